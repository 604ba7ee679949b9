"""A further device of a learner, in a process of its own: it computes gradients and keeps nothing.

    python -m distributed_muzero.workers.learner_peer

Its standard input brings JSON lines, first who it is (`Order`), then one for each step. When that ends, so does the
process, whatever it is waiting for: its learner has closed it, or died.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel

from distributed_muzero.algorithm.losses import LossWeights
from distributed_muzero.config import LearnerConfig, NetworkConfig
from distributed_muzero.environments.base import EnvironmentSpec, TokenColumn
from distributed_muzero.errors import DistributedMuZeroError
from distributed_muzero.networks.device import choose_dtype
from distributed_muzero.networks.flat import FlatWeights
from distributed_muzero.networks.registry import make_networks
from distributed_muzero.workers.data_parallel import LOCALHOST, DataParallel, GroupBroken

LEFT_ALONE = 3  # the exit code of a process that ended because another of its group did
MAX_LINES_WAITING = 4  # a learner is at most a step ahead
START_SECONDS = 60.0


class Order(BaseModel):
    """Who a helper is, and what it needs to make the learner's networks."""

    rank: int
    size: int
    port: int  # of the store where the group meets, on this machine
    device: str
    timeout_seconds: float
    learner: LearnerConfig
    spec: dict[str, Any]  # of the environment, as `spec_to_json` writes it
    history_length: int
    network: NetworkConfig


class Step(BaseModel):
    """What a helper has to know of a batch before its rows come."""

    num_rows: int
    layout: list[tuple[str, list[int]]]
    seed: int  # of what the networks may draw


def spec_to_json(spec: EnvironmentSpec) -> dict[str, Any]:
    return {**spec._asdict(), "observation_dtype": np.dtype(spec.observation_dtype).str}


def spec_from_json(values: dict[str, Any]) -> EnvironmentSpec:
    spec = EnvironmentSpec(**values)
    return spec._replace(
        observation_shape=tuple(spec.observation_shape),
        observation_dtype=np.dtype(spec.observation_dtype),
        action_shape=tuple(spec.action_shape),
        token_columns=tuple(TokenColumn(*column) for column in spec.token_columns),
    )


def main() -> None:
    lines: queue.Queue[str] = queue.Queue(MAX_LINES_WAITING)
    threading.Thread(target=read_lines, args=(lines,), daemon=True).start()
    order = Order.model_validate_json(lines.get(timeout=START_SECONDS))
    store = dist.TCPStore(
        LOCALHOST, order.port, is_master=False, timeout=timedelta(seconds=order.timeout_seconds)
    )
    code = 1
    try:
        serve(order, store, lines)
    except GroupBroken:
        code = LEFT_ALONE
    except DistributedMuZeroError as error:
        tell(store, "mistake", order.rank, str(error))
    except Exception as error:
        traceback.print_exc()
        tell(store, "failure", order.rank, f"{type(error).__name__}: {error}")
    # Not sys.exit: it would wait for the others.
    sys.stderr.flush()
    os._exit(code)


def read_lines(lines: queue.Queue[str]) -> None:
    """The learner's lines as they come. Without a learner, the process ends here."""
    try:
        for line in sys.stdin:
            lines.put_nowait(line)
    finally:
        os._exit(0)


def serve(order: Order, store: dist.Store, lines: queue.Queue[str]) -> None:
    """Takes part in the learner's steps, until the process ends."""
    torch.set_num_threads(order.learner.num_threads)
    device = torch.device(order.device)
    networks = make_networks(spec_from_json(order.spec), order.history_length, order.network)
    networks = networks.to(device).train()
    config, flat = order.learner, FlatWeights(networks)
    networks.compute_dtype = choose_dtype(config.compute_dtype, device)
    weights = LossWeights(config.value_weight, config.reward_weight, config.policy_weight)
    group = DataParallel(order.rank, order.size, networks, flat, device, weights)
    store.set(here(order.rank), "")
    group.join(store, order.timeout_seconds)
    while True:
        # As long as the learner wants: `read_lines` ends the wait when there is no learner.
        step = Step.model_validate(json.loads(lines.get()))
        torch.manual_seed(step.seed + order.rank)
        flat.zero_grad()
        group.step(None, step.num_rows, step.layout)


def here(rank: int) -> str:
    """The store's key of a helper that has made its networks."""
    return f"here/{rank}"


def tell(store: dist.Store, what: str, rank: int, text: str) -> None:
    with suppress(RuntimeError):
        store.set(f"{what}/{rank}", text)
        store.get(f"{what}/{rank}")  # it has arrived


if __name__ == "__main__":
    main()
