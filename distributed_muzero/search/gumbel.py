"""Gumbel MuZero's rules (Danihelka et al., "Policy improvement by planning with Gumbel", 2022; details as in mctx).

    root       argmax  g(a) + logit(a) + σ(a)   over the actions that sequential halving asks for next
    interior   argmax  π'(a) − n(a) / (1 + Σ n)
    policy     π' = softmax(logit + σ)
    value      σ(a) = (maxvisit_init + max n) · value_scale · q̂(a)

q̂, the completed Q, is Q(a) where a was visited. Elsewhere it is what the node itself is worth: its network value and
the visited actions' Q, these weighted by the prior. The first of equal scores wins.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba.extending import register_jitable

from distributed_muzero.config import SearchConfig
from distributed_muzero.search.qtransforms import EPSILON
from distributed_muzero.search.tree import NONE, ROOT, Tree

SMALLEST_PRIOR = 1e-37  # of a visited action, so that priors of 0 can be averaged with


def make_settings(
    tree: Tree,
    root_logits: np.ndarray,
    legal_mask: np.ndarray,
    root_gumbel: np.ndarray,
    num_simulations: int,
    config: SearchConfig,
) -> tuple[Any, ...]:
    """What the rules read, for roots that `plant_roots` has accepted; numbers are of root_logits' [B, A] float type.

    A plain tuple, as compiled calls take it quicker than a named one, and a cache of kernels survives changes of it:
        root_scores    [B, R] g(a) + logit(a) − the row's highest legal logit, by slot; −inf where forbidden
        visits_due     [B, num_simulations] int32, visits so far of the action that each simulation takes
        weights        [slots] room for one node's policy
        constants      value_scale, maxvisit_init, rescale_values, use_mixed_value
    """
    logits = np.where(legal_mask, root_logits, -np.inf)
    number = logits.dtype.type
    most_considered = min(config.max_num_considered_actions, legal_mask.shape[1])
    num_considered = np.minimum(legal_mask.sum(axis=1), most_considered)
    scores = (logits - logits.max(axis=1, keepdims=True) + root_gumbel).astype(logits.dtype)
    return (
        tree.by_slot(scores, -np.inf),
        visits_due(most_considered, num_simulations)[num_considered - 1],
        np.empty(tree.edges.shape[2], logits.dtype),
        (
            number(config.value_scale),
            number(config.maxvisit_init),
            config.rescale_values,
            config.use_mixed_value,
        ),
    )


@lru_cache
def visits_due(most_considered: int, num_simulations: int) -> np.ndarray:
    """[most_considered, num_simulations] int32, read-only: row m − 1 is the schedule for m considered actions."""
    schedules = [_halving(number, num_simulations) for number in range(1, most_considered + 1)]
    table = np.array(schedules, np.int32)
    table.flags.writeable = False
    return table


def _halving(num_considered: int, num_simulations: int) -> list[int]:
    """Sequential halving, as the visits that the next action must have had.

    There are ⌈log₂ m⌉ phases of about equal length. Each visits all that remain equally often; then the better half
    remains, until two are left. These two share what simulations rounding has left over.
    """
    if num_considered == 1:
        return list(range(num_simulations))
    num_phases = (num_considered - 1).bit_length()
    due: list[int] = []
    visits, remaining = 0, num_considered
    while len(due) < num_simulations:
        rounds = max(1, num_simulations // (num_phases * remaining))
        for _ in range(rounds):
            due += [visits] * remaining
            visits += 1
        remaining = max(2, remaining // 2)
    return due[:num_simulations]


@register_jitable(forceinline=True)
def select_root(nodes, edges, q_bounds, settings, row, node):
    """The root's next action, by sequential halving."""
    _, due, _, _ = settings
    return _best_root_action(nodes, edges, settings, row, due[row, nodes[row, node].visits - 1])


@register_jitable(forceinline=True)
def select_interior(nodes, edges, q_bounds, settings, row, node):
    """The action whose share of the visits lies farthest below the improved policy; no chance is in it."""
    _, _, weights, _ = settings
    total = _improve(nodes, edges, settings, row, node, weights)
    visits = type(total)(nodes[row, node].visits)
    best_action, best_score = 0, type(total)(-np.inf)
    for action in range(edges.shape[2]):
        score = weights[action] / total - type(total)(edges[row, node, action].visits) / visits
        if score > best_score:
            best_action, best_score = action, score
    return best_action


def answers(tree: Tree, settings: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    """After the search: π' [B, A] of each root, exactly 0 where forbidden, and the action [B] that halving has ended
    with."""
    edges = tree.root_edges
    weights = np.empty((len(edges), edges.shape[2]), edges.dtype["prior"])
    slots = np.empty(len(edges), np.int64)
    write_answers(tree.nodes, edges, settings, weights, slots)
    return tree.by_action(weights), tree.root_actions(slots)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def write_answers(nodes, edges, settings, action_weights, actions):
    """What `answers` tells, by slot."""
    num_rows, _, num_actions = edges.shape
    for row in range(num_rows):
        total = _improve(nodes, edges, settings, row, ROOT, action_weights[row])
        most_visits = 0
        for action in range(num_actions):
            action_weights[row, action] /= total
            most_visits = max(most_visits, edges[row, ROOT, action].visits)
        actions[row] = _best_root_action(nodes, edges, settings, row, most_visits)


@register_jitable(forceinline=True)
def _best_root_action(nodes, edges, settings, row, visits):
    """Of the legal actions with that many visits, the one of the best g + logit + σ. There always is one."""
    root_scores, _, _, _ = settings
    unvisited, highest, scale = _completed(nodes, edges, settings, row, ROOT)
    best_action, best_score = NONE, type(scale)(-np.inf)
    for action in range(edges.shape[2]):
        edge = edges[row, ROOT, action]
        if edge.visits == visits and edge.prior >= 0:
            qvalue = edge.qvalue if edge.visits > 0 else unvisited
            score = root_scores[row, action] + (qvalue - highest) * scale
            if best_action == NONE or score > best_score:
                best_action, best_score = action, score
    return best_action


@register_jitable(forceinline=True)
def _improve(nodes, edges, settings, row, node, weights):
    """Writes P(a) · exp(σ(a)), but for one factor, to weights [A], 0 where forbidden. Returns their sum, above 0."""
    unvisited, highest, scale = _completed(nodes, edges, settings, row, node)
    growth_of_unvisited = _exp((unvisited - highest) * scale)
    total = type(scale)(0)
    for action in range(edges.shape[2]):
        edge = edges[row, node, action]
        weights[action] = 0
        if edge.prior > 0:
            growth = _exp((edge.qvalue - highest) * scale) if edge.visits > 0 else growth_of_unvisited
            weights[action] = edge.prior * growth
            total += weights[action]
    return total


@register_jitable(forceinline=True)
def _exp(difference):
    """exp(difference); a node's best action differs by 0, and needs no computing."""
    return np.exp(difference) if difference != 0 else type(difference)(1)


@register_jitable(forceinline=True)
def _completed(nodes, edges, settings, row, node):
    """(q̂ of an action without visits, highest q̂, scale):  σ(a) = (q̂(a) − highest) · scale, but for a constant.

    The highest is taken over the actions with P > 0, so that their exp(σ) neither grow without bound nor vanish all.
    Where values are rescaled, the scale counts all actions of the node, a root's forbidden ones among them.
    """
    _, _, _, (value_scale, maxvisit_init, rescale_values, use_mixed_value) = settings
    unvisited = nodes[row, node].raw_value
    low, high, highest = type(unvisited)(np.inf), type(unvisited)(-np.inf), type(unvisited)(-np.inf)
    total, weighted = type(unvisited)(0), type(unvisited)(0)
    most_visits, some_unvisited, likely_unvisited = 0, False, False
    for action in range(edges.shape[2]):
        edge = edges[row, node, action]
        if edge.visits == 0:
            some_unvisited = True
            likely_unvisited |= edge.prior > 0
            continue
        most_visits = max(most_visits, edge.visits)
        low, high = min(low, edge.qvalue), max(high, edge.qvalue)
        if edge.prior > 0:
            highest = max(highest, edge.qvalue)
        prior = max(edge.prior, type(unvisited)(SMALLEST_PRIOR))
        total += prior
        weighted += prior * edge.qvalue
    if use_mixed_value and most_visits > 0:
        visits = type(unvisited)(nodes[row, node].visits - 1)
        unvisited = (unvisited + visits * (weighted / total)) / (visits + type(unvisited)(1))
    if likely_unvisited:
        highest = max(highest, unvisited)
    scale = (maxvisit_init + type(unvisited)(most_visits)) * value_scale
    if rescale_values:
        if some_unvisited:
            low, high = min(low, unvisited), max(high, unvisited)
        scale /= max(high - low, type(unvisited)(EPSILON))
    return unvisited, highest, scale
