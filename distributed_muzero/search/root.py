"""What a search starts from: checked inputs, and the root's prior with its noise."""

from __future__ import annotations

import numba
import numpy as np

from distributed_muzero.errors import ContractError, NonFiniteError
from distributed_muzero.search.tree import NONE, ROOT, Tree

NO_NOISE = np.zeros((0, 0))


def plant_roots(
    tree: Tree,
    root_logits: np.ndarray,
    root_values: np.ndarray,
    legal_mask: np.ndarray,
    noise_logits: np.ndarray = NO_NOISE,
    noise_fraction: float = 0.0,
) -> None:
    """Writes the roots:  P = (1 − f) · softmax(root_logits) + f · softmax(noise_logits)  over the legal actions.

    Each root has one visit, with the network's value. Logits of forbidden actions are never read.
    Raises ContractError for a row without a legal action, NonFiniteError for NaN or Inf.
    """
    bad_row = _write_roots(
        tree.nodes,
        tree.root_edges,
        tree.by_slot(root_logits, 0),
        root_values,
        tree.by_slot(legal_mask, False),
        tree.by_slot(noise_logits, 0) if noise_fraction > 0 else NO_NOISE,
        noise_fraction,
    )
    if bad_row != NONE:
        raise _bad_root(bad_row, root_logits, root_values, legal_mask)


def check_roots(root_logits: np.ndarray, root_values: np.ndarray, legal_mask: np.ndarray) -> None:
    """Raises ContractError unless they are [B, A], neither of them 0, [B] and [B, A] bool."""
    if root_logits.ndim != 2 or root_logits.size == 0:
        raise ContractError(f"root_logits has shape {root_logits.shape}; expected [B, A], neither of them 0")
    batch, num_actions = root_logits.shape
    if root_values.shape != (batch,):
        raise ContractError(f"root_values has shape {root_values.shape}; expected ({batch},)")
    if legal_mask.shape != (batch, num_actions) or legal_mask.dtype != bool:
        raise ContractError(
            f"legal_mask is {legal_mask.dtype} of shape {legal_mask.shape}; "
            f"expected bool of shape ({batch}, {num_actions})"
        )


def dirichlet_logits(shape: tuple[int, int], alpha: float, rng: np.random.Generator) -> np.ndarray:
    """[B, A] float64. The softmax over any subset of a row's actions is a symmetric Dirichlet(α) draw over it.

    A draw is a row of Gamma(α) variates divided by their sum. They are taken as logarithms, by
    Gamma(α) ~ Gamma(α + 1) · U^(1/α): a small α would round all of them to 0.
    """
    return np.log(rng.standard_gamma(alpha + 1, shape)) - rng.standard_exponential(shape) / alpha


@numba.njit(cache=True, nogil=True)
def _write_roots(nodes, edges, root_logits, root_values, legal_mask, noise_logits, noise_fraction):
    """Returns -1, or the first row without a legal action or with a number that isn't finite.

    A forbidden edge gets the prior −inf: it scores below all others in any rule that adds a multiple of it.
    """
    for row in range(len(legal_mask)):
        total = _softmax_legal(edges, row, root_logits, legal_mask, 0.0)
        if not (0 < total < np.inf and np.isfinite(root_values[row])):
            return row
        if noise_fraction > 0:
            _softmax_legal(edges, row, noise_logits, legal_mask, 1 - noise_fraction)
        nodes[row, ROOT].visits = 1
        nodes[row, ROOT].value = root_values[row]
        nodes[row, ROOT].raw_value = root_values[row]
    return NONE


@numba.njit(cache=True)
def _softmax_legal(edges, row, logits, legal_mask, kept):
    """prior ← kept · prior + (1 − kept) · softmax(logits) over the legal actions; returns Σ exp(logit − max)."""
    num_actions = legal_mask.shape[1]
    highest = -np.inf
    for action in range(num_actions):
        if legal_mask[row, action] and logits[row, action] > highest:
            highest = logits[row, action]
    total = 0.0
    for action in range(num_actions):
        if legal_mask[row, action]:
            total += np.exp(logits[row, action] - highest)
    for action in range(num_actions):
        if legal_mask[row, action]:
            share = np.exp(logits[row, action] - highest) / total
            edges[row, ROOT, action].prior = kept * edges[row, ROOT, action].prior + (1 - kept) * share
        else:
            edges[row, ROOT, action].prior = -np.inf
    return total


def _bad_root(
    row: int, root_logits: np.ndarray, root_values: np.ndarray, legal_mask: np.ndarray
) -> ContractError | NonFiniteError:
    if not legal_mask[row].any():
        return ContractError(f"legal_mask forbids every action in row {row}; expected at least one allowed")
    return NonFiniteError(
        f"the root in row {row} isn't finite: value {root_values[row]}, logits {root_logits[row].tolist()}, "
        f"legal {legal_mask[row].tolist()}"
    )
