"""The episodes of a shard, in memory and on disk: what was acknowledged is there again after a restart.

    shard_0/episodes/   the log of episodes, oldest first; a segment goes when all of its episodes were evicted
    shard_0/journal/    what changed since: counters, refreshed targets, priorities, ids of dropped segments.
                        When it has grown to twice what it has to say, it is written anew.

Episodes are appended → synced → indexed → acknowledged. The journal's state is handed to the operating system before
a batch leaves (it survives the process), and synced by `flush` (it survives the machine).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
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
from distributed_muzero.replay.recovery import find_episodes, fold_journal, remember
from distributed_muzero.replay.sampler import PrioritizedSampler, UniformSampler
from distributed_muzero.replay.schema import Kind, Priorities, StoredEpisode, Targets
from distributed_muzero.types import Episode

MIN_JOURNAL_BYTES = 4 * 1024**2  # below this, writing it anew isn't worth it
TARGETS_IN_A_RECORD = 256


class Appended(NamedTuple):
    """Episodes of one record of the log."""

    stored: list[StoredEpisode]
    segment: int
    generation: int  # that a commit has to return
    number: int  # of the record


class Recovered(NamedTuple):
    state: dict[str, Any]  # the last that was written; empty in a new shard
    new_episodes: int  # stored after that state was written
    new_transitions: int
    missing_episodes: int  # held when that state was written, and no longer in the log


class EpisodeStore:
    """A ring of episodes over its logs. One thread calls everything but `commit` and what `flushing` gives."""

    def __init__(self, folder: Path, spec: EnvironmentSpec, config: ReplayConfig, algorithm: AlgorithmConfig):
        shards = config.num_shards
        is_prioritized = config.priority_exponent > 0
        sampler_bytes = PrioritizedSampler.ROW_BYTES if is_prioritized else 0
        max_transitions, max_bytes = config.max_transitions // shards, config.max_bytes // shards
        self.spec = spec
        self.algorithm = algorithm
        self.ring = EpisodeRing(spec, max_transitions, max_bytes, sampler_bytes)
        self.sampler: UniformSampler | PrioritizedSampler = UniformSampler(self.ring)
        if is_prioritized:
            self.sampler = PrioritizedSampler(self.ring, config.priority_exponent, config.importance_exponent)
        with ExitStack() as opened:
            self.log = ReplayLog(folder / "episodes", config.segment_bytes)
            opened.callback(self.log.close)
            self.journal = ReplayLog(folder / "journal", config.segment_bytes)
            opened.pop_all()
        self._next_key = 0
        self._next_indexed_key = 0  # below it, the counters of the state know every episode
        self._pending: set[str] = set()  # ids, until they are indexed or abandoned
        self._live: dict[str, int] = {}  # episode id -> segment of the log
        self._remembered: OrderedDict[str, None] = OrderedDict()  # ids of evicted episodes
        self._evicted_ids: dict[int, list[str]] = {}  # by segment that is still there
        self._num_live: dict[int, int] = {}  # episodes by segment
        self._newest_segment = 0  # with an indexed episode; in later ones, episodes may wait for their commit
        self._dirty_targets: set[int] = set()
        self._dirty_priorities: list[Priorities] = []
        self._snapshot_bytes = 0

    @property
    def num_refusals(self) -> int:
        """How often the disk refused to write, to sync or to drop."""
        return self.log.num_refusals + self.journal.num_refusals

    # Episodes -------------------------------------------------------------------------------------------------

    def knows(self, episode_id: str) -> bool:
        """Whether an episode of this id was stored, is stored, or is about to be."""
        return self.has_stored(episode_id) or episode_id in self._pending

    def has_stored(self, episode_id: str) -> bool:
        """Whether an episode of this id is in the ring, or was, so that it may be acknowledged."""
        return episode_id in self._live or episode_id in self._remembered

    def append(self, episodes: Sequence[Episode]) -> Appended:
        """Puts valid, unknown episodes, at least one, into the log's next commit."""
        stored = [StoredEpisode(self._next_key + i, episode) for i, episode in enumerate(episodes)]
        segment, generation = self.log.append(Kind.EPISODES, schema.encode_episodes(stored))
        self._next_key += len(stored)
        self._pending.update(episode.episode_id for episode in episodes)
        return Appended(stored, segment, generation, self.log.num_appended)

    def commit(self) -> int:
        """Makes durable what was appended before. Returns its generation, see ReplayLog. Raises LogError."""
        return self.log.sync()

    def has_committed(self, appended: Appended) -> bool:
        """Whether a commit has made them durable."""
        return self.log.has_synced(appended.generation, appended.number)

    def index(self, appended: Appended) -> None:
        """Makes committed episodes part of what is sampled, in the order in which they were appended."""
        for key, episode in appended.stored:
            assert key >= self._next_indexed_key
            self._pending.discard(episode.episode_id)
            self._add(key, episode, appended.segment, None)
            self._next_indexed_key = key + 1

    def abandon(self, appended: Appended) -> None:
        """Forgets episodes whose commit failed: they may be offered again."""
        self._pending.difference_update(item.episode.episode_id for item in appended.stored)

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
        # A copy with an older key, given up by a disk that kept it, may have been taken for evicted.
        self._remembered.pop(episode.episode_id, None)
        self._newest_segment = max(self._newest_segment, segment)
        self._num_live[segment] = self._num_live.get(segment, 0) + 1

    def _forget(self, entry: Entry) -> None:
        self.sampler.remove(entry)
        self._dirty_targets.discard(entry.key)
        segment = self._live.pop(entry.episode_id)
        self._num_live[segment] -= 1
        self._remember_evicted(entry.episode_id, segment)

    def _remember_evicted(self, episode_id: str, segment: int) -> None:
        self._evicted_ids.setdefault(segment, []).append(episode_id)
        remember(self._remembered, [episode_id])

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
        rewards, to_play = self.ring.columns.rewards[entry.played], self.ring.to_play[entry.rows]
        returns = self._returns(rewards, targets.root_values, to_play)
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
        _, generation = self.journal.append(Kind.STATE, schema.encode_state(self._with_own(state)))
        if self.journal.write() != generation:
            raise LogError(f"{self.journal.folder}: a sync failed meanwhile, and the state with it")

    @property
    def has_dead_segments(self) -> bool:
        """Whether a flush can drop a part of the log."""
        return any(segment.number < self._first_live_segment() for segment in self.log.segments[:1])

    @contextmanager
    def flushing(self, state: dict[str, Any]) -> Iterator[Callable[[], None]]:
        """Makes state, targets and priorities durable, and drops segments of the log without a held episode.

        `with store.flushing(state) as wait_for_disk: wait_for_disk()`, and the call in the middle may run in any
        thread; one flush at a time. Raises LogError; the next flush then writes everything.
        """
        targets, self._dirty_targets = self._dirty_targets, set()
        priorities, self._dirty_priorities = self._dirty_priorities, []
        first_live = self._first_live_segment()
        try:
            is_anew = self.journal.num_bytes > 2 * self._snapshot_bytes + MIN_JOURNAL_BYTES
            records = list(self._everything() if is_anew else self._changes(targets, priorities, first_live))
            # Last: its counters know of everything before.
            records.append((Kind.STATE, schema.encode_state(self._with_own(state))))
            if is_anew:
                self.journal.start_segment()
            # The others' generation is no lower.
            (first, generation), *_ = [self.journal.append(*record) for record in records]
            yield partial(self._wait_for_disk, generation, first if is_anew else 0, first_live)
        except BaseException:
            self._dirty_targets |= {key for key in targets if self.ring.get(key)}
            self._dirty_priorities[:0] = priorities
            raise
        if is_anew:
            self._snapshot_bytes = sum(len(payload) for _, payload in records)
        for by_segment in (self._evicted_ids, self._num_live):
            for number in [number for number in by_segment if number < first_live]:
                del by_segment[number]

    def _wait_for_disk(self, generation: int, journal_from: int, log_from: int) -> None:
        """Syncs the journal, then drops what lies before. What is dropped can't be read again after a restart."""
        if self.journal.sync() != generation:
            raise LogError(f"{self.journal.folder}: a write failed meanwhile, and this flush with it")
        for log, first in ((self.journal, journal_from), (self.log, log_from)):
            while any(segment.number < first for segment in log.segments[:1]):
                log.drop_oldest()

    def _first_live_segment(self) -> int:
        """All before it hold nothing that is held, or waits for its commit."""
        live = (number for number, num_live in self._num_live.items() if num_live)
        return min(live, default=self._newest_segment)

    def _changes(
        self, targets: Iterable[int], priorities: Iterable[Priorities], first_live: int
    ) -> Iterator[tuple[Kind, bytes]]:
        gone = [
            episode_id
            for number, ids in self._evicted_ids.items()
            for episode_id in ids
            if number < first_live and episode_id not in self._live
        ]
        if gone:
            yield Kind.IDS, schema.encode_ids(gone)
        yield from self._targets(targets)
        for update in priorities:
            yield Kind.PRIORITIES, schema.encode_priorities(update)

    def _everything(self) -> Iterator[tuple[Kind, bytes]]:
        yield Kind.IDS, schema.encode_ids(self._remembered)
        yield from self._targets(e.key for e in self.ring if e.targets_version > e.weights_version)
        if isinstance(self.sampler, PrioritizedSampler):
            yield Kind.PRIORITIES, schema.encode_priorities(self.sampler.all_priorities())

    def _targets(self, keys: Iterable[int]) -> Iterator[tuple[Kind, bytes]]:
        columns, values = self.ring.columns, self.ring.root_values
        entries = [entry for key in sorted(keys) if (entry := self.ring.get(key))]
        for first in range(0, len(entries), TARGETS_IN_A_RECORD):
            targets = [
                Targets(entry.key, entry.targets_version, columns.policies[entry.played], values[entry.rows])
                for entry in entries[first : first + TARGETS_IN_A_RECORD]
            ]
            yield Kind.TARGETS, schema.encode_targets(targets)

    def _with_own(self, state: dict[str, Any]) -> dict[str, Any]:
        oldest = self.ring.oldest
        own = {
            "next_key": self._next_indexed_key,
            "oldest_key": oldest.key if oldest else self._next_indexed_key,
            "held_episodes": self.ring.num_episodes,
            "evicted_transitions": self.ring.num_evicted_transitions,
            "evicted_episodes": self.ring.num_evicted_episodes,
        }
        return {**state, **own}

    # After a restart ------------------------------------------------------------------------------------------

    def recover(self) -> Recovered:
        """Rebuilds everything from the logs; comes first. Raises LogError for a log of another format or spec."""
        journal = fold_journal(self.journal.recover(), self.journal.folder)
        state = journal.state
        remember(self._remembered, journal.gone_ids)
        first_new = self._next_key = state.get("next_key", 0)
        new_episodes = new_transitions = num_known = 0
        too_long: list[str] = []
        for key, episode, segment, fate in find_episodes(self.log.recover(), journal, self.log.folder):
            self._next_key = max(self._next_key, key + 1)
            if fate == "evicted":
                self._remember_evicted(episode.episode_id, segment)
            if fate != "held":
                continue
            self._check_fits(episode)
            if episode.num_steps < self.ring.capacity:
                self._add(key, episode, segment, journal.targets.get(key))
            else:
                self._remember_evicted(episode.episode_id, segment)
                self.ring.num_evicted_episodes += 1
                self.ring.num_evicted_transitions += episode.num_steps
                too_long.append(episode.episode_id)
            num_known += key < first_new
            new_episodes += key >= first_new
            new_transitions += episode.num_steps * (key >= first_new)
        for update in journal.priorities:
            self._apply_priorities(update)
        self.ring.num_evicted_transitions += state.get("evicted_transitions", 0)
        self.ring.num_evicted_episodes += state.get("evicted_episodes", 0)
        self._next_indexed_key = self._next_key
        if too_long:
            # With the next state, so that they aren't counted again.
            self.journal.append(Kind.IDS, schema.encode_ids(too_long))
        missing = max(state.get("held_episodes", 0) - num_known, 0)
        return Recovered(state, new_episodes, new_transitions, missing)

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
        try:
            self.log.close()
        finally:
            self.journal.close()
