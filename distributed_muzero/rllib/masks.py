"""Masks as RLlib's environments give them: a Dict of two, `action_mask` and what is observed under any other name.

Its own examples call that `observations`, PettingZoo `observation`, others `obs`.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from distributed_muzero.replay.recorded_pieces import MASK, key_beside_mask


def masked_key(space: spaces.Space) -> str | None:
    """Under which key the observation stands beside its mask; None for any other space."""
    return key_beside_mask(space.spaces) if isinstance(space, spaces.Dict) else None


class Unmasked(gymnasium.ObservationWrapper):
    """Of an environment for one player: the observation alone, and its mask as `action_masks()`."""

    def __init__(self, environment: gymnasium.Env, key: str):
        super().__init__(environment)
        assert isinstance(environment.observation_space, spaces.Dict)
        self.observation_space = environment.observation_space[key]
        self._key = key
        self._mask = np.zeros(0)

    def observation(self, observation: Any) -> Any:
        self._mask = np.array(observation[MASK])
        return observation[self._key]

    def action_masks(self) -> np.ndarray:
        return self._mask
