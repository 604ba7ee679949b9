"""RLlib's offline algorithms learn from our episodes, and we learn from what RLlib recorded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile

import gymnasium
import pytest
import ray
from ray.rllib.algorithms.marwil import MARWILConfig
from ray.rllib.algorithms.ppo import PPOConfig

from distributed_muzero.config import make_config
from distributed_muzero.replay.recording_writer import write_recording
from distributed_muzero.replay.schema import StoredEpisode
from distributed_muzero.workers.builder import Builder

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    with tempfile.TemporaryDirectory(prefix="dm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            _temp_dir=folder,
            object_store_memory=150 * 2**20,
            logging_level=40,
        )
        ray.data.DataContext.get_current().read_op_min_num_blocks = 1  # else RLlib writes 200 files each time
        yield
        ray.shutdown()


def cartpole_episodes(number):
    """As an actor plays them, whose networks have learnt nothing."""
    config = make_config({"actor": {"envs_per_actor": 4}, "search": {"num_simulations": 2}})
    builder = Builder(config, "run")
    learner, actor = builder.learner(), builder.actor(0, 0)
    actor.set_weights(*learner.weights(), 0)
    found = []
    while len(found) < number:
        found += actor.step()
    learner.close()
    actor.close()
    return [StoredEpisode(key, episode) for key, episode in enumerate(found)]


def test_marwil_learns_from_our_episodes(tmp_path):
    pytest.importorskip("msgpack_numpy")  # which RLlib needs to read episodes
    episodes = cartpole_episodes(20)
    write_recording(tmp_path / "ours", lambda: episodes)
    env = gymnasium.make("CartPole-v1")
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    config = MARWILConfig().environment(**spaces).learners(num_learners=0).env_runners(num_env_runners=0)
    config.training(train_batch_size_per_learner=32)
    config.offline_data(
        input_=[str(tmp_path / "ours")],
        input_read_episodes=True,
        input_read_batch_size=10,
        dataset_num_iters_per_learner=1,
        map_batches_kwargs={"concurrency": 1, "num_cpus": 0.5},
    )
    algorithm = config.build_algo()
    for _ in range(2):
        learnt = algorithm.train()["learners"]["default_policy"]
        assert learnt["total_loss"] == learnt["total_loss"] and learnt["num_module_steps_trained"] >= 32
    algorithm.stop()


@pytest.mark.parametrize("as_episodes", [True, False])
def test_we_learn_from_what_ppo_recorded(tmp_path, as_episodes):
    if as_episodes:
        pytest.importorskip("msgpack_numpy")
    config = PPOConfig().environment("CartPole-v1").learners(num_learners=0)
    config.env_runners(
        num_env_runners=0, batch_mode="complete_episodes" if as_episodes else "truncate_episodes"
    )
    config.training(train_batch_size_per_learner=200, minibatch_size=100, num_epochs=1)
    recording = tmp_path / "recorded"
    config.offline_data(output=str(recording), output_write_episodes=as_episodes, output_compress_columns=[])
    algorithm = config.build_algo()
    algorithm.train()
    algorithm.train()
    algorithm.stop()
    command = [
        sys.executable,
        "-m",
        "distributed_muzero",
        "train",
        "--env",
        "CartPole-v1",
        "--name",
        "learns",
    ]
    command += ["--runs-dir", str(tmp_path / "runs"), "--in-process", "--offline", str(recording)]
    settings = {
        "run.max_train_steps": 8,
        "replay.min_size_to_sample": 100,
        "learner.batch_size": 16,
        "reanalyse.ratio": 0.5,
        "search.num_simulations": 4,
        "evaluator.num_episodes": 1,
    }
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"learner steps: (\d+)", done.stdout)[1]) >= 8
    # Rows end anywhere in a game, of which fewer steps than are unrolled can't be learnt from.
    assert re.search(r" (0 refused|1 refused \(1 cut_short\))$", done.stderr, re.MULTILINE), done.stderr
    stats = subprocess.run(
        [sys.executable, "-m", "distributed_muzero", "replay", "stats", "learns", "--json"]
        + ["--runs-dir", str(tmp_path / "runs")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(stats.stdout)["total"]["transitions"] >= 396
