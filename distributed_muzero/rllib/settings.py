"""RLlib's names for a run's settings, and what stands behind each of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distributed_muzero.config import Config
from distributed_muzero.errors import ConfigError
from distributed_muzero.mirror.uri import is_uri


class Setting(NamedTuple):
    """A name that RLlib's users know."""

    method: str  # of MuZeroConfig
    key: str | None  # section.key of a run's config; None: it is read below
    meaning: str


SETTINGS = {
    "env": Setting(
        "environment", "environment.id", "an id of `distributed-muzero envs`, or a registered name"
    ),
    "env_config": Setting("environment", "environment.kwargs", "what the environment is made with"),
    "max_episode_steps": Setting(
        "environment", "environment.max_episode_steps", "a longer game is truncated"
    ),
    "history_length": Setting("environment", "environment.history_length", "observations stacked"),
    "num_env_runners": Setting("env_runners", None, "actors; 0 = one process plays and learns"),
    "num_envs_per_env_runner": Setting("env_runners", "actor.envs_per_actor", "games in one batched search"),
    "sample_timeout_s": Setting("env_runners", "actor.timeout_seconds", "a silent actor is replaced"),
    "autoscale": Setting("env_runners", "actor.autoscale", "fewest and most actors, chosen by the run"),
    "lr": Setting(
        "training", None, "learner.learning_rate; final_learning_rate stays the same fraction of it"
    ),
    "gamma": Setting("training", "algorithm.discount", "discount"),
    "train_batch_size_per_learner": Setting(
        "training", None, "learner.batch_size is this times the number of learners"
    ),
    "grad_clip": Setting("training", "learner.max_grad_norm", "by the global norm"),
    "n_step": Setting("training", "algorithm.td_steps", "rewards before the bootstrap"),
    "num_unroll_steps": Setting("training", "algorithm.num_unroll_steps", "steps that the model is unrolled"),
    "num_simulations": Setting("training", "search.num_simulations", "of each search"),
    "samples_per_insert": Setting(
        "training", "replay.samples_per_insert", "RLlib's training_intensity, held by a limiter"
    ),
    "num_steps_sampled_before_learning_starts": Setting(
        "training", "replay.min_size_to_sample", "stored steps"
    ),
    "replay_buffer_config": Setting("training", None, "capacity, alpha and beta of the replay"),
    "store_buffer_in_checkpoints": Setting("training", None, "True: what was played is saved as well"),
    "num_learners": Setting("learners", None, "learner.num_devices; 0 and 1 are the same"),
    "num_gpus_per_learner": Setting("learners", None, "1: learner.device is cuda; 0, the default: cpu"),
    "num_cpus_per_learner": Setting("learners", "learner.num_threads", "threads of the learner"),
    "evaluation_interval": Setting("evaluation", None, "calls of train() from one evaluation to the next"),
    "evaluation_duration": Setting("evaluation", "evaluator.num_episodes", "episodes of an evaluation"),
    "evaluation_duration_unit": Setting("evaluation", None, "episodes"),
    "evaluation_num_simulations": Setting("evaluation", "evaluator.num_simulations", "of each search there"),
    "evaluation_opponent": Setting(
        "evaluation", "evaluator.opponent", "in games of two: random, mcts:SIMS, …"
    ),
    "input_": Setting("offline_data", None, "datasets or runs to learn from; nobody plays then"),
    "min_time_s_per_iteration": Setting("reporting", None, "seconds of one train(), 5 unless set"),
    "min_sample_timesteps_per_iteration": Setting(
        "reporting", None, "environment steps of one train(), 0 unless set"
    ),
    "seed": Setting("debugging", "run.seed", "of everything"),
}

# Of a run's config, which .training() takes as dictionaries: what RLlib has no name for.
SECTIONS = (
    "environment",
    "network",
    "algorithm",
    "search",
    "actor",
    "replay",
    "reanalyse",
    "curriculum",
    "learner",
    "evaluator",
)

METHODS: dict[str, list[str]] = {}
for _name, _setting in SETTINGS.items():
    METHODS.setdefault(_setting.method, []).append(_name)
METHODS["training"] += SECTIONS[1:]

REPLAY_NAMES = {
    "capacity": "max_transitions",
    "alpha": "priority_exponent",
    "beta": "importance_exponent",
}


class Given(NamedTuple):
    """What is the face's own, checked."""

    num_env_runners: int | None
    datasets: tuple[str, ...]
    store_buffer: bool
    evaluation_interval: int | None
    evaluates: bool  # by the run itself, on its way
    min_seconds: float
    min_env_steps: int


def layers(settings: Mapping[str, Any], given: Given, base: Config) -> dict[str, dict[str, Any]]:
    """The sections of a run's config that the settings ask for.

    given: of these settings.   base: what they are laid on. Raises ConfigError.
    """
    _check_said_once(settings)
    sections: dict[str, dict[str, Any]] = {name: dict(settings.get(name, {})) for name in SECTIONS}
    # How long it goes on is the caller's to say, or Tune's.
    nothing = dict.fromkeys(("max_env_steps", "max_train_steps", "max_minutes", "stop_at_return"))
    sections["run"] = nothing
    for name, setting in SETTINGS.items():
        if setting.key is not None and name in settings:
            section, _, key = setting.key.partition(".")
            sections.setdefault(section, {})[key] = settings[name]
    if given.num_env_runners:
        sections["actor"]["num_actors"] = given.num_env_runners
    elif given.num_env_runners == 0:
        sections["actor"]["num_actors"] = 1
    for name, value in dict(settings.get("replay_buffer_config", {})).items():
        if name not in REPLAY_NAMES:
            raise ConfigError(
                f"replay_buffer_config has no {name!r}. Known here: {', '.join(REPLAY_NAMES)}; everything else of the "
                "replay is set by .training(replay={…})"
            )
        sections["replay"][REPLAY_NAMES[name]] = value
    _lay_learner(settings, base, sections["learner"])
    return sections


BEHIND = {
    "num_env_runners": "actor.num_actors",
    "lr": "learner.learning_rate",
    "train_batch_size_per_learner": "learner.batch_size",
    "num_learners": "learner.num_devices",
    "num_gpus_per_learner": "learner.device",
    **{f"replay_buffer_config {name}": f"replay.{key}" for name, key in REPLAY_NAMES.items()},
}  # what stands behind names that are not one key's alone


def _check_said_once(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError where a name and the key behind it are both set: one of them would count for nothing."""
    keys = {name: setting.key for name, setting in SETTINGS.items() if setting.key is not None}
    for name, path in {**keys, **BEHIND}.items():
        section, _, key = path.partition(".")
        first, _, inner = name.partition(" ")
        is_named = inner in settings.get(first, {}) if inner else name in settings
        if is_named and key in settings.get(section, {}):
            raise ConfigError(f"{name} and {path} are both set, and are the same: leave one of them out")


def _lay_learner(settings: Mapping[str, Any], base: Config, learner: dict[str, Any]) -> None:
    if "lr" in settings:
        lr = _number("lr", settings["lr"], 0, more=True)
        share = base.learner.final_learning_rate / base.learner.learning_rate
        learner["learning_rate"] = lr
        learner.setdefault("final_learning_rate", lr * share)
    if "num_learners" in settings:
        learner["num_devices"] = max(_whole("num_learners", settings["num_learners"]), 1)
    if "train_batch_size_per_learner" in settings:
        rows = _whole("train_batch_size_per_learner", settings["train_batch_size_per_learner"], 1)
        learner["batch_size"] = rows * learner.get("num_devices", base.learner.num_devices)
    num_gpus = settings.get("num_gpus_per_learner", 0)
    if num_gpus not in (0, 1):
        raise ConfigError(f"num_gpus_per_learner={num_gpus!r}: expected 0 or 1")
    learner.setdefault("device", "cuda" if num_gpus else "cpu")


def read_given(settings: Mapping[str, Any]) -> Given:
    """What the settings ask of the face. Raises ConfigError."""
    unit = settings.get("evaluation_duration_unit", "episodes")
    if unit != "episodes":
        raise ConfigError(f"evaluation_duration_unit={unit!r}: expected 'episodes'")
    stored = settings.get("store_buffer_in_checkpoints", True)
    if not isinstance(stored, bool):
        raise ConfigError(f"store_buffer_in_checkpoints={stored!r}: expected True or False")
    if not isinstance(settings.get("replay_buffer_config", {}), Mapping):
        raise ConfigError(f"replay_buffer_config={settings['replay_buffer_config']!r}: expected a dictionary")
    num_runners, interval = settings.get("num_env_runners"), settings.get("evaluation_interval")
    given = Given(
        None if num_runners is None else _whole("num_env_runners", num_runners),
        tuple(absolute(settings.get("input_"))),
        stored,
        None if interval is None else _whole("evaluation_interval", interval, 1),
        "interval_seconds" in settings.get("evaluator", {}),
        _number("min_time_s_per_iteration", settings.get("min_time_s_per_iteration", 5.0), 0),
        _whole("min_sample_timesteps_per_iteration", settings.get("min_sample_timesteps_per_iteration", 0)),
    )
    if given.datasets and (given.num_env_runners or given.min_env_steps):
        raise ConfigError(
            "input_ is learnt from alone, nobody plays: leave out num_env_runners and "
            "min_sample_timesteps_per_iteration"
        )
    return given


def absolute(paths: Any) -> list[str]:
    """Of one path or URI, several, or None. Raises ConfigError for anything else."""
    listed = [paths] if isinstance(paths, (str, Path)) else [] if paths is None else paths
    if not isinstance(listed, (list, tuple)) or not all(isinstance(path, (str, Path)) for path in listed):
        raise ConfigError(f"input_={paths!r}: expected a path or a URI, or a list of them")
    return [str(path) if is_uri(str(path)) else str(Path(path).expanduser().resolve()) for path in listed]


def _whole(name: str, value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: expected a whole number, at least {least}")
    return value


def _number(name: str, value: Any, least: float, more: bool = False) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or value < least or (more and value == least):
        what = "above" if more else "at least"
        raise ConfigError(f"{name}={value!r}: expected a number {what} {least:g}")
    return float(value)
