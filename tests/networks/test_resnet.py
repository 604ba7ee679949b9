import numpy as np
import pytest
import torch

from distributed_muzero.algorithm.losses import LossWeights
from distributed_muzero.algorithm.training import add_row_gradients, training
from distributed_muzero.config import NetworkConfig, make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import ConfigError
from distributed_muzero.networks.inference import make_search_model
from distributed_muzero.networks.registry import make_networks
from distributed_muzero.networks.resnet import make_action_planes
from distributed_muzero.networks.resnet_inference import ResNetInference
from distributed_muzero.networks.torch_inference import TorchInference

BOARDS = {  # observation, actions
    "tic-tac-toe": ((3, 3, 3), (3, 3)),
    "connect four": ((3, 6, 7), (7,)),
    "go with a pass": ((2, 4, 4), (17,)),
    "one plane, actions without a place": ((5, 4), (3,)),
    "one row": ((2, 1, 6), (6,)),
    "one cell": ((2, 1, 1), (2,)),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other make such small products slower, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_spec(shape, action_shape=(4,), dtype=np.float32):
    return EnvironmentSpec("t", shape, np.dtype(dtype), action_shape)


def make_resnet(shape=(3, 3, 3), action_shape=(9,), history_length=1, trained=True, **options):
    """A small ResNet after three large steps on noise, so that no layer is as it was made."""
    config = NetworkConfig(name="resnet", **{"num_channels": 16, "num_blocks": 1, **options})
    networks = make_networks(make_spec(shape, action_shape), history_length, config)
    if trained:
        optimizer = torch.optim.Adam(networks.parameters(), lr=0.02)
        for seed in range(3):
            training(*random_batch(networks, shape, history_length, seed), optimizer=optimizer)
    return networks.eval()


def random_batch(networks, shape, history_length, seed, rows=8, steps=3):
    rng = np.random.default_rng(seed)
    num_actions = networks.num_actions
    return (
        torch.from_numpy(observe(shape, rows, history_length, seed)),
        torch.from_numpy(rng.dirichlet(np.ones(num_actions), (rows, steps)).astype(np.float32)),
        torch.from_numpy(rng.integers(0, num_actions, (rows, steps))),
        torch.from_numpy(rng.normal(size=(rows, steps)).astype(np.float32)),
        *networks.functions,
    )


def observe(shape, batch, history_length=1, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, (batch, history_length, *shape)).astype(np.float32)


def expand_once(model, observations, actions):
    model.initial(observations, 2)
    rows = len(observations)
    return model.expand(np.zeros(rows, np.int32), np.asarray(actions, np.int32), np.ones(rows, np.int32))


@pytest.mark.parametrize(("shape", "action_shape"), BOARDS.values(), ids=BOARDS)
@pytest.mark.parametrize("batch", [1, 5, 33])
@pytest.mark.parametrize(
    ("num_blocks", "hidden_sizes", "history_length"), [(0, (), 1), (1, (32,), 2), (2, (8, 4), 1)]
)
def test_inference_without_torch_gives_the_answers_of_the_module(
    shape, action_shape, batch, num_blocks, hidden_sizes, history_length
):
    networks = make_resnet(
        shape, action_shape, history_length, num_blocks=num_blocks, hidden_sizes=hidden_sizes
    )
    observations = observe(shape, batch, history_length)
    fast, slow = ResNetInference(networks), TorchInference(networks)
    num_nodes = 4
    for ours, theirs in zip(
        fast.initial(observations, num_nodes), slow.initial(observations, num_nodes), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    rng = np.random.default_rng(0)
    for child in range(1, num_nodes):  # each row goes on from a node of its own choice
        parents = rng.integers(0, child, batch).astype(np.int32)
        actions = rng.integers(0, networks.num_actions, batch).astype(np.int32)
        children = np.full(batch, child, np.int32)
        ours, theirs = fast.expand(parents, actions, children), slow.expand(parents, actions, children)
        np.testing.assert_allclose(ours.rewards, theirs.rewards, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours.prior_logits, theirs.prior_logits, rtol=1e-5, atol=1e-5)
        assert ours.prior_logits.shape == (batch, networks.num_actions)


def test_gradients_in_bfloat16_point_where_those_in_float32_do():
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        networks = make_resnet().train()
        networks.compute_dtype = dtype
        observations, policies, actions, returns, *_ = random_batch(networks, (3, 3, 3), 1, seed=9, rows=32)
        inputs = (observations, actions, policies, returns, returns)
        losses = add_row_gradients(networks, inputs, None, LossWeights())
        assert {part.dtype for part in losses} == {torch.float32}
        gradients.append([parameter.grad for parameter in networks.parameters()])
    for exact, coarse in zip(*gradients, strict=True):
        assert coarse.dtype == torch.float32
        assert torch.cosine_similarity(exact.flatten(), coarse.flatten(), dim=0) > 0.98
    assert not all(torch.equal(exact, coarse) for exact, coarse in zip(*gradients, strict=True))


def test_networks_elsewhere_than_on_a_cpu_are_asked_where_they_are():
    assert isinstance(make_search_model(make_resnet()), ResNetInference)
    model = make_search_model(make_resnet().to("meta"))
    assert isinstance(model, TorchInference) and model.device.type == "meta"


def test_parameter_count_by_hand():
    """Tic-tac-toe, history 2, 16 channels, 1 block, heads of 32, 5 bins:
    h  (6 + 2·16)·16·9 = 5472, its three norms 3·2·16 = 96;  g_s  (17 + 2·16)·16·9 = 7056, norms 96, actions 9·9 = 81;
    each head 16·16+16 = 272 and 144·32+32 = 4640, then 32·5+5 = 165 (reward, value) or 32·9+9 = 297 (policy)."""
    networks = make_resnet(history_length=2, trained=False, hidden_sizes=(32,), support_size=5)
    count = sum(p.numel() for p in networks.parameters())
    assert count == 5472 + 96 + 7056 + 96 + 81 + 3 * (272 + 4640) + 2 * 165 + 297 == 28_164


@pytest.mark.parametrize("make", [ResNetInference, TorchInference])
@pytest.mark.parametrize("training_mode", [False, True])
def test_rows_of_a_batch_do_not_reach_each_other(make, training_mode):
    networks = make_resnet().train(training_mode)
    model = make(networks)
    observations = observe((3, 3, 3), 4)
    before = expand_once(model, observations, [0, 1, 2, 3]).values.copy()
    observations[0] = 100
    after = expand_once(model, observations, [0, 1, 2, 3]).values
    assert before[0] != after[0] and (before[1:] == after[1:]).all()


def test_a_row_of_a_training_batch_has_the_gradient_that_it_has_alone():
    """Nothing is averaged over a batch, so devices may share it and add up what they find."""
    networks = make_resnet()
    observations, actions = torch.from_numpy(observe((3, 3, 3), 4)), torch.tensor([0, 4, 8, 1])

    def gradient(rows):
        networks.zero_grad()
        answer = networks.recurrent_inference(networks.representation(observations[rows]), actions[rows])
        (answer.values.sum() + answer.policy_logits.square().sum()).backward()
        return torch.cat([p.grad.flatten().clone() for p in networks.parameters() if p.grad is not None])

    together = gradient([0, 1, 2, 3])
    torch.testing.assert_close(together, sum(gradient([row]) for row in range(4)), rtol=1e-3, atol=1e-4)


def test_a_new_search_forgets_the_last_one():
    model = ResNetInference(make_resnet())
    first, second = (observe((3, 3, 3), 2, seed=s) for s in (1, 2))
    alone = [x.copy() for x in expand_once(model, first, [0, 1])[:3]]
    expand_once(model, second, [3, 4])
    for x, y in zip(alone, expand_once(model, first, [0, 1])[:3], strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_search_model_is_a_snapshot():
    """Training goes on in place; a search that began must not see half of it."""
    networks = make_resnet((2, 6, 7), (7,))
    model = make_search_model(networks)
    observations = observe((2, 6, 7), 3)
    before = [x.copy() for x in expand_once(model, observations, [0, 1, 6])[:3]]
    with torch.no_grad():
        for tensor in (*networks.parameters(), *networks.buffers()):
            tensor.zero_()
    for x, y in zip(before, expand_once(model, observations, [0, 1, 6])[:3], strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "part",
    [
        "representation_layers.first.0",
        "representation_layers.rest.1.1",
        "transition_layers.first.0",
        "transition_layers.rest.0.0",
        "value_layers.0",
        "policy_layers.3",
    ],
)
def test_nan_in_any_layer_reaches_the_answer(part):
    """ReLU and normalisation must not turn NaN into a number that looks right."""
    networks = make_resnet()
    with torch.no_grad():
        networks.get_submodule(part).weight.view(-1)[0] = float("nan")
    expansion = expand_once(ResNetInference(networks), observe((3, 3, 3), 2), [4, 4])
    assert np.isnan(np.concatenate([expansion.values, expansion.prior_logits.ravel()])).any()


def test_a_new_model_predicts_zero_and_no_preference():
    expansion = expand_once(
        make_search_model(make_resnet(trained=False)), observe((3, 3, 3), 2), np.array([1, 2])
    )
    np.testing.assert_allclose(expansion.values, 0, atol=1e-6)
    np.testing.assert_allclose(expansion.rewards, 0, atol=1e-6)
    assert (expansion.prior_logits == 0).all()


def test_each_row_of_embeddings_spans_zero_to_one():
    networks = make_resnet()
    with torch.no_grad():
        first = networks.representation(torch.from_numpy(observe((3, 3, 3), 5)))
        then = networks.transition(first, torch.arange(5))
    for embeddings in (first, then):
        assert embeddings.shape == (5, 16, 3, 3)
        assert (embeddings.flatten(1).amin(1) == 0).all() and (embeddings.flatten(1).amax(1) > 0.999).all()


def test_an_observation_of_rank_two_is_one_plane():
    plane, planes = (make_resnet(shape, (4,), trained=False) for shape in ((5, 4), (1, 5, 4)))
    observations = torch.from_numpy(observe((5, 4), 3))
    with torch.no_grad():
        assert torch.equal(
            plane.representation(observations), planes.representation(observations[:, :, None])
        )


def test_history_becomes_channels_and_every_part_of_it_counts():
    networks = make_resnet((2, 3, 3), (9,), history_length=3)
    assert networks.representation_layers.first[0].in_channels == 6
    observations = torch.from_numpy(observe((2, 3, 3), 1, history_length=3))
    with torch.no_grad():
        before = networks.representation(observations)
        for past in range(3):
            changed = observations.clone()
            changed[0, past, 1, 2, 0] += 1
            assert not torch.allclose(networks.representation(changed), before, atol=1e-4)


@pytest.mark.parametrize("shape", [(4,), (), (2, 3, 4, 5), (3, 0, 3)])
def test_observations_that_are_no_planes_are_refused_with_the_way_out(shape):
    with pytest.raises(ConfigError, match=r"those of t have the shape .* Set network.name to mlp"):
        make_networks(make_spec(shape), 1, NetworkConfig(name="resnet"))


def test_bytes_and_floats_of_any_scale_are_read_alike():
    """Every plane is seen by its own mean and variance, so 0/255 says no more than 0/1."""
    answers = []
    for scale in (1, 255):
        networks = make_resnet((2, 3, 3), (9,), trained=False).train()
        observations = torch.from_numpy((observe((2, 3, 3), 64) * scale).astype(np.uint8))
        networks.representation(observations)  # gathers the statistics
        answers.append(networks.eval().representation(observations).detach())
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-3)


def test_planes_of_actions_that_are_cells():
    planes = make_action_planes(6, 2, 3)
    assert planes.shape == (6, 1, 2, 3)
    assert planes[4, 0].tolist() == [[0, 0, 0], [0, 1, 0]]
    with_pass = make_action_planes(7, 2, 3)
    assert torch.equal(with_pass[:6], planes) and (with_pass[6] == 0).all()


def test_planes_of_actions_that_are_columns():
    planes = make_action_planes(3, 2, 3)
    assert planes[1, 0].tolist() == [[0, 1, 0], [0, 1, 0]]


def test_actions_without_a_place_get_codes_that_differ():
    planes = make_action_planes(50, 4, 4)
    assert planes.shape[2:] == (1, 1)
    distances = torch.cdist(planes.flatten(1), planes.flatten(1)) + 10 * torch.eye(50)
    assert distances.min() > 0.1


@pytest.mark.parametrize(("shape", "action_shape"), BOARDS.values(), ids=BOARDS)
def test_every_action_leads_to_another_embedding(shape, action_shape):
    networks = make_resnet(shape, action_shape)
    count = networks.num_actions
    with torch.no_grad():
        embeddings = networks.representation(torch.from_numpy(observe(shape, 1))).expand(count, -1, -1, -1)
        following = networks.transition(embeddings, torch.arange(count)).flatten(1)
    assert (torch.cdist(following, following) + 10 * torch.eye(count)).min() > 1e-3


def test_more_actions_than_a_table_holds_are_searched_through_torch():
    networks = make_resnet((2, 8, 8), (8, 8, 73), trained=False, num_channels=32)
    model = make_search_model(networks)
    assert isinstance(model, TorchInference)
    assert expand_once(model, observe((2, 8, 8), 2), [0, 4671]).prior_logits.shape == (2, 4672)


def test_a_board_and_its_best_moves_are_learnt():
    """The target is the first free cell of a row of its own, behind one model step: all three networks must work."""
    networks = make_resnet(trained=False).train()
    observations = observe((3, 3, 3), 64, seed=3)
    actions = np.random.default_rng(0).integers(0, 9, (64, 2))
    policies = np.eye(9, dtype=np.float32)[
        np.stack([observations[:, 0, 0].reshape(64, 9).argmax(1), actions[:, 0]], 1)
    ]
    returns = np.stack([observations[:, 0, 1, 1, 1], observations[:, 0, 2].mean((1, 2))], 1)
    batch = [torch.from_numpy(x) for x in (observations, policies, actions, returns)]
    optimizer = torch.optim.Adam(networks.parameters(), lr=3e-3)
    losses = [training(*batch, *networks.functions, optimizer=optimizer) for _ in range(150)]
    assert losses[-1] < 0.2 * losses[0]


def test_options_of_the_other_network_are_refused():
    with pytest.raises(
        ConfigError, match=r"embedding_size 32 is for mlp or node_sequence, and name is resnet"
    ):
        make_config({"network": {"name": "resnet", "embedding_size": 32}})
    with pytest.raises(ConfigError, match=r"num_blocks 3 is for resnet or node_sequence, and name is mlp"):
        make_config({"network": {"num_blocks": 3}})
    with pytest.raises(ConfigError, match=r"num_channels"):
        make_config({"network": {"name": "resnet", "num_channels": 0}})


def test_a_file_that_lists_every_option_is_read_and_others_networks_may_use_any():
    config = make_config({"network": {"name": "resnet", "num_channels": 8}})
    assert make_config(config.model_dump()) == config
    mixed = {"name": "somebody's", "num_channels": 8, "embedding_size": 8}
    assert make_config({"network": mixed}).network.num_channels == 8
