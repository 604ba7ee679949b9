import datetime
import json
import time
from pathlib import Path

import pytest

from distributed_muzero import run_folder
from distributed_muzero.config import Config, make_config
from distributed_muzero.errors import RunError
from distributed_muzero.run_folder import (
    FIRST_LAUNCH,
    Launch,
    create_run,
    default_run_name,
    open_run,
    run_names,
)

ODD = make_config(
    {
        "environment": {
            "id": "FrozenLake-v1",
            "kwargs": {"map_name": "4x4", "levels": [1, "1e3"], "depth": "7"},
        },
        "learner": {"learning_rate": 1e-5},
        "network": {"hidden_sizes": [32, 16]},
    }
)


def test_a_run_reads_back_the_config_it_was_made_with(tmp_path):
    made = create_run(tmp_path, "first", ODD)
    opened = open_run("first", tmp_path)
    assert opened == made and opened.config == ODD and opened.name == "first"


def test_the_folder_has_the_shape_of_the_architecture_page(tmp_path):
    run = create_run(tmp_path / "not" / "there", "first", Config())
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "replay",
        "tensorboard",
    ]
    assert run.metrics_file == run.path / "metrics.jsonl" and run.evaluations_file.name == "evaluations.jsonl"


def test_a_run_opens_by_its_folders_path_wherever_that_lies(tmp_path, monkeypatch):
    made = create_run(tmp_path / "elsewhere", "first", Config())
    assert open_run(made.path, tmp_path / "runs") == made
    monkeypatch.chdir(tmp_path)
    assert open_run("elsewhere/first") == made


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", "/etc", ".hidden", "-flag", "a b", "ä", "x" * 65, "a\n", "a\0"]
)
def test_names_that_are_not_allowed_are_refused_and_leave_nothing(tmp_path, name):
    with pytest.raises(RunError, match=r"expected 1 to 64 letters"):
        create_run(tmp_path / "runs", name, Config())
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "x" * 64])
def test_allowed_names(tmp_path, name):
    assert create_run(tmp_path, name, Config()).path.name == name


def test_a_link_that_leads_out_of_the_runs_folder_is_refused(tmp_path):
    outside = create_run(tmp_path / "outside", "run", Config()).path
    root = tmp_path / "runs"
    root.mkdir()
    (root / "link").symlink_to(outside)
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    for attempt in (lambda: open_run("link", root), lambda: create_run(root, "dangling", Config())):
        with pytest.raises(RunError, match="leads out of"):
            attempt()
    assert not (tmp_path / "nowhere").exists()


def test_the_runs_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert create_run(tmp_path / "runs", "a", Config()) == open_run("a", tmp_path / "runs")


def test_an_existing_run_is_left_alone_and_the_error_says_what_to_do(tmp_path):
    create_run(tmp_path, "first", ODD)
    with pytest.raises(RunError, match=r"'first' exists already in .*choose another --name"):
        create_run(tmp_path, "first", Config())
    assert open_run("first", tmp_path).config == ODD


def test_a_runs_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        create_run(tmp_path / "file", "a", Config())


def test_a_missing_run_names_those_that_exist_newest_first(tmp_path):
    with pytest.raises(RunError, match="holds no runs yet"):
        open_run("cartpole", tmp_path)
    for name in ("cartpole-1", "lander"):
        create_run(tmp_path, name, Config())
        time.sleep(0.02)
    assert run_names(tmp_path) == ["lander", "cartpole-1"]
    with pytest.raises(
        RunError, match=r"did you mean 'cartpole-1'\?\)\. Runs there, newest first: lander, cartpole-1"
    ):
        open_run("cartpole", tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("learner: [", "can't read"),
        ("- 1", "isn't a mapping"),
        ("learner: {speed: 1}", "fit this version.*speed"),
    ],
)
def test_a_broken_config_is_a_run_error(tmp_path, content, problem):
    create_run(tmp_path, "a", Config()).config_file.write_text(content)
    with pytest.raises(RunError, match=problem):
        open_run("a", tmp_path)


def test_a_folder_without_config_is_not_a_run(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(RunError, match=r"has no config\.yaml"):
        open_run("a", tmp_path)


def test_default_name_is_environment_time_seed():
    config = make_config({"environment": {"id": "CartPole-v1"}, "run": {"seed": 7}})
    now = datetime.datetime(2026, 11, 21, 1, 45, 0)
    assert default_run_name(config, now) == "cartpole-20261121-014500-7"
    odd = make_config({"environment": {"id": "openspiel:" + "very/long name " * 9}})
    assert default_run_name(odd, now) == "openspiel-very-long-name-very-lo-20261121-014500-1"


def test_runs_without_a_name_never_meet(tmp_path):
    assert len({create_run(tmp_path, None, Config()).name for _ in range(5)}) == 5


def test_launches_are_counted_and_begin_above_all_reserved_versions(tmp_path):
    run = create_run(tmp_path, "r", ODD)
    first = run.begin_launch()
    assert first == FIRST_LAUNCH
    run.reserve_versions(first, 100)
    run.reserve_versions(first, 200)
    assert run.begin_launch() == Launch(1, 200)
    assert open_run(run.path).begin_launch() == Launch(2, 200)


def test_a_run_of_a_version_that_did_not_count_launches_is_no_new_one(tmp_path):
    run = create_run(tmp_path, "r", ODD)
    (run.checkpoints / "step_00000010").mkdir()
    assert run.begin_launch() == Launch(1, 0)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"launches": "x"}', '{"versions": null}'])
def test_launches_that_can_not_be_read_are_a_run_error(tmp_path, content):
    run = create_run(tmp_path, "r", ODD)
    run.launches_file.write_text(content)
    with pytest.raises(RunError, match=r"launches\.json"):
        run.begin_launch()


def test_a_kill_while_a_run_is_made_leaves_its_name_free(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, "write_atomically", killed)
        create_run(tmp_path, "r", ODD)
    (tmp_path / ".creating-s-1").mkdir()
    (tmp_path / ".creating-s-1" / "config.yaml").write_text("")
    assert run_names(tmp_path) == []
    assert create_run(tmp_path, "r", ODD).name == "r"


def test_datasets_to_import_are_remembered_until_they_are_in(tmp_path):
    run = create_run(tmp_path, "r", ODD)
    assert run.read_datasets() == []
    run.write_datasets([tmp_path / "a.parquet", Path("b")])
    assert open_run(run.path).read_datasets() == [tmp_path / "a.parquet", Path.cwd() / "b"]
    run.write_datasets([])
    assert run.read_datasets() == []


def test_a_launch_that_fails_before_anybody_plays_tells_its_own_reason_beside_the_last_counts(tmp_path):
    run = create_run(tmp_path, "a", Config())
    last = {"state": "finished", "reason": "500 steps were made", "seconds": 9.0, "learner_steps": 500}
    run.write_status({**last, "updated": "2026-01-01T00:00:00+00:00"})
    run.write_counts("starting")
    status = run.read_status()
    began = datetime.datetime.fromisoformat(status.pop("updated")).timestamp()
    assert status == {"run": "a", "state": "starting", "learner_steps": 500}
    assert abs(began - time.time()) < 5
    run.write_counts("failed", "no episode can be learnt from")
    assert run.read_status()["reason"] == "no episode can be learnt from"
    assert run.read_status()["learner_steps"] == 500


@pytest.mark.parametrize("state", ["starting", "running", "laying out"])
def test_a_run_that_nobody_goes_on_with_is_lost(tmp_path, state):
    run = create_run(tmp_path, "a", Config())
    run.write_counts(state)
    assert run.current_status()["state"] == "lost"
    with run.locked():
        assert run.current_status()["state"] == state


def test_status_is_replaced_whole(tmp_path):
    run = create_run(tmp_path, "a", Config())
    assert run.read_status() is None
    run.write_status({"state": "running", "return": float("nan")})
    run.write_status({"state": "finished"})
    assert run.read_status() == json.loads(run.status_file.read_text()) == {"state": "finished"}
    assert not list(run.path.glob(".*"))
    run.status_file.write_text("{")
    with pytest.raises(RunError, match=r"can't read .*status\.json"):
        run.read_status()
