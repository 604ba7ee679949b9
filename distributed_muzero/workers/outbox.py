"""Finished episodes on their way to the shards, held until a shard acknowledges them."""

from __future__ import annotations

from collections.abc import Callable

from distributed_muzero.replay.index import shard_of
from distributed_muzero.types import Episode
from distributed_muzero.workers.replay_shard import InsertReply
from distributed_muzero.workers.run_state import ActorReport

# Offers {shard: episodes} to the shards at once; a shard that gave no answer is left out of the result.
Insert = Callable[[dict[int, list[Episode]]], dict[int, list[InsertReply]]]


class Outbox:
    """Episodes that no shard has acknowledged yet; nothing leaves it otherwise.

    While a shard holds the actors back, `is_blocked` asks the actor to stop playing: games that wait only grow stale.
    Then just the oldest episode is offered to that shard, to ask rather than to deliver. One step of B games may
    finish all of them, so the outbox holds at most limit + B − 1 episodes.

    An episode's shard follows from its id, so one that is offered again, because an answer was lost, meets the shard
    that may hold it already.
    """

    def __init__(self, insert: Insert, num_shards: int, limit: int):
        self._insert = insert
        self._num_shards = num_shards
        self._limit = limit
        self._waiting: list[Episode] = []
        self._closed: set[int] = set()  # shards that refused, or gave no answer

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_blocked(self) -> bool:
        return bool(self._closed) or len(self._waiting) >= self._limit

    def put(self, episode: Episode) -> None:
        self._waiting.append(episode)

    def flush(self, report: ActorReport) -> None:
        """Offers what waits. What is acknowledged leaves; a refusal for good is told in the report."""
        offers: dict[int, list[Episode]] = {}
        for episode in self._waiting:
            shard = shard_of(episode.episode_id, self._num_shards)
            if shard not in self._closed or shard not in offers:
                offers.setdefault(shard, []).append(episode)
        if not offers:
            return
        replies = self._insert(offers)
        done = set()
        for shard, episodes in offers.items():
            answers = replies.get(shard, [InsertReply("wait")])
            (self._closed.add if answers[-1].status == "wait" else self._closed.discard)(shard)
            for episode, answer in zip(episodes, answers, strict=False):
                if answer.status == "rejected":
                    report.last_rejection = answer.reason
                if answer.status != "wait":
                    done.add(episode.episode_id)
        self._waiting = [episode for episode in self._waiting if episode.episode_id not in done]

    def drain(self, is_over: Callable[[], bool], pause: Callable[[], None] | None = None) -> int:
        """Offers what is left as long as something is taken; returns how many episodes are left.

        A shard that held back is offered one episode at first.   pause: waits before the next offer where nothing was
        taken; without it, that is the end.
        """
        while len(self) > 0 and not is_over():
            before = len(self)
            self.flush(ActorReport())
            if len(self) == before:
                if pause is None:
                    break
                pause()
        return len(self)
