"""What is copied to a URI, in which order, and what a store that fails does to it."""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from distributed_muzero import checkpoint
from distributed_muzero.errors import RunError
from distributed_muzero.mirror import plan, remote
from distributed_muzero.mirror.download import fetch, names_at
from distributed_muzero.mirror.mirror import ALIVE, Mirror, keep_pushing
from distributed_muzero.mirror.remote import CHUNK_BYTES, Remote, RemoteError
from tests.mirror.folders import claimed, contents, pushed, watch, write
from tests.object_store import environment


def test_a_copy_comes_back_as_it_was(any_uri, tmp_path):
    large = random.Random(0).randbytes(2 * CHUNK_BYTES + 12345)
    here = write(
        tmp_path / "here",
        config_dot_yaml=b"run: {}\n",
        checkpoints__step_00000001__DONE=b"done",
        checkpoints__step_00000001__optimizer_dot_safetensors=large,
        empty=b"",
        history__0=b"h",
        replay__shard_0__episodes__segment_00000001_dot_log=b"of another mirror",
        replay__shard_0__episodes__lock=b"",
        lock=b"",
        _dot_status_dot_json_dot_writing=b"half",
    )
    mirror = pushed(here, any_uri, exclude=("replay",))
    there = tmp_path / "elsewhere"
    assert Mirror(there, any_uri, exclude=("replay",)).claim() == "fetched"
    expected = {name: data for name, data in contents(here).items() if not name.startswith("replay/")}
    assert contents(there) == expected
    assert not (there / "lock").exists() and not (there / "replay").exists()
    stats = mirror.stats()
    assert (stats["files"], stats["bytes"]) == (5, sum(map(len, expected.values())))
    assert stats["failures"] == 0 and stats["seconds_since_push"] < 60


def test_only_changes_are_copied(any_uri, tmp_path):
    here = write(tmp_path / "here", config=b"1", replay__log=b"one", gone=b"x", folder__gone=b"x")
    mirror = pushed(here, any_uri)
    assert mirror.push() and mirror.stats()["files"] == 4
    with (here / "replay/log").open("ab") as file:
        file.write(b" two")
    (here / "gone").unlink()
    shutil.rmtree(here / "folder")
    assert mirror.push()
    stats = mirror.stats()
    assert (stats["files"], stats["bytes"], stats["removed"]) == (5, 4 + 2 + 7, 2)
    assert contents(fetch(any_uri, tmp_path / "read")) == {"config": b"1", "replay/log": b"one two"}


def test_a_replaced_file_of_the_same_size_is_copied(any_uri, tmp_path):
    here = write(tmp_path / "here", status=b"1")
    mirror = pushed(here, any_uri)
    time_of_change = (here / "status").stat().st_mtime_ns
    (here / ".new").write_bytes(b"2")
    os.utime(here / ".new", ns=(time_of_change, time_of_change))
    (here / ".new").rename(here / "status")
    assert mirror.push()
    assert contents(fetch(any_uri, tmp_path / "read")) == {"status": b"2"}


def test_what_somebody_deletes_there_is_copied_again(object_store, bucket, s3_uri, tmp_path):
    here = write(tmp_path / "here", config=b"1", log=b"22")
    mirror = pushed(here, s3_uri)
    client = object_store.client()
    client.delete_object(Bucket=bucket, Key="runs/r/log")
    client.delete_object(Bucket=bucket, Key="runs/r/.owner")
    client.put_object(Bucket=bucket, Key="runs/r/config", Body=b"cut off")
    assert mirror.push() and mirror.push()
    assert contents(fetch(s3_uri, tmp_path / "read")) == {"config": b"1", "log": b"22"}
    assert "runs/r/.owner" in object_store.names(bucket)


def test_large_records_are_copied_less_often_but_in_the_end(a_uri, tmp_path):
    now = 0.0
    here = write(tmp_path / "here", metrics_dot_jsonl=b"x" * 256 * 1024 * 60, log=b"1")
    mirror = pushed(here, a_uri, clock=lambda: now)
    write(here, metrics_dot_jsonl=b"more", log=b"more")
    there = Path(a_uri.removeprefix("file://"))

    def sizes() -> tuple[int, int]:
        return (there / "metrics.jsonl").stat().st_size, (there / "log").stat().st_size

    now = 59.0
    assert mirror.push(everything=False) and sizes() == (256 * 1024 * 60, 4)
    now = 61.0
    assert mirror.push(everything=False) and sizes() == (4, 4)
    write(here, metrics_dot_jsonl=b"x" * 10**6)
    assert mirror.push() and sizes() == (10**6, 4)
    write(here, metrics_dot_jsonl=b"last")
    assert mirror.push() and sizes() == (4, 4)


def test_of_a_growing_file_the_bytes_are_copied_that_were_there_when_it_was_looked_at(s3_uri, tmp_path):
    here = write(tmp_path / "here", a=b"", log=b"first")
    mirror = claimed(here, s3_uri)

    def grow_once(operation: str, path: str) -> None:
        if path.endswith("/a") and (here / "log").stat().st_size == len(b"first"):
            with (here / "log").open("ab") as file:
                file.write(b" later")

    watch(mirror, grow_once)
    assert mirror.push()
    assert contents(fetch(s3_uri, tmp_path / "read")) == {"a": b"", "log": b"first"}
    assert mirror.push()
    assert contents(fetch(s3_uri, tmp_path / "read")) == {"a": b"", "log": b"first later"}


def test_when_a_file_goes_meanwhile_nothing_of_a_later_stage_is_copied_before_a_new_look(a_uri, tmp_path):
    here = write(
        tmp_path / "here",
        episodes__segment_00000001_dot_log=b"1",
        episodes__segment_00000002_dot_log=b"2",
        journal__segment_00000001_dot_log=b"knows 1",
    )
    mirror = claimed(here, a_uri)
    moved = []

    def drop_the_first(operation: str, path: str) -> None:
        if (here / "episodes/segment_00000002.log").exists():
            write(here, journal__segment_00000001_dot_log=b"knows that 2 was dropped")
            (here / "episodes/segment_00000002.log").unlink()
        moved.append(path)

    watch(mirror, drop_the_first)
    assert mirror.push()
    assert contents(fetch(a_uri, tmp_path / "read")) == {
        "episodes/segment_00000001.log": b"1",
        "journal/segment_00000001.log": b"knows that 2 was dropped",
    }


def test_a_newer_best_json_is_not_copied_before_the_checkpoint_that_it_names(a_uri, tmp_path):
    folder = tmp_path / "here" / "checkpoints"
    checkpoint.write_checkpoint(folder, 1, {"weights": {"w": np.zeros(3)}}, {})
    checkpoint.mark_best(folder, 1, 1.0)
    mirror = claimed(tmp_path / "here", a_uri)

    def improve_once(operation: str, path: str) -> None:
        if not (folder / "step_00000002").exists():
            checkpoint.write_checkpoint(folder, 2, {"weights": {"w": np.ones(3)}}, {})
            checkpoint.mark_best(folder, 2, 2.0)

    watch(mirror, improve_once)
    assert mirror.push()
    best = checkpoint.best_checkpoint(fetch(a_uri, tmp_path / "read") / "checkpoints")
    assert best is not None and best.step == 2


def test_a_checkpoint_that_is_written_again_meanwhile_is_copied_as_one(a_uri, tmp_path):
    folder = tmp_path / "here" / "checkpoints"
    checkpoint.write_checkpoint(folder, 1, {"weights": {"w": np.zeros(3)}}, {"written": 1})
    mirror = claimed(tmp_path / "here", a_uri)

    operations: list[str] = []

    def write_again_once(operation: str, path: str) -> None:
        operations.append(operation)
        if operations == ["open_output_stream", "move"]:  # of its first file
            checkpoint.write_checkpoint(folder, 1, {"weights": {"w": np.ones(3)}}, {"written": 2})

    watch(mirror, write_again_once)
    assert mirror.push()
    saved = checkpoint.latest_checkpoint(fetch(a_uri, tmp_path / "read") / "checkpoints")
    assert saved is not None and saved.state == {"written": 2} and saved.tensors["weights"]["w"].all()


def test_a_store_slower_than_checkpoints_come_gets_the_newest_and_loses_the_old_ones(a_uri, tmp_path):
    folder = tmp_path / "here" / "checkpoints"

    def save(step: int) -> None:
        checkpoint.write_checkpoint(folder, step, {"weights": {"w": np.full(3, step)}}, {})
        checkpoint.prune_checkpoints(folder, 2)

    save(1)
    checkpoint.mark_best(folder, 1, 1.0)
    mirror = pushed(tmp_path / "here", a_uri)
    for step in (2, 3, 4):
        save(step)
    number_copied, newest = 0, 4

    # Two more come while one is copied.
    def save_two_of_each_checkpoint(operation: str, path: str) -> None:
        nonlocal number_copied, newest
        number_copied += path.endswith("/DONE") and operation == "move"
        if newest < 4 + 2 * number_copied:
            newest += 2
            save(newest - 1)
            save(newest)

    watch(mirror, save_two_of_each_checkpoint)
    for number in range(2, 5):
        before = newest
        assert mirror.push()
        copied = fetch(a_uri, tmp_path / f"read-{number}") / "checkpoints"
        saved, best = checkpoint.latest_checkpoint(copied), checkpoint.best_checkpoint(copied)
        assert saved is not None and saved.step >= before
        assert best is not None and best.step == 1
        assert len(list(copied.glob("step_*"))) <= 3


def test_files_that_go_on_going_end_the_push_as_a_failure(a_uri, tmp_path):
    here = write(tmp_path / "here", episodes__0=b"", journal__0=b"")
    told: list[str] = []
    mirror = claimed(here, a_uri, tell=told.append)
    number = 0

    def replace_all(operation: str, path: str) -> None:
        nonlocal number
        for name in (f"a{number + 1}", f"b{number + 1}"):
            write(here, **{f"episodes__{name}": b"x"})
        for name in (f"a{number}", f"b{number}"):
            (here / "episodes" / name).unlink(missing_ok=True)
        number += 1

    replace_all("", "")
    watch(mirror, replace_all)
    assert not mirror.push()
    assert "faster than they can be copied" in told[0]


def test_a_file_that_cant_be_read_keeps_no_other_from_being_copied(a_uri, tmp_path):
    here = write(tmp_path / "here", a=b"1", b=b"2", journal__z=b"3")
    told: list[str] = []
    mirror = claimed(here, a_uri, tell=told.append)

    def make_it_a_folder(operation: str, path: str) -> None:
        if (here / "b").is_file():
            (here / "b").unlink()
            write(here, b__c=b"2")

    watch(mirror, make_it_a_folder)
    assert not mirror.push()
    assert f"can't read {here / 'b'}" in told[0]
    assert contents(fetch(a_uri, tmp_path / "read")) == {"a": b"1", "journal/z": b"3"}
    assert mirror.push()
    assert contents(fetch(a_uri, tmp_path / "read")) == {"a": b"1", "b/c": b"2", "journal/z": b"3"}


# Orders -----------------------------------------------------------------------------------------------------------


def test_the_order_of_uploads():
    expected = [
        "config.yaml",
        "checkpoints/step_00000002/manifest.json",
        "checkpoints/step_00000002/DONE",
        "checkpoints/step_00000001/state.json",
        "checkpoints/step_00000001/weights.safetensors",
        "checkpoints/step_00000001/DONE",
        "episodes/segment_00000001.log",
        "episodes/segment_00000002.log",
        "league.json",
        "checkpoints/best.json",
        "journal/segment_00000003.log",
        "journal/segment_00000004.log",
    ]
    shuffled = random.Random(1).sample(expected, len(expected))
    assert sorted(shuffled, key=plan.upload_order) == expected


def test_downloads_begin_with_what_uploads_end_with_and_removals_with_done():
    names = ["a", "journal/segment_1.log", "episodes/segment_1.log", "checkpoints/step_1/DONE"]
    assert sorted(names, key=plan.download_order)[0] == "journal/segment_1.log"
    assert sorted(names, key=plan.removal_order)[0] == "checkpoints/step_1/DONE"


def test_the_journal_is_looked_at_before_the_episodes(tmp_path, monkeypatch):
    """So it never speaks of more than is found, however fast episodes come in."""
    write(tmp_path, journal__j=b"", episodes__0=b"")
    number = 0

    def add_one(path):
        nonlocal number
        listed = scandir(path)
        number += 1
        write(tmp_path, **{f"episodes__{number}": b""})
        # Its size tells how many it speaks of.
        write(tmp_path, journal__j=b"." * number)
        return listed

    scandir = os.scandir
    monkeypatch.setattr(plan.os, "scandir", add_one)
    found = plan.look(tmp_path)
    num_episodes = sum(name.startswith("episodes/") for name in found)
    assert 1 < found["journal/j"].num_bytes <= num_episodes - 1


def test_a_look_during_which_a_file_goes_is_not_used(tmp_path, monkeypatch):
    write(tmp_path, journal__j=b"knows 1 and 2", episodes__1=b"", episodes__2=b"")

    def drop_one(path):
        if Path(path).name == "episodes" and (tmp_path / "episodes/1").exists():
            write(tmp_path, journal__j=b"knows 2")
            (tmp_path / "episodes/1").unlink()
        return scandir(path)

    scandir = os.scandir
    monkeypatch.setattr(plan.os, "scandir", drop_one)
    found = plan.look(tmp_path)
    assert found.keys() == {"journal/j", "episodes/2"}
    assert found["journal/j"].num_bytes == len(b"knows 2")


# The store fails --------------------------------------------------------------------------------------------------


def test_a_store_that_goes_away_and_comes_back(object_store, s3_uri, tmp_path):
    here = write(tmp_path / "here", log=b"1")
    told: list[str] = []
    mirror = pushed(here, s3_uri, tell=told.append)
    write(here, log=b"12")
    object_store.stop()
    try:
        assert [mirror.push(), mirror.push()] == [False, False]
        assert len(told) == 1 and "it can't be reached" in told[0] and "training goes on" in told[0]
        assert mirror.stats()["failures"] == 2 and "it can't be reached" in mirror.last_failure
        with pytest.raises(RunError, match="it can't be reached"):
            mirror.push(required=True)
    finally:
        object_store.start()
    assert mirror.push() and mirror.last_failure is None
    assert len(told) == 2 and "up to date again" in told[1]
    assert contents(fetch(s3_uri, tmp_path / "read")) == {"log": b"12"}


def test_an_error_that_nobody_foresaw_is_counted_and_the_next_push_is_tried(a_uri, tmp_path):
    told: list[str] = []
    mirror = claimed(write(tmp_path / "here", a=b"1"), a_uri, interval_seconds=0.02, tell=told.append)

    def fail_at_first(operation: str, path: str) -> None:
        if mirror.stats()["failures"] < 3:
            raise ValueError("odd")

    watch(mirror, fail_at_first)
    with mirror.keep_pushing():
        deadline = time.monotonic() + 20
        while not mirror.stats()["files"] and time.monotonic() < deadline:
            time.sleep(0.01)
    assert mirror.stats()["failures"] == 3 and mirror.stats()["files"] == 1
    assert "odd" in told[0] and "up to date again" in told[1]


def test_an_upload_that_breaks_off_leaves_the_file_that_was_there(object_store, s3_uri, tmp_path):
    remote = Remote(s3_uri)
    old = b"old" * CHUNK_BYTES
    remote.write_bytes("large", old)

    class BreaksOff(io.BytesIO):
        def read(self, size=-1):
            if self.tell() == 2 * CHUNK_BYTES:
                object_store.stop()
            return super().read(size)

    try:
        with pytest.raises(RemoteError, match="can't be reached"):
            remote.write("large", BreaksOff(bytes(4 * CHUNK_BYTES)), 4 * CHUNK_BYTES)
    finally:
        object_store.start()

    class Unreadable(io.BytesIO):
        def read(self, size=-1):
            if self.tell() == 2 * CHUNK_BYTES:
                raise OSError("bad sector")
            return super().read(size)

    with pytest.raises(OSError, match="bad sector"):
        remote.write("large", Unreadable(bytes(4 * CHUNK_BYTES)), 4 * CHUNK_BYTES)
    assert remote.read("large") == old
    assert Mirror(tmp_path / "new", s3_uri).claim() == "fetched"
    assert Remote(s3_uri).files().keys() == {"large", ".owner"}


def test_no_bucket_no_permission_and_no_folder_for_it_are_one_clear_error_each(
    object_store, bucket, tmp_path
):
    here = write(tmp_path / "here", log=b"1")
    with pytest.raises(
        RunError, match=r"can't write s3://no-such-bucket/r/.owner: .*no such bucket: create it"
    ):
        Mirror(here, object_store.uri("no-such-bucket", "r")).claim()
    place = object_store.uri(bucket, "r")
    mirror = pushed(here, place, tell=lambda _: None)
    with object_store.asking_for_permission():
        with pytest.raises(RunError, match="credentials are missing or may not do this"):
            Mirror(tmp_path / "new", place).claim()
        write(here, log=b"2")
        assert not mirror.push()
    assert mirror.push()
    with pytest.raises(RunError, match=r"can't read file://.*/here/log/r/.owner"):
        Mirror(here, f"file://{here}/log/r").claim()


def test_the_endpoint_may_come_from_the_environment(object_store, bucket, tmp_path, monkeypatch):
    for name, value in environment(object_store).items():
        monkeypatch.setenv(name, value)
    pushed(write(tmp_path / "here", config_dot_yaml=b""), f"s3://{bucket}/runs/r")
    assert names_at(f"s3://{bucket}/runs") == ["r"]


def test_a_store_that_never_answers_fails_in_bounded_time(silent_uri, tmp_path, monkeypatch):
    monkeypatch.setattr("distributed_muzero.mirror.remote.REQUEST_SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(RunError, match="can't be reached"):
        Mirror(tmp_path, silent_uri).claim()
    assert time.monotonic() - began < 20


# In the background ------------------------------------------------------------------------------------------------


def test_it_pushes_again_and_again_and_once_more_in_the_end(any_uri, tmp_path):
    here = write(tmp_path / "here", log=b"1")
    mirror = claimed(here, any_uri, interval_seconds=0.05)
    with mirror.keep_pushing():
        deadline = time.monotonic() + 20
        while not mirror.stats()["files"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert mirror.stats()["files"] == 1
        mirror.interval_seconds = 60.0
        time.sleep(0.2)
        write(here, log=b"12", more=b"3")
    assert contents(fetch(any_uri, tmp_path / "read")) == {"log": b"12", "more": b"3"}
    assert threading.active_count() == 1 or "mirror" not in {thread.name for thread in threading.enumerate()}


def test_in_the_background_the_owner_learns_that_it_was_overtaken(a_uri, tmp_path):
    told: list[str] = []
    mirror = claimed(write(tmp_path / "here", log=b"1"), a_uri, interval_seconds=0.02, tell=told.append)
    with mirror.keep_pushing():
        mirror.check()
        claimed(tmp_path / "elsewhere", a_uri)
        deadline = time.monotonic() + 20
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(RunError, match="taken the run over"):
            mirror.check()
    assert len(told) == 1


def test_a_push_that_takes_longer_than_the_others_patience_shows_all_the_while_that_it_lives(
    any_uri, tmp_path, monkeypatch
):
    """Each chunk takes 40 s; whoever sees no new sign of life for 60 s takes the run for dead."""
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)
    now = 0.0
    signs: list[bytes | None] = []

    class Slow:
        """A stream or file system of pyarrow's, which takes long to write a chunk."""

        def __init__(self, original):
            self._original = original

        def __getattr__(self, name):
            return getattr(self._original, name)

        def open_output_stream(self, *arguments, **options):
            return Slow(self._original.open_output_stream(*arguments, **options))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._original.close()

        def write(self, chunk: bytes) -> None:
            nonlocal now
            if len(chunk) == 1000:
                now += 40.0
                signs.append(Remote(any_uri).read(ALIVE))
            self._original.write(chunk)

    here = write(tmp_path / "here", a=bytes(1000), b=bytes(1000), c=bytes(6000), d=bytes(1000))
    mirror = claimed(here, any_uri, clock=lambda: now)
    mirror._remote._files = Slow(mirror._remote._files)
    assert mirror.push(everything=False)
    assert len(signs) == 9 and None not in signs[2:]
    assert len(set(signs[1:])) == 8
    assert contents(fetch(any_uri, tmp_path / "read")) == contents(here)
    assert {name for name in Remote(any_uri).files() if name.startswith(".")} == {".alive", ".owner"}


def test_a_store_that_gives_no_answer_between_chunks_ends_no_upload(a_uri, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)
    here = write(tmp_path / "here", a=bytes(5000))
    mirror = claimed(here, a_uri, clock=itertools.count(0, 5).__next__)
    original, num_reads = Remote.read, 0

    def read(self: Remote, name: str) -> bytes | None:
        nonlocal num_reads
        num_reads += 1
        if num_reads == 4:
            raise RemoteError("503 SlowDown")
        return original(self, name)

    monkeypatch.setattr(Remote, "read", read)
    assert mirror.push(required=True) and num_reads > 4


def test_without_a_last_push_the_end_begins_none(a_uri, tmp_path):
    here = write(tmp_path / "here", log=b"1")
    mirror = claimed(here, a_uri, interval_seconds=60.0)
    with keep_pushing([mirror], once_more=False):
        pass
    assert mirror.stats()["files"] == 0
    assert mirror.push() and mirror.stats()["files"] == 1


def test_the_end_waits_for_the_last_push_for_a_bounded_time_only(a_uri, tmp_path):
    told: list[str] = []
    mirror = claimed(write(tmp_path / "here", a=b"1", b=b"2"), a_uri, last_push_seconds=0.2, tell=told.append)
    hold = threading.Event()
    watch(mirror, lambda *_: hold.wait(20))
    began = time.monotonic()
    with mirror.keep_pushing():
        pass
    assert time.monotonic() - began < 5
    assert "isn't done after 0.2 s" in told[0]
    hold.set()
    for thread in threading.enumerate():
        if thread.name == "mirror":
            thread.join(20)
    # What was under way is finished, and nothing after it is begun.
    assert contents(fetch(a_uri, tmp_path / "read")) == {"a": b"1"}


def test_the_last_pushes_of_several_folders_share_their_time(tmp_path):
    mirrors = [
        claimed(
            write(tmp_path / name, a=b"1", b=b"2"), f"file://{tmp_path}/there/{name}", last_push_seconds=0.5
        )
        for name in "123"
    ]
    hold = threading.Event()
    for mirror in mirrors:
        watch(mirror, lambda *_: hold.wait(20))
    began = time.monotonic()
    with keep_pushing(mirrors):
        pass
    assert 0.5 <= time.monotonic() - began < 1.4
    hold.set()
    for thread in threading.enumerate():
        if thread.name == "mirror":
            thread.join(20)
    assert [mirror.stats()["files"] for mirror in mirrors] == [1, 1, 1]
