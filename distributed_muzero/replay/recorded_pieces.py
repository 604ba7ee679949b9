"""A game, or a piece of one, as RLlib recorded it, and what it is as an episode of ours."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.types import Episode

LOGITS, VALUES = "action_dist_inputs", "vf_preds"  # of RLlib's extra model outputs
OBSERVATIONS, MASK = "observations", "action_mask"  # as we write observations with legal moves


class Piece(NamedTuple):
    """T steps. Items are arrays, numbers, lists, or Dicts of one of these and `action_mask`."""

    game: str  # RLlib's own id
    begin: int | None  # its first step in the game; None where that isn't recorded
    observations: list[Any]  # T + 1
    actions: list[Any]
    rewards: list[Any]
    extra: dict[str, list[Any]]  # what else was recorded of each step
    terminated: bool
    truncated: bool
    part: int = 0  # fragments of this game before it, behind which there is a gap

    @property
    def is_over(self) -> bool:
        return self.terminated or self.truncated

    def goes_on_with(self, other: Piece) -> bool:
        """Whether the other one is what came next: by its first step, or by what it shows first."""
        if other.begin is not None and self.begin is not None:
            return other.begin == self.begin + len(self.actions)
        return _same(self.observations[-1], other.observations[0])

    def holds(self, other: Piece) -> bool:
        """Whether the other one's steps are known to be among these."""
        if self.begin is None or other.begin is None:
            return False
        return (
            self.begin <= other.begin and len(other.actions) + other.begin <= len(self.actions) + self.begin
        )

    def begins(self, other: Piece) -> bool:
        """Whether the other one begins with all of these steps."""
        length = len(self.actions)
        return (
            self.begin == other.begin
            and length <= len(other.actions)
            and _same(self.observations, other.observations[: length + 1])
            and _same(self.actions, other.actions[:length])
        )

    def joined(self, other: Piece) -> Piece:
        # In place: a long game comes step by step.
        self.observations.extend(other.observations[1:])
        self.actions.extend(other.actions)
        self.rewards.extend(other.rewards)
        for name, items in self.extra.items():
            items.extend(other.extra.get(name, []))
        return self._replace(terminated=other.terminated, truncated=other.truncated)

    @np.errstate(all="ignore")  # whatever is neither a number nor finite is refused
    def episode(self, spec: EnvironmentSpec, discount: float) -> Episode:
        """As if one of our actors had played it; what can't be learnt from is left to the shard to refuse.

        Policy: that of the recorded logits, else the played action alone.   Root values: discounted returns to the
        game's end; behind a cut, what the last recorded value implies, else 0.   Legal: all, unless a mask was
        recorded. A search replaces policies and values where stored steps are searched anew.
        """
        actions, legal = _flat_actions(self.actions, spec), self._legal_masks(spec)
        place = f"@{self.begin}" if self.begin else f"#{self.part + 1}" if self.part else ""
        rewards = _array(self.rewards)
        rewards = rewards.astype(np.float32) if rewards.dtype.kind in "biuf" else np.zeros(0, np.float32)
        return Episode(
            episode_id=f"rllib/{self.game}" + place,
            environment_id=spec.id,
            seed=0,
            weights_version=0,
            observations=_observations([_unmasked(item) for item in self.observations], spec),
            legal_masks=legal,
            actions=actions,
            rewards=rewards,
            policies=self._policies(actions, legal, spec),
            root_values=self._root_values(rewards, discount),
            to_play=np.zeros(len(self.actions) + 1, np.int8),
            terminated=self.terminated,
            truncated=not self.terminated,
        )

    def _legal_masks(self, spec: EnvironmentSpec) -> np.ndarray:
        masks = [item[MASK] for item in self.observations[:-1] if isinstance(item, dict) and MASK in item]
        if len(masks) == len(self.actions) > 0:
            return _array(masks).reshape(len(masks), -1) == 1
        return np.ones((len(self.actions), spec.num_actions), bool)

    def _policies(self, actions: np.ndarray, legal: np.ndarray, spec: EnvironmentSpec) -> np.ndarray:
        """[T, A] float32."""
        logits = _array(self.extra.get(LOGITS, []))
        is_flat = _array(self.actions).size == len(self.actions)
        sizes = (spec.num_actions,) if is_flat else spec.action_shape  # of the logits, concatenated
        fits = logits.shape[1:] == (sum(sizes),) and legal.shape == (len(logits), spec.num_actions)
        if fits and logits.dtype.kind == "f":
            logits = np.where(legal, _joint_logits(logits.astype(np.float64), sizes), -np.inf)
            shares = np.exp(logits - logits.max(1, keepdims=True))
        elif actions.dtype == np.int32 and actions.shape == legal.shape[:1]:
            shares = (np.arange(legal.shape[1]) == actions[:, None]).astype(np.float64)
        else:
            shares = np.zeros(legal.shape)
        sums = shares.sum(1, keepdims=True)
        # Where the action is none of the environment's, the shard is to say so, and not that a policy is none.
        return np.where(sums > 0, shares / sums, legal / legal.sum(1, keepdims=True)).astype(np.float32)

    def _root_values(self, rewards: np.ndarray, discount: float) -> np.ndarray:
        """[T+1] float32."""
        values = np.zeros(len(rewards) + 1)
        recorded = _array(self.extra.get(VALUES, []))
        if recorded.shape == rewards.shape and len(recorded) and not self.terminated:
            values[-1] = (recorded[-1] - rewards[-1]) / discount  # v(s) = u + γ v(s'), at the last step
        for step in reversed(range(len(rewards))):
            values[step] = rewards[step] + discount * values[step + 1]
        return values.astype(np.float32)


def key_beside_mask(names: Collection[str]) -> str | None:
    """Of two names, one of which is the mask's, the other one."""
    return next(name for name in names if name != MASK) if MASK in names and len(names) == 2 else None


def _unmasked(item: Any) -> Any:
    """The observation beside its mask; all else as it is."""
    key = key_beside_mask(item) if isinstance(item, dict) else None
    return item if key is None else item[key]


def _flat_actions(actions: list[Any], spec: EnvironmentSpec) -> np.ndarray:
    """[T] int32; what is no action of the environment's stays what it is, to be refused."""
    found = _array(actions)
    if found.dtype.kind not in "iu" or found.size == 0:
        return found
    parts = found.reshape(len(actions), -1)
    if parts.shape[1] == 1:
        return parts[:, 0].clip(-1, 2**31 - 1).astype(np.int32)
    if parts.shape[1] != len(spec.action_shape) or ((parts < 0) | (parts >= spec.action_shape)).any():
        return parts
    return np.ravel_multi_index(tuple(parts.T), spec.action_shape).astype(np.int32)


def _joint_logits(logits: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """[T, A] of joint actions, from those of each part of an action: shares are multiplied, so that logits add up."""
    parts = np.split(logits, np.cumsum(sizes)[:-1], axis=1)
    return reduce(lambda joint, part: (joint[:, :, None] + part[:, None]).reshape(len(logits), -1), parts)


def _observations(shown: list[Any], spec: EnvironmentSpec) -> np.ndarray:
    """[T+1, *O] in the environment's dtype, from arrays as they are or flattened, or from the numbers of one-hots;
    what is none of these stays what it is, to be refused."""
    found, shape, dtype = _array(shown), spec.observation_shape, np.dtype(spec.observation_dtype)
    if found.dtype.kind in "iu" and found.size == len(shown) and len(shape) == 1 and shape[0] > 1:
        numbers = found.reshape(-1, 1)
        hot = (numbers == np.arange(shape[0])).astype(dtype)
        return hot if hot.any(1).all() else found
    if found.shape[1:] == (math.prod(shape),):  # not of any shape of this size: channels may come last
        found = found.reshape(len(shown), *shape)
    if found.dtype.kind not in "biuf":
        return found
    converted = found.astype(dtype)
    return converted if dtype.kind == "f" or np.array_equal(converted, found) else found


def _array(items: list[Any]) -> np.ndarray:
    """An array of texts, which fits nowhere, for what is no array."""
    try:
        found = np.asarray(items)
    except ValueError:
        return np.full(len(items), "not an array")
    return np.full(len(items), "not numbers") if found.dtype.hasobject else found


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return np.array_equal(np.asarray(one), np.asarray(other))
