"""A row of states with a reward at each end: small enough to solve exactly, so that tests know the best."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import EnvironmentFailure, UnknownEnvironmentError

LEFT, RIGHT, JUMP = 0, 1, 2
MOVES = (-1, +1, +2)


class ChainEnvironment:
    """States 0 … length-1; both ends terminate, the left one pays little and the right one much.

    Actions: LEFT, RIGHT, and JUMP two to the right, which is legal in every third state only. A game is cut
    after `max_episode_steps`, as truncated. Observation: the state's one-hot [length] float32. The seed
    has no effect: every game starts in `start` (a third of the way by default).
    """

    def __init__(
        self,
        length: int = 10,
        start: int | None = None,
        left_reward: float = 0.2,
        right_reward: float = 1.0,
        max_episode_steps: int = 50,
    ):
        start = length // 3 if start is None else start
        if not isinstance(length, int) or length < 3 or not 0 < start < length - 1:
            raise EnvironmentFailure(
                f"chain: length {length}, start {start}; expected a length from 3 on, a start between ends"
            )
        self.spec = EnvironmentSpec("chain", (length,), np.dtype(np.float32), (len(MOVES),))
        self.length = length
        self.start = start
        self.left_reward = float(left_reward)
        self.right_reward = float(right_reward)
        self.max_episode_steps = max_episode_steps
        self.state = start
        self._num_steps = 0
        self._truncated = False

    def initial_state(self, seed: int | None = None) -> np.ndarray:
        self.state, self._num_steps, self._truncated = self.start, 0, False
        return self._observe()

    def step(self, action: int) -> tuple[float, np.ndarray, bool]:
        if self.is_end(self.state) or self._truncated:
            raise EnvironmentFailure("chain: the game has ended; call initial_state() first")
        if not 0 <= action < len(MOVES) or not self.legal_actions(self.state)[action]:
            raise EnvironmentFailure(f"chain: action {action} is forbidden in state {self.state}")
        reward, self.state = self.transition(self.state, action)
        self._num_steps += 1
        terminated = self.is_end(self.state)
        self._truncated = not terminated and self._num_steps >= self.max_episode_steps
        return reward, self._observe(), terminated or self._truncated

    def mask(self) -> np.ndarray:
        return self.legal_actions(self.state)

    def to_play(self) -> int:
        return 0

    @property
    def truncated(self) -> bool:
        return self._truncated

    def close(self) -> None:
        pass

    def transition(self, state: int, action: int) -> tuple[float, int]:
        """The rules: (reward, next state)."""
        after = min(state + MOVES[action], self.length - 1)
        return {0: self.left_reward, self.length - 1: self.right_reward}.get(after, 0.0), after

    def legal_actions(self, state: int) -> np.ndarray:
        """[3] bool."""
        return np.array([True, True, state % 3 == 0])

    def is_end(self, state: int) -> bool:
        return state in (0, self.length - 1)

    def _observe(self) -> np.ndarray:
        observation = np.zeros(self.length, dtype=np.float32)
        observation[self.state] = 1.0
        return observation


class ChainSolution(NamedTuple):
    """The optimum without a time limit (a truncated game bootstraps, so that the limit doesn't change it)."""

    values: np.ndarray  # [length] float64, 0 at the ends
    qvalues: np.ndarray  # [length, 3] float64, -inf where an action is forbidden, 0 at the ends
    optimal_actions: np.ndarray  # [length, 3] bool, every action that attains the value; false at the ends


def solve(chain: ChainEnvironment, discount: float) -> ChainSolution:
    """Value iteration  V(s) ← max_a r(s, a) + γ V(s').  Exact after `length` sweeps from 0: no best path
    visits a state twice, and never ending is worth the 0 that V starts from."""
    values = np.zeros(chain.length)
    qvalues = np.zeros((chain.length, len(MOVES)))
    inner = range(1, chain.length - 1)
    for _ in range(chain.length):
        for state in inner:
            for action, legal in enumerate(chain.legal_actions(state)):
                reward, after = chain.transition(state, action)
                qvalues[state, action] = reward + discount * values[after] if legal else -np.inf
        values = qvalues.max(axis=1)
    optimal = np.isclose(qvalues, values[:, None], rtol=0, atol=1e-12)
    optimal[[0, -1]] = False
    return ChainSolution(values, qvalues, optimal)


def make_chain(config: EnvironmentConfig) -> ChainEnvironment:
    """The registry's factory; `kwargs` are those of ChainEnvironment, the shorter time limit counts."""
    if config.id != "chain":
        raise UnknownEnvironmentError(f"{config.id}: this family has one member, chain")
    options = dict(config.kwargs)
    options["max_episode_steps"] = min(options.get("max_episode_steps", 50), config.max_episode_steps)
    try:
        return ChainEnvironment(**options)
    except TypeError as error:
        raise EnvironmentFailure(f"chain with kwargs {config.kwargs}: {error}") from error
