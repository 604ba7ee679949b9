"""Searches over hundreds of actions, with and without a limit below the root, on one thread of the CPU.

    python benchmarks/search_many_actions.py --limits none 32 16 --batches 1 32 --turns 9

448 actions, of which 10 are legal at each root, as in mathy with 64 tokens; 50 simulations, root noise on. The model is
next to free: it looks its answers up among 256 random states. So the rates are the search's own, of a search that asks
its model from Python once a simulation. They are for each second of CPU time that the process takes, medians over
turns in which the limits take turns. "Tree" is what the trees of a batch take in memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

# Before any library reads them.
os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1"))

import numpy as np

from distributed_muzero.config import SearchConfig
from distributed_muzero.search import Expansion, Tree, gumbel_search, muzero_search

NUM_STATES = 256
POLICIES: dict[str, Callable[..., Any]] = {"muzero": muzero_search, "gumbel": gumbel_search}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limits", type=limit, nargs="+", default=[None, 32, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--actions", type=int, default=448)
    parser.add_argument("--legal", type=int, default=10, help="at each root")
    parser.add_argument("--simulations", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one turn")
    parser.add_argument("--turns", type=int, default=9)
    arguments = parser.parse_args()
    print(f"load before: {os.getloadavg()[0]:.1f}")
    print("| policy | batch | limit | sims/s | lowest, highest turn | against none | tree (kB) |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for policy in POLICIES:
        for batch in arguments.batches:
            print_rows(policy, batch, arguments)
    print(f"load after: {os.getloadavg()[0]:.1f}")


def limit(text: str) -> int | None:
    return None if text == "none" else int(text)


def print_rows(policy: str, batch: int, arguments: argparse.Namespace) -> None:
    searches = {limit: make_search(policy, batch, limit, arguments) for limit in arguments.limits}
    trees = {limit: num_bytes(search()) for limit, search in searches.items()}  # compiles, too
    rates: dict[int | None, list[float]] = {limit: [] for limit in searches}
    for _ in range(arguments.turns):
        for limit, search in searches.items():
            seconds = cpu_seconds(search, arguments.seconds)
            rates[limit].append(batch * arguments.simulations / seconds)
    medians = {limit: statistics.median(turns) for limit, turns in rates.items()}
    for limit, turns in rates.items():
        ratio = f"{medians[limit] / medians[None]:.2f}" if None in medians else "–"
        print(
            f"| {policy} | {batch} | {limit or 'none'} | {medians[limit]:,.0f} "
            f"| {min(turns):,.0f}, {max(turns):,.0f} | {ratio} | {trees[limit] / 1000:,.0f} |",
            flush=True,
        )


def make_search(
    policy: str, batch: int, limit: int | None, arguments: argparse.Namespace
) -> Callable[[], Tree]:
    """Searches the same roots each time."""
    rng = np.random.default_rng(0)
    num_actions, num_nodes = arguments.actions, arguments.simulations + 1
    values = rng.normal(size=NUM_STATES).astype(np.float32)
    logits = 2 * rng.normal(size=(NUM_STATES, num_actions)).astype(np.float32)
    legal = np.argsort(rng.random((batch, num_actions))) < arguments.legal
    states, rows = np.zeros((batch, num_nodes), np.int64), np.arange(batch)
    states[:, 0] = rng.integers(NUM_STATES, size=batch)
    rewards = np.zeros(batch, np.float32)
    config = SearchConfig.model_validate(
        {"policy": policy, "num_simulations": arguments.simulations, "max_interior_actions": limit}
    )

    def expand(parents: np.ndarray, actions: np.ndarray, children: np.ndarray) -> Expansion:
        after = (31 * states[rows, parents] + actions) % NUM_STATES
        states[rows, children] = after
        return Expansion(rewards, values[after], logits[after])

    def search() -> Tree:
        roots = logits[states[:, 0]], values[states[:, 0]], legal
        seeded = np.random.default_rng(0)
        return POLICIES[policy](*roots, expand, config, discount=0.99, rng=seeded)[1]

    return search


def num_bytes(tree: Tree) -> int:
    return sum(array.nbytes for array in (tree.nodes, tree.edges, *(tree.narrow or ())))


def cpu_seconds(function: Callable[[], object], seconds: float) -> float:
    """Of one call, over at least `seconds` of them."""
    calls, began = 0, time.process_time()
    while (passed := time.process_time() - began) < seconds:
        function()
        calls += 1
    return passed / calls


if __name__ == "__main__":
    main()
