import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_muzero.algorithm.acting import Game
from distributed_muzero.algorithm.targets import make_batch, num_start_positions
from distributed_muzero.replay.index import EpisodeRing
from tests.episodes import SPEC, make_episode
from tests.games import Script
from tests.reference.batch import slow_row


def ring_of(*episodes, capacity=1000):
    ring = EpisodeRing(SPEC, capacity, 2**30)
    for key, episode in enumerate(episodes):
        ring.add(key, episode, np.arange(episode.num_steps + 1, dtype=np.float32) + 10, episode.num_steps)
    return ring


def batch_of(ring, rows, history_length, num_unroll_steps, seed=0):
    rows = np.asarray(rows)
    weights = np.ones(len(rows), np.float32)
    return make_batch(
        ring.columns, rows, history_length, num_unroll_steps, weights, np.random.default_rng(seed)
    )


def test_a_row_at_the_end_of_a_game_by_hand():
    episode = make_episode(3)
    batch = batch_of(ring_of(episode), [2], history_length=2, num_unroll_steps=3)
    assert (batch.observations[0] == episode.observations[1:3]).all()
    assert batch.target_actions[0, 0] == episode.actions[2]
    assert batch.target_rewards[0].tolist() == [episode.rewards[2], 0, 0, 0]
    assert batch.target_returns[0].tolist() == [12, 13, 0, 0]  # z_2, ν_3, then nothing
    assert (batch.target_policies[0, 0] == episode.policies[2]).all() and (
        batch.target_policies[0, 1:] == 0
    ).all()
    assert batch.positions.tolist() == [[0, 2]]


def test_observations_before_the_first_are_zero_as_they_are_in_acting():
    game = Game(Script(3), history_length=3)
    histories = [game.history.copy()]
    for _ in range(3):
        game.play(np.ones(2, bool), np.float32([0.5, 0.5]), 0, 0.0)
        histories.append(game.history.copy())
    assert histories[0].ravel().tolist() == [0, 0, 1] and histories[1].ravel().tolist() == [0, 1, 2]

    spec = SPEC._replace(observation_shape=(1,), action_shape=(2,))
    ring = EpisodeRing(spec, 100, 2**30)
    ring.add(0, make_episode(4, spec=spec), np.zeros(5, np.float32), 4)  # something else stands before it
    ring.add(1, game.episode("a", "script", 0, 0.0), np.zeros(4, np.float32), 3)
    batch = batch_of(ring, 5 + np.arange(3), history_length=3, num_unroll_steps=1)
    np.testing.assert_array_equal(batch.observations, np.stack(histories[:3]))


def test_actions_past_the_end_are_legal_and_all_of_them_turn_up():
    episode = make_episode(2, seed=3)
    legal = np.nonzero(episode.legal_masks[-1])[0].tolist()
    batch = batch_of(ring_of(episode), [1] * 200, history_length=1, num_unroll_steps=3)
    assert len(legal) > 1
    assert np.unique(batch.target_actions[:, 1:]).tolist() == legal


def test_rows_behind_a_time_limit_never_reach_past_the_final_observation():
    assert num_start_positions(make_episode(9, terminated=True), 5) == 9
    assert (
        num_start_positions(make_episode(9, terminated=False), 5) == 5
    )  # steps 0 … 4: 4 + 5 is the final one
    assert num_start_positions(make_episode(3, terminated=False), 5) == 0


@pytest.mark.parametrize("terminated", [True, False])
def test_dtypes_are_those_of_the_batch_contract(terminated):
    batch = batch_of(ring_of(make_episode(4, terminated=terminated)), [0, 3], 2, 3)
    assert [array.dtype.name for array in batch[:-1]] == (
        ["float32", "float32", "int32", "float32", "float32", "float32", "int64", "int64"]
    )
    assert all(array.flags.c_contiguous for array in batch[:-1])


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=15),
    history_length=st.integers(1, 4),
    num_unroll_steps=st.integers(1, 6),
    capacity=st.integers(9, 30),
    seed=st.integers(0, 1000),
)
def test_equals_the_slow_oracle_through_wrap_around_and_eviction(
    lengths, history_length, num_unroll_steps, capacity, seed
):
    episodes = [
        make_episode(n, seed=seed + i, terminated=i % 3 > 0, version=i) for i, n in enumerate(lengths)
    ]
    ring = ring_of(*episodes, capacity=capacity)
    rng = np.random.default_rng(seed)
    batch = batch_of(ring, ring.sample_rows(40, rng), history_length, num_unroll_steps, seed)
    for m in range(40):
        key, t = batch.positions[m]
        episode = episodes[key]
        returns = np.arange(episode.num_steps + 1) + 10
        slow = slow_row(episode, returns, t, history_length, num_unroll_steps)
        np.testing.assert_array_equal(batch.observations[m], slow["observations"])
        np.testing.assert_array_equal(batch.target_policies[m], slow["policies"])
        np.testing.assert_array_equal(batch.target_rewards[m], slow["rewards"])
        np.testing.assert_array_equal(batch.target_returns[m], slow["returns"])
        for action, expected in zip(batch.target_actions[m], slow["actions"], strict=True):
            assert episode.legal_masks[-1][action] if expected is None else action == expected
        assert batch.weights_versions[m] == key
