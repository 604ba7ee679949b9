"""The driver's rules, without a cluster."""

from __future__ import annotations

import pytest

from distributed_muzero.cluster.driver import last_to_keep
from distributed_muzero.cluster.placement import gpu_share
from distributed_muzero.cluster.roles import MAX_FAILURES_IN_A_ROW, STEADY_SECONDS, Role
from distributed_muzero.cluster.run_control import Desired, first_desired
from distributed_muzero.config import make_config
from distributed_muzero.errors import RunError

LOST = RuntimeError("out of memory")


def fail(role, times, now=0.0):
    for _ in range(times):
        role.has_failed(LOST, now)


def test_a_part_that_keeps_failing_ends_the_run_and_says_why():
    role = Role("learner", lambda: None)
    fail(role, MAX_FAILURES_IN_A_ROW)
    with pytest.raises(RunError, match="the learner failed 6 times in a row, last: out of memory"):
        role.has_failed(LOST, 0.0)


def test_a_little_work_between_failures_forgives_none_of_them():
    role = Role("learner", lambda: None)
    with pytest.raises(RunError, match="6 times in a row"):
        for turn in range(2 * MAX_FAILURES_IN_A_ROW):
            role.has_worked(100.0 * turn)
            role.has_failed(LOST, 100.0 * turn + STEADY_SECONDS)


def test_steady_work_forgives_earlier_failures():
    role = Role("actor 3", lambda: None)
    for turn in range(3):
        fail(role, MAX_FAILURES_IN_A_ROW - 1, 100.0 * turn)
        role.has_worked(100.0 * turn + 1)
        role.has_worked(100.0 * turn + 20)  # work is counted from its first answer
        role.has_failed(LOST, 100.0 * turn + 1.1 + STEADY_SECONDS)
        assert role.failures_in_a_row == 1


def test_a_pause_without_work_forgives_nothing():
    role = Role("learner", lambda: None)
    with pytest.raises(RunError, match="6 times in a row"):
        for turn in range(2 * MAX_FAILURES_IN_A_ROW):
            role.has_failed(LOST, 120.0 * turn)


@pytest.mark.parametrize(
    ("num_gpus", "learner", "reanalyse", "num_workers", "share"),
    [
        (0, "auto", "auto", 1, 0),
        (0, "cuda", "cpu", 1, 1),  # its node is yet to come
        (1, "auto", "cpu", 3, 1),
        (1, "cpu", "cpu", 1, 0),
        (1, "auto", "auto", 1, 1 / 2),
        (1, "cuda", "cuda", 3, 1 / 4),
        (2, "auto", "auto", 2, 1 / 2),  # a third of each GPU would find no place for all three
        (4, "auto", "cuda", 2, 1),
    ],
)
def test_everybody_who_uses_a_gpu_finds_a_place_on_one(num_gpus, learner, reanalyse, num_workers, share):
    sections = {
        "environment": {"id": "chain"},
        "learner": {"device": learner},
        "reanalyse": {"ratio": 0.5, "device": reanalyse, "num_workers": num_workers},
    }
    assert gpu_share(make_config(sections), num_gpus) == share


def test_actors_that_dont_play_are_the_first_to_go():
    playing = [Role(f"actor {i}", lambda: None, index=i, is_ready=True, working_since=1.0) for i in range(3)]
    starting = Role("actor 1", lambda: None, index=1, is_ready=True)
    pending = [Role(f"actor {i}", lambda: None, index=i) for i in (0, 4)]
    actors = [*playing, starting, *pending]
    order = []
    while actors:
        order.append(last_to_keep(actors))
        actors.remove(order[-1])
    assert order == [pending[1], pending[0], starting, playing[2], playing[1], playing[0]]


def wish(before=(4, 2, 3), **wishes):
    return Desired(*before).changed(**wishes)


def test_a_number_that_is_asked_for_ends_the_choosing():
    chosen = wish(autoscale=(2, 8))
    assert chosen.autoscale == (2, 8)
    assert chosen.changed(num_actors=5) == Desired(5, 2, 3)
    assert chosen.changed(num_reanalysers=1).autoscale == (2, 8)


@pytest.mark.parametrize(
    ("before", "wishes", "message"),
    [
        ((4, 2, 3), {"num_actors": 0}, "0 actors: this run can have 1 to 10000"),
        ((4, 2, 3), {"num_shards": 10_000}, "this run can have 1 to 256"),
        ((4, 2, 3), {"autoscale": (1, 10**6)}, "expected at most 10000"),
        ((0, 2, 3), {"num_actors": 4}, "learns from stored episodes alone"),
        ((0, 2, 3), {"autoscale": (1, 4)}, "learns from stored episodes alone"),
        ((4, 0, 3), {"num_reanalysers": 1}, "reanalyse.ratio is 0"),
    ],
)
def test_what_a_run_can_not_be_is_refused(before, wishes, message):
    with pytest.raises(RunError, match=message):
        wish(before, **wishes)


def test_reanalysers_on_a_gpu_have_the_places_that_the_run_began_with():
    sections = {
        "environment": {"id": "chain"},
        "reanalyse": {"ratio": 0.5, "device": "auto", "num_workers": 2},
    }
    desired = first_desired(make_config(sections))
    assert desired.changed(num_reanalysers=1).num_reanalysers == 1
    with pytest.raises(RunError, match="3 reanalysers: this run can have 1 to 2"):
        desired.changed(num_reanalysers=3)
