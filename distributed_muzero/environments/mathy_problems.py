"""Mathy's problems, each the same whenever it is drawn with the same seed."""

from __future__ import annotations

import random
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

import numpy as np
from mathy_core.problems import variables
from mathy_envs.env import MathyEnv
from mathy_envs.types import MathyEnvProblem, MathyEnvProblemArgs

from distributed_muzero.errors import EnvironmentFailure

MAX_DRAWS = 1000
CONSTANT_PROBABILITY = 0.2  # as where mathy itself makes terms without a variable

_generators = Lock()


def draw_problem(
    mathy: MathyEnv,
    arguments: MathyEnvProblemArgs,
    seed: int | None,
    constants: bool,
    fits: Callable[[str], bool],
) -> MathyEnvProblem:
    """The seed's first problem that fits; without a seed, any.

    constants: whether some of its terms lose their variable.
    Raises EnvironmentFailure when none of MAX_DRAWS fits.
    """
    with seeded(seed):
        for _ in range(MAX_DRAWS):
            problem = mathy.problem_fn(arguments)
            text = rename(problem.text)
            if constants:
                text = re.sub(r"(\d)[a-z](\^\d+)?", _maybe_drop_variable, text)
            if fits(text):
                return problem._replace(text=text)
    raise EnvironmentFailure(
        f"none of {MAX_DRAWS} problems was short enough and had a move, the last one was {text!r}; set "
        "environment.kwargs.max_nodes higher"
    )


def rename(text: str) -> str:
    """Other letters for the variables, in order of appearance.

    Mathy takes them out of a set, in an order that differs from one Python process to another; all else about a problem
    depends on its generators only.
    """
    letters = list(dict.fromkeys(re.findall("[a-z]", text)))
    names = random.sample(variables, len(letters))
    return text.translate(str.maketrans(dict(zip(letters, names, strict=True))))


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """The global generators of `random` and numpy, which mathy draws from, seeded within and restored after."""
    seed = secrets.randbits(64) if seed is None else int(seed)  # random takes no numbers of numpy
    with _generators:
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            random.seed(seed)
            np.random.seed(random.getrandbits(32))  # noqa: NPY002
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _maybe_drop_variable(term: re.Match[str]) -> str:
    return term[1] if random.random() < CONSTANT_PROBABILITY else term[0]
