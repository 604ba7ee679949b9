"""A replay log's bytes: what its files look like, and how they are read back. `log.py` writes them.

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

import re
import struct
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from distributed_muzero.errors import LogError

FORMAT_VERSION = 1
MAGIC = b"DMZ-RLOG"
MARKER = b"\x9eREC"
ALIGNMENT = 8

SEGMENT = struct.Struct("<8sII")
RECORD = struct.Struct("<4sB3xQII")
_PLACE = struct.Struct("<QQ")
_CHECKSUM_BYTES = 4
_SEGMENT_NAME = re.compile(r"segment_(\d{8,})\.log")


class Record(NamedTuple):
    """What append() got. A payload that was read is a view of its whole segment: copy what is to be kept."""

    kind: int
    payload: memoryview | bytes
    segment: int


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
    numbers = list(list_segments(folder))
    check_formats(folder, numbers)
    for number in numbers:
        # The log's owner may have dropped it since the listing.
        with reported(f"can't read {folder}"), suppress(FileNotFoundError):
            yield from read_segment(folder, number, number == numbers[-1], damage or Damage())


def verify(folder: Path) -> Verification:
    """Reads the whole log as read() does, and counts."""
    damage = Damage()
    by_kind = Counter(record.kind for record in read(folder, damage))
    sizes = list_segments(folder)
    return Verification(damage, dict(sorted(by_kind.items())), len(sizes), sum(sizes.values()))


def padded(payload: memoryview) -> tuple[bytes, int]:
    """The zeros behind a payload, and the checksum of both."""
    padding = bytes(-len(payload) % ALIGNMENT)
    return padding, checksum(padding, checksum(payload))


def segment_header() -> bytes:
    header = SEGMENT.pack(MAGIC, FORMAT_VERSION, 0)[:-_CHECKSUM_BYTES]
    return header + checksum(header).to_bytes(_CHECKSUM_BYTES, "little")


def record_header(number: int, offset: int, kind: int, length: int, body_checksum: int) -> bytes:
    header = RECORD.pack(MARKER, kind, length, body_checksum, 0)[:-_CHECKSUM_BYTES]
    return header + checksum(_PLACE.pack(number, offset) + header).to_bytes(_CHECKSUM_BYTES, "little")


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"segment_{number:08d}.log"


def list_segments(folder: Path) -> dict[int, int]:
    """Size in bytes by number, oldest first."""
    sizes = {}
    with reported(f"can't list the replay log {folder}"):
        for path in folder.iterdir():
            # A log that is read without its lock may drop the file right now.
            with suppress(FileNotFoundError):
                if match := _SEGMENT_NAME.fullmatch(path.name):
                    sizes[int(match[1])] = path.stat().st_size
    return dict(sorted(sizes.items()))


def check_formats(folder: Path, numbers: Iterable[int]) -> None:
    for number in numbers:
        path = segment_path(folder, number)
        with reported(f"can't read {path}"), suppress(FileNotFoundError), path.open("rb") as file:
            has_segment_header(file.read(SEGMENT.size), path)


def has_segment_header(data: bytes, path: Path) -> bool:
    """Whether it is there and intact. Raises LogError if it is, but of another format version."""
    if len(data) < SEGMENT.size:
        return False
    magic, version, header_checksum = SEGMENT.unpack_from(data)
    if magic != MAGIC or header_checksum != checksum(data[: SEGMENT.size - _CHECKSUM_BYTES]):
        return False
    if version != FORMAT_VERSION:
        raise LogError(
            f"{path} holds replay log format {version}, this version reads format {FORMAT_VERSION}; "
            "resume the run with the distributed_muzero that wrote it, or start a new run"
        )
    return True


def read_segment(folder: Path, number: int, is_newest: bool, damage: Damage) -> Generator[Record, None, int]:
    """Yields a segment's intact records, counts the gaps between them, returns where the last good byte ends."""
    path = segment_path(folder, number)
    data = path.read_bytes()
    good_end = SEGMENT.size if has_segment_header(data, path) else 0
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
        body = start + RECORD.size
        if checksum(view[body:end]) == body_checksum:
            yield start, end, Record(kind, view[body : body + length], number)
        start = data.find(MARKER, end)


def _intact_header(view: memoryview, number: int, start: int) -> tuple[int, int, int, int] | None:
    """Kind, payload length, checksum of payload and padding, and the record's end; None if it doesn't hold."""
    body = start + RECORD.size
    if body > len(view):
        return None
    _, kind, length, body_checksum, header_checksum = RECORD.unpack_from(view, start)
    end = body + length + -length % ALIGNMENT
    place = _PLACE.pack(number, start)
    if end > len(view) or header_checksum != checksum(place + bytes(view[start : body - _CHECKSUM_BYTES])):
        return None
    return kind, length, body_checksum, end


@contextmanager
def reported(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LogError(f"{what}: {error}") from error
