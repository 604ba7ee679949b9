"""Calls between actors and shards that fail on their way there, or back (P6)."""

from __future__ import annotations

import json

import pytest

from tests.cluster.nodes import LOOSE, SLOW_CHAIN, connected_nodes, run_in

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.faults]

FAILURES = {"num_failures": -1, "req_failure_prob": 10, "resp_failure_prob": 20}  # per cent, without end
# Ray's own: the sender is told of a failure, whether or not the call has reached the other process.
LOSSY = {"RAY_testing_rpc_failure": json.dumps({"CoreWorkerService.grpc_client.PushTask": FAILURES})}


def test_lost_requests_and_answers_make_no_duplicates(tmp_path):
    with connected_nodes() as nodes:
        nodes.add(2, LOSSY)
        with run_in(nodes, tmp_path, *SLOW_CHAIN, *LOOSE, "--actors", 2, "--shards", 2) as run:
            run.wait("games offered twice", lambda: run.metrics()[-1]["replay/duplicates"] > 5)
            run.wait("stored games", lambda: run.metrics()[-1]["replay/episodes"] > 60)
            assert run.status()["restarts"] == 0
            run.end()
            verdict = run.verdict()
            assert verdict.is_good and verdict.acknowledged > 60, verdict
