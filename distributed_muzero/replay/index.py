"""The episodes that a shard holds: a ring of rows, the oldest episode giving way to the newest."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from distributed_muzero.algorithm.targets import Columns
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.types import Episode


class _Entry(NamedTuple):
    first_row: int
    num_rows: int
    num_starts: int


class EpisodeRing:
    """Columns of `capacity` rows. Episodes stay contiguous, so one that doesn't fit behind the newest starts at row 0.

    The start positions of all held episodes form a queue in the order of arrival, so that a uniform draw over them
    is one draw of integers.
    """

    def __init__(self, spec: EnvironmentSpec, max_transitions: int, max_bytes: int):
        self.spec = spec
        self.capacity = max(min(max_transitions, max_bytes // row_bytes(spec)), 2)
        shape, actions = (self.capacity, *spec.observation_shape), (self.capacity, spec.num_actions)
        self.columns = Columns(
            observations=np.empty(shape, spec.observation_dtype),
            legal_masks=np.empty(actions, bool),
            actions=np.empty(self.capacity, np.int32),
            rewards=np.empty(self.capacity, np.float32),
            policies=np.empty(actions, np.float32),
            returns=np.empty(self.capacity, np.float32),
            first_rows=np.empty(self.capacity, np.int64),
            last_rows=np.empty(self.capacity, np.int64),
            weights_versions=np.empty(self.capacity, np.int64),
            episode_keys=np.empty(self.capacity, np.int64),
        )
        self._starts = np.empty(self.capacity, np.int64)
        self._first_start = self.num_starts = 0
        self._entries: deque[_Entry] = deque()
        self._next_row = 0
        self.num_inserted = 0
        self.num_transitions = 0
        self.num_evicted_transitions = 0
        self.num_evicted_episodes = 0

    @property
    def num_episodes(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        return (self.num_transitions + self.num_episodes) * row_bytes(self.spec)

    def add(self, episode: Episode, returns: np.ndarray, num_starts: int) -> None:
        """Stores an episode of T+1 ≤ capacity rows with its returns [T+1]; evicts the oldest where they stood."""
        num_steps = episode.num_steps
        num_rows = num_steps + 1
        first = self._next_row if self._next_row + num_rows <= self.capacity else 0
        self._make_room(first, num_rows)
        rows = slice(first, first + num_rows)
        played = slice(first, first + num_steps)
        last = first + num_steps
        c = self.columns
        c.observations[rows] = episode.observations
        c.legal_masks[played], c.legal_masks[last] = episode.legal_masks, episode.legal_masks[-1]
        c.actions[played], c.actions[last] = episode.actions, 0
        c.rewards[played], c.rewards[last] = episode.rewards, 0
        c.policies[played], c.policies[last] = episode.policies, 0
        c.returns[rows] = returns
        c.first_rows[rows], c.last_rows[rows] = first, last
        c.weights_versions[rows] = episode.weights_version
        c.episode_keys[rows] = self.num_inserted
        places = (self._first_start + self.num_starts + np.arange(num_starts)) % self.capacity
        self._starts[places] = first + np.arange(num_starts)
        self.num_starts += num_starts
        self._entries.append(_Entry(first, num_rows, num_starts))
        self._next_row = first + num_rows
        self.num_inserted += 1
        self.num_transitions += num_steps

    def sample_rows(self, num_rows: int, rng: np.random.Generator) -> np.ndarray:
        """Uniform draw of start positions, with replacement: [num_rows] int64."""
        return self._starts[(self._first_start + rng.integers(0, self.num_starts, num_rows)) % self.capacity]

    def _make_room(self, first: int, num_rows: int) -> None:
        if first < self._next_row:
            # The ring wraps: whatever still stands between the newest episode and the end is the oldest.
            while self._entries and self._entries[0].first_row >= self._next_row:
                self._evict_oldest()
        while self._entries and first <= self._entries[0].first_row < first + num_rows:
            self._evict_oldest()

    def _evict_oldest(self) -> None:
        entry = self._entries.popleft()
        self._first_start = (self._first_start + entry.num_starts) % self.capacity
        self.num_starts -= entry.num_starts
        self.num_transitions -= entry.num_rows - 1
        self.num_evicted_transitions += entry.num_rows - 1
        self.num_evicted_episodes += 1


def row_bytes(spec: EnvironmentSpec) -> int:
    """What one row takes in all columns together."""
    observation = int(np.prod(spec.observation_shape)) * np.dtype(spec.observation_dtype).itemsize
    return observation + spec.num_actions * (1 + 4) + 3 * 4 + 5 * 8
