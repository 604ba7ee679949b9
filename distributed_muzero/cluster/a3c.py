"""Actors that compute gradients, as processes of Ray: each is asked again as soon as its answer is used."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from distributed_muzero.cluster.session import ray_session
from distributed_muzero.errors import ClusterError, DistributedMuZeroError, first_line

START_SECONDS = 120.0  # until an actor's first answer, at least: its process and torch are loaded before

logger = logging.getLogger(__name__)


class Asked(NamedTuple):
    """A call that wasn't answered yet."""

    actor: int
    deadline: float


@ray.remote(num_cpus=1)
class GradientWorker:
    def __init__(self, make_actor: Callable[..., Any], num_lost: int = 0):
        self.actor = make_actor(num_lost=num_lost)

    def contribute(self, weights: np.ndarray) -> Any:
        return self.actor.contribute(weights)


def contributions(
    makers: Sequence[Callable[..., Any]],
    weights: Callable[[], np.ndarray],
    timeout_seconds: float,
    max_lost: int,
) -> Iterator[Any]:
    """What `contribute(weights)` of each maker's actor returns, as it comes, without end.

    makers: each makes an actor from `num_lost`, how many were lost so far, so that one in another's place can begin
    differently.
    Starts a Ray on this machine and ends it with the iterator, or joins that of RAY_ADDRESS. The weights are read
    when an actor is asked, at once after its last answer was used. An actor that dies, or that doesn't answer within
    `timeout_seconds` (the first time within START_SECONDS, if that is longer), is replaced. Raises ClusterError when
    more than max_lost were, and what an actor itself raises.
    """
    first_patience = max(timeout_seconds, START_SECONDS)
    with ray_session(num_cpus=len(makers)):
        workers = [GradientWorker.remote(make) for make in makers]
        asked: dict[Any, Asked] = {}

        def ask(index: int, patience: float) -> None:
            asked[workers[index].contribute.remote(weights())] = Asked(index, time.monotonic() + patience)

        for index in range(len(makers)):
            ask(index, first_patience)
        num_lost = 0
        while True:
            next_due = min(asked, key=lambda call: asked[call].deadline)
            seconds = max(0.0, asked[next_due].deadline - time.monotonic())
            ready, _ = ray.wait(list(asked), num_returns=1, timeout=seconds)
            call = ready[0] if ready else next_due
            index, patience = asked.pop(call).actor, timeout_seconds
            try:
                if not ready:
                    raise ClusterError("it gave no answer in time")
                answer = ray.get(call)
            except RayTaskError as error:
                if isinstance(error.cause, DistributedMuZeroError):
                    raise error.cause from None
                raise
            except (RayError, ClusterError) as error:
                num_lost += 1
                if num_lost > max_lost:
                    raise ClusterError(
                        f"{num_lost} actors were lost, last actor {index}: {first_line(error)}; is there memory, and "
                        "a CPU for each?"
                    ) from error
                logger.warning("actor %d is replaced: %s", index, first_line(error))
                ray.kill(workers[index])
                workers[index] = GradientWorker.remote(makers[index], num_lost)
                patience = first_patience
            else:
                yield answer
            ask(index, patience)
