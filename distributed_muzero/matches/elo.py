"""Elo ratings: how many points of a game a difference of ratings is worth, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

POINTS_OF_TEN_TO_ONE = 400.0  # a difference of so many ratings means ten points for each of the other's
NORMAL_95 = 1.959964


def expected_score(difference: float) -> float:
    """Points a game, 0 … 1, for the player whose rating is higher by `difference`."""
    return 1 / (1 + 10 ** (-difference / POINTS_OF_TEN_TO_ONE))


def elo_difference(score: float) -> float | None:
    """The difference of ratings at which `score` (0 … 1) is expected; None for 0 and 1, beyond all of them."""
    if not 0 < score < 1:
        return None
    return POINTS_OF_TEN_TO_ONE * math.log10(score / (1 - score))


def elo_interval(score: float, num_games: int, z: float = NORMAL_95) -> tuple[float | None, float | None]:
    """Of the difference, 95%: Wilson's interval of a share, in ratings; None for an end at 0 or 1.

    Draws make a score more certain than Wilson's takes it to be, so that the interval is rather too wide.
    """
    square = z * z
    centre = (score + square / (2 * num_games)) / (1 + square / num_games)
    half = (z / (1 + square / num_games)) * math.sqrt(
        score * (1 - score) / num_games + square / (4 * num_games**2)
    )
    low = 0.0 if score == 0 else centre - half
    high = 1.0 if score == 1 else centre + half
    return elo_difference(low), elo_difference(high)


def fit_rating(opponents: Sequence[tuple[float, int, float]]) -> float:
    """The rating that best explains games against opponents, each (rating, number of games, points).

    Maximum likelihood, 4000 beyond the opponents at most: no rating explains that everything was won, or lost. Raises
    ValueError without an opponent.
    """
    if not opponents:
        raise ValueError("a rating needs an opponent")
    points = sum(won for _, _, won in opponents)
    low = min(rating for rating, _, _ in opponents) - 4000.0
    high = max(rating for rating, _, _ in opponents) + 4000.0
    for _ in range(60):
        middle = (low + high) / 2
        expected = sum(games * expected_score(middle - rating) for rating, games, _ in opponents)
        low, high = (middle, high) if expected < points else (low, middle)
    return (low + high) / 2
