"""A real Prometheus, with our configuration, scrapes a run of eight actors in a cluster with a token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from distributed_muzero.cluster.process_metrics import BUCKETS, COUNTERS
from tests.cluster.test_jobs import free_port
from tests.processes import command, descendants, find_role, status, wait_for

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
NUM_ACTORS = 8
RUN = '{run="watched"}'
# What status.json and Prometheus both tell.
SHARED = {
    "env_steps": f"distributed_muzero_environment_steps_total{RUN}",
    "episodes": f"distributed_muzero_episodes_total{RUN}",
    "learner_steps": f"distributed_muzero_learner_steps{RUN}",
    "weights_version": f"distributed_muzero_weights_version{RUN}",
    "staleness": f"distributed_muzero_actors_staleness_versions{RUN}",
    "samples_per_insert": f"distributed_muzero_replay_samples_per_insert{RUN}",
    "env_steps_per_second": f"distributed_muzero_environment_steps_per_second{RUN}",
    "undelivered_episodes": f"distributed_muzero_undelivered_episodes_total{RUN}",
    "live": 'distributed_muzero_actors{run="watched", state="live"}',
}

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("promtool")),
        reason="needs prometheus and promtool (Debian's package prometheus)",
    ),
]


class Prometheus:
    def __init__(self, address: str):
        self.address = address

    def ask(self, path: str, **parameters: str) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.load(answer)["data"]

    def vector(self, query: str) -> list[dict[str, Any]]:
        return self.ask("query", query=query)["result"]

    def number(self, query: str) -> float | None:
        """Of the one series that answers; None where none does."""
        found = self.vector(query)
        assert len(found) < 2, found
        return float(found[0]["value"][1]) if found else None

    def samples(self, query: str) -> dict[float, float]:
        """Scrape's time -> value, of one series in the last ten minutes."""
        found = self.vector(f"{query}[10m]")
        assert len(found) == 1, f"{query}: {found}"
        return {moment: float(value) for moment, value in found[0]["values"]}

    def targets(self, job: str) -> list[dict[str, Any]]:
        active = self.ask("targets", state="active")["activeTargets"]
        return [target for target in active if target["labels"]["job"] == job]


class Watched:
    """A run, and who watches it."""

    def __init__(
        self, prometheus: Prometheus, run: subprocess.Popen[bytes], folder: Path, head: int, node: str
    ):
        """head: the process of Ray's head.   node: what selects its series."""
        self.prometheus, self.run, self.folder = prometheus, run, folder
        self.head, self.node = head, node
        self.target_file = folder.parent / ".prometheus" / f"{folder.name}.json"

    def status(self) -> dict[str, Any]:
        assert self.run.poll() is None, (self.folder.parent / "run.log").read_text()[-3000:]
        return status(self.folder)


@contextmanager
def process(arguments: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Ended with all its descendants."""
    with log.open("wb") as file:
        started = subprocess.Popen(arguments, stdout=file, stderr=file, **options)
    try:
        yield started
    finally:
        left = descendants(started.pid)
        started.terminate()
        with suppress(subprocess.TimeoutExpired):
            started.wait(timeout=30)
        started.kill()
        started.wait(timeout=10)
        for child in left:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def head_command(folder: Path, gcs: int, dashboard: int, metrics: int) -> list[str]:
    return [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
        f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={metrics}",
        f"--num-cpus={NUM_ACTORS}",
        "--object-store-memory=200000000", "--disable-usage-stats", f"--temp-dir={folder}/ray",
        '--system-config={"metrics_report_interval_ms": 1000}',
    ]  # fmt: skip


def lay_out(folder: Path, runs: Path, dashboard: int, token: str) -> Path:
    """Our configuration with its paths, but faster, and for another port of the dashboard."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    of_runs, of_ray = config["scrape_configs"]
    of_runs["file_sd_configs"][0]["refresh_interval"] = "1s"
    [discovery] = of_ray["http_sd_configs"]
    assert discovery["url"].startswith("http://127.0.0.1:8265/")
    discovery |= {"url": discovery["url"].replace("8265", str(dashboard)), "refresh_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "rules.yml").symlink_to(MONITORING / "rules.yml")
    (folder / "runs").symlink_to(runs)
    (folder / "ray_token").write_text(token)
    return folder / "prometheus.yml"


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    gcs, dashboard, metrics, port = (free_port() for _ in range(4))
    token = secrets.token_hex(32)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_worker_niceness": "0",
    }
    with ExitStack() as stack:
        # Sockets live in Ray's folder, and their paths may not be longer than 107 bytes.
        folder = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="dm", dir="/tmp", ignore_cleanup_errors=True)
            )
        )
        runs = folder / "all_runs"
        (runs / ".prometheus").mkdir(parents=True)
        head = stack.enter_context(
            process(head_command(folder, gcs, dashboard, metrics), folder / "head.log", env=environment)
        )
        watch = ["--config.file", str(lay_out(folder, runs, dashboard, token))]
        watch += ["--storage.tsdb.path", str(folder / "data"), "--web.listen-address", f"127.0.0.1:{port}"]
        stack.enter_context(process(["prometheus", *watch], folder / "prometheus.log"))
        prometheus = Prometheus(f"127.0.0.1:{port}")
        node = f'instance=~".+:{metrics}"'

        def node_is_up() -> bool:
            assert head.poll() is None, (folder / "head.log").read_text()[-3000:]
            with suppress(OSError):
                return prometheus.number(f"up{{{node}}}") == 1
            return False

        wait_for("Ray's node among Prometheus' targets", node_is_up, timeout=180)
        train = command(
            "train", "--preset", "debug", "--actors", NUM_ACTORS, "--metrics-port", 0, "--runs-dir", runs,
            "--name", "watched", "--set", "run.max_train_steps=null", "--max-minutes", 30,
            "--set", "evaluator.interval_seconds=600",
        )  # fmt: skip
        run = stack.enter_context(
            process(train, runs / "run.log", env={**environment, "RAY_ADDRESS": f"127.0.0.1:{gcs}"})
        )
        found = Watched(prometheus, run, runs / "watched", head.pid, node)
        wait_for("eight actors", lambda: found.status().get("actors", {}).get("live") == NUM_ACTORS, 240)
        wait_for("learner steps", lambda: found.status()["learner_steps"] > 0, timeout=120)
        yield found


def test_every_sample_that_prometheus_took_is_what_the_run_said(watched):
    """The numbers of one scrape belong to one moment of the run, and status.json had that moment's."""
    seen: dict[tuple[float, ...], float] = {}
    began = time.time()
    while time.time() < began + 15:
        told = watched.status()
        told |= {"live": told["actors"]["live"]}
        seen.setdefault(tuple(told[name] for name in SHARED), time.time())
        time.sleep(0.05)
    series = {name: watched.prometheus.samples(query) for name, query in SHARED.items()}
    scrapes = set.intersection(*map(set, series.values()))
    taken = [
        (moment, tuple(series[name][moment] for name in SHARED))
        for moment in sorted(scrapes)
        if began + 2 < moment < began + 13
    ]
    assert len({values for _, values in taken}) >= 4, "the run stood still, or was hardly scraped"
    for moment, values in taken:
        assert values in seen, f"{dict(zip(SHARED, values, strict=True))} was never in status.json"
        # A status is written once a second, right after Prometheus can get its numbers.
        assert abs(seen[values] - moment) < 3


def test_there_are_few_series_and_none_of_the_runs_own_is_an_actors(watched):
    ask = watched.prometheus.number
    own = ask('count({run="watched", job="distributed-muzero", __name__=~"distributed_muzero_.+"})')
    assert own is not None and 50 < own < 90
    labels = {
        name
        for series in watched.prometheus.vector(
            '{run="watched", job="distributed-muzero", __name__=~"distributed_muzero_.+"}'  # none of Prometheus's own
        )
        for name in series["metric"]
    }
    assert labels <= {
        "__name__",
        "run",
        "job",
        "instance",
        "version",
        "role",
        "state",
        "queue",
        "side",
        "reason",
    }
    of_actors = sum(name.startswith("actor_") for name in COUNTERS) * NUM_ACTORS
    of_a_shard = sum(name.startswith("shard_") for name in COUNTERS) + len(BUCKETS) + 3
    count = 'count({__name__=~"ray_distributed_muzero_.+", run="watched"})'
    wait_for("the series of eight actors and a shard", lambda: ask(count) == of_actors + of_a_shard, 120)
    kept = ask(f"scrape_samples_post_metric_relabeling{{{watched.node}}}")
    assert kept is not None and kept < of_actors + of_a_shard + 30
    print(
        f"series: {own:g} of the run's port, {of_actors + of_a_shard} of its processes, {kept:g} kept of Ray's"
    )


def test_a_run_that_stands_still_has_the_same_counts_everywhere(watched):
    """Without a learner, the limiter soon holds all actors back. Their own counts then add up to the run's."""
    [learner] = find_role(watched.head, "LearnerWorker")
    learner.suspend()
    try:
        wait_for("the limiter", lambda: watched.status()["actors_waiting"] > 0.95, timeout=60)
        wait_for("nothing new", lambda: stands_still(watched, 6.0), timeout=60)
        told, prometheus = watched.status(), watched.prometheus
        for name in ("env_steps", "episodes", "learner_steps", "weights_version", "samples_per_insert"):
            assert prometheus.number(SHARED[name]) == told[name]
        sums = {
            "actor_environment_steps": told["env_steps"],
            "actor_episodes": told["episodes"],
            "shard_inserted_transitions": prometheus.number(
                f"distributed_muzero_replay_inserted_transitions_total{RUN}"
            ),
            "shard_sampled_rows": prometheus.number(f"distributed_muzero_replay_sampled_rows_total{RUN}"),
        }
        for name, expected in sums.items():
            assert prometheus.number(f"sum(ray_distributed_muzero_{name}_total{RUN})") == expected
    finally:
        learner.resume()


def stands_still(watched: Watched, seconds: float) -> bool:
    before = watched.status()
    time.sleep(seconds)
    return all(before[name] == watched.status()[name] for name in ("env_steps", "episodes", "learner_steps"))


def test_restarts_and_the_roles_that_can_have_them(watched):
    roles = {
        series["metric"]["role"]
        for series in watched.prometheus.vector(f"distributed_muzero_restarts_total{RUN}")
    }
    assert roles == {"actor", "learner", "replay_shard", "reanalyser", "evaluator", "run_control"}
    [actor] = watched.prometheus.vector('distributed_muzero_restarts_total{run="watched", role="actor"}')
    before = watched.status()["restarts"]
    assert before == watched.prometheus.number(f"sum(distributed_muzero_restarts_total{RUN})")
    find_role(watched.head, "ActorWorker")[0].kill()
    wait_for("its replacement", lambda: watched.status()["restarts"] == before + 1)
    query = 'distributed_muzero_restarts_total{run="watched", role="actor"}'
    wait_for("Prometheus' count", lambda: watched.prometheus.number(query) == float(actor["value"][1]) + 1)
    wait_for("eight actors", lambda: watched.status()["actors"]["live"] == NUM_ACTORS)


def test_promtool_has_nothing_to_say_of_a_runs_metrics(watched):
    with urllib.request.urlopen(watched.status()["metrics"], timeout=10) as answer:
        text = answer.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_rules_are_loaded_and_a_run_at_work_raises_no_alarm(watched):
    assert watched.prometheus.vector('ALERTS{alertstate="firing", severity="critical"}') == []
    [group] = watched.prometheus.ask("rules")["groups"]
    assert len(group["rules"]) > 10
    assert all(rule["health"] == "ok" for rule in group["rules"]), group


def test_the_dashboards_panels_have_something_to_show(watched):
    dashboard = json.loads((MONITORING / "grafana" / "dashboards" / "overview.json").read_text())
    empty = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            query = target["expr"].replace("$run", "watched").replace("$__rate_interval", "1m")
            if not watched.prometheus.vector(query):
                empty.add(target["expr"].partition("{")[0])
    # Nothing was refused, no evaluation has ended, one player has no opponent, there is no curriculum and no GPU.
    allowed = {
        "increase(distributed_muzero_replay_rejects_total",
        "distributed_muzero_evaluation_return_mean",
        "distributed_muzero_evaluation_score",
        "distributed_muzero_evaluation_elo",
        "distributed_muzero_curriculum_stage",
        "distributed_muzero_curriculum_win_rate",
    }
    assert empty <= allowed | {"ray_node_gpus_utilization"}


def test_a_stopped_runs_target_is_gone(watched):
    [target] = watched.prometheus.targets("distributed-muzero")
    assert target["labels"]["run"] == "watched" and watched.target_file.exists()
    last = watched.status()
    watched.run.send_signal(signal.SIGTERM)
    assert watched.run.wait(timeout=120) == 0
    assert not watched.target_file.exists()
    wait_for("a list without it", lambda: not watched.prometheus.targets("distributed-muzero"))
    assert watched.prometheus.vector(SHARED["env_steps"]) == []
    assert status(watched.folder)["env_steps"] >= last["env_steps"]
    assert "metrics" not in status(watched.folder)
