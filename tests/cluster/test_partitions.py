"""Processes that hang, in a run that plays and learns (P6, P7, P9)."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from tests.cluster.nodes import LOOSE, SLOW_CHAIN, ClusterRun, Nodes, connected_nodes, played_after, run_in

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.faults]

HUNG_SECONDS = 20.0
TIMEOUT_SECONDS = 30  # the least that actor.timeout_seconds may be


@pytest.fixture(scope="module")
def four_cpus() -> Iterator[Nodes]:
    with connected_nodes(4) as nodes:
        yield nodes


@contextmanager
def frozen(*processes: psutil.Process) -> Iterator[None]:
    """They neither answer nor end meanwhile."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            if process.is_running():
                process.send_signal(signal.SIGCONT)


def steps_a_second(run: ClusterRun, begin: float, end: float) -> dict[int, float]:
    """Of the games that each actor offered between two moments."""
    num_steps = {episode.episode_id: episode.num_steps for episode in run.episodes()}
    rates: dict[int, float] = {}
    for name, history in run.histories().items():
        offered = {e["id"] for e in history if e["event"] == "invoke" and begin < e["time"] <= end}
        total = sum(num_steps.get(episode_id, 0) for episode_id in offered)
        rates[name.index] = rates.get(name.index, 0) + total / (end - begin)
    return rates


def test_a_hanging_shard_makes_actors_wait_and_everything_goes_on_after_it(four_cpus, tmp_path):
    options = ("--set", f"actor.timeout_seconds={TIMEOUT_SECONDS}", "--set", "actor.max_unacknowledged=16")
    options = (*SLOW_CHAIN, *LOOSE, *options, "--actors", 2, "--shards", 2)
    with run_in(four_cpus, tmp_path, *options) as run:
        run.wait("two actors", lambda: run.actors("live") == 2)
        roles = ("ActorWorker", "LearnerWorker", "ReplayShardWorker")
        before = {process for role in roles for process in run.processes(role)}
        with frozen(run.processes("ReplayShardWorker")[0]):
            thawed = time.monotonic() + HUNG_SECONDS
            time.sleep(HUNG_SECONDS / 2)
            env_steps = run.env_steps
            time.sleep(max(thawed - time.monotonic(), 0))
            # An actor's report is as late as the answer that it waits for; what it tells is from before.
            assert run.env_steps - env_steps < 200
        env_steps, learner_steps = run.env_steps, run.learner_steps
        moment = time.monotonic()
        run.wait("steps of actors", lambda: run.env_steps > env_steps + 500)
        run.wait("steps of the learner", lambda: run.learner_steps > learner_steps)
        run.wait(
            "games of all actors",
            lambda: all(played_after(history, moment) is not None for history in run.histories().values()),
        )
        assert run.status()["restarts"] == 0
        assert {process for role in roles for process in run.processes(role)} == before
        run.judge(num_games=50)


def test_a_hung_actor_is_replaced_and_the_others_lose_no_time(four_cpus, tmp_path):
    options = ("--set", f"actor.timeout_seconds={TIMEOUT_SECONDS}", "--actors", 4)
    with run_in(four_cpus, tmp_path, *SLOW_CHAIN, *LOOSE, *options) as run:
        run.wait("four actors", lambda: run.actors("live") == 4)
        begin = time.monotonic()
        time.sleep(HUNG_SECONDS / 2)
        victim, process = max(run.actor_processes().items())
        middle = time.monotonic()
        with frozen(process):
            time.sleep(HUNG_SECONDS)
            end = time.monotonic()
            # The learner goes on meanwhile, and the weights that the hung one has grow old.
            assert run.status()["staleness"] > 1
            assert run.metrics()[-1]["actors/staleness"] > 1
            run.wait("its successor", lambda: run.status()["restarts"] == 1, TIMEOUT_SECONDS)
            assert time.monotonic() - middle > TIMEOUT_SECONDS - 1
            run.wait(
                "games of its successor",
                lambda: any(
                    name.index == victim.index and name != victim and played_after(history) is not None
                    for name, history in run.histories().items()
                ),
            )
            assert not process.is_running()
        run.end()
        before, during = steps_a_second(run, begin, middle), steps_a_second(run, middle, end)
        others = before.keys() - {victim.index}
        assert sum(during[index] for index in others) >= 0.9 * sum(before[index] for index in others)
        assert during[victim.index] < 0.1 * before[victim.index]
        assert run.verdict().is_good


def test_actors_play_on_with_the_weights_they_have_and_never_go_back(four_cpus, tmp_path):
    with run_in(four_cpus, tmp_path, *SLOW_CHAIN, *LOOSE, "--actors", 2) as run:
        run.wait("two actors", lambda: run.actors("live") == 2)
        (learner,) = run.processes("LearnerWorker")
        with frozen(learner):
            time.sleep(2)
            version, env_steps = run.status()["weights_version"], run.env_steps
            run.wait("steps without a learner", lambda: run.env_steps > env_steps + 500)
            assert run.status()["weights_version"] == version
        run.wait("newer weights", lambda: run.status()["weights_version"] > version + 2)
        learner.kill()
        newest = run.status()["weights_version"]
        run.wait("weights of another learner", lambda: run.status()["weights_version"] > newest + 5)
        moment = time.monotonic()
        run.wait(
            "games with them",
            lambda: all(played_after(history, moment) is not None for history in run.histories().values()),
        )
        run.end()
        versions = run.versions()
        assert len(versions) == 2
        assert all(played == sorted(played) and played[-1] > newest for played in versions.values())
        staleness = [line["actors/staleness"] for line in run.metrics()]
        assert min(staleness) >= 0
        assert run.verdict().is_good
