"""Trains, kills every process of the run, resumes it, and draws the return before and after; one run for each seed.

    python benchmarks/resume_curve.py --seeds 1 2 3 --figure docs/figures/resume.svg

Evaluations play 20 games without noise. The table compares the last three before the kill with the first after it
and with the last three of all. Needs matplotlib: `pip install 'distributed_muzero[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from distributed_muzero.chaos.child import kill_session

SLACK_SECONDS = 120.0


class Curve(NamedTuple):
    seed: int
    killed: float  # seconds after the first evaluation, as all times here
    seconds: list[float]
    returns: list[float]
    transitions: tuple[int, int]  # stored, as last told before the kill and first told after it


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="cartpole")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--seconds", type=float, default=90.0, help="of training, before the kill and after it"
    )
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    curves = []
    print("| seed | evaluations | last 3 before | first after | last 3 | transitions before | after |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory(prefix="dm") as folder:
            curves.append(train_and_kill(Path(folder), arguments.preset, seed, arguments.seconds))
        print_row(curves[-1])
    if arguments.figure:
        draw(curves, arguments.figure)


def train_and_kill(folder: Path, preset: str, seed: int, seconds: float) -> Curve:
    """Trains for `seconds`, kills all, resumes for `seconds`."""
    program = [sys.executable, "-m", "distributed_muzero"]
    new = ["--preset", preset, "--seed", str(seed), "--runs-dir", str(folder), "--name", "run"]
    new += ["--set", "run.stop_at_return=null", "--set", "run.max_minutes=null"]
    run = folder / "run"
    with (folder / "errors.txt").open("wb") as errors:
        process = start([*program, "train", *new], errors)
        try:
            time.sleep(seconds)
        finally:
            kill_session(process)
        killed, lines = time.time(), len(read(run / "metrics.jsonl"))
        resume = [*program, "resume", str(run), "--max-minutes", str(seconds / 60)]
        process = start(resume, errors)
        try:
            code = process.wait(seconds + SLACK_SECONDS)
        finally:
            kill_session(process)
    if code:
        sys.exit(f"seed {seed}: resume ended with {code}: {(folder / 'errors.txt').read_text()[-2000:]}")
    metrics, evaluations = read(run / "metrics.jsonl"), read(run / "evaluations.jsonl")
    began = evaluations[0]["wall_time"]
    return Curve(
        seed,
        killed - began,
        [line["wall_time"] - began for line in evaluations],
        [line["mean_return"] for line in evaluations],
        (stored(metrics[:lines])[-1], stored(metrics[lines:])[0]),
    )


def start(command: list[str], errors: BinaryIO) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def stored(metrics: list[dict[str, Any]]) -> list[int]:
    return [int(line["replay/transitions"]) for line in metrics if "replay/transitions" in line]


def print_row(curve: Curve) -> None:
    before = [value for at, value in zip(curve.seconds, curve.returns, strict=True) if at < curve.killed]
    after = curve.returns[len(before) :]
    print(
        f"| {curve.seed} | {len(before)} + {len(after)} | {statistics.mean(before[-3:]):.1f} | {after[0]:.1f} | "
        f"{statistics.mean(after[-3:]):.1f} | {curve.transitions[0]} | {curve.transitions[1]} |",
        flush=True,
    )


def draw(curves: list[Curve], path: Path) -> None:
    """Returns over the seconds before and after the kill."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.name
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    for curve in curves:
        axes.plot(
            [at - curve.killed for at in curve.seconds], curve.returns, ".-", label=f"seed {curve.seed}"
        )
    axes.axvline(0, color="black", linestyle="--", label="every process killed, then resumed")
    axes.set(xlabel="seconds after the kill", ylabel="mean return of 20 games without noise")
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
