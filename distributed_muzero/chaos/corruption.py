"""Damages checkpoints in every way that a disk can, and counts what was noticed.

What is checked is taken from the module `checkpoint` when it is called: with a part of it replaced by a broken one,
the counts must tell.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import resource
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero import checkpoint
from distributed_muzero.chaos.child import run_with_offsets
from distributed_muzero.errors import CheckpointError, CheckpointFormatError, DistributedMuZeroError

OLDER, NEWEST, NEXT = 1, 2, 3  # steps
NUM_FILES = 6  # of a checkpoint, manifest and DONE included

Content = tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]  # tensors and state


class CorruptionResult(NamedTuple):
    """How often what happened, after `n` damages one at a time. An intact checkpoint was always there."""

    n: int
    fell_back: int  # the intact checkpoint came, as it was written, and a warning named what was damaged
    refused: int  # CheckpointError
    loaded_silently: int  # what came isn't the intact checkpoint as it was written
    fell_back_silently: int
    crashed: int  # any other exception

    @property
    def broken(self) -> int:
        return self.n - self.fell_back


class VersionResult(NamedTuple):
    n: int
    broken: list[str]  # which version, and what happened


class DiskFullResult(NamedTuple):
    n: int
    refused: int  # writing raised CheckpointError
    previous_loads: int  # the older checkpoint came afterwards, as it was written
    goes_on: bool  # with space again, the next checkpoint is written and loads

    @property
    def broken(self) -> int:
        return 2 * self.n - self.refused - self.previous_loads + (not self.goes_on)


def run_corruptions(folder: Path, seed: int, n_flips: int = 200, n_truncations: int = 50) -> CorruptionResult:
    """Flips a bit of, or cuts short, a random file of the newest of two checkpoints, or best.json, which names the
    older one; loads the latest, or the best; undoes it.

    folder: new or empty. Raises DistributedMuZeroError if the undamaged checkpoints don't load.
    """
    rng = np.random.default_rng(seed)
    older, newest = make_content(rng), make_content(rng)
    checkpoint.write_checkpoint(folder, OLDER, *older)
    path = checkpoint.write_checkpoint(folder, NEWEST, *newest)
    checkpoint.mark_best(folder, OLDER, 450.5)
    files = [*sorted(path.iterdir()), folder / "best.json"]
    counts: Counter[str] = Counter()
    for damage in [flip_bit] * n_flips + [cut_short] * n_truncations:
        file = files[rng.integers(len(files))]
        data = file.read_bytes()
        file.write_bytes(damage(data, rng))
        if file.name == "best.json":
            counts[_outcome(checkpoint.best_or_latest, folder, file.name, NEWEST, newest)] += 1
        else:
            counts[_outcome(checkpoint.latest_checkpoint, folder, path.name, OLDER, older)] += 1
        file.write_bytes(data)
    latest, best = checkpoint.latest_checkpoint(folder), checkpoint.best_or_latest(folder)
    if not (_is(latest, NEWEST, newest) and _is(best, OLDER, older)):
        raise DistributedMuZeroError(f"the undamaged checkpoints in {folder} don't load as they were written")
    of_each = {name: counts[name] for name in CorruptionResult._fields if name != "n"}
    return CorruptionResult(n_flips + n_truncations, **of_each)


def run_other_versions(folder: Path, seed: int) -> VersionResult:
    """Readable formats must load; all others be refused by a message that names theirs and ours, although an older
    checkpoint of ours is beside them, and neither be replaced nor pruned."""
    rng = np.random.default_rng(seed)
    older, newest = make_content(rng), make_content(rng)
    readable = checkpoint.READABLE
    versions = (*readable, min(readable) - 1, max(readable) + 1, max(readable) + 97)
    broken = []
    for version in versions:
        beside = folder / f"format_{version}"
        checkpoint.write_checkpoint(beside, OLDER, *older)
        path = checkpoint.write_checkpoint(beside, NEWEST, *newest)
        _rewrite_version(path, version)
        broken += _faults_with_format(path, version, newest)
        if version not in readable:
            broken += _losses_of_format(path, version, older)
    return VersionResult(len(versions), broken)


def run_disk_full(folder: Path, seed: int, n: int = 20) -> DiskFullResult:
    """`check_disk_full` in a process of its own, which no other writing of this one can disturb."""
    found = run_with_offsets("distributed_muzero.chaos.corruption", folder, seed, n)
    return DiskFullResult(**found)


def check_disk_full(folder: Path, seed: int, n: int) -> DiskFullResult:
    """Writes a checkpoint `n` times while the kernel refuses to let its files (in turn) grow beyond a random size."""
    rng = np.random.default_rng(seed)
    older, newest = make_content(rng), make_content(rng)
    checkpoint.write_checkpoint(folder, OLDER, *older)
    refused = previous_loads = 0
    with _warnings():
        for attempt in range(n):
            try:
                with _full_disk(attempt % NUM_FILES, rng.random()):
                    checkpoint.write_checkpoint(folder, NEWEST, *newest)
            except CheckpointError:
                refused += 1
            previous_loads += _is(_load(folder), OLDER, older)
    checkpoint.write_checkpoint(folder, NEWEST, *newest)
    return DiskFullResult(n, refused, previous_loads, _is(_load(folder), NEWEST, newest))


def make_content(rng: np.random.Generator) -> Content:
    """Random tensors and a state of the kind that a learner gives."""
    weights = {"a": rng.normal(size=(16, 8)).astype(np.float32), "b": rng.normal(size=8).astype(np.float32)}
    optimizer = {"vector": rng.normal(size=136).astype(np.float32), "step": np.float32(7).reshape(())}
    generators = {"cpu": rng.integers(256, size=500, dtype=np.uint8)}
    tensors: dict[str, dict[str, Any]] = {
        "weights": weights,
        "optimizer": optimizer,
        "generators": generators,
    }
    return tensors, {"learner_steps": int(rng.integers(1000)), "weights_version": 3, "ratio": rng.random()}


def flip_bit(data: bytes, rng: np.random.Generator) -> bytes:
    flipped = bytearray(data)
    flipped[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(flipped)


def cut_short(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data))]


def _outcome(
    load: Callable[[Path], checkpoint.Checkpoint | None],
    folder: Path,
    damaged: str,
    step: int,
    intact: Content,
) -> str:
    """Of loading while `damaged` is, where `intact` is still there; a field of CorruptionResult."""
    with _warnings() as warnings:
        try:
            found = load(folder)
        except CheckpointError:
            return "refused"
        except Exception:
            return "crashed"
    if not _is(found, step, intact):
        return "loaded_silently"
    return "fell_back" if any(damaged in warning for warning in warnings) else "fell_back_silently"


def _faults_with_format(path: Path, version: int, content: Content) -> list[str]:
    """What goes wrong in loading the newest checkpoint, which has that format."""
    readable = checkpoint.READABLE
    try:
        with _warnings():
            found = checkpoint.latest_checkpoint(path.parent)
    except CheckpointFormatError as error:
        ours = " and ".join(map(str, readable))
        is_named = f"format {version}," in str(error) and ours in str(error)
        return [f"format {version}: {error}"] if version in readable or not is_named else []
    except CheckpointError as error:
        return [f"format {version}: {error}"]
    if version not in readable:
        is_ours = found is not None and found.path == path
        return [f"format {version} was {'loaded' if is_ours else 'skipped'}"]
    return [] if _is(found, NEWEST, content) else [f"format {version} doesn't load as it was written"]


def _losses_of_format(path: Path, version: int, content: Content) -> list[str]:
    """Whether a writer replaces or prunes a checkpoint whose format isn't ours."""
    before = _files(path)
    try:
        checkpoint.write_checkpoint(path.parent, NEWEST, *content)
        return [f"a write in the place of format {version} wasn't refused"]
    except CheckpointFormatError:
        pass
    checkpoint.write_checkpoint(path.parent, NEXT, *content)
    checkpoint.prune_checkpoints(path.parent, keep=1)
    return [] if _files(path) == before else [f"format {version} was removed"]


def _files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.exists() else {}


def _is(found: checkpoint.Checkpoint | None, step: int, content: Content) -> bool:
    tensors, state = content
    if found is None or found.step != step or found.state != state or found.tensors.keys() != tensors.keys():
        return False
    return all(_same(found.tensors[stem], arrays) for stem, arrays in tensors.items())


def _same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == array.dtype and np.array_equal(found[name], array)
        for name, array in expected.items()
    )


def _load(folder: Path) -> checkpoint.Checkpoint | None:
    try:
        return checkpoint.latest_checkpoint(folder)
    except CheckpointError:
        return None


def _rewrite_version(path: Path, version: int) -> None:
    manifest = json.loads((path / "manifest.json").read_bytes())
    data = json.dumps({**manifest, "format_version": version}).encode()
    (path / "manifest.json").write_bytes(data)
    (path / "DONE").write_text(hashlib.sha256(data).hexdigest())


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the checkpoints' logger warns of meanwhile; kept from the terminal."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger, propagate = checkpoint.logger, checkpoint.logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)


@contextmanager
def _full_disk(file_number: int, share: float) -> Iterator[None]:
    """From the checkpoint's file of that number (from 0) on, no file may grow beyond that share of its size."""
    real: Callable[[Path, bytes], None] = checkpoint.write_synced
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    num_written = 0

    def write(path: Path, data: bytes) -> None:
        nonlocal num_written
        if num_written == file_number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(data)), hard))
        num_written += 1
        real(path, data)

    vars(checkpoint)["write_synced"] = write
    try:
        yield
    finally:
        vars(checkpoint)["write_synced"] = real
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Writes checkpoints to a disk that is full at random offsets."
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--offsets", type=int, default=20)
    options = parser.parse_args(arguments)
    print(json.dumps(check_disk_full(options.folder, options.seed, options.offsets)._asdict()))


if __name__ == "__main__":
    main()
