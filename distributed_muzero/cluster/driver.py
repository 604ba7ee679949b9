"""The driver: compares what runs with what was asked for, and acts on the difference.

It owns every process of the run and the newest weights; it is the only place that creates, replaces or kills. All
calls are asynchronous: the loop waits for whichever is done first and never for one in particular.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from distributed_muzero import checkpoint
from distributed_muzero.cluster.program import (
    ActorWorker,
    EvaluatorWorker,
    LearnerWorker,
    ReanalyserWorker,
    ReplayShardWorker,
)
from distributed_muzero.cluster.run_control import NAMESPACE, RunControl
from distributed_muzero.config import Config
from distributed_muzero.errors import DistributedMuZeroError, RunError
from distributed_muzero.workers.bookkeeper import Bookkeeper
from distributed_muzero.workers.builder import num_reanalysers
from distributed_muzero.workers.run_state import LearnerReport

PLAY_SECONDS = 0.25
REANALYSE_SECONDS = 0.5
TRAIN_SECONDS = 1.0  # at most; a call ends when the next weights version is due
LEARNER_CALLS_IN_FLIGHT = 2  # so that the learner never waits for the driver
CALL_TIMEOUT_SECONDS = 120.0  # also covers the start of the process behind the call
EVALUATION_TIMEOUT_SECONDS = 3600.0  # games may be long, and a slow evaluation holds nobody up
EXCHANGE_SECONDS = 0.5
STOP_SECONDS = 15.0  # for flushing shards and fetching the learner's state when the run ends
SHARD_RESTART_SECONDS = 60.0  # Ray's restart of a shard's process, and its own from its log
MAX_FAILURES_IN_A_ROW = 5


class Published(NamedTuple):
    """The newest weights: one vector in the object store, owned by the driver, so it outlives the learner."""

    version: int
    learner_steps: int
    weights: Any  # ObjectRef of [P] float32


@dataclass
class Role:
    """One process of the run: who it is now, and how often it came to grief since it last did something."""

    name: str
    make: Callable[[int], Any]  # incarnation -> handle
    handle: Any = None
    first_incarnation: int = 0
    num_starts: int = 0
    failures_in_a_row: int = 0
    has_answered: bool = False  # this incarnation
    lost_at: float | None = None  # of a shard that Ray is restarting

    def start(self) -> None:
        self.handle = self.make(self.first_incarnation + self.num_starts)
        self.num_starts += 1
        self.has_answered = False


@dataclass
class Call:
    role: Role
    on_result: Callable[[Any], object]
    deadline: float


class Driver:
    """Runs one run to its end. Ray must be initialised."""

    def __init__(self, config: Config, run_name: str, book: Bookkeeper, stop_requested: Callable[[], bool]):
        self.config = config
        self.run_name = run_name
        self.book = book
        self.stop_requested = stop_requested
        self.calls: dict[Any, Call] = {}
        self.published: Published | None = None
        self.num_desired_actors = config.actor.num_actors
        self.shard_stats: dict[int, dict[str, float]] = {}
        self._evaluation_waits_for: Role | None = None
        self._was_told_to_stop = False
        self._next_exchange = 0.0

    def run(self) -> str:
        """Plays and learns until a limit of the run or a request to stop; returns the reason in words."""
        try:
            return self._run()
        except DistributedMuZeroError:
            self._end()
            raise

    def _run(self) -> str:
        self._create()
        while True:
            self._handle_results()
            self._reconcile()
            self.book.tick(
                list(self.shard_stats.values()),
                num_desired=self.num_desired_actors,
                num_actors=sum(role.has_answered for role in self.actors),
                num_restarts=sum(role.num_starts - 1 for role in self.actors),
            )
            if reason := self.book.state.stop_reason():
                self._end(evaluate=not self.book.state.has_reached_goal)
                return reason
            if self.stop_requested() or self._was_told_to_stop:
                self._end()
                return "a stop was asked for"

    # What runs ------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        config, name = self.config, self.run_name
        self.control = Role("run control", lambda _: self._make_control())
        self.control.start()
        self.shards = [
            Role(
                f"replay shard {index}",
                lambda _: None,
                ReplayShardWorker.remote(config, name, index, self.book.folder.replay),
            )
            for index in range(config.replay.num_shards)
        ]
        self._shard_handles = [role.handle for role in self.shards]
        self.num_gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        num_gpus = self.num_gpus if config.learner.device != "cpu" else 0
        self.learner = Role(
            "learner",
            lambda _: LearnerWorker.options(num_gpus=num_gpus).remote(config, name, self._shard_handles),
        )
        self.evaluator = Role("evaluator", lambda _: EvaluatorWorker.remote(config, name))
        self.actors: list[Role] = []
        self.reanalysers = [
            Role(f"reanalyser {index}", partial(self._make_reanalyser, index))
            for index in range(num_reanalysers(config))
        ]
        self._start_learner()
        for role in self.reanalysers:
            role.start()
        self._reconcile()

    def _make_control(self) -> Any:
        options = {"name": self.run_name, "namespace": NAMESPACE}
        return RunControl.options(**options).remote(self.num_desired_actors)

    def _start_learner(self) -> None:
        self.learner.start()
        saved = checkpoint.latest_checkpoint(self.book.folder.checkpoints)
        handle, published = self.learner.handle, self.published
        # A version is never given to two sets of weights.
        version = published.version + 1 if published else self.book.first_version
        if saved is None and published is not None:
            begun = handle.start_from.remote(published.weights, published.learner_steps, version)
        else:
            begun = handle.begin.remote(saved and saved.tensors, saved and saved.state, version)
        self._call(self.learner, begun, ignore)
        if self.published is None:
            self._call(self.learner, self.learner.handle.weights.remote(), self._on_first_weights)
        for _ in range(LEARNER_CALLS_IN_FLIGHT):
            self._train()

    def _reconcile(self) -> None:
        while len(self.actors) < self.num_desired_actors:
            index = len(self.actors)
            first = self.book.first_incarnation
            role = Role(f"actor {index}", partial(self._make_actor, index), first_incarnation=first)
            self.actors.append(role)
            role.start()
            self._play(role)
        while len(self.actors) > self.num_desired_actors:
            self._forget(role := self.actors.pop())
            ray.kill(role.handle)
        now = time.monotonic()
        if now >= self._next_exchange:
            self._next_exchange = now + EXCHANGE_SECONDS
            self._exchange()
        for call_id, call in list(self.calls.items()):
            if now > call.deadline and call_id in self.calls:
                self._replace(call.role, RunError("it gave no answer in time"))
        due = self.book.evaluation_is_due(self.book.state.learner.learner_steps)
        if due and self._evaluation_waits_for is None:
            self._evaluation_waits_for = self.learner
            self._call(self.learner, self.learner.handle.state.remote(), self._on_learner_state)

    def _make_actor(self, index: int, incarnation: int) -> Any:
        return ActorWorker.remote(
            self.config,
            self.run_name,
            index,
            incarnation,
            self._shard_handles,
            self.book.folder.history,
        )

    def _make_reanalyser(self, index: int, _: int) -> Any:
        num_gpus = self.num_gpus if self.config.reanalyse.device != "cpu" else 0
        return ReanalyserWorker.options(num_gpus=num_gpus).remote(
            self.config, self.run_name, index, self._shard_handles
        )

    # What it asks of them, and what it does with the answers ---------------------------------------------------

    def _play(self, role: Role) -> None:
        if self.published is None:
            return  # the first weights are still on their way; _on_first_weights starts everybody
        version, steps, weights = self.published
        call = role.handle.play.remote(version, weights, steps, PLAY_SECONDS)
        self._call(role, call, lambda report: self._on_play(role, report))

    def _on_play(self, role: Role, report: Any) -> None:
        self.book.add_actor_report(report)
        if role in self.actors:
            self._play(role)

    def _reanalyse(self, role: Role) -> None:
        assert self.published is not None
        version, _, weights = self.published
        call = role.handle.work.remote(version, weights, REANALYSE_SECONDS)
        self._call(role, call, lambda report: self._on_reanalyse(role, report))

    def _on_reanalyse(self, role: Role, report: Any) -> None:
        self.book.state.add_reanalyse_report(report)
        self._reanalyse(role)

    def _on_first_weights(self, answer: tuple[int, Any]) -> None:
        version, weights = answer
        self.published = Published(version, self.book.state.learner.learner_steps, ray.put(weights))
        for role in self.actors:
            self._play(role)
        for role in self.reanalysers:
            self._reanalyse(role)

    def _train(self) -> None:
        handle = self.learner.handle
        report, weights = handle.train.options(num_returns=2).remote(TRAIN_SECONDS)
        self._call(self.learner, report, lambda value: self._on_train(value, weights))

    def _on_train(self, report: Any, weights: Any) -> None:
        self.book.state.add_learner_report(report)
        if self.published is None or report.weights_version > self.published.version:
            self.published = Published(report.weights_version, report.learner_steps, weights)
        self._train()

    def _on_learner_state(self, answer: Any) -> None:
        (arrays, state), weights = answer
        path = self.book.write_checkpoint(arrays, state)
        steps = state["learner_steps"]
        if self.evaluator.handle is None:  # its start would have slowed down that of the others
            self.evaluator.start()
        self._evaluation_waits_for = self.evaluator
        version, seeds = state["weights_version"], (self.config.run.seed, steps)
        call = self.evaluator.handle.evaluate.remote(version, weights, seeds)
        on_result = partial(self._on_evaluation, path, steps)
        self._call(self.evaluator, call, on_result, EVALUATION_TIMEOUT_SECONDS)

    def _on_evaluation(self, path: Path, steps: int, result: dict[str, Any]) -> None:
        self._evaluation_waits_for = None
        self.book.add_evaluation(result, path, steps)

    def _exchange(self) -> None:
        status = {
            "env_steps": self.book.state.env_steps,
            "learner_steps": self.book.state.learner.learner_steps,
        }
        asked = {id(call.role) for call in self.calls.values()}
        if id(self.control) not in asked:
            self._call(self.control, self.control.handle.exchange.remote(status), self._on_exchange)
        for index, role in enumerate(self.shards):
            if id(role) not in asked:
                self._call(role, role.handle.flush.remote(), partial(self.shard_stats.__setitem__, index))

    def _on_exchange(self, desired: dict[str, Any]) -> None:
        self.num_desired_actors = desired["num_actors"]
        self._was_told_to_stop = desired["stop"]

    # Calls, and what happens when one is lost -------------------------------------------------------------------

    def _call(
        self,
        role: Role,
        call: Any,
        on_result: Callable[[Any], object],
        timeout_seconds: float = CALL_TIMEOUT_SECONDS,
    ) -> None:
        self.calls[call] = Call(role, on_result, time.monotonic() + timeout_seconds)

    def _handle_results(self) -> None:
        done, _ = ray.wait(list(self.calls), num_returns=1, timeout=0.1, fetch_local=False)
        for ready in done:
            call = self.calls.pop(ready)
            try:
                result = ray.get(ready, timeout=CALL_TIMEOUT_SECONDS)
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, DistributedMuZeroError):
                    raise cause from None  # its message says what to do; trying again would not help
                self._replace(call.role, cause)
            except RayError as error:
                self._replace(call.role, error)
            else:
                call.role.failures_in_a_row = 0
                call.role.has_answered = True
                call.role.lost_at = None
                call.on_result(result)

    def _replace(self, role: Role, error: BaseException) -> None:
        """Starts a lost process anew and gives it its work."""
        self._forget(role)
        if role in self.shards:
            self._await_shard(role, error)
            return
        role.failures_in_a_row += 1
        if role.failures_in_a_row > MAX_FAILURES_IN_A_ROW:
            raise RunError(f"the {role.name} failed {role.failures_in_a_row} times in a row, last: {error}")
        self._tell_lost(role, error)
        ray.kill(role.handle)
        if role is self._evaluation_waits_for:
            self._evaluation_waits_for = None
        if role is self.learner:
            self._start_learner()
        elif role is self.control:
            # Its name is free again once Ray has seen it dead; until then the wishes stay as they are.
            self._next_exchange = time.monotonic() + 5.0
            role.handle = RunControl.options(
                name=self.run_name, namespace=NAMESPACE, get_if_exists=True
            ).remote(self.num_desired_actors)
        else:
            role.start()
            if role in self.actors:
                self._play(role)
            elif role in self.reanalysers and self.published is not None:
                self._reanalyse(role)

    def _await_shard(self, role: Role, error: BaseException) -> None:
        """Ray restarts a shard under the same handle, which actors and learner hold; a hung one has to die first."""
        now = time.monotonic()
        if role.lost_at is None:
            role.lost_at = now
            self._tell_lost(role, error)
        if not isinstance(error, RayActorError):
            ray.kill(role.handle, no_restart=False)
        if now - role.lost_at > SHARD_RESTART_SECONDS:
            raise RunError(f"the {role.name} didn't come back in {SHARD_RESTART_SECONDS:g} s, last: {error}")

    def _tell_lost(self, role: Role, error: BaseException) -> None:
        short = next(iter(str(error).strip().splitlines()), type(error).__name__)
        self.book.progress.message(f"the {role.name} was lost ({short}); starting another")

    def _forget(self, role: Role) -> None:
        for ready in [ready for ready, call in self.calls.items() if call.role is role]:
            del self.calls[ready]

    def _end(self, evaluate: bool = False) -> None:
        """Saves what was learnt last (evaluated, so that it can turn out to be the best) and what the shards hold."""
        deadline = time.monotonic() + STOP_SECONDS
        flushes = [role.handle.flush.remote() for role in self.shards]
        done, late = ray.wait(flushes, num_returns=len(flushes), timeout=STOP_SECONDS / 3)
        if late:
            self.book.progress.message(
                f"{len(late)} replay shards gave no answer in time; their logs are intact"
            )
        try:
            self.shard_stats.update((flushes.index(call), ray.get(call)) for call in done)
            if self.book.state.learner.learner_steps:  # else the learner may not even have started
                self._write_last_checkpoint(deadline, evaluate)
        except RayError as error:
            self.book.progress.message(f"the last checkpoint could not be written or evaluated: {error}")

    def _write_last_checkpoint(self, deadline: float, evaluate: bool) -> None:
        state_call = self.learner.handle.state.remote()
        (arrays, state), weights = ray.get(state_call, timeout=max(deadline - time.monotonic(), 1.0))
        steps, version = state["learner_steps"], state["weights_version"]
        self.book.state.add_learner_report(LearnerReport(steps, version))
        path = self.book.write_checkpoint(arrays, state)
        if evaluate:
            if self.evaluator.handle is None:
                self.evaluator.start()
            call = self.evaluator.handle.evaluate.remote(version, weights, (self.config.run.seed, steps))
            self.book.add_evaluation(ray.get(call, timeout=CALL_TIMEOUT_SECONDS), path, steps)


def ignore(result: object) -> None:
    """For calls that are only waited for."""
