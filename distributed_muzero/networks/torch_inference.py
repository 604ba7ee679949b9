"""Any torch Networks as the model of a search; embeddings stay on the networks' device."""

from __future__ import annotations

import numpy as np
import torch

from distributed_muzero.networks.base import Networks
from distributed_muzero.search.simulate import Expansion


class TorchInference:
    """Keeps the embeddings of a search by (node, row); the same interface as the torch-free models."""

    def __init__(self, networks: Networks):
        self.networks = networks
        first = next(networks.parameters(), None)
        self.device = first.device if first is not None else torch.device("cpu")
        self._embeddings = torch.empty(0)
        self._rows = torch.empty(0)

    @torch.inference_mode()
    def initial(self, observations: np.ndarray, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts a search over [B, N, *O] with room for `num_nodes`: root values [B], policy logits [B, A]."""
        answer = self.networks.initial_inference(torch.as_tensor(observations).to(self.device))
        roots = answer.embeddings
        self._rows = torch.arange(len(roots), device=roots.device)
        self._embeddings = torch.empty((num_nodes, *roots.shape), dtype=roots.dtype, device=roots.device)
        self._embeddings[0] = roots
        return answer.values.cpu().numpy(), answer.policy_logits.cpu().numpy()

    @torch.inference_mode()
    def expand(self, parents: np.ndarray, actions: np.ndarray, children: np.ndarray) -> Expansion:
        """One recurrent inference for every row."""
        embeddings = self._embeddings[self._index(parents), self._rows]
        answer = self.networks.recurrent_inference(embeddings, self._index(actions))
        self._embeddings[self._index(children), self._rows] = answer.embeddings
        return Expansion(
            answer.rewards.cpu().numpy(), answer.values.cpu().numpy(), answer.policy_logits.cpu().numpy()
        )

    def _index(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(numbers, dtype=torch.long).to(self.device)
