"""A whole run through Ray, whose processes die: shards, the learner, the driver, and everything at once.

What is judged is what the run itself writes: its status, its checkpoints, and the histories of its actors.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from distributed_muzero import checkpoint
from distributed_muzero.chaos.child import (
    DEATH_SECONDS,
    POLL_SECONDS,
    becomes_true,
    has_ended,
    kill_session,
    living,
)
from distributed_muzero.chaos.history import Verdict, check
from distributed_muzero.errors import DistributedMuZeroError
from distributed_muzero.replay.index import shard_of
from distributed_muzero.run_folder import open_run

NUM_SHARDS = 2
PATIENCE_SECONDS = 120.0
DEEDS = {"shard": "P2", "learner": "P4", "stop": "P11", "driver": "P5", "all": "P5"}  # and what they try
OPTIONS = (
    "--set", "run.max_train_steps=null", "--set", "run.max_minutes=null", "--set", "actor.record_history=true",
    "--set", "replay.samples_per_insert=4", "--set", "evaluator.interval_seconds=2", "--actors", "2",
    "--shards", str(NUM_SHARDS), "--preset", "debug", "--name", "live",
)  # fmt: skip


class LiveResult(NamedTuple):
    """Of each deed the seconds from the kill: until a shard acknowledges again, the learner steps again (the start of
    Ray included where it died), or, after SIGTERM, the command has ended."""

    seconds: dict[str, list[float]]
    steps_lost: list[int]  # learner steps made again, after each kill of a learner, driver or everything
    broken: dict[str, list[str]]  # by promise
    verdict: Verdict


def run_live(
    folder: Path, seed: int, deeds: Mapping[str, int], progress: Callable[[str], None] | None = None
) -> LiveResult:
    """Trains in `folder`/runs with real processes and ends them.

    deeds: how often each of `DEEDS` is done; their order and moments follow from the seed. A deed that the run doesn't
    survive is the last one. Raises DistributedMuZeroError if the run doesn't even start.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation([deed for deed, number in deeds.items() for _ in range(number)])
    seconds: dict[str, list[float]] = {deed: [] for deed in DEEDS}
    with LiveRun(folder, progress or ignore) as run:
        run.start()
        try:
            for deed in order:
                time.sleep(float(rng.uniform(0, 1.5)))
                seconds[deed].append(run.do(deed, rng))
            deed = "stop"
            seconds[deed].append(run.stop())
        except DistributedMuZeroError as error:
            run.broken[DEEDS[deed]].append(f"{deed}: {error}")
    histories = sorted((run.path / "history").glob("*.jsonl"))
    shards = [run.path / "replay" / f"shard_{index}" for index in range(NUM_SHARDS)]
    # Bytes don't limit so small episodes.
    capacity = open_run(run.path).config.replay.max_transitions // NUM_SHARDS
    verdict = check(histories, shards, capacity=capacity)
    broken = {promise: texts for promise, texts in run.broken.items() if texts}
    return LiveResult(seconds, run.steps_lost, broken, verdict)


class Stand(NamedTuple):
    """What a status says of the learner."""

    learner_steps: int
    weights_version: int


class Judgement(NamedTuple):
    learns: bool  # steps were seen that the new learner made
    lowest_steps: int
    broken: list[str]


def judge(before: Stand, after: Sequence[Stand], saved_step: int) -> Judgement:
    """Of a learner that takes a lost one's place.

    before: the last status of the lost one.   after: what statuses said since there was another, in order; the first
    may still speak of the lost one, or of the checkpoint.   saved_step: of the newest intact checkpoint at the kill.
    """
    lowest = min((stand.learner_steps for stand in after), default=before.learner_steps)
    broken = []
    if lowest < saved_step:
        broken.append(f"a learner at step {lowest}, behind its checkpoint of step {saved_step}")
    for earlier, later in pairwise([before, *after]):
        if later.weights_version < earlier.weights_version:
            broken.append(f"weights version {later.weights_version} after {earlier.weights_version}")
    of_the_new_one = dropwhile(lambda stand: stand == after[0], after)
    learns = any(later.learner_steps > earlier.learner_steps for earlier, later in pairwise(of_the_new_one))
    return Judgement(learns, lowest, broken)


def first_acknowledgement(
    history: Iterable[Mapping[str, Any]], shard: int, moment: float, num_shards: int = NUM_SHARDS
) -> float | None:
    """When a shard acknowledged the first episode that was offered, or offered again, after a moment; None before.

    history: an actor's lines, in order (workers/history.py).   Times in monotonic seconds.
    """
    offered: dict[str, float] = {}
    for line in history:
        if line["event"] == "invoke":
            offered[line["id"]] = line["time"]
        elif (
            line["event"] == "ok"
            and shard_of(line["id"], num_shards) == shard
            and offered[line["id"]] > moment
        ):
            return line["time"]
    return None


class LiveRun:
    """One run, launched again and again. A context manager that ends every process it started."""

    def __init__(self, folder: Path, progress: Callable[[str], None]):
        self.path = folder / "runs" / "live"
        self.broken: defaultdict[str, list[str]] = defaultdict(list)
        self.steps_lost: list[int] = []
        self._progress = progress
        self._launches: list[subprocess.Popen[bytes]] = []
        self._highest_version = 0
        self._highest_rise = 0  # of learner steps from one status to the next
        self._errors = folder / "stderr.txt"
        # Sockets live in Ray's folder, and their paths may not be longer than 107 bytes.
        self._ray = tempfile.TemporaryDirectory(prefix="dm", dir="/tmp", ignore_cleanup_errors=True)

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_everything()
        self._ray.cleanup()

    def start(self) -> None:
        """Launches the run for the first time, and waits until it learns."""
        self._launch("train", "--runs-dir", str(self.path.parent), *OPTIONS)
        self._watch("P5", Stand(0, 0), 0)

    def do(self, deed: str, rng: np.random.Generator) -> float:
        """Does one of `DEEDS` to the run that learns, and leaves one that learns."""
        if deed == "shard":
            return self.kill_shard(int(rng.integers(NUM_SHARDS)))
        # A learner that began anew must show behind the checkpoint before it can have passed it.
        self._wait("a late checkpoint", lambda: self._saved_step() > 2 * self._highest_rise)
        if deed == "stop":
            seconds = self.stop()
            self._resume(DEEDS[deed])
            return seconds
        return {"learner": self.kill_learner, "driver": self.kill_driver, "all": self.kill_all}[deed]()

    def kill_shard(self, shard: int) -> float:
        """Returns the seconds until another process acknowledged an episode that was offered to it."""
        victim = self._wait(f"shard {shard}", lambda: self._shard_process(shard))
        self._progress(f"killing shard {shard}")
        victim.kill()
        killed = time.monotonic()
        psutil.wait_procs([victim], DEATH_SECONDS)
        dead = time.monotonic()
        self._wait(f"another shard {shard}", lambda: self._shard_process(shard) not in (None, victim))
        return self._wait("an acknowledgement", lambda: self._acknowledged_after(shard, dead)) - killed

    def kill_learner(self) -> float:
        """Returns the seconds until another one learns."""
        (victim,) = self._wait("the learner", lambda: self._find("LearnerWorker"))
        before, saved_step = self._last_stand(), self._saved_step()
        self._progress("killing the learner")
        victim.kill()
        killed = time.monotonic()
        self._wait("another learner", lambda: [p for p in self._find("LearnerWorker") if p != victim])
        self.steps_lost.append(self._watch("P4", before, saved_step))
        return time.monotonic() - killed

    def kill_driver(self) -> float:
        """Kills the command alone, and resumes at once, beside what is left; returns the seconds until it learns."""
        self._progress("killing the driver")
        os.kill(self._process.pid, signal.SIGKILL)
        killed = time.monotonic()
        self._wait_for_end(DEATH_SECONDS)
        self.steps_lost.append(self._resume("P5"))
        return time.monotonic() - killed

    def kill_all(self) -> float:
        """Kills every process of the run, then resumes it; returns the seconds until it learns again."""
        self._progress("killing everything")
        killed = time.monotonic()
        self._end_everything()
        self.steps_lost.append(self._resume("P5"))
        return time.monotonic() - killed

    def stop(self) -> float:
        """SIGTERM; returns the seconds until the command has ended. Broken if it left a process or no checkpoint."""
        self._progress("SIGTERM")
        began = time.monotonic()
        os.kill(self._process.pid, signal.SIGTERM)
        self._wait_for_end(PATIENCE_SECONDS)
        seconds = time.monotonic() - began
        becomes_true(lambda: not living(self._process), DEATH_SECONDS)
        left = len(living(self._process))
        kill_session(self._process)
        code, saved_step, steps = self._process.returncode, self._saved_step(), self._stand().learner_steps
        if code != 0 or left or saved_step != steps:
            self.broken["P11"].append(
                f"SIGTERM: exit code {code}, {left} processes left, last checkpoint {saved_step}, "
                f"learner steps {steps}"
            )
        return seconds

    def _resume(self, promise: str) -> int:
        """Goes on with the run, whose driver is dead; returns the steps lost once it learns and its actors play."""
        before, saved_step, env_steps = self._last_stand(), self._saved_step(), self._env_steps()
        self._launch("resume", str(self.path))
        lost = self._watch(promise, before, saved_step)
        self._wait("steps of its actors", lambda: self._env_steps() > env_steps)
        return lost

    def _launch(self, *arguments: str) -> None:
        with self._errors.open("ab") as errors:
            launch = subprocess.Popen(
                [sys.executable, "-m", "distributed_muzero", *arguments],
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={**os.environ, "RAY_TMPDIR": self._ray.name},
                start_new_session=True,
            )
        self._launches.append(launch)

    def _watch(self, promise: str, before: Stand, saved_step: int) -> int:
        """Waits until steps of a new learner show in the statuses from now on; returns how many it does again.

        What the statuses break is written down also when the wait is in vain.
        """
        after: list[Stand] = []
        last = self._status_time()

        def learns() -> bool:
            nonlocal last
            if (written := self._status_time()) != last:
                last = written
                after.append(self._stand())
            return judge(before, after, saved_step).learns

        try:
            self._wait("learner steps", learns)
        finally:
            judgement = judge(before, after, saved_step)
            self.broken[promise] += judgement.broken
            rises = (later.learner_steps - earlier.learner_steps for earlier, later in pairwise(after))
            self._highest_rise = max([self._highest_rise, *rises])
        # A checkpoint may be newer than the last status.
        return max(before.learner_steps, saved_step) - judgement.lowest_steps

    # What the run has written -----------------------------------------------------------------------------------

    def _status(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "status.json").read_text())
        except FileNotFoundError:
            return {}

    def _status_time(self) -> int:
        with suppress(FileNotFoundError):
            return (self.path / "status.json").stat().st_mtime_ns
        return 0

    def _env_steps(self) -> int:
        return int(self._status().get("env_steps", 0))

    def _stand(self) -> Stand:
        status = self._status()
        stand = Stand(status.get("learner_steps", 0), status.get("weights_version", 0))
        self._highest_version = max(self._highest_version, stand.weights_version)
        return stand

    def _last_stand(self) -> Stand:
        """Of what is about to be replaced, with the highest version of the whole run: none may come below it."""
        stand = self._stand()
        return stand._replace(weights_version=self._highest_version)

    def _saved_step(self) -> int:
        """Of the newest intact checkpoint; 0 before the first."""
        saved = checkpoint.latest_checkpoint(self.path / "checkpoints")
        return saved.step if saved else 0

    def _acknowledged_after(self, shard: int, moment: float) -> float | None:
        found = (
            first_acknowledgement(read_history(path), shard, moment)
            for path in (self.path / "history").glob("*.jsonl")
        )
        return min((time for time in found if time is not None), default=None)

    # Its processes ----------------------------------------------------------------------------------------------

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        """The command of the last launch: the driver."""
        return self._launches[-1]

    def _shard_process(self, shard: int) -> psutil.Process | None:
        """The one that holds a shard's log open."""
        for process in self._find("ReplayShardWorker"):
            with suppress(psutil.Error):
                if any(f"shard_{shard}" in Path(file.path).parts for file in process.open_files()):
                    return process
        return None

    def _find(self, role: str) -> list[psutil.Process]:
        """The processes of a Ray class; its name begins the title that Ray gives them."""
        found = []
        for process in living(self._process):
            with suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(f"ray::{role}"):
                    found.append(process)
        return found

    def _wait(self, what: str, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if found := condition():
                return found
            if has_ended(self._process):
                break
            time.sleep(POLL_SECONDS)
        tail = self._errors.read_text()[-2000:]
        raise DistributedMuZeroError(f"waited in vain for {what}; the run's last words: {tail}")

    def _wait_for_end(self, seconds: float) -> None:
        becomes_true(lambda: has_ended(self._process), seconds)

    def _end_everything(self) -> None:
        for launch in self._launches:
            kill_session(launch)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Its whole lines: an actor may die in the middle of one, or be writing it."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def ignore(text: str) -> None:
    """Nobody wants to know."""
