"""What of a run's folder is copied, and in which order, so that the copy can be used at every moment.

- A checkpoint's DONE goes after its other files and comes off before them; best.json and league.json, which name
  checkpoints, go after all of them.
- A shard's journal is looked at before its episodes and copied after them. So the copy's journal never speaks of
  episodes that the copy lacks, and episodes that it doesn't speak of yet are found in their log.
- What is gone here is removed there last, when the journal says so there too. A file that goes while it is copied
  is one more change: the copy begins again with what is there now. A checkpoint that goes is left out alone, and the
  newest one is copied first: a slow store gets that one, however fast they come.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

LOCK = "lock"
MAX_LOOKS = 10


class Stamp(NamedTuple):
    """How a file looked; it changed if any of these did."""

    num_bytes: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class Unsteady(Exception):
    """The folder changes faster than it can be looked at or copied."""


def is_copied(name: str, exclude: Collection[str] = ()) -> bool:
    """Locks and hidden files stay where they are, and so does what lies in the excluded folders."""
    parts = PurePosixPath(name).parts
    return parts[0] not in exclude and parts[-1] != LOCK and not any(part[0] == "." for part in parts)


def look(folder: Path, exclude: Collection[str] = ()) -> dict[str, Stamp]:
    """The files below a folder that are to be copied; none of them went meanwhile. Raises Unsteady, OSError."""
    for _ in range(MAX_LOOKS):
        before = _look_once(folder, exclude)
        now = _look_once(folder, exclude)
        if before.keys() <= now.keys():
            return now
    raise Unsteady(f"files in {folder} come and go too fast")


def _look_once(folder: Path, exclude: Collection[str], prefix: str = "") -> dict[str, Stamp]:
    found, folders = {}, []
    with os.scandir(folder) as entries:
        listed = [entry for entry in entries if is_copied(prefix + entry.name, exclude)]
    for entry in listed:
        if entry.is_dir(follow_symlinks=False):
            folders.append(entry.name)
        elif entry.is_file():
            try:
                found[prefix + entry.name] = Stamp.of(os.stat(entry.path))
            except FileNotFoundError:
                continue
    for name in sorted(folders, key=lambda name: name != "journal"):
        try:
            found.update(_look_once(folder / name, exclude, f"{prefix}{name}/"))
        except FileNotFoundError:
            continue
    return found


def stage(name: str) -> int:
    """All files of a stage are copied before the first of the next."""
    path = PurePosixPath(name)
    return 1 if path.name in ("best.json", "league.json") or path.parent.name == "journal" else 0


def upload_order(name: str) -> tuple[int, str, int, bool, str]:
    path = PurePosixPath(name)
    folder = path.parent if checkpoint_of(name) is None else path.parent.parent
    return stage(name), str(folder), -step_of(name), path.name == "DONE", path.name


def removal_order(name: str) -> tuple[bool, str]:
    return PurePosixPath(name).name != "DONE", name


def usable(names: Collection[str]) -> list[str]:
    """Without the files of checkpoints that are still being copied: the first one would have none before it."""
    return [name for name in names if (folder := checkpoint_of(name)) is None or f"{folder}/DONE" in names]


def download_order(name: str) -> tuple[int, str]:
    """The other way round: what the journal speaks of is there when the episodes' turn comes."""
    return -stage(name), name


def may_be_newer(name: str) -> bool:
    """Whether a file that is replaced at once may be copied as it is by now: nothing that is copied hangs on it."""
    return stage(name) == 0 and checkpoint_of(name) is None


def is_record(name: str) -> bool:
    """Only ever looked at by people: what is lost of it, nobody misses."""
    return name == "metrics.jsonl" or name.startswith("tensorboard/")


def checkpoint_of(name: str) -> str | None:
    """The checkpoint's folder that a file lies in."""
    folder = PurePosixPath(name).parent
    return str(folder) if folder.name.startswith("step_") and "." not in folder.name else None


def step_of(name: str) -> int:
    """Of the checkpoint that a file lies in; 0 for other files."""
    digits = (checkpoint_of(name) or "").rpartition("step_")[2]
    return int(digits) if digits.isdecimal() else 0


def marked_step(best: bytes) -> int | None:
    """The checkpoint that a best.json names; None if it can't be read."""
    try:
        return int(json.loads(best)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def has_lost(recorded: Iterable[str], local: Iterable[str]) -> bool:
    """Whether the newest checkpoint or segment of any folder is gone, with none after it.

    A run itself removes old ones only, after it has written newer ones.
    """
    newest = _newest(local)
    return any(newest.get(folder, (0, "")) < last for folder, last in _newest(recorded).items())


def _newest(names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """The last checkpoint or segment by the folder it lies in, in an order that knows 10 comes after 9."""
    found: dict[str, tuple[int, str]] = {}
    for name in names:
        path = PurePosixPath(name)
        if path.name == "DONE" and checkpoint_of(name):
            path = path.parent
        elif not path.name.startswith("segment_"):
            continue
        folder = str(path.parent)
        found[folder] = max(found.get(folder, (0, "")), (len(path.name), path.name))
    return found


def folders_of(names: Iterable[str]) -> set[str]:
    return {str(parent) for name in names for parent in PurePosixPath(name).parents}
