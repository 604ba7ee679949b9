"""Runs as jobs of a real cluster with a token: everything through the commands, as from a laptop."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from distributed_muzero import checkpoint
from distributed_muzero.chaos.history import check
from distributed_muzero.cluster.jobs import (
    COMMAND_KEY,
    RUN_KEY,
    STOP_WAIT_SECONDS,
    cluster_address,
    commands_to_forget,
    entrypoint,
    is_http,
    last_error,
    last_json,
    lost_nothing,
    place_in,
    reason_over,
)
from distributed_muzero.config import make_config
from distributed_muzero.errors import ClusterError
from distributed_muzero.run_folder import create_run, open_run
from tests.processes import command, descendants, wait_for

# Few samples an insert: the limiter lets drained actors go soon.
FOREVER = (
    "--set", "run.max_train_steps=null", "--max-minutes", 5, "--set", "replay.samples_per_insert=4",
)  # fmt: skip
RECORDED = ("--set", "actor.record_history=true")
COIN = """
import numpy as np
from distributed_muzero.environments.base import EnvironmentSpec


class Coin:
    spec = EnvironmentSpec("coin", (2,), np.dtype(np.float32), (2,))
    truncated = False

    def initial_state(self, seed=None):
        self.side = np.random.default_rng(seed).integers(2)
        return np.eye(2, dtype=np.float32)[self.side]

    def step(self, action):
        return float(action == self.side), np.zeros(2, np.float32), True

    def mask(self):
        return np.ones(2)

    def to_play(self):
        return 0

    def close(self):
        pass


def make_coin(config):
    return Coin()
"""


class Cluster(NamedTuple):
    http: str
    gcs: str
    runs_dir: Path
    environment: dict[str, str]
    pid: int

    def run(
        self, *arguments: object, expect: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command(*arguments),
            capture_output=True,
            text=True,
            timeout=200,
            env={**self.environment, **environment},
        )
        assert done.returncode == expect, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def outside(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run(*arguments, "--address", self.http, **options)

    def inside(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """As on a node."""
        return self.run(*arguments, "--address", self.gcs, **options)

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """From outside, to be waited for."""
        return subprocess.Popen(
            command(*arguments, "--address", self.http),
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def status(self, run: str) -> dict[str, Any]:
        return json.loads(self.inside("status", run, "--json").stdout)

    def workers(self, run: str) -> list[psutil.Process]:
        """The run's driver and, as only one run goes on, all of its processes."""
        return [process for process in descendants(self.pid) if is_of_a_run(process, run)]


def is_of_a_run(process: psutil.Process, run: str) -> bool:
    with suppress(psutil.NoSuchProcess):
        title = " ".join(process.cmdline())
        return f"--name {run}" in title or (title.startswith("ray::") and "Worker" in title)
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    ports = [free_port() for _ in range(3)]
    # Sockets live in Ray's folder, and their paths may not be longer than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="dm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        runs_dir = Path(folder) / "runs"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_worker_niceness": "0",
            "DISTRIBUTED_MUZERO_RUNS_DIR": str(runs_dir),
        }
        head = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
                f"--port={ports[0]}", f"--dashboard-port={ports[1]}", "--dashboard-host=127.0.0.1",
                f"--dashboard-agent-listen-port={ports[2]}", "--num-cpus=6",
                "--object-store-memory=200000000", "--disable-usage-stats", f"--temp-dir={folder}/ray",
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        found = Cluster(
            f"http://127.0.0.1:{ports[1]}", f"127.0.0.1:{ports[0]}", runs_dir, environment, head.pid
        )
        try:
            wait_for("the cluster", lambda: answers(found))
            yield found
        finally:
            left = descendants(head.pid)
            head.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                head.wait(timeout=30)
            for process in [*left, psutil.Process(head.pid)] if head.poll() is None else left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            head.wait(timeout=10)


def answers(found: Cluster) -> bool:
    done = subprocess.run(
        command("runs", "--address", found.http), capture_output=True, timeout=60, env=found.environment
    )
    return done.returncode == 0


cluster_test = [pytest.mark.cluster, pytest.mark.slow]


class TestALifeFromOutside:
    pytestmark = cluster_test

    def test_submit_status_scale_stop(self, cluster):
        submitted = cluster.outside(
            "submit", "--preset", "debug", "--name", "life", "--actors", 2, *FOREVER, *RECORDED, "--json"
        )
        found = json.loads(submitted.stdout)
        assert found == {"run": "life", "job": "life", "folder": str(cluster.runs_dir / "life")}

        wait_for("learner steps", lambda: cluster.status("life").get("learner_steps", 0) > 0)
        status = json.loads(cluster.outside("status", "life", "--json").stdout)
        assert status["run"] == "life" and status["state"] == "running"
        assert status["actors"]["desired"] == 2 and status["shards"] == 1

        refused = cluster.outside("submit", "--preset", "debug", "--name", "life", expect=2)
        assert "run 'life' is going on (job life)" in refused.stderr

        desired = json.loads(cluster.outside("scale", "life", "--actors", 3, "--json").stdout)
        assert desired["num_actors"] == 3
        wait_for("three actors", lambda: cluster.status("life")["actors"]["live"] == 3)
        cluster.inside("scale", "life", "--actors", 1)
        wait_for("one actor", lambda: cluster.status("life")["actors"]["desired"] == 1)
        wait_for("its games", lambda: cluster.status("life")["actors"]["draining"] == 0)
        assert cluster.status("life")["undelivered_episodes"] == 0

        assert "run life in" in cluster.outside("logs", "life").stdout
        watching = cluster.start("status", "life", "--watch", "--json")
        following = cluster.start("logs", "life", "-f")
        assert len(cluster.workers("life")) >= 5
        assert "run life has stopped" in cluster.outside("stop", "life").stdout
        wait_for("its processes' end", lambda: not cluster.workers("life"))
        seen, _ = watching.communicate(timeout=60)
        assert json.loads(seen.splitlines()[-1])["state"] == "stopped"
        assert "stopped after" in following.communicate(timeout=60)[0]
        assert (watching.returncode, following.returncode) == (0, 0)
        saved = checkpoint.latest_checkpoint(cluster.runs_dir / "life" / "checkpoints")
        last = cluster.status("life")
        assert last["state"] == "stopped"
        assert saved is not None and saved.step == last["learner_steps"]
        assert "isn't going on: it has stopped" in cluster.outside("stop", "life", expect=2).stderr
        assert "isn't going on" in cluster.inside("scale", "life", "--actors", 2, expect=2).stderr

    @pytest.mark.long
    def test_a_stopped_run_is_resumed_with_other_shards_and_rays_own_stop_writes_a_checkpoint(self, cluster):
        folder = cluster.runs_dir / "life"
        before = cluster.status("life")
        taken = cluster.outside("submit", "--preset", "debug", "--name", "life", expect=2)
        assert "exists (stopped); choose another --name, or go on with it: --resume auto" in taken.stderr
        cluster.outside(
            "submit", "--preset", "debug", "--name", "life", "--resume", "auto", *FOREVER, *RECORDED
        )
        wait_for(
            "more steps", lambda: cluster.status("life").get("learner_steps", 0) > before["learner_steps"]
        )
        cluster.inside("scale", "life", "--shards", 3)
        wait_for("three shards", lambda: len(list((folder / "replay").glob("shard_*"))) == 3)
        more = cluster.status("life")["learner_steps"]
        wait_for("steps with them", lambda: cluster.status("life")["learner_steps"] > more)
        ray = str(Path(sys.executable).parent / "ray")
        subprocess.run(
            [ray, "job", "stop", "life-launch-2", "--address", cluster.http],
            env=cluster.environment,
            check=True,
            capture_output=True,
            timeout=STOP_WAIT_SECONDS + 20,
        )
        wait_for("its processes' end", lambda: not cluster.workers("life"))
        last = cluster.status("life")
        assert (last["state"], last["shards"]) == ("stopped", 3)
        saved = checkpoint.latest_checkpoint(folder / "checkpoints")
        assert saved is not None and saved.step == last["learner_steps"]
        cluster.run("replay", "verify", "life")
        shards = sorted((folder / "replay").glob("shard_*"))
        capacity = open_run(folder).config.replay.max_transitions // 3
        verdict = check(sorted((folder / "history").glob("*.jsonl")), shards, capacity=capacity)
        assert verdict.acknowledged > 0 and verdict.is_good, verdict
        lines = [json.loads(line) for line in cluster.outside("runs", "--json").stdout.splitlines()]
        assert [(line["job"], line["state"]) for line in lines if line["run"] == "life"] == [
            ("life-launch-2", "stopped"),
            ("life", "stopped"),
        ]

    @pytest.mark.long
    def test_a_run_that_is_over_goes_on_with_other_limits_and_shards_and_is_told_as_it_is(
        self, cluster, tmp_path
    ):
        first = ("submit", "--preset", "debug", "--name", "brief")
        again = (*first, "--resume", "auto")
        cluster.outside(*first, "--max-train-steps", 20, "--max-minutes", 5)
        wait_for("its end", lambda: cluster.status("brief")["state"] == "finished")
        over = cluster.outside(*again, "--max-train-steps", 20)
        assert "nothing is left to do: run brief is over" in over.stdout

        refused = cluster.outside(*again, "--set", "network.embedding_size=7", expect=2)
        assert "can't become 7" in refused.stderr
        failed = cluster.status("brief")
        assert failed["state"] == "failed" and failed["learner_steps"] >= 20

        # A run of that name in a folder of this machine, where Ray finds the cluster, is another one.
        for name in ("brief", "mine"):
            create_run(tmp_path, name, make_config({})).write_status({"run": name, "state": "finished"})
        here = {"RAY_TMPDIR": str(cluster.runs_dir.parent), "DISTRIBUTED_MUZERO_RUNS_DIR": str(tmp_path)}
        told = [
            json.loads(cluster.run("status", name, "--json", **here).stdout) for name in ("brief", "mine")
        ]
        assert [status["state"] for status in told] == ["failed", "finished"]

        more = ("--set", "run.max_train_steps=null", "--max-minutes", 0.2, "--set", "replay.num_shards=2")
        assert "run brief in" in cluster.outside(*again, *more).stdout
        wait_for("its end", lambda: cluster.status("brief")["state"] == "finished")
        assert len(list((cluster.runs_dir / "brief" / "replay").glob("shard_*"))) == 2
        asking = [cluster.start("status", "brief", "--json") for _ in range(3)]
        answers = [process.communicate(timeout=120)[0] for process in asking]
        assert [process.returncode for process in asking] == [0, 0, 0]
        assert {json.loads(answer)["shards"] for answer in answers} == {2}

    @pytest.mark.long
    def test_a_stop_at_once_ends_all_without_a_checkpoint(self, cluster):
        cluster.outside(
            "submit", "--preset", "debug", "--name", "haste", *FOREVER, "--set", "learner.checkpoint_seconds=1000",
            "--set", "evaluator.interval_seconds=1000",
        )  # fmt: skip
        wait_for("learner steps", lambda: cluster.status("haste").get("learner_steps", 0) > 0)
        assert "run haste has stopped" in cluster.outside("stop", "haste", "--now").stdout
        wait_for("its processes' end", lambda: not cluster.workers("haste"))
        assert not list((cluster.runs_dir / "haste" / "checkpoints").glob("step_*"))

    @pytest.mark.long
    def test_watch_follows_a_run_to_its_end_and_ctrl_c_ends_the_view_alone(self, cluster):
        cluster.outside("submit", "--preset", "debug", "--name", "seen", *FOREVER)
        wait_for("learner steps", lambda: cluster.status("seen").get("learner_steps", 0) > 0)
        watching, leaving = cluster.start("watch", "seen"), cluster.start("watch", "seen")
        assert leaving.stdout is not None and watching.stdout is not None
        for process in (leaving, watching):
            line = process.stdout.readline()
            assert line.startswith("seen running · time ") and "losses total " in line and "GB free" in line
        leaving.send_signal(signal.SIGINT)
        leaving.communicate(timeout=60)
        assert leaving.returncode == 0
        assert cluster.status("seen")["state"] == "running"
        cluster.outside("stop", "seen")
        lines = watching.communicate(timeout=60)[0].splitlines()
        assert lines[-1].startswith("seen stopped: it was asked to stop")
        assert watching.returncode == 0

    @pytest.mark.long
    def test_a_wheel_brings_an_environment_of_ones_own(self, cluster, tmp_path):
        wheel = make_wheel(tmp_path)
        cluster.outside(
            "submit", "--env", "coin", "--package", wheel, "--name", "coins", "--max-train-steps", 30,
            "--set", "replay.min_size_to_sample=100", "--set", "network.hidden_sizes=[8]",
        )  # fmt: skip
        wait_for("its end", lambda: cluster.status("coins")["state"] == "finished")
        assert cluster.status("coins")["learner_steps"] >= 30

    def test_a_run_that_cannot_start_says_why(self, cluster):
        (cluster.runs_dir / "there" / "checkpoints").mkdir(parents=True)
        refused = cluster.outside("submit", "--preset", "debug", "--name", "there", expect=2)
        assert "did not start, its job has failed: run 'there' exists already" in refused.stderr


class TestMistakes:
    pytestmark = cluster_test

    def test_a_runs_folder_that_would_go_with_the_job(self, cluster):
        assert "goes with it: give an absolute path" in cluster.run(
            "train", "--preset", "debug", "--runs-dir", "runs", expect=2, RAY_JOB_CONFIG_JSON_ENV_VAR="{}"
        ).stderr  # fmt: skip

    def test_a_wrong_token_and_none(self, cluster):
        wrong = cluster.outside("runs", expect=2, RAY_AUTH_TOKEN=secrets.token_hex(32))
        assert "refused the token" in wrong.stderr
        none = cluster.outside("submit", "--preset", "debug", expect=2, RAY_AUTH_MODE="disabled")
        assert "refused the token" in none.stderr and "RAY_AUTH_TOKEN" in none.stderr

    def test_a_wrong_token_on_a_node(self, cluster):
        answer = cluster.inside("scale", "x", "--actors", 2, expect=2, RAY_AUTH_TOKEN=secrets.token_hex(32))
        assert "another token than this one may be the cause" in answer.stderr

    def test_no_cluster_there(self, cluster):
        answer = cluster.run("runs", "--address", f"http://127.0.0.1:{free_port()}", expect=2)
        assert "no Ray cluster answers at http://127.0.0.1" in answer.stderr
        assert "no Ray cluster answers" in cluster.run(
            "status", "x", "--address", f"127.0.0.1:{free_port()}", expect=2
        ).stderr  # fmt: skip

    def test_no_such_run(self, cluster):
        for ask in (cluster.outside, cluster.inside):
            assert "no run 'nobody'" in ask("status", "nobody", "--json", expect=2).stderr
        assert "no run 'nobody'" in cluster.outside("logs", "nobody", expect=2).stderr

    def test_training_where_only_jobs_are_taken(self, cluster, tmp_path):
        answer = cluster.run(
            "train", "--preset", "debug", "--runs-dir", tmp_path, expect=2, RAY_ADDRESS=cluster.http
        )
        assert "or use `submit`" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scale", "r"], "say what is to change"),
        (["scale", "r", "--autoscale", "8:2"], "expected MIN:MAX"),
        (["scale", "r", "--autoscale", "1:4", "--actors", "2"], "give one of them"),
        (["submit", "--preset", "debug", "--name", "../up"], "run name '../up'"),
        (["submit", "--preset", "debug", "--package", "folder"], "expected a wheel"),
        (["submit", "--preset", "debug", "--resume", "auto"], "give it with --name"),
        (["submit"], "exactly one of --preset"),
        (["submit", "--preset", "debug", "--runs-dir", "runs"], "expected an absolute path on the cluster"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_cluster_is_asked(arguments, message):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_the_address_is_the_one_given_else_the_one_that_rays_tools_read(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster_address(None) is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster_address(None) == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://10.0.0.1:8265/")
    assert cluster_address(None) == "http://10.0.0.1:8265"
    assert cluster_address("auto") == "auto"
    assert is_http("https://x") and not is_http("auto") and not is_http(None)


def test_a_jobs_command_is_quoted():
    assert entrypoint(["train", "--set", "a.b={c: 1}"]).endswith("train --set 'a.b={c: 1}'")


def test_the_answer_is_the_last_json_line_among_rays_own():
    assert last_json('2026 INFO\n{"state": 1}\n{"state": 2}\n{broken\nbye') == {"state": 2}
    with pytest.raises(ClusterError, match="can't be read"):
        last_json("nothing")


def test_a_failed_commands_last_error_is_what_it_said():
    assert last_error("Running\nerror: first\nerror: no run\n  two lines\n") == "no run\n  two lines"
    assert last_error("Traceback\nboom") == "Traceback\nboom"
    assert "printed nothing" in last_error("\n")


STARTED = "Ray says something\nrun r in /mnt/my in runs/r\nstarting its workers\n"


def test_where_a_run_lies_is_told_once_it_has_begun():
    assert place_in(STARTED) == "/mnt/my in runs/r"
    assert place_in("run: /mnt/runs/r\nrun r is over\n") is None


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("", True),
        ("120 stored episodes: 120 new\n", True),
        (STARTED, False),
        (f"{STARTED}env steps 3\nstopped after 3.1 s: a stop was asked for\n", True),
        (f"{STARTED}finished after 3.1 s: 5 learner steps were made\n", True),
        (f"{STARTED}failed after 3.1 s\n", False),
    ],
)
def test_a_job_lost_nothing_if_it_ended_by_itself_or_had_not_begun(output, expected):
    assert lost_nothing(output) is expected


def test_a_run_that_was_over_before_its_job_says_which_limit():
    over = "run r is over: 200 learner steps were made (run.max_train_steps 200)"
    assert reason_over(f"Ray\nnothing is left to do: {over}\n") == over
    assert reason_over(f"error: {over}\n") is None


def test_a_small_job_is_forgotten_by_who_asked_and_by_others_only_a_minute_later():
    def job(name, end, key=COMMAND_KEY, status=JobStatus.SUCCEEDED):
        return JobDetails(
            type=JobType.SUBMISSION, submission_id=name, status=status, entrypoint="", metadata={key: "status"},
            end_time=end,
        )  # fmt: skip

    listed = [
        job("left long ago", 100_000),
        job("a minute before", 940_000),
        job("read by another now", 940_001),
        job("own", 1_000_000),
        job("ended later", 1_000_500, status=JobStatus.FAILED),
        job("at work", None, status=JobStatus.RUNNING),
        job("a run", 100_000, RUN_KEY),
    ]
    assert commands_to_forget(listed, "own") == ["own", "left long ago", "a minute before"]
    assert commands_to_forget(listed, "at work") == []


def make_wheel(folder: Path) -> Path:
    """A package with the environment `coin`, as a build backend would pack it."""
    wheel = folder / "coins-1.0-py3-none-any.whl"
    info = "coins-1.0.dist-info"
    files = {
        "coins.py": COIN,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: coins\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[distributed_muzero.environments]\ncoin = coins:make_coin\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel
