"""How action values are brought to the prior's scale before PUCT adds them.

Each transform gives (shift, scale): a visited edge scores (Q − shift) · scale, an unvisited one 0. They carry
names because they answer differently, and are not interchangeable.
"""

from __future__ import annotations

from numba.extending import register_jitable

EPSILON = 1e-8  # a narrower spread than this counts as this


@register_jitable(forceinline=True)
def parent_and_siblings(nodes, edges, row, node):
    """The spread of one node: lowest and highest of its own value and its visited edges' Q, as in mctx.

    An unvisited edge stands in with the node's value, so it never widens the spread.
    """
    lowest = highest = nodes[row, node].value
    for action in range(edges.shape[2]):
        edge = edges[row, node, action]
        if edge.visits > 0:
            lowest = edge.qvalue if edge.qvalue < lowest else lowest
            highest = edge.qvalue if edge.qvalue > highest else highest
    return lowest, type(lowest)(1) / max(highest - lowest, type(lowest)(EPSILON))


@register_jitable(forceinline=True)
def between_bounds(q_bounds, row):
    """The spread of a row, q_bounds[row]: fixed (`min_max`) or tracked (`tree_min_max`).

    Tracked, these are the min-max statistics of the MuZero paper's pseudocode with no bounds known beforehand:
    - They hold every edge value reward + discount · value(child) that a backup wrote during this search. So
      the rewards count, where the first published pseudocode took bare node values; the root's value is in no
      edge and does not count.
    - They only ever widen: an extreme stays although its edge has moved on.
    - Until two different values are known there is no spread, and Q is used as it is.
    """
    lowest, highest = q_bounds[row, 0], q_bounds[row, 1]
    if highest > lowest:
        return lowest, type(lowest)(1) / (highest - lowest)
    return type(lowest)(0), type(lowest)(1)
