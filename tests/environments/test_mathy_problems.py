"""Mathy's problems: which ones come with a seed, and what drawing them leaves behind."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.registry import make_environment
from distributed_muzero.errors import EnvironmentFailure

pytest.importorskip("mathy_envs", reason="mathy isn't installed: pip install 'distributed_muzero[mathy]'")

from distributed_muzero.environments.mathy_games import trainable_games
from distributed_muzero.environments.mathy_problems import seeded


def problems(game, seeds, **kwargs):
    environment = make_environment(EnvironmentConfig(id=f"mathy:{game}", kwargs=kwargs))
    found = []
    for seed in seeds:
        environment.initial_state(seed)
        found.append(environment.expression)
    return found


@pytest.mark.parametrize("game", trainable_games())
def test_a_seed_gives_its_problem_whatever_ran_before(game):
    first = problems(game, [1, 2, 3])
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    assert problems(game, [3, 2, 1]) == first[::-1]
    assert len(set(first)) == 3


def test_a_seed_gives_its_problem_in_every_process():
    """Mathy takes variables out of sets, in an order that depends on how a process hashes text."""
    code = (
        "from tests.environments.test_mathy_problems import problems, trainable_games\n"
        "for game in trainable_games(): print(*problems(game, range(3)), sep='\\n')"
    )
    texts = set()
    for hash_seed in "123":
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code]
        texts.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(texts) == 1 and len(texts.pop().splitlines()) == 72


def test_global_generators_go_on_as_if_no_problem_had_been_drawn():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = (random.random(), np.random.random())  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    problems("poly-hard", [5, None])
    assert (random.random(), np.random.random()) == expected  # noqa: NPY002


def test_global_generators_are_restored_after_an_error_too():
    state = random.getstate()
    with pytest.raises(KeyError), seeded(1):
        random.random()
        raise KeyError
    assert random.getstate() == state


def test_without_a_seed_problems_differ():
    assert len(set(problems("poly-hard", [None] * 5))) == 5


def test_problems_fit_into_max_nodes():
    environment = make_environment(EnvironmentConfig(id="mathy:poly-hard", kwargs={"max_nodes": 25}))
    for seed in range(10):
        assert np.count_nonzero(environment.initial_state(seed)[:, 0]) <= 25
    with pytest.raises(EnvironmentFailure, match=r"mathy:poly-hard: none of 1000 .*kwargs\.max_nodes higher"):
        problems("poly-hard", [1], max_nodes=3)


def test_operators_and_numbers_alone_come_where_they_are_asked_for():
    plain = problems("poly-easy", range(30))
    assert not any("-" in text for text in plain)
    mixed = problems("poly-easy", range(30), operators=["+", "-"])
    assert mixed == problems("poly-easy", range(30), operators=["+", "-"])
    assert sum("-" in text for text in mixed) > 15 and any("+" in text for text in mixed)

    def has_number_alone(text):
        return any(re.fullmatch(r"\d+", term) for term in re.split(r"[ ()+-]+", text))

    assert any(map(has_number_alone, mixed)) and not any(map(has_number_alone, plain))
    only = problems("poly-easy", range(30), operators=["-"], constants=False)
    assert not any("+" in text or has_number_alone(text) for text in only)


def test_a_seed_may_be_a_number_of_numpy():
    assert problems("poly-easy", [np.int64(7)]) == problems("poly-easy", [7])


def test_a_given_problem_comes_with_every_seed():
    assert problems("poly-easy", [1, 2, None], problem="4x + 2x + 7 - 3") == ["4x + 2x + 7 - 3"] * 3
