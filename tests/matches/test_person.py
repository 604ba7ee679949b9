"""A person's game: whose turn it is, what is taken back, how it ended, what the search says of it."""

from __future__ import annotations

import numpy as np
import pytest

from distributed_muzero.config import SearchConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.environments.chain import ChainEnvironment
from distributed_muzero.errors import EnvironmentFailure
from distributed_muzero.matches.person import Adviser, PersonGame, legal_softmax
from distributed_muzero.networks.base import FunctionNetworks
from distributed_muzero.networks.inference import make_search_model
from tests import games

LEFT, RIGHT = 0, 1


class Nim(games.Nim):
    """With what a game of a person needs besides. Odd seeds start with one stone more."""

    spec = EnvironmentSpec("nim", (1,), np.dtype(np.float32), (2,), num_players=2)
    truncated = False
    num_open = 0

    def __init__(self, pile, first_player=0):
        super().__init__(pile, first_player)
        type(self).num_open += 1

    def initial_state(self, seed=None):
        observation = super().initial_state()
        self.pile += (seed or 0) % 2
        return observation + (seed or 0) % 2

    def close(self):
        type(self).num_open -= 1


class WaitingNim(Nim):
    """The second player may do nothing at its first turn."""

    must_pass = False

    def step(self, action):
        if self.must_pass:
            self.must_pass, self.player = False, 0
            return 0.0, np.array([self.pile], np.float32), False
        self.must_pass = self.pile == self.start
        return super().step(action)

    def mask(self):
        return np.array([True, False]) if self.must_pass else super().mask()


@pytest.fixture(params=["muzero", "gumbel"])
def adviser(request):
    search = SearchConfig(num_simulations=300, policy=request.param)
    return Adviser(make_search_model(games.nim_networks()), search, discount=1.0)


@pytest.fixture(autouse=True)
def none_open():
    Nim.num_open = WaitingNim.num_open = 0


@pytest.mark.parametrize("pile", [4, 5, 7, 8])
def test_the_search_that_knows_the_rules_leaves_a_multiple_of_three(adviser, pile):
    game = PersonGame(lambda: Nim(pile), 1, seed=0)
    opinion = adviser.opinion(game.game)
    assert opinion.action + 1 == pile % 3
    assert opinion.value == opinion.qvalues[opinion.action] > 0.5  # a won position, whatever else was tried
    assert opinion.policy.sum() == pytest.approx(1, abs=1e-5)
    assert opinion.priors.tolist() == [0.5, 0.5]  # nothing is known before the search


def test_values_are_those_of_who_is_to_move(adviser):
    game = PersonGame(lambda: Nim(4), 1, seed=0)
    game.play(0)
    opinion = adviser.opinion(game.game)
    assert opinion.value < -0.5  # three are left, and are lost whatever happens
    assert (opinion.qvalues < 0).all()


def test_an_opinion_has_nothing_for_what_is_forbidden(adviser):
    game = PersonGame(lambda: Nim(1), 1, seed=0)
    opinion = adviser.opinion(game.game)
    assert opinion.action == 0 and opinion.priors.tolist() == [1, 0]
    assert opinion.policy.tolist() == [1, 0] and np.isnan(opinion.qvalues[1])


def test_the_same_position_gets_the_same_opinion(adviser):
    game = PersonGame(lambda: Nim(7), 1, seed=0)
    one, other = adviser.opinion(game.game), adviser.opinion(game.game)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other, strict=True))


def test_a_forbidden_action_has_no_prior_however_large_its_logit():
    priors = legal_softmax(np.array([1.0, 1000.0, 1.0]), np.array([True, False, True]))
    assert priors.tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize("begins", [True, False])
def test_taking_back_returns_to_the_persons_own_turn(begins):
    game = PersonGame(lambda: Nim(10), 1, seed=1, begins=begins)
    actions = [0, 1, 0, 1, 0]
    for action in actions:
        game.play(action)
    before = game.describe()
    at = 4 if begins else 3
    assert game.take_back() == 5 - at
    assert game.is_persons_turn and [move.action for move in game.moves] == actions[:at]
    assert game.describe() != before
    for action in actions[at:]:
        game.play(action)
    assert game.describe() == before  # with the same seed's eleven stones
    assert Nim.num_open == 1
    game.close()
    assert Nim.num_open == 0


def test_all_can_be_taken_back_and_no_more():
    game = PersonGame(lambda: Nim(10), 1, seed=0, begins=False)
    game.play(0)
    assert game.take_back() == 0 and len(game.moves) == 1  # the other one's move alone stays
    for action in (0, 1, 1, 0):
        game.play(action)
    assert [game.take_back(), game.take_back(), game.take_back()] == [2, 2, 0]
    assert [move.action for move in game.moves] == [0] and game.describe() == "9"


def test_taking_back_restores_the_stack_of_observations():
    game, other = (PersonGame(lambda: Nim(10), 3, seed=0) for _ in range(2))
    for action in (0, 1, 0, 0):
        game.play(action)
    game.take_back()
    for action in (0, 1):
        other.play(action)
    assert np.array_equal(game.game.history, other.game.history)


def test_an_environment_that_plays_another_game_cannot_be_taken_back():
    piles = iter([10, 20])
    game = PersonGame(lambda: Nim(next(piles)), 1, seed=0)
    game.play(0)
    game.play(1)
    with pytest.raises(EnvironmentFailure, match="the same moves from the same seed 0 gave another game"):
        game.take_back()
    assert len(game.moves) == 2 and game.describe() == "7"  # it goes on as it was
    assert Nim.num_open == 1


def test_idle_moves_are_told_and_not_what_is_taken_back():
    game = PersonGame(lambda: WaitingNim(10), 1, seed=0, begins=False)
    game.play(0)
    assert game.must_pass and game.is_persons_turn and game.legal_actions() == [0]
    assert game.play(0).is_idle
    assert not game.must_pass and game.num_moves == 1
    assert game.take_back() == 0
    for action in (1, 0, 1):
        game.play(action)
    assert game.take_back() == 2 and len(game.moves) == 3


@pytest.mark.parametrize("first_player", [0, 1])
@pytest.mark.parametrize(("begins", "score"), [(True, 1), (False, -1)])
def test_who_takes_the_last_stone_wins(begins, score, first_player):
    game = PersonGame(lambda: Nim(4, first_player), 1, seed=0, begins=begins)
    assert game.is_persons_turn == begins
    for action in (0, 1, 0):
        assert not game.is_over
        game.play(action)
    assert game.is_over and game.outcome() == (score, "by the rules") and game.num_moves == 3


def test_resigning_ends_the_game():
    game = PersonGame(lambda: Nim(4), 1, seed=0)
    game.resign()
    assert game.is_over and game.outcome().ended == "resigned"


def test_one_player_plays_alone_and_gets_advice():
    """The ends of the chain pay 0.2 and 1."""
    game = PersonGame(lambda: ChainEnvironment(5, start=1), 1, seed=0)
    functions = games.constant_functions(3)
    model = make_search_model(FunctionNetworks(*functions))
    opinion = Adviser(model, SearchConfig(num_simulations=5), 0.99).opinion(game.game)
    assert game.legal_actions() == [0, 1] and opinion.policy[2] == 0
    assert game.is_persons_turn
    game.play(RIGHT)
    game.play(LEFT)
    assert game.is_persons_turn and game.take_back() == 1
    game.play(RIGHT)
    game.play(RIGHT)
    assert game.outcome() == (1.0, "by the rules")


def test_a_game_that_a_limit_cuts_says_so():
    game = PersonGame(lambda: ChainEnvironment(9, start=4, max_episode_steps=1), 1, seed=0)
    game.play(RIGHT)
    assert game.outcome() == (0.0, "cut")
