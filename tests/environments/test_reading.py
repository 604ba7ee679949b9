"""Positions and actions as text for a person, by the environment's word and without it."""

from __future__ import annotations

import numpy as np
import pytest

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.environments.chain import ChainEnvironment
from distributed_muzero.environments.pettingzoo import AECEnvironment
from distributed_muzero.environments.reading import (
    action_name,
    describe,
    describe_observation,
    draw_fen,
    draw_pieces,
    must_pass,
)
from distributed_muzero.environments.registry import make_environment
from distributed_muzero.errors import EnvironmentFailure
from tests.environments.games import Nim


@pytest.fixture
def play():
    """Plays actions from a new game's beginning: the environment, and its last observation."""

    def start(id, actions=(), **kwargs):
        package = {"openspiel": "pyspiel"}.get(id.partition(":")[0], "pettingzoo")
        pytest.importorskip(package, reason=f"{package} isn't installed")
        environment = make_environment(EnvironmentConfig(id=id, kwargs=kwargs))
        observation = environment.initial_state(1)
        for action in actions:
            _, observation, _ = environment.step(action)
        return environment, observation

    return start


def test_open_spiel_says_its_own_positions_and_moves(play):
    environment, observation = play("openspiel:tic_tac_toe")
    assert action_name(environment, 4) == "x(1,1)"
    _, observation, _ = environment.step(4)
    assert describe(environment, observation) == "...\n.x.\n..."
    assert action_name(environment, 0) == "o(0,0)"


def test_a_position_can_be_read_after_the_end(play):
    environment, observation = play("openspiel:tic_tac_toe", [0, 3, 1, 4, 2])
    assert describe(environment, observation) == "xxx\noo.\n..."
    environment, observation = play("pettingzoo:connect_four_v3", [0, 1, 0, 1, 0, 1, 0])
    assert describe(environment, observation).splitlines()[2:] == [
        "x . . . . . .",
        "x o . . . . .",
        "x o . . . . .",
        "x o . . . . .",
        "0 1 2 3 4 5 6",
    ]


def test_chess_and_shogi_are_shown_as_boards(play):
    environment, observation = play("openspiel:chess")
    [opening] = [a for a in np.flatnonzero(environment.mask()) if action_name(environment, int(a)) == "e4"]
    _, observation, _ = environment.step(int(opening))
    lines = describe(environment, observation).splitlines()
    assert lines[0] == "8 r n b q k b n r" and lines[4] == "4 . . . . P . . ."
    assert lines[8] == "  a b c d e f g h" and lines[9].startswith("b KQkq")
    environment, observation = play("openspiel:shogi")
    lines = describe(environment, observation).splitlines()
    assert lines[1] == "b . r . . . . . b ." and lines[9] == "  9 8 7 6 5 4 3 2 1"
    move = next(int(a) for a in np.flatnonzero(environment.mask()) if action_name(environment, a) == "7g7f")
    _, observation, _ = environment.step(move)
    assert describe(environment, observation).splitlines()[5:7] == [
        "f . . P . . . . . .",
        "g P P . P P P P P P",
    ]


def test_promoted_pieces_keep_the_columns():
    assert draw_fen("k1/+P1 b - 1", "ab", "21") == " a  k  .\n b +P  .\n    2  1\nb - 1"


def test_the_move_in_between_of_who_must_wait_is_a_pass_that_does_nothing(play):
    environment, _ = play("openspiel:dots_and_boxes(num_rows=1,num_cols=1)")
    for _ in range(3):
        assert not must_pass(environment)
        environment.step(int(np.flatnonzero(environment.mask())[0]))
    environment, _ = play("openspiel:dots_and_boxes(num_rows=1,num_cols=2)")
    passes = []
    is_terminal = False
    while not is_terminal:
        legal = np.flatnonzero(environment.mask())
        names = [action_name(environment, action) for action in legal]
        assert (names == ["pass"]) == must_pass(environment)
        passes.append(must_pass(environment))
        _, _, is_terminal = environment.step(int(legal[0]))
    assert any(passes)


def test_pieces_keep_their_mark_whoever_is_to_move(play):
    for num_moves, middle in ((1, "3 x 5"), (2, "3 x 5"), (3, "3 x x")):
        environment, observation = play("pettingzoo:tictactoe_v3", [4, 0, 5][:num_moves])
        assert describe(environment, observation).splitlines()[1] == middle
    assert describe(environment, observation) == "o 1 2\n3 x x\n6 7 8"
    assert action_name(environment, 7) == "7"


def test_go_names_points_as_on_a_board_that_is_read_from_below(play):
    environment, observation = play("pettingzoo:go_v5", board_size=5)
    names = [action_name(environment, action) for action in (0, 4, 20, 24, 25)]
    assert names == ["A5", "E5", "A1", "E1", "pass"]
    environment, observation = play("pettingzoo:go_v5", [1, 24], board_size=5)
    assert describe(environment, observation) == "\n".join(
        [" 5 . x . . .", " 4 . . . . .", " 3 . . . . .", " 2 . . . . .", " 1 . . . . o", "   A B C D E"]
    )


def test_chess_names_moves_by_squares_for_both_sides(play):
    environment, observation = play("pettingzoo:chess_v6")
    names = {action_name(environment, action): int(action) for action in np.flatnonzero(environment.mask())}
    assert len(names) == 20 and {"e2e4", "g1f3"} <= names.keys()
    _, observation, _ = environment.step(names["e2e4"])
    replies = {action_name(environment, action) for action in np.flatnonzero(environment.mask())}
    assert len(replies) == 20 and {"e7e5", "g8f6"} <= replies
    assert describe(environment, observation).splitlines()[4] == "4 . . . . P . . ."


def test_an_aec_environment_without_a_board_shows_what_it_observes(play):
    pytest.importorskip("pettingzoo")
    from pettingzoo.classic.connect_four import connect_four

    environment = AECEnvironment(connect_four.env(), "own", 100)
    environment.initial_state(1)
    _, observation, _ = environment.step(3)
    assert describe(environment, observation).splitlines()[-1] == ". . . 1 . . ."
    assert action_name(environment, 3) == "3"


def test_planes_become_a_board_of_plane_numbers():
    planes = np.zeros((4, 2, 3), np.float32)
    planes[0, 0, 1] = planes[2, 0, 1] = 1
    planes[1, 1, 2] = 1
    planes[3] = 1
    assert describe_observation(planes) == ". 0 .\n. . 1\neverywhere: 3 is 1"


def test_many_planes_stay_apart():
    planes = np.zeros((40, 1, 2), np.int8)
    planes[38, 0, 1] = 1
    assert describe_observation(planes) == " . 38"


@pytest.mark.parametrize(
    ("observation", "text"),
    [
        (np.eye(11)[7], "7 of 0 … 10"),
        (np.array([0.25, -1, 3]), "0.25 -1 3"),
        (np.array([1.0]), "1"),
        (np.array(2.0), "2"),
        (np.array([[0, 12], [3, 4]]), " 0 12\n 3  4"),
        (np.zeros(100), " ".join(["0"] * 64) + " … (100 numbers)"),
    ],
)
def test_other_observations_are_shown_as_numbers(observation, text):
    assert describe_observation(observation) == text


def test_the_first_players_pieces_are_x():
    own, other = np.array([[1, 0]]), np.array([[0, 1]])
    assert draw_pieces(own, other, 0) == "x o"
    assert draw_pieces(own, other, 1) == "o x"


def test_an_environment_without_these_methods_can_be_read():
    environment = Nim(10)
    assert describe(environment, environment.initial_state()) == "10 of 0 … 10"
    assert action_name(environment, 2) == "2" and not must_pass(environment)
    chain = ChainEnvironment()
    assert describe(chain, chain.initial_state()) == "3 of 0 … 9"


def test_joint_actions_are_named_by_their_parts():
    environment = Nim(10)
    environment.spec = EnvironmentSpec("joint", (1,), np.dtype(np.float32), (2, 3))
    assert [action_name(environment, action) for action in (0, 4)] == ["0,0", "1,1"]


def test_ones_own_words_count_and_mistakes_in_them_are_told():
    class Spoken(Nim):
        def describe(self):
            return f"{self.left} stones"

        def action_name(self, action):
            return {0: "take 1", 1: 5}[action]

    environment = Spoken(10)
    assert describe(environment, environment.initial_state()) == "10 stones"
    assert action_name(environment, 0) == "take 1"
    with pytest.raises(EnvironmentFailure, match=r"nim: action_name\(1\) returned 5; expected text"):
        action_name(environment, 1)
    with pytest.raises(EnvironmentFailure, match=r"nim: action_name\(2\) raised KeyError: 2"):
        action_name(environment, 2)
