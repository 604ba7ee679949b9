"""Simulations per second of the search policies on the yardstick networks: alone, without the network, against mctx.

Everything runs in one fresh process, bound to one core and to one thread of each library before any of them starts
(numpy's BLAS, XLA). Both sides plan for the same observations with the same weights, root noise on. What counts is the
process's CPU time, with all its threads: on one core that nobody else uses it is wall time. The sides take turns, as
other work still costs both sides caches, and the median of the turns counts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from distributed_muzero.benchmarks.one_thread import run_on_one_thread
from distributed_muzero.errors import ConfigError

NETWORKS = ("E64", "T64")  # of benchmarks/yardstick.py, which loads torch
POLICIES = ("muzero", "gumbel")


def run(
    batches: Sequence[int] = (1, 8, 64, 256),
    simulations: int | None = None,
    against_mctx: bool = False,
    repeats: int = 7,
    seconds: float = 0.15,
    policies: Sequence[str] = ("muzero",),
    networks: Sequence[str] = ("E64",),
) -> dict[str, Any]:
    """Measures in a process of its own. `seconds`: the CPU time of one turn of one side, at least.

    simulations: None = as many as each network's game is searched with, 50 for E64 and 200 for T64.
    Returns {"threads", "load": the machine's before and after, "rows": one for each network, policy and batch}; a row's
    speeds are simulations of all its searches per second of CPU time, mctx's and the ratio None unless asked for.
    Raises ConfigError.
    """
    if not batches or min(batches) < 1:
        raise ConfigError(f"batch sizes {list(batches)}: expected one or more numbers above 0")
    for what, names, known in (("policy", policies, POLICIES), ("network", networks, NETWORKS)):
        for name in names:
            if name not in known:
                raise ConfigError(f"{what} {name!r}: expected {' or '.join(known)}")
    if against_mctx and not all(importlib.util.find_spec(name) for name in ("mctx", "jax")):
        raise ConfigError(
            "mctx and jax aren't installed; get them with: pip install 'distributed_muzero[bench]'"
        )
    order = {
        "batches": list(batches),
        "simulations": simulations,
        "against_mctx": against_mctx,
        "repeats": repeats,
        "seconds": seconds,
        "policies": list(policies),
        "networks": list(networks),
    }
    return run_on_one_thread(__name__, order)


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """The result for people: thousands of simulations per second."""
    loads = " to ".join(f"{load:.1f}" for load in result["load"])
    table = Table(
        *("network", "sims", "policy", "batch", "search", "tree alone", "mctx", "search ÷ mctx"),
        title=f"1000 simulations a second of CPU time, {result['threads']} thread, load {loads}",
    )
    for row in result["rows"]:
        speeds = [row["sims_per_second"], row["tree_sims_per_second"], row["mctx_sims_per_second"]]
        table.add_row(
            row["network"],
            str(row["simulations"]),
            row["policy"],
            str(row["batch"]),
            *("–" if x is None else f"{x / 1000:,.0f}" for x in speeds),
            "–" if row["ratio"] is None else f"{row['ratio']:.2f}",
        )
    (console or Console()).print(table)


def bench_search(
    batches: Sequence[int],
    simulations: int | None,
    against_mctx: bool,
    repeats: int,
    seconds: float,
    policies: Sequence[str],
    networks: Sequence[str],
) -> dict[str, Any]:
    """The measurement itself, on whatever threads this process has; `run` gives it one."""
    before = os.getloadavg()[0]
    rows = [
        _measure(network, policy, batch, simulations, against_mctx, repeats, seconds)
        for network, policy, batch in product(networks, policies, batches)
    ]
    return {"threads": 1, "load": [before, os.getloadavg()[0]], "rows": rows}


def _measure(
    network: str,
    policy: str,
    batch: int,
    simulations: int | None,
    against_mctx: bool,
    repeats: int,
    seconds: float,
) -> dict[str, Any]:
    from distributed_muzero.benchmarks.yardstick import YARDSTICKS

    simulations = simulations or YARDSTICKS[network].simulations
    sides = _make_sides(network, policy, batch, simulations, against_mctx)
    turns: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()  # compiles, allocates
    for _ in range(repeats):
        for name, side in sides.items():
            turns[name].append(batch * simulations * _calls_per_second(side, seconds))
    speeds = {name: median(turns[name]) if name in turns else None for name in ("search", "tree", "mctx")}
    return {
        "network": network,
        "simulations": simulations,
        "policy": policy,
        "batch": batch,
        "sims_per_second": speeds["search"],
        "tree_sims_per_second": speeds["tree"],
        "mctx_sims_per_second": speeds["mctx"],
        "ratio": speeds["search"] / speeds["mctx"] if speeds["search"] and speeds["mctx"] else None,
    }


def _make_sides(
    network: str, policy: str, batch: int, simulations: int, against_mctx: bool
) -> dict[str, Callable[[], Any]]:
    """Functions that plan once for `batch` roots each. The search and the tree alone grow the same trees."""
    import numpy as np

    from distributed_muzero.algorithm.planning import plan_batch
    from distributed_muzero.benchmarks.recording import Recording
    from distributed_muzero.benchmarks.yardstick import YARDSTICKS, make_network, make_observations
    from distributed_muzero.config import SearchConfig
    from distributed_muzero.networks.inference import make_search_model

    spec, _, discount = YARDSTICKS[network]
    config = SearchConfig.model_validate({"policy": policy, "num_simulations": simulations})
    networks, observations = make_network(spec), make_observations(batch, spec=spec)
    model = make_search_model(networks)
    legal_masks = np.ones((batch, networks.num_actions), bool)

    def search(model: Any) -> Any:
        rng = np.random.default_rng(0)
        return plan_batch(model, observations, legal_masks, config, discount, rng=rng, noise=True)

    recording = Recording(model)
    search(recording)
    sides: dict[str, Callable[[], Any]] = {"search": lambda: search(model), "tree": lambda: search(recording)}
    if against_mctx:
        from distributed_muzero.benchmarks.mctx_search import make_mctx_search

        mctx_search = make_mctx_search(networks, config, discount)
        sides["mctx"] = lambda: mctx_search(observations, 0)
    return sides


def _calls_per_second(function: Callable[[], Any], seconds: float) -> float:
    calls, start, elapsed = 0, time.process_time(), 0.0
    while elapsed < seconds:
        function()
        calls += 1
        elapsed = time.process_time() - start
    return calls / elapsed


def _main() -> None:
    if hasattr(os, "sched_setaffinity"):  # before any library starts a thread: they inherit it
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(json.dumps(bench_search(**json.loads(sys.argv[1]))))


if __name__ == "__main__":
    _main()
