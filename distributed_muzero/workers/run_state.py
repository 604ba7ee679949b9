"""What is known of a run while it goes on: counts, rates, the last evaluation, and whether it is over.

The loop in one process and the driver of a cluster both feed one of these, so that both stop by the same rules and
report the same metrics.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from distributed_muzero.config import RunConfig
from distributed_muzero.observability.metrics import metric_of

T = TypeVar("T")

RETURNS_WINDOW = 100  # episodes in the mean return, as the field's tools report it


@dataclass
class ActorReport:
    """What an actor did since its last report."""

    env_steps: int = 0
    simulations: int = 0
    seconds: float = 0.0
    # of them, without playing: for a shard's answer, or for it to take games again
    waited_seconds: float = 0.0
    search_seconds: float = 0.0  # of them, in searches
    unacknowledged: int = 0  # finished episodes that it still holds
    weights_version: int = -1  # played with last
    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    # (stage that it was begun in, won) of games that ended, in the order in which they began
    results: list[tuple[int, bool]] = field(default_factory=list)
    last_rejection: str = ""


@dataclass
class LearnerReport:
    """What the learner did since its last report; `metrics` are means over its steps."""

    learner_steps: int = 0  # since the run began
    weights_version: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    waited_seconds: float = 0.0  # of them, for batches
    ready_batches: int = 0  # that wait for the learner now


class Version(NamedTuple):
    """One published version of the weights."""

    number: int
    learner_steps: int  # behind it
    num_bytes: int
    age_seconds: float  # from the learner's step until it was ready to be given out


class Ending(NamedTuple):
    """Why a launch is over."""

    reason: str  # in words
    was_stopped: bool = False  # by a person, before any limit of the run
    was_hurried: bool = False  # by a person, while it ended at a limit


STOPPED = Ending("a stop was asked for", True)


def outcome(turns: Generator[Any, None, T]) -> T:
    """Takes all turns; what the last one returned."""
    while True:
        try:
            next(turns)
        except StopIteration as over:
            return over.value


class Crew(NamedTuple):
    """Who is at work."""

    desired: int  # actors
    live: int = 0  # of them, those that play
    draining: int = 0  # actors that leave once their finished games are stored
    reanalysers: int = 0
    staleness: int = 0  # the learner's weights version minus the oldest one that an actor played with last
    unacknowledged: int = 0  # finished episodes that the actors still hold
    calls: int = 0  # to processes, not answered yet
    cpu_seconds: float | None = None  # of the driver's process, where there is one

    @property
    def pending(self) -> int:
        """Actors that wait for a node, or start."""
        return max(self.desired - self.live, 0)

    def metrics(self) -> dict[str, float]:
        states = {name: getattr(self, name) for name in ("desired", "live", "pending", "draining")}
        driver = {} if self.cpu_seconds is None else {"driver/cpu_seconds": self.cpu_seconds}
        return {
            **driver,
            **{f"actors/{name}": number for name, number in states.items()},
            "actors/staleness": self.staleness,
            "queue/episodes": self.unacknowledged,
            "queue/calls": self.calls,
        }


class Waiting(NamedTuple):
    """Seconds since the launch, of all actors together and of the learner, and those that each waited."""

    actor_seconds: float = 0.0
    actor_waited: float = 0.0
    learner_seconds: float = 0.0
    learner_waited: float = 0.0

    def since(self, before: Waiting) -> Waiting:
        return Waiting(*(now - then for now, then in zip(self, before, strict=True)))

    @property
    def actor_share(self) -> float:
        """Of their time, that the actors waited for the shards to take games."""
        return self.actor_waited / self.actor_seconds if self.actor_seconds > 0 else 0.0

    @property
    def learner_share(self) -> float:
        """Of its time, that the learner waited for batches."""
        return self.learner_waited / self.learner_seconds if self.learner_seconds > 0 else 0.0


@dataclass
class ReanalyseReport:
    """What a reanalyser did since its last report."""

    positions: int = 0  # searched
    simulations: int = 0
    episodes: int = 0  # refreshed
    updated: int = 0  # of them, those whose shard took the answer


class Steady:
    """Counts of processes that begin anew after a restart: a sum that falls goes on from where it stood."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._offset: dict[str, float] = {}

    def counts(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics, of which counters never fall."""
        return {
            name: self._steady(name, value) if metric_of(name)[0].kind == "counter" else value
            for name, value in metrics.items()
        }

    def _steady(self, name: str, value: float) -> float:
        fall = max(self._last.get(name, value) - value, 0)
        self._last[name] = value
        self._offset[name] = self._offset.get(name, 0) + fall
        return value + self._offset[name]


class RunState:
    def __init__(self, config: RunConfig, clock: Callable[[], float]):
        self.config = config
        self._clock = clock
        self._began = self._last_time = clock()
        self._last_counts = (0, 0, 0, 0)
        self._returns: deque[float] = deque(maxlen=RETURNS_WINDOW)
        self._lengths: deque[int] = deque(maxlen=RETURNS_WINDOW)
        self.env_steps = 0
        self.simulations = 0
        self.search_seconds = 0.0
        self.refreshed = 0
        self.episodes = 0
        self.learner = LearnerReport()
        self.evaluation: dict[str, Any] | None = None
        self.waiting = self._last_waiting = Waiting()
        self._shares = {"actors/waiting": 0.0, "train/waiting": 0.0}
        self._steady = Steady()

    @property
    def seconds(self) -> float:
        return self._clock() - self._began

    @property
    def last_returns(self) -> list[float]:
        """Of the last episodes, RETURNS_WINDOW at most."""
        return list(self._returns)

    @property
    def last_lengths(self) -> list[int]:
        return list(self._lengths)

    def add_actor_report(self, report: ActorReport) -> None:
        self.env_steps += report.env_steps
        self.simulations += report.simulations
        self.search_seconds += report.search_seconds
        self.waiting = self.waiting._replace(
            actor_seconds=self.waiting.actor_seconds + report.seconds,
            actor_waited=self.waiting.actor_waited + report.waited_seconds,
        )
        self.episodes += len(report.returns)
        self._returns.extend(report.returns)
        self._lengths.extend(report.lengths)

    def add_reanalyse_report(self, report: ReanalyseReport) -> None:
        self.refreshed += report.positions
        self.simulations += report.simulations

    def restore(self, env_steps: int, episodes: int, learner_steps: int, weights_version: int) -> None:
        """Goes on counting where an earlier launch of the run stood."""
        self.env_steps, self.episodes = env_steps, episodes
        self.learner = LearnerReport(learner_steps, weights_version)
        self._last_counts = (env_steps, 0, learner_steps, 0)

    def add_learner_report(self, report: LearnerReport) -> None:
        # A learner that could not step has nothing new to say of its losses.
        self.learner = LearnerReport(
            report.learner_steps,  # fewer, when a lost learner went on from its checkpoint
            max(report.weights_version, self.learner.weights_version),
            report.metrics or self.learner.metrics,
            ready_batches=report.ready_batches,
        )
        self.waiting = self.waiting._replace(
            learner_seconds=self.waiting.learner_seconds + report.seconds,
            learner_waited=self.waiting.learner_waited + report.waited_seconds,
        )

    @property
    def has_reached_goal(self) -> bool:
        """Whether the last evaluation reached `stop_at_return`."""
        goal = self.config.stop_at_return
        return goal is not None and self.evaluation is not None and self.evaluation["mean_return"] >= goal

    @property
    def is_out_of_time(self) -> bool:
        limit = self.config.max_minutes
        return limit is not None and self.seconds >= 60 * limit

    def stop_reason(self) -> str | None:
        """Why the run is over, in words; None while it isn't."""
        limits = self.config
        if limits.max_env_steps is not None and self.env_steps >= limits.max_env_steps:
            return (
                f"{self.env_steps} environment steps were played (run.max_env_steps {limits.max_env_steps})"
            )
        if limits.max_train_steps is not None and self.learner.learner_steps >= limits.max_train_steps:
            steps = self.learner.learner_steps
            return f"{steps} learner steps were made (run.max_train_steps {limits.max_train_steps})"
        if self.is_out_of_time:
            return f"{limits.max_minutes:g} minutes are over"
        if self.has_reached_goal and self.evaluation is not None:
            return f"an evaluation reached a mean return of {self.evaluation['mean_return']:.1f}"
        return None

    def metrics(self, shards: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """All of the run's metrics under their public names; rates are over the time since the last call."""
        now = self._clock()
        counts = (self.env_steps, self.simulations, self.learner.learner_steps, self.refreshed)
        interval = max(now - self._last_time, 1e-9)
        env_rate, simulation_rate, learner_rate, refresh_rate = (
            # Fewer learner steps, when a lost learner went on from its checkpoint, are no negative rate.
            max(count - last, 0) / interval
            for count, last in zip(counts, self._last_counts, strict=True)
        )
        self._last_time, self._last_counts = now, counts
        waiting, self._last_waiting = self.waiting.since(self._last_waiting), self.waiting
        # Who waits for an answer, or searches for long, reports nothing meanwhile: what was last known still holds.
        if waiting.actor_seconds > 0:
            self._shares["actors/waiting"] = waiting.actor_share
        if waiting.learner_seconds > 0:
            self._shares["train/waiting"] = waiting.learner_share
        metrics = {
            "time/seconds": self.seconds,
            "rollout/env_steps": self.env_steps,
            "rollout/env_steps_per_second": env_rate,
            "rollout/episodes": self.episodes,
            "search/simulations": self.simulations,
            "search/simulations_per_second": simulation_rate,
            "search/seconds": self.search_seconds,
            "train/learner_steps": self.learner.learner_steps,
            "train/learner_steps_per_second": learner_rate,
            **self._shares,
            "actors/waited_seconds": self.waiting.actor_waited,
            "train/waited_seconds": self.waiting.learner_waited,
            "queue/batches": self.learner.ready_batches,
            "reanalyse/positions": self.refreshed,
            "reanalyse/positions_per_second": refresh_rate,
            "weights/version": self.learner.weights_version,
            **self.learner.metrics,
            **self._steady.counts(replay_metrics(shards, self.learner.weights_version)),
        }
        if self._returns:
            metrics["rollout/ep_rew_mean"] = sum(self._returns) / len(self._returns)
            metrics["rollout/ep_len_mean"] = sum(self._lengths) / len(self._lengths)
        return metrics


SUMS = (
    "transitions",
    "episodes",
    "bytes",
    "inserted_transitions",
    "sampled_rows",
    "evicted_transitions",
    "rejected_episodes",
    "duplicates",
    "ignored_priorities",
    "log_bytes",
    "log_failures",
    "corrupt_records",
    "limited/inserts",
    "limited/samples",
)


def replay_metrics(shards: Sequence[Mapping[str, float]], newest_version: int) -> dict[str, float]:
    """The sums of the shards' counts, the ratio that their limiters hold, and the age of the oldest game."""
    total: dict[str, float] = {}
    for stats in shards:
        for name, value in stats.items():
            total[name] = total.get(name, 0) + value
    if not total:
        return {}
    reasons = [name for name in total if name.startswith("rejects/")]
    oldest = min((shard["oldest_version"] for shard in shards if "oldest_version" in shard), default=None)
    return {
        **{f"replay/{name}": total[name] for name in (*SUMS, *reasons)},
        **({} if oldest is None else {"replay/age": newest_version - oldest}),
        "queue/inserts": total["pending_transitions"],
        "replay/samples_per_insert": total["sampled_rows"] / max(total["inserted_transitions"], 1),
    }
