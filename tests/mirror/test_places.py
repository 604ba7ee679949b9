"""Which text is a URI, and what lies at one: to be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed_muzero.errors import RunError
from distributed_muzero.mirror import uri
from distributed_muzero.mirror.download import fetch, names_at
from distributed_muzero.mirror.mirror import Mirror
from distributed_muzero.mirror.remote import Remote
from tests.mirror.folders import contents, pushed, write


def test_a_uri_is_told_from_a_path():
    for text in ("s3://bucket/prefix", "gs://bucket", "file:///folder", "s3:/bucket"):
        assert uri.is_uri(text)
    for text in ("runs", "/data/runs", "./s3", "a:b", "", "C:/runs", Path("runs")):
        assert not uri.is_uri(text)


def test_a_run_lies_below_its_runs_folder_and_before_the_query():
    run = uri.join("s3://bucket/prefix/?region=eu-west-3", "cartpole")
    assert run == "s3://bucket/prefix/cartpole?region=eu-west-3"
    assert uri.split_name(run) == ("s3://bucket/prefix?region=eu-west-3", "cartpole")
    assert uri.join("gs://bucket", "replay", "shard_0") == "gs://bucket/replay/shard_0"
    assert uri.shown(run) == "s3://bucket/prefix/cartpole"


def test_each_uri_has_a_folder_of_its_own_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTRIBUTED_MUZERO_STATE_DIR", str(tmp_path))
    folder = uri.local_runs_dir("s3://bucket/my/runs/")
    assert folder.parent == tmp_path and folder.name.startswith("bucket-my-runs-")
    assert folder == uri.local_runs_dir("s3://bucket/my/runs")
    assert folder != uri.local_runs_dir("s3://bucket/my-runs")
    monkeypatch.delenv("DISTRIBUTED_MUZERO_STATE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert uri.local_runs_dir("s3://b").parent == tmp_path / "home/.local/state/distributed_muzero"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert uri.local_runs_dir("s3://b").parent == tmp_path / "state/distributed_muzero"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3:/bucket/runs", "expected one like s3://bucket/prefix"),
        ("s3:///runs", "names no bucket"),
        ("s3://bucket//runs?region=x", "without #, .. or //"),
        ("s3://bucket/../runs?region=x", "without #, .. or //"),
        ("s3://bucket/runs#1?region=x", "without #, .. or //"),
        ("s3://bucket/runs?regoin=x", "unknown option regoin"),
        ("s3://key:secret@bucket/runs?region=x", "give it by the environment"),
        ("http://host/runs", "Unrecognized filesystem type"),
        ("file://runs", "expected one like"),
        ("file:///", "names no folder"),
        ("gs://bucket/runs?regoin=x", "regoin"),
    ],
)
def test_a_wrong_uri_is_one_clear_error(text, message, tmp_path):
    with pytest.raises(RunError) as error:
        Mirror(tmp_path, text)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "secret" not in str(error.value)


# To be read -------------------------------------------------------------------------------------------------------


def test_fetch_replaces_what_was_there_and_leaves_out_what_isnt_needed(any_uri, tmp_path):
    here = write(tmp_path / "here", config_dot_yaml=b"1", replay__shard_0__log=b"2")
    pushed(here, any_uri)
    read = write(tmp_path / "read", stale=b"x")
    assert contents(fetch(any_uri, read, exclude=("replay",))) == {"config.yaml": b"1"}
    assert contents(fetch(any_uri, read)) == {"config.yaml": b"1", "replay/shard_0/log": b"2"}
    assert {path.name for path in tmp_path.iterdir()} <= {"here", "read", "there"}
    parent, _ = uri.split_name(any_uri)
    with pytest.raises(RunError, match=r"no run at .*nothing lies there"):
        fetch(uri.join(parent, "other"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_runs_of_a_runs_folder_are_those_with_a_config(any_uri, tmp_path):
    parent, _ = uri.split_name(any_uri)
    assert names_at(parent) == []
    for name in ("b", "a"):
        pushed(write(tmp_path / name, config_dot_yaml=b"1"), uri.join(parent, name))
    pushed(write(tmp_path / "half", status=b"1"), uri.join(parent, "half"))
    assert names_at(parent) == ["a", "b"]


def test_a_name_that_leads_out_of_the_folder_is_refused(object_store, bucket, s3_uri, tmp_path):
    object_store.client().put_object(Bucket=bucket, Key="runs/r/a/../../../evil", Body=b"")
    with pytest.raises(RunError, match="no run has such a file"):
        fetch(s3_uri, tmp_path / "read")


def test_a_fetch_while_the_run_goes_on_begins_again_when_a_file_goes(a_uri, tmp_path, monkeypatch):
    here = write(tmp_path / "here", episodes__1=b"1", episodes__2=b"2", journal__1=b"knows 1 and 2")
    mirror = pushed(here, a_uri)
    original = Remote.download

    def download(remote: Remote, name: str, path: Path) -> bool:
        if name == "episodes/1" and (here / "episodes/1").exists():
            (here / "episodes/1").unlink()
            write(here, journal__1=b"knows 2")
            assert mirror.push()
        return original(remote, name, path)

    monkeypatch.setattr(Remote, "download", download)
    assert contents(fetch(a_uri, tmp_path / "read")) == {"episodes/2": b"2", "journal/1": b"knows 2"}
