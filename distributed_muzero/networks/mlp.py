"""Fully connected networks for observations that are vectors (or are small enough to be flattened)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from distributed_muzero.algorithm.value_transform import CategoricalOutput
from distributed_muzero.config import NetworkConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.kernels import NORMALIZE_EPSILON
from distributed_muzero.networks.mlp_inference import MLPInference
from distributed_muzero.networks.normalizer import ObservationNormalizer


class MLP(Networks):
    """Representation, transition and three heads, each a small perceptron with ReLU.

    The transition sees the embedding and the one-hot action; the reward is read from the embedding it leads to.
    Embeddings are min-max normalised to [0, 1] in each row (MuZero, appendix G).
    """

    value_head: CategoricalOutput
    reward_head: CategoricalOutput

    def __init__(self, spec: EnvironmentSpec, history_length: int, config: NetworkConfig):
        super().__init__()
        self.num_actions = spec.num_actions
        hidden, embedding = list(config.hidden_sizes), config.embedding_size
        num_inputs = history_length
        for size in spec.observation_shape:
            num_inputs *= size
        is_bytes = spec.observation_dtype == "uint8"
        self.normalizer = None if is_bytes else ObservationNormalizer(num_inputs)
        self.value_head = self.reward_head = CategoricalOutput(
            config.support_min, config.support_max, config.support_size
        )
        self.representation_layers = perceptron([num_inputs, *hidden, embedding])
        self.transition_layers = perceptron([embedding + self.num_actions, *hidden, embedding])
        self.reward_layers = perceptron([embedding, *hidden, config.support_size], zero_last=True)
        self.value_layers = perceptron([embedding, *hidden, config.support_size], zero_last=True)
        self.policy_layers = perceptron([embedding, *hidden, self.num_actions], zero_last=True)

    def representation(self, observations: Tensor) -> Tensor:
        return min_max_normalize(self.representation_layers(self.features(observations)))

    def features(self, observations: Tensor) -> Tensor:
        """Any scale of observation to small numbers: bytes to [0, 1], the rest by its mean and variance."""
        flat = observations.flatten(1).to(torch.float32)
        return flat / 255 if self.normalizer is None else self.normalizer(flat)

    def transition(self, embeddings: Tensor, actions: Tensor) -> Tensor:
        hot = functional.one_hot(actions, self.num_actions).to(embeddings.dtype)
        return min_max_normalize(self.transition_layers(torch.cat([embeddings, hot], -1)))

    def reward_output(self, embeddings: Tensor, actions: Tensor, next_embeddings: Tensor) -> Tensor:
        return self.reward_layers(next_embeddings)

    def value_output(self, embeddings: Tensor) -> Tensor:
        return self.value_layers(embeddings)

    def policy(self, embeddings: Tensor) -> Tensor:
        return self.policy_layers(embeddings)

    def numpy_inference(self) -> MLPInference:
        return MLPInference(self)


def perceptron(sizes: Sequence[int], zero_last: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them; `zero_last` starts a head from a flat prediction."""
    layers: list[nn.Module] = []
    for num_inputs, num_outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(num_inputs, num_outputs), nn.ReLU()]
    last = layers[-2]
    if zero_last and isinstance(last, nn.Linear):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(*layers[:-1])


def min_max_normalize(embeddings: Tensor) -> Tensor:
    """(s − min s) / (max s − min s) in each row."""
    low, high = torch.aminmax(embeddings, dim=-1, keepdim=True)
    return (embeddings - low) / (high - low + NORMALIZE_EPSILON)
