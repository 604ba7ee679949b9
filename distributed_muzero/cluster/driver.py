"""The driver: compares what runs with what was asked for, and acts on the difference.

It owns every process of the run and the newest weights; it is the only place that creates, replaces or kills. All
calls are asynchronous: the loop waits for whichever is done first and never for one in particular.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
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
from distributed_muzero.files import folder_bytes
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
SHARD_RESTART_SECONDS = 60.0  # Ray's restart of a shard's process
RECOVERY_BYTES_PER_SECOND = 10e6  # of its log, at least
MAX_FAILURES_IN_A_ROW = 5
STEADY_SECONDS = 10.0  # of work, after which earlier failures are forgiven


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
    working_since: float | None = None  # this incarnation
    lost_at: float | None = None  # of a shard that Ray is restarting
    is_leaving: bool = False  # an actor that delivers its last games

    def start(self) -> None:
        self.handle = self.make(self.first_incarnation + self.num_starts)
        self.num_starts += 1

    def has_worked(self, now: float) -> None:
        self.working_since = now if self.working_since is None else self.working_since
        self.lost_at = None

    def has_failed(self, error: BaseException, now: float) -> None:
        """Raises RunError after too many failures with little work between them."""
        if self.working_since is not None and now - self.working_since > STEADY_SECONDS:
            self.failures_in_a_row = 0
        self.working_since = None
        self.failures_in_a_row += 1
        if self.failures_in_a_row > MAX_FAILURES_IN_A_ROW:
            raise RunError(f"the {self.name} failed {self.failures_in_a_row} times in a row, last: {error}")


@dataclass
class Call:
    role: Role
    on_result: Callable[[Any], object]
    deadline: float
    shows_work: bool  # its answer proves that the role does what it is there for


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
        self._state_is_asked = self._is_evaluating = False
        self._learner_has_begun = self._has_ended = False
        self._num_actor_starts: dict[int, int] = {}  # by index, of actors that left
        self._was_told_to_stop = False
        self._next_exchange = 0.0

    def run(self) -> str:
        """Plays and learns until a limit of the run or a request to stop; returns the reason in words."""
        try:
            return self._run()
        except DistributedMuZeroError:
            if not self._has_ended:
                try:
                    self._end()
                except DistributedMuZeroError as error:
                    self.book.progress.message(str(error))
            raise

    def _run(self) -> str:
        self._create()
        while True:
            self._handle_results()
            self._reconcile()
            self.book.tick(
                list(self.shard_stats.values()),
                num_desired=self.num_desired_actors,
                num_actors=sum(role.working_since is not None for role in self.actors),
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
        self.gpu_share = gpu_share(config, int(ray.cluster_resources().get("GPU", 0)))
        num_gpus = self.gpu_share if config.learner.device != "cpu" else 0
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
        saved = checkpoint.latest_checkpoint(self.book.folder.checkpoints)
        self.learner.start()
        self._state_is_asked = self._learner_has_begun = False
        handle, published = self.learner.handle, self.published
        # A version is never given to two sets of weights; a lost learner may have been ahead of its answers.
        version = published.version + 1 + LEARNER_CALLS_IN_FLIGHT if published else self.book.first_version
        if saved is None and published is not None:
            begun = handle.start_from.remote(published.weights, published.learner_steps, version)
        else:
            begun = handle.begin.remote(saved and saved.tensors, saved and saved.state, version)
        self._call(self.learner, begun, self._on_begun, shows_work=False)
        if self.published is None:
            call = self.learner.handle.weights.remote()
            self._call(self.learner, call, self._on_first_weights, shows_work=False)
        for _ in range(LEARNER_CALLS_IN_FLIGHT):
            self._train()

    def _reconcile(self) -> None:
        while len(self.actors) < self.num_desired_actors:
            index = len(self.actors)
            first = self.book.first_incarnation + self._num_actor_starts.get(index, 0)
            role = Role(f"actor {index}", partial(self._make_actor, index), first_incarnation=first)
            self.actors.append(role)
            role.start()
            self._play(role)
        while len(self.actors) > self.num_desired_actors:
            self._forget(role := self.actors.pop())
            role.is_leaving = True
            self._num_actor_starts[len(self.actors)] = (
                role.first_incarnation + role.num_starts - self.book.first_incarnation
            )
            self._call(role, role.handle.drain.remote(), partial(self._on_drained, role))
        now = time.monotonic()
        if now >= self._next_exchange:
            self._next_exchange = now + EXCHANGE_SECONDS
            self._exchange()
        for call_id, call in list(self.calls.items()):
            if now > call.deadline and call_id in self.calls:
                self._replace(call.role, RunError("it gave no answer in time"))
        if not self._state_is_asked and (self._evaluates_now() or self.book.checkpoint_is_due(self._steps)):
            self._state_is_asked = True
            call = self.learner.handle.state.remote()
            self._call(self.learner, call, self._on_learner_state, shows_work=False)

    @property
    def _steps(self) -> int:
        return self.book.state.learner.learner_steps

    def _evaluates_now(self) -> bool:
        return not self._is_evaluating and self.book.evaluation_is_due(self._steps)

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
        num_gpus = self.gpu_share if self.config.reanalyse.device != "cpu" else 0
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

    def _on_drained(self, role: Role, num_left: int) -> None:
        self._tell_undelivered(num_left)
        ray.kill(role.handle)

    def _tell_undelivered(self, num_episodes: int) -> None:
        if num_episodes:
            self.book.progress.message(
                f"{num_episodes} finished games were left with actors that ended: the shards take no more for now"
            )

    def _reanalyse(self, role: Role) -> None:
        assert self.published is not None
        version, _, weights = self.published
        call = role.handle.work.remote(version, weights, REANALYSE_SECONDS)
        self._call(role, call, lambda report: self._on_reanalyse(role, report))

    def _on_reanalyse(self, role: Role, report: Any) -> None:
        self.book.state.add_reanalyse_report(report)
        self._reanalyse(role)

    def _on_begun(self, _: None) -> None:
        self._learner_has_begun = True

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
        on_result = partial(self._on_train, weights=weights)
        self._call(self.learner, report, on_result, shows_work=False)

    def _on_train(self, report: LearnerReport, weights: Any) -> None:
        self.book.add_learner_report(report)
        if report.metrics:  # else it found no batches, and has yet to show that it can learn
            self.learner.has_worked(time.monotonic())
        if self.published is None or report.weights_version > self.published.version:
            self.published = Published(report.weights_version, report.learner_steps, weights)
        self._train()

    def _on_learner_state(self, answer: Any) -> None:
        (arrays, state), weights = answer
        path = self.book.write_checkpoint(arrays, state)
        self._state_is_asked = False
        if self._evaluates_now():
            self._is_evaluating = True
            on_result = partial(self._on_evaluation, path, state["learner_steps"])
            self._call(self.evaluator, self._evaluate(state, weights), on_result, EVALUATION_TIMEOUT_SECONDS)

    def _evaluate(self, state: dict[str, Any], weights: Any) -> Any:
        """The call for an evaluation of a checkpoint that was just written."""
        steps = state["learner_steps"]
        if self.evaluator.handle is None:  # its start would have slowed down that of the others
            self.evaluator.start()
        self.book.begin_evaluation(steps)
        seeds = (self.config.run.seed, steps)
        return self.evaluator.handle.evaluate.remote(state["weights_version"], weights, seeds)

    def _on_evaluation(self, path: Path, steps: int, result: dict[str, Any]) -> None:
        self._is_evaluating = False
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
                on_result = partial(self.shard_stats.__setitem__, index)
                patience = CALL_TIMEOUT_SECONDS + self._recovery_seconds(role)
                self._call(role, role.handle.flush.remote(), on_result, patience)

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
        shows_work: bool = True,
    ) -> None:
        self.calls[call] = Call(role, on_result, time.monotonic() + timeout_seconds, shows_work)

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
                if call.shows_work:
                    call.role.has_worked(time.monotonic())
                call.on_result(result)

    def _replace(self, role: Role, error: BaseException) -> None:
        """Starts a lost process anew and gives it its work."""
        self._forget(role)
        if role in self.shards:
            self._await_shard(role, error)
            return
        if role.is_leaving:
            ray.kill(role.handle)
            return
        role.has_failed(error, time.monotonic())
        self._tell_lost(role, error)
        ray.kill(role.handle)
        if role is self.evaluator:
            self._is_evaluating = False
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
            role.has_failed(error, now)
            self._tell_lost(role, error)
        if not isinstance(error, RayActorError):
            ray.kill(role.handle, no_restart=False)
        if (waited := now - role.lost_at) > SHARD_RESTART_SECONDS + self._recovery_seconds(role):
            raise RunError(f"the {role.name} didn't come back in {waited:.0f} s, last: {error}")

    def _recovery_seconds(self, shard: Role) -> float:
        """How long a shard may read its logs before its first answer; 0 from then on."""
        if shard.working_since is not None:
            return 0.0
        folder = self.book.folder.replay / f"shard_{self.shards.index(shard)}"
        return folder_bytes(folder) / RECOVERY_BYTES_PER_SECOND

    def _tell_lost(self, role: Role, error: BaseException) -> None:
        short = next(iter(str(error).strip().splitlines()), type(error).__name__)
        self.book.progress.message(f"the {role.name} was lost ({short}); starting another")

    def _forget(self, role: Role) -> None:
        for ready in [ready for ready, call in self.calls.items() if call.role is role]:
            del self.calls[ready]

    def _end(self, evaluate: bool = False) -> None:
        """Saves what actors, shards and learner still have. Raises RunError if what was learnt last is lost."""
        self._has_ended = True
        deadline = time.monotonic() + STOP_SECONDS
        drained = self._ask_all("actors", [role.handle.drain.remote() for role in self.actors])
        self._tell_undelivered(sum(drained.values()))
        flushes = [role.handle.flush.remote() for role in self.shards]
        self.shard_stats.update(self._ask_all("replay shards", flushes))
        # Else it may not even have started, or hold random weights; all that was learnt is in the checkpoints.
        if self._learner_has_begun and self._steps:
            self._write_last_checkpoint(deadline, evaluate)

    def _ask_all(self, whom: str, calls: list[Any]) -> dict[int, Any]:
        """The answers by index, of those that answer within a third of the time there is."""
        done = ray.wait(calls, num_returns=len(calls), timeout=STOP_SECONDS / 3)[0] if calls else []
        answers = {}
        for call in done:
            with suppress(RayError):
                answers[calls.index(call)] = ray.get(call)
        if num_silent := len(calls) - len(answers):
            self.book.progress.message(
                f"{num_silent} {whom} gave no answer at the end; what was acknowledged is on disk"
            )
        return answers

    def _write_last_checkpoint(self, deadline: float, evaluate: bool) -> None:
        call = self.learner.handle.state.remote()
        try:
            (arrays, state), weights = ray.get(call, timeout=max(deadline - time.monotonic(), 1.0))
        except RayError as error:
            raise RunError(
                f"the last checkpoint could not be written, the learner gave no answer ({error}); "
                "what it learnt since the one before is lost; resume goes on from there"
            ) from None
        self.book.add_learner_report(LearnerReport(state["learner_steps"], state["weights_version"]))
        path = self.book.write_checkpoint(arrays, state)
        if evaluate:
            self._evaluate_last(path, state, weights)

    def _evaluate_last(self, path: Path, state: dict[str, Any], weights: Any) -> None:
        """So that the last checkpoint can turn out to be the best. A request to stop is heard."""
        call = self._evaluate(state, weights)
        deadline = time.monotonic() + CALL_TIMEOUT_SECONDS
        while not ray.wait([call], timeout=0.2)[0]:
            if self.stop_requested() or time.monotonic() > deadline:
                self.book.progress.message("the last checkpoint was not evaluated")
                return
        try:
            self.book.add_evaluation(ray.get(call), path, state["learner_steps"])
        except RayError as error:
            self.book.progress.message(f"the last checkpoint could not be evaluated: {error}")


def gpu_share(config: Config, num_gpus: int) -> float:
    """Of a GPU, for each of the learner and the reanalysers that may use one: all of them find a place."""
    on_gpu = (config.learner.device != "cpu") + num_reanalysers(config) * (config.reanalyse.device != "cpu")
    return 1 / math.ceil(on_gpu / num_gpus) if num_gpus and on_gpu else 0
