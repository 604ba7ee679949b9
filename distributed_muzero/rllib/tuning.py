"""A search over settings with Tune: the space that a person writes, the schedulers, what is seen meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search.sample import Domain

from distributed_muzero.config import with_numbers
from distributed_muzero.errors import ConfigError, RunError, first_line
from distributed_muzero.rllib.algorithm import NAME
from distributed_muzero.rllib.config import MuZeroConfig
from distributed_muzero.rllib.settings import SECTIONS, SETTINGS

METRIC = "evaluation/env_runners/episode_return_mean"
ITERATION = "training_iteration"
PERTURBATIONS = 6  # of a trial under PBT, at most
REDUCTION = 3  # ASHA lets one of so many trials go on at each rung
KINDS: dict[str, Callable[..., Domain]] = {
    "uniform": tune.uniform,
    "loguniform": tune.loguniform,
    "quniform": tune.quniform,
    "randint": tune.randint,
    "lograndint": tune.lograndint,
}


class Best(NamedTuple):
    """What a search came to."""

    trial: str
    chosen: dict[str, Any]  # settings by their names in the space
    checkpoint: tune.Checkpoint
    score: float


def read_space(path: Path) -> dict[str, Domain]:
    """Domains by the names of settings, from a YAML file. Raises ConfigError.

    Each line is `name: {kind: arguments}`: `lr: {loguniform: [1e-4, 1e-2]}`, `samples_per_insert: {choice: [2, 4, 8]}`.
    A name is one of MuZeroConfig's, or section.key of a run's config.
    """
    try:
        lines = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"can't read the space {path}: {error}") from None
    if not isinstance(lines, dict) or not lines:
        raise ConfigError(
            f"{path}: expected a line for each setting, such as lr: {{loguniform: [1.0e-4, 1.0e-2]}}"
        )
    return {str(name): _domain(str(name), line, path) for name, line in lines.items()}


def _domain(name: str, line: Any, path: Path) -> Domain:
    kinds = ", ".join([*KINDS, "choice"])
    if not isinstance(line, dict) or len(line) != 1:
        raise ConfigError(f"{path}: {name}: {line!r}: expected {{kind: [arguments]}} with one of {kinds}")
    [(kind, arguments)] = line.items()
    if not isinstance(arguments, list) or not arguments:
        raise ConfigError(f"{path}: {name}: {kind}: {arguments!r}: expected a list, such as [1.0e-4, 1.0e-2]")
    if kind == "choice":
        return tune.choice(with_numbers(arguments))
    if kind not in KINDS:
        raise ConfigError(f"{path}: {name}: no kind {kind!r}; expected one of {kinds}")
    try:
        numbers = [float(number) for number in arguments]
        is_whole = kind in ("randint", "lograndint")
        return KINDS[kind](*(int(number) if is_whole else number for number in numbers))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {name}: {kind} {arguments}: {error}") from None


def lay(settings: dict[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as MuZeroConfig takes them, with these over them; section.key goes into its section."""
    laid = {name: dict(value) if name in SECTIONS else value for name, value in settings.items()}
    for name, value in chosen.items():
        section, dot, key = name.partition(".")
        if not dot:
            laid[name] = value
        else:
            laid.setdefault(section, {})[key] = value
    return laid


def chosen_of(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The other way round: what a trial has of these."""
    found = {}
    for name in names:
        section, dot, key = name.partition(".")
        found[name] = settings[section][key] if dot else settings[name]
    return found


def check_space(config: MuZeroConfig, space: Mapping[str, Domain], seed: int) -> None:
    """That an example of the space can be. Raises ConfigError for a name that isn't known, or a value that can't be."""
    import numpy as np

    for name in space:
        if "." not in name and name not in SETTINGS:
            MuZeroConfig().update_from_dict({name: 0})  # raises, with what is near
        if name in ("preset", "env", "env_config"):
            raise ConfigError(f"{name} can't be searched over: all trials play the same")
    rng = np.random.RandomState(seed)
    example = {name: domain.sample(random_state=rng) for name, domain in space.items()}
    MuZeroConfig.from_dict(lay(config.to_dict(), example)).validate()


def make_scheduler(name: str, iterations: int, space: Mapping[str, Domain]) -> TrialScheduler:
    """asha stops trials that fall behind, pbt lets them go on from a better one's checkpoint with other settings."""
    if name == "asha":
        grace = max(1, math.ceil(iterations / REDUCTION**2))
        return ASHAScheduler(
            time_attr=ITERATION, max_t=iterations, grace_period=grace, reduction_factor=REDUCTION
        )
    if name == "pbt":
        return PopulationBasedTraining(
            time_attr=ITERATION,
            perturbation_interval=max(1, iterations // PERTURBATIONS),
            hyperparam_mutations=lay({}, space),
        )
    return FIFOScheduler()


def search(
    config: MuZeroConfig,
    space: Mapping[str, Domain],
    num_trials: int,
    scheduler: str,
    iterations: int,
    name: str,
    folder: Path,
    seed: int,
    watcher: Callback,
) -> Best:
    """Runs the trials, as many at a time as the cluster has room for, and gives the one that stood best in the end.

    Ray must be initialised. Raises RunError if no trial came to an evaluation.
    """
    tuner = tune.Tuner(
        NAME,
        param_space=lay(config.to_dict(), space),
        tune_config=tune.TuneConfig(
            num_samples=num_trials,
            reuse_actors=True,
            scheduler=make_scheduler(scheduler, iterations, space),
            metric=METRIC,
            mode="max",
            search_alg=tune.search.BasicVariantGenerator(random_state=seed),
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(folder.resolve()),
            stop={ITERATION: iterations},
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2, checkpoint_at_end=True),
            verbose=0,
            callbacks=[watcher],
        ),
    )
    results = tuner.fit()
    return best_of(results, list(space))


def best_of(results: tune.ResultGrid, names: Sequence[str]) -> Best:
    """The trial whose last evaluation was best, and that can be gone on with."""
    ended = []
    for place in range(len(results)):
        score = score_of(results[place].metrics or {})
        if score is not None and results[place].checkpoint is not None:
            ended.append((score, place))
    if not ended:
        errors = "; ".join(sorted({first_line(error) for error in results.errors}))
        raise RunError(f"no trial came to an evaluation and a checkpoint{f': {errors}' if errors else ''}")
    score, place = max(ended)
    best = results[place]
    assert best.checkpoint is not None and best.metrics is not None and best.config is not None
    return Best(best.metrics["trial_id"], chosen_of(best.config, names), best.checkpoint, score)


def score_of(result: Mapping[str, Any]) -> float | None:
    """Of a trial's result: the mean return of its evaluation."""
    return result.get("evaluation", {}).get("env_runners", {}).get("episode_return_mean")


class Watcher(Callback):
    """Tells `show` how all trials stand, each time that one has something new."""

    def __init__(self, names: Sequence[str], show: Callable[[list[dict[str, Any]]], None]):
        self._names = list(names)
        self._show = show
        self._copies: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps its callbacks with the search; where it shows things stays here."""
        return {**self.__dict__, "_show": None}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        self._tell(trials)

    def on_trial_restore(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._copies[trial.trial_id] = self._copies.get(trial.trial_id, 0) + 1

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._tell(trials)

    on_trial_error = on_trial_complete

    def _tell(self, trials: list[Trial]) -> None:
        self.rows = [self._row(trial) for trial in trials]
        self._show(self.rows)

    def _row(self, trial: Trial) -> dict[str, Any]:
        last = trial.last_result or {}
        return {
            "trial": trial.trial_id,
            "state": trial.status.lower(),
            **chosen_of(trial.config, self._names),
            "iterations": last.get(ITERATION, 0),
            "env steps": last.get("num_env_steps_sampled_lifetime", 0),
            "learner steps": last.get("num_grad_updates_lifetime", 0),
            "restored": self._copies.get(trial.trial_id, 0),
            "evaluation": score_of(last),
        }
