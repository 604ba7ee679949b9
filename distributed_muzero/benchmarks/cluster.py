"""The data plane under synthetic actors: what shards carry, and what the driver's loop costs.

Sizes are those of CartPole (episodes of 10 KB) and of 96×96×4 frames (370 KB). Every simulation counts what was
acknowledged against what lies in the shards' logs afterwards.
"""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from distributed_muzero.benchmarks.replay import CARTPOLE, FRAMES, array_bytes, make_episode
from distributed_muzero.benchmarks.yardstick import make_e64
from distributed_muzero.config import Config, LearnerConfig, make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import ConfigError
from distributed_muzero.observability.progress import Progress
from distributed_muzero.replay import log_format
from distributed_muzero.replay.index import row_bytes
from distributed_muzero.replay.schema import decode_episodes
from distributed_muzero.run_folder import create_run
from distributed_muzero.types import Batch
from distributed_muzero.workers.bookkeeper import Bookkeeper
from distributed_muzero.workers.learner import Learner

NUM_STEPS = {CARTPOLE.id: 200, FRAMES.id: 10}  # of an episode
BATCH_ROWS = {CARTPOLE.id: 256, FRAMES.id: 64}
MAX_BYTES = 6e9  # that the shards' rings may take
# Rows that the learner takes for each transition: few, so that inserts are what is measured.
SAMPLES_PER_INSERT = 0.1
MAX_HOSTS = 4
PACED_EPISODES = 50.0  # a second, of all actors together

# cluster/simulation.py: (config, book, spec, players, make_learner, seconds) -> Measured
Simulate = Callable[..., Any]
MakePlayers = Callable[..., Any]


class IdleLearner(Learner):
    """Takes batches, makes versions, learns nothing."""

    def __init__(self, config: LearnerConfig):
        super().__init__(make_e64(), config)
        self.num_bytes = 0  # of the batches that it took

    def step(self, batch: Batch) -> dict[str, float]:
        self.num_bytes += sum(array.nbytes for array in batch if isinstance(array, np.ndarray))
        self.num_steps += 1
        if self.num_steps % self.config.publish_interval == 0:
            self.version += 1
            self._publish()
        return {"train/staleness": float(self.version - batch.weights_versions.mean())}


class Setting(NamedTuple):
    """Of one simulation."""

    spec: EnvironmentSpec
    num_actors: int
    num_shards: int
    episodes_per_second: float | None  # of all actors together; None = as fast as they are acknowledged


def run(
    simulate: Simulate,
    make_players: MakePlayers,
    actors: Sequence[int] = (10, 100, 500),
    shards: Sequence[int] = (1, 2, 4),
    seconds: float = 5.0,
    repeats: int = 3,
    folder: Path | None = None,
    specs: Sequence[EnvironmentSpec] = (CARTPOLE, FRAMES),
) -> dict[str, Any]:
    """Measures every number of shards under `loading_actors(actors)` actors that go as fast as they can, and every
    number of actors at one slow rate of episodes, which shows what the driver does for each of them.

    seconds: of one turn, with all actors at work.   repeats: turns; the one in the middle is given.
    folder: where logs are written and removed again; the system's place for temporary files when absent.

    Returns {"shards": one row for each kind of episode and number of shards, "actors": one for each number of them}.
    Raises ConfigError for impossible numbers, ClusterError.
    """
    if min(*actors, *shards, repeats) < 1 or seconds <= 0:
        raise ConfigError(
            f"actors {list(actors)}, shards {list(shards)}, seconds {seconds}, repeats {repeats}: "
            "expected numbers above 0"
        )
    measure = partial(median_turn, simulate, make_players, seconds=seconds, repeats=repeats, folder=folder)
    loading = loading_actors(actors)
    return {
        "shards": [measure(Setting(spec, loading, number, None)) for spec in specs for number in shards],
        "actors": [measure(Setting(CARTPOLE, number, 1, PACED_EPISODES)) for number in actors],
    }


def loading_actors(actors: Sequence[int]) -> int:
    """How many play while shards are measured: the most that are asked for, but no more than 100."""
    return min(max(actors), 100)


def median_turn(
    simulate: Simulate,
    make_players: MakePlayers,
    setting: Setting,
    seconds: float,
    repeats: int,
    folder: Path | None,
) -> dict[str, Any]:
    """The turn whose episodes a second (paced: driver's CPU) are in the middle, and those of all turns."""
    turns = [one_turn(simulate, make_players, setting, seconds, folder) for _ in range(repeats)]
    name = "episodes_per_second" if setting.episodes_per_second is None else "driver_cpu"
    turns.sort(key=lambda turn: turn[name])
    return {**turns[len(turns) // 2], "turns": [turn[name] for turn in turns]}


def one_turn(
    simulate: Simulate, make_players: MakePlayers, setting: Setting, seconds: float, folder: Path | None
) -> dict[str, Any]:
    """One simulation, and whether all that was acknowledged is stored."""
    spec, num_actors, num_shards, pace = setting
    config = make_simulation_config(setting)
    episode = make_episode(spec, NUM_STEPS[spec.id])
    players = make_players(num_actors, min(MAX_HOSTS, num_actors), episode, episodes_per_second=pace)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        run_folder = create_run(place, "bench", config)
        with Progress(Console(file=io.StringIO())) as progress:
            book = Bookkeeper(config, run_folder, progress)
            measured = simulate(config, book, spec, players, partial(IdleLearner, config.learner), seconds)
            book.close("stopped")
        kept = conserved(measured.counts, stored_ids(run_folder.replay), measured.shard_stats)
    length, episodes = measured.seconds, measured.episodes
    return {
        "observations": f"{'×'.join(map(str, spec.observation_shape))} {spec.observation_dtype}",
        "episode_bytes": array_bytes(episode),
        "actors": num_actors,
        "shards": num_shards,
        "seconds": length,
        "episodes_per_second": episodes / length,
        "transitions_per_second": episodes * episode.num_steps / length,
        "megabytes_per_second": episodes * array_bytes(episode) / length / 1e6,
        "batches_per_second": measured.batches / length,
        "batch_megabytes_per_second": measured.batches * measured.batch_bytes / length / 1e6,
        "play_calls_per_second": measured.play_calls / length,
        "idle_share": measured.idle_seconds / (num_actors * length),
        "driver_cpu": measured.driver_cpu / length,
        "driver_cpu_microseconds_per_call": 1e6 * measured.driver_cpu / max(measured.play_calls, 1),
        "cpu": {kind: share / length for kind, share in sorted(measured.cpu.items()) if share > 0},
        **kept,
    }


def make_simulation_config(setting: Setting) -> Config:
    """A real limiter between actors and learner, and room for all that can be played."""
    spec, num_actors, num_shards, pace = setting
    rows = BATCH_ROWS[spec.id]
    sections = {
        "actor": {"num_actors": num_actors, "timeout_seconds": 3600},
        "environment": {"id": spec.id},
        "evaluator": {"interval_seconds": 1e6},
        "learner": {"batch_size": rows, "device": "cpu", "publish_interval": 200 if pace is None else 20},
        "replay": {
            "num_shards": num_shards,
            "max_transitions": int(MAX_BYTES / row_bytes(spec)),
            "max_bytes": int(MAX_BYTES),
            "min_size_to_sample": 10 * NUM_STEPS[spec.id],
            "samples_per_insert": SAMPLES_PER_INSERT,
            "error_buffer": 100.0 * rows * num_shards,
        },
    }
    return make_config(sections)


def stored_ids(replay: Path) -> list[str]:
    """The ids of all episodes in the shards' logs, as often as they are there."""
    return [
        stored.episode.episode_id
        for folder in sorted(replay.glob("shard_*"))
        for record in log_format.read(folder / "episodes")
        for stored in decode_episodes(record.payload)
    ]


def conserved(counts: Any, stored: Sequence[str], stats: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Acknowledged episodes against stored ones; `lost`, `twice` and `left` are 0 in a whole run."""
    times = Counter(stored)
    evicted = sum(shard["evicted_transitions"] for shard in stats)
    return {
        "acknowledged": len(counts.acknowledged),
        "stored": len(stored),
        "lost": sum(name not in times for name in counts.acknowledged),
        "twice": len(stored) - len(times),
        "unacknowledged": len(times.keys() - set(counts.acknowledged)),
        "left": counts.left,
        "refused": counts.statuses["rejected"],
        "evicted_transitions": int(evicted),
    }


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """The result for people. CPU: 1 is one core."""
    console = console or Console()
    table = Table(
        "observations", "shards", "actors", "episodes/s", "steps/s", "MB/s in", "MB/s out", "lost, twice",
        title="as fast as shards acknowledge",
    )  # fmt: skip
    for row in result["shards"]:
        speeds = (row["episodes_per_second"], row["transitions_per_second"], row["megabytes_per_second"])
        numbers = (*speeds, row["batch_megabytes_per_second"])
        kind = (row["observations"], str(row["shards"]), str(row["actors"]))
        table.add_row(*kind, *(f"{number:,.1f}" for number in numbers), f"{row['lost']}, {row['twice']}")
    console.print(table)
    table = Table(
        "actors", "play calls/s", "driver's CPU", "µs a call", "actors idle", title="slow actors, one shard"
    )
    for row in result["actors"]:
        cost = f"{row['driver_cpu_microseconds_per_call']:,.0f}"
        calls = f"{row['play_calls_per_second']:,.0f}"
        table.add_row(str(row["actors"]), calls, f"{row['driver_cpu']:.2f}", cost, f"{row['idle_share']:.0%}")
    console.print(table)
