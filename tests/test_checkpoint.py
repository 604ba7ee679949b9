import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distributed_muzero import checkpoint as checkpoints
from distributed_muzero.checkpoint import (
    Best,
    best_checkpoint,
    best_or_latest,
    latest_checkpoint,
    mark_best,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from distributed_muzero.errors import CheckpointError

GOLDEN = Path(__file__).parent / "fixtures" / "checkpoints"
STATE = {"learner_steps": 7, "rng": {"state": 2**127 + 1}, "ratio": 0.1, "name": "é"}


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "weights": {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": np.arange(5)},
        "optimizer": {
            "step": np.float32(3.0).reshape(()),
            "m": rng.normal(size=7),
            "on": np.array([True, False]),
        },
    }


def assert_same(left, right):
    assert {stem: set(arrays) for stem, arrays in left.items()} == {s: set(a) for s, a in right.items()}
    for stem, arrays in right.items():
        for name, array in arrays.items():
            assert left[stem][name].dtype == array.dtype and left[stem][name].shape == array.shape
            np.testing.assert_array_equal(left[stem][name], array)


def write(folder, *steps):
    return [write_checkpoint(folder, step, tensors(step), {"step": step}) for step in steps]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_was_written_is_read_back_exactly(tmp_path):
    path = write_checkpoint(tmp_path / "checkpoints", 1000, tensors(), STATE)
    assert path == tmp_path / "checkpoints" / "step_00001000"
    assert names(path) == [
        "DONE",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
        "weights.safetensors",
    ]
    read = read_checkpoint(path)
    assert (read.path, read.step, read.state) == (path, 1000, STATE)
    assert_same(read.tensors, tensors())


def test_views_come_back_as_they_looked(tmp_path):
    matrix = np.arange(12.0).reshape(3, 4)
    path = write_checkpoint(tmp_path, 1, {"weights": {"turned": matrix.T, "every_other": matrix[:, ::2]}}, {})
    assert_same(
        read_checkpoint(path).tensors, {"weights": {"turned": matrix.T, "every_other": matrix[:, ::2]}}
    )


def test_nothing_is_pickled_and_torch_is_not_imported():
    code = "import sys, distributed_muzero.checkpoint as _; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "ray"} & set(result.stdout.split())


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
    bad = [
        ({"../weights": {}}, {}),
        ({"weights": {"a": np.array([object()])}}, {}),
        ({}, {"a": object()}),
        ({}, {"loss": float("nan")}),
    ]
    for arrays, state in bad:
        with pytest.raises(CheckpointError):
            write_checkpoint(tmp_path, 1, arrays, state)
    assert names(tmp_path) == []


def damaged(path, rng):
    """Changes one random bit, or cuts one random file short; returns what undoes it."""
    file = path / rng.choice(names(path))
    data = file.read_bytes()
    position = int(rng.integers(len(data)))
    if rng.random() < 0.7:
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
    else:
        file.write_bytes(data[:position])
    return lambda: file.write_bytes(data)


def test_200_bit_flips_and_truncations_are_never_loaded(tmp_path):
    path = write_checkpoint(tmp_path, 1, tensors(), STATE)
    rng = np.random.default_rng(1)
    for _ in range(200):
        undo = damaged(path, rng)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
        undo()
    assert_same(read_checkpoint(path).tensors, tensors())


def test_every_missing_file_is_noticed(tmp_path):
    (path,) = write(tmp_path, 1)
    for name in names(path):
        data = (path / name).read_bytes()
        (path / name).unlink()
        with pytest.raises(CheckpointError, match="incomplete" if name == "DONE" else f"{name} is missing"):
            read_checkpoint(path)
        (path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read_checkpoint(tmp_path / "step_00000002")


def test_a_file_from_another_checkpoint_is_noticed(tmp_path):
    first, second = write(tmp_path, 1, 2)
    shutil.copy(first / "weights.safetensors", second / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors has changed"):
        read_checkpoint(second)


@pytest.mark.parametrize("version", [0, 3, 7])
def test_another_format_is_refused_naming_both_versions(tmp_path, monkeypatch, version):
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", version)
    (path,) = write(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=rf"has format {version}, .* reads 1 and 2;"):
        read_checkpoint(path)


def test_the_last_two_formats_are_read():
    one, two = (read_checkpoint(GOLDEN / f"format_{version}" / "step_00000006") for version in (1, 2))
    assert one.state == {"learner_steps": 6, "weights_version": 1, "env_steps": 360}
    assert two.state == {**one.state, "learner_config": two.state["learner_config"]}
    assert set(one.tensors) == {"weights", "optimizer"}
    assert set(two.tensors) == {"weights", "optimizer", "generators"}
    for read, version in ((one, 1), (two, 2)):
        manifest = json.loads((read.path / "manifest.json").read_text())
        assert manifest["format_version"] == version and read.step == 6
        assert read.tensors["weights"]["representation_layers.0.weight"].shape == (4, 10)
        assert read.tensors["optimizer"]["step"] == 6


def test_latest_is_the_newest_and_none_before_the_first(tmp_path, caplog):
    assert latest_checkpoint(tmp_path / "nowhere") is None and latest_checkpoint(tmp_path) is None
    write(tmp_path, 2, 10, 9)
    assert latest_checkpoint(tmp_path).path == tmp_path / "step_00000010"
    write(tmp_path, 100_000_000)
    assert latest_checkpoint(tmp_path).path == tmp_path / "step_100000000"
    assert warnings_of(caplog) == []


def test_latest_falls_back_and_says_what_it_skipped(tmp_path, caplog):
    paths = write(tmp_path, 1, 2, 3)
    damaged(paths[2], np.random.default_rng(2))
    (paths[1] / "DONE").unlink()
    assert latest_checkpoint(tmp_path).path == paths[0]
    skipped = warnings_of(caplog)
    assert len(skipped) == 2 and "step_00000003" in skipped[0] and "step_00000002" in skipped[1]
    assert "fell back to step 1" in skipped[0] and "incomplete" in skipped[1]


def test_without_an_intact_one_every_reason_is_given(tmp_path):
    for path in write(tmp_path, 1, 2):
        (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)no intact checkpoint.*step_00000002.*step_00000001"):
        latest_checkpoint(tmp_path)


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test catches it."""


class Disk:
    """Lets a number of the disk's operations through, then kills, or refuses as a full disk does."""

    def __init__(self, monkeypatch, end):
        self.left = None
        for owner, name in [
            (os, "fsync"),
            (os, "replace"),
            (os, "rename"),
            (checkpoints, "write_synced"),
            (checkpoints.shutil, "rmtree"),
        ]:
            real = getattr(owner, name)
            monkeypatch.setattr(
                owner, name, lambda *args, real=real, **kw: self.count(end) or real(*args, **kw)
            )

    def count(self, end):
        if self.left == 0 and isinstance(end, Killed):
            raise end
        if self.left == 0:
            self.left = None  # the clean-up frees space
            raise end
        if self.left is not None:
            self.left -= 1


@pytest.mark.parametrize("end", [Killed(), OSError(28, "No space left on device")], ids=["kill", "full disk"])
@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step again"])
def test_an_end_at_any_moment_of_writing_leaves_a_loadable_checkpoint(tmp_path, monkeypatch, end, step):
    disk = Disk(monkeypatch, end)
    for moment in range(100):
        folder = tmp_path / str(moment)
        disk.left = None
        write(folder, 1)
        disk.left = moment
        try:
            write_checkpoint(folder, step, tensors(99), {"step": 99})
        except (Killed, CheckpointError) as error:
            assert isinstance(error, Killed) or "No space left" in str(error)
        else:
            break
        disk.left = None
        read = latest_checkpoint(folder)
        assert read.state["step"] in (1, 99)
        assert_same(read.tensors, tensors(read.state["step"]))
        again = write_checkpoint(
            folder, step, tensors(5), {"step": 5}
        )  # what was left behind is in nobody's way
        assert latest_checkpoint(folder).path == again and read_checkpoint(again).state == {"step": 5}
        assert names(folder) == sorted({"step_00000001", again.name})
    assert moment > 10


@pytest.mark.parametrize("end", [Killed(), OSError(28, "No space left on device")], ids=["kill", "full disk"])
def test_an_end_at_any_moment_of_writing_the_first_one_leaves_a_whole_one_or_none(tmp_path, monkeypatch, end):
    disk = Disk(monkeypatch, end)
    found = []
    for moment in range(100):
        folder = tmp_path / str(moment)
        disk.left = moment
        try:
            write(folder, 1)
        except (Killed, CheckpointError):
            disk.left = None
            found.append(latest_checkpoint(folder))
        else:
            break
    assert found[0] is None and all(read is None or read.state == {"step": 1} for read in found)
    assert moment > 10


def test_partial_folders_are_skipped_whatever_they_hold(tmp_path):
    good, whole = write(tmp_path / "a", 1, 2)
    files = ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    for count in range(len(files) + 1):
        partial = tmp_path / "a" / "step_00000003"
        partial.mkdir()
        for name in files[:count]:
            shutil.copy(whole / name, partial)
        assert latest_checkpoint(tmp_path / "a").path == whole
        shutil.rmtree(partial)
    assert good.exists()


def test_only_the_last_few_are_kept(tmp_path):
    paths = write(tmp_path, 1, 2, 3, 4, 5)
    assert sorted(prune_checkpoints(tmp_path, keep=2)) == paths[:3]
    assert names(tmp_path) == ["step_00000004", "step_00000005"]
    assert prune_checkpoints(tmp_path, keep=2) == []
    with pytest.raises(ValueError, match="at least 1"):
        prune_checkpoints(tmp_path, keep=0)


def test_the_best_is_spared_and_can_change(tmp_path):
    write(tmp_path, 1, 2, 3, 4)
    assert best_checkpoint(tmp_path) is None
    mark_best(tmp_path, 2, 1.0)
    mark_best(tmp_path, 1, 450.5)
    prune_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["best.json", "step_00000001", "step_00000004"]
    assert best_checkpoint(tmp_path) == Best(1, 450.5)
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 1, "mean_return": 450.5}
    mark_best(tmp_path, 4, 500.0)
    prune_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["best.json", "step_00000004"]


def test_best_or_latest_falls_back_and_says_so(tmp_path, caplog):
    assert best_or_latest(tmp_path) is None
    paths = write(tmp_path, 1, 2)
    assert best_or_latest(tmp_path).path == paths[1]
    mark_best(tmp_path, 1, 9.0)
    assert best_or_latest(tmp_path).path == paths[0] and warnings_of(caplog) == []
    damaged(paths[0], np.random.default_rng(4))
    assert best_or_latest(tmp_path).path == paths[1]
    assert "best checkpoint can't be used" in warnings_of(caplog)[0]


def test_only_a_complete_checkpoint_can_be_the_best(tmp_path):
    (path,) = write(tmp_path, 1)
    (path / "DONE").unlink()
    for step in (1, 2):
        with pytest.raises(CheckpointError, match="can't be the best"):
            mark_best(tmp_path, step, 1.0)


def test_an_unreadable_best_stops_pruning(tmp_path, caplog):
    write(tmp_path, 1, 2, 3)
    for content in ("{", "[1]", '{"step": 1}'):
        (tmp_path / "best.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"can't read .*best\.json"):
            best_checkpoint(tmp_path)
        assert prune_checkpoints(tmp_path, keep=1) == []
    assert len(warnings_of(caplog)) == 3


def test_a_corrupt_checkpoint_does_not_push_an_intact_one_out(tmp_path):
    # A run fell back from a corrupt step 5 to step 1, and has reached step 2 since.
    paths = write(tmp_path, 1, 5, 2)
    damaged(paths[1], np.random.default_rng(3))
    assert prune_checkpoints(tmp_path, keep=1) == [paths[0]]
    assert latest_checkpoint(tmp_path).path == paths[2]
