"""What random games show of an environment. Each function gets them all, and returns what it saw."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from distributed_muzero.environments.base import MAX_MAGNITUDE
from distributed_muzero.environments.random_games import RandomGame, same

KINDS = "biuf"  # of numpy's types: truth values, integers, floats
NO_STEP = "no step was played"
EXPECTED_MAGNITUDE = (
    f"expected a finite number from {-MAX_MAGNITUDE:g} to {MAX_MAGNITUDE:g}, as replay takes no others"
)


class Broken(Exception):
    """A promise that isn't kept; the message says where, what came and what was expected."""


class Unseen(Exception):
    """Nothing came up that could be checked."""


def check_play(games: list[RandomGame]) -> str:
    if error := games[-1].error:
        raise Broken(error)
    num_steps = _num_steps(games)
    if not num_steps:
        raise Unseen(NO_STEP)
    return f"{len(games)} random games, {num_steps} steps"


def check_observations(games: list[RandomGame]) -> str:
    low, high = np.inf, -np.inf
    for game in games:
        spec = game.spec
        for step, observation in enumerate(game.copies):
            where = game.at(step)
            if not isinstance(game.observations[step], np.ndarray):
                raise Broken(f"{where}: {type(game.observations[step]).__name__}; expected a numpy array")
            if observation.shape != spec.observation_shape or observation.dtype != spec.observation_dtype:
                raise Broken(
                    f"{where}: shape {observation.shape} and type {observation.dtype}; expected "
                    f"{spec.observation_shape} and {spec.observation_dtype}, as the spec says"
                )
            if not np.isfinite(observation).all():
                bad = observation[~np.isfinite(observation)][0]
                raise Broken(f"{where}: holds {bad}; expected finite numbers")
            lowest, highest = float(observation.min()), float(observation.max())
            if observation.dtype.kind == "f" and max(-lowest, highest) > MAX_MAGNITUDE:
                bad = highest if highest > MAX_MAGNITUDE else lowest
                raise Broken(f"{where}: holds {bad:g}; {EXPECTED_MAGNITUDE}")
            low, high = min(low, lowest), max(high, highest)
    if low > high:
        raise Unseen("no observation came")
    return f"as the spec says, finite, from {low:g} to {high:g}"


def check_rewards(games: list[RandomGame]) -> str:
    rewards = []
    for game in games:
        for step, reward in enumerate(game.rewards):
            where = game.at(step)
            if not isinstance(reward, (int, float, np.number, np.bool_)):
                raise Broken(f"{where}: the reward is {reward!r}; expected a number")
            # A NaN compares false.
            if not abs(float(reward)) <= MAX_MAGNITUDE:
                raise Broken(f"{where}: the reward is {reward}; {EXPECTED_MAGNITUDE}")
            rewards.append(float(reward))
    if not rewards:
        raise Unseen(NO_STEP)
    return f"finite, from {min(rewards):g} to {max(rewards):g}"


def check_masks(games: list[RandomGame]) -> str:
    fewest = games[0].spec.num_actions
    for game in games:
        for step, mask in enumerate(game.masks):
            where, expected = game.at(step), game.spec.action_shape
            if mask.shape != expected or mask.dtype.kind not in KINDS:
                raise Broken(
                    f"{where}: shape {mask.shape} and type {mask.dtype}; expected {expected}, 1 = allowed"
                )
            if not np.isin(mask, (0, 1)).all():
                raise Broken(f"{where}: holds {mask[~np.isin(mask, (0, 1))][0]}; expected 0 and 1 only")
            if not mask.any():
                raise Broken(f"{where}: allows no action; at least one must be legal until the game ends")
            fewest = min(fewest, int(mask.sum()))
    if not any(game.masks for game in games):
        raise Unseen("no mask came")
    return f"shape {games[0].spec.action_shape}, at least {fewest} legal before each step"


def check_turns(games: list[RandomGame]) -> str:
    num_players = games[0].spec.num_players
    for game in games:
        for step, player in enumerate(game.players):
            if not isinstance(player, (int, np.integer)) or not 0 <= player < num_players:
                raise Broken(f"{game.at(step)}: to_play() is {player!r}; expected 0 … {num_players - 1}")
        if num_players == 2:
            for step, (before, after) in enumerate(pairwise(game.players)):
                if before == after:
                    raise Broken(
                        f"{game.at(step + 1)}: player {after} is to move again; the search takes it that turns "
                        "alternate, so give the other player a move in between that does nothing"
                    )
    if not any(game.players for game in games):
        raise Unseen("nobody was to move")
    return "always player 0" if num_players == 1 else "both players in turn"


def check_length(games: list[RandomGame], max_episode_steps: int) -> str:
    for game in games:
        if not game.is_over and len(game.actions) >= max_episode_steps:
            raise Broken(
                f"seed {game.seed}: goes on after {max_episode_steps} steps; expected the environment to cut a game "
                "there (max_episode_steps of its config), with `truncated`"
            )
    lengths = [len(game.actions) for game in games if game.is_over]
    if not lengths:
        raise _no_end(games)
    return f"{min(lengths)} to {max(lengths)} steps"


def check_ends(games: list[RandomGame]) -> str:
    ended = [game for game in games if game.is_over]
    for game in games:
        for step, is_terminal in enumerate(game.terminals):
            if not isinstance(is_terminal, (bool, np.bool_)):
                raise Broken(f"{game.at(step)}: is_terminal is {is_terminal!r}; expected True or False")
    for game in ended:
        if not isinstance(game.truncated, (bool, np.bool_)):
            raise Broken(
                f"seed {game.seed}: after the end, truncated is {game.truncated!r}; expected True or False"
            )
    if not ended:
        raise _no_end(games)
    num_truncated = sum(bool(game.truncated) for game in ended)
    return f"{len(ended) - num_truncated} by the rules, {num_truncated} truncated"


def check_earlier_observations(games: list[RandomGame]) -> str:
    for game in games:
        for step, (given, copy) in enumerate(zip(game.observations, game.copies, strict=True)):
            if not same(given, copy):
                raise Broken(
                    f"{game.at(step)}: changed after it was given out; return a new array each time (`.copy()`)"
                )
    if not _num_steps(games):
        raise Unseen(NO_STEP)
    return "unchanged by later steps"


def _num_steps(games: list[RandomGame]) -> int:
    return sum(len(game.actions) for game in games)


def _no_end(games: list[RandomGame]) -> Unseen:
    return Unseen(f"no game ended in the {games[-1].short_of} there was")


OF_GAMES: dict[str, Callable[[list[RandomGame]], str]] = {
    "play": check_play,
    "observations": check_observations,
    "rewards": check_rewards,
    "masks": check_masks,
    "turns": check_turns,
    "ends": check_ends,
    "earlier observations": check_earlier_observations,
}
