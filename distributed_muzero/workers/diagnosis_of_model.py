"""The model along real trajectories: its values, rewards and policies, k steps after it last looked.

It sees the real observation at step t, then only the actions a_t … a_{t+k−1} that were really played. What it says
there is compared with what the game and a search from the real observation at t+k say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from distributed_muzero.algorithm.targets import Columns, make_batch
from distributed_muzero.errors import NonFiniteError
from distributed_muzero.networks.base import Networks
from distributed_muzero.types import Batch, Episode
from distributed_muzero.workers.diagnosis_of_search import divergence, log_prior


class Trajectories(NamedTuple):
    """Games back to back, R rows in all, with what the rules and a search of the weights at hand say of each row."""

    columns: Columns  # its returns are those of the whole rest of the game, its policies the search's
    search_values: np.ndarray  # [R] ν; at the final observation 0 if terminated
    last_valued_rows: np.ndarray  # [R] of the row's game: the final one if terminated, else the one before


class Errors(NamedTuple):
    """At B positions and K+1 depths, [B, K+1] float64 each; NaN where there is nothing to compare."""

    values: np.ndarray  # the model's − the return
    search_values: np.ndarray  # the model's − the search's
    rewards: np.ndarray  # the model's − the real one
    divergences: np.ndarray  # KL(search ‖ the model's prior)
    illegal_masses: np.ndarray  # that the model's prior puts on what is forbidden


def make_columns(episodes: Sequence[Episode]) -> Columns:
    """The games as training reads them; returns and policies are yet to be filled in."""
    lengths = np.array([episode.num_steps + 1 for episode in episodes])
    last_rows = np.cumsum(lengths) - 1
    num_rows = int(lengths.sum())
    masks = [np.append(episode.legal_masks, episode.legal_masks[-1:], 0) for episode in episodes]
    return Columns(
        observations=np.concatenate([episode.observations for episode in episodes]),
        legal_masks=np.concatenate(masks),
        actions=np.concatenate([np.append(episode.actions, 0) for episode in episodes]),
        rewards=np.concatenate([np.append(episode.rewards, np.float32(0)) for episode in episodes]),
        policies=np.zeros((num_rows, masks[0].shape[1])),
        returns=np.zeros(num_rows, np.float32),
        first_rows=np.repeat(last_rows - lengths + 1, lengths),
        last_rows=np.repeat(last_rows, lengths),
        weights_versions=np.zeros(num_rows, np.int64),
        episode_keys=np.repeat(np.arange(len(episodes)), lengths),
    )


def batch_at(columns: Columns, rows: np.ndarray, history_length: int, num_unroll_steps: int = 0) -> Batch:
    """As training makes it, from `rows` [B] on. Behind the end of a game its actions mean nothing."""
    weights = np.ones(len(rows), np.float32)
    return make_batch(columns, rows, history_length, num_unroll_steps, weights, np.random.default_rng(0))


def name_of(columns: Columns, row: int) -> str:
    return f"step {row - columns.first_rows[row]} of game {columns.episode_keys[row]}"


@torch.inference_mode()
def unrolled_errors(
    networks: Networks,
    trajectories: Trajectories,
    rows: np.ndarray,
    history_length: int,
    num_unroll_steps: int,
) -> Errors:
    """Of the model unrolled from the real observations at `rows` [B] along the actions that were played.

    Raises NonFiniteError for NaN or Inf from the networks.
    """
    columns, search_values, last_valued_rows = trajectories
    batch = batch_at(columns, rows, history_length, num_unroll_steps)
    rewards, values, logits = _unroll(networks, batch)

    reached = rows[:, None] + np.arange(num_unroll_steps + 1)
    last_rows = columns.last_rows[rows, None]
    at = np.minimum(reached, last_rows)
    is_valued = reached <= last_valued_rows[rows, None]
    is_decided = reached < last_rows
    is_rewarded = (reached > rows[:, None]) & (reached <= last_rows)
    log_priors, illegal_masses = log_prior(logits, columns.legal_masks[at])
    errors = Errors(
        np.where(is_valued, values - columns.returns[at], np.nan),
        np.where(is_valued, values - search_values[at], np.nan),
        # The reward of step k came after the action at k − 1.
        np.where(is_rewarded, rewards - columns.rewards[at - 1], np.nan),
        np.where(is_decided, divergence(columns.policies[at], log_priors), np.nan),
        np.where(is_decided, illegal_masses, np.nan),
    )
    for name, known in zip(
        Errors._fields, (is_valued, is_valued, is_rewarded, is_decided, is_decided), strict=True
    ):
        bad = np.argwhere(known & ~np.isfinite(getattr(errors, name)))
        if len(bad):
            row, k = bad[0]
            raise NonFiniteError(
                f"the model gives NaN or Inf {k} steps after {name_of(columns, rows[row])}; check its weights"
            )
    return errors


def _unroll(networks: Networks, batch: Batch) -> list[np.ndarray]:
    """Rewards [B, K+1], 0 at first, values [B, K+1] and policy logits [B, K+1, A]."""
    actions = torch.as_tensor(batch.target_actions).long()
    answers = [networks.initial_inference(torch.as_tensor(batch.observations))]
    for k in range(actions.shape[1] - 1):
        answers.append(networks.recurrent_inference(answers[-1].embeddings, actions[:, k]))
    columns = zip(*(answer[1:] for answer in answers), strict=True)
    return [torch.stack(steps, 1).double().numpy() for steps in columns]


def at_depth(errors: Errors, k: int) -> dict[str, Any]:
    """Plain values; None where no position reaches the depth, or nothing is rewarded at it."""
    values, search_values, rewards, divergences, illegal_masses = (
        numbers[:, k][~np.isnan(numbers[:, k])] for numbers in errors
    )
    return {
        "k": k,
        "values": len(values),
        "value_rmse": _rmse(values),
        "value_bias": _mean(values),
        "search_value_rmse": _rmse(search_values),
        "search_value_bias": _mean(search_values),
        "rewards": len(rewards),
        "reward_rmse": _rmse(rewards),
        "reward_bias": _mean(rewards),
        "policies": len(divergences),
        "policy_kl": _mean(divergences),
        "illegal_mass": _mean(illegal_masses),
    }


def _rmse(errors: np.ndarray) -> float | None:
    return float(np.sqrt((errors**2).mean())) if len(errors) else None


def _mean(errors: np.ndarray) -> float | None:
    return float(errors.mean()) if len(errors) else None
