"""Losses and gradients worked by hand on networks of one or two numbers (contract, decisions 6 and 12)."""

import pytest
import torch

from distributed_muzero.algorithm.losses import LossWeights, scale_gradient, unroll_losses
from distributed_muzero.networks.base import FunctionNetworks

ALL_ONE = LossWeights(1, 1, 1)


def no_reward(s, a):
    return torch.zeros(len(s))


def one_action(s):
    return torch.zeros(len(s), 1)


def losses_of(functions, observations, actions, returns, rewards=None, policies=None, weights=ALL_ONE):
    actions = torch.tensor(actions)
    returns = torch.tensor(returns)
    return unroll_losses(
        FunctionNetworks(*functions),
        torch.tensor(observations),
        actions,
        torch.zeros(*actions.shape, 1) if policies is None else torch.tensor(policies),
        returns,
        torch.zeros_like(returns) if rewards is None else torch.tensor(rewards),
        weights,
    )


def test_steps_see_the_actions_and_targets_of_their_own_time_and_row():
    # The embedding writes the actions down as digits: s⁰ = o, s¹ = 10·o + a_t, s² = 100·o + 10·a_t + a_{t+1}.
    functions = (
        lambda o: o[:, -1],
        lambda s, a: 1000 * s[:, 0] + a,
        lambda s, a: 10 * s + a[:, None],
        lambda s: s[:, 0],
        one_action,
    )
    actions = [[3, 4, 9], [7, 0, 9]]  # the last action, a_{t+2}, is never used
    returns = [[1.0, 13.0, 134.0], [2.0, 27.0, 270.0]]
    rewards = [
        [1003.0, 13004.0, -1.0],
        [2007.0, 27000.0, -1.0],
    ]  # r¹ from u_t, r² from u_{t+1}; u_{t+2} is unused
    losses = losses_of(functions, [[[1.0]], [[2.0]]], actions, returns, rewards)
    assert losses.total.tolist() == [0, 0]

    returns[1][2] += 2  # one wrong return in the second row, at k = 2: its square, halved by 1/K
    rewards[0][1] += 3  # one wrong reward in the first row, at k = 2
    losses = losses_of(functions, [[[1.0]], [[2.0]]], actions, returns, rewards)
    assert losses.value.tolist() == [0, 2] and losses.reward.tolist() == [4.5, 0]


def test_policies_are_learnt_at_every_step_with_one_over_k_from_the_first_unrolled_on():
    functions = (
        lambda o: o[:, -1],
        no_reward,
        lambda s, a: s,
        lambda s: s[:, 0],
        lambda s: torch.zeros(len(s), 4),
    )
    target = [[[1.0, 0, 0, 0], [0, 0.5, 0.5, 0], [0.25, 0.25, 0.25, 0.25]]]
    losses = losses_of(functions, [[[0.0]]], [[0, 0, 0]], [[0.0, 0, 0]], policies=target)
    # Each step costs ln 4 against flat logits: 1 + ½ + ½ of it.
    assert losses.policy.tolist() == pytest.approx([2 * torch.log(torch.tensor(4.0)).item()])


def test_an_all_zero_policy_row_costs_nothing():
    functions = (
        lambda o: o[:, -1],
        no_reward,
        lambda s, a: s,
        lambda s: s[:, 0],
        lambda s: torch.ones(len(s), 4),
    )
    assert losses_of(
        functions, [[[0.0]]], [[0, 0]], [[0.0, 0]], policies=[[[0.0] * 4] * 2]
    ).policy.tolist() == [0]


def test_gradients_of_two_unrolled_steps_by_hand():
    # s⁰ = w·o, sᵏ = v·sᵏ⁻¹, value = s; everything is 1 and the targets are 0, so L = 1 + ½(1 + 1) = 2.
    w, v = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    functions = (lambda o: w * o[:, -1], no_reward, lambda s, a: v * s, lambda s: s[:, 0], one_action)
    losses = losses_of(functions, [[[1.0]]], [[0, 0, 0]], [[0.0, 0, 0]])
    assert losses.total.tolist() == [2]
    losses.total.sum().backward()
    # dL/ds² = ½·2 = 1;  dL/ds¹ = ½·2 + ½·1 = 1.5;  dL/ds⁰ = 2 + ½·1.5 = 2.75
    assert w.grad.item() == pytest.approx(2.75)
    # dL/dv = dL/ds¹·s⁰ + dL/ds²·s¹
    assert v.grad.item() == pytest.approx(2.5)


def test_the_reward_sends_half_its_gradient_into_the_embedding_it_starts_from():
    # r¹ = x·s⁰ with K = 1, target 0: L = r², dL/dr = 2, so dx = 2·s⁰ in full and dw = ½·2·x·o.
    w, x = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    functions = (
        lambda o: w * o[:, -1],
        lambda s, a: x * s[:, 0],
        lambda s, a: s,
        lambda s: 0 * s[:, 0],
        one_action,
    )
    losses_of(functions, [[[1.0]]], [[0, 0]], [[0.0, 0]]).reward.sum().backward()
    assert (x.grad.item(), w.grad.item()) == pytest.approx((2, 1))


def test_scaled_gradient_leaves_the_number_as_it_is():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = scale_gradient(x, 0.5)
    assert torch.equal(x, y)
    y.sum().backward()
    assert (x.grad == 0.5).all()


def test_no_unrolled_step_learns_value_and_policy_of_the_root_only():
    functions = (lambda o: o[:, -1], no_reward, lambda s, a: s, lambda s: s[:, 0], one_action)
    losses = losses_of(functions, [[[3.0]]], [[0]], [[1.0]], rewards=[[7.0]])
    assert losses.value.tolist() == [4] and losses.reward.tolist() == [0]


def test_weights_multiply_their_part():
    functions = (
        lambda o: o[:, -1],
        lambda s, a: torch.ones(len(s)),
        lambda s, a: s,
        lambda s: s[:, 0],
        lambda s: torch.zeros(len(s), 2),
    )
    policies = [[[1.0, 0.0], [0.0, 0.0]]]
    losses = losses_of(
        functions, [[[2.0]]], [[0, 0]], [[0.0, 2]], policies=policies, weights=LossWeights(0.25, 3, 2)
    )
    # value 2² at the root, reward 1², policy ln 2
    assert losses.total.tolist() == pytest.approx([0.25 * 4 + 3 * 1 + 2 * 0.6931472])
