"""A curriculum through real Ray processes, that are killed with their driver and started again."""

from __future__ import annotations

import json
import signal

import pytest

from tests.processes import run, started, status, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.long]

CONFIG = """
environment: {id: chain, max_episode_steps: 12}
curriculum:
  stages: [{kwargs: {start: 8}}, {kwargs: {start: 6}}, {kwargs: {start: 3}}]
  won_at_return: 1.0
  window: 30
  promote_at: 0.7
  demote_at: 0.0
network: {hidden_sizes: [32]}
search: {num_simulations: 8}
actor: {num_actors: 2, envs_per_actor: 8}
replay: {min_size_to_sample: 200, samples_per_insert: 16}
reanalyse: {ratio: 0.3}
learner: {batch_size: 32, checkpoint_seconds: 2}
evaluator: {num_episodes: 2, interval_seconds: 5}
run: {max_minutes: 3}
"""


def test_stages_are_gone_through_and_outlive_the_driver(tmp_path):
    folder = tmp_path / "r"
    config = tmp_path / "chain.yaml"
    config.write_text(CONFIG)

    def stage():
        return (status(folder).get("curriculum") or {}).get("stage", 0)

    def recorded(name):
        """Of each second so far."""
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line)[name] for line in lines if line.endswith("\n")]

    with started("train", "--config", config, "--name", "r", "--runs-dir", tmp_path) as process:
        wait_for("the second stage", lambda: stage() >= 2)
        wait_for("a checkpoint", lambda: list((folder / "checkpoints").glob("step_*/DONE")))
        process.kill()  # the driver, which alone knows the stage
        process.wait()
        reached = stage()
    with started("resume", "r", "--runs-dir", tmp_path) as process:
        wait_for("the third stage", lambda: stage() == 3)
        wait_for("positions searched anew", lambda: recorded("reanalyse/positions")[-1] > 0)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    stages = recorded("curriculum/stage")
    assert stages == sorted(stages) and {1, reached, 3} <= set(stages)
    assert status(folder)["rejected_episodes"] == 0
    limit = status(folder)["learner_steps"] + 20
    alone = run("resume", "r", "--runs-dir", tmp_path, "--max-train-steps", limit, "--in-process")
    assert alone.returncode == 0 and stage() == 3, alone.stderr
