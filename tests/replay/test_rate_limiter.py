import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_muzero.replay.rate_limiter import RateLimiter


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
