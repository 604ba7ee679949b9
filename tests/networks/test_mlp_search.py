"""A search that has an MLP compiled into it: what it answers is what it would answer from Python."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from numba import njit

from distributed_muzero.config import SearchConfig
from distributed_muzero.errors import ContractError, NonFiniteError
from distributed_muzero.networks.inference import make_search_model
from distributed_muzero.networks.mlp_inference import MOST_COMPILED_WORK, MLPInference, recurrent
from distributed_muzero.networks.torch_inference import TorchInference
from distributed_muzero.search import Expansion, gumbel_search, muzero_search
from distributed_muzero.search.simulate import CompiledExpand
from tests.networks.test_mlp import make_mlp, observe

NUM_ACTIONS = 3
both_policies = pytest.mark.parametrize("policy", ["muzero", "gumbel"])
compiled_recurrent = njit(recurrent)


def called_from_python(expand):
    """The compiled inference, but one call a simulation."""
    batch, _, num_actions = expand.room
    answer = Expansion(*np.empty((2, batch), np.float32), np.empty((batch, num_actions), np.float32))

    def call(parents, actions, children):
        compiled_recurrent(expand.arrays, parents, actions, children, *answer[:3])
        return answer

    return call


def search(model, observations, config, change=lambda expand: expand, **options):
    """The tree that the config's policy grows with what `change` makes of the model's expand."""
    root_values, root_logits = model.initial(observations, config.num_simulations + 1)
    legal = np.ones(root_logits.shape, bool)
    legal[0, 1] = False
    policy = gumbel_search if config.policy == "gumbel" else muzero_search
    expand, rng = change(model.expand), np.random.default_rng(0)
    _, tree, *_ = policy(root_logits, root_values, legal, expand, config, discount=-0.9, rng=rng, **options)
    return tree


@both_policies
@pytest.mark.parametrize("max_depth", [None, 2])
@pytest.mark.parametrize("hidden_sizes", [(), (7,)])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_compiled_search_grows_the_tree_of_one_that_asks_from_python(
    policy, max_depth, hidden_sizes, batch
):
    model = MLPInference(make_mlp(hidden_sizes))
    observations = observe(None, batch, (4,), np.float32)
    config = SearchConfig(policy=policy, num_simulations=40, max_depth=max_depth)
    compiled = search(model, observations, config)
    asked = search(model, observations, config, called_from_python)
    assert compiled.nodes.tobytes() == asked.nodes.tobytes()
    assert compiled.edges.tobytes() == asked.edges.tobytes()
    assert compiled.node_visits[:, 0].tolist() == [41] * batch


@both_policies
def test_a_compiled_search_with_fewer_actions_inside_grows_the_tree_of_one_that_asks_from_python(policy):
    model, observations = MLPInference(make_mlp((7,))), observe(None, 5, (4,), np.float32)
    config = SearchConfig(policy=policy, num_simulations=40, max_interior_actions=2)
    compiled = search(model, observations, config)
    asked = search(model, observations, config, called_from_python)
    assert compiled.nodes.tobytes() == asked.nodes.tobytes()
    np.testing.assert_array_equal(compiled.children_visits, asked.children_visits)
    np.testing.assert_array_equal(compiled.priors, asked.priors)


@both_policies
def test_a_compiled_search_answers_as_blas_and_torch_do(policy):
    networks = make_mlp((16,))
    observations = observe(None, 2, (4,), np.float32)
    config = SearchConfig(policy=policy, num_simulations=30)
    compiled = search(MLPInference(networks), observations, config)
    blas = search(MLPInference(networks), observations, config, lambda expand: expand.plain)
    slow = search(TorchInference(networks), observations, config)
    for other in (blas, slow):
        np.testing.assert_array_equal(compiled.children_visits, other.children_visits)
        np.testing.assert_allclose(compiled.qvalues, other.qvalues, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(compiled.node_values, other.node_values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hidden_sizes", [(), (33,), (7, 5, 3)])
@pytest.mark.parametrize("batch", [1, 6])
def test_the_compiled_inference_gives_the_answers_of_the_module(hidden_sizes, batch):
    networks = make_mlp(hidden_sizes, embedding_size=9)
    observations = observe(networks, batch, (4,), np.float32)
    fast, slow = MLPInference(networks), TorchInference(networks)
    for model in (fast, slow):
        model.initial(observations, 4)
    ask = called_from_python(CompiledExpand(recurrent, fast.arrays, (batch, 4, NUM_ACTIONS), fast.expand))
    rng = np.random.default_rng(0)
    for child in range(1, 4):  # each row goes on from a node of its own choice
        parents = rng.integers(0, child, batch).astype(np.int32)
        actions = rng.integers(0, NUM_ACTIONS, batch).astype(np.int32)
        children = np.full(batch, child, np.int32)
        ours, theirs = ask(parents, actions, children), slow.expand(parents, actions, children)
        for x, y in zip(ours[:3], theirs[:3], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_little_work_is_compiled_into_the_search_and_more_is_not():
    """An embedding of 8, one hidden layer of 16, 3 actions and 41 bins: 8·16 + 16·8 in the transition, 8·16 + 16·41 in
    each of two heads, 8·16 + 16·3 in the policy."""
    model = make_search_model(make_mlp((16,)))
    most = MOST_COMPILED_WORK // (256 + 2 * 784 + 176)
    model.initial(observe(None, most, (4,), np.float32), 2)
    assert isinstance(model.expand, CompiledExpand)
    model.initial(observe(None, most + 1, (4,), np.float32), 2)
    assert not isinstance(model.expand, CompiledExpand)


@both_policies
def test_a_tree_of_doubles_is_grown_from_python(policy):
    model = MLPInference(make_mlp((16,)))
    observations = observe(None, 2, (4,), np.float32)
    config = SearchConfig(policy=policy, num_simulations=10)
    single = search(model, observations, config)
    double = search(model, observations, config, dtype=np.float64)
    assert double.node_values.dtype == np.float64
    np.testing.assert_allclose(single.node_values, double.node_values, rtol=1e-4, atol=1e-4)


@both_policies
def test_nan_from_a_compiled_network_names_row_and_simulation(policy):
    networks = make_mlp((16,))
    with torch.no_grad():
        networks.transition_layers[0].weight[0, 0] = float("nan")
    model = MLPInference(networks)
    config = SearchConfig(policy=policy, num_simulations=10)
    with pytest.raises(NonFiniteError, match="at simulation 0 gave numbers for row 0"):
        search(model, observe(None, 2, (4,), np.float32), config)


def test_a_search_that_is_larger_than_the_model_has_room_for_is_refused():
    """Compiled, it would write past the arrays' end."""
    model = MLPInference(make_mlp((16,)))
    config = SearchConfig(num_simulations=10)
    with pytest.raises(ContractError, match=r"room for \(2, 11, 3\).* needs \(2, 13, 3\)"):
        search(model, observe(None, 2, (4,), np.float32), config, num_simulations=12)


@both_policies
def test_a_second_process_compiles_no_search_again(policy):
    code = (
        "from tests.networks.test_mlp_search import *; from distributed_muzero.search import policies, simulate\n"
        f"config = SearchConfig(policy='{policy}', num_simulations=3)\n"
        "search(MLPInference(make_mlp((16,))), observe(None, 1, (4,), np.float32), config)\n"
        "rule = policies.GUMBEL_RULE if config.policy == 'gumbel' else policies.MUZERO_RULES['parent_and_siblings']\n"
        "print(simulate.make_step(rule, recurrent).stats.cache_misses.total())"
    )
    misses = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        misses.append(done.stdout.strip())
    assert misses[1] == "0", "the search was compiled again"
