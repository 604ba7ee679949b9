"""What MuZeroConfig costs beside the command line: environment steps a second, and seconds until the first one.

    python benchmarks/rllib_face.py --turns 8 --seconds 60

Each turn trains the preset cartpole twice at the same time, through `distributed-muzero train` and through `train()` of
a DistributedMuZero, each on a core of its own, which they exchange from turn to turn: whatever else slows the machine
slows both. The learning rate is too small to learn anything, so that all games stay equally short, and nothing is
evaluated before the end. Steps are counted while both train. Starts are measured alone, with all cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

END_SECONDS = 120  # for what a run does before and after its seconds
START_SECONDS = 25.0  # of a training of which only the first step counts
WARM_SECONDS = 10.0  # after the first learner step, before which rates don't count
LEARNING_RATE = 1e-9
COMMAND = "train"
FACE = "MuZeroConfig"
FACE_SCRIPT = """
import shutil, sys, time
from distributed_muzero.rllib import MuZeroConfig
config = MuZeroConfig("cartpole").debugging(seed=int(sys.argv[1])).training(lr=float(sys.argv[4]))
algorithm = config.build_algo()
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    algorithm.train()
algorithm.stop()
shutil.copytree(algorithm.logdir, sys.argv[3], dirs_exist_ok=True)
shutil.rmtree(algorithm.logdir)
"""


class Curve(NamedTuple):
    """What a training wrote."""

    began: float  # when it was started; as all times here, in seconds since 1970
    times: np.ndarray
    env_steps: np.ndarray
    learner_steps: np.ndarray

    @property
    def first_step(self) -> float:
        """The first time that is known to be behind an environment step."""
        return self.times[np.argmax(self.env_steps > 0)]

    @property
    def warm(self) -> float:
        return self.times[np.argmax(self.learner_steps > 0)] + WARM_SECONDS

    def steps_per_second(self, begin: float, end: float) -> float:
        before, after = np.interp((begin, end), self.times, self.env_steps)
        return (after - before) / (end - begin)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=8, help="best an even number")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each training")
    parser.add_argument("--starts", type=int, default=3, help="of each, alone")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        parser.error("two cores are needed, one for each training")
    report_starts(options.starts)
    report_rates(options.turns, options.seconds, cores)


def report_starts(number: int) -> None:
    found: dict[str, list[float]] = {COMMAND: [], FACE: []}
    for seed in range(1, number + 1):
        for name, start in STARTS.items():
            with trained(start, seed, START_SECONDS) as wait:
                curve = wait()
            found[name].append(curve.first_step - curve.began)
    for name, seconds in found.items():
        print(f"{name}: first environment step after {spread(seconds, 1)} s")


def report_rates(number: int, seconds: float, cores: list[int]) -> None:
    ratios = []
    for turn in range(number):
        order = cores if turn % 2 else cores[::-1]
        with (
            trained(train_by_command, turn + 1, seconds, order[0]) as wait_for_command,
            trained(train_by_face, turn + 1, seconds, order[1]) as wait_for_face,
        ):
            curves = wait_for_command(), wait_for_face()
        begin, end = max(curve.warm for curve in curves), min(curve.times[-1] for curve in curves)
        command, face = (curve.steps_per_second(begin, end) for curve in curves)
        ratios.append(face / command)
        print(
            f"turn {turn + 1}: {COMMAND} {command:.0f}, {FACE} {face:.0f} steps/s in {end - begin:.0f} s: "
            f"{ratios[-1]:.3f}",
            flush=True,
        )
    print(
        f"{FACE} / {COMMAND}: {spread(ratios, 3)}, geometric mean {statistics.geometric_mean(ratios):.3f}",
        end="",
    )
    if number > 1:
        error = statistics.stdev(map(math.log, ratios)) / math.sqrt(number)
        print(f", standard error {error:.3f}", end="")
    print()


def spread(numbers: list[float], digits: int) -> str:
    low, middle, high = (
        f"{number:.{digits}f}" for number in (min(numbers), statistics.median(numbers), max(numbers))
    )
    return f"median {middle} ({low} to {high}, n = {len(numbers)})"


@contextmanager
def trained(
    start: Callable[[Path, int, float], subprocess.Popen[str]],
    seed: int,
    seconds: float,
    core: int | None = None,
) -> Iterator[Callable[[], Curve]]:
    """Yields what waits for the training's end; it is killed if that isn't reached."""
    all_cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        try:
            if core is not None:
                os.sched_setaffinity(0, {core})  # its processes' too
            process = start(Path(folder), seed, seconds)
        finally:
            os.sched_setaffinity(0, all_cores)

        def wait() -> Curve:
            _, errors = process.communicate(timeout=seconds + END_SECONDS)
            if process.returncode:
                sys.exit(f"a training ended with {process.returncode}:\n{errors}")
            return read_curve(Path(folder), began)

        try:
            yield wait
        finally:
            process.terminate()
            process.wait(30)


def train_by_command(folder: Path, seed: int, seconds: float) -> subprocess.Popen[str]:
    command = (
        f"train --preset cartpole --seed {seed} --runs-dir {folder} --name r --max-minutes {seconds / 60} "
        f"--set run.stop_at_return=null --set evaluator.interval_seconds=1e9 "
        f"--set learner.learning_rate={LEARNING_RATE} --set learner.final_learning_rate={LEARNING_RATE}"
    )
    return _python("-m", "distributed_muzero", *command.split())


def train_by_face(folder: Path, seed: int, seconds: float) -> subprocess.Popen[str]:
    return _python("-c", FACE_SCRIPT, str(seed), str(seconds), str(folder), str(LEARNING_RATE))


STARTS = {COMMAND: train_by_command, FACE: train_by_face}


def _python(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def read_curve(folder: Path, began: float) -> Curve:
    [file] = folder.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    names = ("time/seconds", "rollout/env_steps", "train/learner_steps")
    seconds, env_steps, learner_steps = (np.array([line[name] for line in lines]) for name in names)
    times = file.stat().st_mtime - seconds[-1] + seconds
    if not learner_steps.any():
        sys.exit("a training learnt nothing in its seconds; raise --seconds")
    # The last line comes from the end, after the last evaluation.
    return Curve(began, times[:-1], env_steps[:-1], learner_steps[:-1])


if __name__ == "__main__":
    main()
