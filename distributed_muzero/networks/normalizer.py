"""Observations of any scale to numbers around 0 with a spread of 1, from statistics that the learner gathers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGEST = 1e15  # its square is still a float32
LIMIT = 10.0  # in standard deviations: a rare extreme must not swamp the rest
SLOWEST_RATE = 0.001
VARIANCE_EPSILON = 1e-8  # inputs that hardly vary stay near 0 rather than being blown up


class ObservationNormalizer(nn.Module):
    """(x − mean) / √variance of each input, clipped to ±10.

    Mean and variance are averages over the batches that training has seen: of all at first, of about the last
    thousand later on. They are buffers, so they travel and are saved with the weights. Only a forward pass that
    records gradients in training mode updates them; before the first one the input passes unchanged.
    """

    mean: Tensor
    variance: Tensor
    num_batches: Tensor

    def __init__(self, num_inputs: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_inputs))
        self.register_buffer("variance", torch.ones(num_inputs))
        self.register_buffer("num_batches", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """[B, I] -> [B, I]."""
        if self.training and torch.is_grad_enabled() and len(x):
            self._update(x.detach().clamp(-LARGEST, LARGEST))
        return ((x - self.mean) * self.scale()).clamp(-LIMIT, LIMIT)

    def scale(self) -> Tensor:
        return torch.rsqrt(self.variance + VARIANCE_EPSILON)

    @torch.no_grad()
    def _update(self, x: Tensor) -> None:
        self.num_batches += 1
        # It is among the weights: unbounded, it would go beyond what float16 holds, in which they may travel.
        self.num_batches.clamp_(max=1 / SLOWEST_RATE)
        rate = torch.clamp(1 / self.num_batches, min=SLOWEST_RATE)
        self.mean.lerp_(x.mean(0), rate)
        self.variance.lerp_(((x - self.mean) ** 2).mean(0), rate)
