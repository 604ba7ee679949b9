"""Trains mathy's A3C agent for some minutes and plays the problems that `evaluate` plays, greedily.

    python benchmarks/mathy_a3c.py --topic poly --minutes 10 --every 2 --seed 1

Prints a line of JSON after every evaluation: seconds of training, steps, episodes, share of problems solved, mean
return. `--temperature` also plays them with sampled actions: a policy may need chance to leave a loop.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time

from distributed_muzero.mathy.agents.a3c import A3CAgent, A3CConfig
from distributed_muzero.mathy.agents.evaluation import evaluate_agent, game_seeds
from distributed_muzero.mathy.envs import TOPICS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topic", default="poly", choices=sorted(TOPICS))
    parser.add_argument("--difficulty", default="easy", choices=["easy", "normal", "hard"])
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, evaluations not counted")
    parser.add_argument("--every", type=float, default=2.0, help="minutes between evaluations")
    parser.add_argument("--workers", type=int, default=0, help="processes of Ray; 0: this one plays")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluation-seed", type=int, default=10_000, help="as --seed of `evaluate`")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--max-nodes", type=int, default=64, help="as the environment's max_nodes")
    parser.add_argument("--temperature", type=float, help="besides, with sampled actions")
    parser.add_argument("--model-dir", help="to begin in or to go on from; else a temporary one")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="of the A3CConfig; goes before other options",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mathy_a3c") as folder:
        run(arguments, arguments.model_dir or folder)


def run(arguments: argparse.Namespace, folder: str) -> None:
    """Trains in slices: an agent goes on where the last one stopped."""
    options = {
        "topics": (arguments.topic,),
        "difficulty": arguments.difficulty,
        "num_workers": arguments.workers,
        "seed": arguments.seed,
        "model_dir": folder,
        "max_nodes": arguments.max_nodes,
        "max_eps": 10**9,
        **dict(option.split("=", 1) for option in arguments.set),
    }
    trained = 0.0
    while trained < arguments.minutes * 60:
        slice_seconds = min(arguments.every, arguments.minutes - trained / 60) * 60
        agent = A3CAgent(A3CConfig(**{**options, "max_seconds": slice_seconds}))
        began = time.monotonic()
        result = agent.train()
        trained += time.monotonic() - began
        print(
            json.dumps({"seconds": round(trained, 1), **result._asdict(), **play(agent, arguments)}),
            flush=True,
        )


def play(agent: A3CAgent, arguments: argparse.Namespace) -> dict[str, float]:
    """Of the evaluation's problems, by how they are played."""
    found = {}
    seeds = game_seeds(arguments.problems, [arguments.evaluation_seed])
    for name, temperature in (("greedy", 0.0), ("sampled", arguments.temperature)):
        if temperature is None:
            continue
        played = evaluate_agent(
            agent.model,
            lambda: TOPICS[arguments.topic](max_nodes=agent.args.max_nodes),
            seeds,
            agent.args.difficulty,
            temperature,
        )
        found[f"{name}_solved"] = played.solved
        found[f"{name}_mean_return"] = round(played.mean_return, 4)
    return found


if __name__ == "__main__":
    sys.exit(main())
