"""Learner steps a second with one device and with several, on the CPU: one thread for each device.

    python benchmarks/learner_devices.py --devices 1 2 --batch 256 --seconds 5 --turns 5

Two networks for CartPole: E64 (as in docs/benchmarks.md) and one with hidden layers of 512. The batch is random; rates
are medians over turns, which alternate between the numbers of devices. "CPU" is what all processes of the learner take
for a step: unlike the rate, it tells something on a machine that does other work too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import NamedTuple

import numpy as np
import psutil

from distributed_muzero.benchmarks.yardstick import CARTPOLE, E64
from distributed_muzero.config import LearnerConfig, NetworkConfig
from distributed_muzero.networks.registry import make_networks
from distributed_muzero.types import Batch
from distributed_muzero.workers.learner import Learner
from distributed_muzero.workers.learner_group import NetworkRecipe

NETWORKS = {"E64": E64, "hidden 512": E64.model_copy(update={"hidden_sizes": (512, 512)})}
NUM_UNROLL_STEPS = 5
WARM_UP_STEPS = 5


class Turn(NamedTuple):
    steps_per_second: float
    cpu_seconds: float  # of a step, all processes together
    start_seconds: float  # of the learner, with its other processes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one turn")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    batch = make_batch(arguments.batch)
    print(f"load before: {os.getloadavg()[0]:.1f}")
    print("| network | weights | devices | steps/s | lowest to highest | ms a step | CPU (ms) | start (s) |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name, network in NETWORKS.items():
        turns: dict[int, list[Turn]] = {number: [] for number in arguments.devices}
        for _ in range(arguments.turns):
            for number, done in turns.items():
                done.append(measure(network, number, batch, arguments.seconds))
        for number, done in turns.items():
            print_row(name, num_weights(network), number, done)


def measure(network: NetworkConfig, num_devices: int, batch: Batch, seconds: float) -> Turn:
    began = time.perf_counter()
    config = LearnerConfig(batch_size=len(batch.positions), num_devices=num_devices, device="cpu")
    learner = Learner(make_networks(CARTPOLE, 1, network), config, NetworkRecipe(CARTPOLE, 1, network))
    start_seconds = time.perf_counter() - began
    try:
        for _ in range(WARM_UP_STEPS):
            learner.step(batch)
        num_steps, cpu, began = 0, cpu_seconds(), time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds:
            learner.step(batch)
            num_steps += 1
        return Turn(num_steps / passed, (cpu_seconds() - cpu) / num_steps, start_seconds)
    finally:
        learner.close()


def cpu_seconds() -> float:
    """So far, of this process and those it started."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children())]
    return sum(time.user + time.system for time in times)


def make_batch(num_rows: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    steps = (num_rows, NUM_UNROLL_STEPS + 1)
    return Batch(
        rng.normal(size=(num_rows, 1, *CARTPOLE.observation_shape)).astype(np.float32),
        rng.dirichlet(np.ones(CARTPOLE.num_actions), steps).astype(np.float32),
        rng.integers(CARTPOLE.num_actions, size=steps, dtype=np.int32),
        rng.normal(size=steps).astype(np.float32),
        rng.normal(size=steps).astype(np.float32),
        np.ones(num_rows, np.float32),
        np.zeros((num_rows, 2), np.int64),
        np.zeros(num_rows, np.int64),
    )


def num_weights(network: NetworkConfig) -> int:
    return sum(parameter.numel() for parameter in make_networks(CARTPOLE, 1, network).parameters())


def print_row(name: str, size: int, num_devices: int, turns: list[Turn]) -> None:
    rates = [turn.steps_per_second for turn in turns]
    median = statistics.median(rates)
    cpu = statistics.median(turn.cpu_seconds for turn in turns)
    start = statistics.median(turn.start_seconds for turn in turns)
    print(
        f"| {name} | {size:,} | {num_devices} | {median:.1f} | {min(rates):.1f} to {max(rates):.1f} | "
        f"{1000 / median:.2f} | {1000 * cpu:.2f} | {start:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
