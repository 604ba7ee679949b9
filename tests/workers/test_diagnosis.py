"""What `diagnose` computes, on models whose mistakes are known exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from distributed_muzero.config import SearchConfig, make_config
from distributed_muzero.environments.chain import JUMP, LEFT, MOVES, RIGHT, ChainEnvironment, solve
from distributed_muzero.environments.chain import make_chain as make_chain_of
from distributed_muzero.errors import NonFiniteError, RunError
from distributed_muzero.networks.base import FunctionNetworks, Networks
from distributed_muzero.networks.inference import make_search_model
from distributed_muzero.search import Expansion, gumbel_search, muzero_search
from distributed_muzero.search.tree import make_tree
from distributed_muzero.types import Episode
from distributed_muzero.workers.builder import Builder
from distributed_muzero.workers.diagnosis import calibration, diagnose, play
from distributed_muzero.workers.diagnosis_of_search import (
    Roots,
    against_prior,
    depths,
    divergence,
    entropy,
    log_prior,
    search_roots,
    summarize_depths,
)
from tests.episodes import make_episode
from tests.games import Nim, stirring_functions

# Powers of two throughout, so that float32 holds every value and every mean of equal values exactly.
CHAIN = ChainEnvironment(length=7, left_reward=0.25, right_reward=1.0)
DISCOUNT = 0.5
SOLUTION = solve(CHAIN, DISCOUNT)
BEST = SOLUTION.optimal_actions
DEPTH = 3
CONFIG = make_config(
    {
        "environment": {"id": "chain"},
        "algorithm": {"discount": DISCOUNT, "num_unroll_steps": DEPTH},
        "search": {"num_simulations": 9},
    }
)


class ChainModel(Networks):
    """The chain itself. Its embedding is the state's one-hot, and how many model steps ago it saw a real one.

    What is added to its exact answers: `value_bias`, `reward_bias`, and `drift` to the value with every model step.
    """

    def __init__(self, value_bias=0.0, reward_bias=0.0, drift=0.0, logits=None):
        super().__init__()
        self.value_bias, self.reward_bias, self.drift = value_bias, reward_bias, drift
        self.values = torch.tensor(SOLUTION.values, dtype=torch.float32)
        exact = np.where(BEST, 0, -1000)
        self.logits = torch.tensor(exact if logits is None else logits, dtype=torch.float32)
        edges = [[self._edge(s, a) for a in range(len(MOVES))] for s in range(CHAIN.length)]
        self.rewards, self.next_states = torch.tensor(edges).unbind(-1)

    @staticmethod
    def _edge(state, action):
        return (0.0, state) if CHAIN.is_end(state) else CHAIN.transition(state, action)

    @staticmethod
    def _states(embeddings):
        return embeddings[:, :-1].argmax(1)

    def representation(self, observations):
        return functional.pad(observations[:, -1], (0, 1))

    def transition(self, embeddings, actions):
        following = self.next_states[self._states(embeddings), actions].long()
        states = functional.one_hot(following, CHAIN.length).to(embeddings.dtype)
        return torch.cat([states, embeddings[:, -1:] + 1], 1)

    def reward_output(self, embeddings, actions, next_embeddings):
        return self.rewards[self._states(embeddings), actions] + self.reward_bias

    def value_output(self, embeddings):
        return self.values[self._states(embeddings)] + self.value_bias + self.drift * embeddings[:, -1]

    def policy(self, embeddings):
        return self.logits[self._states(embeddings)]


def walk(actions, start=CHAIN.start, name="walk"):
    """An episode on the chain; one that doesn't reach an end was cut."""
    states, rewards = [start], []
    for action in actions:
        assert CHAIN.legal_actions(states[-1])[action] and not CHAIN.is_end(states[-1])
        reward, after = CHAIN.transition(states[-1], action)
        states.append(after)
        rewards.append(reward)
    terminated = CHAIN.is_end(states[-1])
    masks = np.stack([CHAIN.legal_actions(state) for state in states[:-1]])
    return Episode(
        episode_id=name,
        environment_id="chain",
        seed=0,
        weights_version=0,
        observations=np.eye(CHAIN.length, dtype=np.float32)[states],
        legal_masks=masks,
        actions=np.array(actions, np.int32),
        rewards=np.array(rewards, np.float32),
        # Nonsense on purpose: what an episode carries of older searches isn't read.
        policies=np.full(masks.shape, 7, np.float32),
        root_values=np.full(len(states), 7, np.float32),
        to_play=np.zeros(len(states), np.int8),
        terminated=terminated,
        truncated=not terminated,
    )


def best_walks():
    """From every state along the best actions: games of 1, 2 and 3 steps, to both ends."""
    walks = []
    for start in range(1, CHAIN.length - 1):
        state, actions = start, []
        while not CHAIN.is_end(state):
            actions.append(int(BEST[state].argmax()))
            _, state = CHAIN.transition(state, actions[-1])
        walks.append(walk(actions, start))
    return walks


def column(result, name):
    return [row[name] for row in result["depths"]]


# The model by unroll depth ---------------------------------------------------------------------------------------


def test_the_environment_itself_as_the_model_has_no_error_at_any_depth():
    result = diagnose(ChainModel(), best_walks(), CONFIG, 1)
    assert sorted(episode.num_steps for episode in best_walks()) == [1, 1, 2, 2, 3]
    assert (result["games"], result["distinct_games"], result["positions"]) == (5, 5, 9)
    # Of lengths 1, 1, 2, 2, 3: positions with k steps behind them, and those with a decision after these.
    assert column(result, "values") == [9, 9, 4, 1]
    assert column(result, "policies") == [9, 4, 1, 0]
    assert column(result, "rewards") == [0, 9, 4, 1]
    for name in ("value_rmse", "value_bias", "search_value_rmse", "search_value_bias"):
        assert column(result, name) == [0, 0, 0, 0]
    assert column(result, "reward_rmse") == column(result, "reward_bias") == [None, 0, 0, 0]
    assert column(result, "policy_kl") == column(result, "illegal_mass") == [0, 0, 0, None]
    exact = {"kl": 0, "agreement": 1, "prior_entropy": 0, "search_entropy": 0}
    assert result["root"] == pytest.approx(exact, abs=1e-30)
    assert result["calibration"]["network"]["error"] == result["calibration"]["search"]["error"] == 0


def test_a_constant_bias_of_values_and_rewards_shows_as_that_bias():
    result = diagnose(ChainModel(value_bias=0.5, reward_bias=-0.25), best_walks(), CONFIG, 1)
    assert column(result, "value_bias") == column(result, "value_rmse") == [0.5] * 4
    assert column(result, "reward_bias") == [None, -0.25, -0.25, -0.25]
    assert column(result, "reward_rmse") == [None, 0.25, 0.25, 0.25]
    assert result["calibration"]["network"]["error"] == 0.5
    assert all(one["predicted"] - one["returned"] == 0.5 for one in result["calibration"]["network"]["bins"])


def test_a_model_that_drifts_shows_it_at_the_depth_where_it_happens():
    result = diagnose(ChainModel(drift=0.125), best_walks(), CONFIG, 1)
    assert column(result, "value_bias") == column(result, "value_rmse") == [0, 0.125, 0.25, 0.375]
    assert column(result, "reward_rmse") == [None, 0, 0, 0]


def test_positive_and_negative_errors_cancel_in_the_bias_only():
    # Both games begin in state 2; one goes the best way (0.5 and 1 are returned), the other to the left.
    right, left = walk([RIGHT, JUMP, RIGHT]), walk([LEFT, LEFT])
    assert CHAIN.start == 2 and SOLUTION.values[[2, 1]].tolist() == [0.25, 0.25]
    result = diagnose(ChainModel(), [right, left], CONFIG, 1, num_unroll_steps=0)
    # Of the left one, 0.125 and 0.25 are returned where the best from there is worth 0.25 and 0.25.
    assert column(result, "value_bias") == [0.125 / 5]
    assert column(result, "value_rmse") == pytest.approx([0.125 / 5**0.5], abs=1e-12)


def test_a_game_that_was_cut_is_worth_what_the_network_says_of_its_final_observation():
    cut = walk([RIGHT, RIGHT, LEFT])  # to state 3, which is worth 0.5
    assert cut.truncated
    result = diagnose(ChainModel(), [cut], CONFIG, 1)
    # Returns by hand: 0.5³/2, 0.5²/2, 0.5/2; the model says 0.25, 0.5, 0.5 in the states 2, 3, 4.
    by_hand = np.array([0.25 - 0.0625, 0.5 - 0.125, 0.5 - 0.25])
    assert SOLUTION.values[[2, 3, 4]].tolist() == [0.25, 0.5, 0.5]
    for k in range(3):
        assert result["depths"][k]["value_bias"] == pytest.approx(by_hand[k:].mean(), abs=1e-12)
    # The final observation has no target but the network's own guess; the reward on the way to it counts.
    assert column(result, "values") == [3, 2, 1, 0]
    assert column(result, "rewards") == [0, 3, 2, 1]
    assert result["depths"][3]["value_rmse"] is None
    assert result["truncated_games"] == 1


def test_prior_mass_on_forbidden_actions_is_measured_and_is_no_part_of_the_divergence():
    logits = np.where(BEST, 0.0, -1000)
    states_without_jump = [state for state in range(1, 6) if state % 3]
    logits[states_without_jump, JUMP] = 0  # as much as the best action has
    result = diagnose(ChainModel(logits=logits), best_walks(), CONFIG, 1)
    visited = [episode.observations[:-1].argmax(1) for episode in best_walks()]
    for k in range(3):
        states = np.concatenate([states[k:] for states in visited])
        assert result["depths"][k]["illegal_mass"] == pytest.approx((states % 3 != 0).mean() / 2)
        assert result["depths"][k]["policy_kl"] == pytest.approx(0, abs=1e-12)


def test_depths_that_no_game_reaches_are_left_out():
    result = diagnose(ChainModel(), [walk([LEFT, LEFT])], CONFIG, 1, num_unroll_steps=50)
    assert column(result, "k") == [0, 1, 2]


class Later(ChainModel):
    """Whose answers of one kind are NaN from the second model step on."""

    def __init__(self, broken):
        super().__init__()
        self.broken = broken

    def _spoil(self, name, answers, embeddings):
        is_late = (embeddings[:, -1] >= 2) & (name == self.broken)
        return answers + torch.where(is_late, torch.nan, 0.0).view(-1, *[1] * (answers.ndim - 1))

    def reward_output(self, embeddings, actions, next_embeddings):
        return self._spoil(
            "reward", super().reward_output(embeddings, actions, next_embeddings), next_embeddings
        )

    def value_output(self, embeddings):
        return self._spoil("value", super().value_output(embeddings), embeddings)

    def policy(self, embeddings):
        return self._spoil("policy", super().policy(embeddings), embeddings)


@pytest.mark.parametrize("broken", ["value", "reward", "policy"])
def test_numbers_that_are_not_finite_are_an_error_that_says_where(broken):
    # One simulation looks one step ahead, and meets nothing broken. Game 0 is over after one step.
    with pytest.raises(NonFiniteError, match="NaN or Inf 2 steps after step 0 of game 1"):
        diagnose(Later(broken), best_walks(), CONFIG, 1, num_simulations=1)
    with pytest.raises(NonFiniteError, match=r"simulation 1 .*row 0 is step 0 of game 0"):
        diagnose(Later(broken), best_walks(), CONFIG, 1, num_simulations=2)


def test_no_games_are_an_error():
    with pytest.raises(RunError, match="there is no game"):
        diagnose(ChainModel(), [], CONFIG, 1)


# Against a slow oracle -------------------------------------------------------------------------------------------


def oracle(episodes, functions, history_length, discount, two_players, search, depth):
    """The rows by depth, one position at a time."""
    h, g_r, g_s, f_v, f_p = functions
    model = make_search_model(FunctionNetworks(*functions))
    errors = {name: [[] for _ in range(depth + 1)] for name in ("value", "search", "reward", "kl", "illegal")}
    for episode in episodes:
        num_steps = episode.num_steps

        def history(t, episode=episode):
            stack = [
                episode.observations[i] if i >= 0 else np.zeros_like(episode.observations[0])
                for i in range(t - history_length + 1, t + 1)
            ]
            return torch.tensor(np.stack(stack))[None]

        roots = [
            search_roots(
                model,
                history(t).numpy(),
                episode.legal_masks[t : t + 1],
                search,
                -discount if two_players else discount,
                search.num_simulations,
            )
            for t in range(num_steps)
        ]
        final = float(f_v(h(history(num_steps)))[0]) if episode.truncated else 0.0
        returns = [final]
        for t in reversed(range(num_steps)):
            sign = 1 if episode.to_play[t] == episode.to_play[t + 1] else -1
            returns.insert(0, float(episode.rewards[t]) + sign * discount * returns[0])
        for t in range(num_steps):
            embedding = h(history(t))
            for k in range(min(depth, num_steps - t) + 1):
                if k:
                    action = torch.tensor([int(episode.actions[t + k - 1])])
                    reward = float(g_r(embedding, action)[0])
                    errors["reward"][k].append(reward - float(episode.rewards[t + k - 1]))
                    embedding = g_s(embedding, action)
                value, at = float(f_v(embedding)[0]), t + k
                if at < num_steps or episode.terminated:
                    searched = float(roots[at].search_values[0]) if at < num_steps else 0.0
                    errors["value"][k].append(value - returns[at])
                    errors["search"][k].append(value - searched)
                if at < num_steps:
                    prior = torch.softmax(f_p(embedding)[0].double(), 0).numpy()
                    legal = episode.legal_masks[at]
                    errors["illegal"][k].append(prior[~legal].sum())
                    prior = prior * legal / prior[legal].sum()
                    pairs = zip(roots[at].policies[0], prior, strict=True)
                    errors["kl"][k].append(sum(p * np.log(p / q) for p, q in pairs if p > 0))
    return errors


@pytest.mark.parametrize("policy", ["muzero", "gumbel"])
@pytest.mark.parametrize("two_players", [False, True])
def test_every_number_by_depth_equals_the_slow_oracles(two_players, policy):
    episodes = [
        make_episode(length, seed=i, name=str(i), terminated=i % 2 == 0, two_players=two_players)
        for i, length in enumerate([1, 7, 4, 12, 3])
    ]
    if two_players:  # the other one begins
        episodes[3] = replace(episodes[3], to_play=1 - episodes[3].to_play)
    config = make_config(
        {
            "environment": {"history_length": 3},
            "algorithm": {"discount": 0.9, "num_unroll_steps": 4},
            "search": {"num_simulations": 6, "policy": policy},
        }
    )
    functions = stirring_functions(3)
    result = diagnose(FunctionNetworks(*functions), episodes, config, 2 if two_players else 1)
    expected = oracle(episodes, functions, 3, 0.9, two_players, config.search, 4)
    assert len(result["depths"]) == 5
    for k, row in enumerate(result["depths"]):
        of = {name: np.array(found[k]) for name, found in expected.items()}
        assert (row["values"], row["rewards"], row["policies"]) == (
            len(of["value"]),
            len(of["reward"]),
            len(of["kl"]),
        )
        close = {
            "value_bias": of["value"].mean(),
            "value_rmse": (of["value"] ** 2).mean() ** 0.5,
            "search_value_bias": of["search"].mean(),
            "search_value_rmse": (of["search"] ** 2).mean() ** 0.5,
            "policy_kl": of["kl"].mean(),
            "illegal_mass": of["illegal"].mean(),
        }
        if k:
            close |= {"reward_bias": of["reward"].mean(), "reward_rmse": (of["reward"] ** 2).mean() ** 0.5}
        for name, number in close.items():
            assert row[name] == pytest.approx(number, abs=2e-6), (k, name)
    assert result["depths"][0]["policy_kl"] == pytest.approx(result["root"]["kl"], abs=1e-6)


# Two players -----------------------------------------------------------------------------------------------------

NIM_CONFIG = make_config(
    {"algorithm": {"discount": 1.0, "num_unroll_steps": 4}, "search": {"num_simulations": 30}}
)


def nim_model(sign_of=lambda steps: 1.0):
    """The rules of Nim, and exact values and moves; the embedding holds the pile and the number of model steps.

    sign_of: steps [B] -> what the value of the player to move is multiplied with.
    """

    def values(s):
        pile = s[:, 0]
        exact = torch.where(pile == 0, 0.0, torch.where(pile % 3 == 0, -1.0, 1.0))
        return exact * sign_of(s[:, 1])

    def logits(s):
        # Of a lost pile both moves are as good; else the rest of the pile by 3 goes.
        pile = s[:, 0]
        return torch.stack([(pile % 3 != 2) * 1.0, (pile % 3 != 1) * 1.0], 1).log().clamp(min=-1000)

    return FunctionNetworks(
        lambda o: functional.pad(o[:, -1].float(), (0, 1)),
        lambda s, a: ((s[:, 0] > 0) & (s[:, 0] <= a + 1)).float(),
        lambda s, a: torch.stack([(s[:, 0] - a - 1).clamp(min=0), s[:, 1] + 1], 1),
        values,
        logits,
    )


def nim_games(first_player, piles=(4, 5, 7, 8, 1, 2, 3, 6)):
    """Both play as well as they can. The piles 3 and 6 are lost from the start. Games of 1 to 5 steps."""
    games = []
    for pile in piles:
        env, observations, masks, actions, rewards, players = Nim(pile, first_player), [], [], [], [], []
        observations.append(env.initial_state())
        players.append(env.to_play())
        is_over = False
        while not is_over:
            masks.append(env.mask())
            actions.append(max(env.pile % 3 - 1, 0))
            reward, observation, is_over = env.step(actions[-1])
            rewards.append(reward)
            observations.append(observation)
            players.append(env.to_play())
        games.append(
            Episode(
                str(pile), "nim", 0, 0, np.stack(observations), np.stack(masks), np.int32(actions),
                np.float32(rewards), np.zeros((len(actions), 2), np.float32),
                np.zeros(len(actions) + 1, np.float32), np.int8(players), True, False,
            )
        )  # fmt: skip
    return games


@pytest.mark.parametrize("first_player", [0, 1])
def test_an_exact_model_of_a_game_for_two_has_no_error_whoever_begins(first_player):
    games = nim_games(first_player)
    assert len({game.num_steps for game in games}) > 2
    assert {int(game.to_play[-2]) for game in games} == {0, 1}, "both sides make a last move"
    result = diagnose(nim_model(), games, NIM_CONFIG, 2)
    assert len(result["depths"]) == 5
    assert column(result, "value_rmse") == [0] * 5
    assert column(result, "reward_rmse") == [None, 0, 0, 0, 0]
    assert result["calibration"]["network"]["error"] == 0
    assert [one["returned"] for one in result["calibration"]["network"]["bins"]] == [-1, 1]


def test_who_begins_changes_no_number():
    model = nim_model(lambda steps: 0.5 + steps / 8)
    assert diagnose(model, nim_games(0), NIM_CONFIG, 2) == diagnose(model, nim_games(1), NIM_CONFIG, 2)


def test_a_model_whose_values_have_the_wrong_sign_is_wrong_by_their_whole_range():
    result = diagnose(nim_model(lambda steps: -1.0), nim_games(0), NIM_CONFIG, 2)
    assert result["depths"][0]["value_rmse"] == 2
    assert all(row["value_rmse"] > 1 for row in result["depths"])
    assert result["calibration"]["network"]["error"] == 2


def test_a_model_that_forgets_to_change_sides_is_wrong_after_every_odd_step():
    def as_the_one_who_looked(steps):
        return 1 - 2 * (steps % 2)

    result = diagnose(nim_model(as_the_one_who_looked), nim_games(0), NIM_CONFIG, 2)
    found = column(result, "value_rmse")
    assert found[0] == found[2] == found[4] == 0
    assert min(found[1], found[3]) > 1


def test_rewards_belong_to_who_moved():
    """A game whose last mover loses: the same positions are worth the opposite, whoever began."""
    for first_player in (0, 1):
        lost = [replace(game, rewards=-game.rewards) for game in nim_games(first_player)]
        result = diagnose(nim_model(), lost, NIM_CONFIG, 2)
        assert result["depths"][0]["value_rmse"] == 2
        assert result["depths"][1]["reward_bias"] == 2 * len(lost) / result["positions"]


# Prior and search ------------------------------------------------------------------------------------------------


def test_divergence_entropy_and_lost_mass_by_hand():
    logits, legal = np.log([[0.5, 0.25, 0.25]]), np.array([[True, True, False]])
    policies = np.array([[0.75, 0.25, 0.0]])
    log_priors, illegal_mass = log_prior(logits, legal)
    np.testing.assert_allclose(np.exp(log_priors), [[2 / 3, 1 / 3, 0]])
    np.testing.assert_allclose(illegal_mass, [0.25])
    by_hand = 0.75 * np.log(0.75 / (2 / 3)) + 0.25 * np.log(0.25 / (1 / 3))
    np.testing.assert_allclose(divergence(policies, log_priors), [by_hand])
    np.testing.assert_allclose(entropy(policies), [-0.75 * np.log(0.75) - 0.25 * np.log(0.25)])
    # Over all actions, as the loss has it, the divergence is larger by −log(1 − the mass that is lost).
    over_all = (policies[0, :2] * np.log(policies[0, :2] / [0.5, 0.25])).sum()
    assert by_hand - np.log(1 - 0.25) == pytest.approx(over_all)


def test_a_prior_that_rules_out_what_the_search_does_is_far_but_not_infinitely_so():
    log_priors, illegal_mass = log_prior(np.array([[0.0, -np.inf]]), np.array([[True, True]]))
    assert divergence(np.array([[0.0, 1.0]]), log_priors) == pytest.approx(100)
    assert illegal_mass == 0


def test_large_logits_do_not_overflow():
    log_priors, illegal_mass = log_prior(
        np.array([[3e4, 3e4, -3e4]], np.float32), np.array([[True, False, True]])
    )
    assert illegal_mass == pytest.approx(0.5)
    np.testing.assert_allclose(log_priors, [[0, -np.inf, -100]])


def test_prior_and_search_are_compared_by_their_best_legal_action():
    roots = Roots(
        network_values=np.zeros(2),
        search_values=np.zeros(2),
        logits=np.log([[0.2, 0.1, 0.7], [0.6, 0.3, 0.1]]),
        policies=np.array([[1.0, 0, 0], [0.25, 0.75, 0]]),
        depths=depths(make_tree(2, 3, 1, np.float32)),
    )
    found = against_prior(roots, np.array([[True, True, False], [True, True, True]]))
    # The forbidden action is the prior's favourite in the first row; of the legal ones it is the search's too.
    assert found["agreement"] == 0.5
    kl = [np.log(1.5), 0.25 * np.log(0.25 / 0.6) + 0.75 * np.log(0.75 / 0.3)]
    assert found["kl"] == pytest.approx(np.mean(kl))
    assert found["search_entropy"] == pytest.approx((0.25 * np.log(4) + 0.75 * np.log(4 / 3)) / 2)


# Depth of trees --------------------------------------------------------------------------------------------------


def test_depths_of_two_trees_by_hand():
    tree = make_tree(2, 2, 4, np.float32)
    tree.nodes["parent"][:, 1:] = [[0, 1, 2, 0], [0, 0, 1, 1]]
    found = depths(tree)
    assert found.mean.tolist() == [(1 + 2 + 3 + 1) / 4, (1 + 1 + 2 + 2) / 4]
    assert found.highest.tolist() == [3, 2]
    assert found.cut_share.tolist() == [0, 0]


def line(num_simulations, max_depth):
    """A search with one action: every simulation goes one deeper, until it is cut."""

    def expand(parents, actions, children):
        return Expansion(np.zeros(1), np.zeros(1), np.zeros((1, 1)))

    return muzero_search(
        np.zeros((1, 1)),
        np.zeros(1),
        np.ones((1, 1), bool),
        expand,
        SearchConfig(num_simulations=num_simulations, max_depth=max_depth),
        discount=1.0,
        rng=np.random.default_rng(0),
        noise=False,
    )[1]


def test_simulations_that_max_depth_cuts_are_counted():
    free, cut = depths(line(5, None)), depths(line(5, 2))
    assert (free.mean, free.highest, free.cut_share) == ([3], [5], [0])
    assert (cut.mean, cut.highest) == ([(1 + 2 + 2 + 2 + 2) / 5], [2])
    assert cut.cut_share == [3 / 5]


@pytest.mark.parametrize("search", [muzero_search, gumbel_search])
@pytest.mark.parametrize("max_depth", [None, 1, 3])
def test_depths_equal_what_the_model_was_asked(search, max_depth):
    rng, batch, num_actions, num_simulations = np.random.default_rng(3), 5, 3, 40
    of_nodes = np.zeros((batch, num_simulations + 1), int)
    ends, rows = [], np.arange(batch)
    known: set[tuple[int, int]] = set()
    num_cut = np.zeros(batch)

    def expand(parents, actions, children):
        of_nodes[rows, children] = of_nodes[rows, parents] + 1
        ends.append(of_nodes[rows, children].copy())
        for row, child in enumerate(children.tolist()):
            num_cut[row] += (row, child) in known
            known.add((row, child))
        return Expansion(
            rng.normal(size=batch), rng.normal(size=batch), rng.normal(size=(batch, num_actions))
        )

    _, tree, *_ = search(
        rng.normal(size=(batch, num_actions)),
        rng.normal(size=batch),
        np.ones((batch, num_actions), bool),
        expand,
        SearchConfig(num_simulations=num_simulations, max_depth=max_depth),
        discount=0.9,
        rng=rng,
        noise=False,
    )
    found = depths(tree)
    np.testing.assert_allclose(found.mean, np.mean(ends, 0))
    np.testing.assert_array_equal(found.highest, np.max(ends, 0))
    np.testing.assert_allclose(found.cut_share, num_cut / num_simulations)
    assert (found.cut_share > 0).all() == (max_depth is not None)


def test_depths_are_summed_up_over_the_roots():
    tree = make_tree(3, 2, 4, np.float32)
    tree.nodes["parent"][:, 1:] = [[0, 1, 2, 0], [0, 0, 1, 1], [0, 0, 1, -1]]
    assert summarize_depths(depths(tree)) == {
        "mean_depth": (7 / 4 + 6 / 4 + 6 / 4) / 3,
        "most_mean_depth": 7 / 4,
        "mean_highest": 7 / 3,
        "highest": 3,
        "cut_share": pytest.approx(1 / 12),
        "roots_by_highest": [[2, 2], [3, 1]],
    }


# Calibration -----------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    predicted, returned = np.array([0.0, 0.2, 1.0, 0.9, 0.5]), np.array([1.0, 0, 1, 1, 0])
    found = calibration(predicted, returned, num_bins=2)
    assert [one["count"] for one in found["bins"]] == [2, 3]
    assert [one["predicted"] for one in found["bins"]] == pytest.approx([0.1, 0.8])
    assert [one["returned"] for one in found["bins"]] == pytest.approx([0.5, 2 / 3])
    assert [(one["low"], one["high"]) for one in found["bins"]] == [(0, 0.5), (0.5, 1)]
    assert found["error"] == pytest.approx((2 * 0.4 + 3 * (0.8 - 2 / 3)) / 5)


def test_equal_predictions_are_one_bin():
    found = calibration(np.full(4, 0.3), np.array([0.0, 1, 0, 1]))
    assert [one["count"] for one in found["bins"]] == [4]
    assert found["error"] == pytest.approx(0.2)


# Games -----------------------------------------------------------------------------------------------------------


def test_games_are_the_evaluators():
    config = make_config({"environment": {"id": "CartPole-v1"}, "search": {"num_simulations": 3}})
    builder = Builder(config, "run")
    networks = builder.networks().eval()
    games = play(builder.environment, networks, config, 3, (5,))
    evaluator = builder.evaluator()
    try:
        evaluator.set_weights(0, evaluator.model.flat.read().numpy())
        result = evaluator.evaluate(3, (5,))
    finally:
        evaluator.close()
    assert [game.episode_return for game in games] == result["returns"]
    assert len({game.seed for game in games}) == 3


def test_a_played_game_ends_as_the_environment_ended_it():
    config = CONFIG.environment
    for limit, truncated in ((50, False), (2, True)):
        section = config.model_copy(update={"kwargs": {"length": 7}, "max_episode_steps": limit})
        [game] = play(lambda section=section: make_chain_of(section), ChainModel(), CONFIG, 1, (1,))
        assert (game.truncated, game.terminated) == (truncated, not truncated)
        assert game.num_steps == (2 if truncated else 3)
