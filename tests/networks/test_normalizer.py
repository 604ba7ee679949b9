"""Observations of any scale come out around 0 with a spread of 1."""

from __future__ import annotations

import pytest
import torch

from distributed_muzero.networks.normalizer import ObservationNormalizer


def test_before_the_first_batch_the_input_passes_unchanged():
    x = torch.tensor([[0.5, -3.0]])
    assert ObservationNormalizer(2).eval()(x).tolist()[0] == pytest.approx([0.5, -3.0], abs=1e-5)


def test_the_first_batch_gives_its_own_mean_and_variance():
    normalizer = ObservationNormalizer(1)
    out = normalizer(torch.tensor([[1.0], [3.0]]))
    assert normalizer.mean.item() == 2.0
    assert normalizer.variance.item() == 1.0
    assert out.flatten().tolist() == pytest.approx([-1.0, 1.0], abs=1e-5)


def test_inputs_of_very_different_scales_come_out_alike():
    normalizer = ObservationNormalizer(2)
    scales, shift = torch.tensor([1e-3, 1e4]), torch.tensor([0.5, -7e4])
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        out = normalizer(torch.randn(256, 2, generator=generator) * scales + shift)
    assert out.mean(0).abs().max() < 0.3
    assert (out.std(0) - 1).abs().max() < 0.3


def test_only_training_changes_the_statistics():
    normalizer = ObservationNormalizer(1)
    with torch.inference_mode():
        normalizer(torch.ones(4, 1))
    normalizer.eval()
    normalizer(torch.ones(4, 1))
    assert normalizer.num_batches == 0


def test_an_extreme_input_is_clipped_to_ten():
    assert ObservationNormalizer(1).eval()(torch.tensor([[1e6], [-1e6]])).flatten().tolist() == [10.0, -10.0]


def test_its_count_of_batches_stays_within_what_float16_holds():
    """It travels among the weights, perhaps as float16; beyond 1000 it changes nothing."""
    normalizer = ObservationNormalizer(1)
    normalizer.num_batches.fill_(1e5)
    normalizer(torch.ones(4, 1))
    assert normalizer.num_batches == 1000 and torch.isfinite(normalizer.num_batches.half())
    assert normalizer.mean.item() == pytest.approx(1e-3)
