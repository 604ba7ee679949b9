"""A search over settings with Tune: the space that a person writes, the schedulers, what is seen meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search.sample import Categorical, Domain, Float, Integer

from distributed_muzero.config import with_numbers
from distributed_muzero.errors import ConfigError, RunError
from distributed_muzero.rllib.algorithm import NAME
from distributed_muzero.rllib.config import MuZeroConfig
from distributed_muzero.rllib.settings import SECTIONS, SETTINGS
from distributed_muzero.run_folder import FIXED

METRIC = "evaluation/env_runners/episode_return_mean"
ITERATION = "training_iteration"
PERTURBATIONS = 6  # of a trial under PBT, at most
SAVES = 3  # of another trial, so that not all is lost where a search is broken off
DIGITS = 12  # of a quantised number, without what rounding leaves behind them
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
    if isinstance(arguments, dict):
        raise ConfigError(f"{path}: {name}: {line!r}: what lies in a section is written {name}.{kind}: …")
    if not isinstance(arguments, list) or not arguments:
        raise ConfigError(f"{path}: {name}: {kind}: {arguments!r}: expected a list, such as [1.0e-4, 1.0e-2]")
    if kind == "choice":
        return tune.choice(with_numbers(arguments))
    if kind not in KINDS:
        raise ConfigError(f"{path}: {name}: no kind {kind!r}; expected one of {kinds}")
    try:
        numbers = [float(number) for number in arguments]
        if len(numbers) != 2 + (kind == "quniform"):
            number = "two numbers" if kind != "quniform" else "two numbers and a step"
            raise ConfigError(f"{path}: {name}: {kind} {arguments}: expected {number}")
        if kind.startswith("log") and numbers[0] <= 0:
            raise ConfigError(f"{path}: {name}: {kind} {arguments}: expected numbers above 0")
        is_whole = kind in ("randint", "lograndint")
        if numbers[0] >= numbers[1]:
            raise ConfigError(f"{path}: {name}: {kind} {arguments}: expected the lower end first")
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


def check_space(config: MuZeroConfig, space: Mapping[str, Domain], scheduler: str) -> None:
    """That the ends of each domain, what lies between, and all that can be chosen, can be. Raises ConfigError."""
    for name in space:
        if "." not in name and name not in SETTINGS:
            MuZeroConfig().update_from_dict(
                {name: {} if name in SECTIONS else 0}
            )  # raises, with what is near
        section, _, key = (SETTINGS[name].key or "" if name in SETTINGS else name).partition(".")
        if name == "preset" or section == "environment":
            raise ConfigError(f"{name} can't be searched over: all trials play the same")
        if scheduler == "pbt" and section in FIXED and key in (FIXED[section] or [key]):
            raise ConfigError(
                f"{name} can't change while a run goes on, as pbt asks for: search with asha, or none"
            )
    examples = {name: examples_of(domain) for name, domain in space.items()}
    first = {name: values[0] for name, values in examples.items()}
    for name, values in examples.items():
        for value in values:
            MuZeroConfig.from_dict(lay(config.to_dict(), {**first, name: value})).validate()


def ends_of(domain: Domain) -> list[Any]:
    """What can be chosen, or of a range the first and the last."""
    if isinstance(domain, Categorical):
        return list(domain.categories)
    assert isinstance(domain, (Float, Integer))
    return [domain.lower, domain.upper - isinstance(domain, Integer)]  # the end of whole numbers is left out


def examples_of(domain: Domain) -> list[Any]:
    """The ends, and of fractions one between them."""
    ends = ends_of(domain)
    is_smooth = isinstance(domain, Float) and step_of(domain) is None
    return [*ends, ends[0] + (ends[1] - ends[0]) / math.pi] if is_smooth else ends


def step_of(domain: Domain) -> float | None:
    """Between the numbers of a quantised range."""
    return getattr(domain.get_sampler(), "q", None)


def make_scheduler(name: str, iterations: int, space: Mapping[str, Domain]) -> TrialScheduler:
    """asha stops trials that fall behind, pbt lets them go on from a better one's checkpoint with other settings."""
    if name == "asha":
        grace = max(1, math.ceil(iterations / REDUCTION**2))
        return ASHAScheduler(
            time_attr=ITERATION, max_t=iterations, grace_period=grace, reduction_factor=REDUCTION
        )

    def within(settings: dict[str, Any]) -> dict[str, Any]:
        """What PBT has multiplied, kept in the space."""
        chosen = chosen_of(settings, list(space))
        for key, domain in space.items():
            if not isinstance(domain, Categorical):
                low, high = ends_of(domain)
                step = step_of(domain)
                value = chosen[key] if step is None else round(round(chosen[key] / step) * step, DIGITS)
                chosen[key] = min(max(value, low), high)
        return lay(settings, chosen)

    def mutations() -> dict[str, Any]:
        """Lists for what is chosen from: Tune goes to a neighbour in them, and would multiply in a domain."""
        return {
            key: list(domain.categories) if isinstance(domain, Categorical) else domain
            for key, domain in space.items()
        }

    if name == "pbt":
        return PopulationBasedTraining(
            time_attr=ITERATION,
            perturbation_interval=max(1, iterations // PERTURBATIONS),
            hyperparam_mutations=lay({}, mutations()),
            custom_explore_fn=within,
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
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=2,
                checkpoint_frequency=0
                if scheduler == "pbt"
                else max(1, iterations // SAVES),  # pbt saves by itself
                checkpoint_at_end=True,
            ),
            verbose=0,
            callbacks=[watcher],
        ),
    )
    results = tuner.fit()
    return best_of(results, list(space))


def best_of(results: tune.ResultGrid, names: Sequence[str]) -> Best:
    """The saved state of a trial whose evaluation then was the best."""
    saved = []
    for place in range(len(results)):
        if results[place].error is None:
            for number, (_, metrics) in enumerate(results[place].best_checkpoints or []):
                if (score := score_of(metrics)) is not None:
                    saved.append((score, place, number))
    if not saved:
        # Ray tells the trial's own error last.
        errors = "; ".join(sorted({str(error).strip().splitlines()[-1] for error in results.errors}))
        raise RunError(
            f"no trial was evaluated and saved before the search ended{f': {errors}' if errors else ''}"
        )
    score, place, number = max(saved)
    checkpoint, metrics = (results[place].best_checkpoints or [])[number]
    return Best(metrics["trial_id"], chosen_of(metrics["config"], names), checkpoint, score)


def score_of(result: Mapping[str, Any]) -> float | None:
    """Of a trial's result: the mean return of its evaluation."""
    return result.get("evaluation", {}).get("env_runners", {}).get("episode_return_mean")


class Watcher(Callback):
    """Tells `show` how all trials stand, each time that one has something new."""

    def __init__(self, names: Sequence[str], show: Callable[[list[dict[str, Any]]], None]):
        self._names = list(names)
        self._show = show
        self._last: dict[str, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps its callbacks with the search; where it shows things stays here."""
        return {**self.__dict__, "_show": None}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        self._last[trial.trial_id] = result
        self._tell(trials)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._tell(trials, {trial.trial_id: "terminated"})

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._tell(trials, {trial.trial_id: "error"})

    def _tell(self, trials: list[Trial], ended: Mapping[str, str] = MappingProxyType({})) -> None:
        """ended: what is known of a trial before Tune says so."""
        self.rows = [self._row(trial, ended.get(trial.trial_id, trial.status.lower())) for trial in trials]
        self._show(self.rows)

    def _row(self, trial: Trial, state: str) -> dict[str, Any]:
        last = self._last.get(trial.trial_id, {})
        return {
            "trial": trial.trial_id,
            "state": state,
            **chosen_of(trial.config, self._names),
            "iterations": last.get(ITERATION, 0),
            "env steps": last.get("num_env_steps_sampled_lifetime", 0),
            "learner steps": last.get("num_grad_updates_lifetime", 0),
            "evaluation": score_of(last),
        }
