"""Each way in which a Ray can't be had is told as what it is."""

from __future__ import annotations

import pytest
import ray
from ray._private.utils import check_version_info

from distributed_muzero.cluster.connect import why_not
from tests import processes


def test_other_versions_are_named_on_one_line_and_no_token_is_asked_for():
    with pytest.raises(RuntimeError) as mismatch:
        check_version_info({"ray_version": "1.2.3", "python_version": "3.4.5"}, "this node")
    told = why_not("10.0.0.1:6379", mismatch.value)
    assert "started with: Ray: 1.2.3 Python: 3.4.5" in told and f"Ray: {ray.__version__}" in told
    assert "\n" not in told and "token" not in told and "no Ray cluster answers" not in told
    assert "http://HOST:8265" in told


@pytest.mark.parametrize("error", [RuntimeError("boom"), ValueError("boom")])
def test_only_a_cluster_that_does_not_answer_may_want_a_token(error):
    assert "token" not in why_not("10.0.0.1:6379", error)
    assert "boom" in why_not("10.0.0.1:6379", error)
    assert "token" in why_not("10.0.0.1:6379", ConnectionError("boom"))


@pytest.mark.cluster
def test_a_ray_that_cannot_start_here_is_no_cluster_at_an_address(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 100)  # its sockets' paths get too long
    folder.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = processes.run("train", "--preset", "debug", "--runs-dir", tmp_path, "--name", "r")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "error: Ray can't be started on this machine: " in done.stderr and "107 bytes" in done.stderr
    assert "--address" not in done.stderr and "--in-process" in done.stderr
