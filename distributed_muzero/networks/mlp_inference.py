"""The MLP's initial and recurrent inference on a CPU without torch.

At the sizes that a search on a CPU uses, calling an operation costs more than its arithmetic. So for a few rows the
search compiles `recurrent` into its own loop. For more rows it is the same function in Python: a few BLAS calls with
fused kernels between them. Every array is allocated once for a batch size. Tests hold both to the torch module.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba.extending import register_jitable

from distributed_muzero.networks.kernels import (
    FAST,
    NORMALIZE_EPSILON,
    Layer,
    decode,
    dense,
    gather,
    linear_layers,
    normalize_and_store,
)
from distributed_muzero.networks.normalizer import LIMIT
from distributed_muzero.search.simulate import CompiledExpand, Expand, Expansion

if TYPE_CHECKING:
    from distributed_muzero.networks.mlp import MLP

# Multiply-adds of all rows in one simulation. Beyond, BLAS saves more than the calls cost: with layers of 64 from some
# 16 rows on, of 128 from 5, of 256 from 2.
MOST_COMPILED_WORK = 400_000


class Weights(NamedTuple):
    """Perceptrons, whose layers have a bias for each of R picks: [R, O]; R = 1 but in the transition's first layer."""

    transition: tuple[Layer, ...]
    reward: tuple[Layer, ...]
    value: tuple[Layer, ...]
    policy: tuple[Layer, ...]
    support: np.ndarray


class Scratch(NamedTuple):
    """Arrays for one batch size and number of nodes."""

    embeddings: np.ndarray  # [nodes, B, E]
    transition: tuple[np.ndarray, ...]  # what each layer reads: the parents' embeddings, hidden layers
    heads: tuple[np.ndarray, ...]  # the children's embeddings, the same hidden layers
    reward_logits: np.ndarray
    value_logits: np.ndarray
    first_pick: np.ndarray  # [B] zeros


@register_jitable(fastmath=FAST)
def perceptron(layers, inputs, picks, first_pick, out):
    """Writes the answer to inputs[0] [B, I] to `out` [B, O], ReLU between the layers.

    inputs: the array that each layer reads. picks [B]: which bias of the first layer a row gets.
    """
    for depth in range(len(layers)):
        is_last = depth + 1 == len(layers)
        y = out if is_last else inputs[depth + 1]
        dense(inputs[depth], layers[depth], picks if depth == 0 else first_pick, not is_last, y)


@register_jitable(fastmath=FAST)
def predict(weights, scratch, rewards, values, prior_logits):
    """What the heads say about the embeddings in scratch.heads[0]."""
    none = scratch.first_pick
    perceptron(weights.reward, scratch.heads, none, none, scratch.reward_logits)
    decode(scratch.reward_logits, weights.support, rewards)
    perceptron(weights.value, scratch.heads, none, none, scratch.value_logits)
    decode(scratch.value_logits, weights.support, values)
    perceptron(weights.policy, scratch.heads, none, none, prior_logits)


@register_jitable(fastmath=FAST)
def recurrent(arrays, parents, actions, children, rewards, values, prior_logits):
    """One recurrent inference for every row: as an Expand, but that it writes its answer to the last three."""
    weights, scratch = arrays
    gather(scratch.embeddings, parents, scratch.transition[0])
    perceptron(weights.transition, scratch.transition, actions, scratch.first_pick, scratch.heads[0])
    normalize_and_store(scratch.heads[0], scratch.embeddings, children)
    predict(weights, scratch, rewards, values, prior_logits)


class MLPInference:
    """A snapshot of an MLP's weights that keeps the embeddings of a search by (node, row)."""

    def __init__(self, networks: MLP):
        self.input_mean, self.input_scale = _input_statistics(networks)
        self.num_actions = networks.num_actions
        self.representation = linear_layers(networks.representation_layers)
        first, *rest = linear_layers(networks.transition_layers)
        self.embedding_size = len(first.weight) - self.num_actions
        # One-hot action times its rows of the first weight is one row of the weight: added with the bias.
        action_rows = np.ascontiguousarray(first.weight[self.embedding_size :] + first.bias)
        first = Layer(np.ascontiguousarray(first.weight[: self.embedding_size]), action_rows)
        support = networks.value_head
        self.weights = Weights(
            (first, *_with_one_bias(rest)),
            _with_one_bias(linear_layers(networks.reward_layers)),
            _with_one_bias(linear_layers(networks.value_layers)),
            _with_one_bias(linear_layers(networks.policy_layers)),
            np.linspace(support.low, support.high, support.size, dtype=np.float32),
        )
        perceptrons = self.weights[:4]
        self.multiply_adds = sum(layer.weight.size for layers in perceptrons for layer in layers)
        self._scratch: Scratch | None = None
        self._answer: Expansion

    def initial(self, observations: np.ndarray, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts a search over [B, N, *O] with room for `num_nodes`: root values [B], policy logits [B, A]."""
        scratch = self._make_room(len(observations), num_nodes)
        x = self._features(observations)
        for index, (weight, bias) in enumerate(self.representation):
            x = x @ weight + bias
            if index + 1 < len(self.representation):
                np.maximum(x, 0, out=x)
        low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
        scratch.heads[0][:] = scratch.embeddings[0] = (x - low) / (high - low + NORMALIZE_EPSILON)
        predict(self.weights, scratch, *self._answer[:3])
        return self._answer.values.copy(), self._answer.prior_logits.copy()

    @property
    def arrays(self) -> tuple[Weights, Scratch]:
        """What `recurrent` reads and writes, since the last `initial`."""
        assert self._scratch is not None, "initial() comes first"
        return self.weights, self._scratch

    @property
    def expand(self) -> Expand:
        """Valid until the next `initial`. The answer's arrays are valid until the next call."""
        num_nodes, batch, _ = self.arrays[1].embeddings.shape
        if batch * self.multiply_adds > MOST_COMPILED_WORK:
            return self._expand
        room = batch, num_nodes, self.num_actions
        return CompiledExpand(recurrent, self.arrays, room, self._expand)

    def _expand(self, parents: np.ndarray, actions: np.ndarray, children: np.ndarray) -> Expansion:
        recurrent(self.arrays, parents, actions, children, *self._answer[:3])
        return self._answer

    def _make_room(self, batch: int, num_nodes: int) -> Scratch:
        if self._scratch is None or self._scratch.embeddings.shape[:2] != (num_nodes, batch):
            sizes = [layer.weight.shape[1] for layer in self.weights.transition]

            def rows(size: int) -> np.ndarray:
                return np.empty((batch, size), np.float32)

            hidden = [rows(size) for size in sizes[:-1]]
            self._scratch = Scratch(
                np.empty((num_nodes, batch, self.embedding_size), np.float32),
                (rows(self.embedding_size), *hidden),
                (rows(self.embedding_size), *hidden),
                rows(len(self.weights.support)),
                rows(len(self.weights.support)),
                np.zeros(batch, np.int32),
            )
            rewards, values = np.empty((2, batch), np.float32)
            self._answer = Expansion(rewards, values, rows(self.num_actions))
        return self._scratch

    def _features(self, observations: np.ndarray) -> np.ndarray:
        flat = observations.reshape(len(observations), -1).astype(np.float32)
        return np.clip((flat - self.input_mean) * self.input_scale, -LIMIT, LIMIT)


def _with_one_bias(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    return tuple(Layer(layer.weight, layer.bias[None]) for layer in layers)


def _input_statistics(networks: MLP) -> tuple[np.ndarray, np.ndarray]:
    """What is subtracted from the inputs and what they are multiplied by; both [I], or [1] for bytes."""
    if networks.normalizer is None:
        return np.zeros(1, np.float32), np.full(1, 1 / 255, np.float32)
    mean, scale = networks.normalizer.mean, networks.normalizer.scale()
    return mean.cpu().numpy().copy(), scale.cpu().numpy()
