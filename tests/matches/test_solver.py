"""Exact values, held against OpenSpiel's own solvers, against theory, and against every order of moves."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.registry import make_environment
from distributed_muzero.errors import EnvironmentFailure
from distributed_muzero.matches import solver

pytest.importorskip("pyspiel")

import pyspiel
from open_spiel.python.algorithms import minimax, minimax_solver

# Small ones of every game that is told by its text; dots_and_boxes has players who move twice.
SMALL = [
    "tic_tac_toe",
    "mnk(m=3,n=2,k=2)",
    "connect_four(rows=3,columns=3,x_in_row=3)",
    "nim(pile_sizes=1;3;2)",
    "nim(pile_sizes=1;3;2,is_misere=False)",
    "hex(num_cols=3,num_rows=2)",
    "hex(num_cols=2,num_rows=2,swap=True)",
    "y(board_size=3)",
    "havannah(board_size=2)",
    "havannah(board_size=2,swap=True)",
    "breakthrough(rows=4,columns=2)",
    "clobber(rows=3,columns=3)",
    "dots_and_boxes(num_rows=1,num_cols=2)",
    "dots_and_boxes(num_rows=2,num_cols=1,utility_margin=True)",
    "misere(game=connect_four(rows=3,columns=3,x_in_row=3))",
]


@functools.lru_cache
def solved(game):
    return solver.solve(pyspiel.load_game(game))


def states_of(game):
    """One state of each position that isn't over, by OpenSpiel's text and player."""
    found, waiting = {}, [pyspiel.load_game(game).new_initial_state()]
    while waiting:
        state = waiting.pop()
        if not state.is_terminal() and (key := (state.current_player(), str(state))) not in found:
            found[key] = state
            waiting += [state.child(action) for action in state.legal_actions()]
    return list(found.values())


# OpenSpiel's solver looks positions up by the text alone, which doesn't say who moves in these.
SAYS_NO_PLAYER = {"breakthrough(rows=4,columns=2)", "hex(num_cols=2,num_rows=2,swap=True)"}


@pytest.mark.parametrize("game", [game for game in SMALL if game not in SAYS_NO_PLAYER])
def test_values_and_moves_are_those_of_openspiels_solver(game):
    table = minimax_solver.MinimaxSolver(game).solve()
    states = states_of(game)
    assert len(states) == len(table) == len(solved(game).values)
    for state in states:
        entry = table[str(state)]
        assert solved(game).value(state) == entry.value
        optimal = np.flatnonzero(entry.action_values == entry.value)
        assert sorted(solved(game).optimal_actions(state)) == optimal.tolist()


@pytest.mark.parametrize(
    "game",
    [
        "tic_tac_toe",
        "connect_four(rows=3,columns=4,x_in_row=3)",
        "breakthrough(rows=5,columns=2)",
        "hex(num_cols=3,num_rows=3,swap=True)",
    ],
)
def test_values_and_moves_are_those_of_openspiels_alpha_beta(game):
    loaded, rng = pyspiel.load_game(game), np.random.default_rng(1)
    for _ in range(40):
        state = loaded.new_initial_state()
        for _ in range(rng.integers(4, 9)):
            if state.is_terminal():
                break
            before, action = state.clone(), int(rng.choice(state.legal_actions()))
            state.apply_action(action)
        if state.is_terminal():
            state = before
        value, _ = minimax.alpha_beta_search(loaded, state=state, maximum_depth=100)
        assert solved(game).value(state) == value
        keep = [
            action
            for action in state.legal_actions()
            if worth(loaded, state.child(action), state.current_player()) == value
        ]
        assert sorted(solved(game).optimal_actions(state).tolist()) == keep


def worth(game, state, player):
    if state.is_terminal():
        return state.player_return(player)
    value, _ = minimax.alpha_beta_search(game, state=state, maximum_depth=100, maximizing_player_id=player)
    return value


@pytest.mark.parametrize("is_misere", [True, False])
def test_nim_is_lost_where_theory_says(is_misere):
    """Normal play: where the piles' binary digits cancel out. Misère: the same while a pile holds 2 or more, else
    where the number of piles left is odd."""
    game = f"nim(pile_sizes=2;3;4,is_misere={is_misere})"
    for state in states_of(game):
        piles = [int(number) for number in str(state).split(": ")[1].split()]
        cancels = functools.reduce(operator.xor, piles) == 0
        is_lost = sum(piles) % 2 == 1 if is_misere and max(piles) <= 1 else cancels
        assert solved(game).value(state) == (-1 if is_lost else 1)


def test_known_numbers_of_tic_tac_toe():
    solution = solved("tic_tac_toe")
    # 5,478 positions, of which 958 are over.
    assert len(solution.values) == 4520
    state = pyspiel.load_game("tic_tac_toe").new_initial_state()
    assert solution.value(state) == 0 and solution.optimal_actions(state).tolist() == list(range(9))
    state.apply_action(0)
    assert solution.optimal_actions(state).tolist() == [4]  # the centre alone answers a corner


@pytest.mark.parametrize("game", SMALL)
def test_the_text_decides_what_comes(game):
    """Every order of moves is played: positions with one key allow the same moves, to positions with the same keys."""
    loaded = pyspiel.load_game(game)
    assert solver.is_told_by_text(loaded)
    key = solver.position_key(loaded)
    seen = {}

    def describe(state):
        return tuple(state.returns()) if state.is_terminal() else key(state)

    def play(state):
        children = {action: state.child(action) for action in state.legal_actions()}
        moves = {action: describe(child) for action, child in children.items()}
        assert seen.setdefault(key(state), moves) == moves
        for child in children.values():
            if not child.is_terminal():
                play(child)

    play(loaded.new_initial_state())
    assert len(seen) == len(solved(game).values)


def test_every_game_that_is_told_by_its_text_is_played_here():
    assert {pyspiel.load_game(game).get_type().short_name for game in SMALL} - {
        "misere"
    } == solver.TOLD_BY_TEXT


def test_other_games_are_told_by_their_moves(monkeypatch):
    assert not solver.is_told_by_text(pyspiel.load_game("checkers"))
    assert not solver.is_told_by_text(pyspiel.load_game("misere(game=checkers())"))
    game = "connect_four(rows=3,columns=3,x_in_row=3)"
    by_text = solved(game)
    monkeypatch.setattr(solver, "TOLD_BY_TEXT", frozenset())
    by_moves = solver.solve(pyspiel.load_game(game))
    assert len(by_moves.values) > 2 * len(by_text.values)
    for state in states_of(game):
        assert by_moves.value(state) == by_text.value(state)
        assert set(by_moves.optimal_actions(state)) == set(by_text.optimal_actions(state))


def test_a_path_leads_to_its_position():
    game = "dots_and_boxes(num_rows=1,num_cols=2)"
    graph = solved(game).graph
    for key, number in graph.numbers.items():
        state = pyspiel.load_game(game).new_initial_state()
        for action in graph.path(number):
            state.apply_action(action)
        assert graph.key(state) == key
        assert graph.actions[graph.moves(number)].tolist() == state.legal_actions()


def test_a_game_with_more_positions_is_refused():
    with pytest.raises(
        EnvironmentFailure, match=r"connect_four.* has more than 1,000 positions: too many to know"
    ):
        solver.solve(pyspiel.load_game("connect_four"), max_positions=1000)
    with pytest.raises(EnvironmentFailure, match="more than 500 positions"):
        solver.solve(pyspiel.load_game("othello"), max_positions=500)
    assert len(solver.solve(pyspiel.load_game("tic_tac_toe"), max_positions=4520).values) == 4520
    with pytest.raises(EnvironmentFailure, match="more than 4,519 positions"):
        solver.solve(pyspiel.load_game("tic_tac_toe"), max_positions=4519)


def test_a_game_that_may_be_very_long_is_refused_at_once():
    with pytest.raises(EnvironmentFailure, match=r"chess\(\) may go on for 17,695 moves: too many"):
        solver.solve(pyspiel.load_game("chess"))


def test_a_game_that_goes_in_circles_has_no_exact_values():
    graph = solver.Graph(
        str.encode,
        {b"a": 0, b"b": 1},
        np.array([0, 1], np.int8),
        np.array([0, 2]),
        np.array([0, 1, 0]),
        np.array([1, -1, 0]),  # the start leads to the other position, or ends; the other one leads back
        np.array([0.0]),
        np.array([-1, 0]),
        np.array([-1, 0]),
    )
    with pytest.raises(EnvironmentFailure, match="positions of this game come back"):
        graph.back_up(lambda of_moves: np.maximum.reduceat(of_moves, graph.starts))


@pytest.mark.parametrize(
    ("id", "message"),
    [
        (
            "pettingzoo:connect_four_v3",
            "minimax plays by OpenSpiel's rules.*train on openspiel:connect_four for it",
        ),
        ("pettingzoo:tictactoe_v3", "train on openspiel:tic_tac_toe for it"),
        ("chain", "which chain doesn't offer; expected an environment openspiel:GAME"),
        ("openspiel:cliff_walking", "openspiel:cliff_walking has one player; minimax needs a game for two"),
    ],
)
def test_who_needs_openspiels_rules_says_so(id, message):
    if id.startswith("pettingzoo"):
        pytest.importorskip("pettingzoo")
    with pytest.raises(EnvironmentFailure, match=message):
        solver.rules_of(make_environment(EnvironmentConfig(id=id)), "minimax")
