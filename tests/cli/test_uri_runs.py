"""A runs folder at a URI, as a user has it: a real server that speaks S3, machines that know nothing but the URI."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distributed_muzero import checkpoint
from distributed_muzero.cluster.program import ReplayShardWorker
from distributed_muzero.cluster.run_control import Desired
from distributed_muzero.config import load_preset, make_config
from distributed_muzero.errors import RunError
from distributed_muzero.mirror.download import fetch, names_at
from distributed_muzero.mirror.uri import local_runs_dir
from distributed_muzero.replay.inspection import list_all_held
from distributed_muzero.run_folder import create_run, locked
from distributed_muzero.workers import runs
from distributed_muzero.workers.launching import check_can_begin
from distributed_muzero.workers.replay_shard import ReplayShard
from distributed_muzero.workers.run_copy import Copies, ShardCopy, interval_seconds
from distributed_muzero.workers.runs import (
    Place,
    await_silence,
    created,
    current_status,
    open_to_read,
    opened,
)
from tests.episodes import SPEC, make_episode
from tests.processes import run, started, wait_for

DEBUG = ("--preset", "debug", "--in-process")
FOREVER = ("--set", "run.max_train_steps=null", "--max-minutes", 3)


def succeed(*arguments: object) -> tuple[str, str]:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def fail(*arguments: object) -> str:
    """The one error that the command ends with."""
    done = run(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    return done.stderr.partition("error: ")[2]


def last_json(*arguments: object) -> dict:
    return json.loads(succeed(*arguments, "--json")[0].splitlines()[-1])


def held_ids(runs_dir: str) -> list[str]:
    return [held.episode_id for held in list_all_held(open_to_read("r", runs_dir).replay)]


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_as_if_nothing_had_happened(s3, on_machine):
    output, _ = succeed("train", *DEBUG, "--name", "r", "--shards", 2, "--max-train-steps", 40)
    assert f"run: {s3}/r" in output
    first = current_status("r", s3)
    assert first["state"] == "finished" and first["folder"] == f"{s3}/r"
    assert first["copy"]["uri"] == f"{s3}/r" and first["copy"]["failures"] == 0
    ids = held_ids(s3)
    assert len(ids) == first["episodes"] > 0
    saved = checkpoint.latest_checkpoint(open_to_read("r", s3).checkpoints)
    assert saved.step == first["learner_steps"]
    launches = json.loads((local_runs_dir(s3) / "r/launches.json").read_text())

    shutil.rmtree(on_machine("a"))
    on_machine("b")
    _, told = succeed("resume", "r", "--in-process", "--max-train-steps", 80)
    before = re.search(r"going on from (\d+) environment steps, (\d+) learner steps", told)
    assert [int(count) for count in before.groups()] == [first["env_steps"], first["learner_steps"]]
    second = current_status("r", s3)
    assert second["learner_steps"] >= 80 and second["episodes"] > first["episodes"]
    assert second["weights_version"] >= launches["versions"] + 10**6
    later = held_ids(s3)
    assert set(ids) < set(later) and len(set(later)) == len(later) == second["episodes"]

    on_machine("c")
    assert last_json("evaluate", "r", "--episodes", 2)["episodes"] == 2
    assert last_json("replay", "verify", "r")["ok"]
    assert last_json("replay", "verify", f"{s3}/r")["ok"]
    assert "2" in succeed("replay", "stats", "r")[0]
    assert "2 replay shards and can't have 3" in fail("resume", "r", "--shards", 3, "--in-process")
    listed = [json.loads(line) for line in succeed("runs", "--json")[0].splitlines()]
    assert listed == [{"run": "r", "state": "finished"}]
    assert last_json("status", "r")["learner_steps"] == second["learner_steps"]


@pytest.mark.slow
def test_episodes_are_imported_into_a_run_at_a_uri_and_learnt_from(there, on_machine, tmp_path):
    succeed("train", *DEBUG, "--name", "r", "--max-train-steps", 30)
    ids = held_ids(there)
    succeed("replay", "export", "r", tmp_path / "all.parquet")
    for name, dataset in (("file", tmp_path / "all.parquet"), ("uri", f"{there}/r")):
        on_machine(name)
        succeed("train", *DEBUG, "--name", name, "--offline", dataset, "--max-train-steps", 20)
        found = list_all_held(open_to_read(name, there).replay)
        assert sorted(held.episode_id for held in found) == sorted(ids)
    on_machine("d")
    counts = last_json("replay", "import", "file", tmp_path / "all.parquet")
    assert (counts["stored"], counts["duplicates"]) == (0, len(ids))


@pytest.mark.slow
def test_names_that_are_taken_or_unknown_and_folders_without_a_copy(there, tmp_path):
    succeed("train", *DEBUG, "--name", "r", "--max-train-steps", 10)
    assert f"run 'r' exists already in {there}" in fail("train", *DEBUG, "--name", "r")
    assert "did you mean 'r'?" in fail("evaluate", "rr")
    shutil.rmtree(tmp_path / "there/r")
    assert f"{local_runs_dir(there) / 'r'} is there, but no copy" in fail("train", *DEBUG, "--name", "r")
    assert "holds no runs yet" in fail("resume", "r", "--in-process")


def test_a_uri_that_leads_nowhere_is_one_clear_error_and_leaves_nothing(s3, tmp_path):
    for uri, message in (
        ("s3://there-is-no-such-bucket/runs", "there is no such bucket"),
        ("s3:/bucket/runs", "expected one like s3://bucket/prefix"),
        ("s4://bucket/runs", "expected one like s3://bucket/prefix"),
    ):
        assert message in fail("train", *DEBUG, "--name", "r", "--runs-dir", uri)
        assert not list(tmp_path.glob("a/*/*")), uri
    assert "holds no runs yet" in fail("evaluate", "r", "--runs-dir", f"{s3}-mistyped")


def test_a_store_that_does_not_answer_when_a_run_begins_is_told(object_store, s3):
    object_store.stop()
    try:
        assert "can't be reached" in fail("train", *DEBUG, "--name", "r")
    finally:
        object_store.start()


@pytest.mark.slow
@pytest.mark.long
def test_who_takes_a_run_over_ends_it_elsewhere_but_not_by_mistake(there, on_machine):
    with started("train", *DEBUG, "--name", "r", *FOREVER) as process:
        status = Path(there[7:], "r/status.json")
        wait_for(
            "a copied status",
            lambda: status.exists() and json.loads(status.read_text())["state"] == "running",
        )
        on_machine("b")
        refused = fail("resume", "r", "--in-process")
        assert "run 'r' is going on" in refused and "--take-over" in refused
        assert process.poll() is None
        _, told = succeed("resume", "r", "--in-process", "--take-over", "--max-minutes", 0.3)
        taken_over_at = int(re.search(r"going on from .* (\d+) learner steps", told)[1])
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2 and "has taken the run over" in errors, errors
    assert current_status("r", there)["learner_steps"] > taken_over_at
    assert last_json("replay", "verify", "r")["ok"]
    ids = held_ids(there)
    assert len(set(ids)) == len(ids)


def test_failed_copies_never_become_fewer_when_a_shard_begins_anew(there, on_machine):
    with created(there, "r", make_config({})) as (_, copies):
        copies.push()
        counts = [copies.state([{"failed_pushes": number}])["failures"] for number in (2, 2, 0, 1)]
    assert counts == [2, 2, 2, 3]


def test_who_asks_for_what_a_run_cant_have_does_not_end_it_elsewhere(there, on_machine):
    with created(there, "r", make_config({})) as (_, copies):
        copies.push()
        on_machine("b")
        for options, message in (
            (("--shards", 4), "can't have 4"),
            (("--set", "network.name=other"), "network.name"),
            (("--set", "learner.batch_size=none"), "batch_size"),
        ):
            assert message in fail("resume", "r", "--in-process", "--take-over", *options)
        copies.push()
        copies.check()
    assert not local_runs_dir(there).exists()


def test_who_could_not_go_on_does_not_end_a_run_elsewhere(there, on_machine):
    with (
        created(there, "r", make_config(load_preset("debug"))) as (folder, copies),
        socket.socket() as holder,
    ):
        folder.write_status({"run": "r", "state": "running", "env_steps": 500, "learner_steps": 90})
        checkpoint.write_checkpoint(folder.checkpoints, 80, {"weights": {"w": np.ones(3)}}, {})
        checkpoint.mark_best(folder.checkpoints, 80, 7.5)
        copies.push()
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        on_machine("b")
        for options, message in (
            (("--max-env-steps", 500), "run r is over: 500 environment steps were played"),
            (("--max-train-steps", 80), "run r is over: 80 learner steps were made"),
            (("--stop-at-return", 7), "run r is over: an evaluation reached a mean return of 7.5"),
            (("--metrics-port", holder.getsockname()[1]), "metrics can't be served"),
        ):
            assert message in fail("resume", "r", "--in-process", "--take-over", *options)
        copies.push()
        copies.check()


def test_a_run_whose_last_steps_were_lost_is_not_over(there, on_machine):
    """Its status was copied after its last checkpoint: it goes on from that one."""
    config = make_config({"run": {"max_train_steps": 90}})
    with created(there, "r", config) as (folder, copies):
        folder.write_status({"run": "r", "state": "running", "learner_steps": 90})
        checkpoint.write_checkpoint(folder.checkpoints, 80, {"weights": {"w": np.ones(3)}}, {})
        copies.push()
    on_machine("b")
    with opened("r", there, pytest.fail, True, check=check_can_begin) as (again, _):
        assert again.read_status()["learner_steps"] == 90


def test_a_disk_that_is_a_file_is_told_with_the_variable_that_names_another(there, on_machine):
    with created(there, "r", make_config({})):
        pass
    on_machine("b").write_text("")
    expected = "can't make .*/b/.*Not a directory.*DISTRIBUTED_MUZERO_STATE_DIR"
    with pytest.raises(RunError, match=expected), opened("r", there, print):
        pass


def test_a_new_run_whose_state_folder_cant_be_made_is_told_the_variable_too(there, on_machine):
    on_machine("b").write_text("")
    expected = "can't make .*/b/.*name a writable disk with room by DISTRIBUTED_MUZERO_STATE_DIR"
    with pytest.raises(RunError, match=expected) as error, created(there, "r", make_config({})):
        pass
    assert "--runs-dir" not in str(error.value)
    on_machine("a")
    with created(there, "r", make_config({})):
        pass
    on_machine("b")
    with pytest.raises(RunError, match=expected):
        open_to_read("r", there)


def test_who_loses_the_race_to_make_a_run_leaves_the_winner_alone(there, tmp_path, monkeypatch):
    winner = tmp_path / "winner"
    winner.mkdir()
    (winner / "config.yaml").write_text("{}")
    won: list[Copies] = []

    def names_before_the_winner_comes(uri: str) -> list[str]:
        found = names_at(uri)
        won.append(Copies(winner, f"{there}/r"))
        won[0].claim_new()
        return found

    monkeypatch.setattr(runs, "names_at", names_before_the_winner_comes)
    with (
        pytest.raises(RunError, match="another process has just made it"),
        created(there, "r", make_config({})),
    ):
        pass
    (winner / "config.yaml").write_text("{run: {}}")
    won[0].push()
    assert Path(there[7:], "r/config.yaml").read_text() == "{run: {}}"
    assert not (local_runs_dir(there) / "r").exists()


def test_a_disk_without_room_for_a_run_does_not_end_it_elsewhere(there, on_machine, monkeypatch):
    with created(there, "r", make_config({})) as (folder, copies):
        copies.claim_shards(1)
        (folder.replay / "shard_0/log").write_bytes(bytes(100_000))
        copies.push()
        here = on_machine("b")
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 950_000, 50_000)
        )
        expected = r"has room for 50000.*DISTRIBUTED_MUZERO_STATE_DIR"
        taking_over = opened("r", there, pytest.fail, take_over=True)
        with pytest.raises(RunError, match=expected) as error, taking_over:
            pass
        assert str(here) in str(error.value)
        copies.push()
        copies.check()
    # What lies here already takes no room.
    on_machine("a")
    with opened("r", there, pytest.fail) as (_, again):
        again.claim_shards(1)


def test_a_lock_that_cant_be_opened_is_no_other_process(there, tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(RunError, match=r"can't lock .*/lock.* Is a directory"), locked(tmp_path):
        pass
    with created(there, "r", make_config({})):
        pass
    lock = local_runs_dir(there) / "r/lock"
    lock.unlink()
    lock.mkdir()
    expected = r"can't lock .*name a writable disk with room by DISTRIBUTED_MUZERO_STATE_DIR"
    with pytest.raises(RunError, match=expected), opened("r", there, pytest.fail):
        pass


# What a shard's own process sees to, and what can't change --------------------------------------------------------


def test_a_shard_takes_no_copy_back_from_the_run_that_took_it_over(there, tmp_path):
    run_uri = f"{there}/r"
    copies = Copies(tmp_path / "a", run_uri)
    copies.claim()
    owned = copies.owned
    first = ShardCopy(tmp_path / "a", owned, 0)
    later = Copies(tmp_path / "b", run_uri)
    later.claim()
    second = ShardCopy(tmp_path / "b", later.owned, 0)
    with pytest.raises(RunError, match="has taken over"):
        ShardCopy(tmp_path / "a", owned, 0)
    first.begin()
    assert "taken the run over" in first.end()
    with pytest.raises(RunError, match="taken the run over"):
        first.stats()
    second.begin()
    (tmp_path / "b/replay/shard_0/log").write_bytes(b"1")
    assert second.end() is None
    assert (Path(there[7:]) / "r/replay/shard_0/log").read_bytes() == b"1"


@pytest.mark.parametrize("in_driver", [False, True])
def test_what_an_earlier_run_of_the_same_name_left_on_a_node_is_not_taken_for_the_new_ones(
    there, tmp_path, in_driver
):
    """Games get the same ids in both: those of the new run must not be taken for known ones."""

    def claim_shard(copies: Copies) -> ShardCopy | None:
        if not in_driver:
            return ShardCopy(tmp_path / "node", copies.owned, 0)
        copies.claim_shards(1)
        return None

    def play(seed: int) -> tuple[str, int]:
        shard = ReplayShard(SPEC, make_config({}), 0, tmp_path / "node/replay/shard_0")
        [reply] = shard.insert([make_episode(10, name="r/0/0/1", seed=seed)])
        shard.close()
        return reply.status, len(list_all_held(tmp_path / "node/replay"))

    run_uri = f"{there}/r"
    driver = tmp_path / "node" if in_driver else tmp_path / "driver"
    first = Copies(driver, run_uri)
    first.claim()
    copy = claim_shard(first)
    assert play(1) == ("stored", 1)
    if copy:
        copy.begin()
        assert copy.end() is None
    first.push()

    shutil.rmtree(there[7:])
    second = Copies(tmp_path / "elsewhere", run_uri)
    second.claim()
    (tmp_path / "elsewhere/config.yaml").write_text("{}")
    second.push()
    if in_driver:
        second = Copies(driver, run_uri)
        second.claim()
    copy = claim_shard(second)
    assert play(2) == ("stored", 1)
    # Its own folder is kept as ever.
    again = Copies(driver if in_driver else tmp_path / "elsewhere", run_uri)
    again.claim()
    claim_shard(again)
    assert play(2) == ("duplicate", 1)


def test_a_shard_on_a_node_that_does_not_see_the_runs_folder_says_so(tmp_path):
    config = make_config({"replay": {"spread_shards": True}})
    shell = ReplayShardWorker.__ray_actor_class__(config, "r", 0, tmp_path / "absent")
    with pytest.raises(RunError, match=r"absent isn't there on node .*shared file system or at a URI"):
        _ = shell.shard


def test_a_run_at_a_uri_is_not_scaled_to_other_shards():
    desired = Desired(1, 0, 2, shards_stay=True)
    assert desired.changed(num_shards=2, num_actors=3).num_actors == 3
    with pytest.raises(RunError, match="has 2 replay shards and keeps them"):
        desired.changed(num_shards=3)


def test_the_first_checkpoint_counts_once_it_is_copied_whole(there, tmp_path):
    run, copied = tmp_path / "run", Path(there[7:], "r")
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    checkpoint.write_checkpoint(run / "checkpoints", 5, {"weights": {"w": np.ones(3)}}, {})
    copies = Copies(run, f"{there}/r")
    copies.claim()
    copies.push()
    (copied / "checkpoints/step_00000005/DONE").rename(tmp_path / "DONE")
    # As a kill leaves it while the first checkpoint is copied.
    fetched = fetch(f"{there}/r", tmp_path / "read")
    assert checkpoint.latest_checkpoint(fetched / "checkpoints") is None
    Copies(tmp_path / "b", f"{there}/r").claim()
    assert checkpoint.latest_checkpoint(tmp_path / "b/checkpoints") is None
    (tmp_path / "DONE").rename(copied / "checkpoints/step_00000005/DONE")
    fetched = fetch(f"{there}/r", tmp_path / "read")
    assert checkpoint.latest_checkpoint(fetched / "checkpoints").step == 5


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "1e9"])
def test_a_pause_between_copies_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("DISTRIBUTED_MUZERO_COPY_SECONDS", text)
    with pytest.raises(RunError, match="expected seconds from"):
        interval_seconds()


def test_what_a_kill_left_before_the_first_copy_is_in_nobodys_way(there):
    config = make_config({})
    create_run(local_runs_dir(there), "r", config)
    with created(there, "r", config) as (folder, copies):
        assert copies is not None and folder.uri == f"{there}/r"
    assert (Path(there[7:]) / "r/config.yaml").exists()


# How long a dead run is waited for ----------------------------------------------------------------------------------


@pytest.fixture
def place(there) -> Place:
    place = Place(there, "r")
    folder = Path(there[7:], "r")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    (folder / "status.json").write_text('{"state": "running"}')
    return place


class Time:
    """A clock that goes on while somebody sleeps; `then` happens in each sleep."""

    def __init__(self, then: Callable[[], object] = lambda: None):
        self.now = 5.0
        self._then = then

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._then()

    def wait(self, place: Place, owner: str = "it", tell: Callable[[str], object] = lambda _: None) -> float:
        """For how long `await_silence` did, with a patience of 60 s."""
        began = self.now
        await_silence(place, owner, tell, 60.0, self.sleep, lambda: self.now)
        return self.now - began


@pytest.mark.parametrize("state", ["running", "starting"])
@pytest.mark.parametrize("written_at", [1000, 10**11])
def test_one_that_may_live_is_watched_for_the_whole_patience_whatever_the_clocks_say(
    place, state, written_at
):
    status = Path(place.uri[7:], "status.json")
    status.write_text(json.dumps({"state": state}))
    os.utime(status, (written_at, written_at))
    told: list[str] = []
    assert 60 <= Time().wait(place, "process 7", told.append) <= 61
    assert len(told) == 1 and "process 7" in told[0] and "waiting 60 s" in told[0]


def test_a_run_that_has_long_copied_nothing_is_shown_as_lost(place):
    os.utime(Path(place.uri[7:], "status.json"), (1000, 1000))
    assert current_status("r", place.runs)["state"] == "lost"
    Path(place.uri[7:], ".alive").write_text("1")
    assert current_status("r", place.runs)["state"] == "running"


def test_a_run_that_has_said_nothing_yet_is_about_to_start_until_it_has_long_copied_nothing(place):
    Path(place.uri[7:], "status.json").unlink()
    assert current_status("r", place.runs) == {"run": "r", "state": "starting"}
    os.utime(Path(place.uri[7:], "config.yaml"), (1000, 1000))
    assert current_status("r", place.runs) == {"run": "r", "state": "lost"}


def test_a_lost_run_has_counts_and_nobody_at_work(place):
    status = Path(place.uri[7:], "status.json")
    status.write_text(
        '{"run": "r", "state": "running", "env_steps": 9, "actors": {"live": 4}, "metrics": "here"}'
    )
    os.utime(status, (1000, 1000))
    assert current_status("r", place.runs) == {"run": "r", "state": "lost", "env_steps": 9}


def test_a_run_that_seldom_copies_is_lost_after_two_of_its_own_pauses(place):
    Path(place.uri[7:], ".owner").write_text('{"interval_seconds": 300}')
    for silent_seconds, state in ((500, "running"), (700, "lost")):
        written_at = time.time() - silent_seconds
        os.utime(Path(place.uri[7:], "status.json"), (written_at, written_at))
        assert current_status("r", place.runs)["state"] == state


def test_one_that_copies_again_lives_and_one_that_says_its_over_is_not_waited_for(place):
    status = Path(place.uri[7:], "status.json")
    for sign in (status.with_name(".alive"), status):
        time = Time(lambda sign=sign: sign.write_text('{"state": "running", "learner_steps": 1}'))
        with pytest.raises(RunError, match="run 'r' is going on: it has just copied it"):
            time.wait(place)
        assert time.now < 10
    assert Time(lambda: status.write_text('{"state": "stopped"}')).wait(place) == 1
    assert Time().wait(place) == 0


def test_a_run_that_has_said_nothing_yet_may_live(there, on_machine):
    with created(there, "r", make_config({})) as (folder, copies):
        on_machine("b")
        assert 60 <= Time().wait(Place(there, "r")) <= 61

        def begin(_: str) -> None:
            folder.write_counts("starting")
            copies.push()

        with pytest.raises(RunError, match="run 'r' is going on"), opened("r", there, begin):
            pass


def test_a_process_that_has_just_begun_is_waited_for_by_its_own_interval(there, on_machine, monkeypatch):
    with created(there, "r", make_config({})) as (folder, copies):
        folder.begin_launch()
        folder.write_counts("starting")
        copies.push()
        on_machine("b")
        waits = []
        monkeypatch.setattr(
            "distributed_muzero.workers.runs.await_silence", lambda place, *rest: waits.append(rest)
        )
        with opened("r", there, pytest.fail) as (again, _):
            assert again.read_status()["state"] == "starting"
    assert waits[0][0].startswith(f"process {os.getpid()}") and waits[0][2] == 60
    monkeypatch.setenv("DISTRIBUTED_MUZERO_COPY_SECONDS", "100")
    on_machine("c")
    Copies(local_runs_dir(there) / "r", f"{there}/r").claim()
    monkeypatch.setenv("DISTRIBUTED_MUZERO_COPY_SECONDS", "1")
    on_machine("d")
    with opened("r", there, pytest.fail):
        assert waits[1][2] == 200
