"""A curriculum: environments of one spec in rising order, of which the next comes when enough games are won."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero.config import Config, EnvironmentConfig
from distributed_muzero.environments.base import Environment, EnvironmentSpec
from distributed_muzero.environments.registry import make_environment
from distributed_muzero.errors import ConfigError, EnvironmentFailure


class Change(NamedTuple):
    """The present stage is another one from now on."""

    stage: int
    before: int
    won: float  # share of the games that decided it
    num_games: int


class Curriculum:
    """Which stage is the present one, by the games of it that were won. Stages count from 0 here, from 1 for people."""

    def __init__(self, config: Config):
        self.config = config.curriculum
        self.stage = 0
        self._environments = config.stages
        self._results: deque[bool] = deque(maxlen=self.config.window)  # of the present stage, the newest last

    @property
    def num_stages(self) -> int:
        return len(self._environments)

    @property
    def win_rate(self) -> float | None:
        """Share of won games among those of the present stage that count; None before the first."""
        return sum(self._results) / len(self._results) if self._results else None

    def record(self, stage: int, won: bool) -> Change | None:
        """Counts a game that was begun in `stage`; returns what follows from it.

        Games of another stage than the present one say nothing of it. Each stage begins with an empty window.
        """
        if stage != self.stage:
            return None
        self._results.append(won)
        share = sum(self._results) / len(self._results)
        if len(self._results) < self.config.window:
            return None
        if share >= self.config.promote_at:
            self.stage = min(stage + 1, self.num_stages - 1)
        elif share < self.config.demote_at:
            self.stage = max(stage - 1, 0)
        if self.stage == stage:
            return None
        self._results.clear()
        return Change(self.stage, stage, share, self.config.window)

    def name(self, stage: int) -> str:
        return name_of(self._environments[stage])

    def metrics(self) -> dict[str, float]:
        """Before a stage's first result its share is NaN: what isn't told stays as it was, the last stage's."""
        return {
            "curriculum/stage": self.stage + 1.0,
            "curriculum/stages": float(self.num_stages),
            "curriculum/win_rate": math.nan if self.win_rate is None else self.win_rate,
        }

    def state(self) -> dict[str, Any]:
        """What a later launch goes on with; fits JSON."""
        environment = self._environments[self.stage]
        return {
            "stage": self.stage + 1,
            "num_stages": self.num_stages,
            "environment": environment.id,
            "kwargs": environment.kwargs,
            "win_rate": self.win_rate,
            "results": "".join("1" if won else "0" for won in self._results),  # the newest last
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state()` gave. Where the stages are others by now, the stage's number counts.

        Results stay if the stage's environment is the same.
        """
        self.stage = min(max(int(state["stage"]), 1), self.num_stages) - 1
        environment = self._environments[self.stage]
        if (state["environment"], state["kwargs"]) == (environment.id, environment.kwargs):
            self._results.extend(result == "1" for result in state["results"])


def draw_stage(present: int, share_of_earlier: float, rng: np.random.Generator) -> int:
    """The stage of a game that begins: the present one, or with that share any of the earlier ones, all alike."""
    if present > 0 and rng.random() < share_of_earlier:
        return int(rng.integers(present))
    return present


@dataclass
class Begun:
    """A game that was begun."""

    stage: int
    won: bool | None = None  # None while it goes on


class ResultsInOrder:
    """Results of one actor's games in the order in which these began, `group` at a time.

    In the order in which they end, quick games would come first after each change of stage. Where a won game is
    shorter than a lost one, a window full of them would say that all are won. Holds at most as many results as games
    end during the longest one, and a group.
    """

    def __init__(self, group: int):
        self._group = group
        self._begun: deque[Begun] = deque()

    def begin(self, stage: int) -> Begun:
        """Of the game, to note in it who won."""
        self._begun.append(game := Begun(stage))
        return game

    def take(self) -> list[tuple[int, bool]]:
        """(stage, won) of the oldest games, if a group of them is over."""
        taken: list[tuple[int, bool]] = []
        while len(self._begun) >= self._group and all(
            self._begun[number].won is not None for number in range(self._group)
        ):
            games = [self._begun.popleft() for _ in range(self._group)]
            taken += [(game.stage, bool(game.won)) for game in games]
        return taken


def is_won(env: Environment, episode_return: float, won_at_return: float | None) -> bool:
    """Of a game that is over, as the environment says, or by its return where a limit is given."""
    return bool(getattr(env, "won", False)) if won_at_return is None else episode_return >= won_at_return


def make_stage(config: Config, stage: int, spec: EnvironmentSpec) -> Environment:
    """The environment of a stage of the curriculum. Raises ConfigError and EnvironmentFailure, which name the stage.

    spec: of `config.environment`, which the run's networks are made for.
    """
    section = config.stages[stage]
    if not config.curriculum.stages:
        return make_environment(section)
    where = f"stage {stage + 1} of curriculum.stages"
    own = config.curriculum.stages[stage].kwargs
    if inherited := ", ".join(name for name in section.kwargs if name not in own):
        where += f" ({inherited} from environment.kwargs)"
    try:
        env = make_environment(section)
    except EnvironmentFailure as error:
        raise type(error)(f"{where}: {error}") from error
    if problem := why_no_stage(section, env, config, spec):
        env.close()
        raise ConfigError(f"{where}: {problem}")
    return env


def why_no_stage(
    section: EnvironmentConfig, env: Environment, config: Config, spec: EnvironmentSpec
) -> str | None:
    """What is wrong with the environment of a stage, and what to do; None if nothing is.

    spec: of `config.environment`.
    """
    name, base = name_of(section), name_of(config.environment)
    if spec.num_players != 1:
        return (
            f"{base} (environment) is a game for {spec.num_players}, and a curriculum is for one player: who "
            "plays against himself wins as much as he loses; leave curriculum.stages empty"
        )
    if env.spec._replace(id=spec.id) != spec:
        return (
            f"{name} shows {facts_of(env.spec, spec)}; {base} (environment) shows {facts_of(spec, env.spec)}: "
            "expected the same, as one network plays all of them; choose ids and kwargs that agree"
        )
    # A property of the class isn't asked: before its first game an environment need not answer.
    says_who_won = hasattr(type(env), "won") or hasattr(env, "won")
    if config.curriculum.won_at_return is None and not says_who_won:
        return (
            f"{name} doesn't say whether a game is won; set curriculum.won_at_return to the return from which on it "
            "is, or give the environment a property `won`"
        )
    return None


def name_of(environment: EnvironmentConfig) -> str:
    """For messages."""
    return f"{environment.id} {environment.kwargs}" if environment.kwargs else environment.id


def facts_of(spec: EnvironmentSpec, other: EnvironmentSpec) -> str:
    """What networks are made for, for messages; token columns only where the `other` has other ones."""
    names = [
        f"{column.name} ({column.size})" if column.size else column.name for column in spec.token_columns
    ]
    tokens = f" of {', '.join(names)}" if names and spec.token_columns != other.token_columns else ""
    return (
        f"observations {spec.observation_shape} {np.dtype(spec.observation_dtype)}{tokens}, actions "
        f"{spec.action_shape}, {spec.num_players} player{'s' if spec.num_players > 1 else ''}"
    )
