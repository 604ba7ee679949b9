"""A chain that takes its time, as real environments do: its actors play at a steady rate, also on few cores."""

from __future__ import annotations

import time

import numpy as np

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.chain import ChainEnvironment

KWARGS = {"length": 12, "start": 6, "max_episode_steps": 30}


class SlowChain(ChainEnvironment):
    def __init__(self, pause_seconds: float):
        super().__init__(**KWARGS)
        self.pause_seconds = pause_seconds

    def step(self, action):
        time.sleep(self.pause_seconds)
        return super().step(action)


def make(config: EnvironmentConfig) -> SlowChain:
    return SlowChain(**config.kwargs)


def faults(episode) -> list[str]:
    """What is wrong with an episode, by the rules of the game; empty where it is whole, from start to end."""
    chain = ChainEnvironment(**KWARGS)
    shown = [chain.initial_state()]
    found = []
    for number, action in enumerate(episode.actions):
        reward, observation, is_over = chain.step(int(action))
        shown.append(observation)
        if abs(reward - episode.rewards[number]) > 1e-6:
            found.append(f"step {number} pays {episode.rewards[number]}, not {reward}")
        if is_over != (number == episode.num_steps - 1):
            found.append(
                f"{episode.num_steps} steps, step {number} {'ends' if is_over else 'does not end'} the game"
            )
            break
    if (episode.terminated, episode.truncated) != (not chain.truncated, chain.truncated):
        found.append(f"terminated {episode.terminated}, truncated {episode.truncated}")
    if not np.array_equal(np.stack(shown), episode.observations):
        found.append("other observations")
    return found
