"""A run's networks in another environment than the one they were trained in (`evaluate --env`, `solve`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distributed_muzero.cli.envs import parse_kwargs
from distributed_muzero.config import make_config
from distributed_muzero.errors import ConfigError, EnvironmentFailure

if TYPE_CHECKING:
    from distributed_muzero.environments.base import EnvironmentSpec
    from distributed_muzero.run_folder import RunFolder
    from distributed_muzero.workers.builder import Builder


def in_environment(folder: RunFolder, id: str, kwargs: Mapping[str, Any]) -> RunFolder:
    """The same run, playing in another environment, with these kwargs and no others; all else as its config says.

    Raises ConfigError for kwargs that none can have, UnknownEnvironmentError, and EnvironmentFailure for kwargs that
    the environment refuses or for an environment that the run's networks can't play in.
    """
    from distributed_muzero.workers.builder import Builder

    section = {**folder.config.environment.model_dump(), "id": id, "kwargs": dict(kwargs)}
    environment = make_config({"environment": section}).environment
    there = replace(folder, config=folder.config.model_copy(update={"environment": environment}))
    check_fits(Builder(folder.config, folder.name), Builder(there.config, folder.name))
    return there


def read_kwargs(env: str | None, env_kwargs: str | None) -> dict[str, Any]:
    """What --env and --env-kwargs say. Raises ConfigError."""
    if env is None and env_kwargs is not None:
        raise ConfigError(f"--env-kwargs {env_kwargs} are for the environment that --env ID names; name it")
    return parse_kwargs(env_kwargs or "{}")


def check_fits(own: Builder, other: Builder) -> None:
    """Raises EnvironmentFailure unless networks for the environment of `own` can play in that of `other`.

    Observations and actions must be shaped alike; of sequences of tokens only the length may differ, and that only if
    the weights don't depend on it.
    """
    from distributed_muzero.workers.curriculum import facts_of

    if own.spec._replace(id="") == other.spec._replace(id=""):
        return
    if _without_length(own.spec) == _without_length(other.spec) and _shapes(own) == _shapes(other):
        return
    raise EnvironmentFailure(
        f"{other.config.environment.id} shows {facts_of(other.spec, own.spec)}; the networks of run {own.run_name} "
        f"({own.config.network.name}) were trained on {own.config.environment.id}, with "
        f"{facts_of(own.spec, other.spec)}: expected an environment that is shaped like it"
    )


def _without_length(spec: EnvironmentSpec) -> EnvironmentSpec:
    """Of sequences [L, C] with actions [L, R], all but L."""
    if not spec.token_columns:
        return spec._replace(id="")
    return spec._replace(
        id="", observation_shape=spec.observation_shape[1:], action_shape=spec.action_shape[1:]
    )


def _shapes(builder: Builder) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in builder.networks().state_dict().items()}
