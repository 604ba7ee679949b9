"""What the search makes of the network's guess at its roots, and how deep its trees grow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero.config import SearchConfig
from distributed_muzero.networks.inference import SearchModel
from distributed_muzero.search.policies import gumbel_search, muzero_search
from distributed_muzero.search.tree import NONE, Tree

MOST_NATS = (
    100.0  # below the likeliest action: a prior of 0 counts as e^-100 of that one, so that no KL is infinite
)


class Depths(NamedTuple):
    """Of B trees, [B] each. The root's depth is 0, a child's one more than its parent's."""

    mean: np.ndarray  # over the simulations: of the leaf that each ended at
    highest: np.ndarray  # of the deepest node
    cut_share: np.ndarray  # of the simulations, those that max_depth ended at a node that was there already


class Roots(NamedTuple):
    """B positions, searched without noise."""

    network_values: np.ndarray  # [B]
    search_values: np.ndarray  # [B] ν
    logits: np.ndarray  # [B, A] of the network's prior
    policies: np.ndarray  # [B, A] π of the search, float64
    depths: Depths


def search_roots(
    model: SearchModel,
    observations: np.ndarray,
    legal_masks: np.ndarray,
    config: SearchConfig,
    discount: float,
    num_simulations: int,
) -> Roots:
    """Searches from observations [B, N, *O] with legal masks [B, A], as an evaluation does.

    discount: negative where players alternate.  Raises NonFiniteError for NaN or Inf from the model.
    """
    search: Callable[..., Any] = gumbel_search if config.policy == "gumbel" else muzero_search
    values, logits = model.initial(observations, num_simulations + 1)
    result, tree, *_ = search(
        logits,
        values,
        legal_masks,
        model.expand,
        config,
        discount=discount,
        rng=np.random.default_rng(0),
        noise=False,
        num_simulations=num_simulations,
    )
    weights = result.action_weights.astype(np.float64)
    policies = weights / weights.sum(1, keepdims=True)
    return Roots(values, result.root_values, logits, policies, depths(tree))


def concatenate(parts: Sequence[Roots]) -> Roots:
    """One after the other."""

    def of(name: str) -> np.ndarray:
        return np.concatenate([getattr(one, name) for one in parts])

    depths = Depths(*map(np.concatenate, zip(*(one.depths for one in parts), strict=True)))
    return Roots(of("network_values"), of("search_values"), of("logits"), of("policies"), depths)


def depths(tree: Tree) -> Depths:
    """How deep each tree of a finished search has grown.

    A simulation that max_depth cuts makes no node: it ends once more at one that lies as deep as max_depth lets any.
    """
    rows, parents = np.arange(len(tree.nodes)), tree.parents
    of_nodes = np.zeros(parents.shape, np.int64)
    num_simulations = parents.shape[1] - 1
    for node in range(1, num_simulations + 1):
        parent = parents[:, node]
        of_nodes[:, node] = np.where(parent == NONE, 0, of_nodes[rows, parent] + 1)
    highest = of_nodes.max(1)
    num_cut = (parents[:, 1:] == NONE).sum(1)
    mean = (of_nodes.sum(1) + num_cut * highest) / num_simulations
    return Depths(mean, highest, num_cut / num_simulations)


def log_prior(logits: np.ndarray, legal_masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log p [..., A] of the prior over the legal actions alone, −inf elsewhere; and the mass that it loses there [...].

    p = softmax(logits) restricted to the legal actions and divided by its sum over them; what is missing from that sum
    to 1 is the mass.   logits, legal_masks: [..., A], with a legal action in each row.
    """
    floor = logits.max(-1, keepdims=True) - MOST_NATS
    floored = np.maximum(logits, floor, dtype=np.float64)
    allowed = np.where(legal_masks, floored, -np.inf)
    total = _log_sum_exp(allowed)
    illegal_mass = 1 - np.exp(total - _log_sum_exp(floored))
    return allowed - total[..., None], np.maximum(illegal_mass, 0)


def entropy(policies: np.ndarray) -> np.ndarray:
    """−Σ π log π in nats: [..., A] -> [...]."""
    logs = np.log(policies, where=policies > 0, out=np.zeros(policies.shape))
    return -(policies * logs).sum(-1)


def divergence(policies: np.ndarray, log_priors: np.ndarray) -> np.ndarray:
    """KL(π ‖ p) = Σ π log(π / p) in nats, over the actions with π > 0: [..., A], [..., A] -> [...]."""
    logs = np.where(policies > 0, log_priors, 0)
    return -(policies * logs).sum(-1) - entropy(policies)


def against_prior(roots: Roots, legal_masks: np.ndarray) -> dict[str, float]:
    """Means over the roots: `kl` of the search from the prior, how often their best actions agree, both entropies."""
    log_priors, _ = log_prior(roots.logits, legal_masks)
    return {
        "kl": float(divergence(roots.policies, log_priors).mean()),
        "agreement": float((roots.policies.argmax(1) == log_priors.argmax(1)).mean()),
        "prior_entropy": float(entropy(np.exp(log_priors)).mean()),
        "search_entropy": float(entropy(roots.policies).mean()),
    }


def summarize_depths(depths: Depths) -> dict[str, Any]:
    """Means and extremes over the roots; `roots_by_highest` are [depth, roots whose deepest node lies there]."""
    return {
        "mean_depth": float(depths.mean.mean()),
        "most_mean_depth": float(depths.mean.max()),
        "mean_highest": float(depths.highest.mean()),
        "highest": int(depths.highest.max()),
        "cut_share": float(depths.cut_share.mean()),
        "roots_by_highest": [list(item) for item in sorted(Counter(depths.highest.tolist()).items())],
    }


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
    highest = x.max(-1, keepdims=True)
    return np.log(np.exp(x - highest).sum(-1)) + highest[..., 0]
