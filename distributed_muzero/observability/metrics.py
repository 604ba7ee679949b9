"""Every metric of a run, defined once. The names are those that the field's tools use."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, NamedTuple


class Metric(NamedTuple):
    name: str  # in metrics.jsonl and TensorBoard
    unit: str
    help: str
    kind: Literal["counter", "gauge"]  # a counter only grows


# fmt: off
_ALL = (
    Metric("rollout/ep_rew_mean", "return", "mean return of the last 100 games played for training", "gauge"),
    Metric("rollout/ep_len_mean", "steps", "mean length of the last 100 games played for training", "gauge"),
    Metric("rollout/env_steps", "steps", "environment steps played", "counter"),
    Metric("rollout/env_steps_per_second", "steps/s", "environment steps played a second", "gauge"),
    Metric("rollout/episodes", "episodes", "games finished", "counter"),
    Metric("search/simulations_per_second", "simulations/s", "simulations of all searches a second", "gauge"),
    Metric("train/learner_steps", "steps", "gradient steps", "counter"),
    Metric("train/learner_steps_per_second", "steps/s", "gradient steps a second", "gauge"),
    Metric("train/loss", "nats", "weighted sum of the losses", "gauge"),
    Metric("train/value_loss", "nats", "loss of the values, unweighted", "gauge"),
    Metric("train/reward_loss", "nats", "loss of the rewards, unweighted", "gauge"),
    Metric("train/policy_loss", "nats", "loss of the policies, unweighted", "gauge"),
    Metric("train/grad_norm", "1", "norm of the gradient before it is clipped", "gauge"),
    Metric("train/learning_rate", "1", "learning rate of the last step", "gauge"),
    Metric("train/waiting", "1", "share of its time that the learner waited for batches", "gauge"),
    Metric("train/staleness", "versions", "learner's weights version minus the sampled games'", "gauge"),
    Metric("replay/transitions", "transitions", "transitions stored now", "gauge"),
    Metric("replay/episodes", "episodes", "episodes stored now", "gauge"),
    Metric("replay/samples_per_insert", "1", "sampled rows for each transition inserted", "gauge"),
    Metric("replay/evicted_transitions", "transitions", "transitions dropped for new ones", "counter"),
    Metric("replay/rejected_episodes", "episodes", "episodes refused by validation", "counter"),
    Metric("replay/duplicates", "episodes", "episodes offered again and stored once", "counter"),
    Metric("replay/ignored_priorities", "steps", "priorities of steps gone, or outdated", "counter"),
    Metric("replay/log_bytes", "bytes", "size of the shards' logs on disk", "gauge"),
    Metric("replay/log_failures", "writes", "writes that the disk refused", "counter"),
    Metric("replay/corrupt_records", "records", "damaged records and torn tails met on start", "gauge"),
    Metric("reanalyse/positions", "positions", "stored positions searched anew", "counter"),
    Metric("reanalyse/positions_per_second", "positions/s", "stored positions searched anew a second", "gauge"),
    Metric("time/seconds", "s", "time since the run began, or went on", "counter"),
    Metric("weights/version", "versions", "last published version of the weights", "counter"),
    Metric("actors/desired", "actors", "actors asked for", "gauge"),
    Metric("actors/live", "actors", "actors at work", "gauge"),
    Metric("actors/pending", "actors", "actors that wait for a node, or start", "gauge"),
    Metric("actors/draining", "actors", "actors that leave once their games are stored", "gauge"),
    Metric("actors/waiting", "1", "share of their time that shards held the actors back", "gauge"),
    Metric("actors/staleness", "versions", "newest weights version minus the oldest one played with", "gauge"),
    Metric("actors/undelivered_episodes", "episodes", "finished games lost with actors that ended", "counter"),
    Metric("actors/restarts", "actors", "actors that were replaced", "counter"),
    Metric("copy/seconds_since_push", "s", "time since the oldest copy at a URI was up to date", "gauge"),
    Metric("copy/failures", "pushes", "attempts to copy to a URI that failed", "counter"),
    Metric("eval/mean_return", "return", "mean return of the last evaluation, without noise", "gauge"),
    Metric("eval/std_return", "return", "standard deviation of the last evaluation's returns", "gauge"),
)
# fmt: on

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def check_known(names: Iterable[str]) -> None:
    """Raises ValueError for a name that isn't in METRICS."""
    for name in names:
        if name not in METRICS:
            close = difflib.get_close_matches(name, METRICS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"unknown metric {name!r}{hint}; metrics are defined in observability/metrics.py"
            )
