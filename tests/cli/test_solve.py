"""`solve` as a user calls it, with networks that have learnt nothing: what is said, and what is refused."""

from __future__ import annotations

import io
import json
import os

import pytest
from rich.console import Console

from distributed_muzero.cli import main
from distributed_muzero.cli.solve_view import View
from distributed_muzero.config import SearchConfig, make_config
from distributed_muzero.errors import DistributedMuZeroError
from distributed_muzero.run_folder import create_run
from distributed_muzero.workers.solving import Branch, Step
from tests import processes
from tests.untrained import untrained_run

pytest.importorskip("mathy_envs")

NETWORK = {"name": "node_sequence", "embedding_size": 16, "num_blocks": 1}
SMALL = {"network": NETWORK, "search": {"num_simulations": 4, "max_interior_actions": 8}}
PROBLEM = "4x + 2x + 7 - 3"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = (
        ("old", {"environment": {"id": "mathy:poly-easy"}, **SMALL}),
        (
            "short",
            {"environment": {"id": "mathy:poly-easy", "kwargs": {"max_nodes": 48, "max_moves": 5}}, **SMALL},
        ),
        ("flat", {"environment": {"id": "mathy:poly-easy"}, "search": {"num_simulations": 4}}),
        ("cart", {"environment": {"id": "CartPole-v1"}}),
    )
    for name, settings in made:
        untrained_run(folder, name, settings)
    create_run(folder, "young", make_config({"environment": {"id": "mathy:poly-easy"}, **SMALL}))
    for seconds, name in enumerate(("old", "flat", "short", "cart", "young")):
        os.utime(folder / name / "config.yaml", (1e9 + seconds, 1e9 + seconds))
    return folder


def called(runs, capsys, *words):
    """Standard output and standard error."""
    main.app(["solve", "--runs-dir", str(runs), *map(str, words)], standalone_mode=False)
    return capsys.readouterr()


def solved(runs, capsys, *words):
    return json.loads(called(runs, capsys, "--json", *words).out)


def refused(runs, *words):
    with pytest.raises(DistributedMuZeroError) as caught:
        main.app(["solve", "--runs-dir", str(runs), *map(str, words)], standalone_mode=False)
    return str(caught.value)


def test_json_has_the_steps_and_nothing_else(runs, capsys):
    result = solved(runs, capsys, PROBLEM, "--run", "short")
    assert result.keys() == {"problem", "solved", "steps"}
    assert result["problem"] == PROBLEM and isinstance(result["solved"], bool)
    assert 1 <= len(result["steps"]) <= 5  # the run's max_moves
    for step in result["steps"]:
        assert step.keys() == {"rule", "node", "expression", "value"}
    first = result["steps"][0]
    assert first["node"] in PROBLEM and first["expression"] != PROBLEM


def test_a_problem_that_one_move_solves(runs, capsys):
    # Nothing is alike in it, so that any move that makes it no longer is mathy's end of the game.
    said = called(runs, capsys, "4x + 3", "--run", "short").out.splitlines()
    assert said[-1] == "solved in 1 move"
    assert solved(runs, capsys, "4x + 3", "--run", "short")["solved"] is True


def test_people_see_a_line_for_each_step(runs, capsys):
    out = called(runs, capsys, PROBLEM, "--run", "short", "--max-moves", 2).out.splitlines()
    assert out[0] == "mathy:poly-easy, short at step_00000000, 4 simulations (muzero)"
    assert out[1].startswith(f"  {PROBLEM}  ")
    assert out[2].startswith("= ") and out[3].startswith("= ")
    assert out[4].startswith("not solved in 2 moves: no moves are left; try --max-moves")
    assert len(out) == 5


def test_the_newest_run_of_mathy_with_a_checkpoint_is_taken_and_named(runs, capsys):
    said = called(runs, capsys, PROBLEM, "--max-moves", 1)
    assert "with run short, the newest of a mathy: environment" in said.err and "short at" in said.out


@pytest.mark.parametrize("policy", ["muzero", "gumbel"])
def test_trees_and_searches(runs, capsys, policy):
    words = (
        PROBLEM,
        "--run",
        "short",
        "--max-moves",
        1,
        "--tree",
        "--simulations",
        9,
        "--search-policy",
        policy,
    )
    [step] = solved(runs, capsys, *words)["steps"]
    assert step.keys() == {"rule", "node", "expression", "value", "tree"}
    assert 1 <= len(step["tree"]) <= 4 and sum(branch["visits"] for branch in step["tree"]) <= 9
    assert step["tree"][0].keys() == {"action", "visits", "prior", "qvalue", "branches"}
    out = called(runs, capsys, *words).out
    assert f"9 simulations ({policy})" in out
    assert step["tree"][0]["action"] in out


def test_room_for_a_problem_that_is_longer_than_the_run_knows(runs, capsys):
    long = " + ".join(["4x"] * 20)  # 79 nodes, where the run had 48
    result = solved(runs, capsys, long, "--run", "short", "--max-moves", 1)
    assert len(result["steps"]) == 1


def test_networks_for_one_length_take_what_they_have_room_for(runs, capsys):
    problem = " + ".join(["4x"] * 16)  # 63 nodes, where the run had 64
    assert len(solved(runs, capsys, problem, "--run", "flat", "--max-moves", 1)["steps"]) == 1


def test_another_environment_of_mathy_and_its_own_max_moves(runs, capsys):
    words = (PROBLEM, "--run", "short", "--env", "mathy:poly-grouping-easy")
    assert "mathy:poly-grouping-easy" in called(runs, capsys, *words).out


MISTAKES = {
    "nothing": ((" ",), "expected an expression, such as '4x + 2x'"),
    "no expression": (("4x + (",), "the problem '4x + (' is no expression"),
    "an equation": (("4x = 12",), "'4x = 12' is an equation; expected an expression to simplify"),
    "nothing to do": (("5",), "no rule can be applied to the problem '5'"),
    "too long": ((" + ".join(["4x"] * 40),), "has 159 nodes, max_nodes is 128; give a shorter one"),
    "far too long": (("1" * 100_000,), "the problem has 100000 characters"),
    "another game": (
        (PROBLEM, "--run", "cart"),
        "run cart plays CartPole-v1: expected one of mathy's environments",
    ),
    "not mathy": ((PROBLEM, "--env", "chain"), "--env chain: expected one of mathy's environments"),
    "no topic": ((PROBLEM, "--env", "mathy:pol-easy"), "did you mean 'poly-easy'"),
    "too long for networks of one length": (
        (" + ".join(["4x"] * 20), "--run", "flat"),
        "the networks of run flat (mlp) were trained on mathy:poly-easy, with observations (64, ",
    ),
    "no run": ((PROBLEM, "--run", "nope"), "no run 'nope'"),
    "no checkpoint": ((PROBLEM, "--run", "young"), "run young has no checkpoint yet"),
    "no such checkpoint": ((PROBLEM, "--run", "old", "--checkpoint", "7"), "no checkpoint of step 7"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told(runs, mistake):
    words, expected = MISTAKES[mistake]
    assert expected in refused(runs, *(words if "--run" in words else (*words, "--run", "short")))


def test_without_any_run_it_says_how_to_get_one(tmp_path):
    create_run(tmp_path, "cart", make_config({}))
    assert "no run of a mathy: environment with a checkpoint" in refused(tmp_path, PROBLEM)
    assert "name one with --run" in refused(f"file://{tmp_path}", PROBLEM)


def test_a_mistake_ends_in_one_message_and_exit_code_2(runs):
    done = processes.run("solve", "4x + (", "--runs-dir", runs, "--run", "short", "--json")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: mathy:poly-easy: the problem") and "Traceback" not in done.stderr


def test_what_is_not_solved_is_an_answer_too(runs):
    done = processes.run("solve", "--runs-dir", runs, "--run", "short", "--json", "--", "-4x + 2x + 3x")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["solved"] is False


def test_how_it_looks():
    console = Console(file=io.StringIO(), width=80)
    view = View("4x + 2x", console)
    view.introduce("mathy:poly-easy, r at step_00000400", SearchConfig())
    deeper = Branch("constant arithmetic at 3", 4, 0.5, 1.5, [])
    view.tell(Step("factor out", "4x + 2x", "(4 + 2) * x", 1.31, []))
    view.tell(Step("constant arithmetic", "4 + 2", "6x", 1.5, [Branch("do it", 30, 0.9, 1.5, [deeper])]))
    view.tell_end(True, "won")
    assert console.file.getvalue().splitlines() == [
        "mathy:poly-easy, r at step_00000400, 50 simulations (muzero)",
        "  4x + 2x              value  rule: applied to",
        "= (4 + 2) * x          +1.31  factor out: 4x + 2x",
        "= 6x                   +1.50  constant arithmetic: 4 + 2",
        "    do it                                    visits    30  prior  90%  Q  +1.50",
        "        constant arithmetic at 3             visits     4  prior  50%  Q  +1.50",
        "solved in 2 moves",
    ]


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("visits", "an expression came back too often"),
        ("nodes", "became too long"),
        ("stuck", "stuck; try"),
        (None, "environment.max_episode_steps cut it"),
    ],
)
def test_why_it_is_not_solved(end, why):
    console = Console(file=io.StringIO(), width=80)
    View("4x + 2x", console).tell_end(False, end)
    assert console.file.getvalue().startswith("not solved in 0 moves: ") and why in console.file.getvalue()
