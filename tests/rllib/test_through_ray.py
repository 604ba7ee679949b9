"""In real Ray processes: creators reach them, and RLlib's PPO trains on environments of ours."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.processes import run, status

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHORT = (
    "--name", "r", "--max-train-steps", "5", "--set", "search.num_simulations=4",
    "--set", "replay.min_size_to_sample=20", "--set", "learner.batch_size=16", "--set", "evaluator.num_episodes=2",
)  # fmt: skip


def run_script(name, *arguments):
    """Its standard output. Ray's sockets lie in a folder whose path is short."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_raylet_start_wait_time_s": "120"}
    with tempfile.TemporaryDirectory(prefix="dm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", HERE / f"{name}.py", *(arguments or [folder])],
            capture_output=True, text=True, timeout=200, env={**environment, "RAY_TMPDIR": folder},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_creator_reaches_every_process_of_the_job():
    early, late, never = json.loads(run_script("ray_script"))
    assert early == {"num_actions": 2, "loaded": []} and late == {"num_actions": 3, "loaded": []}
    assert "'never' isn't registered" in never["error"] and "(registered: early, late)" in never["error"]


@pytest.mark.long
def test_a_script_registers_an_environment_and_trains_on_it(tmp_path):
    run_script("train_script", *SHORT, "--runs-dir", str(tmp_path))
    assert status(tmp_path / "r")["state"] == "finished"


def test_the_command_line_imports_the_module_that_registers_it(tmp_path, monkeypatch):
    (tmp_path / "my_games.py").write_text(
        "import gymnasium\nfrom ray import tune\n"
        "tune.register_env('pole', lambda config: gymnasium.make('CartPole-v1'))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ours = ("--env", "rllib:my_games:pole", "--trust-env-code")
    done = run("train", "--in-process", *SHORT, *ours, timeout=200)
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "runs" / "r")["state"] == "finished"


def test_rllibs_ppo_trains_on_environments_of_ours():
    chain, game, masked = map(json.loads, run_script("ppo_script").splitlines())
    for result in (chain, game, masked):
        assert result["env_steps"] == 256
        assert all(map(math.isfinite, [*result["returns"].values(), *result["losses"]])) and result["losses"]
    for result in (game, masked):
        assert result["returns"]["player_0"] == pytest.approx(-result["returns"]["player_1"])
    # Nobody wins tic-tac-toe in fewer than five moves; an illegal one would end it earlier.
    assert masked["episode_len_mean"] >= 5
