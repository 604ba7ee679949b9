"""The same network and the same search in mctx: the comparison's other side. Needs the extra `bench`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mctx
import numpy as np
from torch import nn

from distributed_muzero.algorithm.value_transform import EPSILON
from distributed_muzero.benchmarks.yardstick import linear_layers
from distributed_muzero.config import SearchConfig
from distributed_muzero.networks.mlp import MLP
from distributed_muzero.networks.mlp_inference import NORMALIZE_EPSILON

Weights = dict[str, list[tuple[jax.Array, jax.Array]]]


def make_mctx_search(
    networks: MLP, config: SearchConfig, discount: float
) -> Callable[[np.ndarray, int], jax.Array]:
    """A compiled function (observations [B, 1, O], seed) -> policies [B, A] of config.policy, root noise on."""
    weights = copy_weights(networks)
    support = jnp.linspace(networks.value_head.low, networks.value_head.high, networks.value_head.size)
    num_actions = networks.num_actions
    if config.policy == "gumbel":
        plan = partial(mctx.gumbel_muzero_policy, **_gumbel_options(config))
    else:
        plan = partial(mctx.muzero_policy, **_muzero_options(config))

    def recurrent(weights: Weights, _: jax.Array, actions: jax.Array, embeddings: jax.Array) -> Any:
        rewards, values, logits, after = recurrent_inference(
            weights, support, num_actions, embeddings, actions
        )
        discounts = jnp.full_like(rewards, discount)
        return mctx.RecurrentFnOutput(
            reward=rewards, discount=discounts, prior_logits=logits, value=values
        ), after

    @jax.jit
    def search(weights: Weights, observations: jax.Array, key: jax.Array) -> jax.Array:
        values, logits, embeddings = initial_inference(weights, support, observations)
        root = mctx.RootFnOutput(prior_logits=logits, value=values, embedding=embeddings)
        return plan(weights, key, root, recurrent, config.num_simulations).action_weights

    return lambda observations, seed: search(weights, observations, jax.random.key(seed)).block_until_ready()


def _muzero_options(config: SearchConfig) -> dict[str, Any]:
    return {
        "dirichlet_fraction": config.dirichlet_fraction,
        "dirichlet_alpha": config.dirichlet_alpha,
        "pb_c_init": config.pb_c_init,
        "pb_c_base": config.pb_c_base,
    }


def _gumbel_options(config: SearchConfig) -> dict[str, Any]:
    return {
        "max_num_considered_actions": config.max_num_considered_actions,
        "gumbel_scale": config.gumbel_scale,
        "qtransform": partial(
            mctx.qtransform_completed_by_mix_value,
            value_scale=config.value_scale,
            maxvisit_init=config.maxvisit_init,
            rescale_values=config.rescale_values,
            use_mixed_value=config.use_mixed_value,
        ),
    }


def copy_weights(networks: MLP) -> Weights:
    """Each part's layers as (weight [inputs, outputs], bias)."""
    parts: dict[str, nn.Module] = {
        "representation": networks.representation_layers,
        "transition": networks.transition_layers,
        "reward": networks.reward_layers,
        "value": networks.value_layers,
        "policy": networks.policy_layers,
    }
    return {
        name: [
            (jnp.asarray(layer.weight.detach().numpy().T), jnp.asarray(layer.bias.detach().numpy()))
            for layer in linear_layers(part)
        ]
        for name, part in parts.items()
    }


def initial_inference(weights: Weights, support: jax.Array, observations: jax.Array) -> Any:
    """[B, 1, O] -> values [B], logits [B, A], embeddings [B, E]."""
    flat = observations.reshape(len(observations), -1)
    embeddings = _normalize(
        _perceptron(weights["representation"], flat)
    )  # E64 is untrained: nothing to normalise by
    values = _decode(_perceptron(weights["value"], embeddings), support)
    return values, _perceptron(weights["policy"], embeddings), embeddings


def recurrent_inference(
    weights: Weights, support: jax.Array, num_actions: int, embeddings: jax.Array, actions: jax.Array
) -> Any:
    """One edge for each row -> rewards [B], values [B], logits [B, A], embeddings [B, E]."""
    inputs = jnp.concatenate([embeddings, jax.nn.one_hot(actions, num_actions)], axis=-1)
    after = _normalize(_perceptron(weights["transition"], inputs))
    rewards = _decode(_perceptron(weights["reward"], after), support)
    values = _decode(_perceptron(weights["value"], after), support)
    return rewards, values, _perceptron(weights["policy"], after), after


def _perceptron(layers: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    for weight, bias in layers[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = layers[-1]
    return x @ weight + bias


def _normalize(x: jax.Array) -> jax.Array:
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    return (x - low) / (high - low + NORMALIZE_EPSILON)


def _decode(logits: jax.Array, support: jax.Array) -> jax.Array:
    """h⁻¹ of the categorical mean."""
    y = jax.nn.softmax(logits) @ support
    root = (jnp.sqrt(1 + 4 * EPSILON * (jnp.abs(y) + 1 + EPSILON)) - 1) / (2 * EPSILON)
    return jnp.sign(y) * (root * root - 1)
