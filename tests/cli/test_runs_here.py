"""`status` and `runs` of a runs folder on a machine without a cluster."""

from __future__ import annotations

import json

import pytest

from distributed_muzero.cli.cluster import run_at_hand, status_of
from distributed_muzero.config import make_config
from distributed_muzero.errors import RunError
from distributed_muzero.run_folder import create_run
from tests import processes
from tests.isolation import in_isolation, why_not_isolated

why_not = why_not_isolated()


def make_run(runs_dir, name, state, second):
    folder = create_run(runs_dir, name, make_config({}))
    folder.write_status({"run": name, "state": state, "updated": f"2026-11-21T12:00:{second:02}+00:00"})
    return folder


@pytest.fixture
def runs_dir(tmp_path):
    """c was made last, b was written last; a can't be read."""
    make_run(tmp_path, "a", "finished", 1).config_file.write_text("learner: [")
    make_run(tmp_path, "b", "stopped", 30)
    make_run(tmp_path, "c", "finished", 20)
    return tmp_path


def test_without_a_name_the_run_that_was_written_last_is_meant(runs_dir):
    assert run_at_hand(str(runs_dir)) == "b"
    assert run_at_hand(f"file://{runs_dir}") == "b"
    assert run_at_hand(str(runs_dir / "none")) is None


def test_without_a_name_the_run_at_work_is_meant_if_there_is_one(runs_dir):
    with make_run(runs_dir, "d", "running", 10).locked():
        assert run_at_hand(str(runs_dir)) == "d"
        with make_run(runs_dir, "e", "starting", 10).locked(), pytest.raises(RunError, match="several runs"):
            run_at_hand(str(runs_dir))
    assert run_at_hand(str(runs_dir)) == "b"


def test_a_run_that_cant_be_read_is_told_as_that(runs_dir):
    assert status_of("a", str(runs_dir)) == {"run": "a", "state": "unreadable"}
    assert status_of("c", str(runs_dir))["state"] == "finished"


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.skipif(why_not is not None, reason=str(why_not))
@in_isolation
def test_the_commands_where_no_cluster_answers(runs_dir, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    listed = processes.run("runs", "--runs-dir", runs_dir, "--json")
    assert listed.returncode == 0, listed.stderr
    states = {run["run"]: run["state"] for run in map(json.loads, listed.stdout.splitlines())}
    assert states == {"a": "unreadable", "b": "stopped", "c": "finished"}
    for name, run in (((), "b"), (("c",), "c")):
        asked = processes.run("status", *name, "--runs-dir", runs_dir, "--json")
        assert asked.returncode == 0 and json.loads(asked.stdout)["run"] == run, asked.stderr
    broken = processes.run("status", "a", "--runs-dir", runs_dir)
    assert broken.returncode == 2 and "can't read the run's" in broken.stderr
    assert "no Ray cluster answers" in broken.stderr and "None" not in broken.stderr
