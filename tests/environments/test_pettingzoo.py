"""PettingZoo's board games: what the player to move sees and gets."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from gymnasium import spaces

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.checks import check_environment
from distributed_muzero.environments.pettingzoo import AECEnvironment
from distributed_muzero.environments.registry import environment_ids, make_environment
from distributed_muzero.errors import EnvironmentFailure, NonFiniteError, UnknownEnvironmentError

MISSING = "PettingZoo isn't installed: pip install 'distributed_muzero[pettingzoo]'"


@pytest.fixture
def make():
    pytest.importorskip("pettingzoo", reason=MISSING)
    return lambda game, **options: make_environment(EnvironmentConfig(id=f"pettingzoo:{game}", **options))


def drop(columns):
    """Cells that stones take which are dropped into these columns of a board of 6 × 7, the highest row first."""
    heights = dict.fromkeys(columns, 0)
    cells = []
    for column in columns:
        cells.append((5 - heights[column]) * 7 + column)
        heights[column] += 1
    return cells


PLACING = [
    ("connect_four_v3", {}, [3, 3, 0, 3, 6, 0], drop([3, 3, 0, 3, 6, 0])),
    ("tictactoe_v3", {}, [4, 0, 8, 2, 1], [4, 0, 8, 2, 1]),
    ("go_v5", {"board_size": 5}, [0, 12, 24, 6, 3], [0, 12, 24, 6, 3]),
]


@pytest.mark.parametrize(("game", "kwargs", "actions", "cells"), PLACING, ids=[row[0] for row in PLACING])
def test_own_pieces_come_first_then_the_others(make, game, kwargs, actions, cells):
    environment = make(game, kwargs=kwargs)
    environment.initial_state()
    for number, action in enumerate(actions, start=1):
        _, observation, _ = environment.step(action)
        taken = [sorted(cells[player:number:2]) for player in (0, 1)]
        player = environment.to_play()
        assert player == number % 2
        # Transposed boards are the same board: stones are compared as sets of cells in either reading.
        own, other = (np.flatnonzero(plane).tolist() for plane in observation[:2])
        turned = [np.flatnonzero(plane.T).tolist() for plane in observation[:2]]
        assert [taken[player], taken[1 - player]] in ([own, other], turned)


def test_older_boards_of_go_are_seen_by_the_mover_too(make):
    environment = make("go_v5", kwargs={"board_size": 5})
    environment.initial_state()
    moves = [0, 12, 24, 6, 3]
    for move in moves:
        _, observation, _ = environment.step(move)
    mover = environment.to_play()
    for age in range(5):
        played = len(moves) - age
        own, other = (np.flatnonzero(observation[2 * age + side]).tolist() for side in (0, 1))
        assert own == sorted(moves[mover:played:2]) and other == sorted(moves[1 - mover : played : 2])
    assert observation[16].min() == mover == 1


@pytest.mark.parametrize(
    ("game", "actions", "mover", "reward"),
    [
        ("connect_four_v3", [0, 1, 0, 1, 0, 1, 0], 0, 1.0),
        ("connect_four_v3", [0, 1, 0, 1, 0, 1, 3, 1], 1, 1.0),
        ("tictactoe_v3", [4, 0, 8, 2, 1, 7, 3, 5, 6], 0, 0.0),
    ],
)
def test_the_reward_is_the_movers(make, game, actions, mover, reward):
    environment = make(game)
    environment.initial_state()
    for action in actions[:-1]:
        assert environment.step(action)[::2] == (0.0, False)
    assert environment.to_play() == mover
    last, _, is_terminal = environment.step(actions[-1])
    assert (last, is_terminal, environment.truncated) == (reward, True, False)


@pytest.mark.parametrize("game", ["connect_four_v3", "tictactoe_v3", "go_v5", "chess_v6"])
def test_every_board_game_keeps_all_promises(make, game):
    kwargs = {"board_size": 5} if game == "go_v5" else {}
    config = EnvironmentConfig(id=f"pettingzoo:{game}", kwargs=kwargs, max_episode_steps=40)
    report = check_environment(
        lambda: make_environment(config), max_episode_steps=40, num_games=3, seconds=5.0
    )
    assert report.passed, report.checks


def test_truth_values_are_numbers(make):
    spec = make("chess_v6").spec
    assert spec.observation_shape == (111, 8, 8) and spec.observation_dtype == np.int8
    assert spec.action_shape == (4672,)


@pytest.mark.parametrize(
    ("game", "error", "message"),
    [
        ("texas_holdem_v4", EnvironmentFailure, "dealt by chance, and hidden; expected one of chess"),
        ("rps_v2", EnvironmentFailure, "move at the same time"),
        ("connect_for_v3", UnknownEnvironmentError, r"did you mean 'connect_four_v3'"),
        ("connect_four", UnknownEnvironmentError, r"did you mean 'connect_four_v3'"),
        ("connect_four_v99", UnknownEnvironmentError, "PettingZoo has .*connect_four_v3"),
        ("pistonball_v6", UnknownEnvironmentError, "no such board game"),
    ],
)
def test_what_does_not_fit_says_why(make, game, error, message):
    with pytest.raises(error, match=message):
        make(game)


def test_wrong_kwargs_are_named(make):
    with pytest.raises(EnvironmentFailure, match="unexpected keyword argument 'rows'"):
        make("connect_four_v3", kwargs={"rows": 5})


def test_a_missing_package_of_one_game_is_named(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "chess", None)
    for name in ("pettingzoo.classic.chess.chess", "pettingzoo.classic.chess.chess_utils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(
        UnknownEnvironmentError, match=r"chess.*pip install 'distributed_muzero\[pettingzoo\]'"
    ):
        make("chess_v6")


def test_installed_ones_are_listed(make):
    listed = [entry.id for entry in environment_ids() if entry.family == "pettingzoo"]
    assert len(listed) == 4 and "pettingzoo:connect_four_v3" in listed


class Duel:
    """An AEC environment of two moves each, as plain as one can be."""

    possible_agents = ("first", "second")
    gains = (1.0, -1.0)
    order = (0, 1, 0, 1)
    actions = spaces.Discrete(2)
    seen = spaces.Dict(
        observation=spaces.Box(-1, 1, (2,), np.float32), action_mask=spaces.Box(0, 1, (2,), np.int8)
    )
    mask = (1, 1)
    cut = False

    def observation_space(self, agent):
        return self.seen

    def action_space(self, agent):
        return self.actions

    def reset(self, seed=None):
        self.num_moves = 0

    @property
    def agent_selection(self):
        return self.possible_agents[self.order[self.num_moves % 4]]

    def observe(self, agent):
        return {"observation": np.zeros(2, np.float32), "action_mask": np.array(self.mask, np.int8)}

    def step(self, action):
        self.num_moves += 1

    @property
    def rewards(self):
        over = self.num_moves == 4
        return {name: gain * over for name, gain in zip(self.possible_agents, self.gains, strict=True)}

    @property
    def terminations(self):
        return dict.fromkeys(self.possible_agents, self.num_moves == 4 and not self.cut)

    @property
    def truncations(self):
        return dict.fromkeys(self.possible_agents, self.num_moves == 4 and self.cut)

    def close(self):
        pass


def play_duel(duel, max_episode_steps=10):
    environment = AECEnvironment(duel, "duel", max_episode_steps)
    environment.initial_state(3)
    steps = []
    while not steps or not steps[-1][2]:
        steps.append(environment.step(0))
    return environment, [reward for reward, _, _ in steps]


def test_any_environment_of_the_kind_can_be_played():
    environment, rewards = play_duel(Duel())
    assert rewards == [0, 0, 0, -1]  # the second player moved last, and lost
    assert not environment.truncated


def test_its_own_limit_and_ours_truncate():
    duel = Duel()
    duel.cut = True
    environment, _ = play_duel(duel)
    assert environment.truncated
    environment, rewards = play_duel(Duel(), max_episode_steps=3)
    assert environment.truncated and len(rewards) == 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"possible_agents": ("a", "b", "c")}, EnvironmentFailure, "3 players, expected two"),
        ({"actions": spaces.MultiDiscrete([2, 2])}, EnvironmentFailure, "expected Discrete from 0"),
        ({"seen": spaces.Box(-1, 1, (2,))}, EnvironmentFailure, "expected a Dict of a Box"),
        ({"gains": (1.0, 1.0)}, EnvironmentFailure, "mover's reward is 1.0 and the other player's 1.0"),
        ({"gains": (np.nan, 0.0)}, NonFiniteError, "step 1.*rewards are nan"),
        ({"order": (0, 0, 1, 1)}, EnvironmentFailure, "step 1: first is to move twice in a row"),
        ({"mask": (0, 0)}, EnvironmentFailure, "forbids every action"),
        ({"mask": (0, 1)}, EnvironmentFailure, "action 0 is forbidden"),
    ],
)
def test_what_breaks_the_rules_is_told(changes, error, message):
    duel = Duel()
    for name, value in changes.items():
        setattr(duel, name, value)
    with pytest.raises(error, match=message):
        play_duel(duel)


def test_what_it_raises_is_named_with_the_step():
    class Broken(Duel):
        def step(self, action):
            if self.num_moves == 2:
                raise KeyError("lost")
            super().step(action)

    with pytest.raises(EnvironmentFailure, match=r"duel, step 2: step\(0\) raised KeyError: 'lost'"):
        play_duel(Broken())


def test_players_who_see_different_things_are_refused():
    class Unlike(Duel):
        def action_space(self, agent):
            return spaces.Discrete(2 if agent == "first" else 3)

    with pytest.raises(EnvironmentFailure, match="different things"):
        AECEnvironment(Unlike(), "duel", 10)
