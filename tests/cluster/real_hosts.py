"""Three hosts, as a person would use them: `ray up`, `submit`, `status`, `scale`, a power cut, `stop`, `ray down`.

    python -m tests.cluster.real_hosts

Each host is a set of Linux namespaces with an sshd of its own (tests/cluster/hosts); the cluster file is
deploy/cluster-local.yaml but for what `cluster_file` below changes. Shows every command with its output, then what was
measured. Exit codes: 0, all promises are kept; 1, one is broken, and logs follow; 77, this machine can't do it: it
needs root, sshd, rsync and iproute2. Whatever it starts is gone when it ends, however it ends: see tests/isolation.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from distributed_muzero.chaos.history import check
from distributed_muzero.run_folder import open_run
from tests.cluster.hosts.network import Network
from tests.cluster.hosts.operator import Operator
from tests.isolation import INSIDE, ROOT, isolated, search_path, why_not_isolated
from tests.processes import descendants, find_role, status, wait_for

NOT_POSSIBLE_HERE = 77
ADDRESSES = {"head": "10.214.0.10", "worker-1": "10.214.0.11", "worker-2": "10.214.0.12"}
HEAD, *WORKERS = ADDRESSES
RUN = "demo"
CPUS_PER_WORKER = 4  # more than there are, perhaps: all four actors must find a place on one host
PLAIN = ("--log-style", "pretty", "--log-color", "false")
# Actors that mostly wait for the learner, and a rare evaluation: the commands need some of the cores, too.
MODEST = {
    "run.stop_at_return": "null",
    "actor.record_history": "true",
    "replay.samples_per_insert": 32,
    "evaluator.interval_seconds": 60,
}


def main() -> int:
    if INSIDE in os.environ:
        return play()
    if reason := why_not_isolated("sshd", "ssh", "ssh-keygen", "rsync"):
        print(f"not possible here: {reason}", file=sys.stderr)
        return NOT_POSSIBLE_HERE
    command = isolated([sys.executable, "-m", "tests.cluster.real_hosts"])
    environment = {**os.environ, INSIDE: "1", "PATH": search_path()}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def play() -> int:
    with tempfile.TemporaryDirectory(prefix="hosts", dir="/tmp", ignore_cleanup_errors=True) as folder:
        story = Story(Path(folder))
        try:
            story.tell()
        except Exception as broken:
            print(f"\nBROKEN ({type(broken).__name__}): {broken}", flush=True)
            story.show_logs()
            return 1
        print(f"\nMeasured, on {psutil.cpu_count()} cores in all:")
        for what, seconds in story.measured.items():
            print(f"  {seconds:5.1f} s  {what}")
        return 0


class Story:
    def __init__(self, folder: Path):
        self.folder = folder
        self.network = Network(folder / "hosts")
        self.operator = Operator(folder / "operator")
        self.runs = folder / "shared" / "runs"  # what NFS would be
        self.cluster = self.operator.home / "cluster.yaml"
        self.measured: dict[str, float] = {}

    def tell(self) -> None:
        for name, address in ADDRESSES.items():
            self.network.boot(name, address)
        self.cluster.write_text(yaml.safe_dump(cluster_file(self.network.key, self.runs), sort_keys=False))
        self.launch()
        self.submit()
        self.scale_up()
        self.lose_a_host()
        self.scale_down()
        self.stop()
        self.take_down()

    # The scenes ---------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        self.operator.export(RAY_AUTH_MODE="token")
        self.operator.run("ray", "get-auth-token", "--generate")
        begun = time.monotonic()
        self.operator.run("ray", "up", "--yes", *PLAIN, self.cluster, timeout=180)
        wait_for("a Ray on every host", lambda: all(self.raylets(name) for name in ADDRESSES), 180)
        self.measured["from `ray up` to Ray on all three hosts"] = time.monotonic() - begun
        wait_for("three nodes", lambda: "3 local.cluster.node" in self.ray_status(), 60)
        self.operator.run("ray", "exec", *PLAIN, self.cluster, "ray status", last=20)

    def submit(self) -> None:
        # As shipped, the head's dashboard listens to itself alone, and this tunnel is the way to it.
        with self.operator.meanwhile("ray", "dashboard", self.cluster):
            wait_for("the tunnel", lambda: is_open("127.0.0.1", 8265), 30)
            runs = self.operator.run("distributed-muzero", "runs", "--address", "http://127.0.0.1:8265")
            assert runs.splitlines()[-1] == "none"
        self.operator.export(RAY_API_SERVER_ADDRESS=f"http://{ADDRESSES[HEAD]}:8265")
        options = ("--preset", "cartpole", "--name", RUN)
        for without in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "a" * 64}):
            refused = self.operator.run("distributed-muzero", "submit", *options, exit_code=2, **without)
            assert "error:" in refused and "token" in refused and "Traceback" not in refused
        sets = [word for key, value in MODEST.items() for word in ("--set", f"{key}={value}")]
        begun = time.monotonic()
        small = ("--actors", 2, "--envs-per-actor", 4, "--max-minutes", 20)
        self.operator.run("distributed-muzero", "submit", *options, *small, *sets)
        self.until("2 actors that play", lambda now: now["actors"]["live"] == 2 and now["env_steps"])
        self.measured["from `submit` to two actors that play"] = time.monotonic() - begun
        self.until("learner steps", lambda now: now["learner_steps"] > 0)
        self.show_status(live=2)

    def scale_up(self) -> None:
        before = self.status()["learner_steps"]
        begun = self.scale_to(4)
        self.until("4 actors that play", lambda now: now["actors"]["live"] == 4)
        self.measured["from `scale --actors 4` to four actors that play"] = time.monotonic() - begun
        wait_for("episodes of the new ones", lambda: all(self.has_delivered(index) for index in (2, 3)))
        self.measured["  and to the first episodes of both new ones"] = time.monotonic() - begun
        self.until("more learner steps", lambda now: now["learner_steps"] > before)
        told = self.operator.run("distributed-muzero", "status", RUN, "--json")
        now = json.loads(told.splitlines()[-1])
        assert now["run"] == RUN and now["state"] == "running", told
        assert counts(now, desired=4, live=4, pending=0, draining=0), told

    def lose_a_host(self) -> None:
        victim = next(name for name in WORKERS if self.actors_on(name))
        lost, before = len(self.actors_on(victim)), self.status()
        print(f"\n# The power of {victim} fails; {lost} of the actors were there.", flush=True)
        begun = time.monotonic()
        self.network.cut_power(victim)
        self.until("notice of the loss", lambda now: now["restarts"] >= before["restarts"] + lost)
        self.measured["from a power cut to notice of it"] = time.monotonic() - begun
        self.until("4 actors that play again", lambda now: now["actors"]["live"] == 4)
        self.measured["  and to four actors that play again"] = time.monotonic() - begun
        (survivor,) = set(WORKERS) - {victim}
        assert len(self.actors_on(survivor)) == 4
        self.until("more learner steps", lambda now: now["learner_steps"] > before["learner_steps"])
        self.show_status(live=4)

    def scale_down(self) -> None:
        begun = self.scale_to(1)
        self.until("1 actor, the others drained", lambda now: counts(now, live=1, draining=0))
        wait_for("1 actor's process", lambda: sum(len(self.actors_on(name)) for name in WORKERS) == 1)
        self.measured["from `scale --actors 1` to three actors drained and gone"] = time.monotonic() - begun
        self.show_status(live=1)

    def stop(self) -> None:
        begun = time.monotonic()
        self.operator.run("distributed-muzero", "stop", RUN, timeout=90)
        self.until("its end", lambda now: now["state"] == "stopped", 60)
        self.measured["from `stop` to the end, with a checkpoint"] = time.monotonic() - begun
        runs = self.operator.run("distributed-muzero", "runs")
        assert RUN in runs and "stopped" in runs
        logs = self.operator.run("distributed-muzero", "logs", RUN, last=12)
        assert "was lost" in logs and "a stop was asked for" in logs and "Traceback" not in logs
        assert list((self.runs / RUN / "checkpoints").glob("step_*/DONE"))
        wait_for("no process of the run", lambda: not any(map(self.workers_on, ADDRESSES)), 60)
        capacity = open_run(RUN, self.runs).config.replay.max_transitions
        histories = sorted((self.runs / RUN / "history").glob("*.jsonl"))
        verdict = check(histories, [self.runs / RUN / "replay" / "shard_0"], capacity)
        print(f"\n# Episodes: {verdict.acknowledged} acknowledged, {verdict.lost} of them lost.", flush=True)
        assert verdict.is_good and verdict.acknowledged > 0, verdict

    def take_down(self) -> None:
        begun = time.monotonic()
        self.operator.run("ray", "down", "--yes", *PLAIN, self.cluster)
        wait_for("the end of every Ray", lambda: not any(map(self.raylets, ADDRESSES)), 120)
        self.measured["from `ray down` to the end of the last Ray"] = time.monotonic() - begun

    # What they look at --------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        return status(self.runs / RUN)

    def until(self, what: str, condition: Callable[[dict[str, Any]], object], timeout: float = 90) -> None:
        def holds() -> object:
            now = self.status()
            assert not now or now["state"] != "failed", f"the run failed while waiting for: {what}"
            return now and condition(now)

        wait_for(what, holds, timeout)

    def show_status(self, live: int) -> None:
        told = self.operator.run("distributed-muzero", "status", RUN)
        assert f"{live} of {live} live" in told and "running" in told

    def scale_to(self, num_actors: int) -> float:
        """Returns when it was typed, in monotonic seconds."""
        begun = time.monotonic()
        self.operator.run("distributed-muzero", "scale", RUN, "--actors", num_actors)
        return begun

    def ray_status(self) -> str:
        return self.operator.quietly("ray", "exec", self.cluster, "ray status").stdout

    def has_delivered(self, index: int) -> bool:
        """Whether an actor's first episode was acknowledged by a shard."""
        files = (self.runs / RUN / "history").glob(f"actor_{index}_*.jsonl")
        return any('"ok"' in file.read_text() for file in files)

    def raylets(self, name: str) -> list[psutil.Process]:
        return [process for process in self.processes(name) if named(process, "raylet")]

    def actors_on(self, name: str) -> list[psutil.Process]:
        return find_role(self.network.processes[name].pid, "ActorWorker")

    def workers_on(self, name: str) -> list[psutil.Process]:
        roles = ("ActorWorker", "LearnerWorker", "ReplayShardWorker", "EvaluatorWorker")
        pid = self.network.processes[name].pid
        return [process for role in roles for process in find_role(pid, role)]

    def processes(self, name: str) -> list[psutil.Process]:
        return descendants(self.network.processes[name].pid)

    def show_logs(self) -> None:
        self.operator.run("distributed-muzero", "logs", RUN, exit_code=None)
        for name, address in ADDRESSES.items():
            print(f"\n# {name}")
            logs = self.network.ssh(
                address, "tail -n 40 /tmp/ray/session_latest/logs/{monitor,raylet,gcs_server}.*"
            )
            print(logs.stdout[-6000:], (self.folder / "hosts" / name / "sshd.log").read_text()[-1000:])


def is_open(address: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0


def counts(now: dict[str, Any], **numbers: int) -> bool:
    return all(now["actors"][name] == number for name, number in numbers.items())


def named(process: psutil.Process, name: str) -> bool:
    try:
        return process.name() == name and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def cluster_file(key: Path, runs: Path) -> dict[str, Any]:
    """deploy/cluster-local.yaml, filled in for these hosts.

    What differs beyond addresses, key and runs folder: the environment that runs this script stands in for an
    installed one; the dashboard can be reached from outside without a tunnel; hosts that share a machine's cores and
    memory are told how much of them is theirs.
    """
    config = yaml.safe_load((ROOT / "deploy" / "cluster-local.yaml").read_text())
    head, *workers = ADDRESSES.values()
    config["provider"] |= {"head_ip": head, "worker_ips": workers}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(key)}
    config["initialization_commands"] = [f"mkdir -p ~/muzero && ln -sfn {sys.prefix} ~/muzero/venv"]
    config["setup_commands"] = [
        command.replace("/mnt/muzero/runs", str(runs))
        for command in config["setup_commands"]
        if "pip install" not in command
    ]
    start = config["head_start_ray_commands"]
    start[-1] = start[-1].replace("127.0.0.1", "0.0.0.0") + " --num-cpus=0 --object-store-memory=300000000"
    config["worker_start_ray_commands"][-1] += (
        f" --num-cpus={CPUS_PER_WORKER} --object-store-memory=200000000"
    )
    return config


if __name__ == "__main__":
    sys.exit(main())
