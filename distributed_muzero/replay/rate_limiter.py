"""Holds sampling and inserting to a ratio, with the rules of Reverb's SampleToInsertRatio; reanalysing as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class RateLimiter:
    """Keeps  inserted · samples_per_insert − sampled  within `error_buffer` of its value at the minimum size.

    Counts are transitions inserted and rows sampled. An insert is refused while the learner is too far
    behind, a sample while it is too far ahead or fewer than `min_size` transitions were ever inserted (Reverb
    counts those still held, so that eviction can close sampling there). Inserts are whole episodes, so the
    upper bound may be passed by one of them.

    With  2 · error_buffer ≥ num_rows  at least one of `can_insert()` and `can_sample(num_rows)` is true.
    Pending transitions must come to be counted, or dropped, without waiting for further inserts.

    A run may go on under other limits. What was inserted and sampled before is then settled: the balance stays as it
    was where the new slack allows it, and within the slack otherwise.
    """

    def __init__(self, samples_per_insert: float, min_size: int, error_buffer: float):
        """Raises ValueError for a ratio or a minimum size that isn't above 0, or a negative slack."""
        if not (samples_per_insert > 0 and min_size >= 1 and error_buffer >= 0):
            raise ValueError(
                f"samples_per_insert {samples_per_insert}, min_size {min_size}, error_buffer {error_buffer}; "
                "expected above 0, at least 1, at least 0"
            )
        self.samples_per_insert = samples_per_insert
        self.min_size = min_size
        self.error_buffer = error_buffer
        self.inserted = 0
        self.sampled = 0
        self._settled = 0.0  # samples forgiven, or taken back, when the limits changed

    @property
    def balance(self) -> float:
        """How many samples the inserts allow beyond those taken, measured from the minimum size."""
        return self._balance_at(self.inserted)

    def can_insert(self, num_pending: int = 0) -> bool:
        """Whether one more episode may come; `num_pending` transitions are accepted but not yet counted."""
        inserted = self.inserted + num_pending
        return inserted < self.min_size or self._balance_at(inserted) <= self.error_buffer

    def can_sample(self, num_rows: int) -> bool:
        """Whether `num_rows` rows may be drawn now. Pending transitions don't help: none can be drawn."""
        return self.inserted >= self.min_size and self.balance - num_rows >= -self.error_buffer

    def count_insert(self, num_transitions: int) -> None:
        self.inserted += num_transitions

    def count_sample(self, num_rows: int) -> None:
        self.sampled += num_rows

    def state(self) -> dict[str, Any]:
        """Both counts, and what they are measured by, for `restore`; fits JSON."""
        return {
            "inserted": int(self.inserted),
            "sampled": int(self.sampled),
            "limits": self._limits(),
            "settled": self._settled,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from an earlier limiter's `state()`; of one without limits, as if they were the same.

        Raises ValueError for other keys, or for numbers that can't be counts.
        """
        counts = {name: count for name, count in state.items() if name not in ("limits", "settled")}
        if counts.keys() != {"inserted", "sampled"} or not all(map(_is_count, counts.values())):
            raise ValueError(
                f"the limiter's state is {dict(state)}; expected inserted and sampled, both 0 or more"
            )
        self.inserted, self.sampled = counts["inserted"], counts["sampled"]
        self._settled = state.get("settled", 0.0)
        if state.get("limits", self._limits()) != self._limits():
            samples_per_insert, min_size, _ = state["limits"]
            before = max(self.inserted - min_size, 0) * samples_per_insert - self.sampled + self._settled
            balance = min(max(before, -self.error_buffer), self.error_buffer)
            self._settled += balance - self._balance_at(max(self.inserted, self.min_size))

    def _limits(self) -> list[float | None]:
        slack = None if self.error_buffer == float("inf") else self.error_buffer
        return [self.samples_per_insert, self.min_size, slack]

    def _balance_at(self, inserted: int) -> float:
        return (inserted - self.min_size) * self.samples_per_insert - self.sampled + self._settled


class RefreshLimiter:
    """Holds  ratio : (1 − ratio) = transitions searched anew : transitions inserted.

    Both are counted from when the run went on with another ratio, or began. Ratio 1 holds nothing back.
    """

    def __init__(self, ratio: float):
        self.ratio = ratio
        self.refreshed = 0
        self._first_inserted = self._first_refreshed = 0

    def can_refresh(self, inserted: int) -> bool:
        """inserted: transitions since the run began."""
        refreshed = self.refreshed - self._first_refreshed
        owed = (inserted - self._first_inserted) * self.ratio
        return self.ratio == 1 or refreshed * (1 - self.ratio) < owed

    def count(self, num_transitions: int) -> None:
        self.refreshed += num_transitions

    def state(self) -> dict[str, Any]:
        """For `restore`; fits JSON."""
        return {"ratio": self.ratio, "first": [self._first_inserted, self._first_refreshed]}

    def restore(self, state: Mapping[str, Any], inserted: int, refreshed: int) -> None:
        """Goes on from the counts of the run, and the `state()` of its last launch."""
        self.refreshed = refreshed
        self._first_inserted, self._first_refreshed = state.get("first", (0, 0))
        if state.get("ratio", self.ratio) != self.ratio:
            self._first_inserted, self._first_refreshed = inserted, refreshed


def _is_count(number: object) -> bool:
    return isinstance(number, int) and number >= 0
