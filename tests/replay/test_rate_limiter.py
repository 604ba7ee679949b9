import ast
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from distributed_muzero.replay import rate_limiter
from distributed_muzero.replay.rate_limiter import RateLimiter, RefreshLimiter

ROUNDING = 1e-6


def test_rules_by_hand():
    limiter = RateLimiter(samples_per_insert=2, min_size=10, error_buffer=8)
    assert limiter.can_insert() and not limiter.can_sample(1)
    limiter.count_insert(10)  # balance 0
    assert limiter.can_sample(8) and not limiter.can_sample(9)
    limiter.count_sample(8)  # balance −8
    assert not limiter.can_sample(1) and limiter.can_insert()
    limiter.count_insert(9)  # balance 10
    assert not limiter.can_insert() and limiter.can_sample(4)
    limiter.count_sample(4)  # balance 6
    assert limiter.can_insert()


def test_nothing_is_sampled_below_the_minimum_size_and_inserts_are_free_until_then():
    limiter = RateLimiter(samples_per_insert=100, min_size=10, error_buffer=1)
    for _ in range(9):
        assert limiter.can_insert() and not limiter.can_sample(1)
        limiter.count_insert(1)


@settings(deadline=None)
@given(
    samples_per_insert=st.floats(0.01, 100),
    min_size=st.integers(1, 50),
    rows=st.integers(1, 64),
    slack=st.floats(0, 100),
    turns=st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=200),
)
def test_never_deadlocks_and_keeps_the_ratio_when_the_slack_holds_a_batch(
    samples_per_insert, min_size, rows, slack, turns
):
    limiter = RateLimiter(samples_per_insert, min_size, rows + slack)
    longest = 1
    for prefers_insert, length in turns:
        may_insert, may_sample = limiter.can_insert(), limiter.can_sample(rows)
        assert may_insert or may_sample
        if may_insert and (prefers_insert or not may_sample):
            limiter.count_insert(length)
            longest = max(longest, length)
        else:
            limiter.count_sample(rows)
        if limiter.inserted >= min_size:
            upper = limiter.error_buffer + longest * samples_per_insert
            assert -limiter.error_buffer - 1e-6 <= limiter.balance <= upper + 1e-6


@pytest.mark.parametrize("samples_per_insert", [0.5, 4, 32])
def test_a_greedy_learner_and_a_greedy_actor_both_end_at_the_asked_ratio(samples_per_insert):
    for greedy in ("learner", "actor"):
        limiter = RateLimiter(samples_per_insert, min_size=100, error_buffer=256)
        for _ in range(20_000):
            sample = limiter.can_sample(64) and (greedy == "learner" or not limiter.can_insert())
            if sample:
                limiter.count_sample(64)
            else:
                limiter.count_insert(10)
        assert limiter.sampled / limiter.inserted == pytest.approx(samples_per_insert, rel=0.05)


class LimiterMachine(RuleBasedStateMachine):
    """A shard's life: episodes are appended (pending) and then counted, batches are drawn, the process dies.

    The counts are kept here once more; every answer of the limiter is judged by these.
    """

    @initialize(
        ratio=st.floats(0.01, 100),
        min_size=st.integers(1, 2_000),
        num_rows=st.integers(1, 256),
        slack=st.one_of(st.just(0.0), st.floats(0, 2_000)),
    )
    def start(self, ratio, min_size, num_rows, slack):
        # The least slack that rules out a deadlock is half a batch.
        self.ratio, self.min_size, self.num_rows, self.slack = ratio, min_size, num_rows, num_rows / 2 + slack
        self.limiter = self.make_limiter()
        self.inserted = self.sampled = self.longest = 0
        self.pending = []

    def make_limiter(self):
        return RateLimiter(self.ratio, self.min_size, self.slack)

    def balance(self, num_pending=0):
        return (self.inserted + num_pending - self.min_size) * self.ratio - self.sampled

    @rule(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=10))
    def append(self, lengths):
        for length in lengths:
            if self.limiter.can_insert(sum(self.pending)):
                self.pending.append(length)
                self.longest = max(self.longest, length)
            else:
                assert self.inserted + sum(self.pending) >= self.min_size
                assert self.balance(sum(self.pending)) > self.slack - ROUNDING

    @rule()
    def count_pending(self):
        for length in self.pending:
            self.limiter.count_insert(length)
            self.inserted += length
        self.pending = []

    @rule(attempts=st.integers(1, 20))
    def sample(self, attempts):
        for _ in range(attempts):
            if self.limiter.can_sample(self.num_rows):
                self.limiter.count_sample(self.num_rows)
                self.sampled += self.num_rows
            else:
                too_small = self.inserted < self.min_size
                assert too_small or self.balance() - self.num_rows < -self.slack + ROUNDING

    @rule(found_in_log=st.booleans())
    def crash(self, found_in_log):
        state = json.loads(json.dumps(self.limiter.state()))
        self.limiter = self.make_limiter()
        self.limiter.restore(state)
        if found_in_log:
            self.count_pending()
        self.pending = []

    @invariant()
    def counts_are_kept(self):
        assert (self.limiter.inserted, self.limiter.sampled) == (self.inserted, self.sampled)

    @invariant()
    def balance_stays_within_its_bounds(self):
        upper = self.slack + self.longest * self.ratio
        assert self.balance(sum(self.pending)) <= upper + ROUNDING
        if self.inserted >= self.min_size:
            assert -self.slack - ROUNDING <= self.balance()
        else:
            assert self.sampled == 0

    @invariant()
    def never_deadlocks(self):
        assert self.limiter.can_insert() or self.limiter.can_sample(self.num_rows)


LimiterMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
test_a_shards_life = LimiterMachine.TestCase


def test_a_batch_of_more_than_twice_the_slack_can_deadlock():
    limiter = RateLimiter(samples_per_insert=1, min_size=1, error_buffer=4)
    limiter.count_insert(6)  # balance 5
    assert not limiter.can_insert() and not limiter.can_sample(10)
    assert limiter.can_sample(9)


def test_pending_transitions_count_against_inserts_but_cannot_be_sampled():
    limiter = RateLimiter(samples_per_insert=2, min_size=10, error_buffer=8)
    assert limiter.can_insert(num_pending=9)
    # At the minimum size the balance is 0; four more transitions make it 8, five make it 10.
    assert limiter.can_insert(num_pending=14) and not limiter.can_insert(num_pending=15)
    assert not limiter.can_sample(1)
    limiter.count_insert(15)
    assert not limiter.can_insert() and limiter.can_sample(18)


def test_sampling_opens_at_the_minimum_size_and_stays_open_in_a_restored_limiter():
    limiter = RateLimiter(samples_per_insert=4, min_size=10, error_buffer=8)
    limiter.count_insert(9)
    assert not limiter.can_sample(1)
    limiter.count_insert(1)
    assert limiter.can_sample(8)
    limiter.count_sample(8)
    restored = RateLimiter(samples_per_insert=4, min_size=10, error_buffer=8)
    restored.restore(limiter.state())
    assert restored.balance == -8 and not restored.can_sample(1) and restored.can_insert()


def restarted(limiter, *limits):
    """What goes on with the other's state under limits of its own."""
    fresh = RateLimiter(*limits)
    fresh.restore(json.loads(json.dumps(limiter.state())))
    return fresh


def test_a_state_without_limits_is_of_the_same_ones():
    limiter = RateLimiter(samples_per_insert=2, min_size=10, error_buffer=8)
    limiter.restore({"inserted": 110, "sampled": 200})
    assert limiter.balance == 0


@pytest.mark.parametrize(("before", "after"), [(32, 4), (4, 32)])
def test_a_new_ratio_holds_from_then_on(before, after):
    limiter = RateLimiter(before, 1000, 3200)
    limiter.count_insert(1_000_000)
    limiter.count_sample(999_000 * before - 100)
    limiter = restarted(limiter, after, 1000, 3200)
    assert limiter.balance == 100
    assert limiter.can_insert() and limiter.can_sample(128)
    limiter.count_insert(1000)
    limiter.count_sample(1000 * after)
    assert limiter.balance == 100
    # Back again: nothing of the other ratio's time is owed.
    again = restarted(limiter, before, 1000, 3200)
    assert again.balance == 100
    assert (again.inserted, again.sampled) == (limiter.inserted, limiter.sampled)


def test_what_an_offline_launch_sampled_is_not_owed():
    limiter = RateLimiter(32, 50, 512)
    limiter.count_insert(1000)
    limiter = restarted(limiter, 1.0, 1, float("inf"))
    limiter.count_sample(20_000 * 128)
    again = restarted(limiter, 32, 50, 512)
    assert again.balance == -512
    again.count_insert(4)
    assert again.can_sample(128)


def test_under_new_limits_nothing_is_owed_beyond_the_slack():
    limiter = RateLimiter(4, 10, 4000)
    limiter.count_insert(1000)
    assert limiter.balance == 3960
    assert restarted(limiter, 4, 10, 100).balance == 100
    # A minimum size that isn't reached yet is waited for; then the balance is what it was.
    later = restarted(limiter, 4, 5000, 4000)
    assert not later.can_sample(1) and later.can_insert()
    later.count_insert(4000)
    assert later.balance == 3960


def test_the_same_limits_change_nothing_even_beyond_the_slack():
    limiter = RateLimiter(4, 10, 100)
    limiter.count_insert(1000)
    again = restarted(limiter, 4, 10, 100)
    assert again.balance == limiter.balance == 3960 and again.state() == limiter.state()


def test_refreshes_are_counted_from_when_their_ratio_was_set():
    limiter = RefreshLimiter(0.5)
    limiter.count(600)
    assert not limiter.can_refresh(600) and limiter.can_refresh(601)
    other = RefreshLimiter(0.75)
    other.restore(json.loads(json.dumps(limiter.state())), 600, 600)
    assert not other.can_refresh(600) and other.can_refresh(601)
    other.count(300)
    assert not other.can_refresh(700) and other.can_refresh(701)
    again = RefreshLimiter(0.75)
    again.restore(json.loads(json.dumps(other.state())), 700, 900)
    assert not again.can_refresh(700) and again.can_refresh(701)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"inserted": 1},
        {"inserted": 1, "sampled": -1},
        {"inserted": 1.5, "sampled": 0},
        {"inserted": 1, "sampled": 0, "deleted": 0},
    ],
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(state):
    limiter = RateLimiter(samples_per_insert=1, min_size=1, error_buffer=1)
    limiter.count_insert(3)
    with pytest.raises(ValueError, match="expected inserted and sampled"):
        limiter.restore(state)
    assert (limiter.inserted, limiter.sampled) == (3, 0)


def test_the_state_of_numpy_counts_is_plain_integers():
    limiter = RateLimiter(samples_per_insert=1, min_size=1, error_buffer=1)
    limiter.count_insert(np.int64(3))
    assert json.dumps(limiter.state()).startswith('{"inserted": 3, "sampled": 0, ')


@pytest.mark.parametrize("bad", [{"samples_per_insert": 0}, {"min_size": 0}, {"error_buffer": -1.0}])
def test_impossible_limits_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RateLimiter(**({"samples_per_insert": 1, "min_size": 1, "error_buffer": 1} | bad))


@settings(deadline=None, max_examples=25)
@given(
    ratio=st.floats(0.2, 32),
    min_size=st.integers(1, 500),
    num_rows=st.integers(16, 256),
    eagerness=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_the_ratio_converges_like_one_over_the_inserts_through_crashes(
    ratio, min_size, num_rows, eagerness, seed
):
    rng = np.random.default_rng(seed)
    limiter, slack = RateLimiter(ratio, min_size, num_rows), num_rows
    unit = min_size + 500 + slack / ratio  # the most inserts by which the ratio may be off
    for multiple in (10, 100):
        while limiter.inserted < multiple * unit:
            may_sample = limiter.can_sample(num_rows)
            if may_sample and (rng.random() < eagerness or not limiter.can_insert()):
                limiter.count_sample(num_rows)
            else:
                assert limiter.can_insert()
                limiter.count_insert(int(rng.integers(1, 501)))
            if rng.random() < 0.01:
                state = limiter.state()
                limiter = RateLimiter(ratio, min_size, slack)
                limiter.restore(state)
        assert limiter.sampled / limiter.inserted == pytest.approx(ratio, rel=1 / multiple)


def test_no_clock_is_used():
    tree = ast.parse(Path(rate_limiter.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"__future__", "collections.abc", "typing"}
    assert not any(isinstance(node, ast.Import) for node in ast.walk(tree))
