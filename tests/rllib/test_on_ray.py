"""DistributedMuZero with processes of its own."""

import threading
import time

import pytest
import ray
from ray import tune

from distributed_muzero.cluster.run_control import NAMESPACE
from distributed_muzero.errors import RunIsOver
from distributed_muzero.rllib import DistributedMuZero, MuZeroConfig
from tests.processes import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def small():
    return (
        MuZeroConfig("debug")
        .env_runners(num_env_runners=2)
        .reporting(min_time_s_per_iteration=0.5, min_sample_timesteps_per_iteration=200)
        .evaluation(evaluation_duration=2)
    )


def alive():
    """Named RunControls and CPUs in use."""
    names = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)]
    return names, ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0)


def test_it_trains_waits_saves_goes_on_and_leaves_ray_as_it_was(own_ray, tmp_path):
    algorithm = small().build_algo()
    assert alive() == ([], 0)
    first = algorithm.train()
    assert first["fault_tolerance"]["num_healthy_workers"] <= 2
    assert len(alive()[0]) == 1 and alive()[1] == 2
    while not (last := algorithm.train())["num_grad_updates_lifetime"]:
        pass
    time.sleep(3)  # whoever was asked for something has done it by now
    algorithm._take_turn()
    waiting = algorithm._book.state.env_steps
    time.sleep(2)
    assert algorithm._book.state.env_steps == waiting
    saved = algorithm.save_to_path(tmp_path / "saved")
    assert algorithm.evaluate()["env_runners"]["num_episodes"] == 2
    algorithm.restore_from_path(saved)
    result = algorithm.train()
    assert result["num_env_steps_sampled_lifetime"] >= last["num_env_steps_sampled_lifetime"] + 200
    assert result["num_grad_updates_lifetime"] >= last["num_grad_updates_lifetime"]
    algorithm.stop()
    assert ray.is_initialized()
    wait_for("all to be gone", lambda: alive() == ([], 0))
    other = DistributedMuZero.from_checkpoint(saved)
    assert other.train()["training_iteration"] == last["training_iteration"] + 1
    other.stop()


@pytest.mark.long
def test_a_run_that_is_stopped_from_outside_is_over(own_ray):
    algorithm = small().build_algo()
    algorithm.train()
    [name] = alive()[0]
    control = ray.get_actor(name, namespace=NAMESPACE)
    ray.get(control.set_desired.remote(stop=True))
    assert any(algorithm.train()["done"] for _ in range(20))
    with pytest.raises(RunIsOver, match="the run was stopped"):
        algorithm.train()
    algorithm.stop()
    wait_for("all to be gone", lambda: alive() == ([], 0))


@pytest.mark.long
def test_actors_of_a_trial_grow_past_its_placement_group(own_ray, tmp_path):
    live = []

    def scale():
        [name] = wait_for("the trial's run", lambda: alive()[0])
        control = ray.get_actor(name, namespace=NAMESPACE)
        ray.get(control.set_desired.remote(num_actors=2))

        def status():
            return ray.get(control.get_status.remote()).get("actors", {})

        live.append(wait_for("two actors at work", lambda: status().get("live") == 2))

    thread = threading.Thread(target=scale, daemon=True)
    thread.start()
    results = tune.Tuner(
        "DistributedMuZero",
        param_space=small().env_runners(num_env_runners=1),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path),
            stop=lambda _, result: bool(live) or result["training_iteration"] >= 200,
            verbose=0,
        ),
    ).fit()
    thread.join(timeout=10)
    assert not results.errors and live
    wait_for("all to be gone", lambda: alive() == ([], 0))
