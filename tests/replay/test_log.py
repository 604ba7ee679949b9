import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_muzero.errors import LogError
from distributed_muzero.replay import log_format
from distributed_muzero.replay.log import ReplayLog
from distributed_muzero.replay.log_format import Damage, read, verify

GOLDEN = Path(__file__).parent.parent / "fixtures/replay_log/format_1"
GOLDEN_RECORDS = [
    (0, b""),
    (1, b"seven b"),
    (2, bytes(range(8))),
    (255, bytes(range(256)) * 2),
    (1, b"\x9eREC"),
]
SMALL = [(1, b"first"), (2, b""), (3, b"the third one"), (4, b"x")]
BIG = 1 << 20
SEGMENT_HEADER = 16
RECORD_HEADER = 24


def fill(folder, records, segment_bytes=BIG):
    with closing(ReplayLog(folder, segment_bytes)) as log:
        list(log.recover())
        numbers = [log.append(kind, payload)[0] for kind, payload in records]
        log.sync()
    return numbers


def recover(folder, segment_bytes=BIG):
    with closing(ReplayLog(folder, segment_bytes, lock_seconds=0)) as log:
        return contents(log.recover()), log.damage


def contents(records):
    return [(record.kind, bytes(record.payload)) for record in records]


def segment_files(folder):
    return sorted(folder.glob("segment_*.log"))


def size_of(payload):
    return RECORD_HEADER + -(-len(payload) // 8) * 8


@pytest.fixture
def quick_fsync(monkeypatch):
    """For tests that neither kill nor fail the disk, but open a log a thousand times."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# Round trips ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    sessions=st.lists(
        st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=200)), max_size=8), max_size=4
    ),
    segment_bytes=st.integers(1, 1000),
)
def test_what_was_written_is_read_back_over_segments_and_reopenings(
    tmp_path_factory, sessions, segment_bytes
):
    folder = tmp_path_factory.mktemp("log")
    written = []
    for records in sessions:
        with closing(ReplayLog(folder, segment_bytes)) as log:
            assert contents(log.recover()) == written
            assert log.damage == Damage()
            numbers = [log.append(*record)[0] for record in records]
            log.sync()
            assert log.num_bytes == sum(path.stat().st_size for path in segment_files(folder))
            assert all(s.num_bytes <= segment_bytes for s in log.segments if numbers.count(s.number) > 1)
        written += records
        assert [r.segment for r in read(folder)][len(written) - len(records) :] == numbers
    assert contents(read(folder)) == written


def test_any_contiguous_buffer_is_taken_and_copied(tmp_path):
    payload = bytearray(b"changes later")
    words = memoryview(bytearray(range(16))).cast("I")
    with closing(ReplayLog(tmp_path, BIG)) as log:
        log.append(0, payload)
        payload[:] = b"-" * len(payload)
        log.append(1, words)
        with pytest.raises(TypeError):
            log.append(2, words[::2])
    assert contents(read(tmp_path)) == [(0, b"changes later"), (1, bytes(range(16)))]


def test_a_kind_that_does_not_fit_a_byte_changes_nothing(tmp_path):
    with closing(ReplayLog(tmp_path, BIG)) as log:
        with pytest.raises(Exception, match="255"):
            log.append(256, b"")
        log.append(255, b"good")
    assert recover(tmp_path) == ([(255, b"good")], Damage())


def test_a_record_never_straddles_segments_and_a_large_one_gets_its_own(tmp_path):
    segment_bytes = SEGMENT_HEADER + 2 * size_of(b"8 bytes.")
    payloads = [b"8 bytes.", b"8 bytes.", b"8 bytes.", b"large" * 100, b"8 bytes.", b"8 bytes."]
    assert fill(tmp_path, [(0, p) for p in payloads], segment_bytes) == [1, 1, 2, 3, 4, 4]
    assert [r.segment for r in read(tmp_path)] == [1, 1, 2, 3, 4, 4]


def test_an_old_file_is_never_appended_to(tmp_path):
    fill(tmp_path, SMALL)
    before = segment_files(tmp_path)[0].read_bytes()
    assert fill(tmp_path, SMALL) == [2] * 4
    assert segment_files(tmp_path)[0].read_bytes() == before
    assert recover(tmp_path) == (SMALL * 2, Damage())


def test_start_segment(tmp_path):
    with closing(ReplayLog(tmp_path, BIG)) as log:
        appended = [log.append(0, b"a"), log.append(0, b"b")]
        log.start_segment()
        appended += [log.append(0, b"c")]
        log.sync()
        log.start_segment()
        log.start_segment()
        appended += [log.append(0, b"d")]
    assert [number for number, _ in appended] == [1, 1, 2, 3]
    assert [bytes(r.payload) for r in read(tmp_path)] == [b"a", b"b", b"c", b"d"]


def test_all_is_of_one_generation_as_long_as_the_disk_takes_it(tmp_path):
    with closing(ReplayLog(tmp_path, BIG)) as log:
        assert log.write() == log.sync() == 0
        assert log.append(0, b"abc") == (1, 0)
        assert (log.num_pending, log.num_bytes) == (1, 0)
        assert log.write() == 0
        assert (log.num_pending, log.num_bytes) == (0, SEGMENT_HEADER + size_of(b"abc"))
        assert log.append(0, b"") == (1, 0)
        assert log.sync() == log.write() == log.generation == log.num_refusals == 0


def test_append_waits_for_an_exhausted_recovery_and_ends_with_close(tmp_path):
    fill(tmp_path, SMALL)
    log = ReplayLog(tmp_path, BIG)
    recovery = log.recover()
    next(recovery)
    with pytest.raises(LogError, match="recover"):
        log.append(0, b"")
    list(recovery)
    log.append(0, b"pending")
    with pytest.raises(LogError, match="recover"):
        list(log.recover())
    log.close()
    log.close()
    for use in (lambda: log.append(0, b""), lambda: list(log.recover()), log.drop_oldest):
        with pytest.raises(LogError):
            use()
    assert recover(tmp_path)[0] == [*SMALL, (0, b"pending")]


def test_bytes_of_a_log_inside_a_payload_are_no_records(tmp_path):
    fill(tmp_path / "inner", SMALL)
    inner = segment_files(tmp_path / "inner")[0].read_bytes()
    fill(tmp_path / "log", [(0, inner), (9, b"after")])
    path = segment_files(tmp_path / "log")[0]
    data = bytearray(path.read_bytes())
    data[SEGMENT_HEADER] ^= 1
    path.write_bytes(data)
    assert recover(tmp_path / "log") == (
        [(9, b"after")],
        Damage(corrupt_records=1, corrupt_bytes=size_of(inner)),
    )


# Damage ---------------------------------------------------------------------------------------------------------


def test_truncated_at_every_byte_of_the_last_record(tmp_path, quick_fsync):
    records = [(1, b"kept"), (2, b"also kept"), (3, b"the last record, torn")]
    fill(tmp_path / "whole", records)
    whole = segment_files(tmp_path / "whole")[0].read_bytes()
    good = len(whole) - size_of(records[-1][1])
    for size in range(good, len(whole)):
        folder = tmp_path / str(size)
        folder.mkdir()
        path = folder / "segment_00000001.log"
        path.write_bytes(whole[:size])
        expected = Damage(torn_tails=int(size > good), torn_bytes=size - good)
        assert verify(folder).damage == expected
        assert path.stat().st_size == size
        assert recover(folder) == (records[:-1], expected)
        assert path.stat().st_size == good
        assert recover(folder) == (records[:-1], Damage())
        assert fill(folder, [(9, b"next")]) == [2]
        assert recover(folder) == ([*records[:-1], (9, b"next")], Damage())


@pytest.mark.parametrize("size", range(SEGMENT_HEADER))
def test_a_newest_segment_without_a_whole_header_goes(tmp_path, size):
    fill(tmp_path, SMALL)
    header = segment_files(tmp_path)[0].read_bytes()[:size]
    torn = tmp_path / "segment_00000002.log"
    torn.write_bytes(header)
    assert recover(tmp_path) == (SMALL, Damage(torn_tails=1, torn_bytes=size))
    assert not torn.exists()
    assert recover(tmp_path) == (SMALL, Damage())


@pytest.mark.parametrize("newest", [True, False])
def test_every_single_flipped_bit_is_counted_and_costs_its_record_only(tmp_path, quick_fsync, newest):
    folder = tmp_path / "log"
    fill(folder, SMALL)
    path = segment_files(folder)[0]
    whole = path.read_bytes()
    later = [] if newest else [(7, b"in the next segment")]
    if later:
        fill(folder, later)
    ends = [SEGMENT_HEADER]
    for _, payload in SMALL:
        ends.append(ends[-1] + size_of(payload))
    assert ends[-1] == len(whole)
    for bit in range(8 * len(whole)):
        byte = bit // 8
        data = bytearray(whole)
        data[byte] ^= 1 << bit % 8
        path.write_bytes(data)
        touched = next(index for index, end in enumerate(ends) if byte < end) - 1
        expected = [record for index, record in enumerate(SMALL) if index != touched] + later
        num_bad = SEGMENT_HEADER if touched < 0 else size_of(SMALL[touched][1])
        if newest and touched == len(SMALL) - 1:
            damage = Damage(torn_tails=1, torn_bytes=num_bad)
        else:
            damage = Damage(corrupt_records=1, corrupt_bytes=num_bad)
        assert contents(read(folder)) == expected, bit
        assert recover(folder) == (expected, damage), bit
        num_left = len(whole) - num_bad if damage.torn_tails else len(whole)
        assert path.stat().st_size == num_left


def test_without_its_checksum_a_flipped_bit_is_accepted(tmp_path, monkeypatch):
    """The flips above can fail: it is the checksum that notices them."""
    monkeypatch.setattr(log_format, "checksum", lambda data, start=0: 0)
    fill(tmp_path, SMALL)
    path = segment_files(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[SEGMENT_HEADER + RECORD_HEADER] ^= 1
    path.write_bytes(data)
    assert recover(tmp_path) == ([(1, b"girst"), *SMALL[1:]], Damage())


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_random_damage_never_crashes_and_never_makes_up_records(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("log")
    records = data.draw(
        st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=60)), min_size=1, max_size=12)
    )
    # Each payload ends in its number, so that records can be told apart.
    records = [(kind, payload + bytes([index])) for index, (kind, payload) in enumerate(records)]
    numbers = fill(folder, records, segment_bytes=250)
    hit = data.draw(st.sampled_from(segment_files(folder)))
    whole = hit.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    hit.write_bytes(whole[:start] + data.draw(st.binary(max_size=100)) + whole[stop:])
    damaged = hit.read_bytes()
    found, damage = recover(folder)
    others = [r for r, n in zip(records, numbers, strict=True) if hit.name != f"segment_{n:08d}.log"]
    assert [r for r in found if r in others] == others
    assert found == [r for r in records if r in found]
    assert (damage == Damage()) == (
        damaged == whole or is_whole_prefix(damaged, whole, records, numbers, hit)
    )
    # What recovery leaves behind reads the same again.
    assert recover(folder)[0] == found


def is_whole_prefix(damaged, whole, records, numbers, path):
    """Cut exactly between two records, which no reader can tell from a shorter log."""
    ends = [SEGMENT_HEADER]
    for (_, payload), number in zip(records, numbers, strict=True):
        if path.name == f"segment_{number:08d}.log":
            ends.append(ends[-1] + size_of(payload))
    return whole.startswith(damaged) and len(damaged) in ends


@pytest.mark.parametrize(
    "tail", [bytes(5), bytes(4096), b"\xff" * 1000, b"\x9eREC" * 50, bytes(range(256)) * 4]
)
def test_a_tail_of_zeros_or_garbage_is_cut(tmp_path, tail):
    fill(tmp_path, SMALL)
    path = segment_files(tmp_path)[0]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + tail)
    assert recover(tmp_path) == (SMALL, Damage(torn_tails=1, torn_bytes=len(tail)))
    assert path.stat().st_size == size
    assert recover(tmp_path) == (SMALL, Damage())


@pytest.mark.parametrize("content", [b"", bytes(4096), b"garbage" * 99])
def test_a_file_without_anything_good(tmp_path, content):
    """Removed if it is the newest, left in place if not; counted in both cases."""
    old, new = tmp_path / "segment_00000001.log", tmp_path / "segment_00000003.log"
    old.write_bytes(content)
    fill(tmp_path, [])
    assert not old.exists()
    old.write_bytes(content)
    new.write_bytes(content)
    found, damage = recover(tmp_path)
    assert found == []
    assert damage == Damage(1, len(content), 1, len(content))
    assert old.read_bytes() == content
    assert not new.exists()


def test_neighbouring_bad_records_are_one_region_and_a_bad_older_end_stays(tmp_path):
    fill(tmp_path, SMALL)
    fill(tmp_path, [(9, b"newer")])
    path = segment_files(tmp_path)[0]
    data = bytearray(path.read_bytes())
    third = SEGMENT_HEADER + size_of(b"first") + size_of(b"")
    data[third + RECORD_HEADER] ^= 1
    data[-1] ^= 1
    path.write_bytes(data)
    bad = size_of(b"the third one") + size_of(b"x")
    assert recover(tmp_path) == ([*SMALL[:2], (9, b"newer")], Damage(corrupt_records=1, corrupt_bytes=bad))
    assert path.read_bytes() == data


def test_a_missing_segment_is_no_damage(tmp_path):
    fill(tmp_path, SMALL, segment_bytes=1)
    segment_files(tmp_path)[1].unlink()
    assert recover(tmp_path) == ([SMALL[0], *SMALL[2:]], Damage())


def test_verify_and_read_change_nothing_and_need_no_lock(tmp_path):
    fill(tmp_path, [*SMALL, (1, b"again")], segment_bytes=100)
    torn = segment_files(tmp_path)[-1]
    torn.write_bytes(torn.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with closing(ReplayLog(tmp_path, BIG)):
        found = verify(tmp_path)
        damage = Damage()
        assert contents(read(tmp_path, damage)) == SMALL
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert found.damage == damage == Damage(torn_tails=1, torn_bytes=size_of(b"again") - 1)
    assert found.records_by_kind == {1: 1, 2: 1, 3: 1, 4: 1}
    assert found.num_segments == len(segment_files(tmp_path))
    assert found.num_bytes == sum(path.stat().st_size for path in segment_files(tmp_path))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(LogError, match="nowhere"):
        verify(tmp_path / "nowhere")


def test_segments_dropped_by_the_owner_while_reading(tmp_path):
    fill(tmp_path, SMALL, segment_bytes=1)
    with closing(ReplayLog(tmp_path, BIG)) as log:
        list(log.recover())
        reading = read(tmp_path)
        found = [next(reading)]
        log.drop_oldest()
        log.drop_oldest()
        assert contents([*found, *reading]) == [SMALL[0], *SMALL[2:]]


# Format versions ------------------------------------------------------------------------------------------------


def test_format_1_is_read(tmp_path):
    folder = tmp_path / "log"
    shutil.copytree(GOLDEN, folder)
    assert contents(read(folder)) == GOLDEN_RECORDS
    assert recover(folder) == (GOLDEN_RECORDS, Damage())


def test_format_1_is_what_is_written(tmp_path):
    fill(tmp_path, GOLDEN_RECORDS)
    assert log_format.FORMAT_VERSION == 1
    assert segment_files(tmp_path)[0].read_bytes() == (GOLDEN / "segment_00000001.log").read_bytes()


def test_another_format_is_refused_before_anything_is_changed(tmp_path):
    fill(tmp_path, SMALL)
    torn = segment_files(tmp_path)[0]
    torn.write_bytes(torn.read_bytes()[:-1])
    # Magic, version 2, CRC-32 of both.
    (tmp_path / "segment_00000002.log").write_bytes(b"DMZ-RLOG" + b"\x02\0\0\0" + bytes.fromhex("a07298a2"))
    torn_again = tmp_path / "segment_00000003.log"
    torn_again.write_bytes(b"torn")
    for use in (recover, verify):
        with pytest.raises(
            LogError, match=r"segment_00000002.log holds .*format 2.* reads format 1.*new run"
        ):
            use(tmp_path)
    with closing(ReplayLog(tmp_path, BIG)) as log:
        for reading in (log.recover(), read(tmp_path)):
            with pytest.raises(LogError, match="format 2"):
                next(reading)
    assert torn_again.read_bytes() == b"torn"


# Disks that fail ------------------------------------------------------------------------------------------------

FILE_LIMIT_CHILD = """
import resource, sys
from pathlib import Path
from distributed_muzero.errors import LogError
from distributed_muzero.replay.log import ReplayLog

log = ReplayLog(Path(sys.argv[1]), 1 << 20)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
number, failed = 0, False
while not failed:
    try:
        log.append(1, b"record %d." % number * 30)
        log.sync()
        number += 1
    except LogError as error:
        assert "File too large" in str(error) and "earlier records are intact" in str(error), error
        assert log.num_pending == 0
        failed = True
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for later in range(number, number + 3):
    log.append(1, b"record %d." % later * 30)
    log.sync()
assert log.num_bytes == sum(path.stat().st_size for path in Path(sys.argv[1]).glob("*.log"))
print(number)
"""


def test_a_file_size_limit_at_20_offsets(tmp_path):
    limits = [1, 15, 16, 17, 39, 40, 41, *(300 + 97 * step for step in range(13))]
    assert len(limits) == 20
    for limit in limits:
        folder = tmp_path / str(limit)
        command = [sys.executable, "-c", FILE_LIMIT_CHILD, str(folder), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        num_synced = int(done.stdout)
        assert num_synced == max(limit - SEGMENT_HEADER, 0) // size_of(b"record 0." * 30)
        expected = [(1, b"record %d." % number * 30) for number in range(num_synced + 3)]
        assert recover(folder) == (expected, Damage())


def fail_in_turn(monkeypatch, name, failures):
    """os.`name` raises EIO for the calls that `failures` says, a set of numbers from 0."""
    real, calls = getattr(os, name), []

    def failing(*args):
        calls.append(args)
        if len(calls) - 1 in failures:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    monkeypatch.setattr(os, name, failing)
    return calls


def note_fsyncs(monkeypatch, real):
    """The names of what os.fsync was called for, from now on."""
    names = []

    def noting(descriptor):
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    return names


def test_partial_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    fill(tmp_path, SMALL)
    assert recover(tmp_path) == (SMALL, Damage())


def test_a_failed_write_is_cut_away_and_the_next_append_takes_a_new_segment(tmp_path, monkeypatch):
    real = os.write
    with closing(ReplayLog(tmp_path, BIG)) as log:
        log.append(1, b"written")
        log.write()
        for attempt in range(2):
            log.append(2, b"lost" * 100)
            calls = []

            def half_then_full(descriptor, data, calls=calls):
                calls.append(data)
                if len(calls) > 1:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(descriptor, data[:60])

            monkeypatch.setattr(os, "write", half_then_full)
            with pytest.raises(LogError, match=r"No space left.*earlier records are intact"):
                log.write() if attempt else log.sync()
            monkeypatch.setattr(os, "write", real)
            assert log.num_pending == 0
            assert log.generation == log.num_refusals == attempt + 1
            assert [s.number for s in log.segments] == [1]
            assert log.num_bytes == segment_files(tmp_path)[0].stat().st_size
        assert log.append(3, b"after") == (3, 2)
        assert log.sync() == 2
    assert recover(tmp_path) == ([(1, b"written"), (3, b"after")], Damage())


def test_a_file_that_can_not_be_made(tmp_path, monkeypatch):
    with closing(ReplayLog(tmp_path, BIG)) as log:
        log.append(1, b"lost")
        with monkeypatch.context() as patch:
            fail_in_turn(patch, "open", {0})
            with pytest.raises(LogError, match="Input/output error"):
                log.write()
        log.append(1, b"stored")
    assert recover(tmp_path) == ([(1, b"stored")], Damage())


@pytest.mark.parametrize("failing_call", [0, 1])
def test_a_failed_fsync_loses_what_was_not_synced_and_is_never_repeated(tmp_path, monkeypatch, failing_call):
    """Call 0 syncs the segment, call 1 the folder that has gained it."""
    with closing(ReplayLog(tmp_path, BIG)) as log:
        log.append(1, b"durable")
        log.sync()
        log.start_segment()
        log.append(2, b"lost")
        log.write()
        with monkeypatch.context() as patch:
            calls = fail_in_turn(patch, "fsync", {failing_call})
            with pytest.raises(LogError, match=r"Input/output error.*earlier records are intact"):
                log.sync()
            assert len(calls) == failing_call + 1
            assert log.sync() == 1
            assert len(calls) == failing_call + 1
        assert log.num_bytes == sum(path.stat().st_size for path in segment_files(tmp_path))
        assert log.append(3, b"again") == (3, 1)
        assert log.sync() == log.generation == log.num_refusals == 1
    assert recover(tmp_path) == ([(1, b"durable"), (3, b"again")], Damage())


def test_a_failed_fsync_leaves_earlier_records_of_the_same_file(tmp_path, monkeypatch):
    with closing(ReplayLog(tmp_path, BIG)) as log:
        log.append(1, b"durable")
        log.sync()
        log.append(2, b"lost")
        with monkeypatch.context() as patch:
            fail_in_turn(patch, "fsync", {0})
            with pytest.raises(LogError):
                log.sync()
        log.append(3, b"after")
        log.write()
    assert recover(tmp_path) == ([(1, b"durable"), (3, b"after")], Damage())


@pytest.mark.parametrize("broken", ["write", "fsync"])
def test_a_generation_tells_what_another_threads_sync_has_lost(tmp_path, monkeypatch, broken):
    errors = []
    entered, appended = threading.Event(), threading.Event()

    def sync():
        try:
            log.sync()
        except LogError as error:
            errors.append(error)

    def refuse(*args):
        entered.set()
        if broken == "fsync":
            assert appended.wait(10)
        raise OSError(errno.EIO, "refused")

    with closing(ReplayLog(tmp_path, BIG)) as log:
        assert log.append(1, b"lost") == (1, 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, refuse)
            thread = threading.Thread(target=sync)
            thread.start()
            assert entered.wait(10)
            if broken == "fsync":
                assert log.append(1, b"lost too, since it waits for the same segment") == (1, 0)
                appended.set()
            thread.join()
        assert len(errors) == 1
        assert log.append(1, b"stored") == (2, 1)
        assert log.write() == log.sync() == 1
    assert recover(tmp_path) == ([(1, b"stored")], Damage())


def test_what_is_appended_while_a_write_fails_is_stored_with_the_next(tmp_path, monkeypatch):
    """append() waits for the log's lock, which the failing write holds: it is of the generation after it."""
    failing, errors, appended = threading.Event(), [], []

    def refuse(descriptor, data):
        failing.set()
        # Time for the other thread to come as far as the lock.
        time.sleep(0.1)
        raise OSError(errno.ENOSPC, "refused")

    def sync():
        try:
            log.sync()
        except LogError as error:
            errors.append(error)

    with closing(ReplayLog(tmp_path, BIG)) as log:
        log.append(1, b"lost")
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", refuse)
            thread = threading.Thread(target=sync)
            thread.start()
            assert failing.wait(10)
            appended.append(log.append(1, b"stored"))
            thread.join()
        assert len(errors) == 1 and appended == [(2, 1)]
        assert log.sync() == 1
    assert recover(tmp_path) == ([(1, b"stored")], Damage())


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO])
def test_a_disk_that_is_gone_altogether_is_a_log_error(tmp_path, monkeypatch, error):
    """The clean-up after a failed sync fails as well, in all it tries."""

    def refuse(*args):
        raise OSError(error, os.strerror(error))

    with closing(ReplayLog(tmp_path, BIG)) as log:
        log.append(1, b"durable")
        log.sync()
        log.append(1, b"lost")
        with monkeypatch.context() as patch:
            for name in ("fsync", "ftruncate", "fstat", "unlink"):
                patch.setattr(os, name, refuse)
            with pytest.raises(LogError):
                log.sync()
        assert log.generation == 1
        assert log.append(1, b"after") == (2, 1)
        assert log.sync() == 1
    # It couldn't be cut off.
    assert recover(tmp_path) == ([(1, b"durable"), (1, b"lost"), (1, b"after")], Damage())


@pytest.mark.parametrize("failing_write", range(3))
def test_a_write_over_several_segments_is_stored_as_a_whole_or_not_at_all(
    tmp_path, monkeypatch, failing_write
):
    record = b"eight by" * 4
    with closing(ReplayLog(tmp_path, SEGMENT_HEADER + 2 * size_of(record))) as log:
        log.append(0, record)
        log.sync()
        before = segment_files(tmp_path)[0].read_bytes()
        for kind in range(1, 6):
            log.append(kind, record)
        with monkeypatch.context() as patch:
            calls = fail_in_turn(patch, "write", {failing_write})
            with pytest.raises(LogError, match="the records of this write are not stored"):
                log.sync()
            assert len(calls) == failing_write + 1
        assert [path.read_bytes() for path in segment_files(tmp_path)] == [before]
        assert log.num_bytes == len(before)
        for kind in range(1, 6):
            log.append(kind, record)
        assert log.sync() == 1
    assert recover(tmp_path) == ([(kind, record) for kind in range(6)], Damage())


def test_a_disk_that_stays_full_takes_no_descriptors(tmp_path, monkeypatch):
    def refuse(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with closing(ReplayLog(tmp_path, BIG)) as log:
        log.append(1, b"stored")
        log.sync()
        num_open = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", refuse)
            for number in range(2000):
                log.append(1, b"lost")
                with pytest.raises(LogError, match="No space left"):
                    log.write() if number % 2 else log.sync()
        assert len(os.listdir("/proc/self/fd")) == num_open
        assert len(segment_files(tmp_path)) == 1
        log.append(1, b"after")
        log.sync()
    assert recover(tmp_path) == ([(1, b"stored"), (1, b"after")], Damage())


def test_an_interrupted_write_is_given_up(tmp_path, monkeypatch):
    """What comes after it must not stand behind its first half."""
    real = os.write

    def interrupted(descriptor, data):
        real(descriptor, data[:20])
        raise KeyboardInterrupt

    with closing(ReplayLog(tmp_path, BIG)) as log:
        log.append(1, b"stored")
        log.sync()
        log.append(1, b"lost")
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                log.write()
        log.append(1, b"after")
    assert recover(tmp_path) == ([(1, b"stored"), (1, b"after")], Damage())


def test_recovered_records_are_made_durable(tmp_path, monkeypatch):
    """Their writer may have been killed before it synced; an episode found again counts as stored."""
    fill(tmp_path, SMALL, segment_bytes=1)
    with closing(ReplayLog(tmp_path, BIG)) as log:
        synced = note_fsyncs(monkeypatch, os.fsync)
        list(log.recover())
        assert synced == [path.name for path in segment_files(tmp_path)] + [tmp_path.name]


def test_rolled_segments_are_synced_before_sync_returns(tmp_path, monkeypatch):
    folder = tmp_path / "log"
    with closing(ReplayLog(folder, 1)) as log:
        synced = note_fsyncs(monkeypatch, os.fsync)
        log.append(1, b"a")
        log.write()
        log.append(1, b"b")
        log.write()
        log.append(1, b"c")
        assert synced == []
        log.sync()
        assert synced == [f"segment_0000000{number}.log" for number in (1, 2, 3)] + ["log"]
        log.sync()
        assert len(synced) == 4


def test_synced_segments_are_closed(tmp_path):
    with closing(ReplayLog(tmp_path, 1)) as log:
        num_open = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            log.append(1, b"a")
            log.append(1, b"b")
            log.sync()
        # The growing one alone.
        assert len(os.listdir("/proc/self/fd")) == num_open + 1


# Processes and threads ------------------------------------------------------------------------------------------

KILLED_CHILD = """
import sys, time
from pathlib import Path
from distributed_muzero.replay.log import ReplayLog

log = ReplayLog(Path(sys.argv[1]), 2000)
list(log.recover())
for number in range(100):
    log.append(7, b"%d" % number * 20)
log.write()
log.append(8, b"only pending")
print("written", flush=True)
time.sleep(60)
"""


def test_written_records_survive_a_kill_and_the_lock_is_free_again(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED_CHILD, str(tmp_path)], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"written\n"
        start = time.monotonic()
        with pytest.raises(LogError, match=rf"{tmp_path} is in use by another process"):
            ReplayLog(tmp_path, BIG, lock_seconds=0.2)
        assert 0.2 <= time.monotonic() - start < 2
        child.send_signal(signal.SIGKILL)
    assert recover(tmp_path) == ([(7, b"%d" % number * 20) for number in range(100)], Damage())


def test_a_second_opener_waits_for_the_first_to_close(tmp_path):
    first = ReplayLog(tmp_path, BIG)
    timer = threading.Timer(0.3, first.close)
    timer.start()
    with closing(ReplayLog(tmp_path, BIG, lock_seconds=10)) as second:
        second.append(0, b"")
    timer.join()
    assert recover(tmp_path) == ([(0, b"")], Damage())


@pytest.mark.parametrize("segment_bytes", [1, SEGMENT_HEADER + 2 * 32, BIG])
@pytest.mark.parametrize("write_meanwhile", [True, False])
def test_the_writer_goes_on_during_an_fsync(tmp_path, monkeypatch, segment_bytes, write_meanwhile):
    """It adds to the very segment that is synced, and begins another; both are synced by the next sync()."""
    entered, go_on = threading.Event(), threading.Event()
    real = os.fsync

    def slow(descriptor):
        entered.set()
        assert go_on.wait(10)
        real(descriptor)

    durable = []
    with closing(ReplayLog(tmp_path, segment_bytes)) as log:
        log.append(1, b"before")
        monkeypatch.setattr(os, "fsync", slow)
        thread = threading.Thread(target=lambda: durable.append(log.sync()))
        thread.start()
        assert entered.wait(10)
        log.append(2, b"during")
        if write_meanwhile:
            log.write()
        log.append(3, b"later")
        if write_meanwhile:
            log.write()
        assert durable == []
        go_on.set()
        thread.join()
        assert durable == [0]
        synced = note_fsyncs(monkeypatch, real)
        log.sync()
        to_sync = {1: {2, 3}, BIG: {1}}.get(segment_bytes, {1, 2})
        assert set(synced) - {tmp_path.name} == {f"segment_0000000{number}.log" for number in to_sync}
    assert recover(tmp_path) == ([(1, b"before"), (2, b"during"), (3, b"later")], Damage())


@pytest.mark.parametrize("segment_bytes", [1, 300, BIG])
def test_one_thread_appends_and_writes_while_another_syncs(tmp_path, segment_bytes):
    durable, errors, done = [], [], threading.Event()

    def sync_until_done():
        try:
            while not done.is_set():
                durable.append(log.sync())
        except BaseException as error:
            errors.append(error)

    records = [(number % 256, b"%d" % number * (number % 9)) for number in range(1500)]
    with closing(ReplayLog(tmp_path, segment_bytes)) as log:
        thread = threading.Thread(target=sync_until_done)
        thread.start()
        for number, record in enumerate(records):
            log.append(*record)
            if number % 3 == 0:
                assert log.write() == 0
        done.set()
        thread.join()
        assert errors == []
        assert log.sync() == 0 and set(durable) == {0}
        assert log.num_bytes == sum(path.stat().st_size for path in segment_files(tmp_path))
    assert len(durable) > 2
    assert recover(tmp_path) == (records, Damage())


def test_drop_oldest(tmp_path):
    fill(tmp_path, SMALL, segment_bytes=1)
    with closing(ReplayLog(tmp_path, 1)) as log:
        list(log.recover())
        for left in (3, 2, 1):
            log.drop_oldest()
            assert [s.number for s in log.segments] == list(range(5 - left, 5))
            assert log.num_bytes == sum(path.stat().st_size for path in segment_files(tmp_path))
        with pytest.raises(LogError, match="no segment to drop"):
            log.drop_oldest()
        assert log.append(9, b"a") == (5, 0)
        assert log.append(9, b"b") == (6, 0)
        log.write()
        # Dropped before they were synced: the sync needs neither.
        log.drop_oldest()
        log.drop_oldest()
        log.sync()
    assert recover(tmp_path) == ([(9, b"b")], Damage())
