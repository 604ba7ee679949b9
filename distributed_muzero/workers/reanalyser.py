"""A reanalyser: stored episodes are searched anew with newer weights; the answers go back to their shards."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from distributed_muzero.algorithm.reanalyse import refresh
from distributed_muzero.algorithm.returns import signed_discount
from distributed_muzero.config import Config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.device import choose_device
from distributed_muzero.networks.flat import FlatWeights
from distributed_muzero.networks.inference import SearchModel, make_search_model
from distributed_muzero.replay.schema import StoredEpisode, Targets
from distributed_muzero.workers.run_state import ReanalyseReport

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = (
    0.005,
    0.08,
)  # between two rounds of shards that have nothing to give
GENERATOR_STREAM = 2**20  # keeps its generators apart from every actor's

Take = Callable[[int, int], list[StoredEpisode]]  # take(shard, max_transitions)
Put = Callable[[int, list[Targets]], int]  # put(shard, targets) -> how many episodes took them


class Reanalyser:
    """Refreshes episodes of all shards in turn, about `reanalyse.batch_size` transitions at a time.

    How much there is to refresh is for the shards to say (`reanalyse.ratio`).
    """

    def __init__(self, networks: Networks, config: Config, spec: EnvironmentSpec, index: int = 0):
        """Raises ConfigError if reanalyse.device is cuda and there is no GPU."""
        self.config = config
        self.device = choose_device(config.reanalyse.device, "reanalyse.device")
        self.version = -1
        self.search_model: SearchModel | None = None
        self._networks = networks.to(self.device)
        self._flat = FlatWeights(self._networks)
        self._discount = signed_discount(config.algorithm.discount, spec.num_players)
        self._rng = np.random.default_rng([config.run.seed, GENERATOR_STREAM + index])
        self._shard = index % config.replay.num_shards  # asked next; workers begin apart

    def set_weights(self, version: int, weights: np.ndarray) -> None:
        """Takes weights [P] of a newer version; others are ignored, so that versions never go back."""
        if version <= self.version:
            return
        self._flat.write(weights)
        self._networks.eval()
        self.search_model = make_search_model(self._networks)
        self.version = version

    def work(
        self, take: Take, put: Put, is_over: Callable[[], bool], sleep: Callable[[float], None]
    ) -> ReanalyseReport:
        """Refreshes until `is_over()`, asked before each shard. While no shard has work, it waits."""
        report = ReanalyseReport()
        wait_seconds = FIRST_WAIT_SECONDS
        num_shards = self.config.replay.num_shards
        num_idle = 0
        while not is_over():
            if stored := take(self._shard, self.config.reanalyse.batch_size):
                report.updated += put(self._shard, self.refresh(stored, report))
                num_idle, wait_seconds = 0, FIRST_WAIT_SECONDS
            else:
                num_idle += 1
            self._shard = (self._shard + 1) % num_shards
            if num_idle == num_shards:
                sleep(wait_seconds)
                num_idle, wait_seconds = 0, min(2 * wait_seconds, LONGEST_WAIT_SECONDS)
        return report

    def refresh(self, stored: list[StoredEpisode], report: ReanalyseReport) -> list[Targets]:
        """New targets of stored episodes, of the weights' version; what was searched is added to `report`."""
        assert self.search_model is not None, "set_weights() comes first"
        config = self.config
        num_simulations = config.reanalyse.num_simulations or config.search.num_simulations
        answers = refresh(
            [item.episode for item in stored],
            self.search_model,
            config.search,
            discount=self._discount,
            history_length=config.environment.history_length,
            batch_size=config.reanalyse.batch_size,
            num_simulations=num_simulations,
            noise=config.reanalyse.root_noise,
            rng=self._rng,
        )
        num_positions = sum(item.episode.num_steps for item in stored)
        report.positions += num_positions
        report.simulations += num_positions * num_simulations
        report.episodes += len(stored)
        return [
            Targets(item.key, self.version, policies, root_values)
            for item, (policies, root_values) in zip(stored, answers, strict=True)
        ]
