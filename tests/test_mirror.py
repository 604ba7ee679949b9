"""A run's copy at a URI: at a real server that speaks S3, and in a folder (file://)."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from distributed_muzero import checkpoint
from distributed_muzero.config import make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import RunError
from distributed_muzero.mirror import mirror as mirror_module
from distributed_muzero.mirror import plan, uri
from distributed_muzero.mirror.download import fetch, names_at
from distributed_muzero.mirror.mirror import Mirror, keep_pushing
from distributed_muzero.mirror.remote import CHUNK_BYTES, Remote, RemoteError
from distributed_muzero.replay import store as replay_store
from distributed_muzero.workers.replay_shard import ReplayShard
from tests.episodes import make_episode
from tests.object_store import CREDENTIALS, ObjectStore, environment

SPEC = EnvironmentSpec("mirrored", (64,), np.dtype(np.float32), (3,))
STEPS = 40  # of an episode: five of them fill a segment
CONFIG = make_config(
    {
        "replay": {
            "max_transitions": 40 * STEPS,
            "min_size_to_sample": 20,
            "segment_bytes": 2**16,
            "error_buffer": 10**9,
        },
        "learner": {"batch_size": 4},
    }
)


@pytest.fixture(scope="module")
def object_store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    yield store
    store.stop()


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(object_store) -> str:
    return object_store.new_bucket()


@pytest.fixture
def s3_uri(object_store, bucket) -> str:
    return object_store.uri(bucket, "runs", "r")


@pytest.fixture(params=["file", "s3"])
def any_uri(request, tmp_path) -> str:
    """Where a run's copy may lie; nothing is there yet."""
    if request.param == "file":
        return f"file://{tmp_path}/there/r"
    return request.getfixturevalue("s3_uri")


@pytest.fixture
def a_uri(tmp_path) -> str:
    return f"file://{tmp_path}/there/r"


def write(folder: Path, **contents: bytes) -> Path:
    """Files by name, with `__` for a slash and `_dot_` for a dot."""
    for name, data in contents.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but locks and hidden ones."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if plan.is_copied(name)}


def claimed(folder: Path, place: str, **options) -> Mirror:
    mirror = Mirror(folder, place, **options)
    mirror.claim()
    return mirror


def pushed(folder: Path, place: str, **options) -> Mirror:
    mirror = claimed(folder, place, **options)
    assert mirror.push(required=True)
    return mirror


# URIs -------------------------------------------------------------------------------------------------------------


def test_a_uri_is_told_from_a_path():
    for text in ("s3://bucket/prefix", "gs://bucket", "file:///folder", "s3:/bucket"):
        assert uri.is_uri(text)
    for text in ("runs", "/data/runs", "./s3", "a:b", "", "C:/runs", Path("runs")):
        assert not uri.is_uri(text)


def test_a_run_lies_below_its_runs_folder_and_before_the_query():
    run = uri.join("s3://bucket/prefix/?region=eu-west-3", "cartpole")
    assert run == "s3://bucket/prefix/cartpole?region=eu-west-3"
    assert uri.split_name(run) == ("s3://bucket/prefix?region=eu-west-3", "cartpole")
    assert uri.join("gs://bucket", "replay", "shard_0") == "gs://bucket/replay/shard_0"
    assert uri.shown(run) == "s3://bucket/prefix/cartpole"


def test_each_uri_has_a_folder_of_its_own_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTRIBUTED_MUZERO_STATE_DIR", str(tmp_path))
    folder = uri.local_runs_dir("s3://bucket/my/runs/")
    assert folder.parent == tmp_path and folder.name.startswith("bucket-my-runs-")
    assert folder == uri.local_runs_dir("s3://bucket/my/runs")
    assert folder != uri.local_runs_dir("s3://bucket/my-runs")
    monkeypatch.delenv("DISTRIBUTED_MUZERO_STATE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert uri.local_runs_dir("s3://b").parent == tmp_path / "home/.local/state/distributed_muzero"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert uri.local_runs_dir("s3://b").parent == tmp_path / "state/distributed_muzero"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3:/bucket/runs", "expected one like s3://bucket/prefix"),
        ("s3:///runs", "names no bucket"),
        ("s3://bucket//runs?region=x", "without #, .. or //"),
        ("s3://bucket/../runs?region=x", "without #, .. or //"),
        ("s3://bucket/runs#1?region=x", "without #, .. or //"),
        ("s3://bucket/runs?regoin=x", "unknown option regoin"),
        ("s3://key:secret@bucket/runs?region=x", "give it by the environment"),
        ("http://host/runs", "Unrecognized filesystem type"),
        ("file://runs", "expected one like"),
        ("file:///", "names no folder"),
        ("gs://bucket/runs?regoin=x", "regoin"),
    ],
)
def test_a_wrong_uri_is_one_clear_error(text, message, tmp_path):
    with pytest.raises(RunError) as error:
        Mirror(tmp_path, text)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "secret" not in str(error.value)


# What is copied, and how often ------------------------------------------------------------------------------------


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


class Watched:
    """pyarrow's file system, which does something before each of its changes."""

    def __init__(self, files, before_change: Callable[[str, str], None]):
        self._files = files
        self._before_change = before_change

    def __getattr__(self, name):
        found = getattr(self._files, name)
        if name not in ("open_output_stream", "move", "copy_file", "delete_file", "delete_dir"):
            return found

        def changed(path, *arguments, **options):
            self._before_change(name, path)
            return found(path, *arguments, **options)

        return changed


def watch(mirror: Mirror, before_change: Callable[[str, str], None]) -> None:
    mirror._remote._files = Watched(mirror._remote._files, before_change)


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


# Owners -----------------------------------------------------------------------------------------------------------


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


class Killed(BaseException):
    """What no handler of errors takes for an error."""


def killed_at(point: int, monkeypatch, mirror: Mirror, work: Callable[[], object]) -> bool:
    """Ends the work before its change number `point`: of the store, or of files here; False if it was done before."""
    number = 0

    def count(*_: object) -> None:
        nonlocal number
        number += 1
        if number > point:
            raise Killed

    def counted(original):
        return lambda *arguments, **options: (count(), original(*arguments, **options))[1]

    files = mirror._remote._files
    watch(mirror, count)
    with monkeypatch.context() as patched:
        patched.setattr(mirror_module, "write_atomically", counted(mirror_module.write_atomically))
        patched.setattr(Remote, "download", counted(Remote.download))
        for name in ("rename", "unlink", "rmdir"):
            patched.setattr(Path, name, counted(getattr(Path, name)))
        patched.setattr(mirror_module.shutil, "rmtree", counted(shutil.rmtree))
        try:
            work()
        except Killed:
            return True
        finally:
            mirror._remote._files = files
    return False


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


@pytest.fixture
def silent_uri() -> Iterator[str]:
    """A server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield f"s3://bucket/r?region=x&scheme=http&endpoint_override=127.0.0.1:{server.getsockname()[1]}"


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


# To be read -------------------------------------------------------------------------------------------------------


def test_fetch_replaces_what_was_there_and_leaves_out_what_isnt_needed(any_uri, tmp_path):
    here = write(tmp_path / "here", config_dot_yaml=b"1", replay__shard_0__log=b"2")
    pushed(here, any_uri)
    read = write(tmp_path / "read", stale=b"x")
    assert contents(fetch(any_uri, read, exclude=("replay",))) == {"config.yaml": b"1"}
    assert contents(fetch(any_uri, read)) == {"config.yaml": b"1", "replay/shard_0/log": b"2"}
    assert {path.name for path in tmp_path.iterdir()} <= {"here", "read", "there"}
    parent, _ = uri.split_name(any_uri)
    with pytest.raises(RunError, match=r"no run at .*nothing lies there"):
        fetch(uri.join(parent, "other"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_runs_of_a_runs_folder_are_those_with_a_config(any_uri, tmp_path):
    parent, _ = uri.split_name(any_uri)
    assert names_at(parent) == []
    for name in ("b", "a"):
        pushed(write(tmp_path / name, config_dot_yaml=b"1"), uri.join(parent, name))
    pushed(write(tmp_path / "half", status=b"1"), uri.join(parent, "half"))
    assert names_at(parent) == ["a", "b"]


def test_a_name_that_leads_out_of_the_folder_is_refused(object_store, bucket, s3_uri, tmp_path):
    object_store.client().put_object(Bucket=bucket, Key="runs/r/a/../../../evil", Body=b"")
    with pytest.raises(RunError, match="no run has such a file"):
        fetch(s3_uri, tmp_path / "read")


def test_a_fetch_while_the_run_goes_on_begins_again_when_a_file_goes(a_uri, tmp_path, monkeypatch):
    here = write(tmp_path / "here", episodes__1=b"1", episodes__2=b"2", journal__1=b"knows 1 and 2")
    mirror = pushed(here, a_uri)
    original = Remote.download

    def download(remote: Remote, name: str, path: Path) -> bool:
        if name == "episodes/1" and (here / "episodes/1").exists():
            (here / "episodes/1").unlink()
            write(here, journal__1=b"knows 2")
            assert mirror.push()
        return original(remote, name, path)

    monkeypatch.setattr(Remote, "download", download)
    assert contents(fetch(a_uri, tmp_path / "read")) == {"episodes/2": b"2", "journal/1": b"knows 2"}


# A run of its own: checkpoints and a shard ------------------------------------------------------------------------


class MirroredRun:
    """A tiny run: episodes into a real shard, checkpoints of a few numbers, and the mirrors of both."""

    def __init__(self, folder: Path, place: str, name: str):
        replay_store.MIN_JOURNAL_BYTES = 3_000
        self.folder = folder
        self.name = name
        self.run_mirror = Mirror(folder, place, exclude=("replay",))
        self.shard_mirror = Mirror(folder / "replay/shard_0", uri.join(place, "replay", "shard_0"))
        self.found = [mirror.claim() for mirror in self.mirrors]
        self.shard = ReplayShard(SPEC, CONFIG, 0, folder / "replay/shard_0")
        saved = checkpoint.latest_checkpoint(folder / "checkpoints")
        self.step = saved.step if saved else 0
        self.number = 0

    @property
    def mirrors(self) -> list[Mirror]:
        return [self.run_mirror, self.shard_mirror]

    def play(self, num_episodes: int) -> list[str]:
        """Ids of stored, acknowledged episodes."""
        played = [
            make_episode(STEPS, name=f"{self.name}/{self.number + i}", seed=i, spec=SPEC)
            for i in range(num_episodes)
        ]
        self.number += num_episodes
        assert {reply.status for reply in self.shard.insert(played)} == {"stored"}
        self.shard.sample()
        self.shard.flush()
        return [episode.episode_id for episode in played]

    def save(self, step: int) -> None:
        folder = self.folder / "checkpoints"
        weights = np.full(1000, step, np.float32)
        checkpoint.write_checkpoint(folder, step, {"weights": {"w": weights}}, {"note": time.time()})
        checkpoint.prune_checkpoints(folder, 2)
        if step % 2:
            checkpoint.mark_best(folder, step, float(step))
        self.step = step


def check_run(run: MirroredRun, acknowledged: list[str], step: int) -> None:
    """What a machine finds that has nothing but the copy."""
    saved = checkpoint.latest_checkpoint(run.folder / "checkpoints")
    assert (saved.step if saved else 0) >= step
    if saved:
        assert (saved.tensors["weights"]["w"] == saved.step).all()
    best = run.folder / "checkpoints/best.json"
    if best.exists():
        assert checkpoint.best_checkpoint(best.parent) is not None
    stats = run.shard.stats()
    assert stats["missing_episodes"] == 0
    assert run.shard.store.log.damage.corrupt_records == run.shard.store.journal.damage.corrupt_records == 0
    assert [name for name in acknowledged if not run.shard.store.has_stored(name)] == []


def test_a_kill_at_any_point_of_a_push_leaves_a_copy_that_a_run_goes_on_from(a_uri, tmp_path, monkeypatch):
    run = MirroredRun(tmp_path / "first", a_uri, "first")
    acknowledged = run.play(30)
    run.save(1)
    run.save(2)
    for mirror in run.mirrors:
        assert mirror.push()
    # Dropped segments, a journal written anew, a checkpoint written again, one pruned, another best one.
    segments = sorted((run.folder / "replay/shard_0/journal").glob("segment_*"))
    later = [name for _ in range(12) for name in run.play(5)]
    run.save(2)
    run.save(3)
    assert sorted((run.folder / "replay/shard_0/journal").glob("segment_*"))[0] not in segments
    there = Path(a_uri.removeprefix("file://"))
    shutil.copytree(there, tmp_path / "before")
    copied = {mirror: dict(mirror._copied) for mirror in run.mirrors}
    num_points = 0
    for mirror, work in ((run.shard_mirror, "shard"), (run.run_mirror, "run")):
        for point in range(200):
            shutil.rmtree(there)
            shutil.copytree(tmp_path / "before", there)
            mirror._copied = dict(copied[mirror])
            was_killed = killed_at(point, monkeypatch, mirror, mirror.push)
            found = MirroredRun(tmp_path / f"{work}-{point}", a_uri, "found")
            check_run(found, acknowledged + (later if work == "shard" and not was_killed else []), 2)
            found.shard.close()
            shutil.rmtree(found.folder)
            num_points += 1
            if not was_killed:
                break
        else:
            raise AssertionError("no end of the push in sight")
    assert num_points > 30
    run.shard.close()


def play_and_push(folder: Path, place: str, name: str, notes: Path) -> None:
    """Plays for ever, and pushes meanwhile; notes what is acknowledged, and what was when a whole push began."""
    run = MirroredRun(folder, place, name)
    noted = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(*line: object) -> None:
        os.write(noted, json.dumps(line).encode() + b"\n")

    note("claimed", *run.found)
    acknowledged: list[str] = []

    def push_on() -> None:
        while True:
            number, step = len(acknowledged), run.step
            are_whole = [mirror.push() for mirror in run.mirrors]
            if all(are_whole) and number and step:
                note("pushed", acknowledged[:number], step)

    threading.Thread(target=push_on, daemon=True).start()
    rng = random.Random(name)
    while True:
        new = run.play(rng.randint(1, 4))
        acknowledged += new
        note("acknowledged", new)
        if rng.random() < 0.2:
            run.save(run.step + rng.randint(0, 1) or 1)
        time.sleep(0.01)


@pytest.mark.slow
def test_kill_9_and_going_on_here_or_elsewhere_loses_nothing_that_was_pushed(any_uri, tmp_path):
    rng = random.Random(0)
    context = multiprocessing.get_context("spawn")
    known: list[str] = []
    step = 0
    folder = tmp_path / "machine-0"
    for number, is_elsewhere in enumerate([True, False, True, True]):
        if is_elsewhere:
            folder = tmp_path / f"machine-{number}"
        notes = tmp_path / f"notes-{number}"
        process = context.Process(target=play_and_push, args=(folder, any_uri, f"run/{number}", notes))
        process.start()
        try:
            wait_for(notes, "pushed", process)
            time.sleep(rng.uniform(0.1, 1.5))
        finally:
            process.kill()
            process.join(20)
        lines = [json.loads(line) for line in notes.read_text().splitlines()]
        assert [line[1:] for line in lines if line[0] == "claimed"] == [
            ["new", "new"] if number == 0 else ["fetched", "fetched"] if is_elsewhere else ["kept", "kept"]
        ]
        whole = [line for line in lines if line[0] == "pushed"]
        # The next machine is lost with its disk; the disk of this one holds all that it acknowledged.
        stays = number == 0
        known += (
            [name for line in lines if line[0] == "acknowledged" for name in line[1]]
            if stays
            else whole[-1][1]
        )
        step = whole[-1][2]
        if stays:
            continue
        found = MirroredRun(tmp_path / f"found-{number}", any_uri, "found")
        assert found.found == ["fetched", "fetched"]
        check_run(found, known, step)
        found.shard.close()


def wait_for(notes: Path, kind: str, process) -> None:
    deadline = time.monotonic() + 60
    while not (notes.exists() and f'["{kind}"' in notes.read_text()):
        assert process.is_alive() and time.monotonic() < deadline, f"nothing was {kind}"
        time.sleep(0.02)
