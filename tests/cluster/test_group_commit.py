"""A shard in an event loop, with disks that fail or hang; no Ray."""

import asyncio
import errno
import os
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from distributed_muzero.cluster.group_commit import GroupCommit, flush, insert
from distributed_muzero.config import make_config
from distributed_muzero.replay import schema
from distributed_muzero.replay.schema import Targets
from distributed_muzero.workers.replay_shard import InsertReply, ReplayShard
from tests.episodes import SPEC, make_episode


@pytest.fixture
def open_shard(tmp_path):
    def open_it():
        replay = {"min_size_to_sample": 10, "samples_per_insert": 1.0, "error_buffer": 1e6}
        replay |= {"segment_bytes": 2**16}
        config = make_config({"replay": replay, "learner": {"batch_size": 4}, "reanalyse": {"ratio": 0.5}})
        return ReplayShard(SPEC, config, 0, tmp_path / "shard")

    return open_it


@pytest.fixture
def shard(open_shard):
    with closing(open_shard()) as shard:
        yield shard


def episodes(*numbers, num_steps=10):
    return [make_episode(num_steps, name=f"run/0/0/{number}", seed=number) for number in numbers]


def statuses(replies):
    return [reply.status for reply in replies]


class Disk:
    """os.`name`, which waits until it is told how to end."""

    def __init__(self, monkeypatch, name):
        self.entered = threading.Event()
        self._go_on = threading.Event()
        self._failures = []
        self._real = getattr(os, name)
        monkeypatch.setattr(os, name, self._call)

    def _call(self, *arguments):
        self.entered.set()
        assert self._go_on.wait(10)
        if self._failures and self._failures.pop(0):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._real(*arguments)

    def end(self, *failures):
        """Lets calls through; the first ones fail where `failures` says so."""
        self._failures = list(failures)
        self._go_on.set()


async def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


# Commits in groups ----------------------------------------------------------------------------------------------


def test_all_who_come_during_a_commit_share_the_next():
    go_on, began = threading.Event(), []

    def commit():
        began.append(len(began))
        assert go_on.wait(10)
        return began[-1]

    async def run():
        group = GroupCommit(commit)
        first = asyncio.create_task(group.done())
        await until(lambda: began)
        late = [asyncio.create_task(group.done()) for _ in range(5)]
        await asyncio.sleep(0.01)
        go_on.set()
        # Not the one that ran when they came: it may have begun before their records were appended.
        assert await first == 0
        assert await asyncio.gather(*late) == [1] * 5
        assert await group.done() == 2

    asyncio.run(run())


def test_a_commit_that_fails_fails_all_who_shared_it_and_nobody_else():
    results = [ValueError("disk"), 7]

    def commit():
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    async def run():
        group = GroupCommit(commit)
        shared = await asyncio.gather(group.done(), group.done(), return_exceptions=True)
        assert [str(error) for error in shared] == ["disk", "disk"]
        assert await group.done() == 7

    asyncio.run(run())


def test_who_gives_up_waiting_stops_nobody_else():
    go_on = threading.Event()

    async def run():
        group = GroupCommit(lambda: go_on.wait(10) and 3)
        tasks = [asyncio.create_task(group.done()) for _ in range(2)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        await asyncio.sleep(0.01)
        go_on.set()
        assert await tasks[1] == 3

    asyncio.run(run())


# Episodes -------------------------------------------------------------------------------------------------------


def test_many_inserts_share_few_commits(shard):
    commits = []

    def commit():
        commits.append(None)
        time.sleep(0.02)
        return shard.commit()

    async def run():
        group = GroupCommit(commit)
        replies = await asyncio.gather(*(insert(shard, group, episodes(number)) for number in range(20)))
        assert [statuses(reply) for reply in replies] == [["stored"]] * 20

    asyncio.run(run())
    assert len(commits) <= 2 and shard.ring.num_episodes == 20


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_an_episode_is_no_duplicate_of_one_that_was_given_up(shard, monkeypatch, call):
    """Its repetition comes between the failure and the first caller's answer, or before the failure."""

    async def run():
        group = GroupCommit(shard.commit)
        disk = Disk(monkeypatch, call)
        first = asyncio.create_task(insert(shard, group, episodes(0)))
        await until(disk.entered.is_set)
        before = asyncio.create_task(insert(shard, group, episodes(0)))
        await asyncio.sleep(0)
        disk.end(True)
        # The loop stands still here: the first caller hears of it after the repetition has begun.
        deadline = time.monotonic() + 10
        while shard.store.log.generation == 0:
            assert time.monotonic() < deadline
        after = await insert(shard, group, episodes(0))
        assert statuses(await first) == statuses(await before) == statuses(after) == ["wait"]
        assert statuses(await insert(shard, group, episodes(0))) == ["stored"]
        assert statuses(await insert(shard, group, episodes(0))) == ["duplicate"]

    asyncio.run(run())
    assert shard.stats()["duplicates"] == 1 and shard.stats()["log_failures"] == 1


def test_a_repetition_of_what_is_being_stored_is_acknowledged_with_it(shard, monkeypatch):
    async def run():
        group = GroupCommit(shard.commit)
        disk = Disk(monkeypatch, "fsync")
        calls = [asyncio.create_task(insert(shard, group, episodes(0, 0))) for _ in range(2)]
        await until(disk.entered.is_set)
        disk.end()
        assert [statuses(await call) for call in calls] == [["stored", "duplicate"], ["duplicate"] * 2]

    asyncio.run(run())
    assert shard.stats()["duplicates"] == 3


def test_what_came_after_a_failure_is_stored_although_it_began_before_it_was_told(shard, monkeypatch):
    async def run():
        group = GroupCommit(shard.commit)
        disk = Disk(monkeypatch, "write")
        lost = asyncio.create_task(insert(shard, group, episodes(0)))
        await until(disk.entered.is_set)
        threading.Timer(0.05, disk.end, [True]).start()
        # Its append waits for the failing write, and comes behind it.
        stored = await insert(shard, group, episodes(1))
        assert (statuses(await lost), statuses(stored)) == (["wait"], ["stored"])

    asyncio.run(run())


def test_what_was_appended_during_a_sync_that_fails_is_gone_with_it(shard, monkeypatch):
    """Its own commit comes next and succeeds, with nothing left to store."""

    async def run():
        group = GroupCommit(shard.commit)
        disk = Disk(monkeypatch, "fsync")
        first = asyncio.create_task(insert(shard, group, episodes(0)))
        await until(disk.entered.is_set)
        second = asyncio.create_task(insert(shard, group, episodes(1)))
        await asyncio.sleep(0.01)
        disk.end(True)
        assert (statuses(await first), statuses(await second)) == (["wait"], ["wait"])
        assert statuses(await insert(shard, group, episodes(0, 1))) == ["stored", "stored"]

    asyncio.run(run())
    assert shard.stats()["log_failures"] == 1 and shard._num_pending == 0


def test_every_failure_of_the_disk_is_counted_once(shard, monkeypatch):
    async def run():
        group = GroupCommit(shard.commit)
        disk = Disk(monkeypatch, "fsync")
        calls = [asyncio.create_task(insert(shard, group, episodes(number))) for number in range(6)]
        await until(disk.entered.is_set)
        disk.end(True)
        return [statuses(await call) for call in calls]

    assert asyncio.run(run()) == [["wait"]] * 6
    assert shard.stats()["log_failures"] == 1


@pytest.mark.parametrize("place", ["encode", "commit"])
def test_an_unexpected_error_leaves_nothing_behind(shard, monkeypatch, place):
    def fail(*arguments):
        raise MemoryError

    async def run():
        group = GroupCommit(lambda: fail() if place == "commit" else shard.commit())
        with monkeypatch.context() as patch:
            if place == "encode":
                patch.setattr(schema, "encode_episodes", fail)
            with pytest.raises(MemoryError):
                await insert(shard, group, episodes(0))
        assert shard._num_pending == 0
        assert statuses(await insert(shard, GroupCommit(shard.commit), episodes(0))) == ["stored"]

    asyncio.run(run())
    assert shard.ring.num_episodes == 1


# Flushes --------------------------------------------------------------------------------------------------------


def refreshed(shard, version):
    entry = shard.ring.oldest
    policies = np.full((entry.num_steps, SPEC.num_actions), 1 / SPEC.num_actions, np.float32)
    return Targets(entry.key, version, policies, np.full(entry.num_rows, version, np.float32))


def test_the_loop_goes_on_while_a_flush_waits_for_the_disk(shard, monkeypatch):
    async def run():
        group = GroupCommit(shard.commit)
        await insert(shard, group, episodes(*range(5)))
        disk = Disk(monkeypatch, "fsync")
        flushing = asyncio.create_task(flush(shard))
        await until(disk.entered.is_set)
        inserting = []
        for number in range(5, 10):
            assert shard.sample() is not None
            inserting.append(asyncio.create_task(insert(shard, group, episodes(number))))
            await asyncio.sleep(0)
        assert not flushing.done()
        disk.end()
        await flushing
        assert await asyncio.gather(*inserting) == [[InsertReply("stored")]] * 5

    asyncio.run(run())


def test_a_flush_that_failed_is_made_up_for_by_the_next(shard, open_shard, monkeypatch, tmp_path):
    async def run():
        await insert(shard, GroupCommit(shard.commit), episodes(0))
        shard.update_targets([refreshed(shard, 1)])
        disk = Disk(monkeypatch, "fsync")
        disk.end(True)
        await flush(shard)
        assert shard.stats()["log_failures"] == 1
        await flush(shard)

    asyncio.run(run())
    shard.store.close()
    with closing(open_shard()) as after:
        assert after.ring.oldest.targets_version == 1


def test_targets_that_come_during_a_flush_are_in_the_next(shard, open_shard, monkeypatch):
    async def run():
        await insert(shard, GroupCommit(shard.commit), episodes(0))
        shard.update_targets([refreshed(shard, 1)])
        disk = Disk(monkeypatch, "fsync")
        flushing = asyncio.create_task(flush(shard))
        await until(disk.entered.is_set)
        shard.update_targets([refreshed(shard, 2)])
        second = asyncio.create_task(flush(shard))
        disk.end()
        await asyncio.gather(flushing, second)

    asyncio.run(run())
    shard.store.close()
    with closing(open_shard()) as after:
        assert after.ring.oldest.targets_version == 2
        assert (after.ring.root_values[after.ring.oldest.rows] == 2).all()


def test_a_write_that_fails_beside_a_flush_fails_it_too(shard, open_shard, monkeypatch):
    """A batch's state went into the same write as the flush's records: both are gone, and come again."""

    async def run():
        await insert(shard, GroupCommit(shard.commit), episodes(*range(5)))
        shard.update_targets([refreshed(shard, 1)])

        def refuse(descriptor, data):
            raise OSError(errno.ENOSPC, "full")

        with shard.store.flushing(shard.state()) as wait_for_disk, monkeypatch.context() as patch:
            patch.setattr(os, "write", refuse)
            assert shard.sample() is None
            patch.undo()
            with pytest.raises(Exception, match="a write failed meanwhile"):
                wait_for_disk()
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    shard.flush()
    shard.store.close()
    with closing(open_shard()) as after:
        assert after.ring.oldest.targets_version == 1


def test_segments_without_a_held_episode_go_with_a_flush(tmp_path):
    replay = {"max_transitions": 60, "min_size_to_sample": 10, "error_buffer": 1e9, "segment_bytes": 2**16}
    config = make_config({"replay": replay, "learner": {"batch_size": 4}})

    async def fill(shard):
        group = GroupCommit(shard.commit)
        for number in range(300):
            await insert(shard, group, episodes(number, num_steps=50))
        assert shard.store.has_dead_segments
        await flush(shard)
        assert not shard.store.has_dead_segments

    with closing(ReplayShard(SPEC, config, 0, tmp_path)) as shard:
        asyncio.run(fill(shard))
        assert shard.store.log.segments[0].number > 1
    with closing(ReplayShard(SPEC, config, 0, tmp_path)) as after:
        assert all(after.store.knows(f"run/0/0/{number}") for number in range(300))


# Ray's shells, without Ray ----------------------------------------------------------------------------------------


def test_what_could_not_be_made_is_not_tried_again():
    from distributed_muzero.cluster.program import made_at_first_use

    class Shell:
        attempts = 0

        @made_at_first_use
        def worker(self):
            self.attempts += 1
            raise ValueError(f"attempt {self.attempts}")

        @made_at_first_use
        def other(self):
            return object()

    shell = Shell()
    for _ in range(3):
        with pytest.raises(ValueError, match="attempt 1"):
            _ = shell.worker
    assert shell.other is shell.other


def test_what_the_commit_before_has_stored_is_acknowledged_although_its_own_commit_fails(shard, monkeypatch):
    """An offer may come between the start of a commit and its look at what there is to write."""
    gates = [threading.Event() for _ in range(3)]
    waiting = iter(gates)

    def commit():
        assert next(waiting).wait(10)
        return shard.commit()

    async def offer_three():
        group = GroupCommit(commit)
        first = asyncio.create_task(insert(shard, group, episodes(1)))
        await asyncio.sleep(0.05)  # its commit has begun, and has written nothing yet
        second = asyncio.create_task(insert(shard, group, episodes(2)))
        await asyncio.sleep(0.05)
        gates[0].set()
        assert statuses(await first) == ["stored"]
        third = asyncio.create_task(insert(shard, group, episodes(3)))
        await asyncio.sleep(0.05)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", refuse)
            gates[1].set()
            gates[2].set()
            return statuses(await second), statuses(await third)

    assert asyncio.run(offer_three()) == (["stored"], ["wait"])
    assert statuses(shard.insert(episodes(2, 3))) == ["duplicate", "stored"]


def refuse(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
