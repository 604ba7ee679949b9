"""The ResNet's initial and recurrent inference on a CPU without torch: matrix products with compiled kernels between.

What an action adds to the transition's first convolution is computed once for each action, the heads' reductions are
one product, and every array is allocated once for a batch size. A test holds these answers to those of the torch
module.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from distributed_muzero.networks.convolutions import GatheredConvolution, make_convolution, normalize_and_add
from distributed_muzero.networks.kernels import (
    FAST,
    Layer,
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
    from distributed_muzero.networks.resnet import ResNet, Tower


class _Normalized:
    """A convolution and the normalisation behind it, of a NormalizedConvolution."""

    def __init__(self, layers: Any, board: tuple[int, int], num_inputs: int):
        convolution, norm = layers
        weight = _array(convolution.weight)[:, :num_inputs].transpose(2, 3, 1, 0).reshape(9, num_inputs, -1)
        self.convolution = make_convolution(weight, board)
        self.scale, self.shift = _array(norm.weight), _array(norm.bias)
        self.epsilon = np.float32(norm.eps)

    def finish(self, x: np.ndarray, skipped: np.ndarray | None) -> None:
        """Normalisation, sum with what was skipped, and ReLU, in place."""
        other = x if skipped is None else skipped
        normalize_and_add(x, self.scale, self.shift, self.epsilon, other, skipped is not None)


class _Tower:
    def __init__(self, tower: Tower, board: tuple[int, int], num_inputs: int):
        self.first = _Normalized(tower.first, board, num_inputs)
        num_channels = len(self.first.scale)
        self.rest = [_Normalized(layers, board, num_channels) for layers in tower.rest]

    def blocks(self, x: np.ndarray, inner: np.ndarray, out: np.ndarray) -> np.ndarray:
        """The residual blocks on x; all three arrays are overwritten, one of them is the answer."""
        for one, other in zip(self.rest[::2], self.rest[1::2], strict=True):
            one.convolution(x, inner)
            one.finish(inner, None)
            other.convolution(inner, out)
            other.finish(out, x)
            x, out = out, x
        return x


class _Scratch:
    """Arrays for one batch size and number of nodes."""

    def __init__(self, model: ResNetInference, batch: int, num_nodes: int):
        shape = batch, model.num_cells, model.num_channels
        self.embeddings = np.empty((num_nodes, batch, model.num_cells * model.num_channels), np.float32)
        self.parents, self.x, self.inner, self.out = (np.empty(shape, np.float32) for _ in range(4))
        width = len(model.head_bias) // len(model.heads)
        self.reduced = np.empty((batch, model.num_cells, len(model.head_bias)), np.float32)
        self.inputs = np.empty((len(model.heads), batch, model.num_cells * width), np.float32)
        self.outputs = [
            [np.empty((batch, len(layer.bias)), np.float32) for layer in head] for head in model.heads
        ]
        self.rewards = np.empty(batch, np.float32)
        self.values = np.empty(batch, np.float32)


class ResNetInference:
    """A snapshot of a ResNet's weights that keeps the embeddings of a search by (node, row)."""

    def __init__(self, networks: ResNet):
        board = networks.board
        self.num_cells, self.num_channels = math.prod(board), networks.num_channels
        self.input_mean = _array(networks.normalizer.mean)
        self.input_scale = _array(networks.normalizer.scale())
        self.representation = _Tower(networks.representation_layers, board, len(self.input_mean))
        self.transition = _Tower(networks.transition_layers, board, self.num_channels)
        self.action_rows = _action_rows(networks)
        heads = [networks.reward_layers, networks.value_layers, networks.policy_layers]
        reductions = [head[0] for head in heads]
        self.head_weight = np.concatenate([_array(part.weight)[:, :, 0, 0] for part in reductions]).T.copy()
        self.head_bias = np.concatenate([_array(part.bias) for part in reductions])
        self.heads = [_head_layers(head, self.num_cells) for head in heads]
        support = networks.value_head
        self.support = np.linspace(support.low, support.high, support.size, dtype=np.float32)
        self._scratch: _Scratch | None = None

    def initial(self, observations: np.ndarray, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts a search over [B, N, *O] with room for `num_nodes`: root values [B], policy logits [B, A]."""
        batch = len(observations)
        if self._scratch is None or self._scratch.embeddings.shape[:2] != (num_nodes, batch):
            self._scratch = _Scratch(self, batch, num_nodes)
        scratch, first = self._scratch, self.representation.first
        first.convolution(self._features(observations), scratch.x)
        first.finish(scratch.x, None)
        x = self.representation.blocks(scratch.x, scratch.inner, scratch.out)
        answer = self._predict(scratch, x, np.zeros(batch, np.int32))
        return answer.values.copy(), answer.prior_logits.copy()

    def expand(self, parents: np.ndarray, actions: np.ndarray, children: np.ndarray) -> Expansion:
        """One recurrent inference for every row. The answer's arrays are valid until the next call."""
        scratch, first = self._scratch, self.transition.first
        assert scratch is not None, "initial() comes first"
        batch = len(parents)
        gather(scratch.embeddings, parents, scratch.parents.reshape(batch, -1))
        first.convolution(scratch.parents, scratch.x)
        add_rows(scratch.x.reshape(batch, -1), self.action_rows, actions, False)
        first.finish(scratch.x, scratch.parents)
        x = self.transition.blocks(scratch.x, scratch.inner, scratch.out)
        return self._predict(scratch, x, children)

    def _predict(self, scratch: _Scratch, x: np.ndarray, children: np.ndarray) -> Expansion:
        """Normalises the embeddings x, keeps them as `children`, and asks the heads."""
        normalize_and_store(x.reshape(len(x), -1), scratch.embeddings, children)
        np.dot(
            x.reshape(-1, self.num_channels),
            self.head_weight,
            out=scratch.reduced.reshape(-1, len(self.head_bias)),
        )
        split_heads(scratch.reduced, self.head_bias, scratch.inputs)
        for head, inputs, outputs in zip(self.heads, scratch.inputs, scratch.outputs, strict=True):
            apply_layers(inputs, head, outputs)
        rewards, values, policy = (outputs[-1] for outputs in scratch.outputs)
        decode(rewards, self.support, scratch.rewards)
        decode(values, self.support, scratch.values)
        return Expansion(scratch.rewards, scratch.values, policy)

    def _features(self, observations: np.ndarray) -> np.ndarray:
        """[B, N, *O] -> [B, H·W, N·C]."""
        planes = observations.reshape(len(observations), -1, self.num_cells).astype(np.float32)
        cells = np.ascontiguousarray(planes.transpose(0, 2, 1))
        return np.clip((cells - self.input_mean) * self.input_scale, -LIMIT, LIMIT)


def _action_rows(networks: ResNet) -> np.ndarray:
    """[A, H·W·C] what each action's planes add to the transition's first convolution."""
    planes = _array(networks.action_planes.expand(-1, -1, *networks.board))
    num_actions, num_planes = planes.shape[:2]
    cells = np.ascontiguousarray(planes.reshape(num_actions, num_planes, -1).transpose(0, 2, 1))
    weight = _array(networks.transition_layers.first[0].weight)[:, networks.num_channels :]
    out = np.empty((num_actions, cells.shape[1], networks.num_channels), np.float32)
    weight = weight.transpose(2, 3, 1, 0).reshape(9, num_planes, -1)
    GatheredConvolution(weight, networks.board)(cells, out)
    return out.reshape(num_actions, -1)


def _head_layers(head: Any, num_cells: int) -> list[Layer]:
    """The perceptron behind the reduction, its inputs put from channels × cells into cells × channels."""
    first, *rest = linear_layers(head[3:])
    by_channel = first.weight.reshape(-1, num_cells, first.weight.shape[1])
    return [Layer(by_channel.transpose(1, 0, 2).reshape(first.weight.shape).copy(), first.bias), *rest]


def _array(tensor: Any) -> np.ndarray:
    return np.array(tensor.detach().cpu().numpy(), np.float32, order="C")


@njit(cache=True, fastmath=FAST)
def split_heads(reduced, bias, inputs):
    """ReLU(reduced [B, H·W, heads · I] + bias), each head's part by itself: inputs [heads, B, H·W · I]."""
    num_heads = inputs.shape[0]
    width = reduced.shape[2] // num_heads
    for head in range(num_heads):
        for b in range(reduced.shape[0]):
            for cell in range(reduced.shape[1]):
                for i in range(width):
                    y = reduced[b, cell, head * width + i] + bias[head * width + i]
                    inputs[head, b, cell * width + i] = max(y, np.float32(0))
