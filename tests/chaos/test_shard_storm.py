import os

import pytest

from distributed_muzero.chaos import bad_disk
from distributed_muzero.chaos.bad_disk import BadDisk, cut_to_synced, record_syncs
from distributed_muzero.chaos.shard_process import taken_out
from distributed_muzero.chaos.shard_storm import run_storm
from distributed_muzero.chaos.storm_watch import MAX_OPENED, LimiterWatch, ResourceWatch
from distributed_muzero.replay import log_format
from distributed_muzero.replay.log import ReplayLog
from distributed_muzero.replay.store import EpisodeStore
from distributed_muzero.workers.replay_shard import ReplayShard


def assert_good(result):
    assert (result.wrong, result.limiter_violations) == (0, 0), result
    assert result.lost == result.duplicates == result.crashes == result.failures == result.leaked == 0
    assert result.acknowledged > 50 and len(result.recovery_seconds) == result.kills


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kill", "power_cut"])
def test_a_shard_in_a_storm_loses_nothing_and_repeats_nothing(tmp_path, mode):
    result = run_storm(tmp_path, seed=1, num_kills=3, mode=mode)
    assert_good(result)
    assert result.kills == 3 and result.lost_replies > 0 and max(result.recovery_seconds) < 10


@pytest.mark.faults
@pytest.mark.slow
def test_a_shard_on_a_bad_disk_loses_and_repeats_and_leaks_nothing(tmp_path):
    result = run_storm(tmp_path, seed=1, num_kills=2, mode="bad_disk")
    assert_good(result)
    assert result.kills == 2 and result.disk_faults > 10


@pytest.mark.faults
@pytest.mark.slow
def test_flipped_bits_are_counted_and_never_come_back_as_episodes(tmp_path):
    result = run_storm(tmp_path, seed=2, num_kills=2, flips_bits=True)
    assert_good(result)
    assert result.damaged > 0 and result.damage_seen > 0


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "without", "what"),
    [
        ("power_cut", "sync", "lost"),
        ("kill", "sync", "lost"),
        ("kill", "dedupe", "duplicates"),
        ("kill", "checksum", "changed"),
        ("bad_disk", "generation", "lost"),
        ("bad_disk", "cut", "duplicates"),
    ],
)
def test_the_storm_breaks_what_has_a_protection_less(tmp_path, mode, without, what):
    assert getattr(run_storm(tmp_path, seed=1, num_kills=2, mode=mode, without=without), what) > 0


def test_protections_come_back():
    knows, checksum = EpisodeStore.knows, log_format.checksum
    finish, cut = ReplayShard.finish, ReplayLog._cut
    for protection in ("dedupe", "checksum", "sync", "generation", "cut", None):
        with taken_out(protection):
            assert (ReplayShard.finish is finish) == (protection != "generation")
            assert (ReplayLog._cut is cut) == (protection != "cut")
            assert (EpisodeStore.knows is knows) == (protection != "dedupe")
            assert (log_format.checksum is checksum) == (protection != "checksum")
    assert EpisodeStore.knows is knows and log_format.checksum is checksum
    assert ReplayShard.finish is finish and ReplayLog._cut is cut


def test_a_power_cut_leaves_what_was_synced(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", os.fsync)
    folder, synced = tmp_path / "shard/episodes", tmp_path / "synced"
    folder.mkdir(parents=True)
    record_syncs(synced, True)
    for number in (1, 2, 3):
        with (folder / f"segment_0000000{number}.log").open("wb") as file:
            file.write(b"12345678")
            file.flush()
            if number < 3:
                os.fsync(file)
            file.write(b"90")
        if number == 1:
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    cut_to_synced(tmp_path / "shard", synced)
    # The second one's name, and the third one's bytes, were never made durable.
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [
        ("segment_00000001.log", b"12345678")
    ]


def limits(balance=0.0, sampled=100, incarnation=1):
    return {
        "incarnation": incarnation,
        "sampled": sampled,
        "balance": balance,
        "error_buffer": 50.0,
        "samples_per_insert": 2.0,
    }


@pytest.mark.parametrize(
    ("answer", "num_violations"),
    [
        (limits(balance=50 + 15 * 2), 0),
        (limits(balance=50 + 15 * 2 + 1), 1),
        (limits(balance=-50), 0),
        (limits(balance=-51), 1),
        (limits(balance=-51, sampled=0), 0),
        (limits(balance=float("nan")), 1),
    ],
)
def test_a_limiter_outside_its_bounds_is_counted(answer, num_violations):
    watch = LimiterWatch(journal_may_be_cut=False)
    watch.see(answer)
    assert watch.num_violations == num_violations


def test_a_restarted_limiter_may_forget_nothing_but_what_a_power_cut_took():
    for cut, sampled, num_violations in [(False, 100, 0), (False, 99, 1), (True, 60, 0), (True, 59, 1)]:
        watch = LimiterWatch(journal_may_be_cut=cut)
        watch.see(limits(sampled=60))
        watch.flushed(60)
        watch.see(limits(sampled=100))
        watch.see(limits(sampled=sampled, incarnation=2))
        assert watch.num_violations == num_violations


def test_what_a_power_cut_made_a_limiter_forget_is_forgiven_until_it_is_back():
    watch = LimiterWatch(journal_may_be_cut=True)
    bound = 50 + 15 * 2
    watch.see(limits(sampled=300))
    # 200 samples are forgotten: the balance may stand 200 above its bound, and come down.
    for balance, num_violations in [(bound + 200, 0), (bound + 120, 0), (bound + 121, 1), (bound - 1, 1)]:
        watch.see(limits(balance, sampled=100, incarnation=2))
        assert watch.num_violations == num_violations
    watch.see(limits(bound + 1, sampled=100, incarnation=2))
    assert watch.num_violations == 2


def test_after_many_power_cuts_no_more_is_forgiven_than_after_one():
    watch = LimiterWatch(journal_may_be_cut=True)
    for incarnation in range(20):
        watch.see(limits(0.0, sampled=100, incarnation=incarnation))
    watch.see(limits(50 + 15 * 2 + 1, sampled=100, incarnation=19))
    assert watch.num_violations == 1


def test_files_that_stay_open_are_counted_from_each_start():
    watch = ResourceWatch()
    for incarnation, descriptors, faults, num_leaked, num_faults in [
        (1, 20, 0, 0, 0),
        (1, 20 + MAX_OPENED, 3, 0, 3),
        (2, 90, 0, 0, 3),
        (2, 92 + MAX_OPENED, 4, 2, 7),
        (2, 90, 5, 2, 8),
    ]:
        watch.see({"incarnation": incarnation, "descriptors": descriptors, "disk_faults": faults})
        assert (watch.num_leaked, watch.num_faults) == (num_leaked, num_faults)


@pytest.fixture
def real_calls(monkeypatch):
    """Puts what a BadDisk replaces back afterwards."""
    monkeypatch.setattr(os, "write", os.write)
    monkeypatch.setattr(os, "fsync", os.fsync)
    monkeypatch.setattr(bad_disk, "MAX_DELAY_SECONDS", 0)


def outcomes(path, num_calls):
    """Of each call whether it failed, with what was written."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    failed = []
    for number in range(num_calls):
        try:
            os.write(descriptor, b"12345678") if number % 2 else os.fsync(descriptor)
            failed.append(False)
        except OSError as error:
            assert error.errno in bad_disk.ERRORS
            failed.append(True)
    os.close(descriptor)
    return failed, path.read_bytes()


def test_a_bad_disk_fails_in_its_folder_only(tmp_path, real_calls):
    disk = BadDisk(tmp_path / "bad", seed=1)
    disk.install()
    (tmp_path / "bad").mkdir()
    assert outcomes(tmp_path / "good.log", 600) == ([False] * 600, b"12345678" * 300)
    failed, written = outcomes(tmp_path / "bad" / "segment.log", 600)
    assert 0.1 < sum(failed) / 600 < 0.6 and disk.num_faults == sum(failed)
    # Single ones and stretches; some that failed wrote a part.
    runs = [len(run) for run in "".join(" x"[value] for value in failed).split()]
    assert min(runs) == 1 and bad_disk.STRETCH[0] <= max(runs) < 3 * bad_disk.STRETCH[1]
    whole = sum(not value for value in failed[1::2])
    assert 8 * whole < len(written) < 8 * 300


def test_a_bad_disk_follows_from_its_seed(tmp_path, real_calls):
    found = []
    for seed in (1, 1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", os.write)
            patch.setattr(os, "fsync", os.fsync)
            BadDisk(tmp_path, seed).install()
            path = tmp_path / "segment.log"
            found.append(outcomes(path, 500))
            path.unlink()
    assert found[0] == found[1] != found[2]
