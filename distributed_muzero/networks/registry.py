"""Networks by name. A package adds its own with `register_networks`, or through the entry point group
`distributed_muzero.networks`, whose entries load a factory `(spec, history_length, NetworkConfig) -> Networks`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

import torch

from distributed_muzero.config import NetworkConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import ConfigError
from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.mlp import MLP

Factory = Callable[[EnvironmentSpec, int, NetworkConfig], Networks]
_factories: dict[str, Factory] = {"mlp": MLP}


def register_networks(name: str, factory: Factory) -> None:
    """Adds a model under `name`. Raises ConfigError if the name is taken."""
    if name in network_names():
        raise ConfigError(f"networks {name!r} exist already; choose another name")
    _factories[name] = factory


def network_names() -> list[str]:
    return sorted({*_factories, *(entry.name for entry in entry_points(group="distributed_muzero.networks"))})


def make_networks(spec: EnvironmentSpec, history_length: int, config: NetworkConfig, seed: int = 0) -> Networks:
    """Builds the model that `config.name` asks for, initialised from `seed` alone. Raises ConfigError."""
    factory = _factories.get(config.name)
    if factory is None:
        found = list(entry_points(group="distributed_muzero.networks", name=config.name))
        if not found:
            raise ConfigError(f"no networks {config.name!r}; registered: {', '.join(network_names())}")
        factory = found[0].load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory(spec, history_length, config)
