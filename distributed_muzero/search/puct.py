"""MuZero's selection rule:  argmax_a  Q̄(s,a) + P(s,a) · c(N) / (1 + n(a))   (MuZero paper, appendix B).

c(N) = √N · (pb_c_init + log((N + pb_c_base + 1) / pb_c_base)),  N the node's visits with its own expansion.
The first of equal scores wins.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable
from numpy.typing import DTypeLike

from distributed_muzero.search.qtransforms import between_bounds, parent_and_siblings


def exploration_table(
    num_simulations: int, pb_c_init: float, pb_c_base: float, dtype: DTypeLike
) -> np.ndarray:
    """[num_simulations + 2] c(N) for each visit count that can be met: no root or logarithm in the loop."""
    visits = np.arange(num_simulations + 2, dtype=np.float64)
    table = np.sqrt(visits) * (pb_c_init + np.log((visits + pb_c_base + 1) / pb_c_base))
    return table.astype(dtype)


@register_jitable(forceinline=True)
def select_parent_and_siblings(nodes, edges, q_bounds, table, row, node):
    """The action to follow from `node`, Q normalised within the node."""
    shift, scale = parent_and_siblings(nodes, edges, row, node)
    return _argmax_score(edges, row, node, shift, scale, table[nodes[row, node].visits])


@register_jitable(forceinline=True)
def select_between_bounds(nodes, edges, q_bounds, table, row, node):
    """The action to follow from `node`, Q normalised by the row's bounds."""
    shift, scale = between_bounds(q_bounds, row)
    return _argmax_score(edges, row, node, shift, scale, table[nodes[row, node].visits])


@register_jitable(forceinline=True)
def _argmax_score(edges, row, node, shift, scale, exploration):
    zero, one = type(shift)(0), type(shift)(1)
    best_action, best_score = 0, type(shift)(-np.inf)
    for action in range(edges.shape[2]):
        edge = edges[row, node, action]
        exploitation = (edge.qvalue - shift) * scale if edge.visits > 0 else zero
        score = exploitation + edge.prior * exploration / (type(shift)(edge.visits) + one)
        if score > best_score:
            best_action, best_score = action, score
    return best_action
