"""From a config to the parts of a run; the same call works in any process.

Only the parts with networks import torch, when they are made: a replay shard's process stays a third of the size.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distributed_muzero.config import Config
from distributed_muzero.environments.base import Environment
from distributed_muzero.environments.registry import make_environment
from distributed_muzero.workers.curriculum import make_stage
from distributed_muzero.workers.replay_shard import ReplayShard

if TYPE_CHECKING:
    from distributed_muzero.networks.base import Networks
    from distributed_muzero.workers.actor import Actor
    from distributed_muzero.workers.evaluator import Evaluator
    from distributed_muzero.workers.learner import Learner
    from distributed_muzero.workers.reanalyser import Reanalyser


class Builder:
    """Makes the parts of a run from its config. The same seed makes the same networks in every process."""

    def __init__(self, config: Config, run_name: str):
        self.config = config
        self.run_name = run_name
        probe = self.environment()
        self.spec = probe.spec
        probe.close()

    def environment(self) -> Environment:
        """What `environment` names: with a curriculum, what evaluations play."""
        return make_environment(self.config.environment)

    def stage_environment(self, stage: int) -> Environment:
        """Of a stage of the curriculum, from 0. Raises ConfigError and EnvironmentFailure for one that can't be."""
        return make_stage(self.config, stage, self.spec)

    def check_stages(self) -> None:
        """Makes an environment of each stage. Raises ConfigError and EnvironmentFailure."""
        for stage in range(len(self.config.stages)):
            self.stage_environment(stage).close()

    def networks(self) -> Networks:
        from distributed_muzero.networks.registry import make_networks

        config = self.config
        return make_networks(self.spec, config.environment.history_length, config.network, config.run.seed)

    def actor(self, index: int, incarnation: int) -> Actor:
        from distributed_muzero.workers.actor import Actor

        make_envs = [partial(self.stage_environment, stage) for stage in range(len(self.config.stages))]
        return Actor(make_envs, self.networks(), self.config, self.run_name, index, incarnation)

    def learner(self) -> Learner:
        from distributed_muzero.workers.learner import Learner
        from distributed_muzero.workers.learner_group import NetworkRecipe

        config = self.config
        recipe = NetworkRecipe(self.spec, config.environment.history_length, config.network)
        return Learner(self.networks(), config.learner, recipe)

    def reanalyser(self, index: int) -> Reanalyser:
        from distributed_muzero.workers.reanalyser import Reanalyser

        return Reanalyser(self.networks(), self.config, self.spec, index)

    def reanalysers(self) -> list[Reanalyser]:
        """All that the config asks for: none where nothing is searched anew."""
        return [self.reanalyser(index) for index in range(num_reanalysers(self.config))]

    def evaluator(self) -> Evaluator:
        if self.spec.num_players == 2:
            from distributed_muzero.workers.match_evaluator import MatchEvaluator

            return MatchEvaluator(self.environment, self.networks, self.config)
        from distributed_muzero.workers.evaluator import Evaluator

        return Evaluator(self.environment, self.networks(), self.config)

    def replay_shard(self, index: int, folder: Path) -> ReplayShard:
        """The shard, from what lies under the run's replay `folder`."""
        return ReplayShard(self.spec, self.config, index, folder / f"shard_{index}")


def num_reanalysers(config: Config) -> int:
    return config.reanalyse.num_workers if config.reanalyse.ratio > 0 else 0
