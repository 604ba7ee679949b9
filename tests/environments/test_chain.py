import numpy as np
import pytest

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.chain import JUMP, LEFT, RIGHT, ChainEnvironment, make_chain, solve
from distributed_muzero.errors import EnvironmentFailure, UnknownEnvironmentError


def play(chain, actions):
    """[(reward, state, ended)] of the actions."""
    chain.initial_state()
    return [(reward, chain.state, ended) for reward, _, ended in map(chain.step, actions)]


def test_right_end_pays_one_and_terminates():
    chain = ChainEnvironment(length=5, start=3)
    assert play(chain, [JUMP]) == [(1.0, 4, True)]  # a jump past the end stops at it
    assert not chain.truncated


def test_left_end_pays_little_and_terminates():
    assert play(ChainEnvironment(length=5, start=2), [LEFT, LEFT]) == [(0.0, 1, False), (0.2, 0, True)]


def test_time_limit_truncates_but_not_when_the_game_ends_in_that_step():
    chain = ChainEnvironment(length=5, start=2, max_episode_steps=2)
    assert play(chain, [LEFT, RIGHT])[-1] == (0.0, 2, True) and chain.truncated
    assert play(chain, [RIGHT, RIGHT])[-1] == (1.0, 4, True) and not chain.truncated


def test_jump_is_legal_in_every_third_state_only():
    chain = ChainEnvironment(length=8, start=3)
    assert chain.initial_state().tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert chain.mask().tolist() == [True, True, True]
    chain.step(RIGHT)
    assert chain.mask().tolist() == [True, True, False]
    with pytest.raises(EnvironmentFailure, match="action 2 is forbidden in state 4"):
        chain.step(JUMP)


def test_solution_by_hand():
    # 0 . . 3 . 5: from 3 jump to the end; from 2 right, then jump; from 1 left 0.2 against 0.5² = 0.25.
    solution = solve(ChainEnvironment(length=6), discount=0.5)
    np.testing.assert_allclose(solution.values, [0, 0.25, 0.5, 1, 1, 0])
    np.testing.assert_allclose(solution.qvalues[3], [0.25, 0.5, 1])
    assert solution.qvalues[4, JUMP] == -np.inf
    assert solution.optimal_actions[3].tolist() == [False, False, True]
    assert solution.optimal_actions[1].tolist() == [False, True, False]


def test_small_discount_prefers_the_near_small_reward():
    assert solve(ChainEnvironment(length=6), discount=0.4).optimal_actions[1].tolist() == [True, False, False]


def test_following_the_solution_earns_its_value():
    chain, discount = ChainEnvironment(length=12), 0.9
    solution = solve(chain, discount)
    chain.initial_state()
    value, factor, ended = 0.0, 1.0, False
    while not ended:
        reward, _, ended = chain.step(int(solution.optimal_actions[chain.state].argmax()))
        value, factor = value + factor * reward, factor * discount
    assert value == pytest.approx(solution.values[chain.start])


def test_factory_takes_the_shorter_limit_and_refuses_wrong_kwargs():
    assert make_chain(EnvironmentConfig(id="chain", max_episode_steps=7)).max_episode_steps == 7
    with pytest.raises(EnvironmentFailure, match="lenght"):
        make_chain(EnvironmentConfig(id="chain", kwargs={"lenght": 5}))
    with pytest.raises(EnvironmentFailure, match="from 3 on"):
        make_chain(EnvironmentConfig(id="chain", kwargs={"length": 2}))
    with pytest.raises(UnknownEnvironmentError, match="one member"):
        make_chain(EnvironmentConfig(id="chain:long"))


def test_playing_on_after_the_end_is_an_error():
    chain = ChainEnvironment(length=5, start=3)
    play(chain, [JUMP])
    with pytest.raises(EnvironmentFailure, match="ended"):
        chain.step(LEFT)
