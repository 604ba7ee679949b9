"""RLlib's evaluation of exported modules returns what our own returns."""

from __future__ import annotations

import tempfile

import gymnasium
import pytest
import ray
from gymnasium.envs.classic_control import CartPoleEnv
from ray import tune
from ray.rllib.algorithms.ppo import PPOConfig

from distributed_muzero.cli.evaluate import evaluate_alone
from distributed_muzero.rllib.export import export_rl_module, rl_module_spec
from tests.rllib.runs import opinionated_run

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.filterwarnings("default")]

GAMES = 6


class OneStart(CartPoleEnv):
    """All games begin alike: who plays alike, returns alike."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=3, options=options)


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    gymnasium.register("OneStart-v0", OneStart, max_episode_steps=60)
    tune.register_env("OneStart-v0", lambda options: gymnasium.make("OneStart-v0"))
    with tempfile.TemporaryDirectory(prefix="dm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            num_cpus=1,
            include_dashboard=False,
            _temp_dir=folder,
            object_store_memory=80 * 2**20,
            logging_level=40,
        )
        yield
        ray.shutdown()
        del gymnasium.registry["OneStart-v0"]


def algorithm(folder):
    config = PPOConfig().environment("OneStart-v0").rl_module(rl_module_spec=rl_module_spec(folder))
    config.env_runners(num_env_runners=0, num_envs_per_env_runner=2, rollout_fragment_length="auto")
    config.learners(num_learners=0)
    config.training(train_batch_size_per_learner=60, minibatch_size=30, num_epochs=1)
    config.evaluation(
        evaluation_interval=1, evaluation_duration=GAMES, evaluation_num_env_runners=0,
        evaluation_config={"explore": False},
    )  # fmt: skip
    return config.build_algo()


@pytest.mark.parametrize("history_length", [1, 3])
@pytest.mark.parametrize("num_simulations", [0, 8])
def test_the_same_returns_as_evaluate(tmp_path, history_length, num_simulations):
    environment = {"id": "OneStart-v0", "history_length": history_length}
    settings = {
        "environment": environment,
        "network": {"hidden_sizes": [16], "embedding_size": 8},
        "search": {"num_simulations": 8},
    }
    run = opinionated_run(tmp_path, "some", settings)
    expected = evaluate_alone(run, 2, (1,), "best", num_simulations == 0)
    folder = export_rl_module(run.path, tmp_path / "module", num_simulations=num_simulations)
    trainer = algorithm(folder)
    found = trainer.evaluate()["env_runners"]
    assert expected["std_return"] == 0 and found["num_episodes"] >= GAMES
    assert found["episode_return_min"] == found["episode_return_max"] == expected["mean_return"]
    trainer.stop()


def test_an_algorithm_goes_on_from_an_export_and_saves_it(tmp_path):
    settings = {"environment": {"id": "OneStart-v0"}, "network": {"hidden_sizes": [16], "embedding_size": 8}}
    run = opinionated_run(tmp_path, "some", settings)
    trainer = algorithm(export_rl_module(run.path, tmp_path / "module"))
    before = trainer.get_module().get_state()["networks.policy_layers.0.weight"]
    learnt = trainer.train()["learners"]["default_policy"]
    assert learnt["total_loss"] == learnt["total_loss"]
    after = trainer.get_module().get_state()["networks.policy_layers.0.weight"]
    assert abs(after - before).max() > 0
    place = f"{trainer.save_to_path(str(tmp_path / 'saved'))}/learner_group/learner/rl_module/default_policy"
    other = algorithm(tmp_path / "module")
    other.restore_from_path(place, component="learner_group/learner/rl_module/default_policy")
    restored = other.learner_group.get_state()["learner"]["rl_module"]["default_policy"]
    assert abs(restored["networks.policy_layers.0.weight"] - after).max() == 0
    trainer.stop()
    other.stop()
