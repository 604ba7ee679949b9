"""What actors and shards count by themselves, through Ray: its node agents export it for Prometheus.

Ray gives every series the id of its process, and a prefix: `ray_distributed_muzero_actor_episodes_total`. So there are
few of them, with few buckets, and no labels besides the run: what is told of all processes together is the run's own
exporter's (observability/exporter.py).
"""

from __future__ import annotations

from ray.util.metrics import Counter, Histogram

from distributed_muzero.observability.metrics import PREFIX
from distributed_muzero.workers.run_state import ActorReport

# Name, of all processes of a kind -> what it counts
COUNTERS = {
    "actor_environment_steps": "environment steps that this actor played",
    "actor_episodes": "games that this actor finished",
    "actor_search_seconds": "time that this actor spent in searches (s)",
    "actor_waited_seconds": "time that shards held this actor back (s)",
    "shard_inserted_transitions": "transitions that this shard took",
    "shard_sampled_rows": "rows of batches that this shard gave",
}
INSERT_SECONDS = "shard_insert_seconds"
INSERT_HELP = "time from when this shard takes up an offer until it acknowledges it (s)"
BUCKETS = [0.003, 0.01, 0.03, 0.1, 1.0]


class ProcessMetrics:
    """Of one process of a run."""

    def __init__(self, run: str, kind: str):
        """kind: the prefix of its counters' names, actor or shard."""
        self._tags = {"run": run}
        self._counters = {
            name.removeprefix(f"{kind}_"): Counter(PREFIX + name, text, tag_keys=("run",))
            for name, text in COUNTERS.items()
            if name.startswith(f"{kind}_")
        }

    def add(self, **counts: float) -> None:
        for name, count in counts.items():
            if count > 0:
                self._counters[name].inc(count, self._tags)


class ActorMetrics(ProcessMetrics):
    def __init__(self, run: str):
        super().__init__(run, "actor")

    def add_report(self, report: ActorReport) -> None:
        self.add(
            environment_steps=report.env_steps,
            episodes=len(report.returns),
            search_seconds=report.search_seconds,
            waited_seconds=report.waited_seconds,
        )


class ShardMetrics(ProcessMetrics):
    def __init__(self, run: str):
        super().__init__(run, "shard")
        self._inserts = Histogram(PREFIX + INSERT_SECONDS, INSERT_HELP, BUCKETS, tag_keys=("run",))

    def add_insert(self, num_transitions: int, seconds: float) -> None:
        self.add(inserted_transitions=num_transitions)
        self._inserts.observe(seconds, self._tags)
