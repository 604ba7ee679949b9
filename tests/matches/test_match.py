"""Games between two players: colours, openings, what counts as won."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distributed_muzero.algorithm.acting import Game
from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.environments.registry import make_environment
from distributed_muzero.errors import ContractError, EnvironmentFailure
from distributed_muzero.matches.match import Tally, outcome, play_match
from distributed_muzero.matches.players import RandomPlayer

pytest.importorskip("pyspiel")

from distributed_muzero.environments import open_spiel


def tic_tac_toe(max_episode_steps: int = 100):
    config = EnvironmentConfig(id="openspiel:tic_tac_toe", max_episode_steps=max_episode_steps)
    return open_spiel.make(config)


class Scripted:
    """Plays the first legal action of a list."""

    is_deterministic = True

    def __init__(self, name, preferred):
        self.name, self.preferred = name, preferred

    def choose(self, games, rng):
        return [next(a for a in self.preferred if game.read_mask()[a]) for game in games]


class Named:
    """Plays the first legal move of a list of names."""

    name = "named"
    is_deterministic = True

    def __init__(self, *names):
        self.names = names

    def choose(self, games, rng):
        return [self.action(game) for game in games]

    def action(self, game):
        legal = {game.env.action_name(action): action for action in np.flatnonzero(game.read_mask())}
        return next(int(legal[name]) for name in self.names if name in legal)


class Recording(Scripted):
    """Plays the first legal action, and writes down for each environment who was asked first, and where."""

    def __init__(self, name, begun):
        super().__init__(name, range(9))
        self.begun, self.most_games = begun, 0

    def choose(self, games, rng):
        self.most_games = max(self.most_games, len(games))
        for game in games:
            if all(game is not other for other, *_ in self.begun):
                self.begun.append((game, self.name, tuple(game.actions)))
        return super().choose(games, rng)


class Counted:
    """Makes so many environments and no more, and counts those that are open."""

    def __init__(self, limit=1000):
        self.limit, self.num_made, self.num_open = limit, 0, 0

    def __call__(self):
        if self.num_made == self.limit:
            raise EnvironmentFailure("no more of them")
        env = tic_tac_toe()
        env.close = self.closed
        self.num_made += 1
        self.num_open += 1
        return env

    def closed(self):
        self.num_open -= 1


class Paying:
    """Two moves, each of which pays its mover."""

    spec = EnvironmentSpec("paying", (1,), np.dtype(np.float32), (1,), num_players=2)
    truncated = False
    pays = (2.5, 1.0)

    def initial_state(self, seed=None):
        self.moved = 0
        return np.zeros(1, np.float32)

    def step(self, action):
        self.moved += 1
        return self.pays[self.moved - 1], np.zeros(1, np.float32), self.moved == 2

    def mask(self):
        return np.ones(1, bool)

    def to_play(self):
        return self.moved % 2

    def close(self):
        pass


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
    environments, begun = [], []

    def make():
        environments.append(tic_tac_toe())
        return environments[-1]

    players = [Recording(name, begun) for name in ("one", "other")]
    result = play_match(*players, make, 40, np.random.default_rng(2), opening_plies=3)
    by_environment = {id(game.env): (name, actions) for game, name, actions in begun}
    begun = [by_environment[id(env)] for env in environments]
    assert len(begun) == 40
    openings = [actions for _, actions in begun]
    assert openings[::2] == openings[1::2]
    assert {len(opening) for opening in openings} == {0, 1, 2, 3}
    assert len({opening for opening in openings if len(opening) == 3}) > 1
    for (name, actions), (other_name, _) in zip(begun[::2], begun[1::2], strict=True):
        # Whose move it is behind the opening: the first player has the first move of the game of each pair.
        assert (name, other_name) == (("one", "other") if len(actions) % 2 == 0 else ("other", "one"))
    assert result.first.games == result.second.games == 20


def test_the_better_colour_of_a_scripted_game_wins_for_whoever_has_it():
    """Both play 0, 3, 1, 4, 2, 5: who begins has the upper row first."""
    one, other = Scripted("one", (0, 1, 2, 3, 4, 5)), Scripted("other", (3, 4, 5, 0, 1, 2))
    result = play_match(one, other, tic_tac_toe, 10, np.random.default_rng(3), opening_plies=0)
    assert result.first == Tally(5, 0, 0) and result.second == Tally(0, 0, 5)
    assert result.score == 0.5 and result.mean_plies == 5


def test_the_first_move_is_the_movers_whatever_its_number():
    """White begins, who is player 1, and is mated in two moves: whoever begins loses."""
    names = ("f3", "g4", "e5", "Qh4#")
    config = EnvironmentConfig(id="openspiel:chess")
    result = play_match(
        Named(*names),
        Named(*names),
        lambda: open_spiel.make(config),
        4,
        np.random.default_rng(3),
        opening_plies=0,
    )
    assert result.first == Tally(0, 0, 2) and result.second == Tally(2, 0, 0)
    assert result.mean_plies == 4


def test_an_outcome_is_seen_from_the_side_that_is_asked_for():
    game = Game(tic_tac_toe(), 1, 0)
    for action in (0, 3, 1, 4, 2):
        game.move(action)
    assert game.is_over and outcome(game, 0) == 1 and outcome(game, 1) == -1


def test_an_outcome_is_the_difference_of_rewards():
    game = Game(Paying(), 1, 0)
    for _ in range(2):
        game.move(0)
    assert outcome(game, 0) == 1.5 and outcome(game, 1) == -1.5
    result = play_match(RandomPlayer(), RandomPlayer(), Paying, 6, np.random.default_rng(1))
    assert result.first == Tally(3, 0, 0) and result.second == Tally(0, 0, 3)


@pytest.mark.parametrize(("number", "better"), [(-1, 2), (0, 2), (1, 2), (7, 8)])
def test_games_without_their_pair_are_refused(number, better):
    with pytest.raises(ContractError, match=rf"num_games is {number}; expected an even .* ask for {better}$"):
        play_match(RandomPlayer(), RandomPlayer(), tic_tac_toe, number, np.random.default_rng(1))


def test_many_games_are_played_a_part_at_a_time():
    make, begun = Counted(), []
    players = [Recording(name, begun) for name in ("one", "other")]
    result = play_match(*players, make, 300, np.random.default_rng(6), opening_plies=0)
    # Both take the first free cell, and who begins has 2, 4, 6 as the seventh move.
    assert result.first == Tally(150, 0, 0) and result.second == Tally(0, 0, 150)
    assert result.mean_plies == 7 and len(begun) == 300
    assert (make.num_made, make.num_open) == (128, 0)
    assert max(player.most_games for player in players) == 128


def test_parts_of_a_match_are_counted_together():
    """Of 128 games and 2."""
    begun = []
    players = [Recording(name, begun) for name in ("one", "other")]
    result = play_match(*players, lambda: tic_tac_toe(7), 130, np.random.default_rng(7), opening_plies=3)
    games = [game for game, *_ in begun]
    assert len(games) == result.total.games == 130 and result.first.games == result.second.games == 65
    assert result.mean_plies == pytest.approx(np.mean([len(game.actions) for game in games]))
    # Until then a game is won by seven moves or cut there; a reward is the winner's alone.
    cut = sum(not any(game.rewards) for game in games)
    assert result.truncated == result.total.draws == cut and 0 < cut < 130


def test_environments_are_closed_when_one_of_them_cannot_be_made():
    make = Counted(limit=5)
    with pytest.raises(EnvironmentFailure, match="no more of them"):
        play_match(RandomPlayer(), RandomPlayer(), make, 8, np.random.default_rng(1))
    assert (make.num_made, make.num_open) == (5, 0)


def test_an_opening_that_ends_its_game_is_drawn_again():
    """0 … 3 random moves, of which the third ends a game: 0, 1 and 2 are left, equally likely."""
    begun = []
    players = [Recording(name, begun) for name in ("one", "other")]
    play_match(*players, lambda: tic_tac_toe(3), 600, np.random.default_rng(8), opening_plies=3)
    shares = np.bincount([len(actions) for *_, actions in begun]) / 600
    # Three standard deviations of a share of 300 pairs; with openings left out at once, 0 moves have ½.
    assert shares == pytest.approx([1 / 3] * 3, abs=0.082)


def test_openings_that_always_end_games_are_left_out():
    result = play_match(
        RandomPlayer(), RandomPlayer(), lambda: tic_tac_toe(1), 20, np.random.default_rng(9), opening_plies=50
    )
    assert result.truncated == 20 and result.mean_plies == 1


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


def test_a_result_can_be_written_as_json():
    result = play_match(RandomPlayer(), RandomPlayer(), tic_tac_toe, 2, np.random.default_rng(6))
    assert json.loads(json.dumps(result.to_json()))["games"] == 2
