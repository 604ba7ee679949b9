"""The commands as a user calls them."""

from __future__ import annotations

import json

import pytest
import yaml

from distributed_muzero.cli import main
from distributed_muzero.cluster import jobs
from tests import processes


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    done = processes.run(
        "train",
        "--preset",
        "debug",
        "--in-process",
        "--max-train-steps",
        30,
        "--runs-dir",
        folder,
        "--name",
        "r",
    )
    assert done.returncode == 0, done.stderr
    assert str(folder / "r") in done.stdout
    return folder / "r"


def test_evaluate_prints_one_json_object_on_the_last_line(run_folder):
    done = processes.run(
        "evaluate", "r", "--runs-dir", run_folder.parent, "--episodes", 3, "--seed", 5, "--simulations", 3,
        "--search-policy", "gumbel", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() >= {
        "mean_return",
        "std_return",
        "returns",
        "episodes",
        "weights_version",
        "checkpoint",
    }
    assert len(result["returns"]) == result["episodes"] == 3
    assert (result["simulations"], result["search_policy"]) == (3, "gumbel")
    assert result["mean_return"] == pytest.approx(sum(result["returns"]) / 3)


def test_a_run_that_learnt_nothing_says_so(tmp_path):
    few = ("--max-env-steps", 40, "--set", "replay.min_size_to_sample=1000")
    done = processes.run(
        "train", "--preset", "debug", "--in-process", *few, "--runs-dir", tmp_path, "--name", "r"
    )
    assert done.returncode == 0, done.stderr
    assert "nothing was learnt, and there is no checkpoint: the learner waits for 1000 stored" in done.stdout


def test_the_same_seed_evaluates_to_the_same_games(run_folder):
    results = [
        processes.run(
            "evaluate", run_folder, "--episodes", 2, "--seed", seed, "--simulations", 3, "--json"
        ).stdout
        for seed in (1, 1, 2)
    ]
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_a_run_keeps_its_whole_config(run_folder):
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert config["run"]["max_train_steps"] == 30
    shown = yaml.safe_load(processes.run("config", "show", "--preset", "debug").stdout)
    shown["run"]["max_train_steps"] = 30
    assert config == shown


def test_evaluating_before_the_first_checkpoint_says_so(run_folder, tmp_path):
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "config.yaml").write_text((run_folder / "config.yaml").read_text())
    done = processes.run("evaluate", folder)
    assert done.returncode == 2
    assert "no checkpoint yet" in done.stderr


def test_presets_schema_envs_and_version():
    assert {"acrobot", "cartpole", "debug", "lunarlander"} <= set(
        processes.run("config", "presets").stdout.split()
    )
    assert "environment" in json.loads(processes.run("config", "schema").stdout)["properties"]
    assert "CartPole-v1" in processes.run("envs").stdout
    assert processes.run("--version").stdout.strip().count(".") == 2


def test_every_preset_makes_a_config():
    for name in ("acrobot", "cartpole", "debug", "lunarlander"):
        assert processes.run("config", "show", "--preset", name).returncode == 0


@pytest.mark.parametrize("take_over", [False, True])
def test_submit_passes_take_over_on_to_the_job(monkeypatch, capsys, take_over):
    sent = []

    class NoCluster:
        """Takes what would be submitted."""

        def __init__(self, address):
            pass

        def submit(self, run, config, arguments, *rest):
            sent.extend(arguments)
            return run

        def wait_until_started(self, *_):
            return "there"

    monkeypatch.setattr(jobs, "Jobs", NoCluster)
    words = ["submit", "--preset", "debug", "--name", "r", "--resume", "auto"]
    main.app([*words, "--take-over"] if take_over else words, standalone_mode=False)
    assert ("--take-over" in sent) is take_over and sent[:2] == ["--resume", "auto"]
