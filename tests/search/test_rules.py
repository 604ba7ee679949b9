"""What a search promises, whatever the model says."""

import subprocess
import sys

import numpy as np
import pytest

from distributed_muzero.config import SearchConfig
from distributed_muzero.search import Expansion, gumbel_search, muzero_search
from tests.search.worlds import make_world, search_world

RULES = {
    "parent_and_siblings": SearchConfig(q_normalization="parent_and_siblings"),
    "tree_min_max": SearchConfig(q_normalization="tree_min_max"),
    "min_max": SearchConfig(q_normalization="min_max"),
    "gumbel": SearchConfig(policy="gumbel"),
    "gumbel_of_3": SearchConfig(policy="gumbel", max_num_considered_actions=3, rescale_values=False),
    "muzero_2_inside": SearchConfig(max_interior_actions=2),
    "gumbel_2_inside": SearchConfig(policy="gumbel", max_interior_actions=2),
}
POLICIES = ["muzero", "gumbel"]

every_rule = pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
both_policies = pytest.mark.parametrize("policy", POLICIES)


@every_rule
@pytest.mark.parametrize("num_simulations", [1, 4, 60])
@pytest.mark.parametrize("noise", [False, True])
def test_illegal_root_action_is_never_visited(rules, num_simulations, noise):
    world = make_world(1, batch=16, num_actions=5)
    world.root_logits[~world.legal_mask] = 1e9  # however much the network wants it
    config = rules.model_copy(update={"num_simulations": num_simulations})
    result, tree = search_world(world, config, noise=noise, dtype=np.float32)
    assert (result.visit_counts[~world.legal_mask] == 0).all()
    assert (result.action_weights[~world.legal_mask] == 0).all()
    assert (tree.priors[:, 0][~world.legal_mask] == 0).all()
    np.testing.assert_allclose(result.action_weights.sum(axis=1), 1, rtol=1e-6)


@both_policies
def test_a_forbidden_actions_logit_is_never_read(policy):
    world = make_world(2, batch=8)
    config = SearchConfig(num_simulations=20, policy=policy)
    expected, _ = search_world(world, config)
    world.root_logits[~world.legal_mask] = np.nan
    _assert_equal(search_world(world, config)[0], expected)


@both_policies
def test_interior_nodes_are_unmasked(policy):
    world = make_world(3, batch=4)
    world.legal_mask[:] = [True, False, False]
    _, tree = search_world(world, SearchConfig(num_simulations=60, policy=policy))
    assert (tree.children_visits[:, 0, 1:] == 0).all()
    assert (tree.children_visits[:, 1:, 1:].sum(axis=(1, 2)) > 0).all()


@every_rule
def test_rows_of_a_batch_never_influence_each_other(rules):
    world = make_world(4, batch=6, num_actions=4)
    config = rules.model_copy(update={"num_simulations": 40, "max_depth": 5})
    together, _ = search_world(world, config)
    for row in range(6):
        alone, _ = search_world(world.rows([row]), config)
        for ours, theirs in zip(alone, together, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[row])


@both_policies
def test_another_rows_content_does_not_change_a_rows_noise(policy):
    world, other = make_world(5, batch=3), make_world(6, batch=3)
    config = SearchConfig(num_simulations=30, policy=policy)
    first, _ = search_world(world, config, noise=True)
    for name in ("root_state", "root_value", "root_logits", "legal_mask"):
        getattr(world, name)[1:] = getattr(other, name)[1:]
    second, _ = search_world(world, config, noise=True)
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])


@both_policies
def test_the_same_seed_gives_the_same_search(policy):
    world = make_world(7, batch=8, num_actions=20)
    config = SearchConfig(num_simulations=40, policy=policy)
    same = [search_world(world, config, noise=True, seed=3)[0] for _ in range(2)]
    _assert_equal(*same)
    other, _ = search_world(world, config, noise=True, seed=4)
    assert (other.visit_counts != same[0].visit_counts).any()


@both_policies
def test_evaluation_draws_no_random_number(policy):
    world = make_world(8)
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    config = SearchConfig(num_simulations=5, policy=policy)
    _search(world.root_logits, world.root_value, world.legal_mask, config, rng=rng, noise=False)
    assert rng.bit_generator.state == before


def test_noise_is_a_dirichlet_draw_over_the_legal_actions():
    rows, alpha = 4000, 0.5
    legal = np.tile([True, False, True, True], (rows, 1))
    config = SearchConfig(num_simulations=1, dirichlet_fraction=1.0, dirichlet_alpha=alpha)
    _, tree = _search(np.zeros((rows, 4)), np.zeros(rows), legal, config, noise=True)
    drawn = tree.priors[:, 0]
    assert (drawn[:, 1] == 0).all()
    np.testing.assert_allclose(drawn.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(drawn[:, [0, 2, 3]].mean(axis=0), 1 / 3, atol=0.02)
    variance = (1 / 3) * (2 / 3) / (3 * alpha + 1)
    np.testing.assert_allclose(drawn[:, [0, 2, 3]].var(axis=0), variance, atol=0.01)


def test_a_tiny_alpha_still_gives_a_distribution():
    config = SearchConfig(num_simulations=1, dirichlet_fraction=1.0, dirichlet_alpha=1e-4)
    _, tree = _search(np.zeros((50, 3)), np.zeros(50), np.ones((50, 3), bool), config, noise=True)
    np.testing.assert_allclose(tree.priors[:, 0].sum(axis=1), 1, rtol=1e-5)


def test_of_equal_scores_the_first_action_wins():
    def expand(parents, actions, children):
        assert actions.tolist() == [1]
        return Expansion(np.zeros(1), np.zeros(1), np.zeros((1, 3)))

    legal = np.array([[False, True, True]])
    config = SearchConfig(num_simulations=1)
    _search(np.zeros((1, 3)), np.zeros(1), legal, config, expand=expand)


@both_policies
def test_the_model_is_asked_once_a_simulation_about_the_whole_batch(policy):
    asked = []

    def expand(parents, actions, children):
        asked.append((parents.copy(), actions.copy(), children.copy()))
        return Expansion(np.zeros(5), np.zeros(5), np.zeros((5, 2)))

    config = SearchConfig(num_simulations=12, policy=policy)
    _search(np.zeros((5, 2)), np.zeros(5), np.ones((5, 2), bool), config, expand=expand)
    assert [call[2].tolist() for call in asked] == [[simulation] * 5 for simulation in range(1, 13)]
    assert all(array.dtype == np.int32 and array.shape == (5,) for call in asked for array in call)


@both_policies
def test_no_path_is_longer_than_max_depth(policy):
    config = SearchConfig(num_simulations=50, max_depth=3, policy=policy)
    _, tree = search_world(make_world(9, batch=8), config)
    for row, parents in enumerate(tree.parents):
        depths = {0: 0}
        for node in np.flatnonzero(tree.node_visits[row])[1:]:
            depths[node] = depths[parents[node]] + 1
        assert max(depths.values()) <= 3


@both_policies
def test_a_number_given_for_simulations_replaces_the_configs(policy):
    world, config = make_world(10), SearchConfig(num_simulations=5, policy=policy)
    result, _ = _search(world.root_logits, world.root_value, world.legal_mask, config, num_simulations=7)
    assert (result.visit_counts.sum(axis=1) == 7).all()


@both_policies
def test_float32_answers_as_float64_does_but_for_rounding(policy):
    world, config = make_world(11, batch=16), SearchConfig(num_simulations=20, policy=policy)
    single, _ = search_world(world, config, dtype=np.float32)
    double, _ = search_world(world, config)
    assert single.root_values.dtype == single.action_weights.dtype == single.qvalues.dtype == np.float32
    np.testing.assert_array_equal(single.visit_counts, double.visit_counts)
    np.testing.assert_allclose(single.root_values, double.root_values, atol=1e-5)
    np.testing.assert_allclose(single.action_weights, double.action_weights, atol=1e-5)


@both_policies
def test_a_second_process_starts_from_the_cache_on_disk(policy):
    world = make_world(12)
    search_world(world, SearchConfig(num_simulations=2, policy=policy))
    rule = {"muzero": "MUZERO_RULES['parent_and_siblings']", "gumbel": "GUMBEL_RULE"}[policy]
    code = (
        "from tests.search.worlds import *; from distributed_muzero.search import gumbel, policies, simulate\n"
        f"search_world(make_world(12), SearchConfig(num_simulations=2, policy='{policy}'))\n"
        f"kernels = simulate.make_step(policies.{rule}), gumbel.write_answers\n"
        "print(sum(kernel.stats.cache_misses.total() for kernel in kernels))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"], "a kernel was compiled again"


def _search(logits, values, legal, config=None, *, expand=None, rng=None, noise=False, num_simulations=None):
    def silent(parents, actions, children):
        return Expansion(np.zeros(len(values)), np.zeros(len(values)), np.zeros(np.shape(logits)))

    config = config or SearchConfig(num_simulations=5)
    search = gumbel_search if config.policy == "gumbel" else muzero_search
    result, tree, *_ = search(
        logits,
        values,
        legal,
        expand or silent,
        config,
        discount=1.0,
        rng=rng or np.random.default_rng(0),
        noise=noise,
        num_simulations=num_simulations,
    )
    return result, tree


def _assert_equal(ours, theirs):
    for left, right in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(left, right)
