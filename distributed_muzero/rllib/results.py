"""What a run counts, under the names of RLlib's results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distributed_muzero.workers.run_state import RunState

# Of the learner's metrics (docs/metrics.md): name there -> name in RLlib's `learners/default_policy`
LEARNER_NAMES = {
    "train/loss": "total_loss",
    "train/value_loss": "vf_loss",
    "train/policy_loss": "policy_loss",
    "train/reward_loss": "reward_loss",
    "train/grad_norm": "gradients_default_optimizer_global_norm",
    "train/learning_rate": "default_optimizer_learning_rate",
}


class Counts(NamedTuple):
    """How far a run is."""

    env_steps: int = 0
    episodes: int = 0
    learner_steps: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, state: RunState, seconds: float) -> Counts:
        return cls(state.env_steps, state.episodes, state.learner.learner_steps, seconds)

    def since(self, before: Counts) -> Counts:
        return Counts(
            self.env_steps - before.env_steps,
            self.episodes - before.episodes,
            self.learner_steps - before.learner_steps,
            self.seconds - before.seconds,
        )


def result(
    state: RunState, now: Counts, before: Counts, batch_size: int, num_live: int, status: Mapping[str, Any]
) -> dict[str, Any]:
    """Of one iteration.   before: how far the run was when it began.   num_live: actors.   status: the last one."""
    this = now.since(before)
    rows = this.learner_steps * batch_size
    metrics = state.learner.metrics
    learner = {name: metrics[ours] for ours, name in LEARNER_NAMES.items() if ours in metrics}
    return {
        "env_runners": {
            **of_episodes(state.last_returns, state.last_lengths),
            "num_env_steps_sampled": this.env_steps,
            "num_env_steps_sampled_lifetime": now.env_steps,
            "num_episodes": this.episodes,
            "num_episodes_lifetime": now.episodes,
        },
        "learners": {
            "default_policy": {
                **learner,
                "num_module_steps_trained": rows,
                "num_module_steps_trained_lifetime": now.learner_steps * batch_size,
                "module_train_batch_size_mean": batch_size,
            },
            "__all_modules__": {
                "num_env_steps_trained": rows,
                "num_env_steps_trained_lifetime": now.learner_steps * batch_size,
            },
        },
        "num_env_steps_sampled_lifetime": now.env_steps,
        "num_env_steps_sampled_lifetime_throughput": this.env_steps / max(this.seconds, 1e-9),
        "num_grad_updates_lifetime": now.learner_steps,
        "fault_tolerance": {
            "num_healthy_workers": num_live,
            "num_remote_worker_restarts": status.get("restarts", 0),
        },
        "samples_per_insert": status.get("samples_per_insert"),
    }


def of_episodes(returns: Sequence[float], lengths: Sequence[int] = ()) -> dict[str, float]:
    """Means, the least and the most; NaN where no episode has ended, as in RLlib."""
    values = {"return": returns, "len": lengths}
    found = {}
    for what, numbers in values.items():
        if numbers or what == "return":
            found[f"episode_{what}_mean"] = sum(numbers) / len(numbers) if numbers else math.nan
            found[f"episode_{what}_min"] = min(numbers, default=math.nan)
            found[f"episode_{what}_max"] = max(numbers, default=math.nan)
    return found
