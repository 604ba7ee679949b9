"""Transformer layers over sequences whose tokens know how far apart they are, not where they stand."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

EXACT_DISTANCES = 8  # 0 … 7 are told apart; from there on buckets grow, until all that is farther is one
FARTHEST = 64
BUCKETS_EACH_WAY = 16
HIDDEN_FACTOR = 2  # of a layer's perceptron, against the width
MASKED = -1e9  # finite also in bfloat16; its softmax is 0


class Layers(nn.Module):
    """Pre-norm transformer layers over x [B, 1 + S, D]: a whole token, then slots. They share their bias of position.

    num_relations: kinds of links between slots that `forward` gets, each of which weighs as much as is learnt.
    """

    def __init__(self, width: int, num_heads: int, num_layers: int, num_relations: int = 0):
        super().__init__()
        self.distances = nn.Parameter(torch.zeros(2 * BUCKETS_EACH_WAY, num_heads))
        self.relations = nn.Parameter(torch.zeros(num_relations, num_heads)) if num_relations else None
        self.of_depth = nn.ModuleList(Layer(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, is_open: Tensor, relations: Tensor | None = None) -> Tensor:
        """is_open [B, 1 + S]: 0 for what nobody may look at.   relations [B, S, S, num_relations] of 0 and 1."""
        bias = self.bias(is_open, relations)
        for layer in self.of_depth:
            x = layer(x, bias)
        return self.norm(x)

    def bias(self, is_open: Tensor, relations: Tensor | None) -> Tensor:
        """[B, H, 1 + S, 1 + S] what is added to the attention of one token (row) to another (column)."""
        bias = distance_bias(self.distances, is_open.shape[1] - 1)[None]
        if self.relations is not None and relations is not None:
            bias = bias + (relations @ self.relations).permute(0, 3, 1, 2)
        masked = ((1 - is_open) * MASKED)[:, None, None, :]
        return functional.pad(bias, (1, 0, 1, 0)) + masked


class Layer(nn.Module):
    """x ← x + attention(norm x), x ← x + perceptron(norm x)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.gathered = nn.Linear(width, width)
        self.inner = nn.Linear(width, HIDDEN_FACTOR * width)
        self.outer = nn.Linear(HIDDEN_FACTOR * width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, S, D], bias [B, H, S, S] -> [B, S, D]."""
        batch, size, width = x.shape
        heads = self.queries_keys_values(self.attention_norm(x)).view(batch, size, 3, self.num_heads, -1)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(queries, keys, values, bias.to(queries.dtype))
        x = x + self.gathered(seen.transpose(1, 2).reshape(batch, size, width))
        return x + self.outer(torch.relu_(self.inner(self.norm(x))))


def distance_bias(table: Tensor, size: int) -> Tensor:
    """table [2 · BUCKETS_EACH_WAY, H] -> [H, size, size], of slot j seen from slot i by j − i."""
    buckets = distance_buckets(torch.arange(1 - size, size, device=table.device))
    # A product rather than a look-up, whose gradient on a GPU would not be the same each time.
    by_distance = functional.one_hot(buckets, len(table)).to(table.dtype) @ table
    # Row i is the window of `size` distances that begins with that of slot 0, −i.
    return by_distance.unfold(0, size, 1).flip(0).permute(1, 0, 2)


def distance_buckets(distances: Tensor) -> Tensor:
    """[…] whole numbers -> […] buckets: 0 … 15 of what comes after (0 itself is 0), 16 … 31 of what comes before."""
    size = distances.abs()
    growth = (BUCKETS_EACH_WAY - EXACT_DISTANCES) / math.log(FARTHEST / EXACT_DISTANCES)
    far = EXACT_DISTANCES + (torch.log(size.clamp(min=1) / EXACT_DISTANCES) * growth).floor().long()
    bucket = torch.where(size < EXACT_DISTANCES, size, far.clamp(max=BUCKETS_EACH_WAY - 1))
    return bucket + BUCKETS_EACH_WAY * (distances < 0)
