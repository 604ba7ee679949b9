"""The append-only, checksummed log under a replay shard. It knows records (kind, payload), not episodes.

`log_format.py` draws its files and reads them; here they are locked, written, synced and recovered.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from distributed_muzero.errors import LogError
from distributed_muzero.files import sync_folder
from distributed_muzero.replay.log_format import (
    RECORD,
    SEGMENT,
    Damage,
    Record,
    check_formats,
    list_segments,
    padded,
    read_segment,
    record_header,
    reported,
    segment_header,
    segment_path,
)

REMEMBERED_GENERATIONS = 64


class Segment(NamedTuple):
    number: int
    num_bytes: int


@dataclass
class _OpenSegment:
    number: int
    descriptor: int
    size: int = 0
    synced_size: int = 0


class ReplayLog:
    """Writes one log folder, which it locks. Nothing is promised before sync() returns.

    Threads: sync() and drop_oldest() may run in another thread than all other calls, which go on meanwhile.

    A disk that refuses raises LogError and leaves the log usable. What isn't promised by then is given up, the next
    append() begins a new segment, and `generation` rises: a failed write() gives up what wasn't written yet, a failed
    sync() what wasn't synced. So a record that append() put into generation g is stored if a sync() that began after
    it returns g as well; if it raises or returns more, append it again. A recovery may find the first copy all the
    same, where the disk refused to cut it off too.
    """

    def __init__(self, folder: Path, segment_bytes: int, lock_seconds: float = 10.0):
        """Makes and locks the folder. Raises LogError if another process still holds it after `lock_seconds`.

        A segment ends before it would grow past `segment_bytes`; a record larger than that gets one of its own.
        """
        self.folder = folder
        self.segment_bytes = segment_bytes
        self.damage = Damage()
        self.generation = 0
        self.num_refusals = 0  # times that the disk failed to write, sync or drop
        self.num_pending = 0
        with reported(f"can't make the replay log's folder {folder}"):
            _make_folder(folder)
        self._sizes: dict[int, int] = {}
        self._folder_lock: int | None = _lock_folder(folder, lock_seconds)
        try:
            self._sizes = list_segments(folder)
        except LogError:
            os.close(self._folder_lock)
            raise
        self._last_number = max(self._sizes, default=0)
        # An empty folder has nothing to recover.
        self._ready = not self._sizes
        self.num_appended = 0  # records
        self._num_synced: dict[
            int, int
        ] = {}  # of them, by each of the newest generations that a sync has covered
        self._lock = threading.Lock()
        self._one_sync = threading.Lock()
        # Bytes that wait for write(), by segment; the last one may still be growing.
        self._pending: list[tuple[int, bytearray]] = []
        # The segment that takes the next record, with its size after everything pending.
        self._tail: Segment | None = None
        # Segments with bytes that may not be synced, and the growing one.
        self._open: list[_OpenSegment] = []
        self._folder_changed = False

    @property
    def segments(self) -> list[Segment]:
        """All files of the log, oldest first, the one being written last."""
        with self._lock:
            return [Segment(*item) for item in self._sizes.items()]

    @property
    def num_bytes(self) -> int:
        """Size of all segments' files together, without what is pending."""
        with self._lock:
            return sum(self._sizes.values())

    def recover(self) -> Iterator[Record]:
        """All intact records in the order of writing; they are durable when it ends. Exhaust it before append().

        Damage is counted in `self.damage`. A torn tail is cut off; other damage stays where it is, stepped over.
        Raises LogError for another format version, before it changes anything, and for a disk that refuses.
        """
        if self.num_appended or self._folder_lock is None:
            raise LogError(f"{self.folder}: recover() after append() or close()")
        self.damage = Damage()
        numbers = list(self._sizes)
        check_formats(self.folder, numbers)
        for number in numbers:
            is_newest = number == numbers[-1]
            with reported(f"can't read {self.folder}"):
                good_bytes = yield from read_segment(self.folder, number, is_newest, self.damage)
            if is_newest and good_bytes == 0:
                self._remove(number)
            else:
                self._settle(number, good_bytes if is_newest else self._sizes[number])
        with reported(f"can't sync {self.folder}"):
            sync_folder(self.folder)
        self._ready = True

    def append(self, kind: int, payload: bytes | bytearray | memoryview) -> tuple[int, int]:
        """Copies a record into memory, for the next write() or sync().

        kind: 0 … 255.   payload: any C-contiguous buffer, may be empty.
        Returns the number of the segment that it will lie in, and its generation.
        """
        if not self._ready:
            raise LogError(f"{self.folder}: append() before recover() was exhausted, or after close()")
        view = memoryview(payload)
        body = view.cast("B") if view.nbytes else memoryview(b"")
        padding, body_checksum = padded(body)
        num_bytes = RECORD.size + len(body) + len(padding)
        with self._lock:
            number, offset, pending = self._place(num_bytes)
            header = record_header(number, offset, kind, len(body), body_checksum)
            # At once, so that no half record stays where memory is short.
            pending += b"".join((header, body, padding))
            self._tail = Segment(number, offset + num_bytes)
            self.num_appended += 1
            self.num_pending += 1
            return number, self.generation

    def write(self) -> int:
        """Hands pending records to the operating system, where they survive the process, but no power cut.

        Returns their generation. Raises LogError, see the class.
        """
        with self._lock:
            self._write_pending()
            return self.generation

    def sync(self) -> int:
        """Makes every record durable that was appended before. Returns their generation. Raises LogError."""
        with self._one_sync:
            with self._lock:
                self._write_pending()
                generation, num_appended = self.generation, self.num_appended
                to_sync = [
                    (segment, segment.size) for segment in self._open if segment.size > segment.synced_size
                ]
                folder_changed, self._folder_changed = self._folder_changed, False
            try:
                for segment, _ in to_sync:
                    os.fsync(segment.descriptor)
                if folder_changed:
                    sync_folder(self.folder)
            except BaseException as error:
                self._give_up_unsynced()
                if not isinstance(error, OSError):
                    raise
                raise LogError(
                    f"can't sync the replay log {self.folder}: {error}; records since the last sync are not stored, "
                    "earlier records are intact; check the disk, then append them again"
                ) from error
            with self._lock:
                for segment, size in to_sync:
                    segment.synced_size = size
                self._close_finished()
                self._num_synced[generation] = num_appended
                self._num_synced.pop(generation - REMEMBERED_GENERATIONS, None)
            return generation

    def has_synced(self, generation: int, number: int) -> bool:
        """Whether the record of that generation that was the `number`-th to be appended is durable.

        For the newest generations only. A sync may cover a record that was appended after the sync was asked for.
        """
        with self._lock:
            return number <= self._num_synced.get(generation, 0)

    def start_segment(self) -> None:
        """The next append() begins a new segment, so that everything before can be dropped without it."""
        with self._lock:
            self._tail = None

    def drop_oldest(self) -> None:
        """Removes the oldest segment with all its records, durably. One thread at a time.

        Raises LogError if it is the only one, since that one is being written, or if the disk refuses.
        """
        with self._lock:
            if not self._ready or len(self._sizes) < 2:
                raise LogError(f"{self.folder} has no segment to drop before the one being written")
            number = next(iter(self._sizes))
        path = segment_path(self.folder, number)
        try:
            # Not under the lock: a large file takes its time.
            path.unlink(missing_ok=True)
            with self._lock:
                self._sizes.pop(number, None)
            sync_folder(self.folder)
        except OSError as error:
            with self._lock:
                self.num_refusals += 1
            raise LogError(f"can't drop {path}: {error}") from error

    def close(self) -> None:
        """Syncs and gives the folder free, also when the sync raises LogError. Closing twice is fine."""
        if self._folder_lock is None:
            return
        self._ready = False
        try:
            self.sync()
        finally:
            for segment in self._open:
                os.close(segment.descriptor)
            self._open.clear()
            os.close(self._folder_lock)
            self._folder_lock = None

    def _place(self, num_bytes: int) -> tuple[int, int, bytearray]:
        """Number, offset and pending bytes of the segment for the next record; begins one where it doesn't fit."""
        tail = self._tail
        if tail is None or tail.num_bytes + num_bytes > self.segment_bytes:
            self._last_number += 1
            self._pending.append((self._last_number, bytearray(segment_header())))
            return self._last_number, SEGMENT.size, self._pending[-1][1]
        if not self._pending:
            self._pending.append((tail.number, bytearray()))
        return tail.number, tail.num_bytes, self._pending[-1][1]

    def _write_pending(self) -> None:
        """Under the lock. All pending records reach their files, or none of them."""
        touched: list[tuple[_OpenSegment, int]] = []
        try:
            for number, data in self._pending:
                segment = self._opened(number)
                touched.append((segment, segment.size))
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(segment.descriptor, rest) :]
                segment.size += len(data)
                self._sizes[number] = segment.size
        except BaseException as error:
            for segment, size in touched:
                self._cut(segment, size)
                if size == 0:
                    self._open.remove(segment)
                    _close(segment)
            self._give_up_pending()
            if not isinstance(error, OSError):
                raise
            raise LogError(
                f"can't write the replay log {self.folder}: {error}; the records of this write are not stored, "
                "earlier records are intact; make room or check the disk, then append them again"
            ) from error
        self._pending.clear()
        self.num_pending = 0

    def _opened(self, number: int) -> _OpenSegment:
        if not self._open or self._open[-1].number != number:
            path = segment_path(self.folder, number)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._open.append(_OpenSegment(number, descriptor))
            self._folder_changed = True
        return self._open[-1]

    def _give_up_pending(self) -> None:
        self._pending.clear()
        self.num_pending = 0
        self._tail = None
        self.generation += 1
        self.num_refusals += 1

    def _give_up_unsynced(self) -> None:
        """After a failed fsync, a second one may succeed without having stored anything: no file is trusted again."""
        with self._lock:
            self._give_up_pending()
            for segment in self._open:
                self._cut(segment, segment.synced_size)
                _close(segment)
            self._open.clear()

    def _cut(self, segment: _OpenSegment, size: int) -> None:
        """Cuts a file, or removes one that would be empty, as far as a failing disk lets it; recovery sees the rest."""
        with suppress(OSError):
            if size:
                os.ftruncate(segment.descriptor, size)
            else:
                segment_path(self.folder, segment.number).unlink(missing_ok=True)
        with suppress(OSError):
            status = os.fstat(segment.descriptor)
            segment.size = status.st_size
            if status.st_nlink:
                self._sizes[segment.number] = segment.size
            else:
                self._sizes.pop(segment.number, None)

    def _close_finished(self) -> None:
        growing = {number for number, _ in self._pending} | ({self._tail.number} if self._tail else set())
        for segment in list(self._open):
            if segment.number not in growing and segment.size == segment.synced_size:
                _close(segment)
                self._open.remove(segment)

    def _remove(self, number: int) -> None:
        path = segment_path(self.folder, number)
        with reported(f"can't remove {path}"):
            path.unlink(missing_ok=True)
        del self._sizes[number]

    def _settle(self, number: int, num_bytes: int) -> None:
        """Makes a segment that was read durable at this size, since its writer may have died before it could."""
        path = segment_path(self.folder, number)
        with reported(f"can't repair {path}"):
            descriptor = os.open(path, os.O_RDWR)
            try:
                if num_bytes < self._sizes[number]:
                    os.ftruncate(descriptor, num_bytes)
                    self._sizes[number] = num_bytes
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _close(segment: _OpenSegment) -> None:
    with suppress(OSError):
        os.close(segment.descriptor)


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def _lock_folder(folder: Path, lock_seconds: float) -> int:
    """A descriptor that holds the folder's lock until it is closed, by its process' end at the latest."""
    with reported(f"can't lock {folder}"):
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + lock_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    raise LogError(
                        f"the replay log {folder} is in use by another process, also after {lock_seconds:g} s; "
                        "stop the run that it belongs to first"
                    ) from error
            time.sleep(0.02)
