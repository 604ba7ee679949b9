"""Stored steps into the rows of a batch: position t of an episode, unrolled K steps, with N stacked observations.

Everything is gathered at once from columns that hold many episodes back to back; no loop runs over steps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distributed_muzero.types import Batch, Episode


class Columns(NamedTuple):
    """Episodes back to back, R rows in all. An episode of T steps takes T+1 rows; the last is its final observation."""

    observations: np.ndarray  # [R, *O]
    legal_masks: np.ndarray  # [R, A] bool; the final row repeats the last mask
    actions: np.ndarray  # [R] int32
    rewards: np.ndarray  # [R] float32
    policies: np.ndarray  # [R, A] float32; the final row is zero
    returns: np.ndarray  # [R] float32; the final row is ν_T, which is 0 if terminated
    first_rows: np.ndarray  # [R] int64, where the row's episode begins
    last_rows: np.ndarray  # [R] int64, its final observation
    weights_versions: np.ndarray  # [R] int64
    episode_keys: np.ndarray  # [R] int64, the shard's own number of the episode


def num_start_positions(episode: Episode, num_unroll_steps: int) -> int:
    """How many positions of an episode may begin a row.

    A terminated game is absorbing, so every step will do. Behind a time limit nothing is known, and padding it with
    zeros would teach that the limit ends the game: rows must end at the final observation. A game that was cut
    before K steps has no such row.
    """
    return episode.num_steps if episode.terminated else max(episode.num_steps - num_unroll_steps + 1, 0)


def make_batch(
    columns: Columns,
    rows: np.ndarray,
    history_length: int,
    num_unroll_steps: int,
    importance_weights: np.ndarray,
    rng: np.random.Generator,
) -> Batch:
    """The batch that starts at `rows` [M] (contract, decisions 2 and 6).

    Past the end of an episode: rewards and returns 0, random legal actions (of the last mask), a zero policy row.
    """
    first, last = columns.first_rows[rows], columns.last_rows[rows]
    steps = rows[:, None] + np.arange(num_unroll_steps + 1)
    clipped = np.minimum(steps, last[:, None])
    played = steps < last[:, None]

    actions = np.where(played, columns.actions[clipped], 0)
    beyond = np.nonzero(~played)
    if len(beyond[0]):
        legal = columns.legal_masks[clipped[beyond]]
        actions[beyond] = (legal * (rng.random(legal.shape) + 1)).argmax(1)

    past = rows[:, None] + np.arange(1 - history_length, 1)
    observations = columns.observations[np.maximum(past, first[:, None])]
    observations[past < first[:, None]] = 0
    return Batch(
        observations=observations,
        target_policies=columns.policies[clipped] * played[:, :, None],
        target_actions=actions,
        target_returns=np.where(steps <= last[:, None], columns.returns[clipped], np.float32(0)),
        target_rewards=np.where(played, columns.rewards[clipped], np.float32(0)),
        importance_weights=importance_weights,
        positions=np.stack([columns.episode_keys[rows], rows - first], 1),
        weights_versions=columns.weights_versions[rows],
    )
