"""Our environments for RLlib: `PPOConfig().environment(register_with_rllib("openspiel:tic_tac_toe"))`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from ray import tune
from ray.rllib.env.multi_agent_env import MultiAgentEnv

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.base import Environment, EnvironmentSpec
from distributed_muzero.environments.registry import make_environment

AGENTS = ["player_0", "player_1"]


class View(NamedTuple):
    """How RLlib sees an environment.

    flat: observations as float32 vectors, which its default networks take; else in their own shape and type.
    with_mask: a Dict of `observations` and `action_mask`, as RLlib's action masking modules expect it.
    illegal_reward: for an illegal action, which ends the game; with two players the other one gets the negative.
    """

    flat: bool = True
    with_mask: bool = False
    illegal_reward: float = -1.0

    def space(self, spec: EnvironmentSpec) -> spaces.Space:
        box = _box(spec.observation_shape, spec.observation_dtype)
        if self.flat:
            box = _box((math.prod(spec.observation_shape),), np.dtype(np.float32))
        if not self.with_mask:
            return box
        mask = spaces.Box(0.0, 1.0, (spec.num_actions,), np.float32)
        return spaces.Dict({"action_mask": mask, "observations": box})

    def show(self, spec: EnvironmentSpec, observation: np.ndarray, mask: np.ndarray | None) -> Any:
        """An observation [*O] and its mask [*A] as an element of `space`; no mask after the end: all 1."""
        seen = observation.ravel().astype(np.float32) if self.flat else observation.astype(_kept(spec))
        if not self.with_mask:
            return seen
        legal = np.ones(spec.num_actions) if mask is None else mask.ravel() != 0
        return {"action_mask": legal.astype(np.float32), "observations": seen}


class RLlibEnvironment(gymnasium.Env):
    """An environment of ours for one player. An illegal action ends the game (`View.illegal_reward`)."""

    def __init__(self, environment: Environment, view: View):
        self._game = environment
        self._view = view
        self._seen: Any = None
        self.observation_space = view.space(environment.spec)
        self.action_space = spaces.Discrete(environment.spec.num_actions)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self._seen = self._view.show(self._game.spec, self._game.initial_state(seed), self._game.mask())
        return self._seen, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self._game.mask().flat[action]:
            return self._seen, self._view.illegal_reward, True, False, {}
        reward, observation, is_over = self._game.step(int(action))
        self._seen = self._view.show(self._game.spec, observation, None if is_over else self._game.mask())
        truncated = is_over and bool(self._game.truncated)
        return self._seen, reward, is_over and not truncated, truncated, {}

    def close(self) -> None:
        self._game.close()


class RLlibGame(MultiAgentEnv):
    """A game of ours for two, `player_0` and `player_1`: only the one to move observes, both at the end.

    Each step rewards both, one with what the other loses. An illegal action loses the game (`View.illegal_reward`).
    At the end, who has just moved observes once more what it saw before that move: a position is only seen by who is
    to move in it.
    """

    def __init__(self, environment: Environment, view: View):
        self._game = environment
        self._view = view
        self.agents = self.possible_agents = list(AGENTS)
        self.observation_spaces = {agent: view.space(environment.spec) for agent in AGENTS}
        self.action_spaces = {agent: spaces.Discrete(environment.spec.num_actions) for agent in AGENTS}
        self._seen: dict[str, Any] = {}  # last, by agent
        super().__init__()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict, dict]:
        observation = self._game.initial_state(seed)
        mover = AGENTS[self._game.to_play()]
        self._seen = {mover: self._view.show(self._game.spec, observation, self._game.mask())}
        return dict(self._seen), {}

    def step(self, action_dict: dict) -> tuple[dict, dict, dict, dict, dict]:  # type: ignore[override]
        player = self._game.to_play()
        mover, other = AGENTS[player], AGENTS[1 - player]
        action = int(action_dict[mover])
        if not self._game.mask().flat[action]:
            return self._result(mover, other, self._view.illegal_reward, terminated=True)
        reward, observation, is_over = self._game.step(action)
        mask = None if is_over else self._game.mask()
        self._seen[other] = self._view.show(self._game.spec, observation, mask)
        truncated = is_over and bool(self._game.truncated)
        return self._result(mover, other, reward, is_over and not truncated, truncated)

    def close(self) -> None:
        self._game.close()

    def _result(
        self, mover: str, other: str, reward: float, terminated: bool, truncated: bool = False
    ) -> tuple[dict, dict, dict, dict, dict]:
        seen = dict(self._seen) if terminated or truncated else {other: self._seen[other]}
        rewards = {mover: float(reward), other: -float(reward)}
        return seen, rewards, {"__all__": terminated}, {"__all__": truncated}, {}


def register_with_rllib(
    id: str,
    *,
    name: str | None = None,
    max_episode_steps: int = 10_000,
    flat: bool = True,
    with_mask: bool = False,
    illegal_reward: float = -1.0,
    **kwargs: Any,
) -> str:
    """Registers an environment of ours with `ray.tune.register_env`; returns the name for `.environment(name)`.

    name: `distributed_muzero:ID` without one.   kwargs: the environment's own; RLlib's env_config goes over them.
    The others are those of `View`. Raises what `make_environment` raises when RLlib makes the environment.
    """
    section = EnvironmentConfig(id=id, kwargs=kwargs, max_episode_steps=max_episode_steps)
    name = name or f"distributed_muzero:{id}"
    tune.register_env(name, partial(_create, section, View(flat, with_mask, illegal_reward)))
    return name


def to_rllib(environment: Environment, view: View) -> RLlibEnvironment | RLlibGame:
    """The environment itself as RLlib takes it, by its number of players."""
    kind = RLlibEnvironment if environment.spec.num_players == 1 else RLlibGame
    return kind(environment, view)


def _create(
    section: EnvironmentConfig, view: View, env_config: Mapping[str, Any]
) -> RLlibEnvironment | RLlibGame:
    changed = section.model_copy(update={"kwargs": {**section.kwargs, **env_config}})
    return to_rllib(make_environment(changed), view)


def _kept(spec: EnvironmentSpec) -> np.dtype:
    """RLlib has no Box of truth values."""
    return np.dtype(np.int8) if spec.observation_dtype.kind == "b" else spec.observation_dtype


def _box(shape: tuple[int, ...], dtype: np.dtype) -> spaces.Box:
    if dtype.kind == "b":
        return spaces.Box(0, 1, shape, np.int8)
    if dtype.kind == "f":
        return spaces.Box(-np.inf, np.inf, shape, dtype.type)
    return spaces.Box(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype.type)
