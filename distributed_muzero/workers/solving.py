"""A problem rewritten step by step by a run's networks, greedily and without noise, until its game is over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from distributed_muzero.algorithm.acting import Game, decide
from distributed_muzero.config import SearchConfig
from distributed_muzero.environments.base import Environment, Winnable
from distributed_muzero.networks.inference import SearchModel
from distributed_muzero.search.tree import ROOT, Tree

MAX_NODES = 128  # that an expression may grow to, unless the run itself had room for more
GROWTH = 2  # room for so many times the problem's nodes: some rules make an expression longer before it gets shorter
WIDTHS = (4, 2, 2)  # actions that are told of a search tree, level by level


class Rewriting(Environment, Winnable, Protocol):
    """An environment in which rules are applied to the nodes of an expression."""

    @property
    def written(self) -> str:
        """The expression as it is now, with brackets wherever it could be read in two ways."""

    @property
    def end(self) -> str | None:
        """Why the game is over; None before that, and where it was cut."""

    def read_action(self, action: int) -> tuple[str, int]:
        """The rule's name and the number of the node; of any flat action, legal or not."""

    def part(self, action: int) -> str:
        """The part of the expression that a legal action changes."""


class Branch(NamedTuple):
    """An action that a search tried."""

    action: str
    visits: int
    prior: float
    qvalue: float
    branches: list[Branch]  # the most visited actions behind it


class Step(NamedTuple):
    rule: str
    node: str  # the part of the expression that it changed
    expression: str  # that came of it
    value: float  # the search's, of the expression before
    tree: list[Branch]  # of the search, from the root; empty unless asked for


def solve(
    game: Game, model: SearchModel, search: SearchConfig, discount: float, with_trees: bool = False
) -> Iterator[Step]:
    """Plays a game in a Rewriting environment to its end, and tells each step when it is made.

    with_trees: whether each step holds the search behind it.
    What came of it, the environment knows: `won`, `end`, `written`.
    """
    env: Rewriting = game.env
    rng = np.random.default_rng(0)
    while not game.is_over:
        made = decide([game], model, search, discount, 0.0, noise=False, rng=rng)
        action = int(made.actions[0])
        (rule, _), part = env.read_action(action), env.part(action)
        tree = root_branches(env, made.tree) if with_trees else []
        game.move(action)
        yield Step(rule, part, env.written, float(made.result.root_values[0]), tree)


def root_branches(env: Rewriting, tree: Tree) -> list[Branch]:
    """The tree of a search for one game, whose position the environment is in: what was visited most, level by level.

    Below the root are the model's own positions, of which there is no text: a node has its number only.
    """
    visits, priors, qvalues, children = (
        part[0] for part in (tree.children_visits, tree.priors, tree.qvalues, tree.children_index)
    )  # [N, A] each

    def name(action: int, is_root: bool) -> str:
        rule, token = env.read_action(action)
        return f"{rule} at {token}{f': {env.part(action)}' if is_root else ''}"

    def branches(node: int, widths: Sequence[int]) -> list[Branch]:
        if not widths:
            return []
        most_visited = np.argsort(-visits[node], kind="stable")[: widths[0]].tolist()
        return [
            Branch(
                name(action, node == ROOT),
                int(visits[node, action]),
                float(priors[node, action]),
                float(qvalues[node, action]),
                branches(int(children[node, action]), widths[1:]),
            )
            for action in most_visited
            if visits[node, action] > 0
        ]

    return branches(ROOT, WIDTHS)


def room_for(make_env: Callable[[int], Environment], own_max_nodes: int) -> int:
    """The `max_nodes` for an environment of one problem: what the run had, or more where the problem is long.

    make_env: from max_nodes.   Raises EnvironmentFailure for a problem that MAX_NODES are too few for.
    """
    most = max(own_max_nodes, MAX_NODES)
    env = make_env(most)
    try:
        num_nodes = int(np.count_nonzero(env.initial_state(0)[:, 0]))
    finally:
        env.close()
    return min(max(own_max_nodes, GROWTH * num_nodes), most)
