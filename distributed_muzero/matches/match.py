"""A match: many games between two players, each opening played twice, with the colours changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero.algorithm.acting import Game
from distributed_muzero.environments.base import Environment
from distributed_muzero.errors import ContractError, EnvironmentFailure
from distributed_muzero.matches.elo import elo_difference, elo_interval
from distributed_muzero.matches.players import Player

OPENING_PLIES = 4  # at most, where two players would play the same game again and again
OPENING_DRAWS = 5  # at most for a pair of games, as an opening may end them
MAX_GAMES_AT_ONCE = 128  # even, as each opening is played twice


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
        return _sum_tallies([self.first, self.second])

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
    """Plays up to 128 games in lockstep; games 2i and 2i+1 begin alike, and the players change colours.

    Who has the first move is the one who moves first in the start position, before an opening.
    num_games: even.   history_length: N, observations stacked for networks.
    opening_plies: each pair of games begins with 0 … so many random moves; None: 4 where both players always play
    the same in the same position, else none.   rng: of starts, openings and players.
    Raises ContractError for a number of games that isn't even, EnvironmentFailure for an environment that isn't for
    two players.
    """
    _check_even(num_games)
    if opening_plies is None:
        opening_plies = default_opening_plies(player, opponent)
    parts = []
    with ExitStack() as stack:
        environments = _make_environments(make_env, min(num_games, MAX_GAMES_AT_ONCE), stack)
        for begin in range(0, num_games, MAX_GAMES_AT_ONCE):
            games = _open_games(environments[: num_games - begin], history_length, opening_plies, rng)
            parts.append(_play_out(games, (player, opponent), rng))
    return _merge(parts)


def default_opening_plies(player: Player, opponent: Player) -> int:
    """Random moves at most, with which games begin: none where one of the two brings variety by itself."""
    return OPENING_PLIES if player.is_deterministic and opponent.is_deterministic else 0


def check_two_players(env: Environment) -> None:
    """Raises EnvironmentFailure for an environment that isn't for two players."""
    if env.spec.num_players != 2:
        raise EnvironmentFailure(
            f"{env.spec.id} has {env.spec.num_players} player; an opponent needs a game for two"
        )


def outcome(game: Game, side: int) -> float:
    """The sum of a game's rewards as player `side` sees them: its own, less the other player's."""
    movers = game.players[: len(game.rewards)]
    return sum(
        reward if mover == side else -reward for mover, reward in zip(movers, game.rewards, strict=True)
    )


def tally(outcomes: Sequence[float]) -> Tally:
    """Outcomes above, at and below 0, counted."""
    signs = np.sign(outcomes).astype(int).tolist()
    return Tally(*(signs.count(kind) for kind in (1, 0, -1)))


def _check_even(num_games: int) -> None:
    if num_games < 2 or num_games % 2:
        raise ContractError(
            f"num_games is {num_games}; expected an even number from 2 on, as each opening is played with both "
            f"colours; ask for {max(2, num_games + 1)}"
        )


def _make_environments(
    make_env: Callable[[], Environment], number: int, stack: ExitStack
) -> list[Environment]:
    """Environments that the stack closes, whatever happens."""
    environments: list[Environment] = []
    for _ in range(number):
        env = make_env()
        stack.callback(env.close)
        check_two_players(env)
        environments.append(env)
    return environments


def _play_out(games: Sequence[Game], players: tuple[Player, Player], rng: np.random.Generator) -> MatchResult:
    """All games to their ends, in lockstep; the first player moves first in games 0, 2, 4, …, from their starts."""
    sides = [(game.players[0] + number) % 2 for number, game in enumerate(games)]
    playing = list(zip(games, sides, strict=True))
    while playing:
        for shift, who in enumerate(players):
            turn = [game for game, side in playing if (game.players[-1] - side) % 2 == shift]
            if turn:
                for game, action in zip(turn, who.choose(turn, rng), strict=True):
                    game.move(action)
                playing = [(game, side) for game, side in playing if not game.is_over]
    outcomes = [outcome(game, side) for game, side in zip(games, sides, strict=True)]
    return MatchResult(
        tally(outcomes[::2]),
        tally(outcomes[1::2]),
        sum(game.truncated for game in games),
        float(np.mean([len(game.actions) for game in games])),
    )


def _merge(parts: Sequence[MatchResult]) -> MatchResult:
    weights = [part.total.games for part in parts]
    return MatchResult(
        _sum_tallies(part.first for part in parts),
        _sum_tallies(part.second for part in parts),
        sum(part.truncated for part in parts),
        float(np.average([part.mean_plies for part in parts], weights=weights)),
    )


def _sum_tallies(tallies: Iterable[Tally]) -> Tally:
    return Tally(*map(sum, zip(*tallies, strict=True)))


def _open_games(
    environments: Sequence[Environment], history_length: int, opening_plies: int, rng: np.random.Generator
) -> list[Game]:
    """Games after their openings, two after each."""
    games = []
    for number in range(0, len(environments), 2):
        games += _open_pair(environments[number : number + 2], history_length, opening_plies, rng)
    return games


def _open_pair(
    environments: Sequence[Environment], history_length: int, opening_plies: int, rng: np.random.Generator
) -> list[Game]:
    """Games after one opening. One that would end them is drawn again; the last of several is left out."""
    for _ in range(OPENING_DRAWS):
        seed, num_plies = int(rng.integers(2**31)), int(rng.integers(opening_plies + 1))
        games = [_open_game(env, history_length, seed, num_plies) for env in environments]
        if not any(game.is_over for game in games):
            return games
    return [Game(env, history_length, seed) for env in environments]


def _open_game(env: Environment, history_length: int, seed: int, num_plies: int) -> Game:
    """A game after so many random moves, or over after fewer."""
    game = Game(env, history_length, seed)
    while len(game.actions) < num_plies and not game.is_over:
        game.move(_random_action(game, seed))
    return game


def _random_action(game: Game, seed: int) -> int:
    """The same for two games with the same seed and number of moves."""
    legal = np.flatnonzero(game.read_mask())
    return int(np.random.default_rng([seed, len(game.actions)]).choice(legal))
