"""CartPole through MuZeroConfig: trained until an evaluation stands at 475, then 50 games that no evaluation had.

    python examples/rllib_cartpole.py --seeds 1 2 3

Prints a line for each seed: seconds, environment steps and learner steps until then, the first evaluation of 350 or
more (the threshold that RLlib's own CartPole examples stop at), and the 50 games.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path

from distributed_muzero.rllib import MuZeroConfig

THRESHOLD = 350


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--goal", type=float, default=475)
    parser.add_argument("--seconds", type=float, default=600, help="of one training, at most")
    parser.add_argument("--env-runners", type=int, default=1)
    options = parser.parse_args()
    for seed in options.seeds:
        train(seed, options.goal, options.seconds, options.env_runners)


def train(seed: int, goal: float, seconds: float, num_env_runners: int) -> None:
    config = (
        MuZeroConfig("cartpole")
        .env_runners(num_env_runners=num_env_runners)
        .evaluation(evaluation_interval=1, evaluation_duration=20)
        .debugging(seed=seed)
    )
    algorithm = config.build_algo()
    first = math.nan
    try:
        while True:
            result = algorithm.train()
            reached = result["evaluation"]["env_runners"]["episode_return_mean"]
            steps = result["num_env_steps_sampled_lifetime"]
            if reached >= THRESHOLD and math.isnan(first):
                first = steps
            if reached >= goal or result["time_total_s"] >= seconds:
                break
    finally:
        algorithm.stop()
    print(
        f"seed {seed}: {reached:.1f} after {result['time_total_s']:.0f} s, {steps} environment steps, "
        f"{result['num_grad_updates_lifetime']} learner steps ({THRESHOLD} by step {first:.0f})",
        flush=True,
    )
    [run] = Path(algorithm.logdir).glob("*/checkpoints")
    evaluate = [
        sys.executable,
        "-m",
        "distributed_muzero",
        "evaluate",
        str(run.parent),
        "--checkpoint",
        "latest",
    ]
    subprocess.run([*evaluate, "--episodes", "50", "--seed", str(10_000 + seed)], check=True)


if __name__ == "__main__":
    main()
