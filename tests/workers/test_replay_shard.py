from dataclasses import replace

import numpy as np
import pytest

from distributed_muzero.algorithm.returns import n_step_returns
from distributed_muzero.config import AlgorithmConfig, make_config
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
