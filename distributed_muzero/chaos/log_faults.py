"""Faults of the disk below a replay shard, and of its limiter: promises P3, P10, P13 and P15."""

from __future__ import annotations

import argparse
import json
import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero.chaos.child import run_with_offsets
from distributed_muzero.chaos.history import check
from distributed_muzero.chaos.mutators import make_episode
from distributed_muzero.config import Config, make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import DistributedMuZeroError, LogError
from distributed_muzero.replay import log_format
from distributed_muzero.replay.rate_limiter import RateLimiter
from distributed_muzero.types import Episode
from distributed_muzero.workers.history import RecordedInsert
from distributed_muzero.workers.outbox import Outbox
from distributed_muzero.workers.replay_shard import InsertReply, ReplayShard
from distributed_muzero.workers.run_state import ActorReport

SPEC = EnvironmentSpec("faults", (2,), np.dtype(np.float32), (3,))
NUM_BEFORE = 3  # records before the last one
SEGMENT_BYTES = 2**16

Progress = Callable[[str], None]


class TornTailResult(NamedTuple):
    n: int  # lengths that the log was cut to
    broken: list[str]


class FormatResult(NamedTuple):
    n: int
    broken: list[str]


class FullDiskResult(NamedTuple):
    n: int  # offsets at which the disk was full
    refused: int  # at which the shard said `wait`, with a reason
    lost: int  # acknowledged episodes that a restarted shard doesn't hold
    duplicates: int
    broken: list[str]  # what else went wrong

    @property
    def is_good(self) -> bool:
        return self.refused == self.n and not (self.lost or self.duplicates or self.broken)


class LimiterResult(NamedTuple):
    n: int  # operations
    restores: int
    violations: int


# P3 ---------------------------------------------------------------------------------------------------------------


def run_torn_tails(folder: Path, seed: int, progress: Progress | None = None) -> TornTailResult:
    """Cuts a shard's log of episodes, and its journal, at every byte of their last records, and restarts the shard.

    All episodes before must be there, and the cut be counted; the shard must take the lost one again.
    """
    rng = np.random.default_rng(seed)
    whole = folder / "whole"
    episodes = [make_episode(rng, SPEC, 4, f"torn/{number}") for number in range(NUM_BEFORE + 1)]
    with closing(_shard(whole)) as shard:
        for episode in episodes[:-1]:
            shard.insert([episode])
        shard.flush()
        sizes = [_newest_segment(whole / name).stat().st_size for name in ("episodes", "journal")]
        shard.insert(episodes[-1:])
        shard.flush()
        # As a kill would leave it: without what close() writes.
        shutil.copytree(whole, folder / "killed")
    broken: list[str] = []
    n = 0
    for name, first in zip(("episodes", "journal"), sizes, strict=True):
        for length in range(first, _newest_segment(folder / "killed" / name).stat().st_size):
            n += 1
            if problem := _torn_at(folder, name, length, length == first, episodes):
                broken.append(f"{name} cut to {length} bytes: {problem}")
        if progress:
            progress(f"{name}: {n} lengths")
    return TornTailResult(n, broken)


def _torn_at(folder: Path, name: str, length: int, is_whole: bool, episodes: list[Episode]) -> str:
    """What is wrong with a shard whose log `name` was cut to that length; nothing if all is well."""
    torn = folder / "torn"
    shutil.rmtree(torn, ignore_errors=True)
    shutil.copytree(folder / "killed", torn)
    segment = _newest_segment(torn / name)
    with segment.open("r+b") as file:
        file.truncate(length)
    expected = episodes[:-1] if name == "episodes" else episodes
    try:
        with _untold(), closing(_shard(torn)) as shard:
            held = [entry.episode_id for entry in shard.ring]
            counted = shard.stats()["corrupt_records"]
            again = shard.insert(episodes[-1:])[0].status
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if held != [episode.episode_id for episode in expected]:
        return f"it holds {held}"
    if counted != (not is_whole):
        return f"{counted} damaged places were counted"
    return "" if again == ("stored" if name == "episodes" else "duplicate") else f"the last one is {again}"


# P10 --------------------------------------------------------------------------------------------------------------


def run_disk_full(folder: Path, seed: int, n: int = 20, progress: Progress | None = None) -> FullDiskResult:
    """`check_disk_full` in a process of its own, whose file size limits bind nobody else."""
    found = run_with_offsets("distributed_muzero.chaos.log_faults", folder, seed, n)
    if progress:
        progress(f"{n} offsets")
    return FullDiskResult(**found)


def check_disk_full(folder: Path, seed: int, n: int) -> FullDiskResult:
    """Fills a shard `n` times from an outbox while no file may grow beyond a random size; then with room again."""
    rng = np.random.default_rng(seed)
    refused = lost = duplicates = 0
    broken: list[str] = []
    for attempt in range(n):
        place = folder / str(attempt)
        place.mkdir(parents=True)
        # Files of one record up to those of some.
        limit = int(rng.integers(0, 3000))
        try:
            refused += _fill_full_disk(place, rng, limit)
        except Exception as error:
            broken.append(f"limit {limit}: {type(error).__name__}: {error}")
            continue
        verdict = check([place / "history.jsonl"], [place / "shard"], _config().replay.max_transitions)
        lost += verdict.lost
        duplicates += verdict.duplicates
        if verdict.stored != 2 * NUM_ON_FULL_DISK or verdict.changed or verdict.uninvited:
            broken.append(f"limit {limit}: {verdict}")
    return FullDiskResult(n, refused, lost, duplicates, broken)


NUM_ON_FULL_DISK = 10  # episodes, each in a record of about 1 kB


def _fill_full_disk(place: Path, rng: np.random.Generator, limit: int) -> bool:
    """Whether the shard said `wait` with a reason. Leaves its folder as a kill would, and everything stored."""
    waits: list[str] = []
    is_full = True
    with closing(_shard(place / "shard")) as shard:

        def insert(offers: dict[int, list[Episode]]) -> dict[int, list[InsertReply]]:
            # The history has a disk of its own.
            with _files_up_to(limit if is_full else None):
                replies = shard.insert(offers[0])
            waits.extend(reply.reason for reply in replies if reply.status == "wait")
            return {0: replies}

        recorded = RecordedInsert(insert, place / "history.jsonl")
        outbox, report = Outbox(recorded, num_shards=1, limit=10**6), ActorReport()
        for number in range(NUM_ON_FULL_DISK):
            outbox.put(make_episode(rng, SPEC, 20, f"full/{number}"))
            outbox.flush(report)
            with _files_up_to(limit):
                shard.sample_many(1)
                shard.flush()
        is_full = False
        for number in range(NUM_ON_FULL_DISK, 2 * NUM_ON_FULL_DISK):
            outbox.put(make_episode(rng, SPEC, 20, f"full/{number}"))
            outbox.flush(report)
        # The first offer after a refusal brings one episode only, to ask.
        outbox.flush(report)
        if len(outbox):
            raise DistributedMuZeroError(f"with room again, {len(outbox)} episodes still wait")
        if shard.stats()["log_failures"] == 0:
            raise DistributedMuZeroError("no failure was counted")
        recorded.close()
    return bool(waits) and all("can't write the replay log" in reason for reason in waits)


@contextmanager
def _files_up_to(num_bytes: int | None) -> Iterator[None]:
    """As long as it lasts, no file of this process can grow beyond that size; the kernel says EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if num_bytes is None else num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# P13 --------------------------------------------------------------------------------------------------------------


def run_other_formats(folder: Path, seed: int) -> FormatResult:
    """A log of another format version must be refused by a message that names theirs and ours, and stay as it is."""
    rng = np.random.default_rng(seed)
    ours = log_format.FORMAT_VERSION
    versions = (ours + 1, ours + 2, int(rng.integers(ours + 3, 2**32)))
    broken = []
    for name in ("episodes", "journal"):
        for version in versions:
            place = folder / f"{name}_{version}"
            with closing(_shard(place)) as shard:
                shard.insert([make_episode(rng, SPEC, 4, "other/0")])
            path = _newest_segment(place / name)
            _rewrite_version(path, version)
            before = path.read_bytes()
            try:
                _shard(place).close()
                broken.append(f"{name} of format {version} was read")
            except LogError as error:
                if f"format {version}," not in str(error) or f"format {ours};" not in str(error):
                    broken.append(f"{name} of format {version}: {error}")
            if path.read_bytes() != before:
                broken.append(f"{name} of format {version} was changed")
    return FormatResult(2 * len(versions), broken)


def _rewrite_version(path: Path, version: int) -> None:
    header = log_format.SEGMENT.pack(log_format.MAGIC, version, 0)[:-4]
    data = path.read_bytes()
    path.write_bytes(header + log_format.checksum(header).to_bytes(4, "little") + data[len(header) + 4 :])


# P15 --------------------------------------------------------------------------------------------------------------


def run_limiter(seed: int, n: int = 10_000) -> LimiterResult:
    """Random inserts, samples and restores with random limits; counts what leaves the bounds, or stands still."""
    rng = np.random.default_rng(seed)
    restores = violations = 0
    limiter, rows, longest = _random_limiter(rng)
    for number in range(n):
        if number % 500 == 0:
            limiter, rows, longest = _random_limiter(rng)
        if rng.random() < 0.05:
            limiter = _restarted(limiter)
            restores += 1
        can_insert, can_sample = limiter.can_insert(), limiter.can_sample(rows)
        if can_insert and rng.random() < 0.5:
            limiter.count_insert(int(rng.integers(1, longest + 1)))
        elif can_sample:
            limiter.count_sample(rows)
        violations += not (can_insert or can_sample)
        violations += not _is_inside(limiter, longest)
    return LimiterResult(n, restores, violations)


def _random_limiter(rng: np.random.Generator) -> tuple[RateLimiter, int, int]:
    """A limiter, the rows of a batch, and the steps of the longest episode."""
    rows = int(rng.integers(1, 300))
    slack = float(rng.uniform(1, 5)) * rows
    return RateLimiter(float(rng.uniform(0.1, 64)), int(rng.integers(1, 500)), slack), rows, 50


def _restarted(limiter: RateLimiter) -> RateLimiter:
    fresh = RateLimiter(limiter.samples_per_insert, limiter.min_size, limiter.error_buffer)
    fresh.restore(json.loads(json.dumps(limiter.state())))
    return fresh


def _is_inside(limiter: RateLimiter, longest: int) -> bool:
    """One episode may pass the upper bound; below the minimum size nothing is sampled."""
    highest = limiter.error_buffer + longest * limiter.samples_per_insert
    lowest = -limiter.error_buffer if limiter.sampled else -limiter.min_size * limiter.samples_per_insert
    return lowest - 1e-6 <= limiter.balance <= highest + 1e-6


# ------------------------------------------------------------------------------------------------------------------


def _config() -> Config:
    replay: dict[str, Any] = {"segment_bytes": SEGMENT_BYTES, "min_size_to_sample": 20}
    replay |= {"samples_per_insert": 1.0, "error_buffer": 1e6}
    return make_config({"replay": replay, "algorithm": {"num_unroll_steps": 2}, "learner": {"batch_size": 4}})


def _shard(folder: Path) -> ReplayShard:
    return ReplayShard(SPEC, _config(), 0, folder)


@contextmanager
def _untold() -> Iterator[None]:
    """A shard says aloud what it misses. Where that was taken from it a hundred times, nobody wants to read it."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _newest_segment(folder: Path) -> Path:
    return max(folder.glob("segment_*.log"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Fills replay shards on a disk that is full at random offsets."
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--offsets", type=int, default=20)
    options = parser.parse_args()
    print(json.dumps(check_disk_full(options.folder, options.seed, options.offsets)._asdict()))


if __name__ == "__main__":
    main()
