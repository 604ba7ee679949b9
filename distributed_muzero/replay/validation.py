"""What an episode must be before a shard takes it. Every reason is a fixed word, fit for a metric's label."""

from __future__ import annotations

from typing import Any

import numpy as np

from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import RejectedEpisode
from distributed_muzero.types import Episode

POLICY_TOLERANCE = 1e-3


def validate(episode: Episode, spec: EnvironmentSpec, max_steps: int) -> None:
    """Raises RejectedEpisode(reason, detail) for the first rule that the episode breaks."""
    num_steps = len(episode.actions)
    if not episode.episode_id or len(episode.episode_id) > 256:
        raise RejectedEpisode(
            "id", f"an id of 1 to 256 characters is needed, got {episode.episode_id[:40]!r}…"
        )
    if num_steps == 0 or num_steps > max_steps:
        raise RejectedEpisode(
            "length",
            f"1 to {max_steps} steps are expected, got {num_steps}; raise replay.max_transitions or max_bytes, "
            "or lower environment.max_episode_steps",
        )
    if episode.terminated == episode.truncated:
        raise RejectedEpisode(
            "ending", f"terminated {episode.terminated}, truncated {episode.truncated}: one must hold"
        )
    _check_arrays(episode, spec, num_steps)
    _check_numbers(episode, num_steps)


def _check_arrays(episode: Episode, spec: EnvironmentSpec, num_steps: int) -> None:
    expected: dict[str, tuple[tuple[int, ...], Any]] = {
        "observations": ((num_steps + 1, *spec.observation_shape), spec.observation_dtype),
        "legal_masks": ((num_steps, spec.num_actions), np.bool_),
        "actions": ((num_steps,), np.int32),
        "rewards": ((num_steps,), np.float32),
        "policies": ((num_steps, spec.num_actions), np.float32),
        "root_values": ((num_steps + 1,), np.float32),
        "to_play": ((num_steps + 1,), np.int8),
    }
    for name, (shape, dtype) in expected.items():
        array = getattr(episode, name)
        if array.shape != shape:
            raise RejectedEpisode("shape", f"{name} is {array.shape}, expected {shape}")
        if array.dtype != np.dtype(dtype):
            raise RejectedEpisode("dtype", f"{name} is {array.dtype}, expected {np.dtype(dtype)}")


def _check_numbers(episode: Episode, num_steps: int) -> None:
    for name in ("observations", "rewards", "policies", "root_values"):
        if not np.isfinite(getattr(episode, name)).all():
            raise RejectedEpisode("not_finite", f"{name} holds NaN or Inf")
    actions, legal = episode.actions, episode.legal_masks
    if ((actions < 0) | (actions >= legal.shape[1])).any():
        raise RejectedEpisode("action", f"an action lies outside 0…{legal.shape[1] - 1}")
    if not legal[np.arange(num_steps), actions].all():
        raise RejectedEpisode("illegal_action", "an action was played that the mask forbids")
    if (episode.policies < 0).any() or (episode.policies[~legal] != 0).any():
        raise RejectedEpisode("policy", "a policy is negative, or not zero where the mask forbids")
    if np.abs(episode.policies.sum(1) - 1).max() > POLICY_TOLERANCE:
        raise RejectedEpisode("policy_sum", "a policy doesn't sum to 1")
    if ((episode.to_play < 0) | (episode.to_play > 1)).any():
        raise RejectedEpisode("player", "to_play must be 0 or 1")
    if episode.terminated and episode.root_values[-1] != 0:
        raise RejectedEpisode("final_value", "a terminated episode ends with the value 0")
