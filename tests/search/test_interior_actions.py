"""`search.max_interior_actions`: only the likeliest actions are considered below the root. The oracle knows it too."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba import njit

from distributed_muzero.config import SearchConfig
from distributed_muzero.errors import NonFiniteError
from distributed_muzero.search import Expansion, muzero_search
from distributed_muzero.search.tree import NONE, make_narrow_tree, write_priors
from tests.reference.search_oracle import considered
from tests.search.worlds import make_world, search_world

INF = np.inf
both_policies = pytest.mark.parametrize("policy", ["muzero", "gumbel"])


@both_policies
def test_a_limit_of_all_actions_is_none(policy):
    world = make_world(1, batch=4, num_actions=5)
    free = SearchConfig(policy=policy, num_simulations=40)
    expected, tree = search_world(world, free, noise=True)
    for limit in (5, 6, 1000):
        config = free.model_copy(update={"max_interior_actions": limit})
        result, limited = search_world(world, config, noise=True)
        assert limited.nodes.tobytes() == tree.nodes.tobytes()
        assert limited.edges.tobytes() == tree.edges.tobytes()
        for ours, theirs in zip(result, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@both_policies
def test_an_action_beyond_the_limit_is_visited_at_the_root_only(policy):
    world = make_world(2, batch=6, num_actions=20)
    world.legal_mask[:] = True
    world.root_logits[:] = 0
    world.logits[:, [3, 11, 17]] += 100
    config = SearchConfig(policy=policy, num_simulations=80, max_interior_actions=3, pb_c_init=8.0)
    result, tree = search_world(world, config)
    inside = np.flatnonzero(tree.children_visits[:, 1:].sum(axis=(0, 1)))
    assert inside.tolist() == [3, 11, 17]
    assert (np.count_nonzero(result.visit_counts, axis=1) > 3).all()
    assert set(tree.action_from_parent[tree.parents > 0]) == {3, 11, 17}


@both_policies
def test_one_action_inside_makes_a_line(policy):
    """Each child of the root is followed by the likeliest actions alone."""
    world = make_world(3, batch=4, num_actions=6)
    config = SearchConfig(policy=policy, num_simulations=30, max_interior_actions=1)
    _, tree = search_world(world, config)
    assert ((tree.children_index[:, 1:] != NONE).sum(axis=2) <= 1).all()
    assert (tree.priors[:, 1:].max(axis=2)[tree.node_visits[:, 1:] > 0] == 1).all()


def test_edges_take_as_many_slots_as_are_considered():
    legal = np.zeros((2, 448), bool)
    legal[0, [5, 300]] = legal[1, [0, 7, 447]] = True
    tree = make_narrow_tree(legal, 16, 50, np.float32)
    assert tree.edges.shape == (2, 51, 16)
    assert tree.root_edges.shape == (2, 1, 4)  # one stands for the forbidden actions
    numbers = np.arange(2 * 448).reshape(2, 448)
    assert tree.by_slot(numbers, -7).tolist() == [[5, 300, -7, -7], [448, 455, 895, -7]]
    assert (tree.by_action(tree.by_slot(numbers, -7)) == numbers * legal).all()
    assert tree.root_actions(np.array([1, 2])).tolist() == [300, 447]


@njit
def written(edges, narrow, logits):
    return write_priors(edges, narrow, 0, 1, logits)


def write(logits, limit, dtype=np.float64):
    """(whether all is well, the priors by action) of a node with these logits."""
    tree = make_narrow_tree(np.ones((1, len(logits)), bool), limit, 1, dtype)
    is_known = written(tree.edges, tree.narrow, np.array([logits], dtype))
    return is_known, tree.priors[0, 1], tree.narrow[2][0, 1].tolist()


numbers = st.one_of(st.sampled_from([-INF, -1e9, 0.0, 2.0, 1e20]), st.floats(-50, 50))


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float64, 1e-12)])
@settings(max_examples=300, deadline=None, derandomize=True)
@given(logits=st.lists(numbers, min_size=2, max_size=60), limit=st.integers(1, 59))
@example(logits=[0.0] * 10, limit=4)
@example(logits=[1e30, 1e29, 3e29, -1e30, 2.0], limit=2)
@example(logits=[-INF, -INF, 1.0, -INF], limit=3)
@example(logits=list(map(float, range(50))), limit=7)
@example(logits=list(map(float, range(50, 0, -1))), limit=7)
def test_the_highest_priors_are_the_oracles(logits, limit, dtype, rtol):
    limit = min(limit, len(logits) - 1)
    logits = np.array(logits, dtype).tolist()
    is_known, priors, actions = write(logits, limit, dtype)
    assert is_known == (max(logits) > -INF)
    if is_known:
        assert actions == considered(logits, limit)
        weights = np.zeros(len(logits))
        weights[actions] = np.exp(np.array(logits)[actions] - max(logits))
        np.testing.assert_allclose(priors, weights / weights.sum(), rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("place", range(12))
@pytest.mark.parametrize("rising", [False, True])
def test_a_logit_that_is_not_finite_is_found_wherever_it_stands(number, place, rising):
    logits = np.arange(12.0) if rising else -np.arange(12.0)
    logits[place] = number
    assert not write(logits, 4)[0]


def test_a_likely_action_that_is_not_finite_is_named_though_few_are_considered():
    def expand(parents, actions, children):
        return Expansion(np.zeros(1), np.zeros(1), np.array([[0, 3, np.nan, -9]]))

    with pytest.raises(NonFiniteError, match=r"simulation 0 .* row 0"):
        muzero_search(
            np.zeros((1, 4)),
            np.zeros(1),
            np.ones((1, 4), bool),
            expand,
            SearchConfig(num_simulations=3, max_interior_actions=1),
            discount=1.0,
            rng=np.random.default_rng(0),
            dtype=np.float64,  # as in the tests above, for which it is compiled already
        )
