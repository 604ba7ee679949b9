"""RLlib's MultiAgentEnv for one player, or for two who move in turn, behind the `Environment` protocol.

It is known by what it does, so that nothing of RLlib has to be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.environments.gymnasium import MAX_REWARD, code_actions, code_observations
from distributed_muzero.errors import EnvironmentFailure, NonFiniteError
from distributed_muzero.replay.recorded_pieces import MASK
from distributed_muzero.rllib.masks import masked_key
from distributed_muzero.rllib.zero_sum import Accounts

ALL = "__all__"


class MultiAgentEnvironment:
    """A MultiAgentEnv in which, at each step, exactly one agent observes: the one to act next.

    Player 0 is who observes first in a game, whatever its name. Rewards are the mover's (`Accounts` says how they are
    told apart); those of two agents must be zero-sum. Masks stand beside the observation (`masked_key`) or in
    `infos[agent]["action_mask"]`; without them all actions are legal.
    Raises EnvironmentFailure for what doesn't fit and for what the environment raises, NonFiniteError for a NaN or Inf.
    """

    def __init__(self, environment: Any, id: str, max_episode_steps: int):
        self._environment = environment
        self._max_episode_steps = max_episode_steps
        self._agents = agents_of(environment, id)
        seen, acts = _spaces(environment, self._agents, id)
        self._key = masked_key(seen)
        self._observations = code_observations(seen if self._key is None else seen[self._key], id)
        self._actions = code_actions(acts, id)
        self.spec = EnvironmentSpec(
            id=id,
            observation_shape=self._observations.shape,
            observation_dtype=self._observations.dtype,
            action_shape=self._actions.shape,
            num_players=len(self._agents),
        )
        self._seats = list(self._agents)  # of this game, by player
        self._player = 0
        self._num_steps = 0
        self._playing = False
        self._truncated = False
        self._is_zero_sum = False  # once a game's rewards have been checked
        self._legal = np.zeros(self.spec.action_shape, dtype=bool)

    def initial_state(self, seed: int | None = None) -> np.ndarray:
        self._num_steps, self._player, self._truncated = 0, 0, False
        seen, infos = self._call("reset()", partial(self._environment.reset, seed=seed))
        first = self._next_agent(seen)
        self._seats = [first, *(agent for agent in self._agents if agent != first)]
        self._accounts = Accounts()
        self._playing = True
        return self._observe(first, seen, infos)

    def step(self, action: int) -> tuple[float, np.ndarray, bool]:
        if not self._playing:
            raise self._failure("step() without a game: call initial_state() first, also after a game's end")
        if not 0 <= action < self.spec.num_actions or not self._legal.flat[action]:
            raise self._failure(f"action {action} is forbidden here")
        mover = self._seats[self._player]
        play = partial(self._environment.step, {mover: self._actions.decode(action)})
        seen, rewards, terminateds, truncateds, infos = self._call(f"step({action})", play)
        self._num_steps += 1
        if ALL not in terminateds or ALL not in truncateds:
            raise self._failure(
                f"terminateds and truncateds lack {ALL!r}, which says whether the game is over"
            )
        terminated, truncated = bool(terminateds[ALL]), bool(truncateds[ALL])
        reward = self._reward(rewards, terminated or truncated)
        self._player = (self._player + 1) % self.spec.num_players
        following = self._seats[self._player]
        if not (terminated or truncated) and (found := self._next_agent(seen)) != following:
            raise self._failure(f"{found!r} is to move twice in a row; expected turns to alternate")
        limit = truncated or self._num_steps >= self._max_episode_steps
        self._is_zero_sum |= self._accounts.was_checked
        if limit and not self._is_zero_sum and self.spec.num_players == 2 and not self._accounts.is_empty:
            raise self._failure(
                "nobody has told both players' rewards by max_episode_steps, so that they can't be checked; expected a "
                "zero-sum game: give both their rewards in some step, or let games end before"
            )
        self._truncated = limit and not terminated
        self._playing = not (terminated or limit)
        if terminated and following not in seen:  # nobody bootstraps from it
            return reward, np.zeros(self.spec.observation_shape, self.spec.observation_dtype), True
        return reward, self._observe(following, seen, infos), not self._playing

    def mask(self) -> np.ndarray:
        return self._legal.copy()

    def to_play(self) -> int:
        return self._player

    @property
    def truncated(self) -> bool:
        return self._truncated

    def close(self) -> None:
        self._environment.close()

    def _next_agent(self, seen: dict[Any, Any]) -> Any:
        if len(seen) != 1 or (agent := next(iter(seen))) not in self._agents:
            raise self._failure(
                f"{sorted(map(str, seen)) or 'nobody'} is to act; expected the observation of exactly one of "
                f"{self._agents}, as in games that are played in turn: moves at the same time can't be trained"
            )
        return agent

    def _reward(self, rewards: dict[Any, float], is_over: bool) -> float:
        told = [rewards.get(agent) for agent in self._seats]
        named = [float(reward) for reward in told if reward is not None]
        if not (np.abs(named) <= MAX_REWARD).all():  # a NaN compares false
            raise NonFiniteError(f"{self._where()}: the rewards are {rewards}; expected finite float32s")
        if len(told) == 1:
            return sum(named)
        try:
            return self._accounts.add((told[0], told[1]), self._player, is_over)
        except ValueError as error:
            raise self._failure(str(error)) from error

    def _observe(self, agent: Any, seen: dict[Any, Any], infos: dict[Any, Any]) -> np.ndarray:
        if agent not in seen:
            raise self._failure(
                f"truncated without an observation of {agent!r}, who would move next; expected it, to bootstrap from"
            )
        raw = seen[agent]
        mask = raw[MASK] if self._key is not None else infos.get(agent, {}).get(MASK)
        self._legal = self._shape_mask(mask)
        try:
            observation = self._observations.encode(raw if self._key is None else raw[self._key])
        except Exception as error:
            raise self._failure(f"the observation {raw!r} doesn't fit its space: {error}") from error
        if observation.shape != self.spec.observation_shape:
            raise self._failure(
                f"the observation has shape {observation.shape}, its space says {self.spec.observation_shape}"
            )
        if not np.isfinite(observation).all():
            raise NonFiniteError(f"{self._where()}: the observation isn't finite; expected finite numbers")
        return observation

    def _shape_mask(self, offered: Any) -> np.ndarray:
        shape = self.spec.action_shape
        if offered is None:
            return np.ones(shape, dtype=bool)
        mask = np.asarray(offered)
        if mask.shape != shape:
            raise self._failure(f"the mask has shape {mask.shape}, expected {shape}, 1 = allowed")
        if self._playing and not mask.any():
            raise self._failure(
                "the mask forbids every action; at least one must be legal until the game ends"
            )
        return mask != 0

    def _call(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            raise self._failure(f"{what} raised {type(error).__name__}: {error}") from error

    def _where(self) -> str:
        return f"{self.spec.id}, step {self._num_steps}"

    def _failure(self, problem: str) -> EnvironmentFailure:
        return EnvironmentFailure(f"{self._where()}: {problem}")


def agents_of(environment: Any, id: str) -> list[Any]:
    """All who may ever act. Raises EnvironmentFailure unless these are one or two."""
    agents = list(environment.possible_agents or environment.agents or environment.observation_spaces or ())
    if len(agents) not in (1, 2):
        raise EnvironmentFailure(
            f"{id} has the agents {agents} (possible_agents); expected one, or two who move in turn"
        )
    return agents


def _spaces(environment: Any, agents: list[Any], id: str) -> tuple[Any, Any]:
    """What is observed and done, by all alike. Raises EnvironmentFailure where that differs."""
    seen = [environment.get_observation_space(agent) for agent in agents]
    acts = [environment.get_action_space(agent) for agent in agents]
    if seen[0] != seen[-1] or acts[0] != acts[-1]:
        raise EnvironmentFailure(
            f"{id}: {agents[0]!r} and {agents[1]!r} observe or do different things; expected the same spaces, as one "
            "network plays both sides"
        )
    return seen[0], acts[0]
