"""A shard in an event loop: what waits for the disk runs in threads, so that the loop goes on sampling meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from distributed_muzero.errors import LogError
from distributed_muzero.types import Episode
from distributed_muzero.workers.replay_shard import InsertReply, ReplayShard


class GroupCommit:
    """Many callers, few commits: an fsync costs milliseconds, whether it serves one of them or all.

    One commit at a time, in a thread; whoever comes while one runs shares the next with all others.
    """

    def __init__(self, commit: Callable[[], int]):
        self._commit = commit
        self._running: asyncio.Task[int] | None = None
        self._next: asyncio.Task[int] | None = None

    async def done(self) -> int:
        """What a commit returned that began after this call. Raises what it raised."""
        if self._next is None:
            self._next = asyncio.create_task(self._run(self._running))
        return await asyncio.shield(self._next)

    async def _run(self, before: asyncio.Task[int] | None) -> int:
        if before is not None:
            await asyncio.wait({before})
        self._running, self._next = self._next, None
        return await asyncio.to_thread(self._commit)


async def insert(shard: ReplayShard, group: GroupCommit, episodes: list[Episode]) -> list[InsertReply]:
    """As ReplayShard.insert, but for the segments that hold nothing any more: `flush` drops them."""
    offer = shard.begin(episodes)
    try:
        generation = await group.done()
    except LogError as error:
        return shard.abandon(offer, str(error))
    except BaseException as error:
        shard.abandon(offer, repr(error))
        raise
    return shard.finish(offer, generation)


async def flush(shard: ReplayShard) -> None:
    """As ReplayShard.flush."""
    async with shard.one_flush:
        with suppress(LogError), shard.store.flushing(shard.state()) as wait_for_disk:
            await asyncio.to_thread(wait_for_disk)
