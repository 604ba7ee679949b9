import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from distributed_muzero import training
from distributed_muzero.algorithm.losses import LossWeights
from distributed_muzero.algorithm.returns import n_step_returns
from distributed_muzero.algorithm.training import collect_parameters, training_step
from distributed_muzero.config import NetworkConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import ContractError, NonFiniteError
from distributed_muzero.networks.registry import make_networks

GLOBAL_LAYER = nn.Linear(1, 1)


def data(num_rows=2, history_length=1, num_unroll_steps=2, num_actions=3):
    generator = torch.Generator().manual_seed(0)
    width = num_unroll_steps + 1
    return (
        torch.randn(num_rows, history_length, 4, generator=generator),
        torch.softmax(torch.randn(num_rows, width, num_actions, generator=generator), -1),
        torch.randint(0, num_actions, (num_rows, width), generator=generator),
        torch.randn(num_rows, width, generator=generator),
    )


class Model(nn.Module):
    """Five small functions over one shared trunk."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 4)
        self.heads = nn.ModuleDict(
            {"reward": nn.Linear(7, 1), "value": nn.Linear(4, 1), "policy": nn.Linear(4, 3)}
        )
        self.functions = (self.h, self.g_r, self.g_s, self.f_v, self.f_p)

    def h(self, o):
        return self.trunk(o[:, -1])

    def g_r(self, s, a):
        return self.heads["reward"](torch.cat([s, nn.functional.one_hot(a, 3)], 1))

    def g_s(self, s, a):
        return self.trunk(s)

    def f_v(self, s):
        return self.heads["value"](s)

    def f_p(self, s):
        return self.heads["policy"](s)


def model(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model()


def weights_of(networks):
    return torch.cat([p.detach().flatten() for p in networks.parameters()])


def test_loss_is_the_mean_over_the_mini_batch():
    # The value is 0 everywhere: rows cost ¼·(1² + 0) and ¼·(3² + 1·1²), the rest is learnt already.
    zero = torch.zeros(1, requires_grad=True)
    loss = training(
        torch.ones(2, 1, 1),
        torch.zeros(2, 2, 2),
        torch.zeros(2, 2, dtype=torch.long),
        torch.tensor([[1.0, 0.0], [3.0, 1.0]]),
        lambda o: zero * o[:, -1],
        lambda s, a: s[:, 0],
        lambda s, a: s,
        lambda s: s[:, 0],
        lambda s: s.expand(-1, 2),
        target_rewards=torch.zeros(2, 2),
    )
    assert loss == pytest.approx((0.25 * 1 + 0.25 * 10) / 2)


@pytest.mark.parametrize("discount", [0.5, -1.0])
def test_implied_reward_target_is_exact_for_monte_carlo_returns(discount):
    """z_t − γ z_{t+1} is u_t, so both calls do the same to the weights; γ is negative where players alternate."""
    rewards = np.array([1.0, 2.0, 4.0])
    to_play = np.arange(4) % 2 if discount < 0 else None
    returns = n_step_returns(rewards, np.zeros(4), abs(discount), 100, to_play)
    observations, policies, actions, _ = data(1)
    z = torch.tensor(returns[None, :3])
    u = torch.tensor(rewards[None], dtype=torch.float32)
    given, implied = model(), model()
    loss_given = training(
        observations, policies, actions, z, *given.functions, target_rewards=u, discount=discount
    )
    loss_implied = training(observations, policies, actions, z, *implied.functions, discount=discount)
    assert loss_given == loss_implied and torch.equal(weights_of(given), weights_of(implied))


def test_the_last_reward_target_is_never_learnt_so_it_needs_no_return_behind_it():
    a, b = model(), model()
    rewards = torch.ones(2, 3)
    other = rewards.clone()
    other[:, -1] = 1000
    training(*data(), *a.functions, target_rewards=rewards)
    training(*data(), *b.functions, target_rewards=other)
    assert torch.equal(weights_of(a), weights_of(b))


def test_two_calls_without_optimizer_are_two_steps_of_one_adam():
    """A new optimizer at each call would forget Adam's moments and step differently."""
    implicit, explicit = model(), model()
    adam = torch.optim.Adam(explicit.parameters(), lr=1e-3)
    for _ in range(3):
        training(*data(), *implicit.functions)
        training(*data(), *explicit.functions, optimizer=adam)
    torch.testing.assert_close(weights_of(implicit), weights_of(explicit), rtol=0, atol=1e-7)


def test_two_models_do_not_share_an_optimizer():
    first, second, alone = model(1), model(2), model(2)
    training(*data(), *first.functions)
    training(*data(), *second.functions)
    training(*data(), *alone.functions)
    assert torch.equal(weights_of(second), weights_of(alone))


def test_an_optimizer_decides_what_is_learnt():
    networks = model()
    before = copy.deepcopy(networks)
    optimizer = torch.optim.SGD(networks.heads["value"].parameters(), lr=0.1)
    for _ in range(2):
        training(*data(), *networks.functions, optimizer=optimizer)
    assert torch.equal(networks.trunk.weight, before.trunk.weight)
    assert not torch.equal(networks.heads["value"].weight, before.heads["value"].weight)


def test_the_callers_own_mixed_precision_is_left_alone():
    net = model()
    seen = []

    def h(o):
        seen.append(net.h(o).dtype)
        return net.h(o)

    with torch.autocast("cpu", torch.bfloat16):
        training(*data(), h, *net.functions[1:])
    assert seen == [torch.bfloat16]


def test_clipping_looks_at_the_gradients_of_this_call_alone():
    """Parameters outside the given optimizer gather gradients for ever; they mustn't shrink what is learnt."""
    fresh, old = model(), model()
    for parameter in old.trunk.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    for networks in (fresh, old):
        training(*data(), *networks.functions, optimizer=torch.optim.SGD(networks.heads.parameters(), lr=0.1))
    assert torch.equal(weights_of(fresh), weights_of(old))


def in_module(layer):
    return layer


def in_bound_method_of_a_module(layer):
    return layer.forward


def in_bound_method_of_a_plain_object(layer):
    class Plain:
        def __init__(self):
            self.parts = {"layer": [layer]}

        def h(self, o):
            return self.parts["layer"][0](o)

    return Plain().h


def in_callable_object(layer):
    class Caller:
        def __init__(self):
            self.layer = layer

        def __call__(self, o):
            return self.layer(o)

    return Caller()


def in_closure_over_a_module(layer):
    return lambda o: layer(o)


def in_closure_over_tensors(layer):
    weight, bias = layer.weight, layer.bias
    return lambda o: o * weight + bias


def in_closure_over_a_namespace(layer):
    space = SimpleNamespace(layer=layer)
    return lambda o: space.layer(o)


def in_function_called_by_a_function(layer):
    def inner(o):
        return layer(o)

    def outer(o):
        return inner(o)

    return outer


def in_default_argument(layer):
    return lambda o, layer=layer: layer(o)


def in_partial(layer):
    return partial(lambda layer, o: layer(o), layer)


def in_partial_by_keyword(layer):
    return partial(lambda o, layer: layer(o), layer=layer)


@pytest.mark.parametrize(
    "wrap",
    [
        in_module,
        in_bound_method_of_a_module,
        in_bound_method_of_a_plain_object,
        in_callable_object,
        in_closure_over_a_module,
        in_closure_over_tensors,
        in_closure_over_a_namespace,
        in_function_called_by_a_function,
        in_default_argument,
        in_partial,
        in_partial_by_keyword,
    ],
)
def test_parameters_are_found(wrap):
    layer = nn.Linear(1, 1)
    found = collect_parameters(wrap(layer))
    assert {id(p) for p in found} == {id(layer.weight), id(layer.bias)}


def test_parameters_of_globals_are_found():
    assert {id(p) for p in collect_parameters(lambda o: GLOBAL_LAYER(o))} == {
        id(p) for p in GLOBAL_LAYER.parameters()
    }


def test_shared_parameters_are_counted_once():
    networks = model()
    found = collect_parameters(*networks.functions)
    assert len(found) == len(set(map(id, found))) == len(list(networks.parameters()))


def test_frozen_and_computed_tensors_are_no_parameters():
    frozen, leaf = torch.ones(1), torch.ones(1, requires_grad=True)
    computed = leaf * 2
    assert collect_parameters(lambda o: o * frozen * computed) == []


def test_networks_without_parameters_are_an_error_that_says_where_they_are_looked_for():
    with pytest.raises(ContractError, match="no trainable parameter"):
        training(*data(), *[lambda *x: torch.zeros(2, 3)] * 5)


@pytest.mark.parametrize(
    ("place", "change", "says"),
    [
        (0, lambda x: x[:1], "observations must be"),
        (1, lambda x: x[:, :1], "target_policies must be"),
        (1, lambda x: x[..., 0], "target_policies must be"),
        (2, lambda x: x.float(), "target_actions must be integers"),
        (2, lambda x: x + 3, "target_actions must lie in 0…2"),
        (2, lambda x: x - 9, "target_actions must lie in 0…2"),
        (3, lambda x: x[:, :1], "target_returns must be"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(place, change, says):
    batch = list(data())
    batch[place] = change(batch[place])
    with pytest.raises(ContractError, match=says):
        training(*batch, *model().functions)


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("ours", [False, True])
def test_nan_in_a_batch_is_an_error_and_changes_no_weight(place, number, ours):
    spec = EnvironmentSpec("t", (4,), np.dtype(np.float32), (3,))
    networks = make_networks(spec, 1, NetworkConfig(hidden_sizes=(4,))) if ours else model()
    functions = networks.functions
    batch = list(data())
    batch[place].view(-1)[0] = number
    before = weights_of(networks)
    with pytest.raises(NonFiniteError):
        training(*batch, *functions)
    assert torch.equal(weights_of(networks), before)


def test_exploding_loss_is_an_error_and_changes_no_weight():
    networks = model()
    observations, *targets = data()
    before = weights_of(networks)
    with pytest.raises(NonFiniteError, match="left as they were"):
        training(observations * 1e30, *targets, *networks.functions)
    assert torch.equal(weights_of(networks), before)
    assert np.isfinite(training(*data(), *networks.functions))


def test_importance_weights_choose_which_rows_are_learnt():
    both, first = model(), model()
    batch = data()
    training(*batch, *both.functions, importance_weights=torch.tensor([2.0, 0.0]))
    training(*(x[:1] for x in batch), *first.functions)
    torch.testing.assert_close(weights_of(both), weights_of(first), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_unroll_steps", [0, 1, 4])
def test_the_number_of_unrolled_steps_is_read_from_the_actions(num_unroll_steps):
    calls = []
    networks = model()
    h, g_r, g_s, f_v, f_p = networks.functions

    def counted(s, a):
        calls.append(len(s))
        return g_s(s, a)

    training(*data(num_rows=3, num_unroll_steps=num_unroll_steps), h, g_r, counted, f_v, f_p)
    assert calls == [3] * num_unroll_steps


def test_a_step_that_others_break_off_leaves_running_statistics_as_they_were():
    norm = nn.BatchNorm1d(2)
    before = copy.deepcopy(norm.state_dict())

    def lost_half_way(networks, inputs, importance_weights, weights):
        networks(torch.randn(8, 2))
        raise ConnectionError("a device is gone")

    batch = data()
    targets = (batch[0], batch[2], batch[1], batch[3], torch.zeros_like(batch[3]))
    optimizer = torch.optim.SGD(norm.parameters(), lr=1.0)
    with pytest.raises(ConnectionError):
        training_step(
            norm, targets, None, optimizer, list(norm.parameters()), LossWeights(), 5.0, lost_half_way
        )
    assert all(torch.equal(norm.state_dict()[name], kept) for name, kept in before.items())
