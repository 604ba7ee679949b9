"""Does a sequence of tokens keep what EnvironmentSpec.token_columns promises of it?"""

from __future__ import annotations

import numpy as np

from distributed_muzero.environments.base import EnvironmentSpec, TokenColumn
from distributed_muzero.environments.checks_of_games import Broken, Unseen
from distributed_muzero.environments.random_games import RandomGame


def check_token_columns(spec: EnvironmentSpec) -> str:
    """Whether the columns can be those of the spec's observations and actions."""
    columns, shape, actions = spec.token_columns, spec.observation_shape, spec.action_shape
    if len(shape) != 2 or shape[1] != len(columns):
        raise Broken(f"observations {shape} with {len(columns)} token columns; expected (L, {len(columns)})")
    if len(actions) != 2 or actions[0] != shape[0]:
        raise Broken(f"action_shape is {actions}; expected ({shape[0]}, R), what can be done to each token")
    if columns[0].kind != "category" or columns[0].shared:
        raise Broken(f"the first column is {columns[0]}; expected a category of each token, 0 = no token")
    names = [column.name for column in columns]
    if len(set(names)) < len(names):
        raise Broken(f"two columns have one name: {', '.join(names)}")
    for column in columns:
        if column.kind not in ("category", "number", "index"):
            raise Broken(f"column {column.name}: kind {column.kind!r}; expected category, number or index")
        if column.kind == "category" and column.size < 2:
            raise Broken(f"column {column.name}: {column.size} categories; expected 2 or more")
        if column.kind == "index" and column.shared:
            raise Broken(f"column {column.name}: a shared index; expected one of each token")
        if column.links and (column.kind != "category" or column.shared):
            raise Broken(f"column {column.name}: only a category of each token links those that share it")
    return f"{len(columns)} columns of up to {shape[0]} tokens"


def check_tokens(games: list[RandomGame]) -> str:
    """Whether all observations, the last ones included, hold what the columns say.

    Those of another shape, and such masks, have failed already.
    """
    fewest, most = np.inf, 0
    for game in games:
        for step, observation in enumerate(game.copies):
            if observation.shape != game.spec.observation_shape:
                continue
            try:
                num_tokens = _check_sequence(observation, game.spec.token_columns)
                if step < len(game.masks):
                    _check_actions(game.masks[step], num_tokens)
            except Broken as broken:
                raise Broken(f"{game.at(step)}: {broken}") from None
            fewest, most = min(fewest, num_tokens), max(most, num_tokens)
    if fewest > most:
        raise Unseen("no observation came")
    return f"{fewest} to {most} of them, first, in range; nothing can be done to empty rows"


def _check_sequence(observation: np.ndarray, columns: tuple[TokenColumn, ...]) -> int:
    """Of one observation [L, C]; the number of its tokens."""
    is_token = observation[:, 0] != 0
    num_tokens = int(is_token.sum())
    if not num_tokens:
        raise Broken("no token; expected one or more")
    if not is_token[:num_tokens].all():
        raise Broken(f"row {int(is_token.argmin())} is empty, and a token comes after it")
    for column, numbers in zip(columns, observation.T, strict=True):
        if column.shared and (numbers != numbers[0]).any():
            raise Broken(f"column {column.name} is shared, and differs between rows")
        if not column.shared and numbers[num_tokens:].any():
            raise Broken(f"column {column.name}: not 0 in an empty row")
        _check_range(column, numbers if column.shared else numbers[:num_tokens], num_tokens)
    return num_tokens


def _check_range(column: TokenColumn, numbers: np.ndarray, num_tokens: int) -> None:
    if column.kind == "number":
        return
    low, high = (0, column.size - 1) if column.kind == "category" else (-1, num_tokens - 1)
    wrong = (numbers != np.floor(numbers)) | (numbers < low) | (numbers > high)
    if wrong.any():
        raise Broken(
            f"column {column.name} holds {numbers[wrong][0]:g}; expected whole numbers from {low} to {high}"
        )


def _check_actions(mask: np.ndarray, num_tokens: int) -> None:
    if mask.ndim == 2 and mask[num_tokens:].any():
        row = num_tokens + int(mask[num_tokens:].any(1).argmax())
        raise Broken(f"the mask allows something to row {row}, in which no token is")
