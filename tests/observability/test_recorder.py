import json
import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distributed_muzero.config import Config
from distributed_muzero.observability.recorder import Recorder
from distributed_muzero.run_folder import create_run


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path, "run", Config())


def lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} isn't JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def scalars(run, tag):
    accumulator = EventAccumulator(str(run.tensorboard))
    accumulator.Reload()
    return [(event.step, pytest.approx(event.value)) for event in accumulator.Scalars(tag)]


def test_each_record_is_one_line_over_environment_steps(run):
    with Recorder(run, wall_clock=lambda: 5.0) as recorder:
        recorder.record({"train/loss": 0.5, "rollout/episodes": 3}, env_steps=64)
        assert lines(run.metrics_file) == [
            {"env_steps": 64, "wall_time": 5.0, "train/loss": 0.5, "rollout/episodes": 3.0}
        ]  # before it is closed
        recorder.record({"train/loss": np.float32(0.25)}, env_steps=128)
    assert lines(run.metrics_file)[1] == {"env_steps": 128, "wall_time": 5.0, "train/loss": 0.25}


def test_tensorboard_shows_the_scalars_over_environment_steps(run):
    with Recorder(run) as recorder:
        recorder.record({"train/value_loss": 0.5, "rollout/ep_rew_mean": 21.5}, env_steps=64)
        recorder.record({"train/value_loss": 0.25}, env_steps=128)
        recorder.record_evaluation({"mean_return": 475.0, "std_return": 2.0, "returns": [473.0, 477.0]})
    assert scalars(run, "train/value_loss") == [(64, 0.5), (128, 0.25)]
    assert scalars(run, "rollout/ep_rew_mean") == [(64, 21.5)]
    assert scalars(run, "eval/mean_return") == [(128, 475.0)]


def test_tensorboard_is_up_to_date_before_the_run_ends(run):
    with Recorder(run) as recorder:
        recorder.record({"train/loss": 0.5}, env_steps=64)
        assert scalars(run, "train/loss") == [(64, 0.5)]


def test_numbers_that_are_not_finite_become_null(run):
    with Recorder(run) as recorder:
        recorder.record({"train/loss": float("nan"), "train/grad_norm": np.float32("inf")}, env_steps=1)
        recorder.record_evaluation(
            {"mean_return": float("nan"), "std_return": 0.0, "returns": [float("-inf"), 1]}
        )
    (metrics,) = lines(run.metrics_file)
    (evaluation,) = lines(run.evaluations_file)
    assert metrics["train/loss"] is None and metrics["train/grad_norm"] is None
    assert evaluation["mean_return"] is None and evaluation["returns"] == [None, 1]


def test_an_evaluation_keeps_all_it_says_and_its_own_steps(run):
    with Recorder(run, wall_clock=lambda: 9.0) as recorder:
        evaluation = {
            "mean_return": 1.0,
            "std_return": 0.5,
            "returns": np.array([0.5, 1.5]),
            "episodes": np.int64(2),
        }
        recorder.record_evaluation({**evaluation, "env_steps": 77})
    expected = {"mean_return": 1.0, "std_return": 0.5, "returns": [0.5, 1.5], "episodes": 2}
    assert lines(run.evaluations_file) == [{**expected, "env_steps": 77, "wall_time": 9.0}]
    assert scalars(run, "eval/std_return") == [(77, 0.5)]


def test_an_evaluation_of_two_players_has_score_and_rating(run):
    with Recorder(run) as recorder:
        recorder.record_evaluation(
            {
                "mean_return": 0.5,
                "std_return": 0.5,
                "score": 0.75,
                "elo": 321.5,
                "opponent": "random",
                "wins": 3,
            }
        )
    assert scalars(run, "eval/score") == [(0, 0.75)]
    assert scalars(run, "eval/elo") == [(0, 321.5)]


def test_an_unknown_name_is_an_error_and_writes_nothing(run):
    with Recorder(run) as recorder, pytest.raises(ValueError, match="train/los"):
        recorder.record({"train/loss": 1.0, "train/los": 1.0}, env_steps=1)
    assert lines(run.metrics_file) == []


def test_a_resumed_run_goes_on_after_the_last_whole_line(run):
    with Recorder(run) as recorder:
        recorder.record({"train/loss": 1.0}, env_steps=1)
    with run.metrics_file.open("a") as file:
        file.write('{"env_steps": 2, "train/l')  # a kill in the middle
    with Recorder(run) as recorder:
        recorder.record({"train/loss": 3.0}, env_steps=3)
    assert [line["env_steps"] for line in lines(run.metrics_file)] == [1, 3]
    assert scalars(run, "train/loss") == [(1, 1.0), (3, 3.0)]


def test_closing_twice_is_fine(run):
    recorder = Recorder(run)
    recorder.close()
    recorder.close()


def test_torch_and_tensorflow_are_not_imported():
    code = "import sys, distributed_muzero.observability.recorder as _; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "ray", "tensorflow"} & set(result.stdout.split())
