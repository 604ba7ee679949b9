"""Prioritised sampling over the rows of a ring (Schaul et al. 2016): sum tree and importance weights."""

from __future__ import annotations

import numba
import numpy as np

# Weights up to here can't overflow the sum of any number of rows that fits in memory.
MAX_WEIGHT = 1e290
NONE = -1


class SumTree:
    """Draws rows with probability  P(i) = wᵢ / Σⱼ wⱼ.  Weights start at 0; a row of weight 0 is never drawn.

    A binary heap of float64 sums in one array: the root is node 1, the children of node i are 2i and 2i + 1,
    row r is the leaf `num_leaves + r`. Every write recomputes the sums above it from their children, so that
    rounding errors don't add up over time. A total that isn't a normal number (below 2.3e-308) is too coarse
    for fair draws. The compiled parts release the GIL; calls from several threads need a lock.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; expected at least 1")
        self.capacity = capacity
        self.num_leaves = 1 << (capacity - 1).bit_length()
        self._nodes = np.zeros(2 * self.num_leaves)

    @property
    def total(self) -> float:
        """Σ w over all rows."""
        return float(self._nodes[1])

    def set(self, rows: np.ndarray, weights: np.ndarray) -> None:
        """rows: [n] integers, of equal ones the last wins.   weights: [n] float, 0 ≤ w ≤ MAX_WEIGHT.

        Raises ValueError for a row or weight out of range, before anything is written.
        """
        rows, weights = self._checked_rows(rows), _checked_weights(weights)
        if len(rows) != len(weights):
            raise ValueError(
                f"{len(rows)} rows came with {len(weights)} weights; expected one weight for each row"
            )
        _set(self._nodes, self.num_leaves, rows, weights)

    def set_range(self, first: int, weights: np.ndarray) -> None:
        """Sets the rows first … first + n − 1 to weights [n]; errors as in `set`."""
        weights = _checked_weights(weights)
        last = first + len(weights) - 1
        if first < 0 or last >= self.capacity:
            raise ValueError(f"rows {first} … {last} aren't all within 0 … {self.capacity - 1}")
        _set_range(self._nodes, self.num_leaves, first, weights)

    def get(self, rows: np.ndarray) -> np.ndarray:
        """The weights [n] float64 of rows [n]. Raises ValueError for a row out of range."""
        return self._nodes[self.num_leaves + self._checked_rows(rows)]

    def sample(self, num_rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Stratified draw with replacement: one row from each of `num_rows` equal slices of the total.

        Returns rows [num_rows] int64 and their probabilities P [num_rows] float64, above 0. The rows come in
        about ascending order. Raises ValueError when every weight is 0.
        """
        if self.total == 0:
            raise ValueError("every weight is 0, nothing can be drawn; set weights first")
        rows = _sample(self._nodes, self.num_leaves, rng.random(num_rows))
        # A weight far below the total would round to P = 0, and its importance weight to infinity.
        return rows, np.maximum(self.get(rows) / self.total, np.finfo(np.float64).tiny)

    def _checked_rows(self, rows: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(np.asarray(rows).astype(np.int64, casting="same_kind", copy=False))
        bad = _first_outside(rows, 0, self.capacity - 1)
        if bad != NONE:
            raise ValueError(f"rows[{bad}] is {rows[bad]}; expected 0 … {self.capacity - 1}")
        return rows


def importance_weights(probabilities: np.ndarray, num_items: int, exponent: float) -> np.ndarray:
    """(N·P)^−β / max over the batch: undoes the bias of unequal draws (Schaul et al. 2016, section 3.4).

    probabilities: [M] P > 0.   num_items: N, rows that can be drawn; it cancels in the division.
    exponent: β, 0 (no correction) … 1 (full).
    Returns [M] float32 in 0 … 1. Raises ValueError for a P that isn't above 0.
    """
    scaled = num_items * np.asarray(probabilities, np.float64)
    if not (scaled > 0).all():
        bad = int(np.argmin(scaled > 0))
        raise ValueError(f"N·P of item {bad} is {scaled[bad]}; expected above 0")
    # The largest weight is that of the smallest P. Dividing first can't overflow.
    return ((scaled.min(initial=np.inf) / scaled) ** exponent).astype(np.float32)


def _checked_weights(weights: np.ndarray) -> np.ndarray:
    weights = np.ascontiguousarray(weights, np.float64)
    bad = _first_outside(weights, 0.0, MAX_WEIGHT)
    if bad != NONE:
        raise ValueError(f"weights[{bad}] is {weights[bad]}; expected a number from 0 to {MAX_WEIGHT}")
    return weights


@numba.njit(cache=True, nogil=True)
def _first_outside(numbers, low, high):
    """Returns -1, or the index of the first number that isn't within low … high; NaN isn't."""
    for index in range(len(numbers)):
        if not (low <= numbers[index] <= high):
            return index
    return NONE


@numba.njit(cache=True, nogil=True)
def _set(nodes, num_leaves, rows, weights):
    """Level by level, so that a parent is summed after all its children are written."""
    for index in range(len(rows)):
        nodes[num_leaves + rows[index]] = weights[index]
    level, shift = num_leaves >> 1, 1
    while level > len(rows):
        for index in range(len(rows)):
            parent = level + (rows[index] >> shift)
            nodes[parent] = nodes[2 * parent] + nodes[2 * parent + 1]
        level, shift = level >> 1, shift + 1
    # The levels with fewer nodes than rows, as a whole.
    for parent in range(2 * level - 1, 0, -1):
        nodes[parent] = nodes[2 * parent] + nodes[2 * parent + 1]


@numba.njit(cache=True, nogil=True)
def _set_range(nodes, num_leaves, first, weights):
    low, high = num_leaves + first, num_leaves + first + len(weights)
    nodes[low:high] = weights
    low, high = low >> 1, (high - 1) >> 1
    while low > 0:
        for parent in range(low, high + 1):
            nodes[parent] = nodes[2 * parent] + nodes[2 * parent + 1]
        low, high = low >> 1, high >> 1


@numba.njit(cache=True, nogil=True)
def _sample(nodes, num_leaves, uniforms):
    """Follows  target = (slice + u) / n · total  down to a leaf.

    Rounding may leave a target at or above the sum that it is looked up in. The walk then still enters only
    nodes whose sum is above 0, and so ends on the last such leaf.
    """
    num_rows = len(uniforms)
    rows = np.empty(num_rows, np.int64)
    for index in range(num_rows):
        target = (index + uniforms[index]) / num_rows * nodes[1]
        node = 1
        while node < num_leaves:
            node *= 2
            left = nodes[node]
            if target >= left and nodes[node + 1] > 0:
                target -= left
                node += 1
        rows[index] = node - num_leaves
    return rows
