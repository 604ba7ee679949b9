"""Keeps a copy of a run's folder, or of one replay shard's, at a URI: the run goes on elsewhere if its machine is lost.

Training never waits for a copy. Whose it is: owner.py.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path, PurePosixPath

from distributed_muzero.errors import RunError, first_line
from distributed_muzero.mirror.download import remote_files
from distributed_muzero.mirror.owner import OwnedCopy, logger
from distributed_muzero.mirror.plan import (
    Stamp,
    Unsteady,
    checkpoint_of,
    folders_of,
    is_record,
    look,
    marked_step,
    may_be_newer,
    removal_order,
    stage,
    step_of,
    upload_order,
)
from distributed_muzero.mirror.remote import RemoteError
from distributed_muzero.mirror.uri import shown

# Written anew with every copy in the background, and while one goes on.
ALIVE = ".alive"
MAX_PASSES = 5
MAX_NAMED = 3  # files in a message
OWNER_SECONDS = 1.0  # for so long, nobody looks again whether the copy is still ours
RECORD_BYTES_PER_SECOND = 256 * 1024  # what copies of one growing record may take; it is copied as a whole


class Mirror(OwnedCopy):
    """Copies one folder to a URI. `claim` comes first; then `push`, or `keep_pushing`, from any thread."""

    def __init__(
        self,
        local: Path,
        uri: str,
        *,
        exclude: Collection[str] = (),
        interval_seconds: float = 30.0,
        last_push_seconds: float = 15.0,
        run: str | None = None,
        tell: Callable[[str], None] = logger.warning,
        clock: Callable[[], float] = time.monotonic,
    ):
        """As `OwnedCopy`.   last_push_seconds: how long the end waits for the last push."""
        super().__init__(
            local, uri, exclude=exclude, interval_seconds=interval_seconds, run=run, tell=tell, clock=clock
        )
        self.last_push_seconds = last_push_seconds
        self._unreadable: list[str] = []  # in this pass
        self._gone: set[str] = set()  # checkpoints that went in this pass
        self._not_before: dict[str, float] = {}  # when a large record's turn comes again
        self._counts = {"files": 0, "bytes": 0, "removed": 0}
        self._last_success: float | None = None
        self._one_push = threading.Lock()
        self._given_up = threading.Event()

    def stats(self) -> dict[str, float]:
        """Since `claim`: copied files and bytes, removed files, failed pushes; seconds since the last whole push, or
        infinite."""
        last = self._last_success
        seconds = float("inf") if last is None else self._clock() - last
        return {**self._counts, "failures": self.num_failures, "seconds_since_push": seconds}

    def push(self, *, required: bool = False, everything: bool = True) -> bool:
        """Copies what is new or changed; True if all is there that was here when it began.

        A failure is counted, told once, and made good by the next push; `required` raises it as a RunError. Without
        `everything`, records that only people read are copied the less often the larger they are. Raises RunError if
        another process has taken over.
        """
        if not self._tokens:
            raise RuntimeError("push() before claim()")
        with self._one_push:
            self.check()
            began = self._clock()
            try:
                self._push(everything)
            except RunError:
                raise
            # Whatever the store's client raises: the next push tries again.
            except Exception as error:
                self._fail(first_line(error))
                if required:
                    raise RunError(f"the run's copy can't be made: {error}") from error
                return False
            if self.last_failure:
                self._tell(f"the copy at {shown(self.uri)} is up to date again")
            self.last_failure = None
            self._last_success = began
            return True

    def _push(self, everything: bool) -> None:
        before = dict(self._copied)
        try:
            for _ in range(MAX_PASSES):
                self._check_time()
                self._check_not_replaced()
                remote = remote_files(self._remote, self.exclude)
                local = look(self.local, self.exclude)
                self._unreadable.clear()
                self._gone.clear()
                if self._copy_changed(local, remote, everything):
                    if self._unreadable:
                        raise OSError("; ".join(self._unreadable[:MAX_NAMED]))
                    self._remove(self._stale(local, remote), folders_of(local))
                    self._copied = {name: stamp for name, stamp in self._copied.items() if name in local}
                    if not everything:
                        self._show_life()
                    return
            raise Unsteady(f"files in {self.local} go faster than they can be copied")
        finally:
            if self._copied != before:
                self._write_state()

    def _go_on(self) -> None:
        """Before each step of a push. Raises RunError for a new owner, RemoteError if the last push's time is over."""
        self._check_time()
        self._check_and_show_life()

    def _check_time(self) -> None:
        if self._given_up.is_set():
            raise RemoteError(
                f"the last copy to {shown(self.uri)} wasn't done after {self.last_push_seconds:g} s"
            )

    def _check_and_show_life(self) -> None:
        """A push may take longer than the others' patience."""
        if self._check_not_replaced(OWNER_SECONDS):
            self._show_life()

    def _show_life(self) -> None:
        self._remote.write_bytes(ALIVE, uuid.uuid4().hex.encode())

    def _copy_changed(self, local: Mapping[str, Stamp], remote: Mapping[str, int], everything: bool) -> bool:
        """False if a file went meanwhile, so that the folder has to be looked at again."""

        def has_changed(name: str) -> bool:
            stamp = local[name]
            is_due = everything or self._clock() >= self._not_before.get(name, -float("inf"))
            return is_due and (self._copied.get(name) != stamp or remote.get(name) != stamp.num_bytes)

        changed = sorted(filter(has_changed, local), key=upload_order)
        kept: set[str] = set()
        for _, names in groupby(changed, key=stage):
            is_whole = True
            for name in names:
                folder = checkpoint_of(name)
                if folder in self._gone:
                    continue
                self._go_on()
                if folder and folder not in kept and f"{folder}/DONE" in remote:
                    self._keep_checkpoint(folder, remote)
                    kept.add(folder)
                is_whole = self._copy(name, local[name]) and is_whole
            if not is_whole or not self._has_checkpoint(local):
                return False
        return True

    def _has_checkpoint(self, local: Mapping[str, Stamp]) -> bool:
        """Whether one is whole there by now, if any went meanwhile."""
        done = {
            name
            for name in local
            if checkpoint_of(name) not in (None, *self._gone) and name.endswith("/DONE")
        }
        return not self._gone or any(self._copied.get(name) == local[name] for name in done)

    def _stale(self, local: Mapping[str, Stamp], remote: Mapping[str, int]) -> set[str]:
        """What is there and not here. A checkpoint that seems gone may be about to be replaced."""
        needed = {f"{folder}.replaced" for folder in self._gone}
        return {name for name in remote if name not in local and name.rpartition("/")[0] not in needed}

    def _copy(self, name: str, stamp: Stamp) -> bool:
        """Copies the bytes that were there when it was looked at; False if the folder has to be looked at again.

        One that can't be read keeps no other from being copied.
        """
        try:
            with (self.local / name).open("rb") as file:
                now = Stamp.of(os.fstat(file.fileno()))
                if now.inode != stamp.inode:
                    # A newer best.json may name a checkpoint that wasn't there when the folder was looked at.
                    if not may_be_newer(name):
                        return False
                    stamp = now
                if PurePosixPath(name).name == "best.json" and self._gone:
                    step = marked_step(file.read())
                    if step is None or step in map(step_of, (f"{folder}/DONE" for folder in self._gone)):
                        return False
                    file.seek(0)
                self._remote.write(name, file, stamp.num_bytes, self._check_and_show_life)
        except FileNotFoundError:
            folder = checkpoint_of(name)
            if folder is None or (self.local / folder).exists():
                return False
            self._gone.add(folder)
            return True
        except OSError as error:
            self._unreadable.append(f"can't read {self.local / name}: {error}")
            return True
        self._copied[name] = stamp
        self._counts["files"] += 1
        self._counts["bytes"] += stamp.num_bytes
        if is_record(name):
            self._not_before[name] = self._clock() + stamp.num_bytes / RECORD_BYTES_PER_SECOND
        return True

    def _keep_checkpoint(self, folder: str, remote: Mapping[str, int]) -> None:
        """One that is about to be replaced stays readable, under the name that such a one has, until it is."""
        aside = f"{folder}.replaced"
        if f"{aside}/DONE" in remote:
            return
        for name in sorted((name for name in remote if checkpoint_of(name) == folder), key=upload_order):
            self._remote.copy(name, f"{aside}/{name.rpartition('/')[2]}")

    def _remove(self, names: Collection[str], local_folders: Collection[str]) -> None:
        gone_folders: dict[str, None] = {}
        for name in sorted(names, key=removal_order):
            self._go_on()
            folder = name.rpartition("/")[0]
            if folder in local_folders or not folder or name.endswith("/DONE"):
                self._remote.remove(name)
            if folder and folder not in local_folders:
                gone_folders[folder] = None
        for folder in gone_folders:
            self._go_on()
            self._remote.remove_folder(folder)
        self._counts["removed"] += len(names)

    @contextmanager
    def keep_pushing(self) -> Iterator[None]:
        """Pushes in a thread of its own; in the end once more, for as long as `last_push_seconds` allow.

        If another process has taken over, `check` raises from then on, and nothing is pushed any more.
        """
        with keep_pushing([self]):
            yield

    def _start(self, ending: threading.Event, once_more: bool) -> threading.Thread:
        self._given_up.clear()
        thread = threading.Thread(
            target=self._push_until, args=(ending, once_more), name="mirror", daemon=True
        )
        thread.start()
        return thread

    def _give_up(self) -> None:
        self._given_up.set()
        self._tell(
            f"the last copy to {shown(self.uri)} isn't done after {self.last_push_seconds:g} s; "
            f"what is missing there lies in {self.local}"
        )

    def _push_until(self, ending: threading.Event, once_more: bool) -> None:
        try:
            while not ending.wait(self.interval_seconds):
                self.push(everything=False)
            if once_more:
                self.push()
        except RunError as error:
            # `check` raises it.
            self._tell(str(error))


@contextmanager
def keep_pushing(mirrors: Sequence[Mirror], once_more: bool = True) -> Iterator[None]:
    """As `Mirror.keep_pushing`, of several at once: their last pushes share the time that the first one's may take.

    Without `once_more` the end begins no last push; one that is under way goes on.
    """
    ending = threading.Event()
    threads = [mirror._start(ending, once_more) for mirror in mirrors]
    try:
        yield
    finally:
        ending.set()
        deadline = time.monotonic() + mirrors[0].last_push_seconds
        for mirror, thread in zip(mirrors, threads, strict=True):
            thread.join(max(0.0, deadline - time.monotonic()))
            if once_more and thread.is_alive():
                mirror._give_up()
