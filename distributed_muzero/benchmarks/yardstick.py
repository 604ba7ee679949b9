"""E64, the network that searches are compared on: as small as CartPole needs, so that the tree shows.

Representation 4→64→64, transition (64+2)→64→64, reward and value 64→64→21, policy 64→64→2; ReLU, min-max
normalised embedding, categorical values over −10…10 in units of h(x).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from distributed_muzero.config import NetworkConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.networks.mlp import MLP

CARTPOLE = EnvironmentSpec("CartPole-v1", (4,), np.dtype(np.float32), (2,))
E64 = NetworkConfig(embedding_size=64, hidden_sizes=(64,), support_min=-10, support_max=10, support_size=21)


def make_e64(seed: int = 0) -> MLP:
    """E64 with random weights in every layer: heads that start from zero would grow the same tree everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = MLP(CARTPOLE, 1, E64)
        for layer in linear_layers(networks):
            layer.reset_parameters()
    return networks


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def multiply_adds(networks: MLP) -> int:
    """Of one recurrent call (transition, reward, value, policy) for one row."""
    parts = (
        networks.transition_layers,
        networks.reward_layers,
        networks.value_layers,
        networks.policy_layers,
    )
    return sum(layer.weight.numel() for part in parts for layer in linear_layers(part))


def make_observations(batch: int, seed: int = 0) -> np.ndarray:
    """[B, 1, 4] float32, of the size that CartPole's are."""
    return np.random.default_rng(seed).normal(size=(batch, 1, 4)).astype(np.float32)
