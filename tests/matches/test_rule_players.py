"""Players who know the rules: one that never loses, one that searches by random games."""

from __future__ import annotations

import numpy as np
import pytest

from distributed_muzero.algorithm.acting import Game
from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.matches.match import Tally, play_match
from distributed_muzero.matches.players import RandomPlayer

pytest.importorskip("pyspiel")

from open_spiel.python.algorithms import mcts

from distributed_muzero.environments import open_spiel
from distributed_muzero.matches.rule_players import EXPLORATION, MctsPlayer, MinimaxPlayer
from distributed_muzero.matches.solver import rules_of, solve


def maker(game):
    return lambda: open_spiel.make(EnvironmentConfig(id=f"openspiel:{game}"))


def rules(game):
    return rules_of(maker(game)(), "a test")


@pytest.fixture(scope="module")
def perfect():
    return MinimaxPlayer(solve(rules("tic_tac_toe")))


def test_minimax_never_loses(perfect):
    opponents = (RandomPlayer(), MctsPlayer(rules("tic_tac_toe"), 20))
    results = [
        play_match(perfect, opponent, maker("tic_tac_toe"), 200, np.random.default_rng(1))
        for opponent in opponents
    ]
    assert [result.total.losses for result in results] == [0, 0]
    assert results[0].score > 0.9
    assert results[1].total.wins > 0


def test_two_of_it_always_draw(perfect):
    result = play_match(perfect, perfect, maker("tic_tac_toe"), 100, np.random.default_rng(2))
    assert result.total == Tally(0, 100, 0)


def test_it_plays_all_that_is_optimal(perfect):
    game = Game(maker("tic_tac_toe")(), 1, 0)
    # X on 0 and 1, O on 3 and 4: X wins at once by 2; by 5 too, which keeps O from a row and makes two threats.
    for action in (0, 3, 1, 4):
        game.move(action)
    rng = np.random.default_rng(3)
    played = {perfect.choose([game], rng)[0] for _ in range(60)}
    assert played == set(perfect.solution.optimal_actions(game.env.state).tolist()) and 2 in played


@pytest.mark.parametrize("game", ["dots_and_boxes(num_rows=1,num_cols=3)", "nim(pile_sizes=1;2;3)"])
def test_it_keeps_the_value_where_players_move_twice_or_cannot_draw(game):
    solution = solve(rules(game))
    value = np.sign(solution.values[0])
    result = play_match(
        MinimaxPlayer(solution), RandomPlayer(), maker(game), 60, np.random.default_rng(4), opening_plies=0
    )
    best = result.first if value > 0 else result.second
    assert value != 0 and best == Tally(30, 0, 0)


def test_mcts_with_1000_simulations_beats_random_moves():
    searching = MctsPlayer(rules("connect_four"), 1000)
    result = play_match(searching, RandomPlayer(), maker("connect_four"), 10, np.random.default_rng(5))
    assert result.total.wins == 10
    result = play_match(
        MctsPlayer(rules("tic_tac_toe"), 1000),
        RandomPlayer(),
        maker("tic_tac_toe"),
        60,
        np.random.default_rng(5),
    )
    assert result.total.losses == 0 and result.score > 0.85


def test_more_simulations_play_better():
    """In connect four; the score of 0.5 of equal players lies far below."""
    few, many = (MctsPlayer(rules("connect_four"), number) for number in (10, 300))
    result = play_match(many, few, maker("connect_four"), 20, np.random.default_rng(6))
    assert result.score >= 0.9


def test_the_same_seed_plays_the_same_games():
    searching = MctsPlayer(rules("tic_tac_toe"), 30)

    def played(seed):
        return play_match(
            searching, searching, maker("tic_tac_toe"), 20, np.random.default_rng(seed), opening_plies=0
        )

    assert played(7) == played(7)
    game = Game(maker("connect_four")(), 1, 0)
    moves = [searching_moves(game, seed) for seed in (8, 8, 9)]
    assert moves[0] == moves[1] != moves[2]


def searching_moves(game, seed):
    rng = np.random.default_rng(seed)
    return [MctsPlayer(rules("connect_four"), 5).choose([game], rng)[0] for _ in range(20)]


def test_it_is_the_search_of_openspiels_python():
    """Both finish a row, stop one, and choose alike on average: shares of moves from a position in the middle."""
    game = rules("tic_tac_toe")
    state = game.new_initial_state()
    for action in (0, 4, 1):  # O has to answer at 2
        state.apply_action(action)
    assert {our_move(game, state, 50, seed) for seed in range(20)} == {2}
    assert {their_move(game, state, 50, seed) for seed in range(20)} == {2}
    start = game.new_initial_state()
    ours, theirs = (
        np.bincount([move(game, start, 40, seed) for seed in range(300)], minlength=9) / 300
        for move in (our_move, their_move)
    )
    assert ours[4] == pytest.approx(theirs[4], abs=0.13)  # three standard deviations of two shares of 300
    assert ours[[0, 2, 6, 8]].sum() == pytest.approx(theirs[[0, 2, 6, 8]].sum(), abs=0.13)


def our_move(game, state, num_simulations, seed):
    return MctsPlayer(game, num_simulations)._bot(np.random.default_rng(seed)).step(state)


def their_move(game, state, num_simulations, seed):
    random = np.random.RandomState(seed)
    evaluator = mcts.RandomRolloutEvaluator(1, random)
    bot = mcts.MCTSBot(game, EXPLORATION, num_simulations, evaluator, solve=True, random_state=random)
    return bot.step(state)
