"""Games between two players: colours, openings, what counts as won."""

from __future__ import annotations

import numpy as np
import pytest

from distributed_muzero.algorithm.acting import Game
from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.registry import make_environment
from distributed_muzero.errors import EnvironmentFailure
from distributed_muzero.matches.match import Tally, outcome, play_match, play_moves
from distributed_muzero.matches.players import RandomPlayer

pytest.importorskip("pyspiel")

from distributed_muzero.environments import open_spiel


def tic_tac_toe(max_episode_steps: int = 100):
    config = EnvironmentConfig(id="openspiel:tic_tac_toe", max_episode_steps=max_episode_steps)
    return open_spiel.make(config)


class Scripted:
    """Plays the first legal action of a list; writes down in which positions it was asked."""

    is_deterministic = True

    def __init__(self, name, preferred):
        self.name, self.preferred, self.asked = name, preferred, []

    def choose(self, games, rng):
        self.asked += [tuple(game.actions) for game in games]
        return [next(a for a in self.preferred if game.read_mask()[a]) for game in games]


def test_random_players_win_as_often_as_counting_all_games_says():
    result = play_match(RandomPlayer(), RandomPlayer(), tic_tac_toe, 4000, np.random.default_rng(1))
    # Of uniformly random games, the first player wins 58.49%, the second 28.81%, and 12.70% are drawn.
    for tally, wins, losses in ((result.first, 0.5849, 0.2881), (result.second, 0.2881, 0.5849)):
        assert tally.games == 2000
        assert tally.wins / 2000 == pytest.approx(wins, abs=0.033)
        assert tally.losses / 2000 == pytest.approx(losses, abs=0.033)
    assert result.score == pytest.approx(0.5, abs=0.03)
    assert result.truncated == 0


def test_each_opening_is_played_with_both_colours():
    one, other = Scripted("one", range(9)), Scripted("other", range(8, -1, -1))
    result = play_match(one, other, tic_tac_toe, 40, np.random.default_rng(2), opening_plies=3)
    first_asked = {}
    for player in (one, other):
        for actions in player.asked:
            first_asked.setdefault(player.name, set()).add(actions)
    openings = {actions for actions in first_asked["one"] | first_asked["other"] if len(actions) <= 3}
    assert {len(opening) for opening in openings} >= {0, 1, 2, 3}
    assert result.total.games == 40 and result.first.games == result.second.games == 20


def test_the_better_colour_of_a_scripted_game_wins_for_whoever_has_it():
    """Both play 0, 3, 1, 4, 2, 5: who begins has the upper row first."""
    one, other = Scripted("one", (0, 1, 2, 3, 4, 5)), Scripted("other", (3, 4, 5, 0, 1, 2))
    result = play_match(one, other, tic_tac_toe, 10, np.random.default_rng(3), opening_plies=0)
    assert result.first == Tally(5, 0, 0) and result.second == Tally(0, 0, 5)
    assert result.score == 0.5 and result.mean_plies == 5


def test_an_outcome_is_seen_from_the_side_that_is_asked_for():
    game = Game(tic_tac_toe(), 1, 0)
    for action in (0, 3, 1, 4, 2):
        play_moves([game], [action])
    assert game.is_over and outcome(game, 0) == 1 and outcome(game, 1) == -1


def test_games_cut_by_the_limit_are_counted():
    result = play_match(RandomPlayer(), RandomPlayer(), lambda: tic_tac_toe(3), 6, np.random.default_rng(4))
    assert result.truncated == 6 and result.total == Tally(0, 6, 0)


def test_one_player_has_no_opponent():
    with pytest.raises(
        EnvironmentFailure, match="CartPole-v1 has 1 player; an opponent needs a game for two"
    ):
        play_match(
            RandomPlayer(),
            RandomPlayer(),
            lambda: make_environment(EnvironmentConfig(id="CartPole-v1")),
            2,
            np.random.default_rng(5),
        )
