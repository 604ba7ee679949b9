"""The search trees of a batch: one record a node, one record an edge, rows independent.

    nodes [B, N]      node 0 is the root; node i + 1 is the one that simulation i expanded
    edges [B, N, A]   what selection reads for each action of a node, side by side in memory

Two arrays of records rather than a dozen plain ones: an edge is 16 bytes in float32, so the edges of a
small node share a cache line; and a compiled call takes two arguments, where handing over twelve costs more
than the simulation itself at batch 1. The named columns (`tree.node_visits`, `tree.children_index`, …) are views of the
records or derived from them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable
from numpy.typing import DTypeLike

ROOT = 0
NONE = -1  # no parent, no child yet


class Tree(NamedTuple):
    nodes: np.ndarray  # [B, N] of node_dtype
    edges: np.ndarray  # [B, N, A] of edge_dtype

    @property
    def node_visits(self) -> np.ndarray:
        """[B, N] 1 at expansion, then one for each return backed up through the node."""
        return self.nodes["visits"]

    @property
    def node_values(self) -> np.ndarray:
        """[B, N] mean of the node's network value and all returns backed up to it."""
        return self.nodes["value"]

    @property
    def raw_values(self) -> np.ndarray:
        """[B, N] the network's value, untouched by the search."""
        return self.nodes["raw_value"]

    @property
    def parents(self) -> np.ndarray:
        """[B, N] node index, -1 at the root and at nodes not made."""
        return self.nodes["parent"]

    @property
    def action_from_parent(self) -> np.ndarray:
        """[B, N] the action that leads here, -1 at the root and at nodes not made."""
        return self.nodes["action"]

    @property
    def children_index(self) -> np.ndarray:
        """[B, N, A] node index of the child, -1 where the edge was never taken."""
        return self.edges["child"]

    @property
    def children_visits(self) -> np.ndarray:
        """[B, N, A] how often each edge was taken."""
        return self.edges["visits"]

    @property
    def qvalues(self) -> np.ndarray:
        """[B, N, A] reward + discount · value(child), 0 where unvisited."""
        return self.edges["qvalue"]

    @property
    def priors(self) -> np.ndarray:
        """[B, N, A] softmax of the prior logits (with the root's noise); 0 where forbidden."""
        return np.maximum(self.edges["prior"], 0)

    @property
    def children_values(self) -> np.ndarray:
        """[B, N, A] value of each child, 0 where unvisited."""
        return self._of_children("value")

    @property
    def children_rewards(self) -> np.ndarray:
        """[B, N, A] reward of each edge, 0 where unvisited."""
        return self._of_children("reward")

    @property
    def children_discounts(self) -> np.ndarray:
        """[B, N, A] discount of each edge, 0 where unvisited."""
        return self._of_children("discount")

    def _of_children(self, field: str) -> np.ndarray:
        rows = np.arange(len(self.nodes))[:, None, None]
        children = self.children_index
        return np.where(children == NONE, 0, self.nodes[field][rows, children])


@lru_cache
def record_dtypes(dtype: np.dtype) -> tuple[np.dtype, np.dtype]:
    """(node, edge) records whose numbers are of the float type `dtype`."""
    node = [
        ("parent", np.int32),
        ("action", np.int32),
        ("visits", np.int32),
        ("value", dtype),
        ("raw_value", dtype),
        ("reward", dtype),  # of the edge that leads here
        ("discount", dtype),  # of the edge that leads here
    ]
    edge = [("child", np.int32), ("visits", np.int32), ("qvalue", dtype), ("prior", dtype)]
    return np.dtype(node, align=True), np.dtype(edge, align=True)


def make_tree(batch: int, num_actions: int, num_simulations: int, dtype: DTypeLike) -> Tree:
    """Trees with room for one node a simulation and nothing in them yet, not even the roots."""
    node_dtype, edge_dtype = record_dtypes(np.dtype(dtype))
    nodes = np.zeros((batch, num_simulations + 1), node_dtype)
    edges = np.zeros((batch, num_simulations + 1, num_actions), edge_dtype)
    nodes["parent"] = NONE
    nodes["action"] = NONE
    edges["child"] = NONE
    return Tree(nodes, edges)


@register_jitable(forceinline=True)
def write_priors(edges, row, node, prior_logits):
    """Softmax of one row of logits into the node's edges. False for NaN, +inf, or nothing but −inf."""
    num_actions = prior_logits.shape[1]
    highest = prior_logits[row, 0]
    for action in range(1, num_actions):
        highest = max(highest, prior_logits[row, action])
    total = highest - highest
    for action in range(num_actions):
        weight = np.exp(prior_logits[row, action] - highest)
        edges[row, node, action].prior = weight
        total += weight
    scale = 1 / total
    for action in range(num_actions):
        edges[row, node, action].prior *= scale
    return np.isfinite(total)


@register_jitable(forceinline=True)
def attach(nodes, row, parent, action, child, value, reward, discount):
    """Writes what the model said about a child. One that exists (met again at max_depth) is valued afresh.

    Its visit count stays, as in mctx; only its running mean restarts from the network's new value.
    """
    node = nodes[row, child]
    node.parent = parent
    node.action = action
    node.visits += 1
    node.value = value
    node.raw_value = value
    node.reward = reward
    node.discount = discount


@register_jitable(forceinline=True)
def backup(nodes, edges, q_bounds, track_bounds, row, leaf):
    """Carries the leaf's value to the root:  G ← reward + discount · G  at each edge, a mean at each node.

    With `track_bounds`, q_bounds[row] widens to hold the new value of every edge on the way.
    Returns the root's G. It isn't finite if anything on the path wasn't, which saves checking each input.
    """
    node = leaf
    returns = nodes[row, leaf].value
    while node != ROOT:
        child = nodes[row, node]
        parent = child.parent
        qvalue = child.reward + child.discount * child.value
        edge = edges[row, parent, child.action]
        edge.child = node
        edge.visits += 1
        edge.qvalue = qvalue
        if track_bounds:
            q_bounds[row, 0] = min(q_bounds[row, 0], qvalue)
            q_bounds[row, 1] = max(q_bounds[row, 1], qvalue)
        returns = child.reward + child.discount * returns
        above = nodes[row, parent]
        visits = above.visits
        above.value = (above.value * visits + returns) / (visits + 1)
        above.visits = visits + 1
        node = parent
    return returns
