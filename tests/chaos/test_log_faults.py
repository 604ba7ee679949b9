import pytest

from distributed_muzero.chaos import log_faults
from distributed_muzero.chaos.log_faults import (
    run_disk_full,
    run_limiter,
    run_other_formats,
    run_torn_tails,
)
from distributed_muzero.replay import log, log_format
from distributed_muzero.replay.log_format import Record
from distributed_muzero.replay.rate_limiter import RateLimiter
from distributed_muzero.workers.replay_shard import ReplayShard


def test_a_tail_torn_at_any_byte_costs_its_record_only(tmp_path):
    result = run_torn_tails(tmp_path, seed=1)
    assert result.n > 300 and result.broken == []


def test_a_torn_tail_that_nobody_counts_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(ReplayShard, "stats", lambda self: {"corrupt_records": 0})
    assert len(run_torn_tails(tmp_path, seed=1).broken) > 300


def test_without_checksums_half_a_record_is_taken_for_one(tmp_path, monkeypatch):
    def read_all(data, number):
        """Neither checksums nor lengths are looked at."""
        view, start = memoryview(data), data.find(log_format.MARKER)
        while start >= 0:
            body = start + log_format.RECORD.size
            if body > len(view):
                return
            _, kind, length, *_ = log_format.RECORD.unpack_from(view, start)
            end = body + length + -length % log_format.ALIGNMENT
            yield start, min(end, len(view)), Record(kind, view[body : body + length], number)
            start = data.find(log_format.MARKER, end)

    monkeypatch.setattr(log_format, "_intact_records", read_all)
    assert len(run_torn_tails(tmp_path, seed=1).broken) > 300


def test_a_full_disk_loses_nothing_that_was_acknowledged(tmp_path):
    result = run_disk_full(tmp_path, seed=1, n=20)
    assert result.is_good, result
    assert (result.n, result.refused, result.lost, result.duplicates) == (20, 20, 0, 0)


def test_a_shard_that_acknowledges_before_its_commit_loses_on_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(ReplayShard, "abandon", lambda self, offer, reason: offer.replies)
    assert log_faults.check_disk_full(tmp_path, seed=1, n=3).lost > 0


def test_other_formats_are_refused(tmp_path):
    result = run_other_formats(tmp_path, seed=1)
    assert result.n == 6 and result.broken == []


def test_a_log_that_reads_any_format_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "check_formats", lambda *args: None)
    monkeypatch.setattr(log_format, "check_formats", lambda *args: None)
    monkeypatch.setattr(log_format, "has_segment_header", lambda *args: True)
    assert len(run_other_formats(tmp_path, seed=1).broken) >= 6


@pytest.mark.parametrize("seed", range(3))
def test_the_limiter_stays_inside_its_bounds(seed):
    result = run_limiter(seed, 10_000)
    assert result.restores > 100 and result.violations == 0


def test_a_limiter_that_forgets_its_samples_is_noticed(monkeypatch):
    def restore(self, state):
        self.inserted, self.sampled = state["inserted"], 0

    monkeypatch.setattr(RateLimiter, "restore", restore)
    assert run_limiter(0, 10_000).violations > 0
