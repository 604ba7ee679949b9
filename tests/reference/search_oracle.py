"""MuZero's search, slow and plain: one root at a time, objects and lists, no numba, everything computed anew.

It is written to be read next to the paper, and to disagree with the fast search if either is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Answer(NamedTuple):
    """The model's words about one edge and the state that it leads to."""

    state: int
    reward: float
    discount: float
    value: float
    logits: Sequence[float]


Model = Callable[[int, int], Answer]  # (state, action) → Answer
Select = Callable[["Search", "Node"], int]


class Settings(NamedTuple):
    num_simulations: int
    q_normalization: str = "parent_and_siblings"
    min_max_bounds: tuple[float, float] = (-1.0, 1.0)
    max_depth: int | None = None
    pb_c_init: float = 1.25
    pb_c_base: float = 19652.0
    max_interior_actions: int | None = None


@dataclass
class Edge:
    child: Node
    reward: float
    discount: float
    visits: int = 0

    @property
    def qvalue(self) -> float:
        return self.reward + self.discount * self.child.value


@dataclass
class Node:
    index: int  # of the simulation that made it, counted from 1; 0 = root
    state: int
    raw_value: float
    priors: list[float]
    actions: list[int]  # that are considered here, in rising order; a root's forbidden ones among them
    visits: int = 1
    total: float = 0.0  # of everything that `value` is the mean of
    edges: dict[int, Edge] = field(default_factory=dict)

    @property
    def value(self) -> float:
        return self.total / self.visits


@dataclass
class Search:
    """One root's search. `nodes` are in the order they were made; `margin` is the closest decision, ties aside,
    or the narrowest spread that values were brought to."""

    nodes: list[Node]
    legal: Sequence[bool]
    settings: Settings
    select: Select
    margin: float = math.inf
    lowest: float = math.inf  # of all edge values written by any backup
    highest: float = -math.inf

    @property
    def root(self) -> Node:
        return self.nodes[0]


def search_one(
    root_state: int,
    root_value: float,
    root_priors: list[float],
    legal: Sequence[bool],
    model: Model,
    settings: Settings,
    select: Select | None = None,
) -> Search:
    """`select` says which action to follow from a node; MuZero's PUCT if it is left out."""
    root = Node(0, root_state, root_value, root_priors, list(range(len(root_priors))), total=root_value)
    search = Search([root], legal, settings, select or select_puct)
    for simulation in range(settings.num_simulations):
        path = _descend(search)
        leaf = _expand(search, *path[-1], model, simulation + 1)
        _backup(search, path, leaf)
    return search


def _descend(search: Search) -> list[tuple[Node, int]]:
    """The (node, action) pairs from the root to the edge that the model is asked about."""
    longest = search.settings.max_depth or search.settings.num_simulations
    node, path = search.root, []
    while True:
        action = search.select(search, node)
        path.append((node, action))
        if action not in node.edges or len(path) == longest:
            return path
        node = node.edges[action].child


def select_puct(search: Search, node: Node) -> int:
    allowed = [a for a in node.actions if node is not search.root or search.legal[a]]
    return best_of(
        search, {a: _normalized(search, node, a) + _bonus(search.settings, node, a) for a in allowed}
    )


def best_of(search: Search, scores: dict[int, float]) -> int:
    """The first action of the best score, actions in rising order; notes how close it was."""
    best = max(scores.values())
    for score in scores.values():
        if score != best:
            search.margin = min(search.margin, best - score)
    return next(action for action, score in scores.items() if score == best)


def _bonus(settings: Settings, node: Node, action: int) -> float:
    visits = node.edges[action].visits if action in node.edges else 0
    growth = math.log((1 + node.visits + settings.pb_c_base) / settings.pb_c_base) + settings.pb_c_init
    return growth * node.priors[action] * math.sqrt(node.visits) / (visits + 1)


def _normalized(search: Search, node: Node, action: int) -> float:
    if action not in node.edges:
        return 0.0
    qvalue = node.edges[action].qvalue
    if search.settings.q_normalization == "parent_and_siblings":
        known = [node.value] + [edge.qvalue for edge in node.edges.values()]
        return (qvalue - min(known)) / max(max(known) - min(known), 1e-8)
    low, high = search.settings.min_max_bounds
    if search.settings.q_normalization == "tree_min_max":
        low, high = search.lowest, search.highest
        if high > low:  # by rounding, perhaps, which this would blow up
            search.margin = min(search.margin, high - low)
    return (qvalue - low) / (high - low) if high > low else qvalue


def _expand(search: Search, parent: Node, action: int, model: Model, index: int) -> Node:
    state, reward, discount, value, logits = model(parent.state, action)
    actions = considered(logits, search.settings.max_interior_actions)
    priors = softmax([logit if a in actions else -math.inf for a, logit in enumerate(logits)])
    if action in parent.edges:  # met again at max_depth: valued afresh, its count goes on
        edge = parent.edges[action]
        node = edge.child
        node.visits += 1
        node.state, node.raw_value, node.total = state, value, value * node.visits
        node.priors, node.actions = priors, actions
        edge.reward, edge.discount = reward, discount
        return node
    node = Node(index, state, value, priors, actions, total=value)
    search.nodes.append(node)
    parent.edges[action] = Edge(node, reward, discount)
    return node


def _backup(search: Search, path: list[tuple[Node, int]], leaf: Node) -> None:
    returns = leaf.value
    for node, action in reversed(path):
        edge = node.edges[action]
        edge.visits += 1
        search.lowest, search.highest = min(search.lowest, edge.qvalue), max(search.highest, edge.qvalue)
        returns = edge.reward + edge.discount * returns
        node.total += returns
        node.visits += 1


def considered(logits: Sequence[float], most: int | None) -> list[int]:
    """The actions of the highest logits in rising order; of equal ones the lower action."""
    best_first = sorted(range(len(logits)), key=lambda action: (-logits[action], action))
    return sorted(best_first[:most])


def softmax(logits: Sequence[float]) -> list[float]:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def root_priors(
    logits: np.ndarray, legal: np.ndarray, fraction: float, alpha: float, rng: np.random.Generator
) -> list[list[float]]:
    """P of all roots [B, A], with Dirichlet noise over the legal actions if fraction > 0.

    Two draws for the whole batch, in this order, make the Gamma(α) variates: Gamma(α + 1), then exponentials.
    """
    noise = np.zeros_like(logits)
    if fraction > 0:
        bases = rng.standard_gamma(alpha + 1, logits.shape)
        noise = bases * np.exp(-rng.standard_exponential(logits.shape)) ** (1 / alpha)
    priors = []
    for row in range(len(logits)):
        prior = [0.0] * logits.shape[1]
        allowed = np.flatnonzero(legal[row])
        for share, action in zip(softmax(logits[row][allowed]), allowed, strict=True):
            drawn = noise[row, action] / noise[row, allowed].sum() if fraction > 0 else 0.0
            prior[action] = float((1 - fraction) * share + fraction * drawn)
        priors.append(prior)
    return priors
