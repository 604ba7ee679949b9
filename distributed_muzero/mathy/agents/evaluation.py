"""How well a model plays greedily, on problems that follow from seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distributed_muzero.errors import ContractError
from distributed_muzero.mathy.agents.games import Episode, num_threads, read_now
from distributed_muzero.mathy.agents.policy_value_model import PolicyValueModel
from distributed_muzero.mathy.env import MathyEnv
from distributed_muzero.workers.evaluator import game_seeds

__all__ = ["Evaluation", "evaluate_agent", "game_seeds"]

BATCH = 64  # problems at a time, which bounds the memory


class Evaluation(NamedTuple):
    num_problems: int
    solved: float  # share of them
    mean_return: float
    returns: list[float]  # of each, in the order of its seed
    won: list[bool]


def evaluate_agent(
    model: PolicyValueModel,
    make_env: Callable[[], MathyEnv],
    seeds: Sequence[int],
    difficulty: str = "easy",
    temperature: float = 0.0,
) -> Evaluation:
    """Plays the problem of each seed once. A seed's problem is that of `initial_state(seed)` in the environment
    `mathy:…` with as many max_nodes.

    temperature: 0 takes the most probable action; else actions are sampled from the policy to the power of
    1 / temperature. Raises ContractError for no seeds.
    """
    if not seeds:
        raise ContractError("no seeds came; an evaluation needs a problem at least")
    returns: list[float] = []
    won: list[bool] = []
    generator = torch.Generator().manual_seed(0)
    with num_threads(1):
        for start in range(0, len(seeds), BATCH):
            episodes = [
                Episode(make_env(), model.args.rnn_size, difficulty, seed)
                for seed in seeds[start : start + BATCH]
            ]
            _play_out(model, episodes, temperature, generator)
            returns += [episode.total_reward for episode in episodes]
            won += [episode.won for episode in episodes]
    return Evaluation(len(seeds), float(np.mean(won)), float(np.mean(returns)), returns, won)


def _play_out(
    model: PolicyValueModel, episodes: Sequence[Episode], temperature: float, generator: torch.Generator
) -> None:
    while playing := [episode for episode in episodes if not episode.is_over]:
        outputs = read_now(model, playing)
        actions = _choose(outputs.masked_logits[:, 0], temperature, generator).tolist()
        states_h, states_c = outputs.rnn_state_h[:, 0].tolist(), outputs.rnn_state_c.tolist()
        for episode, action, state_h, state_c in zip(playing, actions, states_h, states_c, strict=True):
            episode.play(action, state_h, state_c)


def _choose(masked_logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """[B] actions out of [B, A]."""
    if temperature == 0:
        return masked_logits.argmax(-1)
    probabilities = torch.softmax(masked_logits / temperature, -1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
