"""The MLP's initial and recurrent inference on a CPU without torch: a few BLAS calls with fused kernels between them.

At the sizes that a search on a CPU uses, calling an operation costs more than its arithmetic. So bias, ReLU,
normalisation and decoding are one compiled kernel each, the heads' first layers are one product, and every array
is allocated once for a batch size. A test holds these answers to those of the torch module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from distributed_muzero.networks.kernels import (
    NORMALIZE_EPSILON,
    Layer,
    add_bias,
    add_rows,
    apply_layers,
    decode,
    gather,
    linear_layers,
    normalize_and_store,
)
from distributed_muzero.networks.normalizer import LIMIT
from distributed_muzero.search.simulate import Expansion

if TYPE_CHECKING:
    from distributed_muzero.networks.mlp import MLP


class _Scratch:
    """Arrays for one batch size and number of nodes."""

    def __init__(self, model: MLPInference, batch: int, num_nodes: int):
        self.embeddings = np.empty((num_nodes, batch, model.embedding_size), np.float32)
        self.parents = np.empty((batch, model.embedding_size), np.float32)
        self.transition = [np.empty((batch, len(layer.bias)), np.float32) for layer in model.transition]
        self.trunk = np.empty((batch, len(model.trunk.bias)), np.float32)
        self.heads = [
            [np.empty((batch, len(layer.bias)), np.float32) for layer in head] for head in model.heads
        ]
        self.rewards = np.empty(batch, np.float32)
        self.values = np.empty(batch, np.float32)


class MLPInference:
    """A snapshot of an MLP's weights that keeps the embeddings of a search by (node, row)."""

    def __init__(self, networks: MLP):
        self.input_mean, self.input_scale = _input_statistics(networks)
        self.num_actions = networks.num_actions
        self.representation = linear_layers(networks.representation_layers)
        transition = linear_layers(networks.transition_layers)
        first = transition[0].weight
        self.embedding_size = len(first) - self.num_actions
        # One-hot action times its rows of the first weight is one row of the weight: added with the bias.
        self.action_rows = np.ascontiguousarray(first[self.embedding_size :] + transition[0].bias)
        self.transition = [
            Layer(np.ascontiguousarray(first[: self.embedding_size]), transition[0].bias),
            *transition[1:],
        ]
        heads = [
            linear_layers(m) for m in (networks.reward_layers, networks.value_layers, networks.policy_layers)
        ]
        self.trunk = Layer(
            np.ascontiguousarray(np.concatenate([head[0].weight for head in heads], 1)),
            np.concatenate([head[0].bias for head in heads]),
        )
        self.heads = [head[1:] for head in heads]  # empty where the trunk is all there is (no hidden layer)
        self.trunk_ends = np.cumsum([len(head[0].bias) for head in heads]).tolist()
        support = networks.value_head
        self.support = np.linspace(support.low, support.high, support.size, dtype=np.float32)
        self._scratch: _Scratch | None = None

    def initial(self, observations: np.ndarray, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts a search over [B, N, *O] with room for `num_nodes`: root values [B], policy logits [B, A]."""
        batch = len(observations)
        if self._scratch is None or self._scratch.embeddings.shape[:2] != (num_nodes, batch):
            self._scratch = _Scratch(self, batch, num_nodes)
        x = self._features(observations)
        for index, (weight, bias) in enumerate(self.representation):
            x = x @ weight + bias
            if index + 1 < len(self.representation):
                np.maximum(x, 0, out=x)
        low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
        self._scratch.embeddings[0] = (x - low) / (high - low + NORMALIZE_EPSILON)
        answer = self._predict(self._scratch, np.ascontiguousarray(self._scratch.embeddings[0]))
        return answer.values.copy(), answer.prior_logits.copy()

    def expand(self, parents: np.ndarray, actions: np.ndarray, children: np.ndarray) -> Expansion:
        """One recurrent inference for every row. The answer's arrays are valid until the next call."""
        scratch = self._scratch
        assert scratch is not None, "initial() comes first"
        gather(scratch.embeddings, parents, scratch.parents)
        x = scratch.parents
        last = len(self.transition) - 1
        for index, (layer, out) in enumerate(zip(self.transition, scratch.transition, strict=True)):
            np.dot(x, layer.weight, out=out)
            if index == 0:
                add_rows(out, self.action_rows, actions, index < last)
            else:
                add_bias(out, layer.bias, index < last)
            x = out
        normalize_and_store(x, scratch.embeddings, children)
        return self._predict(scratch, x)

    def _predict(self, scratch: _Scratch, embeddings: np.ndarray) -> Expansion:
        np.dot(embeddings, self.trunk.weight, out=scratch.trunk)
        add_bias(scratch.trunk, self.trunk.bias, bool(self.heads[0]))
        outputs = []
        start = 0
        for head, buffers, end in zip(self.heads, scratch.heads, self.trunk_ends, strict=True):
            outputs.append(apply_layers(scratch.trunk[:, start:end], head, buffers))
            start = end
        decode(outputs[0], self.support, scratch.rewards)
        decode(outputs[1], self.support, scratch.values)
        return Expansion(scratch.rewards, scratch.values, outputs[2])

    def _features(self, observations: np.ndarray) -> np.ndarray:
        flat = observations.reshape(len(observations), -1).astype(np.float32)
        return np.clip((flat - self.input_mean) * self.input_scale, -LIMIT, LIMIT)


def _input_statistics(networks: MLP) -> tuple[np.ndarray, np.ndarray]:
    """What is subtracted from the inputs and what they are multiplied by; both [I], or [1] for bytes."""
    if networks.normalizer is None:
        return np.zeros(1, np.float32), np.full(1, 1 / 255, np.float32)
    mean, scale = networks.normalizer.mean, networks.normalizer.scale()
    return mean.cpu().numpy().copy(), scale.cpu().numpy()
