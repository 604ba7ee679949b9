"""The loss of MuZero over an unrolled model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distributed_muzero.algorithm.value_transform import cross_entropy
from distributed_muzero.networks.base import Networks

DYNAMICS_GRADIENT_SCALE = 0.5


class LossWeights(NamedTuple):
    value: float = 0.25
    reward: float = 1.0
    policy: float = 1.0


class Losses(NamedTuple):
    """Each [M]: one number a row; steps k ≥ 1 are scaled by 1/K (contract, decision 12)."""

    total: Tensor
    value: Tensor
    reward: Tensor
    policy: Tensor
    value_errors: Tensor  # |v⁰ − z_t|, unscaled: the row's priority


def unroll_losses(
    networks: Networks,
    observations: Tensor,
    actions: Tensor,
    target_policies: Tensor,
    target_returns: Tensor,
    target_rewards: Tensor,
    weights: LossWeights,
) -> Losses:
    """Loss of the model unrolled along a_t … a_{t+K−1}   (contract, decisions 6 and 12).

    observations [M, N, *O], actions [M, K+1], target_policies [M, K+1, A], target_returns [M, K+1],
    target_rewards [M, K+1] u_t … u_{t+K}. Values and policies are learnt at k = 0…K, rewards at k = 1…K, where
    r_t^k is learnt from u_{t+k−1}. Only the transition is sequential: every head sees all its steps in one call.
    """
    num_rows, num_unroll_steps = len(observations), actions.shape[1] - 1
    if networks.compute_dtype == torch.float32:
        value_output, logits, reward_output = unroll(networks, observations, actions)
    else:
        with torch.autocast(observations.device.type, networks.compute_dtype):
            outputs = unroll(networks, observations, actions)
        value_output, logits, reward_output = (output.float() for output in outputs)
    scale = torch.ones(num_unroll_steps + 1, 1, dtype=target_returns.dtype, device=target_returns.device)
    scale[1:] /= max(num_unroll_steps, 1)

    def by_row(loss: Tensor, scale: Tensor) -> Tensor:
        return (loss.view(-1, num_rows) * scale).sum(0)

    value = by_row(networks.value_head.loss(value_output, flat(target_returns)), scale)
    with torch.no_grad():
        value_errors = (networks.value_head.decode(value_output[:num_rows]) - target_returns[:, 0]).abs()
    policy = by_row(cross_entropy(logits, flat(target_policies)), scale)
    if num_unroll_steps:
        reward = by_row(networks.reward_head.loss(reward_output, flat(target_rewards[:, :-1])), scale[1:])
    else:
        reward = torch.zeros_like(value)
    return Losses(
        weights.value * value + weights.reward * reward + weights.policy * policy,
        value,
        reward,
        policy,
        value_errors,
    )


def unroll(networks: Networks, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the heads give along the actions: values and policies of k = 0…K, [(K+1)·M, …], rewards of k = 1…K.

    Rows of one k lie together, as `flat` orders targets.
    """
    embeddings = [networks.representation(observations)]
    inputs: list[Tensor] = []
    for k in range(actions.shape[1] - 1):
        inputs.append(scale_gradient(embeddings[-1], DYNAMICS_GRADIENT_SCALE))
        embeddings.append(networks.transition(inputs[-1], actions[:, k]))
    everything = torch.cat(embeddings)
    reward_output = everything.new_empty(0)
    if inputs:
        following = everything[len(observations) :]
        reward_output = networks.reward_output(torch.cat(inputs), flat(actions[:, :-1]), following)
    return networks.value_output(everything), networks.policy(everything), reward_output


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x itself, whose gradient is multiplied by `scale` on the way back."""
    return torch.lerp(x.detach(), x, scale)


def flat(target: Tensor) -> Tensor:
    """[M, K, …] -> [K·M, …], the order of the concatenated steps."""
    return target.transpose(0, 1).flatten(0, 1)
