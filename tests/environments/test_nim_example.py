"""examples/nim.py: the rules, by its known solution."""

from __future__ import annotations

import numpy as np
import pytest

from tests.environments.games import EXAMPLES, Nim


def value(environment, left):
    """Of the player to move with so many stones left, through the environment alone."""
    outcomes = []
    environment.left = left
    for action in np.flatnonzero(environment.mask()):
        environment.left = left
        reward, _, is_terminal = environment.step(int(action))
        outcomes.append(reward - (0 if is_terminal else value(environment, environment.left)))
    return max(outcomes)


@pytest.mark.parametrize("stones", range(1, 11))
def test_who_moves_at_a_multiple_of_four_loses(stones):
    environment = Nim(stones)
    environment.initial_state()
    assert value(environment, stones) == (-1 if stones % 4 == 0 else 1)


def test_stones_that_are_not_there_cannot_be_taken():
    environment = Nim(2)
    environment.initial_state()
    assert environment.mask().tolist() == [True, True, False]
    for action in (2, 3, -1):
        with pytest.raises(ValueError, match="of 2 stones"):
            environment.step(action)


def test_it_has_at_most_thirty_lines_of_code():
    lines = (EXAMPLES / "nim.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) <= 30
