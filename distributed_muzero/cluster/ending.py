"""What is asked of a run's processes when it ends. Unlike the driver's loop, this waits, for so long at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from distributed_muzero.errors import RunError


def ask_all(
    whom: str, calls: list[Any], timeout_seconds: float, tell: Callable[[str], None]
) -> dict[int, Any]:
    """The answers by index, of those that answer in time."""
    done = ray.wait(calls, num_returns=len(calls), timeout=timeout_seconds)[0] if calls else []
    answers = {}
    for call in done:
        with suppress(RayError):
            answers[calls.index(call)] = ray.get(call)
    if num_silent := len(calls) - len(answers):
        tell(f"{num_silent} {whom} gave no answer at the end; what was acknowledged is on disk")
    return answers


def last_state(learner: Any, deadline: float) -> Any:
    """The learner's state and its published weights.

    deadline: monotonic seconds. Raises RunError if there is no answer by then, or a second from now.
    """
    try:
        return ray.get(learner.state.remote(), timeout=max(deadline - time.monotonic(), 1.0))
    except RayError as error:
        raise RunError(
            f"the last checkpoint could not be written, the learner gave no answer ({error}); "
            "what it learnt since the one before is lost; resume goes on from there"
        ) from None


def is_answered(call: Any, deadline: float, stop_requested: Callable[[], bool]) -> bool:
    """Waits for a call. False if it has no answer by the deadline (monotonic seconds), or a stop is asked for."""
    while not ray.wait([call], timeout=0.2)[0]:
        if stop_requested() or time.monotonic() > deadline:
            return False
    return True
