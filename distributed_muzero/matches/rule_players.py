"""Players who know the rules: they look at OpenSpiel's own state and search in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distributed_muzero.algorithm.acting import Game
from distributed_muzero.environments.base import Environment
from distributed_muzero.matches.players import Player
from distributed_muzero.matches.solver import MAX_POSITIONS, Solution, rules_of, solve

EXPLORATION = 2.0  # uct_c, as in OpenSpiel's own examples
SEEDS = 2**31
# Far above what a search takes, so that OpenSpiel never drops parts of a tree.
MAX_MEGABYTES = 2**20


def make_rule_player(name: str, env: Environment, who: str, max_positions: int = MAX_POSITIONS) -> Player:
    """`minimax` or `mcts:SIMS`, for the game of an environment, which is closed.   who: asks for it, for the error.

    max_positions: of a game for minimax. Raises EnvironmentFailure for a game that this player can't play.
    """
    try:
        rules = rules_of(env, who)
    finally:
        env.close()
    if name == "minimax":
        return MinimaxPlayer(solve(rules, max_positions))
    return MctsPlayer(rules, int(name.removeprefix("mcts:")))


class MinimaxPlayer:
    """Plays any of the moves that keep a position's exact value, all equally likely."""

    name = "minimax"
    is_deterministic = False

    def __init__(self, solution: Solution):
        self.solution = solution

    def choose(self, games: Sequence[Game], rng: np.random.Generator) -> list[int]:
        return [self._choose(game, rng) for game in games]

    def _choose(self, game: Game, rng: np.random.Generator) -> int:
        if (only := only_action(game)) is not None:
            return only
        return int(rng.choice(self.solution.optimal_actions(game.env.state)))


class MctsPlayer:
    """OpenSpiel's MCTS: UCT with random games to the end as values, proven results backed up, most visits played.

    Its implementation in C++, which is the one of open_spiel.python.algorithms.mcts many times as fast.
    """

    is_deterministic = False

    def __init__(self, rules: Any, num_simulations: int):
        """rules: OpenSpiel's game.   num_simulations: of each move, a random game each."""
        self.name = f"mcts:{num_simulations}"
        self.rules = rules
        self.num_simulations = num_simulations

    def choose(self, games: Sequence[Game], rng: np.random.Generator) -> list[int]:
        return [self._choose(game, rng) for game in games]

    def _choose(self, game: Game, rng: np.random.Generator) -> int:
        if (only := only_action(game)) is not None:
            return only
        return int(self._bot(rng).step(game.env.state))

    def _bot(self, rng: np.random.Generator) -> Any:
        """A new one for each move: nothing but the seeds decides what it plays."""
        evaluator_seed, seed = (int(number) for number in rng.integers(SEEDS, size=2))
        import pyspiel  # by now there is a game of it

        return pyspiel.MCTSBot(
            game=self.rules,
            evaluator=pyspiel.RandomRolloutEvaluator(1, evaluator_seed),
            uct_c=EXPLORATION,
            max_simulations=self.num_simulations,
            max_memory_mb=MAX_MEGABYTES,
            solve=True,
            seed=seed,
            verbose=False,
        )


def only_action(game: Game) -> int | None:
    """The one legal action, if there is no other: such as the idle move between two of the same player."""
    legal = np.flatnonzero(game.read_mask())
    return int(legal[0]) if len(legal) == 1 else None
