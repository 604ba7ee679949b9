"""A shard of the replay buffer: takes finished episodes, keeps them, makes batches of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from distributed_muzero.algorithm.targets import make_batch, num_start_positions
from distributed_muzero.config import Config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import LogError, RejectedEpisode
from distributed_muzero.replay.index import Entry
from distributed_muzero.replay.rate_limiter import RateLimiter
from distributed_muzero.replay.schema import Priorities, StoredEpisode, Targets
from distributed_muzero.replay.store import EpisodeStore
from distributed_muzero.replay.validation import validate, validate_id
from distributed_muzero.types import Batch, Episode

MAX_LOOKED_AT = 1000  # episodes in one search for those with outdated targets


class InsertReply(NamedTuple):
    """`wait`: the limiter or the disk holds actors back, offer it again later. All others acknowledge the episode."""

    status: Literal["stored", "duplicate", "rejected", "wait"]
    reason: str = ""


@dataclass
class Offer:
    """Episodes on their way to the disk, and what their actor will be told once they are there."""

    replies: list[InsertReply]
    stored: list[StoredEpisode]
    segment: int
    num_failures: int  # of the store's commits when it was begun
    num_transitions: int


class ReplayShard:
    """One of `config.replay.num_shards`; budgets and limits are its share of the whole.

    The order is validate → append → sync → index → acknowledge: `begin`, `commit`, `finish`. One thread calls
    everything but `commit`, which may run in another, so that one commit serves all that began before it.
    """

    def __init__(self, spec: EnvironmentSpec, config: Config, index: int, folder: Path):
        replay = config.replay
        self.spec = spec
        self.index = index
        self.algorithm = config.algorithm
        self.history_length = config.environment.history_length
        self.batch_size = config.learner.batch_size
        self.store = EpisodeStore(folder, spec, replay, config.algorithm)
        self.ring = self.store.ring
        self.limiter = make_limiter(config)
        self.inserted_episodes = 0
        self.refreshed_transitions = 0  # handed out to be searched anew
        self.num_duplicates = 0
        self.num_ignored_priorities = 0
        self.num_log_failures = 0
        self.rejects: Counter[str] = Counter()
        self._reanalyse_ratio = config.reanalyse.ratio
        self._last_refreshed = -1  # key
        self._num_pending = 0  # transitions begun, not yet finished
        self.rng = np.random.default_rng([config.run.seed, index])
        self._recover()

    # Episodes come in -----------------------------------------------------------------------------------------

    def insert(self, episodes: list[Episode]) -> list[InsertReply]:
        """Offers finished episodes; one reply for each. Only `wait` leaves the episode with the caller."""
        offer = self.begin(episodes)
        try:
            self.commit()
        except LogError as error:
            return self.abandon(offer, error)
        return self.finish(offer)

    def begin(self, episodes: list[Episode]) -> Offer:
        """Validates, and appends what is new to the log; nothing is durable before the next `commit`."""
        replies: list[InsertReply] = []
        accepted: list[Episode] = []
        num_transitions = 0
        for episode in episodes:
            reply = self._judge(episode, {other.episode_id for other in accepted})
            replies.append(reply)
            if reply.status == "stored":
                accepted.append(episode)
                num_transitions += episode.num_steps
                self._num_pending += episode.num_steps
        failures = self.store.num_failures
        stored, segment = self.store.append(accepted) if accepted else ([], 0)
        return Offer(replies, stored, segment, failures, num_transitions)

    def commit(self) -> None:
        """Makes what was begun durable. Raises LogError if the disk refuses."""
        self.store.commit()

    def finish(self, offer: Offer) -> list[InsertReply]:
        """Indexes what a commit has made durable; the answer acknowledges it."""
        if offer.num_failures != self.store.num_failures:
            # A commit failed in between: maybe the one that held these, or the first of a duplicate.
            return self.abandon(offer, LogError("a commit to the replay log failed"))
        self._num_pending -= offer.num_transitions
        self.limiter.count_insert(offer.num_transitions)
        self.inserted_episodes += len(offer.stored)
        self.store.index(offer.stored, offer.segment, self.state)
        return offer.replies

    def abandon(self, offer: Offer, error: LogError) -> list[InsertReply]:
        """Tells that nothing of it is promised: what would have been stored has to wait."""
        self.num_log_failures += 1
        self._num_pending -= offer.num_transitions
        self.store.abandon(offer.stored)
        wait = InsertReply("wait", str(error))
        return [reply if reply.status == "rejected" else wait for reply in offer.replies]

    def _judge(self, episode: Episode, accepted: set[str]) -> InsertReply:
        try:
            validate_id(episode)
            if self.store.knows(episode.episode_id) or episode.episode_id in accepted:
                self.num_duplicates += 1
                return InsertReply("duplicate")
            if not self.limiter.can_insert(self._num_pending):
                return InsertReply("wait")
            self._validate(episode)
        except RejectedEpisode as error:
            self.rejects[error.reason] += 1
            return InsertReply("rejected", str(error))
        return InsertReply("stored")

    def _validate(self, episode: Episode) -> None:
        """Raises RejectedEpisode for an episode that can't be learnt from."""
        validate(episode, self.spec, self.ring.capacity - 1)
        num_unroll_steps = self.algorithm.num_unroll_steps
        if num_start_positions(episode, num_unroll_steps) == 0:
            raise RejectedEpisode(
                "cut_short",
                f"truncated after {episode.num_steps} steps, before algorithm.num_unroll_steps {num_unroll_steps}; "
                "raise the time limit or unroll fewer steps",
            )

    # Batches go out, priorities come back -----------------------------------------------------------------------

    def sample(self) -> Batch | None:
        """A batch of `batch_size` rows, or None while the limiter holds the learner back."""
        batches = self.sample_many(1)
        return batches[0] if batches else None

    def sample_many(self, num_batches: int) -> list[Batch]:
        """Up to `num_batches` batches; fewer, or none, where the limiter or the disk holds the learner back.

        What the limiter counted is on its way to the disk before they leave: a restarted shard knows of them.
        """
        batches: list[Batch] = []
        while len(batches) < num_batches and self._can_sample():
            drawn = self.store.sampler.sample(self.batch_size, self.rng)
            self.limiter.count_sample(self.batch_size)
            batch = make_batch(
                self.ring.columns,
                drawn.rows,
                self.history_length,
                self.algorithm.num_unroll_steps,
                drawn.importance_weights,
                self.rng,
            )
            batches.append(batch._replace(shard=self.index))
        if batches:
            try:
                self.store.write_state(self.state())
            except LogError:
                self.num_log_failures += 1
                self.limiter.count_sample(-len(batches) * self.batch_size)
                return []
        return batches

    def _can_sample(self) -> bool:
        return self.limiter.can_sample(self.batch_size) and self.ring.num_starts > 0

    def update_priorities(self, update: Priorities) -> None:
        """Priorities that the learner found; those of evicted steps, or older than what is there, are ignored."""
        self.num_ignored_priorities += self.store.update_priorities(update)

    # Reanalyse --------------------------------------------------------------------------------------------------

    def take_for_reanalyse(self, max_transitions: int, version: int | None = None) -> list[StoredEpisode]:
        """Held episodes to search anew, in turn, as far as `reanalyse.ratio` allows.

        version: of the weights that will search; episodes that have targets of it already are left out.
        """
        taken: list[StoredEpisode] = []
        num_taken = 0
        for _ in range(min(self.ring.num_episodes, MAX_LOOKED_AT)):
            if num_taken >= max_transitions or not self._may_refresh():
                break
            entry = self._next_in_turn()
            if version is None or entry.targets_version < version:
                taken.append(StoredEpisode(entry.key, self.ring.episode(entry)))
                num_taken += entry.num_steps
                self.refreshed_transitions += entry.num_steps
        return taken

    def update_targets(self, targets: list[Targets]) -> int:
        """Takes refreshed policies and values; returns how many episodes took them (others are gone, or newer)."""
        return sum(self.store.update_targets(item) for item in targets)

    def _may_refresh(self) -> bool:
        """ratio : (1 − ratio) = transitions searched anew : transitions played."""
        ratio = self._reanalyse_ratio
        return ratio == 1 or self.refreshed_transitions * (1 - ratio) < self.limiter.inserted * ratio

    def _next_in_turn(self) -> Entry:
        """The held episode after the one that was looked at last; behind the newest follows the oldest."""
        oldest = self.ring.oldest
        assert oldest is not None
        key = max(self._last_refreshed + 1, oldest.key)
        while (entry := self.ring.get(key)) is None and key <= self.ring.newest_key:
            key += 1
        entry = entry or oldest
        self._last_refreshed = entry.key
        return entry

    # What lasts -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a restarted shard goes on with, besides its episodes; fits JSON."""
        return {
            "limiter": self.limiter.state(),
            "generator": self.rng.bit_generator.state,
            "inserted_episodes": self.inserted_episodes,
            "refreshed_transitions": self.refreshed_transitions,
            "duplicates": self.num_duplicates,
            "rejects": dict(self.rejects),
        }

    def flush(self) -> None:
        """Makes counters, priorities and refreshed targets durable. A disk that refuses is counted."""
        try:
            self.store.flush(self.state())
        except LogError:
            self.num_log_failures += 1

    def close(self) -> None:
        self.flush()
        self.store.close()

    def _recover(self) -> None:
        state, new_episodes, new_transitions = self.store.recover()
        if state:
            self.limiter.restore(state["limiter"])
            self.rng.bit_generator.state = state["generator"]
            self.inserted_episodes = state["inserted_episodes"]
            self.refreshed_transitions = state["refreshed_transitions"]
            self.num_duplicates = state["duplicates"]
            self.rejects.update(state["rejects"])
        self.inserted_episodes += new_episodes
        self.limiter.count_insert(new_transitions)

    def stats(self) -> dict[str, float]:
        """Counts since the run began; see observability/metrics.py for their meaning."""
        ring, limiter, store = self.ring, self.limiter, self.store
        damage = [store.log.damage, store.journal.damage]
        return {
            "transitions": ring.num_transitions,
            "episodes": ring.num_episodes,
            "bytes": ring.num_bytes,
            "log_bytes": store.log.num_bytes + store.journal.num_bytes,
            "inserted_transitions": limiter.inserted,
            "inserted_episodes": self.inserted_episodes,
            "sampled_rows": limiter.sampled,
            "evicted_transitions": ring.num_evicted_transitions,
            "rejected_episodes": sum(self.rejects.values()),
            "duplicates": self.num_duplicates,
            "refreshed_transitions": self.refreshed_transitions,
            "ignored_priorities": self.num_ignored_priorities,
            "log_failures": self.num_log_failures,
            "corrupt_records": sum(d.corrupt_records + d.torn_tails for d in damage),
        }


def make_limiter(config: Config) -> RateLimiter:
    """A shard's share of the limits. Where nobody plays, nothing is held back."""
    replay, rows = config.replay, config.learner.batch_size
    if config.is_offline:
        return RateLimiter(1.0, 1, float("inf"))
    ratio = replay.samples_per_insert
    min_size = max(replay.min_size_to_sample // replay.num_shards, 1)
    slack = max(4 * rows, 0.1 * min_size * ratio, 2 * ratio)
    return RateLimiter(ratio, min_size, replay.error_buffer or slack)
