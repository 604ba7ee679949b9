"""mathy_envs as it comes, to hold ours against: slow, and without anything of ours in between."""

from __future__ import annotations

import numpy as np
from mathy_envs.env import MathyEnv
from mathy_envs.state import MathyEnvState
from mathy_envs.time_step import is_terminal_transition


class PlainMathy:
    """One game of a mathy environment from a given text."""

    def __init__(self, mathy: MathyEnv, problem: str, max_moves: int):
        self.mathy = mathy
        mathy.valid_actions_mask_cache = {}
        mathy.valid_rules_cache = {}
        mathy.parser.clear_cache()
        self.state = MathyEnvState(
            problem=problem,
            max_moves=max_moves,
            num_rules=len(mathy.rules),
            problem_type=mathy.get_env_namespace(),
        )

    def step(self, rule: int, token: int) -> tuple[float, str, bool]:
        """(reward, text, is_terminal)"""
        self.state, transition, _ = self.mathy.get_next_state(self.state, (rule, token))
        return transition.reward, self.state.agent.problem, is_terminal_transition(transition)

    def mask(self) -> np.ndarray:
        """[nodes, rules] bool.

        Not from mathy's cache: trees that differ may have one text, as 2x * (3y * 4z) has that of (2x * 3y) * 4z, and
        the cache gives the second one the mask of the first.
        """
        self.mathy.valid_actions_mask_cache.clear()
        return np.array(self.mathy.get_valid_moves(self.state), bool).T
