"""Searches with node sequences on one thread of the CPU: the torch-free inference against torch.

    python benchmarks/node_sequence_search.py --batches 1 32 --seconds 0.3 --turns 5

Rows of up to 64 tokens with 21 columns and 7 rules each, 25 simulations, random weights and tokens, root noise on:
lengths as of short problems (3 … 41, 18 on average), of long ones (8 … 60, 37), and all 60. Rates are for each
second of CPU time that the process takes, medians over turns in which the two take turns. "Call" is one recurrent
inference for the whole batch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

# Before any library reads them.
os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1"))

import numpy as np
import torch

from distributed_muzero.algorithm.planning import plan_batch
from distributed_muzero.config import NetworkConfig, SearchConfig
from distributed_muzero.environments.base import EnvironmentSpec, TokenColumn
from distributed_muzero.networks.inference import SearchModel
from distributed_muzero.networks.node_sequence import NodeSequence
from distributed_muzero.networks.registry import make_networks
from distributed_muzero.networks.sequence_inference import SequenceInference
from distributed_muzero.networks.torch_inference import TorchInference

MODELS: dict[str, Callable[[NodeSequence], SearchModel]] = {
    "torch": TorchInference,
    "fast": SequenceInference,
}
NUM_SLOTS, NUM_RULES, NUM_SIMULATIONS = 64, 7, 25
COLUMNS = (
    TokenColumn("token", "category", 40),
    *(TokenColumn(f"number {place}", "number") for place in range(14)),
    *(TokenColumn(name, "index") for name in ("parent", "left", "right")),
    *(TokenColumn(f"shared {place}", "number", shared=True) for place in range(3)),
)
LENGTHS = {
    "short": (3, 41, 18, 7),
    "long": (8, 60, 37, 10),
    "full": (60, 60, 60, 1),
}  # least, most, mean, spread


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=0.3, help="of one turn")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"load before: {os.getloadavg()[0]:.1f}")
    print(
        "| layers | lengths | batch | call, torch (µs) | call, fast (µs) | sims/s, torch | sims/s, fast | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for num_blocks in (1, 2):
        networks = make(num_blocks)
        for lengths in LENGTHS:
            for batch in arguments.batches:
                print_row(networks, num_blocks, lengths, batch, arguments.seconds, arguments.turns)
    print(f"load after: {os.getloadavg()[0]:.1f}")


def make(num_blocks: int) -> NodeSequence:
    """With random heads too: those of a new model predict the same everywhere."""
    shape = NUM_SLOTS, len(COLUMNS)
    spec = EnvironmentSpec("tokens", shape, np.dtype(np.float32), (NUM_SLOTS, NUM_RULES), 1, COLUMNS)
    networks = make_networks(spec, 1, NetworkConfig(name="node_sequence", num_blocks=num_blocks))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    assert isinstance(networks, NodeSequence)
    return networks.eval()


def make_observations(lengths: str, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """[B, 1, L, C], and the masks [B, L · R] that allow a rule for every other token."""
    rng = np.random.default_rng(0)
    least, most, mean, spread = LENGTHS[lengths]
    observations = np.zeros((batch, 1, NUM_SLOTS, len(COLUMNS)), np.float32)
    legal = np.zeros((batch, NUM_SLOTS, NUM_RULES), bool)
    for row, count in enumerate(np.clip(rng.normal(mean, spread, batch).astype(int), least, most)):
        tokens = observations[row, 0, :count]
        tokens[:, 0] = rng.integers(1, 40, count)
        tokens[:, 1:15] = rng.normal(size=(count, 14))
        tokens[:, 15:18] = rng.integers(-1, count, (count, 3))
        legal[row, :count:2, 0] = True
    return observations, legal.reshape(batch, -1)


def print_row(
    networks: NodeSequence, num_blocks: int, lengths: str, batch: int, seconds: float, turns: int
) -> None:
    observations, legal = make_observations(lengths, batch)
    config = SearchConfig(num_simulations=NUM_SIMULATIONS)
    roots, children, actions = np.zeros(batch, np.int32), np.ones(batch, np.int32), np.zeros(batch, np.int32)
    calls: dict[str, list[float]] = {name: [] for name in MODELS}
    searches: dict[str, list[float]] = {name: [] for name in MODELS}
    models = {name: make_model(networks) for name, make_model in MODELS.items()}

    def search(model: SearchModel) -> None:
        plan_batch(model, observations, legal, config, 0.99, rng=np.random.default_rng(0), noise=True)

    for _ in range(turns):
        for name, model in models.items():
            # A search leaves room for its nodes behind, which single calls then use.
            searches[name].append(cpu_seconds(lambda model=model: search(model), seconds))
            expand = model.expand
            calls[name].append(cpu_seconds(lambda expand=expand: expand(roots, actions, children), seconds))
    call = {name: 1e6 * statistics.median(times) for name, times in calls.items()}
    simulations = batch * NUM_SIMULATIONS
    rate = {name: simulations / statistics.median(times) for name, times in searches.items()}
    print(
        f"| {num_blocks} | {lengths} | {batch} | {call['torch']:,.0f} | {call['fast']:,.0f} | {rate['torch']:,.0f} "
        f"| {rate['fast']:,.0f} | {rate['fast'] / rate['torch']:.1f} |",
        flush=True,
    )


def cpu_seconds(function: Callable[[], object], seconds: float) -> float:
    """Of one call, over at least `seconds` of them."""
    function()
    calls, began = 0, time.process_time()
    while (passed := time.process_time() - began) < seconds:
        function()
        calls += 1
    return passed / calls


if __name__ == "__main__":
    main()
