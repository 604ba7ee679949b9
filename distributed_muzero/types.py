"""The data that travels between the parts. Shapes: T steps, A flat actions, O one observation, N history,
K unroll steps, M rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Step(NamedTuple):
    """One step of an episode, as `acting` returns it (contract, decision 9)."""

    observation: Any  # [*O] what the environment showed before the action
    policy: Any  # [A] π_t, the search's visit distribution
    action: int  # a_t, flat
    reward: float  # u_t, received after a_t
    value: float  # ν_t, the search's value of the root


@dataclass(frozen=True)
class Episode:
    """A finished game as one actor played it; arrays are never changed after it is made."""

    episode_id: str  # run/actor/incarnation/seq, unique for ever
    environment_id: str
    seed: int
    weights_version: int  # the version that chose the last action
    observations: np.ndarray  # [T+1, *O], the environment's own dtype; the last one is the final observation
    legal_masks: np.ndarray  # [T, A] bool
    actions: np.ndarray  # [T] int32
    rewards: np.ndarray  # [T] float32, u_t received after a_t
    policies: np.ndarray  # [T, A] float32
    root_values: np.ndarray  # [T+1] float32; the last one is 0 if terminated, else the bootstrap ν_T
    to_play: np.ndarray  # [T+1] int8, the player to move
    terminated: bool
    truncated: bool

    @property
    def num_steps(self) -> int:
        return len(self.actions)

    @property
    def episode_return(self) -> float:
        return float(self.rewards.sum(dtype=np.float64))


class Batch(NamedTuple):
    """What one learner step eats; everything is a contiguous numpy array."""

    observations: np.ndarray  # [M, N, *O] the environment's own dtype
    target_policies: np.ndarray  # [M, K+1, A] float32; an all-zero row costs nothing
    target_actions: np.ndarray  # [M, K+1] int32: a_t … a_{t+K}
    target_returns: np.ndarray  # [M, K+1] float32
    target_rewards: np.ndarray  # [M, K+1] float32: u_t … u_{t+K}
    importance_weights: np.ndarray  # [M] float32
    positions: np.ndarray  # [M, 2] int64: episode key inside the shard, step t
    weights_versions: np.ndarray  # [M] int64: the version whose search gave each row's policies and values
    shard: int = 0  # that made it, and takes its priorities


class SearchResult(NamedTuple):
    """The answer of one batched search over B roots (decision 9)."""

    action_weights: np.ndarray  # [B, A] untempered visit distribution, exactly 0 where forbidden
    root_values: np.ndarray  # [B] visit-weighted search value ν
    visit_counts: np.ndarray  # [B, A]
    qvalues: np.ndarray  # [B, A] reward + discount · value of each root edge, 0 where unvisited
