"""`envs` and `envs check`, and training on code of one's own, as a user would."""

from __future__ import annotations

import json
import shutil

import pytest

from distributed_muzero.cli import main
from distributed_muzero.cli.envs import parse_kwargs
from distributed_muzero.config import make_config, parse_overrides
from distributed_muzero.environments.checks_of_games import OF_GAMES
from distributed_muzero.environments.checks_of_instances import OF_INSTANCES
from distributed_muzero.environments.registry import environment_ids
from tests import processes
from tests.environments.games import EXAMPLES

TRUST = "--trust-env-code"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder in which the commands are given: it holds the example, and a broken one of that."""
    shutil.copy(EXAMPLES / "nim.py", tmp_path)
    text = (EXAMPLES / "nim.py").read_text(encoding="utf-8")
    (tmp_path / "odd_nim.py").write_text(text.replace("self.player = 1 - self.player", "pass"))
    monkeypatch.chdir(tmp_path)


def test_the_list_has_two_columns_however_long_the_ids_are(capsys):
    main.app(["envs"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    entries = environment_ids()
    second = max(len(entry.id) for entry in entries) + 2
    assert [line[:second].rstrip() for line in lines] == [entry.id for entry in entries]
    assert all(line[second:].startswith(entry.family) for line, entry in zip(lines, entries, strict=True))


def test_a_sound_environment_gets_a_table_and_exit_code_0():
    done = processes.run("envs", "check", "chain", "--env-kwargs", "{length: 6}", "--games", 3)
    assert done.returncode == 0, done.stderr
    assert "all promises are kept" in done.stdout
    for name in ("spec", "length", *OF_GAMES, *OF_INSTANCES, "close", "speed"):
        assert name in done.stdout


def test_a_broken_one_gets_the_failing_row_and_exit_code_1(here):
    done = processes.run("envs", "check", "odd_nim:make", TRUST, "--json", "--games", 3)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    failed = [row for row in report["checks"] if row["passed"] is False]
    assert not report["passed"] and report["games"] == 3
    assert [row["name"] for row in failed] == ["turns"]
    assert "player 0 is to move again" in failed[0]["detail"]
    done = processes.run("envs", "check", "odd_nim:make", TRUST, "--games", 3)
    assert done.returncode == 1 and "FAILED" in done.stdout and "broken: turns" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nim:make",), "--trust-env-code"),
        (("nim:make", TRUST, "--env-kwargs", "[1"), "expected a YAML mapping"),
        (("nim:make", TRUST, "--env-kwargs", "{pebbles: 3}"), "unexpected keyword argument 'pebbles'"),
        (("chian",), "did you mean 'chain'"),
    ],
)
def test_mistakes_end_in_one_message(here, arguments, message):
    done = processes.run("envs", "check", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_kwargs_are_read_as_training_reads_them():
    text = "{speed: 1e-3, sizes: [1e2, 3], name: wide, deep: {rate: 2E-1}}"
    expected = {"speed": 0.001, "sizes": [100.0, 3], "name": "wide", "deep": {"rate": 0.2}}
    assert parse_kwargs(text) == expected
    section = parse_overrides([f"environment.kwargs={text}"])
    assert make_config(section).environment.kwargs == expected


@pytest.mark.cluster
@pytest.mark.slow
def test_actors_in_processes_of_their_own_find_the_code(here, tmp_path):
    small = (
        "--envs-per-actor",
        4,
        "--set",
        "search.num_simulations=4",
        "--set",
        "replay.min_size_to_sample=50",
    )
    with processes.started(
        "train", "--env", "nim:make", TRUST, "--name", "r", "--runs-dir", tmp_path / "runs", "--max-train-steps", 3,
        *small,
    ) as process:  # fmt: skip
        output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert (
        "learner steps: " in output
        and json.loads((tmp_path / "runs/r/status.json").read_text())["env_steps"] > 0
    )


@pytest.mark.slow
def test_the_example_is_trained_and_evaluated_and_needs_trust_each_time(here, tmp_path):
    begin = ("train", "--env", "nim:make", "--in-process", "--name", "r", "--max-train-steps", 3)
    small = (
        "--envs-per-actor",
        4,
        "--set",
        "search.num_simulations=4",
        "--set",
        "replay.min_size_to_sample=50",
    )
    done = processes.run(*begin, *small, "--runs-dir", tmp_path / "runs")
    assert done.returncode == 2 and TRUST in done.stderr and not (tmp_path / "runs" / "r").exists()
    done = processes.run(*begin, *small, "--runs-dir", tmp_path / "runs", TRUST)
    assert done.returncode == 0, done.stderr
    evaluate = ("evaluate", "r", "--runs-dir", tmp_path / "runs", "--games", 2, "--json")
    done = processes.run(*evaluate)
    assert done.returncode == 2 and TRUST in done.stderr
    done = processes.run(*evaluate, TRUST)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["games"] == 2
