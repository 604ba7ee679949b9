"""The whole loop in one process."""

from __future__ import annotations

import io
import json
import time

from rich.console import Console

from distributed_muzero import checkpoint
from distributed_muzero.config import load_preset, make_config
from distributed_muzero.observability.progress import Progress
from distributed_muzero.run_folder import create_run
from distributed_muzero.workers import local
from distributed_muzero.workers.bookkeeper import Bookkeeper
from distributed_muzero.workers.builder import Builder
from distributed_muzero.workers.learner import Learner
from distributed_muzero.workers.run_state import outcome


def train(tmp_path, name, sections=None, interval_seconds=100.0, clock=time.monotonic, **limits):
    config = make_config(
        load_preset("debug"),
        sections or {},
        {
            "run": limits,
            "evaluator": {"interval_seconds": interval_seconds},
            "learner": {"keep_checkpoints": 100},
        },
    )
    folder = create_run(tmp_path, name, config)
    book = Bookkeeper(config, folder, Progress(Console(file=io.StringIO())), clock)
    reason = outcome(local.turns(config, name, book, lambda: False)).reason
    book.close("finished")
    return folder, book, reason


def test_a_checkpoint_plays_the_very_games_that_it_was_evaluated_by(tmp_path):
    folder, _, _ = train(tmp_path, "r", interval_seconds=0.2, max_train_steps=120)
    evaluations = [json.loads(line) for line in folder.evaluations_file.read_text().splitlines()]
    assert len(evaluations) > 1
    for evaluation in evaluations:
        evaluator = Builder(folder.config, "r").evaluator()
        evaluator.load(checkpoint.read_checkpoint(folder.checkpoints / evaluation["checkpoint"]))
        seeds = (folder.config.run.seed, evaluation["learner_steps"])
        assert (
            evaluator.evaluate(folder.config.evaluator.num_episodes, seeds)["returns"]
            == evaluation["returns"]
        )


def test_every_limit_ends_the_run_and_is_named(tmp_path):
    assert "learner steps" in train(tmp_path, "a", max_train_steps=10)[2]
    assert "environment steps" in train(tmp_path, "b", max_env_steps=50)[2]
    assert "minutes" in train(tmp_path, "c", max_minutes=0.01, max_train_steps=None)[2]
    assert "evaluation" in train(tmp_path, "d", interval_seconds=0.0, stop_at_return=1.0)[2]


def test_time_is_looked_at_between_learner_steps(tmp_path, monkeypatch):
    seconds, step = 0, Learner.step

    def slow_step(self, batch):
        nonlocal seconds
        seconds += 25
        return step(self, batch)

    monkeypatch.setattr(Learner, "step", slow_step)
    _, book, reason = train(tmp_path, "r", clock=lambda: seconds, max_minutes=1, max_train_steps=None)
    assert (book.state.learner.learner_steps, reason) == (3, "1 minutes are over")


def test_the_same_seed_learns_the_same_weights(tmp_path):
    weights = []
    for name in ("a", "b"):
        folder, _, _ = train(tmp_path, name, max_train_steps=40)
        weights.append(checkpoint.latest_checkpoint(folder.checkpoints).tensors["weights"])
    for name, array in weights[0].items():
        assert (array == weights[1][name]).all(), name


def test_several_shards_never_hold_each_other_up(tmp_path):
    """A shard that runs dry must not keep the learner from the others, which hold the actor back meanwhile."""
    config = {"replay": {"num_shards": 3, "min_size_to_sample": 400}, "actor": {"max_unacknowledged": 1}}
    _, book, _ = train(tmp_path, "r", config, max_train_steps=400, max_minutes=1)
    assert book.state.learner.learner_steps >= 400
