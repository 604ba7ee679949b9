"""Who may write a copy at a URI: one process at a time, which owns a folder and its copy.

It says so by a token that lies in both, `.mirror.json` here and `.owner` there: who finds another one there has been
replaced and writes no more. Both name the run as well, by a random id: a folder of another run of that name is emptied.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distributed_muzero.errors import RunError, RunTakenOver
from distributed_muzero.files import sync_folder, write_atomically
from distributed_muzero.mirror.download import download, remote_files
from distributed_muzero.mirror.plan import Stamp, Unsteady, has_lost, look
from distributed_muzero.mirror.remote import Remote, RemoteError
from distributed_muzero.mirror.uri import STATE_VARIABLE, shown

OWNER = ".owner"
STATE = ".mirror.json"
DOWNLOADED = ".downloaded"

logger = logging.getLogger(__name__)


class _State(NamedTuple):
    tokens: list[str]  # any of which may be the copy's
    files: dict[str, Stamp]  # as they were copied
    fetched: bool
    run: str | None


class _Here(NamedTuple):
    """What a claim finds in the folder."""

    files: dict[str, Stamp]
    has_lost: bool  # somebody has emptied the folder: the copy must not lose the same
    is_of_another_run: bool
    tokens: list[str]

    @property
    def is_usable(self) -> bool:
        return bool(self.tokens) and not self.has_lost and not self.is_of_another_run


class _There(NamedTuple):
    """What a claim finds at the URI."""

    owner: bytes | None
    files: dict[str, int]


class OwnedCopy:
    """A folder here and its copy at a URI, which this process may write after `claim`."""

    def __init__(
        self,
        local: Path,
        uri: str,
        *,
        exclude: Collection[str] = (),
        interval_seconds: float = 30.0,
        run: str | None = None,
        tell: Callable[[str], None] = logger.warning,
        clock: Callable[[], float] = time.monotonic,
    ):
        """exclude: folders in it that others mirror.   interval_seconds: from one push to the next.

        run: id of the run that the folder has to be of; without it, the copy tells.   tell: takes a message when pushes
        begin to fail, and when they succeed again. Raises RunError for a URI that can't be one.
        """
        self.local = local
        self.uri = uri
        self.exclude = exclude
        self.interval_seconds = interval_seconds
        self.run = run
        self.last_failure: str | None = None  # since the last whole push
        self.num_failures = 0
        # By this claim or an earlier one, since `settle`: the folder may be older than what its last owner did.
        self.was_fetched = False
        self._remote = Remote(uri)
        self._expected_run = run
        self._tell = tell
        self._clock = clock
        self._tokens: list[str] = []  # any of which may be the copy's; the last is this process'
        self._copied: dict[str, Stamp] = {}  # how files looked when they were copied
        self._owned_at = 0.0
        self._replaced_by: RunError | None = None

    @property
    def token(self) -> str:
        """This process' own, after `claim`."""
        return self._tokens[-1]

    def owner_elsewhere(self) -> str | None:
        """Who owns the copy, in words; None for nobody, and for this folder's last process. Raises RunError."""
        try:
            data = self._remote.read(OWNER)
        except RemoteError as error:
            raise RunError(str(error)) from None
        return None if _token_of(data) in (None, *self._read_state().tokens) else _describe(data)

    def require_owner(self, token: str) -> None:
        """Raises RunError if another process than the one with this token owns the copy, as far as can be told."""
        with suppress(RemoteError):
            data = self._remote.read(OWNER)
            if _token_of(data) not in (None, token):
                raise RunError(f"{_describe(data)} has taken over {shown(self.uri)}; stop that one first")

    def bytes_to_fetch(self) -> int:
        """What `claim` would copy into the folder. Raises RunError."""
        try:
            here, there = self._look_here(self._read_state()), self._look_there()
        except (RemoteError, OSError, Unsteady) as error:
            raise RunError(f"can't look at the run's copy: {error}") from error
        return 0 if _is_ours(here, there) else sum(there.files.values())

    # To become the owner --------------------------------------------------------------------------------------

    def claim(
        self, *, must_be_new: bool = False, may_be_late: bool = False
    ) -> Literal["new", "kept", "fetched"]:
        """Makes this process the owner, and the folder as new as its copy or newer; says what it found.

        new: nothing was there.   kept: nobody else has owned the copy since; the folder stays, it may be newer.
        fetched: the folder was absent or has lost what was copied, is of another run, or another process has owned the
        copy since; it holds the copy now.
        must_be_new: where anything lies there, it is left alone, and its owner too.
        may_be_late: a process that begins again where it was goes on with its folder while the store can't be reached;
        the next push takes over, or finds that another process has. Raises RunError if the store or the disk refuses.
        """
        state = self._read_state()
        self._copied, self.was_fetched = state.files, state.fetched
        self._tokens = [*state.tokens, uuid.uuid4().hex]
        try:
            return self._claim(state, must_be_new, may_be_late)
        except RunError:
            self._tokens = []
            raise
        except OSError as error:
            self._tokens = []
            raise RunError(
                f"can't take over the run's copy into {self.local}: {error}; name a writable disk with room by "
                f"{STATE_VARIABLE}"
            ) from error
        except (RemoteError, Unsteady) as error:
            self._tokens = []
            raise RunError(f"can't take over the run's copy: {error}") from error

    def _claim(
        self, state: _State, must_be_new: bool, may_be_late: bool
    ) -> Literal["new", "kept", "fetched"]:
        here = self._look_here(state)
        may_be_late = may_be_late and here.is_usable
        try:
            there = self._look_there()
            if must_be_new:
                self._check_new()
        except RemoteError as error:
            if not may_be_late:
                raise
            return self._claim_later(state, error)
        is_new, is_ours = not there.files, _is_ours(here, there)
        if is_ours:
            known = state.run
        else:
            known = None if is_new else _run_of(there.owner)
        self.run = self._expected_run or known or uuid.uuid4().hex
        if is_new and here.is_of_another_run:
            self._copied = {}
            self._empty()
        if is_new or is_ours:
            self.local.mkdir(parents=True, exist_ok=True)
            self._write_state()
        try:
            self._write_owner()
            self._remote.remove_leftovers()
        except RemoteError as error:
            if not (is_ours and may_be_late):
                raise
            return self._claim_later(state, error)
        if not is_new and not is_ours:
            num_newer = sum(self._copied.get(name) != stamp for name, stamp in here.files.items())
            self._copied = self._replace_folder()
            self.was_fetched = True
            if num_newer and here.is_usable:
                self._tell(
                    f"{self.local} held {num_newer} files that were newer than their copies when "
                    f"{_describe(there.owner)} took the run over; what that one has copied has replaced them"
                )
        if here.is_of_another_run:
            self._tell(f"{self.local} was of another run of this name; what it held has been removed")
        self._forget_old_tokens()
        return "kept" if is_ours else "new" if is_new else "fetched"

    def _look_here(self, state: _State) -> _Here:
        files = look(self.local, self.exclude) if state.tokens and self.local.is_dir() else {}
        is_of_another = bool(state.tokens) and self._expected_run not in (None, state.run)
        return _Here(files, has_lost(state.files, files), is_of_another, state.tokens)

    def _look_there(self) -> _There:
        owner = self._remote.read(OWNER)
        return _There(owner, remote_files(self._remote, self.exclude))

    def _check_new(self) -> None:
        if remote_files(self._remote):
            raise RunError(
                f"{shown(self.uri)} isn't empty: another process has just made it, or an earlier run has left "
                "something there; choose another --name, go on with that run, or remove it"
            )

    def _claim_later(self, state: _State, error: RemoteError) -> Literal["kept"]:
        """The state names the old tokens and the new one: the next push takes over from any of them."""
        self.run = state.run
        self._write_state()
        self._fail(str(error))
        return "kept"

    def settle(self) -> None:
        """Whatever the last owner may have done besides is allowed for, durably. Raises RunError."""
        self.was_fetched = False
        try:
            self._write_state()
        except OSError as error:
            raise RunError(
                f"can't write {self.local / STATE}: {error}; make room there, or name another disk by {STATE_VARIABLE}"
            ) from None

    def _replace_folder(self) -> dict[str, Stamp]:
        """Puts the copy in its place. Until the state is written anew, the next claim does it again."""
        downloaded = self.local / DOWNLOADED
        shutil.rmtree(downloaded, ignore_errors=True)
        try:
            download(self._remote, downloaded, self.exclude)
            (self.local / STATE).unlink(missing_ok=True)
            self._empty()
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

    def _empty(self) -> None:
        """Of all but locks, hidden files and what others mirror."""
        for path in self.local.iterdir():
            if path.name not in self.exclude and not path.name.startswith(".") and path.name != "lock":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _write_owner(self) -> None:
        """A kill right after it leaves a folder that knows this token: it is in the state already."""
        owner = {
            "token": self._tokens[-1],
            "run": self.run,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "interval_seconds": self.interval_seconds,
        }
        self._remote.write_bytes(OWNER, json.dumps(owner).encode())
        self._owned_at = self._clock()

    def _forget_old_tokens(self) -> None:
        del self._tokens[:-1]
        self._write_state()

    # To stay the owner ----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises RunError if another process has taken over; as of the last push."""
        if self._replaced_by:
            raise self._replaced_by

    def _check_not_replaced(self, max_seconds: float = 0.0) -> bool:
        """Raises RunError if another process has taken over, as was known `max_seconds` ago at the latest.

        Returns whether it had to look.
        """
        if max_seconds and self._clock() - self._owned_at < max_seconds:
            return False
        data = self._remote.read(OWNER)
        token = _token_of(data)
        if token is None or token in self._tokens[:-1]:
            self._write_owner()
            self._forget_old_tokens()
        elif token != self._tokens[-1]:
            self._replaced_by = RunTakenOver(
                f"{self.local} is no longer copied to {shown(self.uri)}: {_describe(data)} has taken the run over; "
                "stop that one first if this one is to go on"
            )
            raise self._replaced_by
        self._owned_at = self._clock()
        return True

    def _fail(self, failure: str) -> None:
        self.num_failures += 1
        if not self.last_failure:
            self._tell(
                f"the run's copy is out of date for now: {failure}. It is tried again; training goes on"
            )
        self.last_failure = failure

    def _read_state(self) -> _State:
        """What `_write_state` wrote; nothing if it is of another URI, or unreadable."""
        try:
            state = json.loads((self.local / STATE).read_bytes())
            if state["uri"] != self.uri:
                return _State([], {}, False, None)
            stamps = {name: Stamp(*stamp) for name, stamp in state["files"].items()}
            return _State(list(state["tokens"]), stamps, bool(state.get("fetched", False)), state.get("run"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return _State([], {}, False, None)

    def _write_state(self) -> None:
        state = {
            "uri": self.uri,
            "run": self.run,
            "tokens": self._tokens,
            "files": self._copied,
            "fetched": self.was_fetched,
        }
        write_atomically(self.local / STATE, json.dumps(state).encode())


def interval_at(uri: str) -> float | None:
    """Seconds between the pushes of a copy's owner; None if it doesn't say. Raises RunError."""
    try:
        interval = _owner(Remote(uri).read(OWNER)).get("interval_seconds")
    except RemoteError as error:
        raise RunError(str(error)) from None
    return float(interval) if isinstance(interval, int | float) else None


def _is_ours(here: _Here, there: _There) -> bool:
    """Without an owner there, nobody has owned it after us."""
    return bool(here.files) and here.is_usable and _token_of(there.owner) in (None, *here.tokens)


def _token_of(data: bytes | None) -> str | None:
    return None if data is None else str(_owner(data).get("token"))


def _run_of(data: bytes | None) -> str | None:
    run = _owner(data).get("run")
    return run if isinstance(run, str) else None


def _owner(data: bytes | None) -> dict[str, Any]:
    try:
        owner = json.loads(data or b"")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _describe(data: bytes | None) -> str:
    owner = _owner(data)
    return (
        f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "another process"
    )
