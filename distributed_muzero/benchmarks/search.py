"""Simulations per second of a search policy on E64: alone, without its network, and against mctx.

Everything runs in one fresh process, bound to one core and to one thread of each library before any of them starts
(numpy's BLAS, XLA). Both sides plan for the same observations with the same weights, root noise on. Their runs take
turns, so that the machine's other work falls on both, and the median of the turns counts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from distributed_muzero.benchmarks.one_thread import run_on_one_thread
from distributed_muzero.errors import ConfigError

DISCOUNT = 0.997


def run(
    batches: Sequence[int] = (1, 8, 64, 256),
    simulations: int = 50,
    against_mctx: bool = False,
    repeats: int = 7,
    seconds: float = 0.15,
    policy: str = "muzero",
) -> dict[str, Any]:
    """Measures in a process of its own. `seconds`: how long one turn of one side lasts, at least.

    Returns {"network", "simulations", "threads", "rows": one for each batch}; a row's speeds are simulations of all
    its searches per second of wall time, mctx's and the ratio None unless asked for. Raises ConfigError.
    """
    if not batches or min(batches) < 1:
        raise ConfigError(f"batch sizes {list(batches)}: expected one or more numbers above 0")
    if policy not in ("muzero", "gumbel"):
        raise ConfigError(f"policy {policy!r}: expected muzero or gumbel")
    if against_mctx and not all(importlib.util.find_spec(name) for name in ("mctx", "jax")):
        raise ConfigError(
            "mctx and jax aren't installed; get them with: pip install 'distributed_muzero[bench]'"
        )
    order = {"batches": list(batches), "simulations": simulations, "against_mctx": against_mctx}
    order |= {"repeats": repeats, "seconds": seconds, "policy": policy}
    return run_on_one_thread(__name__, order)


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """The result for people: thousands of simulations per second."""
    title = (
        f"{result['network']}, {result['simulations']} simulations, {result['threads']} thread: 1000 sims/s"
    )
    table = Table("batch", "policy", "search", "tree alone", "mctx", "search ÷ mctx", title=title)
    for row in result["rows"]:
        speeds = [row["sims_per_second"], row["tree_sims_per_second"], row["mctx_sims_per_second"]]
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.1f}"
        table.add_row(
            str(row["batch"]),
            row["policy"],
            *("–" if x is None else f"{x / 1000:,.0f}" for x in speeds),
            ratio,
        )
    (console or Console()).print(table)


def bench_search(
    batches: Sequence[int],
    simulations: int,
    against_mctx: bool,
    repeats: int,
    seconds: float,
    policy: Literal["muzero", "gumbel"],
) -> dict[str, Any]:
    """The measurement itself, on whatever threads this process has; `run` gives it one."""
    rows = []
    for batch in batches:
        sides = _make_sides(batch, simulations, against_mctx, policy)
        turns: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():
            side()  # compiles, allocates
        for _ in range(repeats):
            for name, side in sides.items():
                turns[name].append(batch * simulations * _calls_per_second(side, seconds))
        speeds = {name: median(turns[name]) if name in turns else None for name in ("search", "tree", "mctx")}
        rows.append(
            {
                "batch": batch,
                "policy": policy,
                "sims_per_second": speeds["search"],
                "tree_sims_per_second": speeds["tree"],
                "mctx_sims_per_second": speeds["mctx"],
                "ratio": speeds["search"] / speeds["mctx"] if speeds["search"] and speeds["mctx"] else None,
            }
        )
    return {"network": "E64", "simulations": simulations, "threads": 1, "rows": rows}


def _make_sides(
    batch: int, simulations: int, against_mctx: bool, policy: Literal["muzero", "gumbel"]
) -> dict[str, Callable[[], Any]]:
    """Functions that plan once for `batch` roots each. The search and the tree alone grow the same trees."""
    import numpy as np

    from distributed_muzero.algorithm.planning import plan_batch
    from distributed_muzero.benchmarks.yardstick import make_e64, make_observations
    from distributed_muzero.config import SearchConfig
    from distributed_muzero.networks.inference import make_search_model

    config = SearchConfig(policy=policy, num_simulations=simulations)
    networks, observations = make_e64(), make_observations(batch)
    model = make_search_model(networks)
    legal_masks = np.ones((batch, networks.num_actions), bool)

    def search(model: Any) -> Any:
        rng = np.random.default_rng(0)
        return plan_batch(model, observations, legal_masks, config, DISCOUNT, rng=rng, noise=True)

    recording = Recording(model)
    search(recording)
    sides: dict[str, Callable[[], Any]] = {"search": lambda: search(model), "tree": lambda: search(recording)}
    if against_mctx:
        from distributed_muzero.benchmarks.mctx_search import make_mctx_search

        mctx_search = make_mctx_search(networks, config, DISCOUNT)
        sides["mctx"] = lambda: mctx_search(observations, 0)
    return sides


class Recording:
    """A model that notes what another one says in its first search, and repeats it in every later one."""

    def __init__(self, model: Any):
        self.model = model
        self.start: tuple[Any, Any] | None = None
        self.expansions: list[Any] = []
        self.replaying: Any = None

    def initial(self, observations: Any, num_nodes: int) -> tuple[Any, Any]:
        if self.start is None:
            self.start = self.model.initial(observations, num_nodes)
        else:
            self.replaying = iter(self.expansions)
        return self.start

    def expand(self, parents: Any, actions: Any, children: Any) -> Any:
        if self.replaying is not None:
            return next(self.replaying)
        expansion = self.model.expand(parents, actions, children)
        copied = type(expansion)(*(None if part is None else part.copy() for part in expansion))
        self.expansions.append(copied)
        return copied


def _calls_per_second(function: Callable[[], Any], seconds: float) -> float:
    calls, start, elapsed = 0, time.perf_counter(), 0.0
    while elapsed < seconds:
        function()
        calls += 1
        elapsed = time.perf_counter() - start
    return calls / elapsed


def _main() -> None:
    if hasattr(os, "sched_setaffinity"):  # before any library starts a thread: they inherit it
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(json.dumps(bench_search(**json.loads(sys.argv[1]))))


if __name__ == "__main__":
    _main()
