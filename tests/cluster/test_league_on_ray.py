"""The league of a two-player run, through real Ray processes."""

from __future__ import annotations

import signal

import pytest

from distributed_muzero.run_folder import open_run
from distributed_muzero.workers.league import unsealed
from tests.processes import find_role, run, started, status, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.long]

pytest.importorskip("pyspiel")

OPTIONS = (
    "--env", "openspiel:tic_tac_toe", "--name", "r", "--max-minutes", 3,
    "--set", "network.hidden_sizes=[32]", "--set", "search.num_simulations=4",
    "--set", "actor.envs_per_actor=8", "--set", "replay.min_size_to_sample=100",
    "--set", "learner.batch_size=16", "--set", "learner.keep_checkpoints=1",
    "--set", "evaluator.interval_seconds=0.5", "--set", "evaluator.num_episodes=4",
    "--set", "evaluator.league_size=2", "--set", "evaluator.league_games=4",
)  # fmt: skip


def test_checkpoints_are_rated_also_by_an_evaluator_that_was_replaced(tmp_path):
    folder = tmp_path / "r"

    def evaluations():
        return open_run("r", tmp_path).read_evaluations() if (folder / "config.yaml").exists() else []

    with started("train", "--runs-dir", tmp_path, *OPTIONS) as process:
        wait_for("a league of two", lambda: len(evaluations()) > 2)
        (victim,) = find_role(process.pid, "EvaluatorWorker")
        victim.kill()
        before = len(evaluations())
        wait_for("more evaluations", lambda: len(evaluations()) > before + 1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "the evaluator was lost" in errors and "leaves the league" not in errors
    ratings: dict[int, float] = {}
    for line in evaluations():
        assert len(line["league"]) == min(len(ratings), 2)
        for games in line["league"]:
            assert games["elo"] == ratings[games["step"]] and games["games"] == 4
        assert line["learner_steps"] > max(ratings, default=0)
        ratings[line["learner_steps"]] = line["elo"]
    assert next(iter(ratings.values())) == 0.0
    assert status(folder)["elo"] == evaluations()[-1]["elo"]
    members = unsealed((folder / "league.json").read_bytes())
    assert [member.step for member in members] == [min(ratings), max(ratings)]
    assert all((folder / "checkpoints" / f"step_{member.step:08d}" / "DONE").exists() for member in members)
    num_lines, limit = len(evaluations()), status(folder)["learner_steps"] + 200
    resumed = run("resume", "r", "--runs-dir", tmp_path, "--max-train-steps", limit, "--in-process")
    assert resumed.returncode == 0, resumed.stderr
    met = {games["step"]: games["elo"] for games in evaluations()[num_lines]["league"]}
    assert met == {member.step: member.elo for member in members}
