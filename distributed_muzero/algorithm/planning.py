"""planning(): one search from one observation, the first public function of the contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distributed_muzero.config import SearchConfig
from distributed_muzero.errors import ContractError, NonFiniteError
from distributed_muzero.networks.base import as_networks
from distributed_muzero.networks.inference import SearchModel, make_search_model
from distributed_muzero.search.policies import gumbel_search, muzero_search
from distributed_muzero.search.tree import Tree
from distributed_muzero.types import SearchResult

DEFAULT_DISCOUNT = 0.99


class Plan(NamedTuple):
    """What one batched search over B roots came to."""

    result: SearchResult
    actions: (
        np.ndarray | None
    )  # [B] to play, where the search policy decides for one, as Gumbel MuZero's does
    tree: Tree


def planning(
    h: Callable,
    g_r: Callable,
    g_s: Callable,
    f_v: Callable,
    f_p: Callable,
    o: Tensor,
    mask: Tensor,
    *,
    search: SearchConfig | None = None,
    discount: float = DEFAULT_DISCOUNT,
    noise: bool = False,
    rng: np.random.Generator | None = None,
) -> tuple[float, Tensor]:
    """ν_t and π_t for the last observations o [N, *O] and the mask of legal actions [*A] (1 = allowed).

    π_t has the mask's shape, sums to 1, and is exactly 0 where the mask is (decisions 1, 7, 8, 9).
    discount: negative where players alternate. noise: exploration noise at the root, drawn from `rng`.
    search: with policy "gumbel", π_t is the improved policy (decision 21).
    Raises ContractError for a mask without a legal action or wrong shapes, NonFiniteError for NaN from a network.
    """
    mask_array = as_array(mask)
    observation = as_array(o)
    if observation.ndim < 1 or mask_array.size == 0:
        raise ContractError(
            f"o must be [N, *O] and mask [*A], got {observation.shape} and {mask_array.shape}"
        )
    result = plan_batch(
        make_search_model(as_networks(h, g_r, g_s, f_v, f_p)),
        observation[None],
        legal_mask(mask_array)[None],
        search or SearchConfig(),
        discount,
        rng=rng,
        noise=noise,
    ).result
    policy = torch.from_numpy(result.action_weights[0].reshape(mask_array.shape))
    return float(result.root_values[0]), policy


def plan_batch(
    model: SearchModel,
    observations: np.ndarray,
    legal_masks: np.ndarray,
    config: SearchConfig,
    discount: float,
    *,
    rng: np.random.Generator | None,
    noise: bool,
    num_simulations: int | None = None,
) -> Plan:
    """The batched search that actors, evaluator and planning() share: observations [B, N, *O], masks [B, A] bool."""
    if noise and rng is None:
        raise ContractError(
            "noise=True needs rng, a numpy.random.Generator, so that the search can be repeated"
        )
    num_simulations = num_simulations or config.num_simulations
    if not np.isfinite(observations).all():
        raise NonFiniteError("an observation given to planning holds NaN or Inf")
    root_values, root_logits = model.initial(observations, num_simulations + 1)
    if root_logits.shape != legal_masks.shape:
        raise ContractError(
            f"the policy network gives logits of shape {root_logits.shape} for masks of shape {legal_masks.shape}"
        )
    roots = root_logits, root_values, legal_masks, model.expand, config
    rng = rng if rng is not None else np.random.default_rng(0)
    if config.policy == "gumbel":
        result, tree, actions = gumbel_search(
            *roots, discount=discount, rng=rng, noise=noise, num_simulations=num_simulations
        )
        return Plan(result, actions, tree)
    result, tree = muzero_search(
        *roots, discount=discount, rng=rng, noise=noise, num_simulations=num_simulations
    )
    return Plan(result, None, tree)


def as_array(x: Any) -> np.ndarray:
    """A tensor on any device, or anything that numpy reads, as an array; shared with `x` where that is possible."""
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def legal_mask(mask: np.ndarray) -> np.ndarray:
    """A contract mask [*A] of 0 and 1 as flat bool [A]. Raises ContractError for anything else."""
    flat = np.asarray(mask).reshape(-1)
    if flat.dtype != bool and not ((flat == 0) | (flat == 1)).all():
        raise ContractError(f"a mask holds 1 (allowed) and 0 (forbidden) only, got {np.unique(flat)[:5]}")
    if not flat.any():
        raise ContractError(
            f"the mask of {flat.size} actions allows none; a state to plan from needs a legal action"
        )
    return flat.astype(bool)
