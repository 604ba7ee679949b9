import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_muzero.config import NetworkConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.networks.inference import make_search_model
from distributed_muzero.networks.mlp import min_max_normalize
from distributed_muzero.networks.mlp_inference import MLPInference
from distributed_muzero.networks.registry import make_networks
from distributed_muzero.networks.torch_inference import TorchInference


def make_mlp(
    hidden_sizes, *, shape=(4,), dtype=np.float32, num_actions=3, history_length=1, embedding_size=8
):
    """An MLP whose heads have opinions; a new one predicts flat distributions."""
    spec = EnvironmentSpec("t", shape, np.dtype(dtype), (num_actions,))
    config = NetworkConfig(hidden_sizes=hidden_sizes, embedding_size=embedding_size)
    networks = make_networks(spec, history_length, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return networks


def observe(networks, batch, shape, dtype, history_length=1, seed=0):
    rng = np.random.default_rng(seed)
    if dtype == np.uint8:
        return rng.integers(0, 256, (batch, history_length, *shape)).astype(np.uint8)
    return (100 * rng.normal(size=(batch, history_length, *shape))).astype(dtype)


def test_parameter_count_of_the_yardstick_network():
    """4 observations, 2 actions, embedding and hidden layer of 64, 21 bins:
    h 4·64+64 + 64·64+64 = 4480;  g 66·64+64 + 64·64+64 = 8448;
    reward and value 64·64+64 + 64·21+21 = 5525 each;  policy 64·64+64 + 64·2+2 = 4290."""
    spec = EnvironmentSpec("t", (4,), np.dtype(np.float32), (2,))
    networks = make_networks(spec, 1, NetworkConfig(support_min=-10, support_max=10, support_size=21))
    assert sum(p.numel() for p in networks.parameters()) == 4480 + 8448 + 2 * 5525 + 4290 == 28_268


@pytest.mark.parametrize("hidden_sizes", [(), (32,), (32, 16), (7, 5, 3)])
@pytest.mark.parametrize("batch", [1, 2, 5, 33])
@pytest.mark.parametrize(
    ("shape", "dtype", "history_length"),
    [((4,), np.float32, 1), ((2, 3), np.uint8, 2), ((1,), np.float64, 1)],
)
def test_inference_without_torch_gives_the_answers_of_the_module(
    hidden_sizes, batch, shape, dtype, history_length
):
    networks = make_mlp(hidden_sizes, shape=shape, dtype=dtype, history_length=history_length)
    observations = observe(networks, batch, shape, dtype, history_length)
    fast, slow = MLPInference(networks), TorchInference(networks)
    num_nodes = 4
    for ours, theirs in zip(
        fast.initial(observations, num_nodes), slow.initial(observations, num_nodes), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    rng = np.random.default_rng(0)
    for child in range(1, num_nodes):  # each row goes on from a node of its own choice
        parents = rng.integers(0, child, batch).astype(np.int32)
        actions = rng.integers(0, 3, batch).astype(np.int32)
        children = np.full(batch, child, np.int32)
        ours, theirs = fast.expand(parents, actions, children), slow.expand(parents, actions, children)
        np.testing.assert_allclose(ours.rewards, theirs.rewards, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(ours.prior_logits, theirs.prior_logits, rtol=1e-4, atol=1e-4)
        assert ours.prior_logits.shape == (batch, 3)


@pytest.mark.parametrize("make", [MLPInference, TorchInference])
def test_rows_of_a_batch_do_not_reach_each_other(make):
    model = make(make_mlp((16,)))
    observations = observe(None, 3, (4,), np.float32)

    def answers(observations):
        model.initial(observations, 2)
        one = np.ones(len(observations), np.int32)
        return model.expand(0 * one, one, one).values.copy()

    before = answers(observations)
    observations[0] = 1e6
    after = answers(observations)
    assert before[0] != after[0] and (before[1:] == after[1:]).all()


def test_a_new_search_forgets_the_last_one():
    model = MLPInference(make_mlp((16,)))
    first, second = (observe(None, 2, (4,), np.float32, seed=s) for s in (1, 2))
    alone = [x.copy() for x in model.initial(first, 3)]
    model.initial(second, 3)
    for x, y in zip(alone, model.initial(first, 3), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("hidden_sizes", [(), (16,)])
@pytest.mark.parametrize("shape", [(4,), (1,)])
def test_a_search_model_is_a_snapshot(hidden_sizes, shape):
    """Training goes on in place; a search that began must not see half of it."""
    networks = make_mlp(hidden_sizes, shape=shape)
    model = make_search_model(networks)
    observations = observe(networks, 3, shape, np.float32)
    before = model.initial(observations, 1)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter.zero_()
    for x, y in zip(before, model.initial(observations, 1), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "part", ["representation_layers", "transition_layers", "value_layers", "policy_layers"]
)
def test_nan_in_any_layer_reaches_the_answer(part):
    """ReLU and normalisation must not turn NaN into a number that looks right."""
    networks = make_mlp((16,))
    with torch.no_grad():
        getattr(networks, part)[0].weight[0, 0] = float("nan")
    model = MLPInference(networks)
    values, logits = model.initial(observe(networks, 2, (4,), np.float32), 2)
    one = np.ones(2, np.int32)
    expansion = model.expand(0 * one, one, one)
    everything = np.concatenate([values, logits.ravel(), expansion.values, expansion.prior_logits.ravel()])
    assert np.isnan(everything).any()


def test_fused_inference_is_the_five_functions_in_one_call():
    networks = make_mlp((16,))
    observations = torch.from_numpy(observe(networks, 3, (4,), np.float32))
    actions = torch.tensor([0, 1, 2])
    h, g_r, g_s, f_v, f_p = networks.functions
    with torch.no_grad():
        first = networks.initial_inference(observations)
        torch.testing.assert_close(first.embeddings, h(observations))
        torch.testing.assert_close(first.values, f_v(h(observations)))
        torch.testing.assert_close(first.policy_logits, f_p(h(observations)))
        assert (first.rewards == 0).all()
        then = networks.recurrent_inference(first.embeddings, actions)
        following = g_s(first.embeddings, actions)
        torch.testing.assert_close(then.embeddings, following)
        torch.testing.assert_close(then.rewards, g_r(first.embeddings, actions))
        torch.testing.assert_close(then.values, f_v(following))
        torch.testing.assert_close(then.policy_logits, f_p(following))


def test_a_new_model_predicts_zero_and_no_preference():
    spec = EnvironmentSpec("t", (4,), np.dtype(np.float32), (3,))
    model = make_search_model(make_networks(spec, 1, NetworkConfig()))
    values, logits = model.initial(observe(None, 2, (4,), np.float32), 1)
    np.testing.assert_allclose(values, 0, atol=1e-6)
    assert (logits == 0).all()


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=9))
def test_normalised_embeddings_lie_between_zero_and_one(row):
    out = min_max_normalize(torch.tensor([row]))
    assert float(out.min()) == 0 and float(out.max()) <= 1
    if max(row) - min(row) > 1:
        assert float(out.max()) > 0.9999
