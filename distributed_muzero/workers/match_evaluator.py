"""Evaluation of a game for two: matches against an opponent that stays the same, and against the league."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from distributed_muzero.config import Config
from distributed_muzero.environments.base import Environment
from distributed_muzero.matches.match import MatchResult, play_match
from distributed_muzero.matches.players import Player, RandomPlayer, SearchPlayer
from distributed_muzero.networks.base import Networks
from distributed_muzero.workers.actor import PolicyModel
from distributed_muzero.workers.evaluator import SEED_STREAM, Evaluator
from distributed_muzero.workers.league import Rival

LEAGUE_STREAM = 0x1EA6  # keeps its games apart from those against the opponent
MAX_POSITIONS = 200_000  # that minimax solves: half a minute, before the first evaluation


class MatchEvaluator(Evaluator):
    """Plays greedily and without noise, all games of a match in lockstep, as often with the first move as without."""

    def __init__(
        self, make_env: Callable[[], Environment], make_networks: Callable[[], Networks], config: Config
    ):
        super().__init__(make_env, make_networks(), config)
        self._rival_model = PolicyModel(make_networks())

    @cached_property
    def opponent(self) -> Player:
        """Who all checkpoints of the run are measured by. Raises EnvironmentFailure if it can't play this game."""
        return make_opponent(self.config.evaluator.opponent, self._make_env)

    def assess(
        self, version: int, weights: np.ndarray, seeds: Sequence[int], rivals: Iterable[Rival] = ()
    ) -> dict[str, Any]:
        """As `Evaluator.assess`, and `league`: step, elo, games and points of the games against each rival."""
        result = super().assess(version, weights, seeds, rivals)
        return {**result, "league": [self._meet(rival, seeds) for rival in rivals]}

    def evaluate(
        self, num_episodes: int, seeds: Sequence[int], num_simulations: int | None = None
    ) -> dict[str, Any]:
        """Plays games against the opponent, one more if the number is odd: wins, draws, losses; score, 0 … 1 a game.

        returns holds the outcomes, -1 … 1, wins first; mean_return, std_return, episodes and weights_version are as
        for one player.
        """
        rng = np.random.default_rng([*seeds, SEED_STREAM])
        player = self._player(self.model, num_simulations)
        result = self._play(player, self.opponent, num_episodes + num_episodes % 2, rng)
        total = result.total
        returns = [1.0] * total.wins + [0.0] * total.draws + [-1.0] * total.losses
        return {
            "mean_return": float(np.mean(returns)),
            "std_return": float(np.std(returns)),
            "returns": returns,
            "episodes": total.games,
            "weights_version": self.model.version,
            "opponent": self.opponent.name,
            **total._asdict(),
            "score": result.score,
        }

    def _meet(self, rival: Rival, seeds: Sequence[int]) -> dict[str, Any]:
        section, step = self.config.evaluator, rival.member.step
        self._rival_model.load(step, self._rival_model.flat.vector_of(rival.weights))
        player, other = (
            self._player(model, section.num_simulations) for model in (self.model, self._rival_model)
        )
        rng = np.random.default_rng([*seeds, LEAGUE_STREAM, step])
        result = self._play(player, other, section.league_games, rng)
        return {**rival.member._asdict(), "games": result.total.games, "points": result.total.points}

    def _play(
        self, player: Player, opponent: Player, num_games: int, rng: np.random.Generator
    ) -> MatchResult:
        history = self.config.environment.history_length
        return play_match(player, opponent, self._make_env, num_games, rng, history_length=history)

    def _player(self, model: PolicyModel, num_simulations: int | None) -> SearchPlayer:
        assert model.search_model is not None, "set_weights() comes first"
        config = self.config
        return SearchPlayer(
            "checkpoint", model.search_model, config.search, config.algorithm.discount, num_simulations
        )


def make_opponent(
    name: str, make_env: Callable[[], Environment], max_positions: int = MAX_POSITIONS
) -> Player:
    """Who `evaluator.opponent` names. Raises EnvironmentFailure for a game that this one can't play.

    max_positions: of a game for minimax.
    """
    if name == "random":
        return RandomPlayer()
    from distributed_muzero.matches.rule_players import make_rule_player

    return make_rule_player(name, make_env(), f"evaluator.opponent {name}", max_positions)
