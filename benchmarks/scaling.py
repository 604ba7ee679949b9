"""Scales a run that plays and learns from a few actors to many and back, and prints how long that takes, in Markdown.

    python benchmarks/scaling.py --rounds 3 --few 2 --many 8 --json scaling.json -- --preset debug

What stands behind `--` goes to `distributed-muzero train`. All processes are on this machine; Ray is told of as many
CPUs as there are actors. Seconds are from the request: until a new actor offers its first finished game, until all are
at work, until the last answer to a dismissed actor's finished games, and until its process is gone. Afterwards every
episode that was acknowledged is looked for in the shards.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray

from distributed_muzero.chaos.history import Verdict, check
from distributed_muzero.chaos.live_run import read_history
from distributed_muzero.cluster.run_control import NAMESPACE
from distributed_muzero.run_folder import open_run

NAME = "scaling"
POLL_SECONDS = 0.05
PATIENCE_SECONDS = 300.0
FIGURES = {
    "first_game": "until a new actor's first game",
    "all_at_work": "until all are at work",
    "delivered": "until a dismissed actor's last game is answered",
    "gone": "until a dismissed actor is gone",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="up and down, so many times")
    parser.add_argument("--few", type=int, default=2)
    parser.add_argument("--many", type=int, default=8)
    parser.add_argument("--pause", type=float, default=10.0, help="seconds of work between two requests")
    parser.add_argument("--json", type=Path, help="a file for the figures, every single one of them")
    parser.add_argument("options", nargs="*", help="for `train`")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")
    with tempfile.TemporaryDirectory(prefix="dm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        context = ray.init(
            address="local", num_cpus=arguments.many, namespace=NAMESPACE, include_dashboard=False,
            log_to_driver=False, _temp_dir=f"{folder}/ray",
        )  # fmt: skip
        try:
            result = measure(Path(folder), context.address_info["gcs_address"], arguments)
        finally:
            ray.shutdown()
    print_table(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result) + "\n")
    if result["lost"] or result["undelivered"]:
        sys.exit("games were lost")


def measure(runs: Path, address: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "distributed_muzero", "train", "--runs-dir", str(runs), "--name", NAME,
        "--actors", str(arguments.few), "--set", "actor.record_history=true",
        "--set", "run.max_train_steps=null", "--max-minutes", "60", *arguments.options,
    ]  # fmt: skip
    environment = {**os.environ, "RAY_ADDRESS": address}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        try:
            run = Watched(runs / NAME, process)
            run.wait("learner steps", lambda: run.status().get("learner_steps"))
            seconds: dict[str, list[float]] = {name: [] for name in FIGURES}
            for _ in range(arguments.rounds):
                time.sleep(arguments.pause)
                run.grow(arguments.many, seconds)
                time.sleep(arguments.pause)
                run.shrink(arguments.few, seconds)
            undelivered = run.status()["undelivered_episodes"]
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_SECONDS)
        finally:
            process.kill()
    verdict = run.verdict()
    return {
        "seconds": seconds,
        "cpus": os.cpu_count(),
        "few": arguments.few,
        "many": arguments.many,
        "acknowledged": verdict.acknowledged,
        "lost": verdict.lost,
        "duplicates": verdict.duplicates,
        "undelivered": undelivered,
    }


class Watched:
    """The run, by what it writes and which processes it has."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]):
        self.path = path
        self.process = process

    def grow(self, number: int, seconds: dict[str, list[float]]) -> None:
        before = self.first_games()
        began = self.ask(number)
        self.wait("all actors", lambda: self.status()["actors"]["live"] == number)
        seconds["all_at_work"].append(time.monotonic() - began)
        new = number - len(self.processes(began))
        self.wait("their first games", lambda: len(self.first_games().keys() - before.keys()) == new)
        seconds["first_game"] += [
            moment - began for name, moment in self.first_games().items() if name not in before
        ]

    def shrink(self, number: int, seconds: dict[str, list[float]]) -> None:
        staying = {f"actor_{index}" for index in range(number)}
        there = self.processes()
        began = self.ask(number)
        while there:
            gone = {process for process in there if not process.is_running()}
            seconds["gone"] += [time.monotonic() - began] * len(gone)
            there -= gone
            if len(there) == number and self.status()["actors"]["draining"] == 0:
                break
            assert time.monotonic() - began < PATIENCE_SECONDS, "waited in vain for actors to leave"
            time.sleep(POLL_SECONDS)
        for path in self.histories():
            last = max((e["time"] for e in read_history(path) if e["event"] == "ok"), default=0.0)
            if path.stem.rpartition("_")[0] not in staying and last > began:
                seconds["delivered"].append(last - began)

    def ask(self, number: int) -> float:
        """Returns when (monotonic seconds)."""
        began = time.monotonic()
        control = ray.get_actor(NAME, namespace=NAMESPACE)
        ray.get(control.set_desired.remote(num_actors=number), timeout=PATIENCE_SECONDS)
        return began

    def processes(self, started_before: float | None = None) -> set[psutil.Process]:
        """The actors'; those that are older than a moment (monotonic seconds)."""
        found = set()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                age = time.time() - process.create_time()
                is_old = started_before is None or age > time.monotonic() - started_before
                if is_old and " ".join(process.cmdline()).startswith("ray::ActorWorker"):
                    found.add(process)
        return found

    def first_games(self) -> dict[str, float]:
        """When each actor offered its first finished game."""
        found = {path.stem: (read_history(path) or [None])[0] for path in self.histories()}
        return {name: event["time"] for name, event in found.items() if event}

    def histories(self) -> list[Path]:
        return sorted((self.path / "history").glob("actor_*.jsonl"))

    def status(self) -> dict[str, Any]:
        with suppress(FileNotFoundError):
            return json.loads((self.path / "status.json").read_text())
        return {}

    def wait(self, what: str, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"waited in vain for {what}; exit code of the run: {self.process.poll()}")
            time.sleep(POLL_SECONDS)

    def verdict(self) -> Verdict:
        replay = open_run(self.path).config.replay
        shards = [self.path / "replay" / f"shard_{index}" for index in range(replay.num_shards)]
        return check(self.histories(), shards, capacity=replay.max_transitions // replay.num_shards)


def print_table(result: dict[str, Any]) -> None:
    print(f"{result['few']} → {result['many']} → {result['few']} actors, {result['cpus']} CPUs, seconds\n")
    print("| | n | median | least | most |\n|---|---|---|---|---|")
    for name, what in FIGURES.items():
        if values := result["seconds"][name]:
            middle, least, most = statistics.median(values), min(values), max(values)
            print(f"| {what} | {len(values)} | {middle:.2f} | {least:.2f} | {most:.2f} |")
    print(
        f"\n{result['acknowledged']} episodes acknowledged, {result['lost']} lost, {result['duplicates']} twice; "
        f"{result['undelivered']} finished games left undelivered by dismissed actors"
    )


if __name__ == "__main__":
    main()
