"""3 × 3 convolutions over a small board as matrix products, and the normalisation that follows them.

Cells come before channels, [B, H·W, C], so that what is done to a cell runs along memory. On boards of few cells a
whole convolution is one matrix [H·W·I, H·W·C]; on larger ones the nine neighbours of each cell are laid side by side,
and their product with the weight [9·I, C] is the convolution. Rows never reach each other.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numba import njit

from distributed_muzero.networks.kernels import FAST

DENSE_CELLS = 9  # up to here the matrix of all cells costs no more than the neighbours of each
DENSE_BYTES = 2**20  # a larger matrix leaves the core's cache
COLUMNS_BYTES = 2**19  # of neighbours that are laid out at a time: they stay in the core's cache


class Convolution(Protocol):
    def __call__(self, x: np.ndarray, out: np.ndarray) -> None:
        """3 × 3 with zeros around the board: x [B, H·W, I] -> out [B, H·W, C]."""


class DenseConvolution:
    """One matrix of every cell's weight for every other."""

    def __init__(self, weight: np.ndarray, board: tuple[int, int]):
        """weight: [9, I, C], the neighbours row by row."""
        neighbours = make_neighbours(*board)
        matrix = np.zeros((len(neighbours), weight.shape[1], len(neighbours), weight.shape[2]), np.float32)
        for cell, around in enumerate(neighbours):
            for place, other in enumerate(around):
                if other >= 0:
                    matrix[other, :, cell] = weight[place]
        self.matrix = matrix.reshape(len(neighbours) * weight.shape[1], -1)

    def __call__(self, x: np.ndarray, out: np.ndarray) -> None:
        np.dot(x.reshape(len(x), -1), self.matrix, out=out.reshape(len(out), -1))


class GatheredConvolution:
    """The neighbours of each cell side by side, a few rows of the batch at a time."""

    def __init__(self, weight: np.ndarray, board: tuple[int, int]):
        """weight: [9, I, C], the neighbours row by row."""
        self.neighbours = make_neighbours(*board)
        self.weight = np.ascontiguousarray(weight.reshape(-1, weight.shape[2]))
        cells, width = len(self.neighbours), len(self.weight)
        self.rows = max(1, COLUMNS_BYTES // (4 * cells * width))
        # What lies outside the board is 0 and stays so.
        self.columns = np.zeros((self.rows, cells, width), np.float32)

    def __call__(self, x: np.ndarray, out: np.ndarray) -> None:
        width, num_channels = self.weight.shape
        for start in range(0, len(x), self.rows):
            part = x[start : start + self.rows]
            columns = self.columns[: len(part)]
            gather_neighbours(part, self.neighbours, columns)
            np.dot(
                columns.reshape(-1, width),
                self.weight,
                out=out[start : start + self.rows].reshape(-1, num_channels),
            )


def make_convolution(weight: np.ndarray, board: tuple[int, int]) -> Convolution:
    """The faster of the two for a weight [9, I, C]."""
    cells = math.prod(board)
    is_small = cells <= DENSE_CELLS and 4 * cells**2 * weight[0].size <= DENSE_BYTES
    return DenseConvolution(weight, board) if is_small else GatheredConvolution(weight, board)


def make_neighbours(height: int, width: int) -> np.ndarray:
    """[H·W, 9] the cells around each cell and itself, row by row; -1 outside the board."""
    cells = np.pad(np.arange(height * width, dtype=np.int32).reshape(height, width), 1, constant_values=-1)
    shifted = [cells[i : i + height, j : j + width].ravel() for i in range(3) for j in range(3)]
    return np.stack(shifted, 1)


@njit(cache=True)
def gather_neighbours(x, neighbours, columns):
    """columns [B, H·W, 9·I] of x [B, H·W, I]; places outside the board are left alone."""
    num_rows, num_cells, num_inputs = x.shape
    # Flat arrays: with three indices the compiler copies one number at a time, nine times as slow.
    source, target = x.reshape(x.size), columns.reshape(columns.size)
    for b in range(num_rows):
        for cell in range(num_cells):
            for place in range(9):
                if neighbours[cell, place] >= 0:
                    begin = (b * num_cells + neighbours[cell, place]) * num_inputs
                    into = ((b * num_cells + cell) * 9 + place) * num_inputs
                    for i in range(num_inputs):
                        target[into + i] = source[begin + i]


@njit(cache=True, fastmath=FAST)
def normalize_and_add(x, scale, shift, epsilon, skipped, adds):
    """ReLU((x − mean) / √variance · scale + shift [+ skipped]) in place, mean and variance those of the row."""
    num_rows, num_cells, num_channels = x.shape
    count = num_cells * num_channels
    flat = x.reshape(num_rows, count)
    for b in range(num_rows):
        total = np.float32(0)
        for i in range(count):
            total += flat[b, i]
        mean = total / np.float32(count)
        squares = np.float32(0)
        for i in range(count):
            squares += (flat[b, i] - mean) ** 2
        inverse = np.float32(1) / np.sqrt(squares / np.float32(count) + epsilon)
        for cell in range(num_cells):
            for i in range(num_channels):
                y = (x[b, cell, i] - mean) * inverse * scale[i] + shift[i]
                if adds:
                    y += skipped[b, cell, i]
                x[b, cell, i] = max(y, np.float32(0))
