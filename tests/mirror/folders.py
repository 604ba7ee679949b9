"""Folders with a copy, and what may happen to both: changes, kills, a store that goes away."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from distributed_muzero.mirror import owner, plan
from distributed_muzero.mirror.mirror import Mirror
from distributed_muzero.mirror.remote import Remote


def write(folder: Path, **contents: bytes) -> Path:
    """Files by name, with `__` for a slash and `_dot_` for a dot."""
    for name, data in contents.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but locks and hidden ones."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if plan.is_copied(name)}


def claimed(folder: Path, place: str, **options) -> Mirror:
    mirror = Mirror(folder, place, **options)
    mirror.claim()
    return mirror


def pushed(folder: Path, place: str, **options) -> Mirror:
    mirror = claimed(folder, place, **options)
    assert mirror.push(required=True)
    return mirror


class Watched:
    """pyarrow's file system, which does something before each of its changes."""

    def __init__(self, files, before_change: Callable[[str, str], None]):
        self._files = files
        self._before_change = before_change

    def __getattr__(self, name):
        found = getattr(self._files, name)
        if name not in ("open_output_stream", "move", "copy_file", "delete_file", "delete_dir"):
            return found

        def changed(path, *arguments, **options):
            self._before_change(name, path)
            return found(path, *arguments, **options)

        return changed


def watch(mirror: Mirror, before_change: Callable[[str, str], None]) -> None:
    mirror._remote._files = Watched(mirror._remote._files, before_change)


class Killed(BaseException):
    """What no handler of errors takes for an error."""


def killed_at(point: int, monkeypatch, mirror: Mirror, work: Callable[[], object]) -> bool:
    """Ends the work before its change number `point`: of the store, or of files here; False if it was done before."""
    number = 0

    def count(*_: object) -> None:
        nonlocal number
        number += 1
        if number > point:
            raise Killed

    def counted(original):
        return lambda *arguments, **options: (count(), original(*arguments, **options))[1]

    files = mirror._remote._files
    watch(mirror, count)
    with monkeypatch.context() as patched:
        patched.setattr(owner, "write_atomically", counted(owner.write_atomically))
        patched.setattr(Remote, "download", counted(Remote.download))
        for name in ("rename", "unlink", "rmdir"):
            patched.setattr(Path, name, counted(getattr(Path, name)))
        patched.setattr(owner.shutil, "rmtree", counted(shutil.rmtree))
        try:
            work()
        except Killed:
            return True
        finally:
            mirror._remote._files = files
    return False
