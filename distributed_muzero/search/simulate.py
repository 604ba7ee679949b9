"""The loop that every search policy shares: descend, ask the model about all leaves at once, back up.

A policy hands in its selection rule and that rule's own array; nothing here knows PUCT from any other rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.extending import register_jitable

from distributed_muzero.errors import ContractError, NonFiniteError
from distributed_muzero.search.tree import (
    NONE,
    ROOT,
    Tree,
    action_of,
    attach,
    backup,
    root_edges_of,
    write_priors,
)


class Expansion(NamedTuple):
    """What the model says about the B children made by one simulation."""

    rewards: np.ndarray  # [B] of the edge parent → child
    values: np.ndarray  # [B] of the child
    prior_logits: np.ndarray  # [B, A] of the child
    discounts: np.ndarray | None = None  # [B] of the edge; none = the search's constant


# expand(parents, actions, children), each [B] int32 and valid during the call only. The model keeps the
# embeddings, by (row, node). A child may exist already: at max_depth it is asked about again.
Expand = Callable[[np.ndarray, np.ndarray, np.ndarray], Expansion]

Answer = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # an Expansion whose discounts are filled in

# select(nodes, edges, q_bounds, settings, row, node) -> slot of an edge, @register_jitable
Select = Callable[..., int]


@dataclass(frozen=True)
class CompiledExpand:
    """An `Expand` that a search can also compile into its loop: no simulation then goes through Python.

    function(arrays, parents, actions, children, rewards, values, prior_logits), @register_jitable, writes the answer
    into the last three, whose float type is the tree's. `plain` must give the same.
    """

    function: Callable[..., None]
    arrays: Any  # a tuple that numba can type
    room: tuple[int, int, int]  # rows, nodes of a row and actions that the arrays are made for
    plain: Expand

    def __call__(self, parents: np.ndarray, actions: np.ndarray, children: np.ndarray, /) -> Expansion:
        return self.plain(parents, actions, children)


class Rule(NamedTuple):
    """How a policy selects. Plain functions marked `register_jitable`, not compiled ones: numba pickles these by name,
    which keeps the cache on disk valid in the next process."""

    select: Select
    select_root: Select | None = None  # the root's own rule, where it has one
    track_bounds: bool = False


def _sources_digest(*files: str) -> int:
    """Of all sources beside these files. Numba renews a cached kernel when its own file changes, not when one that it
    calls into does; with this number in the kernel's closure, it does."""
    digest = sha256()
    for folder in sorted({Path(file).parent for file in files}):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:6], "big")


@register_jitable
def _ask_python(arrays, parents, actions, children, rewards, values, prior_logits):
    """In place of an expand that isn't compiled."""


@lru_cache
def make_step(rule: Rule, expand: Callable[..., None] = _ask_python) -> Callable[..., int]:
    """Compiles what a search does without Python: with an `expand` all simulations, else what stands between two calls
    of the model, which is to back up simulation i − 1 and to descend for simulation i."""
    digest = _sources_digest(__file__, expand.__code__.co_filename)
    select, track_bounds = rule.select, rule.track_bounds
    select_first = rule.select_root or select
    goes_on = expand is not _ask_python

    # No rule divides by 0; the check for it before each division would cost a quarter of a Gumbel simulation.
    @numba.njit(cache=True, nogil=True, error_model="numpy")
    def step(
        nodes,
        edges,
        narrow,
        q_bounds,
        settings,
        arrays,
        leaves,
        made,
        max_depth,
        rewards,
        values,
        prior_logits,
        discounts,
    ):
        """`made` nodes exist, the root among them. Returns -1, or the first row that isn't finite."""
        assert digest >= 0  # keeps the digest in the closure, and so in the cache's key
        num_rows, num_nodes = nodes.shape
        root_edges = root_edges_of(edges, narrow)
        while True:
            for row in range(num_rows):
                if made > 1:
                    parent, action, child, slot = (
                        leaves[0, row],
                        leaves[1, row],
                        leaves[2, row],
                        leaves[3, row],
                    )
                    attach(nodes, row, parent, action, slot, child, values[row], rewards[row], discounts[row])
                    known = write_priors(edges, narrow, row, child, prior_logits)
                    returns = backup(nodes, edges, narrow, q_bounds, track_bounds, row, child)
                    if not (known and np.isfinite(returns)):
                        return row
                if made < num_nodes:
                    node, depth = ROOT, 1
                    slot = select_first(nodes, root_edges, q_bounds, settings, row, node)
                    child = root_edges[row, node, slot].child
                    while child != NONE and depth < max_depth:
                        node, depth = child, depth + 1
                        slot = select(nodes, edges, q_bounds, settings, row, node)
                        child = edges[row, node, slot].child
                    leaves[0, row], leaves[1, row] = node, action_of(narrow, row, node, slot)
                    leaves[2, row] = child if child != NONE else made
                    leaves[3, row] = slot
            if not goes_on or made == num_nodes:
                return NONE
            expand(arrays, leaves[0], leaves[1], leaves[2], rewards, values, prior_logits)
            made += 1

    return step


def run_simulations(
    tree: Tree,
    rule: Rule,
    settings: Any,
    expand: Expand,
    *,
    discount: float,
    max_depth: int | None,
    q_bounds: np.ndarray,
) -> None:
    """Grows `tree` until it is full, asking `expand` once a simulation.

    settings: what the selection rule reads. q_bounds: [B, 2], changed if the rule tracks bounds.
    A compiled expand is asked from Python too, where the tree isn't of its float type, float32.
    Raises ContractError for a wrong shape and NonFiniteError for NaN or Inf from the model; both name the
    simulation.
    """
    nodes, edges, num_actions, narrow = tree
    batch, num_nodes = nodes.shape
    leaves = np.empty((4, batch), np.int32)  # parents, actions, children, slots of the actions
    limit = max_depth or num_nodes
    answer = _empty_answer(batch, num_actions, discount, q_bounds.dtype)
    if isinstance(expand, CompiledExpand) and q_bounds.dtype == np.float32:
        needed = batch, num_nodes, num_actions
        if expand.room != needed:
            raise ContractError(
                f"the model has room for {expand.room} (rows, nodes, actions), and the search needs "
                f"{needed}; call the model's initial() with this search's rows and nodes"
            )
        step = make_step(rule, expand.function)
        bad_row = step(nodes, edges, narrow, q_bounds, settings, expand.arrays, leaves, 1, limit, *answer)
    else:
        step = partial(make_step(rule), nodes, edges, narrow, q_bounds, settings, (), leaves)
        bad_row, answer = _ask_each_time(step, expand, leaves, num_nodes, limit, answer)
    if bad_row != NONE:
        raise _not_finite(int(nodes[bad_row, ROOT]["visits"]) - 2, bad_row, Expansion(*answer))


def _empty_answer(batch: int, num_actions: int, discount: float, dtype: np.dtype) -> Answer:
    rewards, values = np.zeros((2, batch), dtype)
    return rewards, values, np.zeros((batch, num_actions), dtype), np.full(batch, discount, dtype)


def _ask_each_time(
    step: Callable[..., int],
    expand: Expand,
    leaves: np.ndarray,
    num_nodes: int,
    limit: int,
    answer: Answer,
) -> tuple[int, Answer]:
    """Calls the model from Python. `answer` holds the search's shapes, float type and discounts.

    Returns -1 or the first row that isn't finite, and the model's last answer.
    """
    parents, actions, children, _ = leaves
    rewards, values, prior_logits, discounts = answer
    constant_discounts = discounts
    dtype, row_shape, logits_shape = rewards.dtype, rewards.shape, prior_logits.shape
    as_array = np.ascontiguousarray
    bad_row = step(1, limit, rewards, values, prior_logits, discounts)
    for made in range(2, num_nodes + 1):
        expansion = expand(parents, actions, children)
        rewards = as_array(expansion.rewards, dtype)
        values = as_array(expansion.values, dtype)
        prior_logits = as_array(expansion.prior_logits, dtype)
        discounts = (
            constant_discounts if expansion.discounts is None else as_array(expansion.discounts, dtype)
        )
        if not (
            rewards.shape == values.shape == discounts.shape == row_shape
            and prior_logits.shape == logits_shape
        ):
            raise _wrong_shape(made - 2, expansion, *logits_shape)
        bad_row = step(made, limit, rewards, values, prior_logits, discounts)
        if bad_row != NONE:
            break
    return bad_row, (rewards, values, prior_logits, discounts)


def _wrong_shape(simulation: int, expansion: Expansion, batch: int, num_actions: int) -> ContractError:
    came = {name: np.shape(value) for name, value in expansion._asdict().items() if value is not None}
    return ContractError(
        f"expand at simulation {simulation} gave shapes {came}; expected ({batch},) for rewards, values and "
        f"discounts, and ({batch}, {num_actions}) for prior_logits"
    )


def _not_finite(simulation: int, row: int, expansion: Expansion) -> NonFiniteError:
    came = {name: value[row].tolist() for name, value in expansion._asdict().items()}
    return NonFiniteError(
        f"expand at simulation {simulation} gave numbers for row {row} that aren't finite, or grow past the "
        f"float type when backed up: {came}; check the network's weights and inputs"
    )
