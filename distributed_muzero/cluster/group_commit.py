"""Many callers, few commits: an fsync costs milliseconds, whether it serves one of them or all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class GroupCommit:
    """One commit at a time, in a thread; whoever comes while one runs shares the next with all others."""

    def __init__(self, commit: Callable[[], None]):
        self._commit = commit
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def done(self) -> None:
        """Returns after a commit that began after this call. Raises what it raised."""
        if self._next is None:
            self._next = asyncio.create_task(self._run(self._running))
        await asyncio.shield(self._next)

    async def _run(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait({before})
        self._running, self._next = self._next, None
        await asyncio.to_thread(self._commit)
