"""One row of a batch, built from one episode with loops and branches only."""

import numpy as np


def slow_row(episode, returns, t, history_length, num_unroll_steps):
    """What `make_batch` must give for step t; `actions` holds None where any legal action will do."""
    num_steps = episode.num_steps
    row = {"observations": [], "policies": [], "actions": [], "returns": [], "rewards": []}
    for i in range(t - history_length + 1, t + 1):
        row["observations"].append(
            episode.observations[i] if i >= 0 else np.zeros_like(episode.observations[0])
        )
    for i in range(t, t + num_unroll_steps + 1):
        played = i < num_steps
        row["policies"].append(episode.policies[i] if played else np.zeros_like(episode.policies[0]))
        row["actions"].append(int(episode.actions[i]) if played else None)
        row["rewards"].append(episode.rewards[i] if played else 0.0)
        row["returns"].append(returns[i] if i <= num_steps else 0.0)
    return row
