"""Creates the processes of a run, each where it may live. Who is created, and when, is the driver's affair."""

from __future__ import annotations

from functools import partial
from typing import Any

import ray

from distributed_muzero.cluster.placement import beside_driver, gpu_share, learner_gpus, shard_options
from distributed_muzero.cluster.program import (
    ActorWorker,
    EvaluatorWorker,
    LearnerWorker,
    ReanalyserWorker,
    ReplayShardWorker,
)
from distributed_muzero.cluster.roles import Role
from distributed_muzero.cluster.run_control import NAMESPACE, Desired, RunControl
from distributed_muzero.config import Config
from distributed_muzero.errors import RunError
from distributed_muzero.workers.bookkeeper import Bookkeeper


class Makers:
    """Makes roles without a process yet; each start of a role creates one."""

    def __init__(self, config: Config, run_name: str, book: Bookkeeper):
        self.config = config
        self.run_name = run_name
        self.book = book
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        self.gpu_share = gpu_share(config, num_gpus)
        self.learner_gpus = learner_gpus(config, num_gpus)
        self.learner_is_elsewhere = self.learner_gpus > 0
        self.shards = [
            Role(f"replay shard {index}", partial(self._shard, index))
            for index in range(config.replay.num_shards)
        ]

    def actor(self, index: int) -> Role:
        return Role(f"actor {index}", partial(self._actor, index), index=index)

    def reanalyser(self, index: int) -> Role:
        return Role(f"reanalyser {index}", partial(self._reanalyser, index), index=index)

    def learner(self) -> Role:
        return Role("learner", self._learner)

    def evaluator(self) -> Role:
        options = beside_driver()
        return Role(
            "evaluator", lambda: EvaluatorWorker.options(**options).remote(self.config, self.run_name)
        )

    @property
    def _shard_handles(self) -> list[Any]:
        return [role.handle for role in self.shards]

    def _shard(self, index: int) -> Any:
        copies = self.book.copies
        return ReplayShardWorker.options(**shard_options(self.config)).remote(
            self.config, self.run_name, index, self.book.folder.replay, copies and copies.owned
        )

    def _learner(self) -> Any:
        options = {"num_gpus": self.learner_gpus} if self.learner_is_elsewhere else beside_driver()
        return LearnerWorker.options(**options).remote(self.config, self.run_name, self._shard_handles)

    def _actor(self, index: int) -> Any:
        # Where the run lives in a placement group, there is room in it for so many; others find theirs elsewhere.
        is_extra = index >= max(self.config.actor.num_actors, *(self.config.actor.autoscale or (0,)))
        options = {"scheduling_strategy": "DEFAULT"} if is_extra else {}
        return ActorWorker.options(**options).remote(
            self.config,
            self.run_name,
            index,
            self.book.next_incarnation(index),
            self._shard_handles,
            self.book.folder.history,
        )

    def _reanalyser(self, index: int) -> Any:
        on_gpu = self.gpu_share if self.config.reanalyse.device != "cpu" else 0
        return ReanalyserWorker.options(num_gpus=on_gpu).remote(
            self.config, self.run_name, index, self._shard_handles
        )


def make_control(run_name: str, desired: Desired, may_exist: bool = False) -> Any:
    """The run's RunControl. Raises RunError if there is one, unless it `may_exist`."""
    options = {"name": run_name, "namespace": NAMESPACE, "get_if_exists": may_exist, **beside_driver()}
    try:
        return RunControl.options(**options).remote(desired)
    except ValueError:
        raise RunError(
            f"a run {run_name!r} is going on in this cluster; choose another name, or stop that one first"
        ) from None
