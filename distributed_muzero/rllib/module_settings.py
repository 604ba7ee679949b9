"""What an exported module needs to know of its run, besides the weights; plain values that JSON holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from distributed_muzero.config import NetworkConfig, SearchConfig
from distributed_muzero.environments.base import EnvironmentSpec, TokenColumn
from distributed_muzero.errors import CheckpointError, ConfigError
from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.registry import make_networks
from distributed_muzero.run_folder import RunFolder

FORMAT_VERSION = 1


class ModuleSettings(NamedTuple):
    """Of a policy that was taken out of a run."""

    spec: EnvironmentSpec
    history_length: int  # N
    network: NetworkConfig
    search: SearchConfig
    discount: float
    num_simulations: int  # 0: the prior alone

    def make_networks(self) -> Networks:
        return make_networks(self.spec, self.history_length, self.network)

    def to_dict(self) -> dict[str, Any]:
        spec = {**self.spec._asdict(), "observation_dtype": str(np.dtype(self.spec.observation_dtype))}
        spec["token_columns"] = [column._asdict() for column in self.spec.token_columns]
        return {
            "format_version": FORMAT_VERSION,
            "spec": {
                name: list(value) if isinstance(value, tuple) else value for name, value in spec.items()
            },
            "history_length": self.history_length,
            "network": self.network.model_dump(mode="json"),
            "search": self.search.model_dump(mode="json"),
            "discount": self.discount,
            "num_simulations": self.num_simulations,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModuleSettings:
        """The inverse of `to_dict`. Raises CheckpointError for anything else."""
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"the module's settings have format {version}, this version reads format {FORMAT_VERSION}; export it "
                "again with this version"
            )
        try:
            spec = EnvironmentSpec(
                id=fields["spec"]["id"],
                observation_shape=tuple(fields["spec"]["observation_shape"]),
                observation_dtype=np.dtype(fields["spec"]["observation_dtype"]),
                action_shape=tuple(fields["spec"]["action_shape"]),
                num_players=fields["spec"]["num_players"],
                token_columns=tuple(TokenColumn(**column) for column in fields["spec"]["token_columns"]),
            )
            return cls(
                spec=spec,
                history_length=fields["history_length"],
                network=NetworkConfig.model_validate(fields["network"]),
                search=SearchConfig.model_validate(fields["search"]),
                discount=fields["discount"],
                num_simulations=fields["num_simulations"],
            )
        except (KeyError, TypeError, ValidationError) as error:
            raise CheckpointError(
                f"the module's settings can't be read ({error}); export it again"
            ) from error


def settings_of(folder: RunFolder, spec: EnvironmentSpec, num_simulations: int) -> ModuleSettings:
    """Of a run. Raises ConfigError for one that can't be a module of RLlib's."""
    history_length = folder.config.environment.history_length
    if num_simulations < 0:
        raise ConfigError(f"num_simulations is {num_simulations}; expected 0 (the prior alone) or more")
    if spec.num_players == 2 and history_length > 1:
        raise ConfigError(
            f"run {folder.name} stacks {history_length} observations of both players, and RLlib shows a module only "
            "those of its own turns; train a run with environment.history_length 1 to export it"
        )
    return ModuleSettings(
        spec=spec,
        history_length=history_length,
        network=folder.config.network,
        search=folder.config.search,
        discount=folder.config.algorithm.discount,
        num_simulations=num_simulations,
    )
