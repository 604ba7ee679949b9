"""A replay shard alone in a process, which the storm kills, with protections taken out on demand.

    python -m distributed_muzero.chaos.shard_process --folder F --config C.json --synced S --connections 7,8,9
        [--without PROTECTION] [--faults SEED]

Each connection is one end of a pipe of `multiprocessing` that the parent left open. A request is (method, arguments);
its answer (True, value) or (False, error in words). The file `--synced` gets a JSON line for each fsync: what a power
cut would leave of the logs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from distributed_muzero.chaos.bad_disk import BadDisk, record_syncs
from distributed_muzero.cluster import group_commit
from distributed_muzero.cluster.group_commit import GroupCommit
from distributed_muzero.config import Config, make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.replay import log_format
from distributed_muzero.replay.log import ReplayLog
from distributed_muzero.replay.schema import Priorities, Targets
from distributed_muzero.replay.store import EpisodeStore
from distributed_muzero.types import Episode
from distributed_muzero.workers.replay_shard import InsertReply, ReplayShard

# "generation": what became of a commit is looked at.   "cut": what a failed one left is cut off.
Protection = Literal["sync", "dedupe", "checksum", "generation", "cut"]
SPEC = EnvironmentSpec("storm", (64,), np.dtype(np.float32), (3,))
BATCH_ROWS = 32
LATE_COMMIT_SECONDS = 0.05  # without "sync", from one commit to the next


class ShardServer:
    """Answers requests in one event loop, as the shard's worker in Ray does; commits run beside it in a thread."""

    def __init__(
        self,
        shard: ReplayShard,
        connections: list[Connection],
        group: GroupCommit,
        disk: BadDisk | None = None,
    ):
        self.shard = shard
        self.connections = connections
        self.group = group
        self.disk = disk
        self.tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Until killed, or until a client has gone."""
        loop = asyncio.get_running_loop()
        gone = loop.create_future()
        for connection in self.connections:
            loop.add_reader(connection.fileno(), self._receive, connection, gone)
        await gone

    def _receive(self, connection: Connection, gone: asyncio.Future) -> None:
        try:
            method, arguments = connection.recv()
        except (EOFError, OSError):
            if not gone.done():
                gone.set_result(None)
            return
        task = asyncio.create_task(self._answer(connection, method, arguments))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _answer(self, connection: Connection, method: str, arguments: tuple) -> None:
        try:
            answer = True, await getattr(self, method)(*arguments)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        # A client that has gone is noticed where it would be heard.
        with contextlib.suppress(OSError):
            connection.send(answer)

    # What clients may call --------------------------------------------------------------------------------------

    async def insert(self, episodes: list[Episode]) -> list[InsertReply]:
        return await group_commit.insert(self.shard, self.group, episodes)

    async def sample(self, num_batches: int) -> dict[str, Any]:
        batches = self.shard.sample_many(num_batches)
        versions = [(batch.positions, batch.weights_versions) for batch in batches]
        return {"batches": versions, **self.limits(), **self.resources()}

    def limits(self) -> dict[str, Any]:
        """The limiter's counts, and how far its balance may go by its own rules."""
        limiter = self.shard.limiter
        return {
            "incarnation": os.getpid(),
            "inserted": limiter.inserted,
            "sampled": limiter.sampled,
            "balance": limiter.balance,
            "error_buffer": limiter.error_buffer,
            "samples_per_insert": limiter.samples_per_insert,
        }

    def resources(self) -> dict[str, int]:
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "disk_faults": self.disk.num_faults if self.disk else 0,
        }

    async def update_priorities(self, update: Priorities) -> None:
        self.shard.update_priorities(update)

    async def take_for_reanalyse(self, max_transitions: int) -> list:
        return self.shard.take_for_reanalyse(max_transitions)

    async def update_targets(self, targets: list[Targets]) -> int:
        return self.shard.update_targets(targets)

    async def flush(self) -> dict[str, float]:
        """The shard's counters; `flushed`: whether the disk refused nothing meanwhile."""
        sampled, failures = self.shard.limiter.sampled, self.shard.stats()["log_failures"]
        await group_commit.flush(self.shard)
        stats = self.shard.stats()
        return {**stats, "sampled_rows": sampled, "flushed": stats["log_failures"] == failures}


def make_storm_config(seed: int) -> Config:
    """A small shard whose log rolls and drops segments, whose ring evicts, and whose limiter holds either side."""
    return make_config(
        {
            "algorithm": {"num_unroll_steps": 2, "td_steps": 3},
            "replay": {
                "max_transitions": 1500,
                "min_size_to_sample": 50,
                "samples_per_insert": 2.0,
                "error_buffer": 400.0,
                "priority_exponent": 0.6,
                "segment_bytes": 2**16,
            },
            "reanalyse": {"ratio": 0.2},
            "learner": {"batch_size": BATCH_ROWS},
            "run": {"seed": seed},
        }
    )


@contextmanager
def taken_out(protection: Protection | None) -> Iterator[None]:
    """Without a protection as long as it lasts; a checksum is always 0 then. "sync" isn't taken out here."""
    finish = ReplayShard.finish
    owner, name, broken = {
        "dedupe": (EpisodeStore, "knows", lambda self, episode_id: False),
        "checksum": (log_format, "checksum", lambda data, start=0: 0),
        "generation": (
            ReplayShard,
            "finish",
            lambda self, offer, _: finish(self, offer, offer.appended.generation),
        ),
        "cut": (ReplayLog, "_cut", lambda self, segment, size: None),
    }.get(protection or "", (None, "", None))
    if owner is None:
        yield
        return
    real = getattr(owner, name)
    setattr(owner, name, broken)
    try:
        yield
    finally:
        setattr(owner, name, real)


def make_group(shard: ReplayShard, acknowledges_early: bool) -> GroupCommit:
    """acknowledges_early: says at once that all is durable, and commits now and then."""
    if not acknowledges_early:
        return GroupCommit(shard.commit)

    def commit_for_ever() -> None:
        while True:
            time.sleep(LATE_COMMIT_SECONDS)
            shard.commit()

    threading.Thread(target=commit_for_ever, daemon=True).start()
    return GroupCommit(lambda: shard.store.log.generation)


def main() -> None:
    parser = argparse.ArgumentParser(description="One replay shard behind pipes.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--synced", type=Path, required=True)
    parser.add_argument("--connections", required=True)
    parser.add_argument("--without", choices=get_args(Protection))
    parser.add_argument("--faults", type=int, help="the seed of a disk that fails at random")
    options = parser.parse_args()
    record_syncs(options.synced, options.without != "sync")
    config = Config.model_validate_json(options.config.read_text())
    connections = [Connection(int(number)) for number in options.connections.split(",")]
    with taken_out(options.without):
        shard = ReplayShard(SPEC, config, 0, options.folder)
        group = make_group(shard, acknowledges_early=options.without == "sync")
        disk = None
        # A shard that can't even recover ends, and is started again: that is no matter of this process.
        if options.faults is not None:
            disk = BadDisk(options.folder, options.faults)
            disk.install()
        asyncio.run(ShardServer(shard, connections, group, disk).serve())


if __name__ == "__main__":
    main()
