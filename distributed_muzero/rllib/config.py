"""MuZeroConfig: a run's config under the names, and in the manner, of RLlib's AlgorithmConfig."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml
from ray import tune
from ray.tune.search.sample import Domain
from ray.tune.tune import _Config

from distributed_muzero.config import OFFLINE, Config, load_preset, make_config
from distributed_muzero.errors import ConfigError
from distributed_muzero.rllib.registered import registered_names
from distributed_muzero.rllib.settings import METHODS, SECTIONS, SETTINGS, Given, absolute, layers, read_given

if TYPE_CHECKING:
    from typing import Self

    from distributed_muzero.rllib.algorithm import DistributedMuZero


class Plan(NamedTuple):
    """What a MuZeroConfig asks for."""

    config: Config
    given: Given  # what is the face's own

    @property
    def in_process(self) -> bool:
        """Whether one process plays and learns: there are no env runners."""
        return self.given.num_env_runners == 0


class MuZeroConfig(_Config):
    """Settings for MuZero, by the methods of RLlib's AlgorithmConfig: each takes keywords and returns the config.

    Values may be search spaces of Tune until `validate`, `build_algo` or a trial reads them. Which name stands for
    which key of a run's config: docs/rllib.md. Raises ConfigError for an unknown name at once, for an impossible value
    when it is read.
    """

    _settings: dict[str, Any]

    def __init__(self, preset: str | None = None):
        """preset: of `distributed-muzero train --preset`, as the ground that settings are laid on; without its limits.

        Raises ConfigError for an unknown one.
        """
        if preset is not None:
            load_preset(preset)
        object.__setattr__(self, "_settings", {} if preset is None else {"preset": preset})

    def environment(self, env: Any = None, **settings: Any) -> Self:
        """env: an id of this project's (`CartPole-v1`, `openspiel:connect_four`), a name given to `tune.register_env`,
        or a class made with env_config, which is registered under its own name."""
        if isinstance(env, type):
            creator, env = env, f"{env.__module__}.{env.__qualname__}"
            tune.register_env(env, creator)
        if env is not None and not isinstance(env, (str, Domain)):
            raise ConfigError(f"env {env!r}: expected an id, a class, or a name given to tune.register_env")
        return self._set("environment", settings if env is None else {"env": env, **settings})

    def env_runners(self, **settings: Any) -> Self:
        """num_env_runners: actors, each with a CPU; 0 = one process plays and learns."""
        return self._set("env_runners", settings)

    def training(self, **settings: Any) -> Self:
        """Search, replay and learner: RLlib's names, or whole sections (`search={"policy": "gumbel"}`)."""
        return self._set("training", settings)

    def learners(self, **settings: Any) -> Self:
        """num_learners: devices that share a batch; 0 and 1 are the same."""
        return self._set("learners", settings)

    def evaluation(self, **settings: Any) -> Self:
        """evaluation_interval: in calls of `train()`; None = evaluate() alone evaluates."""
        return self._set("evaluation", settings)

    def offline_data(self, **settings: Any) -> Self:
        """input_: datasets, or runs, to learn from; nobody plays then."""
        return self._set("offline_data", settings)

    def reporting(self, **settings: Any) -> Self:
        """How long an iteration is: until both minima are reached."""
        return self._set("reporting", settings)

    def debugging(self, **settings: Any) -> Self:
        """seed"""
        return self._set("debugging", settings)

    def framework(self, framework: str = "torch") -> Self:
        """torch is all there is."""
        if framework != "torch":
            raise ConfigError(f"framework {framework!r}: expected 'torch'")
        return self

    def _set(self, method: str, settings: Mapping[str, Any]) -> Self:
        for name in settings:
            if name not in METHODS[method]:
                raise ConfigError(_unknown(name, method))
        return self.update_from_dict(settings)

    def update_from_dict(self, settings: Mapping[str, Any]) -> Self:
        """Takes settings of any method by their names. Raises ConfigError for an unknown one."""
        for name, value in settings.items():
            if name == "input_" and not isinstance(value, Domain):
                value = absolute(value)  # a trial of Tune may have another working directory
            if name != "preset" and name not in SETTINGS and name not in SECTIONS:
                raise ConfigError(_unknown(name))
            if name in SECTIONS and not isinstance(value, Mapping):
                raise ConfigError(
                    f"{name}={value!r}: expected a dictionary of its keys, such as {name}={{…}}"
                )
            before = self._settings.get(name)
            both = isinstance(before, Mapping) and isinstance(value, Mapping) and name in SECTIONS
            self._settings[name] = {**before, **value} if both else value  # type: ignore[dict-item]
        return self

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """What `to_dict` gave. Raises ConfigError."""
        return cls(settings.get("preset")).update_from_dict(settings)

    def to_dict(self) -> dict[str, Any]:
        """What was set, by name."""
        return copy.deepcopy(self._settings)

    def copy(self) -> Self:
        return type(self).from_dict(self.to_dict())

    def to_yaml(self) -> str:
        """Raises ConfigError while there are search spaces."""
        self._check_chosen()
        try:
            return yaml.safe_dump(_plain(self._settings), sort_keys=False)
        except yaml.YAMLError as error:
            raise ConfigError(f"the config can't be written as YAML: {error}") from None

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """What `to_yaml` gave. Raises ConfigError."""
        try:
            settings = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"this is no config in YAML: {error}") from None
        if not isinstance(settings, dict):
            raise ConfigError("this is no config in YAML: expected a mapping of names to values")
        return cls.from_dict(settings)

    def validate(self) -> None:
        """Raises ConfigError for values that can't be."""
        self.plan()

    def plan(self) -> Plan:
        """What is asked for. Raises ConfigError."""
        self._check_chosen()
        preset = load_preset(self._settings["preset"]) if "preset" in self._settings else {}
        settings = _plain(self._settings)
        if settings.get("env") in registered_names():
            settings["env"] = f"rllib:{settings['env']}"
        given = read_given(settings)
        ground = [preset, OFFLINE] if given.datasets else [preset]
        sections = layers(settings, given, make_config(*ground))
        try:
            config = make_config(*ground, sections)
        except ConfigError as error:
            raise ConfigError(_in_known_names(str(error))) from None
        if given.datasets and not config.is_offline:
            raise ConfigError(
                "input_ is learnt from alone, nobody plays: leave out actor.num_actors and autoscale"
            )
        return Plan(config, given)

    def _check_chosen(self) -> None:
        for path, value in _leaves(self._settings):
            if isinstance(value, Domain):
                raise ConfigError(f"{path} is a search space, {value}: tune.Tuner chooses a value for it")

    def build_algo(self) -> DistributedMuZero:
        """The algorithm, which hasn't started anything yet. Raises ConfigError, EnvironmentFailure."""
        from distributed_muzero.rllib.algorithm import DistributedMuZero

        self.validate()
        return DistributedMuZero(self)

    def __getattr__(self, name: str) -> Any:
        """What was set. Raises AttributeError for what wasn't, or can't be."""
        settings = self.__dict__.get("_settings", {})
        if name in settings:
            return settings[name]
        if name in SETTINGS:
            raise AttributeError(f"{name} wasn't set; plan().config holds what is used in its place")
        methods = [method for method in vars(MuZeroConfig) if not method.startswith("_")]
        close = difflib.get_close_matches(name, [*SETTINGS, *SECTIONS, *methods], n=1, cutoff=0.7)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise AttributeError(
            f"MuZeroConfig has no {name!r}{hint}: its methods are {', '.join(methods)}; "
            "docs/rllib.md says what stands for others of RLlib's"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        self.update_from_dict({name: value})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MuZeroConfig) and self._settings == other._settings

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"MuZeroConfig({self._settings})"


def _unknown(name: str, method: str | None = None) -> str:
    known = METHODS[method] if method else [*SETTINGS, *SECTIONS, *METHODS]
    home = next((other for other, names in METHODS.items() if name in names), None)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if home is not None:
        hint = f" (it belongs to .{home}())"
    else:
        hint = f" (did you mean {close[0]!r}?)" if close else ""
    where = f".{method}() has no {name!r}" if method else f"MuZeroConfig has no {name!r}"
    return f"{where}{hint}. Known here: {', '.join(known)}; docs/rllib.md says what stands for what"


def _in_known_names(message: str) -> str:
    """An error of the run's config, with the names under which the values came."""
    for name, setting in SETTINGS.items():
        if setting.key is not None:
            message = message.replace(f"{setting.key}:", f"{name} ({setting.key}):")
    return message


def _leaves(values: Mapping[str, Any], path: str = "") -> Any:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _plain(value: Any) -> Any:
    """With lists in place of tuples, which YAML would tag, and plain numbers in place of numpy's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
