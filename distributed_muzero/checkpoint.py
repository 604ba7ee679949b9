"""Checkpoints: atomic, checksummed, versioned; safetensors and JSON, never pickle.

    checkpoints/step_00001000/{weights.safetensors, optimizer.safetensors, …, state.json, manifest.json, DONE}
    checkpoints/best.json       the step whose evaluation was the best; pruning spares it

manifest.json holds size and sha256 of every file, DONE the sha256 of manifest.json: no bit goes unwatched.
All of it is written under another name, DONE last, and then renamed: a kill leaves a whole checkpoint or none.

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from distributed_muzero.errors import CheckpointError
from distributed_muzero.files import sync_folder, write_atomically, write_synced

FORMAT_VERSION = 2
READABLE = (1, 2)
STEM = re.compile(r"[a-z][a-z0-9_]*")
FOLDER = re.compile(r"step_(\d{8,})(\.replaced)?")  # .replaced: set aside until its successor is there
LEFTOVER = ".leftover-"  # prefix of folders that are being written or removed

logger = logging.getLogger(__name__)

Tensors = dict[str, dict[str, np.ndarray]]  # file stem -> name -> array


class Checkpoint(NamedTuple):
    path: Path
    step: int  # learner steps
    tensors: Tensors
    state: dict[str, Any]


class Best(NamedTuple):
    step: int
    mean_return: float


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any]
) -> Path:
    """Writes one checkpoint, durable when this returns, and returns its folder. One writer at a time.

    tensors: file stem (`weights`, `optimizer`) -> name -> array.   state: what JSON can hold, no NaN.
    A checkpoint of the same step is replaced once the new one is complete. Raises CheckpointError when
    something can't be stored or the disk refuses; earlier checkpoints stay as they were.
    """
    files = _serialize(tensors, state)
    manifest = _manifest(step, files)
    path = _checkpoint_path(folder, step)
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
        _remove(_replaced(path))
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs its space back
        raise CheckpointError(
            f"can't write the checkpoint {path}: {error}; earlier checkpoints are intact. Free some space or "
            "mend the folder's permissions"
        ) from error
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Verifies every file of a checkpoint, then loads it. Raises CheckpointError: missing, incomplete,
    corrupt, or written in another format."""
    step, files = _verify(path)
    try:
        state = json.loads(files.pop("state.json"))
        tensors = {
            name.removesuffix(".safetensors"): safetensors.numpy.load(data) for name, data in files.items()
        }
    except Exception as error:  # its checksums hold, so it was written like this
        raise _corrupt(path, f"its files can't be parsed ({error})") from error
    return Checkpoint(path, step, tensors, state)


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is intact; None if none was ever written.

    Every newer one that had to be skipped is logged as a warning. Raises CheckpointError, with all reasons,
    if there are checkpoints but no intact one.
    """
    reasons = []
    for path in _checkpoint_folders(folder):
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            logger.warning("skipped a checkpoint and fell back to step %d: %s", checkpoint.step, reason)
        return checkpoint
    if reasons:
        raise CheckpointError(f"no intact checkpoint in {folder}:\n  " + "\n  ".join(reasons))
    return None


def prune_checkpoints(folder: Path, keep: int) -> list[Path]:
    """Removes what is older than the last `keep` intact checkpoints, but the best; returns what it removed.

    A corrupt one doesn't count, so that there is always one to fall back to. An unreadable best.json stops
    pruning: it is better to hold too many than to lose the best.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    try:
        best = best_checkpoint(folder)
    except CheckpointError as error:
        logger.warning("kept all checkpoints: %s", error)
        return []
    paths = _checkpoint_folders(folder)
    kept = list(itertools.islice(filter(_is_intact, paths), keep))
    if len(kept) < keep:
        return []
    spared = _checkpoint_path(folder, best.step) if best else None
    removed = [path for path in paths if path != spared and _order(path) < _order(kept[-1])]
    for path in removed:
        _remove(path)
    return removed


def mark_best(folder: Path, step: int, mean_return: float) -> None:
    """Points best.json at a step's checkpoint. Raises CheckpointError if that isn't complete."""
    if not (_checkpoint_path(folder, step) / "DONE").exists():
        raise CheckpointError(f"step {step} can't be the best: {folder} holds no complete checkpoint of it")
    data = json.dumps({"step": step, "mean_return": float(mean_return)}, allow_nan=False)
    try:
        write_atomically(folder / "best.json", data.encode())
    except OSError as error:
        raise CheckpointError(
            f"can't write {folder / 'best.json'}: {error}; the old one is intact"
        ) from error


def best_checkpoint(folder: Path) -> Best | None:
    """The step that was marked best; None if none was. Raises CheckpointError if best.json can't be read."""
    try:
        pointer = json.loads((folder / "best.json").read_text(encoding="utf-8"))
        return Best(int(pointer["step"]), float(pointer["mean_return"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"can't read {folder / 'best.json'} ({error}); remove it") from error


def best_or_latest(folder: Path) -> Checkpoint | None:
    """The checkpoint that was marked best, else the newest intact one; None if there is none.

    A best one that can't be used is logged as a warning. Raises CheckpointError as `latest_checkpoint` does.
    """
    try:
        best = best_checkpoint(folder)
        if best is not None:
            return read_checkpoint(_checkpoint_path(folder, best.step))
    except CheckpointError as error:
        logger.warning("the best checkpoint can't be used, taking the latest: %s", error)
    return latest_checkpoint(folder)


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


def _verify(path: Path) -> tuple[int, dict[str, bytes]]:
    """The step and the content of every file, once all checksums hold."""
    manifest = _read_manifest(path)
    files = {name: _read_verified(path / name, entry) for name, entry in manifest["files"].items()}
    return manifest["step"], files


def _is_intact(path: Path) -> bool:
    try:
        _verify(path)
    except CheckpointError:
        return False
    return True


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint {path}; expected a folder step_…")
    done = _read(path / "DONE", "it is incomplete: DONE is missing")
    data = _read(path / "manifest.json", "manifest.json is missing")
    if done != _sha256(data).encode():
        raise _corrupt(path, "manifest.json or DONE has changed")
    manifest = json.loads(data)
    if manifest["format_version"] not in READABLE:
        raise CheckpointError(
            f"the checkpoint {path} has format {manifest['format_version']}, this version of distributed_muzero "
            f"reads {' and '.join(map(str, READABLE))}; use the version that wrote it, or start a new run"
        )
    return manifest


def _read_verified(path: Path, entry: Mapping[str, Any]) -> bytes:
    data = _read(path, f"{path.name} is missing")
    if len(data) != entry["bytes"]:
        raise _corrupt(path.parent, f"{path.name} has {len(data)} bytes instead of {entry['bytes']}")
    if _sha256(data) != entry["sha256"]:
        raise _corrupt(path.parent, f"{path.name} has changed (sha256 differs)")
    return data


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
        sync_folder(path.parent)
        shutil.rmtree(doomed)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(f"{LEFTOVER}*"):
        shutil.rmtree(path)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
