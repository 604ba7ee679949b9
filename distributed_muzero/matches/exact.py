"""How well a player plays in every position of a game that is small enough to be solved: nothing is sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero.algorithm.acting import Game
from distributed_muzero.environments.base import Environment
from distributed_muzero.errors import EnvironmentFailure
from distributed_muzero.matches.players import Player
from distributed_muzero.matches.solver import Graph, Solution

MAX_POSITIONS = 200_000  # each is played up to, and searched
BATCH_SIZE = 128
NOT_CHOSEN = -1
RESULTS = {1: "win", 0: "draw", -1: "loss"}


class Mistake(NamedTuple):
    """A move that makes a position worth less to the player who makes it."""

    moves: list[int]  # actions that lead to the position, OpenSpiel's
    played: int
    optimal: list[int]
    value: float
    value_after: float


class ExactResult(NamedTuple):
    """What a player does in all positions that aren't lost for the player to move, whichever side that is."""

    positions: int
    # Of these, the ones in which some replies, good or bad ones, lead to a loss
    losses: int
    optimal: int  # in which the move keeps the position's value
    decisive_positions: int  # in which some legal move doesn't
    decisive_optimal: int
    start_value: float  # of the game, for the first player
    as_first: str  # from the start, at worst: win, draw or loss
    as_second: str
    first_mistakes: list[Mistake]  # those after the fewest moves

    @property
    def mistakes(self) -> int:
        return self.positions - self.optimal

    def to_json(self) -> dict[str, Any]:
        return {
            "positions": self.positions,
            "losses": self.losses,
            "mistakes": self.mistakes,
            "optimal_move_share": _share(self.optimal, self.positions),
            "decisive_positions": self.decisive_positions,
            "decisive_optimal_share": _share(self.decisive_optimal, self.decisive_positions),
            "start": {"value": self.start_value, "as_first": self.as_first, "as_second": self.as_second},
            "first_mistakes": [mistake._asdict() for mistake in self.first_mistakes],
        }


def play_everywhere(
    player: Player,
    make_env: Callable[[], Environment],
    solution: Solution,
    rng: np.random.Generator,
    *,
    history_length: int = 1,
    num_mistakes: int = 10,
) -> ExactResult:
    """Asks the player for a move in every position that isn't lost, and follows from there every reply.

    make_env: environments of the solved game.   history_length: N, observations stacked for networks; above 1, a
    position is shown as it looks after one of the ways that lead there.   num_mistakes: at most, to be listed.
    Raises EnvironmentFailure for an environment that cuts games before their end.
    """
    graph = solution.graph
    values = np.maximum.reduceat(solution.move_values, graph.starts)
    asked = np.flatnonzero(values >= 0)
    chosen = np.full(len(values), NOT_CHOSEN)
    chosen[asked] = _choose(player, make_env, graph, asked, rng, history_length)
    keeps = solution.move_values[chosen[asked]] == values[asked]
    is_decisive = np.minimum.reduceat(solution.move_values, graph.starts)[asked] < values[asked]
    worst = [worst_results(solution, chosen, side) for side in (0, 1)]
    own_worst = np.where(graph.players == 0, *worst)
    first_mover = int(graph.players[0])
    starts = [float(worst[side][0]) for side in (first_mover, 1 - first_mover)]
    return ExactResult(
        positions=len(asked),
        losses=int((own_worst[asked] < 0).sum()),
        optimal=int(keeps.sum()),
        decisive_positions=int(is_decisive.sum()),
        decisive_optimal=int((is_decisive & keeps).sum()),
        start_value=float(values[0]),
        as_first=RESULTS[int(np.sign(starts[0]))],
        as_second=RESULTS[int(np.sign(starts[1]))],
        first_mistakes=_list_mistakes(solution, chosen, asked[~keeps], num_mistakes),
    )


def worst_results(solution: Solution, chosen: np.ndarray, side: int) -> np.ndarray:
    """What the player of a side gets at worst, [P]: it plays the chosen moves, the other one any legal moves.

    chosen [P]: numbers of moves; none is needed where the mover has lost already, and the value stands for it.
    """
    graph = solution.graph
    sign = 1.0 if side == 0 else -1.0
    is_own, has_choice = graph.players == side, chosen != NOT_CHOSEN

    def fold(of_moves: np.ndarray) -> np.ndarray:
        own = np.where(has_choice, of_moves[chosen], solution.values)
        others = sign * np.minimum.reduceat(sign * of_moves, graph.starts)
        return np.where(is_own, own, others)

    return sign * graph.back_up(fold)


def _choose(
    player: Player,
    make_env: Callable[[], Environment],
    graph: Graph,
    asked: np.ndarray,
    rng: np.random.Generator,
    history_length: int,
) -> np.ndarray:
    """The number of the player's move in each of the positions."""
    environments = [make_env() for _ in range(min(BATCH_SIZE, len(asked)))]
    chosen: list[int] = []
    try:
        for begin in range(0, len(asked), BATCH_SIZE):
            numbers = asked[begin : begin + BATCH_SIZE].tolist()
            games = [
                _play_up_to(env, graph.path(number), history_length)
                for env, number in zip(environments, numbers, strict=False)
            ]
            actions = player.choose(games, rng)
            for number, action in zip(numbers, actions, strict=True):
                moves = graph.moves(number)
                chosen.append(moves.start + graph.actions[moves].tolist().index(int(action)))
    finally:
        for env in environments:
            env.close()
    return np.array(chosen)


def _play_up_to(env: Any, path: list[int], history_length: int) -> Game:
    """A game after these moves of OpenSpiel's, with the moves in between that do nothing."""
    game = Game(env, history_length)
    _pass(game)
    for action in path:
        game.move(action)
        _pass(game)
    return game


def _pass(game: Game) -> None:
    """Plays the moves that do nothing. Raises EnvironmentFailure for a game that is over, which none should be here."""
    while not game.is_over and game.env.must_pass:
        game.move(int(np.flatnonzero(game.read_mask())[0]))
    if game.is_over:
        raise EnvironmentFailure(
            f"{game.env.spec.id} cuts games after {len(game.actions)} steps, before they are decided; raise "
            "environment.max_episode_steps and train again"
        )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _list_mistakes(
    solution: Solution, chosen: np.ndarray, numbers: np.ndarray, num_mistakes: int
) -> list[Mistake]:
    graph = solution.graph
    paths = sorted(
        ((graph.path(number), number) for number in numbers.tolist()), key=lambda pair: len(pair[0])
    )
    mistakes = []
    for path, number in paths[:num_mistakes]:
        moves, move = graph.moves(number), chosen[number]
        values = solution.move_values[moves]
        optimal = graph.actions[moves][values == values.max()].tolist()
        mistakes.append(
            Mistake(
                path,
                int(graph.actions[move]),
                optimal,
                float(values.max()),
                float(solution.move_values[move]),
            )
        )
    return mistakes
