import numpy as np
import pytest

from distributed_muzero import checkpoint
from distributed_muzero.chaos import kill_points
from distributed_muzero.chaos.kill_points import KILL_POINTS, KillResult, run_kill_points, train
from distributed_muzero.errors import DistributedMuZeroError
from distributed_muzero.workers.learner import Learner

SEED = 4


@pytest.mark.faults
@pytest.mark.slow
def test_a_learner_killed_at_a_named_point_goes_on_bit_for_bit(tmp_path):
    names = ["after_optimizer_step", "inside_state", "half_of_weights_file", "while_pruning"]
    results = run_kill_points(tmp_path, SEED, names, steps=30, checkpoint_every=5)
    assert [result.name for result in results] == names
    for result in results:
        assert result.broken == [], result
        assert result.resumed_from in (5, 10, 15, 20, 25) and result.steps_after == 30 - result.resumed_from
        assert 0 <= result.steps_lost <= 5 and 0 < result.seconds_to_resume < 60, result


def test_a_point_that_is_never_reached_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(kill_points, "_choose_occurrence", lambda *args, **kwargs: 3)
    with pytest.raises(
        DistributedMuZeroError, match=r"before_state, occurrence 3: .*ended with code 0: never"
    ):
        run_kill_points(tmp_path, SEED, ["before_state"], steps=4, checkpoint_every=2)


class Killed(BaseException):
    """Stands for SIGKILL, in this process."""


@pytest.mark.parametrize("name", KILL_POINTS)
@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_every_kill_leaves_a_checkpoint_to_go_on_from_and_steps_to_make(tmp_path, monkeypatch, name, which):
    def die(*_):
        raise Killed

    point = KILL_POINTS[name]
    # So that the armed one goes with the test.
    monkeypatch.setattr(point.owner, point.attribute, getattr(point.owner, point.attribute))
    monkeypatch.setattr(kill_points.os, "kill", die)
    kill_points.arm(point, kill_points.occurrences(name, 10, 2)[which])
    with pytest.raises(Killed):
        train(tmp_path, SEED, 10, 2, lambda step: None)
    assert 0 < checkpoint.latest_checkpoint(tmp_path).step < 10


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_kill_is_drawn_from_the_occurrences_that_tell_something(seed):
    for name in KILL_POINTS:
        assert kill_points._choose_occurrence(name, seed, 60, 10) in kill_points.occurrences(name, 60, 10)


def test_too_few_checkpoints_are_refused():
    with pytest.raises(ValueError, match=r"while_pruning needs a checkpoint before it .* got 4 checkpoints"):
        kill_points.occurrences("while_pruning", 40, 10)
    with pytest.raises(ValueError, match="before_forward"):
        kill_points.occurrences("before_forward", 10, 10)


def test_a_result_that_proves_no_resumption_is_broken():
    good = KillResult("before_done", 1.0, True, True, 3, 2, resumed_from=10, steps_after=50)
    assert good.broken == []
    assert good._replace(resumed_from=0).broken == ["before_done, occurrence 2: it began anew"]
    assert good._replace(steps_after=0).broken == ["before_done, occurrence 2: it made no steps afterwards"]
    assert good._replace(weights_equal=False, optimizer_equal=False).broken == [
        "before_done, occurrence 2: weights differ",
        "before_done, occurrence 2: optimizer differs",
    ]


def test_there_are_at_least_twelve_points_and_all_name_something_real():
    assert len(KILL_POINTS) >= 12
    assert all(callable(getattr(point.owner, point.attribute)) for point in KILL_POINTS.values())


def test_batches_follow_from_seed_and_step_alone():
    one, same = kill_points.make_batch(1, 7), kill_points.make_batch(1, 7)
    assert all((a == b).all() for a, b in zip(one[:-1], same[:-1], strict=True))
    for other in (kill_points.make_batch(1, 8), kill_points.make_batch(2, 7)):
        assert (one.observations != other.observations).any()


def die_at(step):
    def on_step(now):
        if now == step:
            raise Killed

    return on_step


def last_files(folder):
    tensors = checkpoint.latest_checkpoint(folder).tensors
    return {
        file: {name: array.tobytes() for name, array in tensors[file].items()}
        for file in ("weights", "optimizer")
    }


def train_with_a_kill(folder):
    """13 steps in two parts, and the files of the last checkpoint; the second part begins at step 5."""
    with pytest.raises(Killed):
        train(folder, SEED, 13, 5, die_at(7))
    train(folder, SEED, 13, 5, lambda step: None)
    return last_files(folder)


def test_a_resumed_learner_ends_like_the_one_that_was_left_alone(tmp_path):
    train(tmp_path / "whole", SEED, 13, 5, lambda step: None)
    assert train_with_a_kill(tmp_path / "killed") == last_files(tmp_path / "whole")


def forget_generators(arrays):
    return {**arrays, "generators": {}}


def forget_buffers(arrays):
    return {name: file for name, file in arrays.items() if name != "buffers"}


def forget_adam(arrays):
    return {**arrays, "optimizer": {"vector": arrays["optimizer"]["vector"]}}


def restart_from_the_average(arrays):
    average = np.concatenate([array.ravel() for array in arrays["weights"].values()])
    vector = arrays["optimizer"]["vector"].copy()
    vector[:100] = average[:100]
    return {**arrays, "optimizer": {**arrays["optimizer"], "vector": vector}}


@pytest.mark.parametrize("forget", [forget_generators, forget_buffers, forget_adam, restart_from_the_average])
def test_with_a_part_of_the_state_forgotten_the_ends_differ(tmp_path, monkeypatch, forget):
    train(tmp_path / "whole", SEED, 13, 5, lambda step: None)
    real = Learner.restore
    monkeypatch.setattr(
        Learner, "restore", lambda learner, arrays, state: real(learner, forget(arrays), state)
    )
    assert train_with_a_kill(tmp_path / "killed")["weights"] != last_files(tmp_path / "whole")["weights"]
