"""Actors that find no room bring nodes; nodes without work go. Ray's autoscaler, whose nodes are processes here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

from distributed_muzero.cluster.run_control import NAMESPACE
from tests.isolation import in_isolation, why_not_isolated
from tests.processes import started, status, wait_for

why_not = why_not_isolated()
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(400),
    pytest.mark.skipif(why_not is not None, reason=str(why_not)),
]

RAY = Path(sys.prefix) / "bin" / "ray"
MAX_NODES = 3  # besides the head, one actor each
IDLE_MINUTES = 0.1


@pytest.fixture
def measured():
    """Seconds, by what they were spent on; printed at the end."""
    seconds: dict[str, float] = {}
    yield seconds
    for what, number in seconds.items():
        print(f"{number:5.1f} s  {what}")


def start_cluster(folder: Path, second_autoscaler: bool) -> None:
    """A head without CPUs, whose autoscaler may start nodes with one CPU each."""
    no_commands = (
        "initialization",
        "setup",
        "head_setup",
        "worker_setup",
        "head_start_ray",
        "worker_start_ray",
    )
    config: dict[str, Any] = {
        "cluster_name": "test",
        "provider": {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": second_autoscaler,
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "actor": {
                "resources": {"CPU": 1, "object_store_memory": 80 * 2**20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": MAX_NODES,
            },
        },
        "max_workers": MAX_NODES,
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 10.0,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in no_commands},
    }
    file = folder / "cluster.json"
    file.write_text(json.dumps(config))
    head = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": str(int(second_autoscaler)),
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    options = ("--num-cpus=0", f"--object-store-memory={200 * 2**20}", f"--autoscaling-config={file}")
    begun = subprocess.run(
        [RAY, "start", "--head", *options],
        env={**os.environ, **head},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert begun.returncode == 0, begun.stdout + begun.stderr


def num_nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())


@in_isolation
@pytest.mark.parametrize("second_autoscaler", [False, True], ids=["v1", "v2"])
def test_pending_actors_bring_nodes_and_idle_nodes_go(tmp_path, monkeypatch, measured, second_autoscaler):
    start_cluster(tmp_path, second_autoscaler)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    ray.init(namespace=NAMESPACE, log_to_driver=False)
    limits = ("--set", "run.max_train_steps=null", "--max-minutes", 5)

    def actors() -> dict[str, int]:
        return status(tmp_path / "r").get("actors", {})

    def has(**numbers: int) -> bool:
        now = actors()
        return bool(now) and all(now[name] == number for name, number in numbers.items())

    def scale(num_actors: int) -> float:
        control = ray.get_actor("r", namespace=NAMESPACE)
        ray.get(control.set_desired.remote(num_actors=num_actors), timeout=10)
        return time.monotonic()

    assert num_nodes() == 1
    with started(
        "train", "--preset", "debug", "--runs-dir", tmp_path, "--name", "r", "--actors", 1, *limits
    ) as run:
        wait_for("an actor that finds no room", lambda: has(desired=1, live=0, pending=1))
        wait_for("a node for it", lambda: num_nodes() == 2)
        wait_for("its play", lambda: has(live=1, pending=0))

        begun = scale(5)
        wait_for("as many nodes as there may be", lambda: num_nodes() == 1 + MAX_NODES)
        measured["from a demand for more actors to the last node"] = time.monotonic() - begun
        wait_for("play on all of them", lambda: has(desired=5, live=3, pending=2))
        measured["  and to play on all of them"] = time.monotonic() - begun
        time.sleep(3)
        assert num_nodes() == 1 + MAX_NODES and has(live=3, pending=2)

        begun = scale(1)
        wait_for("the end of the others", lambda: has(desired=1, live=1, pending=0, draining=0))
        measured["from a wish for fewer actors to their end"] = time.monotonic() - begun
        wait_for("the end of idle nodes", lambda: num_nodes() == 2)
        measured[f"  and to the end of their nodes (idle for {60 * IDLE_MINUTES:g} s)"] = (
            time.monotonic() - begun
        )
        steps = status(tmp_path / "r")["env_steps"]
        wait_for("more play", lambda: status(tmp_path / "r")["env_steps"] > steps)

        run.terminate()
        _, errors = run.communicate(timeout=40)
        assert run.returncode == 0, errors
    assert status(tmp_path / "r")["restarts"] == 0
    wait_for("a head alone", lambda: num_nodes() == 1)
    ray.shutdown()
