"""Small games of OpenSpiel, solved: what every position is worth, and which moves keep that."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero.environments.base import Environment
from distributed_muzero.errors import EnvironmentFailure

MAX_POSITIONS = 2_000_000
MAX_PATHS = 200_000  # as many where each order of moves counts as a position of its own
MAX_PLIES = 200  # games that may be longer have more positions than can be looked at
TOO_LARGE = (
    "too many to know the exact value of each. Measure against mcts:SIMS, or train a smaller board, such as "
    "openspiel:connect_four(rows=4,columns=4)"
)
# What OpenSpiel calls the games of other packages.
SAME_GAMES = {
    "connect_four": "connect_four",
    "tictactoe": "tic_tac_toe",
    "chess": "chess",
    "go": "go",
}
# Games whose text, with the player to move, decides how they go on: neither moves that were played earlier nor how
# many there were count. Read in OpenSpiel's sources; a test plays out small ones of each by every order of moves.
TOLD_BY_TEXT = frozenset(
    (
        "breakthrough",
        "clobber",
        "connect_four",
        "dots_and_boxes",
        "havannah",
        "hex",
        "mnk",
        "nim",
        "tic_tac_toe",
        "y",
    )
)


class Graph(NamedTuple):
    """The P positions of a game in which somebody is to move, numbered from 0, the start; and the M moves in them.

    The moves of a position lie together, those of lower numbers first. Positions that can't be told apart by what is
    still to come are one.
    """

    key: Callable[[Any], bytes]  # of a position, given OpenSpiel's state
    numbers: dict[bytes, int]  # by key
    players: np.ndarray  # [P] int8: 0 or 1 to move
    starts: np.ndarray  # [P]: the first of its moves
    actions: np.ndarray  # [M] int32
    targets: np.ndarray  # [M] int32: a position; or -1 - i, where the game ends with the i-th of the outcomes
    outcomes: np.ndarray  # [D] float64: what player 0 gains at an end
    parents: np.ndarray  # [P] int32: a position that leads there, -1 for the start …
    parent_actions: np.ndarray  # [P] int32: … by this action

    def moves(self, number: int) -> slice:
        """Which of the moves are those of a position."""
        end = self.starts[number + 1] if number + 1 < len(self.starts) else len(self.actions)
        return slice(int(self.starts[number]), int(end))

    @property
    def num_moves(self) -> np.ndarray:
        """Of each position, [P]."""
        return np.diff(self.starts, append=len(self.actions))

    def path(self, number: int) -> list[int]:
        """Actions that lead from the start to a position."""
        actions = []
        while number:
            actions.append(int(self.parent_actions[number]))
            number = int(self.parents[number])
        return actions[::-1]

    def back_up(self, fold: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Values of all positions [P] for player 0, from those of the ends.

        fold: from the values of the moves' targets [M] to those of the positions [P]; NaN stands for one that isn't
        known yet, and has to stay where it decides. Raises EnvironmentFailure for a game that can go in circles.
        """
        num_positions = missing = len(self.players)
        values = np.concatenate([np.full(num_positions, np.nan), self.outcomes[::-1]])
        while missing:
            values[:num_positions] = fold(values[self.targets])
            before, missing = missing, int(np.isnan(values[:num_positions]).sum())
            if missing == before:
                raise EnvironmentFailure(
                    "positions of this game come back, so that it has no exact values; play against mcts:SIMS"
                )
        return values[:num_positions]


class Solution(NamedTuple):
    """A game's graph and what its positions are worth where both play as well as can be."""

    graph: Graph
    values: np.ndarray  # [P] float64, for player 0
    move_values: np.ndarray  # [M] float64, for the player who makes the move

    def value(self, state: Any) -> float:
        """Of OpenSpiel's state, not yet over, for the player to move."""
        return float(self.move_values[self.graph.moves(self._number(state))].max())

    def optimal_actions(self, state: Any) -> np.ndarray:
        """All actions that keep the value, of OpenSpiel's state that is not yet over."""
        moves = self.graph.moves(self._number(state))
        values = self.move_values[moves]
        return self.graph.actions[moves][values == values.max()]

    def _number(self, state: Any) -> int:
        return self.graph.numbers[self.graph.key(state)]


def rules_of(env: Environment, who: str) -> Any:
    """OpenSpiel's game behind an environment.   who: needs it, for the error.

    Raises EnvironmentFailure for an environment of other rules, or that isn't for two players.
    """
    family, _, name = env.spec.id.partition(":")
    if family != "openspiel":
        same = SAME_GAMES.get(re.sub(r"_v\d+$", "", name)) if family == "pettingzoo" else None
        advice = f"train on openspiel:{same} for it" if same else "expected an environment openspiel:GAME"
        raise EnvironmentFailure(
            f"{who} plays by OpenSpiel's rules, which {env.spec.id} doesn't offer; {advice}"
        )
    if env.spec.num_players != 2:
        raise EnvironmentFailure(f"{env.spec.id} has one player; {who} needs a game for two")
    env.initial_state()
    game = env.state.get_game()  # type: ignore[attr-defined]
    kind = game.get_type()
    if kind.reward_model != kind.RewardModel.TERMINAL:
        raise EnvironmentFailure(
            f"{env.spec.id} gives rewards before its end; {who} needs a game that is decided at its end"
        )
    return game


def solve(game: Any, max_positions: int = MAX_POSITIONS) -> Solution:
    """Every position that can be reached, with its value.   game: as `rules_of` gives it.

    Raises EnvironmentFailure for a game with more positions, or one that can go in circles.
    """
    graph = lay_out(game, max_positions)
    signs = np.where(graph.players == 0, 1.0, -1.0)
    signs_of_moves = np.repeat(signs, graph.num_moves)
    values = graph.back_up(
        lambda of_moves: signs * np.maximum.reduceat(signs_of_moves * of_moves, graph.starts)
    )
    of_targets = np.concatenate([values, graph.outcomes[::-1]])[graph.targets]
    # Without the sum, a draw would be -0.0 for one of the players.
    return Solution(graph, values + 0.0, signs_of_moves * of_targets + 0.0)


def lay_out(game: Any, max_positions: int = MAX_POSITIONS) -> Graph:
    """The graph of a game, depth first, so that few states are held. Raises EnvironmentFailure for one with more
    positions, or one whose games may be too long for that to be worth a try."""
    if (length := game.max_game_length()) > MAX_PLIES:
        raise EnvironmentFailure(f"{game} may go on for {length:,} moves: {TOO_LARGE}")
    if not is_told_by_text(game):
        max_positions = min(max_positions, MAX_PATHS)
    key, start = position_key(game), game.new_initial_state()
    numbers = {key(start): 0}
    players, parents, parent_actions = (
        array("b", [start.current_player()]),
        array("i", [-1]),
        array("i", [-1]),
    )
    sources, actions, targets = array("i"), array("i"), array("i")
    outcomes: dict[float, int] = {}
    path = [(0, start, iter(start.legal_actions()))]
    while path:
        number, state, untried = path[-1]
        action = next(untried, None)
        if action is None:
            path.pop()
            continue
        child = state.child(action)
        if child.is_terminal():
            target = -1 - outcomes.setdefault(_gain(child), len(outcomes))
        elif (target := numbers.setdefault(key(child), len(numbers))) == len(players):
            if target == max_positions:
                raise EnvironmentFailure(f"{game} has more than {max_positions:,} positions: {TOO_LARGE}")
            players.append(child.current_player())
            parents.append(number)
            parent_actions.append(action)
            path.append((target, child, iter(child.legal_actions())))
        sources.append(number)
        actions.append(action)
        targets.append(target)
    order = np.argsort(sources, kind="stable")
    counts = np.bincount(np.array(sources), minlength=len(players))
    return Graph(
        key,
        numbers,
        np.array(players),
        np.cumsum(counts) - counts,
        np.array(actions)[order],
        np.array(targets)[order],
        np.array(list(outcomes)),
        np.array(parents),
        np.array(parent_actions),
    )


def position_key(game: Any) -> Callable[[Any], bytes]:
    """What tells the positions of a game apart, given OpenSpiel's state: 16 bytes of a hash.

    Of the player to move and the text, where these are known to decide what comes; else of all moves so far, which
    always do, but make as many positions as there are ways to reach them.
    """
    if is_told_by_text(game):
        return lambda state: _hashed(f"{state.current_player()} {state}")
    return lambda state: _hashed(state.history_str())


def _hashed(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_told_by_text(game: Any) -> bool:
    name = game.get_type().short_name
    if name == "misere":
        name = game.get_parameters()["game"]["name"]
    return name in TOLD_BY_TEXT


def _gain(state: Any) -> float:
    """What player 0 gains in a game that is over, as the environment's rewards have it."""
    first, second = state.returns()
    return (first - second) / 2
