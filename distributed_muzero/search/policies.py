"""The search policies: what to prepare at the root, which selection rule to follow, what to answer."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import DTypeLike

from distributed_muzero.config import SearchConfig
from distributed_muzero.errors import ContractError
from distributed_muzero.search import gumbel, puct
from distributed_muzero.search.root import NO_NOISE, check_roots, dirichlet_logits, plant_roots
from distributed_muzero.search.simulate import Expand, Rule, run_simulations
from distributed_muzero.search.tree import ROOT, Tree, make_narrow_tree, make_tree
from distributed_muzero.types import SearchResult

MUZERO_RULES = {
    "parent_and_siblings": Rule(puct.select_parent_and_siblings),
    "tree_min_max": Rule(puct.select_between_bounds, track_bounds=True),
    "min_max": Rule(puct.select_between_bounds),
}
GUMBEL_RULE = Rule(gumbel.select_interior, select_root=gumbel.select_root)


def muzero_search(
    root_logits: np.ndarray,
    root_values: np.ndarray,
    legal_mask: np.ndarray,
    expand: Expand,
    config: SearchConfig,
    *,
    discount: float,
    rng: np.random.Generator,
    noise: bool = True,
    num_simulations: int | None = None,
    dtype: DTypeLike = np.float32,
) -> tuple[SearchResult, Tree]:
    """MuZero's search over B independent roots (MuZero paper, appendix B; trees as in mctx).

    root_logits: [B, A].  root_values: [B].  legal_mask: [B, A] bool, applied at the root only.
    expand: called once a simulation for the whole batch; the model keeps the embeddings, by (row, node).
    discount: γ of an edge; negative when players alternate, values then being the player to move's.
    noise: mixes Dirichlet noise over the legal actions into the root's prior; switch it off in evaluation.
    num_simulations: in place of the config's.  dtype: of all numbers in the tree.
    Raises ContractError and NonFiniteError, naming the row and the simulation.
    """
    num_simulations = config.num_simulations if num_simulations is None else num_simulations
    tree, root_logits, root_values, legal_mask = _make_roots(
        root_logits, root_values, legal_mask, num_simulations, config.max_interior_actions, dtype
    )
    fraction = config.dirichlet_fraction if noise else 0.0
    drawn = dirichlet_logits(root_logits.shape, config.dirichlet_alpha, rng) if fraction > 0 else NO_NOISE
    plant_roots(tree, root_logits, root_values, legal_mask, drawn, fraction)
    run_simulations(
        tree,
        MUZERO_RULES[config.q_normalization],
        _exploration_table(num_simulations, config.pb_c_init, config.pb_c_base, np.dtype(dtype)),
        expand,
        discount=discount,
        max_depth=config.max_depth,
        q_bounds=_first_bounds(config, len(root_logits), dtype),
    )
    return summarize(tree), tree


def gumbel_search(
    root_logits: np.ndarray,
    root_values: np.ndarray,
    legal_mask: np.ndarray,
    expand: Expand,
    config: SearchConfig,
    *,
    discount: float,
    rng: np.random.Generator,
    noise: bool = True,
    num_simulations: int | None = None,
    root_gumbel: np.ndarray | None = None,
    dtype: DTypeLike = np.float32,
) -> tuple[SearchResult, Tree, np.ndarray]:
    """Gumbel MuZero's search (search/gumbel.py): as `muzero_search`, but for what follows.

    noise: Gumbel noise [B, A], times config.gumbel_scale, decides with the prior and the values which actions the
    root considers, and which it takes; switch it off in evaluation.  root_gumbel: that noise, in place of a draw.
    Returns also the action [B] that the search decided for: it is to be played. action_weights is the improved policy,
    an actor's target: what the values make of the prior, without the noise.
    """
    num_simulations = config.num_simulations if num_simulations is None else num_simulations
    tree, root_logits, root_values, legal_mask = _make_roots(
        root_logits, root_values, legal_mask, num_simulations, config.max_interior_actions, dtype
    )
    plant_roots(tree, root_logits, root_values, legal_mask)
    if root_gumbel is None:
        scale = config.gumbel_scale if noise else 0.0
        root_gumbel = scale * rng.gumbel(size=root_logits.shape) if scale > 0 else np.zeros(root_logits.shape)
    elif np.shape(root_gumbel) != root_logits.shape:
        raise ContractError(f"root_gumbel has shape {np.shape(root_gumbel)}; expected {root_logits.shape}")
    settings = gumbel.make_settings(tree, root_logits, legal_mask, root_gumbel, num_simulations, config)
    run_simulations(
        tree,
        GUMBEL_RULE,
        settings,
        expand,
        discount=discount,
        max_depth=config.max_depth,
        q_bounds=np.zeros((len(root_logits), 2), dtype),
    )
    action_weights, actions = gumbel.answers(tree, settings)
    return summarize(tree)._replace(action_weights=action_weights), tree, actions


def summarize(tree: Tree) -> SearchResult:
    """The root's answer: π = visits / their sum, ν = the root's search value (decision 9)."""
    visit_counts = tree.of_root("visits").copy()
    values = tree.node_values[:, ROOT].copy()
    weights = visit_counts / visit_counts.sum(axis=1, keepdims=True)
    return SearchResult(weights.astype(values.dtype), values, visit_counts, tree.of_root("qvalue").copy())


def _make_roots(
    root_logits: np.ndarray,
    root_values: np.ndarray,
    legal_mask: np.ndarray,
    num_simulations: int,
    max_interior_actions: int | None,
    dtype: DTypeLike,
) -> tuple[Tree, np.ndarray, np.ndarray, np.ndarray]:
    """An empty tree for these roots, and their own copies of logits [B, A], values [B] and mask [B, A]."""
    logits, values = np.array(root_logits, dtype, order="C"), np.array(root_values, dtype, order="C")
    legal = np.array(legal_mask, order="C")
    check_roots(logits, values, legal)
    if num_simulations < 1:
        raise ContractError(f"num_simulations is {num_simulations}; expected at least 1")
    batch, num_actions = logits.shape
    if max_interior_actions is not None and max_interior_actions < num_actions:
        tree = make_narrow_tree(legal, max_interior_actions, num_simulations, dtype)
    else:
        tree = make_tree(batch, num_actions, num_simulations, dtype)
    return tree, logits, values, legal


def _first_bounds(config: SearchConfig, batch: int, dtype: DTypeLike) -> np.ndarray:
    tracked = config.q_normalization == "tree_min_max"
    bounds = np.empty((batch, 2), dtype)
    bounds[:] = (np.inf, -np.inf) if tracked else config.min_max_bounds
    return bounds


_exploration_table = lru_cache(puct.exploration_table)
