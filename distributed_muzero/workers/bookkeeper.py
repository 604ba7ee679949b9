"""Writes down what a run does: metrics, evaluations, checkpoints, its status, and the view in the terminal."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero import checkpoint
from distributed_muzero.config import Config, RunConfig
from distributed_muzero.errors import CheckpointError, RunError
from distributed_muzero.observability.exporter import Exporter
from distributed_muzero.observability.metrics import evaluation_metrics
from distributed_muzero.observability.progress import Progress
from distributed_muzero.observability.recorder import Recorder
from distributed_muzero.run_folder import AT_WORK, FIRST_LAUNCH, Launch, RunFolder, now_text
from distributed_muzero.workers.curriculum import Change, Curriculum
from distributed_muzero.workers.league import League
from distributed_muzero.workers.run_copy import Copies, interval_seconds
from distributed_muzero.workers.run_state import ActorReport, Crew, LearnerReport, RunState, Version

TICK_SECONDS = 1.0
ROLES = ("actor", "learner", "replay_shard", "reanalyser", "evaluator", "run_control")  # that are restarted
# Weights versions are written down as given before they are, so many at once; a kill leaves the rest unused.
RESERVED_VERSIONS = 100
INCARNATIONS_A_LAUNCH = 10**6
LOSSES = {
    "missing_episodes": "stored episodes are no longer in the shards' logs",
    "corrupt_records": "damaged or cut off records were found in the shards' logs",
}


class Stand(NamedTuple):
    """The counts of a run: of the last second where that can be read, else of the newest checkpoint."""

    env_steps: int
    episodes: int
    learner_steps: int  # of the checkpoint, from which the learner goes on
    weights_version: int


class Known(NamedTuple):
    """What earlier launches wrote down last; empty where there is nothing."""

    checkpoint: Mapping[str, Any]
    status: Mapping[str, Any]

    @property
    def stand(self) -> Stand:
        def last(name: str) -> int:
            return max(counts.get(name, 0) for counts in self)

        steps = self.checkpoint.get("learner_steps", 0)
        return Stand(last("env_steps"), last("episodes"), steps, last("weights_version"))

    @property
    def curriculum(self) -> Mapping[str, Any] | None:
        """As `Curriculum.state` gave it; the status is the newer one."""
        return self.status.get("curriculum") or self.checkpoint.get("curriculum")


def read_known(folder: RunFolder, tell: Callable[[str], None]) -> Known:
    """Where earlier launches left a run. Raises CheckpointError if no checkpoint is intact."""
    saved = checkpoint.latest_checkpoint(folder.checkpoints)
    status = None
    try:
        status = folder.read_status()
    except RunError as error:
        tell(str(error))
    return Known(saved.state if saved else {}, status or {})


def why_over(folder: RunFolder) -> str | None:
    """Which limit or goal a run has reached before it is launched again, in words; changes nothing."""
    best = best_so_far(folder)
    stand = read_known(folder, lambda _: None).stand
    return why_over_by(folder.config.run, {**stand._asdict(), "evaluation": best and best.mean_return})


def why_over_by(limits: RunConfig, counts: Mapping[str, Any]) -> str | None:
    """The same by what was counted, as a status names it."""
    state = RunState(limits, time.monotonic)
    state.restore(*(counts.get(name, 0) for name in Stand._fields))
    if counts.get("evaluation") is not None:
        state.evaluation = {"mean_return": counts["evaluation"]}
    return state.stop_reason()


def best_so_far(folder: RunFolder) -> checkpoint.Best | None:
    """The best checkpoint; of a game for two, if it was evaluated against the opponent that the config names."""
    best = checkpoint.best_checkpoint(folder.checkpoints)
    lines = [line for line in folder.read_evaluations() if best and line.get("learner_steps") == best.step]
    return best if not lines or is_comparable(lines[-1], folder.config) else None


def is_comparable(evaluation: Mapping[str, Any], config: Config) -> bool:
    """Whether an evaluation of two players was against the opponent that the config names; always so of one."""
    return evaluation.get("opponent") in (None, config.evaluator.opponent)


class Bookkeeper:
    """The one writer of a run's folder. Every evaluation is of a checkpoint, so that what did best can be loaded."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
        launch: Launch = FIRST_LAUNCH,
        copies: Copies | None = None,
        exporter: Exporter | None = None,
        evaluates: bool = True,
    ):
        """launch: from number 1 on, counts go on where they stood.   copies: of the folder, at a URI.

        evaluates: False = an evaluation is never due; somebody else evaluates.
        """
        self.config = config
        self.folder = folder
        self.progress = progress
        self.state = RunState(config.run, clock)
        self.curriculum = Curriculum(config)
        self.league = League(folder, config.evaluator.league_size, progress.message)
        self._clock = clock
        self._recorder = Recorder(folder)
        self._next_tick = clock() + TICK_SECONDS
        self._last_evaluation = self._last_checkpoint = clock()
        # Learner steps of the newest checkpoint that was evaluated, or is being, and of the newest of all.
        self.evaluated_step = self._saved_step = 0
        self._best_return = -np.inf
        self._shown_rejections: set[str] = set()
        self._told_losses = dict.fromkeys(LOSSES, 0)
        self.launch = launch
        self.copies = copies
        self.exporter = exporter
        self._evaluates = evaluates
        self._shards: Sequence[Mapping[str, float]] = ()
        self._crew = Crew(0)
        self._undelivered = 0
        self._restarts = Counter(dict.fromkeys(ROLES, 0))
        self._checkpoint_seconds: float | None = None
        self._checkpoint_is_asked = False
        self._published: Version | None = None
        self._actor_starts: Counter[int] = Counter()
        self.status: dict[str, Any] = {}
        self._reason: str | None = None
        # Of this launch's weights: a version is never given to two sets of weights.
        self.first_version = launch.first_version
        if launch.number:
            self._go_on()
            self.first_version = max(self.first_version, self.state.learner.weights_version + 1)
        self._reserved_versions = 0
        self._reserve_versions(self.first_version + RESERVED_VERSIONS)

    def next_incarnation(self, actor: int) -> int:
        """Of the actor with this index: episode ids that it gives are never given again."""
        self._actor_starts[actor] += 1
        return self.launch.number * INCARNATIONS_A_LAUNCH + self._actor_starts[actor] - 1

    def add_restart(self, role: str) -> None:
        """role: one of ROLES."""
        self._restarts[role] += 1

    def add_undelivered(self, num_episodes: int) -> None:
        """Counts finished games that are lost, as the shards didn't take them while their actor lived."""
        if num_episodes:
            self._undelivered += num_episodes
            self.progress.message(
                f"finished games left with actors that ended, as the shards took no more by then: {num_episodes}"
            )

    def change_config(self, config: Config) -> None:
        """The launch goes on with other settings, such as another number of shards, and new processes."""
        self.folder = self.folder.with_config(config)
        self.folder.write_config()
        self.config = config
        self.first_version = max(self.first_version, self.state.learner.weights_version + 1)

    def _reserve_versions(self, end: int) -> None:
        self._reserved_versions = end
        self.folder.reserve_versions(self.launch, end)

    def _go_on(self) -> None:
        known = read_known(self.folder, self.progress.message)
        stand = known.stand
        self.evaluated_step = self._saved_step = stand.learner_steps
        self.state.restore(*stand)
        if known.curriculum:
            self.curriculum.restore(known.curriculum)
        best = best_so_far(self.folder)
        if best is not None:
            self._best_return = best.mean_return
        else:
            self._mark_best_again()

    def _mark_best_again(self) -> None:
        """By the evaluations, of the checkpoints that are still there."""
        for line in filter(partial(is_comparable, config=self.config), self.folder.read_evaluations()):
            step, mean_return = line.get("learner_steps"), line.get("mean_return")
            if isinstance(step, int) and isinstance(mean_return, float) and mean_return >= self._best_return:
                with suppress(CheckpointError):
                    checkpoint.mark_best(self.folder.checkpoints, step, mean_return)
                    self._best_return = mean_return

    def add_actor_report(self, report: ActorReport) -> None:
        """Counts what an actor did. A refusal is shown once for each kind of it."""
        self.state.add_actor_report(report)
        for change in filter(None, starmap(self.curriculum.record, report.results)):
            self._tell_of_stage(change)
        kind = report.last_rejection.partition(":")[0]
        if kind and kind not in self._shown_rejections:
            self._shown_rejections.add(kind)
            self.progress.message(report.last_rejection)

    def _tell_of_stage(self, change: Change) -> None:
        self.progress.message(
            f"curriculum: {change.won:.0%} of the last {change.num_games} games of stage {change.before + 1} were won; "
            f"stage {change.stage + 1} of {self.curriculum.num_stages} is next, {self.curriculum.name(change.stage)}"
        )

    def add_learner_report(self, report: LearnerReport) -> None:
        self.state.add_learner_report(report)
        if report.weights_version > self._reserved_versions - RESERVED_VERSIONS // 2:
            self._reserve_versions(report.weights_version + RESERVED_VERSIONS)

    def add_version(self, version: Version) -> None:
        """Actors can get it from now on."""
        self._published = version

    def tick(self, shards: Sequence[Mapping[str, float]], crew: Crew) -> bool:
        """Takes how the run stands; once a second, records the metrics, shows them, and returns True.

        Raises RunError if another process has taken the run over.
        """
        self._shards, self._crew = shards, crew
        self._tell_of_losses(shards)
        self.tell_of_copies()
        if self.copies:
            self.copies.check()
        is_due = self._clock() >= self._next_tick
        if is_due:
            self._next_tick = self._clock() + TICK_SECONDS
            self.write_down()
        return is_due

    def write_down(self) -> None:
        """Records the metrics and the status as they are now."""
        self.write_status("running", self._record())

    @property
    def crew(self) -> Crew:
        """Who was at work in the last turn."""
        return self._crew

    def take_shards(self, shards: Sequence[Mapping[str, float]]) -> None:
        """How the shards stand in the end, after the last tick."""
        self._shards = shards

    def _tell_of_losses(self, shards: Sequence[Mapping[str, float]]) -> None:
        """What shards met when they started; told once for each number."""
        for name, what in LOSSES.items():
            number = int(sum(shard[name] for shard in shards))
            if number > self._told_losses[name]:
                self._told_losses[name] = number
                self.progress.message(f"{number} {what}; the replay goes on with what is intact")

    def tell_of_copies(self) -> None:
        for text in self.copies.messages() if self.copies else ():
            self.progress.message(text)

    def _record(self) -> dict[str, float]:
        metrics = {
            **self.state.metrics(self._shards),
            **self._crew.metrics(),
            **{f"restarts/{role}": number for role, number in self._restarts.items()},
            "actors/undelivered_episodes": self._undelivered,
            "checkpoint/age_seconds": self._clock() - self._last_checkpoint,
            "disk/free_bytes": shutil.disk_usage(self.folder.path).free,
        }
        if self.config.curriculum.stages:
            metrics.update(self.curriculum.metrics())
        if self.league.members or self.league.num_lost:
            metrics["league/members"] = len(self.league.members)
            metrics["league/lost_members"] = self.league.num_lost
        if self._checkpoint_seconds is not None:
            metrics["checkpoint/seconds"] = self._checkpoint_seconds
        if self._published is not None:
            metrics["weights/bytes"] = self._published.num_bytes
            metrics["weights/publish_seconds"] = self._published.age_seconds
        if self.copies:
            copy = self.copies.state(self._shards)
            metrics["copy/seconds_since_push"] = copy["seconds_since_push"]
            metrics["copy/interval_seconds"] = interval_seconds()
            metrics["copy/failures"] = copy["failures"]
        self._recorder.record(metrics, self.state.env_steps)
        self._show(metrics)
        return metrics

    def _show(self, metrics: Mapping[str, float]) -> None:
        self.progress.update(metrics)
        if self.exporter:
            self.exporter.update(metrics)

    def evaluation_is_due(self, learner_steps: int) -> bool:
        """Whether the pause is over and there is something new to evaluate."""
        waited = self._clock() - self._last_evaluation >= self.config.evaluator.interval_seconds
        return self._evaluates and waited and learner_steps > self.evaluated_step

    def checkpoint_is_due(self, learner_steps: int) -> bool:
        """Whether too much would be lost with the learner."""
        waited = self._clock() - self._last_checkpoint >= self.config.learner.checkpoint_seconds
        return (waited or self._checkpoint_is_asked) and learner_steps > self._saved_step

    def ask_for_checkpoint(self) -> None:
        """One is due at once, if there is anything new to save."""
        self._checkpoint_is_asked = True

    @property
    def owes_checkpoint(self) -> bool:
        """Whether one was asked for that isn't written yet."""
        return self._checkpoint_is_asked and self.state.learner.learner_steps > self._saved_step

    def write_checkpoint(
        self, arrays: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any]
    ) -> Path:
        """Writes what `Learner.state()` gave and prunes old ones."""
        step = int(state["learner_steps"])
        began, self._saved_step, self._checkpoint_is_asked = self._clock(), step, False
        path = checkpoint.write_checkpoint(
            self.folder.checkpoints,
            step,
            arrays,
            {
                **state,
                "env_steps": self.state.env_steps,
                "episodes": self.state.episodes,
                "shards": list(self._shards),
                "config": self.config.model_dump(mode="json"),
                "curriculum": self._curriculum_state(),
            },
        )
        self._last_checkpoint = self._clock()
        self._checkpoint_seconds = self._last_checkpoint - began
        # The one that is being evaluated may turn out to be the best.
        spared = {self.evaluated_step, *self.league.steps}
        checkpoint.prune_checkpoints(self.folder.checkpoints, self.config.learner.keep_checkpoints, spared)
        return path

    def _curriculum_state(self) -> dict[str, Any] | None:
        """None where the config asks for none."""
        return self.curriculum.state() if self.config.curriculum.stages else None

    def begin_evaluation(self, learner_steps: int) -> None:
        """The checkpoint of so many steps is being evaluated from now on."""
        self._last_evaluation, self.evaluated_step = self._clock(), learner_steps

    def add_evaluation(self, result: Mapping[str, Any], path: Path, learner_steps: int) -> None:
        """Records an evaluation of the checkpoint at `path`; the best one so far is kept from pruning.

        With games against the `league`, the checkpoint gets its rating by them, and joins.
        """
        result = {**result, "checkpoint": path.name, "learner_steps": learner_steps}
        if "league" in result and self.league.size:
            result["elo"] = self.league.rate(result["league"])
        self.state.evaluation = result
        self._recorder.record_evaluation(
            {**result, "env_steps": self.state.env_steps, "seconds": self.state.seconds}
        )
        self._show(evaluation_metrics(result))
        if path.exists():
            if "elo" in result:
                self.league.join(learner_steps, result["elo"])
            # A tie goes to the newer one: an opponent that is always beaten tells them apart no more.
            if result["mean_return"] >= self._best_return:
                self._best_return = result["mean_return"]
                checkpoint.mark_best(self.folder.checkpoints, learner_steps, self._best_return)
        self._last_evaluation = self._clock()

    def write_status(self, status: str, metrics: Mapping[str, float]) -> None:
        """Writes status.json, which `self.status` holds as well; docs/operations.md names its keys."""
        state, is_at_work = self.state, status in AT_WORK
        crew = self._crew if is_at_work else Crew(0)
        rates = metrics if is_at_work else {}
        self.status = {
            "run": self.folder.name,
            "state": status,
            "folder": self.folder.place,
            "actors": {
                "desired": crew.desired,
                "live": crew.live,
                "pending": crew.pending,
                "draining": crew.draining,
            },
            "reanalysers": crew.reanalysers,
            "shards": self.config.replay.num_shards,
            "env_steps": state.env_steps,
            "env_steps_per_second": rates.get("rollout/env_steps_per_second"),
            "episodes": state.episodes,
            "learner_steps": state.learner.learner_steps,
            "learner_steps_per_second": rates.get("train/learner_steps_per_second"),
            "weights_version": state.learner.weights_version,
            "staleness": crew.staleness,
            "samples_per_insert": metrics.get("replay/samples_per_insert"),
            "actors_waiting": rates.get("actors/waiting"),
            "learner_waiting": rates.get("train/waiting"),
            "mean_return": metrics.get("rollout/ep_rew_mean"),
            "evaluation": state.evaluation and state.evaluation["mean_return"],
            "score": state.evaluation and state.evaluation.get("score"),
            "solved": state.evaluation and state.evaluation.get("solved"),
            "elo": state.evaluation and state.evaluation.get("elo"),
            "curriculum": self._curriculum_state(),
            "losses": {
                name.partition("/")[2]: value
                for name, value in state.learner.metrics.items()
                if "loss" in name
            },
            "restarts": self._restarts.total(),
            "restarts_by_role": dict(self._restarts),
            "undelivered_episodes": self._undelivered,
            "rejected_episodes": metrics.get("replay/rejected_episodes"),
            "checkpoint_age_seconds": rates.get("checkpoint/age_seconds") if self._saved_step else None,
            "disk_free_bytes": rates.get("disk/free_bytes"),
            "seconds": round(state.seconds, 1),
            "updated": now_text(),
        }
        if self.exporter and is_at_work:
            self.status["metrics"] = f"http://{self.exporter.address}/metrics"
        if self._reason:
            self.status["reason"] = self._reason
        if self.copies:
            self.status["copy"] = self.copies.state(self._shards)
        self.folder.write_status(self.status)

    def close(self, status: str, reason: str | None = None) -> None:
        """The last lines.   status: finished, stopped or failed.   reason: why, in words."""
        self._reason = reason
        if status != "failed":
            self._reserve_versions(self.state.learner.weights_version + 1)
        self.write_status(status, self._record())
        self._recorder.close()
