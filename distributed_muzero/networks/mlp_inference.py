"""The MLP's initial and recurrent inference on a CPU without torch: a few BLAS calls with fused kernels between them.

At the sizes that a search on a CPU uses, calling an operation costs more than its arithmetic. So bias, ReLU,
normalisation and decoding are one compiled kernel each, the heads' first layers are one product, and every array
is allocated once for a batch size. A test holds these answers to those of the torch module.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import njit

from distributed_muzero.algorithm.value_transform import EPSILON
from distributed_muzero.networks.normalizer import LIMIT
from distributed_muzero.search.simulate import Expansion

if TYPE_CHECKING:
    from distributed_muzero.networks.mlp import MLP

NORMALIZE_EPSILON = np.float32(1e-5)


class Layer(NamedTuple):
    weight: np.ndarray  # [inputs, outputs] float32
    bias: np.ndarray  # [outputs] float32


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
        self.representation = _layers(networks.representation_layers)
        transition = _layers(networks.transition_layers)
        first = transition[0].weight
        self.embedding_size = len(first) - self.num_actions
        # One-hot action times its rows of the first weight is one row of the weight: added with the bias.
        self.action_rows = np.ascontiguousarray(first[self.embedding_size :] + transition[0].bias)
        self.transition = [
            Layer(np.ascontiguousarray(first[: self.embedding_size]), transition[0].bias),
            *transition[1:],
        ]
        heads = [_layers(m) for m in (networks.reward_layers, networks.value_layers, networks.policy_layers)]
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
        _gather(scratch.embeddings, parents, scratch.parents)
        x = scratch.parents
        last = len(self.transition) - 1
        for index, (layer, out) in enumerate(zip(self.transition, scratch.transition, strict=True)):
            np.dot(x, layer.weight, out=out)
            if index == 0:
                _add_rows(out, self.action_rows, actions, index < last)
            else:
                _add_bias(out, layer.bias, index < last)
            x = out
        _normalize_and_store(x, scratch.embeddings, children)
        return self._predict(scratch, x)

    def _predict(self, scratch: _Scratch, embeddings: np.ndarray) -> Expansion:
        np.dot(embeddings, self.trunk.weight, out=scratch.trunk)
        _add_bias(scratch.trunk, self.trunk.bias, bool(self.heads[0]))
        outputs = []
        start = 0
        for head, buffers, end in zip(self.heads, scratch.heads, self.trunk_ends, strict=True):
            x = scratch.trunk[:, start:end]
            start = end
            for index, (layer, out) in enumerate(zip(head, buffers, strict=True)):
                np.dot(x, layer.weight, out=out)
                _add_bias(out, layer.bias, index + 1 < len(head))
                x = out
            outputs.append(x)
        _decode(outputs[0], self.support, scratch.rewards)
        _decode(outputs[1], self.support, scratch.values)
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


def _layers(module: Iterable[Any]) -> list[Layer]:
    linears = [part for part in module if hasattr(part, "weight")]
    return [
        Layer(
            np.array(part.weight.detach().cpu().numpy().T, np.float32, order="C"),
            part.bias.detach().cpu().numpy().astype(np.float32),
        )
        for part in linears
    ]


@njit(cache=True)
def _gather(embeddings, parents, out):
    for row in range(len(parents)):
        out[row] = embeddings[parents[row], row]


@njit(cache=True, fastmath={"reassoc", "contract", "nsz"})
def _add_rows(x, rows, actions, relu):
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            y = x[b, i] + rows[actions[b], i]
            x[b, i] = max(y, np.float32(0)) if relu else y


@njit(cache=True, fastmath={"reassoc", "contract", "nsz"})
def _add_bias(x, bias, relu):
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            y = x[b, i] + bias[i]
            x[b, i] = max(y, np.float32(0)) if relu else y


@njit(cache=True, fastmath={"reassoc", "contract", "nsz"})
def _normalize_and_store(x, embeddings, children):
    for b in range(x.shape[0]):
        low = high = x[b, 0]
        for i in range(x.shape[1]):
            low = min(low, x[b, i])
            high = max(high, x[b, i])
        scale = np.float32(1) / (high - low + NORMALIZE_EPSILON)
        for i in range(x.shape[1]):
            x[b, i] = (x[b, i] - low) * scale
        embeddings[children[b], b] = x[b]


@njit(cache=True, fastmath={"reassoc", "contract", "nsz"})
def _decode(logits, support, out):
    """h⁻¹(softmax(logits) · support) of each row."""
    epsilon = np.float32(EPSILON)
    for b in range(logits.shape[0]):
        high = logits[b, 0]
        for i in range(logits.shape[1]):
            high = max(high, logits[b, i])
        total = np.float32(0)
        mean = np.float32(0)
        for i in range(logits.shape[1]):
            weight = np.exp(logits[b, i] - high)
            total += weight
            mean += weight * support[i]
        y = mean / total
        shifted = abs(y) + 1 + epsilon
        root = 2 * shifted / (np.sqrt(1 + 4 * epsilon * shifted) + 1)
        out[b] = np.sign(y) * (root * root - 1)
