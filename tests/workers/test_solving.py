"""`solve`'s loop on an expression that is a number: halved and lowered until it is 1."""

from __future__ import annotations

import numpy as np
import pytest

from distributed_muzero.algorithm.acting import Game
from distributed_muzero.config import SearchConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.networks.base import FunctionNetworks
from distributed_muzero.networks.inference import make_search_model
from distributed_muzero.workers.solving import MAX_NODES, WIDTHS, room_for, solve

HALVE, LOWER = 0, 1
RULES = ("halve", "lower")


class Numbers:
    """One node, the number itself. A game is won at 1 and lost after `max_moves`."""

    spec = EnvironmentSpec("numbers", (1, 1), np.dtype(np.float32), (1, 2))
    truncated = False

    def __init__(self, start, max_moves=10):
        self.start, self.max_moves = start, max_moves

    def initial_state(self, seed=None):
        self.number, self.num_moves = self.start, 0
        return self._show()

    def step(self, action):
        self.number = self.number // 2 if action == HALVE else self.number - 1
        self.num_moves += 1
        return float(self.won), self._show(), self.end is not None

    def mask(self):
        return np.array([[self.number % 2 == 0, True]])

    def to_play(self):
        return 0

    def close(self):
        pass

    @property
    def won(self):
        return self.number == 1

    @property
    def end(self):
        return "won" if self.won else "moves" if self.num_moves == self.max_moves else None

    @property
    def written(self):
        return str(self.number)

    def read_action(self, action):
        return RULES[action], 0

    def part(self, action):
        return str(self.number)

    def _show(self):
        return np.array([[self.number]], np.float32)


def rules_themselves():
    """A model that knows the numbers; halving an odd one gives a fraction, which never gets to 1."""
    return make_search_model(
        FunctionNetworks(
            lambda o: o[:, -1, 0].float(),
            lambda s, a: (after(s, a) == 1).float(),
            lambda s, a: after(s, a)[:, None],
            lambda s: 0 * s[:, 0],
            lambda s: s.new_zeros(len(s), 2),
        )
    )


def after(s, a):
    return (s[:, 0] / 2) * (a == HALVE) + (s[:, 0] - 1) * (a == LOWER)


def steps_of(env, policy="muzero", with_trees=False, **search):
    game = Game(env, 1, seed=0)
    config = SearchConfig(policy=policy, num_simulations=60, **search)
    return list(solve(game, rules_themselves(), config, 0.9, with_trees))


@pytest.mark.parametrize("policy", ["muzero", "gumbel"])
def test_each_step_says_what_was_done_where_and_what_came_of_it(policy):
    env = Numbers(5)
    steps = steps_of(env, policy)
    # From 2, both rules lead to 1.
    assert [step.rule for step in steps[:2]] == ["lower", "halve"]
    assert [(step.node, step.expression) for step in steps] == [("5", "4"), ("4", "2"), ("2", "1")]
    assert env.won
    values = [step.value for step in steps]
    assert values == sorted(values) and values[0] > 0  # the nearer the end, the more is expected
    assert all(step.tree == [] for step in steps)


def test_it_ends_where_the_environment_ends_it():
    env = Numbers(1000, max_moves=3)
    assert len(steps_of(env)) == 3
    assert not env.won and env.end == "moves"


@pytest.mark.parametrize("limits", [{}, {"max_interior_actions": 1}])
def test_the_tree_holds_what_was_visited_most_level_by_level(limits):
    first = steps_of(Numbers(4), with_trees=True, **limits)[0]
    assert {branch.action for branch in first.tree} == {"halve at 0: 4", "lower at 0: 4"}
    assert sum(branch.visits for branch in first.tree) == 60
    assert sum(branch.prior for branch in first.tree) == pytest.approx(1)
    assert first.tree[0].action.startswith(first.rule) or first.tree[0].visits == first.tree[1].visits
    level, names = first.tree, ("halve at 0", "lower at 0")
    for width in WIDTHS[1:]:
        assert [branch.visits for branch in level] == sorted((b.visits for b in level), reverse=True)
        level = level[0].branches
        assert 0 < len(level) <= width and all(branch.action in names for branch in level)
    assert all(branch.branches == [] for branch in level)


@pytest.mark.parametrize(
    ("num_nodes", "own", "expected"), [(5, 48, 48), (30, 48, 60), (100, 48, MAX_NODES), (90, 150, 150)]
)
def test_a_long_problem_gets_room(num_nodes, own, expected):
    class Problem(Numbers):
        def __init__(self, max_nodes):
            assert max_nodes == max(own, MAX_NODES)  # the most that there can be, to count them

        def initial_state(self, seed=None):
            return np.repeat([[1.0], [0.0]], [num_nodes, 3], axis=0)

    assert room_for(Problem, own) == expected
