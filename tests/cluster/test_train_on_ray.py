"""The whole thing through real Ray processes, started by the command line."""

from __future__ import annotations

import json
import signal

import psutil
import pytest

from distributed_muzero import checkpoint
from tests.cluster.nodes import SLOW_CHAIN, connected_nodes, run_in
from tests.processes import descendants, find_role, run, started, status, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

FOREVER = ("--set", "run.max_train_steps=null", "--max-minutes", 3)


def start(tmp_path, *options):
    return started("train", "--preset", "debug", "--runs-dir", tmp_path, "--name", "r", *options)


def env_steps(tmp_path):
    return status(tmp_path / "r").get("env_steps", 0)


def learner_steps(tmp_path):
    return status(tmp_path / "r").get("learner_steps", 0)


def metrics(tmp_path):
    """The whole lines so far."""
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_a_run_ends_at_its_limit_and_leaves_everything_behind(tmp_path):
    with start(tmp_path, "--actors", 2, "--shards", 2, "--max-train-steps", 300) as process:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    folder = tmp_path / "r"
    assert "learner steps were made" in errors
    assert str(folder) in output
    assert status(folder)["state"] == "finished"
    assert status(folder)["learner_steps"] >= 300
    checkpoints = sorted((folder / "checkpoints").glob("step_*"))
    assert checkpoints
    for path in checkpoints:
        assert {file.name for file in path.iterdir()} == {
            "manifest.json", "weights.safetensors", "optimizer.safetensors", "generators.safetensors",
            "state.json", "DONE",
        }  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["rollout/env_steps"] > 0
    assert lines[-1]["actors/live"] == 2
    assert list((folder / "tensorboard").iterdir())
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert evaluations[-1]["checkpoint"] == checkpoints[-1].name
    assert evaluations[-1]["learner_steps"] == status(folder)["learner_steps"]
    assert all(evaluation["episodes"] == 2 for evaluation in evaluations)


@pytest.mark.long
def test_an_evaluation_that_outlasts_the_limit_is_waited_for_and_the_last_checkpoint_gets_its_own(tmp_path):
    game = ("--env", "tests.cluster.slow_chain:make", "--trust-env-code", *long_evaluations(num_episodes=12))
    with started("train", *game, "--runs-dir", tmp_path, "--name", "r") as process:
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    lines = [json.loads(line) for line in (tmp_path / "r" / "evaluations.jsonl").read_text().splitlines()]
    steps = [line["learner_steps"] for line in lines]
    assert len(steps) == 2 and steps[0] < steps[1] == learner_steps(tmp_path), errors


@pytest.mark.long
def test_a_stop_is_heard_while_the_last_evaluation_is_waited_for(tmp_path):
    options = (*SLOW_CHAIN, *long_evaluations(num_episodes=1000))
    with connected_nodes(1) as nodes, run_in(nodes, tmp_path, *options) as learning:
        checkpoints = learning.path / "checkpoints"
        learning.wait(
            "the last checkpoint",
            lambda: any(int(done.parent.name[-8:]) >= 200 for done in checkpoints.glob("step_*/DONE")),
        )
        learning.ask(stop=True)
        assert learning.process.wait(30) == 0, learning.errors
        assert learning.status()["state"] == "finished"
        assert "the last evaluation is not waited for" in learning.errors


def long_evaluations(num_episodes):
    """Options: an episode of an evaluation takes a second, the 200 learner steps less than that."""
    options = {
        "run.max_train_steps": 200,
        "environment.kwargs": "{pause_seconds: 0.03}",
        "search.num_simulations": 2,
        "actor.envs_per_actor": 2,
        "replay.min_size_to_sample": 20,
        "replay.samples_per_insert": 5000,
        "learner.batch_size": 16,
        "evaluator.interval_seconds": 0,
        "evaluator.num_episodes": num_episodes,
    }
    return [word for key, value in options.items() for word in ("--set", f"{key}={value}")]


def test_a_killed_actor_is_replaced_and_the_run_goes_on(tmp_path):
    with start(tmp_path, *FOREVER) as process:
        wait_for("the first steps", lambda: env_steps(tmp_path) > 0)
        (victim,) = wait_for("an actor's process", lambda: find_role(process.pid, "ActorWorker"))
        victim.kill()
        (successor,) = wait_for(
            "its successor", lambda: [p for p in find_role(process.pid, "ActorWorker") if p.pid != victim.pid]
        )
        before = env_steps(tmp_path)
        wait_for("more steps", lambda: env_steps(tmp_path) > before + 100)
        assert successor.is_running()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "actor 0 was lost" in errors
    assert process.returncode == 0, errors


def test_a_killed_learner_goes_on_from_the_last_checkpoint(tmp_path):
    with start(tmp_path, *FOREVER) as process:
        wait_for("a checkpoint", lambda: list((tmp_path / "r" / "checkpoints").glob("step_*/DONE")))
        (victim,) = find_role(process.pid, "LearnerWorker")
        saved = checkpoint.latest_checkpoint(tmp_path / "r" / "checkpoints")
        before, num_lines = learner_steps(tmp_path), len(metrics(tmp_path))
        victim.kill()
        wait_for("more learner steps", lambda: learner_steps(tmp_path) > before + 100)
        assert min(line["train/learner_steps"] for line in metrics(tmp_path)[num_lines:]) >= saved.step > 0
        versions = [line["weights/version"] for line in metrics(tmp_path)]
        assert versions == sorted(versions)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "the learner was lost" in errors
    assert process.returncode == 0, errors


def test_a_killed_shard_comes_back_and_the_run_goes_on(tmp_path):
    with start(tmp_path, *FOREVER) as process:
        wait_for("learner steps", lambda: learner_steps(tmp_path) > 0)
        (victim,) = find_role(process.pid, "ReplayShardWorker")
        victim.kill()
        wait_for(
            "its successor",
            lambda: [p for p in find_role(process.pid, "ReplayShardWorker") if p.pid != victim.pid],
        )
        before = learner_steps(tmp_path)
        wait_for("more learner steps", lambda: learner_steps(tmp_path) > before + 100)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_a_checkpoint_and_leaves_no_process(tmp_path, number):
    with start(tmp_path, *FOREVER) as process:
        wait_for("learner steps", lambda: learner_steps(tmp_path) > 0)
        children = descendants(process.pid)
        process.send_signal(number)
        _, errors = process.communicate(timeout=25)  # as promised
        assert process.returncode == 0, errors
        _, alive = psutil.wait_procs(children, timeout=15)
        assert not alive
    assert "Traceback" not in errors
    assert status(tmp_path / "r")["state"] == "stopped"
    assert list((tmp_path / "r" / "checkpoints").glob("step_*/DONE"))


def test_a_second_signal_ends_at_once(tmp_path):
    with start(tmp_path, *FOREVER) as process:
        wait_for("the first steps", lambda: env_steps(tmp_path) > 0)
        process.send_signal(signal.SIGSTOP)  # so that both signals are there when it goes on
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=20)
        assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)


@pytest.mark.faults
def test_a_stopped_run_goes_on_with_other_limits_and_the_same_command_finds_it(tmp_path):
    name = ("--runs-dir", tmp_path, "--name", "r")
    same = ("train", "--preset", "debug", *name, "--resume", "auto", "--set", "replay.priority_exponent=0.6")
    reanalyse = ("--set", "reanalyse.ratio=0.5", "--shards", 2)
    first = run(*same, *reanalyse, "--max-train-steps", 200)
    assert first.returncode == 0, first.stderr
    stopped = status(tmp_path / "r")
    again = run(*same, *reanalyse, "--max-train-steps", 400, "--in-process")
    assert again.returncode == 0, again.stderr
    assert f"going on from {stopped['env_steps']} environment steps" in again.stderr
    resumed = run("resume", "r", "--runs-dir", tmp_path, "--max-train-steps", 500)
    assert resumed.returncode == 0, resumed.stderr
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["train/learner_steps"] for line in lines]
    assert steps == sorted(steps) and steps[-1] >= 500
    assert any(line["reanalyse/positions"] > 0 for line in lines)
    for options in (("--max-train-steps", 500), ("--set", "network.embedding_size=7")):
        refused = run("resume", "r", "--runs-dir", tmp_path, *options)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "network.embedding_size of run 'r' is 64 and can't become 7" in refused.stderr


@pytest.mark.long
def test_an_exported_set_trains_offline(tmp_path):
    played = run("train", "--preset", "debug", "--runs-dir", tmp_path, "--name", "played", "--in-process")
    assert played.returncode == 0, played.stderr
    dataset = tmp_path / "played.parquet"
    exported = run("replay", "export", "played", dataset, "--runs-dir", tmp_path)
    assert exported.returncode == 0, exported.stderr
    options = ("--preset", "debug", "--runs-dir", tmp_path, "--offline", dataset)
    # Through Ray, the learner is ahead while the reanalyser's process starts.
    for name, steps, where in (("ray", 1500, ()), ("local", 100, ("--in-process",))):
        done = run("train", *options, "--max-train-steps", steps, "--name", name, *where)
        assert done.returncode == 0, done.stderr
        result = status(tmp_path / name)
        assert result["learner_steps"] >= steps and result["env_steps"] == 0
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["reanalyse/positions"] > 0
