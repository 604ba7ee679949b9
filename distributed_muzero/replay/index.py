"""The episodes that a shard holds: a ring of rows, the oldest episode giving way to the newest."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distributed_muzero.algorithm.targets import Columns
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.types import Episode


@dataclass(slots=True)
class Entry:
    """A held episode: where its rows stand, and what no column holds."""

    key: int  # the shard's own number of it, never given twice
    first_row: int
    num_rows: int
    num_starts: int
    episode_id: str
    environment_id: str
    seed: int
    weights_version: int
    terminated: bool
    targets_version: int  # of the weights whose search gave policies and values

    @property
    def num_steps(self) -> int:
        return self.num_rows - 1

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.num_rows)

    @property
    def played(self) -> slice:
        """Without the row of the final observation."""
        return slice(self.first_row, self.first_row + self.num_steps)

    @property
    def starts(self) -> slice:
        return slice(self.first_row, self.first_row + self.num_starts)


class EpisodeRing:
    """Columns of `capacity` rows. Episodes stay contiguous, so one that doesn't fit behind the newest starts at row 0.

    The start positions of all held episodes form a queue in the order of arrival, so that a uniform draw over them
    is one draw of integers.
    """

    def __init__(self, spec: EnvironmentSpec, max_transitions: int, max_bytes: int, sampler_bytes: int = 0):
        """sampler_bytes: what its sampler takes for each row, a part of `max_bytes`."""
        self.spec = spec
        self.row_bytes = row_bytes(spec) + sampler_bytes
        self.capacity = max(min(max_transitions, max_bytes // self.row_bytes), 2)
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
        self.root_values = np.empty(self.capacity, np.float32)
        self.to_play = np.empty(self.capacity, np.int8)
        self._starts = np.empty(self.capacity, np.int64)
        self._first_start = self.num_starts = 0
        self._entries: dict[int, Entry] = {}  # oldest first
        self._next_row = 0
        self.newest_key = -1
        self.num_transitions = 0
        self.num_evicted_transitions = 0
        self.num_evicted_episodes = 0

    @property
    def num_episodes(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        return (self.num_transitions + self.num_episodes) * self.row_bytes

    @property
    def oldest(self) -> Entry | None:
        return next(iter(self._entries.values()), None)

    def __iter__(self) -> Iterator[Entry]:
        """The entries, oldest first."""
        return iter(self._entries.values())

    def get(self, key: int) -> Entry | None:
        """The entry of an episode; None once it was evicted."""
        return self._entries.get(key)

    def add(self, key: int, episode: Episode, returns: np.ndarray, num_starts: int) -> list[Entry]:
        """Stores an episode of T+1 ≤ capacity rows with its returns [T+1]. The oldest give way: they are returned."""
        num_steps = episode.num_steps
        num_rows = num_steps + 1
        first = self._next_row if self._next_row + num_rows <= self.capacity else 0
        evicted = self._make_room(first, num_rows)
        entry = Entry(
            key, first, num_rows, num_starts, episode.episode_id, episode.environment_id, episode.seed,
            episode.weights_version, episode.terminated, episode.weights_version,
        )  # fmt: skip
        rows = entry.rows
        played = entry.played
        last = first + num_steps
        c = self.columns
        c.observations[rows] = episode.observations
        c.legal_masks[played], c.legal_masks[last] = episode.legal_masks, episode.legal_masks[-1]
        c.actions[played], c.actions[last] = episode.actions, 0
        c.rewards[played], c.rewards[last] = episode.rewards, 0
        c.first_rows[rows], c.last_rows[rows] = first, last
        c.weights_versions[rows] = episode.weights_version
        c.episode_keys[rows] = key
        self.to_play[rows] = episode.to_play
        c.policies[last] = 0
        self._write_targets(entry, episode.policies, episode.root_values, returns)
        places = (self._first_start + self.num_starts + np.arange(num_starts)) % self.capacity
        self._starts[places] = first + np.arange(num_starts)
        self.num_starts += num_starts
        self._entries[key] = entry
        self.newest_key = max(self.newest_key, key)
        self._next_row = first + num_rows
        self.num_transitions += num_steps
        return evicted

    def episode(self, entry: Entry) -> Episode:
        """A copy of a held episode, with its newest targets."""
        c, rows, played = self.columns, entry.rows, entry.played
        return Episode(
            entry.episode_id,
            entry.environment_id,
            entry.seed,
            entry.weights_version,
            observations=c.observations[rows].copy(),
            legal_masks=c.legal_masks[played].copy(),
            actions=c.actions[played].copy(),
            rewards=c.rewards[played].copy(),
            policies=c.policies[played].copy(),
            root_values=self.root_values[rows].copy(),
            to_play=self.to_play[rows].copy(),
            terminated=entry.terminated,
            truncated=not entry.terminated,
        )

    def update_targets(
        self, entry: Entry, version: int, policies: np.ndarray, root_values: np.ndarray, returns: np.ndarray
    ) -> None:
        """Puts newer policies [T, A], values [T+1] and the returns [T+1] that follow from them in place."""
        self._write_targets(entry, policies, root_values, returns)
        self.columns.weights_versions[entry.rows] = version
        entry.targets_version = version

    def sample_rows(self, num_rows: int, rng: np.random.Generator) -> np.ndarray:
        """Uniform draw of start positions, with replacement: [num_rows] int64."""
        return self._starts[(self._first_start + rng.integers(0, self.num_starts, num_rows)) % self.capacity]

    def _write_targets(
        self, entry: Entry, policies: np.ndarray, root_values: np.ndarray, returns: np.ndarray
    ) -> None:
        self.columns.policies[entry.played] = policies
        self.root_values[entry.rows] = root_values
        self.columns.returns[entry.rows] = returns

    def _make_room(self, first: int, num_rows: int) -> list[Entry]:
        evicted = []
        if first < self._next_row:
            # The ring wraps: whatever still stands between the newest episode and the end is the oldest.
            while self.oldest and self.oldest.first_row >= self._next_row:
                evicted.append(self._evict_oldest())
        while self.oldest and first <= self.oldest.first_row < first + num_rows:
            evicted.append(self._evict_oldest())
        return evicted

    def _evict_oldest(self) -> Entry:
        entry = self._entries.pop(next(iter(self._entries)))
        self._first_start = (self._first_start + entry.num_starts) % self.capacity
        self.num_starts -= entry.num_starts
        self.num_transitions -= entry.num_steps
        self.num_evicted_transitions += entry.num_steps
        self.num_evicted_episodes += 1
        return entry


def shard_of(episode_id: str, num_shards: int) -> int:
    """The shard that an episode belongs to; follows from its id alone."""
    return zlib.crc32(episode_id.encode()) % num_shards


def row_bytes(spec: EnvironmentSpec) -> int:
    """What one row takes in all columns together."""
    observation = int(np.prod(spec.observation_shape)) * np.dtype(spec.observation_dtype).itemsize
    columns = observation + spec.num_actions * (1 + 4) + 3 * 4 + 4 * 8
    return columns + 4 + 1 + 8  # root values, players, start positions
