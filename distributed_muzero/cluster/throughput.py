"""How fast one shard acknowledges episodes that other processes offer it, each of them durable by then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from distributed_muzero.cluster.program import ReplayShardWorker
from distributed_muzero.config import Config
from distributed_muzero.errors import DistributedMuZeroError
from distributed_muzero.types import Episode


@ray.remote(num_cpus=1)
class Producer:
    """Offers copies of the same episodes under ever new ids, as fast as they are acknowledged."""

    def __init__(self, shard: Any, name: str, episodes: Sequence[Episode]):
        self.shard = shard
        self.name = name
        self.episodes = episodes
        self.num_stored = 0

    def offer(self, seconds: float) -> int:
        """One call at a time for so long, and at least one; returns how many episodes were acknowledged."""
        before, deadline = self.num_stored, time.monotonic() + seconds
        while self.num_stored == before or time.monotonic() < deadline:
            offered = [
                replace(episode, episode_id=f"{self.name}/{self.num_stored + i}")
                for i, episode in enumerate(self.episodes)
            ]
            for reply in ray.get(self.shard.insert.remote(offered)):
                if reply.status != "stored":
                    raise DistributedMuZeroError(f"the shard answered {reply.status}: {reply.reason}")
            self.num_stored += len(offered)
        return self.num_stored - before


def insert_speed(
    config: Config,
    folder: Path,
    episodes: Sequence[Episode],
    num_producers: int,
    seconds: float,
    repeats: int,
) -> list[float]:
    """Acknowledged episodes a second, all producers together, one number for each of `repeats` turns.

    episodes: of one call.   seconds: of one turn.   Needs a Ray session with a CPU for each producer; the shard
    writes into `folder`. Raises DistributedMuZeroError if an episode isn't stored.
    """
    shard = ReplayShardWorker.remote(config, "bench", 0, folder)  # type: ignore[attr-defined]
    producers = [
        Producer.remote(shard, f"bench/{i}", episodes)  # type: ignore[attr-defined]
        for i in range(num_producers)
    ]
    try:
        # Starts the processes.
        ray.get([producer.offer.remote(0.0) for producer in producers])
        speeds = []
        for _ in range(repeats):
            start = time.perf_counter()
            num_stored = sum(ray.get([producer.offer.remote(seconds) for producer in producers]))
            speeds.append(num_stored / (time.perf_counter() - start))
        return speeds
    finally:
        for worker in (*producers, shard):
            ray.kill(worker)
