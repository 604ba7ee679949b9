"""Which checkpoint a command takes, and what it says where there is none like it."""

from __future__ import annotations

import numpy as np
import pytest

from distributed_muzero.checkpoint import mark_best, write_checkpoint
from distributed_muzero.cli.checkpoints import load_checkpoint
from distributed_muzero.config import make_config
from distributed_muzero.errors import CheckpointError
from distributed_muzero.run_folder import RunFolder

STEPS = (10, 200, 3000)


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "r", make_config({}))
    for step in STEPS:
        save(folder, step)
    return folder


def save(folder, step):
    write_checkpoint(
        folder.checkpoints, step, {"weights": {"w": np.full(2, step)}}, {"weights_version": step}
    )


@pytest.mark.parametrize(
    ("which", "step"), [("latest", 3000), ("10", 10), ("200", 200), ("step_00000200", 200), ("0200", 200)]
)
def test_a_checkpoint_by_its_name(folder, which, step):
    saved = load_checkpoint(folder, which)
    assert saved.step == step and saved.tensors["weights"]["w"].tolist() == [step, step]


def test_best_is_what_was_evaluated_best_else_the_latest(folder):
    assert load_checkpoint(folder, "best").step == 3000
    mark_best(folder.checkpoints, 200, 1.0)
    assert load_checkpoint(folder, "best").step == 200
    assert load_checkpoint(folder, "latest").step == 3000


def test_while_a_checkpoint_is_replaced_its_predecessor_is_taken(folder):
    path = folder.checkpoints / "step_00000200"
    path.rename(path.with_name("step_00000200.replaced"))
    assert load_checkpoint(folder, "200").step == 200
    save(folder, 200)
    assert load_checkpoint(folder, "200").path.name == "step_00000200"


@pytest.mark.parametrize(
    ("which", "problem"),
    [
        ("201", "run r has no checkpoint of step 201"),
        ("bets", "--checkpoint 'bets': expected best, latest or a learner step"),
        ("-1", "--checkpoint '-1': expected best"),
        ("", "--checkpoint '': expected best"),
    ],
)
def test_an_error_names_what_there_is(folder, which, problem):
    with pytest.raises(CheckpointError, match=problem) as caught:
        load_checkpoint(folder, which)
    assert "There are best, latest and the steps 10, 200, 3000" in str(caught.value)


def test_many_steps_are_named_by_the_first_and_the_last_ones(folder):
    for step in range(4000, 4030):
        save(folder, step)
    with pytest.raises(CheckpointError, match=r"steps 10, 200, …, 4021, .*, 4029$"):
        load_checkpoint(folder, "7")


@pytest.mark.parametrize("which", ["best", "latest", "10", "bets"])
def test_a_run_without_checkpoints_says_so(tmp_path, which):
    folder = RunFolder(tmp_path / "r", make_config({}))
    with pytest.raises(CheckpointError, match=r"run r has no checkpoint yet in .*; train it for longer"):
        load_checkpoint(folder, which)


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(folder):
    weights = folder.checkpoints / "step_00000200" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"weights.safetensors has changed \(sha256 differs\)"):
        load_checkpoint(folder, "200")
