"""Gumbel MuZero's search: numbers worked out on paper, and what it promises beyond MuZero's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from distributed_muzero.config import SearchConfig
from distributed_muzero.search import Expansion, gumbel_search
from distributed_muzero.search.gumbel import visits_due
from tests.reference import gumbel_oracle
from tests.search.worlds import gumbel_search_world, make_world


def softmax(numbers):
    weights = np.exp(np.asarray(numbers) - np.max(numbers))
    return weights / weights.sum()


def bandit(rewards, *, num_simulations, root_value=0.0, child_value=0.0, discount=1.0, **options):
    """One step deep: each action's reward, then a child that the model calls worth `child_value`."""
    arguments = {"logits": np.zeros(len(rewards)), "legal": np.ones(len(rewards), bool), "gumbel": None}
    arguments |= {name: options.pop(name) for name in list(options) if name in arguments}

    def expand(parents, actions, children):
        return Expansion(
            np.array(rewards, float)[actions], np.full(1, child_value), np.zeros((1, len(rewards)))
        )

    result, _, (action,) = gumbel_search(
        [arguments["logits"]],
        [root_value],
        np.array([arguments["legal"]]),
        expand,
        SearchConfig(policy="gumbel", num_simulations=num_simulations, max_depth=1, **options),
        discount=discount,
        rng=np.random.default_rng(0),
        noise=False,
        root_gumbel=None if arguments["gumbel"] is None else [arguments["gumbel"]],
        dtype=np.float64,
    )
    return result, int(action)


@pytest.mark.parametrize(
    ("num_considered", "due"),
    [
        (1, [0, 1, 2, 3, 4, 5, 6, 7]),
        # ⌈log₂ 2⌉ = 1 phase of 8 / 2 = 4 rounds.
        (2, [0, 0, 1, 1, 2, 2, 3, 3]),
        # 2 phases: 8 / (2·3) gives 1 round of three, 8 / (2·2) = 2 rounds of two; one is left over.
        (3, [0, 0, 0, 1, 1, 2, 2, 3]),
        # 2 phases: 8 / (2·4) = 1 round of four, 2 rounds of two.
        (4, [0, 0, 0, 0, 1, 1, 2, 2]),
        # 3 phases: 1 round of five, 8 / (3·2) = 1 round of two, again 1 round of the same two: cut at 8.
        (5, [0, 0, 0, 0, 0, 1, 1, 2]),
        # More to consider than there are simulations.
        (16, [0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_the_schedule_of_eight_simulations_by_hand(num_considered, due):
    assert visits_due(16, 8)[num_considered - 1].tolist() == due


def test_the_schedule_of_fifty_simulations_and_sixteen_actions_by_hand():
    # 4 phases: 50 / 64 → 1 round of 16, 50 / 32 → 1 of 8, 50 / 16 → 3 of 4, 50 / 8 → 6 of 2, then these two again.
    expected = [0] * 16 + [1] * 8 + [2] * 4 + [3] * 4 + [4] * 4
    expected += [visits for visits in range(5, 12) for _ in range(2)]
    assert visits_due(16, 50)[15].tolist() == expected


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 120))
def test_the_schedules_are_the_oracles(most_considered, num_simulations):
    table = visits_due(most_considered, num_simulations)
    for number, due in enumerate(table, start=1):
        assert due.tolist() == gumbel_oracle.visits_due(number, num_simulations)


def test_a_schedule_is_made_once_and_cannot_be_changed():
    table = visits_due(4, 9)
    assert visits_due(4, 9) is table and not table.flags.writeable


def test_two_simulations_of_a_bandit():
    # Each action once. Q = 1 and 3, brought to 0 and 1; σ = (50 + 1) · 0.1 · q̂.
    result, action = bandit([1, 3], num_simulations=2)
    assert result.visit_counts.tolist() == [[1, 1]] and action == 1
    assert result.root_values.tolist() == [4 / 3]  # the mean of 0, 1 and 3
    np.testing.assert_allclose(result.action_weights, [softmax([0, 5.1])], rtol=1e-12)


def test_halving_spends_the_rest_on_the_better_half():
    # 8 simulations of 4: one each, then the two best twice more.
    result, action = bandit([0, 5, 2, 9], num_simulations=8)
    assert result.visit_counts.tolist() == [[1, 3, 1, 3]] and action == 3


def test_only_the_likeliest_actions_are_considered():
    result, action = bandit(
        [9, 1, 2, 0], num_simulations=6, logits=[0, 2, 3, 1.0], max_num_considered_actions=2
    )
    assert result.visit_counts.tolist() == [[0, 3, 3, 0]] and action == 2


def test_the_noise_decides_who_is_considered_but_is_no_part_of_the_policy():
    options = {"num_simulations": 1, "logits": [3.0, 0, 0], "rescale_values": False}
    quiet, first = bandit([0, 0, 0], gumbel=[0, 0, 0], **options)
    noisy, third = bandit([0, 0, 0], gumbel=[0, 2.9, 3.1], **options)
    assert (first, third) == (0, 2)
    assert quiet.visit_counts.tolist() == [[1, 0, 0]] and noisy.visit_counts.tolist() == [[0, 0, 1]]
    for result in (quiet, noisy):
        np.testing.assert_allclose(result.action_weights, [softmax([3, 0, 0])], rtol=1e-12)


@pytest.mark.parametrize(
    ("use_mixed_value", "unvisited"),
    # Q(0) = 2 after 1 simulation, the network says 1: (1 + 1·2) / (1 + 1), or 1.
    [(True, 1.5), (False, 1.0)],
)
def test_unvisited_actions_are_worth_what_the_node_is(use_mixed_value, unvisited):
    result, action = bandit(
        [2, 9, 9],
        num_simulations=1,
        root_value=1.0,
        rescale_values=False,
        use_mixed_value=use_mixed_value,
        value_scale=0.01,
        maxvisit_init=20,
    )
    assert action == 0
    np.testing.assert_allclose(
        result.action_weights, [softmax(0.21 * np.array([2, unvisited, unvisited]))], rtol=1e-12
    )


def test_visited_actions_count_by_their_prior_in_the_mixed_value():
    # Q = 4 and 8 with priors 3 : 1 (of the visited), so 5; with the network's 0: (0 + 2 · 5) / (1 + 2).
    result, _ = bandit(
        [4, 8, 0],
        num_simulations=2,
        logits=np.log([6, 2, 1]),
        rescale_values=False,
        value_scale=0.01,
        maxvisit_init=20,
    )
    expected = np.log([6, 2, 1]) + 0.21 * np.array([4, 8, 10 / 3])
    np.testing.assert_allclose(result.action_weights, [softmax(expected)], rtol=1e-12)


def test_the_opponents_value_completes_with_the_movers_sign():
    # The opponent stands at +1 behind action 0, so Q(0) = −1; the mover's own 0.4 with it: (0.4 − 1) / 2.
    result, _ = bandit(
        [0, 0],
        num_simulations=1,
        root_value=0.4,
        child_value=1.0,
        discount=-1.0,
        rescale_values=False,
        value_scale=0.01,
        maxvisit_init=20,
    )
    assert result.qvalues.tolist() == [[-1, 0]] and result.root_values[0] == pytest.approx(-0.3)
    np.testing.assert_allclose(result.action_weights, [softmax(0.21 * np.array([-1, -0.3]))], rtol=1e-12)


def test_the_interior_follows_the_improved_policy_by_hand():
    # One legal action at the root. Below it π' = (0.7, 0.3) as values say nothing: visits make up for what is missing.
    # By N: 0: .7 > .3, a.  1: .7 − 1/2 < .3, b.  2: .7 − 1/3 > .3 − 1/3, a.  3: .7 − 2/4 > .3 − 1/4, a.
    def expand(parents, actions, children):
        return Expansion(np.zeros(1), np.zeros(1), np.log([[0.7, 0.3]]))

    result, tree, _ = gumbel_search(
        np.zeros((1, 2)),
        np.zeros(1),
        np.array([[True, False]]),
        expand,
        SearchConfig(policy="gumbel", num_simulations=5, max_depth=2),
        discount=1.0,
        rng=np.random.default_rng(0),
        noise=False,
        dtype=np.float64,
    )
    assert tree.children_visits[0, 1].tolist() == [3, 1]
    assert result.visit_counts.tolist() == [[5, 0]] and result.action_weights.tolist() == [[1, 0]]


@pytest.mark.parametrize("num_simulations", [1, 2, 30])
@pytest.mark.parametrize("noise", [False, True])
def test_one_legal_action_gets_everything(num_simulations, noise):
    world = make_world(20, batch=6, num_actions=4)
    world.legal_mask[:] = np.eye(4, dtype=bool)[[0, 1, 2, 3, 0, 2]]
    config = SearchConfig(policy="gumbel", num_simulations=num_simulations)
    result, _, actions = gumbel_search_world(world, config, noise=noise, dtype=np.float32)
    assert (result.action_weights == world.legal_mask).all()
    assert (result.visit_counts == num_simulations * world.legal_mask).all()
    assert actions.tolist() == [0, 1, 2, 3, 0, 2]


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 10_000),
    num_actions=st.integers(1, 9),
    num_simulations=st.integers(1, 40),
    max_considered=st.integers(1, 12),
    noise=st.booleans(),
)
def test_what_every_search_keeps_to(seed, num_actions, num_simulations, max_considered, noise):
    world = make_world(seed, batch=5, num_actions=num_actions, discount=-0.9)
    config = SearchConfig(
        policy="gumbel", num_simulations=num_simulations, max_num_considered_actions=max_considered
    )
    result, _, actions = gumbel_search_world(world, config, noise=noise, seed=seed, dtype=np.float32)
    visits, rows = result.visit_counts, np.arange(5)
    assert (visits.sum(axis=1) == num_simulations).all()
    assert (visits[~world.legal_mask] == 0).all() and (result.action_weights[~world.legal_mask] == 0).all()
    np.testing.assert_allclose(result.action_weights.sum(axis=1), 1, rtol=1e-5)
    assert (visits[rows, actions] == visits.max(axis=1)).all() and world.legal_mask[rows, actions].all()
    considered = np.minimum(world.legal_mask.sum(axis=1), max_considered)
    assert ((visits > 0).sum(axis=1) == np.minimum(considered, num_simulations)).all()


@pytest.mark.parametrize("rescale_values", [False, True])
@pytest.mark.parametrize("spread", [1e-6, 1e3, 1e6])
def test_priors_that_vanish_and_large_values_still_give_a_policy(rescale_values, spread):
    world = make_world(21, batch=8, num_actions=5)
    world.logits[:] *= 200  # float32 rounds most priors to 0
    world.root_logits[:] *= 200
    world = world._replace(reward=world.reward * spread, value=world.value * spread)
    config = SearchConfig(policy="gumbel", num_simulations=60, rescale_values=rescale_values)
    result, _, actions = gumbel_search_world(world, config, noise=True, dtype=np.float32)
    assert np.isfinite(result.action_weights).all() and (result.action_weights >= 0).all()
    assert (result.visit_counts[~world.legal_mask] == 0).all()
    assert world.legal_mask[np.arange(8), actions].all()
    np.testing.assert_allclose(result.action_weights.sum(axis=1), 1, rtol=1e-5)


def test_a_legal_action_that_the_prior_rules_out_is_taken_last():
    result, action = bandit([0, 1, 2], num_simulations=3, logits=[-np.inf, 0.0, -np.inf])
    assert result.visit_counts.tolist() == [[1, 1, 1]] and action == 1
    assert result.action_weights.tolist() == [[0, 1, 0]]


def test_the_scale_of_the_noise_is_the_configs():
    world = make_world(22, batch=200, num_actions=6)
    world.legal_mask[:] = True
    world.root_logits[:] = [5.0, 4, 3, 2, 1, 0]

    def first_choice(scale):
        config = SearchConfig(policy="gumbel", num_simulations=1, gumbel_scale=scale)
        return gumbel_search_world(world, config, noise=True)[2]

    assert set(first_choice(0.0).tolist()) == set(first_choice(1e-3).tolist()) == {0}
    drawn = first_choice(1.0)
    assert np.mean(drawn == 0) == pytest.approx(softmax([5, 4, 3, 2, 1, 0])[0], abs=0.1)
    assert len(set(first_choice(100.0).tolist())) == 6


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "alphazero"},
        {"max_num_considered_actions": 0},
        {"gumbel_scale": -1.0},
        {"value_scale": 0.0},
        {"maxvisit_init": -1.0},
        {"gumbel_scale": float("nan")},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        SearchConfig(**wrong)
