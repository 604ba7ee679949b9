"""Holds sampling and inserting to a ratio, with the rules of Reverb's SampleToInsertRatio."""

from __future__ import annotations

from collections.abc import Mapping


class RateLimiter:
    """Keeps  inserted · samples_per_insert − sampled  within `error_buffer` of its value at the minimum size.

    Counts are transitions inserted and rows sampled. An insert is refused while the learner is too far
    behind, a sample while it is too far ahead or fewer than `min_size` transitions were ever inserted (Reverb
    counts those still held, so that eviction can close sampling there). Inserts are whole episodes, so the
    upper bound may be passed by one of them.

    With  2 · error_buffer ≥ num_rows  at least one of `can_insert()` and `can_sample(num_rows)` is true.
    Pending transitions must come to be counted, or dropped, without waiting for further inserts.
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

    def state(self) -> dict[str, int]:
        """Both counts, for `restore`."""
        return {"inserted": int(self.inserted), "sampled": int(self.sampled)}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes on from the counts of an earlier limiter's `state()`.

        The ratio is that of all inserts ever counted: under another `samples_per_insert` one side waits until
        the other has caught up. Raises ValueError for other keys or for numbers that can't be counts.
        """
        if state.keys() != {"inserted", "sampled"} or not all(map(_is_count, state.values())):
            raise ValueError(
                f"the limiter's state is {dict(state)}; expected inserted and sampled, both 0 or more"
            )
        self.inserted, self.sampled = state["inserted"], state["sampled"]

    def _balance_at(self, inserted: int) -> float:
        return (inserted - self.min_size) * self.samples_per_insert - self.sampled


def _is_count(number: object) -> bool:
    return isinstance(number, int) and number >= 0
