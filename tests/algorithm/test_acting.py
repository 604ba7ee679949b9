import numpy as np
import pytest
import torch

from distributed_muzero import acting
from distributed_muzero.algorithm.acting import Game, choose_actions
from distributed_muzero.config import SearchConfig
from distributed_muzero.errors import ContractError, EnvironmentFailure, NonFiniteError
from tests.games import Nim, Script, constant_functions

UNIFORM = constant_functions(2)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_a_step_holds_the_reward_that_came_after_its_action():
    episode = acting(Script(3), *UNIFORM)
    assert [(step.observation.tolist(), step.reward) for step in episode] == [([1], 1), ([2], 2), ([3], 3)]
    assert all(isinstance(step.action, int) and isinstance(step.value, float) for step in episode)


@pytest.mark.parametrize("tensors", [False, True])
def test_environments_may_speak_in_tensors_or_arrays(tensors):
    masks = [[1, 0], [0, 1], [1, 0]]
    env = Script(3, masks, tensors=tensors)
    assert [step.action for step in acting(env, *UNIFORM)] == [0, 1, 0]


def test_history_is_the_last_observations_behind_zeros():
    seen = []

    def h(o):
        seen.append(o.ravel().tolist())
        return torch.zeros(1, 1)

    acting(Script(4), h, *UNIFORM[1:], history_length=3)
    assert seen == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_an_environment_that_reuses_its_array_does_not_rewrite_the_past():
    class Reusing(Script):
        array = np.zeros(1, np.float32)

        def _show(self):
            self.array[0] = len(self.actions)
            return self.array

    assert [step.observation.item() for step in acting(Reusing(3), *UNIFORM)] == [0, 1, 2]


def test_the_mask_is_read_again_at_every_step():
    masks = [[1, 0], [0, 1], [0, 1], [1, 1]]
    episode = acting(Script(4, masks), *UNIFORM, rng=rng())
    assert [step.action for step in episode[:3]] == [0, 1, 1]
    assert [step.policy.tolist() for step in episode[:3]] == [[1, 0], [0, 1], [0, 1]]


def test_actions_of_a_two_dimensional_space_are_flat_row_major():
    mask = np.array([[0, 0, 0], [0, 0, 1]])
    (step,) = acting(Script(1, [mask]), *constant_functions(6))
    assert step.action == 5 and step.policy.tolist() == mask.tolist()


def test_an_empty_mask_names_the_step():
    with pytest.raises(ContractError, match=r"allows none.*step 1"):
        acting(Script(2, [[1, 1], [0, 0]]), *UNIFORM)


@pytest.mark.parametrize("field", ["reward", "observation"])
def test_nan_from_the_environment_names_the_step(field):
    class Broken(Script):
        def step(self, action):
            reward, observation, is_terminal = super().step(action)
            if len(self.actions) < 2:
                return reward, observation, is_terminal
            nan = float("nan")
            return (
                (nan, observation, is_terminal)
                if field == "reward"
                else (reward, observation * nan, is_terminal)
            )

    with pytest.raises(NonFiniteError, match=f"{field}.*step [12]"):
        acting(Broken(3), *UNIFORM)


def test_same_seed_plays_the_same_episode_and_another_seed_another():
    def actions(seed):
        return [step.action for step in acting(Script(20), *UNIFORM, rng=rng(seed))]

    assert actions(1) == actions(1) != actions(2)


def test_temperature_changes_the_choice_but_not_the_policy():
    functions = constant_functions(2, logits=[1.0, 0.0])
    cold, hot = (acting(Script(30), *functions, temperature=t, noise=False, rng=rng()) for t in (0.0, 5.0))
    assert {step.action for step in cold} == {0} and {step.action for step in hot} == {0, 1}
    assert len({tuple(step.policy.tolist()) for step in cold + hot}) == 1


def test_actions_are_drawn_by_visits_to_the_power_of_one_over_temperature():
    visits = np.tile([1, 0, 3], (20_000, 1))
    for temperature, share in ((1.0, 3 / 4), (0.5, 9 / 10), (2.0, 3**0.5 / (1 + 3**0.5))):
        drawn = choose_actions(visits, temperature, rng())
        assert np.mean(drawn == 2) == pytest.approx(share, abs=0.02)
        assert not (drawn == 1).any()


def test_temperature_zero_and_almost_zero_take_the_most_visited_action():
    visits = np.array([[3, 10, 9], [50, 1, 0]])
    assert choose_actions(visits, 0.0, rng()).tolist() == [1, 0]
    assert choose_actions(visits, 1e-3, rng()).tolist() == [1, 0]


def test_a_game_longer_than_max_steps_is_cut():
    assert len(acting(Script(10), *UNIFORM, max_steps=4)) == 4


def play_out(env, **options):
    game = Game(env, 1)
    while not game.is_over:
        legal = game.read_mask()
        game.play(legal, (legal / legal.sum()).astype(np.float32), int(legal.argmax()), 0.5)
    return game.episode("run/0/0/1", "game", 0, final_value=8.0)


def test_a_time_limit_is_not_a_termination():
    cut, ended = play_out(Script(3, truncated=True)), play_out(Script(3))
    assert (cut.truncated, cut.terminated, ended.truncated, ended.terminated) == (True, False, False, True)
    assert cut.root_values.tolist() == [0.5, 0.5, 0.5, 8] and ended.root_values.tolist() == [0.5, 0.5, 0.5, 0]
    assert cut.observations.ravel().tolist() == [1, 2, 3, 4]  # the final one is kept to bootstrap from


@pytest.mark.parametrize("first_player", [0, 1])
def test_players_are_written_down_with_the_one_after_the_end(first_player):
    expected = [0, 1, 0, 1] if first_player == 0 else [1, 0, 1, 0]
    assert play_out(Nim(3, first_player)).to_play.tolist() == expected


def test_players_alternate_only_where_the_environment_has_two():
    assert Game(Nim(3), 1).alternates and not Game(Script(1), 1).alternates
    # A solitary environment may offer to_play() as well, when its spec says that one player plays.
    from distributed_muzero.environments.chain import ChainEnvironment

    assert not Game(ChainEnvironment(), 1).alternates


def test_two_players_who_do_not_move_in_turn_are_refused():
    env = Nim(3)
    env.to_play = lambda: 0
    with pytest.raises(EnvironmentFailure, match="player 0 is to move again at step 1"):
        play_out(env)


def test_noise_reaches_the_search_only_when_asked_for():
    functions = constant_functions(8)
    search = SearchConfig(dirichlet_fraction=0.9)
    (quiet,) = acting(Script(1, [np.ones(8)]), *functions, noise=False, rng=rng(1), search=search)
    (noisy,) = acting(Script(1, [np.ones(8)]), *functions, noise=True, rng=rng(1), search=search)
    assert len(set(quiet.policy[1:].tolist())) <= 2 < len(set(noisy.policy.tolist()))
