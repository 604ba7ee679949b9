"""Games of random legal actions, written down without trusting what the environment returns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distributed_muzero.environments.base import Environment, EnvironmentSpec
from distributed_muzero.errors import first_line

# Games are kept whole to be looked at later: time alone wouldn't keep large observations from filling the memory.
MAX_BYTES_OF_A_GAME = 128 * 1024**2
# What a step takes besides its arrays' contents: their headers, numbers, places in lists (550 were measured).
BYTES_OF_A_STEP = 600


@dataclass
class RandomGame:
    """What came of one game: entry t of each list belongs to step t; observations and players have one more.

    observations: as they were given out; copies: as they were then. error: what was raised, and where; after that,
    or where no action was legal, nothing more was played. short_of: what there was too little of, if it didn't end.
    """

    spec: EnvironmentSpec
    seed: int
    observations: list[Any] = field(default_factory=list)
    copies: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    players: list[Any] = field(default_factory=list)
    actions: list[int] = field(default_factory=list)
    rewards: list[Any] = field(default_factory=list)
    terminals: list[Any] = field(default_factory=list)
    truncated: Any = None
    is_over: bool = False
    error: str | None = None
    seconds: float = 0.0
    num_bytes: int = 0
    short_of: str = "time"

    def at(self, step: int) -> str:
        return f"step {step}, seed {self.seed}"

    def difference(self, other: RandomGame) -> str | None:
        """In words, where two games part; None if they don't."""
        if self.error or other.error:
            return self.error or other.error
        for name in ("copies", "masks", "players", "rewards", "terminals"):
            for step, pair in enumerate(zip(getattr(self, name), getattr(other, name), strict=False)):
                if not same(*pair):
                    word = {"copies": "observation", "terminals": "end"}.get(name, name.removesuffix("s"))
                    return f"the {word} of step {step} differs"
        return None if len(self.actions) == len(other.actions) else "one is longer"


def play(
    environment: Environment,
    seed: int,
    max_steps: int,
    clock: Callable[[], float] = time.perf_counter,
    deadline: float = float("inf"),
    max_bytes: int = MAX_BYTES_OF_A_GAME,
) -> RandomGame:
    """Plays one game to its end, to `max_steps`, until the clock passes `deadline`, or what is kept of it reaches
    `max_bytes`."""
    game = RandomGame(environment.spec, seed)
    rng = np.random.default_rng(seed)
    doing = f"initial_state({seed})"
    try:
        _see(game, environment.initial_state(seed))
        began = clock()
        while not game.is_over and len(game.actions) < max_steps and clock() < deadline:
            if game.num_bytes >= max_bytes:
                game.short_of = "memory"
                break
            doing = "to_play()"
            game.players.append(environment.to_play())
            doing = "mask()"
            game.masks.append(np.array(environment.mask()))
            game.num_bytes += game.masks[-1].nbytes
            legal = legal_actions(game.masks[-1])
            if not len(legal):
                break
            action = int(rng.choice(legal))
            doing = f"step({action})"
            reward, observation, is_terminal = environment.step(action)
            game.actions.append(action)
            game.rewards.append(reward)
            game.terminals.append(is_terminal)
            _see(game, observation)
            game.is_over = bool(is_terminal)
        game.seconds = clock() - began
        doing = "truncated"
        game.truncated = environment.truncated
    except Exception as error:
        game.error = (
            f"{game.at(len(game.actions))}: {doing} raised {type(error).__name__}: {first_line(error)}"
        )
    return game


def legal_actions(mask: Any) -> np.ndarray:
    """Flat indices of the legal actions."""
    return np.flatnonzero(np.asarray(mask))


def same(one: Any, other: Any) -> bool:
    """Equal as arrays, a NaN included."""
    one, other = np.asarray(one), np.asarray(other)
    floats = one.dtype.kind == "f" and other.dtype.kind == "f"
    return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=floats)


def _see(game: RandomGame, observation: Any) -> None:
    game.observations.append(observation)
    copy = np.array(observation)
    game.copies.append(copy)
    game.num_bytes += BYTES_OF_A_STEP + copy.nbytes + getattr(observation, "nbytes", copy.nbytes)
