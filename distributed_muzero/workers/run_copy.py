"""The copy of a run's folder that is kept at a URI while the run goes on, and those of its shards."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from distributed_muzero.errors import RunError
from distributed_muzero.mirror import uri as uris
from distributed_muzero.mirror.download import files_at
from distributed_muzero.mirror.mirror import Mirror, keep_pushing
from distributed_muzero.mirror.owner import interval_at
from distributed_muzero.workers.run_state import Steady

COPIED_BY_SHARDS = ("replay", "replay.resharding", "replay.before-resharding")
INTERVAL_VARIABLE = "DISTRIBUTED_MUZERO_COPY_SECONDS"
INTERVAL_SECONDS = 30.0
# Of all mirrors of a process together. Nothing is begun after it, but one request that hangs may hold the process up
# for its own time limit (mirror/remote.py).
LAST_PUSH_SECONDS = 8.0
MAX_MESSAGES = 100

logger = logging.getLogger(__name__)


class Owned(NamedTuple):
    """What a shard's own process needs to know of the run's copy."""

    uri: str
    token: str  # of the driver; no shard takes its copy back from another run's
    run: str  # id; a folder that an earlier run of this name has left is emptied


class Copies:
    """The copies that this process makes of a run: of its folder, and of shards that have no process of their own."""

    def __init__(self, folder: Path, uri: str):
        """Raises RunError for a URI that can't be one."""
        self.uri = uri
        self._folder = folder
        self._messages: deque[str] = deque(maxlen=MAX_MESSAGES)
        self._told_of_shards = False
        self._run = self._mirror(folder, uri, COPIED_BY_SHARDS)
        self._shards: list[Mirror] = []
        self._steady = Steady()

    def _mirror(
        self, folder: Path, uri: str, exclude: Collection[str] = (), run: str | None = None
    ) -> Mirror:
        return make_mirror(folder, uri, exclude, run, self._messages.append)

    def owner_elsewhere(self) -> str | None:
        """Who went on with the run last, in words; None if it was this folder's last process. Raises RunError."""
        return self._run.owner_elsewhere()

    def interval_elsewhere(self) -> float | None:
        """Seconds between the copies of who went on with it last; None if it doesn't say. Raises RunError."""
        return interval_at(self.uri)

    def require_room(self, num_shards: int) -> None:
        """Raises RunError if what `claim` would fetch, for so many shards too, has no room on this machine's disk."""
        shards = [self._mirror(*shard_place(self._folder, self.uri, i)) for i in range(num_shards)]
        num_bytes = sum(mirror.bytes_to_fetch() for mirror in (self._run, *shards))
        num_free = shutil.disk_usage(self._folder).free
        if num_bytes > num_free:
            raise RunError(
                f"the run at {uris.shown(self.uri)} takes {num_bytes} bytes, the disk of {self._folder} has room for "
                f"{num_free}: make room, or name another disk by {uris.STATE_VARIABLE}; nothing has been taken over"
            )

    def claim(self) -> None:
        """Makes this process the owner; the folder is as new as the copy afterwards. Raises RunError."""
        self._run.claim()

    @property
    def was_fetched(self) -> bool:
        """Whether the last owner may have done more than this folder knows of; until `settle`, in any process."""
        return self._run.was_fetched

    def settle(self) -> None:
        """A launch has begun, durably, that allows for it. Raises RunError."""
        self._run.settle()

    @property
    def owned(self) -> Owned:
        assert self._run.run is not None
        return Owned(self.uri, self._run.token, self._run.run)

    def claim_new(self) -> None:
        """As `claim`, of a copy that isn't there yet, and makes it. Raises RunError if there is one by now."""
        self._run.claim(must_be_new=True)
        self._run.push(required=True)

    def claim_shards(self, num_shards: int) -> None:
        """The same for the shards' folders: where they are opened in this process."""
        places = [shard_place(self._folder, self.uri, i) for i in range(num_shards)]
        self._shards = [self._mirror(*place, run=self._run.run) for place in places]
        for mirror in self._shards:
            mirror.claim()

    def release_shards(self) -> None:
        """The shards' own processes copy them from now on."""
        self._shards = []

    def push(self) -> None:
        """Copies all that is new; the shards' first: only then does the run say that they have imported something.

        Raises RunError if the store refuses.
        """
        for mirror in (*self._shards, self._run):
            mirror.push(required=True)

    @contextmanager
    def keep_pushing(self, once_more: bool = True) -> Iterator[None]:
        """Copies in the background, and `once_more` in the end."""
        with keep_pushing([self._run, *self._shards], once_more):
            yield

    def has_episodes(self) -> bool:
        """Whether any shard's copy has stored any. Raises RunError."""
        return any("/episodes/segment_" in name for name in files_at(uris.join(self.uri, "replay")))

    def check(self) -> None:
        """Raises RunError if another process has taken the run over."""
        for mirror in (self._run, *self._shards):
            mirror.check()

    def messages(self) -> Iterator[str]:
        """What the mirrors' threads have had to tell since the last call."""
        while self._messages:
            yield self._messages.popleft()

    def state(self, shards: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """Of all copies of the run: URI, seconds since the oldest one's last push (None before the first), failures.

        shards: what the shards tell of themselves.
        """
        own = [mirror.stats() for mirror in (self._run, *self._shards)]
        seconds = [stats["seconds_since_push"] for stats in own]
        seconds += [shard["seconds_since_push"] for shard in shards if "seconds_since_push" in shard]
        failures_of_shards = self._steady.counts(
            {"copy/failures": sum(shard.get("failed_pushes", 0) for shard in shards)}
        )["copy/failures"]
        if failures_of_shards and not self._told_of_shards:
            self._told_of_shards = True
            self._messages.append("a replay shard's copy is out of date for now; it is tried again")
        return {
            "uri": uris.shown(self.uri),
            "seconds_since_push": round(max(seconds), 1),
            "failures": int(sum(stats["failures"] for stats in own) + failures_of_shards),
        }


class ShardCopy:
    """The copy that a shard's own process makes."""

    def __init__(self, run: Path, owned: Owned, index: int):
        """Makes the shard's folder as new as its copy, or newer; the shard opens it afterwards. Raises RunError."""
        make_mirror(run, owned.uri).require_owner(owned.token)
        self._mirror = make_mirror(*shard_place(run, owned.uri, index), run=owned.run)
        self._mirror.claim(may_be_late=True)
        self._claimed_at = time.monotonic()
        self._pushing = ExitStack()

    def begin(self) -> None:
        self._pushing.enter_context(self._mirror.keep_pushing())

    def stats(self) -> dict[str, float]:
        """Beside the shard's own. Raises RunError if another process has taken the run over."""
        self._mirror.check()
        stats = self._mirror.stats()
        return {
            "seconds_since_push": min(stats["seconds_since_push"], time.monotonic() - self._claimed_at),
            "failed_pushes": stats["failures"],
        }

    def end(self) -> str | None:
        """Copies once more, for LAST_PUSH_SECONDS at most, and then no more; returns what went wrong."""
        began = time.monotonic()
        self._pushing.close()
        try:
            self._mirror.check()
        except RunError as error:
            return str(error)
        if self._mirror.stats()["seconds_since_push"] <= time.monotonic() - began:
            return None
        return self._mirror.last_failure or f"it wasn't done in {LAST_PUSH_SECONDS:g} s"


def make_mirror(
    folder: Path,
    uri: str,
    exclude: Collection[str] = (),
    run: str | None = None,
    tell: Callable[[str], None] = logger.warning,
) -> Mirror:
    return Mirror(
        folder,
        uri,
        exclude=exclude,
        interval_seconds=interval_seconds(),
        last_push_seconds=LAST_PUSH_SECONDS,
        run=run,
        tell=tell,
    )


def shard_place(run: Path, uri: str, index: int) -> tuple[Path, str]:
    """Where a run's shard lies, and its copy."""
    return run / "replay" / f"shard_{index}", uris.join(uri, "replay", f"shard_{index}")


def interval_seconds() -> float:
    """From one push to the next; DISTRIBUTED_MUZERO_COPY_SECONDS. Raises RunError if that is no such number."""
    text = os.environ.get(INTERVAL_VARIABLE) or str(INTERVAL_SECONDS)
    with suppress(ValueError):
        if 0.1 <= float(text) <= 3600:
            return float(text)
    raise RunError(
        f"{INTERVAL_VARIABLE}={text}: expected seconds from 0.1 to 3600, such as {INTERVAL_SECONDS:g}"
    )
