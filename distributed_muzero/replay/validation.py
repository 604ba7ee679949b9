"""What an episode must be before a shard takes it. Every reason is a fixed word, fit for a metric's label.

Nothing here trusts what came: whatever it is, the answer is a RejectedEpisode, no other exception, and takes no more
memory than the episode itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distributed_muzero.environments.base import MAX_MAGNITUDE, EnvironmentSpec
from distributed_muzero.errors import RejectedEpisode
from distributed_muzero.types import Episode

POLICY_TOLERANCE = 1e-3
MAX_ID_LENGTH = 256


def validate(episode: Episode, spec: EnvironmentSpec, max_steps: int) -> None:
    """Raises RejectedEpisode(reason, detail) for the first rule that the episode breaks."""
    validate_id(episode)
    _check_fields(episode)
    num_steps = _checked_length(episode, max_steps)
    if episode.terminated == episode.truncated:
        raise RejectedEpisode(
            "ending", f"terminated {episode.terminated}, truncated {episode.truncated}: one must hold"
        )
    _check_arrays(episode, spec, num_steps)
    _check_numbers(episode)
    _check_game(episode, num_steps)


def validate_id(episode: Episode) -> None:
    """Raises RejectedEpisode unless it is an episode whose id can be looked up and stored."""
    if not isinstance(episode, Episode):
        raise RejectedEpisode("type", f"an episode is expected, got {type(episode).__name__}")
    _check_name("id", episode.episode_id)


def _check_name(reason: str, name: Any) -> None:
    if not isinstance(name, str):
        raise RejectedEpisode("type", f"the {reason} must be text, got {type(name).__name__}")
    if not name or len(name) > MAX_ID_LENGTH:
        raise RejectedEpisode(
            reason, f"1 to {MAX_ID_LENGTH} characters are needed, got {len(name)}: {name[:40]!r}"
        )
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise RejectedEpisode(reason, f"{name[:40]!r} can't be written as UTF-8")


def _check_fields(episode: Episode) -> None:
    _check_name("environment", episode.environment_id)
    for name in ("seed", "weights_version"):
        number = getattr(episode, name)
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise RejectedEpisode("type", f"{name} must be an integer, got {type(number).__name__}")
        if not 0 <= number < 2**63:
            raise RejectedEpisode("number", f"{name} must be 0 or more, and fit 64 bits")
    for name in ("terminated", "truncated"):
        if not isinstance(getattr(episode, name), bool | np.bool_):
            found = type(getattr(episode, name)).__name__
            raise RejectedEpisode("type", f"{name} must be True or False, got {found}")


def _checked_length(episode: Episode, max_steps: int) -> int:
    if type(episode.actions) is not np.ndarray:
        raise RejectedEpisode("type", f"actions must be an array, got {type(episode.actions).__name__}")
    if episode.actions.ndim != 1:
        raise RejectedEpisode("shape", f"actions is {episode.actions.shape}, expected (steps,)")
    num_steps = len(episode.actions)
    if num_steps == 0 or num_steps > max_steps:
        raise RejectedEpisode(
            "length",
            f"1 to {max_steps} steps are expected, got {num_steps}; raise replay.max_transitions or max_bytes, "
            "or lower environment.max_episode_steps",
        )
    return num_steps


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
        # Subclasses, such as masked arrays, have rules of their own.
        if type(array) is not np.ndarray:
            raise RejectedEpisode("type", f"{name} must be an array, got {type(array).__name__}")
        if array.shape != shape:
            raise RejectedEpisode("shape", f"{name} is {array.shape}, expected {shape}")
        if array.dtype != np.dtype(dtype):
            raise RejectedEpisode("dtype", f"{name} is {array.dtype}, expected {np.dtype(dtype)}")


def _check_numbers(episode: Episode) -> None:
    for name in ("observations", "rewards", "policies", "root_values"):
        array = getattr(episode, name)
        # NaN makes both of them NaN.
        low, high = array.min(initial=0), array.max(initial=0)
        if not (np.isfinite(low) and np.isfinite(high)):
            raise RejectedEpisode("not_finite", f"{name} holds NaN or Inf")
        if array.dtype.kind == "f" and max(-low, high) > MAX_MAGNITUDE:
            raise RejectedEpisode("too_large", f"{name} goes beyond ±{MAX_MAGNITUDE:g}")


def _check_game(episode: Episode, num_steps: int) -> None:
    actions, legal = episode.actions, episode.legal_masks
    if (legal.view(np.uint8) > 1).any():
        raise RejectedEpisode("legal_mask", "a byte of legal_masks is neither 0 nor 1")
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
