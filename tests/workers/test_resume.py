"""A run that ends, or dies, and goes on, in one process."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from distributed_muzero import checkpoint
from distributed_muzero.config import make_config
from distributed_muzero.errors import RunError
from distributed_muzero.observability.progress import Progress
from distributed_muzero.replay.inspection import list_all_held
from distributed_muzero.run_folder import Launch, create_run, open_run
from distributed_muzero.workers.bookkeeper import Bookkeeper
from distributed_muzero.workers.local import turns
from distributed_muzero.workers.run_state import LearnerReport, outcome

SMALL = {
    "environment": {"id": "chain"},
    "network": {"hidden_sizes": [16], "embedding_size": 8},
    "search": {"num_simulations": 4},
    "actor": {"envs_per_actor": 4},
    "replay": {"min_size_to_sample": 50, "samples_per_insert": 8},
    "learner": {"batch_size": 8, "publish_interval": 5, "keep_checkpoints": 50},
    "evaluator": {"num_episodes": 2, "interval_seconds": 0},
}


def launch(folder, max_train_steps):
    """One launch of the run, to its end; returns its bookkeeper."""
    limits = {"run": {"max_train_steps": max_train_steps}}
    folder = folder.with_config(make_config(folder.config.model_dump(), limits))
    with Progress(limits=folder.config.run) as progress:
        book = Bookkeeper(folder.config, folder, progress, launch=folder.begin_launch())
        before = (book.state.env_steps, book.state.learner.learner_steps)
        outcome(turns(folder.config, folder.name, book, lambda: False))
        book.close("finished")
    return book, before


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path, "r", make_config(SMALL))


def lines(folder):
    return [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]


def test_counts_go_on_where_they_stood_and_nothing_stored_is_lost_or_named_twice(run):
    first, before = launch(run, 20)
    assert before == (0, 0)
    held = {item.episode_id for item in list_all_held(run.replay)}
    written = lines(run)
    second, before = launch(run, 60)
    assert before == (first.state.env_steps, first.state.learner.learner_steps)
    assert second.state.learner.learner_steps >= 60
    again = [item.episode_id for item in list_all_held(run.replay)]
    assert held < set(again) and len(set(again)) == len(again)
    assert lines(run)[: len(written)] == written  # the same file goes on
    versions = [line["weights/version"] for line in lines(run)]
    assert versions == sorted(versions)


def test_it_learns_on_from_the_checkpoints_weights(run):
    launch(run, 20)
    saved = checkpoint.latest_checkpoint(run.checkpoints)
    with Progress(limits=run.config.run) as progress:
        book = Bookkeeper(run.config, run, progress, launch=run.begin_launch())
        assert outcome(turns(run.config, run.name, book, lambda: True)).was_stopped
        book.close("stopped")
    after = checkpoint.latest_checkpoint(run.checkpoints)
    assert after.state["weights_version"] > saved.state["weights_version"]
    # At most one turn of the learner lies between; an optimizer that began anew would have counted from 0.
    assert after.tensors["optimizer"]["step"] == after.step >= saved.step == 20 + saved.step % 20
    assert np.linalg.norm(after.tensors["optimizer"]["vector"]) > 0


def test_a_run_without_its_last_checkpoints_goes_on_from_an_earlier_one(run):
    launch(run, 20)
    kept = checkpoint.latest_checkpoint(run.checkpoints)
    launch(run, 60)
    for path in run.checkpoints.glob("step_*"):
        if path != kept.path:
            shutil.rmtree(path)
    assert kept.path.exists()
    third, before = launch(run, 80)
    assert before[1] == kept.step and third.state.learner.learner_steps >= 80
    assert third.launch.number == 2


def test_the_best_so_far_is_known_to_the_next_launch(run):
    launch(run, 20)
    best = checkpoint.best_checkpoint(run.checkpoints)
    with Progress(limits=run.config.run) as progress:
        book = Bookkeeper(run.config, run, progress, launch=Launch(1, 0))
        worse = {"mean_return": best.mean_return - 1, "std_return": 0.0, "returns": [0.0], "episodes": 1}
        book.add_evaluation(worse, checkpoint.latest_checkpoint(run.checkpoints).path, 20)
        book.close("stopped")
    assert checkpoint.best_checkpoint(run.checkpoints) == best


def test_no_version_is_given_twice_though_the_last_status_was_old(run):
    launch(run, 20)
    with Progress(limits=run.config.run) as progress:
        killed = Bookkeeper(run.config, run, progress, launch=run.begin_launch())
        killed.write_status("running", {})
        for version in range(killed.first_version, killed.first_version + 500):  # published, in no status
            killed.add_learner_report(LearnerReport(1000, version))
        killed.close("failed")
        resumed = Bookkeeper(run.config, run, progress, launch=run.begin_launch())
        resumed.close("stopped")
    assert version < resumed.first_version <= version + 100


def test_an_orderly_end_leaves_no_gap_between_versions(run):
    first, _ = launch(run, 20)
    with Progress(limits=run.config.run) as progress:
        resumed = Bookkeeper(run.config, run, progress, launch=run.begin_launch())
        resumed.close("stopped")
    assert resumed.first_version == first.state.learner.weights_version + 1


def test_checkpoints_are_due_by_time_while_an_evaluation_takes_long(run):
    clock = iter(range(0, 10_000, 20)).__next__  # each look takes 20 s
    with Progress(limits=run.config.run) as progress:
        book = Bookkeeper(run.config, run, progress, clock)
        assert not book.checkpoint_is_due(0)  # nothing was learnt
        assert book.checkpoint_is_due(5)
        arrays = {"weights": {"w": np.zeros(2, np.float32)}}
        book.write_checkpoint(arrays, {"learner_steps": 5, "weights_version": 1})
        assert not book.checkpoint_is_due(6)  # 20 s after it
        assert not book.checkpoint_is_due(5)
        assert book.checkpoint_is_due(6)
        book.close("stopped")


def test_the_age_of_a_checkpoint_is_told_once_there_is_one(run):
    def told(book):
        book.write_status("running", book._record())
        return run.read_status()["checkpoint_age_seconds"]

    with Progress(limits=run.config.run) as progress:
        book = Bookkeeper(run.config, run, progress, launch=run.begin_launch())
        assert told(book) is None
        arrays = {"weights": {"w": np.zeros(2, np.float32)}}
        book.write_checkpoint(arrays, {"learner_steps": 5, "weights_version": 1})
        assert told(book) >= 0
        book.close("stopped")
        book = Bookkeeper(run.config, run, progress, launch=run.begin_launch())
        assert told(book) >= 0
        book.close("stopped")


def test_what_is_evaluated_for_long_can_still_be_the_best(run):
    with Progress(limits=run.config.run) as progress:
        config = make_config(SMALL, {"learner": {"keep_checkpoints": 1}})
        book = Bookkeeper(config, run, progress)
        arrays = {"weights": {"w": np.zeros(2, np.float32)}}
        path = book.write_checkpoint(arrays, {"learner_steps": 10, "weights_version": 1})
        book.begin_evaluation(10)
        for step in (20, 30, 40):
            book.write_checkpoint(arrays, {"learner_steps": step, "weights_version": 1})
        assert sorted(run.checkpoints.glob("step_*")) == [path, run.checkpoints / "step_00000040"]
        book.add_evaluation(
            {"mean_return": 1.0, "std_return": 0.0, "returns": [1.0], "episodes": 1}, path, 10
        )
        book.close("stopped")
    assert checkpoint.best_checkpoint(run.checkpoints).step == 10


def test_a_damaged_mark_of_the_best_is_set_again_by_the_evaluations(run):
    launch(run, 40)
    best = checkpoint.best_checkpoint(run.checkpoints)
    (run.checkpoints / "best.json").write_text("{")
    with Progress(limits=run.config.run) as progress:
        Bookkeeper(run.config, run, progress, launch=run.begin_launch()).close("stopped")
    assert checkpoint.best_checkpoint(run.checkpoints) == best


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("network", "embedding_size", 9), ("environment", "id", "CartPole-v1")],
)
def test_what_weights_and_episodes_depend_on_can_not_change(run, section, key, value):
    changed = make_config(run.config.model_dump(), {section: {key: value}})
    with pytest.raises(RunError, match=rf"{section}.{key} of run 'r' is .* can't become {value!r}"):
        run.with_config(changed)
    assert open_run(run.path).config == run.config


def test_a_run_goes_on_in_one_process_at_a_time(run):
    with run.locked(), pytest.raises(RunError, match="going on in another process"), run.locked():
        pass
    with run.locked():
        pass


def test_reanalyse_and_priorities_in_one_process(tmp_path):
    config = make_config(
        SMALL,
        {"replay": {"min_size_to_sample": 50, "priority_exponent": 0.6}, "reanalyse": {"ratio": 0.5}},
    )
    folder = create_run(tmp_path, "r", config)
    book, _ = launch(folder, 60)
    state = book.state
    longest = max(item.num_steps for item in list_all_held(folder.replay))
    assert 0 < state.refreshed <= state.env_steps + longest
    assert lines(folder)[-1]["reanalyse/positions"] == state.refreshed
