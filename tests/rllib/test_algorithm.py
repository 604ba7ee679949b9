"""DistributedMuZero in one process: iterations, results, what is saved."""

import json
import math
import signal
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from ray import tune

from distributed_muzero.checkpoint import latest_checkpoint
from distributed_muzero.config import load_preset, make_config
from distributed_muzero.errors import ConfigError, ContractError, EnvironmentFailure, RunError, RunIsOver
from distributed_muzero.rllib import DistributedMuZero, MuZeroConfig
from distributed_muzero.rllib.interrupts import put_off
from distributed_muzero.rllib.saved import ASIDE, CONTENT, read_saved, run_in


def small():
    return (
        MuZeroConfig("debug")
        .env_runners(num_env_runners=0)
        .reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=150)
        .evaluation(evaluation_duration=3)
    )


@pytest.fixture
def made():
    """Builds algorithms, and stops them in the end."""
    all_made = []

    def build(config):
        all_made.append(config.build_algo())
        return all_made[-1]

    yield build
    for algorithm in all_made:
        algorithm.stop()


def steps_of(result):
    return result["num_env_steps_sampled_lifetime"], result["num_grad_updates_lifetime"]


def test_results_have_rllibs_names_and_add_up(made):
    algorithm = made(small().evaluation(evaluation_interval=2))
    results = [algorithm.train() for _ in range(4)]
    assert [result["training_iteration"] for result in results] == [1, 2, 3, 4]
    assert ["evaluation" in result for result in results] == [False, True, False, True]
    sampled = [result["env_runners"]["num_env_steps_sampled"] for result in results]
    assert results[-1]["num_env_steps_sampled_lifetime"] == sum(sampled)
    assert all(number >= 150 for number in sampled[1:])
    last = results[-1]
    runners, learner = last["env_runners"], last["learners"]["default_policy"]
    assert runners["num_env_steps_sampled_lifetime"] == sum(sampled)
    assert runners["num_episodes_lifetime"] == sum(
        result["env_runners"]["num_episodes"] for result in results
    )
    assert runners["episode_return_min"] <= runners["episode_return_mean"] <= runners["episode_return_max"]
    assert runners["episode_len_min"] <= runners["episode_len_mean"] <= runners["episode_len_max"]
    assert last["num_grad_updates_lifetime"] > 0
    batch_size = learner["module_train_batch_size_mean"]
    assert learner["num_module_steps_trained_lifetime"] == last["num_grad_updates_lifetime"] * batch_size
    assert {"total_loss", "vf_loss", "policy_loss", "default_optimizer_learning_rate"} <= learner.keys()
    played = last["evaluation"]["env_runners"]
    assert played["num_episodes"] == 3 and math.isfinite(played["episode_return_mean"])
    assert last["time_total_s"] == pytest.approx(sum(result["time_this_iter_s"] for result in results))


def test_before_the_first_iteration_it_evaluates_and_plays_by_its_first_weights(made):
    algorithm = made(small())
    one, other = (algorithm.evaluate()["env_runners"] for _ in range(2))
    assert one == other and one["num_episodes"] == 3
    assert algorithm.iteration == 0
    assert algorithm._turns is None  # nothing was started for it


def test_it_goes_on_in_another_process_with_weights_optimizer_replay_and_counts(made, tmp_path):
    algorithm = made(small())
    for _ in range(3):
        last = algorithm.train()
    saved = algorithm.save_to_path(tmp_path / "saved")
    before = latest_checkpoint(run_in(saved) / "checkpoints")
    assert before.step >= last["num_grad_updates_lifetime"] > 0
    code = f"""
import json
from distributed_muzero.checkpoint import latest_checkpoint
from distributed_muzero.rllib import DistributedMuZero
algorithm = DistributedMuZero.from_checkpoint({saved!r})
held = latest_checkpoint(algorithm._run_folder().checkpoints)
first = algorithm.iteration
result = algorithm.train()
stored = sum(shard["transitions"] for shard in algorithm._book._shards)
algorithm.stop()
print(json.dumps([held.step, float(sum(abs(a).sum() for a in held.tensors["optimizer"].values())), first,
    result["training_iteration"], result["num_env_steps_sampled_lifetime"], result["num_grad_updates_lifetime"],
    stored]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    step, optimizer, first, iteration, env_steps, learner_steps, stored = json.loads(
        done.stdout.splitlines()[-1]
    )
    assert step == before.step
    assert optimizer == pytest.approx(sum(abs(array).sum() for array in before.tensors["optimizer"].values()))
    assert (first, iteration) == (3, 4)
    assert env_steps >= last["num_env_steps_sampled_lifetime"] + 150
    assert learner_steps > before.step
    assert stored > 0.9 * last["num_env_steps_sampled_lifetime"]


def test_what_was_played_can_be_left_out(made, tmp_path):
    algorithm = made(small().training(store_buffer_in_checkpoints=False))
    first = algorithm.train()
    algorithm.save_to_path(tmp_path / "saved")
    assert not (run_in(tmp_path / "saved") / "replay").exists()
    algorithm.restore_from_path(tmp_path / "saved")
    assert steps_of(algorithm.train())[0] >= steps_of(first)[0] + 150


def test_another_rate_goes_on_from_saved_weights(made, tmp_path):
    """As a trial does under PBT."""
    algorithm = made(small().training(lr=1e-3))
    while not algorithm.train()["num_grad_updates_lifetime"]:
        pass
    saved = algorithm.save_to_path(tmp_path / "saved")
    other = made(small().training(lr=1e-2, learner={"warmup_steps": 0, "final_learning_rate": 1e-2}))
    other.train()
    other.restore_from_path(saved)
    assert (
        latest_checkpoint(other._run_folder().checkpoints).step
        == latest_checkpoint(algorithm._run_folder().checkpoints).step
    )
    result = other.train()
    assert result["learners"]["default_policy"]["default_optimizer_learning_rate"] == pytest.approx(1e-2)
    assert result["training_iteration"] == algorithm.iteration + 1


def test_other_networks_cannot_take_it_over(made, tmp_path):
    algorithm = made(small())
    algorithm.train()
    saved = algorithm.save_to_path(tmp_path / "saved")
    other = made(small().training(network={"embedding_size": 48}))
    with pytest.raises(RunError, match=r"network\.embedding_size .* can't become 48"):
        other.restore_from_path(saved)


def test_a_refused_restore_leaves_the_run_as_it_is(made, tmp_path):
    algorithm, other = made(small()), made(small().training(network={"embedding_size": 48}))
    algorithm.train()
    saved = algorithm.save_to_path(tmp_path / "saved")
    before = steps_of(other.train())[0]
    with pytest.raises(RunError):
        other.restore_from_path(saved)
    assert steps_of(other.train())[0] >= before + 150


def test_after_an_error_it_goes_on_from_what_was_saved(made, monkeypatch):
    algorithm = made(small())
    while not (before := steps_of(algorithm.train()))[1]:
        pass
    algorithm._write_weights()

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(algorithm._book, "tick", fail)
        with pytest.raises(KeyboardInterrupt):
            algorithm.train()
    result = algorithm.train()
    assert not result["done"]
    assert steps_of(result)[0] > before[0] and steps_of(result)[1] >= before[1]


def test_ctrl_c_comes_between_two_turns_and_loses_nothing(made, tmp_path, monkeypatch):
    algorithm = made(small())
    while not (before := steps_of(algorithm.train()))[1]:
        pass
    book, tick = algorithm._book, algorithm._book.tick

    def tick_with_ctrl_c(*arguments):
        signal.raise_signal(signal.SIGINT)
        return tick(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(book, "tick", tick_with_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            algorithm.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    algorithm.save_to_path(tmp_path)
    saved = latest_checkpoint(run_in(tmp_path) / "checkpoints")
    assert saved.step >= before[1] and algorithm._book is book
    assert steps_of(algorithm.train())[1] >= saved.step


def test_a_second_ctrl_c_comes_at_once():
    reached = []
    with pytest.raises(KeyboardInterrupt), put_off():
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
        signal.raise_signal(signal.SIGINT)
        reached.append(2)
    assert reached == [1]
    with pytest.raises(KeyboardInterrupt), put_off():
        signal.raise_signal(signal.SIGINT)
        reached.append(3)
    assert reached == [1, 3]
    with put_off():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_script_that_never_stops_it_ends(tmp_path):
    code = """
from distributed_muzero.rllib import MuZeroConfig
config = MuZeroConfig("debug").env_runners(num_env_runners=0).reporting(min_time_s_per_iteration=0)
algorithm = config.build_algo()
algorithm.train()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Exception" not in done.stderr, done.stderr


def test_a_path_may_be_saved_to_again(made, tmp_path):
    algorithm = made(small())
    for _ in range(2):
        last = algorithm.train()
        algorithm.save_to_path(tmp_path / "saved")
        (tmp_path / "saved" / ".muzero-killed").mkdir()  # by a save that was broken off
        algorithm.save_to_path(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["muzero"]
    again = DistributedMuZero.from_checkpoint(tmp_path / "saved")
    assert again.iteration == 2 and steps_of(again.train())[0] >= steps_of(last)[0] + 150
    again.stop()


def test_a_save_that_was_broken_off_leaves_the_one_before(made, tmp_path):
    algorithm = made(small())
    algorithm.train()
    algorithm.save_to_path(tmp_path)
    (tmp_path / CONTENT).rename(tmp_path / ASIDE)
    assert read_saved(tmp_path).training_iteration == 1
    algorithm.train()
    algorithm.save_to_path(tmp_path)
    assert read_saved(tmp_path).training_iteration == 2
    assert [path.name for path in tmp_path.iterdir()] == [CONTENT]


def test_counts_are_saved_as_they_are_now(made, tmp_path):
    algorithm = made(small())
    counts = algorithm.train()
    algorithm.save_to_path(tmp_path)
    algorithm._book._next_tick = math.inf  # what a fast machine plays within a second
    counts = algorithm.train()
    algorithm.save_to_path(tmp_path)
    status = read_saved(tmp_path).run.current_status()
    assert status["env_steps"] >= counts["num_env_steps_sampled_lifetime"]
    assert status["state"] == "stopped"


def test_a_saved_run_is_one_that_the_command_line_goes_on_with(made, tmp_path):
    algorithm = made(small())
    algorithm.train()
    algorithm.save_to_path(tmp_path)
    preset = make_config(load_preset("debug"))
    assert read_saved(tmp_path).run.config.evaluator.interval_seconds == preset.evaluator.interval_seconds
    assert not (
        run_in(tmp_path) / "evaluations.jsonl"
    ).read_text()  # train() evaluates only when it is asked to


def test_after_stop_nothing_goes_on(made, tmp_path):
    algorithm = made(small())
    algorithm.train()
    algorithm.save_to_path(tmp_path)
    algorithm.stop()
    calls = (
        algorithm.train,
        algorithm.evaluate,
        lambda: algorithm.save_to_path(tmp_path),
        lambda: algorithm.compute_single_action(np.zeros(4)),
    )
    for call in calls:
        with pytest.raises(RunIsOver, match=r"stop\(\) has ended this algorithm"):
            call()
    assert read_saved(tmp_path).training_iteration == 1


def test_a_run_that_ends_while_it_is_evaluated_is_done(made, monkeypatch):
    algorithm = made(small().evaluation(evaluation_interval=1))
    monkeypatch.setattr(algorithm, "_write_weights", lambda: setattr(algorithm, "_is_over", True))
    assert algorithm.train()["done"]


def test_places_that_cannot_be_are_refused(made, tmp_path):
    algorithm = made(small())
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"can't save to .*file"):
        algorithm.save_to_path(tmp_path / "file")
    for call in (algorithm.save_to_path, algorithm.restore_from_path, DistributedMuZero.from_checkpoint):
        with pytest.raises(RunError, match="not at a URI"):
            call("s3://bucket/place")


def test_a_part_that_cannot_be_made_leaves_the_others_closed(made, monkeypatch):
    algorithm = made(small())

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("distributed_muzero.workers.builder.Builder.actor", fail)
        with pytest.raises(KeyboardInterrupt):
            algorithm.train()
    assert algorithm.train()["num_env_steps_sampled_lifetime"] > 0


def test_a_folder_without_a_saved_one_is_refused(made, tmp_path):
    algorithm = made(small())
    for load in (algorithm.restore_from_path, DistributedMuZero.from_checkpoint):
        with pytest.raises(RunError, match=r"holds no saved DistributedMuZero: muzero is not there"):
            load(tmp_path)


def test_it_plays_one_move(made):
    algorithm = made(MuZeroConfig("cartpole").training(num_simulations=4).env_runners(num_env_runners=0))
    observation, _ = gymnasium.make("CartPole-v1").reset(seed=3)
    assert algorithm.compute_single_action(observation) in (0, 1)
    for action in (0, 1):
        mask = np.eye(2)[action]
        assert algorithm.compute_single_action(observation, action_mask=mask) == action
        assert algorithm.compute_single_action(observation, action_mask=mask, explore=True) == action
    stacked = made(small().environment("CartPole-v1", history_length=3))
    assert stacked.compute_single_action(observation) in (0, 1)
    assert stacked.compute_single_action(np.stack([observation] * 3)) in (0, 1)
    beside = {"seen": observation, "action_mask": np.eye(2)[1]}
    assert algorithm.compute_single_action(beside) == 1
    with pytest.raises(ContractError, match=r"shape \(3,\) came; expected \(4,\)"):
        algorithm.compute_single_action(observation[:3])
    for nonsense in ({"seen": observation}, "north"):
        with pytest.raises(ContractError):
            algorithm.compute_single_action(nonsense)
    lake = made(small().environment("FrozenLake-v1"))
    assert lake.compute_single_action(3) == lake.compute_single_action(np.eye(16)[3])
    with pytest.raises(ContractError, match=r"shape \(\) came"):
        lake.compute_single_action(16)
    with pytest.raises(ContractError, match=r"mask of shape \(3,\) came; expected \(2,\)"):
        algorithm.compute_single_action(observation, action_mask=[1, 1, 0])


def test_a_games_equal_seeds_play_equal_games(made):
    games = [made(small()) for _ in range(2)]
    one, other = ([algorithm.train()["env_runners"] for _ in range(2)] for algorithm in games)
    assert one == other


class Pole(gymnasium.Wrapper):
    """As RLlib's users write them: made with an env_config."""

    def __init__(self, config):
        super().__init__(gymnasium.make("CartPole-v1"))
        self.steps = config.get("steps", 20)

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        self.steps -= 1
        return observation, reward, terminated, truncated or self.steps == 0, info

    def reset(self, **options):
        self.steps = 20
        return super().reset(**options)


def test_classes_and_registered_names_are_environments(made):
    tune.register_env("short_pole", Pole)
    for env in (Pole, "short_pole"):
        algorithm = made(small().environment(env, env_config={"steps": 20}))
        assert algorithm.train()["env_runners"]["episode_len_max"] <= 20


def test_what_cannot_be_fails_when_it_is_built():
    with pytest.raises(ConfigError, match="has no 'gama'"):
        DistributedMuZero({"gama": 1})
    with pytest.raises(EnvironmentFailure, match="Pendulum-v1 has continuous actions"):
        MuZeroConfig().environment("Pendulum-v1").build_algo()
    with pytest.raises(ConfigError, match="evaluation_opponent is for games of two"):
        MuZeroConfig("cartpole").evaluation(evaluation_opponent="random").build_algo()
