"""The append-only, checksummed log under a replay shard. It knows records (kind, payload), not episodes.

    folder/lock                    held by the one process that writes
    folder/segment_00000001.log    oldest records
    folder/segment_00000002.log    …

    segment  = magic 8 bytes | format version u32 | checksum u32 of these 12 bytes | records
    record   = marker 4 bytes | kind u8 | 3 zeros | payload length u64 | checksum u32 of payload and padding
             | checksum u32 of place and the 20 bytes before it | payload | zeros up to a multiple of 8

All numbers are little-endian. `place` is the segment's number (u64) and the record's offset in it (u64): a header
holds at its own place only, so bytes of a log inside a payload are never taken for records.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from distributed_muzero.errors import LogError
from distributed_muzero.files import sync_folder

FORMAT_VERSION = 1
MAGIC = b"DMZ-RLOG"
MARKER = b"\x9eREC"
ALIGNMENT = 8

_SEGMENT = struct.Struct("<8sII")
_RECORD = struct.Struct("<4sB3xQII")
_PLACE = struct.Struct("<QQ")
_CHECKSUM_BYTES = 4
_SEGMENT_NAME = re.compile(r"segment_(\d{8,})\.log")


class Record(NamedTuple):
    """What append() got. A payload that was read is a view of its whole segment: copy what is to be kept."""

    kind: int
    payload: memoryview | bytes
    segment: int


class Segment(NamedTuple):
    number: int
    num_bytes: int


@dataclass
class Damage:
    """What one reading of a log found. A tail is the end of the newest segment; corrupt is all that lies before.

    Neighbouring corrupt records count as one.
    """

    torn_tails: int = 0
    torn_bytes: int = 0
    corrupt_records: int = 0
    corrupt_bytes: int = 0


class Verification(NamedTuple):
    damage: Damage
    records_by_kind: dict[int, int]
    num_segments: int
    num_bytes: int


def checksum(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """CRC-32 of the data, going on from `start`."""
    return zlib.crc32(data, start)


def read(folder: Path, damage: Damage | None = None) -> Iterator[Record]:
    """All intact records in the order of writing; adds what is not intact to `damage`. Changes nothing.

    Needs no lock. A log that is written meanwhile may show its last record half, which counts as a torn tail.
    Raises LogError for a folder or file that can't be read, and for another format version.
    """
    numbers = list(_list_segments(folder))
    _check_formats(folder, numbers)
    for number in numbers:
        # The log's owner may have dropped it since the listing.
        with _reported(f"can't read {folder}"), suppress(FileNotFoundError):
            yield from _read_segment(folder, number, number == numbers[-1], damage or Damage())


def verify(folder: Path) -> Verification:
    """Reads the whole log as read() does, and counts."""
    damage = Damage()
    by_kind = Counter(record.kind for record in read(folder, damage))
    sizes = _list_segments(folder)
    return Verification(damage, dict(sorted(by_kind.items())), len(sizes), sum(sizes.values()))


@dataclass
class _OpenSegment:
    number: int
    descriptor: int
    size: int = 0
    synced_size: int = 0


class ReplayLog:
    """Writes one log folder, which it locks. Nothing is promised before sync() returns.

    Threads: all calls but sync() belong to one thread, the writer. sync() may run in another at the same time; the
    writer goes on during its fsync. Positions count the bytes appended since opening: what write() returned as p is
    durable as soon as sync() returns p or more.

    Failures raise LogError and leave the log usable; the next append() begins a new segment. These records are not
    promised then, and to be appended again:
    - write(): everything appended since the last write() that returned. It also raises if a sync() in another thread
      has lost such records.
    - sync(): everything that no sync() has covered yet. A later sync() doesn't cover it, though it returns a higher
      position: whoever waits for p and isn't yet durable has failed if p ≤ `failed_position`.
    A recovery may find such records all the same, so that they can come twice.
    """

    def __init__(self, folder: Path, segment_bytes: int, lock_seconds: float = 10.0):
        """Makes and locks the folder. Raises LogError if another process still holds it after `lock_seconds`.

        A segment ends before it would grow past `segment_bytes`; a record larger than that gets one of its own.
        """
        self.folder = folder
        self.segment_bytes = segment_bytes
        self.damage = Damage()
        self.failed_position = 0
        self.num_pending = 0
        with _reported(f"can't make the replay log's folder {folder}"):
            _make_folder(folder)
        self._folder_lock: int | None = _lock_folder(folder, lock_seconds)
        self._sizes = _list_segments(folder)
        self._last_number = max(self._sizes, default=0)
        # An empty folder has nothing to recover.
        self._ready = not self._sizes
        self._lock = threading.Lock()
        self._one_sync = threading.Lock()
        self._position = 0
        # Bytes that wait for write(), by segment; the last one may still be growing.
        self._pending: list[tuple[int, bytearray]] = []
        # The segment that takes the next record, with its size after everything pending.
        self._tail: Segment | None = None
        # Segments with bytes that may not be synced, and the growing one.
        self._open: list[_OpenSegment] = []
        self._folder_changed = False
        self._writer = threading.get_ident()
        self._writer_lost_records = False

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
        if self._position or self._folder_lock is None:
            raise LogError(f"{self.folder}: recover() after append() or close()")
        self.damage = Damage()
        numbers = list(self._sizes)
        _check_formats(self.folder, numbers)
        for number in numbers:
            is_newest = number == numbers[-1]
            with _reported(f"can't read {self.folder}"):
                good_bytes = yield from _read_segment(self.folder, number, is_newest, self.damage)
            if is_newest and good_bytes == 0:
                self._remove(number)
            else:
                self._settle(number, good_bytes if is_newest else self._sizes[number])
        with _reported(f"can't sync {self.folder}"):
            sync_folder(self.folder)
        self._ready = True

    def append(self, kind: int, payload: bytes | bytearray | memoryview) -> int:
        """Copies a record into memory, for the next write(). Returns the number of the segment that it will lie in.

        kind: 0 … 255.   payload: any C-contiguous buffer, may be empty.
        """
        if not self._ready:
            raise LogError(f"{self.folder}: append() before recover() was exhausted, or after close()")
        view = memoryview(payload)
        body = view.cast("B") if view.nbytes else memoryview(b"")
        padding = bytes(-len(body) % ALIGNMENT)
        body_checksum = checksum(padding, checksum(body))
        num_bytes = _RECORD.size + len(body) + len(padding)
        with self._lock:
            self._writer = threading.get_ident()
            number, offset, pending = self._place(num_bytes)
            pending += _record_header(number, offset, kind, len(body), body_checksum)
            pending += body
            pending += padding
            self._tail = Segment(number, offset + num_bytes)
            self._position += num_bytes
            self.num_pending += 1
        return number

    def write(self) -> int:
        """Hands pending records to the operating system, where they survive the process, but no power cut.

        Returns the position after them. Raises LogError, see the class.
        """
        with self._lock:
            if self._writer_lost_records:
                self._writer_lost_records = False
                self._forget_pending()
                raise LogError(
                    f"{self.folder}: a sync failed meanwhile; records appended since the last write are not stored, "
                    "append them again"
                )
            self._write_pending()
            return self._position

    def sync(self) -> int:
        """Makes every record durable that was appended before. Returns the position up to which the log is durable.

        Raises LogError, see the class.
        """
        with self._one_sync:
            with self._lock:
                self._write_pending()
                position = self._position
                to_sync = [
                    (segment, segment.size) for segment in self._open if segment.size > segment.synced_size
                ]
                folder_changed, self._folder_changed = self._folder_changed, False
            try:
                for segment, _ in to_sync:
                    os.fsync(segment.descriptor)
                if folder_changed:
                    sync_folder(self.folder)
            except OSError as error:
                self._give_up_unsynced()
                raise LogError(
                    f"can't sync the replay log {self.folder}: {error}; records since the last sync are not stored, "
                    "earlier records are intact; check the disk, then append them again"
                ) from error
            with self._lock:
                for segment, size in to_sync:
                    segment.synced_size = size
                self._close_finished()
            return position

    def start_segment(self) -> None:
        """The next append() begins a new segment, so that everything before can be dropped without it."""
        with self._lock:
            self._tail = None

    def drop_oldest(self) -> None:
        """Removes the oldest segment with all its records, durably.

        Raises LogError if it is the only one, since that one is being written, or if the disk refuses.
        """
        with self._lock:
            if not self._ready or len(self._sizes) < 2:
                raise LogError(f"{self.folder} has no segment to drop before the one being written")
            self._remove(next(iter(self._sizes)))
        with _reported(f"can't sync {self.folder}"):
            sync_folder(self.folder)

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
            self._pending.append((self._last_number, bytearray(_segment_header())))
            return self._last_number, _SEGMENT.size, self._pending[-1][1]
        if not self._pending:
            self._pending.append((tail.number, bytearray()))
        return tail.number, tail.num_bytes, self._pending[-1][1]

    def _write_pending(self) -> None:
        try:
            for number, data in self._pending:
                self._write_to_segment(number, data)
        except OSError as error:
            self._forget_pending()
            raise LogError(
                f"can't write the replay log {self.folder}: {error}; the records of this write are not stored, "
                "earlier records are intact; make room or check the disk, then append them again"
            ) from error
        self._pending.clear()
        self.num_pending = 0

    def _write_to_segment(self, number: int, data: bytearray) -> None:
        if not self._open or self._open[-1].number != number:
            path = _segment_path(self.folder, number)
            self._open.append(
                _OpenSegment(number, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            )
            self._folder_changed = True
        segment = self._open[-1]
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(segment.descriptor, rest) :]
        except OSError:
            self._cut(segment, segment.size)
            raise
        segment.size += len(data)
        self._sizes[number] = segment.size

    def _forget_pending(self) -> None:
        # A writer in another thread doesn't see the error of this sync(): its own next write() must tell it.
        if self._pending and threading.get_ident() != self._writer:
            self._writer_lost_records = True
        self._pending.clear()
        self.num_pending = 0
        self._tail = None

    def _give_up_unsynced(self) -> None:
        """After a failed fsync, a second one may succeed without having stored anything: no file is trusted again."""
        with self._lock:
            self.failed_position = self._position
            self._forget_pending()
            for segment in self._open:
                self._cut(segment, segment.synced_size)
                with suppress(OSError):
                    os.close(segment.descriptor)
            self._open.clear()

    def _cut(self, segment: _OpenSegment, size: int) -> None:
        """Cuts a file, or removes one that would be empty, as far as a failing disk lets it; recovery sees the rest."""
        with suppress(OSError):
            os.ftruncate(segment.descriptor, size)
            if size == 0:
                _segment_path(self.folder, segment.number).unlink(missing_ok=True)
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
                os.close(segment.descriptor)
                self._open.remove(segment)

    def _remove(self, number: int) -> None:
        path = _segment_path(self.folder, number)
        with _reported(f"can't remove {path}"):
            path.unlink(missing_ok=True)
        del self._sizes[number]

    def _settle(self, number: int, num_bytes: int) -> None:
        """Makes a segment that was read durable at this size, since its writer may have died before it could."""
        path = _segment_path(self.folder, number)
        with _reported(f"can't repair {path}"):
            descriptor = os.open(path, os.O_RDWR)
            try:
                if num_bytes < self._sizes[number]:
                    os.ftruncate(descriptor, num_bytes)
                    self._sizes[number] = num_bytes
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextmanager
def _reported(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LogError(f"{what}: {error}") from error


def _segment_path(folder: Path, number: int) -> Path:
    return folder / f"segment_{number:08d}.log"


def _list_segments(folder: Path) -> dict[int, int]:
    """Size in bytes by number, oldest first."""
    sizes = {}
    with _reported(f"can't list the replay log {folder}"):
        for path in folder.iterdir():
            # A log that is read without its lock may drop the file right now.
            with suppress(FileNotFoundError):
                if match := _SEGMENT_NAME.fullmatch(path.name):
                    sizes[int(match[1])] = path.stat().st_size
    return dict(sorted(sizes.items()))


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def _lock_folder(folder: Path, lock_seconds: float) -> int:
    """A descriptor that holds the folder's lock until it is closed, by its process' end at the latest."""
    with _reported(f"can't lock {folder}"):
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


def _segment_header() -> bytes:
    header = _SEGMENT.pack(MAGIC, FORMAT_VERSION, 0)[:-_CHECKSUM_BYTES]
    return header + checksum(header).to_bytes(_CHECKSUM_BYTES, "little")


def _record_header(number: int, offset: int, kind: int, length: int, body_checksum: int) -> bytes:
    header = _RECORD.pack(MARKER, kind, length, body_checksum, 0)[:-_CHECKSUM_BYTES]
    return header + checksum(_PLACE.pack(number, offset) + header).to_bytes(_CHECKSUM_BYTES, "little")


def _check_formats(folder: Path, numbers: Iterable[int]) -> None:
    for number in numbers:
        path = _segment_path(folder, number)
        with _reported(f"can't read {path}"), suppress(FileNotFoundError), path.open("rb") as file:
            _has_segment_header(file.read(_SEGMENT.size), path)


def _has_segment_header(data: bytes, path: Path) -> bool:
    """Whether it is there and intact. Raises LogError if it is, but of another format version."""
    if len(data) < _SEGMENT.size:
        return False
    magic, version, header_checksum = _SEGMENT.unpack_from(data)
    if magic != MAGIC or header_checksum != checksum(data[: _SEGMENT.size - _CHECKSUM_BYTES]):
        return False
    if version != FORMAT_VERSION:
        raise LogError(
            f"{path} holds replay log format {version}, this version reads format {FORMAT_VERSION}; "
            "resume the run with the distributed_muzero that wrote it, or start a new run"
        )
    return True


def _read_segment(folder: Path, number: int, is_newest: bool, damage: Damage) -> Generator[Record, None, int]:
    """Yields a segment's intact records, counts the gaps between them, returns where the last good byte ends."""
    path = _segment_path(folder, number)
    data = path.read_bytes()
    good_end = _SEGMENT.size if _has_segment_header(data, path) else 0
    for start, end, record in _intact_records(data, number):
        if start > good_end:
            damage.corrupt_records += 1
            damage.corrupt_bytes += start - good_end
        good_end = end
        yield record
    num_bad_bytes = len(data) - good_end
    if num_bad_bytes == 0 and data:
        return good_end
    if is_newest:
        damage.torn_tails += 1
        damage.torn_bytes += num_bad_bytes
    else:
        damage.corrupt_records += 1
        damage.corrupt_bytes += num_bad_bytes
    return good_end


def _intact_records(data: bytes, number: int) -> Iterator[tuple[int, int, Record]]:
    """(start, end, record) of each. A bad payload is stepped over as a whole; after a bad header it looks on."""
    view = memoryview(data)
    start = data.find(MARKER)
    while start >= 0:
        header = _intact_header(view, number, start)
        if header is None:
            start = data.find(MARKER, start + 1)
            continue
        kind, length, body_checksum, end = header
        body = start + _RECORD.size
        if checksum(view[body:end]) == body_checksum:
            yield start, end, Record(kind, view[body : body + length], number)
        start = data.find(MARKER, end)


def _intact_header(view: memoryview, number: int, start: int) -> tuple[int, int, int, int] | None:
    """Kind, payload length, checksum of payload and padding, and the record's end; None if it doesn't hold."""
    body = start + _RECORD.size
    if body > len(view):
        return None
    _, kind, length, body_checksum, header_checksum = _RECORD.unpack_from(view, start)
    end = body + length + -length % ALIGNMENT
    place = _PLACE.pack(number, start)
    if end > len(view) or header_checksum != checksum(place + bytes(view[start : body - _CHECKSUM_BYTES])):
        return None
    return kind, length, body_checksum, end
