"""The judgement of a live run, without one, and what finds its processes."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from distributed_muzero.chaos.child import becomes_true, has_ended, kill_session, living
from distributed_muzero.chaos.live_run import Judgement, Stand, first_acknowledgement, judge
from distributed_muzero.replay.index import shard_of


def judged(*stands, saved_step):
    """Of (learner steps, weights version): the last before the kill, then those after it."""
    before, *after = (Stand(*stand) for stand in stands)
    return judge(before, after, saved_step)


def test_a_learner_that_starts_from_nothing_is_broken():
    found = judged((140, 7), (0, 8), saved_step=100)
    assert found == Judgement(False, 0, ["a learner at step 0, behind its checkpoint of step 100"])


def test_it_stays_broken_when_the_learner_gets_ahead_later():
    found = judged((140, 7), (140, 7), (20, 8), (90, 9), (150, 12), saved_step=100)
    assert found.learns and found.lowest_steps == 20 and len(found.broken) == 1


def test_another_version_without_steps_is_no_learning():
    assert not judged((100, 7), (100, 8), (100, 8), (100, 9), saved_step=100).learns
    assert not judged((100, 7), (100, 7), (100, 8), (100, 8), saved_step=100).learns


def test_a_late_report_of_the_lost_learner_is_no_learning():
    assert not judged((140, 7), (144, 8), (144, 8), saved_step=100).learns
    assert not judged((140, 7), (144, 8), (104, 9), saved_step=100).learns


def test_a_checkpoint_newer_than_the_status_is_no_learning():
    assert not judged((140, 7), (140, 7), (150, 8), (150, 8), saved_step=150).learns


def test_a_learner_that_goes_on_from_its_checkpoint_is_good():
    stands = [(140, 7), (140, 7), (100, 8), (100, 8), (112, 8)]
    assert judged(*stands, saved_step=100) == Judgement(True, 100, [])
    assert judged((140, 7), (120, 8), (160, 9), (170, 9), saved_step=100) == Judgement(True, 120, [])


def test_a_version_that_falls_is_broken():
    found = judged((140, 7), (140, 7), (120, 6), (130, 8), saved_step=100)
    assert found.broken == ["weights version 6 after 7"]
    assert judged((140, 7), (120, 8), (130, 7), saved_step=100).broken == ["weights version 7 after 8"]


def test_nothing_written_is_no_learning():
    assert judged((140, 7), saved_step=100) == Judgement(False, 140, [])


NUM_SHARDS = 2
NAMES = [f"run/0/0/{number}" for number in range(20)]
HERE, ALSO_HERE = [name for name in NAMES if shard_of(name, NUM_SHARDS) == 1][:2]
ELSEWHERE = next(name for name in NAMES if shard_of(name, NUM_SHARDS) == 0)


def acknowledged(*lines, killed=10.0):
    history = [{"event": event, "id": name, "time": time} for event, name, time in lines]
    return first_acknowledgement(history, 1, killed, NUM_SHARDS)


def test_an_answer_to_an_offer_from_before_the_kill_is_not_of_the_new_shard():
    assert acknowledged(("invoke", HERE, 9.9), ("ok", HERE, 10.4)) is None


def test_the_first_answer_to_a_later_offer_counts():
    lines = [
        ("invoke", HERE, 9.9),
        ("invoke", ELSEWHERE, 9.9),
        ("unknown", HERE, 10.4),
        ("ok", ELSEWHERE, 10.4),
        ("invoke", HERE, 11.0),
        ("invoke", ELSEWHERE, 11.0),
    ]
    assert acknowledged(*lines, ("ok", ELSEWHERE, 11.2)) is None
    assert acknowledged(*lines, ("ok", HERE, 12.5), ("ok", ELSEWHERE, 12.5)) == 12.5


def test_a_later_offer_of_another_episode_says_nothing_of_this_one():
    lines = [("invoke", HERE, 9.9), ("invoke", ALSO_HERE, 10.1), ("ok", HERE, 10.2)]
    assert acknowledged(*lines) is None
    assert acknowledged(*lines, ("fail", ALSO_HERE, 10.2)) is None
    assert acknowledged(*lines, ("ok", ALSO_HERE, 10.3)) == 10.3


FAMILY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("born", flush=True)
time.sleep(600)
"""


@pytest.fixture
def leader():
    process = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"born\n"
    yield process
    kill_session(process)
    process.stdout.close()


def test_orphans_of_a_killed_leader_are_found_and_killed(leader):
    assert len(living(leader)) == 2 and not has_ended(leader)
    os.kill(leader.pid, signal.SIGKILL)
    assert becomes_true(lambda: has_ended(leader), 10)
    (orphan,) = living(leader)
    assert psutil.pid_exists(leader.pid)
    kill_session(leader)
    assert leader.returncode == -signal.SIGKILL and living(leader) == []
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


def test_a_whole_session_is_killed(leader):
    family = living(leader)
    kill_session(leader)
    assert len(family) == 2
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)


def test_a_condition_is_waited_for_no_longer_than_allowed():
    answers = iter([False, False, True])
    assert becomes_true(lambda: next(answers), 10)
    assert not becomes_true(lambda: False, 0.1)
