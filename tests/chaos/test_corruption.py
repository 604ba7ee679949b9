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


def test_other_formats_are_refused_and_ours_are_read(tmp_path):
    result = run_other_versions(tmp_path, SEED)
    assert (result.n, result.broken) == (5, [])


def test_a_reader_that_takes_any_format_fails(tmp_path, monkeypatch):
    def read(path):
        return json.loads(checkpoint._read(path / "manifest.json", "missing"))

    monkeypatch.setattr(checkpoint, "_read_manifest", read)
    result = run_other_versions(tmp_path, SEED)
    assert result.broken == ["format 0 was loaded", "format 3 was loaded", "format 99 was loaded"]


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
