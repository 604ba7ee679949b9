import contextlib
import json
import shutil

from distributed_muzero import checkpoint
from distributed_muzero.chaos.corruption import (
    check_disk_full,
    run_corruptions,
    run_disk_full,
    run_other_versions,
)
from distributed_muzero.errors import CheckpointError, CheckpointFormatError

SEED = 11


def test_every_damage_is_noticed_and_the_older_checkpoint_comes_with_a_warning(tmp_path):
    result = run_corruptions(tmp_path, SEED, n_flips=60, n_truncations=20)
    assert result.n == result.fell_back == 80 and result.broken == 0


def test_without_checksums_the_campaign_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_sha256", lambda data: "0" * 64)
    result = run_corruptions(tmp_path, SEED, n_flips=60, n_truncations=20)
    assert result.loaded_silently > 10 and result.broken >= result.loaded_silently


def test_without_warnings_the_campaign_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.logger, "warning", lambda *args: None)
    result = run_corruptions(tmp_path, SEED, n_flips=5, n_truncations=5)
    assert result.fell_back_silently == result.broken == 10


def test_a_reader_that_always_refuses_fails(tmp_path, monkeypatch):
    real = checkpoint.latest_checkpoint

    def read(folder):
        found = real(folder)
        if found.step == 1:
            raise CheckpointError("the newest is damaged")
        return found

    monkeypatch.setattr(checkpoint, "latest_checkpoint", read)
    result = run_corruptions(tmp_path, SEED, n_flips=20, n_truncations=10)
    assert result.refused == result.broken > 20 and result.refused + result.fell_back == 30


def test_a_reader_that_dies_of_a_damaged_best_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "best_checkpoint", checkpoint._read_best)
    result = run_corruptions(tmp_path, SEED, n_flips=80, n_truncations=20)
    assert result.refused == result.broken > 3


def test_a_best_without_a_checksum_fails(tmp_path, monkeypatch):
    def seal(content):
        return json.dumps({"step": content["step"], "mean_return": content["mean_return"]}).encode()

    monkeypatch.setattr(checkpoint, "_seal", seal)
    result = run_corruptions(tmp_path, SEED, n_flips=200, n_truncations=0)
    assert result.loaded_silently == result.broken > 0


def test_other_formats_are_refused_and_ours_are_read(tmp_path):
    result = run_other_versions(tmp_path, SEED)
    assert (result.n, result.broken) == (5, [])


def test_a_reader_that_takes_any_format_fails(tmp_path, monkeypatch):
    def read(path):
        return json.loads(checkpoint._read(path / "manifest.json", "missing"))

    monkeypatch.setattr(checkpoint, "_read_manifest", read)
    result = run_other_versions(tmp_path, SEED)
    assert [line for line in result.broken if "loaded" in line] == [
        "format 0 was loaded",
        "format 3 was loaded",
        "format 99 was loaded",
    ]


def test_a_reader_that_skips_a_newer_format_fails(tmp_path, monkeypatch):
    real = checkpoint.read_checkpoint

    def read(path):
        try:
            return real(path)
        except CheckpointFormatError as error:
            raise CheckpointError(str(error)) from error

    monkeypatch.setattr(checkpoint, "read_checkpoint", read)
    result = run_other_versions(tmp_path, SEED)
    assert result.broken == ["format 0 was skipped", "format 3 was skipped", "format 99 was skipped"]


def test_a_writer_that_takes_another_format_for_a_broken_checkpoint_fails(tmp_path, monkeypatch):
    real = checkpoint.write_checkpoint
    monkeypatch.setattr(checkpoint, "_format_error", lambda path: None)
    result = run_other_versions(tmp_path / "replaced", SEED)
    assert result.broken == [
        f"a write in the place of format {version} wasn't refused" for version in (0, 3, 99)
    ]

    def write(folder, step, *content):
        if (folder / f"step_{step:08d}").exists():
            raise CheckpointFormatError("it is there")
        return real(folder, step, *content)

    monkeypatch.setattr(checkpoint, "write_checkpoint", write)
    result = run_other_versions(tmp_path / "pruned", SEED)
    assert result.broken == [f"format {version} was removed" for version in (0, 3, 99)]


def test_a_full_disk_is_told_and_the_previous_checkpoint_loads(tmp_path):
    result = run_disk_full(tmp_path, SEED, n=12)
    assert result == (12, 12, 12, True) and result.broken == 0


def test_a_writer_that_hides_a_full_disk_fails(tmp_path, monkeypatch):
    real = checkpoint.write_synced

    def write(path, data):
        with contextlib.suppress(OSError):
            real(path, data)

    monkeypatch.setattr(checkpoint, "write_synced", write)
    result = check_disk_full(tmp_path, SEED, n=6)
    assert result == (6, 0, 6, True) and result.broken == 6


def test_a_writer_that_makes_room_before_it_writes_fails(tmp_path, monkeypatch):
    real = checkpoint.write_checkpoint

    def write(folder, step, *content):
        shutil.rmtree(folder / "step_00000001", ignore_errors=True)
        return real(folder, step, *content)

    monkeypatch.setattr(checkpoint, "write_checkpoint", write)
    result = check_disk_full(tmp_path, SEED, n=6)
    assert result == (6, 6, 0, True) and result.broken == 6
