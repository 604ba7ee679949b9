"""Any Gymnasium environment with discrete actions, behind the `Environment` protocol."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

os.environ.setdefault(
    "PYGAME_HIDE_SUPPORT_PROMPT", "1"
)  # pygame greets on standard output, where --json goes

import gymnasium
from gymnasium import spaces

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import EnvironmentFailure, NonFiniteError, UnknownEnvironmentError

MAX_ACTIONS = 100_000  # the search lays out every action of every node
MAX_REWARD = float(np.finfo(np.float32).max)  # rewards are kept as float32
CHOOSE = "choose another id (`distributed-muzero envs`), or make it discrete by its kwargs"

# module of Gymnasium's entry point -> what to install for it
EXTRAS = {
    "gymnasium.envs.box2d": "pip install 'distributed_muzero[box2d]'",
    "gymnasium.envs.phys2d": "pip install 'gymnasium[jax]'",
    "gymnasium.envs.tabular": "pip install 'gymnasium[jax]'",
}


class ActionCoding(NamedTuple):
    shape: tuple[int, ...]  # A
    decode: Callable[[int], Any]  # flat index -> the action that the space expects


class ObservationCoding(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    encode: Callable[[Any], np.ndarray]  # always a new array: environments may reuse their buffer


class GymnasiumEnvironment:
    """One Gymnasium environment. Flat actions are unravelled, observations become one array.

    Legal actions come from the environment's `action_masks()` method or its `info["action_mask"]`; without
    these, all are. Games end after `max_episode_steps` at the latest, as truncated.
    Raises EnvironmentFailure for spaces that can't be played and for what the environment raises,
    NonFiniteError for a NaN or Inf that it returns.
    """

    def __init__(self, environment: gymnasium.Env, id: str, max_episode_steps: int):
        self._environment = environment
        self._actions = code_actions(environment.action_space, id)
        self._observations = code_observations(environment.observation_space, id)
        self.spec = EnvironmentSpec(
            id=id,
            observation_shape=self._observations.shape,
            observation_dtype=self._observations.dtype,
            action_shape=self._actions.shape,
        )
        self._all_legal = np.ones(self.spec.action_shape, dtype=bool)
        self._offers_masks = environment.has_wrapper_attr("action_masks")
        self._max_episode_steps = max_episode_steps
        self._info: dict[str, Any] = {}
        self._seed: int | None = None
        self._num_steps = 0
        self._playing = False
        self._truncated = False

    def initial_state(self, seed: int | None = None) -> np.ndarray:
        self._seed, self._num_steps, self._truncated = seed, 0, False
        try:
            raw, self._info = self._environment.reset(seed=seed)
        except Exception as error:
            raise self._failure(f"reset() raised {type(error).__name__}: {error}") from error
        self._playing = True
        return self._encode(raw)

    def step(self, action: int) -> tuple[float, np.ndarray, bool]:
        if not self._playing:
            raise self._failure("step() without a game: call initial_state() first, also after a game's end")
        if not 0 <= action < self.spec.num_actions:
            raise self._failure(f"action {action} isn't in 0 … {self.spec.num_actions - 1}")
        try:
            raw, reward, terminated, truncated, self._info = self._environment.step(
                self._actions.decode(action)
            )
            reward = float(reward)
        except Exception as error:
            raise self._failure(f"step({action}) raised {type(error).__name__}: {error}") from error
        self._num_steps += 1
        if not abs(reward) <= MAX_REWARD:  # a NaN compares false
            raise NonFiniteError(f"{self._where()}: the reward is {reward}; expected a finite float32")
        # Ending by the rules wins over a limit reached in the same step: nothing is left to bootstrap from.
        limit = bool(truncated) or self._num_steps >= self._max_episode_steps
        self._truncated = limit and not terminated
        self._playing = not (terminated or limit)
        return reward, self._encode(raw), not self._playing

    def mask(self) -> np.ndarray:
        if self._offers_masks:
            offered = self._environment.get_wrapper_attr("action_masks")()
        else:
            offered = self._info.get("action_mask")
        if offered is None:
            return self._all_legal.copy()
        mask = self._shape_mask(offered)
        if not mask.any():
            raise self._failure(
                "the mask forbids every action; at least one must be legal until the game ends"
            )
        return mask

    def to_play(self) -> int:
        return 0

    @property
    def truncated(self) -> bool:
        return self._truncated

    def close(self) -> None:
        self._environment.close()

    def _encode(self, raw: Any) -> np.ndarray:
        try:
            observation = self._observations.encode(raw)
        except Exception as error:
            raise self._failure(f"the observation {raw!r} doesn't fit its space: {error}") from error
        if observation.shape != self.spec.observation_shape:
            expected = self.spec.observation_shape
            raise self._failure(f"the observation has shape {observation.shape}, its space says {expected}")
        if observation.dtype.kind == "f" and not np.isfinite(observation).all():
            bad = observation[~np.isfinite(observation)][0]
            raise NonFiniteError(f"{self._where()}: the observation holds {bad}; expected finite numbers")
        return observation

    def _shape_mask(self, offered: Any) -> np.ndarray:
        """[*A] bool, from a joint mask [*A] or from one row for each sub-action, concatenated."""
        shape = self.spec.action_shape
        mask = np.asarray(offered)
        if mask.shape == shape and mask.dtype.kind in "biuf":
            return mask != 0
        if len(shape) > 1 and mask.shape == (sum(shape),):
            rows = np.split(mask != 0, np.cumsum(shape)[:-1])
            return reduce(lambda joint, row: joint[..., None] & row, rows)
        raise self._failure(
            f"the mask has shape {mask.shape} and type {mask.dtype}, expected {shape}, 1 = allowed"
        )

    def _where(self) -> str:
        return f"{self.spec.id}, step {self._num_steps}, seed {self._seed}"

    def _failure(self, problem: str) -> EnvironmentFailure:
        return EnvironmentFailure(f"{self._where()}: {problem}")


def make_gymnasium(config: EnvironmentConfig) -> GymnasiumEnvironment:
    """Makes a registered Gymnasium id. Raises UnknownEnvironmentError if a package is missing, and
    EnvironmentFailure if the constructor refuses the kwargs or the spaces can't be played."""
    if _module(config.id).startswith(
        "gymnasium.envs.mujoco"
    ):  # said before asking for MuJoCo to be installed
        raise EnvironmentFailure(f"{config.id} has continuous actions, which can't be trained yet; {CHOOSE}")
    options = {"disable_env_checker": True, **config.kwargs}  # its checks warn; ours raise
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes on versions, and on the imports of third parties
            environment = gymnasium.make(config.id, **options)
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        advice = extra_for(config.id) or "install the package that it names"
        reason = str(error).rstrip(".")
        raise UnknownEnvironmentError(f"{config.id} can't be made: {reason}. To play it: {advice}") from error
    except Exception as error:
        kwargs = f" with kwargs {config.kwargs}" if config.kwargs else ""
        raise EnvironmentFailure(f"{config.id}{kwargs}: {type(error).__name__}: {error}") from error
    try:
        return GymnasiumEnvironment(environment, config.id, config.max_episode_steps)
    except EnvironmentFailure:
        environment.close()
        raise


def extra_for(id: str) -> str | None:
    """The command that installs what a registered id needs beyond Gymnasium; None if it isn't known."""
    return next((command for family, command in EXTRAS.items() if _module(id).startswith(family)), None)


def _module(id: str) -> str:
    """Where the registered id's class lives; empty if that isn't said."""
    entry_point = gymnasium.registry[id].entry_point if id in gymnasium.registry else None
    return entry_point.split(":")[0] if isinstance(entry_point, str) else ""


def code_actions(space: spaces.Space, id: str) -> ActionCoding:
    """How flat actions map to the space. Raises EnvironmentFailure unless it is (multi-)discrete."""
    if isinstance(space, spaces.Discrete):
        start = int(space.start)
        return ActionCoding((int(space.n),), lambda action: start + int(action))
    if isinstance(space, spaces.MultiDiscrete):
        return _unravelled(space.nvec, space.start, space.dtype, id)
    if isinstance(space, spaces.MultiBinary):
        return _unravelled(np.full(space.shape, 2), np.zeros(space.shape, int), space.dtype, id)
    if isinstance(space, spaces.Box):
        raise EnvironmentFailure(
            f"{id} has continuous actions {space}, which can't be trained yet; expected Discrete, "
            f"MultiDiscrete or MultiBinary; {CHOOSE}"
        )
    raise EnvironmentFailure(
        f"{id} has actions {space}; expected Discrete, MultiDiscrete or MultiBinary. Wrap it to have one"
    )


def code_observations(space: spaces.Space, id: str) -> ObservationCoding:
    """How observations become one array: Box as it is, everything discrete as one-hot float32."""
    if isinstance(space, spaces.Box):
        dtype = np.dtype(space.dtype)
        return ObservationCoding(space.shape, dtype, lambda raw: np.array(raw, dtype=dtype))
    if isinstance(space, spaces.MultiBinary):
        return ObservationCoding(
            space.shape, np.dtype(np.float32), lambda raw: np.array(raw, dtype=np.float32)
        )
    if isinstance(space, spaces.Discrete):
        return _one_hots(np.array([space.n]), np.array([space.start]))
    if isinstance(space, spaces.MultiDiscrete):
        return _one_hots(space.nvec.ravel(), space.start.ravel())
    raise EnvironmentFailure(
        f"{id} observes {type(space).__name__}, not one array; expected Box, Discrete, MultiDiscrete or "
        "MultiBinary. Wrap it in gymnasium.wrappers.FlattenObservation and register that under its own name"
    )


def _unravelled(sizes: np.ndarray, start: np.ndarray, dtype: Any, id: str) -> ActionCoding:
    shape = tuple(int(size) for size in sizes.ravel())
    num_actions = int(np.prod(shape, dtype=object))  # Python's integers: many sub-actions overflow an int64
    if num_actions > MAX_ACTIONS:
        raise EnvironmentFailure(
            f"{id} has {num_actions} joint actions {shape}; at most {MAX_ACTIONS} can be searched"
        )

    def decode(action: int) -> np.ndarray:
        return (np.reshape(np.unravel_index(action, shape), sizes.shape) + start).astype(dtype)

    return ActionCoding(shape, decode)


def _one_hots(sizes: np.ndarray, start: np.ndarray) -> ObservationCoding:
    """One one-hot for each number, concatenated. A number outside its range is an IndexError."""
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    size = int(sizes.sum())

    def encode(raw: Any) -> np.ndarray:
        values = np.ravel(np.asarray(raw)) - start
        if values.shape != sizes.shape or (values < 0).any() or (values >= sizes).any():
            raise IndexError(f"expected {len(sizes)} numbers from {start} on, below {start + sizes}")
        observation = np.zeros(size, dtype=np.float32)
        observation[offsets + values] = 1.0
        return observation

    return ObservationCoding((size,), np.dtype(np.float32), encode)
