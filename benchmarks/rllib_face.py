"""What MuZeroConfig costs beside the command line: environment steps a second, and seconds until the first one.

    python benchmarks/rllib_face.py --seconds 60 --turns 3

Each turn trains the preset cartpole twice, through `distributed-muzero train` and through `train()` of a
DistributedMuZero, one after the other, without evaluations; both write the same metrics, from which all figures are.
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

END_SECONDS = 3.0
WARM_SECONDS = 15.0  # after the first learner step, before which rates don't count
FACE = """
import shutil, sys, time
from distributed_muzero.rllib import MuZeroConfig
algorithm = MuZeroConfig("cartpole").debugging(seed=int(sys.argv[1])).build_algo()
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    algorithm.train()
algorithm.stop()
shutil.copytree(algorithm.logdir, sys.argv[3], dirs_exist_ok=True)
shutil.rmtree(algorithm.logdir)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of each training")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {"train": [], "MuZeroConfig": []}
    for seed in range(1, options.turns + 1):
        # The one that comes first may find the machine in another state: they take turns at that.
        for name in list(found)[:: 1 if seed % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                measure = by_command if name == "train" else by_face
                found[name].append(measure(Path(folder), seed, options.seconds))
            rate, start = found[name][-1]
            print(f"{name}: {rate:.0f} steps/s, first step after {start:.1f} s", flush=True)
    for name, figures in found.items():
        rates, starts = zip(*figures, strict=True)
        print(f"{name}: {spread(rates, 0)} environment steps/s, first step after {spread(starts, 1)} s")
    ratios = [
        face[0] / command[0] for command, face in zip(found["train"], found["MuZeroConfig"], strict=True)
    ]
    print(f"MuZeroConfig / train, turn by turn: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")


def spread(numbers: tuple[float, ...], digits: int) -> str:
    low, middle, high = (
        f"{number:.{digits}f}" for number in (min(numbers), statistics.median(numbers), max(numbers))
    )
    return f"median {middle} ({low} to {high}, n = {len(numbers)})"


def by_command(folder: Path, seed: int, seconds: float) -> tuple[float, float]:
    began = time.time()
    subprocess.run(
        [
            sys.executable, "-m", "distributed_muzero", "train", "--preset", "cartpole", "--seed", str(seed),
            "--runs-dir", str(folder), "--name", "r", "--max-minutes", str(seconds / 60),
            "--set", "run.stop_at_return=null", "--set", "evaluator.interval_seconds=1e9",
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return figures_of(folder / "r", began, seconds)


def by_face(folder: Path, seed: int, seconds: float) -> tuple[float, float]:
    began = time.time()
    subprocess.run(
        [sys.executable, "-c", FACE, str(seed), str(seconds), str(folder)], check=True, capture_output=True
    )
    [run] = [path.parent for path in folder.glob("*/metrics.jsonl")]
    return figures_of(run, began, seconds)


def figures_of(run: Path, began: float, seconds: float) -> tuple[float, float]:
    """Environment steps a second once it learns, and seconds from the command to the first step.

    began: seconds since 1970.   seconds: of the training; what a run does at its end doesn't count.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    launched = run.joinpath("metrics.jsonl").stat().st_mtime - lines[-1]["time/seconds"]
    first = next(line["time/seconds"] for line in lines if line["rollout/env_steps"])
    warm = next(line["time/seconds"] for line in lines if line["train/learner_steps"]) + WARM_SECONDS
    counted = [
        (line["time/seconds"], line["rollout/env_steps"]) for line in lines if line["time/seconds"] > warm
    ]
    (start, before), (end, after) = counted[0], counted[-1]
    return (after - before) / (end - start), launched - began + first


if __name__ == "__main__":
    main()
