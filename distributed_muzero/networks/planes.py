"""The shape of planes, without torch."""

from __future__ import annotations

from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import ConfigError


def plane_shape(spec: EnvironmentSpec) -> tuple[int, int, int]:
    """(C, H, W) of one observation. Raises ConfigError unless it has rank 2 or 3 and isn't empty."""
    shape = spec.observation_shape
    if len(shape) not in (2, 3) or not all(shape):
        raise ConfigError(
            f"networks 'resnet' read planes, observations of shape [C, H, W] or [H, W]; those of {spec.id} have "
            f"the shape {list(shape)}. Set network.name to mlp, which takes any shape"
        )
    num_planes, height, width = shape if len(shape) == 3 else (1, *shape)
    return num_planes, height, width
