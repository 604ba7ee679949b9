"""Mathy's expressions as observations [L, C]: a row for each node, in order, and what the game's rewards depend on."""

from __future__ import annotations

import math

from mathy_core import expressions as ex
from mathy_core.rule import BaseRule
from mathy_envs.state import MathyEnvState

from distributed_muzero.environments.base import TokenColumn
from distributed_muzero.environments.mathy_moves import Tree
from distributed_muzero.environments.mathy_rewards import MAX_VISITS

OTHER = 11  # a function; 0 is no token
TOKENS: dict[type[ex.MathExpression], int] = {
    ex.ConstantExpression: 1,
    ex.VariableExpression: 2,
    ex.AddExpression: 3,
    ex.SubtractExpression: 4,
    ex.MultiplyExpression: 5,
    ex.DivideExpression: 6,
    ex.PowerExpression: 7,
    ex.EqualExpression: 8,
    ex.NegateExpression: 9,
    ex.FactorialExpression: 10,
}
NUM_SMALL = 32  # constants from 0 to 31 have a category each, all others share one
MAX_LOG = 700.0
DEPTH_UNIT = 10.0
MOVES_UNIT = 20.0
HASH_SIZE = 32
OF_TOKENS = (
    TokenColumn("token", "category", OTHER + 1),
    TokenColumn("letter", "category", 27, links=True),  # 0 = no variable; X is x
    TokenColumn("log_constant", "number"),  # sign(v) · log(1 + |v|), 0 = no constant
    TokenColumn(
        "small_constant", "category", NUM_SMALL + 2
    ),  # 0 = no constant, v + 1, the last one = another
    TokenColumn("depth", "number"),
    TokenColumn("side", "category", 3),  # root, left, right
    TokenColumn("parent", "index"),
    TokenColumn("left", "index"),
    TokenColumn("right", "index"),
)
OF_THE_GAME = (
    TokenColumn("time", "number", shared=True),  # the fraction of moves used
    TokenColumn("moves_left", "number", shared=True),
    TokenColumn("visits", "number", shared=True),  # of this expression so far
    TokenColumn("type_hash_1", "category", HASH_SIZE, shared=True),
    TokenColumn("type_hash_2", "category", HASH_SIZE, shared=True),
)


def columns_of(rules: list[BaseRule]) -> tuple[TokenColumn, ...]:
    """What is seen: of a token; then for each rule, whether it can be applied to it now (1 or more), and how often what
    that leads to has been there in this game (visits + 1), as rewards depend on it; then of the game."""
    can_apply = (TokenColumn(f"can_{rule.code.lower()}", "category", 1 + MAX_VISITS) for rule in rules)
    return (*OF_TOKENS, *can_apply, *OF_THE_GAME)


def in_order(root: ex.MathExpression) -> tuple[Tree, list[int]]:
    """The nodes from left to right, as mathy's masks and actions count them, and their depths, the root's being 0.

    Each node gets its number as `r_index`.
    """
    nodes: Tree = []
    depths: list[int] = []
    above: list[tuple[ex.MathExpression, int]] = []
    node: ex.MathExpression | None = root
    depth = 0
    while above or node is not None:
        while node is not None:
            above.append((node, depth))
            node, depth = node.left, depth + 1
        node, depth = above.pop()
        node.r_index = len(nodes)
        nodes.append(node)
        depths.append(depth)
        node, depth = node.right, depth + 1
    return nodes, depths


def describe_nodes(nodes: Tree, depths: list[int]) -> list[tuple[float, ...]]:
    """[n, len(OF_TOKENS)]: a row for each node of `in_order`."""
    return [
        (TOKENS.get(type(node), OTHER), *_describe_leaf(node), depth / DEPTH_UNIT, *_describe_links(node))
        for node, depth in zip(nodes, depths, strict=True)
    ]


def describe_game(state: MathyEnvState, visits: int) -> list[float]:
    """[len(OF_THE_GAME)]"""
    left = state.agent.moves_remaining
    return [
        1 - left / state.max_moves,
        left / MOVES_UNIT,
        min(visits, MAX_VISITS) / MAX_VISITS,
        *hash_type(state),
    ]


def hash_type(state: MathyEnvState) -> list[int]:
    """Two of mathy's hashes of the problem's type, from 0 to 1, as categories. They differ between all its topics."""
    return [int(part * 2**16) % HASH_SIZE for part in state.get_problem_hash()[:2]]


def _describe_leaf(node: ex.MathExpression) -> tuple[float, float, float]:
    """letter, log_constant, small_constant"""
    if type(node) is ex.VariableExpression:
        return ord(node.identifier.lower()) - ord("a") + 1, 0.0, 0
    if type(node) is not ex.ConstantExpression:
        return 0, 0.0, 0
    value = node.value
    size = min(math.log(1 + abs(value)), MAX_LOG)  # whole numbers may be too large for a float
    is_small = 0 <= value < NUM_SMALL and value == int(value)
    return 0, size if value >= 0 else -size, int(value) + 1 if is_small else NUM_SMALL + 1


def _describe_links(node: ex.MathExpression) -> tuple[int, int, int, int]:
    """side, parent, left, right"""
    left, right, parent = node.left, node.right, node.parent
    children = (-1 if left is None else left.r_index, -1 if right is None else right.r_index)
    if parent is None:
        return 0, -1, *children
    return 1 if parent.left is node else 2, parent.r_index, *children
