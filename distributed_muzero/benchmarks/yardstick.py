"""The two networks that searches are compared on, as small as their games need, so that the tree shows.

    E64   CartPole's size, 50 simulations: representation 4→64→64, transition (64+2)→64→64, reward and value
          64→64→21, policy 64→64→2
    T64   tic-tac-toe's size, 200 simulations, two players: 27→64→64, (64+9)→64→64, 64→64→21, 64→64→9

ReLU, min-max normalised embedding, categorical values over −10…10 in units of h(x).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from distributed_muzero.config import NetworkConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.networks.mlp import MLP

CARTPOLE = EnvironmentSpec("CartPole-v1", (4,), np.dtype(np.float32), (2,))
TICTACTOE = EnvironmentSpec("tic_tac_toe", (3, 3, 3), np.dtype(np.float32), (9,), num_players=2)
E64 = NetworkConfig(embedding_size=64, hidden_sizes=(64,), support_min=-10, support_max=10, support_size=21)


class Yardstick(NamedTuple):
    spec: EnvironmentSpec
    simulations: int
    discount: float  # of an edge in the search


YARDSTICKS = {"E64": Yardstick(CARTPOLE, 50, 0.997), "T64": Yardstick(TICTACTOE, 200, -1.0)}


def make_network(spec: EnvironmentSpec, seed: int = 0) -> MLP:
    """Random weights in every layer: heads that start from zero would grow the same tree everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = MLP(spec, 1, E64)
        for layer in linear_layers(networks):
            layer.reset_parameters()
    return networks


def make_e64(seed: int = 0) -> MLP:
    return make_network(CARTPOLE, seed)


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


def make_observations(batch: int, seed: int = 0, spec: EnvironmentSpec = CARTPOLE) -> np.ndarray:
    """[B, 1, *O] float32, normally distributed: of the size that CartPole's are."""
    shape = batch, 1, *spec.observation_shape
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
