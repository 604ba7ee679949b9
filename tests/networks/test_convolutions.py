"""A 3 × 3 convolution over a board, as one matrix and as products of gathered neighbours."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from distributed_muzero.networks.convolutions import (
    DenseConvolution,
    GatheredConvolution,
    make_convolution,
    make_neighbours,
    normalize_and_add,
)

KINDS = [DenseConvolution, GatheredConvolution]


def test_neighbours_by_hand():
    """Cells 0 1 2 / 3 4 5."""
    neighbours = make_neighbours(2, 3)
    assert neighbours[0].tolist() == [-1, -1, -1, -1, 0, 1, -1, 3, 4]
    assert neighbours[4].tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_ones_counts_the_neighbours(kind):
    out = np.empty((1, 9, 1), np.float32)
    kind(np.ones((9, 1, 1), np.float32), (3, 3))(np.ones((1, 9, 1), np.float32), out)
    assert out.ravel().tolist() == [4, 6, 4, 6, 9, 6, 4, 6, 4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("board", [(1, 1), (1, 4), (3, 3), (6, 7), (19, 19)])
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_both_kinds_are_torchs_convolution(kind, board, batch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, 3, *board)).astype(np.float32)
    weight = rng.normal(size=(5, 3, 3, 3)).astype(np.float32)
    expected = functional.conv2d(torch.from_numpy(x), torch.from_numpy(weight), padding=1).flatten(2).mT
    convolution = kind(weight.transpose(2, 3, 1, 0).reshape(9, 3, 5), board)
    out = np.empty((batch, board[0] * board[1], 5), np.float32)
    cells = np.ascontiguousarray(x.reshape(batch, 3, -1).transpose(0, 2, 1))
    for _ in range(2):  # the second call finds what the first left in its arrays
        convolution(cells, out)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    convolution(cells[:1], out[:1])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_normalisation_sum_and_relu_by_hand():
    """Mean 2, variance 1: −1 and 1; times 3 and 1, plus 1 and −2 gives −2 and −1; what was skipped adds 5 and 0.5."""
    x = np.array([[[1.0, 3.0]]], np.float32)
    scale, shift = np.array([3.0, 1.0], np.float32), np.array([1.0, -2.0], np.float32)
    alone = x.copy()
    normalize_and_add(alone, scale, shift, np.float32(0), alone, False)
    assert alone.ravel().tolist() == [0, 0]
    normalize_and_add(x, scale, shift, np.float32(0), np.array([[[5.0, 0.5]]], np.float32), True)
    assert x.ravel().tolist() == [3, 0]


@pytest.mark.parametrize(
    ("board", "num_channels", "kind"),
    [((3, 3), 16, DenseConvolution), ((3, 3), 64, GatheredConvolution), ((3, 4), 16, GatheredConvolution)],
)
def test_few_cells_and_channels_make_one_matrix(board, num_channels, kind):
    assert isinstance(make_convolution(np.ones((9, num_channels, num_channels), np.float32), board), kind)
