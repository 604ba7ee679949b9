"""Every remote class of a run on one page. Each is a thin shell: what it does stands in the worker it wraps.

A shell makes its worker at the first call, not in its constructor: what goes wrong then reaches the driver as the
exception that it is, where Ray makes a dead process of an exception in a constructor.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from distributed_muzero.cluster.group_commit import GroupCommit, flush, insert
from distributed_muzero.cluster.process_metrics import ActorMetrics, ShardMetrics
from distributed_muzero.config import Config
from distributed_muzero.errors import RunError
from distributed_muzero.replay.schema import Priorities, StoredEpisode, Targets
from distributed_muzero.types import Batch, Episode
from distributed_muzero.workers.builder import Builder
from distributed_muzero.workers.history import RecordedInsert
from distributed_muzero.workers.league import Member, Rival
from distributed_muzero.workers.outbox import Insert, Outbox
from distributed_muzero.workers.replay_shard import InsertReply, ReplayShard
from distributed_muzero.workers.run_copy import Owned, ShardCopy
from distributed_muzero.workers.run_state import ActorReport, LearnerReport, ReanalyseReport, Version

if TYPE_CHECKING:  # they import torch, which a shard's process does without
    from distributed_muzero.workers.actor import Actor
    from distributed_muzero.workers.evaluator import Evaluator
    from distributed_muzero.workers.learner import Learner
    from distributed_muzero.workers.reanalyser import Reanalyser

BATCHES_PER_CALL = 4
REST_SECONDS = 0.005  # before a shard that had nothing is asked again
MAX_UPDATES_IN_FLIGHT = 32  # of priorities
LOST_REST_SECONDS = 0.5  # before a shard that was lost is asked again
INSERT_TIMEOUT_SECONDS = 20.0
SAMPLE_TIMEOUT_SECONDS = 20.0
DRAIN_SECONDS = 4.0  # of one call
DRAIN_PAUSE_SECONDS = 0.05


class made_at_first_use:
    """functools.cached_property without its lock, which can't travel with the class to another process.

    What failed once is not tried again: it fails with the same exception.
    """

    def __init__(self, make: Callable[[Any], Any]):
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        failure = f"_{self._name}_failure"
        if failure in instance.__dict__:
            raise instance.__dict__[failure].with_traceback(None)
        try:
            value = instance.__dict__[self._name] = self._make(instance)
        except Exception as error:
            instance.__dict__[failure] = error
            raise
        return value


@ray.remote(num_cpus=0, max_restarts=-1)
class ReplayShardWorker:
    """Everything runs in one event loop but what waits for the disk: it goes on sampling meanwhile."""

    def __init__(
        self, config: Config, run_name: str, index: int, replay_folder: Path, owned: Owned | None = None
    ):
        """owned: the run's copy at a URI, if there is one."""
        self.make = lambda: Builder(config, run_name).replay_shard(index, replay_folder)
        self.make_copy = lambda: ShardCopy(replay_folder.parent, owned, index) if owned else None
        self.copy: ShardCopy | None = None
        self.metrics = ShardMetrics(run_name)
        self.must_share = replay_folder if config.replay.spread_shards and not owned else None

    @made_at_first_use
    def shard(self) -> ReplayShard:
        if self.must_share and not self.must_share.is_dir():
            raise RunError(
                f"{self.must_share} isn't there on node {ray.util.get_node_ip_address()}: with "
                "replay.spread_shards every node has to see the runs folder; put it on a shared file system or at a "
                "URI, or leave replay.spread_shards false"
            )
        self.copy = self.make_copy()
        shard = self.make()
        if self.copy:
            self.copy.begin()
        return shard

    async def ready(self) -> None:
        """Answers as soon as there is a process."""

    @made_at_first_use
    def group_commit(self) -> GroupCommit:
        return GroupCommit(self.shard.commit)

    async def insert(self, episodes: list[Episode]) -> list[InsertReply]:
        since = time.monotonic()
        replies = await insert(self.shard, self.group_commit, episodes)
        self.metrics.add_insert(num_stored(episodes, replies), time.monotonic() - since)
        return replies

    async def sample(self, num_batches: int) -> list[Batch]:
        batches = self.shard.sample_many(num_batches)
        self.metrics.add(sampled_rows=sum(len(batch.positions) for batch in batches))
        return batches

    async def update_priorities(self, update: Priorities) -> None:
        self.shard.update_priorities(update)

    async def take_for_reanalyse(self, max_transitions: int, version: int) -> list[StoredEpisode]:
        return self.shard.take_for_reanalyse(max_transitions, version)

    async def update_targets(self, targets: list[Targets]) -> int:
        return self.shard.update_targets(targets)

    async def flush(self) -> dict[str, float]:
        await flush(self.shard)
        return {**self.shard.stats(), **(self.copy.stats() if self.copy else {})}

    async def last_push(self) -> str | None:
        """Copies once more before the process is ended; returns what went wrong."""
        return await asyncio.to_thread(self.copy.end) if self.copy else None


def num_stored(episodes: list[Episode], replies: list[InsertReply]) -> int:
    """Transitions that are new."""
    pairs = zip(episodes, replies, strict=True)
    return sum(episode.num_steps for episode, reply in pairs if reply.status == "stored")


@ray.remote(num_cpus=1)
class ActorWorker:
    def __init__(
        self, config: Config, run_name: str, index: int, incarnation: int, shards: list[Any], history: Path
    ):
        self.make = lambda: Builder(config, run_name).actor(index, incarnation)
        insert: Insert = RemoteInsert(shards)
        if config.actor.record_history:
            insert = RecordedInsert(insert, history / f"actor_{index}_{incarnation}.jsonl")
        self.outbox = Outbox(insert, len(shards), config.actor.max_unacknowledged)
        self.metrics = ActorMetrics(run_name)

    @made_at_first_use
    def actor(self) -> Actor:
        return self.make()

    def ready(self) -> None:
        """Answers as soon as there is a process."""

    def play(
        self, version: int, weights: np.ndarray, learner_step: int, stage: int, seconds: float
    ) -> ActorReport:
        self.actor.set_weights(version, weights, learner_step)
        self.actor.set_stage(stage)
        deadline = time.monotonic() + seconds
        report = self.actor.play(self.outbox, lambda: time.monotonic() >= deadline, time.sleep)
        self.metrics.add_report(report)
        return report

    def drain(self, is_patient: bool) -> int:
        """Delivers what is finished; returns how many episodes are left.

        is_patient: for a few seconds, else only as long as the shards take something.
        """
        deadline = time.monotonic() + DRAIN_SECONDS
        pause = partial(time.sleep, DRAIN_PAUSE_SECONDS) if is_patient else None
        return self.outbox.drain(lambda: time.monotonic() >= deadline, pause)


@ray.remote(num_cpus=0, concurrency_groups={"publishing": 1})  # type: ignore[call-overload]
class LearnerWorker:
    """Steps in one thread; weights leave through another, so that the learner goes on meanwhile."""

    def __init__(self, config: Config, run_name: str, shards: list[Any]):
        self.make = lambda: Builder(config, run_name).learner()
        self.batches = BatchStream(shards, config.learner.prefetch)
        self.give_back = self.batches.give_back if config.replay.priority_exponent > 0 else None

    @made_at_first_use
    def learner(self) -> Learner:
        return self.make()

    def ready(self) -> None:
        """Answers as soon as there is a process."""

    def begin(self, arrays: Any, state: dict[str, Any] | None, min_version: int) -> None:
        self.learner.begin(arrays, state, min_version)

    def start_from(self, weights: np.ndarray, num_steps: int, version: int) -> None:
        self.learner.start_from(weights, num_steps, version)

    @ray.method(concurrency_group="publishing", num_returns=2)
    def weights(self) -> tuple[Version, np.ndarray]:
        """The newest version; asked for once the learner has begun."""
        return self.learner.give_out()

    def train(self, seconds: float) -> LearnerReport:
        start, waited = time.monotonic(), self.batches.waited_seconds
        report = self.learner.learn(self.batches.until(start + seconds), self.give_back)
        report.seconds = time.monotonic() - start
        report.waited_seconds = self.batches.waited_seconds - waited
        report.ready_batches = self.batches.num_ready
        return report

    def state(self) -> tuple[Any, np.ndarray]:
        return self.learner.state(), self.learner.average_weights()


@ray.remote(num_cpus=1)
class ReanalyserWorker:
    def __init__(self, config: Config, run_name: str, index: int, shards: list[Any]):
        self.make = lambda: Builder(config, run_name).reanalyser(index)
        self.shards = shards

    @made_at_first_use
    def reanalyser(self) -> Reanalyser:
        return self.make()

    def ready(self) -> None:
        """Answers as soon as there is a process."""

    def work(self, version: int, weights: np.ndarray, seconds: float) -> ReanalyseReport:
        self.reanalyser.set_weights(version, weights)
        deadline = time.monotonic() + seconds
        return self.reanalyser.work(self.take, self.put, lambda: time.monotonic() >= deadline, time.sleep)

    def take(self, shard: int, max_transitions: int) -> list[StoredEpisode]:
        call = self.shards[shard].take_for_reanalyse.remote(max_transitions, self.reanalyser.version)
        return answer_or(call, [])

    def put(self, shard: int, targets: list[Targets]) -> int:
        return answer_or(self.shards[shard].update_targets.remote(targets), 0)


def answer_or(call: Any, otherwise: Any, timeout: float = INSERT_TIMEOUT_SECONDS) -> Any:
    """A shard's answer; `otherwise` while it is lost: what it would have got is asked for again."""
    try:
        return ray.get(call, timeout=timeout)
    except (RayActorError, ObjectLostError, GetTimeoutError):
        return otherwise


@ray.remote(num_cpus=0)
class EvaluatorWorker:
    def __init__(self, config: Config, run_name: str):
        self.make = lambda: Builder(config, run_name).evaluator()

    @made_at_first_use
    def evaluator(self) -> Evaluator:
        return self.make()

    def evaluate(
        self, version: int, weights: np.ndarray, seeds: tuple[int, ...], members: list[Member], *theirs: Any
    ) -> dict[str, object]:
        """theirs: the weights of each member of the league that is to be met."""
        rivals = map(Rival, members, theirs)
        return self.evaluator.assess(version, weights, seeds, rivals)


class RemoteInsert:
    """An actor's way to the shards: one call each, all at once. A shard that doesn't answer is left out."""

    def __init__(self, shards: list[Any]):
        self._shards = shards

    def __call__(self, offers: dict[int, list[Episode]]) -> dict[int, list[InsertReply]]:
        calls = {index: self._shards[index].insert.remote(episodes) for index, episodes in offers.items()}
        deadline = time.monotonic() + INSERT_TIMEOUT_SECONDS
        replies = {}
        for index, call in calls.items():
            answer = answer_or(call, None, max(deadline - time.monotonic(), 0.01))
            if answer is not None:  # else offered again later, under the same ids
                replies[index] = answer
        return replies


class BatchStream:
    """The learner's way to the shards: `prefetch` calls in flight to each, whichever answers first."""

    def __init__(self, shards: list[Any], prefetch: int):
        self._shards = shards
        self._prefetch = prefetch
        self._calls: dict[Any, tuple[int, float]] = {}  # call -> its shard, and when it is given up
        self._wake = [0.0] * len(shards)  # when a resting shard is asked again
        self._ready: list[Batch] = []
        self._given_back: deque[Any] = deque()
        self.waited_seconds = 0.0  # so far, with no batch at hand

    def until(self, deadline: float) -> Iterator[Batch]:
        """Batches as they come, until `deadline` (monotonic seconds)."""
        while time.monotonic() < deadline:
            if self._ready:
                yield self._ready.pop()
                continue
            since = time.monotonic()
            self._ask()
            self._wait(deadline)
            self.waited_seconds += time.monotonic() - since

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    def give_back(self, shard: int, update: Priorities) -> None:
        """Sends priorities on their way. Where a shard lags behind, the learner waits for it, but not for long."""
        self._given_back.append(self._shards[shard].update_priorities.remote(update))
        if len(self._given_back) > MAX_UPDATES_IN_FLIGHT:
            ray.wait([self._given_back.popleft()], timeout=LOST_REST_SECONDS)

    def _wait(self, deadline: float) -> None:
        if not self._calls:
            time.sleep(REST_SECONDS)
            return
        # Not until the deadline: another shard's rest may be over before a hung one answers.
        timeout = min(max(deadline - time.monotonic(), 0), LOST_REST_SECONDS)
        done, _ = ray.wait(list(self._calls), timeout=timeout)
        for call in done:
            self._take(call)

    def _ask(self) -> None:
        now = time.monotonic()
        self._calls = {call: (index, end) for call, (index, end) in self._calls.items() if now < end}
        in_flight = [index for index, _ in self._calls.values()]
        for index, shard in enumerate(self._shards):
            if now >= self._wake[index]:
                for _ in range(self._prefetch - in_flight.count(index)):
                    self._calls[shard.sample.remote(BATCHES_PER_CALL)] = index, now + SAMPLE_TIMEOUT_SECONDS

    def _take(self, call: Any) -> None:
        index, _ = self._calls.pop(call)
        try:
            batches = ray.get(call)
        except (RayActorError, ObjectLostError):
            self._wake[index] = time.monotonic() + LOST_REST_SECONDS
            return
        if not batches:
            self._wake[index] = time.monotonic() + REST_SECONDS
        self._ready.extend(batches)
        self._ask()
