"""Finished episodes on their way to the shards, held until a shard acknowledges them."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from distributed_muzero.types import Episode
from distributed_muzero.workers.replay_shard import InsertReply
from distributed_muzero.workers.run_state import ActorReport

# Offers {shard: episodes} to the shards at once; a shard that gave no answer is left out of the result.
Insert = Callable[[dict[int, list[Episode]]], dict[int, list[InsertReply]]]


class Outbox:
    """Episodes without acknowledgement; nothing leaves it otherwise.

    It is full from `limit` on, and an actor then plays no further step. The step that fills it may end several games,
    so B games in lockstep hold at most limit + B − 1 episodes.

    An episode's shard follows from its id, so one that is offered again, because an answer was lost, meets the shard
    that may hold it already.
    """

    def __init__(self, insert: Insert, num_shards: int, limit: int):
        self._insert = insert
        self._num_shards = num_shards
        self._limit = limit
        self._waiting: list[Episode] = []

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        return len(self._waiting) >= self._limit

    def put(self, episode: Episode) -> None:
        self._waiting.append(episode)

    def flush(self, report: ActorReport) -> None:
        """Offers everything once. What is acknowledged leaves; refusals are counted in the report."""
        offers: dict[int, list[Episode]] = {}
        for episode in self._waiting:
            offers.setdefault(zlib.crc32(episode.episode_id.encode()) % self._num_shards, []).append(episode)
        if not offers:
            return
        replies = self._insert(offers)
        waiting = []
        for shard, episodes in offers.items():
            answers = replies.get(shard) or [InsertReply("wait")] * len(episodes)
            for episode, answer in zip(episodes, answers, strict=True):
                if answer.status == "wait":
                    waiting.append(episode)
                elif answer.status == "rejected":
                    report.num_rejected += 1
                    report.last_rejection = answer.reason
        self._waiting = waiting
