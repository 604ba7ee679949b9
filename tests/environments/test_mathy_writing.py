"""Mathy's expressions as people see them: brackets that tell how they are read, and what of them a rule changes."""

from __future__ import annotations

import numpy as np
import pytest

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.registry import make_environment

pytest.importorskip("mathy_envs", reason="mathy isn't installed: pip install 'distributed_muzero[mathy]'")

from mathy_core.parser import ExpressionParser

from distributed_muzero.environments.mathy_writing import written

WRITTEN = {
    "-2^2": "(-2)^2",
    "-x^2": "-x^2",
    "-(x + 2)": "-(x + 2)",
    "x^2y": "x^(2y)",
    "x^-1": "x^-1",
    "(x + 1)^2": "(x + 1)^2",
    "4x^2^3": "(4x^2)^3",
    "2x^(1 + 2)": "2x^(1 + 2)",
    "1/2x": "1 / (2x)",
    "a/b/c": "a / b / c",
    "a/(b/c)": "a / (b / c)",
    "a - (b - c)": "a - (b - c)",
    "(4+2)x": "(4 + 2) * x",
    "hello": "h * e * l * l * o",
    "3! + sgn(x)": "3! + sgn(x)",
}


@pytest.mark.parametrize("text", WRITTEN)
def test_brackets_tell_how_it_is_read(text):
    root = ExpressionParser().parse(text)
    assert written(root) == WRITTEN[text]
    again = ExpressionParser().parse(written(root))  # and mathy reads that in the same way
    assert [str(node) for node in again.to_list()] == [str(node) for node in root.to_list()]


def parts(problem, rule):
    """What the rule may be applied to, from left to right."""
    env = make_environment(EnvironmentConfig(id="mathy:poly-easy", kwargs={"problem": problem}))
    env.initial_state()
    legal = map(int, np.flatnonzero(env.mask()))
    return [env.part(action) for action in legal if env.read_action(action)[0] == rule]


@pytest.mark.parametrize(
    ("rule", "problem", "expected"),
    [
        ("commutative swap", "7 + 6x + -3", ["7 + 6x", "6x + -3"]),
        ("commutative swap", "2a * b * c", ["a * b", "b * c"]),
        ("commutative swap", "7 + (6x + 2)", ["7 + (6x + 2)", "(6x + 2)"]),
        ("distributive factoring", "7 + 4x + 2x", ["4x + 2x"]),
        ("distributive factoring", "4x + (2x + 7)", ["4x + 2x"]),
        ("distributive factoring", "(7 + 4x) + (2x + 3)", ["4x + 2x"]),
        ("distributive factoring", "(7 + (3 + 4x)) + 2x", ["4x + 2x"]),
        ("distributive factoring", "4x + ((2x + 7) + y)", ["4x + 2x"]),
        ("constant arithmetic", "(4 + 2) * x", ["(4 + 2)"]),
        ("constant arithmetic", "4 + (2 + x)", ["4 + 2"]),
        ("constant arithmetic", "4n * 2 + 1", ["4 * 2"]),
        ("restate subtraction", "6x + 7 - 3", ["- 3"]),
        ("restate subtraction", "6x + 7 + -3", ["+ -3"]),
        ("variable multiplication", "x * (x^2 * y)", ["x * x^2"]),
        ("distributive multiply", "2 * (x + y) + 1", ["2 * (x + y)"]),
    ],
)
def test_the_part_that_a_rule_changes(rule, problem, expected):
    assert parts(problem, rule) == expected
