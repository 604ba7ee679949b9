"""Bootstrapped returns."""

from __future__ import annotations

import numpy as np


def signed_discount(discount: float, num_players: int) -> float:
    """γ as a search takes it (contract, decision 10): negative where two players move in turn."""
    return -discount if num_players == 2 else discount


def n_step_returns(
    rewards: np.ndarray,
    values: np.ndarray,
    discount: float,
    n: int,
    to_play: np.ndarray | None = None,
    literal_returns: bool = False,
) -> np.ndarray:
    """z_t = Σ_{k<n} γᵏ u_{t+k} + γⁿ ν_{t+n}   (contract, decision 3); the horizon shortens at the episode's end.

    rewards: [T] u_t, received after a_t.   values: [T+1] ν_t, the last one 0 if terminated.
    to_play: [T+1] the player to move; rewards and values are from that player's view and change sign for the other.
    literal_returns: the source's sum from k = 1, which drops u_t.
    Returns [T+1] float32; the last entry is ν_T.
    """
    num_steps = len(rewards)
    sign = np.ones(num_steps + 1) if to_play is None else np.where(np.asarray(to_play) == 0, 1.0, -1.0)
    returns = np.zeros(num_steps + 1)
    if longest := min(n, num_steps):
        weights = discount ** np.arange(float(longest))
        if literal_returns:
            weights[0] = 0
        returns[:-1] = np.correlate(np.pad(rewards * sign[:-1], (0, longest - 1)), weights, "valid")
    steps = np.arange(num_steps + 1)
    horizon = np.minimum(n, num_steps - steps)
    returns += discount**horizon * (values * sign)[steps + horizon]
    return (returns * sign).astype(np.float32)
