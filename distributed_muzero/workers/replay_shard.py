"""A shard of the replay buffer: takes finished episodes, makes batches of them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Literal, NamedTuple

import numpy as np

from distributed_muzero.algorithm.returns import n_step_returns
from distributed_muzero.algorithm.targets import make_batch, num_start_positions
from distributed_muzero.config import AlgorithmConfig, ReplayConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import RejectedEpisode
from distributed_muzero.replay.index import EpisodeRing
from distributed_muzero.replay.rate_limiter import RateLimiter
from distributed_muzero.replay.validation import validate
from distributed_muzero.types import Batch, Episode

MAX_REMEMBERED_IDS = 100_000  # far more than all actors may hold unacknowledged


class InsertReply(NamedTuple):
    """`wait`: the limiter holds actors back, offer it again later. All others acknowledge the episode."""

    status: Literal["stored", "duplicate", "rejected", "wait"]
    reason: str = ""


class ReplayShard:
    """One of `config.num_shards`; budgets and limits are its share of the whole.

    The order is validate → index → acknowledge; the log on disk will stand between the first two.
    """

    def __init__(
        self,
        spec: EnvironmentSpec,
        config: ReplayConfig,
        algorithm: AlgorithmConfig,
        history_length: int,
        batch_size: int,
        seed: int,
    ):
        self.spec = spec
        self.algorithm = algorithm
        self.history_length = history_length
        self.batch_size = batch_size
        self.rng = np.random.default_rng(seed)
        shards = config.num_shards
        self.ring = EpisodeRing(spec, config.max_transitions // shards, config.max_bytes // shards)
        min_size = max(config.min_size_to_sample // shards, 1)
        slack = max(4 * batch_size, 0.1 * min_size * config.samples_per_insert, 2 * config.samples_per_insert)
        self.limiter = RateLimiter(config.samples_per_insert, min_size, config.error_buffer or slack)
        self.num_duplicates = 0
        self.rejects: Counter[str] = Counter()
        self._seen: OrderedDict[str, None] = OrderedDict()

    def insert(self, episodes: list[Episode]) -> list[InsertReply]:
        """Offers finished episodes; one reply for each. Only `wait` leaves the episode with the caller."""
        return [self._insert(episode) for episode in episodes]

    def _insert(self, episode: Episode) -> InsertReply:
        if episode.episode_id in self._seen:
            self.num_duplicates += 1
            return InsertReply("duplicate")
        if not self.limiter.can_insert():
            return InsertReply("wait")
        try:
            num_starts = self._validate(episode)
        except RejectedEpisode as error:
            self.rejects[error.reason] += 1
            return InsertReply("rejected", str(error))
        returns = n_step_returns(
            episode.rewards,
            episode.root_values,
            self.algorithm.discount,
            self.algorithm.td_steps,
            episode.to_play,
        )
        self.ring.add(episode, returns, num_starts)
        self.limiter.count_insert(episode.num_steps)
        self._seen[episode.episode_id] = None
        if len(self._seen) > MAX_REMEMBERED_IDS:
            self._seen.popitem(last=False)
        return InsertReply("stored")

    def _validate(self, episode: Episode) -> int:
        """The number of its start positions. Raises RejectedEpisode for an episode that can't be learnt from."""
        validate(episode, self.spec, self.ring.capacity - 1)
        num_unroll_steps = self.algorithm.num_unroll_steps
        num_starts = num_start_positions(episode, num_unroll_steps)
        if num_starts == 0:
            raise RejectedEpisode(
                "cut_short",
                f"truncated after {episode.num_steps} steps, before algorithm.num_unroll_steps {num_unroll_steps}; "
                "raise the time limit or unroll fewer steps",
            )
        return num_starts

    def sample(self) -> Batch | None:
        """A batch of `batch_size` rows drawn uniformly, or None while the limiter holds the learner back."""
        if not self.limiter.can_sample(self.batch_size) or self.ring.num_starts == 0:
            return None
        rows = self.ring.sample_rows(self.batch_size, self.rng)
        self.limiter.count_sample(self.batch_size)
        weights = np.ones(self.batch_size, np.float32)
        return make_batch(
            self.ring.columns, rows, self.history_length, self.algorithm.num_unroll_steps, weights, self.rng
        )

    def sample_many(self, num_batches: int) -> list[Batch]:
        """Up to `num_batches` batches; fewer, or none, where the limiter holds the learner back."""
        batches: list[Batch] = []
        while len(batches) < num_batches and (batch := self.sample()) is not None:
            batches.append(batch)
        return batches

    def stats(self) -> dict[str, float]:
        """Counts since the shard began; see observability/metrics.py for their meaning."""
        ring, limiter = self.ring, self.limiter
        return {
            "transitions": ring.num_transitions,
            "episodes": ring.num_episodes,
            "bytes": ring.num_bytes,
            "inserted_transitions": limiter.inserted,
            "inserted_episodes": ring.num_inserted,
            "sampled_rows": limiter.sampled,
            "evicted_transitions": ring.num_evicted_transitions,
            "rejected_episodes": sum(self.rejects.values()),
            "duplicates": self.num_duplicates,
        }
