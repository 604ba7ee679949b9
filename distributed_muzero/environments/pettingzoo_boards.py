"""PettingZoo's board games as text, for a person who plays them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero.environments.reading import draw_pieces

GO_COLUMNS = "ABCDEFGHJKLMNOPQRSTUVWXYZ"  # there is no I


class Board(NamedTuple):
    """How one game is shown. Both functions get the AEC environment and the player to move, 0 or 1."""

    describe: Callable[[Any, int, np.ndarray], str]  # and the observation, own pieces first
    action_name: Callable[[Any, int, int], str]  # and the action


def _connect_four(environment: Any, player: int, planes: np.ndarray) -> str:
    columns = " ".join(str(column) for column in range(planes.shape[2]))
    return f"{draw_pieces(planes[0], planes[1], player)}\n{columns}"


def _tictactoe(environment: Any, player: int, planes: np.ndarray) -> str:
    """Free cells show the action that takes them."""
    _, height, width = planes.shape
    free = [[str(row * width + column) for column in range(width)] for row in range(height)]
    return draw_pieces(planes[0], planes[1], player, free)


def _go(environment: Any, player: int, planes: np.ndarray) -> str:
    """Black, who begins, is x. Rows are counted from below."""
    size = planes.shape[1]
    rows = draw_pieces(planes[0], planes[1], player).splitlines()
    numbered = [f"{size - number:2} {row}" for number, row in enumerate(rows)]
    return "\n".join([*numbered, f"   {' '.join(GO_COLUMNS[:size])}"])


def _go_action(environment: Any, player: int, action: int) -> str:
    points = environment.action_space(environment.possible_agents[0]).n - 1
    if action == points:
        return "pass"
    size = int(np.sqrt(points))
    row, column = divmod(action, size)
    return f"{GO_COLUMNS[column]}{size - row}"


def _chess(environment: Any, player: int, planes: np.ndarray) -> str:
    """Capitals are white, who begins."""
    rows = str(environment.unwrapped.board).splitlines()
    numbered = [f"{8 - number} {row}" for number, row in enumerate(rows)]
    return "\n".join([*numbered, "  a b c d e f g h"])


def _chess_action(environment: Any, player: int, action: int) -> str:
    """From where to where, such as e2e4 or a7a8q."""
    moves = importlib.import_module("pettingzoo.classic.chess.chess_utils")
    return moves.action_to_move(environment.unwrapped.board, action, player).uci()


def _number(environment: Any, player: int, action: int) -> str:
    return str(action)


BOARDS = {
    "chess": Board(_chess, _chess_action),
    "connect_four": Board(_connect_four, _number),
    "go": Board(_go, _go_action),
    "tictactoe": Board(_tictactoe, _number),
}
