"""Copies of runs at a URI that commands fetch to read them: nobody takes them away, and none is left behind."""

from __future__ import annotations

import fcntl
import multiprocessing

import pytest

from distributed_muzero.config import make_config
from distributed_muzero.mirror.uri import local_runs_dir
from distributed_muzero.workers.runs import created, open_to_read


@pytest.fixture
def copied(there) -> str:
    """The runs folder of a run with an episode."""
    with created(there, "r", make_config({})) as (folder, copies):
        copies.claim_shards(1)
        (folder.replay / "shard_0/log").write_bytes(b"1")
        copies.push()
    return there


def test_what_one_purpose_fetches_takes_nothing_from_another(copied):
    whole = open_to_read("r", copied)
    without = open_to_read("r", copied, exclude=("replay",))
    assert (whole.replay / "shard_0/log").read_bytes() == b"1" and not without.replay.exists()
    assert whole.name == without.name == "r"


def test_who_reads_again_fetches_into_the_same_folder(copied):
    assert open_to_read("r", copied).path == open_to_read("r", copied).path


def test_what_killed_readers_left_is_removed_and_what_is_read_stays(copied):
    fetched = local_runs_dir(copied) / ".fetched"
    names = ("reader-killed", ".r.fetching-1", ".r.old-1", "reader-live")
    for name in names:
        (fetched / name / "r").mkdir(parents=True)
    with (fetched / "reader-live/lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        mine = open_to_read("r", copied).path
    assert [path.name for path in fetched.iterdir() if path not in mine.parents] == ["reader-live"]


def read_again_and_again(uri: str, failures: multiprocessing.Queue) -> None:
    try:
        for _ in range(10):
            folder = open_to_read("r", uri)
            assert (folder.replay / "shard_0/log").read_bytes() == b"1"
            assert folder.config == make_config({})
        failures.put(None)
    except BaseException as error:
        failures.put(repr(error))


def test_processes_that_read_at_once_are_in_nobodys_way_and_leave_nothing(copied):
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    readers = [context.Process(target=read_again_and_again, args=(copied, failures)) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        assert [failures.get(timeout=60) for _ in readers] == [None] * 2
    finally:
        for reader in readers:
            reader.join(20)
            reader.kill()
    assert list((local_runs_dir(copied) / ".fetched").iterdir()) == []
