"""What a search starts from: checked inputs and the root's prior."""

from __future__ import annotations

import numpy as np

from distributed_muzero.errors import ContractError, NonFiniteError


def check_roots(root_logits: np.ndarray, root_values: np.ndarray, legal_mask: np.ndarray) -> None:
    """Raises ContractError for wrong shapes or a row without a legal action, NonFiniteError for NaN or Inf.

    A forbidden action's logit may be anything: it is never read.
    """
    if root_logits.ndim != 2 or 0 in root_logits.shape:
        raise ContractError(
            f"root_logits has shape {root_logits.shape}; expected [B, A] with at least one of each"
        )
    if root_values.shape != root_logits.shape[:1]:
        raise ContractError(f"root_values has shape {root_values.shape}; expected {root_logits.shape[:1]}")
    if legal_mask.shape != root_logits.shape or legal_mask.dtype != bool:
        raise ContractError(
            f"legal_mask is {legal_mask.dtype} of shape {legal_mask.shape}; expected bool of {root_logits.shape}"
        )
    if not legal_mask.any(axis=1).all():
        row = int(np.argmin(legal_mask.any(axis=1)))
        raise ContractError(
            f"legal_mask forbids every action in row {row}; expected at least one allowed action"
        )
    finite = np.isfinite(root_values) & (np.isfinite(root_logits) | ~legal_mask).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise NonFiniteError(
            f"row {row} of the roots isn't finite: value {root_values[row]}, logits {root_logits[row].tolist()}"
        )


def masked_softmax(logits: np.ndarray, legal_mask: np.ndarray) -> np.ndarray:
    """[B, A] probabilities over the legal actions, exactly 0 elsewhere."""
    legal_logits = np.where(legal_mask, logits, -np.inf)
    weights = np.exp(legal_logits - legal_logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def dirichlet_noise(legal_mask: np.ndarray, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """[B, A] float64, each row a symmetric Dirichlet(α) draw over its legal actions, exactly 0 elsewhere.

    A draw is a row of Gamma(α) variates divided by their sum. They are taken as logarithms, by
    Gamma(α) ~ Gamma(α + 1) · U^(1/α): a small α would round all of them to 0.
    """
    log_gammas = np.log(rng.standard_gamma(alpha + 1, legal_mask.shape))
    log_gammas -= rng.standard_exponential(legal_mask.shape) / alpha
    return masked_softmax(log_gammas, legal_mask)
