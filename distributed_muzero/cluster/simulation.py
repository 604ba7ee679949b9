"""The data plane without search and without gradients: real driver, shards, outboxes and streams, synthetic players.

Hundreds of actors share a few host processes, each actor a thread there. The driver makes the calls that it would make
to as many processes of their own.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import psutil
import ray
from ray.exceptions import GetTimeoutError

from distributed_muzero.cluster.driver import Driver
from distributed_muzero.cluster.makers import Makers, make_control
from distributed_muzero.cluster.program import DRAIN_PAUSE_SECONDS, DRAIN_SECONDS, RemoteInsert
from distributed_muzero.cluster.run_control import first_desired
from distributed_muzero.config import Config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import ClusterError
from distributed_muzero.types import Episode
from distributed_muzero.workers.bookkeeper import Bookkeeper
from distributed_muzero.workers.outbox import Outbox
from distributed_muzero.workers.replay_shard import InsertReply, ReplayShard
from distributed_muzero.workers.run_state import ActorReport, outcome

BLOCKED_SECONDS = 0.08  # between two offers of an actor that is held back, as Actor.play waits in the end
WARM_UP_SECONDS = 1.0  # after the last actor has begun
START_SECONDS = 110.0  # until the last actor has begun: the driver would replace those that are later
END_SECONDS = 60.0  # until what was played is stored
ANSWER_SECONDS = 20.0


class Players(NamedTuple):
    """The synthetic actors of a simulation."""

    num_actors: int
    num_hosts: int  # processes that they share
    episode: Episode  # what each of them plays, under ever new ids
    episodes_at_once: int = 4  # that one step of an actor finishes
    episodes_per_second: float | None = None  # of all together; None = as fast as they are acknowledged


@dataclass
class Counts:
    """What hosts did; `stored_at` has (monotonic seconds, episodes) of each acknowledgement."""

    offered: int = 0
    acknowledged: list[str] = field(default_factory=list)  # ids
    statuses: Counter[str] = field(default_factory=Counter)
    stored_at: list[tuple[float, int]] = field(default_factory=list)
    calls_at: list[tuple[float, float]] = field(
        default_factory=list
    )  # begin of a play, idle seconds before it
    left: int = 0  # episodes that no shard has acknowledged

    def add(self, other: Counts) -> None:
        self.offered += other.offered
        self.acknowledged += other.acknowledged
        self.statuses += other.statuses
        self.stored_at += other.stored_at
        self.calls_at += other.calls_at
        self.left += other.left


class SyntheticActor:
    """Games without a search, through a real outbox to the real shards."""

    def __init__(self, name: str, index: int, players: Players, shards: list[Any]):
        self._name = name
        self._players = players
        self._insert = RemoteInsert(shards)
        self.outbox = Outbox(self._note_answers, len(shards), 64)
        self.counts = Counts()
        self.lock = threading.Lock()  # held by the thread that plays or drains
        self._ended: float | None = None
        self._is_leaving = False
        rate = players.episodes_per_second
        self._period = 0.0 if rate is None else players.episodes_at_once * players.num_actors / rate
        self._next = time.monotonic() + self._period * index / players.num_actors

    def play(self, version: int, seconds: float) -> ActorReport:
        """As Actor.play, with steps that cost nothing. A call that was on its way when it was drained plays nothing."""
        report = ActorReport(weights_version=version)
        if self._is_leaving:
            return report
        start = time.monotonic()
        self.counts.calls_at.append((start, 0.0 if self._ended is None else start - self._ended))
        while (now := time.monotonic()) < start + seconds:
            if self.outbox.is_blocked:
                time.sleep(BLOCKED_SECONDS)
                self.outbox.flush(report)
                report.waited_seconds += time.monotonic() - now
            elif now < self._next:
                time.sleep(min(self._next, start + seconds) - now)
            else:
                self._finish_games(report)
                self.outbox.flush(report)
                self._next = max(self._next + self._period, now)
        report.unacknowledged = len(self.outbox)
        self._ended = time.monotonic()
        report.seconds = self._ended - start
        return report

    def drain(self, is_patient: bool) -> int:
        """As ActorWorker.drain."""
        self._is_leaving = True
        deadline = time.monotonic() + DRAIN_SECONDS
        pause = partial(time.sleep, DRAIN_PAUSE_SECONDS) if is_patient else None
        self.counts.left = self.outbox.drain(lambda: time.monotonic() >= deadline, pause)
        return self.counts.left

    def _finish_games(self, report: ActorReport) -> None:
        episode = self._players.episode
        for _ in range(self._players.episodes_at_once):
            self.counts.offered += 1
            self.outbox.put(replace(episode, episode_id=f"{self._name}/{self.counts.offered}"))
            report.returns.append(episode.episode_return)
            report.lengths.append(episode.num_steps)
            report.env_steps += episode.num_steps

    def _note_answers(self, offers: dict[int, list[Episode]]) -> dict[int, list[InsertReply]]:
        replies = self._insert(offers)
        before = len(self.counts.acknowledged)
        for shard, answers in replies.items():
            for episode, answer in zip(offers[shard], answers, strict=True):
                self.counts.statuses[answer.status] += 1
                if answer.status in ("stored", "duplicate"):
                    self.counts.acknowledged.append(episode.episode_id)
        self.counts.stored_at.append((time.monotonic(), len(self.counts.acknowledged) - before))
        return replies


@ray.remote(num_cpus=0)
class ActorHost:
    """Many synthetic actors in one process; each call to one of them runs in a thread."""

    def __init__(self, run_name: str, players: Players, shards: list[Any]):
        self._make = lambda index: SyntheticActor(f"{run_name}/{index}/0", index, players, shards)
        self._actors: dict[int, SyntheticActor] = {}
        self._lock = threading.Lock()

    def ready(self, index: int) -> None:
        with self._lock:
            self._actors.setdefault(index, self._make(index))

    def play(
        self, index: int, version: int, weights: np.ndarray, learner_step: int, stage: int, seconds: float
    ) -> ActorReport:
        actor = self._actors[index]
        with actor.lock:
            return actor.play(version, seconds)

    def drain(self, index: int, is_patient: bool) -> int:
        actor = self._actors[index]
        with actor.lock:
            return actor.drain(is_patient)

    def counts(self) -> Counts:
        """Of all its actors; nobody plays any more."""
        total = Counts()
        for actor in self._actors.values():
            total.add(actor.counts)
        return total


class HostedActor:
    """Stands for the handle of an actor's process: `.play.remote(…)` asks its host."""

    def __init__(self, host: Any, index: int):
        self.ready = HostedMethod(host.ready, index)
        self.play = HostedMethod(host.play, index)
        self.drain = HostedMethod(host.drain, index)


@dataclass
class HostedMethod:
    method: Any
    index: int

    def remote(self, *arguments: Any) -> Any:
        return self.method.remote(self.index, *arguments)


class SimulationMakers(Makers):
    """Real shards and the real learner's process; what makes their parts is replaced, and so are the actors."""

    def __init__(
        self,
        config: Config,
        run_name: str,
        book: Bookkeeper,
        spec: EnvironmentSpec,
        players: Players,
        make_learner: Callable[[], Any],
    ):
        super().__init__(config, run_name, book)
        self.spec = spec
        self.players = players
        self.make_learner = make_learner
        self.hosts: list[Any] = []
        self.handles: list[Any] = []  # of all processes

    def _shard(self, index: int) -> Any:
        folder = self.book.folder.replay / f"shard_{index}"
        return self._made_by(
            super()._shard(index), partial(ReplayShard, self.spec, self.config, index, folder)
        )

    def _learner(self) -> Any:
        return self._made_by(super()._learner(), self.make_learner)

    def _made_by(self, handle: Any, make: Callable[[], Any]) -> Any:
        self.handles.append(handle)
        # A shard may begin with a later call first.
        ray.get(handle.__ray_call__.remote(set_make, make), timeout=START_SECONDS)
        return handle

    def _actor(self, index: int) -> Any:
        while len(self.hosts) < self.players.num_hosts:
            threads = -(-self.players.num_actors // self.players.num_hosts) + 1
            options = ActorHost.options(max_concurrency=threads)  # type: ignore[attr-defined]
            self.hosts.append(options.remote(self.run_name, self.players, self._shard_handles))
        return HostedActor(self.hosts[index % self.players.num_hosts], index)


def set_make(worker: Any, make: Callable[[], Any]) -> None:
    """The worker, one of program.py's, makes its part by this at its first use."""
    worker.make = make


class Snapshot(NamedTuple):
    """How things stood at one moment."""

    time: float  # monotonic seconds
    driver_cpu: float  # seconds of this process, Ray's threads in it included
    cpu: dict[str, float]  # seconds by kind of process
    learner_steps: int


class Stretch:
    """Asks the driver to stop after so many seconds with all actors at work, and remembers both ends."""

    def __init__(self, num_actors: int, seconds: float):
        self._num_actors = num_actors
        self._seconds = seconds
        self._give_up = time.monotonic() + START_SECONDS
        self._begins: float | None = None
        self._has_asked = False
        self.driver: Driver | None = None
        self.first: Snapshot | None = None
        self.last: Snapshot | None = None

    def is_over(self) -> bool:
        """The driver's `stop_requested`. It leaves the driver to its last calls; what they delivered is counted later.

        Raises ClusterError if the actors don't come to play.
        """
        now, driver = time.monotonic(), self.driver
        assert driver is not None
        if self._begins is None:
            if len(driver.actors) == self._num_actors and all(role.working_since for role in driver.actors):
                self._begins = now + WARM_UP_SECONDS
            elif now > self._give_up:
                raise ClusterError(
                    f"{self._num_actors} actors were to play within {START_SECONDS:.0f} s; try fewer of them"
                )
        elif self.first is None and now >= self._begins:
            self.first = snapshot(driver)
        elif self.first and self.last is None and now >= self.first.time + self._seconds:
            self.last = snapshot(driver)
            driver.control.handle.set_desired.remote(stop=True, in_haste=True)
        return False


def snapshot(driver: Driver) -> Snapshot:
    steps = driver.book.state.learner.learner_steps
    return Snapshot(time.monotonic(), time.process_time(), cpu_by_kind(), steps)


def cpu_by_kind() -> dict[str, float]:
    """CPU seconds of the processes that this one has started, by what Ray calls them (ReplayShardWorker, raylet)."""
    seconds: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            title = (process.cmdline() or [process.name()])[0]
            times = process.cpu_times()
        except psutil.Error:
            continue  # it has just ended
        kind = title.removeprefix("ray::").partition(".")[0].rpartition("/")[2]
        seconds[kind] = seconds.get(kind, 0.0) + times.user + times.system
    return seconds


class Measured(NamedTuple):
    """One simulation. Seconds are those of the stretch with all actors at work."""

    seconds: float
    episodes: int  # acknowledged meanwhile
    batches: int  # that the learner took meanwhile
    batch_bytes: float  # of one
    play_calls: int  # that the actors were asked for meanwhile
    idle_seconds: float  # of all actors together, between two of those calls
    driver_cpu: float  # seconds meanwhile
    cpu: dict[str, float]  # seconds meanwhile, by kind of process
    counts: Counts  # of the whole simulation
    shard_stats: list[dict[str, float]]  # at its end


def simulate(
    config: Config,
    book: Bookkeeper,
    spec: EnvironmentSpec,
    players: Players,
    make_learner: Callable[[], Any],
    seconds: float,
) -> Measured:
    """Runs the data plane for so long, and then until all that was played is stored.

    config: `actor.num_actors` is the players' number.   make_learner: gives what a LearnerWorker wraps; its
    `num_bytes` counts the bytes of the batches it took.   Needs a Ray session. Raises ClusterError if the actors
    don't come to play, or there are no answers at the end.
    """
    name = book.folder.name
    makers = SimulationMakers(config, name, book, spec, players, make_learner)
    desired = first_desired(config)
    control = make_control(name, desired)
    stretch = Stretch(players.num_actors, seconds)
    stretch.driver = Driver(config, name, book, stretch.is_over, desired, control, makers)
    try:
        outcome(stretch.driver.turns())
        assert stretch.first and stretch.last
        deliver_the_rest(makers, stretch.driver.learner.handle)
        return result(makers, stretch.driver.learner.handle, stretch.first, stretch.last)
    except GetTimeoutError:
        raise ClusterError("the processes gave no answer in time; try fewer actors") from None
    finally:
        for handle in (*makers.hosts, *makers.handles, control):
            ray.kill(handle)


def deliver_the_rest(makers: SimulationMakers, learner: Any) -> None:
    """The learner goes on, so that no limiter holds the last games back."""
    num_hosts, deadline = len(makers.hosts), time.monotonic() + END_SECONDS
    left: Iterable[int] = range(makers.players.num_actors)
    while left and time.monotonic() < deadline:
        draining = {makers.hosts[index % num_hosts].drain.remote(index, True): index for index in left}
        waiting = list(draining)
        while waiting and time.monotonic() < deadline:
            ray.get(learner.train.remote(0.1), timeout=ANSWER_SECONDS)
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        left = [index for call, index in draining.items() if ray.get(call, timeout=ANSWER_SECONDS)]


def result(makers: SimulationMakers, learner: Any, first: Snapshot, last: Snapshot) -> Measured:
    """Puts all counts together. Nobody plays any more."""
    num_bytes, num_steps = ray.get(learner.__ray_call__.remote(bytes_and_steps), timeout=ANSWER_SECONDS)
    counts = Counts()
    for part in ray.get([host.counts.remote() for host in makers.hosts], timeout=ANSWER_SECONDS):
        counts.add(part)
    stats = ray.get([role.handle.flush.remote() for role in makers.shards], timeout=ANSWER_SECONDS)
    calls = [idle for time, idle in counts.calls_at if first.time <= time < last.time]
    return Measured(
        last.time - first.time,
        sum(number for time, number in counts.stored_at if first.time <= time < last.time),
        last.learner_steps - first.learner_steps,
        num_bytes / max(num_steps, 1),
        len(calls),
        sum(calls),
        last.driver_cpu - first.driver_cpu,
        {kind: last.cpu[kind] - first.cpu.get(kind, 0.0) for kind in last.cpu},
        counts,
        stats,
    )


def bytes_and_steps(worker: Any) -> tuple[int, int]:
    return worker.learner.num_bytes, worker.learner.num_steps
