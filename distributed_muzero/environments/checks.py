"""Does an environment keep what `Environment` promises? Random games, and a row for each promise.

Nothing here trusts the environment: whatever it returns or raises ends up in a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from distributed_muzero.environments.base import Environment
from distributed_muzero.environments.checks_of_games import KINDS, OF_GAMES, Broken, Unseen, check_length
from distributed_muzero.environments.checks_of_instances import OF_INSTANCES, Make, check_close, close
from distributed_muzero.environments.checks_of_tokens import check_token_columns, check_tokens
from distributed_muzero.environments.random_games import RandomGame, play
from distributed_muzero.errors import first_line

SECONDS_OF_A_REPLAY = 2.0
MAX_REPLAYED_STEPS = 200
MAX_BYTES = 512 * 1024**2
MAX_ITEM_BYTES = 8


class Check(NamedTuple):
    """One row. passed: None where nothing came up that could be checked."""

    name: str
    passed: bool | None
    detail: str


class Report(NamedTuple):
    """What `check_environment` found; `num_games` and `num_steps` were played at random."""

    checks: list[Check]
    num_games: int
    num_steps: int

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)


def check_environment(
    make: Make,
    *,
    max_episode_steps: int,
    num_games: int = 20,
    seed: int = 1,
    seconds: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Report:
    """Plays up to `num_games` random games in up to `seconds` and about MAX_BYTES, and a few more for what takes two
    of them.

    make: makes the environment, a new one each time; what it raises goes through. A game that is still going on
    after `max_episode_steps` breaks its promise.
    """
    environment = make()
    games: list[RandomGame] = []
    try:
        spec = _row("spec", partial(check_spec, environment))
        if spec.passed:
            games = _play(environment, num_games, seed, max_episode_steps, clock, clock() + seconds)
    finally:
        when = "after the random games" if games else "before the first game"
        closed = _row("close", partial(close, environment, when))
    if not spec.passed:
        return Report([spec, closed], 0, 0)
    checks = [spec, *(_row(name, partial(check, games)) for name, check in OF_GAMES.items())]
    if environment.spec.token_columns:
        checks.append(_row("tokens", partial(check_tokens, games)))
    checks.append(_row("length", partial(check_length, games, max_episode_steps)))
    num_steps = sum(len(game.actions) for game in games)
    per_step = sum(game.seconds for game in games) / max(num_steps, 1)
    steps = int(min(MAX_REPLAYED_STEPS, max_episode_steps, max(5, SECONDS_OF_A_REPLAY / max(per_step, 1e-6))))
    checks += [_row(name, partial(check, make, seed, steps)) for name, check in OF_INSTANCES.items()]
    checks.append(_row("close", partial(check_close, make, seed)) if closed.passed else closed)
    if num_steps:
        checks.append(Check("speed", True, f"{per_step * 1e6:,.0f} µs for a step and its mask"))
    return Report(checks, len(games), num_steps)


def _play(
    environment: Environment,
    num_games: int,
    seed: int,
    max_steps: int,
    clock: Callable[[], float],
    deadline: float,
) -> list[RandomGame]:
    """At least one game; none after one that raised."""
    games = [play(environment, seed, max_steps, clock, deadline, MAX_BYTES)]
    left = MAX_BYTES - games[0].num_bytes
    while len(games) < num_games and clock() < deadline and left > 0 and not games[-1].error:
        games.append(play(environment, seed + len(games), max_steps, clock, deadline, left))
        left -= games[-1].num_bytes
    return games


def _row(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except Unseen as unseen:
        return Check(name, None, str(unseen))
    except Broken as broken:
        return Check(name, False, str(broken))
    except Exception as error:
        return Check(name, False, f"raised {type(error).__name__}: {first_line(error)}")


def check_spec(environment: Environment) -> str:
    spec = environment.spec
    for name in ("observation_shape", "action_shape"):
        shape = getattr(spec, name)
        is_shape = isinstance(shape, tuple) and all(isinstance(size, int) and size > 0 for size in shape)
        if not is_shape or (name == "action_shape" and not shape):
            raise Broken(f"{name} is {shape!r}; expected a tuple of sizes from 1 on")
    dtype = spec.observation_dtype
    if not isinstance(dtype, np.dtype) or dtype.kind not in KINDS:
        raise Broken(
            f"observation_dtype is {dtype!r}; expected a numpy dtype of numbers, as np.dtype(np.float32)"
        )
    if dtype.itemsize > MAX_ITEM_BYTES or not dtype.isnative:
        raise Broken(
            f"observation_dtype is {dtype!r}, which networks can't take; expected numbers of up to "
            f"{MAX_ITEM_BYTES} bytes in this machine's byte order, as np.dtype(np.float32)"
        )
    if spec.num_players not in (1, 2):
        raise Broken(f"num_players is {spec.num_players!r}; expected 1 or 2")
    players = "one player" if spec.num_players == 1 else "two players"
    tokens = f", {check_token_columns(spec)}" if spec.token_columns else ""
    return f"observations {spec.observation_shape} {dtype}, {spec.num_actions} actions, {players}{tokens}"
