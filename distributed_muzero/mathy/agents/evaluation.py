"""How well a model plays greedily, on problems that follow from seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from distributed_muzero.errors import ContractError
from distributed_muzero.mathy.agents.games import Episode, num_threads, read_now
from distributed_muzero.mathy.agents.policy_value_model import PolicyValueModel
from distributed_muzero.mathy.env import MathyEnv

BATCH = 64  # problems at a time, which bounds the memory


class Evaluation(NamedTuple):
    num_problems: int
    solved: float  # share of them
    mean_return: float
    returns: list[float]  # of each, in the order of its seed
    won: list[bool]


def evaluate_agent(
    model: PolicyValueModel, make_env: Callable[[], MathyEnv], seeds: Sequence[int], difficulty: str = "easy"
) -> Evaluation:
    """Plays the problem of each seed once, taking the most probable action. A given seed is the same problem
    as `initial_state(seed)` of the environment `mathy:…` makes.

    Raises ContractError for no seeds.
    """
    if not seeds:
        raise ContractError("no seeds came; an evaluation needs a problem at least")
    returns: list[float] = []
    won: list[bool] = []
    with num_threads(1):
        for start in range(0, len(seeds), BATCH):
            episodes = [
                Episode(make_env(), model.args.rnn_size, difficulty, seed)
                for seed in seeds[start : start + BATCH]
            ]
            _play_out(model, episodes)
            returns += [episode.total_reward for episode in episodes]
            won += [episode.won for episode in episodes]
    return Evaluation(len(seeds), float(np.mean(won)), float(np.mean(returns)), returns, won)


def game_seeds(num_problems: int, seeds: Sequence[int], stream: int = 0x5EED) -> list[int]:
    """Seeds of the problems that an evaluation with these `seeds` plays (workers.evaluator.play_greedily)."""
    rng = np.random.default_rng([*seeds, stream])
    return [int(rng.integers(2**31)) for _ in range(num_problems)]


def _play_out(model: PolicyValueModel, episodes: Sequence[Episode]) -> None:
    while playing := [episode for episode in episodes if not (episode.is_over or episode.is_stuck)]:
        outputs = read_now(model, playing)
        actions = outputs.masked_logits[:, 0].argmax(-1).tolist()
        states_h, states_c = outputs.rnn_state_h[:, 0].tolist(), outputs.rnn_state_c.tolist()
        for episode, action, state_h, state_c in zip(playing, actions, states_h, states_c, strict=True):
            episode.play(action, state_h, state_c)
