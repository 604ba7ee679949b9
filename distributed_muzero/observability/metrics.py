"""Every metric of a run, defined once. The names are those that the field's tools use.

A metric with a label stands for several numbers: `restarts` with the label `role` is recorded as `restarts/actor`,
`restarts/learner` and so on, and exported as one Prometheus metric with one series for each.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

PREFIX = "distributed_muzero_"  # of every name in Prometheus


class Metric(NamedTuple):
    name: str  # in metrics.jsonl and TensorBoard
    exported: str  # in Prometheus, behind PREFIX; a counter gets `_total` there
    unit: str
    help: str
    kind: Literal["counter", "gauge"] = "gauge"  # a counter only grows while its launch lasts
    label: str = ""


# fmt: off
_ALL = (
    Metric("rollout/ep_rew_mean", "episode_return_mean", "return", "mean return of the last 100 games played for training"),
    Metric("rollout/ep_len_mean", "episode_length_mean", "steps", "mean length of the last 100 games played for training"),
    Metric("rollout/env_steps", "environment_steps", "steps", "environment steps played", "counter"),
    Metric("rollout/env_steps_per_second", "environment_steps_per_second", "steps/s", "environment steps played a second"),
    Metric("rollout/episodes", "episodes", "episodes", "games finished", "counter"),
    Metric("search/simulations", "simulations", "simulations", "simulations of all searches of this launch", "counter"),
    Metric("search/simulations_per_second", "simulations_per_second", "simulations/s", "simulations of all searches a second"),
    Metric("search/seconds", "search_seconds", "s", "time that actors spent in searches, all together", "counter"),
    Metric("train/learner_steps", "learner_steps", "steps", "gradient steps behind the current weights"),
    Metric("train/learner_steps_per_second", "learner_steps_per_second", "steps/s", "gradient steps a second"),
    Metric("train/loss", "learner_loss", "nats", "weighted sum of the losses"),
    Metric("train/value_loss", "learner_value_loss", "nats", "loss of the values, unweighted"),
    Metric("train/reward_loss", "learner_reward_loss", "nats", "loss of the rewards, unweighted"),
    Metric("train/policy_loss", "learner_policy_loss", "nats", "loss of the policies, unweighted"),
    Metric("train/grad_norm", "learner_gradient_norm", "1", "norm of the gradient before it is clipped"),
    Metric("train/learning_rate", "learner_learning_rate", "1", "learning rate, mean over the last steps"),
    Metric("train/waiting", "learner_waiting_ratio", "1", "share of its time that the learner waited for batches"),
    Metric("train/waited_seconds", "learner_waited_seconds", "s", "time that the learner waited for batches", "counter"),
    Metric("train/staleness", "learner_staleness_versions", "versions", "learner's weights version minus the sampled games'"),
    Metric("train/gpu_bytes", "learner_gpu_bytes", "bytes", "memory that the learner's tensors take on its GPU"),
    Metric("replay/transitions", "replay_transitions", "transitions", "transitions stored now"),
    Metric("replay/episodes", "replay_episodes", "episodes", "episodes stored now"),
    Metric("replay/bytes", "replay_bytes", "bytes", "memory of the stored episodes"),
    Metric("replay/age", "replay_age_versions", "versions", "newest weights version minus the one of the oldest stored game"),
    Metric("replay/samples_per_insert", "replay_samples_per_insert", "1", "sampled rows for each transition inserted"),
    Metric("replay/inserted_transitions", "replay_inserted_transitions", "transitions", "transitions ever inserted", "counter"),
    Metric("replay/sampled_rows", "replay_sampled_rows", "rows", "rows of batches ever sampled", "counter"),
    Metric("replay/evicted_transitions", "replay_evicted_transitions", "transitions", "transitions dropped for new ones", "counter"),
    Metric("replay/rejected_episodes", "replay_rejected_episodes", "episodes", "episodes refused by validation", "counter"),
    Metric("replay/rejects", "replay_rejects", "episodes", "episodes refused by validation, by what was wrong", "counter", "reason"),
    Metric("replay/limited", "replay_limited", "calls", "calls that the limiter sent away: inserts, or samples", "counter", "side"),
    Metric("replay/duplicates", "replay_duplicates", "episodes", "episodes offered again and stored once", "counter"),
    Metric("replay/ignored_priorities", "replay_ignored_priorities", "steps", "priorities of steps gone, or outdated", "counter"),
    Metric("replay/log_bytes", "replay_log_bytes", "bytes", "size of the shards' logs on disk"),
    Metric("replay/log_failures", "replay_log_failures", "writes", "writes that the disk refused", "counter"),
    Metric("replay/corrupt_records", "replay_corrupt_records", "records", "damaged records and torn tails met on start"),
    Metric("reanalyse/positions", "reanalysed_positions", "positions", "stored positions searched anew", "counter"),
    Metric("reanalyse/positions_per_second", "reanalysed_positions_per_second", "positions/s", "stored positions searched anew a second"),
    Metric("time/seconds", "run_seconds", "s", "time since the run began, or went on", "counter"),
    Metric("weights/version", "weights_version", "versions", "last published version of the weights"),
    Metric("weights/bytes", "weights_bytes", "bytes", "size of one published version"),
    Metric("weights/publish_seconds", "weights_publish_seconds", "s", "from the learner's step to its weights being ready for actors, last version"),
    Metric("checkpoint/seconds", "checkpoint_seconds", "s", "time that writing the last checkpoint took"),
    Metric("checkpoint/age_seconds", "checkpoint_age_seconds", "s", "time since the last checkpoint was written, or the launch began"),
    Metric("actors", "actors", "actors", "actors by state: desired, live, pending (wait for a node, or start), draining (deliver their last games)", label="state"),
    Metric("actors/waiting", "actors_waiting_ratio", "1", "share of their time that shards held the actors back"),
    Metric("actors/waited_seconds", "actors_waited_seconds", "s", "time that shards held the actors back, all together", "counter"),
    Metric("actors/staleness", "actors_staleness_versions", "versions", "newest weights version minus the oldest one played with"),
    Metric("actors/undelivered_episodes", "undelivered_episodes", "episodes", "finished games that leaving actors could not deliver", "counter"),
    Metric("queue", "queue_length", "items", "what waits: episodes with actors, transitions at shards for the disk, batches with the learner, calls of the driver", label="queue"),
    Metric("restarts", "restarts", "processes", "processes that were replaced", "counter", "role"),
    Metric("driver/cpu_seconds", "driver_cpu_seconds", "s", "processor time of the driver's process, where there is one", "counter"),
    Metric("disk/free_bytes", "disk_free_bytes", "bytes", "room left on the disk of the run's folder"),
    Metric("copy/seconds_since_push", "copy_age_seconds", "s", "time since the oldest copy at a URI was up to date"),
    Metric("copy/interval_seconds", "copy_interval_seconds", "s", "time that is left between two copies to a URI"),
    Metric("copy/failures", "copy_failures", "pushes", "attempts to copy to a URI that failed", "counter"),
    Metric("eval/mean_return", "evaluation_return_mean", "return", "mean return of the last evaluation, without noise"),
    Metric("eval/std_return", "evaluation_return_stddev", "return", "standard deviation of the last evaluation's returns"),
    Metric("eval/score", "evaluation_score", "1", "points a game of the last evaluation against its opponent: a win 1, a draw 0.5; of two players"),
    Metric("eval/solved", "evaluation_solved", "1", "share of the last evaluation's games that were won; of one player, where a game is won or not"),
    Metric("eval/elo", "evaluation_elo", "Elo points", "rating of the last evaluation by games against earlier checkpoints, of which the first has 0; of two players"),
    Metric("curriculum/stage", "curriculum_stage", "stages", "present stage of the curriculum, from 1"),
    Metric("curriculum/stages", "curriculum_stages", "stages", "stages that the curriculum has"),
    Metric("curriculum/win_rate", "curriculum_win_rate", "1", "share of won games among the last ones of the present stage, with noise"),
    Metric("league/members", "league_members", "checkpoints", "earlier checkpoints that the next evaluation meets; of two players"),
    Metric("league/lost_members", "league_lost_members", "checkpoints", "members of the league whose checkpoint was gone or damaged", "counter"),
)
# fmt: on

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
OF_AN_EVALUATION = ("mean_return", "std_return", "score", "solved", "elo")


def metric_of(name: str) -> tuple[Metric, str]:
    """The metric that a recorded name belongs to, and the value of its label (or nothing).

    Raises ValueError for a name that isn't in METRICS.
    """
    if name in METRICS and not METRICS[name].label:
        return METRICS[name], ""
    base, _, value = name.rpartition("/")
    if value and base in METRICS and METRICS[base].label:
        return METRICS[base], value
    close = difflib.get_close_matches(name, METRICS, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown metric {name!r}{hint}; metrics are defined in observability/metrics.py")


def evaluation_metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """An evaluation's numbers by their recorded names; a game of one player has neither score nor Elo, one of two no `solved`."""
    return {f"eval/{name}": float(evaluation[name]) for name in OF_AN_EVALUATION if name in evaluation}


def check_known(names: Iterable[str]) -> None:
    """Raises ValueError for a name that isn't in METRICS."""
    for name in names:
        metric_of(name)
