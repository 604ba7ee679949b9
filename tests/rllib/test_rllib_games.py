"""Environments of RLlib's own classes, played here; and ours, as RLlib gets them."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from ray import tune
from ray.rllib.env.multi_agent_env import MultiAgentEnv
from ray.rllib.env.wrappers.pettingzoo_env import PettingZooEnv
from ray.rllib.examples.envs.classes.multi_agent.rock_paper_scissors import RockPaperScissors
from ray.rllib.examples.envs.classes.multi_agent.tic_tac_toe import TicTacToe

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.checks import check_environment
from distributed_muzero.environments.pettingzoo import AECEnvironment
from distributed_muzero.environments.random_games import play
from distributed_muzero.environments.registry import make_environment
from distributed_muzero.errors import EnvironmentFailure
from distributed_muzero.rllib.multi_agent import MultiAgentEnvironment
from distributed_muzero.rllib.to_rllib import RLlibEnvironment, RLlibGame, View, register_with_rllib, to_rllib


def make(name, **kwargs):
    return make_environment(EnvironmentConfig(id=f"rllib:{name}", kwargs=kwargs))


def passes(name):
    report = check_environment(lambda: make(name), max_episode_steps=10_000, num_games=10, seconds=5.0)
    assert report.passed, report.checks
    return True


class FairTicTacToe(TicTacToe):
    """RLlib's own example as it can be trained here: occupied cells masked, and who begins by the seed."""

    def __init__(self, config=None):
        super().__init__(config)
        cells = spaces.Box(-1.0, 1.0, (9,), np.float32)
        mask = spaces.Box(0, 1, (9,), np.int8)
        self.observation_spaces = dict.fromkeys(
            self.agents, spaces.Dict(observations=cells, action_mask=mask)
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.current_player = self.agents[(seed or 0) % 2]
        return self.masked({self.current_player: np.zeros(9, np.float32)}), {}

    def step(self, actions):
        seen, *rest = super().step(actions)
        return self.masked(seen), *rest

    def masked(self, seen):
        return {
            agent: {"observations": cells, "action_mask": (cells == 0).astype(np.int8)}
            for agent, cells in seen.items()
        }


def test_rllibs_tic_tac_toe_with_masks_keeps_all_promises():
    tune.register_env("fair", FairTicTacToe)
    assert passes("fair")
    environment = make("fair")
    environment.initial_state(1)
    rewards = [environment.step(cell)[0] for cell in (4, 0, 8, 2, 1, 5, 7)]
    assert rewards == [0, 0, 0, 0, 0, 0, 1] and environment.to_play() == 1


def test_rllibs_tic_tac_toe_as_it_is_punishes_one_player_alone():
    tune.register_env("unfair", TicTacToe)
    environment = make("unfair")
    environment.initial_state(1)
    with pytest.raises(EnvironmentFailure, match="mask illegal actions rather than punishing them"):
        for cell in (4, 4, 0, 1, 3, 2, 6, 7, 8, 5):
            environment.step(cell)


def test_moves_at_the_same_time_are_refused():
    tune.register_env("rps", RockPaperScissors)
    with pytest.raises(EnvironmentFailure, match="moves at the same time can't be trained"):
        make("rps").initial_state(1)


@pytest.mark.parametrize("game", ["tictactoe_v3", "connect_four_v3"])
def test_a_wrapped_board_game_is_the_same_as_pettingzoos(game):
    classic = pytest.importorskip(f"pettingzoo.classic.{game}")
    tune.register_env("wrapped", lambda config: PettingZooEnv(classic.env()))
    assert passes("wrapped")
    wrapped = make("wrapped")
    assert isinstance(wrapped, AECEnvironment)
    plain = make_environment(EnvironmentConfig(id=f"pettingzoo:{game}"))
    for seed in range(5):
        assert play(wrapped, seed, 100).difference(play(plain, seed, 100)) is None
    plain.initial_state(1), wrapped.initial_state(1)
    assert plain.describe() == wrapped.describe()


def test_other_wrapped_environments_are_played_by_rllibs_own_rules():
    """What PettingZooEnv makes of rewards, which come late there, is worth the same."""
    classic = pytest.importorskip("pettingzoo.classic.connect_four_v3")

    class Changed(PettingZooEnv):
        def __init__(self, config):
            super().__init__(classic.env())

    tune.register_env("changed", Changed)
    assert passes("changed")
    changed, plain = make("changed"), make_environment(EnvironmentConfig(id="pettingzoo:connect_four_v3"))
    assert isinstance(changed, MultiAgentEnvironment)
    for seed in range(5):
        assert play(changed, seed, 100).rewards == play(plain, seed, 100).rewards


@pytest.mark.parametrize(
    "id", ["openspiel:tic_tac_toe", "openspiel:dots_and_boxes(num_rows=1,num_cols=2)", "chain"]
)
def test_there_and_back_again_an_environment_plays_the_same_games(id):
    if id.startswith("openspiel"):
        pytest.importorskip("pyspiel")
    tune_name = register_with_rllib(id, flat=False, with_mask=True)
    assert passes(tune_name)
    back, plain = make(tune_name), make_environment(EnvironmentConfig(id=id))
    for seed in range(5):
        one, other = play(back, seed, 100), play(plain, seed, 100)
        assert (
            one.rewards == other.rewards and one.players == other.players and one.terminals == other.terminals
        )
        assert all(map(np.array_equal, one.masks, other.masks))
        assert all(map(np.array_equal, one.copies, other.copies))


def test_one_player_is_a_gymnasium_environment():
    environment = to_rllib(make_environment(EnvironmentConfig(id="CartPole-v1", max_episode_steps=3)), View())
    assert isinstance(environment, RLlibEnvironment)
    assert isinstance(environment.action_space, spaces.Discrete) and environment.action_space.n == 2
    seen, _ = environment.reset(seed=5)
    assert seen.dtype == np.float32 and np.array_equal(seen, environment.reset(seed=5)[0])
    ends = [environment.step(0)[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]  # truncated is not terminated


def test_observations_and_masks_lie_in_their_spaces():
    pytest.importorskip("pyspiel")
    for flat, with_mask in [(True, True), (True, False), (False, True), (False, False)]:
        game = to_rllib(
            make_environment(EnvironmentConfig(id="openspiel:tic_tac_toe")), View(flat, with_mask)
        )
        assert isinstance(game, RLlibGame) and isinstance(game, MultiAgentEnv)
        seen, _ = game.reset(seed=1)
        for cell in (4, 0, 8, 2, 1, 7):
            assert list(seen) == [f"player_{game._game.to_play()}"]
            for agent, observation in seen.items():
                space = game.get_observation_space(agent)
                assert space.contains(observation)
                if with_mask:
                    assert space["observations"].shape == ((27,) if flat else (3, 3, 3))
                    assert observation["action_mask"][cell] == 1.0
            seen, rewards, terminateds, _, _ = game.step({next(iter(seen)): cell})
            assert not terminateds["__all__"] and sum(rewards.values()) == 0


def test_the_winner_is_rewarded_and_both_observe_the_end():
    pytest.importorskip("pyspiel")
    game = to_rllib(make_environment(EnvironmentConfig(id="openspiel:tic_tac_toe")), View())
    game.reset(seed=1)
    for mover, cell in enumerate((0, 3, 1, 4)):
        game.step({f"player_{mover % 2}": cell})
    seen, rewards, terminateds, truncateds, _ = game.step({"player_0": 2})
    assert set(seen) == {"player_0", "player_1"} and rewards == {"player_0": 1, "player_1": -1}
    assert terminateds == {"__all__": True} and truncateds == {"__all__": False}


def test_an_illegal_action_loses_the_game():
    pytest.importorskip("pyspiel")
    game = to_rllib(
        make_environment(EnvironmentConfig(id="openspiel:tic_tac_toe")), View(illegal_reward=-2.0)
    )
    game.reset(seed=1)
    game.step({"player_0": 4})
    _, rewards, terminateds, truncateds, _ = game.step({"player_1": 4})
    assert rewards == {"player_1": -2.0, "player_0": 2.0}
    assert terminateds["__all__"] and not truncateds["__all__"]
    assert list(game.reset(seed=1)[0]) == ["player_0"]


def test_an_illegal_action_of_one_player_ends_it_too():
    tune.register_env("frozen", lambda config: Gate())
    environment = to_rllib(make("frozen"), View(with_mask=True))
    seen, _ = environment.reset()
    assert seen["action_mask"].tolist() == [1.0, 0.0]
    assert environment.step(1)[1:4] == (-1.0, True, False)


class Gate(gymnasium.Env):
    observation_space = spaces.Discrete(2)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return 0, {"action_mask": np.array([1, 0])}

    def step(self, action):
        return 1, 0.0, False, False, {"action_mask": np.array([1, 0])}


def test_rllibs_env_config_goes_over_the_kwargs():
    name = register_with_rllib("chain", length=6, start=2)
    creator = tune.registry._global_registry.get("env_creator", name)
    assert creator({"length": 8}).observation_space.shape == (8,)
