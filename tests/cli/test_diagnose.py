"""`diagnose`, of runs that were really trained, if only for a moment."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from distributed_muzero.checkpoint import latest_checkpoint
from distributed_muzero.cli.diagnose import diagnose, diagnose_run, show
from distributed_muzero.errors import CheckpointError, ConfigError, DistributedMuZeroError, RunError
from distributed_muzero.observability.diagnosis_plot import make_figure
from distributed_muzero.replay.inspection import replay_stats
from distributed_muzero.run_folder import open_run
from tests.processes import run

DEPTHS = ["k", "values", "value_rmse", "value_bias", "search_value_rmse", "search_value_bias"]
DEPTHS += ["rewards", "reward_rmse", "reward_bias", "policies", "policy_kl", "illegal_mass"]
SMALL = ["--set", "search.num_simulations=5", "--set", "actor.envs_per_actor=4"]
SMALL += ["--set", "replay.min_size_to_sample=50", "--set", "learner.batch_size=16"]
SMALL += ["--set", "evaluator.num_episodes=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, source in (("pole", ["--preset", "debug"]), ("ttt", ["--env", "openspiel:tic_tac_toe"])):
        limits = ["--in-process", "--max-train-steps", 30]
        done = run("train", *source, *SMALL, *limits, "--runs-dir", folder, "--name", name)
        assert done.returncode == 0, done.stderr
    return folder


def diagnosis(runs, name, episodes, seed=3, **options):
    given = {"from_replay": False, "num_unroll_steps": None, "num_simulations": None, **options}
    folder = open_run(name, runs)
    saved = latest_checkpoint(folder.checkpoints)
    return diagnose_run(folder, saved, episodes, seed=seed, **given)


@pytest.fixture(scope="module")
def played(runs):
    return diagnosis(runs, "pole", 4)


def test_the_command_prints_one_json_object_on_the_last_line(runs, played):
    options = ["--episodes", 4, "--seed", 3, "--checkpoint", "latest", "--json"]
    done = run("diagnose", "pole", "--runs-dir", runs, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout.splitlines()[-1]) == played


def test_games_are_played_and_every_depth_is_told(runs, played):
    assert (played["run"], played["environment"], played["source"]) == ("pole", "CartPole-v1", "played")
    assert (played["games"], played["distinct_games"], played["players"]) == (4, 4, 1)
    assert [list(row) for row in played["depths"]] == [DEPTHS] * 6
    assert [row["k"] for row in played["depths"]] == list(range(6))
    first = played["depths"][0]
    assert first["values"] == first["policies"] == played["positions"]
    assert first["rewards"] == 0 and first["reward_rmse"] is None
    assert all(row["value_rmse"] >= abs(row["value_bias"]) for row in played["depths"])
    assert all(row["illegal_mass"] == 0 for row in played["depths"]), "both actions are always legal"
    for bins in (found["bins"] for found in played["calibration"].values()):
        assert sum(one["count"] for one in bins) == played["positions"]


def test_the_same_seed_diagnoses_the_same_games(runs, played):
    assert diagnosis(runs, "pole", 4) == played
    assert diagnosis(runs, "pole", 4, seed=4)["depths"] != played["depths"]


def test_stored_games_in_place_of_new_ones(runs):
    result = diagnosis(runs, "pole", 3, from_replay=True, num_unroll_steps=2, num_simulations=2)
    assert (result["source"], result["games"], result["simulations"]) == ("replay", 3, 2)
    assert [row["k"] for row in result["depths"]] == [0, 1, 2]
    total = replay_stats(runs / "pole" / "replay")["total"]
    every = diagnosis(runs, "pole", 10_000, from_replay=True, num_unroll_steps=0, num_simulations=1)
    assert (every["games"], every["positions"]) == (total["episodes"], total["transitions"])


def test_games_for_two_that_are_all_alike_are_told(runs):
    done = run("diagnose", "ttt", "--runs-dir", runs, "--episodes", 3, "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["players"], result["games"], result["distinct_games"]) == (2, 3, 1)
    assert "all 3 games are alike" in done.stderr and "--replay" in done.stderr
    stored = diagnosis(runs, "ttt", 10, from_replay=True)
    assert stored["distinct_games"] > 1
    assert any(row["illegal_mass"] > 0 for row in stored["depths"])


def test_tables_for_a_person_and_a_picture(runs, tmp_path):
    out = tmp_path / "model.png"
    done = run("diagnose", "pole", "--runs-dir", runs, "--episodes", 2, "--depth", 1, "--out", out)
    assert (done.returncode, done.stderr) == (0, f"wrote {out}\n")
    lines = [line.split() for line in done.stdout.splitlines()]
    header = next(line for line in lines if line[:1] == ["k"])
    assert " ".join(header) == "k positions value RMSE bias to search's reward RMSE policy KL illegal"
    [first, second] = [line for line in lines if line[:1] in (["0"], ["1"])]
    assert len(first) == len(second) == 8 and first[5] == "n/a" != second[5]
    assert "of the simulations cut by max_depth" in done.stdout
    data = out.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1200, 700)


def test_the_table_says_what_the_json_says(played, capsys):
    show(played)
    text = capsys.readouterr().out
    for row in played["depths"]:
        assert f"{row['value_rmse']:.3g}" in text and f"{row['policy_kl']:.3g}" in text
    assert f"{played['root']['agreement']:.1%}" in text
    assert f"{played['calibration']['search']['error']:.3g}" in text


def test_the_picture_shows_the_numbers(played):
    figure = make_figure(played, "title")
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == [
        "value error",
        "reward error",
        "policy error",
        "prior on illegal actions",
        "calibration of root values",
        "depth of the search's trees",
    ]
    curves = {line.get_label(): line for line in panels["value error"].lines}
    found = curves["RMSE against the return"]
    assert found.get_xdata().tolist() == [0, 1, 2, 3, 4, 5]
    assert found.get_ydata().tolist() == [row["value_rmse"] for row in played["depths"]]
    assert panels["reward error"].lines[0].get_xdata().tolist() == [1, 2, 3, 4, 5]
    bars = panels["depth of the search's trees"].patches
    assert sum(bar.get_height() for bar in bars) == played["positions"]


def test_one_depth_of_one_game_can_be_drawn(runs, tmp_path, capsys):
    out = tmp_path / "small.svg"
    diagnose("ttt", episodes=1, depth=0, simulations=1, runs_dir=str(runs), as_json=True, out=out)
    assert out.read_text().startswith("<?xml")
    assert len(json.loads(capsys.readouterr().out)["depths"]) == 1


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("nobody", {}, RunError, "no run 'nobody' in"),
        ("pole", {"which": "31"}, CheckpointError, "no checkpoint of step 31"),
        ("pole", {"which": "first"}, CheckpointError, "expected best, latest or a learner step"),
        ("pole", {"out": Path("model.bmp")}, ConfigError, "no picture is known by .bmp"),
        ("pole", {"out": Path("nowhere/model.png")}, ConfigError, "there is no folder nowhere"),
        ("pole", {"out": Path("/proc/self/model.png"), "episodes": 1}, ConfigError, "choose another --out"),
    ],
)
def test_a_mistake_is_an_error_that_says_what_to_do(runs, name, options, error, message):
    with pytest.raises(error, match=message):
        diagnose(name, runs_dir=str(runs), **options)


def test_a_mistake_on_the_command_line_is_one_line(runs):
    done = run("diagnose", "nobody", "--runs-dir", runs)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    done = run("diagnose", "pole", "--runs-dir", runs, "--episodes", 0)
    assert done.returncode == 2 and "--episodes" in done.stderr


def test_a_run_that_has_stored_no_game_says_so(runs, tmp_path):
    folder = tmp_path / "empty"
    shutil.copytree(runs / "pole", folder, ignore=shutil.ignore_patterns("replay"))
    with pytest.raises(DistributedMuZeroError, match="holds no replay shards"):
        diagnose(str(folder), replay=True)
    for part in ("episodes", "journal"):
        (folder / "replay" / "shard_0" / part).mkdir(parents=True)
    with pytest.raises(RunError, match=r"has stored no game yet in .*; leave out --replay"):
        diagnose(str(folder), replay=True)
