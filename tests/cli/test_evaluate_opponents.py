"""`evaluate` of games for two, as a user calls it: opponents, every position, mistakes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distributed_muzero.algorithm.acting import Game, decide
from distributed_muzero.cli import main
from distributed_muzero.cli.opponents import load_side, with_search
from distributed_muzero.cli.options import Policy
from distributed_muzero.config import make_config
from distributed_muzero.errors import DistributedMuZeroError
from distributed_muzero.run_folder import create_run, open_run
from distributed_muzero.workers.builder import Builder
from tests import processes

pytest.importorskip("pyspiel")

MATCH_KEYS = {
    "games",
    "wins",
    "draws",
    "losses",
    "score",
    "elo_difference",
    "elo_interval",
    "as_first",
    "as_second",
    "truncated",
    "mean_plies",
    "run",
    "checkpoint",
    "opponent",
    "simulations",
    "search_policy",
    "opening_plies",
    "seed",
    "seconds",
}
EXACT_KEYS = {
    "positions",
    "losses",
    "mistakes",
    "optimal_move_share",
    "decisive_positions",
    "decisive_optimal_share",
    "start",
    "first_mistakes",
    "history_length",
    "run",
    "checkpoint",
    "simulations",
    "search_policy",
    "seconds",
}


def train(folder, name, id, *options):
    done = processes.run(
        "train",
        "--preset",
        "debug",
        "--in-process",
        "--runs-dir",
        folder,
        "--name",
        name,
        "--max-train-steps",
        40,
        "--max-minutes",
        10,
        "--set",
        f"environment.id={id}",
        *options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of tic-tac-toe, really trained, if hardly; and others, of which no more is known than their configs."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "one", "openspiel:tic_tac_toe", "--set", "learner.checkpoint_seconds=0.1")
    said = train(folder, "two", "openspiel:tic_tac_toe", "--set", "environment.history_length=3")
    assert "against random" in said  # in place of a mean return, which says nothing here
    for name, id in (
        ("young", "openspiel:tic_tac_toe"),
        ("nim", "openspiel:nim"),
        ("cart", "CartPole-v1"),
        ("zoo", "pettingzoo:connect_four_v3"),
        ("chess", "openspiel:chess"),
    ):
        create_run(folder, name, make_config({"environment": {"id": id}}))
    return folder


def evaluate(runs, *words):
    done = processes.run("evaluate", *words, "--runs-dir", runs, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def refused(runs, *words):
    """What the command says, in this process: starting one for each mistake would take minutes."""
    with pytest.raises(DistributedMuZeroError) as caught:
        main.app(["evaluate", *map(str, words), "--runs-dir", str(runs)], standalone_mode=False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("opponent", "name", "opening_plies"),
    [
        ((), "random", 0),
        (("--opponent", "random"), "random", 0),
        (("--opponent", "minimax"), "minimax", 0),
        (("--opponent", "mcts:20"), "mcts:20", 0),
        (("--opponent", "two"), "two/step_", 4),
        (("--opponent", "two", "--opening-plies", 2), "two/step_", 2),
        (("--opponent", "random", "--opening-plies", 3, "--no-search"), "random", 3),
    ],
)
def test_games_against_whom_one_names(runs, opponent, name, opening_plies):
    result = evaluate(runs, "one", *opponent, "--games", 6, "--seed", 3)
    assert result.keys() == MATCH_KEYS
    assert result["run"] == "one" and result["opponent"].startswith(name)
    assert result["opening_plies"] == opening_plies and result["seed"] == 3
    assert result["games"] == 6 == result["wins"] + result["draws"] + result["losses"]
    assert sum(result["as_first"].values()) == sum(result["as_second"].values()) == 3
    assert result["score"] == pytest.approx((result["wins"] + result["draws"] / 2) / 6)
    assert result["simulations"] == (0 if "--no-search" in opponent else 4)
    assert result["search_policy"] == (None if "--no-search" in opponent else "muzero")


def test_the_same_seed_gives_the_same_match(runs):
    one, again, other = (
        evaluate(runs, "one", "--opponent", "mcts:20", "--games", 20, "--simulations", 3, "--seed", seed)
        for seed in (1, 1, 2)
    )
    for result in (one, again, other):
        del result["seconds"]
    assert one == again
    assert {**one, "seed": 2} != other
    assert one["simulations"] == 3


def test_the_other_search_plays_with_the_same_networks(runs):
    folder = open_run("one", runs)
    other = with_search(folder, 30, Policy.gumbel)
    expected = folder.config.search.model_copy(update={"num_simulations": 30, "policy": "gumbel"})
    assert other.config == folder.config.model_copy(update={"search": expected}) != folder.config
    assert with_search(folder, None, None) == folder == open_run("one", runs)
    result = evaluate(runs, "one", "--games", 2, "--simulations", 30, "--search-policy", "gumbel")
    assert (result["simulations"], result["search_policy"]) == (30, "gumbel")

    builder = Builder(folder.config, "one")
    games = [Game(builder.environment(), 1, seed) for seed in range(4)]
    for game, num_moves in zip(games, (0, 1, 2, 3), strict=True):
        game.play_opening(num_moves, np.random.default_rng(num_moves))
    sides = [load_side(run, builder, "latest") for run in (folder, other)]
    played = decide(
        games, sides[0].player.model, expected, folder.config.algorithm.discount, 0.0,
        noise=False, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert sides[1].player.choose(games, np.random.default_rng(0)) == played.actions.tolist()


def test_a_checkpoint_of_its_own_as_opponent(runs):
    steps = sorted(int(path.name[5:]) for path in (runs / "one" / "checkpoints").glob("step_*"))
    result = evaluate(
        runs, "one", "--opponent", f"step:{steps[0]}", "--checkpoint", "latest", "--games", 4, "--no-search"
    )
    assert result["opponent"] == f"one/step_{steps[0]:08d}"
    assert result["checkpoint"] == f"step_{steps[-1]:08d}" and result["simulations"] == 0
    same = evaluate(runs, "one", "--opponent", f"step:{steps[-1]}", "--checkpoint", steps[-1], "--games", 4)
    assert same["score"] == 0.5  # each plays both colours of the same games


def test_a_run_by_its_path_and_by_its_uri(runs):
    for opponent in (runs / "two", f"file://{runs}/two"):
        assert evaluate(runs, "one", "--opponent", opponent, "--games", 2)["opponent"].startswith("two/")


@pytest.mark.parametrize("manner", [("--simulations", 2), ("--no-search",), ("--checkpoint", "latest")])
def test_every_position(runs, manner):
    result = evaluate(runs, "one", "--exact", *manner)
    assert result.keys() == EXACT_KEYS
    assert result["simulations"] == {"--simulations": 2, "--no-search": 0, "--checkpoint": 4}[manner[0]]
    assert 0 < result["decisive_positions"] < result["positions"] < 4520
    assert 0 < result["losses"] < result["positions"] and 0 < result["mistakes"] < result["positions"]
    assert result["optimal_move_share"] == pytest.approx(1 - result["mistakes"] / result["positions"])
    mistakes_share = result["mistakes"] / result["decisive_positions"]
    assert result["decisive_optimal_share"] == pytest.approx(1 - mistakes_share)
    assert result["start"]["value"] == 0
    assert {result["start"]["as_first"], result["start"]["as_second"]} <= {"draw", "loss"}
    first = result["first_mistakes"][0]
    assert first["played"] not in first["optimal"] and first["value_after"] < first["value"]


def test_tables_for_people(runs):
    done = processes.run("evaluate", "one", "--runs-dir", runs, "--games", 4)
    assert done.returncode == 0, done.stderr
    assert "against random" in done.stdout and "Elo difference" in done.stdout
    assert "no --opponent was named" in done.stdout
    done = processes.run("evaluate", "two", "--runs-dir", runs, "--exact")
    assert done.returncode == 0, done.stderr
    for text in (
        "in every position",
        "share of optimal moves",
        "as second",
        "optimal: ",
        "see 3 observations",
    ):
        assert text in done.stdout


MISTAKES = {
    "an odd number": (("one", "--games", 7), "--games 7: expected an even number"),
    "nobody": (
        ("one", "--opponent", "minmax"),
        "expected random, minimax, mcts:SIMS such as mcts:1000, step:STEP for a checkpoint of the run itself, or the "
        "name, path or URI of another run; no run 'minmax' in",
    ),
    "a folder's name": (("one", "--opponent", "step_00000040"), "step:STEP for a checkpoint"),
    "mcts without a number": (("one", "--opponent", "mcts"), "expected random, minimax, mcts:SIMS"),
    "mcts with words": (("one", "--opponent", "mcts:many"), "--opponent 'mcts:many': expected random"),
    "mcts with nothing to do": (("one", "--opponent", "mcts:0"), "expected 1 to 10,000,000 simulations"),
    "a step that isn't there": (("one", "--opponent", "step:77"), "run one has no checkpoint of step 77"),
    "a step of words": (("one", "--opponent", "step:best"), "--opponent 'step:best': expected random"),
    "another game": (("one", "--opponent", "nim"), "expected two runs of the same game"),
    "a checkpoint that isn't there": (("one", "--checkpoint", "77"), "run one has no checkpoint of step 77"),
    "no checkpoint yet": (("young",), "run young has no checkpoint yet"),
    "too large a game": (
        ("chess", "--opponent", "minimax"),
        "chess() may go on for 17,695 moves: too many to know the exact value of each. Measure against mcts:SIMS, or "
        "train a smaller board",
    ),
    "one player": (
        ("cart", "--opponent", "random"),
        "--opponent is for two players, and CartPole-v1 is for one",
    ),
    "every position for one": (("cart", "--exact"), "--exact is for two players"),
    "games for one": (("cart", "--games", "4"), "How many games are played, --episodes says"),
    "episodes for two": (("one", "--episodes", "4"), "--episodes is for one player"),
    "an opponent in every position": (
        ("one", "--exact", "--opponent", "random", "--games", 4),
        "--exact leaves nothing for --opponent, --games to say",
    ),
    "a search without one": (
        ("one", "--no-search", "--simulations", 4, "--search-policy", "gumbel"),
        "--no-search leaves nothing for --simulations, --search-policy to say",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told(runs, mistake):
    words, expected = MISTAKES[mistake]
    assert expected in refused(runs, *words)


def test_a_mistake_ends_in_one_message_and_exit_code_2(runs):
    done = processes.run("evaluate", "one", "--opponent", "minmax", "--runs-dir", runs)
    assert done.returncode == 2
    assert (
        done.stderr.startswith("error: --opponent 'minmax': expected random, minimax") and done.stdout == ""
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("--opponent", "minimax"), ("--opponent", "mcts:10"), ("--exact",)])
def test_pettingzoo_has_no_rules_to_search_in(runs, words):
    pytest.importorskip("pettingzoo")
    assert "train on openspiel:connect_four for it" in refused(runs, "zoo", *words)
