"""Evaluation: whole games without any noise, in environments of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from distributed_muzero.algorithm.acting import Game, act
from distributed_muzero.checkpoint import Checkpoint
from distributed_muzero.config import Config
from distributed_muzero.environments.base import Environment
from distributed_muzero.matches.players import PriorPlayer
from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.inference import SearchModel
from distributed_muzero.workers.actor import PolicyModel
from distributed_muzero.workers.league import Rival

CONFIRMATION_STREAM = 1
SEED_STREAM = 0x5EED  # keeps evaluation's games apart from every actor's


class Evaluator:
    """Plays greedily (temperature 0, no root noise), all games of an evaluation in lockstep."""

    def __init__(self, make_env: Callable[[], Environment], networks: Networks, config: Config):
        self.config = config
        self.model = PolicyModel(networks)
        self._make_env = make_env
        self._environments: list[Environment] = []

    def set_weights(self, version: int, weights: np.ndarray) -> None:
        """The weights to evaluate. Two checkpoints may lie within one version, so the version decides nothing here."""
        self.model.load(version, weights)

    def load(self, saved: Checkpoint) -> None:
        """A checkpoint's weights. Raises CheckpointError if they are of other networks."""
        self.model.load_checkpoint(saved)

    def assess(
        self, version: int, weights: np.ndarray, seeds: Sequence[int], rivals: Iterable[Rival] = ()
    ) -> dict[str, Any]:
        """A run's evaluation of a checkpoint, as its config asks for it.

        rivals: earlier checkpoints to be met, in a game of two players.
        """
        self.set_weights(version, weights)
        section = self.config.evaluator
        return self.evaluate_for_goal(
            section.num_episodes, seeds, section.num_simulations, self.config.run.stop_at_return
        )

    def evaluate_for_goal(
        self, num_episodes: int, seeds: Sequence[int], num_simulations: int | None, goal: float | None
    ) -> dict[str, Any]:
        """`evaluate`; but a mean return that reaches the goal is played again on new games, and those count.

        Among many evaluations the luckiest one would end the run, and say more than the weights can do.
        """
        result = self.evaluate(num_episodes, seeds, num_simulations)
        if goal is None or result["mean_return"] < goal:
            return result
        return self.evaluate(num_episodes, (*seeds, CONFIRMATION_STREAM), num_simulations)

    def evaluate(
        self, num_episodes: int, seeds: Sequence[int], num_simulations: int | None = None
    ) -> dict[str, Any]:
        """Plays games whose starts follow from `seeds`: mean_return, std_return, returns, episodes, weights_version.

        Where the environments are Winnable, also `solved`, the share of the games that were won.
        num_simulations: in place of the config's; 0 plays by the prior alone, in games for one player. Two evaluations
        share their games only if they share their seeds.
        """
        assert self.model.search_model is not None, "set_weights() comes first"
        while len(self._environments) < num_episodes:
            self._environments.append(self._make_env())
        environments = self._environments[:num_episodes]
        games = play_greedily(environments, self.model.search_model, self.config, seeds, num_simulations)
        returns = [float(np.sum(game.rewards)) for game in games]
        return {
            "mean_return": float(np.mean(returns)),
            "std_return": float(np.std(returns)),
            "returns": returns,
            "episodes": num_episodes,
            "weights_version": self.model.version,
            **share_solved(environments),
        }

    def close(self) -> None:
        for env in self._environments:
            env.close()


def share_solved(environments: Sequence[Environment]) -> dict[str, float]:
    """`solved`: the share of the games that were won, all of them over; nothing where winning is not a matter."""
    won = [getattr(env, "won", None) for env in environments]
    return {} if None in won else {"solved": float(np.mean([bool(one) for one in won]))}


def game_seeds(num_games: int, seeds: Sequence[int]) -> list[int]:
    """What an evaluation with these `seeds` begins its games with."""
    rng = np.random.default_rng([*seeds, SEED_STREAM])
    return [int(rng.integers(2**31)) for _ in range(num_games)]


def play_greedily(
    environments: Sequence[Environment],
    model: SearchModel,
    config: Config,
    seeds: Sequence[int],
    num_simulations: int | None = None,
) -> list[Game]:
    """A game in each environment, all in lockstep, at temperature 0 and without noise; `seeds` say how they start.

    num_simulations: in place of the config's; 0: the legal action with the highest prior, without a search.
    """
    rng = np.random.default_rng(0)  # nothing is drawn from it
    by_prior = PriorPlayer("prior", model)
    history = config.environment.history_length
    starts = game_seeds(len(environments), seeds)
    games = [Game(env, history, start) for env, start in zip(environments, starts, strict=True)]
    playing = games
    while playing:
        if num_simulations == 0:
            for game, action in zip(playing, by_prior.choose(playing, rng), strict=True):
                game.move(action)
        else:
            act(
                playing,
                model,
                config.search,
                config.algorithm.discount,
                0.0,
                noise=False,
                rng=rng,
                num_simulations=num_simulations,
            )
        playing = [game for game in playing if not game.is_over]
    return games
