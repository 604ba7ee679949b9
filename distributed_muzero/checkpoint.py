"""Checkpoints: atomic, checksummed, versioned; safetensors and JSON, never pickle.

    checkpoints/step_00001000/{weights.safetensors, optimizer.safetensors, …, state.json, manifest.json, DONE}
    checkpoints/best.json       the step whose evaluation was the best; pruning spares it

manifest.json holds size and sha256 of every file, DONE the sha256 of manifest.json, best.json its own: no bit
goes unwatched. A checkpoint is written under another name, DONE last, and then renamed: a kill leaves a whole one
or none. One of a format that isn't read here is refused, never skipped, removed or replaced.

Format 1 holds weights and optimizer; format 2 also the states of the generators, the settings, and whatever
other files a writer adds. Both are laid out alike: a reader fills in what format 1 lacks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from distributed_muzero.errors import CheckpointError, CheckpointFormatError
from distributed_muzero.files import sync_folder, write_atomically, write_synced

FORMAT_VERSION = 2
READABLE = (1, 2)
STEM = re.compile(r"[a-z][a-z0-9_]*")
FOLDER = re.compile(r"step_(\d{8,})(\.replaced)?")  # .replaced: set aside until its successor is there
LEFTOVER = ".leftover-"  # prefix of folders that are being written or removed

logger = logging.getLogger(__name__)

Tensors = dict[str, dict[str, np.ndarray]]  # file stem -> name -> array
Stamp = tuple[tuple[str, int, int, int], ...]  # of each file: name, size, time of change, inode

# What this process wrote or verified, as it looked then: not hashed again to decide what may be pruned.
_verified: dict[Path, Stamp] = {}


class Checkpoint(NamedTuple):
    path: Path
    step: int  # learner steps
    tensors: Tensors
    state: dict[str, Any]


class Best(NamedTuple):
    step: int
    mean_return: float
    weights_sha256: str | None = None  # None: marked by a version that didn't note it


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any]
) -> Path:
    """Writes one checkpoint, durable when this returns, and returns its folder. One writer at a time.

    tensors: file stem (`weights`, `optimizer`) -> name -> array.   state: what JSON can hold, no NaN.
    A checkpoint of the same step is replaced once the new one is complete. Raises CheckpointError when
    something can't be stored or the disk refuses, and CheckpointFormatError when the step's checkpoint is of a
    format that isn't read here; earlier checkpoints stay as they were.
    """
    files = _serialize(tensors, state)
    manifest = _manifest(step, files)
    path = _checkpoint_path(folder, step)
    for existing in (path, _replaced(path)):
        if refusal := _format_error(existing):
            raise refusal
    temporary = folder / f"{LEFTOVER}writing-{path.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()
        for name, data in {**files, "manifest.json": manifest, "DONE": _sha256(manifest).encode()}.items():
            write_synced(temporary / name, data)
        sync_folder(temporary)
        _set_aside(path)
        temporary.rename(path)
        sync_folder(folder)
        _verified[path] = _stamp(path)
        _remove(_replaced(path))
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs its space back
        raise CheckpointError(
            f"can't write the checkpoint {path}: {error}; earlier checkpoints are intact. Free some space or "
            "mend the folder's permissions"
        ) from error
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Loads a checkpoint; of each file the very bytes whose checksum holds. Raises CheckpointError: missing,
    incomplete or corrupt; CheckpointFormatError: of a format that isn't read here."""
    tensors: Tensors = {}
    state: dict[str, Any] = {}
    with _verifying(path):
        manifest = _read_manifest(path)
        for name, entry in manifest["files"].items():
            data = _read_verified(path / name, entry)
            try:
                if name == "state.json":
                    state = json.loads(data)
                else:
                    tensors[name.removesuffix(".safetensors")] = safetensors.numpy.load(data)
            except Exception as error:  # its checksum holds, so it was written like this
                raise _corrupt(path, f"{name} can't be parsed ({error})") from error
    return Checkpoint(path, manifest["step"], tensors, state)


def newest_path(folder: Path) -> Path | None:
    """Of the newest checkpoint, which `latest_checkpoint` gives if it is intact; None if there is none."""
    return next(iter(_checkpoint_folders(folder)), None)


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is intact; None if none was ever written.

    Every newer one that had to be skipped is logged as a warning. Raises CheckpointError, with all reasons,
    if there are checkpoints but no intact one; CheckpointFormatError if the newest that isn't damaged is of a
    format that isn't read here.
    """
    reasons = []
    for path in _checkpoint_folders(folder):
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointFormatError:
            raise
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            logger.warning("skipped a checkpoint and fell back to step %d: %s", checkpoint.step, reason)
        return checkpoint
    if reasons:
        raise CheckpointError(f"no intact checkpoint in {folder}:\n  " + "\n  ".join(reasons))
    return None


def prune_checkpoints(folder: Path, keep: int, spared: Collection[int] = ()) -> list[Path]:
    """Removes what is older than the last `keep` intact checkpoints, but the best and the steps in `spared`.

    Returns what it removed.

    A corrupt one doesn't count, so that there is always one to fall back to. One of a format that isn't read here
    doesn't count and stays. A damaged best.json stops pruning: it is better to hold too many than to lose the best.
    What the disk doesn't let go stays, with a warning.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    try:
        best = _read_best(folder)
    except CheckpointError as error:
        logger.warning("kept all checkpoints: %s", error)
        return []
    paths = _checkpoint_folders(folder)
    kept = list(itertools.islice(filter(_is_intact, paths), keep))
    if len(kept) < keep:
        return []
    stay = {_checkpoint_path(folder, step) for step in (*spared, *([best.step] if best else []))}
    removed = []
    for path in paths:
        if path not in stay and _order(path) < _order(kept[-1]) and not _format_error(path):
            try:
                _remove(path)
                removed.append(path)
            except OSError as error:
                logger.warning("the old checkpoint %s stays, it can't be removed: %s", path, error)
    return removed


def mark_best(folder: Path, step: int, mean_return: float) -> None:
    """Points best.json at a step's checkpoint. Raises CheckpointError if that isn't complete."""
    try:
        weights = _weights_sha256(_checkpoint_path(folder, step))
    except CheckpointError as error:
        raise CheckpointError(f"step {step} can't be the best: {error}") from error
    try:
        write_atomically(folder / "best.json", _seal(Best(step, float(mean_return), weights)._asdict()))
    except OSError as error:
        raise CheckpointError(
            f"can't write {folder / 'best.json'}: {error}; the old one is intact"
        ) from error


def best_checkpoint(folder: Path) -> Best | None:
    """The step that was marked best; None if none was.

    None also, with a warning, if best.json is damaged or the step's checkpoint is gone or holds other weights now.
    Raises CheckpointFormatError if that checkpoint is of a format that isn't read here.
    """
    try:
        best = _read_best(folder)
        if best is not None:
            _best_path(folder, best)
    except CheckpointFormatError:
        raise
    except CheckpointError as error:
        logger.warning("the best checkpoint can't be used, going on as if none was marked: %s", error)
        return None
    return best


def best_or_latest(folder: Path) -> Checkpoint | None:
    """The checkpoint that was marked best, else the newest intact one; None if there is none.

    A best one that can't be used is logged as a warning. Raises CheckpointError as `latest_checkpoint` does.
    """
    best = best_checkpoint(folder)
    if best is not None:
        try:
            return read_checkpoint(_best_path(folder, best))
        except CheckpointFormatError:
            raise
        except CheckpointError as error:
            logger.warning("the best checkpoint can't be used, taking the latest: %s", error)
    return latest_checkpoint(folder)


def _best_path(folder: Path, best: Best) -> Path:
    """Of the checkpoint that was marked; while its step is being replaced, of what it was. Raises CheckpointError."""
    path = _checkpoint_path(folder, best.step)
    candidates = [path, *filter(Path.exists, [_replaced(path)])]
    for candidate in candidates:
        try:
            if best.weights_sha256 in (None, _weights_sha256(candidate)):
                return candidate
        except CheckpointFormatError:
            raise
        except CheckpointError:
            if candidate == candidates[-1]:
                raise
    raise CheckpointError(f"{path} holds other weights than those that were marked best")


def _read_best(folder: Path) -> Best | None:
    """What best.json says, whether or not its checkpoint is there. Raises CheckpointError if it is damaged."""
    path = folder / "best.json"
    try:
        data = path.read_bytes()
        content = json.loads(data)
        if content.keys() != {"step", "mean_return"}:  # as it was before it held a checksum
            del content["sha256"]
            if data != _seal(content):
                raise CheckpointError(f"{path} has changed (sha256 differs); restore it or remove it")
        return Best(int(content["step"]), float(content["mean_return"]), content.get("weights_sha256"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"can't read {path} ({error}); restore it or remove it") from error


def _seal(content: Mapping[str, Any]) -> bytes:
    """As JSON, with the sha256 of all else at the end."""
    checksum = _sha256(json.dumps(content, allow_nan=False).encode())
    return json.dumps({**content, "sha256": checksum}, allow_nan=False).encode()


def _weights_sha256(path: Path) -> str | None:
    """Of a checkpoint's weights, by its manifest."""
    entry = _read_manifest(path)["files"].get("weights.safetensors")
    return entry and entry["sha256"]


def _serialize(tensors: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any]) -> dict[str, bytes]:
    files = {}
    for stem, arrays in tensors.items():
        if not STEM.fullmatch(stem):
            raise CheckpointError(f"file stem {stem!r}: expected lower-case letters, digits and _")
        # safetensors stores the memory as it lies, so that a transposed view would come back scrambled.
        ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        try:
            files[f"{stem}.safetensors"] = safetensors.numpy.save(ordered)
        except Exception as error:
            raise CheckpointError(f"the arrays of {stem!r} can't be stored: {error}") from error
    try:
        files["state.json"] = json.dumps(dict(state), allow_nan=False, indent=2).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"a checkpoint's state must fit JSON, without NaN: {error}") from error
    return files


def _manifest(step: int, files: Mapping[str, bytes]) -> bytes:
    entries = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()}
    return json.dumps({"format_version": FORMAT_VERSION, "step": step, "files": entries}, indent=2).encode()


def _is_intact(path: Path) -> bool:
    try:
        manifest = _read_manifest(path)
        if path not in _verified or _verified[path] != _stamp(path):
            with _verifying(path):
                for name, entry in manifest["files"].items():
                    _check(path / name, entry)
    except CheckpointError:
        return False
    return True


@contextmanager
def _verifying(path: Path) -> Iterator[None]:
    """The folder counts as verified, as it looked in the beginning, unless the block raises."""
    _verified.pop(path, None)
    stamp = _stamp(path)
    yield
    _verified[path] = stamp


def _stamp(path: Path) -> Stamp:
    """Empty if the folder can't be read."""
    try:
        found = [(file.name, file.stat()) for file in path.iterdir()]
    except OSError:
        return ()
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found))


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint {path}; expected a folder step_…")
    done = _read(path / "DONE", "it is incomplete: DONE is missing")
    data = _read(path / "manifest.json", "manifest.json is missing")
    if done != _sha256(data).encode():
        raise _corrupt(path, "manifest.json or DONE has changed")
    manifest = json.loads(data)
    if manifest["format_version"] not in READABLE:
        raise CheckpointFormatError(
            f"the checkpoint {path} has format {manifest['format_version']}, this version of distributed_muzero "
            f"reads {' and '.join(map(str, READABLE))}; use the version that wrote it, or start a new run"
        )
    return manifest


def _format_error(path: Path) -> CheckpointFormatError | None:
    """Why a whole checkpoint isn't ours to load, replace or remove; None if it is, or is none."""
    try:
        _read_manifest(path)
    except CheckpointFormatError as error:
        return error
    except CheckpointError:
        pass
    return None


def _read_verified(path: Path, entry: Mapping[str, Any]) -> bytes:
    data = _read(path, f"{path.name} is missing")
    _compare(path, entry, len(data), _sha256(data))
    return data


def _check(path: Path, entry: Mapping[str, Any]) -> None:
    """As `_read_verified`, but never holds the whole file."""
    try:
        with path.open("rb") as file:
            _compare(path, entry, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise _corrupt(path.parent, f"{path.name} can't be read ({error})") from error


def _compare(path: Path, entry: Mapping[str, Any], num_bytes: int, sha256: str) -> None:
    if num_bytes != entry["bytes"]:
        raise _corrupt(path.parent, f"{path.name} has {num_bytes} bytes instead of {entry['bytes']}")
    if sha256 != entry["sha256"]:
        raise _corrupt(path.parent, f"{path.name} has changed (sha256 differs)")


def _read(path: Path, problem: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _corrupt(path.parent, problem) from None
    except OSError as error:
        raise _corrupt(path.parent, f"{path.name} can't be read ({error})") from error


def _corrupt(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {path} can't be used: {problem}. Use an earlier one, or restore it"
    )


def _checkpoint_folders(folder: Path) -> list[Path]:
    """Newest first; one set aside comes after its successor."""
    found = [path for path in folder.iterdir() if FOLDER.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_order, reverse=True)


def _order(path: Path) -> tuple[int, bool]:
    match = FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match[1]), match[2] is None


def _set_aside(path: Path) -> None:
    """Frees the name of a checkpoint. An intact one stays readable until its successor is there; a broken one
    goes, and leaves what an earlier, interrupted replacement had set aside."""
    if _is_intact(path):
        _remove(_replaced(path))
        path.rename(_replaced(path))
    else:
        _remove(path)


def _checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def _replaced(path: Path) -> Path:
    return path.with_name(f"{path.name}.replaced")


def _remove(path: Path) -> None:
    """Takes the name away first: a kill in the middle leaves a leftover, not half a checkpoint."""
    if path.exists():
        doomed = path.rename(path.with_name(f"{LEFTOVER}removing-{path.name}"))
        _verified.pop(path, None)
        sync_folder(path.parent)
        _delete(doomed)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(f"{LEFTOVER}*"):
        _delete(path)


def _delete(leftover: Path) -> None:
    """What the disk doesn't let go, such as a file that is open on NFS, stays; the next write tries again."""
    try:
        shutil.rmtree(leftover)
    except OSError as error:
        logger.warning("%s stays for now, it can't be removed: %s", leftover, error)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
