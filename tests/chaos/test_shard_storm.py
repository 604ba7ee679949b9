import os

import pytest

from distributed_muzero.chaos.shard_process import record_syncs, taken_out
from distributed_muzero.chaos.shard_storm import LimiterWatch, cut_to_synced, run_storm
from distributed_muzero.replay import log
from distributed_muzero.replay.store import EpisodeStore


def assert_good(result):
    bad = (result.lost, result.duplicates, result.changed, result.uninvited)
    assert (*bad, result.limiter_violations, result.crashes) == (0,) * 6, result
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
    ],
)
def test_the_storm_breaks_what_has_a_protection_less(tmp_path, mode, without, what):
    assert getattr(run_storm(tmp_path, seed=1, num_kills=2, mode=mode, without=without), what) > 0


def test_protections_come_back():
    knows, checksum = EpisodeStore.knows, log.checksum
    for protection in ("dedupe", "checksum", "sync", None):
        with taken_out(protection):
            assert (EpisodeStore.knows is knows) == (protection != "dedupe")
            assert (log.checksum is checksum) == (protection != "checksum")
    assert EpisodeStore.knows is knows and log.checksum is checksum


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
