"""The fault campaign: what the system promises when something dies, tried again and again from a seed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distributed_muzero.chaos import corruption, log_faults
from distributed_muzero.chaos.kill_points import KILL_POINTS, run_kill_points
from distributed_muzero.chaos.live_run import DEEDS, PATIENCE_SECONDS, LiveResult, run_live
from distributed_muzero.chaos.mutators import run_mutators
from distributed_muzero.chaos.shard_process import Protection
from distributed_muzero.chaos.shard_storm import MODES, Mode, run_storm

# P5 promises no time but learning again: as long as the live run waits for that.
LIMITS = {"P2": 10.0, "P4": 60.0, "P5": PATIENCE_SECONDS, "P11": 25.0}
LIVE_DEEDS = {"shard": 5, "learner": 3, "stop": 5, "driver": 2, "all": 2}

Tell = Callable[[str], None]


@dataclass
class Promise:
    """What was tried of one promise; `seconds` are the times that it promises something about."""

    id: str
    what: str
    n: int = 0
    broken: int = 0
    seconds: list[float] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    def add(
        self, n: int, broken: int | Iterable[str], seconds: Iterable[float] = (), limit: float = 0
    ) -> None:
        """Counts `n` more tries. Of `seconds`, those over `limit` are broken too."""
        self.n += n
        times = list(seconds)
        self.seconds += times
        late = [f"{value:.1f} s, promised {limit:g}" for value in times if value > limit]
        examples = late + ([] if isinstance(broken, int) else list(broken))
        self.broken += len(examples) + (broken if isinstance(broken, int) else 0)
        self.examples = (self.examples + examples)[:10]


# fmt: off
PROMISES = {
    "P2": "a killed shard loses and doubles nothing acknowledged, and is back in 10 s",
    "P3": "a torn tail of a log is cut back to the last whole record, counted",
    "P4": "a killed learner goes on bit for bit from its checkpoint, within 60 s",
    "P5": "a run whose driver, or every process, was killed learns on, nothing acknowledged lost",
    "P8": "a poisoned episode is refused with a reason before it is acknowledged",
    "P10": "a full disk: the previous checkpoint loads, nothing acknowledged is lost",
    "P11": "SIGTERM: a checkpoint, and the end within 25 s",
    "P12": "a corrupt checkpoint is never loaded silently",
    "P13": "files of another version are refused, naming both",
    "P15": "samples per insert stay inside their bounds, also over restarts",
}
# fmt: on


STORM_PROMISES = frozenset({"P2", "P15"})


class Campaign:
    """Runs every check once, then goes on with storms until its time is over."""

    def __init__(self, seed: int, minutes: float, only: set[str], without: Protection | None, tell: Tell):
        self.seed = seed
        self.only = only
        self.without = without
        self.tell = tell
        self.promises = {name: Promise(name, what) for name, what in PROMISES.items()}
        self.acknowledged = self.lost = self.duplicates = 0
        self._deadline = time.monotonic() + 60 * minutes
        self._minutes = minutes

    @property
    def is_broken(self) -> bool:
        return any(promise.broken for promise in self.promises.values())

    def run(self) -> None:
        """Raises DistributedMuZeroError when a check itself can't be carried out."""
        if self.without is None:
            self._check_files()
            self._check_learner()
            self._check_live_run()
        number = 0
        while self._wants(*STORM_PROMISES) and (number < len(MODES) or time.monotonic() < self._deadline):
            self._storm(number, MODES[number % len(MODES)])
            number += 1

    def to_json(self) -> dict[str, Any]:
        rows = []
        for promise in self.promises.values():
            if promise.n or promise.broken:
                row = asdict(promise)
                seconds = sorted(row.pop("seconds"))
                row["median_seconds"] = seconds[len(seconds) // 2] if seconds else None
                row["max_seconds"] = seconds[-1] if seconds else None
                rows.append(row)
        return {
            "promises": rows,
            "seed": self.seed,
            "without": self.without,
            "acknowledged": self.acknowledged,
            "lost": self.lost,
            "duplicates": self.duplicates,
        }

    def _wants(self, *names: str) -> bool:
        return not self.only or bool(self.only.intersection(names))

    def _num(self, whole: int) -> int:
        """How many tries of a costly check: `whole` from 8 minutes on, fewer in less."""
        return max(1, round(whole * min(self._minutes / 8, 1)))

    def _check_files(self) -> None:
        p, seed = self.promises, self.seed
        if self._wants("P3"):
            with self._folder("P3: truncating a log at every byte of its last record") as folder:
                torn = log_faults.run_torn_tails(folder, seed)
                p["P3"].add(torn.n, torn.broken)
        if self._wants("P8"):
            with self._folder("P8: poisoned episodes") as folder:
                mutants = run_mutators(folder, seed)
                p["P8"].add(mutants.n, [*mutants.accepted, *mutants.crashed, *mutants.unusable])
        if self._wants("P10"):
            with self._folder("P10: full disks") as folder:
                full = log_faults.run_disk_full(folder / "log", seed)
                p["P10"].add(full.n, full.lost + full.duplicates + (not full.is_good))
                saved = corruption.run_disk_full(folder / "checkpoints", seed)
                p["P10"].add(saved.n, saved.broken)
        if self._wants("P12"):
            with self._folder("P12: flipped bits and truncations of a checkpoint") as folder:
                damages = corruption.run_corruptions(folder, seed)
                p["P12"].add(damages.n, damages.broken)
        if self._wants("P13"):
            with self._folder("P13: files of other versions") as folder:
                checkpoints = corruption.run_other_versions(folder / "checkpoints", seed)
                p["P13"].add(checkpoints.n, checkpoints.broken)
                logs = log_faults.run_other_formats(folder / "log", seed)
                p["P13"].add(logs.n, logs.broken)
        if self._wants("P15"):
            limits = log_faults.run_limiter(seed)
            p["P15"].add(limits.n, limits.violations)

    def _check_learner(self) -> None:
        if not self._wants("P4"):
            return
        names = choose_points(self.seed, self._num(len(KILL_POINTS)))
        with self._folder(f"P4: killing the learner at {len(names)} points") as folder:
            for result in run_kill_points(folder, self.seed, names):
                self.promises["P4"].add(1, result.broken, [result.seconds_to_resume], LIMITS["P4"])

    def _check_live_run(self) -> None:
        deeds = {deed: self._num(number) for deed, number in LIVE_DEEDS.items() if self._wants(DEEDS[deed])}
        if not deeds:
            return
        with self._folder("P2, P4, P5, P11: a whole run through Ray") as folder:
            live = run_live(folder, self.seed, deeds, self.tell)
        self.add_live(live)

    def add_live(self, live: LiveResult) -> None:
        """Counts a live run. A wrong episode is found at its end only, and counts for one promise."""
        for deed, seconds in live.seconds.items():
            promise = DEEDS[deed]
            self.promises[promise].add(len(seconds), 0, seconds, LIMITS[promise])
        for promise, broken in live.broken.items():
            self.promises[promise].add(0, broken)
        verdict = live.verdict
        self._count(verdict)
        wrong = verdict.lost + verdict.duplicates + verdict.changed + verdict.uninvited
        self.promises["P2" if live.seconds["shard"] else "P5"].add(0, in_words(wrong, verdict.examples))

    def _storm(self, number: int, mode: Mode) -> None:
        with self._folder(f"P2, P15: a storm of kills ({mode}), seed {self.seed + number}") as folder:
            storm = run_storm(
                folder,
                seed=self.seed + number,
                num_kills=self._num(20),
                mode=mode,
                without=self.without,
                flips_bits=mode == "power_cut",
            )
        self._count(storm)
        broken = in_words(storm.wrong, storm.examples)
        self.promises["P2"].add(storm.kills, broken, storm.recovery_seconds, LIMITS["P2"])
        self.promises["P15"].add(storm.kills, storm.limiter_violations)

    def _count(self, result: Any) -> None:
        self.acknowledged += result.acknowledged
        self.lost += result.lost
        self.duplicates += result.duplicates

    @contextmanager
    def _folder(self, what: str) -> Iterator[Path]:
        """A place for one check, which is told of."""
        self.tell(what)
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            yield Path(folder)


def choose_points(seed: int, n: int) -> list[str]:
    """`n` of the kill points, each once."""
    return [str(name) for name in np.random.default_rng(seed).choice(list(KILL_POINTS), n, replace=False)]


def in_words(wrong: int, examples: Sequence[str]) -> int | list[str]:
    """The examples where they are all that is wrong, else how many that is."""
    return list(examples) if 0 < wrong <= len(examples) else wrong
