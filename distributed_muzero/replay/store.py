"""The episodes of a shard, in memory and on disk: what was acknowledged is there again after a restart.

    shard_0/episodes/   the log of episodes, oldest first; a segment goes when all of its episodes were evicted
    shard_0/journal/    what changed since: counters, refreshed targets, priorities, ids of dropped segments.
                        When it has grown to twice what it has to say, it is written anew.

Episodes are appended → synced → indexed → acknowledged. The journal's state is handed to the operating system before
a batch leaves (it survives the process), and synced by `flush` (it survives the machine).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero.algorithm.returns import n_step_returns
from distributed_muzero.algorithm.targets import num_start_positions
from distributed_muzero.config import AlgorithmConfig, ReplayConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import LogError
from distributed_muzero.replay import schema
from distributed_muzero.replay.index import Entry, EpisodeRing
from distributed_muzero.replay.log import ReplayLog
from distributed_muzero.replay.sampler import PrioritizedSampler, UniformSampler
from distributed_muzero.replay.schema import Kind, Priorities, StoredEpisode, Targets
from distributed_muzero.types import Episode

MAX_REMEMBERED_IDS = 100_000  # of evicted episodes; far more than all actors may hold unacknowledged
MIN_JOURNAL_BYTES = 4 * 1024**2  # below this, writing it anew isn't worth it


class Recovered(NamedTuple):
    state: dict[str, Any]  # the last that was written; empty in a new shard
    new_episodes: int  # stored after that state was written
    new_transitions: int


class EpisodeStore:
    """A ring of episodes over its logs. One thread calls everything but `commit`, which may run beside it."""

    def __init__(self, folder: Path, spec: EnvironmentSpec, config: ReplayConfig, algorithm: AlgorithmConfig):
        shards = config.num_shards
        self.spec = spec
        self.algorithm = algorithm
        self.ring = EpisodeRing(spec, config.max_transitions // shards, config.max_bytes // shards)
        self.sampler: UniformSampler | PrioritizedSampler = UniformSampler(self.ring)
        if config.priority_exponent > 0:
            self.sampler = PrioritizedSampler(self.ring, config.priority_exponent, config.importance_exponent)
        self.log = ReplayLog(folder / "episodes", config.segment_bytes)
        self.journal = ReplayLog(folder / "journal", config.segment_bytes)
        self._next_key = 0
        self._next_indexed_key = 0  # below it, the counters of the state know every episode
        self.num_failures = 0  # commits that failed
        self.num_recovered_duplicates = 0
        self._pending: set[str] = set()
        self._live: dict[str, int] = {}  # episode id -> segment of the log
        self._remembered: OrderedDict[str, None] = OrderedDict()  # ids of evicted episodes
        self._evicted_ids: dict[int, list[str]] = {}  # by segment that is still there
        self._num_live: dict[int, int] = {}  # episodes by segment
        self._newest_segment = 0  # with an indexed episode; in later ones, episodes may wait for their commit
        self._dirty_targets: set[int] = set()
        self._dirty_priorities: list[Priorities] = []
        self._snapshot_bytes = 0

    # Episodes -------------------------------------------------------------------------------------------------

    def knows(self, episode_id: str) -> bool:
        """Whether an episode of this id was stored, is stored, or is about to be."""
        return episode_id in self._live or episode_id in self._remembered or episode_id in self._pending

    def append(self, episodes: Sequence[Episode]) -> tuple[list[StoredEpisode], int]:
        """Puts valid, unknown episodes into the log's next commit; returns them with their keys, and their segment."""
        stored = [StoredEpisode(self._next_key + i, episode) for i, episode in enumerate(episodes)]
        self._next_key += len(stored)
        self._pending.update(episode.episode_id for episode in episodes)
        return stored, self.log.append(Kind.EPISODES, schema.encode_episodes(stored))

    def commit(self) -> None:
        """Makes everything appended durable. Raises LogError; what was appended since the last one is then void."""
        try:
            self.log.sync()
        except LogError:
            self.num_failures += 1
            raise

    def index(
        self, stored: Iterable[StoredEpisode], segment: int, state: Callable[[], dict[str, Any]]
    ) -> None:
        """Makes committed episodes part of what is sampled. `state` is asked if a segment can be dropped."""
        for key, episode in stored:
            self._pending.discard(episode.episode_id)
            self._add(key, episode, segment, None)
            self._next_indexed_key = key + 1
        self._drop_dead_segments(state)

    def abandon(self, stored: Iterable[StoredEpisode]) -> None:
        """Forgets episodes whose commit failed: they may be offered again."""
        self._pending.difference_update(item.episode.episode_id for item in stored)

    def _add(self, key: int, episode: Episode, segment: int, targets: Targets | None) -> None:
        root_values = episode.root_values if targets is None else targets.root_values
        returns = self._returns(episode.rewards, root_values, episode.to_play)
        num_starts = num_start_positions(episode, self.algorithm.num_unroll_steps)
        evicted = self.ring.add(key, episode, returns, num_starts)
        entry = self.ring.get(key)
        assert entry is not None
        for old in evicted:
            self._forget(old)
        if targets is not None:
            self.ring.update_targets(entry, targets.version, targets.policies, root_values, returns)
        self.sampler.add(entry)
        self._live[episode.episode_id] = segment
        self._newest_segment = max(self._newest_segment, segment)
        self._num_live[segment] = self._num_live.get(segment, 0) + 1

    def _forget(self, entry: Entry) -> None:
        self.sampler.remove(entry)
        self._dirty_targets.discard(entry.key)
        segment = self._live.pop(entry.episode_id)
        self._num_live[segment] -= 1
        self._evicted_ids.setdefault(segment, []).append(entry.episode_id)
        self._remember([entry.episode_id])

    def _remember(self, ids: Iterable[str]) -> None:
        self._remembered.update(dict.fromkeys(ids))
        while len(self._remembered) > MAX_REMEMBERED_IDS:
            self._remembered.popitem(last=False)

    def _drop_dead_segments(self, state: Callable[[], dict[str, Any]]) -> None:
        """Drops the oldest segments without a held episode, once the journal remembers their ids.

        And the counters: what is dropped can't be counted again after a restart.
        """
        while len(self.log.segments) > 1:
            number = self.log.segments[0].number
            if self._num_live.get(number) or number >= self._newest_segment:
                return
            try:
                self.journal.append(Kind.IDS, schema.encode_ids(self._evicted_ids.get(number, ())))
                self.journal.append(Kind.STATE, schema.encode_state(self._with_own(state())))
                self.journal.sync()
                self.log.drop_oldest()
            except LogError:
                return  # a full disk; the next episode tries again
            self._evicted_ids.pop(number, None)
            self._num_live.pop(number, None)

    def _returns(self, rewards: np.ndarray, root_values: np.ndarray, to_play: np.ndarray) -> np.ndarray:
        return n_step_returns(rewards, root_values, self.algorithm.discount, self.algorithm.td_steps, to_play)

    # What is learnt of them afterwards ------------------------------------------------------------------------

    def update_targets(self, targets: Targets) -> bool:
        """Takes newer policies and values of an episode; False if it is gone or has newer ones already."""
        entry = self.ring.get(targets.key)
        if entry is None or targets.version <= entry.targets_version:
            return False
        shapes = ((entry.num_steps, self.spec.num_actions), (entry.num_rows,))
        arrays = (targets.policies, targets.root_values)
        if tuple(a.shape for a in arrays) != shapes or not all(np.isfinite(a).all() for a in arrays):
            return False
        rows = entry.rows
        rewards = self.ring.columns.rewards[rows.start : rows.stop - 1]
        returns = self._returns(rewards, targets.root_values, self.ring.to_play[rows])
        self.ring.update_targets(entry, targets.version, targets.policies, targets.root_values, returns)
        self.sampler.refresh(entry)
        self._dirty_targets.add(entry.key)
        return True

    def update_priorities(self, update: Priorities) -> int:
        """Takes priorities that the learner found; returns how many were ignored, as evicted or outdated."""
        num_ignored = self._apply_priorities(update)
        if num_ignored < len(update.keys):
            self._dirty_priorities.append(update)
        return num_ignored

    def _apply_priorities(self, update: Priorities) -> int:
        keys, which = np.unique(update.keys, return_inverse=True)
        entries = [self.ring.get(int(key)) for key in keys]
        first_rows = np.array([entry.first_row if entry else 0 for entry in entries])
        num_starts = np.array([entry.num_starts if entry else 0 for entry in entries])
        held = (update.steps >= 0) & (update.steps < num_starts[which]) & np.isfinite(update.priorities)
        rows = (first_rows[which] + update.steps)[held]
        num_stale = self.sampler.update(rows, update.priorities[held], update.versions[held])
        return int((~held).sum()) + num_stale

    # The journal ----------------------------------------------------------------------------------------------

    def write_state(self, state: dict[str, Any]) -> None:
        """Hands the caller's state to the operating system. Raises LogError."""
        self.journal.append(Kind.STATE, schema.encode_state(self._with_own(state)))
        self.journal.write()

    def flush(self, state: dict[str, Any]) -> None:
        """Makes state, targets and priorities durable. Raises LogError; the next flush then writes everything."""
        if self.journal.num_bytes > 2 * self._snapshot_bytes + MIN_JOURNAL_BYTES:
            self._write_anew(state)
            return
        self._append_targets(sorted(self._dirty_targets))
        for update in self._dirty_priorities:
            self.journal.append(Kind.PRIORITIES, schema.encode_priorities(update))
        self.journal.append(Kind.STATE, schema.encode_state(self._with_own(state)))
        self.journal.sync()
        self._dirty_targets.clear()
        self._dirty_priorities.clear()

    def _write_anew(self, state: dict[str, Any]) -> None:
        old = len(self.journal.segments)
        before = self.journal.num_bytes
        self.journal.start_segment()
        self.journal.append(Kind.IDS, schema.encode_ids(self._remembered))
        self._append_targets([e.key for e in self.ring if e.targets_version > e.weights_version])
        if isinstance(self.sampler, PrioritizedSampler):
            update = self.sampler.all_priorities()
            self.journal.append(Kind.PRIORITIES, schema.encode_priorities(update))
        self.journal.append(Kind.STATE, schema.encode_state(self._with_own(state)))
        self.journal.sync()
        self._snapshot_bytes = self.journal.num_bytes - before
        for _ in range(old):
            self.journal.drop_oldest()
        self._dirty_targets.clear()
        self._dirty_priorities.clear()

    def _append_targets(self, keys: Sequence[int]) -> None:
        for key in keys:
            entry = self.ring.get(key)
            assert entry is not None
            episode = self.ring.episode(entry)
            targets = Targets(key, entry.targets_version, episode.policies, episode.root_values)
            self.journal.append(Kind.TARGETS, schema.encode_targets([targets]))

    def _with_own(self, state: dict[str, Any]) -> dict[str, Any]:
        oldest = self.ring.oldest
        own = {
            "next_key": self._next_indexed_key,
            "oldest_key": oldest.key if oldest else self._next_indexed_key,
            "evicted_transitions": self.ring.num_evicted_transitions,
            "evicted_episodes": self.ring.num_evicted_episodes,
        }
        return {**state, **own}

    # After a restart ------------------------------------------------------------------------------------------

    def recover(self) -> Recovered:
        """Rebuilds everything from the logs; comes first. Raises LogError for a log of another format or spec."""
        state: dict[str, Any] = {}
        targets: dict[int, Targets] = {}
        updates: list[Priorities] = []
        for record in self.journal.recover():
            if record.kind == Kind.STATE:
                state = schema.decode_state(record.payload)
            elif record.kind == Kind.IDS:
                self._remember(schema.decode_ids(record.payload))
            elif record.kind == Kind.TARGETS:
                targets.update((item.key, item) for item in schema.decode_targets(record.payload))
            elif record.kind == Kind.PRIORITIES:
                updates.append(schema.decode_priorities(record.payload))
        first_new = self._next_key = state.get("next_key", 0)
        oldest = state.get("oldest_key", 0)
        new_episodes = new_transitions = 0
        for record in self.log.recover():
            for key, episode in schema.decode_episodes(record.payload):
                self._next_key = max(self._next_key, key + 1)
                if self.knows(episode.episode_id):
                    self.num_recovered_duplicates += 1
                elif key < oldest:
                    self._evicted_ids.setdefault(record.segment, []).append(episode.episode_id)
                    self._remember([episode.episode_id])
                else:
                    self._check_fits(episode)
                    self._add(key, episode, record.segment, targets.get(key))
                    new_episodes += key >= first_new
                    new_transitions += episode.num_steps * (key >= first_new)
        for update in updates:
            self._apply_priorities(update)
        self.ring.num_evicted_transitions += state.get("evicted_transitions", 0)
        self.ring.num_evicted_episodes += state.get("evicted_episodes", 0)
        self._next_indexed_key = self._next_key
        return Recovered(state, new_episodes, new_transitions)

    def _check_fits(self, episode: Episode) -> None:
        shape, kind = episode.observations.shape[1:], episode.observations.dtype
        held = (shape, kind, episode.policies.shape[1])
        expected = (self.spec.observation_shape, self.spec.observation_dtype, self.spec.num_actions)
        if held != expected:
            raise LogError(
                f"{self.log.folder} holds episodes with observations {shape} {kind} and {held[2]} actions; the "
                f"environment has {expected[0]} {expected[1]} and {expected[2]}; "
                "go on with the environment that it began with"
            )

    def close(self) -> None:
        self.log.close()
        self.journal.close()
