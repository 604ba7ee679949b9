"""A run at a URI through real Ray processes, each shard with a copy of its own: killed with all it has on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed_muzero import checkpoint
from distributed_muzero.mirror.uri import local_runs_dir
from distributed_muzero.replay.inspection import list_all_held
from distributed_muzero.workers.runs import current_status, names_in, open_to_read
from tests.object_store import ObjectStore, environment
from tests.processes import run, started, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_SHARDS = 2


@pytest.fixture
def s3(monkeypatch) -> Iterator[str]:
    store = ObjectStore()
    uri = f"s3://{store.new_bucket()}/runs"
    known = {**environment(store), "DISTRIBUTED_MUZERO_RUNS_DIR": uri, "DISTRIBUTED_MUZERO_COPY_SECONDS": "1"}
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    yield uri
    store.stop()


def held_ids(replay: Path) -> list[list[str]]:
    """Of each shard, in the order in which it stored them."""
    ids: list[list[str]] = [[] for _ in range(NUM_SHARDS)]
    for held in sorted(list_all_held(replay), key=lambda held: held.key):
        ids[held.shard].append(held.episode_id)
    return ids


@pytest.mark.long
def test_killed_with_its_machine_a_run_goes_on_elsewhere_from_its_last_copy(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTRIBUTED_MUZERO_STATE_DIR", str(tmp_path / "a"))
    forever = ("--set", "run.max_train_steps=null", "--max-minutes", 3)
    with started("train", "--preset", "debug", "--name", "r", "--shards", NUM_SHARDS, *forever):
        copied = wait_for(
            "a copied checkpoint", lambda: current_status("r", s3) if saved_step(s3) else None, timeout=120
        )
        assert copied["state"] == "running" and copied["copy"]["failures"] == 0
        pushed = held_ids(open_to_read("r", s3).replay)
        step = saved_step(s3)
    assert all(pushed)

    acknowledged = held_ids(local_runs_dir(s3) / "r" / "replay")
    shutil.rmtree(tmp_path / "a")
    monkeypatch.setenv("DISTRIBUTED_MUZERO_STATE_DIR", str(tmp_path / "b"))
    found = held_ids(open_to_read("r", s3).replay)
    for before, now, all_of_them in zip(pushed, found, acknowledged, strict=True):
        assert now[: len(before)] == before
        assert now == all_of_them[: len(now)]

    resumed = run("resume", "r", "--take-over", "--max-train-steps", saved_step(s3) + 500)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from" in resumed.stderr and "Traceback" not in resumed.stderr
    status = current_status("r", s3)
    assert status["state"] == "finished" and status["env_steps"] > copied["env_steps"]
    assert saved_step(s3) >= step + 500
    there, here = open_to_read("r", s3).replay, local_runs_dir(s3) / "r" / "replay"
    last = held_ids(there)
    assert last == held_ids(here)
    for before, now in zip(found, last, strict=True):
        assert now[: len(before)] == before
    assert sum(map(len, last)) > sum(map(len, found))
    ids = [name for shard in last for name in shard]
    assert len(set(ids)) == len(ids)


def saved_step(uri: str) -> int:
    """Of the newest checkpoint in the copy; 0 before the first."""
    if "r" not in names_in(uri):
        return 0
    saved = checkpoint.latest_checkpoint(open_to_read("r", uri, exclude=("replay",)).checkpoints)
    return saved.step if saved else 0
