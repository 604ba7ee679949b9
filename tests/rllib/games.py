"""Environments as RLlib's users write them, by modules of which nothing is imported from RLlib."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium import spaces

BOX = spaces.Box(0, 9, (2,), np.float32)
MASKED = spaces.Dict(observations=BOX, action_mask=spaces.Box(0, 1, (2,), np.int8))


class Count:
    """A MultiAgentEnv of four moves in turn, by which `rewards` are handed out; its observations count them."""

    possible_agents = ("white", "black")
    observation = BOX
    actions = spaces.Discrete(2)
    order = ("white", "black", "white", "black")
    rewards = ({}, {}, {}, {"white": -1.0, "black": 1.0})
    ends = ("terminated",)
    everybody_at_the_end = True

    def get_observation_space(self, agent):
        return self.observation

    def get_action_space(self, agent):
        return self.actions

    def reset(self, *, seed=None, options=None):
        self.num_moves = 0
        self.played = []
        return {self.order[0]: self.seen()}, {}

    def seen(self):
        return np.array([self.num_moves, 0], np.float32)

    def step(self, actions):
        self.played.append(actions)
        self.num_moves += 1
        over = self.num_moves == 4
        terminated, truncated = (over and end in self.ends for end in ("terminated", "truncated"))
        agents = () if over else (self.order[self.num_moves],)
        if over and self.everybody_at_the_end:
            agents = self.possible_agents
        return (
            {agent: self.seen() for agent in agents},
            self.rewards[self.num_moves - 1],
            {"__all__": terminated},
            {"__all__": truncated},
            {},
        )

    def close(self):
        self.closed = True


class Walk(gymnasium.Env):
    """For one player, as RLlib's creators make them of their config: to the right until the end, or one mask to the
    left."""

    observation_space = MASKED
    action_space = spaces.Discrete(2)

    def __init__(self, config):
        self.length = config.get("length", 3)
        assert config.worker_index == 0 and config.vector_index == 0 and config.num_workers == 0

    def reset(self, *, seed=None, options=None):
        self.place = 0
        return self.seen(), {}

    def step(self, action):
        self.place += 1 if action else -1
        won = self.place == self.length
        return self.seen(), float(won), won, False, {}

    def seen(self):
        return {
            "observations": np.array([self.place, 0], np.float32),
            "action_mask": np.array([self.place > 0, 1], np.int8),
        }
