"""Speed of one replay shard: batches out, what the journal adds to them, the learner beside it, episodes in.

Batches and learner are measured in a fresh process, bound to one core and one thread of each library. Inserts go
through real processes to a real log; how fast its disk syncs is reported beside them.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from distributed_muzero.algorithm.targets import make_batch
from distributed_muzero.benchmarks.one_thread import run_on_one_thread
from distributed_muzero.config import Config, make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import ConfigError
from distributed_muzero.replay.index import EpisodeRing, row_bytes
from distributed_muzero.replay.sampler import PrioritizedSampler, UniformSampler
from distributed_muzero.types import Batch, Episode
from distributed_muzero.workers.replay_shard import ReplayShard

CARTPOLE = EnvironmentSpec("CartPole-v1", (4,), np.dtype(np.float32), (2,))
FRAMES = EnvironmentSpec("frames", (96, 96, 4), np.dtype(np.uint8), (5,))
PRIORITY_EXPONENT = 0.6
STEPS_PER_EPISODE = {CARTPOLE.id: 200, FRAMES.id: 100}
BATCHES_PER_CALL = 4  # as the learner's stream asks
NUM_SYNCS = 20

# Acknowledged episodes a second in each turn; cluster/throughput.py.
InsertSpeed = Callable[[Config, Path, Sequence[Episode], int, float, int], list[float]]


class Spread(NamedTuple):
    """Of the turns of one measurement."""

    median: float
    low: float
    high: float


def run_sampling(
    seconds: float = 1.0,
    repeats: int = 5,
    batches: Sequence[int] = (128, 256),
    transitions: int = 1_000_000,
    frame_bytes: int = 1024**3,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Measures batches and learner, in a process of its own.

    seconds: of one measurement, all its turns together.   batches: rows; the learner takes the largest.
    transitions: of CartPole's size that are held.   frame_bytes: what the held frames take at most.
    folder: where logs are written and removed again; the system's place for temporary files when absent.

    Returns {"threads", "shards": one for each kind of observations and of sampling, "index": `transitions` frames
    whose bytes overlap, so that the index is large and the memory isn't, "learner"}. Times are in microseconds a
    batch, as {"median", "low", "high"}. Raises ConfigError.
    """
    if seconds <= 0 or not batches or min(batches) < 1:
        raise ConfigError(f"seconds {seconds}, batches {list(batches)}: expected numbers above 0")
    order = {"seconds": seconds, "repeats": repeats, "batches": list(batches), "transitions": transitions}
    order |= {"frame_bytes": frame_bytes, "folder": None if folder is None else str(folder)}
    return run_on_one_thread(__name__, order)


def run_inserts(
    insert_speed: InsertSpeed,
    seconds: float = 1.0,
    repeats: int = 3,
    episode_bytes: Sequence[int] = (10_000, 100_000, 1_000_000),
    producers: Sequence[int] = (1, 8),
    episodes_per_call: Sequence[int] = (1, 4),
    folder: Path | None = None,
) -> dict[str, Any]:
    """Measures every combination. `episode_bytes`: of all arrays of an episode, which has CartPole's observations.

    Returns {"sync_milliseconds", "inserts": one row for each combination}.
    """
    rows = []
    for size, num_producers, at_once in itertools.product(episode_bytes, producers, episodes_per_call):
        episode = make_episode(CARTPOLE, _num_steps(CARTPOLE, size))
        config = unlimited_config(CARTPOLE, max(1_000_000, 2 * episode.num_steps))
        with tempfile.TemporaryDirectory(dir=folder) as place:
            turns = insert_speed(
                config, Path(place), [episode] * at_once, num_producers, seconds / repeats, repeats
            )
        row: dict[str, Any] = {"episode_bytes": array_bytes(episode), "producers": num_producers}
        row |= {"episodes_per_call": at_once, "episodes_per_second": spread(turns)._asdict()}
        row |= {"megabytes_per_second": median(turns) * array_bytes(episode) / 1e6}
        rows.append(row)
    return {"sync_milliseconds": _sync_milliseconds(folder)._asdict(), "inserts": rows}


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """The result for people. Journal: with what is written before a batch leaves; by 4: as the learner asks."""
    console = console or Console()
    title = "µs for a batch, one thread"
    table = Table("observations", "sampling", "held", "batch", "gather", "+ journal", "by 4", title=title)
    for shard in result["shards"]:
        kind = (shard["observations"], shard["sampling"], f"{shard['transitions']:,}")
        for row in shard["batches"]:
            times = (row[name]["median"] for name in ("without_journal", "with_journal", "of_four"))
            table.add_row(*kind, str(row["batch"]), *(f"{time:,.0f}" for time in times))
    for index in result["index"]:
        kind = ("overlapping frames", index["sampling"], f"{index['transitions']:,}")
        for row in index["batches"]:
            table.add_row(*kind, str(row["batch"]), f"{row['without_journal']['median']:,.0f}", "", "")
    console.print(table)
    learner = result["learner"]
    console.print(
        f"learner on E64, batch {learner['batch']}: {learner['steps_per_second']:,.0f} steps/s; "
        f"the shard makes {learner['ratio']:.1f} times as many batches"
    )
    sync = result["sync_milliseconds"]["median"]
    table = Table(
        "episode", "producers", "a call", "episodes/s", "MB/s", title=f"inserts; a sync takes {sync:.2f} ms"
    )
    for row in result["inserts"]:
        speed = (row["episodes_per_second"]["median"], row["megabytes_per_second"])
        shape = (f"{row['episode_bytes']:,} B", str(row["producers"]), str(row["episodes_per_call"]))
        table.add_row(*shape, *(f"{number:,.0f}" for number in speed))
    console.print(table)


def unlimited_config(spec: EnvironmentSpec, num_rows: int, priority_exponent: float = 0.0) -> Config:
    """One shard of `num_rows` rows whose limiter holds nobody back."""
    sampler_bytes = PrioritizedSampler.ROW_BYTES if priority_exponent else 0
    replay = {
        "max_transitions": num_rows,
        "max_bytes": num_rows * (row_bytes(spec) + sampler_bytes),
        "min_size_to_sample": 1,
        "samples_per_insert": 1e-9,
        "error_buffer": 1e18,
        "priority_exponent": priority_exponent,
    }
    return make_config({"environment": {"id": spec.id}, "replay": replay})


def make_episode(spec: EnvironmentSpec, num_steps: int) -> Episode:
    """A random game that a shard accepts."""
    rng = np.random.default_rng(0)
    shape = (num_steps + 1, *spec.observation_shape)
    policies = rng.random((num_steps, spec.num_actions)).astype(np.float32)
    root_values = rng.random(num_steps + 1).astype(np.float32)
    root_values[-1] = 0
    return Episode(
        episode_id="bench",
        environment_id=spec.id,
        seed=0,
        weights_version=0,
        observations=(255 * rng.random(shape, np.float32)).astype(spec.observation_dtype),
        legal_masks=np.ones((num_steps, spec.num_actions), bool),
        actions=rng.integers(0, spec.num_actions, num_steps, np.int32),
        rewards=np.ones(num_steps, np.float32),
        policies=policies / policies.sum(1, keepdims=True),
        root_values=root_values,
        to_play=np.zeros(num_steps + 1, np.int8),
        terminated=True,
        truncated=False,
    )


def array_bytes(episode: Episode) -> int:
    """Of all its arrays together."""
    return sum(value.nbytes for value in vars(episode).values() if isinstance(value, np.ndarray))


def _num_steps(spec: EnvironmentSpec, num_bytes: int) -> int:
    """Of the longest episode with arrays of no more than `num_bytes`; at least 1."""
    one, two = (array_bytes(make_episode(spec, steps)) for steps in (1, 2))
    return max((num_bytes - one) // (two - one) + 1, 1)


def spread(turns: Sequence[float]) -> Spread:
    return Spread(median(turns), min(turns), max(turns))


# The measurement itself, on whatever threads this process has ----------------------------------------------------


def bench_sampling(
    seconds: float,
    repeats: int,
    batches: Sequence[int],
    transitions: int,
    frame_bytes: int,
    folder: str | None,
) -> dict[str, Any]:
    """See `run_sampling`, which gives it one thread."""
    timer = Timer(seconds / repeats, repeats)
    num_frames = max(frame_bytes // row_bytes(FRAMES), STEPS_PER_EPISODE[FRAMES.id])
    shards: list[dict[str, Any]] = []
    to_learn: list[Batch] = []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        # What is loaded and compiled at the first insert is no part of a shard's size.
        for exponent in (0.0, PRIORITY_EXPONENT):
            _open_shard(CARTPOLE, 1, exponent, Path(place))[1].close()
    for spec, size in ((CARTPOLE, transitions), (FRAMES, num_frames)):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            # The second one goes on with the episodes of the first.
            for exponent in (0.0, PRIORITY_EXPONENT):
                facts, shard = _open_shard(spec, size, exponent, Path(place))
                facts["batches"] = [_time_batches(shard, rows, timer) for rows in batches]
                facts["journal"] = _time_journal(shard, timer)
                shards.append(facts)
                if spec is CARTPOLE and not exponent:
                    shard.batch_size = max(batches)
                    to_learn = shard.sample_many(8)
                shard.close()
                del shard
    index = [
        _time_index(transitions, frame_bytes, exponent, batches, timer)
        for exponent in (0.0, PRIORITY_EXPONENT)
    ]
    learner = _time_learner(to_learn, timer)
    fastest = next(row for row in shards[0]["batches"] if row["batch"] == learner["batch"])
    learner["ratio"] = 1e6 / fastest["with_journal"]["median"] / learner["steps_per_second"]
    return {"threads": 1, "shards": shards, "index": index, "learner": learner}


class Timer(NamedTuple):
    seconds: float  # of one turn
    repeats: int

    def microseconds(self, function: Callable[[], Any]) -> Spread:
        """Of one call. The first call isn't timed: it compiles, allocates."""
        function()
        return spread([self._one_turn(function) for _ in range(self.repeats)])

    def _one_turn(self, function: Callable[[], Any]) -> float:
        calls, elapsed, start = 0, 0.0, time.perf_counter()
        while elapsed < self.seconds:
            function()
            calls += 1
            elapsed = time.perf_counter() - start
        return elapsed / calls * 1e6


def _open_shard(
    spec: EnvironmentSpec, transitions: int, exponent: float, folder: Path
) -> tuple[dict[str, Any], ReplayShard]:
    """A shard with so many transitions, less than one episode; filled if it finds none in `folder`."""
    steps = min(STEPS_PER_EPISODE[spec.id], transitions)
    num_episodes = transitions // steps
    episode = make_episode(spec, steps)
    before, start = _resident_bytes(), time.perf_counter()
    # One row more for each episode, for its final observation.
    shard = ReplayShard(spec, unlimited_config(spec, num_episodes * (steps + 1), exponent), 0, folder)
    was_there = shard.ring.num_episodes > 0
    if not was_there:
        for first in range(0, num_episodes, 10):
            numbers = range(first, min(first + 10, num_episodes))
            shard.insert([replace(episode, episode_id=f"bench/{number}") for number in numbers])
    took, after = time.perf_counter() - start, _resident_bytes()
    held = shard.ring.num_transitions
    facts = {
        "observations": f"{'×'.join(map(str, spec.observation_shape))} {spec.observation_dtype}",
        "sampling": "prioritised" if exponent else "uniform",
        "transitions": held,
        "row_bytes": shard.ring.row_bytes,
        "resident_bytes_per_transition": (after - before) / held if before else None,
        "recovery_seconds" if was_there else "fill_seconds": took,
    }
    return facts, shard


def _time_batches(shard: ReplayShard, rows: int, timer: Timer) -> dict[str, Any]:
    shard.batch_size = rows

    def draw_and_gather() -> Batch:
        drawn = shard.store.sampler.sample(rows, shard.rng)
        unroll, weights = shard.algorithm.num_unroll_steps, drawn.importance_weights
        return make_batch(shard.ring.columns, drawn.rows, shard.history_length, unroll, weights, shard.rng)

    of_four = timer.microseconds(lambda: shard.sample_many(BATCHES_PER_CALL))
    times = {
        "draw": timer.microseconds(lambda: shard.store.sampler.sample(rows, shard.rng)),
        "without_journal": timer.microseconds(draw_and_gather),
        "with_journal": timer.microseconds(shard.sample),
        "of_four": Spread(*(time / BATCHES_PER_CALL for time in of_four)),
    }
    named = {name: time._asdict() for name, time in times.items()}
    return {"batch": rows, **named, "batches_per_second": 1e6 / times["with_journal"].median}


def _time_index(
    transitions: int, frame_bytes: int, exponent: float, batches: Sequence[int], timer: Timer
) -> dict[str, Any]:
    """Batches of frames out of a ring of so many, without a log. Frames begin a few bytes behind one another."""
    small = FRAMES._replace(observation_shape=(1,))
    steps = min(STEPS_PER_EPISODE[FRAMES.id], transitions)
    num_episodes = transitions // steps
    capacity = num_episodes * (steps + 1)
    config = unlimited_config(FRAMES, capacity, exponent)
    ring = EpisodeRing(small, capacity, capacity * (row_bytes(small) + PrioritizedSampler.ROW_BYTES))
    sampler: UniformSampler | PrioritizedSampler = UniformSampler(ring)
    if exponent:
        sampler = PrioritizedSampler(ring, exponent, config.replay.importance_exponent)
    episode = make_episode(small, steps)
    for key in range(num_episodes):
        ring.add(key, replace(episode, episode_id=f"bench/{key}"), episode.root_values, steps)
        entry = ring.get(key)
        assert entry is not None
        sampler.add(entry)
    frame = int(np.prod(FRAMES.observation_shape))
    distance = max((frame_bytes - frame) // capacity, 1)
    content = np.random.default_rng(0).integers(0, 256, distance * capacity + frame, np.uint8)
    frames = np.lib.stride_tricks.sliding_window_view(content, frame)[::distance][:capacity]
    columns = ring.columns._replace(
        observations=frames.reshape(capacity, *FRAMES.observation_shape, copy=False)
    )
    rng = np.random.default_rng(0)

    def draw_and_gather(rows: int) -> Batch:
        drawn = sampler.sample(rows, rng)
        return make_batch(
            columns, drawn.rows, 1, config.algorithm.num_unroll_steps, drawn.importance_weights, rng
        )

    times = {rows: timer.microseconds(partial(draw_and_gather, rows)) for rows in batches}
    return {
        "sampling": "prioritised" if exponent else "uniform",
        "transitions": ring.num_transitions,
        "index_bytes_per_transition": row_bytes(small)
        - 1
        + (PrioritizedSampler.ROW_BYTES if exponent else 0),
        "frame_bytes": frame,
        "batches": [{"batch": rows, "without_journal": spread._asdict()} for rows, spread in times.items()],
    }


def _time_journal(shard: ReplayShard, timer: Timer) -> dict[str, Any]:
    """What a call of `sample_many` writes before its batches leave."""
    before = shard.store.journal.num_bytes
    shard.store.write_state(shard.state())
    num_bytes = shard.store.journal.num_bytes - before
    times = timer.microseconds(lambda: shard.store.write_state(shard.state()))
    return {"bytes": num_bytes, "microseconds": times._asdict()}


def _time_learner(batches: Sequence[Batch], timer: Timer) -> dict[str, Any]:
    """Steps a second on E64. Here torch is loaded, after every shard was weighed."""
    from distributed_muzero.benchmarks.yardstick import make_e64
    from distributed_muzero.config import LearnerConfig
    from distributed_muzero.workers.learner import Learner

    num_rows = len(batches[0].positions)
    learner = Learner(make_e64(), LearnerConfig(batch_size=num_rows, device="cpu", num_threads=1))
    endless = itertools.cycle(batches)
    times = timer.microseconds(lambda: learner.step(next(endless)))
    return {
        "batch": num_rows,
        "microseconds": times._asdict(),
        "steps_per_second": 1e6 / times.median,
    }


def _resident_bytes() -> int:
    """What this process has in memory; 0 where the system doesn't tell it in /proc."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def _sync_milliseconds(folder: Path | None) -> Spread:
    """Of one fsync behind 4 KB that were appended to a file."""
    times = []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(NUM_SYNCS):
            file.write(bytes(4096))
            start = time.perf_counter()
            os.fsync(file.fileno())
            times.append(1e3 * (time.perf_counter() - start))
    return spread(times)


def _main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(json.dumps(bench_sampling(**json.loads(sys.argv[1]))))


if __name__ == "__main__":
    _main()
