"""Copies at a URI that are read: the runs there, one run's files."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from distributed_muzero.errors import RunError
from distributed_muzero.files import sync_folder
from distributed_muzero.mirror.plan import LOCK, Unsteady, download_order, is_copied, usable
from distributed_muzero.mirror.remote import Remote, RemoteError
from distributed_muzero.mirror.uri import STATE_VARIABLE, shown

MAX_TRIES = 5


def names_at(uri: str) -> list[str]:
    """The runs whose copies lie at a runs folder's URI, in alphabetical order. Raises RunError."""
    try:
        remote = Remote(uri)
        names = remote.folders()
        configs = remote.existing(*(f"{name}/config.yaml" for name in names)) if names else []
    except RemoteError as error:
        raise RunError(str(error)) from None
    return sorted(path.partition("/")[0] for path in configs)


def read_at(uri: str, name: str) -> tuple[bytes | None, float | None]:
    """One small file of a copy, and when it was written (seconds since 1970, by the store). Raises RunError."""
    try:
        remote = Remote(uri)
        return remote.read(name), remote.changed_at(name)
    except RemoteError as error:
        raise RunError(str(error)) from None


def num_bytes_at(uri: str) -> int:
    """Of all files of a copy. Raises RunError."""
    return sum(files_at(uri).values())


def files_at(uri: str) -> dict[str, int]:
    """Bytes by name of all files of a copy. Raises RunError."""
    try:
        return remote_files(Remote(uri))
    except RemoteError as error:
        raise RunError(str(error)) from None


def fetch(uri: str, local: Path, exclude: Collection[str] = ()) -> Path:
    """Makes `local` what the run at the URI is now, to be read; `exclude`: folders that aren't needed (`replay`).

    Takes nothing over, so that the run may go on meanwhile. Nobody else may read `local`: see `reading_folder`. Raises
    RunError: no run there, the store refuses, the disk refuses; nothing is left then.
    """
    is_whole = False
    try:
        remote = Remote(uri)
        shutil.rmtree(local, ignore_errors=True)
        is_whole = bool(download(remote, local, exclude))
    except RemoteError as error:
        raise RunError(str(error)) from None
    except Unsteady as error:
        raise RunError(f"can't fetch {shown(uri)}: {error}; try again") from None
    except OSError as error:
        raise RunError(
            f"can't fetch {shown(uri)} into {local}: {error}; make room there, or name another disk by {STATE_VARIABLE}"
        ) from None
    finally:
        if not is_whole:
            shutil.rmtree(local, ignore_errors=True)
    if not is_whole:
        raise RunError(f"no run at {shown(uri)}: nothing lies there; check the run's name and the URI")
    return local


def reading_folder(parent: Path) -> Path:
    """A folder in `parent` for what this process fetches, until it ends; removes those of processes that were killed.

    Raises OSError.
    """
    known = _reading.get(parent)
    if known is not None and known.is_dir():
        return known
    parent.mkdir(parents=True, exist_ok=True)
    for folder in parent.iterdir():
        _remove_unless_read(folder)
    for _ in range(MAX_TRIES):
        folder = Path(tempfile.mkdtemp(dir=parent, prefix="reader-"))
        if _lock(folder):
            _reading[parent] = folder
            return folder
    raise OSError(f"others remove what is made in {parent}")


_reading: dict[Path, Path] = {}  # this process' folders
_at_end = ExitStack()
atexit.register(_at_end.close)


def _lock(folder: Path) -> bool:
    """Until this process ends, when it is removed; False if somebody took it for a killed one's meanwhile."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context((folder / LOCK).open("w"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK))
        except (FileNotFoundError, BlockingIOError):
            return False
        if is_there:
            _at_end.enter_context(stack.pop_all())
            _at_end.callback(shutil.rmtree, folder, ignore_errors=True)
        return is_there


def _remove_unless_read(folder: Path) -> None:
    with suppress(OSError), (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


def download(remote: Remote, folder: Path, exclude: Collection[str] = ()) -> list[str]:
    """Copies what is there into a folder, durably; returns the names.

    Raises RemoteError, OSError, and Unsteady if what is there goes on changing.
    """
    for _ in range(MAX_TRIES):
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(usable(remote_files(remote, exclude)), key=download_order)
        if all(_download_one(remote, name, folder / name) for name in names):
            _sync_folders(folder, names)
            return names
        shutil.rmtree(folder)
    raise Unsteady("what is there goes on changing while it is read")


def remote_files(remote: Remote, exclude: Collection[str] = ()) -> dict[str, int]:
    """Bytes by name of the files that a copy is made of."""
    found = remote.files()
    if strange := [name for name in found if {"", ".", ".."} & set(name.split("/"))]:
        raise RemoteError(f"{shown(remote.uri)} holds {strange[0]!r}: no run has such a file; remove it")
    return {name: num_bytes for name, num_bytes in found.items() if is_copied(name, exclude)}


def _download_one(remote: Remote, name: str, path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    return remote.download(name, path)


def _sync_folders(folder: Path, names: Iterable[str]) -> None:
    for parent in {path for name in names for path in (folder / name).parents if path.is_relative_to(folder)}:
        sync_folder(parent)
