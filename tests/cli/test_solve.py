"""`solve` as a user calls it, with networks that have learnt nothing: what is said, and what is refused."""

from __future__ import annotations

import io
import json
import os
import re
from fractions import Fraction

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
    assert out[4:] == [
        "not solved in 2 moves: no moves are left (--max-moves gives more)",
        "What helps is a run that was trained for longer, or on such problems: this run's are mathy:poly-easy's.",
    ]


def test_a_problem_that_is_read_in_another_way_than_it_looks(runs, capsys):
    def read_as(problem):
        second = called(runs, capsys, "--run", "short", "--max-moves", 1, "--", problem).out.splitlines()[1]
        return second.removeprefix("read as: ") if second.startswith("read as: ") else None

    assert read_as("hello + 2h") == "h * e * l * l * o + 2h"
    assert read_as("-2^2 + x") == "(-2)^2 + x"
    assert read_as("1/2x + 3y^2y") == "1 / (2x) + 3y^(2y)"
    assert read_as("4x+2x") is None and read_as("(-2)^2 + 1 / (2x)") is None
    assert solved(runs, capsys, "hello + 2h", "--run", "short")["problem"] == "hello + 2h"


def test_no_step_is_wrong(runs, capsys):
    for problem in ("7^30 + x", "2^-1 + x + x", "x - 4^2"):
        result = solved(runs, capsys, problem, "--run", "short", "--max-moves", 6)
        values = {eval_at(step["expression"]) for step in result["steps"]}
        assert values == {eval_at(problem)}


def eval_at(expression):
    """Where x is 3."""
    return eval(re.sub(r"(\d)(x)", r"\1 * x", expression).replace("^", "**"), {"x": Fraction(3)})


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
    words = ("4x + 2x", "--run", "short", "--env", "mathy:poly-easy", "--env-kwargs", "{max_moves: 1}")
    assert len(solved(runs, capsys, *words)["steps"]) == 1


MISTAKES = {
    "nothing": ((" ",), "expected an expression, such as '4x + 2x'"),
    "too large": (("2^64",), "mathy can't compute '2^64': its constant arithmetic gives 0, which is wrong"),
    "no value": (("5/0",), "it divides by zero"),
    "a minus first": (("-4x + 2x",), """a problem goes last and behind --: solve -- "-4x + 2x\""""),
    "kwargs of nothing": ((PROBLEM, "--env-kwargs", "{max_moves: 3}"), "the environment that --env ID names"),
    "a problem among the kwargs": (
        (PROBLEM, "--env", "mathy:poly-easy", "--env-kwargs", "{problem: 4x}"),
        "--env-kwargs: problem: solve itself sets that; leave it out",
    ),
    "no expression": (("4x + (",), "the problem '4x + (' is no expression"),
    "an equation": (("4x = 12",), "'4x = 12' is an equation; expected an expression to simplify"),
    "nothing to do": (("5",), "there is nothing to simplify in '5', a single term"),
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
    view = View("4x+2x", console)
    view.introduce("mathy:poly-easy, r at step_00000400", SearchConfig(), "4x + 2x")
    deeper = Branch("constant arithmetic at 3", 4, 0.5, 1.5, [])
    view.tell(
        [
            Step("factor out", "4x + 2x", "(4 + 2) * x", 1.31, []),
            Step("constant arithmetic", "4 + 2", "6x", 1.5, [Branch("do it", 30, 0.9, 1.5, [deeper])]),
        ]
    )
    view.tell_end(2, True, "won", "mathy:poly-easy")
    assert console.file.getvalue().splitlines() == [
        "mathy:poly-easy, r at step_00000400, 50 simulations (muzero)",
        "  4x+2x        value  rule: applied to",
        "= (4 + 2) * x  +1.31  factor out: 4x + 2x",
        "= 6x           +1.50  constant arithmetic: 4 + 2",
        "    do it                         visits    30  prior  90%  Q  +1.50",
        "        constant arithmetic at 3  visits     4  prior  50%  Q  +1.50",
        "solved in 2 moves",
    ]


def test_columns_stand_in_line_however_long_an_expression_gets():
    console = Console(file=io.StringIO(), width=80)
    longest = " + ".join(["4x"] * 30)
    View("4x", console).tell([Step("a", "b", "4x", 1.0, []), Step("a", "b", longest, 1.0, [])])
    head, first, second = console.file.getvalue().splitlines()
    assert first.index("+1.00") == second.index("+1.00") == head.index("value") == len(longest) + 4


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("visits", "an expression came back too often"),
        ("nodes", "became too long"),
        ("stuck", "mathy knows no rule that leads on"),
        (None, "environment.max_episode_steps cut it"),
    ],
)
def test_why_it_is_not_solved(end, why):
    console = Console(file=io.StringIO(), width=80)
    View("4x + 2x", console).tell_end(0, False, end, "mathy:poly-easy")
    assert console.file.getvalue().startswith("not solved in 0 moves: ") and why in console.file.getvalue()
