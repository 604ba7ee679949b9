import numpy as np
import pytest
import torch

from distributed_muzero.algorithm.acting import acting
from distributed_muzero.algorithm.losses import LossWeights
from distributed_muzero.algorithm.training import add_row_gradients, training
from distributed_muzero.config import NetworkConfig, SearchConfig, make_config
from distributed_muzero.environments.base import TokenColumn
from distributed_muzero.errors import ConfigError
from distributed_muzero.networks.flat import FlatWeights
from distributed_muzero.networks.node_sequence import SPARE_SLOTS, NodeSequence
from distributed_muzero.networks.registry import check_observations, make_networks
from distributed_muzero.networks.sequence_inference import SequenceInference, exponentiate
from distributed_muzero.networks.torch_inference import TorchInference
from tests.tokens import COLUMNS, Seek, random_observations, token_spec


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other make such small products slower, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_sequence(spec=None, stirred=True, seed=0, **options):
    """A small model; `stirred`: every weight is moved, so that no layer is as it was made."""
    config = NetworkConfig(name="node_sequence", **{"embedding_size": 16, "num_blocks": 1, **options})
    networks = make_networks(spec or token_spec(), 1, config, seed)
    assert isinstance(networks, NodeSequence)
    if stirred:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in networks.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return networks.eval()


def random_batch(spec, rows=8, num_unroll_steps=2, longest=8):
    rng = np.random.default_rng(3)
    steps, num_actions = num_unroll_steps + 1, spec.num_actions
    policies = np.zeros((rows, steps, num_actions), np.float32)
    policies[..., : spec.action_shape[1]] = rng.dirichlet(np.ones(spec.action_shape[1]), (rows, steps))
    return (
        torch.from_numpy(random_observations(spec, rows, longest)),
        torch.from_numpy(policies),
        torch.from_numpy(rng.integers(0, num_actions, (rows, steps))),
        torch.from_numpy(rng.normal(size=(rows, steps)).astype(np.float32)),
    )


def unrolled(networks, observations, *actions):
    """Values, rewards and policies of h and of each action behind it, in turn."""
    answers = [networks.initial_inference(observations)]
    for action in actions:
        answers.append(networks.recurrent_inference(answers[-1].embeddings, torch.tensor(action)))
    return answers


@torch.no_grad()
def test_an_answer_does_not_depend_on_how_many_tokens_there_could_be():
    short_spec, long_spec = token_spec(24), token_spec(48)
    observations = random_observations(short_spec, 5, 20)
    padded = np.pad(observations, ((0, 0), (0, 0), (0, 24), (0, 0)))
    padded[..., 3:] = padded[:, :, :1, 3:]  # shared columns are in empty rows, too
    short, long = make_sequence(short_spec), make_sequence(long_spec)
    actions = [0, 3, 7, 1, 2], [39, 0, 2, 5, 1]
    for ours, theirs in zip(
        unrolled(short, torch.from_numpy(observations), *actions),
        unrolled(long, torch.from_numpy(padded), *actions),
        strict=True,
    ):
        for name in ("values", "rewards"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5)
        both = short_spec.num_actions
        torch.testing.assert_close(ours.policy_logits, theirs.policy_logits[:, :both], rtol=1e-5, atol=1e-5)
        assert theirs.policy_logits.shape == (5, long_spec.num_actions)


@torch.no_grad()
def test_an_answer_does_not_depend_on_longer_rows_beside_it():
    spec, networks = token_spec(24), make_sequence(token_spec(24))
    observations = random_observations(spec, 4, 5)
    longer = np.concatenate([observations, random_observations(spec, 3, 24, seed=9)])
    alone = unrolled(networks, torch.from_numpy(observations), [3, 9, 1, 0], [1, 1, 2, 40])
    beside = unrolled(networks, torch.from_numpy(longer), [3, 9, 1, 0, 5, 5, 5], [1, 1, 2, 40, 7, 7, 7])
    for ours, theirs in zip(alone, beside, strict=True):
        torch.testing.assert_close(ours.values, theirs.values[:4], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.rewards, theirs.rewards[:4], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.policy_logits, theirs.policy_logits[:4], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_slots_behind_the_last_token_are_open_as_far_as_the_spare_ones_and_have_no_prior_beyond():
    spec = token_spec(24)
    networks = make_sequence(spec)
    observations = torch.from_numpy(random_observations(spec, 2, 6))
    counts = (observations[:, 0, :, 0] > 0).sum(1)
    for answer in unrolled(networks, observations, [47, 0]):
        assert answer.embeddings.shape == (2, 1 + 6 + SPARE_SLOTS, 16)
        priors = torch.softmax(answer.policy_logits, -1).view(2, 24, 2)
        for row, count in enumerate(counts):
            assert (priors[row, : count + SPARE_SLOTS] > 0).all()
            assert (priors[row, count + SPARE_SLOTS :] == 0).all()
            assert (answer.embeddings[row, : 1 + count + SPARE_SLOTS, 0] == 1).all()
            assert (answer.embeddings[row, 1 + count + SPARE_SLOTS :] == 0).all()


@torch.no_grad()
def test_a_rule_is_added_to_its_slot_and_to_the_whole():
    """Without layers the transition is the norm of that sum. Action 7 of 2 rules: rule 1 on slot 3."""
    networks = make_sequence(num_blocks=0)
    before = networks.representation(
        torch.from_numpy(random_observations(networks_spec := token_spec(), 1, 5))
    )
    assert networks_spec.num_actions == 24
    after = networks.transition(before, torch.tensor([7]))
    expected = before.clone()
    expected[0, 0] += networks.rules[1, :16]
    expected[0, 1 + 3] += networks.rules[1, 16:]
    expected = networks.transition_layers.norm(expected)
    torch.testing.assert_close(after[0, :, 1:], expected[0, :, 1:])
    assert (after[..., 0] == 1).all()


@torch.no_grad()
def test_what_tokens_refer_to_is_seen_from_both_ends():
    """Tokens 0 … 3, where 1 names 3; the answer is a matrix for each direction, and one for those of one kind."""
    networks = make_sequence()
    slots = torch.zeros(1, 5, 5)
    slots[0, :4, 0] = torch.tensor([1.0, 2, 3, 1])
    slots[0, :, 2] = torch.tensor([-1.0, 3, -1, -1, 0])  # row 4 holds no token: its 0 is no index
    forward, backward, same = networks.relations(slots, slots[..., 0] > 0)[0].movedim(-1, 0)
    assert forward.nonzero().tolist() == [[1, 3]]
    assert backward.nonzero().tolist() == [[3, 1]]
    assert same.nonzero().tolist() == [[0, 0], [0, 3], [1, 1], [2, 2], [3, 0], [3, 3]]
    observations = torch.zeros(2, 1, 12, 5)
    observations[:, :, :4, 0] = torch.tensor([1.0, 2, 3, 4])
    observations[:, :, :4, 2] = -1
    observations[1, 0, 1, 2] = 3
    linked = networks.value(networks.representation(observations))
    assert linked[0] != linked[1]


@torch.no_grad()
def test_order_matters_by_distance_alone():
    """Tokens further on have the same answers where nothing else stands: without a token there is no first place."""
    networks = make_sequence()
    kinds = torch.zeros(2, 1, 12, 5)
    kinds[0, 0, :3, 0], kinds[1, 0, :3, 0] = torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 2, 1])
    kinds[:, 0, :, 2] = -1
    one, other = networks.initial_inference(kinds).policy_logits.view(2, 12, 2)[:, :3]
    assert not torch.allclose(one, other.flip(0), atol=1e-3)


def test_weights_fit_any_number_of_tokens():
    short, long = make_sequence(token_spec(48), seed=1), make_sequence(token_spec(64), seed=2)
    weights = FlatWeights(short).read().numpy()
    target = FlatWeights(long)
    arrays = target.named_arrays(weights)
    target.write(target.vector_of(arrays))
    observations = random_observations(token_spec(48), 2, 30)
    padded = np.pad(observations, ((0, 0), (0, 0), (0, 16), (0, 0)))
    with torch.no_grad():
        ours, theirs = (
            short.initial_inference(torch.from_numpy(observations)),
            long.initial_inference(torch.from_numpy(padded)),
        )
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-5, atol=1e-5)


def test_same_seed_same_weights_and_answers():
    observations = torch.from_numpy(random_observations(token_spec(), 3, 7))
    ours, again, others = (make_sequence(stirred=False, seed=seed) for seed in (4, 4, 5))
    with torch.no_grad():
        first, second, third = (networks.representation(observations) for networks in (ours, again, others))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_gradients_reach_every_parameter():
    spec = token_spec()
    networks = make_sequence(spec).train()
    observations, policies, actions, returns = random_batch(spec)
    add_row_gradients(networks, (observations, actions, policies, returns, returns), None, LossWeights())
    for name, parameter in networks.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_gradients_in_bfloat16_point_where_those_in_float32_do():
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        networks = make_sequence().train()
        networks.compute_dtype = dtype
        observations, policies, actions, returns = random_batch(token_spec(), rows=32)
        losses = add_row_gradients(
            networks, (observations, actions, policies, returns, returns), None, LossWeights()
        )
        assert all(bool(torch.isfinite(part).all()) for part in losses)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in networks.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98
    assert not torch.equal(*gradients)


def test_a_target_on_a_slot_that_is_closed_costs_a_number():
    spec = token_spec(24)
    networks = make_sequence(spec).train()
    observations, policies, actions, returns = random_batch(spec, longest=3)
    policies[:] = 0
    policies[..., -1] = 1  # slot 23 of rows with 3 + 4 open ones
    assert training(observations, policies, actions, returns, *networks.functions) < 1000


def test_scales_are_those_of_tokens_not_of_empty_rows():
    spec = token_spec(24)
    networks = make_sequence(spec, stirred=False).train()
    observations = random_observations(spec, 16, 6)
    networks.representation(torch.from_numpy(observations))
    sizes = observations[..., 1][observations[..., 0] > 0]
    assert networks.tokens.normalizer.mean.tolist() == pytest.approx([sizes.mean()], rel=1e-5)
    counts = (observations[..., 0] > 0).sum((1, 2))
    left = observations[:, 0, 0, 4]
    assert networks.whole.normalizer.mean.tolist() == pytest.approx([left.mean(), counts.mean()], rel=1e-5)


def test_without_a_single_token_nothing_breaks():
    networks = make_sequence().train()
    values = networks.value(networks.representation(torch.zeros(2, 1, 12, 5)))
    assert bool(torch.isfinite(values).all())
    assert all(bool(torch.isfinite(buffer).all()) for buffer in networks.buffers())


def test_one_category_is_enough():
    spec = token_spec(6, 3, (TokenColumn("kind", "category", 3),))
    networks = make_sequence(spec)
    observations = np.zeros((2, 1, 6, 1), np.float32)
    observations[:, 0, :4] = 1
    values, logits = TorchInference(networks).initial(observations, 2)
    assert values.shape == (2,) and logits.shape == (2, 18)


UNFIT = {
    "no columns": (token_spec()._replace(token_columns=()), 1, r"tokens has none .*mlp or resnet"),
    "a number first": (
        token_spec(columns=COLUMNS[1:]),
        1,
        r"begins with 'size', a number.*category, 0 = no token",
    ),
    "a shared one first": (token_spec(columns=COLUMNS[3:]), 1, r"begins with 'wanted', a shared category"),
    "another shape": (
        token_spec()._replace(observation_shape=(12, 4)),
        1,
        r"shows \[12, 4\] with 5 columns.*\[L, C\]",
    ),
    "other actions": (token_spec()._replace(action_shape=(24,)), 1, r"has actions \[24\].*\[L, R\]"),
    "a shared index": (
        token_spec(columns=(COLUMNS[0], TokenColumn("root", "index", shared=True))),
        1,
        r"shares the index 'root'",
    ),
    "a link that is no category": (
        token_spec(columns=(COLUMNS[0], TokenColumn("size", "number", links=True))),
        1,
        r"links tokens by 'size'",
    ),
    "a category without size": (
        token_spec(columns=(COLUMNS[0], TokenColumn("sign", "category"))),
        1,
        r"size 0 for the category 'sign'",
    ),
    "a category of one": (
        token_spec(columns=(COLUMNS[0], TokenColumn("sign", "category", 1))),
        1,
        r"size 1 for the category 'sign'.*2 or more",
    ),
    "a history": (token_spec(), 4, r"history_length is 4; set it to 1.*shared columns"),
}


@pytest.mark.parametrize(("spec", "history_length", "message"), UNFIT.values(), ids=UNFIT)
def test_what_is_no_sequence_of_tokens_is_refused(spec, history_length, message):
    with pytest.raises(ConfigError, match=message):
        check_observations("node_sequence", spec, history_length)
    with pytest.raises(ConfigError, match=message):
        make_networks(spec, history_length, NetworkConfig(name="node_sequence"))


def test_heads_share_the_embedding():
    with pytest.raises(ConfigError, match=r"num_heads 3 must divide embedding_size 64"):
        make_config({"network": {"name": "node_sequence", "num_heads": 3}})
    with pytest.raises(ConfigError, match=r"num_channels 8 is for resnet, and name is node_sequence"):
        make_config({"network": {"name": "node_sequence", "num_channels": 8}})
    with pytest.raises(ConfigError, match=r"num_heads 2 is for node_sequence, and name is mlp"):
        make_config({"network": {"num_heads": 2}})


def test_an_mlp_reads_tokens_as_plain_numbers():
    networks = make_networks(token_spec(), 1, NetworkConfig())
    observations = torch.from_numpy(random_observations(token_spec(), 3, 7))
    assert networks.initial_inference(observations).policy_logits.shape == (3, 24)


def test_a_game_of_tokens_is_learnt():
    """From random games, with the rewards of what is done there, and values and actions of the best player."""
    support = {"support_min": -2, "support_max": 2, "support_size": 5}
    networks = make_sequence(stirred=False, embedding_size=32, **support).train()
    rng = np.random.default_rng(0)
    optimizer = torch.optim.Adam(networks.parameters(), lr=3e-3)
    for _ in range(120):
        rows = [make_row(rng) for _ in range(32)]
        *batch, rewards = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        training(*batch, *networks.functions, target_rewards=rewards, optimizer=optimizer)
    networks.eval()
    search = SearchConfig(num_simulations=16)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        steps = acting(Seek(seed), *networks.functions, search=search, temperature=0, noise=False, rng=rng)
        assert sum(step.reward for step in steps) == 2
        with torch.no_grad():
            value = networks.value(networks.representation(steps[0].observation[None, None]))
        assert value.item() == pytest.approx(2, abs=0.3)


def make_row(rng):
    """A position of a random game, K = 1: observation, policies, actions, returns (discount 1), rewards."""
    game = Seek(int(rng.integers(2**31)))
    observation, left = game.initial_state(), 2
    if rng.random() < 0.5:
        left, observation = 1, game.step(rng.choice(np.flatnonzero(game.mask())))[1]
    best = 2 * int((observation[:, 0] == observation[0, 3]).argmax())
    choices = np.flatnonzero(game.mask())
    action = best + int(rng.integers(2)) if rng.random() < 0.5 else int(rng.choice(choices))
    policies = np.zeros((2, 24), np.float32)
    policies[0, best] = 1
    returns, rewards = np.zeros((2, 2), np.float32)
    returns[:], rewards[0] = (left, left - 1), game.step(action)[0]
    return observation[None], policies, np.array([action, 0]), returns, rewards


@pytest.mark.parametrize(("batch", "longest"), [(1, 1), (5, 12), (33, 9)])
@pytest.mark.parametrize(
    "options", [{"num_blocks": 0}, {"num_blocks": 1}, {"num_blocks": 2, "num_heads": 2}], ids=str
)
def test_inference_without_torch_gives_the_answers_of_the_module(batch, longest, options):
    spec = token_spec(12)
    networks = make_sequence(spec, hidden_sizes=(8, 4), **options)
    observations = random_observations(spec, batch, longest)
    fast, slow = SequenceInference(networks), TorchInference(networks)
    num_nodes = 5
    for ours, theirs in zip(
        fast.initial(observations, num_nodes), slow.initial(observations, num_nodes), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    rng = np.random.default_rng(0)
    for child in range(1, num_nodes):  # each row goes on from a node of its own choice
        parents = rng.integers(0, child, batch).astype(np.int32)
        actions = rng.integers(0, spec.num_actions, batch).astype(np.int32)
        children = np.full(batch, child, np.int32)
        ours, theirs = fast.expand(parents, actions, children), slow.expand(parents, actions, children)
        np.testing.assert_allclose(ours.rewards, theirs.rewards, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(ours.prior_logits, theirs.prior_logits, rtol=1e-4, atol=2e-5)


def test_the_exponential_is_exact_in_float32():
    numbers = np.concatenate([np.linspace(-86, 0, 1001), [-1e9]]).astype(np.float32)
    x, powers = numbers.copy() + 1, np.empty_like(numbers)
    exponentiate(x, np.ones_like(x), powers, powers.view(np.int32))
    np.testing.assert_allclose(x[:-1], np.exp(numbers[:-1].astype(np.float64)), rtol=1e-5)
    assert x[-1] < 1e-37
