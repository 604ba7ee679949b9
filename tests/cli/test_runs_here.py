"""`status` and `runs` of a runs folder on a machine without a cluster."""

from __future__ import annotations

import json
import signal
from contextlib import nullcontext

import pytest

from distributed_muzero.cli import cluster
from distributed_muzero.cli.cluster import run_at_hand, status_of
from distributed_muzero.cluster import control
from distributed_muzero.config import make_config
from distributed_muzero.errors import RunError
from distributed_muzero.mirror import download
from distributed_muzero.run_folder import create_run
from distributed_muzero.workers import runs
from distributed_muzero.workers.runs import created
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


# A run at a URI that is watched ------------------------------------------------------------------------------------


@pytest.fixture
def at_uri(tmp_path, monkeypatch):
    """A runs folder with a run at work elsewhere, and what happens in the pauses between looks."""
    make_run(tmp_path, "far", "running", 1)
    pauses = []
    monkeypatch.setattr(cluster.time, "sleep", pauses.append)
    return f"file://{tmp_path}", pauses


def test_a_watched_run_is_looked_for_once_and_its_store_is_asked_every_five_seconds(at_uri, monkeypatch):
    uri, pauses = at_uri
    looks = []
    monkeypatch.setattr(runs, "names_at", lambda uri: looks.append(uri) or ["far"])
    watching = cluster._of_a_folder("far", uri, True)
    assert [next(watching)["state"] for _ in range(4)] == ["running"] * 4
    assert looks == [uri] and pauses == [5.0] * 3


@pytest.mark.parametrize(
    ("num_failures", "is_borne"), [(cluster.MAX_FAILURES, True), (cluster.MAX_FAILURES + 1, False)]
)
def test_a_store_that_fails_a_few_times_does_not_end_the_view(at_uri, monkeypatch, num_failures, is_borne):
    uri, _ = at_uri
    watching = cluster._of_a_folder("far", uri, True)
    for _ in range(2):
        assert next(watching)["state"] == "running"
        failures = iter(range(num_failures))

        def read_at(*place, failures=failures):
            if next(failures, None) is not None:
                raise RunError("it can't be reached")
            return download.read_at(*place)

        monkeypatch.setattr(runs, "read_at", read_at)
        if not is_borne:
            with pytest.raises(RunError, match="can't be reached"):
                next(watching)
            return
    assert next(watching)["state"] == "running"


def test_a_run_at_a_uri_that_is_at_work_on_this_machine_is_read_here(there, tmp_path):
    with created(there, "r", make_config({})) as (folder, _):
        folder.write_status({"run": "r", "state": "running", "env_steps": 7})
        for name in ("r", None):
            [found] = cluster.watched(name, None, there, False, None)
            assert found == {"run": "r", "state": "running", "env_steps": 7}


# A run of the same name elsewhere on this machine ----------------------------------------------------------------


@pytest.fixture
def in_cluster(monkeypatch):
    """What runs of the cluster on this machine tell, by name."""
    found = {}
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(control, "joined", lambda address: nullcontext())
    monkeypatch.setattr(control, "run_status", lambda run, runs_dir, address: found[run or "c"])
    monkeypatch.setattr(control, "going_on_status", found.__getitem__)
    return found


def running(name, folder):
    return {"run": name, "state": "running", "folder": str(folder)}


@pytest.mark.parametrize(("asked", "shown"), [("c", ("c", "finished")), (None, ("b", "stopped"))])
def test_a_run_of_this_folder_is_shown_not_one_of_its_name_elsewhere(
    runs_dir, in_cluster, capsys, asked, shown
):
    in_cluster["c"] = running("c", "/other/runs/c")
    [found] = cluster.watched(asked, None, str(runs_dir), True, None)
    assert (found["run"], found["state"]) == shown
    told = "this machine's cluster has another run 'c', in /other/runs/c; --address auto means that one"
    assert capsys.readouterr().err == f"{told}\n"
    [found] = cluster.watched(asked, "auto", str(runs_dir), False, None)
    assert found == in_cluster["c"]


def test_a_run_of_the_cluster_is_shown_where_it_lies_if_none_here_has_its_name(runs_dir, in_cluster, capsys):
    # c goes on on another node, and its folder is seen from here.
    for name, folder in (("c", runs_dir / "c"), ("far", "/other/runs/far")):
        in_cluster[name] = running(name, folder)
        [found] = cluster.watched(name, None, str(runs_dir), False, None)
        assert found == in_cluster[name]
    in_cluster["c"] = {"run": "c", "state": "pending"}  # it doesn't say where
    assert [*cluster.watched("c", None, str(runs_dir), False, None)] == [in_cluster["c"]]
    assert capsys.readouterr().err == ""


def test_nothing_is_asked_of_a_run_elsewhere_whose_name_is_of_one_here(runs_dir, in_cluster):
    in_cluster["c"] = running("c", "/other/runs/c")
    for name in ("b", "c", "far"):
        in_cluster.setdefault(name, running(name, runs_dir / name))
    with pytest.raises(
        RunError, match=r"has a run 'c', and this .* another run 'c', in /other/runs/c; --address"
    ):
        cluster.check_is_meant("c", str(runs_dir))
    cluster.check_is_meant("b", str(runs_dir))
    cluster.check_is_meant("far", str(runs_dir))


# Beside clusters --------------------------------------------------------------------------------------------------


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.skipif(why_not is not None, reason=str(why_not))
@in_isolation
def test_a_train_with_a_ray_of_its_own_is_in_the_way_of_no_other_and_is_watched_to_its_end(
    runs_dir, tmp_path, monkeypatch
):
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    options = ("--set", "run.max_train_steps=null", "--max-minutes", 15)
    work = tmp_path / "work"
    with processes.started(
        "train", "--preset", "debug", "--runs-dir", work, "--name", "r", *options
    ) as training:
        processes.wait_for("learner steps", lambda: processes.status(work / "r").get("learner_steps"))
        for command in (("status", "c", "--json"), ("watch", "c")):
            asked = processes.run(*command, "--runs-dir", runs_dir)
            assert asked.returncode == 0 and "finished" in asked.stdout, asked.stderr
        make_run(runs_dir, "r", "stopped", 5)
        same_name = processes.run("status", "r", "--runs-dir", runs_dir, "--json")
        assert json.loads(same_name.stdout)["state"] == "stopped" and f"in {work / 'r'};" in same_name.stderr
        refused = processes.run("scale", "r", "--actors", 2, "--runs-dir", runs_dir)
        assert refused.returncode == 2 and f"another run 'r', in {work / 'r'};" in refused.stderr
        unknown = processes.run("status", "nobody", "--runs-dir", runs_dir)
        assert unknown.returncode == 2 and "no run 'nobody' in" in unknown.stderr, unknown.stderr
        assert "Traceback" not in unknown.stderr
        with processes.started("watch", "--runs-dir", work) as watching:
            assert watching.stdout.readline().startswith("r running")
            training.send_signal(signal.SIGINT)
            told, errors = watching.communicate(timeout=60)
        assert watching.returncode == 0 and told.splitlines()[-1].startswith("r stopped: it was asked"), (
            errors
        )
        assert training.wait(timeout=60) == 0


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
