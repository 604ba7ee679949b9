"""The learner: batches in, weights out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from distributed_muzero.algorithm.losses import LossWeights
from distributed_muzero.algorithm.training import training_step
from distributed_muzero.config import LearnerConfig
from distributed_muzero.errors import ConfigError, NonFiniteError
from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.flat import FlatWeights
from distributed_muzero.types import Batch
from distributed_muzero.workers.run_state import LearnerReport


class Learner:
    """One gradient step a batch on one vector of all weights, and the moving average of it that others play with."""

    def __init__(self, networks: Networks, config: LearnerConfig):
        self.config = config
        self.device = choose_device(config.device)
        torch.set_num_threads(config.num_threads)
        self.networks = networks.to(self.device).train()
        self.flat = FlatWeights(self.networks)
        self.optimizer = torch.optim.AdamW(
            [self.flat.vector], lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.average = self.flat.read()
        self.num_steps = 0
        self.version = 0
        self._loss_weights = LossWeights(config.value_weight, config.reward_weight, config.policy_weight)

    def step(self, batch: Batch) -> dict[str, float]:
        """Learns from a batch and returns its metrics (means over the batch)."""
        rate = learning_rate(self.config, self.num_steps)
        self.optimizer.param_groups[0]["lr"] = rate
        targets = (
            self._tensor(batch.observations),
            self._tensor(batch.target_actions).long(),
            self._tensor(batch.target_policies),
            self._tensor(batch.target_returns),
            self._tensor(batch.target_rewards),
        )
        try:
            losses, norm = training_step(
                self.networks,
                targets,
                self._tensor(batch.importance_weights),
                self.optimizer,
                [self.flat.vector],
                self._loss_weights,
                self.config.max_grad_norm,
            )
        except NonFiniteError as error:
            raise NonFiniteError(
                f"learner step {self.num_steps}, run.seed in the run's config: {error}"
            ) from None
        self.num_steps += 1
        # A young average would hold on to the random start: its memory grows with the number of steps.
        decay = min(self.config.average_decay, self.num_steps / (self.num_steps + 10))
        self.average.lerp_(self.flat.read(), 1 - decay)
        if self.num_steps % self.config.publish_interval == 0:
            self.version += 1
        return {
            "train/loss": float(losses.total.mean()),
            "train/value_loss": float(losses.value.mean()),
            "train/reward_loss": float(losses.reward.mean()),
            "train/policy_loss": float(losses.policy.mean()),
            "train/grad_norm": float(norm),
            "train/learning_rate": rate,
            "train/staleness": float(self.version - batch.weights_versions.mean()),
        }

    def learn(self, batches: Iterable[Batch]) -> LearnerReport:
        """Steps on the batches until the next weights version is due, or there are no more."""
        version, first_step = self.version, self.num_steps
        sums: Counter[str] = Counter()
        for batch in batches:
            sums.update(self.step(batch))
            if self.version > version:
                break
        steps = self.num_steps - first_step
        return LearnerReport(
            self.num_steps, self.version, {name: value / steps for name, value in sums.items()}
        )

    def weights(self) -> tuple[int, np.ndarray]:
        """The current version and its weights [P] float32: the moving average, not the last step."""
        return self.version, self.average.cpu().numpy().copy()

    def state(self) -> tuple[dict[str, Mapping[str, np.ndarray]], dict[str, Any]]:
        """What a checkpoint needs: arrays by file and name, and plain numbers. Later steps don't change it."""
        adam = self.optimizer.state.get(self.flat.vector, {})
        arrays: dict[str, Mapping[str, np.ndarray]] = {
            "weights": self.flat.named_arrays(self.average.cpu().numpy().copy()),
            "optimizer": {
                "vector": self.flat.read().cpu().numpy(),
                **{name: value.detach().cpu().numpy().copy() for name, value in adam.items()},
            },
        }
        return arrays, {"learner_steps": self.num_steps, "weights_version": self.version}

    def start_from(self, weights: np.ndarray, num_steps: int, version: int) -> None:
        """Goes on from published weights where no checkpoint was written yet; the optimizer starts anew."""
        self.flat.write(weights)
        self.average = self.flat.read()
        self.num_steps, self.version = num_steps, version

    def restore(
        self, arrays: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any], min_version: int = 0
    ) -> None:
        """Goes on from what `state()` gave. The version starts at `min_version` or later, so it never goes back."""
        self.average = torch.from_numpy(self.flat.vector_of(arrays["weights"])).to(self.device)
        adam = dict(arrays["optimizer"])
        self.flat.write(adam.pop("vector"))
        if adam:
            self.optimizer.state[self.flat.vector] = {
                # Adam keeps its step count as a tensor of its own, on the CPU unless it is fused on a GPU.
                name: torch.from_numpy(value.copy()).to(self.device)
                for name, value in adam.items()
            }
        self.num_steps = int(state["learner_steps"])
        self.version = max(int(state["weights_version"]), min_version)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        # What comes through the object store is read-only; torch only warns, and nothing here writes to it.
        array = array if array.flags.writeable else array.copy()
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def learning_rate(config: LearnerConfig, step: int) -> float:
    """Linear warm-up, then half a cosine from learning_rate down to final_learning_rate."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / config.decay_steps, 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * share


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU if torch sees one. Raises ConfigError when cuda is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("learner.device is cuda, but torch sees no GPU here; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
