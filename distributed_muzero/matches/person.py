"""A game of a person: against a search, or alone in an environment for one player. It knows no terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from distributed_muzero.algorithm.acting import Game, decide
from distributed_muzero.config import SearchConfig
from distributed_muzero.environments import reading
from distributed_muzero.environments.base import Environment
from distributed_muzero.errors import EnvironmentFailure
from distributed_muzero.matches.match import outcome
from distributed_muzero.networks.inference import SearchModel


class Opinion(NamedTuple):
    """What a search says of a position, to the player who is to move there."""

    action: int  # that it would play
    value: float  # that it expects then; not the root's, in which moves count that it only tried
    policy: np.ndarray  # [A] its share for each action, sums to 1
    qvalues: np.ndarray  # [A] NaN where it has tried nothing
    priors: np.ndarray  # [A] the policy before any search, sums to 1 over the legal actions


class Adviser:
    """Networks with a search: greedy and without noise, one game at a time."""

    def __init__(self, model: SearchModel, search: SearchConfig, discount: float):
        self.model = model
        self.search = search
        self.discount = discount

    def opinion(self, game: Game) -> Opinion:
        made = decide(
            [game],
            self.model,
            self.search,
            self.discount,
            0.0,
            noise=False,
            rng=np.random.default_rng(0),
        )
        action, result = int(made.actions[0]), made.result
        _, logits = self.model.initial(game.history[None], 1)
        return Opinion(
            action,
            float(result.qvalues[0, action]),
            result.action_weights[0],
            np.where(result.visit_counts[0] > 0, result.qvalues[0], np.nan),
            legal_softmax(logits[0], made.legal_masks[0]),
        )


class Move(NamedTuple):
    player: int
    action: int
    name: str
    is_idle: bool  # the only one that there was, and it does nothing


class Outcome(NamedTuple):
    score: float  # rewards as the person sees them: own ones less the other player's
    ended: Literal["by the rules", "cut", "resigned"]


class PersonGame:
    """One game that can be taken back: its moves are played again then, from the same seed in a new environment.

    begins: whether the person has the first move; alone, a person has all of them.
    """

    def __init__(
        self, make_env: Callable[[], Environment], history_length: int, seed: int, begins: bool = True
    ):
        self.begins = begins
        self.moves: list[Move] = []
        self._make_env = make_env
        self._history_length = history_length
        self._seed = seed
        self._has_resigned = False
        self._env = make_env()
        self.game = Game(self._env, history_length, seed)
        first_mover = self.game.players[0]
        self.person = first_mover if begins else 1 - first_mover

    @property
    def is_over(self) -> bool:
        return self.game.is_over or self._has_resigned

    @property
    def is_persons_turn(self) -> bool:
        return self.game.players[-1] == self.person

    @property
    def must_pass(self) -> bool:
        """Whether the environment says that the one legal move does nothing."""
        return reading.must_pass(self._env) and len(self.legal_actions()) == 1

    @property
    def num_moves(self) -> int:
        """Of both players, without idle ones."""
        return sum(not move.is_idle for move in self.moves)

    def legal_actions(self) -> list[int]:
        return np.flatnonzero(self.game.read_mask()).tolist()

    def action_name(self, action: int) -> str:
        return reading.action_name(self._env, action)

    def describe(self) -> str:
        return reading.describe(self._env, self.game.observations[-1])

    def play(self, action: int) -> Move:
        """The legal action of whoever is to move."""
        move = Move(self.game.players[-1], action, self.action_name(action), self.must_pass)
        self.game.move(action)
        self.moves.append(move)
        return move

    def take_back(self) -> int:
        """Back to before the person's last move that wasn't idle; returns how many were taken back, 0 without one.

        Raises EnvironmentFailure for an environment that doesn't play the same game again.
        """
        own = [at for at, move in enumerate(self.moves) if move.player == self.person and not move.is_idle]
        if not own:
            return 0
        env = self._make_env()
        try:
            game = self._replay(env, own[-1])
        except Exception:
            env.close()
            raise
        self.close()
        self._env, self.game = env, game
        num_taken = len(self.moves) - own[-1]
        del self.moves[own[-1] :]
        return num_taken

    def resign(self) -> None:
        self._has_resigned = True

    def outcome(self) -> Outcome:
        """Of a game that is over."""
        score = outcome(self.game, self.person)
        if self._has_resigned:
            return Outcome(score, "resigned")
        return Outcome(score, "cut" if self.game.truncated else "by the rules")

    def close(self) -> None:
        self._env.close()

    def _replay(self, env: Environment, num_moves: int) -> Game:
        game = Game(env, self._history_length, self._seed)
        for move in self.moves[:num_moves]:
            game.move(move.action)
        if not all(map(np.array_equal, game.observations, self.game.observations)):
            raise EnvironmentFailure(
                f"{env.spec.id}: the same moves from the same seed {self._seed} gave another game, so that nothing can "
                "be taken back; `distributed-muzero envs check` tells more"
            )
        return game


def legal_softmax(logits: np.ndarray, legal: np.ndarray) -> np.ndarray:
    """softmax over the legal actions [A] alone, 0 elsewhere."""
    weights = np.exp(np.where(legal, logits - logits[legal].max(), -np.inf))
    return weights / weights.sum()
