"""A whole run through Ray, whose processes die: shards, the learner, and everything at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from distributed_muzero import checkpoint
from distributed_muzero.chaos.child import kill_tree
from distributed_muzero.chaos.history import Verdict, check
from distributed_muzero.errors import DistributedMuZeroError
from distributed_muzero.replay.index import shard_of

NUM_SHARDS = 2
PATIENCE_SECONDS = 120.0
OPTIONS = (
    "--set", "run.max_train_steps=null", "--set", "run.max_minutes=null", "--set", "actor.record_history=true",
    "--set", "replay.samples_per_insert=4", "--set", "evaluator.interval_seconds=2", "--actors", "2",
)  # fmt: skip


class LiveResult(NamedTuple):
    shard_seconds: list[float]  # kill -> the shard's next acknowledgement
    learner_seconds: list[float]  # kill -> the next learner step
    steps_lost: list[int]  # learner steps behind the last count, when it went on
    stop_seconds: list[float]  # SIGTERM -> the end of the command
    resume_seconds: list[float]  # kill of everything -> the next learner step, start of Ray included
    broken: list[str]
    verdict: Verdict


def run_live(
    folder: Path,
    seed: int,
    *,
    shard_kills: int = 5,
    learner_kills: int = 3,
    stops: int = 5,
    kills_of_all: int = 2,
    progress: Callable[[str], None] | None = None,
) -> LiveResult:
    """Trains in `folder`/runs with real processes and ends them, in an order that follows from the seed."""
    run = LiveRun(folder, progress or ignore)
    rng = np.random.default_rng(seed)
    result = LiveResult([], [], [], [], [], [], check([], []))
    deeds = ["shard"] * shard_kills + ["learner"] * learner_kills + ["stop"] * stops + ["all"] * kills_of_all
    with run:
        run.start()
        for deed in rng.permutation(deeds):
            time.sleep(float(rng.uniform(0, 1.5)))
            if deed == "shard":
                result.shard_seconds.append(run.kill_shard(rng))
            elif deed == "learner":
                seconds, lost = run.kill_learner()
                result.learner_seconds.append(seconds)
                result.steps_lost.append(lost)
            elif deed == "stop":
                result.stop_seconds.append(run.stop(result.broken))
                run.start()
            else:
                result.resume_seconds.append(run.kill_everything())
        run.stop(result.broken)
    histories = sorted((run.path / "history").glob("*.jsonl"))
    shards = [run.path / "replay" / f"shard_{index}" for index in range(NUM_SHARDS)]
    return result._replace(verdict=check(histories, shards))


class LiveRun:
    """One run, launched again and again. A context manager that ends every process it started."""

    def __init__(self, folder: Path, progress: Callable[[str], None]):
        self.runs = folder / "runs"
        self.path = self.runs / "live"
        self._progress = progress
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = folder / "stderr.txt"
        # Sockets live in Ray's folder, and their paths may not be longer than 107 bytes.
        self._ray = tempfile.TemporaryDirectory(prefix="dm", dir="/tmp", ignore_cleanup_errors=True)

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_everything()
        self._ray.cleanup()

    def start(self) -> None:
        """Launches the run, anew or as it stands, and waits until it learns."""
        command = [sys.executable, "-m", "distributed_muzero"]
        if self.path.exists():
            command += ["resume", str(self.path)]
        else:
            new = (
                "--preset",
                "debug",
                "--runs-dir",
                str(self.runs),
                "--name",
                "live",
                "--shards",
                str(NUM_SHARDS),
            )
            command += ["train", *new, *OPTIONS]
        before = (self.status().get("seconds"), self.env_steps())
        with self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={**os.environ, "RAY_TMPDIR": self._ray.name},
            )
        self._wait(
            "steps of its actors",
            lambda: self.status().get("seconds") != before[0] and self.env_steps() > before[1],
        )
        self._wait_for_steps()

    def kill_shard(self, rng: np.random.Generator) -> float:
        """Kills a shard; returns the seconds until one of its episodes is acknowledged again."""
        processes = self._wait("all shards", self._all_shards)
        victim = processes[int(rng.integers(NUM_SHARDS))]
        parts = {part for file in victim.open_files() for part in Path(file.path).parts}
        shard = next(part for part in parts if part.startswith("shard_"))
        self._progress(f"killing {shard}")
        victim.kill()
        killed = time.monotonic()
        index = int(shard.removeprefix("shard_"))
        return self._wait("an acknowledgement", lambda: self._acknowledged_after(index, killed)) - killed

    def kill_learner(self) -> tuple[float, int]:
        """Kills the learner; returns the seconds until it steps again, and how many steps it made anew."""
        (victim,) = self._wait("the learner", lambda: self._find("LearnerWorker"))
        saved = checkpoint.latest_checkpoint(self.path / "checkpoints")
        steps = int(self.status()["learner_steps"])
        self._progress("killing the learner")
        victim.kill()
        killed = time.monotonic()
        self._wait("another learner", lambda: [p for p in self._find("LearnerWorker") if p.pid != victim.pid])
        self._wait_for_steps()
        return time.monotonic() - killed, steps - (saved.step if saved else 0)

    def stop(self, broken: list[str]) -> float:
        """SIGTERM; returns the seconds until the command has ended with a checkpoint."""
        assert self._process is not None
        self._progress("SIGTERM")
        children = psutil.Process(self._process.pid).children(recursive=True)
        began = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        seconds = time.monotonic() - began
        _, alive = psutil.wait_procs(children, timeout=10)
        saved = checkpoint.latest_checkpoint(self.path / "checkpoints")
        if code != 0 or alive or saved is None or saved.step != self.status()["learner_steps"]:
            at = saved.step if saved else None
            broken.append(
                f"SIGTERM: exit code {code}, {len(alive)} processes left, last checkpoint {at}, "
                f"learner steps {self.status()['learner_steps']}"
            )
            self._end_everything()
        return seconds

    def kill_everything(self) -> float:
        """Kills every process of the run, then resumes it; returns the seconds until it learns again."""
        self._progress("killing everything")
        killed = time.monotonic()
        self._end_everything()
        self.start()
        return time.monotonic() - killed

    def status(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "status.json").read_text())
        except FileNotFoundError:
            return {}

    def env_steps(self) -> int:
        return int(self.status().get("env_steps", 0))

    def _wait_for_steps(self) -> None:
        before = self._newest_steps()
        self._wait("learner steps", lambda: self._newest_steps() not in (None, before))

    def _newest_steps(self) -> tuple[int, int] | None:
        """Learner steps and the version of the last status: one of them changes when it steps."""
        status = self.status()
        return (status["learner_steps"], status["weights_version"]) if status else None

    def _acknowledged_after(self, shard: int, moment: float) -> float | None:
        """Monotonic time of a shard's first acknowledgement after a moment; None before it."""
        times = (
            line["time"]
            for line in self._history()
            if line["event"] == "ok" and shard_of(line["id"], NUM_SHARDS) == shard
        )
        return min((at for at in times if at > moment), default=None)

    def _all_shards(self) -> list[psutil.Process]:
        """Once all of them have opened their logs; none before."""
        found = self._find("ReplayShardWorker")
        with suppress(psutil.Error):
            if len(found) == NUM_SHARDS and all(map(_writes_a_log, found)):
                return found
        return []

    def _history(self) -> Iterator[dict[str, Any]]:
        for path in (self.path / "history").glob("*.jsonl"):
            for line in path.read_text().splitlines():
                with suppress(ValueError):  # the end of a killed actor's file
                    yield json.loads(line)

    def _find(self, role: str) -> list[psutil.Process]:
        """The processes of a Ray class; its name begins the title that Ray gives them."""
        found = []
        for process in self._descendants():
            with suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(f"ray::{role}"):
                    found.append(process)
        return found

    def _descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children(recursive=True) if self._process else []
        except psutil.NoSuchProcess:
            return []

    def _wait(self, what: str, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if found := condition():
                return found
            if self._process is not None and self._process.poll() is not None:
                break
            time.sleep(0.05)
        tail = self._errors.read_text()[-2000:]
        raise DistributedMuZeroError(f"waited in vain for {what}; the run's last words: {tail}")

    def _end_everything(self) -> None:
        if self._process is not None:
            kill_tree(self._process)


def _writes_a_log(process: psutil.Process) -> bool:
    return any("shard_" in file.path for file in process.open_files())


def ignore(text: str) -> None:
    """Nobody wants to know."""
