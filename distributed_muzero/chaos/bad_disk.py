"""The disk below a shard, as the storm makes it: it refuses now and then, and a power cut takes what isn't synced."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

SHARE_OF_FAULTS = 0.03  # of calls that begin a fault
SHARE_OF_STRETCHES = 0.15  # of faults that last for more calls than one
STRETCH = (20, 60)  # calls
MAX_DELAY_SECONDS = 0.01  # a disk that fails takes its time to say so
ERRORS = (errno.ENOSPC, errno.EIO)


class BadDisk:
    """Makes os.write and os.fsync fail at random for a folder and what lies in it. A failing write may write a part."""

    def __init__(self, folder: Path, seed: int):
        self.num_faults = 0  # calls that failed
        self._folder = str(folder.resolve())
        self._rng = np.random.default_rng([seed, 2])
        self._lock = threading.Lock()
        self._left = 0  # calls that are still to fail of a stretch
        self._error = 0

    def install(self) -> None:
        """From now on, for the whole process."""
        real_write, real_fsync = os.write, os.fsync

        def write(descriptor: int, data: Any) -> int:
            if self._fails(descriptor):
                view = memoryview(data).cast("B")
                real_write(descriptor, view[: int(len(view) * max(self._random(-1, 1), 0))])
                self._refuse()
            return real_write(descriptor, data)

        def fsync(descriptor: int) -> None:
            if self._fails(descriptor):
                self._refuse()
            real_fsync(descriptor)

        vars(os).update(write=write, fsync=fsync)

    def _fails(self, descriptor: int) -> bool:
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith(self._folder):
            return False
        with self._lock:
            if self._left == 0 and self._rng.random() < SHARE_OF_FAULTS:
                is_stretch = self._rng.random() < SHARE_OF_STRETCHES
                self._left = int(self._rng.integers(*STRETCH)) if is_stretch else 1
                self._error = int(self._rng.choice(ERRORS))
            fails = self._left > 0
            self._left -= fails
            self.num_faults += fails
        return fails

    def _refuse(self) -> None:
        time.sleep(self._random(0, MAX_DELAY_SECONDS))
        raise OSError(self._error, os.strerror(self._error))

    def _random(self, low: float, high: float) -> float:
        with self._lock:
            return float(self._rng.uniform(low, high))


def record_syncs(path: Path, syncs: bool) -> None:
    """From now on os.fsync writes to `path` what it made durable: a file's length, or the names in a folder.

    syncs: False for a disk that does nothing at all when asked.
    """
    real = os.fsync
    record = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def fsync(descriptor: Any) -> None:
        if not syncs:
            return
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        target = Path(os.readlink(f"/proc/self/fd/{number}"))
        # What is there before the call: only that is promised after it.
        if target.is_dir():
            durable: dict[str, Any] = {"folder": str(target), "names": os.listdir(target)}
        else:
            durable = {"file": str(target), "length": os.fstat(number).st_size}
        real(number)
        os.write(record, json.dumps(durable).encode() + b"\n")

    vars(os)["fsync"] = fsync


def cut_to_synced(shard_folder: Path, synced: Path) -> None:
    """What a power cut leaves of a shard's logs: bytes and names that an fsync has covered, by `record_syncs`."""
    lengths: dict[str, int] = {}
    names: dict[str, set[str]] = {}
    lines = synced.read_bytes().splitlines(keepends=True) if synced.exists() else []
    for line in lines:
        if not line.endswith(b"\n"):
            continue
        durable = json.loads(line)
        if "file" in durable:
            lengths[durable["file"]] = durable["length"]
        else:
            names[durable["folder"]] = set(durable["names"])
    for path in shard_folder.glob("*/segment_*.log"):
        if str(path) not in lengths or path.name not in names.get(str(path.parent), ()):
            path.unlink()
        elif lengths[str(path)] < path.stat().st_size:
            os.truncate(path, lengths[str(path)])
