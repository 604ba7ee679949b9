"""A version's way from the learner's step into every actor's networks, through the processes of a real run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import ray
from ray.exceptions import GetTimeoutError

from distributed_muzero.cluster.driver import LEARNER_CALLS_IN_FLIGHT
from distributed_muzero.cluster.program import ActorWorker, LearnerWorker, ReplayShardWorker
from distributed_muzero.config import Config
from distributed_muzero.errors import ClusterError
from distributed_muzero.types import Episode

START_SECONDS = 300.0  # until the last process has made its networks
STEP_SECONDS = 60.0  # of one learner step at most
LEARNER_CALLS = 1 + LEARNER_CALLS_IN_FLIGHT


class Trip(NamedTuple):
    """One version. Seconds since the learner's step that made it."""

    packed: float  # ready to leave the learner's process
    offered: float  # the driver has its reference
    first: float  # the first actor has written it into its networks
    last: float  # the last one has


class Steps(NamedTuple):
    """What the learner's thread did, in seconds: of each step, and of it, setting a version aside."""

    step: list[float]
    publish: list[float]


class Private(NamedTuple):
    """Private memory (USS) of each actor's process, bytes."""

    before: list[int]  # its networks are made; they have weights already
    viewing: list[int]  # it has read every weight in the object store
    after: list[int]  # it plays with them
    later: list[int]  # it plays with the last version


class Broadcast(NamedTuple):
    quiet: list[Trip]  # the learner waits meanwhile
    busy: list[Trip]  # the learner goes on stepping
    alone: Steps  # nobody takes the versions
    giving: Steps  # each version is given out, no actor takes it
    sending: Steps  # actors take the versions: the steps of `busy`
    private: Private


class Crew:
    """A learner, a shard that feeds it and actors, as a run has them."""

    def __init__(
        self, config: Config, folder: Path, episode: Episode, make_learner: Callable[[], Any], num_actors: int
    ):
        """make_learner: notes `made_at` (version -> monotonic seconds) and `timed` (step, publish seconds)."""
        self.shard = ReplayShardWorker.remote(config, "bench", 0, folder)  # type: ignore[attr-defined]
        self.learner = LearnerWorker.remote(config, "bench", [self.shard])  # type: ignore[attr-defined]
        self.actors = [
            ActorWorker.remote(config, "bench", index, 0, [self.shard], folder)  # type: ignore[attr-defined]
            for index in range(num_actors)
        ]
        self._training: list[Any] = []
        self._make_learner = make_learner
        self._episode = episode

    def begin(self) -> None:
        self.learner.__ray_call__.remote(set_make, self._make_learner)
        begun = [
            self.learner.begin.remote(None, None, 1),
            self.shard.insert.remote([self._episode]),
            *(actor.__ray_call__.remote(make_networks) for actor in self.actors),
        ]
        ray.get(begun, timeout=START_SECONDS)

    def step_on(self) -> None:
        """Waits until the learner has made a version; it goes on meanwhile, as the driver lets it."""
        while len(self._training) < LEARNER_CALLS:
            self._training.append(self.learner.train.remote(STEP_SECONDS))
        ray.get(self._training.pop(0), timeout=STEP_SECONDS)

    def pause(self) -> None:
        """The learner comes to rest."""
        ray.get(self._training, timeout=LEARNER_CALLS * STEP_SECONDS)
        self._training.clear()

    def broadcast(self) -> Trip:
        """Gives the newest version to all actors, as the driver does."""
        version, weights = self.learner.weights.remote()
        packed = ray.get(version, timeout=STEP_SECONDS)
        offered = time.monotonic()
        waiting = [
            actor.play.remote(packed.number, weights, packed.learner_steps, 0, 0.0) for actor in self.actors
        ]
        held = []
        while waiting:
            done, waiting = ray.wait(waiting, timeout=STEP_SECONDS)
            if not done:
                raise GetTimeoutError
            ray.get(done)
            held.append(time.monotonic())
        made_at = self.ask_learner(made_at_of, packed.number)
        return Trip(packed.age_seconds, *(moment - made_at for moment in (offered, held[0], held[-1])))

    def give_out(self) -> None:
        """As `broadcast`, to nobody."""
        ray.wait(list(self.learner.weights.remote()), num_returns=2, timeout=STEP_SECONDS)

    def ask_learner(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Beside its steps."""
        call = self.learner.__ray_call__.options(concurrency_group="publishing")
        return ray.get(call.remote(function, *arguments), timeout=STEP_SECONDS)

    def of_actors(self, function: Callable[..., int], *arguments: Any) -> list[int]:
        """One answer after the other: what they share is nobody's private memory only while several have it."""
        calls = [actor.__ray_call__.remote(function, *arguments) for actor in self.actors]
        return ray.get(calls, timeout=START_SECONDS)


@contextmanager
def crew(*arguments: Any) -> Iterator[Crew]:
    made = Crew(*arguments)
    try:
        made.begin()
        yield made
    finally:
        for worker in (*made.actors, made.learner, made.shard):
            ray.kill(worker)


def measure(
    config: Config,
    folder: Path,
    episode: Episode,
    make_learner: Callable[[], Any],
    num_actors: int,
    repeats: int,
) -> Broadcast:
    """`repeats` versions of each kind to `num_actors` actors. Needs a Ray session with a CPU for each of them.

    config: `learner.publish_interval` is 1; the shard lets the learner take batches without end.   episode: what they
    are made of. Raises ClusterError if a process gives no answer.
    """
    try:
        with crew(config, folder, episode, make_learner, num_actors) as made:
            return measured(made, repeats)
    except GetTimeoutError:
        raise ClusterError("a process of the broadcast gave no answer in time; try fewer actors") from None


def measured(crew: Crew, repeats: int) -> Broadcast:
    for _ in range(LEARNER_CALLS):
        crew.step_on()
    crew.pause()
    before = crew.of_actors(private_bytes)
    _, weights = crew.learner.weights.remote()
    viewing = crew.of_actors(private_bytes_while_reading, weights)
    crew.broadcast()
    after = crew.of_actors(private_bytes)
    quiet = []
    for _ in range(repeats):
        crew.step_on()
        crew.pause()
        quiet.append(crew.broadcast())
    alone = timed(crew, repeats, lambda: None)
    giving = timed(crew, repeats, crew.give_out)
    busy: list[Trip] = []
    sending = timed(crew, repeats, lambda: busy.append(crew.broadcast()))
    crew.pause()
    return Broadcast(
        quiet, busy, alone, giving, sending, Private(before, viewing, after, crew.of_actors(private_bytes))
    )


def timed(crew: Crew, repeats: int, meanwhile: Callable[[], object]) -> Steps:
    """The learner's steps while `meanwhile` is done so often: for each version, or as fast as it can be."""
    crew.step_on()
    crew.ask_learner(take_times)
    for _ in range(repeats):
        crew.step_on()
        meanwhile()
    return Steps(*map(list, zip(*crew.ask_learner(take_times), strict=True)))


# Run inside the processes -----------------------------------------------------------------------------------------


def set_make(worker: Any, make: Callable[[], Any]) -> None:
    worker.make = make


def make_networks(worker: Any) -> None:
    worker.actor  # noqa: B018 - made at first use


def made_at_of(worker: Any, version: int) -> float:
    return worker.learner.made_at[version]


def take_times(worker: Any) -> list[tuple[float, float]]:
    times, worker.learner.timed = worker.learner.timed, []
    return times


def private_bytes(_: Any) -> int:
    return psutil.Process().memory_full_info().uss


def private_bytes_while_reading(_: Any, weights: np.ndarray) -> int:
    """With every byte of them touched."""
    assert np.isfinite(weights.sum(dtype=np.float64))
    return psutil.Process().memory_full_info().uss
