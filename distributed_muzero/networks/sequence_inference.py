"""The node sequence's recurrent inference on a CPU without torch: only open slots are kept, row behind row.

Rows of one batch differ in length by several times, and what torch would compute for the short ones' empty slots is
here not there. Matrix products see all open slots of the batch at once; between them are compiled kernels. The
representation, asked once a search, stays torch's. A test holds these answers to those of the torch module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numba.extending import register_jitable

from distributed_muzero.networks.attention import distance_buckets
from distributed_muzero.networks.kernels import FAST, add_bias, apply_layers, decode, linear_layers
from distributed_muzero.networks.tokens import CLOSED_LOGIT
from distributed_muzero.search.simulate import Expansion

if TYPE_CHECKING:
    from distributed_muzero.networks.node_sequence import NodeSequence

LANES = 16  # float32 numbers in the widest vector of a CPU
LOWEST = np.finfo(np.float32).min
LOWEST_EXPONENT = -87.0  # exp of it is still a normal float32


class Norm(NamedTuple):
    scale: np.ndarray  # [D]
    shift: np.ndarray
    epsilon: np.float32


class _AttentionLayer:
    """The weights of an attention.Layer; the queries are scaled in theirs."""

    def __init__(self, layer: Any):
        first, gathered, inner, outer = linear_layers(
            [layer.queries_keys_values, layer.gathered, layer.inner, layer.outer]
        )
        width = gathered.weight.shape[0]
        for part in first:
            part[..., :width] *= np.float32((width // layer.num_heads) ** -0.5)
        self.first, self.gathered, self.inner, self.outer = first, gathered, inner, outer
        self.attention_norm, self.norm = _norm(layer.attention_norm), _norm(layer.norm)


class _Scratch:
    """Arrays for the open slots of one batch, T of them, and a number of nodes."""

    def __init__(self, model: SequenceInference, counts: np.ndarray, num_nodes: int):
        """counts: [B] open slots of each row, the whole token among them."""
        batch, longest, width = len(counts), int(counts.max()), model.width
        self.counts = counts
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        size = int(self.starts[-1])

        def slots(num: int) -> np.ndarray:
            return np.empty((size, num), np.float32)

        self.embeddings = np.empty((num_nodes, size, width), np.float32)
        self.x, self.normed, self.seen, self.out = (slots(width) for _ in range(4))
        self.heads, self.inner = slots(3 * width), slots(model.inner_width)
        self.logits = slots(len(model.policy.bias))
        distances = distance_buckets(torch.arange(2 - longest, longest - 1)).numpy()
        self.bias = np.ascontiguousarray(model.distances[distances[::-1]].T)
        self.room = _attention_room(longest, width // model.num_heads)
        self.summary = np.empty((batch, 2 * width), np.float32)
        self.reward_outs, self.value_outs = (
            [np.empty((batch, len(layer.bias)), np.float32) for layer in head]
            for head in (model.reward, model.value)
        )
        self.rewards, self.values = np.empty((2, batch), np.float32)
        self.prior_logits = np.empty((batch, model.num_actions), np.float32)


class SequenceInference:
    """Keeps the embeddings of a search by (node, row).

    `expand` reads a snapshot of the NodeSequence's weights, and `initial` the module itself: after weights were loaded
    into it, an inference is to be made anew.
    """

    def __init__(self, networks: NodeSequence):
        self.networks = networks
        transition = networks.transition_layers
        self.width, self.num_heads = networks.rules.shape[1] // 2, transition.distances.shape[1]
        self.num_actions = networks.num_actions
        self.rules = networks.rules.detach().numpy().copy()
        self.layers = [_AttentionLayer(layer) for layer in transition.of_depth]
        self.inner_width = len(self.layers[0].inner.bias) if self.layers else 0
        self.norm = _norm(transition.norm)
        self.distances = transition.distances.detach().numpy().copy()
        self.reward, self.value = linear_layers(networks.reward_layers), linear_layers(networks.value_layers)
        (self.policy,) = linear_layers(networks.policy_layers)
        support = networks.value_head
        self.support = np.linspace(support.low, support.high, support.size, dtype=np.float32)
        self._scratch: _Scratch | None = None

    @torch.inference_mode()
    def initial(self, observations: np.ndarray, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts a search over [B, 1, L, C] with room for `num_nodes`: root values [B], policy logits [B, A]."""
        answer = self.networks.initial_inference(torch.as_tensor(observations))
        roots = answer.embeddings.numpy()
        is_open = roots[..., 0] > 0
        self._scratch = _Scratch(self, is_open.sum(1), num_nodes)
        self._scratch.embeddings[0] = roots[is_open]
        return answer.values.numpy(), answer.policy_logits.numpy()

    def expand(self, parents: np.ndarray, actions: np.ndarray, children: np.ndarray) -> Expansion:
        """One recurrent inference for every row. The answer's arrays are valid until the next call."""
        scratch = self._scratch
        assert scratch is not None, "initial() comes first"
        x = scratch.x
        gather_and_act(scratch.embeddings, scratch.starts, parents, self.rules, actions, x)
        for layer in self.layers:
            self._apply(scratch, layer)
        normalize(x, self.norm, x)
        mark_and_store(x, scratch.starts, scratch.embeddings, children, scratch.summary)
        decode(apply_layers(scratch.summary, self.reward, scratch.reward_outs), self.support, scratch.rewards)
        decode(apply_layers(scratch.summary, self.value, scratch.value_outs), self.support, scratch.values)
        np.dot(x, self.policy.weight, out=scratch.logits)
        scatter_logits(
            scratch.logits, self.policy.bias, scratch.starts, np.float32(CLOSED_LOGIT), scratch.prior_logits
        )
        return Expansion(scratch.rewards, scratch.values, scratch.prior_logits)

    def _apply(self, scratch: _Scratch, layer: _AttentionLayer) -> None:
        x = scratch.x
        normalize(x, layer.attention_norm, scratch.normed)
        np.dot(scratch.normed, layer.first.weight, out=scratch.heads)
        add_bias(scratch.heads, layer.first.bias, False)
        attend(scratch.heads, scratch.starts, scratch.bias, scratch.room, scratch.seen)
        np.dot(scratch.seen, layer.gathered.weight, out=scratch.out)
        add_to(x, scratch.out, layer.gathered.bias)
        normalize(x, layer.norm, scratch.normed)
        np.dot(scratch.normed, layer.inner.weight, out=scratch.inner)
        add_bias(scratch.inner, layer.inner.bias, True)
        np.dot(scratch.inner, layer.outer.weight, out=scratch.out)
        add_to(x, scratch.out, layer.outer.bias)


def _attention_room(longest: int, size: int) -> tuple[np.ndarray, ...]:
    """queries [size, n], scores [longest, n], powers [n] and their bits, high, total, out [n]; n queries, padded."""
    padded = -(-longest // LANES) * LANES
    powers, high, total, out = np.zeros((4, padded), np.float32)
    queries, scores = np.zeros((size, padded), np.float32), np.zeros((longest, padded), np.float32)
    return queries, scores, powers, powers.view(np.int32), high, total, out


def _norm(norm: torch.nn.LayerNorm) -> Norm:
    scale, shift = (part.detach().numpy().copy() for part in (norm.weight, norm.bias))
    return Norm(scale, shift, np.float32(norm.eps))


@njit(cache=True)
def gather_and_act(embeddings, starts, parents, rules, actions, out):
    """out [T, D] = embeddings [nodes, T, D] of each row's parent; the rule's vectors [R, 2D] to whole and slot."""
    width = out.shape[1]
    for b in range(len(parents)):
        first, last = starts[b], starts[b + 1]
        out[first:last] = embeddings[parents[b], first:last]
        slot, rule = divmod(actions[b], len(rules))
        out[first] += rules[rule, :width]
        if first + 1 + slot < last:
            out[first + 1 + slot] += rules[rule, width:]


@njit(cache=True, fastmath=FAST)
def normalize(x, norm, out):
    """LayerNorm of each slot of x [T, D]; `out` may be x."""
    scale, shift, epsilon = norm
    width = np.float32(x.shape[1])
    for t in range(x.shape[0]):
        total = np.float32(0)
        for i in range(x.shape[1]):
            total += x[t, i]
        mean = total / width
        squares = np.float32(0)
        for i in range(x.shape[1]):
            squares += (x[t, i] - mean) * (x[t, i] - mean)
        factor = np.float32(1) / np.sqrt(squares / width + epsilon)
        for i in range(x.shape[1]):
            out[t, i] = (x[t, i] - mean) * factor * scale[i] + shift[i]


@njit(cache=True, fastmath=FAST)
def add_to(x, more, bias):
    """x [T, D] += more + bias."""
    for t in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[t, i] += more[t, i] + bias[i]


@njit(cache=True, fastmath=FAST)
def attend(heads, starts, bias, room, seen):
    """seen [T, D] of queries, keys and values side by side, heads [T, 3D], each row of the batch by itself.

    bias [H, 2S − 1]: of slot j seen from slot i, at S − 1 + i − j.
    Scores are kept key by key, so that all loops within run along the queries, whose number is padded to LANES.
    """
    queries, scores, powers, powers_bits, high, total, out = room
    middle = bias.shape[1] // 2
    width = seen.shape[1]
    size = queries.shape[0]
    for b in range(len(starts) - 1):
        first = starts[b]
        count = starts[b + 1] - first
        padded = (count + LANES - 1) // LANES * LANES
        for head in range(bias.shape[0]):
            place = head * size
            for i in range(count):
                for d in range(size):
                    queries[d, i] = heads[first + i, place + d]
            high[:padded] = np.float32(LOWEST)
            for j in range(count):
                scores[j, :padded] = np.float32(0)
                if j > 0:  # the whole token, 0, is at no distance from others
                    for i in range(1, count):
                        scores[j, i] = bias[head, middle + i - j]
                add_products(
                    heads[first + j, width + place : width + place + size], queries, scores[j, :padded]
                )
                for i in range(padded):
                    high[i] = max(high[i], scores[j, i])
            total[:padded] = np.float32(0)
            for j in range(count):
                exponentiate(scores[j, :padded], high, powers, powers_bits)
                for i in range(padded):
                    total[i] += scores[j, i]
            for d in range(size):
                out[:padded] = np.float32(0)
                value = 2 * width + place + d
                add_products(heads[first : first + count, value], scores, out[:padded])
                for i in range(count):
                    seen[first + i, place + d] = out[i] / total[i]


@register_jitable(fastmath=FAST)
def add_products(factors, rows, out):
    """out [n] += factors [k] @ rows [k, n or more]."""
    by_fours = len(factors) - len(factors) % 4
    for k in range(0, by_fours, 4):
        f0, f1, f2, f3 = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
        r0, r1, r2, r3 = rows[k], rows[k + 1], rows[k + 2], rows[k + 3]
        for i in range(len(out)):
            out[i] += f0 * r0[i] + f1 * r1[i] + f2 * r2[i] + f3 * r3[i]
    for k in range(by_fours, len(factors)):
        f, r = factors[k], rows[k]
        for i in range(len(out)):
            out[i] += f * r[i]


@njit(cache=True, fastmath=FAST)
def exponentiate(x, high, powers, powers_bits):
    """x [n] ← exp(x − high), where x ≤ high. powers and powers_bits: the same room for n, as float32 and as int32.

    exp(y) = 2ᵏ exp(r) with |r| ≤ log(2) / 2, whose series to the sixth power is exact in float32. Unlike np.exp, the
    compiler makes vector instructions of it.
    """
    for j in range(len(x)):
        y = max(x[j] - high[j], np.float32(LOWEST_EXPONENT))
        k = np.floor(y * np.float32(1.44269504) + np.float32(0.5))
        powers_bits[j] = (np.int32(k) + np.int32(127)) << np.int32(23)
        r = y - k * np.float32(0.693359375) + k * np.float32(2.12194440e-4)
        series = np.float32(1 / 720) * r + np.float32(1 / 120)
        series = series * r + np.float32(1 / 24)
        series = series * r + np.float32(1 / 6)
        series = series * r + np.float32(0.5)
        x[j] = (series * r + np.float32(1)) * r + np.float32(1)
    for j in range(len(x)):
        x[j] *= powers[j]


@njit(cache=True, fastmath=FAST)
def mark_and_store(x, starts, embeddings, children, summary):
    """Marks x [T, D] as open, keeps it as `children`, and sums it up [B, 2D]: the whole token, the slots' mean."""
    width = x.shape[1]
    for b in range(len(children)):
        first, last = starts[b], starts[b + 1]
        for t in range(first, last):
            x[t, 0] = np.float32(1)
        embeddings[children[b], first:last] = x[first:last]
        summary[b, :width] = x[first]
        mean = summary[b, width:]
        mean[:] = np.float32(0)
        for t in range(first + 1, last):
            for i in range(width):
                mean[i] += x[t, i]
        mean /= np.float32(last - first - 1)


@njit(cache=True)
def scatter_logits(logits, bias, starts, closed, out):
    """out [B, L · R]: logits [T, R] of each row's slots, without the whole token, and `closed` behind them."""
    num_rules = len(bias)
    num_slots = out.shape[1] // num_rules
    for b in range(len(out)):
        count = min(starts[b + 1] - starts[b] - 1, num_slots)
        for slot in range(count):
            for rule in range(num_rules):
                out[b, slot * num_rules + rule] = logits[starts[b] + 1 + slot, rule] + bias[rule]
        out[b, count * num_rules :] = closed
