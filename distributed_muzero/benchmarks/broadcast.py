"""From the learner's step to the last actor: seconds, copies, and what it costs the learner.

Learner, shard and actors are those of a run, with an MLP that has as many weights as asked for; the actors take the
weights and play no step.
"""

from __future__ import annotations

import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from distributed_muzero.benchmarks.replay import CARTPOLE, make_episode, spread
from distributed_muzero.config import Config, make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import ConfigError
from distributed_muzero.networks.registry import make_networks
from distributed_muzero.types import Batch
from distributed_muzero.workers.learner import Learner

FLOAT32_BYTES = 4
EPISODE_STEPS = 200
MAX_WIDTH = 20_000  # of a hidden layer: 8 GB
SIZES = ((0.1, "float32"), (5.0, "float32"), (100.0, "float32"), (100.0, "float16"), (100.0, "bfloat16"))
MOMENTS = ("packed", "offered", "first", "last")

# cluster/broadcasting.py: (config, folder, episode, make_learner, num_actors, repeats) -> Broadcast
Measure = Callable[..., Any]


class TimedLearner(Learner):
    """Notes when each version was made, and how long each step took the thread that steps."""

    def __init__(self, config: Config, spec: EnvironmentSpec):
        self.made_at: dict[int, float] = {}
        self.timed: list[
            tuple[float, float]
        ] = []  # seconds of each step, and of it, of setting a version aside
        self._publish_seconds = 0.0
        super().__init__(make_networks(spec, 1, config.network), config.learner)

    def step(self, batch: Batch) -> dict[str, float]:
        start = time.perf_counter()
        metrics = super().step(batch)
        self.timed.append((time.perf_counter() - start, self._publish_seconds))
        return metrics

    def _publish(self) -> None:
        self.made_at[self.version] = time.monotonic()
        start = time.perf_counter()
        super()._publish()
        self._publish_seconds = time.perf_counter() - start


def run(
    measure: Measure,
    num_actors: int = 8,
    sizes: Sequence[tuple[float, str]] = SIZES,
    repeats: int = 10,
) -> dict[str, Any]:
    """Measures each (MB of float32 weights, dtype on their way), `repeats` versions of each kind.

    Returns {"actors", "sizes": one row each}; times in milliseconds as {"median", "low", "high"}. Raises ConfigError
    for impossible numbers, ClusterError.
    """
    if num_actors < 1 or repeats < 1 or not sizes or min(size for size, _ in sizes) <= 0:
        raise ConfigError(f"{num_actors} actors, {repeats} repeats, sizes {list(sizes)}: expected above 0")
    rows = [measure_size(measure, size, dtype, num_actors, repeats) for size, dtype in sizes]
    return {"actors": num_actors, "repeats": repeats, "sizes": rows}


def measure_size(
    measure: Measure, megabytes: float, dtype: str, num_actors: int, repeats: int
) -> dict[str, Any]:
    width = bisect_left(range(MAX_WIDTH), megabytes * 1e6, key=num_bytes, lo=1)
    config = make_broadcast_config(width, dtype)
    make_learner = partial(TimedLearner, config, CARTPOLE)
    with tempfile.TemporaryDirectory() as folder:
        episode = make_episode(CARTPOLE, EPISODE_STEPS)
        found = measure(config, Path(folder), episode, make_learner, num_actors, repeats)
    row: dict[str, Any] = {"float32_bytes": num_bytes(width), "dtype": dtype}
    for name in ("quiet", "busy"):
        trips = getattr(found, name)
        row[name] = {moment: milliseconds(getattr(trip, moment) for trip in trips) for moment in MOMENTS}
    for name in ("alone", "giving", "sending"):
        steps = getattr(found, name)
        times = {"step": milliseconds(steps.step), "setting_aside": milliseconds(steps.publish)}
        row[f"learner_{name}"] = {**times, "steps": len(steps.step)}
    return row | {"private_bytes": growth(found.private)}


def growth(private: Any) -> dict[str, float]:
    """Of an actor's own memory, in the middle of all actors, in bytes."""
    before, *others = private
    grown = [median(now - then for now, then in zip(moment, before, strict=True)) for moment in others]
    return {
        "before": median(before),
        **dict(zip(("by_viewing", "by_taking", "in_the_end"), grown, strict=True)),
    }


def milliseconds(seconds: Iterable[float]) -> dict[str, float]:
    return spread([1e3 * number for number in seconds])._asdict()


def num_bytes(width: int) -> int:
    """Of the network's weights as float32, with hidden layers of this width."""
    config = make_broadcast_config(width, "float32")
    with torch.device("meta"):
        networks = make_networks(CARTPOLE, 1, config.network)
    tensors = (*networks.parameters(), *networks.buffers())
    return FLOAT32_BYTES * sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())


def make_broadcast_config(width: int, dtype: str) -> Config:
    """Every step makes a version, and no limiter holds the learner back."""
    sections = {
        "network": {"hidden_sizes": [width, width], "embedding_size": 64},
        "actor": {"envs_per_actor": 1},
        "learner": {"batch_size": 1, "publish_interval": 1, "weights_dtype": dtype, "device": "cpu"},
        "replay": {"min_size_to_sample": 1, "samples_per_insert": 1.0, "error_buffer": 1e12},
    }
    return make_config(sections)


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """The result for people: medians."""
    console = console or Console()
    table = Table(
        "MB", "dtype", "packed", "offered", "first", "last", "last, learner busy", "private MB",
        title=f"ms from the learner's step to {result['actors']} actors",
    )  # fmt: skip
    for row in result["sizes"]:
        times = [row["quiet"][moment] for moment in MOMENTS] + [row["busy"]["last"]]
        private = (row["private_bytes"][name] / 1e6 for name in ("by_viewing", "by_taking"))
        size = (f"{row['float32_bytes'] / 1e6:,.1f}", row["dtype"])
        table.add_row(
            *size, *(f"{time['median']:,.1f}" for time in times), " + ".join(f"{mb:,.1f}" for mb in private)
        )
    console.print(table)
    table = Table(
        "MB", "dtype", "step", "given out", "to actors", "setting aside", title="ms of a learner step"
    )
    for row in result["sizes"]:
        steps = [row[f"learner_{name}"]["step"] for name in ("alone", "giving", "sending")]
        steps.append(row["learner_alone"]["setting_aside"])
        size = (f"{row['float32_bytes'] / 1e6:,.1f}", row["dtype"])
        table.add_row(*size, *(f"{time['median']:,.1f}" for time in steps))
    console.print(table)
