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
from typing import NamedTuple

import numba
import numpy as np
from numba.extending import register_jitable

from distributed_muzero.config import SearchConfig
from distributed_muzero.search.qtransforms import EPSILON
from distributed_muzero.search.tree import NONE, ROOT

SMALLEST_PRIOR = 1e-37  # of a visited action, so that priors of 0 can be averaged with


class GumbelSettings(NamedTuple):
    """What the rules read. The numbers are of the tree's float type."""

    root_scores: np.ndarray  # [B, A] g(a) + logit(a) − the row's highest legal logit; −inf where forbidden
    visits_due: (
        np.ndarray
    )  # [B, num_simulations] int32, visits so far of the action that each simulation takes
    value_scale: np.floating
    maxvisit_init: np.floating
    rescale_values: bool
    use_mixed_value: bool


def make_settings(
    root_logits: np.ndarray,
    legal_mask: np.ndarray,
    root_gumbel: np.ndarray,
    num_simulations: int,
    config: SearchConfig,
) -> GumbelSettings:
    """For roots that `plant_roots` has accepted. root_logits: [B, A], in the tree's float type; so is root_gumbel."""
    logits = np.where(legal_mask, root_logits, -np.inf)
    number = logits.dtype.type
    most_considered = min(config.max_num_considered_actions, legal_mask.shape[1])
    num_considered = np.minimum(legal_mask.sum(axis=1), most_considered)
    return GumbelSettings(
        (logits - logits.max(axis=1, keepdims=True) + root_gumbel).astype(logits.dtype),
        visits_due(most_considered, num_simulations)[num_considered - 1],
        number(config.value_scale),
        number(config.maxvisit_init),
        config.rescale_values,
        config.use_mixed_value,
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
    due = settings.visits_due[row, nodes[row, node].visits - 1]
    return _best_root_action(nodes, edges, settings, row, due)


@register_jitable(forceinline=True)
def select_interior(nodes, edges, q_bounds, settings, row, node):
    """The action whose share of the visits lies farthest below the improved policy; no chance is in it."""
    unvisited, shift, scale = _completed(nodes, edges, settings, row, node)
    highest, total = _normalizer(edges, row, node, unvisited, shift, scale)
    visits = type(total)(nodes[row, node].visits)
    best_action, best_score = 0, type(total)(-np.inf)
    for action in range(edges.shape[2]):
        edge = edges[row, node, action]
        weight = edge.prior * np.exp(_transformed(edge, unvisited, shift, scale) - highest)
        score = weight / total - type(total)(edge.visits) / visits
        if score > best_score:
            best_action, best_score = action, score
    return best_action


@numba.njit(cache=True, nogil=True)
def write_answers(nodes, edges, settings, action_weights, actions):
    """After the search: π' of each root, exactly 0 where forbidden, and the action that halving has ended with."""
    num_rows, _, num_actions = edges.shape
    for row in range(num_rows):
        unvisited, shift, scale = _completed(nodes, edges, settings, row, ROOT)
        highest, total = _normalizer(edges, row, ROOT, unvisited, shift, scale)
        most_visits = 0
        for action in range(num_actions):
            edge = edges[row, ROOT, action]
            most_visits = max(most_visits, edge.visits)
            if edge.prior > 0:
                weight = edge.prior * np.exp(_transformed(edge, unvisited, shift, scale) - highest)
                action_weights[row, action] = weight / total
            else:
                action_weights[row, action] = 0
        actions[row] = _best_root_action(nodes, edges, settings, row, most_visits)


@register_jitable(forceinline=True)
def _best_root_action(nodes, edges, settings, row, visits):
    """Of the legal actions with that many visits, the one of the best g + logit + σ. There always is one."""
    unvisited, shift, scale = _completed(nodes, edges, settings, row, ROOT)
    best_action, best_score = NONE, type(shift)(-np.inf)
    for action in range(edges.shape[2]):
        edge = edges[row, ROOT, action]
        if edge.visits == visits and edge.prior >= 0:
            score = settings.root_scores[row, action] + _transformed(edge, unvisited, shift, scale)
            if best_action == NONE or score > best_score:
                best_action, best_score = action, score
    return best_action


@register_jitable(forceinline=True)
def _completed(nodes, edges, settings, row, node):
    """(unvisited, shift, scale): q̂ of an action without visits, and σ(a) = (q̂(a) − shift) · scale.

    With rescale_values, q̂ is brought to 0 … 1 over all actions of the node, a root's forbidden ones among them.
    """
    unvisited = nodes[row, node].raw_value
    lowest, highest = type(unvisited)(np.inf), type(unvisited)(-np.inf)
    total, weighted = type(unvisited)(0), type(unvisited)(0)
    most_visits, num_visited, num_actions = 0, 0, edges.shape[2]
    for action in range(num_actions):
        edge = edges[row, node, action]
        if edge.visits > 0:
            num_visited += 1
            most_visits = max(most_visits, edge.visits)
            lowest, highest = min(lowest, edge.qvalue), max(highest, edge.qvalue)
            prior = max(edge.prior, type(unvisited)(SMALLEST_PRIOR))
            total += prior
            weighted += prior * edge.qvalue
    if settings.use_mixed_value and num_visited > 0:
        visits = type(unvisited)(nodes[row, node].visits - 1)
        unvisited = (unvisited + visits * (weighted / total)) / (visits + type(unvisited)(1))
    scale = (settings.maxvisit_init + type(unvisited)(most_visits)) * settings.value_scale
    if not settings.rescale_values:
        return unvisited, type(unvisited)(0), scale
    if num_visited < num_actions:
        lowest, highest = min(lowest, unvisited), max(highest, unvisited)
    return unvisited, lowest, scale / max(highest - lowest, type(unvisited)(EPSILON))


@register_jitable(forceinline=True)
def _transformed(edge, unvisited, shift, scale):
    """σ of one action."""
    return ((edge.qvalue if edge.visits > 0 else unvisited) - shift) * scale


@register_jitable(forceinline=True)
def _normalizer(edges, row, node, unvisited, shift, scale):
    """(m, Σ P(a) · exp(σ(a) − m)) over the actions with P > 0, m the highest σ among them: the sum is above 0."""
    highest, total = type(shift)(-np.inf), type(shift)(0)
    for action in range(edges.shape[2]):
        edge = edges[row, node, action]
        if edge.prior > 0:
            highest = max(highest, _transformed(edge, unvisited, shift, scale))
    for action in range(edges.shape[2]):
        edge = edges[row, node, action]
        if edge.prior > 0:
            total += edge.prior * np.exp(_transformed(edge, unvisited, shift, scale) - highest)
    return highest, total
