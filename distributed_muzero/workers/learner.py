"""The learner: batches in, weights out."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distributed_muzero.algorithm.losses import LossWeights
from distributed_muzero.algorithm.training import add_row_gradients, training_step
from distributed_muzero.config import LearnerConfig
from distributed_muzero.errors import CheckpointError, ConfigError, NonFiniteError
from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.device import choose_devices, choose_dtype
from distributed_muzero.networks.flat import FlatWeights, packed
from distributed_muzero.replay.schema import Priorities
from distributed_muzero.types import Batch
from distributed_muzero.workers.data_parallel import IN_THE_VECTOR
from distributed_muzero.workers.learner_group import LearnerGroup, NetworkRecipe
from distributed_muzero.workers.run_state import LearnerReport, Version

ADAM = ("step", "exp_avg", "exp_avg_sq")


class Published(NamedTuple):
    version: int
    num_steps: int
    average: Tensor  # [P], never written to again
    made_at: float  # monotonic seconds


logger = logging.getLogger(__name__)

Arrays = Mapping[str, Mapping[str, np.ndarray]]  # file stem -> name -> array


class Learner:
    """One gradient step a batch on one vector of all weights, and the moving average of it that others play with."""

    def __init__(self, networks: Networks, config: LearnerConfig, recipe: NetworkRecipe | None = None):
        """recipe: of the networks, for the other processes of a learner with several devices; it is to be closed.

        Raises ConfigError for devices that aren't there.
        """
        self.config = config
        devices = choose_devices(config.device, "learner.device", config.num_devices)
        self.device = devices[0]
        torch.set_num_threads(config.num_threads)
        self.networks = networks.to(self.device).train()
        self.networks.compute_dtype = choose_dtype(config.compute_dtype, self.device)
        self.flat = FlatWeights(self.networks)
        self.optimizer = torch.optim.AdamW(
            [self.flat.vector], lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.average = self.flat.read()
        self.num_steps = 0
        self.version = 0
        self._publish()
        self._loss_weights = LossWeights(config.value_weight, config.reward_weight, config.policy_weight)
        self._group: LearnerGroup | None = None
        if len(devices) > 1:
            if recipe is None:
                raise ConfigError(
                    f"learner.num_devices is {len(devices)}: hand the learner a recipe, or make it with Builder"
                )
            self._group = LearnerGroup(self.networks, self.flat, devices, config, recipe)

    def close(self) -> None:
        """Ends the processes of its other devices, if it has any. May be called again; no step can follow."""
        if self._group is not None:
            self._group.close()

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
                self._group.add_gradients if self._group else add_row_gradients,
            )
        except NonFiniteError as error:
            raise NonFiniteError(
                f"learner step {self.num_steps}, run.seed in the run's config: {error}"
            ) from None
        self.num_steps += 1
        self._value_errors = losses.value_errors
        # A young average would hold on to the random start: its memory grows with the number of steps.
        decay = min(self.config.average_decay, self.num_steps / (self.num_steps + 10))
        self.average.lerp_(self.flat.read(), 1 - decay)
        if self.num_steps % self.config.publish_interval == 0:
            self.version += 1
            self._publish()
        return {
            "train/loss": float(losses.total.mean()),
            "train/value_loss": float(losses.value.mean()),
            "train/reward_loss": float(losses.reward.mean()),
            "train/policy_loss": float(losses.policy.mean()),
            "train/grad_norm": float(norm),
            "train/learning_rate": rate,
            "train/staleness": float(self.version - batch.weights_versions.mean()),
            **self._gpu_metrics(),
        }

    def _gpu_metrics(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        return {"train/gpu_bytes": float(torch.cuda.memory_allocated(self.device))}

    def priorities(self, batch: Batch) -> Priorities:
        """Of the batch that was learnt from last: how wrong the value of each of its rows was."""
        versions = np.full(len(batch.positions), self.version)
        steps = batch.positions[:, 1].astype(np.int32)
        return Priorities(batch.positions[:, 0], steps, self._value_errors.cpu().numpy(), versions)

    def learn(
        self, batches: Iterable[Batch], give_back: Callable[[int, Priorities], None] | None = None
    ) -> LearnerReport:
        """Steps on the batches until the next weights version is due, or there are no more.

        give_back: gets the shard of each batch and the new priorities of its rows.
        """
        version, first_step = self.version, self.num_steps
        sums: Counter[str] = Counter()
        for batch in batches:
            sums.update(self.step(batch))
            if give_back is not None:
                give_back(batch.shard, self.priorities(batch))
            if self.version > version:
                break
        steps = self.num_steps - first_step
        return LearnerReport(
            self.num_steps, self.version, {name: value / steps for name, value in sums.items()}
        )

    def _publish(self) -> None:
        """Sets a version aside, on the learner's device: whoever fetches it doesn't stop the learner."""
        self._published = Published(self.version, self.num_steps, self.average.clone(), time.monotonic())

    def weights(self) -> tuple[int, np.ndarray]:
        """The last published version and its weights [P], packed: the moving average, not the last step."""
        version, weights = self.give_out()
        return version.number, weights

    def give_out(self) -> tuple[Version, np.ndarray]:
        """As `weights`, with all that is known of the version. May be called while another thread steps."""
        published = self._published
        weights = packed(published.average, self.config.weights_dtype)
        age = time.monotonic() - published.made_at
        return Version(published.version, published.num_steps, weights.nbytes, age), weights

    def average_weights(self) -> np.ndarray:
        """The moving average as it is now [P] float32, which a checkpoint of now holds; published or not."""
        return _copy(self.average)

    def state(self) -> tuple[dict[str, Mapping[str, np.ndarray]], dict[str, Any]]:
        """All that later steps depend on: arrays by file and name, and plain values. Later steps don't change it.

        weights: the moving average that is published, by name.   optimizer: the raw weights as one vector, and Adam's.
        generators: the states of torch's generators, uint8.   buffers: those of the networks that a float32 vector
        would round (counts, flags), if there are any. Networks that keep more than parameters, buffers and torch's
        generators don't go on bit for bit.
        """
        adam = self.optimizer.state.get(self.flat.vector, {})
        arrays: dict[str, Mapping[str, np.ndarray]] = {
            "weights": self.flat.named_arrays(_copy(self.average)),
            "optimizer": {
                "vector": self.flat.read().cpu().numpy(),
                **{name: _copy(adam[name]) for name in ADAM if name in adam},
            },
            "generators": self._generators(),
        }
        if buffers := self._other_buffers():
            arrays["buffers"] = {name: _copy(buffer) for name, buffer in buffers.items()}
        return arrays, {
            "learner_steps": self.num_steps,
            "weights_version": self.version,
            "learner_config": self.config.model_dump(mode="json"),
        }

    def begin(self, arrays: Arrays | None, state: Mapping[str, Any] | None, min_version: int) -> None:
        """Goes on from a checkpoint, or anew without one; the version starts at `min_version` or later."""
        if arrays is not None and state is not None:
            self.restore(arrays, state)
        self.version = max(self.version, min_version)
        self._publish()

    def start_from(self, weights: np.ndarray, num_steps: int, version: int) -> None:
        """Goes on from published weights where no checkpoint was written yet; the optimizer starts anew."""
        self.flat.write(weights)
        self.average = self.flat.read()
        self.num_steps, self.version = num_steps, version
        self._publish()

    def restore(self, arrays: Arrays, state: Mapping[str, Any]) -> None:
        """Goes on from what `state()` gave.

        Files and keys of others are passed over. What a checkpoint of format 1 doesn't hold (generators, other
        buffers) stays as it is in a new learner. Raises CheckpointError, and changes nothing, when the arrays aren't
        of these networks.
        """
        self._check(arrays, state)
        saved = arrays["optimizer"]
        self.average = torch.from_numpy(self.flat.vector_of(arrays["weights"])).to(self.device)
        self.flat.write(saved["vector"])
        self.optimizer.state.clear()
        if "step" in saved:
            self.optimizer.state[self.flat.vector] = {
                # Adam keeps its step count as a tensor of its own, on the CPU unless it is fused on a GPU.
                name: torch.from_numpy(saved[name].copy()).to(self.device)
                for name in ADAM
            }
        if "buffers" in arrays:
            for name, buffer in self._other_buffers().items():
                buffer.copy_(torch.from_numpy(arrays["buffers"][name].copy()))
        self.num_steps = int(state["learner_steps"])
        self.version = int(state["weights_version"])
        self._publish()
        self._tell_what_changed(state.get("learner_config", {}))
        self._set_generators(arrays.get("generators", {}))

    def _check(self, arrays: Arrays, state: Mapping[str, Any]) -> None:
        for name in ("learner_steps", "weights_version"):
            if not isinstance(state.get(name), int):
                raise CheckpointError(
                    f"a learner's checkpoint needs a whole number {name}; got {state.get(name)!r}"
                )
        optimizer = arrays.get("optimizer", {})
        size, moments = (self.flat.size,), tuple(self.flat.vector.shape)
        wanted = {"vector": size, "step": (), "exp_avg": moments, "exp_avg_sq": moments}
        if not optimizer.keys() & ADAM:  # saved before the first step
            wanted = {"vector": size}
        _check_shapes("weights", arrays.get("weights", {}), dict(self.flat.layout))
        _check_shapes("optimizer", {name: optimizer[name] for name in wanted if name in optimizer}, wanted)
        if "buffers" in arrays:
            buffers = {name: tuple(buffer.shape) for name, buffer in self._other_buffers().items()}
            _check_shapes("buffers", arrays["buffers"], buffers)

    def _other_buffers(self) -> dict[str, Tensor]:
        """The networks' buffers whose exact values the vector of all weights doesn't hold."""
        named = self.networks.named_buffers()
        return {name: buffer for name, buffer in named if buffer.dtype not in IN_THE_VECTOR}

    def _generators(self) -> dict[str, np.ndarray]:
        states = {"cpu": torch.get_rng_state().numpy()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device).numpy()
        return states

    def _set_generators(self, saved: Mapping[str, np.ndarray]) -> None:
        try:
            if "cpu" in saved:
                torch.set_rng_state(torch.from_numpy(saved["cpu"].copy()))
            if "cuda" in saved and self.device.type == "cuda":
                torch.cuda.set_rng_state(torch.from_numpy(saved["cuda"].copy()), self.device)
        except (RuntimeError, TypeError) as error:
            logger.warning(
                "the generators of the checkpoint are of another torch; they start anew (%s)", error
            )

    def _tell_what_changed(self, saved: Mapping[str, Any]) -> None:
        now = self.config.model_dump(mode="json")
        changed = [
            f"{name} {saved[name]} → {now[name]}" for name in now if saved.get(name, now[name]) != now[name]
        ]
        if changed:
            logger.warning(
                "the learner goes on with other settings than its checkpoint's: %s", ", ".join(changed)
            )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        # Unlike from_numpy, it takes what the object store shares read-only; nothing here writes to it.
        return torch.from_dlpack(array).to(self.device, non_blocking=True)


def learning_rate(config: LearnerConfig, step: int) -> float:
    """Linear warm-up, then half a cosine from learning_rate down to final_learning_rate."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / config.decay_steps, 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * share


def _copy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", copy=True).numpy()


def _check_shapes(
    file: str, found: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> None:
    for name in (*expected, *sorted(found.keys() - expected.keys())):
        came = str(list(found[name].shape)) if name in found else "missing"
        wanted = str(list(expected[name])) if name in expected else "nothing of that name"
        if came != wanted:
            raise CheckpointError(
                f"the checkpoint doesn't fit these networks: {name} of its {file} is {came}, expected {wanted}; "
                "use the config that the run was trained with, or start a new run"
            )
