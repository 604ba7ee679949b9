"""Who plays in a match: anything that chooses an action for each of several games."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from distributed_muzero.algorithm.acting import Game, decide
from distributed_muzero.config import SearchConfig
from distributed_muzero.errors import NonFiniteError
from distributed_muzero.networks.inference import SearchModel


class Player(Protocol):
    """One side of a match. A player may be asked for games of both sides at once, but only for its own turns."""

    name: str
    # Whether it always plays the same in the same position: two such players need openings that differ.
    is_deterministic: bool

    def choose(self, games: Sequence[Game], rng: np.random.Generator) -> Sequence[int]:
        """A legal flat action for each game; it is this player's turn in all of them."""


class RandomPlayer:
    """Plays any legal action, all equally likely."""

    name = "random"
    is_deterministic = False

    def choose(self, games: Sequence[Game], rng: np.random.Generator) -> list[int]:
        return [int(rng.choice(np.flatnonzero(game.read_mask()))) for game in games]


class SearchPlayer:
    """Networks with a search: greedy and without noise, all games through one batched search."""

    is_deterministic = True

    def __init__(
        self,
        name: str,
        model: SearchModel,
        search: SearchConfig,
        discount: float,
        num_simulations: int | None = None,
        history_length: int | None = None,
    ):
        """num_simulations: in place of the search's own.   history_length: N of the networks, where games keep more."""
        self.name = name
        self.model = model
        self.search = search
        self.discount = discount
        self.num_simulations = num_simulations
        self.history_length = history_length

    def choose(self, games: Sequence[Game], rng: np.random.Generator) -> list[int]:
        return decide(
            [seen_with(game, self.history_length) for game in games],
            self.model,
            self.search,
            self.discount,
            0.0,
            noise=False,
            rng=rng,
            num_simulations=self.num_simulations,
        ).actions.tolist()


class PriorPlayer:
    """Networks without a search: the legal action with the highest prior."""

    is_deterministic = True

    def __init__(self, name: str, model: SearchModel, history_length: int | None = None):
        """history_length: N of the networks, where games keep more."""
        self.name = name
        self.model = model
        self.history_length = history_length

    def choose(self, games: Sequence[Game], rng: np.random.Generator) -> list[int]:
        """Raises NonFiniteError where the network gives a legal action NaN or Inf."""
        seen = [seen_with(game, self.history_length) for game in games]
        _, logits = self.model.initial(np.stack([game.history for game in seen]), 1)
        legal = np.stack([game.read_mask() for game in games])
        bad_rows = (legal & ~np.isfinite(logits)).any(1)
        if bad_rows.any():
            row = int(bad_rows.argmax())
            raise NonFiniteError(
                f"the prior in row {row} isn't finite: logits {logits[row].tolist()}, legal {legal[row].tolist()}; "
                f"check the network's weights (step {len(games[row].actions)} of a game with seed {games[row].seed})"
            )
        return np.where(legal, logits, -np.inf).argmax(1).tolist()


def seen_with(game: Game, history_length: int | None) -> Game:
    """The same game, with no more than its last so many observations."""
    if history_length is None or history_length == len(game.history):
        return game
    seen = copy.copy(game)
    seen.history = game.history[-history_length:]
    return seen
