"""Two players: every sign from the view of the player to move, whoever began."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from distributed_muzero import acting
from distributed_muzero.algorithm.acting import Game, act
from distributed_muzero.algorithm.planning import plan_batch
from distributed_muzero.algorithm.reanalyse import refresh
from distributed_muzero.algorithm.returns import n_step_returns
from distributed_muzero.config import SearchConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.networks.base import FunctionNetworks
from distributed_muzero.networks.inference import make_search_model
from tests.episodes import make_episode
from tests.games import Nim, nim_functions, nim_networks
from tests.reference.gumbel_oracle import Gumbel
from tests.reference.returns import slow_return
from tests.reference.search_oracle import Answer, Settings, root_priors, search_one

both_policies = pytest.mark.parametrize("policy", ["muzero", "gumbel"])
GAMMA = 0.9

# Two moves, then the other's two: what the one who began gets. Move 0 tempts with 3, but the other answers −1.
# Move 1 is worth 1 whatever comes. So the first plays 1 and has 1; had they played 0, the second would have +1.
PAYOFFS = torch.tensor([[3.0, -1.0], [1.0, 2.0]])


def small_game_functions():
    """h … f_p of the game: 0 = nothing played, 1 + m = move m played, 3 = over. Rewards are the mover's."""

    def reward(state, action):
        first_move = (state[:, 0].long() - 1).clamp(0, 1)
        return torch.where((state[:, 0] == 1) | (state[:, 0] == 2), -PAYOFFS[first_move, action], 0.0)

    def follow(state, action):
        return torch.where(state == 0, 1.0 + action[:, None], 3.0)

    return (
        lambda o: o[:, -1],
        reward,
        follow,
        lambda s: torch.zeros(len(s)),
        lambda s: torch.zeros(len(s), 2),
    )


@both_policies
@pytest.mark.parametrize(("state", "best", "qvalues"), [(0, 1, [-1, 1]), (1, 1, [-3, 1]), (2, 0, [-1, -2])])
def test_every_position_of_the_small_game_is_judged_by_the_one_to_move(policy, state, best, qvalues):
    result = plan_batch(
        make_search_model(FunctionNetworks(*small_game_functions())),
        np.full((1, 1, 1), state, np.float32),
        np.ones((1, 2), bool),
        SearchConfig(policy=policy, num_simulations=400),
        -1.0,
        rng=None,
        noise=False,
    ).result
    np.testing.assert_allclose(result.qvalues[0], qvalues, atol=0.5 if state == 0 else 0)
    assert result.action_weights[0].argmax() == best


class SmallGame:
    """The game itself; `first_player` begins."""

    def __init__(self, first_player):
        self.first_player = first_player

    def initial_state(self):
        self.state, self.player = 0, self.first_player
        return np.zeros(1, np.float32)

    def step(self, action):
        reward = 0.0 if self.state == 0 else -float(PAYOFFS[self.state - 1, action])
        self.state = 1 + action if self.state == 0 else 3
        self.player = 1 - self.player
        return reward, np.array([self.state], np.float32), self.state == 3

    def mask(self):
        return np.ones(2)

    def to_play(self):
        return self.player


def played(env, policy, functions, num_simulations=100):
    """The episode that greedy play without noise makes."""
    game = Game(env, 1)
    model = make_search_model(FunctionNetworks(*functions))
    config = SearchConfig(policy=policy, num_simulations=num_simulations)
    while not game.is_over:
        act([game], model, config, 1.0, 0.0, noise=False, rng=np.random.default_rng(0))
    return game.episode("run/0/0/1", "game", 0, 0.0)


@both_policies
@pytest.mark.parametrize("make_game", [SmallGame, lambda first: Nim(7, first), lambda first: Nim(8, first)])
def test_exchanged_players_play_the_same_game_with_their_results_exchanged(policy, make_game):
    functions = small_game_functions() if make_game is SmallGame else nim_functions()
    one, other = (played(make_game(first), policy, functions) for first in (0, 1))
    assert one.actions.tolist() == other.actions.tolist()
    assert one.to_play.tolist() == (1 - other.to_play).tolist()
    np.testing.assert_array_equal(one.root_values, other.root_values)
    np.testing.assert_array_equal(one.policies, other.policies)
    for n in (1, 2, 99):
        ours, theirs = (
            n_step_returns(episode.rewards, episode.root_values, 1.0, n, episode.to_play)
            for episode in (one, other)
        )
        np.testing.assert_array_equal(ours, theirs)  # each from the view of its mover
        of_player_0 = [np.where(e.to_play == 0, z, -z) for e, z in ((one, ours), (other, theirs))]
        np.testing.assert_array_equal(of_player_0[0], -of_player_0[1])
    assert (np.abs(of_player_0[0][:-1]) == 1).all()


@both_policies
@pytest.mark.parametrize("first_player", [0, 1])
def test_the_small_game_is_played_and_valued_right(policy, first_player):
    episode = played(SmallGame(first_player), policy, small_game_functions())
    assert episode.actions.tolist() == [1, 0] and episode.rewards.tolist() == [0, -1]
    returns = n_step_returns(episode.rewards, episode.root_values, 1.0, 9, episode.to_play)
    assert returns.tolist() == [1, -1, 0]


@both_policies
@pytest.mark.parametrize("first_player", [0, 1])
def test_nim_is_won_from_every_won_pile(policy, first_player):
    for pile in (4, 5, 7, 8):
        search = SearchConfig(policy=policy, num_simulations=100)
        steps = acting(
            Nim(pile, first_player),
            *nim_functions(),
            search=search,
            discount=1.0,
            temperature=0,
            noise=False,
            rng=np.random.default_rng(0),
        )
        assert len(steps) % 2 == 1 and steps[-1].reward == 1  # the one who began took the last


def random_game(seed, num_states=9, num_actions=3):
    """Tables of a game without end between two, and its h … f_p."""
    rng = np.random.default_rng(seed)
    edges = (num_states, num_actions)
    tables = (
        rng.integers(num_states, size=edges),
        rng.normal(size=edges),
        rng.normal(size=num_states),
        rng.normal(size=edges),
    )
    follow, reward, value, logits = (torch.from_numpy(table) for table in tables)
    functions = (
        lambda o: o[:, -1].double(),
        lambda s, a: reward[s[:, 0].long(), a],
        lambda s, a: follow[s[:, 0].long(), a][:, None].double(),
        lambda s: value[s[:, 0].long()],
        lambda s: logits[s[:, 0].long()],
    )
    return tables, functions


def stored_game(seed, num_steps, num_states):
    """An episode whose observations are states; first one player begins, then the other."""
    spec = EnvironmentSpec("tables", (1,), np.dtype(np.float32), (3,))
    episode = make_episode(num_steps, seed=seed, spec=spec, two_players=True, terminated=seed % 3 > 0)
    rng = np.random.default_rng(seed)
    states = rng.integers(num_states, size=(num_steps + 1, 1)).astype(np.float32)
    to_play = ((np.arange(num_steps + 1) + seed) % 2).astype(np.int8)
    return replace(episode, observations=states, to_play=to_play)


def slow_answer(tables, state, legal, config):
    """π, ν and the closest decision of the oracle's search from one state, without noise."""
    follow, reward, value, logits = tables

    def model(state, action):
        after = follow[state, action]
        return Answer(after, reward[state, action], -GAMMA, value[after], logits[after].tolist())

    [prior] = root_priors(logits[[state]], legal[None], 0.0, 1.0, np.random.default_rng(0))
    loop = Settings(config.num_simulations)
    if config.policy == "muzero":
        search = search_one(state, value[state], prior, legal, model, loop)
        edges = search.root.edges
        visits = [edges[a].visits if a in edges else 0 for a in range(len(legal))]
        return np.divide(visits, sum(visits)), search.root.value, search.margin
    rules = Gumbel(
        logits[state].tolist(), [0.0] * len(legal), config.num_simulations, 16, 0.1, 50.0, True, True
    )
    search = search_one(state, value[state], prior, legal, model, loop, rules.select)
    return np.array(rules.policy(search)), search.root.value, search.margin


@both_policies
def test_reanalysed_games_and_their_returns_equal_the_slow_oracles(policy):
    tables, functions = random_game(3)
    episodes = [stored_game(seed, num_steps, 9) for seed, num_steps in enumerate([1, 6, 9, 4, 12])]
    config = SearchConfig(policy=policy, num_simulations=20)
    model = make_search_model(FunctionNetworks(*functions))
    answers = refresh(
        episodes,
        model,
        config,
        discount=-GAMMA,
        history_length=1,
        batch_size=8,
        noise=False,
        rng=np.random.default_rng(0),
    )
    compared = 0
    for episode, (policies, root_values) in zip(episodes, answers, strict=True):
        states = episode.observations[:, 0].astype(int)
        expected = np.zeros(len(root_values))
        for t in range(episode.num_steps):
            pi, expected[t], margin = slow_answer(tables, states[t], episode.legal_masks[t], config)
            assert margin > 1e-5, "float32 might decide otherwise: take another seed"
            np.testing.assert_allclose(policies[t], pi, atol=1e-4)
            compared += 1
        expected[-1] = 0.0 if episode.terminated else tables[2][states[-1]]
        np.testing.assert_allclose(root_values, expected, atol=1e-5)
        returns = n_step_returns(episode.rewards, root_values, GAMMA, 3, episode.to_play)
        slow = [
            slow_return(episode.rewards, expected, GAMMA, 3, t, episode.to_play) for t in range(len(expected))
        ]
        np.testing.assert_allclose(returns, slow, atol=1e-4)
    assert compared == 32


@both_policies
def test_acting_and_reanalysis_give_a_game_of_two_the_same_targets(policy):
    episode = played(Nim(11, 1), policy, nim_functions(), num_simulations=30)
    [(policies, root_values)] = refresh(
        [episode],
        make_search_model(nim_networks()),
        SearchConfig(policy=policy, num_simulations=30),
        discount=-1.0,
        history_length=1,
        batch_size=4,
        noise=False,
        rng=np.random.default_rng(5),
    )
    np.testing.assert_array_equal(policies, episode.policies)
    np.testing.assert_array_equal(root_values, episode.root_values)
