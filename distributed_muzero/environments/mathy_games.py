"""Mathy's 24 environments by name, TOPIC-DIFFICULTY, and what each of them may be given."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from mathy_envs import envs
from mathy_envs.env import MathyEnv
from mathy_envs.types import MathyEnvDifficulty, MathyEnvProblemArgs

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.errors import EnvironmentFailure, UnknownEnvironmentError

TOPICS: dict[str, type[MathyEnv]] = {
    "binomial": envs.BinomialDistribute,
    "complex": envs.ComplexSimplify,
    "poly": envs.PolySimplify,
    "poly-blockers": envs.PolySimplifyBlockers,
    "poly-combine": envs.PolyCombineInPlace,
    "poly-commute": envs.PolyCommuteLikeTerms,
    "poly-grouping": envs.PolyGroupLikeTerms,
    "poly-like-terms-haystack": envs.PolyHaystackLikeTerms,
}
DIFFICULTIES = [difficulty.value for difficulty in MathyEnvDifficulty]
HAYSTACK = "poly-like-terms-haystack"

DEFAULT_MAX_NODES = 64
# Where most problems, or every fifth, would be longer than that.
LARGER_MAX_NODES = {"poly-combine-normal": 96, "poly-combine-hard": 128, "poly-grouping-hard": 96}
# Mathy reads and writes expressions by recursion, six of Python's 1,000 frames for each bracket.
MAX_MAX_NODES = 200
MAX_MAX_MOVES = 1000
MAX_PROBLEM_LENGTH = 4096  # characters; mathy's reader takes their square


@dataclass(frozen=True)
class Options:
    """The `environment.kwargs` of a mathy environment. None: as mathy has it."""

    max_nodes: int  # L, the longest expression
    max_moves: int | None = None
    problem: str | None = None  # to start from, in place of generated ones
    operators: tuple[str, ...] | None = None  # of generated problems; poly only
    constants: bool = False  # whether some terms of generated problems are mere numbers; poly only
    preferred_term_commute: bool = False  # whether 4x may become x * 4
    sound: bool = False  # of a given problem: whether moves that mathy gets wrong are forbidden


def trainable_games() -> list[str]:
    """Names of all topics in all difficulties, sorted."""
    return sorted(f"{topic}-{difficulty}" for topic in TOPICS for difficulty in DIFFICULTIES)


def read_name(id: str) -> tuple[str, MathyEnvProblemArgs]:
    """The topic and difficulty of `mathy:TOPIC-DIFFICULTY`. Raises UnknownEnvironmentError, with what is near."""
    name = id.partition(":")[2]
    topic, _, difficulty = name.rpartition("-")
    if topic in TOPICS and difficulty in DIFFICULTIES:
        return topic, MathyEnvProblemArgs(MathyEnvDifficulty(difficulty))
    if name.lower() in TOPICS:
        close = [f"{name.lower()}-{difficulty}" for difficulty in DIFFICULTIES]
    else:
        close = difflib.get_close_matches(name.lower(), trainable_games(), n=3, cutoff=0.6)
    hint = f" (did you mean {' or '.join(repr(game) for game in close)}?)" if close else ""
    raise UnknownEnvironmentError(
        f"{id}: no such topic and difficulty{hint}; mathy has the topics {', '.join(TOPICS)}, each with "
        f"-{', -'.join(DIFFICULTIES)}"
    )


def read_options(config: EnvironmentConfig, topic: str) -> Options:
    """The kwargs, checked. Raises EnvironmentFailure for one that is unknown or can't be had."""
    given = dict(config.kwargs)
    known = [field.name for field in fields(Options)]
    for name in given.keys() - set(known):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise EnvironmentFailure(f"{config.id}: no option {name!r}{hint}; it takes {', '.join(known)}")
    default_nodes = LARGER_MAX_NODES.get(config.id.partition(":")[2], DEFAULT_MAX_NODES)
    _check_number(config.id, "max_nodes", given.setdefault("max_nodes", default_nodes), MAX_MAX_NODES)
    if given.get("max_moves") is not None:
        _check_number(config.id, "max_moves", given["max_moves"], MAX_MAX_MOVES)
    _check_problem(config.id, given.get("problem"))
    if given.get("operators") is not None:
        given["operators"] = _read_operators(config.id, given["operators"])
    given.setdefault("constants", given.get("operators") is not None)
    given.setdefault("preferred_term_commute", topic == HAYSTACK)
    given.setdefault("sound", False)
    for name in ("constants", "preferred_term_commute", "sound"):
        if not isinstance(given[name], bool):
            raise EnvironmentFailure(f"{config.id}: {name} is {given[name]!r}; expected true or false")
    if given["sound"] and given.get("problem") is None:
        raise EnvironmentFailure(
            f"{config.id}: sound is for a problem of one's own; give one, or leave it out"
        )
    if topic != "poly" and (given.get("operators") is not None or given["constants"]):
        raise EnvironmentFailure(
            f"{config.id}: operators and constants are for mathy:poly-easy, -normal and -hard; the problems of other "
            "topics can't be had with other ones"
        )
    return Options(**given)


def make_rules(topic: str, options: Options) -> MathyEnv:
    """Mathy's environment: its rules, rewards and endings, and what draws its problems."""
    operators = {} if options.operators is None else {"ops": list(options.operators)}
    return TOPICS[topic](preferred_term_commute=options.preferred_term_commute, **operators)


def _check_number(id: str, name: str, value: Any, highest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= highest:
        raise EnvironmentFailure(f"{id}: {name} is {value!r}; expected a whole number from 1 to {highest}")


def _check_problem(id: str, problem: Any) -> None:
    if problem is None:
        return
    if not isinstance(problem, str) or not problem.strip():
        raise EnvironmentFailure(f"{id}: problem is {problem!r}; expected an expression, such as '4x + 2x'")
    if "=" in problem:
        raise EnvironmentFailure(
            f"{id}: {problem!r} is an equation; expected an expression to simplify, such as '4x + 2x + 7 - 3'"
        )
    if len(problem) > MAX_PROBLEM_LENGTH:
        raise EnvironmentFailure(
            f"{id}: the problem has {len(problem)} characters; expected up to {MAX_PROBLEM_LENGTH}"
        )


def _read_operators(id: str, operators: Any) -> tuple[str, ...]:
    if (
        not isinstance(operators, (list, tuple))
        or not operators
        or any(operator not in ("+", "-") for operator in operators)
    ):
        raise EnvironmentFailure(f'{id}: operators is {operators!r}; expected a list out of "+" and "-"')
    return tuple(operators)
