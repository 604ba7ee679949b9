"""What each of a learner's devices does in a step, the learner's own and its helpers' alike.

Every process calls the same collectives in the same order: weights out, rows out, gradients in, losses in.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_muzero.algorithm.losses import Losses, LossWeights
from distributed_muzero.algorithm.training import add_row_gradients
from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.flat import FlatWeights
from distributed_muzero.networks.normalizer import ObservationNormalizer

LOCALHOST = "127.0.0.1"

IN_THE_VECTOR = (torch.float32, torch.float16, torch.bfloat16)  # kept exactly by a float32 vector

Layout = list[tuple[str, list[int]]]  # of each tensor of a batch: its dtype, and its shape without the rows


class GroupBroken(RuntimeError):
    """Another process of the group has died, or didn't answer in time."""


class DataParallel:
    """One of `size` processes that share each batch. Its networks' weights are rank 0's at each step.

    Their normalizers learn from the rows of all; other modules that look at a whole batch see their own rows only.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        networks: Networks,
        flat: FlatWeights,
        device: torch.device,
        loss_weights: LossWeights,
    ):
        self.rank = rank
        self.size = size
        self.networks = networks
        self.flat = flat
        self.device = device
        self.loss_weights = loss_weights
        self._has_joined = False
        self._hooks = [
            module.register_forward_pre_hook(learn_from_all_rows)
            for module in networks.modules()
            if isinstance(module, ObservationNormalizer)
        ]

    def join(self, store: dist.Store, timeout_seconds: float) -> None:
        """Meets the others; from then on each collective has so long. Raises GroupBroken when they don't come."""
        is_gpu = self.device.type == "cuda"
        if is_gpu:
            torch.cuda.set_device(self.device)
        excepthook = sys.excepthook
        with on_loopback(), or_broken():
            dist.init_process_group(
                "nccl" if is_gpu else "gloo",
                store=store,
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=timeout_seconds),
                device_id=self.device if is_gpu else None,
            )
        self._has_joined = True
        sys.excepthook = excepthook  # torch's own would write the rank before each line of a traceback

    def step(self, rows: Tensor | None, num_rows: int, layout: Layout) -> Losses | None:
        """Adds the gradient of the batch's mean loss at rank 0, and returns all its rows' losses there.

        rows: what `pack` made of the whole batch of num_rows, at rank 0.   Raises GroupBroken.
        """
        self._share_weights()
        mine = self._deal(rows, num_rows, layout)
        observations, actions, policies, returns, rewards, importance_weights = unpack(mine, layout)
        losses = add_row_gradients(
            self.networks,
            (observations, actions, policies, returns, rewards),
            importance_weights,
            self.loss_weights,
            num_rows,
        )
        assert self.flat.vector.grad is not None
        with or_broken():
            dist.reduce(self.flat.vector.grad, dst=0)
        return self._gather(losses)

    def leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._has_joined:
            self._has_joined = False
            dist.destroy_process_group()

    @torch.no_grad()
    def _share_weights(self) -> None:
        weights = self.flat.read()
        with or_broken():
            dist.broadcast(weights, src=0)
        if self.rank > 0:
            self.flat.write(weights)
        for buffer in self.networks.buffers():
            if buffer.dtype not in IN_THE_VECTOR:
                with or_broken():
                    dist.broadcast(buffer, src=0)

    def _deal(self, rows: Tensor | None, num_rows: int, layout: Layout) -> Tensor:
        mine = torch.empty(num_rows // self.size, row_bytes(layout), dtype=torch.uint8, device=self.device)
        with or_broken():
            dist.scatter(mine, list(rows.chunk(self.size)) if rows is not None else None, src=0)
        return mine

    def _gather(self, losses: Losses) -> Losses | None:
        mine = torch.stack(losses)
        parts = [torch.empty_like(mine) for _ in range(self.size)] if self.rank == 0 else None
        with or_broken():
            dist.gather(mine, parts, dst=0)
        return Losses(*torch.cat(parts, 1)) if parts else None


def learn_from_all_rows(normalizer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Before a normalizer's forward pass: it learns from all devices' rows, as one device would, then only applies."""
    if not torch.is_grad_enabled():
        return
    mine = inputs[0].contiguous()
    counts = [int(count) for count in gather_from_all(torch.tensor(len(mine), device=mine.device))]
    padded = mine.new_zeros(max(counts), *mine.shape[1:])  # devices hold equally many rows, but not tokens
    padded[: len(mine)] = mine
    parts = [part[:count] for part, count in zip(gather_from_all(padded), counts, strict=True)]
    normalizer.train()
    normalizer.forward(torch.cat(parts))
    normalizer.eval()


def gather_from_all(mine: Tensor) -> list[Tensor]:
    """The tensors of all devices, which are of one shape."""
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    with or_broken():
        dist.all_gather(parts, mine)
    return parts


def pack(tensors: list[Tensor]) -> tuple[Tensor, Layout]:
    """Tensors [M, …] of any dtypes as one of bytes, a row for each of theirs."""
    num_rows = len(tensors[0])
    bytes_of = [tensor.contiguous().view(num_rows, -1).view(torch.uint8) for tensor in tensors]
    layout = [(str(tensor.dtype).removeprefix("torch."), list(tensor.shape[1:])) for tensor in tensors]
    return torch.cat(bytes_of, 1), layout


def unpack(rows: Tensor, layout: Layout) -> list[Tensor]:
    """The inverse of `pack`."""
    tensors, start = [], 0
    for dtype, shape in layout:
        end = start + row_bytes([(dtype, shape)])
        # A copy that begins where a number of that dtype may begin.
        part = rows[:, start:end].clone(memory_format=torch.contiguous_format)
        tensors.append(part.view(getattr(torch, dtype)).view(len(rows), *shape))
        start = end
    return tensors


def row_bytes(layout: Layout) -> int:
    return sum(getattr(torch, dtype).itemsize * int(torch.Size(shape).numel()) for dtype, shape in layout)


@contextmanager
def or_broken() -> Iterator[None]:
    """What a collective raises, as GroupBroken."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise GroupBroken(str(error)) from None


@contextmanager
def on_loopback() -> Iterator[None]:
    """Sockets that gloo and nccl open meanwhile are on the machine's loopback interface: neither asks who connects."""
    loopback = next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.family == socket.AF_INET and address.address == LOCALHOST for address in addresses)
    )
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, loopback))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
