"""Who may write a copy, and what a claim makes of a folder and its copy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from distributed_muzero.errors import RunError
from distributed_muzero.mirror import owner
from distributed_muzero.mirror.download import fetch
from distributed_muzero.mirror.mirror import Mirror
from distributed_muzero.mirror.remote import CHUNK_BYTES, Remote
from tests.mirror.folders import claimed, contents, killed_at, pushed, watch, write


def test_a_process_that_begins_again_on_its_disk_goes_on_from_it(any_uri, tmp_path):
    here = write(tmp_path / "here", log=b"copied", old=b"same")
    pushed(here, any_uri)
    write(here, log=b"newer than the copy")
    again = Mirror(here, any_uri)
    assert again.claim() == "kept"
    assert again.push() and again.stats()["files"] == 1
    assert contents(fetch(any_uri, tmp_path / "read")) == {"log": b"newer than the copy", "old": b"same"}


def test_the_copy_replaces_what_another_process_has_overtaken(any_uri, tmp_path):
    first = write(
        tmp_path / "first", log=b"1", stale=b"x", folder__stale=b"x", replay__log=b"of another", lock=b""
    )
    pushed(first, any_uri, exclude=("replay",))
    second = tmp_path / "second"
    mirror = claimed(second, any_uri, exclude=("replay",))
    write(second, log=b"12", new__file=b"y")
    (second / "stale").unlink()
    shutil.rmtree(second / "folder")
    assert mirror.push()
    write(first, log=b"played alone")

    back = Mirror(first, any_uri, exclude=("replay",))
    assert back.claim() == "fetched"
    assert contents(first) == {"log": b"12", "new/file": b"y", "replay/log": b"of another"}
    assert (first / "lock").exists()
    assert back.push() and back.stats()["files"] == 0


@pytest.mark.parametrize(
    "lost", ["checkpoints", "checkpoints/step_2", "episodes", "episodes/segment_2.log", "journal"]
)
def test_a_folder_that_somebody_emptied_is_fetched_and_the_copy_stays(a_uri, tmp_path, lost):
    here = write(
        tmp_path / "here",
        config=b"1",
        checkpoints__step_1__DONE=b"1",
        checkpoints__step_2__DONE=b"2",
        episodes__segment_1_dot_log=b"1",
        episodes__segment_2_dot_log=b"2",
        journal__segment_1_dot_log=b"1",
    )
    pushed(here, a_uri)
    everything = contents(here)
    shutil.rmtree(here / lost) if (here / lost).is_dir() else (here / lost).unlink()
    mirror = Mirror(here, a_uri)
    assert mirror.claim() == "fetched" and mirror.was_fetched
    assert mirror.push() and contents(here) == everything == contents(fetch(a_uri, tmp_path / "read"))


def test_a_folder_that_went_on_without_what_is_old_is_kept(a_uri, tmp_path):
    here = write(
        tmp_path / "here",
        checkpoints__step_1__DONE=b"1",
        episodes__segment_1_dot_log=b"1",
        episodes__segment_2_dot_log=b"2",
        journal__segment_1_dot_log=b"1",
    )
    pushed(here, a_uri)
    write(
        here,
        checkpoints__step_2__DONE=b"2",
        episodes__segment_3_dot_log=b"3",
        journal__segment_2_dot_log=b"2",
    )
    shutil.rmtree(here / "checkpoints/step_1")
    (here / "episodes/segment_1.log").unlink()
    (here / "journal/segment_1.log").unlink()
    assert Mirror(here, a_uri).claim() == "kept"


def test_that_a_folder_was_fetched_is_known_until_it_is_settled(a_uri, tmp_path):
    first = pushed(write(tmp_path / "first", log=b"1"), a_uri)
    assert not first.was_fetched
    there = tmp_path / "elsewhere"
    for expected in ("fetched", "kept"):
        mirror = Mirror(there, a_uri)
        assert (mirror.claim(), mirror.was_fetched) == (expected, True)
    mirror.settle()
    mirror = Mirror(there, a_uri)
    assert (mirror.claim(), mirror.was_fetched) == ("kept", False)


def test_who_was_overtaken_writes_no_more(any_uri, tmp_path):
    here = write(tmp_path / "here", log=b"1")
    mirror = pushed(here, any_uri)
    mirror.check()
    there = tmp_path / "there-now"
    pushed(there, any_uri)
    write(here, log=b"of the one before")
    for _ in range(2):
        with pytest.raises(
            RunError, match=f"process {os.getpid()} on .* has taken the run over; stop that one"
        ):
            mirror.push()
    with pytest.raises(RunError, match="taken the run over"):
        mirror.check()
    assert contents(fetch(any_uri, tmp_path / "read")) == {"log": b"1"}


def test_who_is_overtaken_in_the_middle_of_a_push_stops_there(a_uri, tmp_path):
    now = 0.0
    here = write(tmp_path / "here", a=b"1", b=b"1", c=b"1")
    mirror = claimed(here, a_uri, clock=lambda: now)
    written = []

    def overtake(operation: str, path: str) -> None:
        nonlocal now
        written.append(path)
        if len(written) == 1:
            claimed(tmp_path / "elsewhere", a_uri)
        now += 2.0

    watch(mirror, overtake)
    with pytest.raises(RunError, match="taken the run over"):
        mirror.push()
    assert not {"b", "c"} & contents(Path(a_uri.removeprefix("file://"))).keys()


def test_who_is_overtaken_during_a_long_upload_replaces_nothing(any_uri, tmp_path):
    now = 0.0
    old = b"old" * CHUNK_BYTES
    here = write(tmp_path / "here", log=old)
    mirror = pushed(here, any_uri, clock=lambda: now)
    write(here, log=b"new" * CHUNK_BYTES)

    def overtake(operation: str, path: str) -> None:
        nonlocal now
        if operation == "open_output_stream":
            now += 2.0
            claimed(tmp_path / "elsewhere", any_uri)

    watch(mirror, overtake)
    with pytest.raises(RunError, match="taken the run over"):
        mirror.push()
    assert contents(fetch(any_uri, tmp_path / "read")) == {"log": old}


def test_what_was_newer_in_a_folder_that_is_replaced_is_told(a_uri, tmp_path):
    here = write(tmp_path / "here", a=b"1", b=b"1", c=b"1")
    pushed(here, a_uri)
    claimed(tmp_path / "elsewhere", a_uri)
    write(here, a=b"12", new=b"1")
    told: list[str] = []
    assert Mirror(here, a_uri, tell=told.append).claim() == "fetched"
    assert len(told) == 1 and f"{here} held 2 files that were newer" in told[0]


def test_a_disk_that_fills_while_a_copy_is_fetched_keeps_no_half_of_it(a_uri, tmp_path, monkeypatch):
    pushed(write(tmp_path / "here", a=b"1", b=b"2"), a_uri)
    there = write(tmp_path / "elsewhere", stale=b"x")
    original = Remote.download

    def download(remote: Remote, name: str, path: Path) -> bool:
        if name == "b":
            raise OSError(28, "No space left on device")
        return original(remote, name, path)

    with monkeypatch.context() as patched, pytest.raises(RunError) as error:
        patched.setattr(Remote, "download", download)
        Mirror(there, a_uri).claim()
    for part in (str(there), "No space left", "make room there", "DISTRIBUTED_MUZERO_STATE_DIR"):
        assert part in str(error.value)
    assert [path.name for path in there.iterdir()] == ["stale"]
    assert Mirror(there, a_uri).claim() == "fetched"
    assert contents(there) == {"a": b"1", "b": b"2"}


def test_a_disk_that_refuses_is_told_with_the_variable_that_names_another(a_uri, tmp_path, monkeypatch):
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(owner, "write_atomically", refuse)
    expected = "Read-only file system.*name a writable disk with room by DISTRIBUTED_MUZERO_STATE_DIR"
    with pytest.raises(RunError, match=expected):
        Mirror(tmp_path / "here", a_uri).claim()


def test_what_must_be_new_is_left_alone_where_anything_lies(any_uri, tmp_path):
    first = pushed(write(tmp_path / "first", log=b"1"), any_uri)
    for exclude in ((), ("log",)):
        second = Mirror(write(tmp_path / "second", log=b"2"), any_uri, exclude=exclude)
        with pytest.raises(RunError, match="isn't empty: another process has just made it"):
            second.claim(must_be_new=True)
    write(first.local, log=b"12")
    assert first.push()
    assert contents(fetch(any_uri, tmp_path / "read")) == {"log": b"12"}


def test_a_folder_of_another_run_is_emptied_or_fetched_and_that_is_told(a_uri, tmp_path):
    here = write(tmp_path / "here", old=b"1", folder__old=b"1", lock=b"")
    pushed(here, a_uri, run="first")
    shutil.rmtree(a_uri.removeprefix("file://"))
    told: list[str] = []
    assert Mirror(here, a_uri, run="second", tell=told.append).claim() == "new"
    assert contents(here) == {} and (here / "lock").exists()
    assert len(told) == 1 and "was of another run of this name" in told[0]

    pushed(write(tmp_path / "elsewhere", log=b"copied"), f"{a_uri}-2", run="first")
    write(tmp_path / "elsewhere", log=b"stale")
    assert Mirror(tmp_path / "elsewhere", f"{a_uri}-2", run="second", tell=told.append).claim() == "fetched"
    assert contents(tmp_path / "elsewhere") == {"log": b"copied"} and len(told) == 2


def test_a_folder_of_another_run_never_goes_on_while_the_store_is_away(object_store, s3_uri, tmp_path):
    here = write(tmp_path / "here", log=b"1")
    pushed(here, s3_uri, run="first")
    object_store.stop()
    try:
        with pytest.raises(RunError, match="it can't be reached"):
            Mirror(here, s3_uri, run="second").claim(may_be_late=True)
        assert Mirror(here, s3_uri, run="first", tell=lambda _: None).claim(may_be_late=True) == "kept"
    finally:
        object_store.start()


def test_a_run_keeps_its_id_wherever_it_goes_on(a_uri, tmp_path):
    first = pushed(write(tmp_path / "here", log=b"1"), a_uri)
    later = [claimed(tmp_path / name, a_uri) for name in ("here", "elsewhere", "elsewhere", "here")]
    assert first.run and {mirror.run for mirror in later} == {first.run}
    assert claimed(tmp_path / "new", f"{a_uri}-2").run != first.run


def test_a_kill_at_any_point_of_an_emptying_claim_leaves_nothing_of_the_other_run(
    a_uri, tmp_path, monkeypatch
):
    for point in range(100):
        here = write(tmp_path / "here", log=b"stale", folder__stale=b"stale")
        claimed(here, a_uri, run="first")
        mirror = Mirror(here, a_uri, run="second", tell=lambda _: None)
        was_killed = killed_at(point, monkeypatch, mirror, mirror.claim)
        Mirror(here, a_uri, run="second", tell=lambda _: None).claim()
        assert contents(here) == {}
        if not was_killed:
            break
    assert 2 < point < 99


def test_a_kill_at_any_point_of_a_claim_keeps_what_is_newer_on_the_disk(a_uri, tmp_path, monkeypatch):
    here = write(tmp_path / "here", log=b"old")
    pushed(here, a_uri)
    write(here, log=b"newer")
    for point in range(100):
        mirror = Mirror(here, a_uri)
        if not killed_at(point, monkeypatch, mirror, mirror.claim):
            break
    assert 2 < point < 99
    assert Mirror(here, a_uri).claim() == "kept"
    assert contents(here) == {"log": b"newer"}


def test_a_kill_at_any_point_of_a_fetching_claim_is_made_good_by_the_next(a_uri, tmp_path, monkeypatch):
    copied = {"log": b"1", "folder/a": b"2", "folder/b": b"3"}
    first = write(tmp_path / "first", log=b"1", folder__a=b"2", folder__b=b"3")
    mirror = pushed(first, a_uri)
    there = tmp_path / "elsewhere"
    for point in range(100):
        shutil.rmtree(there, ignore_errors=True)
        write(there, log=b"stale", folder__stale=b"stale")
        mirror = Mirror(there, a_uri)
        was_killed = killed_at(point, monkeypatch, mirror, mirror.claim)
        assert Mirror(there, a_uri).claim() == ("fetched" if was_killed else "kept")
        assert contents(there) == copied
        if not was_killed:
            break
    assert 2 < point < 99


def test_a_run_that_begins_again_while_the_store_is_away_goes_on_from_its_disk(
    object_store, s3_uri, tmp_path
):
    here = write(tmp_path / "here", log=b"1")
    pushed(here, s3_uri)
    told: list[str] = []
    again = Mirror(here, s3_uri, tell=told.append)
    object_store.stop()
    try:
        with pytest.raises(RunError, match="it can't be reached"):
            Mirror(here, s3_uri).claim()
        with pytest.raises(RunError, match="it can't be reached"):
            Mirror(tmp_path / "new", s3_uri).claim(may_be_late=True)
        assert again.claim(may_be_late=True) == "kept"
        assert "out of date for now" in told[0]
    finally:
        object_store.start()
    write(here, log=b"12")
    assert again.push()
    assert contents(fetch(s3_uri, tmp_path / "read")) == {"log": b"12"}


@pytest.mark.parametrize("point", [0, 1])
def test_a_store_that_refuses_in_the_middle_of_a_claim_may_be_late_as_well(a_uri, tmp_path, point):
    here = write(tmp_path / "here", log=b"1")
    pushed(here, a_uri)
    Remote(a_uri).write_bytes(".uploading-1", b"half")
    changes = []

    def refuse(operation: str, path: str) -> None:
        changes.append((operation, path))
        if len(changes) == (1 if point == 0 else 3):  # the owner's writing, its move, a leftover's removal
            raise OSError("503 SlowDown")

    strict = Mirror(here, a_uri)
    watch(strict, refuse)
    with pytest.raises(RunError, match="503 SlowDown"):
        strict.claim()
    changes.clear()
    told: list[str] = []
    late = Mirror(here, a_uri, tell=told.append)
    watch(late, refuse)
    assert late.claim(may_be_late=True) == "kept"
    assert "503 SlowDown" in told[0]
    write(here, log=b"12")
    assert late.push()
    assert contents(fetch(a_uri, tmp_path / "read")) == {"log": b"12"}
    assert Mirror(here, a_uri).owner_elsewhere() is None


def test_who_was_overtaken_while_the_store_was_away_finds_out(object_store, s3_uri, tmp_path):
    here = write(tmp_path / "here", log=b"1")
    pushed(here, s3_uri)
    again = Mirror(here, s3_uri, tell=lambda _: None)
    object_store.stop()
    try:
        again.claim(may_be_late=True)
    finally:
        object_store.start()
    claimed(tmp_path / "elsewhere", s3_uri)
    write(here, log=b"12")
    with pytest.raises(RunError, match="taken the run over"):
        again.push()
    assert Mirror(here, s3_uri).claim() == "fetched"
    assert contents(here) == {"log": b"1"}
