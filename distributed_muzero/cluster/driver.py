"""The driver: compares what runs with what was asked for, and acts on the difference.

It owns every process of the run and the newest weights; it is the only place that creates, replaces or kills. All
calls are asynchronous: the loop waits for whichever is done first and never for one in particular.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from distributed_muzero import checkpoint
from distributed_muzero.cluster.ending import ask_all, is_answered, last_state
from distributed_muzero.cluster.makers import Makers, make_control
from distributed_muzero.cluster.roles import Calls, Role
from distributed_muzero.cluster.run_control import Desired
from distributed_muzero.cluster.scaling import Autoscaler
from distributed_muzero.config import Config
from distributed_muzero.errors import DistributedMuZeroError, RunError, first_line
from distributed_muzero.files import folder_bytes
from distributed_muzero.mirror.download import num_bytes_at
from distributed_muzero.mirror.uri import join
from distributed_muzero.workers.bookkeeper import Bookkeeper
from distributed_muzero.workers.run_copy import LAST_PUSH_SECONDS
from distributed_muzero.workers.run_state import STOPPED, ActorReport, Crew, Ending, LearnerReport, Version

PLAY_SECONDS = 0.25  # of one call, at least
MAX_PLAY_CALLS = 800  # a second, of all actors: more would keep the driver from everything else
REANALYSE_SECONDS = 0.5
TRAIN_SECONDS = 1.0  # at most; a call ends when the next weights version is due
LEARNER_CALLS_IN_FLIGHT = 2  # so that the learner never waits for the driver
CALL_TIMEOUT_SECONDS = 120.0  # also covers what a process makes at its first call
LAST_EVALUATIONS_SECONDS = 120.0
EVALUATION_TIMEOUT_SECONDS = 3600.0  # games may be long, and a slow evaluation holds nobody up
EXCHANGE_SECONDS = 0.5
STOP_DRAIN_SECONDS = 6.0  # for the actors' last games when the run ends
STOP_SECONDS = 15.0  # for flushing shards and fetching the learner's state when the run ends
RESHARD_SECONDS = 120.0  # the same, where nothing hurries
LEAVE_SECONDS = 600.0  # for an actor's last games, while the limiter holds them back
SHARD_RESTART_SECONDS = 60.0  # Ray's restart of a shard's process
MAX_DOUBTS = 3  # answers of a process that are lost one after the other, before it is taken for lost itself
RECOVERY_BYTES_PER_SECOND = 10e6  # of its log, at least; as many are fetched from a URI


class Published(NamedTuple):
    """The newest weights: one vector that the driver owns and has on its node, so that it outlives the learner."""

    version: int
    learner_steps: int
    weights: Any  # ObjectRef of [P] float32


class Driver:
    """Runs one run to its end, or until another number of shards is asked for. Ray must be initialised."""

    def __init__(
        self,
        config: Config,
        run_name: str,
        book: Bookkeeper,
        stop_requested: Callable[[], bool],
        desired: Desired,
        control: Any,
        makers: Makers | None = None,
    ):
        """desired: what `control`, the handle of the run's RunControl, asks for so far.

        makers: of other processes than the run's own.
        """
        self.config = config
        self.run_name = run_name
        self.book = book
        self.stop_requested = stop_requested
        self.desired = desired
        self.calls = Calls()
        self.published: Published | None = None
        self.autoscaler = Autoscaler(desired.num_actors, desired.autoscale)
        self.control = Role("run control", lambda: control, control)
        self.shard_stats: dict[int, dict[str, float]] = {}
        self.makers = makers or Makers(config, run_name, book)
        self.learner, self.evaluator = self.makers.learner(), self.makers.evaluator()
        self.shards = self.makers.shards
        self.actors: list[Role] = []
        self.leaving: list[Role] = []
        self.reanalysers: list[Role] = []
        self._state_is_asked = self._weights_are_asked = False
        self._learner_has_begun = self._has_ended = False
        self._first_step = self._steps
        self._reshards = False
        self._draining_since: float | None = None
        self._next_exchange = 0.0
        self._bytes_to_fetch = 0  # by a shard, at most, before its first answer

    def turns(self) -> Generator[None, None, Ending | None]:
        """Plays and learns until a limit of the run or a request to stop, a turn of the loop at a time.

        Between two turns, processes do what they were asked for and no more. Returns None where another number of
        shards is asked for: all processes are ended then, for another driver to go on.
        """
        try:
            return (yield from self._turns())
        except DistributedMuZeroError:
            if not self._has_ended:
                try:
                    self._end()
                except DistributedMuZeroError as error:
                    self.book.progress.message(str(error))
            raise

    def _turns(self) -> Generator[None, None, Ending | None]:
        self._create()
        while True:
            self._handle_results()
            self._reconcile()
            self.book.tick(self._stats_of_shards(), self._crew())
            if reason := self.book.state.stop_reason():
                self._end(evaluate=not self.book.state.has_reached_goal)
                return Ending(reason, was_hurried=self._is_stopped)
            is_stopped = self._is_stopped
            if is_stopped and self.desired.in_haste:
                return Ending("a stop at once: what was learnt since the last checkpoint is lost", True)
            if self.desired.num_shards != self.config.replay.num_shards:
                self._reshards = True  # and is not taken back: the actors are leaving by now
            if (is_stopped or self._reshards) and self._has_drained(is_stopped):
                if is_stopped:
                    self._end()
                    return STOPPED
                try:
                    self._end(seconds=RESHARD_SECONDS)
                except RunError as error:  # the next learner goes on from the last checkpoint
                    self.book.progress.message(str(error))
                self.kill_all()
                return None
            yield

    @property
    def _is_stopped(self) -> bool:
        """By a signal, or by RunControl."""
        return self.stop_requested() or self.desired.stop

    def _stats_of_shards(self) -> list[dict[str, float]]:
        """Of all shards, or none: sums of some would look as if episodes had gone."""
        has_all = len(self.shard_stats) == len(self.shards)
        return [self.shard_stats[index] for index in range(len(self.shards))] if has_all else []

    def _has_drained(self, is_stopped: bool) -> bool:
        """Whether all games are delivered, or the time for it is over. From the first call on, nobody plays.

        The learner goes on meanwhile: it makes room where the limiter holds the last games back.
        """
        if self._draining_since is None:
            self._draining_since = time.monotonic()
            self._reconcile()
        patience = STOP_DRAIN_SECONDS if is_stopped else LEAVE_SECONDS
        return not self.leaving or time.monotonic() > self._draining_since + patience

    @property
    def num_desired_actors(self) -> int:
        """As asked for, or as chosen between the limits that were; none once the run ends."""
        if self._draining_since is not None:
            return 0
        if self.desired.autoscale is None:
            return self.desired.num_actors
        return self.autoscaler.num_actors

    def _crew(self) -> Crew:
        played = [role.weights_version for role in self.actors if role.weights_version is not None]
        # Not just the published one: a slow way out of the learner's node is staleness as well.
        newest = max(self.published.version if self.published else 0, self.book.state.learner.weights_version)
        return Crew(
            desired=self.num_desired_actors,
            live=sum(role.working_since is not None for role in self.actors),
            draining=len(self.leaving),
            reanalysers=sum(role.working_since is not None for role in self.reanalysers),
            staleness=newest - min(played, default=newest),
            unacknowledged=sum(role.unacknowledged for role in (*self.actors, *self.leaving)),
            calls=len(self.calls),
            cpu_seconds=time.process_time(),
        )

    # What runs ------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        if self.book.copies:
            with suppress(RunError):  # it only makes us patient
                self._bytes_to_fetch = num_bytes_at(join(self.book.copies.uri, "replay"))
        for role in self.shards:
            self._start(role)
        self._start_learner()
        self._reconcile()

    def _start(self, role: Role, begin: Callable[[Role], object] = lambda _: None) -> None:
        """Creates the role's process, wherever and whenever there is room for it, and then lets it begin."""
        role.start()
        self._call(role, role.handle.ready.remote(), lambda _: begin(role), math.inf, shows_work=False)

    def _start_learner(self) -> None:
        self._state_is_asked = self._weights_are_asked = self._learner_has_begun = False
        self._start(self.learner, self._begin_to_learn)

    def _begin_to_learn(self, role: Role) -> None:
        saved = checkpoint.latest_checkpoint(self.book.folder.checkpoints)
        handle, published = role.handle, self.published
        # A version is never given to two sets of weights; a lost learner may have been ahead of its answers.
        known = max(published.version, self.book.state.learner.weights_version) if published else 0
        version = known + 1 + LEARNER_CALLS_IN_FLIGHT if published else self.book.first_version
        if saved is None and published is not None:
            begun = handle.start_from.remote(published.weights, published.learner_steps, version)
        else:
            begun = handle.begin.remote(saved and saved.tensors, saved and saved.state, version)
        self._call(role, begun, self._on_begun, shows_work=False)
        self._learn(role)

    def _learn(self, role: Role) -> None:
        assert role is self.learner
        self._state_is_asked = self._weights_are_asked = False
        for _ in range(LEARNER_CALLS_IN_FLIGHT):
            self._train()

    def _reconcile(self) -> None:
        while len(self.actors) < self.num_desired_actors:
            taken = {role.index for role in self.actors}
            index = next(index for index in itertools.count() if index not in taken)
            self.actors.append(role := self.makers.actor(index))
            self._start(role, self._play)
        while len(self.actors) > self.num_desired_actors:
            self._dismiss(last_to_keep(self.actors))
        while len(self.reanalysers) < self.desired.num_reanalysers:
            self.reanalysers.append(role := self.makers.reanalyser(len(self.reanalysers)))
            self._start(role, self._reanalyse)
        while len(self.reanalysers) > self.desired.num_reanalysers:
            self._kill(self.reanalysers.pop())  # it holds nothing
        now = time.monotonic()
        if now >= self._next_exchange:
            self._next_exchange = now + EXCHANGE_SECONDS
            self._exchange()
        for role in self.calls.overdue():
            self._replace(role, RunError("it gave no answer in time"))
        for role in (self.learner, *self.shards, *self.reanalysers):
            if role.is_long_pending(now):
                gpu = role is self.learner and self.config.learner.device == "cuda"
                room = "with room for it" + (", and a GPU" if gpu else "")
                self.book.progress.message(f"the {role.name} still waits for a node {room}")
        is_due = self._evaluates_now() or self.book.checkpoint_is_due(self._steps)
        if self._learner_has_begun and is_due and not self._state_is_asked:
            self._state_is_asked = True
            call = self.learner.handle.state.remote()
            self._call(self.learner, call, self._on_learner_state, shows_work=False)

    @property
    def _steps(self) -> int:
        return self.book.state.learner.learner_steps

    def _evaluates_now(self) -> bool:
        return self.book.evaluation_is_due(self._steps) and not self.calls.is_asked(self.evaluator)

    def _dismiss(self, role: Role) -> None:
        """Lets an actor deliver its finished games before it is ended. What it is doing now still counts."""
        self.actors.remove(role)
        if not role.is_ready:
            self._kill(role)
            return
        role.leaves_by = time.monotonic() + LEAVE_SECONDS
        self.leaving.append(role)
        self._drain(role)

    def _drain(self, role: Role) -> None:
        self._call(role, role.handle.drain.remote(True), partial(self._on_drained, role))

    def _kill(self, role: Role) -> None:
        self.calls.forget(role)
        if role.handle is not None:
            ray.kill(role.handle)

    def kill_all(self) -> None:
        for role in (
            *self.actors,
            *self.leaving,
            *self.reanalysers,
            self.learner,
            self.evaluator,
            *self.shards,
        ):
            self._kill(role)

    # What it asks of them, and what it does with the answers ---------------------------------------------------

    def _play(self, role: Role) -> None:
        if self.published is None:
            return  # the first weights are still on their way; _publish starts everybody
        version, steps, weights = self.published
        seconds = max(PLAY_SECONDS, len(self.actors) / MAX_PLAY_CALLS)
        stage = self.book.curriculum.stage
        call = role.handle.play.remote(version, weights, steps, stage, seconds)
        has_played = role.working_since is not None
        timeout = self.config.actor.timeout_seconds if has_played else CALL_TIMEOUT_SECONDS
        self._call(role, call, partial(self._on_play, role), timeout)

    def _on_play(self, role: Role, report: ActorReport) -> None:
        self.book.add_actor_report(report)
        role.weights_version, role.unacknowledged = report.weights_version, report.unacknowledged
        if role in self.actors:
            self._play(role)

    def _on_drained(self, role: Role, num_left: int) -> None:
        assert role.leaves_by is not None
        if num_left and time.monotonic() < role.leaves_by:
            self._drain(role)
            return
        self.book.add_undelivered(num_left)
        self.leaving.remove(role)
        self._kill(role)

    def _reanalyse(self, role: Role) -> None:
        if self.published is None:
            return  # as above
        version, _, weights = self.published
        call = role.handle.work.remote(version, weights, REANALYSE_SECONDS)
        self._call(role, call, lambda report: self._on_reanalyse(role, report))

    def _on_reanalyse(self, role: Role, report: Any) -> None:
        self.book.state.add_reanalyse_report(report)
        self._reanalyse(role)

    def _on_begun(self, _: None) -> None:
        self._learner_has_begun = True
        self._ask_for_weights()

    def _train(self) -> None:
        call = self.learner.handle.train.remote(TRAIN_SECONDS)
        self._call(self.learner, call, self._on_train, shows_work=False)

    def _on_train(self, report: LearnerReport) -> None:
        self.book.add_learner_report(report)
        if report.metrics:  # else it found no batches, and has yet to show that it can learn
            self.learner.has_worked(time.monotonic())
        if self.published is not None and report.weights_version > self.published.version:
            self._ask_for_weights()
        self._train()

    def _ask_for_weights(self) -> None:
        """For the newest version; one at a time, so that a slow network gets fewer versions, and no queue of them."""
        if not self._weights_are_asked:
            self._weights_are_asked = True
            version, weights = self.learner.handle.weights.remote()
            on_result = partial(self._on_weights, weights=weights)
            self._call(self.learner, version, on_result, shows_work=False)

    def _on_weights(self, version: Version, weights: Any) -> None:
        if self.makers.learner_is_elsewhere:
            on_result = partial(self._on_copy, version, time.monotonic())
            self._call(self.learner, weights, on_result, shows_work=False)
        else:
            self._publish(version, weights)

    def _on_copy(self, version: Version, since: float, weights: Any) -> None:
        """Keeps them on the driver's node: what lies on the learner's alone would be lost with it."""
        copy = ray.put(weights)
        seconds = version.age_seconds + time.monotonic() - since
        self._publish(version._replace(age_seconds=seconds), copy)

    def _publish(self, version: Version, weights: Any) -> None:
        is_first, self._weights_are_asked = self.published is None, False
        self.published = Published(version.number, version.learner_steps, weights)
        self.book.add_version(version)
        if is_first:  # everybody who is there has waited for it
            for role in self.actors:
                if role.is_ready:
                    self._play(role)
            for role in self.reanalysers:
                if role.is_ready:
                    self._reanalyse(role)

    def _on_learner_state(self, answer: Any) -> None:
        (arrays, state), weights = answer
        path = self.book.write_checkpoint(arrays, state)
        self._state_is_asked = False
        if self._evaluates_now():
            self._evaluate(path, state, weights)

    def _evaluate(self, path: Path, state: dict[str, Any], weights: Any) -> None:
        """Asks for an evaluation of a checkpoint that was just written."""
        steps = state["learner_steps"]
        if self.evaluator.handle is None:  # its start would have slowed down that of the others
            self.evaluator.start()
        self.book.begin_evaluation(steps)
        seeds = (self.config.run.seed, steps)
        # Arguments of their own, for the evaluator to find them in the store; they go when the call is over.
        rivals = [(rival.member, ray.put(rival.weights)) for rival in self.book.league.rivals(steps)]
        members, theirs = [member for member, _ in rivals], [weights for _, weights in rivals]
        call = self.evaluator.handle.evaluate.remote(
            state["weights_version"], weights, seeds, members, *theirs
        )
        on_result = partial(self.book.add_evaluation, path=path, learner_steps=steps)
        self._call(self.evaluator, call, on_result, EVALUATION_TIMEOUT_SECONDS)

    def _exchange(self) -> None:
        if not self.calls.is_asked(self.control):
            call = self.control.handle.exchange.remote(self.book.status)
            self._call(self.control, call, self._on_exchange)
        for index, role in enumerate(self.shards):
            if not self.calls.is_asked(role):
                on_result = partial(self.shard_stats.__setitem__, index)
                patience = CALL_TIMEOUT_SECONDS + self._recovery_seconds(role)
                self._call(role, role.handle.flush.remote(), on_result, patience)

    def _on_exchange(self, desired: Desired) -> None:
        self.desired = desired
        if desired.autoscale is None:
            self.autoscaler.num_actors = desired.num_actors
        else:
            has_stepped = self._steps > self._first_step
            self.autoscaler.decide(self._crew(), self.book.state.waiting, has_stepped, desired.autoscale)

    # Calls, and what happens when one is lost -------------------------------------------------------------------

    def _call(
        self,
        role: Role,
        call: Any,
        on_result: Callable[[Any], object],
        timeout_seconds: float = CALL_TIMEOUT_SECONDS,
        shows_work: bool = True,
    ) -> None:
        self.calls.add(role, call, on_result, timeout_seconds, shows_work)

    def _handle_results(self) -> None:
        # Answers that are large arrive meanwhile: nothing is waited for below.
        asked = self.calls.references()
        done, _ = ray.wait(asked, num_returns=1, timeout=0.1)
        if done:  # and all others: what a turn costs grows with the number of actors
            done, _ = ray.wait(asked, num_returns=len(asked), timeout=0)
        for ready in done:
            call = self.calls.pop(ready)
            if call is None:
                continue  # an answer before this one has shown that its process is lost
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
                call.role.is_ready = True
                if call.shows_work:
                    call.role.has_worked(time.monotonic())
                call.on_result(result)

    def _replace(self, role: Role, error: BaseException) -> None:
        """Starts a lost process anew and gives it its work."""
        self.calls.forget(role)
        if role in self.shards:
            self._await_shard(role, error)
            return
        if isinstance(error, ActorUnavailableError) and self._goes_on(role):
            return
        if role in self.leaving:
            self.leaving.remove(role)
            self.book.progress.message(
                f"the {role.name} was lost while it delivered its last games ({first_line(error)})"
            )
            ray.kill(role.handle)
            return
        if role.is_ready or not lost_its_node(error):  # else it never ran, and goes on waiting for a place
            self.book.add_restart(role.kind)
            self._tell_lost(role, error)
        if lost_its_node(error):
            role.has_lost_its_node()
        else:
            role.has_failed(error, time.monotonic())
        ray.kill(role.handle)
        if role is self.evaluator:
            role.handle = None  # made again for the next evaluation
        if role is self.learner:
            self._start_learner()
        elif role is self.control:
            # Its name is free again once Ray has seen it dead; until then the wishes stay as they are.
            self._next_exchange = time.monotonic() + 5.0
            role.handle = make_control(self.run_name, self.desired, may_exist=True)
        elif role is not self.evaluator:
            self._start(role, self._play if role in self.actors else self._reanalyse)

    def _work_of(self, role: Role) -> Callable[[Role], object] | None:
        """What a process that has begun is asked for, again and again; None for those that only answer."""
        if role in self.leaving:
            return self._drain
        if role in self.actors and role.is_ready:
            return self._play
        if role in self.reanalysers and role.is_ready:
            return self._reanalyse
        if role is self.learner and self._learner_has_begun and self.published is not None:
            return self._learn
        return None

    def _goes_on(self, role: Role) -> bool:
        """An answer was lost, perhaps nothing else: a process that answers a next call goes on with what it has."""
        if role is self.control:
            return True  # and is asked again before long
        if self._work_of(role) is None or role.num_doubts == MAX_DOUBTS:
            return False
        role.num_doubts += 1
        self._call(role, role.handle.ready.remote(), lambda _: self._trust(role), shows_work=False)
        return True

    def _trust(self, role: Role) -> None:
        """It has answered. By now it may have been dismissed, and asked for its last games."""
        role.num_doubts = 0
        work = self._work_of(role)
        if work is not None and not self.calls.is_asked(role):
            work(role)

    def _await_shard(self, role: Role, error: BaseException) -> None:
        """Ray restarts a shard under the same handle, which actors and learner hold; a hung one has to die first."""
        now = time.monotonic()
        if role.lost_at is None:
            role.lost_at = now
            self.book.add_restart(role.kind)
            role.has_failed(error, now)
            self._tell_lost(role, error)
        if not isinstance(error, RayActorError):
            ray.kill(role.handle, no_restart=False)
        # One that isn't bound to this node may wait for another to come.
        is_bound = not self.config.replay.spread_shards
        if is_bound and (waited := now - role.lost_at) > SHARD_RESTART_SECONDS + self._recovery_seconds(role):
            raise RunError(f"the {role.name} didn't come back in {waited:.0f} s, last: {error}")

    def _recovery_seconds(self, shard: Role) -> float:
        """How long a shard may read its logs before its first answer; 0 from then on."""
        if shard.working_since is not None:
            return 0.0
        folder = self.book.folder.replay / f"shard_{self.shards.index(shard)}"
        num_bytes = max(folder_bytes(folder), self._bytes_to_fetch)
        return (num_bytes + self._bytes_to_fetch) / RECOVERY_BYTES_PER_SECOND

    def _tell_lost(self, role: Role, error: BaseException) -> None:
        self.book.progress.message(f"the {role.name} was lost ({first_line(error)}); starting another")

    def _end(self, evaluate: bool = False, seconds: float = STOP_SECONDS) -> None:
        """Saves what actors, shards and learner still have. Raises RunError if what was learnt last is lost."""
        self._has_ended = True
        deadline, tell, third = time.monotonic() + seconds, self.book.progress.message, STOP_SECONDS / 3
        actors = [role for role in (*self.actors, *self.leaving) if role.is_ready]
        self._count_what_they_play(4 * PLAY_SECONDS)
        drained = ask_all("actors", [role.handle.drain.remote(False) for role in actors], third, tell)
        self.book.add_undelivered(sum(drained.values()))
        flushes = [role.handle.flush.remote() for role in self.shards]
        self.shard_stats.update(ask_all("replay shards", flushes, third, tell))
        self.book.take_shards(self._stats_of_shards())
        copies = [role.handle.last_push.remote() for role in self.shards] if self.book.copies else []
        last = None
        try:
            # Else it may not even have started, or hold random weights; all that was learnt is in the checkpoints.
            if self._learner_has_begun and self._steps:
                last = self._write_last_checkpoint(deadline)
        finally:
            if evaluate:
                self._finish_evaluations(last)
            pushed = ask_all("replay shards", copies, LAST_PUSH_SECONDS, tell)
            for failure in filter(None, pushed.values()):
                tell(f"the last copy of a replay shard is not whole: {failure}")

    def _count_what_they_play(self, seconds: float) -> None:
        """Takes the reports of actors that are playing, so that the last counts are whole."""
        calls = [call for role in self.actors for call in self.calls.of(role)]
        done = ray.wait(calls, num_returns=len(calls), timeout=seconds)[0] if calls else []
        for call in done:
            with suppress(RayError):
                report = ray.get(call)
                if isinstance(report, ActorReport):
                    self.book.add_actor_report(report)

    def _write_last_checkpoint(self, deadline: float) -> tuple[Path, dict[str, Any], Any]:
        """Its path, the learner's state, the published weights. Raises RunError."""
        (arrays, state), weights = last_state(self.learner.handle, deadline)
        self.book.add_learner_report(LearnerReport(state["learner_steps"], state["weights_version"]))
        return self.book.write_checkpoint(arrays, state), state, weights

    def _finish_evaluations(self, last: tuple[Path, dict[str, Any], Any] | None) -> None:
        """Of the checkpoint whose games still go on, and of the last one: either may turn out to be the best."""
        deadline = time.monotonic() + LAST_EVALUATIONS_SECONDS
        is_over = self._await_evaluation(deadline)
        if is_over and last and last[1]["learner_steps"] > self.book.evaluated_step:
            self._evaluate(*last)
            is_over = self._await_evaluation(deadline)
        if not is_over:
            self.book.progress.message("the last evaluation is not waited for")

    def _hears_stop(self) -> bool:
        """Once the loop is over, which has asked RunControl until then."""
        with suppress(RayError):
            call = self.control.handle.exchange.remote(self.book.status)
            self.desired = ray.get(call, timeout=EXCHANGE_SECONDS)
        return self._is_stopped

    def _await_evaluation(self, deadline: float) -> bool:
        """Takes the evaluation that goes on, if one does. False if it goes on still."""
        for reference in self.calls.of(self.evaluator):
            if not is_answered(reference, deadline, self._hears_stop):
                return False
            call = self.calls.pop(reference)
            assert call is not None
            try:
                result = ray.get(reference, timeout=CALL_TIMEOUT_SECONDS)
            except RayError as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                self.book.progress.message(f"an evaluation failed: {first_line(cause)}")
                self._kill(self.evaluator)
                self.evaluator.handle = None
            else:
                call.on_result(result)
        return True


def last_to_keep(actors: list[Role]) -> Role:
    """The actor that is missed least: one that has no process yet, then one that doesn't play, then the youngest."""
    return min(actors, key=lambda role: (role.is_ready, role.working_since is not None, -role.index))


def lost_its_node(error: BaseException) -> bool:
    """Whether a process is gone with its node, or was to start on one that is. The text is all that Ray tells."""
    return isinstance(error, RayActorError) and (error.preempted or "its node has died" in str(error))
