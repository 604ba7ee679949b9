"""Random finite worlds to search, for tests."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from distributed_muzero.config import SearchConfig
from distributed_muzero.search import Expansion, Tree, gumbel_search, muzero_search
from distributed_muzero.types import SearchResult


class World(NamedTuple):
    """A finite deterministic MDP and B roots in it. Roots have values and logits of their own."""

    next_state: np.ndarray  # [S, A]
    reward: np.ndarray  # [S, A]
    discount: np.ndarray  # [S, A]; 0 = the edge ends the game
    value: np.ndarray  # [S]
    logits: np.ndarray  # [S, A]
    root_state: np.ndarray  # [B]
    root_value: np.ndarray  # [B]
    root_logits: np.ndarray  # [B, A]
    legal_mask: np.ndarray  # [B, A] bool

    def rows(self, rows: list[int]) -> World:
        """The same world with these roots only."""
        roots = ("root_state", "root_value", "root_logits", "legal_mask")
        return self._replace(**{name: getattr(self, name)[rows] for name in roots})


def make_world(
    seed: int,
    batch: int = 3,
    num_actions: int = 3,
    num_states: int = 6,
    discount: float = 0.97,
    coarse_logits: bool = False,
) -> World:
    """coarse_logits: below the roots many of them are equal or −inf."""
    rng = np.random.default_rng(seed)
    edges = (num_states, num_actions)
    legal = rng.random((batch, num_actions)) < 0.7
    legal[np.arange(batch), rng.integers(num_actions, size=batch)] = True
    world = World(
        rng.integers(num_states, size=edges),
        rng.normal(size=edges),
        np.where(rng.random(edges) < 0.1, 0.0, discount),
        rng.normal(size=num_states),
        2 * rng.normal(size=edges),
        rng.integers(num_states, size=batch),
        rng.normal(size=batch),
        2 * rng.normal(size=(batch, num_actions)),
        legal,
    )
    if coarse_logits:
        world.logits[:] = np.where(rng.random(edges) < 0.3, -np.inf, rng.integers(3, size=edges))
        world.logits[np.arange(num_states), rng.integers(num_actions, size=num_states)] = 1
    return world


def search_world(
    world: World, config: SearchConfig, *, noise: bool = False, seed: int = 0, dtype: DTypeLike = np.float64
) -> tuple[SearchResult, Tree]:
    """Our search in the world by the config's policy."""
    search = gumbel_search_world if config.policy == "gumbel" else muzero_search_world
    result, tree, *_ = search(world, config, noise=noise, seed=seed, dtype=dtype)
    return result, tree


def muzero_search_world(
    world: World, config: SearchConfig, *, noise: bool = False, seed: int = 0, dtype: DTypeLike = np.float64
) -> tuple[SearchResult, Tree]:
    rng = np.random.default_rng(seed)
    return muzero_search(*_inputs(world, config), discount=1.0, rng=rng, noise=noise, dtype=dtype)


def gumbel_search_world(
    world: World, config: SearchConfig, *, noise: bool = False, seed: int = 0, dtype: DTypeLike = np.float64
) -> tuple[SearchResult, Tree, np.ndarray]:
    rng = np.random.default_rng(seed)
    return gumbel_search(*_inputs(world, config), discount=1.0, rng=rng, noise=noise, dtype=dtype)


def _inputs(world: World, config: SearchConfig) -> tuple:
    """The world's roots and its model, with the states kept by (row, node) as a model keeps embeddings."""
    states = np.zeros((len(world.root_state), config.num_simulations + 1), np.int64)
    states[:, 0] = world.root_state
    rows = np.arange(len(states))

    def expand(parents: np.ndarray, actions: np.ndarray, children: np.ndarray) -> Expansion:
        edge = (states[rows, parents], actions)
        after = states[rows, children] = world.next_state[edge]
        return Expansion(world.reward[edge], world.value[after], world.logits[after], world.discount[edge])

    return world.root_logits, world.root_value, world.legal_mask, expand, config
