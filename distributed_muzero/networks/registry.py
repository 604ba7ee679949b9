"""Networks by name. A package adds its own with `register_networks`, or through the entry point group
`distributed_muzero.networks`, whose entries load a factory `(spec, history_length, NetworkConfig) -> Networks`.

torch is imported only when networks are made, so that a name can be checked at once.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from distributed_muzero.config import NetworkConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import ConfigError
from distributed_muzero.networks.planes import plane_shape
from distributed_muzero.networks.tokens import token_layout

if TYPE_CHECKING:
    from distributed_muzero.networks.base import Networks

GROUP = "distributed_muzero.networks"

Factory = Callable[[EnvironmentSpec, int, NetworkConfig], "Networks"]
_own = [
    EntryPoint("mlp", "distributed_muzero.networks.mlp:MLP", GROUP),
    EntryPoint("node_sequence", "distributed_muzero.networks.node_sequence:NodeSequence", GROUP),
    EntryPoint("resnet", "distributed_muzero.networks.resnet:ResNet", GROUP),
]
_registered: dict[str, Factory] = {}


def register_networks(name: str, factory: Factory) -> None:
    """Adds a model under `name`, in this process. Raises ConfigError if the name is taken."""
    if name in network_names():
        raise ConfigError(f"networks {name!r} exist already; choose another name")
    _registered[name] = factory


def network_names() -> list[str]:
    return sorted({*_registered, *_entries()})


def check_name(name: str) -> None:
    """Raises ConfigError if there are no networks of that name."""
    if name not in network_names():
        raise ConfigError(f"no networks {name!r}; registered: {', '.join(network_names())}")


def check_observations(name: str, spec: EnvironmentSpec, history_length: int) -> None:
    """Raises ConfigError if our own networks of that name can't read what an environment shows."""
    if name == "resnet":
        plane_shape(spec)
    elif name == "node_sequence":
        token_layout(spec, history_length)


def make_networks(
    spec: EnvironmentSpec, history_length: int, config: NetworkConfig, seed: int = 0
) -> Networks:
    """Builds the model that `config.name` asks for, initialised from `seed` alone. Raises ConfigError."""
    import torch

    check_name(config.name)
    factory = _registered.get(config.name) or _entries()[config.name].load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory(spec, history_length, config)


def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in (*entry_points(group=GROUP), *_own)}
