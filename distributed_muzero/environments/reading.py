"""Positions and actions as text, for a person: as the environment says it, else as well as can be told from outside."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distributed_muzero.environments.base import Environment, EnvironmentSpec
from distributed_muzero.errors import EnvironmentFailure

EMPTY = "."
PIECES = "xo"  # of the first and the second player
SHOWN_NUMBERS = 64
MARKS = "0123456789abcdefghijklmnopqrstuvwxyz"


def describe(environment: Environment, observation: np.ndarray) -> str:
    """The position, by the environment's own `describe()` or by what is observed [*O]."""
    own = getattr(environment, "describe", None)
    return describe_observation(observation) if own is None else _ask(environment, "describe()", own)


def action_name(environment: Environment, action: int) -> str:
    """Of a flat action, by the environment's own `action_name(action)`; else its number, or its numbers where the
    shape of actions has several dimensions."""
    own = getattr(environment, "action_name", None)
    if own is not None:
        return _ask(environment, f"action_name({action})", lambda: own(action))
    return number_of(environment.spec, action)


def must_pass(environment: Environment) -> bool:
    """Whether the environment says that the one legal action does nothing."""
    return bool(getattr(environment, "must_pass", False))


def number_of(spec: EnvironmentSpec, action: int) -> str:
    if len(spec.action_shape) < 2:
        return str(action)
    return ",".join(str(part) for part in np.unravel_index(action, spec.action_shape))


def describe_observation(observation: np.ndarray) -> str:
    """Any observation [*O] as text, whatever it stands for.

    Planes [C, H, W]: a board on which each cell shows the number of the first plane that isn't 0 there; planes that
    are the same everywhere are named below it. [H, W]: its numbers. All else: numbers in a row, a one-hot as its place.
    """
    if observation.ndim == 3:
        return _describe_planes(observation)
    if observation.ndim == 2:
        return draw([[f"{number:g}" for number in row] for row in observation])
    numbers = observation.ravel()
    if numbers.size > 1 and np.count_nonzero(numbers) == 1 and numbers.max() == 1:
        return f"{numbers.argmax()} of 0 … {numbers.size - 1}"
    shown = " ".join(f"{number:.4g}" for number in numbers[:SHOWN_NUMBERS])
    return shown if numbers.size <= SHOWN_NUMBERS else f"{shown} … ({numbers.size} numbers)"


def draw_pieces(
    own: np.ndarray, other: np.ndarray, player: int, free: Sequence[Sequence[str]] | None = None
) -> str:
    """A board of the pieces [H, W] of `player`, who is to move, and of the other one.

    free: what cells without a piece show, [H][W].
    """
    mine, others = PIECES[player], PIECES[1 - player]
    rows = [
        [
            mine
            if own[row, column]
            else others
            if other[row, column]
            else free[row][column]
            if free
            else EMPTY
            for column in range(own.shape[1])
        ]
        for row in range(own.shape[0])
    ]
    return draw(rows)


def draw_fen(fen: str, rows: str, columns: str) -> str:
    """A position of chess or shogi in Forsyth's notation as a board, and the rest of the notation below it.

    rows: their names from the top, a character each.   columns: from the left.
    """
    pieces, _, rest = fen.partition(" ")
    board = []
    for name, line in zip(rows, pieces.split("/"), strict=True):
        board.append([name])
        for part in re.findall(r"\d+|\+?\D", line):
            board[-1] += [EMPTY] * int(part) if part.isdecimal() else [part]
    return f"{draw([*board, [' ', *columns]])}\n{rest}"


def draw(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns of one width."""
    width = max((len(cell) for row in rows for cell in row), default=1)
    return "\n".join(" ".join(cell.rjust(width) for cell in row) for row in rows)


def _describe_planes(planes: np.ndarray) -> str:
    constant = planes.min((1, 2)) == planes.max((1, 2))
    taken = (planes != 0) & ~constant[:, None, None]
    first = np.where(taken.any(0), taken.argmax(0), -1)
    marks = [str(number) for number in range(len(planes))] if len(planes) > len(MARKS) else MARKS
    lines = [draw([[EMPTY if plane < 0 else marks[plane] for plane in row] for row in first])]
    everywhere = [
        f"{marks[plane]} is {planes[plane, 0, 0]:g}"
        for plane in np.flatnonzero(constant)
        if planes[plane].any()
    ]
    if everywhere:
        lines.append(f"everywhere: {', '.join(everywhere)}")
    return "\n".join(lines)


def _ask(environment: Environment, what: str, call: Callable[[], Any]) -> str:
    try:
        text = call()
    except Exception as error:
        raise EnvironmentFailure(
            f"{environment.spec.id}: {what} raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(text, str):
        raise EnvironmentFailure(f"{environment.spec.id}: {what} returned {text!r}; expected text")
    return text
