"""What the storm's consumer sees in a shard's answers: a limiter outside its bounds, open files that become more."""

from __future__ import annotations

from typing import Any

from distributed_muzero.chaos.shard_process import BATCH_ROWS

MAX_STEPS = 15  # of an episode
BATCHES_PER_CALL = 2
MAX_OPENED = 8  # files that a shard has open for a while beside those it had at first


class LimiterWatch:
    """Counts answers of a shard after which its limiter stood outside its bounds, or had forgotten samples.

    Where the journal may be cut, a restarted shard may have forgotten what it gave out since the last flush, so that
    its balance stands that much higher, until enough was sampled.
    """

    def __init__(self, journal_may_be_cut: bool):
        self.num_violations = 0
        self._journal_may_be_cut = journal_may_be_cut
        self._incarnation: int | None = None
        self._sampled = self._sampled_at_flush = 0
        self._forgiven = 0.0

    def see(self, limits: dict[str, Any]) -> None:
        """limits: what ShardServer.limits() says."""
        if limits["incarnation"] != self._incarnation:
            self._incarnation = limits["incarnation"]
            self._restored(limits["sampled"])
        self._sampled = limits["sampled"]
        slack = limits["error_buffer"]
        excess = limits["balance"] - (slack + MAX_STEPS * limits["samples_per_insert"])
        self.num_violations += not (excess <= self._forgiven)
        self.num_violations += self._sampled > 0 and limits["balance"] < -slack
        # Above its bound nothing is inserted: what was sampled since must not come back.
        self._forgiven = min(self._forgiven, max(excess, 0.0))

    def flushed(self, sampled: int) -> None:
        self._sampled_at_flush = sampled

    def _restored(self, sampled: int) -> None:
        forgotten = self._sampled - sampled
        may_forget = self._sampled - self._sampled_at_flush if self._journal_may_be_cut else 0
        self.num_violations += forgotten > may_forget
        if self._journal_may_be_cut:
            # With what the call in flight may have drawn.
            self._forgiven += max(forgotten, 0) + BATCHES_PER_CALL * BATCH_ROWS


class ResourceWatch:
    """Open files beyond what a shard needs, and the faults of its disk, over all incarnations."""

    def __init__(self) -> None:
        self.num_leaked = 0
        self._incarnation: int | None = None
        self._opened_at_first = 0
        self._faults_before = self._faults = 0

    @property
    def num_faults(self) -> int:
        return self._faults_before + self._faults

    def see(self, answer: dict[str, Any]) -> None:
        """answer: what ShardServer.limits() and resources() say together."""
        if answer["incarnation"] != self._incarnation:
            self._incarnation = answer["incarnation"]
            self._opened_at_first = answer["descriptors"]
            self._faults_before = self.num_faults
        self._faults = answer["disk_faults"]
        opened = answer["descriptors"] - self._opened_at_first
        self.num_leaked = max(self.num_leaked, opened - MAX_OPENED)
