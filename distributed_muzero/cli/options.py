"""The options that `train` and `submit` share, and how they become a config."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from distributed_muzero.config import (
    OFFLINE,
    TRUST_VARIABLE,
    Config,
    load_file,
    load_preset,
    make_config,
    parse_overrides,
    preset_names,
)
from distributed_muzero.errors import ConfigError

RUNS_DIR_VARIABLE = "DISTRIBUTED_MUZERO_RUNS_DIR"


def trust_code(trusted: bool) -> bool:
    """For this process and those that it starts; configs that are made from now on carry it along."""
    if trusted:
        os.environ[TRUST_VARIABLE] = "1"
    return trusted


class Resume(StrEnum):
    never = "never"
    auto = "auto"


class Policy(StrEnum):
    muzero = "muzero"
    gumbel = "gumbel"


Preset = Annotated[str | None, typer.Option(help="A shipped preset; `config presets` lists them.")]
Env = Annotated[
    str | None,
    typer.Option(
        help="An environment's id with the default config: one of `envs`, or package.module:factory."
    ),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A YAML file of config sections.")]
Name = Annotated[str | None, typer.Option(help="The run's name; made up when absent.")]
# No Path: it would make s3:/ of s3://.
RunsDir = Annotated[
    str,
    typer.Option(help="The folder of all runs: a path, or a URI (s3://…, gs://…).", envvar=RUNS_DIR_VARIABLE),
]
RUNS = "runs"
Seed = Annotated[int | None, typer.Option(help="run.seed")]
Actors = Annotated[int | None, typer.Option(help="actor.num_actors: actor processes.")]
Autoscale = Annotated[
    str | None, typer.Option(metavar="MIN:MAX", help="actor.autoscale: as many actors as keep all busy.")
]
EnvsPerActor = Annotated[int | None, typer.Option(help="actor.envs_per_actor: games in lockstep.")]
Shards = Annotated[int | None, typer.Option(help="replay.num_shards")]
MaxEnvSteps = Annotated[int | None, typer.Option(help="Stop after so many environment steps.")]
MaxTrainSteps = Annotated[int | None, typer.Option(help="Stop after so many learner steps.")]
MaxMinutes = Annotated[float | None, typer.Option(help="Stop after so many minutes, starting included.")]
StopAtReturn = Annotated[float | None, typer.Option(help="Stop when an evaluation reaches this mean.")]
MetricsPort = Annotated[
    int | None,
    typer.Option(help="metrics.port: where Prometheus finds the run's metrics; 0 for any port that is free."),
]
Set = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")]
ResumeOption = Annotated[
    Resume, typer.Option("--resume", help="auto: go on with the run if there is one of this name.")
]
TakeOver = Annotated[
    bool,
    typer.Option(
        "--take-over", help="Of a run at a URI: also if it seems to go on elsewhere, which ends there then."
    ),
]
TrustEnvCode = Annotated[
    bool,
    typer.Option(
        "--trust-env-code",
        callback=trust_code,
        help="Import and run environments that are given as package.module:factory. Runs don't remember it.",
    ),
]
Offline = Annotated[
    list[str] | None,
    typer.Option(
        help="Learn from stored episodes alone: an exported .parquet, a folder of them, a run, or what RLlib recorded."
    ),
]
SearchPolicy = Annotated[Policy | None, typer.Option(help="In place of the run's own search.policy.")]


class Choices(NamedTuple):
    """What a person chose for a run, option by option."""

    preset: str | None
    env: str | None
    config: Path | None
    name: str | None
    seed: int | None
    actors: int | None
    autoscale: str | None
    envs_per_actor: int | None
    shards: int | None
    max_env_steps: int | None
    max_train_steps: int | None
    max_minutes: float | None
    stop_at_return: float | None
    metrics_port: int | None
    set_: list[str] | None
    resume: Resume
    offline: list[str] | None

    def make_config(self) -> Config:
        """The whole config. Raises ConfigError for what doesn't fit together."""
        options: dict[str, dict[str, Any]] = {
            "run": {
                "seed": self.seed,
                "max_env_steps": self.max_env_steps,
                "max_train_steps": self.max_train_steps,
                "max_minutes": self.max_minutes,
                "stop_at_return": self.stop_at_return,
            },
            "actor": {
                "num_actors": self.actors,
                "envs_per_actor": self.envs_per_actor,
                "autoscale": self.autoscale and parse_range(self.autoscale),
            },
            "replay": {"num_shards": self.shards},
            "metrics": {"port": self.metrics_port},
        }
        layers = [
            _source(self.preset, self.env, self.config),
            given_only(options),
            parse_overrides(self.set_ or []),
        ]
        if self.offline:
            layers[1:1] = [OFFLINE]
        if self.resume is Resume.auto and self.name is None:
            raise ConfigError("--resume auto goes on with the run of a name: give it with --name")
        chosen = make_config(*layers)
        if self.offline and not chosen.is_offline:
            raise ConfigError(
                f"--offline learns from stored episodes alone: leave out --actors {self.actors}"
            )
        if chosen.is_offline and not self.offline:
            raise ConfigError("actor.num_actors is 0: say with --offline DATASET what to learn from")
        return chosen


def given_only(options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in options.items()
    }


def parse_range(text: str) -> tuple[int, int]:
    """`2:8` as two numbers. Raises ConfigError."""
    fewest, colon, most = text.partition(":")
    if not (colon and fewest.isdecimal() and most.isdecimal() and 1 <= int(fewest) <= int(most)):
        raise ConfigError(
            f"--autoscale {text!r}: expected MIN:MAX, such as 2:8, with 1 or more and MIN not above MAX"
        )
    return int(fewest), int(most)


def _source(preset: str | None, env: str | None, file: Path | None) -> dict[str, Any]:
    if sum(source is not None for source in (preset, env, file)) != 1:
        raise ConfigError(
            f"name what to train by exactly one of --preset ({', '.join(preset_names())}), --env ID or --config FILE"
        )
    if preset is not None:
        return load_preset(preset)
    return load_file(file) if file is not None else {"environment": {"id": env}}
