"""Ratings against numbers by hand."""

from __future__ import annotations

import pytest

from distributed_muzero.matches.elo import elo_difference, elo_interval, expected_score, fit_rating


def test_differences_and_scores_by_hand():
    assert elo_difference(10 / 11) == pytest.approx(400)
    assert elo_difference(0.5) == 0
    assert elo_difference(0.75) == pytest.approx(190.85, abs=0.01)
    assert elo_difference(0.0) is None and elo_difference(1.0) is None
    assert expected_score(elo_difference(0.83)) == pytest.approx(0.83)


def test_interval_is_wilsons():
    # 8 of 10: Wilson gives 0.4902 to 0.9433.
    low, high = elo_interval(0.8, 10)
    assert low == pytest.approx(elo_difference(0.4902), abs=0.2)
    assert high == pytest.approx(elo_difference(0.9433), abs=0.5)


def test_who_won_everything_has_a_lower_end_only():
    low, high = elo_interval(1.0, 20)
    # Wilson: 20 / (20 + 1.96²) = 0.8389.
    assert low == pytest.approx(elo_difference(0.8389), abs=0.3) and high is None
    low, high = elo_interval(0.0, 20)
    assert low is None and high == pytest.approx(-elo_difference(0.8389), abs=0.3)


def test_a_rating_explains_the_points():
    assert fit_rating([(100.0, 1000, 750.0)]) == pytest.approx(290.85, abs=0.01)
    opponents = [(0.0, 40, 36.0), (200.0, 40, 26.0)]
    rating = fit_rating(opponents)
    assert sum(n * expected_score(rating - r) for r, n, _ in opponents) == pytest.approx(62.0, abs=1e-6)


def test_who_won_everything_has_a_finite_rating():
    assert fit_rating([(100.0, 20, 20.0)]) == pytest.approx(4100, abs=0.1)
    assert fit_rating([(100.0, 20, 0.0), (0.0, 1, 0.0)]) == pytest.approx(-4000, abs=0.1)


def test_nobody_has_no_rating():
    with pytest.raises(ValueError, match="needs an opponent"):
        fit_rating([])
