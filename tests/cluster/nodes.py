"""Several nodes on this machine, and a run that joins them as a user's command would."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil
import ray
from ray.cluster_utils import Cluster

from distributed_muzero.chaos.history import Verdict, check, read_episodes
from distributed_muzero.chaos.live_run import read_history
from distributed_muzero.cluster.run_control import NAMESPACE
from distributed_muzero.run_folder import open_run
from distributed_muzero.types import Episode
from tests.processes import command, descendants, find_role, wait_for

# A node that is gone is seen after two seconds.
FAST_DEATH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "health_check_timeout_ms": 1000,
}
CHAIN = ("--set", "environment.id=chain", "--set", "environment.kwargs={length: 12, start: 6}")
SLOW_CHAIN = ("--set", "environment.id=slow_chain", "--set", "environment.kwargs={pause_seconds: 0.01}")
# Neither side waits for the other, so that each shows what happens to it alone.
LOOSE = ("--set", "replay.samples_per_insert=2", "--set", "replay.error_buffer=100000")
ENDLESS = (
    "--set", "run.max_train_steps=null", "--max-minutes", 10, "--set", "actor.record_history=true",
    "--set", "evaluator.interval_seconds=600", "--set", "actor.envs_per_actor=2",
)  # fmt: skip
REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 120.0
END_SECONDS = 40.0


class Nodes:
    """A head without CPUs, so that everything that asks for one lives elsewhere."""

    def __init__(self, folder: str):
        self.environment = {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}", "RAY_worker_niceness": "0"}
        _install_slow_chain(Path(folder))
        with patch.dict(os.environ, self.environment):
            self.cluster = Cluster(
                head_node_args={
                    "num_cpus": 0, "include_dashboard": False, "temp_dir": folder, "_system_config": FAST_DEATH,
                },
                initialize_head=True,
                shutdown_at_exit=False,
            )  # fmt: skip

    def add(self, num_cpus: int, environment: dict[str, str] | None = None, **options: Any) -> Any:
        """environment: variables for the new node's processes."""
        with patch.dict(os.environ, {**self.environment, **(environment or {})}):
            return self.cluster.add_node(num_cpus=num_cpus, **options)

    def workers(self, node: Any) -> list[psutil.Process]:
        return descendants(_raylet(node).pid)

    def lose(self, node: Any) -> None:
        """As when its machine goes: none of its processes gets to end by itself."""
        workers = self.workers(node)
        _raylet(node).kill()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        self.cluster.remove_node(node, allow_graceful=False)


@contextmanager
def connected_nodes(*num_cpus: int) -> Iterator[Nodes]:
    """A head and so many nodes; this process is connected to them."""
    # Sockets live in Ray's folder, and their paths may not be longer than 107 bytes.
    with (
        tempfile.TemporaryDirectory(prefix="dm", dir="/tmp", ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ),
    ):
        os.environ.pop("RAY_ADDRESS", None)
        nodes = Nodes(folder)
        try:
            for number in num_cpus:
                nodes.add(number)
            ray.init(address=nodes.cluster.address, namespace=NAMESPACE, log_to_driver=False)
            yield nodes
        finally:
            left = descendants(os.getpid())
            ray.shutdown()
            nodes.cluster.shutdown()
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


class Name(NamedTuple):
    """Who played an episode: `run/index/incarnation/number`."""

    index: int
    incarnation: int


class ClusterRun:
    """A run that `distributed-muzero train` started; the tests' view of it."""

    def __init__(
        self, nodes: Nodes, runs_dir: Path, *options: object, environment: dict[str, str] | None = None
    ):
        """It is called as its folder is, and so as no other test's.   environment: variables for its driver."""
        self.name = runs_dir.name
        self.path = runs_dir / self.name
        self._errors = runs_dir / "stderr.txt"
        arguments = ("--preset", "debug", *ENDLESS, "--runs-dir", runs_dir, "--name", self.name, *options)
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command("train", *arguments),
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={
                    **os.environ,
                    **nodes.environment,
                    "RAY_ADDRESS": nodes.cluster.address,
                    **(environment or {}),
                },
            )

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def wait(self, what: str, condition: Any, timeout: float = START_SECONDS) -> Any:
        """Polls until the condition gives something true, and returns that. Fails also when the run has ended."""

        def look() -> Any:
            assert self.process.poll() is None, f"the run ended before {what}: {self.errors[-3000:]}"
            return condition()

        try:
            return wait_for(what, look, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.status()}\n{self.errors[-3000:]}") from None

    def begin(self) -> None:
        """Waits until it learns."""
        self.wait("learner steps", lambda: self.learner_steps > 0)

    def end(self) -> None:
        """SIGTERM; the run drains what it can, and ends well."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(END_SECONDS) == 0, self.errors[-3000:]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    # How it stands ----------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        with suppress(FileNotFoundError):
            return json.loads((self.path / "status.json").read_text())
        return {}

    def actors(self, key: str) -> int:
        return self.status().get("actors", {}).get(key, 0)

    @property
    def learner_steps(self) -> int:
        return self.status().get("learner_steps", 0)

    @property
    def env_steps(self) -> int:
        return self.status().get("env_steps", 0)

    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines so far."""
        lines = (self.path / "metrics.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def ask(self, **wishes: Any) -> None:
        """As `scale` does."""
        ray.get(ray.get_actor(self.name, namespace=NAMESPACE).set_desired.remote(**wishes), timeout=30)

    def processes(self, role: str) -> list[psutil.Process]:
        """Those of a Ray class, on all nodes."""
        return find_role(os.getpid(), role)

    def actor_processes(self) -> dict[Name, psutil.Process]:
        """By the history that each writes."""
        found = {}
        for process in self.processes("ActorWorker"):
            with suppress(psutil.Error):
                for file in process.open_files():
                    if match := re.search(rf"{self.name}/history/actor_(\d+)_(\d+)\.jsonl$", file.path):
                        found[Name(int(match[1]), int(match[2]))] = process
        return found

    def histories(self) -> dict[Name, list[dict[str, Any]]]:
        """The events of each actor so far."""
        found = {}
        for path in (self.path / "history").glob("actor_*.jsonl"):
            _, index, incarnation = path.stem.split("_")
            found[Name(int(index), int(incarnation))] = read_history(path)
        return found

    # What it leaves ---------------------------------------------------------------------------------------------

    def judge(self, num_games: int) -> None:
        """Ends it once more games than that are acknowledged: all of them are stored, once and unchanged."""

        def acknowledged() -> int:
            return sum(event["event"] == "ok" for history in self.histories().values() for event in history)

        self.wait("games to judge", lambda: acknowledged() > num_games)
        self.end()
        verdict = self.verdict()
        assert verdict.is_good and verdict.acknowledged > num_games, verdict

    def verdict(self) -> Verdict:
        """Whether all that was acknowledged is stored, once and unchanged."""
        replay = open_run(self.path).config.replay
        shards = [self.path / "replay" / f"shard_{index}" for index in range(replay.num_shards)]
        histories = sorted((self.path / "history").glob("*.jsonl"))
        return check(histories, shards, capacity=replay.max_transitions // replay.num_shards)

    def episodes(self) -> list[Episode]:
        """All that were ever stored."""
        folders = sorted((self.path / "replay").glob("shard_*"))
        return [item.episode for folder in folders for item in read_episodes(folder)]

    def versions(self) -> dict[Name, list[int]]:
        """Of the weights that each actor's episodes ended with, in the order in which it finished them."""
        found: dict[Name, list[tuple[int, int]]] = defaultdict(list)
        for episode in self.episodes():
            _, index, incarnation, number = episode.episode_id.rsplit("/", 3)
            found[Name(int(index), int(incarnation))].append((int(number), episode.weights_version))
        return {name: [version for _, version in sorted(played)] for name, played in found.items()}


@contextmanager
def run_in(
    nodes: Nodes, runs_dir: Path, *options: object, environment: dict[str, str] | None = None
) -> Iterator[ClusterRun]:
    """A run that learns. However the test ends, the run and its processes are gone afterwards."""
    run = ClusterRun(nodes, runs_dir, *options, environment=environment)
    try:
        run.begin()
        yield run
    finally:
        run.kill()
        roles = ("ActorWorker", "ReplayShardWorker", "LearnerWorker", "EvaluatorWorker", "RunControl")
        for process in (process for role in roles for process in run.processes(role)):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def played_after(history: list[dict[str, Any]], moment: float = 0.0) -> float | None:
    """When (monotonic) an actor first offered an episode after `moment`."""
    times = [event["time"] for event in history if event["event"] == "invoke" and event["time"] > moment]
    return min(times, default=None)


def unanswered(history: list[dict[str, Any]]) -> set[str]:
    """Episodes that were offered and neither acknowledged nor refused."""
    ids: dict[str, set[str]] = defaultdict(set)
    for event in history:
        ids[event["event"]].add(event["id"])
    return ids["invoke"] - ids["ok"] - ids["fail"]


def _raylet(node: Any) -> subprocess.Popen[bytes]:
    (raylet,) = [infos[0].process for kind, infos in node.all_processes.items() if kind == "raylet"]
    return raylet


def _install_slow_chain(folder: Path) -> None:
    """As a package that declares its environment, so that every process of a run finds it by name."""
    package = folder / "slow_chain-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: slow_chain\nVersion: 1\n")
    entry = "[distributed_muzero.environments]\nslow_chain = tests.cluster.slow_chain:make\n"
    (package / "entry_points.txt").write_text(entry)
