"""The loop that every search policy shares: descend, ask the model about all leaves at once, back up.

A policy hands in its selection rule and that rule's own array; nothing here knows PUCT from any other rule.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np

from distributed_muzero.errors import ContractError, NonFiniteError
from distributed_muzero.search.tree import NONE, ROOT, Tree, attach, backup, write_priors


class Expansion(NamedTuple):
    """What the model says about the B children made by one simulation."""

    rewards: np.ndarray  # [B] of the edge parent → child
    values: np.ndarray  # [B] of the child
    prior_logits: np.ndarray  # [B, A] of the child
    discounts: np.ndarray | None = None  # [B] of the edge; none = the search's constant


# expand(parents, actions, children), each [B] int32 and valid during the call only. The model keeps the
# embeddings, by (row, node). A child may exist already: at max_depth it is asked about again.
Expand = Callable[[np.ndarray, np.ndarray, np.ndarray], Expansion]

Select = Callable[
    ..., int
]  # select(nodes, edges, q_bounds, settings, row, node) -> action, @register_jitable


def _sources_digest() -> int:
    """Of this package's sources. Numba renews a cached kernel when its own file changes, not when one that it
    calls into does; with this number in the kernel's closure, it does."""
    digest = sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:6], "big")


_SOURCES_DIGEST = _sources_digest()


def make_step(select: Select, *, select_root: Select | None = None, track_bounds: bool) -> Callable[..., int]:
    """Compiles the one call that a simulation costs: back up simulation i − 1, descend for simulation i.

    select_root: the root's own rule, where it has one.
    `select` is a plain function marked `register_jitable`, not a compiled one: numba pickles it by name, which
    keeps the cache on disk valid in the next process.
    """
    digest = _SOURCES_DIGEST
    select_first = select if select_root is None else select_root

    # No rule divides by 0; the check for it before each division would cost a quarter of a Gumbel simulation.
    @numba.njit(cache=True, nogil=True, error_model="numpy")
    def step(
        nodes, edges, q_bounds, settings, leaves, made, max_depth, rewards, values, prior_logits, discounts
    ):
        """`made` nodes exist, the root among them. Returns -1, or the first row that isn't finite."""
        assert digest >= 0  # keeps the digest in the closure, and so in the cache's key
        num_rows, num_nodes = nodes.shape
        for row in range(num_rows):
            if made > 1:
                parent, action, child = leaves[0, row], leaves[1, row], leaves[2, row]
                attach(nodes, row, parent, action, child, values[row], rewards[row], discounts[row])
                known = write_priors(edges, row, child, prior_logits)
                returns = backup(nodes, edges, q_bounds, track_bounds, row, child)
                if not (known and np.isfinite(returns)):
                    return row
            if made < num_nodes:
                node, depth = ROOT, 1
                action = select_first(nodes, edges, q_bounds, settings, row, node)
                child = edges[row, node, action].child
                while child != NONE and depth < max_depth:
                    node, depth = child, depth + 1
                    action = select(nodes, edges, q_bounds, settings, row, node)
                    child = edges[row, node, action].child
                leaves[0, row], leaves[1, row] = node, action
                leaves[2, row] = child if child != NONE else made
        return NONE

    return step


def run_simulations(
    tree: Tree,
    step: Callable[..., int],
    settings: Any,
    expand: Expand,
    *,
    discount: float,
    max_depth: int | None,
    q_bounds: np.ndarray,
) -> None:
    """Grows `tree` until it is full, with one call of `expand` a simulation.

    settings: what the selection rule reads. q_bounds: [B, 2], changed if the step tracks bounds.
    Raises ContractError for a wrong shape and NonFiniteError for NaN or Inf from the model; both name the
    simulation.
    """
    nodes, edges = tree
    batch, num_nodes = nodes.shape
    dtype = q_bounds.dtype
    limit = max_depth or num_nodes
    leaves = np.empty((3, batch), np.int32)
    parents, actions, children = leaves
    row_shape, logits_shape = (batch,), (batch, edges.shape[2])
    rewards = values = np.zeros(batch, dtype)
    prior_logits = np.zeros(logits_shape, dtype)
    discounts = constant_discounts = np.full(batch, discount, dtype)
    as_array = np.ascontiguousarray
    step(nodes, edges, q_bounds, settings, leaves, 1, limit, rewards, values, prior_logits, discounts)
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
            raise _wrong_shape(made - 2, expansion, batch, edges.shape[2])
        bad_row = step(
            nodes, edges, q_bounds, settings, leaves, made, limit, rewards, values, prior_logits, discounts
        )
        if bad_row != NONE:
            raise _not_finite(made - 2, bad_row, Expansion(rewards, values, prior_logits, discounts))


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
