"""Registers environments with Tune, as a user's script does, and has them made in another process of the job."""

from __future__ import annotations

import json
import sys

import gymnasium
import ray
from ray import tune

from distributed_muzero.config import make_config
from distributed_muzero.errors import DistributedMuZeroError
from distributed_muzero.workers.builder import Builder


@ray.remote
def made(name: str) -> dict[str, object]:
    try:
        spec = Builder(make_config({"environment": {"id": f"rllib:{name}"}}), "run").spec
    except DistributedMuZeroError as error:
        return {"error": str(error)}
    heavy = [module for module in ("ray.rllib", "ray.tune", "torch") if module in sys.modules]
    return {"num_actions": spec.num_actions, "loaded": heavy}


if __name__ == "__main__":
    tune.register_env("early", lambda config: gymnasium.make("CartPole-v1"))
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
    tune.register_env("late", lambda config: gymnasium.make("Acrobot-v1"))
    print(json.dumps(ray.get([made.remote(name) for name in ("early", "late", "never")])))
