"""The search trees of a batch: one record a node, one record an edge, rows independent.

    nodes [B, N]      node 0 is the root; node i + 1 is the one that simulation i expanded
    edges [B, N, W]   what selection reads for each action of a node, side by side in memory

Where all actions are considered, an edge's place among its node's, its slot, is its action, and W = A. Where the
actions below the root are limited (`search.max_interior_actions`), W is the limit, the roots' legal actions lie in an
array of their own, and a third part says which action each slot stands for (`Narrow`).

Two arrays of records rather than a dozen plain ones: an edge is 16 bytes in float32, so the edges of a
small node share a cache line; and a compiled call takes two arguments, where handing over twelve costs more
than the simulation itself at batch 1. The named columns (`tree.node_visits`, `tree.children_index`, …) are views of the
records or derived from them; those of edges are by action whatever the slots.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable
from numpy.typing import DTypeLike

ROOT = 0
NONE = -1  # no parent, no child yet, no action in this slot

# The slots of a tree with limited actions, in rising order of their actions, unused ones at the end:
#     root_edges     [B, 1, R] of edge_dtype. R has room for every root's legal actions, and for one forbidden one that
#                    stands for all of them, where there are any: their presence counts, not their number
#     root_choices   [B, 1, R] int32, the action of each slot
#     choices        [B, N, W] int32, the same of all other nodes
# A plain tuple: compiled calls take it quicker than a named one.
Narrow = tuple[np.ndarray, np.ndarray, np.ndarray]


class Tree(NamedTuple):
    nodes: np.ndarray  # [B, N] of node_dtype
    edges: np.ndarray  # [B, N, W] of edge_dtype
    num_actions: int  # A
    narrow: Narrow | None = None  # none: a slot is an action, and W = A

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
    def root_edges(self) -> np.ndarray:
        """[B, N, A] or [B, 1, R] of edge_dtype: the roots' are [:, ROOT]."""
        return self.edges if self.narrow is None else self.narrow[0]

    @property
    def children_index(self) -> np.ndarray:
        """[B, N, A] node index of the child, -1 where the edge was never taken."""
        return self._of_edges("child", NONE)

    @property
    def children_visits(self) -> np.ndarray:
        """[B, N, A] how often each edge was taken."""
        return self._of_edges("visits")

    @property
    def qvalues(self) -> np.ndarray:
        """[B, N, A] reward + discount · value(child), 0 where unvisited."""
        return self._of_edges("qvalue")

    @property
    def priors(self) -> np.ndarray:
        """[B, N, A] softmax of the prior logits (with the root's noise); 0 where forbidden or beyond the limit."""
        return np.maximum(self._of_edges("prior"), 0)

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

    def of_root(self, field: str) -> np.ndarray:
        """[B, A] of the roots' edges: a field that is 0 where nothing was written."""
        return self.by_action(self.root_edges[field][:, ROOT])

    def by_slot(self, of_actions: np.ndarray, unused: float) -> np.ndarray:
        """[B, A] of the roots' actions -> [B, R] of their slots."""
        if self.narrow is None:
            return of_actions
        actions = self.narrow[1][:, ROOT]
        return np.where(actions == NONE, unused, np.take_along_axis(of_actions, actions, 1))

    def by_action(self, of_slots: np.ndarray) -> np.ndarray:
        """[B, R] of the roots' slots -> [B, A] of their actions, 0 where there is no slot."""
        if self.narrow is None:
            return of_slots
        return _scattered(of_slots, self.narrow[1][:, ROOT], self.num_actions, 0)

    def root_actions(self, slots: np.ndarray) -> np.ndarray:
        """[B] a slot of each root -> its action."""
        if self.narrow is None:
            return slots
        return self.narrow[1][np.arange(len(slots)), ROOT, slots].astype(slots.dtype)

    def _of_edges(self, field: str, missing: int = 0) -> np.ndarray:
        if self.narrow is None:
            return self.edges[field]
        root_edges, root_choices, choices = self.narrow
        dense = _scattered(self.edges[field], choices, self.num_actions, missing)
        dense[:, :1] = _scattered(root_edges[field], root_choices, self.num_actions, missing)
        return dense

    def _of_children(self, field: str) -> np.ndarray:
        rows = np.arange(len(self.nodes))[:, None, None]
        children = self.children_index
        return np.where(children == NONE, 0, self.nodes[field][rows, children])


def _scattered(of_slots: np.ndarray, actions: np.ndarray, num_actions: int, missing: int) -> np.ndarray:
    """[..., slots] -> [..., A]; a slot without an action falls into a last column, which is cut off."""
    dense = np.full((*of_slots.shape[:-1], num_actions + 1), missing, of_slots.dtype)
    np.put_along_axis(dense, actions, of_slots, -1)
    return dense[..., :-1]


@lru_cache
def record_dtypes(dtype: np.dtype) -> tuple[np.dtype, np.dtype]:
    """(node, edge) records whose numbers are of the float type `dtype`."""
    node = [
        ("parent", np.int32),
        ("action", np.int32),
        ("slot", np.int32),  # of the edge that leads here, among the parent's
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
    nodes, edges = _make_records(batch, num_simulations + 1, num_actions, np.dtype(dtype))
    return Tree(nodes, edges, num_actions)


def make_narrow_tree(
    legal_mask: np.ndarray, max_interior_actions: int, num_simulations: int, dtype: DTypeLike
) -> Tree:
    """As `make_tree`, with the legal actions [B, A] in the roots' slots, and room for fewer than A below."""
    batch, num_actions = legal_mask.shape
    num_legal = legal_mask.sum(axis=1)
    num_slots = min(num_actions, num_legal.max() + 1)
    nodes, edges = _make_records(batch, num_simulations + 1, max_interior_actions, np.dtype(dtype))
    _, root_edges = _make_records(batch, 1, num_slots, np.dtype(dtype))
    root_choices = np.full((batch, 1, num_slots), NONE, np.int32)
    rows, actions = np.nonzero(legal_mask)
    root_choices[rows, ROOT, np.arange(len(rows)) - (num_legal.cumsum() - num_legal)[rows]] = actions
    choices = np.full(edges.shape, NONE, np.int32)
    return Tree(nodes, edges, num_actions, (root_edges, root_choices, choices))


def _make_records(
    batch: int, num_nodes: int, num_slots: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    node_dtype, edge_dtype = record_dtypes(dtype)
    nodes = np.zeros((batch, num_nodes), node_dtype)
    edges = np.zeros((batch, num_nodes, num_slots), edge_dtype)
    for field in ("parent", "action", "slot"):
        nodes[field] = NONE
    edges["child"] = NONE
    return nodes, edges


# What follows is compiled anew for a tree with limited actions and one without: `narrow` is none or not by its type,
# so that a tree without pays nothing for the other.


@register_jitable(forceinline=True)
def root_edges_of(edges, narrow):
    """The array whose [row, ROOT] are the edges of a root."""
    if narrow is None:
        return edges
    return narrow[0]


@register_jitable(forceinline=True)
def action_of(narrow, row, node, slot):
    """The action that a slot stands for."""
    if narrow is None:
        return slot
    if node == ROOT:
        return narrow[1][row, ROOT, slot]
    return narrow[2][row, node, slot]


@register_jitable(forceinline=True)
def write_priors(edges, narrow, row, node, prior_logits):
    """Softmax of one row of logits into the node's edges. False for NaN, +inf, or nothing but −inf."""
    if narrow is None:
        return _write_all_priors(edges, row, node, prior_logits)
    return _write_highest_priors(edges, narrow[2], row, node, prior_logits)


@register_jitable(forceinline=True)
def _write_all_priors(edges, row, node, prior_logits):
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
def _write_highest_priors(edges, choices, row, node, prior_logits):
    """The softmax over the highest logits alone. Of equal ones the lower action is taken; slots follow the actions."""
    num_slots = edges.shape[2]
    num_known = num_finite = 0
    for action in range(prior_logits.shape[1]):
        num_known += prior_logits[row, action] < np.inf
        num_finite += np.isfinite(prior_logits[row, action])
    if num_known < prior_logits.shape[1] or num_finite == 0:
        return False
    highest = _highest(prior_logits, row)
    low, high, num_equal = _cut(prior_logits, row, highest, num_finite, num_slots)
    slot = 0
    total = highest - highest
    for action in range(prior_logits.shape[1]):
        logit = prior_logits[row, action]
        if logit < low:
            continue
        if logit < high:
            if num_equal == 0:
                continue
            num_equal -= 1
        weight = np.exp(logit - highest)
        choices[row, node, slot] = action
        edges[row, node, slot].prior = weight
        total += weight
        slot += 1
    scale = 1 / total
    for slot in range(num_slots):
        edges[row, node, slot].prior *= scale
    return True


@register_jitable(forceinline=True)
def _cut(prior_logits, row, highest, num_finite, num_slots):
    """(low, high, n): the highest logits, one for each slot, are those from `high` on, and the first n of those from
    `low` on, which are equal.

    Goes down from the highest in growing steps, then halves what is left between. Counting all logits above a number
    takes a few vector operations, and some ten counts are enough; a heap takes three times as long.
    """
    infinity = type(highest)(np.inf)
    if num_finite < num_slots:
        return -infinity, np.nextafter(-infinity, highest), num_slots - num_finite
    low, high, middle = -infinity, infinity, highest
    step = max(type(highest)(1), abs(highest) / 2)
    num_above = 0  # from `high` on
    while low < middle and middle < high:
        count = 0
        for action in range(prior_logits.shape[1]):
            count += prior_logits[row, action] >= middle
        if count == num_slots:
            return middle, middle, 0
        if count > num_slots:
            low = middle
        else:
            high, num_above = middle, count
        if low > -infinity:
            middle = low / 2 + high / 2
        else:
            middle, step = middle - step, 2 * step
    return low, high, num_slots - num_above


@register_jitable(forceinline=True)
def _highest(prior_logits, row):
    """The maximum of a row without NaN: by fours, as each comparison would wait for the one before."""
    num_actions = prior_logits.shape[1]
    a = b = c = d = prior_logits[row, 0]
    for action in range(0, num_actions - 3, 4):
        a, b = max(a, prior_logits[row, action]), max(b, prior_logits[row, action + 1])
        c, d = max(c, prior_logits[row, action + 2]), max(d, prior_logits[row, action + 3])
    for action in range(num_actions - num_actions % 4, num_actions):
        a = max(a, prior_logits[row, action])
    return max(max(a, b), max(c, d))


@register_jitable(forceinline=True)
def attach(nodes, row, parent, action, slot, child, value, reward, discount):
    """Writes what the model said about a child. One that exists (met again at max_depth) is valued afresh.

    Its visit count stays, as in mctx; only its running mean restarts from the network's new value.
    """
    node = nodes[row, child]
    node.parent = parent
    node.action = action
    node.slot = slot
    node.visits += 1
    node.value = value
    node.raw_value = value
    node.reward = reward
    node.discount = discount


@register_jitable(forceinline=True)
def backup(nodes, edges, narrow, q_bounds, track_bounds, row, leaf):
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
        if parent == ROOT:
            _write_edge(root_edges_of(edges, narrow), row, parent, child.slot, node, qvalue)
        else:
            _write_edge(edges, row, parent, child.slot, node, qvalue)
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


@register_jitable(forceinline=True)
def _write_edge(edges, row, node, slot, child, qvalue):
    edge = edges[row, node, slot]
    edge.child = child
    edge.visits += 1
    edge.qvalue = qvalue
