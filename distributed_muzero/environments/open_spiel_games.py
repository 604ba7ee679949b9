"""Which of OpenSpiel's games can be trained, and what has to be known of one before it is played."""

from __future__ import annotations

import difflib
import json
import math
import random
from functools import lru_cache
from typing import Any, NamedTuple

import pyspiel

from distributed_muzero.errors import EnvironmentFailure, UnknownEnvironmentError

EXPECTED = (
    "expected a deterministic game with perfect information, in which one player, or two with opposite aims, move "
    "in turn; `distributed-muzero envs` lists those"
)
MAX_ACTIONS = 100_000  # the search lays out every action of every node
MAX_OBSERVATION = 1_000_000
REFUSALS = (RuntimeError, TypeError, ValueError, IndexError)  # what a wrong parameter may end in
SURVEY_PLIES = 2_000
SURVEY_GAMES = 200
COMPARED_PLIES = 100
KNOWN_ISSUES = ("quoridor",)  # OpenSpiel says so on standard error whenever it is loaded


class View(NamedTuple):
    """How a game's tensor becomes what the player to move sees."""

    # Which planes player 0 sees: own pieces, the other's, the rest. None where the tensor is left as it comes.
    order: tuple[int, ...] | None
    # Whether a further plane has to say who moves: not where the tensor does, or the rules treat both alike.
    says_player: bool
    # Whether the first two of the order change places for player 1: not where the tensor itself looks from a player.
    turns: bool = False


# Read in OpenSpiel's sources; the tests hold those with an order against the moves that were played.
VIEWS = {
    "breakthrough": View((0, 1, 2), True),
    "clobber": View(None, False),
    "connect_four": View((0, 1, 2), False),
    "go": View((0, 1, 2, 3), False),
    "gomoku": View((0, 1, 2), False),
    "havannah": View(None, False),
    "lines_of_action": View((0, 1, 2), False),
    "mnk": View((2, 1, 0), False),
    "othello": View((1, 2, 0), False),
    "pentago": View(None, False),
    "tic_tac_toe": View((2, 1, 0), False),
    "y": View(None, False),
}
# Of games whose tensor looks from a player only if a parameter asks for it: the order then.
RELATIVE_ORDERS = {"connect_four": (1, 0, 2)}


class Rules(NamedTuple):
    """A loaded game, and what random games have shown of it."""

    game: Any
    tensor_shape: tuple[int, ...]  # planes first
    view: View
    moves_twice: bool  # whether a player may be to move again after a move


def trainable_games() -> list[str]:
    """Names of the games that can be trained with their default parameters, sorted."""
    names = []
    for kind in pyspiel.registered_games():
        may_fit = kind.default_loadable and refusal(kind, kind.min_num_players) is None
        if may_fit and kind.short_name not in KNOWN_ISSUES:
            num_players = pyspiel.load_game(kind.short_name).num_players()
            names += [kind.short_name] if refusal(kind, num_players) is None else []
    return sorted(names)


def refusal(kind: Any, num_players: int) -> str | None:
    """Why a game of this GameType can't be trained; None if it can."""
    if kind.dynamics != kind.Dynamics.SEQUENTIAL:
        return "its players move at the same time"
    if kind.chance_mode != kind.ChanceMode.DETERMINISTIC:
        return "chance has a part in it (dice, cards, a start that is drawn)"
    if kind.information != kind.Information.PERFECT_INFORMATION:
        return "it hides something from its players"
    if num_players > 2:
        return f"it has {num_players} players"
    if num_players == 2 and kind.utility not in (kind.Utility.ZERO_SUM, kind.Utility.CONSTANT_SUM):
        return "what one player gains needn't be the other's loss"
    if not kind.provides_observation_tensor:
        return "it offers no observation tensor"
    return None


@lru_cache(maxsize=64)
def load_rules(id: str, parameters: str) -> Rules:
    """Loads a game, once in a process.

    id: `openspiel:` and OpenSpiel's own string, `name` or `name(key=value,…)`.   parameters: more of these, as JSON.
    Raises UnknownEnvironmentError if there is no such game, and EnvironmentFailure for parameters that it refuses and
    for games that can't be trained.
    """
    text = id.partition(":")[2]
    name = text.partition("(")[0].strip()
    kind = _kinds().get(name)
    if kind is None:
        suggestion = _suggest(name, _kinds())
        raise UnknownEnvironmentError(
            f"{id}: OpenSpiel has no game {name!r}{suggestion}; `distributed-muzero envs` lists those to train"
        )
    game = _load(id, text, name, kind, json.loads(parameters))
    if reason := refusal(game.get_type(), game.num_players()):
        if game.num_players() > 2 and "players" in kind.parameter_specification:
            reason += "; give it fewer, such as (players=2)"
        raise EnvironmentFailure(f"{id} can't be trained: {reason}. {EXPECTED[0].upper()}{EXPECTED[1:]}")
    check_size(id, game)
    try:
        return survey(game)
    except REFUSALS as error:  # some parameters are looked at only when a game begins
        raise _refused(id, error) from None


def check_size(id: str, game: Any) -> None:
    """Raises EnvironmentFailure for a game without actions or board, which crashes when played, and for a huge one."""
    for what, number, most in (
        ("actions", game.num_distinct_actions(), MAX_ACTIONS),
        ("numbers in an observation", math.prod(game.observation_tensor_shape()), MAX_OBSERVATION),
    ):
        if not 1 <= number <= most:
            raise EnvironmentFailure(f"{id} has {number} {what}; expected 1 to {most}")


def survey(game: Any) -> Rules:
    """Plays random games, the same ones in every process, to see how turns and tensors go."""
    rng = random.Random(0)
    is_absolute, moves_twice, plies = True, False, 0
    for _ in range(SURVEY_GAMES):
        state = game.new_initial_state()
        while not state.is_terminal() and plies < SURVEY_PLIES:
            player = state.current_player()
            state.apply_action(rng.choice(state.legal_actions()))
            plies += 1
            moves_twice = moves_twice or state.current_player() == player
            if game.num_players() == 2 and is_absolute and plies <= COMPARED_PLIES:
                is_absolute = state.observation_tensor(0) == state.observation_tensor(1)
    shape = tuple(game.observation_tensor_shape())
    name = game.get_type().short_name
    if name == "gomoku" and (side := math.isqrt(shape[1])) ** 2 == shape[1]:
        shape = (shape[0], side, side)  # a board in two dimensions, though it comes flat
    if game.num_players() == 1:
        return Rules(game, shape, View(None, False), False)
    view = VIEWS.get(name, View(None, True))._replace(turns=is_absolute)
    if not is_absolute and name in RELATIVE_ORDERS:
        view = view._replace(order=RELATIVE_ORDERS[name])
    return Rules(game, shape, view, moves_twice)


@lru_cache(maxsize=1)
def _kinds() -> dict[str, Any]:
    return {kind.short_name: kind for kind in pyspiel.registered_games()}


def _load(id: str, text: str, name: str, kind: Any, parameters: dict[str, Any]) -> Any:
    known = kind.parameter_specification
    try:
        given = {**pyspiel.game_parameters_from_string(text), **parameters}
        given.pop("name", None)
        unknown = sorted(given.keys() - known.keys())
        if not unknown:
            return pyspiel.load_game(name, given)
    except REFUSALS as error:
        raise _refused(id, error) from None
    takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
    raise EnvironmentFailure(
        f"{id}: {name} has no parameter {unknown[0]!r}{_suggest(unknown[0], known)}; {takes}"
    )


def _refused(id: str, error: Exception) -> EnvironmentFailure:
    return EnvironmentFailure(f"{id}: OpenSpiel refuses these parameters: {' '.join(str(error).split())}")


def _suggest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word.lower(), list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
