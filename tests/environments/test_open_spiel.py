"""OpenSpiel's games: what the player to move sees and gets, held against the moves that were played."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.checks import check_environment
from distributed_muzero.environments.registry import environment_ids, make_environment
from distributed_muzero.errors import EnvironmentFailure, UnknownEnvironmentError

pytest.importorskip(
    "pyspiel", reason="OpenSpiel isn't installed: pip install 'distributed_muzero[openspiel]'"
)

import pyspiel

from distributed_muzero.environments.open_spiel_games import VIEWS, refusal, trainable_games


def make(game, **options):
    return make_environment(EnvironmentConfig(id=f"openspiel:{game}", **options))


def play(environment, actions):
    """The (reward, observation, is_terminal) of each step."""
    environment.initial_state()
    return [environment.step(action) for action in actions]


def drop(columns):
    """Cells that stones take which are dropped into these columns of a board of 7, the lowest row first."""
    heights = dict.fromkeys(columns, 0)
    cells = []
    for column in columns:
        cells.append(heights[column] * 7 + column)
        heights[column] += 1
    return cells


# game, moves that capture nothing, the cells that they take
PLACING = [
    ("tic_tac_toe", [4, 0, 8, 2, 1], [4, 0, 8, 2, 1]),
    ("connect_four", [3, 3, 0, 3, 6, 0], drop([3, 3, 0, 3, 6, 0])),
    ("connect_four(egocentric_obs_tensor=True)", [3, 3, 0, 3, 6, 0], drop([3, 3, 0, 3, 6, 0])),
    ("mnk(m=5,n=4,k=4)", [7, 0, 19, 2, 11], [7, 0, 19, 2, 11]),
    ("go(board_size=5)", [0, 12, 24, 6, 3], [0, 12, 24, 6, 3]),
    ("gomoku(size=7)", [0, 12, 48, 6, 3], [0, 12, 48, 6, 3]),
    ("havannah(board_size=3)", [0, 12, 1, 13], [0, 12, 1, 13]),
    ("y(board_size=5)", [0, 6, 1, 12], [0, 6, 1, 12]),
]


@pytest.mark.parametrize(("game", "actions", "cells"), PLACING, ids=[game for game, _, _ in PLACING])
def test_own_pieces_come_first_then_the_others(game, actions, cells):
    environment = make(game)
    environment.initial_state()
    for number, action in enumerate(actions, start=1):
        _, observation, _ = environment.step(action)
        taken = [sorted(cells[player:number:2]) for player in (0, 1)]
        own, other = (np.flatnonzero(plane).tolist() for plane in observation[:2])
        player = environment.to_play()
        assert player == number % 2
        assert (own, other) == (taken[player], taken[1 - player])


def test_stones_that_turn_with_the_board_are_counted_for_their_owner():
    """In pentago each move turns a quarter of the board; in othello it takes over what lies between."""
    environment = make("pentago")
    environment.initial_state()
    for number in range(1, 5):
        _, observation, _ = environment.step(int(np.flatnonzero(environment.mask())[0]))
        assert observation[:2].sum((1, 2)).tolist() == [number // 2, (number + 1) // 2]
    environment = make("othello")
    before = environment.initial_state()
    _, after, _ = environment.step(int(np.flatnonzero(environment.mask())[0]))
    assert before[:2].sum((1, 2)).tolist() == [2, 2]
    assert after[:2].sum((1, 2)).tolist() == [1, 4]  # the second player has one left


@pytest.mark.parametrize("game", ["clobber", "lines_of_action", "breakthrough"])
def test_pieces_that_stay_change_places_with_the_mover(game):
    environment = make(game)
    before = environment.initial_state()
    _, after, _ = environment.step(int(np.flatnonzero(environment.mask())[0]))
    assert np.count_nonzero(before[0] != after[1]) == 2  # one piece has moved, which is the other's now
    assert np.count_nonzero(before[1] != after[0]) <= 1  # and has taken one at most
    assert np.count_nonzero(before[0] != after[0]) > 2


def test_the_same_stones_look_the_same_to_whoever_moves():
    """In go a player may pass, so that both can come before the same board."""
    first, second = make("go(board_size=5)"), make("go(board_size=5)")
    stones = play(first, [7, 13])[-1][1]
    turned = play(second, [25, 7, 13])[-1][1]  # after a pass, white plays where black did
    assert (first.to_play(), second.to_play()) == (0, 1)
    assert (stones[:3] == turned[:3]).all()
    assert stones[3].max() == 0 and turned[3].min() == 1  # komi is for one of them: a plane says who moves


def test_a_plane_says_who_moves_where_rules_differ_for_the_players():
    environment = make("hex(board_size=4)")
    game_planes = 9
    assert environment.spec.observation_shape == (game_planes + 1, 4, 4)
    start = environment.initial_state()
    _, after, _ = environment.step(5)
    assert start[-1].max() == 0 and after[-1].min() == 1
    assert make("tic_tac_toe").spec.observation_shape == (3, 3, 3)


# x: the first player wins; o: the second one does; misère: who completes a line loses
FINISHED = [
    ("tic_tac_toe", [0, 3, 1, 4, 2], 0, 1.0),
    ("tic_tac_toe", [0, 3, 1, 4, 8, 5], 1, 1.0),
    ("tic_tac_toe", [4, 0, 8, 2, 1, 7, 3, 5, 6], 0, 0.0),
    ("misere(game=tic_tac_toe())", [0, 3, 1, 4, 2], 0, -1.0),
    ("misere(game=tic_tac_toe())", [0, 3, 1, 4, 8, 5], 1, -1.0),
    ("connect_four", [0, 1, 0, 1, 0, 1, 0], 0, 1.0),
    ("connect_four", [0, 1, 0, 1, 0, 1, 3, 1], 1, 1.0),
]


@pytest.mark.parametrize(("game", "actions", "mover", "reward"), FINISHED)
def test_the_reward_is_the_movers(game, actions, mover, reward):
    environment = make(game)
    steps = play(environment, actions[:-1])
    assert [step[0] for step in steps] == [0.0] * len(steps) and not steps[-1][2]
    assert environment.to_play() == mover
    last, _, is_terminal = environment.step(actions[-1])
    assert (last, is_terminal, environment.truncated) == (reward, True, False)


SMALL = [
    "tic_tac_toe",
    "misere(game=tic_tac_toe())",
    "mnk(m=3,n=3,k=3)",
    "connect_four(rows=3,columns=4,x_in_row=3)",
    "connect_four(rows=3,columns=4,x_in_row=3,egocentric_obs_tensor=True)",
    "nim(pile_sizes=1;2;3)",
    "hex(board_size=3)",
    "y(board_size=3)",
    "clobber(rows=3,columns=3)",
    "breakthrough(rows=4,columns=2)",
    "dots_and_boxes(num_rows=1,num_cols=2)",
]


def solve(environment, game_value):
    """Plays every game out from here, through the environment alone; returns the value for the player to move.

    Asserts that equal observations have equal values, which is what a network can learn, and that the game's own exact
    value is the same.   game_value: of a state for its first player.
    """
    values, seen_at = {}, {}

    def value_here(observation):
        state, player = environment._state, environment.to_play()
        known = values.get(key := observation.tobytes())
        if known is not None and key in seen_at.get(str(state), ()):
            return known
        seen_at.setdefault(str(state), set()).add(key)
        best = -np.inf
        for action in np.flatnonzero(environment.mask()):
            environment._state, environment._player = state.clone(), player
            environment._find_legal()
            reward, after, is_terminal = environment.step(int(action))
            best = max(best, reward - (0.0 if is_terminal else value_here(after)))
        environment._state, environment._player = state, player
        environment._find_legal()
        assert values.setdefault(key, best) == best
        assert best == (game_value(state) if player == 0 else -game_value(state))
        return best

    return value_here(environment.initial_state())


@pytest.mark.parametrize("game", SMALL)
def test_what_is_seen_decides_the_exact_value_and_rewards_lead_to_it(game):
    known = {}

    def game_value(state):
        key = (str(state), state.current_player())
        if state.is_terminal():
            return state.returns()[0]
        if key not in known:
            after = [game_value(state.child(action)) for action in state.legal_actions()]
            known[key] = max(after) if state.current_player() == 0 else min(after)
        return known[key]

    environment = make(game, max_episode_steps=10**9)
    assert solve(environment, game_value) == game_value(environment._game.new_initial_state())


def play_at_random(environment, seed):
    """[(mover, action, reward)] of a game, to its end."""
    rng = np.random.default_rng(seed)
    environment.initial_state()
    steps, is_terminal = [], False
    while not is_terminal:
        mover = environment.to_play()
        action = int(rng.choice(np.flatnonzero(environment.mask())))
        reward, _, is_terminal = environment.step(action)
        steps.append((mover, action, reward))
    return steps


@pytest.mark.parametrize("game", ["dots_and_boxes", "mancala", "nine_mens_morris", "ultimate_tic_tac_toe"])
def test_a_player_who_may_move_twice_finds_a_move_of_the_other_in_between(game):
    environment = make(game)
    idle = environment.spec.num_actions - 1
    for seed in range(3):
        steps = play_at_random(environment, seed)
        state = environment._game.new_initial_state()
        num_idle = 0
        for number, (mover, action, _) in enumerate(steps):
            assert mover == (steps[0][0] + number) % 2
            if action == idle:
                num_idle += 1
                assert state.current_player() != mover
            else:
                assert state.current_player() == mover
                state.apply_action(action)
        assert state.is_terminal() and num_idle > 0
        gained = sum(reward if mover == 0 else -reward for mover, _, reward in steps)
        assert gained == pytest.approx(state.returns()[0])


def test_the_idle_move_is_the_only_one_where_there_is_one_and_a_plane_says_so():
    environment = make("dots_and_boxes(num_rows=1,num_cols=2)")
    idle = environment.spec.num_actions - 1
    box = [0, 2, 4]  # above, below and left of the first box
    for _, observation, _ in play(environment, box):
        assert observation[-1].max() == 0.0
    assert not environment.mask()[idle]
    _, observation, _ = environment.step(5)
    assert environment.to_play() == 0
    assert np.flatnonzero(environment.mask()).tolist() == [idle]
    assert observation[-1].min() == 1.0
    reward, observation, _ = environment.step(idle)
    assert (environment.to_play(), reward, observation[-1].max()) == (1, 0.0, 0.0)


def test_a_second_move_that_was_not_foreseen_is_told():
    environment = make("dots_and_boxes", kwargs={"pass_turns": False})
    with pytest.raises(EnvironmentFailure, match=r"to move twice in a row.*pass_turns: true"):
        play_at_random(environment, 1)
    assert make("tic_tac_toe", kwargs={"pass_turns": True}).spec.num_actions == 10
    with pytest.raises(EnvironmentFailure, match="pass_turns is 'maybe'"):
        make("tic_tac_toe", kwargs={"pass_turns": "maybe"})


def test_parameters_come_by_the_id_or_by_kwargs():
    by_id = make("connect_four(rows=5,columns=6)")
    by_kwargs = make("connect_four", kwargs={"rows": 5, "columns": 6})
    assert by_id.spec.observation_shape == by_kwargs.spec.observation_shape == (3, 5, 6)
    assert by_id.spec.action_shape == (6,) and by_id.spec.num_players == 2


@pytest.mark.parametrize(
    ("game", "message"),
    [
        ("tictactoe", r"no game 'tictactoe' \(did you mean 'tic_tac_toe' or"),
        ("Connect_Four", "did you mean 'connect_four'"),
        ("", "no game ''"),
    ],
)
def test_a_misspelt_game_gets_the_nearest_name(game, message):
    with pytest.raises(UnknownEnvironmentError, match=message):
        make(game)


@pytest.mark.parametrize(
    ("game", "message"),
    [
        ("kuhn_poker", "chance has a part in it"),
        ("2048", "chance has a part in it"),
        ("matrix_pd", "move at the same time"),
        ("phantom_ttt", "hides something"),
        ("chinese_checkers(players=3)", r"3 players; give it fewer, such as \(players=2\)"),
        ("mfg_crowd_modelling", "at the same time|chance"),
        ("connect_four(row=5)", r"no parameter 'row' \(did you mean 'rows'\?\); it takes .*columns, .*rows"),
        ("tic_tac_toe(size=5)", "no parameter 'size'; it takes none"),
        ("connect_four(rows=five)", "OpenSpiel refuses these parameters"),
        ("connect_four(rows=5", "OpenSpiel refuses these parameters.*bracket"),
        ("go(board_size=100)", "OpenSpiel refuses these parameters.*up to 19"),
        ("connect_four(rows=0)", "has 0 numbers in an observation; expected 1 to"),
        ("connect_four(rows=-1)", "has -21 numbers in an observation"),
        ("connect_four(rows=2000,columns=2000)", "has 12000000 numbers in an observation"),
        ("mnk(m=0)", "has 0 actions; expected 1 to"),
        ("hex(board_size=1000)", "has 1000000 actions; expected 1 to 100000"),
        ("misere", "OpenSpiel refuses these parameters: Missing parameter game"),
    ],
)
def test_a_game_that_does_not_fit_says_why(game, message):
    with pytest.raises(EnvironmentFailure, match=message):
        make(game)


def test_two_players_need_opposite_aims():
    fitting = {kind.short_name: kind for kind in pyspiel.registered_games()}["tic_tac_toe"]
    names = ("dynamics", "chance_mode", "information", "provides_observation_tensor")
    names += ("Dynamics", "ChanceMode", "Information", "Utility")
    for utility, fits in (
        ("ZERO_SUM", True),
        ("CONSTANT_SUM", True),
        ("GENERAL_SUM", False),
        ("IDENTICAL", False),
    ):
        kind = SimpleNamespace(**{name: getattr(fitting, name) for name in names})
        kind.utility = getattr(fitting.Utility, utility)
        assert (refusal(kind, 2) is None) == fits
        assert refusal(kind, 1) is None


def test_a_game_with_one_player_is_always_his_turn():
    environment = make("cliff_walking")
    assert environment.spec.num_players == 1
    steps = play_at_random(environment, 1)
    assert {mover for mover, _, _ in steps} == {0}
    assert sum(reward for _, _, reward in steps) <= -len(steps)  # each step costs 1, the cliff 100


def test_a_long_game_is_truncated():
    environment = make("connect_four", max_episode_steps=3)
    steps = play(environment, [0, 1, 2])
    assert [step[2] for step in steps] == [False, False, True] and environment.truncated
    with pytest.raises(EnvironmentFailure, match=r"initial_state\(\) first"):
        environment.step(3)


def test_forbidden_actions_are_refused():
    environment = make("tic_tac_toe")
    play(environment, [4])
    for action in (4, 9, -1):
        with pytest.raises(EnvironmentFailure, match=f"step 1: action {action} is forbidden"):
            environment.step(action)


def test_all_that_fit_are_listed():
    listed = [entry.id for entry in environment_ids() if entry.family == "openspiel"]
    assert listed == [f"openspiel:{game}" for game in trainable_games()]
    assert {"tic_tac_toe", "connect_four", "chess", "go", "othello", "dots_and_boxes"} <= set(
        trainable_games()
    )
    assert not {"kuhn_poker", "matrix_pd", "phantom_ttt", "backgammon"} & set(trainable_games())
    assert VIEWS.keys() <= set(trainable_games())


@pytest.mark.slow
@pytest.mark.parametrize("game", trainable_games())
def test_every_game_keeps_all_promises(game):
    config = EnvironmentConfig(id=f"openspiel:{game}", max_episode_steps=200)
    report = check_environment(
        lambda: make_environment(config), max_episode_steps=200, num_games=3, seconds=5.0
    )
    assert report.passed, report.checks
