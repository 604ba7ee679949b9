import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_muzero.algorithm.returns import n_step_returns
from tests.reference.returns import slow_return


def returns(rewards, values, discount, n, **options):
    return n_step_returns(np.float32(rewards), np.float32(values), discount, n, **options).tolist()


def test_two_step_returns_by_hand():
    # z_0 = 1 + ½·2 + ¼·20,  z_1 = 2 + ½·4 + ¼·30,  z_2 = 4 + ½·30 (the game was cut there),  z_3 = 30
    assert returns([1, 2, 4], [0, 10, 20, 30], 0.5, 2) == [7, 11.5, 19, 30]


def test_terminated_game_ends_with_value_zero():
    assert returns([1, 2, 4], [0, 10, 20, 0], 0.5, 2) == [7, 4, 4, 0]


def test_horizon_beyond_the_game_gives_monte_carlo_returns():
    assert returns([1, 2, 4], [9, 9, 9, 0], 0.5, 100) == [3, 4, 4, 0]


def test_literal_returns_drop_the_reward_of_the_first_step():
    # z_0 = ½·2 + ¼·20,  z_1 = ½·4 + ¼·30,  z_2 = ½·30
    assert returns([1, 2, 4], [0, 10, 20, 30], 0.5, 2, literal_returns=True) == [6, 9.5, 15, 30]


@pytest.mark.parametrize("first_player", [0, 1])
def test_two_players_rewards_and_values_change_sign_for_the_other(first_player):
    to_play = np.array([0, 1, 0, 1]) ^ first_player
    # z_0 = 1 − 2 + 20,  z_1 = 2 − 4 + 30,  z_2 = 4 − 30,  z_3 = 30, whoever began
    assert returns([1, 2, 4], [0, 10, 20, 30], 1.0, 2, to_play=to_play) == [19, 28, -26, 30]


def test_a_player_who_moves_twice_keeps_the_sign():
    assert returns([1, 2, 4], [0, 0, 0, 0], 1.0, 9, to_play=np.array([0, 0, 1, 0])) == [-1, -2, 4, 0]


@settings(deadline=None)
@given(
    num_steps=st.integers(1, 12),
    n=st.integers(1, 15),
    discount=st.floats(0.1, 1),
    players=st.one_of(st.none(), st.integers(0, 2**13 - 1)),
    literal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_slow_oracle(num_steps, n, discount, players, literal, seed):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=num_steps), rng.normal(size=num_steps + 1)
    to_play = None if players is None else np.array([players >> i & 1 for i in range(num_steps + 1)])
    fast = n_step_returns(rewards, values, discount, n, to_play, literal)
    slow = [slow_return(rewards, values, discount, n, t, to_play, int(literal)) for t in range(num_steps + 1)]
    np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-5)
