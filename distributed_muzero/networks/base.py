"""The five functions h, g_r, g_s, f_v, f_p as one object, with the fused calls that search and learner use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distributed_muzero.algorithm.value_transform import CategoricalOutput, ScalarOutput


class Inference(NamedTuple):
    """Rows of predictions at embeddings [B, *E]."""

    embeddings: Tensor  # [B, *E]
    rewards: Tensor  # [B]; zeros after initial_inference
    values: Tensor  # [B]
    policy_logits: Tensor  # [B, A]


class Networks(nn.Module):
    """Base of every model. A model writes representation, transition, reward_output, value_output and policy.

    B rows; observations [B, N, *O] as the environment gives them; actions LongTensor [B], flat.
    The `*_output` functions give what a head computes before it is decoded (logits for a categorical head).
    """

    compute_dtype: torch.dtype = torch.float32  # of the layers while they learn
    value_head: ScalarOutput | CategoricalOutput = ScalarOutput()
    reward_head: ScalarOutput | CategoricalOutput = ScalarOutput()

    def representation(self, observations: Tensor) -> Tensor:
        """h: observations [B, N, *O] -> embeddings s⁰ [B, *E]."""
        raise NotImplementedError

    def transition(self, embeddings: Tensor, actions: Tensor) -> Tensor:
        """g_s: sᵏ⁻¹ [B, *E], aᵏ [B] -> sᵏ [B, *E]."""
        raise NotImplementedError

    def reward_output(self, embeddings: Tensor, actions: Tensor, next_embeddings: Tensor) -> Tensor:
        """g_r before decoding: sᵏ⁻¹, aᵏ and the sᵏ that g_s made of them -> [B, reward_head.size]."""
        raise NotImplementedError

    def value_output(self, embeddings: Tensor) -> Tensor:
        """f_v before decoding: [B, *E] -> [B, value_head.size]."""
        raise NotImplementedError

    def policy(self, embeddings: Tensor) -> Tensor:
        """f_p: [B, *E] -> logits [B, A]."""
        raise NotImplementedError

    def reward(self, embeddings: Tensor, actions: Tensor) -> Tensor:
        """g_r: sᵏ⁻¹ [B, *E], aᵏ [B] -> rᵏ [B]."""
        next_embeddings = self.transition(embeddings, actions)
        return self.reward_head.decode(self.reward_output(embeddings, actions, next_embeddings))

    def value(self, embeddings: Tensor) -> Tensor:
        """f_v: [B, *E] -> v [B]."""
        return self.value_head.decode(self.value_output(embeddings))

    def initial_inference(self, observations: Tensor) -> Inference:
        """h, f_v and f_p in one call."""
        embeddings = self.representation(observations)
        values = self.value(embeddings)
        return Inference(embeddings, torch.zeros_like(values), values, self.policy(embeddings))

    def recurrent_inference(self, embeddings: Tensor, actions: Tensor) -> Inference:
        """g_s, g_r, f_v and f_p in one call; the transition is computed once."""
        following = self.transition(embeddings, actions)
        rewards = self.reward_head.decode(self.reward_output(embeddings, actions, following))
        return Inference(following, rewards, self.value(following), self.policy(following))

    @property
    def functions(self) -> tuple[Callable, Callable, Callable, Callable, Callable]:
        """(h, g_r, g_s, f_v, f_p) for the contract's functions."""
        return self.representation, self.reward, self.transition, self.value, self.policy

    def numpy_inference(self) -> Any:
        """A torch-free model of the same weights for the search on a CPU, or None where there is no such thing."""
        return None


class FunctionNetworks(Networks):
    """Five plain callables (contract, decision 11): f_v and g_r give numbers [B] or [B, 1], f_p logits [B, A]."""

    def __init__(self, h: Callable, g_r: Callable, g_s: Callable, f_v: Callable, f_p: Callable):
        super().__init__()
        # As a tuple they are not registered as submodules: they may not be modules, and may share trunks.
        self._functions = (h, g_r, g_s, f_v, f_p)

    def representation(self, observations: Tensor) -> Tensor:
        return self._functions[0](observations)

    def reward_output(self, embeddings: Tensor, actions: Tensor, next_embeddings: Tensor) -> Tensor:
        return self._functions[1](embeddings, actions)

    def transition(self, embeddings: Tensor, actions: Tensor) -> Tensor:
        return self._functions[2](embeddings, actions)

    def value_output(self, embeddings: Tensor) -> Tensor:
        return self._functions[3](embeddings)

    def policy(self, embeddings: Tensor) -> Tensor:
        return self._functions[4](embeddings)


def as_networks(h: Callable, g_r: Callable, g_s: Callable, f_v: Callable, f_p: Callable) -> Networks:
    """The Networks that the five functions belong to, so that its fused calls are used; else they are wrapped."""
    owner = getattr(h, "__self__", None)
    if isinstance(owner, Networks) and owner.functions == (h, g_r, g_s, f_v, f_p):
        return owner
    return FunctionNetworks(h, g_r, g_s, f_v, f_p)
