"""DistributedMuZero: a run, an iteration at a time, as RLlib's Algorithm and Tune's Trainable are driven."""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
import time
import uuid
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune import Trainable
from ray.tune.execution.placement_groups import PlacementGroupFactory

from distributed_muzero import checkpoint
from distributed_muzero.algorithm.planning import as_array, legal_mask, plan_batch
from distributed_muzero.algorithm.returns import signed_discount
from distributed_muzero.cluster.session import num_cpus, ray_session
from distributed_muzero.cluster.session import turns as play_on_ray
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import ConfigError, ContractError, RunError, RunIsOver
from distributed_muzero.observability.progress import Progress
from distributed_muzero.replay.recorded_pieces import MASK, key_beside_mask
from distributed_muzero.rllib.config import MuZeroConfig
from distributed_muzero.rllib.interrupts import put_off
from distributed_muzero.rllib.registered import register_again
from distributed_muzero.rllib.results import Counts, of_episodes, result
from distributed_muzero.rllib.saved import folder_at, read_saved, write_saved
from distributed_muzero.run_folder import RunFolder, create_run, open_run
from distributed_muzero.workers.bookkeeper import Bookkeeper
from distributed_muzero.workers.builder import Builder
from distributed_muzero.workers.evaluator import Evaluator
from distributed_muzero.workers.launching import Loop, Turns, check_parts, launch
from distributed_muzero.workers.local import turns as play_here
from distributed_muzero.workers.snapshot import copy_run

NAME = "DistributedMuZero"
NOT_SAVED = ("tensorboard", "history", "videos")
START_SECONDS = 300.0  # for processes to start, on a machine that is busy
EVALUATION_STREAM = 10**12  # its games are no others': the run's own use learner steps as seeds

logger = logging.getLogger(__name__)


class Logged(Progress):
    """What a run has to say, in this process' log; who calls `train()` sees the rest in its results."""

    def update(self, metrics: Mapping[str, float]) -> None:
        pass

    def message(self, text: str) -> None:
        logger.warning(text)


class DistributedMuZero(Trainable):
    """One run, made by `MuZeroConfig.build_algo()` or by Tune. Its processes start with the first `train()`.

    They play and learn during `train()`: between two calls they finish what they are at, and wait; what evaluates or
    saves lets them go on until the weights of that moment are written. The run's folder lies in `logdir`, for
    `distributed-muzero watch`, `evaluate`, `plot` and others. Raises ConfigError, EnvironmentFailure and RunError as
    `distributed-muzero train` does.
    """

    def __init__(self, config: MuZeroConfig | Mapping[str, Any] | None = None, storage: Any = None):
        settings = config.to_dict() if isinstance(config, MuZeroConfig) else dict(config or {})
        super().__init__(settings, storage)

    def setup(self, config: dict[str, Any]) -> None:
        self.algorithm_config = MuZeroConfig.from_dict(config)
        self._plan = self.algorithm_config.plan()
        spec = check_parts(self._plan.config)
        if spec.num_players == 1 and "evaluation_opponent" in config:
            raise ConfigError(
                f"evaluation_opponent is for games of two, and {spec.id} is for one: leave it out"
            )
        self._folder: RunFolder | None = None
        self._stack = ExitStack()
        self._turns: Turns | None = None
        self._book: Bookkeeper | None = None
        self._builder = Builder(self._plan.config, NAME)
        self._evaluator: Evaluator | None = None
        self._loaded: checkpoint.Checkpoint | None = None  # into the evaluator
        self._is_over = self._is_stopped = False
        self._has_played = False  # in this launch
        self._reported = Counts()
        self._seconds = 0.0  # in turns
        self.algorithm_config.to_yaml()  # raises for what couldn't be saved later
        self._rng = np.random.default_rng(self._plan.config.run.seed)

    # One iteration -----------------------------------------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """An iteration, of so many seconds and environment steps as `.reporting()` asks for at least.

        The first one begins when somebody plays, or after START_SECONDS.
        """
        given, began = self._plan.given, time.monotonic()
        book = self._begun()
        before = self._reported
        if not self._has_played:
            while not self._is_over and not self._has_played and time.monotonic() - began < START_SECONDS:
                self._take_turn()
                self._has_played = book.state.env_steps > before.env_steps or book.config.is_offline
            began = time.monotonic()
        while not self._is_over and (
            time.monotonic() - began < given.min_seconds
            or book.state.env_steps - before.env_steps < given.min_env_steps
        ):
            self._take_turn()
        now = self._reported = Counts.of(book.state, self._seconds)
        found = result(book.state, now, before, book.config.learner.batch_size, book.crew.live, book.status)
        if given.evaluation_interval and (self.iteration + 1) % given.evaluation_interval == 0:
            found["evaluation"] = self.evaluate()
        return {**found, "done": self._is_over}  # an evaluation's turns may have ended it

    def evaluate(self) -> dict[str, Any]:
        """Whole games without noise by the weights as they are now; the run doesn't go on meanwhile."""
        evaluator, config = self._loaded_evaluator(), self._plan.config
        steps = self._loaded.step if self._loaded else 0
        played = evaluator.evaluate(
            config.evaluator.num_episodes,
            (config.run.seed, EVALUATION_STREAM, steps),
            config.evaluator.num_simulations,
        )
        others = {name: played[name] for name in ("solved", "score") if name in played}
        return {
            "env_runners": {**of_episodes(played["returns"]), "num_episodes": played["episodes"], **others}
        }

    def compute_single_action(
        self,
        observation: Any,
        *,
        action_mask: Any = None,
        num_simulations: int | None = None,
        explore: bool = False,
    ) -> int:
        """The flat action of one search from an observation [*O] by the weights as they are now.

        observation: as the environment gives it; the number of a one-hot, or a Dict of `action_mask` and one other
        entry, will do.   action_mask: [*A], 1 = allowed; all are without it.
        num_simulations: in place of the config's.
        explore: draw the action in proportion to the search's policy, with noise at the root.
        Raises ContractError for shapes that don't fit.
        """
        config, spec = self._plan.config, self._builder.spec
        if isinstance(observation, Mapping) and (key := key_beside_mask(observation)):
            action_mask = observation[MASK] if action_mask is None else action_mask
            observation = observation[key]
        seen = stacked(observation, spec, config.environment.history_length)
        mask = np.ones(spec.action_shape) if action_mask is None else as_array(action_mask)
        if mask.size != spec.num_actions:
            raise ContractError(f"a mask of shape {mask.shape} came; expected {spec.action_shape}")
        model = self._loaded_evaluator().model.search_model
        assert model is not None
        plan = plan_batch(
            model,
            seen[None],
            legal_mask(mask)[None],
            config.search,
            signed_discount(config.algorithm.discount, spec.num_players),
            rng=self._rng,
            noise=explore,
            num_simulations=num_simulations,
        )
        weights = plan.result.action_weights[0]
        if explore:
            return int(self._rng.choice(len(weights), p=weights / weights.sum()))
        return int(plan.result.visit_counts[0].argmax() if plan.actions is None else plan.actions[0])

    # What is saved -----------------------------------------------------------------------------------------------

    def save_to_path(self, path: str | Path | None = None) -> str:
        """Saves what the run can go on from, here or in another process; what was saved there before is replaced.

        Weights, optimizer, what was played unless `store_buffer_in_checkpoints` is False, counts, and the settings.
        Raises RunError.
        """
        folder = Path(tempfile.mkdtemp(prefix="muzero-")) if path is None else folder_at(path)
        self.save_checkpoint(str(folder))
        return str(folder)

    def restore_from_path(self, path: Any) -> None:
        """Goes on from what `save_to_path`, or a trial, has saved; with this algorithm's own settings.

        path: a folder, or a Checkpoint of Tune. Raises RunError for what isn't one, or has other networks.
        """
        if isinstance(path, tune.Checkpoint):
            with path.as_directory() as folder:
                self.restore_from_path(folder)
            return
        saved = read_saved(folder_at(path))
        self._take_over(saved.run)
        self._iteration, self._time_total = saved.training_iteration, saved.time_total_s

    @classmethod
    def from_checkpoint(cls, path: Any) -> DistributedMuZero:
        """An algorithm with the settings that were saved, which goes on where it stood. Raises RunError."""
        if isinstance(path, tune.Checkpoint):
            with path.as_directory() as folder:
                return cls.from_checkpoint(folder)
        algorithm = cls(MuZeroConfig.from_yaml(read_saved(folder_at(path)).settings))
        algorithm.restore_from_path(path)
        return algorithm

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        run, settings = self._run_folder(), self.algorithm_config.to_yaml()
        self._write_weights()
        if self._book is not None and not self._is_over:
            self._book.write_down()  # the counts of now
        left_out = NOT_SAVED if self._plan.given.store_buffer else (*NOT_SAVED, "replay")
        state = {"training_iteration": self.iteration, "time_total_s": self._time_total}
        write_saved(Path(checkpoint_dir), run, left_out, settings, state)

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        self._take_over(read_saved(folder_at(checkpoint_dir)).run)

    def _take_over(self, saved: RunFolder) -> None:
        """Goes on from a copy of the saved run."""
        saved.with_config(self._plan.config)  # raises before anything is changed
        path = Path(self.logdir) / self._new_name()
        copy_run(saved.path, path)
        for name in ("checkpoints", "replay", "tensorboard"):
            (path / name).mkdir(exist_ok=True)
        self._end()
        self._forget_folder()
        self._folder = open_run(str(path)).with_config(self._plan.config)

    # The run -----------------------------------------------------------------------------------------------------

    def _begun(self) -> Bookkeeper:
        """The book of the launch, which starts with the first call. Raises RunIsOver after a stop."""
        if self._turns is None:
            self._has_played = False
            folder = self._run_folder()
            _going_on.add(self)
            if not self._plan.in_process and not ray.is_initialized():
                _own_ray.enter_context(ray_session(num_cpus(self._plan.config)))
                register_again()
            self._stack.enter_context(folder.locked())
            loop: Loop = play_here if self._plan.in_process else play_on_ray
            self._turns = launch(
                (folder, None),
                self._plan.config,
                self._plan.in_process,
                loop,
                Logged(),
                lambda: False,
                self._plan.given.datasets,
                evaluates=self._plan.given.evaluates,
            )
            self._take_turn()
            assert self._book is not None
            self._reported = Counts.of(self._book.state, self._seconds)
        if self._is_over or self._book is None:
            raise RunIsOver("the run was stopped; restore it from a checkpoint, or build another")
        return self._book

    def _take_turn(self) -> bool:
        """False if the run is over. What is raised in it ends the launch; the next one goes on from what was saved.

        Ctrl-C comes between two turns, and ends nothing.
        """
        assert self._turns is not None
        if self._book is not None and not self._plan.in_process and not ray.is_initialized():
            self._end()
            raise RunError(
                "Ray was shut down while the run went on; the next train() goes on from what was saved"
            )
        began = time.monotonic()
        with put_off():
            try:
                self._book = next(self._turns)
            except StopIteration:
                self._is_over = True
            except BaseException:
                logger.warning("what was learnt since the run's last checkpoint is lost")
                self._end()
                raise
            self._seconds += time.monotonic() - began
        return not self._is_over

    def _write_weights(self) -> None:
        """As they are now, to a checkpoint of the run; there is none before the first learner step."""
        book = self._book
        if book is not None and not self._is_over:
            book.ask_for_checkpoint()
            while book.owes_checkpoint and self._take_turn():
                pass

    def _loaded_evaluator(self) -> Evaluator:
        """With the weights as they are now."""
        folder = self._run_folder()
        self._write_weights()
        if self._evaluator is None:
            self._evaluator, self._loaded = self._builder.evaluator(), None
            # Networks of one seed begin alike in all processes.
            self._evaluator.model.load(0, self._evaluator.model.flat.read().numpy())
        newest = checkpoint.newest_path(folder.checkpoints)
        if newest is not None and (self._loaded is None or self._loaded.path != newest):
            self._loaded = checkpoint.latest_checkpoint(folder.checkpoints)
            assert self._loaded is not None
            self._evaluator.load(self._loaded)
        return self._evaluator

    def _run_folder(self) -> RunFolder:
        """Made with the first call. Raises RunIsOver after a stop."""
        if self._is_stopped:
            raise RunIsOver("stop() has ended this algorithm; from_checkpoint() goes on from what was saved")
        if self._folder is None:
            self._folder = create_run(self.logdir, self._new_name(), self._plan.config)
        return self._folder

    def _new_name(self) -> str:
        """Of a run, in a cluster with others."""
        return f"{self.trial_id if self._trial_info else 'muzero'}-{uuid.uuid4().hex[:8]}"

    def _end(self) -> None:
        """At once: what was learnt since the last checkpoint is lost."""
        turns, evaluator = self._turns, self._evaluator
        self._turns = self._book = self._evaluator = None
        self._is_over = False
        _going_on.discard(self)
        with self._stack:  # the folder's lock is let go of last, whatever happens
            if turns is not None:
                self._stack.callback(turns.close)
            if evaluator is not None:
                self._stack.callback(evaluator.close)

    def _forget_folder(self) -> None:
        if self._folder and self._storage:
            shutil.rmtree(self._folder.path, ignore_errors=True)  # a trial's, which nobody looks for
        self._folder = None

    def cleanup(self) -> None:
        with ExitStack() as stack:
            if all(other is self or other._plan.in_process for other in _going_on):
                stack.callback(_own_ray.close)
            self._end()
            self._forget_folder()
            self._is_stopped = True

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial, or the same with other settings, in this process."""
        self.cleanup()
        self.setup(new_config)
        return True

    # Tune --------------------------------------------------------------------------------------------------------

    @classmethod
    def default_resource_request(cls, config: Mapping[str, Any]) -> PlacementGroupFactory:
        """A CPU for the trial with its learner and replay, one for each actor and reanalyser; the learner's GPUs."""
        plan = MuZeroConfig.from_dict(config).plan()
        wanted, learner = plan.config, plan.config.learner
        if learner.device == "auto" or wanted.reanalyse.device != "cpu":
            raise ConfigError(
                f"learner.device {learner.device}, reanalyse.device {wanted.reanalyse.device}: Tune has to know what a "
                "trial asks for; expected cpu or cuda for the learner (num_gpus_per_learner), and cpu to reanalyse"
            )
        gpus: dict[str, float] = {"GPU": learner.num_devices} if learner.device == "cuda" else {}
        if plan.in_process:
            return PlacementGroupFactory([{"CPU": 1, **gpus}])
        # Spread shards are placed by themselves.
        number = num_cpus(wanted) - (wanted.replay.num_shards if wanted.replay.spread_shards else 0)
        bundles: list[dict[str, float]] = [{"CPU": 1} for _ in range(1 + number)]
        return PlacementGroupFactory([*bundles, gpus] if gpus else bundles)


def stacked(observation: Any, spec: EnvironmentSpec, history_length: int) -> np.ndarray:
    """[N, *O] of an observation [*O], of one with those before it, or of the number of a one-hot. Raises ContractError.

    What was before a single one is zeros, as when a game begins.
    """
    shape = (history_length, *spec.observation_shape)
    try:
        seen = as_array(observation)
        if seen.shape == () and seen.dtype.kind in "iu" and len(shape) == 2 and 0 <= seen < shape[1]:
            seen = np.arange(shape[1]) == seen
        seen = seen.astype(spec.observation_dtype, copy=False)
    except (TypeError, ValueError) as error:
        raise ContractError(f"an observation came that is no array of numbers: {error}") from None
    if seen.shape == spec.observation_shape:
        seen = np.concatenate([np.zeros((history_length - 1, *seen.shape), seen.dtype), seen[None]])
    if seen.shape != shape:
        raise ContractError(
            f"an observation of shape {seen.shape} came; expected {spec.observation_shape}, or {shape} with those "
            "before it, as the environment's `spec` says"
        )
    return seen


_going_on: weakref.WeakSet[DistributedMuZero] = weakref.WeakSet()
_own_ray = ExitStack()  # the Ray that one of them has started, for all of this process; the last one ends it


@atexit.register
def _end_all() -> None:
    """Of a script that ends without `stop()`: before the threads are gone that the runs' records need."""
    for algorithm in list(_going_on):
        algorithm.stop()


tune.register_trainable(NAME, DistributedMuZero)
