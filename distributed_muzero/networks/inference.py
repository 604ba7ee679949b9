"""The model that a search asks: whichever of the two answers fastest for these networks."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.torch_inference import TorchInference
from distributed_muzero.search.simulate import Expansion


class SearchModel(Protocol):
    """Keeps the embeddings of a search by (node, row)."""

    def initial(self, observations: np.ndarray, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts a search over [B, N, *O] with room for `num_nodes`: root values [B], policy logits [B, A]."""

    def expand(self, parents: np.ndarray, actions: np.ndarray, children: np.ndarray) -> Expansion:
        """One recurrent inference for every row."""


def make_search_model(networks: Networks) -> SearchModel:
    """A torch-free snapshot where the networks offer one and live on a CPU, else the networks themselves."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in networks.parameters())
    return (on_cpu and networks.numpy_inference()) or TorchInference(networks)
