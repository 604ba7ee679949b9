"""Several devices for one learner: it leads, and a helper process for each further device computes a part of the rows.

The learner alone owns weights, optimizer, counts and checkpoints; helpers are told everything anew at each step.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_muzero.algorithm.losses import Losses, LossWeights
from distributed_muzero.algorithm.training import Inputs
from distributed_muzero.config import LearnerConfig, NetworkConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import ConfigError, ContractError, RunError
from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.flat import FlatWeights
from distributed_muzero.workers.data_parallel import LOCALHOST, DataParallel, GroupBroken, pack
from distributed_muzero.workers.learner_peer import LEFT_ALONE, Order, Step, here, spec_to_json

COLLECTIVE_SECONDS = 60.0  # for one answer of all; a helper that hangs so long is taken for lost
START_SECONDS = 100.0  # less than the driver waits for a learner's first answer
LAST_WORDS_SECONDS = 2.0  # for those who broke the group to be dead
KILL_SECONDS = 10.0
POLL_SECONDS = 0.02
LARGEST_SEED = 2**62


class DeviceLost(RuntimeError):
    """A helper died or hung, and the learner can't step any more: another one can, from its checkpoint."""


class NetworkRecipe(NamedTuple):
    """What other processes make the learner's networks from."""

    spec: EnvironmentSpec
    history_length: int
    network: NetworkConfig


class LearnerGroup:
    """Starts the helpers of a learner, and computes gradients with them. One at a time in a process.

    Raises ConfigError for networks that they can't make, DeviceLost when one fails to start, RunError for a second
    group.
    """

    def __init__(
        self,
        networks: Networks,
        flat: FlatWeights,
        devices: list[torch.device],
        config: LearnerConfig,
        recipe: NetworkRecipe,
    ):
        if dist.is_initialized():
            raise RunError(
                "this process uses torch.distributed already: it can have one learner with several devices; close "
                "the other, or set learner.num_devices to 1"
            )
        self._helpers: dict[int, subprocess.Popen[str]] = {}  # by rank
        weights = LossWeights(config.value_weight, config.reward_weight, config.policy_weight)
        self._group = DataParallel(0, len(devices), networks, flat, devices[0], weights)
        # Bound here: the store would listen on every interface, and asks nobody who connects.
        listener = socket.create_server((LOCALHOST, 0))
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            LOCALHOST,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
            master_listen_fd=listener.detach(),
        )
        try:
            for rank, device in enumerate(devices[1:], 1):
                self._helpers[rank] = start_helper()
                self._send(
                    rank,
                    Order(
                        rank=rank,
                        size=len(devices),
                        port=port,
                        device=str(device),
                        timeout_seconds=COLLECTIVE_SECONDS,
                        learner=config,
                        spec=spec_to_json(recipe.spec),
                        history_length=recipe.history_length,
                        network=recipe.network,
                    ),
                )
            self._await_helpers()
            self._group.join(self._store, COLLECTIVE_SECONDS)
        except GroupBroken as error:
            raise self._lost(str(error)) from None
        except BaseException:
            self.close()
            raise

    def add_gradients(
        self, networks: Networks, inputs: Inputs, importance_weights: Tensor | None, weights: LossWeights
    ) -> Losses:
        """`add_row_gradients`, by all devices.

        Raises ContractError for rows that can't be shared equally, DeviceLost when a helper dies or hangs; there is
        no further step then.
        """
        num_rows, size = len(inputs[0]), self._group.size
        if num_rows % size:
            raise ContractError(f"a batch of {num_rows} rows can't be shared by {size} devices")
        if not self._helpers:
            raise DeviceLost("the learner's other devices are closed; start another learner")
        if importance_weights is None:
            importance_weights = torch.ones_like(inputs[3][:, 0])
        rows, layout = pack([*inputs, importance_weights])
        generator = torch.get_rng_state()
        seed = int(torch.randint(LARGEST_SEED, ()))
        step = Step(num_rows=num_rows, layout=layout, seed=seed)
        try:
            for rank in self._helpers:
                self._send(rank, step)
            losses = self._group.step(rows, num_rows, layout)
        except GroupBroken as error:
            torch.set_rng_state(generator)  # the step was not made
            raise self._lost(str(error)) from None
        except BaseException:
            self.close()
            raise
        assert losses is not None
        return losses

    def close(self) -> None:
        """Ends the helpers and waits until they are gone. May be called again."""
        helpers, self._helpers = self._helpers, {}
        for helper in helpers.values():
            helper.kill()  # it has nothing to lose
        for helper in helpers.values():
            with suppress(subprocess.TimeoutExpired):  # the kernel doesn't let it go yet
                helper.communicate(timeout=KILL_SECONDS)
        self._group.leave()

    def _send(self, rank: int, message: Order | Step) -> None:
        stdin = self._helpers[rank].stdin
        assert stdin is not None
        try:
            stdin.write(message.model_dump_json() + "\n")
            stdin.flush()
        except OSError as error:
            raise GroupBroken(str(error)) from None

    def _await_helpers(self) -> None:
        """Until all have made their networks."""
        deadline = time.monotonic() + START_SECONDS
        while not self._store.check([here(rank) for rank in self._helpers]):
            if any(helper.poll() is not None for helper in self._helpers.values()):
                raise GroupBroken("a helper ended before its first step")
            if time.monotonic() > deadline:
                raise GroupBroken(f"it wasn't ready after {START_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)

    def _lost(self, symptom: str) -> Exception:
        """What to raise, once everybody is gone."""
        cause: Exception | None = None
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while cause is None and time.monotonic() < deadline:
            cause = next(filter(None, map(self._cause_of, self._helpers)), None)
            time.sleep(POLL_SECONDS)
        size = self._group.size
        self.close()
        return cause or DeviceLost(f"the learner's {size} devices lost each other: {symptom}")

    def _cause_of(self, rank: int) -> Exception | None:
        """Why a helper has ended by itself, if it has."""
        code = self._helpers[rank].poll()
        if code is None or code == LEFT_ALONE:
            return None
        if self._store.check([f"mistake/{rank}"]):
            return ConfigError(self._store.get(f"mistake/{rank}").decode())
        if self._store.check([f"failure/{rank}"]):
            how = f"failed: {self._store.get(f'failure/{rank}').decode()}"
        else:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return DeviceLost(f"device {rank} of the learner's {self._group.size} {how}")


def start_helper() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "distributed_muzero.workers.learner_peer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # What is typed at a terminal is for the learner, which ends its helpers when it is done.
        start_new_session=True,
        env=os.environ.copy(),
    )
