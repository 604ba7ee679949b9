"""Where a run's processes may live. What asks for no CPU stays beside the driver: no autoscaler takes that node."""

from __future__ import annotations

import math
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distributed_muzero.config import Config
from distributed_muzero.workers.builder import num_reanalysers


def beside_driver() -> dict[str, Any]:
    """Options of a remote class that has to live on the driver's node."""
    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def shard_options(config: Config) -> dict[str, Any]:
    """Beside the driver, where the run's folder is; or a CPU each, on whichever nodes share that folder."""
    if config.replay.spread_shards:
        return {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
    return beside_driver()


def gpu_share(config: Config, num_gpus: int) -> float:
    """Of a GPU, for each of the learner and the reanalysers that may use one: all of them find a place.

    A learner with several devices has whole ones, and the reanalysers share what is left.
    num_gpus: that the cluster has now. A device of `cuda` waits for a node that is yet to come.
    """
    devices = num_reanalysers(config) * [config.reanalyse.device]
    if config.learner.num_devices == 1:
        devices.append(config.learner.device)
    else:
        num_gpus = max(num_gpus - int(learner_gpus(config, num_gpus)), 0)
    on_gpu = sum(device != "cpu" for device in devices)
    num_gpus = max(num_gpus, int("cuda" in devices))
    return 1 / math.ceil(on_gpu / num_gpus) if num_gpus and on_gpu else 0


def learner_gpus(config: Config, num_gpus: int) -> float:
    """For the learner: one for each of its devices, or a share of one. All are on one node, as Ray places a process."""
    learner = config.learner
    if learner.device == "cpu" or (learner.device == "auto" and not num_gpus):
        return 0
    return learner.num_devices if learner.num_devices > 1 else gpu_share(config, num_gpus)
