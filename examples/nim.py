"""A game of one's own: take 1 to 3 stones from a heap; who takes the last one wins.

distributed-muzero envs check nim:make --trust-env-code        (in the folder of this file)
distributed-muzero train --env nim:make --trust-env-code       (docs/environments.md has settings for two players)
"""

import numpy as np

from distributed_muzero.environments.base import EnvironmentSpec


class Nim:
    truncated = False  # no game is cut by a limit

    def __init__(self, stones=10):
        self.stones = stones
        self.spec = EnvironmentSpec("nim", (stones + 1,), np.dtype(np.float32), (3,), num_players=2)

    def initial_state(self, seed=None):
        self.left, self.player = self.stones, 0
        return self.observe()

    def step(self, action):
        if not 0 <= action < 3 or not self.mask()[action]:
            raise ValueError(f"can't take {action + 1} of {self.left} stones")
        self.left -= action + 1
        self.player = 1 - self.player
        return float(self.left == 0), self.observe(), self.left == 0  # the reward is the mover's

    def mask(self):
        return np.arange(1, 4) <= self.left

    def to_play(self):
        return self.player

    def observe(self):
        return np.eye(self.stones + 1, dtype=np.float32)[self.left]

    def close(self):
        pass


def make(config):
    return Nim(**config.kwargs)
