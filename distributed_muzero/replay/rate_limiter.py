"""Holds sampling and inserting to a ratio, with the rules of Reverb's SampleToInsertRatio."""

from __future__ import annotations


class RateLimiter:
    """Keeps  inserted · samples_per_insert − sampled  within `error_buffer` of its value at the minimum size.

    Counts are transitions inserted and rows sampled. An insert is refused while the learner is too far behind, a
    sample while it is too far ahead or fewer than `min_size` transitions were ever inserted. Inserts are whole
    episodes, so the upper bound may be passed by one of them.
    """

    def __init__(self, samples_per_insert: float, min_size: int, error_buffer: float):
        self.samples_per_insert = samples_per_insert
        self.min_size = min_size
        self.error_buffer = error_buffer
        self.inserted = 0
        self.sampled = 0

    @property
    def balance(self) -> float:
        """How many samples the inserts allow beyond those taken, measured from the minimum size."""
        return (self.inserted - self.min_size) * self.samples_per_insert - self.sampled

    def can_insert(self) -> bool:
        return self.inserted < self.min_size or self.balance <= self.error_buffer

    def can_sample(self, num_rows: int) -> bool:
        return self.inserted >= self.min_size and self.balance - num_rows >= -self.error_buffer

    def count_insert(self, num_transitions: int) -> None:
        self.inserted += num_transitions

    def count_sample(self, num_rows: int) -> None:
        self.sampled += num_rows
