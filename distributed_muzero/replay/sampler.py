"""Which stored steps the learner sees: all alike, or those whose value was most wrong more often."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from distributed_muzero.replay.index import Entry, EpisodeRing
from distributed_muzero.replay.schema import Priorities

NO_ROWS = np.empty(0, np.int64)
SMALLEST_PRIORITY = 1e-3  # so that a step that was once predicted well is seen again


class Drawn(NamedTuple):
    rows: np.ndarray  # [M] int64
    importance_weights: np.ndarray  # [M] float32


class UniformSampler:
    """Every start position is as likely as any other."""

    def __init__(self, ring: EpisodeRing):
        self._ring = ring

    def add(self, entry: Entry) -> None:
        """Nothing to keep: the ring knows the start positions."""

    def remove(self, entry: Entry) -> None:
        """Nothing to forget."""

    def refresh(self, entry: Entry) -> None:
        """Nothing follows from an episode's values."""

    def update(self, rows: np.ndarray, priorities: np.ndarray, versions: np.ndarray) -> int:
        """No priorities here: all are ignored."""
        return len(rows)

    def sample(self, num_rows: int, rng: np.random.Generator) -> Drawn:
        return Drawn(self._ring.sample_rows(num_rows, rng), np.ones(num_rows, np.float32))


class PrioritizedSampler:
    """Steps are drawn with P ∝ p^exponent (Schaul et al. 2016), where p = |ν − z| (MuZero, appendix G).

    Each priority carries the weights version that it comes from: what an older one says of it is ignored.
    """

    # Priorities 4, versions 8, the sum tree 16 … 32, as the capacity is just below or above a power of two.
    ROW_BYTES = 4 + 8 + 32

    def __init__(self, ring: EpisodeRing, exponent: float, importance_exponent: float):
        # Here, since it brings numba: a shard with uniform sampling stays half the size without it.
        from distributed_muzero.replay.priority import SumTree, importance_weights

        self._ring = ring
        self._exponent = exponent
        self._weights_of = partial(importance_weights, exponent=importance_exponent)
        self._tree = SumTree(ring.capacity)
        self.priorities = np.zeros(ring.capacity, np.float32)
        self.versions = np.zeros(ring.capacity, np.int64)

    def add(self, entry: Entry) -> None:
        """A new episode's priorities follow from its own values and returns."""
        self.versions[entry.starts] = -1
        self.refresh(entry)

    def remove(self, entry: Entry) -> None:
        self._tree.set_range(entry.first_row, np.zeros(entry.num_starts))

    def refresh(self, entry: Entry) -> None:
        """Priorities of refreshed targets; those that the learner gave with newer weights stay."""
        starts = entry.starts
        errors = np.abs(self._ring.root_values[starts] - self._ring.columns.returns[starts])
        rows = np.arange(starts.start, starts.stop)
        self.update(rows, errors, np.full(len(rows), entry.targets_version))

    def update(self, rows: np.ndarray, priorities: np.ndarray, versions: np.ndarray) -> int:
        """Takes priorities of start positions; returns how many were ignored because newer ones are there."""
        fresh = versions >= self.versions[rows]
        rows, priorities = rows[fresh], np.maximum(priorities[fresh], SMALLEST_PRIORITY)
        self.priorities[rows] = priorities
        self.versions[rows] = versions[fresh]
        self._tree.set(rows, priorities.astype(np.float64) ** self._exponent)
        return len(fresh) - len(rows)

    def all_priorities(self) -> Priorities:
        """Those of every start position that is held."""
        rows = np.concatenate([np.arange(e.starts.start, e.starts.stop) for e in self._ring] or [NO_ROWS])
        columns = self._ring.columns
        steps = (rows - columns.first_rows[rows]).astype(np.int32)
        return Priorities(columns.episode_keys[rows], steps, self.priorities[rows], self.versions[rows])

    def sample(self, num_rows: int, rng: np.random.Generator) -> Drawn:
        rows, probabilities = self._tree.sample(num_rows, rng)
        return Drawn(rows, self._weights_of(probabilities, self._ring.num_starts))
