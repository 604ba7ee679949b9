"""Searches with small ResNets on one thread of the CPU: the torch-free inference against torch.

    python benchmarks/resnet_search.py --batches 1 8 32 64 --seconds 0.3 --turns 5

Tic-tac-toe (1 block of 16 channels, 25 simulations) and Connect Four (1, 2 and 4 blocks of 64 channels, 50
simulations), random weights and boards, root noise on. Rates are for each second of CPU time that the process takes,
medians over turns in which the two take turns. "Call" is one recurrent inference for the whole batch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

# Before any library reads them.
os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1"))

import numpy as np
import torch

from distributed_muzero.algorithm.planning import plan_batch
from distributed_muzero.config import NetworkConfig, SearchConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.networks.inference import SearchModel
from distributed_muzero.networks.registry import make_networks
from distributed_muzero.networks.resnet import ResNet
from distributed_muzero.networks.resnet_inference import ResNetInference
from distributed_muzero.networks.torch_inference import TorchInference

MODELS: dict[str, Callable[[ResNet], SearchModel]] = {"torch": TorchInference, "fast": ResNetInference}


class Game(NamedTuple):
    name: str
    shape: tuple[int, int, int]
    num_actions: int
    num_channels: int
    num_blocks: int
    num_simulations: int


GAMES = [
    Game("tic-tac-toe 1×16", (3, 3, 3), 9, 16, 1, 25),
    *(Game(f"Connect Four {blocks}×64", (3, 6, 7), 7, 64, blocks, 50) for blocks in (1, 2, 4)),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--seconds", type=float, default=0.3, help="of one turn")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"load before: {os.getloadavg()[0]:.1f}")
    print("| network | batch | call, torch (µs) | call, fast (µs) | sims/s, torch | sims/s, fast | ratio |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for game in GAMES:
        networks = make(game)
        for batch in arguments.batches:
            print_row(networks, game, batch, arguments.seconds, arguments.turns)
    print(f"load after: {os.getloadavg()[0]:.1f}")


def make(game: Game) -> ResNet:
    """With random heads too: those of a new model predict the same everywhere."""
    spec = EnvironmentSpec(game.name, game.shape, np.dtype(np.float32), (game.num_actions,), 2)
    config = NetworkConfig(name="resnet", num_channels=game.num_channels, num_blocks=game.num_blocks)
    networks = make_networks(spec, 1, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    assert isinstance(networks, ResNet)
    return networks.eval()


def print_row(networks: ResNet, game: Game, batch: int, seconds: float, turns: int) -> None:
    observations = np.random.default_rng(0).integers(0, 2, (batch, 1, *game.shape)).astype(np.float32)
    legal = np.ones((batch, game.num_actions), bool)
    config = SearchConfig(num_simulations=game.num_simulations)
    roots, children = np.zeros(batch, np.int32), np.ones(batch, np.int32)
    actions = (np.arange(batch) % game.num_actions).astype(np.int32)
    calls: dict[str, list[float]] = {name: [] for name in MODELS}
    searches: dict[str, list[float]] = {name: [] for name in MODELS}
    models = {name: make_model(networks) for name, make_model in MODELS.items()}

    def search(model: SearchModel) -> None:
        rng = np.random.default_rng(0)
        plan_batch(model, observations, legal, config, -1.0, rng=rng, noise=True)

    for _ in range(turns):
        for name, model in models.items():
            # A search leaves room for its nodes behind, which single calls then use.
            searches[name].append(cpu_seconds(lambda model=model: search(model), seconds))
            expand = model.expand
            calls[name].append(cpu_seconds(lambda expand=expand: expand(roots, actions, children), seconds))
    call = {name: 1e6 * statistics.median(times) for name, times in calls.items()}
    simulations = batch * game.num_simulations
    rate = {name: simulations / statistics.median(times) for name, times in searches.items()}
    print(
        f"| {game.name} | {batch} | {call['torch']:,.0f} | {call['fast']:,.0f} | {rate['torch']:,.0f} "
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
