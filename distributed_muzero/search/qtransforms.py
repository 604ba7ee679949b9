"""How action values are brought to the prior's scale before PUCT adds them.

Each transform gives (shift, scale); a visited edge then scores (Q − shift) · scale and an unvisited one 0. They are
named because they differ in what they find, not only in how fast: see the contract's list of pitfalls.
"""

from __future__ import annotations

from numba.extending import register_jitable

EPSILON = 1e-8  # a narrower spread than this is taken for no spread


@register_jitable
def parent_and_siblings(nodes, edges, row, node):
    """The spread of one node: lowest and highest of its own value and its visited edges' Q (mctx's transform).

    An unvisited edge stands in with the node's value, so it never widens the spread.
    """
    lowest = highest = nodes[row, node].value
    for action in range(edges.shape[2]):
        edge = edges[row, node, action]
        if edge.visits > 0:
            lowest = min(lowest, edge.qvalue)
            highest = max(highest, edge.qvalue)
    return lowest, 1 / max(highest - lowest, type(lowest)(EPSILON))


@register_jitable
def between_bounds(q_bounds, row):
    """The spread of a whole row, q_bounds[row] = (lowest, highest): fixed (`min_max`) or tracked (`tree_min_max`).

    `tree_min_max` is the MuZero paper's pseudocode in its published variant for known nothing about the game:
    the running extremes over every edge value reward + discount · value(child) that any backup wrote during this
    search (edges, not bare node values; the root's own value is in no edge and does not count; an extreme stays when
    the edge it came from has moved on). While fewer than two different values are known there is no spread, and
    Q is used as it is.
    """
    lowest, highest = q_bounds[row, 0], q_bounds[row, 1]
    if highest > lowest:
        return lowest, 1 / (highest - lowest)
    return type(lowest)(0), type(lowest)(1)
