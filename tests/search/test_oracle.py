"""The fast search equals the slow oracle, node by node, in float64."""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distributed_muzero.config import SearchConfig
from distributed_muzero.search import Tree
from tests.reference import search_oracle
from tests.reference.gumbel_oracle import Gumbel
from tests.search.worlds import World, gumbel_search_world, make_world, search_world

TOLERANCE = 1e-9
CLOSEST_DECISION = 1e-9  # rounding may turn a closer one round

worlds = st.builds(
    make_world,
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 5),
    num_actions=st.integers(1, 7),
    num_states=st.integers(1, 12),
    discount=st.sampled_from([1.0, 0.997, 0.5, -1.0, -0.95]),
    coarse_logits=st.booleans(),
)
limits = st.one_of(st.none(), st.integers(1, 8))  # of the actions below the root: worlds have up to 7
gumbel_configs = st.builds(
    SearchConfig,
    policy=st.just("gumbel"),
    num_simulations=st.integers(1, 60),
    max_depth=st.one_of(st.none(), st.integers(1, 6)),
    max_num_considered_actions=st.integers(1, 8),
    gumbel_scale=st.sampled_from([0.0, 1.0, 3.0]),
    value_scale=st.sampled_from([0.1, 1.0]),
    maxvisit_init=st.sampled_from([0.0, 1.0, 50.0]),
    rescale_values=st.booleans(),
    use_mixed_value=st.booleans(),
    max_interior_actions=limits,
)
configs = st.builds(
    SearchConfig,
    num_simulations=st.integers(1, 40),
    q_normalization=st.sampled_from(["parent_and_siblings", "tree_min_max", "min_max"]),
    min_max_bounds=st.sampled_from([(-1.0, 1.0), (-4.0, 7.5)]),
    max_depth=st.one_of(st.none(), st.integers(1, 6)),
    pb_c_init=st.sampled_from([0.3, 1.25, 4.0]),
    pb_c_base=st.sampled_from([20.0, 19652.0]),
    dirichlet_alpha=st.sampled_from([0.2, 0.3, 1.0, 5.0]),
    dirichlet_fraction=st.sampled_from([0.25, 1.0]),
    max_interior_actions=limits,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(worlds, configs, st.booleans(), st.integers(0, 100))
def test_fast_search_equals_the_oracle(world: World, config: SearchConfig, noise: bool, seed: int):
    expected = _oracle(world, config, noise, seed)
    assume(min(search.margin for search in expected) > CLOSEST_DECISION)
    result, tree = search_world(world, config, noise=noise, seed=seed)
    for row, search in enumerate(expected):
        _assert_same_tree(tree, row, search)
        root = search.root
        visits = [root.edges[a].visits if a in root.edges else 0 for a in range(len(root.priors))]
        assert result.visit_counts[row].tolist() == visits
        np.testing.assert_allclose(result.action_weights[row], np.divide(visits, sum(visits)), atol=TOLERANCE)
        np.testing.assert_allclose(result.root_values[row], root.value, rtol=TOLERANCE, atol=TOLERANCE)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(worlds, gumbel_configs, st.booleans(), st.integers(0, 100))
def test_fast_gumbel_search_equals_the_oracle(world: World, config: SearchConfig, noise: bool, seed: int):
    expected = _gumbel_oracle(world, config, noise, seed)
    actions = [rules.action(search) for rules, search in expected]
    assume(min(search.margin for _, search in expected) > CLOSEST_DECISION)
    result, tree, decided = gumbel_search_world(world, config, noise=noise, seed=seed)
    assert decided.tolist() == actions
    for row, (rules, search) in enumerate(expected):
        _assert_same_tree(tree, row, search)
        np.testing.assert_allclose(result.action_weights[row], rules.policy(search), atol=TOLERANCE)
        np.testing.assert_allclose(result.root_values[row], search.root.value, rtol=TOLERANCE, atol=TOLERANCE)


def _oracle(world: World, config: SearchConfig, noise: bool, seed: int) -> list[search_oracle.Search]:
    fraction = config.dirichlet_fraction if noise else 0.0
    rng = np.random.default_rng(seed)
    priors = search_oracle.root_priors(
        world.root_logits, world.legal_mask, fraction, config.dirichlet_alpha, rng
    )
    rules = search_oracle.Settings(
        config.num_simulations,
        config.q_normalization,
        config.min_max_bounds,
        config.max_depth,
        config.pb_c_init,
        config.pb_c_base,
        config.max_interior_actions,
    )
    roots = zip(world.root_state, world.root_value, priors, world.legal_mask, strict=True)
    return [search_oracle.search_one(*root, _model(world), rules) for root in roots]


def _gumbel_oracle(
    world: World, config: SearchConfig, noise: bool, seed: int
) -> list[tuple[Gumbel, search_oracle.Search]]:
    drawn = np.zeros_like(world.root_logits)
    if noise and config.gumbel_scale > 0:
        drawn = config.gumbel_scale * np.random.default_rng(seed).gumbel(size=drawn.shape)
    priors = search_oracle.root_priors(world.root_logits, world.legal_mask, 0.0, 1.0, np.random.default_rng())
    loop = search_oracle.Settings(
        config.num_simulations,
        max_depth=config.max_depth,
        max_interior_actions=config.max_interior_actions,
    )
    searches = []
    for row, prior in enumerate(priors):
        rules = Gumbel(
            world.root_logits[row].tolist(),
            drawn[row].tolist(),
            config.num_simulations,
            config.max_num_considered_actions,
            config.value_scale,
            config.maxvisit_init,
            config.rescale_values,
            config.use_mixed_value,
        )
        root = world.root_state[row], world.root_value[row], prior, world.legal_mask[row]
        searches.append((rules, search_oracle.search_one(*root, _model(world), loop, rules.select)))
    return searches


def _model(world: World) -> search_oracle.Model:
    def model(state: int, action: int) -> search_oracle.Answer:
        after = world.next_state[state, action]
        return search_oracle.Answer(
            after,
            world.reward[state, action],
            world.discount[state, action],
            world.value[after],
            world.logits[after].tolist(),
        )

    return model


def _assert_same_tree(tree: Tree, row: int, search: search_oracle.Search) -> None:
    made = [node.index for node in search.nodes]
    assert np.flatnonzero(tree.node_visits[row]).tolist() == made
    assert tree.node_visits[row, made].tolist() == [node.visits for node in search.nodes]
    for ours, theirs in [
        (tree.node_values[row, made], [node.value for node in search.nodes]),
        (tree.raw_values[row, made], [node.raw_value for node in search.nodes]),
        (tree.priors[row, made], [node.priors for node in search.nodes]),
    ]:
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    for node in search.nodes:
        children = tree.children_index[row, node.index]
        assert {a: c for a, c in enumerate(children) if c >= 0} == {
            a: e.child.index for a, e in node.edges.items()
        }
        for action, edge in node.edges.items():
            at = (row, node.index, action)
            assert tree.children_visits[at] == edge.visits
            assert (tree.parents[row, children[action]], tree.action_from_parent[row, children[action]]) == (
                node.index,
                action,
            )
            np.testing.assert_allclose(tree.qvalues[at], edge.qvalue, rtol=TOLERANCE, atol=TOLERANCE)
