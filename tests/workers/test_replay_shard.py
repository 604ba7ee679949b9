import errno
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from distributed_muzero.algorithm.returns import n_step_returns
from distributed_muzero.config import AlgorithmConfig, make_config
from distributed_muzero.replay import schema
from distributed_muzero.replay.index import row_bytes
from distributed_muzero.replay.sampler import PrioritizedSampler
from distributed_muzero.workers.replay_shard import ReplayShard
from tests.episodes import SPEC, make_episode

BATCH = 4


@pytest.fixture
def make_shard(tmp_path):
    shards = []

    def make(seed=0, history_length=1, algorithm=None, reanalyse=None, folder=None, num_actors=1, **options):
        options = {"max_transitions": 200, "min_size_to_sample": 20, "samples_per_insert": 2.0, **options}
        config = make_config(
            {
                "environment": {"history_length": history_length},
                "algorithm": algorithm or {},
                "actor": {"num_actors": num_actors},
                "replay": options,
                "reanalyse": reanalyse or {},
                "learner": {"batch_size": BATCH},
                "run": {"seed": seed},
            }
        )
        shards.append(ReplayShard(SPEC, config, 0, folder or tmp_path / f"shard_{len(shards)}"))
        return shards[-1]

    yield make
    for shard in shards:
        shard.close()


def episodes(number, num_steps=10, first=0, **options):
    return [
        make_episode(num_steps, name=f"run/0/0/{i}", seed=i, **options) for i in range(first, first + number)
    ]


def statuses(replies):
    return [reply.status for reply in replies]


def test_same_id_twice_is_stored_once_and_acknowledged_twice(make_shard):
    shard = make_shard()
    (episode,) = episodes(1)
    assert statuses(shard.insert([episode, episode])) == ["stored", "duplicate"]
    assert statuses(shard.insert([episode])) == ["duplicate"]
    stats = shard.stats()
    assert (stats["inserted_episodes"], stats["transitions"], stats["duplicates"]) == (1, 10, 2)


def test_wait_leaves_the_episode_with_the_caller_who_may_offer_it_again(make_shard):
    shard = make_shard(error_buffer=BATCH)
    replies = statuses(shard.insert(episodes(10)))
    held_back = replies.index("wait")
    assert replies == ["stored"] * held_back + ["wait"] * (10 - held_back)
    assert shard.stats()["episodes"] == held_back
    # A repeated id needs no room, so it is acknowledged all the same.
    assert statuses(shard.insert(episodes(1))) == ["duplicate"]
    while shard.sample() is not None:
        pass
    assert statuses(shard.insert(episodes(1, first=held_back))) == ["stored"]


def test_a_refused_episode_is_acknowledged_counted_and_not_stored(make_shard):
    shard = make_shard()
    bad = replace(episodes(1)[0], rewards=np.full(10, np.nan, np.float32))
    (reply,) = shard.insert([bad])
    assert reply.status == "rejected" and "rewards holds NaN" in reply.reason
    assert shard.rejects == {"not_finite": 1} and shard.stats()["episodes"] == 0


def test_an_episode_longer_than_the_shard_is_refused(make_shard):
    shard = make_shard()
    assert statuses(shard.insert([make_episode(200)])) == ["rejected"]
    assert shard.rejects == {"length": 1}
    assert statuses(shard.insert([make_episode(199)])) == ["stored"]


def test_nothing_is_sampled_before_the_minimum_size(make_shard):
    shard = make_shard()
    shard.insert(episodes(1))
    assert shard.sample() is None
    shard.insert(episodes(1, first=1))
    assert shard.sample() is not None


def test_sampling_and_inserting_never_both_wait(make_shard):
    shard = make_shard(error_buffer=BATCH)
    offered = iter(episodes(60, num_steps=7))
    waiting = next(offered)
    for _ in range(400):
        stored = shard.insert([waiting])[0].status == "stored"
        if stored and (waiting := next(offered, None)) is None:
            break
        assert stored or shard.sample() is not None
    else:
        pytest.fail("the episodes were never all stored")


def test_each_shard_takes_its_share_of_minimum_and_budget(make_shard):
    shard = make_shard(num_shards=4, min_size_to_sample=40, max_transitions=400)
    assert shard.limiter.min_size == 10 and shard.ring.capacity == 100


def test_rows_hold_the_returns_of_their_step(make_shard):
    algorithm = AlgorithmConfig(discount=0.9, td_steps=3, num_unroll_steps=2)
    shard = make_shard(algorithm=algorithm.model_dump())
    stored = episodes(4, two_players=True)
    shard.insert(stored)
    batch = shard.sample()
    assert batch.importance_weights.tolist() == [1] * BATCH
    for (key, t), returns, observation in zip(
        batch.positions, batch.target_returns, batch.observations[:, -1], strict=True
    ):
        episode = stored[key]
        z = n_step_returns(episode.rewards, episode.root_values, 0.9, 3, episode.to_play)
        expected = [z[t + k] if t + k <= 10 else 0 for k in range(3)]
        np.testing.assert_array_equal(returns, np.float32(expected))
        np.testing.assert_array_equal(observation, episode.observations[t])


def test_no_row_of_a_truncated_game_reaches_past_its_limit(make_shard):
    shard = make_shard(algorithm={"num_unroll_steps": 5})
    shard.insert(episodes(4, terminated=False))
    steps = np.concatenate([batch.positions[:, 1] for batch in shard.sample_many(1000)])
    assert steps.max() == 5  # of ten steps: 5 + 5 is the final observation


def test_batches_follow_from_the_seed(make_shard):
    def positions(seed):
        shard = make_shard(seed)
        shard.insert(episodes(6))
        return np.stack([batch.positions for batch in shard.sample_many(3)]).tolist()

    assert positions(1) == positions(1) != positions(2)


def test_sample_many_gives_what_the_limiter_allows(make_shard):
    shard = make_shard(error_buffer=2 * BATCH)
    assert shard.sample_many(5) == []
    shard.insert(episodes(2))  # exactly the minimum: the slack alone may be sampled
    assert len(shard.sample_many(5)) == 2 and shard.sample() is None


def test_evicted_transitions_are_counted(make_shard):
    shard = make_shard(max_transitions=40, error_buffer=10_000)
    shard.insert(episodes(9))
    stats = shard.stats()
    assert stats["transitions"] + stats["evicted_transitions"] == stats["inserted_transitions"] == 90
    assert stats["transitions"] <= 40


# Limits -----------------------------------------------------------------------------------------------------------


def test_the_slack_is_of_all_shards_together(make_shard):
    slacks = [make_shard(num_shards=n, error_buffer=100).limiter.error_buffer for n in (1, 4, 50)]
    # At least a batch, so that one side can always move.
    assert slacks == [100, 25, BATCH]


def test_prioritised_rows_fit_the_budget_with_all_that_is_kept_of_them(make_shard):
    num_rows = 4096 + 1  # the sum tree's worst case
    budget = num_rows * (row_bytes(SPEC) + PrioritizedSampler.ROW_BYTES)
    shard = make_shard(priority_exponent=0.6, max_transitions=10**6, max_bytes=budget)
    assert shard.ring.capacity == num_rows
    sampler, columns = shard.store.sampler, shard.ring.columns
    arrays = [*columns, shard.ring.root_values, shard.ring.to_play, shard.ring._starts]
    arrays += [sampler.priorities, sampler.versions, sampler._tree._nodes]
    assert 0.95 * budget < sum(array.nbytes for array in arrays) <= budget
    uniform = make_shard(max_transitions=10**6, max_bytes=budget)
    assert uniform.ring.capacity > num_rows


@pytest.mark.parametrize(("before", "after"), [(32, 4), (4, 32)])
def test_a_run_that_goes_on_with_another_ratio_has_no_debts(make_shard, tmp_path, before, after):
    shard = make_shard(folder=tmp_path / "s", samples_per_insert=before)
    shard.insert(episodes(3))
    # A long life.
    shard.limiter.count_insert(1_000_000)
    shard.limiter.count_sample(shard.limiter.balance - 10)
    shard.close()
    again = make_shard(folder=tmp_path / "s", samples_per_insert=after)
    assert again.limiter.balance == 10 and again.limiter.inserted == 1_000_030
    assert again.sample() is not None
    assert statuses(again.insert(episodes(1, first=3))) == ["stored"]


def test_a_run_that_was_offline_may_play_and_learn_at_once(make_shard, tmp_path):
    shard = make_shard(folder=tmp_path / "s", error_buffer=1000)
    shard.insert(episodes(10))
    shard.close()
    offline = make_shard(folder=tmp_path / "s", error_buffer=1000, num_actors=0)
    assert len(offline.sample_many(5000)) == 5000
    offline.close()
    again = make_shard(folder=tmp_path / "s", error_buffer=1000)
    assert statuses(again.insert(episodes(1, first=10))) == ["stored"]
    assert again.sample() is not None
    assert again.limiter.sampled == 5001 * BATCH and again.limiter.inserted == 110


def test_episodes_found_after_the_last_state_count_under_the_limits_they_came_with(make_shard, tmp_path):
    shard = make_shard(folder=tmp_path / "s", samples_per_insert=1.0, error_buffer=100)
    shard.insert(episodes(1))
    shard.flush()
    shard.insert(episodes(9, first=1))
    copy = tmp_path / "killed"
    shutil.copytree(tmp_path / "s", copy)
    again = make_shard(folder=copy, samples_per_insert=32.0, error_buffer=100)
    assert again.limiter.inserted == 100 and again.limiter.balance == 100 - 20


def test_another_share_of_reanalysed_steps_is_counted_from_then_on(make_shard, tmp_path):
    shard = make_shard(folder=tmp_path / "s", error_buffer=1000, reanalyse={"ratio": 0.0})
    shard.insert(episodes(10))
    assert shard.take_for_reanalyse(100) == []
    shard.close()
    again = make_shard(folder=tmp_path / "s", error_buffer=1000, reanalyse={"ratio": 0.5})
    # Not the hundred transitions of before: of those nobody said that they were to be searched anew.
    assert again.take_for_reanalyse(100) == []
    again.insert(episodes(2, first=10))
    assert sum(episode.num_steps for _, episode in again.take_for_reanalyse(100)) == 20
    assert again.stats()["refreshed_transitions"] == 20


# Disks that fail --------------------------------------------------------------------------------------------------


def refuse(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_learner_that_polls_a_full_disk_leaves_the_shard_usable(make_shard, monkeypatch):
    shard = make_shard()
    shard.insert(episodes(3))
    num_open = len(os.listdir("/proc/self/fd"))
    counts = shard.limiter.state()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        for _ in range(300):
            assert shard.sample() is None
    assert len(os.listdir("/proc/self/fd")) <= num_open + 1
    assert shard.limiter.state() == counts and shard.stats()["log_failures"] == 300
    assert shard.sample() is not None


def test_duplicates_of_what_is_stored_are_acknowledged_by_a_full_disk_too(make_shard, monkeypatch):
    shard = make_shard()
    shard.insert(episodes(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        replies = shard.insert([*episodes(2), *episodes(2), make_episode(300, name="run/0/0/long")])
    assert statuses(replies) == ["duplicate", "wait", "duplicate", "wait", "rejected"]
    assert "No space left" in replies[1].reason
    stats = shard.stats()
    assert (stats["duplicates"], stats["log_failures"]) == (2, 1)
    assert statuses(shard.insert(episodes(2))) == ["duplicate", "stored"]


def test_an_insert_that_breaks_off_may_come_again(make_shard, monkeypatch):
    shard = make_shard()

    def fail(*arguments):
        raise MemoryError

    for owner, name in ((schema, "encode_episodes"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(MemoryError):
                shard.insert(episodes(1))
    assert statuses(shard.insert(episodes(1))) == ["stored"]
    assert shard.stats()["episodes"] == shard.stats()["inserted_episodes"] == 1


def test_a_segment_that_can_not_be_dropped_is_counted_and_goes_later(make_shard, monkeypatch):
    shard = make_shard(max_transitions=30, error_buffer=1e6, segment_bytes=2**16)
    numbers = iter(range(10**6))

    def fill():
        shard.insert(episodes(1, num_steps=20, first=next(numbers)))
        return shard.store.log.segments[0].number

    while fill() == 1:
        pass
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        while shard.stats()["log_failures"] == 0:
            assert fill() == 2
    assert fill() > 2 and shard.stats()["log_failures"] == 1
