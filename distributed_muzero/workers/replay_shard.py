"""A shard of the replay buffer: takes finished episodes, keeps them, makes batches of them."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from distributed_muzero.algorithm.targets import make_batch, num_start_positions
from distributed_muzero.config import Config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import LogError, RejectedEpisode
from distributed_muzero.replay.index import Entry
from distributed_muzero.replay.rate_limiter import RateLimiter, RefreshLimiter
from distributed_muzero.replay.schema import Priorities, StoredEpisode, Targets
from distributed_muzero.replay.store import Appended, EpisodeStore
from distributed_muzero.replay.validation import validate, validate_id
from distributed_muzero.types import Batch, Episode

logger = logging.getLogger(__name__)

NOTHING = Appended([], 0, 0, 0)
MAX_LOOKED_AT = 1000  # episodes in one search for those with outdated targets


class InsertReply(NamedTuple):
    """`wait`: the limiter or the disk holds actors back, offer it again later. All others acknowledge the episode."""

    status: Literal["stored", "duplicate", "rejected", "wait"]
    reason: str = ""


@dataclass
class Offer:
    """Episodes on their way to the disk, and what their actor will be told once they are there."""

    replies: list[InsertReply]
    episode_ids: list[str]
    appended: Appended
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
        self.refresh_limiter = RefreshLimiter(config.reanalyse.ratio)
        self.num_duplicates = 0
        self.num_ignored_priorities = 0
        self.num_missing_episodes = 0
        self.num_limited_inserts = self.num_limited_samples = 0  # calls, since this process began
        self.rejects: Counter[str] = Counter()
        self.one_flush = asyncio.Lock()
        self._last_refreshed = -1  # key
        self._num_pending = 0  # transitions begun, not yet finished
        self.rng = np.random.default_rng([config.run.seed, index])
        try:
            self._recover()
        except BaseException:
            self.store.close()
            raise

    # Episodes come in -----------------------------------------------------------------------------------------

    def insert(self, episodes: list[Episode]) -> list[InsertReply]:
        """Offers finished episodes; one reply for each. Only `wait` leaves the episode with the caller."""
        offer = self.begin(episodes)
        try:
            generation = self.commit()
        except LogError as error:
            return self.abandon(offer, str(error))
        except BaseException as error:
            self.abandon(offer, repr(error))
            raise
        replies = self.finish(offer, generation)
        if self.store.has_dead_segments:
            self.flush()
        return replies

    def begin(self, episodes: list[Episode]) -> Offer:
        """Validates, and appends what is new to the log; nothing is durable before the next `commit`."""
        replies: list[InsertReply] = []
        accepted: list[Episode] = []
        num_transitions = 0
        for episode in episodes:
            known = {other.episode_id for other in accepted}
            replies.append(self._judge(episode, known, self._num_pending + num_transitions))
            if replies[-1].status == "stored":
                accepted.append(episode)
                num_transitions += episode.num_steps
        self.num_limited_inserts += any(reply.status == "wait" for reply in replies)
        appended = self.store.append(accepted) if accepted else NOTHING
        self._num_pending += num_transitions
        # What was rejected may have no id, or be no episode at all.
        names = [
            "" if reply.status == "rejected" else episode.episode_id
            for episode, reply in zip(episodes, replies, strict=True)
        ]
        return Offer(replies, names, appended, num_transitions)

    def commit(self) -> int:
        """Makes what was begun durable; returns what `finish` asks for. Raises LogError if the disk refuses."""
        return self.store.commit()

    def finish(self, offer: Offer, generation: int) -> list[InsertReply]:
        """Indexes what a commit has made durable that began after the offer; the answer acknowledges it.

        generation: that commit's; it tells whether the disk refused these episodes. Offers finish as they began.
        """
        if offer.appended.stored and offer.appended.generation != generation:
            return self.abandon(offer, "the disk refused the write that held it")
        self._num_pending -= offer.num_transitions
        self.limiter.count_insert(offer.num_transitions)
        self.inserted_episodes += len(offer.appended.stored)
        self.store.index(offer.appended)
        return self._answer(offer, "")

    def abandon(self, offer: Offer, reason: str) -> list[InsertReply]:
        """A commit failed that began after the offer: what would have been stored has to wait.

        Unless the commit before, which began while the offer did, has made it durable.
        """
        if offer.appended.stored and self.store.has_committed(offer.appended):
            return self.finish(offer, offer.appended.generation)
        self._num_pending -= offer.num_transitions
        self.store.abandon(offer.appended)
        return self._answer(offer, reason)

    def _answer(self, offer: Offer, reason: str) -> list[InsertReply]:
        """Acknowledges only what is stored by now: the first of a repeated episode may have met a full disk."""
        replies = []
        for name, reply in zip(offer.episode_ids, offer.replies, strict=True):
            if reply.status in ("stored", "duplicate") and not self.store.has_stored(name):
                reply = InsertReply("wait", reason)
            self.num_duplicates += reply.status == "duplicate"
            replies.append(reply)
        return replies

    def _judge(self, episode: Episode, accepted: set[str], num_pending: int) -> InsertReply:
        try:
            validate_id(episode)
            if self.store.knows(episode.episode_id) or episode.episode_id in accepted:
                return InsertReply("duplicate")
            # Without a step to sample, no sampling can let the limiter go on.
            is_empty = self.ring.num_starts == num_pending == 0
            if not (is_empty or self.limiter.can_insert(num_pending)):
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
        self.num_limited_samples += not self._can_sample()
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
            if num_taken >= max_transitions or not self.refresh_limiter.can_refresh(self.limiter.inserted):
                break
            entry = self._next_in_turn()
            if version is None or entry.targets_version < version:
                taken.append(StoredEpisode(entry.key, self.ring.episode(entry)))
                num_taken += entry.num_steps
                self.refresh_limiter.count(entry.num_steps)
        return taken

    def update_targets(self, targets: list[Targets]) -> int:
        """Takes refreshed policies and values; returns how many episodes took them (others are gone, or newer)."""
        return sum(self.store.update_targets(item) for item in targets)

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
            "refreshed_transitions": self.refresh_limiter.refreshed,
            "refresh_limiter": self.refresh_limiter.state(),
            "duplicates": self.num_duplicates,
            "rejects": dict(self.rejects),
        }

    def flush(self) -> None:
        """Makes counters, priorities and refreshed targets durable. A disk that refuses is counted."""
        with suppress(LogError), self.store.flushing(self.state()) as wait_for_disk:
            wait_for_disk()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self.store.close()

    def _recover(self) -> None:
        state, new_episodes, new_transitions, self.num_missing_episodes = self.store.recover()
        if state:
            counts = state["limiter"]
            self.limiter.restore({**counts, "inserted": counts["inserted"] + new_transitions})
            self.rng.bit_generator.state = state["generator"]
            self.inserted_episodes = state["inserted_episodes"]
            self.refresh_limiter.restore(
                state.get("refresh_limiter", {}), self.limiter.inserted, state["refreshed_transitions"]
            )
            self.num_duplicates = state["duplicates"]
            self.rejects.update(state["rejects"])
        else:
            self.limiter.count_insert(new_transitions)
        self.inserted_episodes += new_episodes
        if self.num_missing_episodes:
            logger.error(
                "replay shard %d: %d episodes that it held are no longer in %s; it goes on without them",
                self.index, self.num_missing_episodes, self.store.log.folder,
            )  # fmt: skip

    def stats(self) -> dict[str, float]:
        """Counts since the run began; see observability/metrics.py for their meaning."""
        ring, limiter, store = self.ring, self.limiter, self.store
        damage = [store.log.damage, store.journal.damage]
        oldest = ring.oldest
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
            "refreshed_transitions": self.refresh_limiter.refreshed,
            "ignored_priorities": self.num_ignored_priorities,
            "log_failures": store.num_refusals,
            "corrupt_records": sum(d.corrupt_records + d.torn_tails for d in damage),
            "missing_episodes": self.num_missing_episodes,
            "limited/inserts": self.num_limited_inserts,
            "limited/samples": self.num_limited_samples,
            "pending_transitions": self._num_pending,
            **{f"rejects/{reason}": number for reason, number in self.rejects.items()},
            **({"oldest_version": oldest.weights_version} if oldest else {}),
        }


def make_limiter(config: Config) -> RateLimiter:
    """A shard's share of the limits. Where nobody plays, nothing is held back."""
    replay, rows = config.replay, config.learner.batch_size
    if config.is_offline:
        return RateLimiter(1.0, 1, float("inf"))
    ratio = replay.samples_per_insert
    min_size = max(replay.min_size_to_sample // replay.num_shards, 1)
    slack = max(4 * rows, 0.1 * min_size * ratio, 2 * ratio)
    if replay.error_buffer is not None:
        # With less than a batch, neither side might move.
        slack = max(replay.error_buffer / replay.num_shards, rows)
    return RateLimiter(ratio, min_size, slack)
