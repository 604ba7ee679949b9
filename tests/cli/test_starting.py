"""What a launch says that ends before anybody has played, and what a run says that has nothing left to do."""

from __future__ import annotations

import datetime
import os
import signal
import time

import pytest

from distributed_muzero.cli.train import asks_for_shards, train_in
from distributed_muzero.config import load_preset, make_config
from distributed_muzero.errors import RunError
from distributed_muzero.run_folder import create_run
from distributed_muzero.workers import launching
from distributed_muzero.workers.runs import created, current_status, opened
from tests import processes

LIMITLESS = ("--set", "run.max_train_steps=null", "--set", "run.max_minutes=null")


AT_WORK = {
    "run": "r", "state": "running", "actors": {"desired": 4, "live": 4, "pending": 0, "draining": 0}, "reanalysers": 1,
    "env_steps_per_second": 9.0, "learner_steps_per_second": 9.0, "staleness": 1, "actors_waiting": 0.1,
    "learner_waiting": 0.1, "checkpoint_age_seconds": 3.0, "disk_free_bytes": 10**9, "metrics": "http://here/metrics",
    "copy": {"uri": "there", "seconds_since_push": 1.0, "failures": 0},
}  # fmt: skip


@pytest.fixture
def ended_run(tmp_path):
    folder = create_run(tmp_path, "r", make_config(load_preset("debug")))
    before = {"reason": "5 learner steps were made", "seconds": 9.0, "updated": "2026-01-01T00:00:00+00:00"}
    folder.write_status({"run": "r", "state": "finished", "learner_steps": 5, **before})
    return folder


def told(status):
    """A status without its moment, which is now: nothing of a launch before is said as if it were of this one."""
    written = datetime.datetime.fromisoformat(status["updated"]).timestamp()
    assert abs(time.time() - written) < 60
    return {key: value for key, value in status.items() if key != "updated"}


def launch(folder):
    train_in(opened("r", str(folder.path.parent), print), lambda config: config, True)


def test_a_stop_during_an_import_is_told_and_is_the_runs_last_word(ended_run, monkeypatch, capfd):
    seen = []

    def stopped_import(folder, *_):
        seen.append(told(folder.current_status()))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(launching, "import_stored", stopped_import)
    launch(ended_run)
    assert seen == [{"run": "r", "state": "starting", "learner_steps": 5}]
    last = told(ended_run.current_status())
    assert last == {"run": "r", "state": "stopped", "learner_steps": 5, "reason": "a stop was asked for"}
    assert any(line.startswith("stopped after") for line in capfd.readouterr().err.splitlines())


def test_what_a_killed_launch_said_of_its_processes_is_not_said_of_the_next(ended_run, monkeypatch):
    ended_run.write_status({**AT_WORK, "learner_steps": 5})
    assert ended_run.current_status() == {"run": "r", "state": "lost", "learner_steps": 5}
    seen = []

    def look(folder, *_):
        seen.append(told(folder.current_status()))
        raise RunError("that is enough")

    monkeypatch.setattr(launching, "import_stored", look)
    with pytest.raises(RunError, match="that is enough"):
        launch(ended_run)
    assert seen == [{"run": "r", "state": "starting", "learner_steps": 5}]


def test_whoever_finds_the_copy_of_a_run_that_imports_sees_that_somebody_is_at_work(there, monkeypatch):
    seen = []

    def look(folder, *_):
        seen.append(told(current_status("r", there)))
        raise RunError("nothing can be learnt from")

    monkeypatch.setattr(launching, "import_stored", look)
    with pytest.raises(RunError, match="nothing can be learnt from"):
        train_in(created(there, "r", make_config(load_preset("debug"))), lambda config: config, True)
    assert seen == [{"run": "r", "state": "starting"}]
    assert current_status("r", there)["state"] == "failed"


def test_a_launch_that_fails_before_anybody_has_played_has_failed(ended_run, monkeypatch):
    def refuse(*_):
        raise RunError("none of the episodes can be learnt from")

    monkeypatch.setattr(launching, "import_stored", refuse)
    with pytest.raises(RunError, match="none of the episodes"):
        launch(ended_run)
    last, reason = told(ended_run.current_status()), "none of the episodes can be learnt from"
    assert last == {"run": "r", "state": "failed", "learner_steps": 5, "reason": reason}


def test_a_run_that_has_reached_its_goal_is_over(tmp_path):
    goal = ("--preset", "debug", "--in-process", *LIMITLESS, "--stop-at-return", 1)
    command = ("train", *goal, "--runs-dir", tmp_path, "--name", "r", "--resume", "auto")
    first = processes.run(*command)
    assert first.returncode == 0 and "an evaluation reached a mean return of" in first.stderr, first.stderr
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    again = processes.run(*command)
    assert again.returncode == 0 and "nothing is left to do: run r is over" in again.stdout, again.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()} == before


def test_a_number_of_shards_is_asked_for_by_either_option():
    assert asks_for_shards(2, None)
    assert asks_for_shards(None, ["actor.num_actors=3", "replay.num_shards=4"])
    assert not asks_for_shards(None, ["replay.min_size_to_sample=9"])
