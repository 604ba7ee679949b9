"""Compiled pieces of torch-free inference, shared by the models that offer it. Rows never reach each other.

At the sizes that a search on a CPU uses, calling an operation costs more than its arithmetic: each of these does in
one pass what would be several calls of numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.extending import overload

from distributed_muzero.algorithm.value_transform import EPSILON

NORMALIZE_EPSILON = 1e-5
FAST = {"reassoc", "contract", "nsz"}  # NaN and Inf stay what they are


class Layer(NamedTuple):
    weight: np.ndarray  # [inputs, outputs] float32
    bias: np.ndarray  # [outputs] float32


def linear_layers(module: Iterable[Any]) -> list[Layer]:
    """Copies of a perceptron's weights, transposed."""
    linears = [part for part in module if hasattr(part, "weight")]
    return [
        Layer(
            np.array(part.weight.detach().cpu().numpy().T, np.float32, order="C"),
            part.bias.detach().cpu().numpy().astype(np.float32),
        )
        for part in linears
    ]


def apply_layers(x: np.ndarray, layers: Sequence[Layer], outs: Sequence[np.ndarray]) -> np.ndarray:
    """A perceptron's output for x [B, I], ReLU between its layers; `outs` are their arrays, the last one the answer.

    Without layers the answer is x itself.
    """
    for index, (layer, out) in enumerate(zip(layers, outs, strict=True)):
        np.dot(x, layer.weight, out=out)
        add_bias(out, layer.bias, index + 1 < len(layers))
        x = out
    return x


def dense(x: np.ndarray, layer: Layer, picks: np.ndarray, relu: bool, out: np.ndarray) -> None:
    """out [B, O] = x [B, I] @ weight [I, O] + biases [R, O] of the rows' picks [B], then ReLU if asked for.

    By BLAS; where it is compiled, by a loop, which takes a few rows less time than the calls.
    """
    np.dot(x, layer.weight, out=out)
    add_rows(out, layer.bias, picks, relu)


@overload(dense, jit_options={"fastmath": FAST})
def _compiled_dense(x, layer, picks, relu, out):
    def loop(x, layer, picks, relu, out):
        weight, biases = layer
        num_inputs, num_outputs = weight.shape
        by_fours = num_inputs - num_inputs % 4
        for b in range(x.shape[0]):
            y, bias = out[b], biases[picks[b]]
            for o in range(num_outputs):
                y[o] = bias[o]
            for i in range(0, by_fours, 4):
                x0, x1, x2, x3 = x[b, i], x[b, i + 1], x[b, i + 2], x[b, i + 3]
                w0, w1, w2, w3 = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
                for o in range(num_outputs):
                    y[o] += x0 * w0[o] + x1 * w1[o] + x2 * w2[o] + x3 * w3[o]
            for i in range(by_fours, num_inputs):
                w = weight[i]
                for o in range(num_outputs):
                    y[o] += x[b, i] * w[o]
            if relu:
                for o in range(num_outputs):
                    y[o] = max(y[o], np.float32(0))

    return loop


@njit(cache=True)
def gather(embeddings, parents, out):
    """out[b] = embeddings[parents[b], b], of embeddings [nodes, B, E]."""
    for row in range(len(parents)):
        out[row] = embeddings[parents[row], row]


@njit(cache=True, fastmath=FAST)
def add_rows(x, rows, actions, relu):
    """x [B, I] += rows [A, I] of the rows' actions [B], then ReLU if asked for."""
    for b in range(x.shape[0]):
        out, row = x[b], rows[actions[b]]
        for i in range(x.shape[1]):
            y = out[i] + row[i]
            out[i] = max(y, np.float32(0)) if relu else y


@njit(cache=True, fastmath=FAST)
def add_bias(x, bias, relu):
    """x [B, I] += bias [I], then ReLU if asked for."""
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            y = x[b, i] + bias[i]
            x[b, i] = max(y, np.float32(0)) if relu else y


@njit(cache=True, fastmath=FAST)
def normalize_and_store(x, embeddings, children):
    """Min-max normalises each row of x [B, E] in place and writes it to embeddings[children[b], b]."""
    for b in range(x.shape[0]):
        low = high = x[b, 0]
        for i in range(x.shape[1]):
            low = min(low, x[b, i])
            high = max(high, x[b, i])
        scale = np.float32(1) / (high - low + np.float32(NORMALIZE_EPSILON))
        for i in range(x.shape[1]):
            x[b, i] = (x[b, i] - low) * scale
        embeddings[children[b], b] = x[b]


@njit(cache=True, fastmath=FAST)
def decode(logits, support, out):
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
