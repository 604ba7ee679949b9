"""Gumbel MuZero outside the search itself: planning, acting, reanalysis."""

import numpy as np
import pytest
import torch

from distributed_muzero import acting, planning
from distributed_muzero.algorithm.planning import plan_batch
from distributed_muzero.algorithm.reanalyse import refresh
from distributed_muzero.config import SearchConfig
from distributed_muzero.networks.base import FunctionNetworks
from distributed_muzero.networks.inference import make_search_model
from tests.episodes import make_episode
from tests.games import Nim, Script, constant_functions, nim_functions, nim_networks

GUMBEL = SearchConfig(policy="gumbel", num_simulations=12)


def rng(seed=0):
    return np.random.default_rng(seed)


def steps_of(seed=0, num_actions=6, **options):
    """A game of 30 steps that are all alike, of networks that prefer the first action."""
    functions = constant_functions(num_actions, logits=[1.0] + [0.0] * (num_actions - 1))
    env = Script(30, [np.ones(num_actions)] * 30)
    return acting(env, *functions, **{"search": GUMBEL, "rng": rng(seed), **options})


def test_the_policy_is_the_improved_one_and_free_of_noise():
    # All rewards and values are 0: nothing improves on the prior.
    prior = torch.softmax(torch.tensor([1.0, 0, 0, 0, 0, 0]), 0)
    for step in steps_of():
        np.testing.assert_allclose(step.policy, prior, rtol=1e-5)


def test_the_action_is_the_searchs_own_whatever_the_temperature():
    cold, hot = ([step.action for step in steps_of(temperature=t)] for t in (0.0, 9.0))
    assert cold == hot and len(set(cold)) > 2


def test_evaluation_always_plays_alike():
    games = [[step.action for step in steps_of(seed, noise=False, temperature=0.0)] for seed in (1, 2)]
    assert games[0] == games[1] == [0] * 30


def test_the_same_generator_plays_the_same_game_and_another_another():
    games = [[step.action for step in steps_of(seed)] for seed in (3, 3, 4)]
    assert games[0] == games[1] != games[2]


def test_actions_are_drawn_as_the_improved_policy_says():
    # With every action considered once the noise alone decides among equal values: a draw from the prior.
    search = SearchConfig(policy="gumbel", num_simulations=1)
    actions = [step.action for seed in range(20) for step in steps_of(seed, num_actions=2, search=search)]
    assert np.mean(np.array(actions) == 0) == pytest.approx(np.e / (np.e + 1), abs=0.06)


def test_planning_equals_the_same_row_inside_a_batch():
    piles = np.arange(1, 9, dtype=np.float32)[:, None, None]
    legal = np.stack([[True, pile > 1] for pile in piles.ravel()])
    batch = plan_batch(
        make_search_model(nim_networks()), piles, legal, GUMBEL, -1.0, rng=None, noise=False
    ).result
    for row, pile in enumerate(piles):
        value, policy = planning(
            *nim_functions(),
            torch.from_numpy(pile),
            torch.from_numpy(legal[row]),
            search=GUMBEL,
            discount=-1.0,
        )
        assert value == batch.root_values[row]
        assert policy.tolist() == batch.action_weights[row].tolist()


def test_muzero_leaves_the_action_to_the_temperature():
    observations, legal = np.ones((3, 1, 1), np.float32), np.ones((3, 2), bool)
    model = make_search_model(nim_networks())
    for policy, decides in (("muzero", False), ("gumbel", True)):
        config = SearchConfig(policy=policy)
        plan = plan_batch(model, observations, legal, config, -1.0, rng=None, noise=False)
        assert (plan.actions is not None) == decides


def test_a_perfect_model_finds_the_better_action_with_two_simulations():
    # The prior is all but sure of action 0, and action 1 pays: two simulations of PUCT don't even look at it.
    h, _, g_s, f_v, f_p = constant_functions(2, logits=[4.0, 0.0])
    functions = h, lambda s, a: (a == 1).float(), g_s, f_v, f_p
    weights = {}
    for policy in ("muzero", "gumbel"):
        search = SearchConfig(policy=policy, num_simulations=2)
        weights[policy] = planning(*functions, torch.ones(1, 1), torch.ones(2), search=search)[1].tolist()
    assert weights["muzero"] == [1, 0]
    # σ = (50 + 1) · 0.1 on the better one, against 4 of the prior.
    assert weights["gumbel"][1] == pytest.approx(1 / (1 + np.exp(4 - 5.1)), rel=1e-5)


@pytest.mark.parametrize("noise", [False, True])
def test_reanalysis_refreshes_with_the_improved_policy(noise):
    functions = constant_functions(3, logits=[0.0, 1.0, 2.0])
    episodes = [make_episode(n, seed=n, terminated=n % 2 > 0) for n in (1, 5, 8)]
    answers = refresh(
        episodes,
        make_search_model(FunctionNetworks(*functions)),
        GUMBEL,
        discount=0.9,
        history_length=1,
        batch_size=4,
        noise=noise,
        rng=rng(),
    )
    for episode, (policies, _) in zip(episodes, answers, strict=True):
        expected = episode.legal_masks * np.exp([0.0, 1.0, 2.0])
        np.testing.assert_allclose(policies, expected / expected.sum(1, keepdims=True), rtol=1e-5)
        assert (policies[~episode.legal_masks] == 0).all()


def test_nim_is_played_with_noise_by_the_rules():
    steps = acting(Nim(9), *nim_functions(), search=GUMBEL, discount=1.0, rng=rng())
    assert sum(step.action + 1 for step in steps) == 9
    assert steps[-1].reward == 1 and all(float(step.policy.sum()) == pytest.approx(1) for step in steps)


def test_the_benchmarks_other_side_plans_as_ours_does():
    pytest.importorskip("mctx")
    from distributed_muzero.benchmarks.mctx_search import make_mctx_search
    from distributed_muzero.benchmarks.yardstick import make_e64, make_observations

    networks, observations = make_e64(), make_observations(8)
    config = SearchConfig(policy="gumbel", num_simulations=20, gumbel_scale=0.0)
    theirs = make_mctx_search(networks, config, 0.997)(observations, 0)
    model, legal = make_search_model(networks), np.ones((8, networks.num_actions), bool)
    ours = plan_batch(model, observations, legal, config, 0.997, rng=None, noise=False).result
    np.testing.assert_allclose(np.asarray(theirs), ours.action_weights, atol=1e-3)
