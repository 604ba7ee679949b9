"""Every mistake that a person can make ends in one clear message, exit code 2 and no traceback."""

from __future__ import annotations

import pytest

from tests import processes

TINY = ("--preset", "debug", "--in-process", "--max-train-steps", "5")

MISTAKES = {
    "unknown environment": (("train", "--env", "CartPoel-v1"), "CartPole-v1"),
    "unknown preset": (("train", "--preset", "cartpol"), "did you mean 'cartpole'"),
    "unknown section": (
        ("train", "--preset", "debug", "--set", "lerner.batch_size=3"),
        "did you mean 'learner'",
    ),
    "unknown key": (
        ("train", "--preset", "debug", "--set", "learner.batchsize=3"),
        "did you mean 'batch_size'",
    ),
    "impossible value": (
        ("train", "--preset", "debug", "--set", "learner.batch_size=-3"),
        "learner.batch_size",
    ),
    "value of another kind": (("train", "--preset", "debug", "--set", "learner.batch_size=many"), "'many'"),
    "malformed override": (("train", "--preset", "debug", "--set", "batch_size"), "section.key=value"),
    "nothing to train": (("train",), "--preset"),
    "two things to train": (("train", "--preset", "debug", "--env", "CartPole-v1"), "exactly one"),
    "name that leaves the folder": (("train", *TINY, "--name", "../x"), "run name"),
    "missing config file": (("train", "--config", "nowhere.yaml"), "nowhere.yaml"),
    "continuous actions": (("train", "--env", "Pendulum-v1"), "Pendulum-v1"),
    "unknown networks": (("train", *TINY, "--set", "network.name=transformer"), "mlp"),
    "networks for other observations": (("train", *TINY, "--set", "network.name=resnet"), "planes"),
    "unknown run": (("evaluate", "no-such-run"), "no-such-run"),
    "no simulations": (
        ("train", "--preset", "debug", "--set", "search.num_simulations=0"),
        "num_simulations",
    ),
    "negative seed": (("train", "--preset", "debug", "--seed", "-1"), "run.seed"),
    "unknown benchmark peer": (("bench", "search", "--against", "alphago"), "mctx"),
    "unknown command": (("trian",), "trian"),
    "resuming nothing by name": (("train", *TINY, "--resume", "auto"), "--name"),
    "a campaign that would check nothing": (
        ("chaos", "--only", "p3,P8", "--without", "dedupe"),
        "leave one of the two out",
    ),
    "dataset that isn't there": (("train", *TINY, "--offline", "nowhere.parquet"), "nowhere.parquet"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_message_and_exit_code_2(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, expected = MISTAKES[mistake]
    done = processes.run(*arguments)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").glob("*"))


def test_a_name_that_is_taken_is_refused_and_the_run_is_left_alone(tmp_path):
    options = ("train", *TINY, "--runs-dir", tmp_path, "--name", "mine")
    assert processes.run(*options).returncode == 0
    before = (tmp_path / "mine" / "metrics.jsonl").read_bytes()
    done = processes.run(*options)
    assert done.returncode == 2
    assert "mine" in done.stderr
    assert "exists already" in done.stderr
    assert (tmp_path / "mine" / "metrics.jsonl").read_bytes() == before


def test_a_config_file_with_an_unknown_key_names_it(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("learner:\n  batchsize: 3\n")
    done = processes.run("train", "--config", file, "--runs-dir", tmp_path)
    assert done.returncode == 2
    assert "batchsize" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_config_file_that_is_no_yaml_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("learner: [1,")
    done = processes.run("config", "show", "--config", file)
    assert done.returncode == 2
    assert "mine.yaml" in done.stderr


BROKEN_ENVIRONMENTS = '''
import numpy as np
from distributed_muzero.environments.base import EnvironmentSpec


class Broken:
    """A game of ten steps that goes wrong at its fourth."""

    truncated = False

    def __init__(self, config):
        self.spec = EnvironmentSpec(config.id, (2,), np.dtype(np.float32), (3,))
        self.fault = config.kwargs["fault"]

    def initial_state(self, seed=None):
        self.steps = 0
        return np.zeros(2, np.float32)

    def step(self, action):
        self.steps += 1
        observation = np.full(2, self.steps, np.float32)
        reward = 0.0
        if self.steps == 4 and self.fault == "observation":
            observation[1] = np.nan
        if self.steps == 4 and self.fault == "reward":
            reward = float("inf")
        return reward, observation, self.steps == 10

    def mask(self):
        broken = self.steps == 4 and self.fault == "mask"
        return np.zeros(3, bool) if broken else np.ones(3, bool)

    def to_play(self):
        return 0

    def close(self):
        pass
'''


@pytest.fixture
def broken_package(tmp_path, monkeypatch):
    """An installed package (its metadata lies beside it) that brings an environment of its own."""
    (tmp_path / "broken_games.py").write_text(BROKEN_ENVIRONMENTS)
    info = tmp_path / "broken_games-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-games\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[distributed_muzero.environments]\nbroken = broken_games:Broken\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.parametrize(
    ("fault", "expected"), [("observation", "NaN"), ("reward", "inf"), ("mask", "allows none")]
)
@pytest.mark.parametrize(
    "mode", ["--in-process", pytest.param("", marks=[pytest.mark.cluster, pytest.mark.slow])]
)
def test_a_broken_environment_is_named_with_step_and_seed(broken_package, tmp_path, fault, expected, mode):
    options = (
        "--env",
        "broken",
        "--set",
        f"environment.kwargs={{fault: {fault}}}",
        *([mode] if mode else []),
    )
    done = processes.run(
        "train", *options, "--runs-dir", tmp_path / "runs", "--name", "r", "--max-minutes", 1
    )
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert "step" in done.stderr
    assert "seed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_network_that_gives_nan_is_named_with_the_step(tmp_path):
    options = ("--set", "learner.learning_rate=1e30", "--set", "learner.max_grad_norm=1e30")
    done = processes.run(
        "train", *TINY, "--max-train-steps", 500, *options, "--runs-dir", tmp_path, "--name", "r"
    )
    assert done.returncode == 2, done.stderr
    assert "step" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_is_over_says_which_limit_and_changes_nothing(tmp_path):
    run = ("--runs-dir", tmp_path, "--name", "r")
    assert processes.run("train", *TINY, *run).returncode == 0
    files = sorted(path for path in (tmp_path / "r").rglob("*") if path.is_file())
    before = [path.read_bytes() for path in files]
    refused = processes.run(
        "resume", tmp_path / "r", "--max-train-steps", 3, "--set", "learner.learning_rate=1e-4"
    )
    assert refused.returncode == 2 and "run.max_train_steps 3" in refused.stderr
    assert "Traceback" not in refused.stderr
    # Whoever repeats one command until the run is over hears that it is.
    again = processes.run("train", *TINY, *run, "--resume", "auto")
    assert again.returncode == 0 and "nothing is left to do" in again.stdout
    assert sorted(path for path in (tmp_path / "r").rglob("*") if path.is_file()) == files
    assert [path.read_bytes() for path in files] == before


def test_a_resume_with_what_cannot_be_made_changes_nothing(tmp_path):
    options = ("--runs-dir", tmp_path)
    game = ("--env", "openspiel:connect_four", "--set", "search.num_simulations=2")
    done = processes.run("train", *game, "--in-process", "--max-train-steps", "1", *options, "--name", "r")
    assert done.returncode == 0, done.stderr
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    changes = ("--set", "evaluator.opponent=minimax", "--set", "run.max_train_steps=90")
    done = processes.run("resume", "r", *options, *changes, "--in-process")
    assert done.returncode == 2 and "too many" in done.stderr and "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()} == before


def test_a_folder_without_config_says_where_its_settings_are(tmp_path):
    assert processes.run("train", *TINY, "--runs-dir", tmp_path, "--name", "r").returncode == 0
    (tmp_path / "r" / "config.yaml").unlink()
    done = processes.run("resume", tmp_path / "r")
    assert done.returncode == 2 and "state.json" in done.stderr


def test_a_dataset_of_another_environment_leaves_no_run_behind(tmp_path):
    assert processes.run("train", *TINY, "--runs-dir", tmp_path, "--name", "r").returncode == 0
    done = processes.run(
        "train", "--preset", "acrobot", "--offline", tmp_path / "r", "--runs-dir", tmp_path, "--name", "other"
    )
    assert done.returncode == 2 and "doesn't fit" in done.stderr
    assert not (tmp_path / "other").exists()
