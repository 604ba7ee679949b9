"""`evaluate` in environments for one player: another environment, no search, games that are won or not."""

from __future__ import annotations

import json

import pytest

from distributed_muzero.cli import main
from distributed_muzero.environments import registry
from distributed_muzero.environments.chain import LEFT, RIGHT, ChainEnvironment
from distributed_muzero.errors import DistributedMuZeroError
from distributed_muzero.workers.evaluator import share_solved
from tests.untrained import untrained_run

SEARCH = {"num_simulations": 4}


class Goal(ChainEnvironment):
    """A chain that is won at its right end."""

    @property
    def won(self):
        return self.state == self.length - 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    registry._factories["goal"] = lambda config: Goal(**config.kwargs)
    folder = tmp_path_factory.mktemp("runs")
    for name, environment in (
        ("chain", {"id": "chain", "kwargs": {"length": 7}}),
        ("goal", {"id": "goal", "kwargs": {"length": 7}}),
        ("cart", {"id": "CartPole-v1", "history_length": 2}),
    ):
        untrained_run(folder, name, {"environment": environment, "search": SEARCH})
    yield folder
    del registry._factories["goal"]


def said(runs, capsys, *words):
    main.app(["evaluate", *map(str, words), "--runs-dir", str(runs)], standalone_mode=False)
    return capsys.readouterr().out.splitlines()[-1]


def evaluate(runs, capsys, *words):
    return json.loads(said(runs, capsys, *words, "--episodes", 3, "--json"))


def refused(runs, *words):
    with pytest.raises(DistributedMuZeroError) as caught:
        main.app(["evaluate", *map(str, words), "--runs-dir", str(runs)], standalone_mode=False)
    return str(caught.value)


def test_the_runs_own_environment_with_the_runs_search(runs, capsys):
    result = evaluate(runs, capsys, "chain")
    assert result["environment"] == "chain" and result["episodes"] == 3
    assert (result["simulations"], result["search_policy"]) == (4, "muzero")
    assert "solved" not in result  # a chain isn't won or lost


def test_without_a_search_the_best_prior_is_played(runs, capsys):
    # All priors are alike in networks that learnt nothing: the first legal move, three times to the left end.
    result = evaluate(
        runs, capsys, "chain", "--env", "chain", "--env-kwargs", "{length: 7, start: 3}", "--no-search"
    )
    assert result["returns"] == pytest.approx([0.2] * 3)
    assert (result["simulations"], result["search_policy"]) == (0, None)
    line = said(runs, capsys, "chain", "--no-search")
    assert "chain/step_00000000 (without a search)" in line and "solved" not in line


def test_the_share_of_games_that_were_won(runs, capsys):
    # Without a search all games go to the left end, where nothing is won.
    lost = evaluate(runs, capsys, "goal", "--no-search")
    assert lost["solved"] == 0 and lost["returns"] == pytest.approx([0.2] * 3)
    assert ", 0.0% solved" in said(runs, capsys, "goal", "--no-search")
    games = [Goal(length=4, start=2) for _ in range(4)]
    for game, action in zip(games, (RIGHT, RIGHT, RIGHT, LEFT), strict=True):
        game.initial_state()
        game.step(action)
    assert share_solved(games) == {"solved": 0.75}
    assert share_solved([*games, ChainEnvironment()]) == {}


def test_another_environment_takes_its_own_kwargs_alone(runs, capsys):
    # From state 1 the left end is a step away; the run's own kwargs would start in state 2.
    there = "{length: 7, start: 1, left_reward: 0.75}"
    result = evaluate(runs, capsys, "chain", "--env", "goal", "--env-kwargs", there, "--no-search")
    assert result["environment"] == "goal" and result["run"] == "chain" and result["solved"] == 0
    assert result["returns"] == [0.75] * 3


@pytest.mark.parametrize("manner", [("--simulations", 3), ("--simulations", 3, "--search-policy", "gumbel")])
def test_another_environment_with_another_search(runs, capsys, manner):
    result = evaluate(runs, capsys, "goal", "--env", "chain", "--env-kwargs", "{length: 7}", *manner)
    assert result["simulations"] == 3
    assert result["search_policy"] == ("gumbel" if "gumbel" in manner else "muzero")


MISTAKES = {
    "kwargs of nothing": (("chain", "--env-kwargs", "{length: 5}"), "the environment that --env ID names"),
    "kwargs that are none": (
        ("chain", "--env", "chain", "--env-kwargs", "[1]"),
        "--env-kwargs '[1]': expected a YAML mapping",
    ),
    "kwargs of another kind": (
        ("chain", "--env", "chain", "--env-kwargs", "{size: 7}"),
        "chain with kwargs {'size': 7}",
    ),
    "no such environment": (("chain", "--env", "chian"), "no environment 'chian'"),
    "other observations": (
        ("chain", "--env", "chain"),  # whose own length is 10
        "chain shows observations (10,) float32, actions (3,), 1 player; the networks of run chain (mlp) were trained "
        "on chain, with observations (7,) float32, actions (3,), 1 player: expected an environment that is "
        "shaped like it",
    ),
    "another game": (("cart", "--env", "Acrobot-v1"), "Acrobot-v1 shows observations (6,) float32, actions (3,)"),
    "a search without one": (
        ("cart", "--no-search", "--simulations", 3),
        "--no-search leaves nothing for --simulations to say",
    ),
    "an opponent for one": (("cart", "--opponent", "random"), "--opponent is for two players"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told(runs, mistake):
    words, expected = MISTAKES[mistake]
    assert expected in refused(runs, *words)
