"""Keeps a copy of a run's folder, or of one replay shard's, at a URI: the run goes on elsewhere if its machine is lost.

One process at a time owns a folder and its copy. It says so by a token that lies in both, `.mirror.json` here and
`.owner` there: who finds another one there has been replaced and writes no more. Training never waits for a copy.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from distributed_muzero.errors import RunError, first_line
from distributed_muzero.files import sync_folder, write_atomically
from distributed_muzero.mirror.download import download, remote_files
from distributed_muzero.mirror.plan import (
    Stamp,
    Unsteady,
    checkpoint_of,
    folders_of,
    has_lost,
    is_record,
    look,
    marked_step,
    may_be_newer,
    removal_order,
    stage,
    step_of,
    upload_order,
)
from distributed_muzero.mirror.remote import Remote, RemoteError
from distributed_muzero.mirror.uri import STATE_VARIABLE, shown

OWNER = ".owner"
ALIVE = ".alive"  # written anew with every copy in the background
STATE = ".mirror.json"
DOWNLOADED = ".downloaded"
MAX_PASSES = 5
MAX_NAMED = 3  # files in a message
OWNER_SECONDS = 1.0  # for so long, nobody looks again whether the copy is still ours
RECORD_BYTES_PER_SECOND = 256 * 1024  # what copies of one growing record may take; it is copied as a whole

logger = logging.getLogger(__name__)


class _State(NamedTuple):
    tokens: list[str]  # any of which may be the copy's
    files: dict[str, Stamp]  # as they were copied
    fetched: bool


class Mirror:
    """Copies one folder to a URI. `claim` comes first; then `push`, or `keep_pushing`, from any thread."""

    def __init__(
        self,
        local: Path,
        uri: str,
        *,
        exclude: Collection[str] = (),
        interval_seconds: float = 30.0,
        last_push_seconds: float = 15.0,
        tell: Callable[[str], None] = logger.warning,
        clock: Callable[[], float] = time.monotonic,
    ):
        """exclude: folders in it that others mirror.   interval_seconds: from one push to the next.

        last_push_seconds: how long the end waits for the last one.   tell: takes a message when pushes begin to fail,
        and when they succeed again. Raises RunError for a URI that can't be one.
        """
        self.local = local
        self.uri = uri
        self.exclude = exclude
        self.interval_seconds = interval_seconds
        self.last_push_seconds = last_push_seconds
        self.last_failure: str | None = None  # since the last whole push
        # By this claim or an earlier one, since `settle`: the folder may be older than what its last owner did.
        self.was_fetched = False
        self._remote = Remote(uri)
        self._tell = tell
        self._clock = clock
        self._tokens: list[str] = []  # any of which may be the copy's; the last is this process'
        self._copied: dict[str, Stamp] = {}  # how files looked when they were copied
        self._unreadable: list[str] = []  # in this pass
        self._gone: set[str] = set()  # checkpoints that went in this pass
        self._not_before: dict[str, float] = {}  # when a large record's turn comes again
        self._counts = {"files": 0, "bytes": 0, "removed": 0, "failures": 0}
        self._last_success: float | None = None
        self._owned_at = 0.0
        self._replaced_by: RunError | None = None
        self._one_push = threading.Lock()
        self._given_up = threading.Event()

    # Who owns it ----------------------------------------------------------------------------------------------

    def owner_elsewhere(self) -> str | None:
        """Who owns the copy, in words; None for nobody, and for this folder's last process. Raises RunError."""
        try:
            data = self._remote.read(OWNER)
        except RemoteError as error:
            raise RunError(str(error)) from None
        return None if _token_of(data) in (None, *self._read_state().tokens) else _describe(data)

    def interval_elsewhere(self) -> float | None:
        """Seconds between the owner's pushes; None if it doesn't say. Raises RunError."""
        try:
            interval = _owner(self._remote.read(OWNER) or b"").get("interval_seconds")
        except RemoteError as error:
            raise RunError(str(error)) from None
        return float(interval) if isinstance(interval, int | float) else None

    @property
    def token(self) -> str:
        """This process' own, after `claim`."""
        return self._tokens[-1]

    def require_owner(self, token: str) -> None:
        """Raises RunError if another process than the one with this token owns the copy, as far as can be told."""
        with suppress(RemoteError):
            data = self._remote.read(OWNER)
            if _token_of(data) not in (None, token):
                raise RunError(f"{_describe(data)} has taken over {shown(self.uri)}; stop that one first")

    def claim(self, *, may_be_late: bool = False) -> Literal["new", "kept", "fetched"]:
        """Makes this process the owner, and the folder as new as its copy or newer; says what it found.

        new: nothing was there.   kept: nobody else has owned the copy since; the folder stays, it may be newer.
        fetched: the folder was absent or has lost what was copied, or another process has owned the copy since; it
        holds the copy now.
        may_be_late: a process that begins again where it was goes on with its folder while the store can't be reached;
        the next push takes over, or finds that another process has. Raises RunError if the store or the disk refuses.
        """
        tokens, self._copied, self.was_fetched = self._read_state()
        self._tokens = [*tokens, uuid.uuid4().hex]
        try:
            return self._claim(tokens, may_be_late and bool(tokens))
        except RunError:
            self._tokens = []
            raise
        except (RemoteError, OSError, Unsteady) as error:
            self._tokens = []
            raise RunError(f"can't take over the run's copy: {error}") from error

    def _claim(self, tokens: list[str], may_be_late: bool) -> Literal["new", "kept", "fetched"]:
        local = look(self.local, self.exclude) if tokens else {}
        # Somebody has emptied the folder: the copy must not lose the same.
        lost = has_lost(self._copied, local)
        may_be_late = may_be_late and not lost
        try:
            data = self._remote.read(OWNER)
            owner = _token_of(data)
            is_new = not remote_files(self._remote, self.exclude)
        except RemoteError as error:
            if not may_be_late:
                raise
            return self._claim_later(error)
        # Without an owner there, nobody has owned it after us.
        is_ours = bool(local) and not lost and owner in (None, *tokens)
        if is_new or is_ours:
            self.local.mkdir(parents=True, exist_ok=True)
            self._write_state()
        try:
            self._write_owner()
            self._remote.remove_leftovers()
        except RemoteError as error:
            if not (is_ours and may_be_late):
                raise
            return self._claim_later(error)
        if not is_new and not is_ours:
            num_newer = sum(self._copied.get(name) != stamp for name, stamp in local.items())
            self._copied = self._replace_folder()
            self.was_fetched = True
            if num_newer and not lost:
                self._tell(
                    f"{self.local} held {num_newer} files that were newer than their copies when "
                    f"{_describe(data)} took the run over; what that one has copied has replaced them"
                )
        self._forget_old_tokens()
        return "kept" if is_ours else "new" if is_new else "fetched"

    def _claim_later(self, error: RemoteError) -> Literal["kept"]:
        """The state names the old tokens and the new one: the next push takes over from any of them."""
        self._write_state()
        self._fail(str(error))
        return "kept"

    def settle(self) -> None:
        """Whatever the last owner may have done besides is allowed for, durably. Raises RunError."""
        self.was_fetched = False
        try:
            self._write_state()
        except OSError as error:
            raise RunError(f"can't write {self.local / STATE}: {error}; make room there") from None

    def _replace_folder(self) -> dict[str, Stamp]:
        """Puts the copy in its place. Until the state is written anew, the next claim does it again."""
        downloaded = self.local / DOWNLOADED
        shutil.rmtree(downloaded, ignore_errors=True)
        try:
            download(self._remote, downloaded, self.exclude)
            (self.local / STATE).unlink(missing_ok=True)
            for path in self.local.iterdir():
                if path.name not in self.exclude and not path.name.startswith(".") and path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            for path in downloaded.iterdir():
                path.rename(self.local / path.name)
            sync_folder(self.local)
        except OSError as error:
            raise RunError(
                f"can't fetch {shown(self.uri)} into {self.local}: {error}; make room there, or name another disk by "
                f"{STATE_VARIABLE}, and try again: the copy is intact"
            ) from None
        finally:
            shutil.rmtree(downloaded, ignore_errors=True)
        return look(self.local, self.exclude)

    def _write_owner(self) -> None:
        """A kill right after it leaves a folder that knows this token: it is in the state already."""
        owner = {
            "token": self._tokens[-1],
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "interval_seconds": self.interval_seconds,
        }
        self._remote.write_bytes(OWNER, json.dumps(owner).encode())
        self._owned_at = self._clock()

    def _forget_old_tokens(self) -> None:
        del self._tokens[:-1]
        self._write_state()

    def _check_owner(self, max_seconds: float = 0.0) -> None:
        """As `_check_not_replaced`; raises RemoteError if the time for the last push is over."""
        if self._given_up.is_set():
            raise RemoteError(
                f"the last copy to {shown(self.uri)} wasn't done after {self.last_push_seconds:g} s"
            )
        self._check_not_replaced(max_seconds)

    def _check_not_replaced(self, max_seconds: float) -> None:
        """Raises RunError if another process has taken over, as was known `max_seconds` ago at the latest."""
        if max_seconds and self._clock() - self._owned_at < max_seconds:
            return
        data = self._remote.read(OWNER)
        token = _token_of(data)
        if token is None or token in self._tokens[:-1]:
            self._write_owner()
            self._forget_old_tokens()
        elif token != self._tokens[-1]:
            self._replaced_by = RunError(
                f"{self.local} is no longer copied to {shown(self.uri)}: {_describe(data)} has taken the run over; "
                "stop that one first if this one is to go on"
            )
            raise self._replaced_by
        self._owned_at = self._clock()

    def check(self) -> None:
        """Raises RunError if another process has taken over; as of the last push."""
        if self._replaced_by:
            raise self._replaced_by

    # What was copied ------------------------------------------------------------------------------------------

    def _read_state(self) -> _State:
        """What `_write_state` wrote; nothing if it is of another URI, or unreadable."""
        try:
            state = json.loads((self.local / STATE).read_bytes())
            if state["uri"] != self.uri:
                return _State([], {}, False)
            stamps = {name: Stamp(*stamp) for name, stamp in state["files"].items()}
            return _State(list(state["tokens"]), stamps, bool(state.get("fetched", False)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return _State([], {}, False)

    def _write_state(self) -> None:
        state = {
            "uri": self.uri,
            "tokens": self._tokens,
            "files": self._copied,
            "fetched": self.was_fetched,
        }
        write_atomically(self.local / STATE, json.dumps(state).encode())

    def stats(self) -> dict[str, float]:
        """Since `claim`: copied files and bytes, removed files, failed pushes; seconds since the last whole push, or
        infinite."""
        last = self._last_success
        return {**self._counts, "seconds_since_push": float("inf") if last is None else self._clock() - last}

    # Copying --------------------------------------------------------------------------------------------------

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

    def _fail(self, failure: str) -> None:
        self._counts["failures"] += 1
        if not self.last_failure:
            self._tell(
                f"the run's copy is out of date for now: {failure}. It is tried again; training goes on"
            )
        self.last_failure = failure

    def _push(self, everything: bool) -> None:
        before = dict(self._copied)
        try:
            for _ in range(MAX_PASSES):
                self._check_owner()
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
                        self._remote.write_bytes(ALIVE, uuid.uuid4().hex.encode())
                    return
            raise Unsteady(f"files in {self.local} go faster than they can be copied")
        finally:
            if self._copied != before:
                self._write_state()

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
                self._check_owner(OWNER_SECONDS)
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
                self._remote.write(
                    name, file, stamp.num_bytes, lambda: self._check_not_replaced(OWNER_SECONDS)
                )
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
            self._check_owner(OWNER_SECONDS)
            folder = name.rpartition("/")[0]
            if folder in local_folders or not folder or name.endswith("/DONE"):
                self._remote.remove(name)
            if folder and folder not in local_folders:
                gone_folders[folder] = None
        for folder in gone_folders:
            self._check_owner(OWNER_SECONDS)
            self._remote.remove_folder(folder)
        self._counts["removed"] += len(names)

    @contextmanager
    def keep_pushing(self) -> Iterator[None]:
        """Pushes in a thread of its own; in the end once more, for as long as `last_push_seconds` allow.

        If another process has taken over, `check` raises from then on, and nothing is pushed any more.
        """
        with keep_pushing([self]):
            yield

    def _start(self, ending: threading.Event) -> threading.Thread:
        self._given_up.clear()
        thread = threading.Thread(target=self._push_until, args=(ending,), name="mirror", daemon=True)
        thread.start()
        return thread

    def _give_up(self) -> None:
        self._given_up.set()
        self._tell(
            f"the last copy to {shown(self.uri)} isn't done after {self.last_push_seconds:g} s; "
            f"what is missing there lies in {self.local}"
        )

    def _push_until(self, ending: threading.Event) -> None:
        try:
            while not ending.wait(self.interval_seconds):
                self.push(everything=False)
            self.push()
        except RunError as error:
            # `check` raises it.
            self._tell(str(error))


@contextmanager
def keep_pushing(mirrors: Sequence[Mirror]) -> Iterator[None]:
    """As `Mirror.keep_pushing`, of several at once: their last pushes share the time that the first one's may take."""
    ending = threading.Event()
    threads = [mirror._start(ending) for mirror in mirrors]
    try:
        yield
    finally:
        ending.set()
        deadline = time.monotonic() + mirrors[0].last_push_seconds
        for mirror, thread in zip(mirrors, threads, strict=True):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                mirror._give_up()


def _token_of(data: bytes | None) -> str | None:
    return None if data is None else str(_owner(data).get("token"))


def _owner(data: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(data)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _describe(data: bytes | None) -> str:
    owner = _owner(data or b"")
    return (
        f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "another process"
    )
