"""A module's weights as one contiguous float32 vector: optimiser, averaging and publishing are one call each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from distributed_muzero.errors import CheckpointError, NonFiniteError


class FlatWeights:
    """Rebinds every parameter of `module` (and its gradient) to a slice of one vector; make one for a module, not two.

    `vector` is a leaf parameter [P]: hand it to an optimiser. Buffers of floating type (running means) are copied in
    behind the parameters when weights are read, and out when they are written. `layout` names each slice.
    """

    def __init__(self, module: nn.Module):
        self._buffers = [
            (name, buffer) for name, buffer in module.named_buffers() if buffer.is_floating_point()
        ]
        parameters = list(module.named_parameters())
        device = parameters[0][1].device if parameters else torch.device("cpu")
        self.vector = nn.Parameter(
            torch.cat([p.detach().flatten().float() for _, p in parameters]).to(device)
        )
        self.vector.grad = torch.zeros_like(self.vector)
        self.layout = [(name, tuple(tensor.shape)) for name, tensor in (*parameters, *self._buffers)]
        start = 0
        for _, parameter in parameters:
            end = start + parameter.numel()
            parameter.data = self.vector.data[start:end].view_as(parameter)
            parameter.grad = self.vector.grad[start:end].view_as(parameter)
            start = end

    @property
    def size(self) -> int:
        return self.vector.numel() + sum(buffer.numel() for _, buffer in self._buffers)

    def zero_grad(self) -> None:
        assert self.vector.grad is not None
        self.vector.grad.zero_()

    @torch.no_grad()
    def read(self) -> Tensor:
        """A copy of all weights, [size] float32."""
        return torch.cat([self.vector.detach(), *(buffer.flatten().float() for _, buffer in self._buffers)])

    @torch.no_grad()
    def write(self, weights: np.ndarray | Tensor) -> None:
        """Sets all weights from a vector [size], or from a packed one. Raises CheckpointError when the sizes differ."""
        if len(weights) != self.size:
            raise CheckpointError(
                f"{len(weights)} weights came, this network has {self.size}: another network or config"
            )
        source = unpacked(weights) if isinstance(weights, np.ndarray) else weights
        start = self.vector.numel()
        self.vector.copy_(source[:start])
        for _, buffer in self._buffers:
            buffer.copy_(source[start : start + buffer.numel()].view_as(buffer))
            start += buffer.numel()

    def named_arrays(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """A weights vector [size] as arrays by name, for a file that others can read."""
        arrays, start = {}, 0
        for name, shape in self.layout:
            size = int(np.prod(shape))
            arrays[name] = weights[start : start + size].reshape(shape)
            start += size
        return arrays

    def vector_of(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The inverse of `named_arrays`. Raises CheckpointError for names or shapes of another network."""
        expected = dict(self.layout)
        found = {name: array.shape for name, array in arrays.items()}
        if found != expected:
            different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            raise CheckpointError(
                f"the checkpoint's weights don't fit this network: {', '.join(different[:4])} differ; "
                "use the config that the run was trained with"
            )
        return np.concatenate([arrays[name].ravel() for name, _ in self.layout]).astype(np.float32)


def packed(weights: Tensor, dtype: str) -> np.ndarray:
    """A vector [P] on its way to actors: float32, float16, or bfloat16 as its bits in int16, which numpy lacks.

    It may share the vector's memory.   Raises NonFiniteError for weights beyond float16's range.
    """
    small = weights.detach().to(getattr(torch, dtype)).cpu()
    if dtype == "float16" and not bool(torch.isfinite(small).all()):
        raise NonFiniteError(
            "a weight goes beyond what float16 holds (65504); set learner.weights_dtype to bfloat16 or float32"
        )
    return (small.view(torch.int16) if dtype == "bfloat16" else small).numpy()


def unpacked(weights: np.ndarray) -> Tensor:
    """What `packed` packed [P]; of float32 and float16 a view of the same memory, which must not be written to."""
    tensor = torch.from_dlpack(weights)  # unlike from_numpy, it takes what the object store shares read-only
    return tensor.view(torch.bfloat16) if weights.dtype == np.int16 else tensor
