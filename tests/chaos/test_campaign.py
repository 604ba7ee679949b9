"""The campaign as a user runs it, small."""

from __future__ import annotations

import json

import pytest

from distributed_muzero.chaos.campaign import PROMISES, Campaign, Promise, choose_points
from distributed_muzero.chaos.history import check
from distributed_muzero.chaos.kill_points import KILL_POINTS
from distributed_muzero.chaos.live_run import DEEDS, LiveResult, run_live
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
    # Each of the three kinds of storm kills once at least.
    assert p2["n"] >= 3 and p2["max_seconds"] < 10


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


def test_a_short_campaign_draws_its_kill_points_from_the_seed():
    drawn = [choose_points(seed, 2) for seed in range(20)]
    assert drawn == [choose_points(seed, 2) for seed in range(20)]
    assert all(len(set(names)) == 2 for names in drawn)
    assert len({name for names in drawn for name in names}) > 10
    assert sorted(choose_points(1, len(KILL_POINTS))) == sorted(KILL_POINTS)


def counted(verdict, **seconds):
    """What a campaign makes of a live run: tries, breaks and the longest time by promise."""
    campaign = Campaign(1, 1, set(), None, print)
    times = {deed: seconds.get(deed, []) for deed in DEEDS}
    campaign.add_live(LiveResult(times, [], {"P4": ["a learner at step 0"]}, verdict))
    rows = campaign.to_json()["promises"]
    return {row["id"]: (row["n"], row["broken"], row["max_seconds"]) for row in rows}


def test_an_episode_lost_in_a_live_run_counts_once():
    lost = check([], [], 100)._replace(lost=1, examples=("run/0/0/1 is lost",))
    assert counted(lost, shard=[2.0], driver=[20.0], all=[30.0]) == {
        "P2": (1, 1, 2.0),
        "P4": (0, 1, None),
        "P5": (2, 0, 30.0),
    }
    assert counted(lost, all=[130.0]) == {"P4": (0, 1, None), "P5": (1, 2, 130.0)}


@pytest.mark.faults
@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_whole_run_survives_the_death_of_its_parts_and_of_everything(tmp_path):
    deeds = {"shard": 1, "learner": 1, "stop": 1, "driver": 1, "all": 1}
    live = run_live(tmp_path, 2, deeds)
    assert live.broken == {}
    assert live.verdict.is_good, live.verdict
    assert live.verdict.acknowledged > 10
    # The last stop is the end of the run.
    assert {deed: len(seconds) for deed, seconds in live.seconds.items()} == {**deeds, "stop": 2}
    assert max(live.seconds["stop"]) < 25
    assert len(live.steps_lost) == 3
