"""What outsiders are told of a run, by itself and by its job, and what becomes of their wishes meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from distributed_muzero.cluster.control import status_by
from distributed_muzero.cluster.jobs import RunJob
from distributed_muzero.cluster.run_control import Desired, RunControl

START = 1_800_000_000.0
BEFORE, AFTER = "2027-01-15T07:59:59+00:00", "2027-01-15T08:00:01+00:00"


def control(*numbers: Any, **more: Any) -> Any:
    """The actor's class in this process."""
    return RunControl.__ray_actor_class__(Desired(*numbers, **more))


def driver_says(desired: int, shards: int = 1) -> dict[str, Any]:
    return {"state": "running", "shards": shards, "actors": {"desired": desired, "live": 2, "pending": 0}}


def test_without_autoscaling_it_keeps_what_was_chosen_last_also_while_the_run_drains():
    asked = control(1, 0, 1, autoscale=(1, 8))
    asked.exchange(driver_says(5))
    asked.exchange(driver_says(0))
    desired = asked.set_desired(autoscale=None)
    assert (desired.autoscale, desired.num_actors) == (None, 5)


def test_without_autoscaling_before_the_driver_said_anything_it_keeps_what_was_asked_for():
    asked = control(3, 0, 1, autoscale=(1, 8))
    asked.exchange({"state": "laying out"})
    assert asked.set_desired(autoscale=None).num_actors == 3


def test_to_end_an_autoscaling_that_there_is_not_changes_nothing():
    asked = control(3, 0, 1)
    asked.set_desired(num_actors=6)
    asked.exchange(driver_says(3))
    assert asked.set_desired(autoscale=None).num_actors == 6
    assert control(0, 1, 1).set_desired(autoscale=None).num_actors == 0


def test_while_the_shards_change_the_status_names_the_actors_that_come_back():
    asked = control(4, 0, 1)
    asked.exchange(driver_says(4))
    asked.set_desired(num_shards=2)
    asked.exchange(driver_says(0))
    assert asked.get_status()["actors"] == {"desired": 4, "live": 2, "pending": 0}
    asked.set_desired(autoscale=(1, 8))
    assert asked.get_status()["actors"]["desired"] == 4
    asked.exchange(driver_says(3, shards=2))
    assert asked.get_status()["actors"]["desired"] == 3


def test_a_run_that_ends_wants_no_actors():
    asked = control(4, 0, 1)
    asked.set_desired(stop=True)
    asked.exchange(driver_says(0))
    assert asked.get_status()["actors"]["desired"] == 0


@pytest.mark.parametrize(
    ("job", "folder", "updated", "told"),
    [
        ("failed", "stopped", BEFORE, "failed"),
        ("failed", "failed", AFTER, "failed"),
        ("failed", "stopped", None, "failed"),
        ("failed", "running", AFTER, "failed"),
        ("stopped", "finished", BEFORE, "stopped"),
        ("stopped", "finished", AFTER, "finished"),
        ("finished", "stopped", AFTER, "stopped"),
    ],
)
def test_of_a_job_that_has_ended_the_folder_tells_how_unless_it_was_written_before(
    job, folder, updated, told
):
    reason = {"reason": "no room"} if updated == AFTER and folder == told else {}
    status = {"state": folder, "learner_steps": 7, **reason, **({"updated": updated} if updated else {})}
    found = status_by(RunJob("r", "r-launch-2", job, START, START + 9, None), status)
    assert found == {**status, "run": "r", "state": told}


def test_of_a_job_that_was_killed_the_counts_are_told_and_nothing_of_who_was_at_work():
    status = {
        "state": "running",
        "learner_steps": 7,
        "updated": AFTER,
        "actors": {"live": 4},
        "actors_waiting": 0.2,
    }
    found = status_by(RunJob("r", "r", "failed", START, START + 9, None), status)
    assert found == {"run": "r", "state": "failed", "learner_steps": 7, "updated": AFTER}


def test_of_a_job_that_goes_on_nothing_is_told_that_was_written_before():
    job = RunJob("r", "r", "pending", START, None, None)
    assert status_by(job, {"learner_steps": 7, "updated": BEFORE}) == {"run": "r", "state": "pending"}
    assert status_by(job, {"learner_steps": 7, "updated": AFTER})["learner_steps"] == 7
