"""Episodes of mathy problems, many at a time through one model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from mathy_envs import MathyEnvDifficulty, MathyEnvProblemArgs
from mathy_envs.time_step import is_terminal_transition

from distributed_muzero.mathy.agents.policy_value_model import Outputs, PolicyValueModel
from distributed_muzero.mathy.env import MathyEnv
from distributed_muzero.mathy.state import MathyInputs, MathyObservation, observations_to_window


class Episode:
    """One problem from its beginning, with the recurrent state that a model has made of it so far."""

    def __init__(self, env: MathyEnv, rnn_size: int, difficulty: str = "easy", seed: int | None = None):
        self.env = env
        self.state, _ = env.get_initial_state(MathyEnvProblemArgs(MathyEnvDifficulty(difficulty)), seed)
        self.total_reward = 0.0
        self.is_over = self.won = False
        self._num_states = 0
        self.observation = env.state_to_observation(self.state, rnn_size)

    def play(self, action: int, rnn_state_h: Sequence[float], rnn_state_c: Sequence[float]) -> float:
        """The reward of an action; the recurrent state is the one after the current observation."""
        self.state, transition, _ = self.env.get_next_state(self.state, action)
        reward = float(transition.reward)
        self.total_reward += reward
        self.is_over = is_terminal_transition(transition)
        self.won = self.is_over and reward > 0  # mathy's losses are all below 0
        self._num_states += 1
        self.observation = transition.observation._replace(
            rnn_state_h=list(rnn_state_h),
            rnn_state_c=list(rnn_state_c),
            rnn_history_h=self._mean_history(rnn_state_h),
        )
        return reward

    def _mean_history(self, rnn_state_h: Sequence[float]) -> list[float]:
        """With one more state."""
        share = 1 / self._num_states
        return [
            mean + share * (new - mean)
            for mean, new in zip(self.observation.rnn_history_h, rnn_state_h, strict=True)
        ]


def batch_of(windows: Iterable[Sequence[MathyObservation]]) -> MathyInputs:
    """Windows of any lengths as one batch [B, n, …]: shorter ones end with empty observations."""
    listed = [list(window) for window in windows]
    longest = max(len(window) for window in listed)
    rows = [window + [_empty(window[0])] * (longest - len(window)) for window in listed]
    flat = observations_to_window([observation for row in rows for observation in row]).to_inputs()
    return [tensor.unflatten(0, (len(rows), longest)) for tensor in flat]


@torch.no_grad()
def read_now(model: PolicyValueModel, episodes: Sequence[Episode]) -> Outputs:
    """What a model says of each episode's current observation: a batch of windows of length 1."""
    return model.read(batch_of([episode.observation] for episode in episodes))


@contextmanager
def num_threads(number: int) -> Iterator[None]:
    """Of torch. Small layers take longest where many threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _empty(like: MathyObservation) -> MathyObservation:
    num_rules = len(like.mask) // len(like.nodes)
    return like._replace(nodes=[0], mask=[0] * num_rules, values=[0.0])
