"""How a scalar becomes a categorical target and back (MuZero, appendix F).

h(x) = sign(x)(√(|x|+1) − 1) + εx shrinks large returns; the two-hot code spreads h(x) over its two neighbouring bins
of an evenly spaced support, both ends included, so that the mean of the bins is h(x) again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 0.001


def transform(x: Tensor) -> Tensor:
    """h(x), elementwise."""
    return torch.sign(x) * (torch.sqrt(torch.abs(x) + 1) - 1) + EPSILON * x


def inverse_transform(y: Tensor) -> Tensor:
    """h⁻¹(y), elementwise."""
    # (d − 1) / 2ε written as 2(…) / (d + 1): in float32 the difference d − 1 would keep four digits only.
    shifted = torch.abs(y) + 1 + EPSILON
    root = 2 * shifted / (torch.sqrt(1 + 4 * EPSILON * shifted) + 1)
    return torch.sign(y) * (root * root - 1)


class ScalarOutput:
    """A head whose raw output is the number itself, learnt by squared error. Raw outputs: [..., 1] or [...]."""

    size = 1

    def decode(self, output: Tensor) -> Tensor:
        return output.squeeze(-1) if output.ndim > 1 else output

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Squared error of each row: [B], [B] -> [B]."""
        return (self.decode(output) - target) ** 2


class CategoricalOutput:
    """A head whose raw output is `size` logits over an even support from `low` to `high`, in units of h(x)."""

    def __init__(self, low: float, high: float, size: int):
        self.low, self.high, self.size = low, high, size
        self.bin_width = (high - low) / (size - 1)

    def support(self, like: Tensor) -> Tensor:
        return torch.linspace(self.low, self.high, self.size, dtype=like.dtype, device=like.device)

    def decode(self, output: Tensor) -> Tensor:
        """h⁻¹(Σ pᵢ xᵢ): [..., size] logits -> [...] numbers."""
        return inverse_transform(torch.softmax(output, -1) @ self.support(output))

    def two_hot(self, target: Tensor) -> Tensor:
        """[...] numbers -> [..., size] probabilities on at most two bins; what lies outside goes to the end bin."""
        position = (transform(target).clamp(self.low, self.high) - self.low) / self.bin_width
        lower = position.floor().clamp(max=self.size - 2)
        upper_share = (position - lower).unsqueeze(-1)
        hot = functional.one_hot(lower.long(), self.size).to(target.dtype)
        return hot * (1 - upper_share) + hot.roll(1, -1) * upper_share

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of each row to the two-hot target: [B, size], [B] -> [B]."""
        return cross_entropy(output, self.two_hot(target))


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """−Σ target · log softmax(logits) over the last axis. A target row of zeros costs nothing."""
    return -(target * torch.log_softmax(logits, -1)).sum(-1)
