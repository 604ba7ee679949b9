"""A match: many games between two players, each opening played twice, with the colours changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero.algorithm.acting import Game
from distributed_muzero.environments.base import Environment
from distributed_muzero.errors import EnvironmentFailure
from distributed_muzero.matches.elo import elo_difference, elo_interval
from distributed_muzero.matches.players import Player

OPENING_PLIES = 4  # at most, where two players would play the same game again and again


class Tally(NamedTuple):
    """Games as the first of two players sees them."""

    wins: int = 0
    draws: int = 0
    losses: int = 0

    @property
    def games(self) -> int:
        return sum(self)

    @property
    def points(self) -> float:
        return self.wins + self.draws / 2


class MatchResult(NamedTuple):
    """What came out of a match, as its first player sees it."""

    first: Tally  # the games in which this player had the first move
    second: Tally
    truncated: int  # games cut by the environment's limit, counted by the rewards until then
    mean_plies: float

    @property
    def total(self) -> Tally:
        return Tally(*(a + b for a, b in zip(self.first, self.second, strict=True)))

    @property
    def score(self) -> float:
        """Points a game, 0 … 1: 1 for a win, ½ for a draw."""
        return self.total.points / self.total.games

    def to_json(self) -> dict[str, Any]:
        """games, wins, draws, losses, score, elo_difference and its 95% interval (None where it has no end)."""
        total = self.total
        return {
            "games": total.games,
            **total._asdict(),
            "score": self.score,
            "elo_difference": elo_difference(self.score),
            "elo_interval": elo_interval(self.score, total.games),
            "as_first": self.first._asdict(),
            "as_second": self.second._asdict(),
            "truncated": self.truncated,
            "mean_plies": self.mean_plies,
        }


def play_match(
    player: Player,
    opponent: Player,
    make_env: Callable[[], Environment],
    num_games: int,
    rng: np.random.Generator,
    *,
    history_length: int = 1,
    opening_plies: int | None = None,
) -> MatchResult:
    """Plays all games in lockstep; games 2i and 2i+1 have the same start and opening, and the colours changed.

    history_length: N, observations stacked for networks.
    opening_plies: each pair of games begins with 0 … so many random moves; None: 4 where both players always play
    the same in the same position, else none.   rng: of starts, openings and players.
    Raises EnvironmentFailure for an environment that isn't for two players.
    """
    if opening_plies is None:
        opening_plies = default_opening_plies(player, opponent)
    environments = [make_env() for _ in range(num_games)]
    try:
        check_two_players(environments[0])
        games = _open_games(environments, history_length, opening_plies, rng)
        playing = list(enumerate(games))
        while playing:
            for side, who in enumerate((player, opponent)):
                turn = [game for number, game in playing if (game.players[-1] + number) % 2 == side]
                if turn:
                    play_moves(turn, who.choose(turn, rng))
                    playing = [(number, game) for number, game in playing if not game.is_over]
    finally:
        for env in environments:
            env.close()
    outcomes = [outcome(game, number % 2) for number, game in enumerate(games)]
    return MatchResult(
        tally(outcomes[::2]),
        tally(outcomes[1::2]),
        sum(game.truncated for game in games),
        float(np.mean([len(game.actions) for game in games])),
    )


def default_opening_plies(player: Player, opponent: Player) -> int:
    """Random moves at most, with which games begin: none where one of the two brings variety by itself."""
    return OPENING_PLIES if player.is_deterministic and opponent.is_deterministic else 0


def check_two_players(env: Environment) -> None:
    """Raises EnvironmentFailure for an environment that isn't for two players."""
    if env.spec.num_players != 2:
        raise EnvironmentFailure(
            f"{env.spec.id} has {env.spec.num_players} player; an opponent needs a game for two"
        )


def play_moves(games: Sequence[Game], actions: Sequence[int]) -> None:
    """Plays an action in each game. Nothing of it is learnt from, so no policy and no value are kept."""
    for game, action in zip(games, actions, strict=True):
        legal = game.read_mask()
        game.play(legal, np.zeros(len(legal)), int(action), 0.0)


def outcome(game: Game, side: int) -> int:
    """1, 0 or -1: how the game ended for the player who moves as `side`, by the sum of its rewards."""
    movers = game.players[: len(game.rewards)]
    gained = sum(
        reward if mover == side else -reward for mover, reward in zip(movers, game.rewards, strict=True)
    )
    return int(np.sign(gained))


def tally(outcomes: Sequence[int]) -> Tally:
    """Outcomes 1, 0, -1, counted."""
    return Tally(*(sum(one == kind for one in outcomes) for kind in (1, 0, -1)))


def _open_games(
    environments: Sequence[Environment], history_length: int, opening_plies: int, rng: np.random.Generator
) -> list[Game]:
    """Games after their openings; an opening that would end its game is left out."""
    games = []
    for number, env in enumerate(environments):
        if number % 2 == 0:
            seed, num_plies = int(rng.integers(2**31)), int(rng.integers(opening_plies + 1))
        game = Game(env, history_length, seed)
        for _ in range(num_plies):
            play_moves([game], [_random_action(game, seed)])
        games.append(Game(env, history_length, seed) if game.is_over else game)
    return games


def _random_action(game: Game, seed: int) -> int:
    """The same for two games with the same seed and number of moves."""
    legal = np.flatnonzero(game.read_mask())
    return int(np.random.default_rng([seed, len(game.actions)]).choice(legal))
