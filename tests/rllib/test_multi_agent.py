"""RLlib's MultiAgentEnv as an Environment: whose turn, whose reward, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces

from distributed_muzero.errors import EnvironmentFailure, NonFiniteError
from distributed_muzero.rllib.multi_agent import MultiAgentEnvironment
from tests.rllib.games import BOX, MASKED, Count


def played(changes=None, max_episode_steps=10):
    """A whole game: the environment and its steps."""
    count = Count()
    for name, value in (changes or {}).items():
        setattr(count, name, value)
    environment = MultiAgentEnvironment(count, "rllib:count", max_episode_steps)
    environment.initial_state(3)
    steps = []
    while not steps or not steps[-1][2]:
        steps.append((*environment.step(1), environment.to_play()))
    return environment, steps


def test_players_move_in_turn_and_the_last_mover_gets_its_reward():
    environment, steps = played()
    assert environment.spec.num_players == 2 and environment.spec.observation_shape == (2,)
    assert [player for *_, player in steps] == [1, 0, 1, 0]
    assert [reward for reward, *_ in steps] == [0, 0, 0, 1]
    assert [observation[0] for _, observation, *_ in steps] == [1, 2, 3, 4]
    assert not environment.truncated


def test_who_observes_first_is_player_0():
    environment, _ = played({"order": ("black", "white", "black", "white"), "rewards": Count.rewards[::-1]})
    assert environment._environment.played[0] == {"black": 1}
    environment.initial_state()
    assert environment.to_play() == 0


def test_the_end_by_the_rules_wins_over_a_limit_and_a_limit_truncates():
    assert not played({"ends": ("terminated", "truncated")})[0].truncated
    assert played({"ends": ("truncated",)})[0].truncated
    environment, steps = played(max_episode_steps=3)
    assert environment.truncated and len(steps) == 3


def test_rewards_that_were_never_checked_are_refused_at_the_limit():
    both_gain = ({"white": 1}, {"black": 1}, {"white": 1}, {"black": 1})
    with pytest.raises(EnvironmentFailure, match="step 3: nobody has told both players' rewards"):
        played({"rewards": both_gain}, max_episode_steps=3)
    checked_once = ({"white": 1}, {"white": 0, "black": -1}, {"white": 1}, {})
    assert len(played({"rewards": checked_once}, max_episode_steps=3)[1]) == 3


def test_a_last_observation_may_be_missing_only_where_nothing_bootstraps_from_it():
    _, steps = played({"everybody_at_the_end": False})
    assert steps[-1][1].tolist() == [0, 0]
    with pytest.raises(EnvironmentFailure, match="truncated without an observation of 'white'"):
        played({"everybody_at_the_end": False, "ends": ("truncated",)})


def test_one_agent_is_one_player():
    alone = {"possible_agents": ("white",), "order": ("white",) * 4, "rewards": ({"white": 2.0}, {}, {}, {})}
    environment, steps = played(alone)
    assert environment.spec.num_players == 1
    assert [reward for reward, *_ in steps] == [2, 0, 0, 0] and {player for *_, player in steps} == {0}


def masked(mask):
    return {
        "observation": MASKED,
        "seen": lambda: {"observations": np.zeros(2, np.float32), "action_mask": np.array(mask)},
    }


def test_masks_beside_the_observation_are_kept_to():
    environment, _ = played(masked([0, 1]))
    environment.initial_state()
    assert environment.mask().tolist() == [False, True] and environment.spec.observation_shape == (2,)
    with pytest.raises(EnvironmentFailure, match="action 0 is forbidden"):
        environment.step(0)


class Unlike(Count):
    def get_action_space(self, agent):
        return spaces.Discrete(2 if agent == "white" else 3)


class Broken(Count):
    def step(self, actions):
        raise KeyError("lost")


class TwoAtOnce(Count):
    def reset(self, *, seed=None, options=None):
        return dict.fromkeys(self.possible_agents, np.zeros(2)), {}


class WithoutAll(Count):
    def step(self, actions):
        return (*super().step(actions)[:2], {}, {}, {})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"possible_agents": ("a", "b", "c")}, EnvironmentFailure, "expected one, or two who move in turn"),
        ({"order": ("white", "white", "black")}, EnvironmentFailure, "step 1: 'white' is to move twice"),
        ({"order": ("white", "nobody")}, EnvironmentFailure, r"\['nobody'\] is to act; expected"),
        ({"observation": spaces.Tuple([BOX])}, EnvironmentFailure, "observes Tuple, not one array"),
        ({"actions": spaces.Box(0, 1)}, EnvironmentFailure, "continuous actions"),
        (
            {"rewards": ({"white": 1, "black": 1},)},
            EnvironmentFailure,
            "step 1: who moved first has earned 1",
        ),
        (
            {"rewards": ({}, {}, {}, {"black": 1})},
            EnvironmentFailure,
            "step 4: .*the other player 1; expected",
        ),
        ({"rewards": ({"white": 1e39, "black": -1e39},)}, NonFiniteError, "step 1: the rewards are"),
        ({"rewards": ({"white": np.nan},)}, NonFiniteError, "step 1: the rewards are"),
        ({"seen": lambda: np.zeros(3)}, EnvironmentFailure, r"has shape \(3,\), its space says \(2,\)"),
        ({"seen": lambda: "a board"}, EnvironmentFailure, "the observation 'a board' doesn't fit"),
        ({"seen": lambda: [0, np.inf]}, NonFiniteError, "step 0: the observation isn't finite"),
        (masked([0, 0]), EnvironmentFailure, "forbids every action"),
        (masked([1, 1, 1]), EnvironmentFailure, r"the mask has shape \(3,\), expected \(2,\)"),
    ],
)
def test_what_does_not_fit_is_told(changes, error, message):
    with pytest.raises(error, match=message):
        played(changes)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Unlike, "'white' and 'black' observe or do different things"),
        (Broken, r"step 0: step\(1\) raised KeyError: 'lost'"),
        (TwoAtOnce, r"\['black', 'white'\] is to act; .*moves at the same time"),
        (WithoutAll, "lack '__all__'"),
    ],
)
def test_what_it_does_wrong_is_told(kind, message):
    with pytest.raises(EnvironmentFailure, match=message):
        environment = MultiAgentEnvironment(kind(), "rllib:count", 10)
        environment.initial_state()
        environment.step(1)
