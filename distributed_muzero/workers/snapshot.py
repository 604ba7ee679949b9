"""A copy of a run's folder at one moment, from which it, or another run, can go on."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from distributed_muzero.errors import RunError
from distributed_muzero.mirror.plan import Stamp, Unsteady, look, upload_order, usable

MAX_TRIES = 5
CHUNK_BYTES = 4 * 1024**2


def copy_run(run: Path, target: Path, exclude: Collection[str] = ()) -> None:
    """Copies a run's folder, which may be at work meanwhile, to `target`, where nothing may be yet.

    exclude: folders that aren't needed. Raises RunError; nothing is left then.
    """
    try:
        if target.exists():
            raise FileExistsError(f"{target} is there already")
        for _ in range(MAX_TRIES):
            try:
                _copy(run, target, exclude)
                return
            except (
                FileNotFoundError
            ):  # a checkpoint or segment that the run removed: what is there now is copied
                shutil.rmtree(target, ignore_errors=True)
        raise Unsteady("its files go faster than they can be copied")
    except (OSError, Unsteady) as error:
        if not isinstance(error, FileExistsError):
            shutil.rmtree(target, ignore_errors=True)
        raise RunError(f"can't copy the run {run} to {target}: {error}") from None


def _copy(run: Path, target: Path, exclude: Collection[str]) -> None:
    found = look(run, exclude)
    for name in sorted(usable(found.keys()), key=upload_order):
        _copy_file(run / name, target / name, found[name])


def _copy_file(source: Path, target: Path, stamp: Stamp) -> None:
    """What it held when it was looked at: a log may have grown, and its last record not be whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    left = stamp.num_bytes
    with source.open("rb") as read, target.open("xb") as written:
        while left and (chunk := read.read(min(left, CHUNK_BYTES))):
            written.write(chunk)
            left -= len(chunk)
