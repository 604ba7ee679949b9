"""PettingZoo's classic board games, behind the `Environment` protocol: `pettingzoo:connect_four_v3`."""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

# Before pygame is imported: it greets on standard output, where --json goes.
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

from gymnasium import spaces

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.environments.pettingzoo_boards import BOARDS, Board
from distributed_muzero.environments.reading import describe_observation
from distributed_muzero.errors import EnvironmentFailure, NonFiniteError, UnknownEnvironmentError

EXTRA = "pip install 'distributed_muzero[pettingzoo]'"
BOARD_GAMES = ("chess", "connect_four", "go", "tictactoe")
CARDS = "its cards are dealt by chance, and hidden"
UNFIT = {
    "gin_rummy": CARDS,
    "hanabi": CARDS,
    "leduc_holdem": CARDS,
    "rps": "its players move at the same time",
    "texas_holdem": CARDS,
    "texas_holdem_no_limit": CARDS,
}


def _go_order() -> tuple[int, ...]:
    """The planes of go: eight boards of two, the newest first, then one that says who moves. Each board is kept as its
    mover saw it: that is the other player for the newest, and for every second one."""
    boards = [(2 * age, 2 * age + 1) for age in range(8)]
    own_first = [board[::-1] if age % 2 == 0 else board for age, board in enumerate(boards)]
    return (*(plane for board in own_first for plane in board), 16)


# Of the planes, where own pieces don't come before the other player's.
ORDERS = {"go": _go_order()}


class AECEnvironment:
    """One of PettingZoo's AEC environments in which two players move in turn, one's gain being the other's loss.

    Observation: what the player to move observes, with channels first if there are any. Reward: the mover's.
    order: of the channels, if not as they come.   board: how a person is shown it, if not as any observation.
    Raises EnvironmentFailure for an environment that doesn't fit, and NonFiniteError for a NaN or Inf from it.
    """

    def __init__(
        self,
        environment: Any,
        id: str,
        max_episode_steps: int,
        order: tuple[int, ...] | None = None,
        board: Board | None = None,
    ):
        self._environment = environment
        self._board = board
        self._agents = list(environment.possible_agents)
        self._order = None if order is None else np.array(order)
        self._max_episode_steps = max_episode_steps
        self.spec = make_spec(environment, id)
        self._player = 0
        self._num_steps = 0
        self._playing = False
        self._truncated = False
        self._legal = np.zeros(self.spec.num_actions, dtype=bool)

    def initial_state(self, seed: int | None = None) -> np.ndarray:
        self._call("reset()", partial(self._environment.reset, seed=seed))
        self._num_steps, self._playing, self._truncated = 0, True, False
        self._player = self._agents.index(self._environment.agent_selection)
        return self._observe()

    def step(self, action: int) -> tuple[float, np.ndarray, bool]:
        if not self._playing:
            raise self._failure("step() without a game: call initial_state() first, also after a game's end")
        if not 0 <= action < self.spec.num_actions or not self._legal[action]:
            raise self._failure(f"action {action} is forbidden here")
        environment, mover = self._environment, self._player
        self._call(f"step({action})", partial(environment.step, int(action)))
        self._num_steps += 1
        reward = self._reward(mover)
        terminated = any(environment.terminations.values())
        limit = any(environment.truncations.values()) or self._num_steps >= self._max_episode_steps
        self._truncated = limit and not terminated
        self._playing = not (terminated or limit)
        self._player = 1 - mover
        if self._playing and environment.agent_selection != self._agents[self._player]:
            raise self._failure(
                f"{self._agents[mover]} is to move twice in a row; expected turns to alternate"
            )
        return reward, self._observe(), not self._playing

    def mask(self) -> np.ndarray:
        return self._legal.copy()

    def to_play(self) -> int:
        return self._player

    @property
    def truncated(self) -> bool:
        return self._truncated

    def describe(self) -> str:
        if self._board is None:
            return describe_observation(self._observe())
        return self._board.describe(self._environment, self._player, self._observe())

    def action_name(self, action: int) -> str:
        if self._board is None:
            return str(action)
        return self._board.action_name(self._environment, self._player, action)

    def close(self) -> None:
        self._environment.close()

    def _reward(self, mover: int) -> float:
        rewards = self._environment.rewards
        own, other = (float(rewards[self._agents[player]]) for player in (mover, 1 - mover))
        if not np.isfinite([own, other]).all():
            raise NonFiniteError(
                f"{self.spec.id}, step {self._num_steps}: the rewards are {own} and {other}; expected finite ones"
            )
        if own + other != 0:
            raise self._failure(
                f"the mover's reward is {own} and the other player's {other}; expected one's gain to be the "
                "other's loss"
            )
        return own

    def _observe(self) -> np.ndarray:
        seen = self._call("observe()", partial(self._environment.observe, self._agents[self._player]))
        self._legal = np.asarray(seen["action_mask"]) != 0
        if self._playing and not self._legal.any():
            raise self._failure("the mask forbids every action; at least one must be legal until the end")
        planes = np.asarray(seen["observation"])
        if planes.ndim == 3:
            planes = np.moveaxis(planes, -1, 0)
        if self._order is not None:
            planes = planes[self._order]
        return np.array(planes, dtype=self.spec.observation_dtype, order="C")

    def _call(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            raise self._failure(f"{what} raised {type(error).__name__}: {error}") from error

    def _failure(self, problem: str) -> EnvironmentFailure:
        return EnvironmentFailure(f"{self.spec.id}, step {self._num_steps}: {problem}")


def make_spec(environment: Any, id: str) -> EnvironmentSpec:
    """What is fixed of an AEC environment. Raises EnvironmentFailure unless two players have the same spaces:
    Discrete actions, and observations with an array and an `action_mask`."""
    agents = environment.possible_agents
    if len(agents) != 2:
        raise EnvironmentFailure(f"{id} can't be trained: it has {len(agents)} players, expected two")
    seen, actions = environment.observation_space(agents[0]), environment.action_space(agents[0])
    same = seen == environment.observation_space(agents[1]) and actions == environment.action_space(agents[1])
    if not same:
        raise EnvironmentFailure(f"{id} can't be trained: its players observe or do different things")
    if not isinstance(actions, spaces.Discrete) or actions.start != 0:
        raise EnvironmentFailure(
            f"{id} can't be trained: its actions are {actions}, expected Discrete from 0"
        )
    box = seen.spaces.get("observation") if isinstance(seen, spaces.Dict) else None
    if not isinstance(box, spaces.Box) or "action_mask" not in seen.spaces:
        raise EnvironmentFailure(
            f"{id} can't be trained: its players observe {seen}, expected a Dict of a Box `observation` and an "
            "`action_mask`"
        )
    shape = (box.shape[-1], *box.shape[:-1]) if len(box.shape) == 3 else box.shape
    # A truth value is kept as a number.
    dtype = np.dtype(np.int8) if box.dtype == bool else np.dtype(box.dtype)
    return EnvironmentSpec(id, shape, dtype, (int(actions.n),), num_players=2)


def make(config: EnvironmentConfig) -> AECEnvironment:
    """Makes `pettingzoo:GAME_vN`, a board game of pettingzoo.classic; kwargs are its own.

    Raises UnknownEnvironmentError (the game, or a package that it needs, is missing) and EnvironmentFailure (it
    doesn't fit, or refuses the kwargs).
    """
    name = config.id.partition(":")[2]
    game = re.sub(r"_v\d+$", "", name)
    if game in UNFIT:
        raise EnvironmentFailure(
            f"{config.id} can't be trained: {UNFIT[game]}; expected one of {', '.join(BOARD_GAMES)}"
        )
    try:
        check_version(config.id, name)
        environment = _import(game).env(**config.kwargs)
    except ImportError as error:
        raise UnknownEnvironmentError(f"{config.id} can't be made: {error}. To play it: {EXTRA}") from error
    except (TypeError, ValueError, AssertionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise EnvironmentFailure(f"{config.id} with kwargs {config.kwargs}: {problem}") from error
    return AECEnvironment(
        environment, config.id, config.max_episode_steps, ORDERS.get(game), BOARDS.get(game)
    )


def trainable_games() -> list[str]:
    """Names of the installed board games with their versions, sorted. Raises ImportError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classic = importlib.import_module("pettingzoo.classic")
    names = [module.name for module in pkgutil.iter_modules(classic.__path__)]
    return sorted(name for name in names if re.sub(r"_v\d+$", "", name) in BOARD_GAMES and name[-1].isdigit())


def check_version(id: str, name: str) -> None:
    """Raises UnknownEnvironmentError, with what is near, unless the game is there in that version."""
    known = trainable_games()
    if name in known:
        return
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise UnknownEnvironmentError(f"{id}: no such board game{hint}; PettingZoo has {', '.join(known)}")


def _import(game: str) -> Any:
    """The module of a game itself: the one that bears the version warns of going out of use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes on the imports of third parties
        return importlib.import_module(f"pettingzoo.classic.{game}.{game}")
