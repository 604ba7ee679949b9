"""Environments made for RLlib, behind the `Environment` protocol: `rllib:NAME` and `rllib:MODULE:NAME`.

Neither this file nor what it imports loads ray.rllib: what an actor's process loads is up to the creator.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import gymnasium

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.base import Environment
from distributed_muzero.environments.custom import how_to_trust, import_module, is_module
from distributed_muzero.environments.gymnasium import GymnasiumEnvironment
from distributed_muzero.environments.pettingzoo import ORDERS, AECEnvironment
from distributed_muzero.environments.pettingzoo_boards import BOARDS
from distributed_muzero.errors import EnvironmentFailure, UnknownEnvironmentError
from distributed_muzero.replay.recorded_pieces import MASK
from distributed_muzero.rllib.masks import Unmasked, masked_key
from distributed_muzero.rllib.multi_agent import MultiAgentEnvironment
from distributed_muzero.rllib.registered import Creator, find_creator, registered_names


class EnvConfig(dict[str, Any]):
    """What a creator gets: the kwargs, with the attributes of RLlib's EnvContext. Every index is 0."""

    worker_index = 0
    vector_index = 0
    remote = False
    num_workers = 0
    recreated_worker = False


def make(config: EnvironmentConfig) -> Environment:
    """Calls the creator with `config.kwargs`; it may return a gymnasium.Env or RLlib's MultiAgentEnv.

    Raises UnknownEnvironmentError (nothing of that name, or its module isn't trusted) and EnvironmentFailure (the
    creator fails, or what it returns can't be trained).
    """
    creator = _find(config)
    try:
        made = creator(EnvConfig(config.kwargs))
    except Exception as error:
        kwargs = f" with kwargs {config.kwargs}" if config.kwargs else ""
        problem = f"its creator raised {type(error).__name__}: {error}"
        hint = "it is called with one argument, the environment's kwargs"
        raise EnvironmentFailure(f"{config.id}{kwargs}: {problem} ({hint})") from error
    if not isinstance(made, gymnasium.Env):
        raise EnvironmentFailure(
            f"{config.id}: its creator returned {type(made).__name__}; expected a gymnasium.Env or RLlib's "
            "MultiAgentEnv"
        )
    try:
        return _adapt(made, config)
    except EnvironmentFailure:
        made.close()
        raise


def trainable_games() -> list[str]:
    """Names registered with Tune, by this process or its Ray job."""
    return registered_names()


def _find(config: EnvironmentConfig) -> Creator:
    """NAME as it is registered; of MODULE:NAME, what is registered once MODULE is imported, or else its attribute."""
    name = config.id.partition(":")[2]
    if creator := find_creator(name):
        return creator
    module_name, colon, rest = name.partition(":")
    if not (colon and rest and is_module(module_name)):
        advice = "Register it before, or give the module that does so: rllib:MODULE:NAME"
        raise UnknownEnvironmentError(f"{_unknown(config.id, name)}. {advice}")
    if config.code_folder is None:
        raise UnknownEnvironmentError(f"{_unknown(config.id, name)}. {how_to_trust(f'{module_name}:{rest}')}")
    module = import_module(config, module_name)
    creator = find_creator(rest) or getattr(module, rest, None)
    if not callable(creator):
        raise UnknownEnvironmentError(f"{_unknown(config.id, rest)}, nor has {module_name} a {rest} to call")
    return creator


def _unknown(id: str, name: str) -> str:
    return (
        f"{id}: {name!r} isn't registered with ray.tune.register_env in this process or its Ray job (registered: "
        f"{', '.join(registered_names()) or 'none'})"
    )


def _adapt(made: Any, config: EnvironmentConfig) -> Environment:
    limit = config.max_episode_steps
    if _wraps_a_board_game(made):
        game = re.sub(r"_v\d+$", "", str(made.env.metadata.get("name")))
        return AECEnvironment(made.env, config.id, limit, ORDERS.get(game), BOARDS.get(game))
    multi_agent = _class_of_rllib("ray.rllib.env.multi_agent_env", "MultiAgentEnv")
    if multi_agent is not None and isinstance(made, multi_agent):
        return MultiAgentEnvironment(made, config.id, limit)
    key = masked_key(made.observation_space)
    return GymnasiumEnvironment(made if key is None else Unmasked(made, key), config.id, limit)


def _wraps_a_board_game(made: Any) -> bool:
    """Whether it is RLlib's PettingZooEnv, nobody's variant of it, around what `pettingzoo:` would play as well."""
    is_wrapper = type(made) is _class_of_rllib("ray.rllib.env.wrappers.pettingzoo_env", "PettingZooEnv")
    if not is_wrapper:
        return False
    agents = made.possible_agents
    return len(agents) == 2 and MASK in getattr(made.get_observation_space(agents[0]), "spaces", {})


def _class_of_rllib(module: str, name: str) -> type | None:
    """None where nobody has imported the module: then there is no instance of it either."""
    return getattr(sys.modules.get(module), name, None)
