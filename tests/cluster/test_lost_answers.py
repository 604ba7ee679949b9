"""Calls between actors and shards that fail on their way there, or back (P6)."""

from __future__ import annotations

import json

import pytest

from tests.cluster.nodes import LOOSE, SLOW_CHAIN, connected_nodes, run_in

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.faults]


def lossy(num_failures: int, **shares: int) -> dict[str, str]:
    """A process's variables: calls to actors fail, in per cent. The caller is told, also where the call was made.

    num_failures: of each process, at most; -1 = without end.
    """
    failures = {"CoreWorkerService.grpc_client.PushTask": {"num_failures": num_failures, **shares}}
    return {"RAY_testing_rpc_failure": json.dumps(failures)}


def test_lost_requests_and_answers_make_no_duplicates(tmp_path):
    with connected_nodes() as nodes:
        nodes.add(2, lossy(-1, req_failure_prob=10, resp_failure_prob=20))
        with run_in(nodes, tmp_path, *SLOW_CHAIN, *LOOSE, "--actors", 2, "--shards", 2) as run:
            run.wait("games offered twice", lambda: run.metrics()[-1]["replay/duplicates"] > 5)
            run.wait("stored games", lambda: run.metrics()[-1]["replay/episodes"] > 60)
            assert run.status()["restarts"] == 0
            run.judge(num_games=60)


def test_an_answer_that_the_driver_misses_costs_no_healthy_process(tmp_path):
    options = (*SLOW_CHAIN, *LOOSE, "--actors", 2)
    few = lossy(5, req_failure_prob=0, resp_failure_prob=2)
    with connected_nodes(2) as nodes, run_in(nodes, tmp_path, *options, environment=few) as run:
        run.wait("two actors", lambda: run.actors("live") == 2)
        roles = ("ActorWorker", "LearnerWorker", "ReplayShardWorker")
        before = {process for role in roles for process in run.processes(role)}
        env_steps, learner_steps = run.env_steps, run.learner_steps
        run.wait("steps of actors", lambda: run.env_steps > env_steps + 3000)
        run.wait("steps of the learner", lambda: run.learner_steps > learner_steps + 20)
        assert {process for role in roles for process in run.processes(role)} == before
        steps = [line["train/learner_steps"] for line in run.metrics()]
        assert steps == sorted(steps), "the learner began anew"
        run.end()
        assert run.verdict().is_good
