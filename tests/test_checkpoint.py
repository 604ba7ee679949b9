import hashlib
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
from distributed_muzero.errors import CheckpointError, CheckpointFormatError

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


def as_format(version, path):
    """Makes of a checkpoint a whole one of another format."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    data = json.dumps({**manifest, "format_version": version}).encode()
    (path / "manifest.json").write_bytes(data)
    (path / "DONE").write_text(hashlib.sha256(data).hexdigest())
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_newer_format_is_refused_although_an_older_checkpoint_is_good(tmp_path, caplog):
    _, good, newer = write(tmp_path, 1, 2, 3)
    as_format(3, newer)
    mark_best(tmp_path, 2, 1.0)
    assert best_or_latest(tmp_path).path == good
    with pytest.raises(CheckpointFormatError, match=r"step_00000003 has format 3, .* reads 1 and 2;"):
        latest_checkpoint(tmp_path)
    (tmp_path / "best.json").unlink()
    with pytest.raises(CheckpointFormatError, match="has format 3"):
        best_or_latest(tmp_path)
    assert warnings_of(caplog) == []


def test_a_best_of_a_newer_format_is_refused(tmp_path):
    first, _ = write(tmp_path, 1, 2)
    mark_best(tmp_path, 1, 1.0)
    as_format(3, first)
    for read in (best_checkpoint, best_or_latest):
        with pytest.raises(CheckpointFormatError, match="step_00000001 has format 3"):
            read(tmp_path)


def test_a_newer_format_is_neither_pruned_nor_replaced(tmp_path):
    first, newer, *others = write(tmp_path, 1, 2, 3, 4)
    content = as_format(3, newer)
    with pytest.raises(CheckpointFormatError, match="step_00000002 has format 3"):
        write(tmp_path, 2)
    assert prune_checkpoints(tmp_path, keep=1) == [others[0], first]
    assert names(tmp_path) == [newer.name, others[1].name]
    assert {file.name: file.read_bytes() for file in newer.iterdir()} == content


def test_a_newer_format_that_was_set_aside_is_not_replaced(tmp_path):
    (newer,) = write(tmp_path, 1)
    as_format(3, newer)
    newer.rename(tmp_path / "step_00000001.replaced")
    with pytest.raises(CheckpointFormatError, match=r"step_00000001\.replaced has format 3"):
        write(tmp_path, 1)
    assert names(tmp_path) == ["step_00000001.replaced"]


def test_newer_formats_do_not_push_ours_out(tmp_path):
    *ours, newer = write(tmp_path, 1, 2, 3)
    as_format(3, newer)
    assert prune_checkpoints(tmp_path, keep=2) == []
    assert prune_checkpoints(tmp_path, keep=1) == [ours[0]]


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
    assert best_checkpoint(tmp_path)[:2] == (1, 450.5)
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


def test_no_changed_bit_or_cut_of_best_is_believed(tmp_path, caplog):
    paths = write(tmp_path, 1, 2)
    mark_best(tmp_path, 1, 450.5)
    file = tmp_path / "best.json"
    data = file.read_bytes()
    flips = [
        data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        for at in range(len(data))
        for bit in range(8)
    ]
    cuts = [data[:at] for at in range(len(data))]
    for damage in flips + cuts:
        file.write_bytes(damage)
        assert best_checkpoint(tmp_path) is None, damage
        (warning,) = warnings_of(caplog)
        assert "going on as if none was marked" in warning and "best.json" in warning
        caplog.clear()
    assert best_or_latest(tmp_path).path == paths[1]
    file.write_bytes(data)
    assert best_or_latest(tmp_path).path == paths[0]


def test_a_best_of_the_format_before_is_read(tmp_path):
    paths = write(tmp_path, 1, 2)
    (tmp_path / "best.json").write_text('{"step": 1, "mean_return": 450.5}')
    assert best_checkpoint(tmp_path) == Best(1, 450.5)
    assert best_or_latest(tmp_path).path == paths[0]
    assert prune_checkpoints(tmp_path, keep=1) == []


def test_an_unreadable_best_stops_pruning_until_another_is_marked(tmp_path, caplog):
    paths = write(tmp_path, 1, 2, 3)
    for content in ("{", "[1]", "7", '{"step": 1}', '{"step": 1, "mean_return": 2.0, "sha256": "00"}'):
        (tmp_path / "best.json").write_text(content)
        assert best_checkpoint(tmp_path) is None
        assert prune_checkpoints(tmp_path, keep=1) == []
    assert len(warnings_of(caplog)) == 10 and all("best.json" in warning for warning in warnings_of(caplog))
    mark_best(tmp_path, 2, 1.0)
    assert prune_checkpoints(tmp_path, keep=1) == [paths[0]]


def test_a_best_whose_weights_were_written_anew_or_are_gone_is_not_believed(tmp_path, caplog):
    paths = write(tmp_path, 1, 2)
    mark_best(tmp_path, 1, 450.5)
    write_checkpoint(tmp_path, 1, tensors(1), {"env_steps": 9})
    assert best_checkpoint(tmp_path)[:2] == (1, 450.5) and warnings_of(caplog) == []
    write_checkpoint(tmp_path, 1, tensors(99), {})
    assert best_checkpoint(tmp_path) is None and "other weights" in warnings_of(caplog)[0]
    assert best_or_latest(tmp_path).path == paths[1]
    shutil.rmtree(paths[0])
    assert best_checkpoint(tmp_path) is None and "no checkpoint" in warnings_of(caplog)[-1]


def test_a_corrupt_checkpoint_does_not_push_an_intact_one_out(tmp_path):
    # A run fell back from a corrupt step 5 to step 1, and has reached step 2 since.
    paths = write(tmp_path, 1, 5, 2)
    damaged(paths[1], np.random.default_rng(3))
    assert prune_checkpoints(tmp_path, keep=1) == [paths[0]]
    assert latest_checkpoint(tmp_path).path == paths[2]


@pytest.fixture
def hashed(monkeypatch):
    """The folders whose files are read in order to hash them."""
    found = []
    real = checkpoints._check
    monkeypatch.setattr(checkpoints, "_verified", {})
    monkeypatch.setattr(
        checkpoints, "_check", lambda path, entry: found.append(path.parent.name) or real(path, entry)
    )
    return found


def test_what_this_process_wrote_is_not_hashed_again(tmp_path, hashed):
    for step in range(1, 8):
        write(tmp_path, step)
        prune_checkpoints(tmp_path, keep=3)
    write(tmp_path, 7)
    assert hashed == [] and len(names(tmp_path)) == 3
    assert sorted(path.name for path in checkpoints._verified) == names(tmp_path)


def test_what_others_wrote_is_hashed_once(tmp_path, hashed):
    write(tmp_path, 1, 2, 3)
    checkpoints._verified.clear()
    latest_checkpoint(tmp_path)
    for _ in range(2):
        assert prune_checkpoints(tmp_path, keep=3) == []
        assert sorted(set(hashed)) == ["step_00000001", "step_00000002"] and len(hashed) == 2 * 3


def test_what_has_changed_since_is_hashed_again_and_does_not_count(tmp_path, hashed):
    paths = write(tmp_path, 1, 2, 3)
    file = paths[2] / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    os.utime(file, ns=(0, 0))
    assert prune_checkpoints(tmp_path, keep=2) == [] and set(hashed) == {"step_00000003"}


def test_damage_that_a_reader_met_is_not_forgotten(tmp_path, hashed):
    paths = write(tmp_path, 1, 2)
    file = paths[1] / "weights.safetensors"
    stat, data = file.stat(), file.read_bytes()
    with file.open("r+b") as opened:
        opened.write(bytes([data[0] ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if the disk had done it
    assert latest_checkpoint(tmp_path).path == paths[0]
    assert prune_checkpoints(tmp_path, keep=1) == [] and hashed == ["step_00000002"]


def test_every_damage_is_found_by_the_check_in_chunks(tmp_path, monkeypatch):
    (path,) = write(tmp_path, 1)
    rng = np.random.default_rng(7)
    for _ in range(100):
        undo = damaged(path, rng)
        monkeypatch.setattr(checkpoints, "_verified", {})
        assert not checkpoints._is_intact(path)
        undo()
    assert checkpoints._is_intact(path)


def test_what_the_disk_does_not_let_go_stays_with_a_warning(tmp_path, monkeypatch, caplog):
    paths = write(tmp_path, 1, 2, 3)
    real = Path.rename

    def rename(path, target):
        if path.name == "step_00000001":
            raise OSError(16, "Device or resource busy")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert prune_checkpoints(tmp_path, keep=1) == [paths[1]]
    (warning,) = warnings_of(caplog)
    assert "step_00000001 stays" in warning and "busy" in warning
    assert read_checkpoint(paths[0]).step == 1


def test_a_busy_leftover_is_in_nobodys_way_and_goes_later(tmp_path, monkeypatch, caplog):
    paths = write(tmp_path, 1, 2)

    def rmtree(path, ignore_errors=False):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpoints.shutil, "rmtree", rmtree)
    assert prune_checkpoints(tmp_path, keep=1) == [paths[0]]
    write(tmp_path, 3)
    leftover = ".leftover-removing-step_00000001"
    assert names(tmp_path) == [leftover, "step_00000002", "step_00000003"]
    assert [leftover in warning and "busy" in warning for warning in warnings_of(caplog)] == [True, True]
    monkeypatch.undo()
    write(tmp_path, 4)
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]


def test_the_best_is_found_while_its_step_is_being_replaced(tmp_path, caplog):
    path = write(tmp_path, 1)[0]
    mark_best(tmp_path, 1, 9.0)
    kept = tmp_path / "step_00000001.replaced"
    shutil.copytree(path, kept)
    (path / "manifest.json").write_text("{}")  # half of the new one has arrived
    assert best_checkpoint(tmp_path).step == 1
    assert best_or_latest(tmp_path).path == kept and warnings_of(caplog) == []
    (kept / "DONE").unlink()
    assert best_checkpoint(tmp_path) is None
    assert "best checkpoint can't be used" in warnings_of(caplog)[0]
