"""The campaign as a user runs it, small."""

from __future__ import annotations

import json

import pytest

from distributed_muzero.chaos.campaign import PROMISES, Promise
from distributed_muzero.chaos.live_run import run_live
from tests.processes import run


def chaos(*options):
    done = run("chaos", *options, "--json", timeout=200)
    return done, json.loads(done.stdout.splitlines()[-1]) if done.stdout else None


def test_files_keep_their_promises():
    done, result = chaos("--minutes", 0.1, "--only", "P3,P8,P13")
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in result["promises"]] == ["P3", "P8", "P13"]
    assert all(row["n"] > 5 and row["broken"] == 0 for row in result["promises"])


@pytest.mark.faults
@pytest.mark.slow
def test_a_storm_keeps_what_was_acknowledged():
    done, result = chaos("--minutes", 0.2, "--only", "P15")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (result["lost"], result["duplicates"]) == (0, 0)
    assert result["acknowledged"] > 10
    (p2,) = [row for row in result["promises"] if row["id"] == "P2"]
    assert p2["n"] >= 4 and p2["max_seconds"] < 10


@pytest.mark.faults
@pytest.mark.slow
def test_it_fails_without_syncs():
    done, result = chaos("--minutes", 0.2, "--only", "P2", "--without", "sync")
    assert done.returncode == 1
    assert result["lost"] > 0 and result["without"] == "sync"


def test_an_unknown_promise_is_named():
    done = run("chaos", "--only", "P2,P77")
    assert done.returncode == 2
    assert "unknown P77; known: P2" in done.stderr and "Traceback" not in done.stderr


def test_times_over_the_promised_limit_are_broken():
    promise = Promise("P2", PROMISES["P2"])
    promise.add(3, ["one was lost"], [1.0, 11.0, 2.0], 10)
    promise.add(2, 4)
    assert (promise.n, promise.broken) == (5, 6)
    assert promise.examples == ["11.0 s, promised 10", "one was lost"]


@pytest.mark.faults
@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_whole_run_survives_the_death_of_its_parts_and_of_everything(tmp_path):
    live = run_live(tmp_path, 2, shard_kills=1, learner_kills=1, stops=1, kills_of_all=1)
    assert live.broken == []
    assert live.verdict.is_good, live.verdict
    assert live.verdict.acknowledged > 10
    assert len(live.shard_seconds) == len(live.learner_seconds) == len(live.resume_seconds) == 1
    assert live.stop_seconds[0] < 25
