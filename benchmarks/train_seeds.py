"""Trains one preset with several seeds, one after the other, as a user would, and prints a table in Markdown.

    python benchmarks/train_seeds.py --preset cartpole --seeds 1 2 3 4 5 -- --stop-at-return 475

What stands behind `--` goes to `distributed-muzero train`. Wall time is from the start of the process to the end of
training and to its exit; memory is the largest sum of private memory (USS) over the process and all below it.
The last evaluation plays games that no evaluation during training has seen.
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

import psutil

MEMORY_SECONDS = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="cartpole")
    parser.add_argument("--env", help="an environment without a preset, in place of --preset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one run")
    parser.add_argument("options", nargs="*", help="for `train`")
    arguments = parser.parse_args()
    source = ["--env", arguments.env] if arguments.env else ["--preset", arguments.preset]
    print(
        "| seed | trained (s) | wall (s) | environment steps | learner steps | in training | last evaluation | MB |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    rows = [measure([*source, *arguments.options], seed, arguments.timeout) for seed in arguments.seeds]
    times = [row["trained_seconds"] for row in rows]
    means = [row["last_evaluation"]["mean_return"] for row in rows]
    print(
        f"\nn = {len(rows)}, seconds: median {statistics.median(times):.1f}, {min(times):.1f} to {max(times):.1f}; "
        f"last evaluation: median {statistics.median(means):.1f}, lowest {min(means):.1f}"
    )


def measure(options: list[str], seed: int, timeout: float) -> dict:
    with tempfile.TemporaryDirectory(prefix="dm") as folder:
        command = [sys.executable, "-m", "distributed_muzero", "train", *options]
        command += ["--seed", str(seed), "--runs-dir", folder, "--name", "run"]
        began, began_wall = time.monotonic(), time.time()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        memory = watch_memory(process, timeout)
        wall = time.monotonic() - began
        _, errors = process.communicate()
        if process.returncode:
            sys.exit(f"seed {seed} failed with exit code {process.returncode}:\n{errors}")
        run = Path(folder) / "run"
        status = json.loads((run / "status.json").read_text())
        evaluation = subprocess.run(
            [sys.executable, "-m", "distributed_muzero", "evaluate", str(run), "--seed", str(90_000 + seed), "--json"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        row = {
            "trained_seconds": (run / "status.json").stat().st_mtime - began_wall,
            "last_evaluation": json.loads(evaluation.stdout.splitlines()[-1]),
        }
    print(
        f"| {seed} | {row['trained_seconds']:.1f} | {wall:.1f} | {status['env_steps']} | {status['learner_steps']} | "
        f"{status['evaluation']} | {row['last_evaluation']['mean_return']:.1f} ± "
        f"{row['last_evaluation']['std_return']:.1f} | {memory / 1e6:.0f} |",
        flush=True,
    )
    return row


def watch_memory(process: subprocess.Popen, timeout: float) -> int:
    """Waits for the process; returns the largest private memory of its tree, in bytes."""
    largest = 0
    deadline = time.monotonic() + timeout
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.terminate()
        total = 0
        for part in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            try:
                total += part.memory_full_info().uss
            except psutil.Error:
                continue
        largest = max(largest, total)
        try:
            process.wait(MEMORY_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    return largest


if __name__ == "__main__":
    main()
