"""What runs have recorded, as curves: real files, numbers worked by hand."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from distributed_muzero.config import make_config
from distributed_muzero.errors import RunError
from distributed_muzero.observability.curves import (
    Curve,
    columns_of,
    group_by_seed,
    read_records,
    spread,
    thinned,
)
from distributed_muzero.observability.recorder import Recorder
from distributed_muzero.run_folder import create_run


def record(folder, lines, wall_clock=time.time):
    """One launch.   lines: (seconds of the launch, env steps, learner steps, loss)."""
    with Recorder(folder, wall_clock) as recorder:
        for seconds, env_steps, learner_steps, loss in lines:
            metrics = {"time/seconds": seconds, "train/learner_steps": learner_steps}
            recorder.record(metrics if loss is None else {**metrics, "train/loss": loss}, env_steps)


def evaluate(folder, mean_return, **counts):
    with Recorder(folder) as recorder:
        recorder.record_evaluation(
            {"mean_return": mean_return, "std_return": 0.0, "returns": [mean_return], **counts}
        )


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path, "run", make_config({}))


def points(curve):
    return list(zip(curve.x.tolist(), curve.y.tolist(), strict=True))


def test_a_metric_over_each_axis(run):
    record(run, [(60, 100, 0, None), (120, 200, 10, 2.0), (180, 300, 20, 1.0)])
    records = read_records(run)
    assert points(records.curve("train/loss", "env_steps")) == [(200, 2.0), (300, 1.0)]
    assert points(records.curve("train/loss", "minutes")) == [(2, 2.0), (3, 1.0)]
    assert points(records.curve("train/loss", "learner_steps")) == [(10, 2.0), (20, 1.0)]
    assert len(records.curve("replay/age", "env_steps").x) == 0
    assert records.names == ["time/seconds", "train/learner_steps", "train/loss"]


def test_minutes_are_played_time_over_all_launches_whatever_the_wall_clock_says(run):
    backwards = iter(range(10**6, 0, -1000)).__next__
    record(run, [(60, 100, 1, 5.0), (120, 200, 2, 4.0)], backwards)
    record(run, [(30, 250, 3, 3.0), (90, 350, 4, 2.0)], backwards)
    record(run, [(6, 360, 5, 1.0)], backwards)
    assert points(read_records(run).curve("train/loss", "minutes")) == [
        (1, 5.0), (2, 4.0), (2.5, 3.0), (3.5, 2.0), (3.6, 1.0),
    ]  # fmt: skip


def test_a_launch_that_was_slower_to_begin_than_the_one_before_lived_is_told_by_its_other_counts(run):
    with Recorder(run) as recorder:
        for seconds, simulations, env_steps in ((3, 50, 10), (6, 20, 20), (12, 80, 30)):
            recorder.record({"time/seconds": seconds, "search/simulations": simulations}, env_steps)
    assert read_records(run).curve("search/simulations", "minutes").x == pytest.approx([0.05, 0.15, 0.25])


def test_what_a_launch_went_over_again_counts_as_it_was_later(run):
    record(run, [(1, 100, 10, 9.0), (2, 200, 20, 8.0), (3, 300, 30, 7.0)])
    record(run, [(1, 150, 15, 6.0), (2, 250, 25, 5.0)])  # from a checkpoint before the kill
    records = read_records(run)
    assert points(records.curve("train/loss", "env_steps")) == [(100, 9.0), (150, 6.0), (250, 5.0)]
    assert points(records.curve("train/loss", "learner_steps")) == [(10, 9.0), (15, 6.0), (25, 5.0)]
    assert len(records.curve("train/loss", "minutes").x) == 5


def test_seconds_without_a_step_stay_so_that_rates_are_not_flattered(run):
    with Recorder(run) as recorder:
        for seconds, rate in ((1, 100), (2, 0), (3, 0), (4, 0)):
            recorder.record({"time/seconds": seconds, "rollout/env_steps_per_second": rate}, env_steps=100)
    curve = read_records(run).curve("rollout/env_steps_per_second", "env_steps")
    assert points(curve) == [(100, 100), (100, 0), (100, 0), (100, 0)]
    assert points(thinned(curve, 1)) == [(100, 25)]


def test_evaluations_lie_where_their_weights_and_games_stood(run):
    record(run, [(60, 100, 10, 1.0), (120, 200, 20, 1.0)])
    evaluate(run, 5.0, env_steps=190, learner_steps=18, seconds=114.0)
    record(run, [(60, 300, 30, 1.0), (120, 400, 40, 1.0)])
    evaluate(run, 7.0, env_steps=290, learner_steps=28, seconds=54.0)
    records = read_records(run)
    assert points(records.curve("eval/mean_return", "env_steps")) == [(190, 5.0), (290, 7.0)]
    assert points(records.curve("eval/mean_return", "learner_steps")) == [(18, 5.0), (28, 7.0)]
    minutes = records.curve("eval/mean_return", "minutes")
    assert minutes.x == pytest.approx([1.9, 2.9]) and minutes.y.tolist() == [5.0, 7.0]


def test_anything_that_an_evaluation_measured_has_a_name(run):
    record(run, [(1, 100, 10, 1.0)])
    evaluate(run, 5.0, env_steps=100, learner_steps=10, seconds=1.0, elo=1250.0)
    records = read_records(run)
    assert {"eval/elo", "eval/mean_return", "eval/std_return"} <= set(records.names)
    assert "eval/learner_steps" not in records.names
    assert points(records.curve("eval/elo", "env_steps")) == [(100, 1250.0)]


def test_numbers_that_are_missing_or_null_or_in_a_broken_line_are_left_out(run):
    record(run, [(1, 100, 1, None), (2, 200, 2, float("nan")), (3, 300, 3, 0.5)])
    with run.metrics_file.open("a") as file:
        file.write('[1]\n{"env_steps": 400, "train/lo')
    assert points(read_records(run).curve("train/loss", "env_steps")) == [(300, 0.5)]


def test_columns_are_as_long_as_there_are_lines():
    columns = columns_of([{"a": 1}, {"b": 2.5, "c": "text"}, {"a": 3}])
    assert {name: json.dumps(column.tolist()) for name, column in columns.items()} == {
        "a": "[1.0, NaN, 3.0]",
        "b": "[NaN, 2.5, NaN]",
    }


def test_a_run_without_a_line_says_so(run):
    with pytest.raises(RunError, match=r"run 'run' has recorded nothing yet in .*metrics\.jsonl"):
        read_records(run)
    run.metrics_file.mkdir()
    with pytest.raises(RunError, match=r"can't read .*metrics\.jsonl"):
        read_records(run)


def test_runs_are_one_group_if_they_differ_in_seed_and_port_alone(tmp_path):
    def made(name, *layers):
        folder = create_run(tmp_path, name, make_config(*layers))
        record(folder, [(1, 1, 1, 1.0)])
        return read_records(folder)

    other = {"learner": {"batch_size": 64}}
    runs = [
        made("pole-1", {"run": {"seed": 1}}),
        made("other", other),
        made("pole-2", {"run": {"seed": 2}, "metrics": {"port": 9000}}),
        made("again", other),
        made("short", {"run": {"max_env_steps": 100}}),
    ]
    groups = group_by_seed(runs)
    assert [[one.name for one in group.records] for group in groups] == [
        ["pole-1", "pole-2"], ["other", "again"], ["short"],
    ]  # fmt: skip
    assert [group.label for group in groups] == [
        "pole (2 seeds, mean ± std)", "other, again (2 runs, mean ± std)", "short",
    ]  # fmt: skip


def test_mean_and_deviation_by_hand():
    """At x = 1 … 3 the first is 2x and the second constant 2: mean x + 1, deviation √2·|x − 1|."""
    first = Curve(np.array([0.0, 4.0]), np.array([0.0, 8.0]))
    second = Curve(np.array([1.0, 3.0]), np.array([2.0, 2.0]))
    together = spread([first, second])
    assert together is not None and (together.x[0], together.x[-1]) == (1, 3)
    assert together.mean == pytest.approx(together.x + 1)
    assert together.std == pytest.approx(np.sqrt(2) * (together.x - 1))


def test_there_is_no_mean_of_one_curve_or_of_stretches_apart():
    first = Curve(np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    assert spread([]) is None and spread([first]) is None
    assert spread([first, Curve(np.array([2.0, 3.0]), np.array([0.0, 1.0]))]) is None


def test_a_long_curve_becomes_means_of_neighbours():
    curve = Curve(np.arange(5.0), np.array([1.0, 3.0, 5.0, 7.0, 12.0]))
    assert points(thinned(curve, 5)) == points(curve)
    assert points(thinned(curve, 2)) == [(0.5, 2.0), (3.0, 8.0)]
