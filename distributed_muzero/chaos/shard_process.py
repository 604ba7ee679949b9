"""A replay shard alone in a process, which the storm kills: commits in groups, with protections taken out on demand.

    python -m distributed_muzero.chaos.shard_process --folder F --config C.json --synced S --connections 7,8,9
        [--without sync|dedupe|checksum]

Each connection is one end of a pipe of `multiprocessing` that the parent left open. A request is (method, arguments);
its answer (True, value) or (False, error in words). The file `--synced` gets a JSON line for each fsync: what a power
cut would leave of the logs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distributed_muzero.config import Config, make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import LogError
from distributed_muzero.replay import log
from distributed_muzero.replay.schema import Priorities, Targets
from distributed_muzero.replay.store import EpisodeStore
from distributed_muzero.types import Episode
from distributed_muzero.workers.replay_shard import InsertReply, Offer, ReplayShard

Protection = Literal["sync", "dedupe", "checksum"]
SPEC = EnvironmentSpec("storm", (64,), np.dtype(np.float32), (3,))
BATCH_ROWS = 32
LATE_COMMIT_SECONDS = 0.05  # without "sync", from the acknowledgement to the commit


class ShardServer:
    """Answers requests in one event loop; commits run beside it in a thread, each for all offers before it."""

    def __init__(self, shard: ReplayShard, connections: list[Connection], acknowledges_early: bool = False):
        self.shard = shard
        self.connections = connections
        self.acknowledges_early = acknowledges_early
        self.waiting: list[tuple[Offer, Connection]] = []
        self.wanted = asyncio.Event()

    async def serve(self) -> None:
        """Until killed, or until a client has gone."""
        loop = asyncio.get_running_loop()
        gone = loop.create_future()
        for connection in self.connections:
            loop.add_reader(connection.fileno(), self._receive, connection, gone)
        commits = asyncio.create_task(self._commit_for_ever())
        await asyncio.wait({gone, commits}, return_when=asyncio.FIRST_COMPLETED)
        if commits.done():
            commits.result()

    def _receive(self, connection: Connection, gone: asyncio.Future) -> None:
        try:
            method, arguments = connection.recv()
            if method == "insert":
                self._begin(connection, *arguments)
            else:
                connection.send((True, getattr(self, method)(*arguments)))
        except (EOFError, OSError):
            if not gone.done():
                gone.set_result(None)
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}"))

    def _begin(self, connection: Connection, episodes: list[Episode]) -> None:
        offer = self.shard.begin(episodes)
        self.waiting.append((offer, connection))
        if self.acknowledges_early:
            connection.send((True, offer.replies))
        self.wanted.set()

    async def _commit_for_ever(self) -> None:
        while True:
            await self.wanted.wait()
            if self.acknowledges_early:
                await asyncio.sleep(LATE_COMMIT_SECONDS)
            self.wanted.clear()
            waiting, self.waiting = self.waiting, []
            try:
                await asyncio.to_thread(self.shard.commit)
            except LogError as error:
                replies = [self.shard.abandon(offer, error) for offer, _ in waiting]
            else:
                replies = [self.shard.finish(offer) for offer, _ in waiting]
            self._answer([connection for _, connection in waiting], replies)

    def _answer(self, connections: list[Connection], replies: list[list[InsertReply]]) -> None:
        if not self.acknowledges_early:
            for connection, reply in zip(connections, replies, strict=True):
                connection.send((True, reply))

    # What clients may call besides `insert` ---------------------------------------------------------------------

    def sample(self, num_batches: int) -> dict[str, Any]:
        batches = self.shard.sample_many(num_batches)
        versions = [(batch.positions, batch.weights_versions) for batch in batches]
        return {"batches": versions, **self.limits()}

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

    def update_priorities(self, update: Priorities) -> None:
        self.shard.update_priorities(update)

    def take_for_reanalyse(self, max_transitions: int) -> list:
        return self.shard.take_for_reanalyse(max_transitions)

    def update_targets(self, targets: list[Targets]) -> int:
        return self.shard.update_targets(targets)

    def flush(self) -> dict[str, float]:
        self.shard.flush()
        return self.shard.stats()


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
    """Without deduplication, or with a checksum that is always 0, as long as it lasts."""
    owner, name, broken = {
        "dedupe": (EpisodeStore, "knows", lambda self, episode_id: False),
        "checksum": (log, "checksum", lambda data, start=0: 0),
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


def record_syncs(path: Path, syncs: bool) -> None:
    """From now on os.fsync writes to `path` what it made durable: a file's length, or the names in a folder.

    syncs: False for a disk that does nothing at all when asked.
    """
    real = os.fsync
    record = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def fsync(descriptor: Any) -> None:
        if not syncs:
            return
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        target = Path(os.readlink(f"/proc/self/fd/{number}"))
        # What is there before the call: only that is promised after it.
        if target.is_dir():
            durable: dict[str, Any] = {"folder": str(target), "names": os.listdir(target)}
        else:
            durable = {"file": str(target), "length": os.fstat(number).st_size}
        real(number)
        os.write(record, json.dumps(durable).encode() + b"\n")

    vars(os)["fsync"] = fsync


def main() -> None:
    parser = argparse.ArgumentParser(description="One replay shard behind pipes.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--synced", type=Path, required=True)
    parser.add_argument("--connections", required=True)
    parser.add_argument("--without", choices=["sync", "dedupe", "checksum"])
    options = parser.parse_args()
    record_syncs(options.synced, options.without != "sync")
    config = Config.model_validate_json(options.config.read_text())
    connections = [Connection(int(number)) for number in options.connections.split(",")]
    with taken_out(options.without):
        shard = ReplayShard(SPEC, config, 0, options.folder)
        server = ShardServer(shard, connections, acknowledges_early=options.without == "sync")
        with contextlib.suppress(BrokenPipeError):
            asyncio.run(server.serve())


if __name__ == "__main__":
    main()
