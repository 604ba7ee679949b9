"""What an environment must offer, and the few facts that the rest needs to know of it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Protocol

import numpy as np

# Of observations, rewards and values: their sums and squares must stay finite in float32.
MAX_MAGNITUDE = 1e15


class TokenColumn(NamedTuple):
    """What one column of an observation [L, C] says of each of its L tokens (or, `shared`, of them all).

    category: whole numbers from 0 to size - 1.  number: any finite number.  index: the row of another token, -1 = none.
    links: of a category of each token: those that share it, 0 aside, have to do with each other, as a name's places do.
    """

    name: str
    kind: Literal["category", "number", "index"]
    size: int = 0  # of a category, 2 or more
    shared: bool = False  # the same in every row
    links: bool = False


class EnvironmentSpec(NamedTuple):
    """Facts of an environment that don't change while it is played."""

    id: str
    observation_shape: tuple[int, ...]
    observation_dtype: np.dtype
    action_shape: tuple[int, ...]  # A may be multi-dimensional; inside it is flat, row-major (decision 8)
    num_players: int = 1
    # of an observation [L, C] that is a sequence of tokens: the first one is a category, 0 where no token is, and all
    # tokens come before the empty rows. Actions are [L, R] there: what can be done to each token.
    token_columns: tuple[TokenColumn, ...] = ()

    @property
    def num_actions(self) -> int:
        return math.prod(self.action_shape)


class Environment(Protocol):
    """The contract's environment, with what the source left open (decisions 7, 8 and 10).

    After the last step (`is_terminal`), only `truncated`, `initial_state` and `close` may be used; before the first
    game, only `spec`, `initial_state` and `close`. Observations and rewards are finite, from -MAX_MAGNITUDE to
    MAX_MAGNITUDE: replay takes no others.
    """

    spec: EnvironmentSpec

    def initial_state(self, seed: int | None = None) -> np.ndarray:
        """Starts a game and returns its first observation [*O]. The same seed starts the same game."""

    def step(self, action: int) -> tuple[float, np.ndarray, bool]:
        """Plays a flat action: (reward u_t, next observation [*O], terminated or truncated)."""

    def mask(self) -> np.ndarray:
        """Legal actions of the current state, [*A] with 1 = allowed."""

    def to_play(self) -> int:
        """The player to move, from 0."""

    @property
    def truncated(self) -> bool:
        """True when the game was cut by a limit rather than ended by its rules."""

    def close(self) -> None:
        """Frees what the environment holds."""


class Winnable(Protocol):
    """What an Environment for one player may offer besides, where a game is either won or not; for `evaluate`."""

    @property
    def won(self) -> bool:
        """After the last step: whether the game was won."""


class Readable(Protocol):
    """What an Environment may offer besides, for a person who plays in it (`play`); each of these is optional.

    They may be used from `initial_state` on, `describe` also after the last step.
    """

    @property
    def must_pass(self) -> bool:
        """True where the one legal action does nothing, so that nobody needs to be asked. Without it: never."""

    def describe(self) -> str:
        """The position as text, one line or several. Without it, the observation is shown."""

    def action_name(self, action: int) -> str:
        """What a person calls an action that is legal here. Without it, its number."""
