"""The processes of a run, and the calls to them that are not answered yet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from distributed_muzero.errors import RunError

MAX_FAILURES_IN_A_ROW = 5
PENDING_SECONDS = 30.0  # before it is told that a process has found no place
STEADY_SECONDS = 10.0  # of work, after which earlier failures are forgiven


@dataclass(eq=False)
class Role:
    """One process of the run: who it is now, and how often it came to grief since it last did something."""

    name: str
    make: Callable[[], Any]  # -> handle
    handle: Any = None
    index: int = 0  # among its kind
    pending_since: float = math.inf
    is_ready: bool = False  # its process is there; before, it waits for a node that has room, or starts
    num_doubts: int = 0  # its answers that were lost since the last one that came
    failures_in_a_row: int = 0
    working_since: float | None = None  # this incarnation
    weights_version: int | None = None  # that an actor played with last
    unacknowledged: int = 0  # finished episodes that an actor held when it reported last
    lost_at: float | None = None  # of a shard that Ray is restarting
    leaves_by: float | None = None  # an actor that delivers its last games, until then at most

    @property
    def kind(self) -> str:
        """Its name without its number."""
        return self.name.rstrip(" 0123456789").replace(" ", "_")

    def start(self) -> None:
        self.handle = self.make()
        self.is_ready = False
        self.num_doubts = self.unacknowledged = 0
        self.pending_since = time.monotonic()

    def is_long_pending(self, now: float) -> bool:
        """True once for each start that has taken so long."""
        if self.is_ready or now - self.pending_since < PENDING_SECONDS:
            return False
        self.pending_since = math.inf
        return True

    def has_worked(self, now: float) -> None:
        self.working_since = now if self.working_since is None else self.working_since
        self.lost_at = None

    def has_lost_its_node(self) -> None:
        """No failure of its own."""
        self.working_since = self.weights_version = None

    def has_failed(self, error: BaseException, now: float) -> None:
        """Raises RunError after too many failures with little work between them."""
        if self.working_since is not None and now - self.working_since > STEADY_SECONDS:
            self.failures_in_a_row = 0
        self.working_since = self.weights_version = None
        self.failures_in_a_row += 1
        if self.failures_in_a_row > MAX_FAILURES_IN_A_ROW:
            raise RunError(f"the {self.name} failed {self.failures_in_a_row} times in a row, last: {error}")


class Call(NamedTuple):
    role: Role
    on_result: Callable[[Any], object]
    deadline: float  # monotonic seconds
    shows_work: bool  # its answer proves that the role does what it is there for


class Calls:
    """Who was asked for what; at most a few calls to each role."""

    def __init__(self) -> None:
        self._calls: dict[Any, Call] = {}

    def add(
        self,
        role: Role,
        reference: Any,
        on_result: Callable[[Any], object],
        timeout_seconds: float,
        shows_work: bool,
    ) -> None:
        self._calls[reference] = Call(role, on_result, time.monotonic() + timeout_seconds, shows_work)

    def __len__(self) -> int:
        return len(self._calls)

    def references(self) -> list[Any]:
        return list(self._calls)

    def pop(self, reference: Any) -> Call | None:
        """Takes a call out; None if its role was forgotten."""
        return self._calls.pop(reference, None)

    def forget(self, role: Role) -> None:
        """Nobody waits for this role's answers any more."""
        self._calls = {reference: call for reference, call in self._calls.items() if call.role is not role}

    def of(self, role: Role) -> list[Any]:
        """Those that this role has not answered."""
        return [reference for reference, call in self._calls.items() if call.role is role]

    def is_asked(self, role: Role) -> bool:
        return bool(self.of(role))

    def overdue(self) -> Iterable[Role]:
        """Each role once that has left a call unanswered for too long."""
        now = time.monotonic()
        return list(dict.fromkeys(call.role for call in self._calls.values() if now > call.deadline))
