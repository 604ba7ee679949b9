"""Actors that compute gradients, as processes of Ray: each is asked again as soon as its answer is used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from distributed_muzero.cluster.session import ray_session
from distributed_muzero.errors import ClusterError, DistributedMuZeroError, first_line

logger = logging.getLogger(__name__)


@ray.remote
class GradientWorker:
    def __init__(self, make_actor: Callable[[], Any]):
        self.actor = make_actor()

    def contribute(self, weights: np.ndarray) -> Any:
        return self.actor.contribute(weights)


def contributions(
    makers: Sequence[Callable[[], Any]],
    weights: Callable[[], np.ndarray],
    timeout_seconds: float,
    max_lost: int,
) -> Iterator[Any]:
    """What `contribute(weights)` of each maker's actor returns, as it comes, without end.

    Starts a Ray on this machine and ends it with the iterator, or joins that of RAY_ADDRESS. The weights are read
    when an actor is asked, at once after its last answer was used. An actor that dies, or that is the first of all to
    answer after more than `timeout_seconds`, is replaced. Raises ClusterError when more than max_lost were, and what
    an actor itself raises.
    """
    with ray_session(num_cpus=len(makers)):
        workers = {index: GradientWorker.remote(make) for index, make in enumerate(makers)}
        asked = {worker.contribute.remote(weights()): index for index, worker in workers.items()}
        num_lost = 0
        while True:
            ready, _ = ray.wait(list(asked), num_returns=1, timeout=timeout_seconds)
            overdue = ready or list(asked)[:1]  # the one that has been waited for longest
            index = asked.pop(overdue[0])
            try:
                if not ready:
                    raise ClusterError(f"no answer in {timeout_seconds:g} s")
                answer = ray.get(ready[0])
            except (RayActorError, ClusterError) as error:
                num_lost += 1
                if num_lost > max_lost:
                    raise ClusterError(
                        f"{num_lost} actors were lost, last actor {index}: {first_line(error)}; is there memory, and "
                        "a CPU for each?"
                    ) from error
                logger.warning("actor %d is replaced: %s", index, first_line(error))
                ray.kill(workers[index])
                workers[index] = GradientWorker.remote(makers[index])
            except RayTaskError as error:
                if isinstance(error.cause, DistributedMuZeroError):
                    raise error.cause from None
                raise
            else:
                yield answer
            asked[workers[index].contribute.remote(weights())] = index
