"""The whole loop in one process, without Ray: for tests, for debugging, for tiny machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from distributed_muzero.config import Config
from distributed_muzero.environments.registry import make_environment
from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.registry import make_networks
from distributed_muzero.types import Episode
from distributed_muzero.workers.actor import Actor
from distributed_muzero.workers.evaluator import Evaluator
from distributed_muzero.workers.learner import Learner
from distributed_muzero.workers.replay_shard import ReplayShard


def build_networks(config: Config) -> Networks:
    """Networks that fit the environment; the same seed gives the same start everywhere."""
    env = make_environment(config.environment)
    try:
        return make_networks(env.spec, config.environment.history_length, config.network, config.run.seed)
    finally:
        env.close()
