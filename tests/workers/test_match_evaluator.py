"""Evaluation of a game for two, with real tic-tac-toe networks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distributed_muzero import checkpoint
from distributed_muzero.algorithm.acting import Game
from distributed_muzero.config import make_config
from distributed_muzero.errors import CheckpointError, ConfigError, EnvironmentFailure
from distributed_muzero.matches.elo import fit_rating
from distributed_muzero.matches.solver import rules_of, solve
from distributed_muzero.networks.flat import FlatWeights
from distributed_muzero.run_folder import open_run
from distributed_muzero.workers.builder import Builder
from distributed_muzero.workers.league import Member, Rival, unsealed
from distributed_muzero.workers.match_evaluator import MatchEvaluator, make_opponent
from tests import processes

pytest.importorskip("pyspiel")

SMALL = {
    "environment": {"id": "openspiel:tic_tac_toe"},
    "network": {"hidden_sizes": [32], "embedding_size": 32},
    "search": {"num_simulations": 8},
    "evaluator": {"num_episodes": 20},
}


def some_weights(builder, seed=0):
    """As they are before anything was learnt."""
    builder = Builder(make_config(builder.config.model_dump(), {"run": {"seed": seed}}), "r")
    model = builder.evaluator().model
    return model.flat.read().numpy(), model.flat.named_arrays(model.flat.read().numpy())


@pytest.fixture
def one_thread():
    """Small networks are no work for several, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def builder():
    return Builder(make_config(SMALL), "r")


def evaluator_with(builder, **section):
    changed = make_config(builder.config.model_dump(), {"evaluator": section})
    return Builder(changed, "r").evaluator()


# The opponent -----------------------------------------------------------------------------------------------------


def test_outcomes_are_counted_and_the_mean_return_is_theirs(builder):
    evaluator = builder.evaluator()
    assert isinstance(evaluator, MatchEvaluator)
    weights, _ = some_weights(builder)
    result = evaluator.assess(3, weights, (1, 2))
    assert result["wins"] + result["draws"] + result["losses"] == result["episodes"] == 20
    assert result["mean_return"] == pytest.approx((result["wins"] - result["losses"]) / 20)
    assert result["mean_return"] == pytest.approx(np.mean(result["returns"])) and len(result["returns"]) == 20
    assert result["score"] == pytest.approx((result["mean_return"] + 1) / 2)
    assert result["std_return"] == pytest.approx(np.std(result["returns"]))
    assert set(result["returns"]) <= {-1.0, 0.0, 1.0}
    assert (result["opponent"], result["weights_version"], result["league"]) == ("random", 3, [])


def test_the_same_seeds_give_the_same_games_in_any_evaluator(builder):
    weights, arrays = some_weights(builder)
    _, theirs = some_weights(builder, 5)
    rivals = [Rival(Member(10, 0.0), theirs), Rival(Member(20, 30.0), arrays)]
    used = builder.evaluator()
    used.assess(1, some_weights(builder, 7)[0], (9, 9), rivals)
    assert used.assess(2, weights, (1, 2), rivals) == builder.evaluator().assess(2, weights, (1, 2), rivals)


def test_nobody_wins_against_minimax(builder):
    result = evaluator_with(builder, opponent="minimax").assess(1, some_weights(builder)[0], (1,))
    assert (result["wins"], result["opponent"]) == (0, "minimax")
    assert result["losses"] > 0 and result["mean_return"] < 0 and result["score"] < 0.5


def test_mcts_wins_more_often_than_random(builder):
    weights, _ = some_weights(builder)
    scores = {
        name: evaluator_with(builder, opponent=name, num_episodes=40).assess(1, weights, (1,))["score"]
        for name in ("random", "mcts:50")
    }
    assert scores["mcts:50"] < scores["random"] - 0.1


def test_a_goal_is_confirmed_by_other_games(builder):
    config = make_config(builder.config.model_dump(), {"run": {"stop_at_return": -1.0}})
    weights, _ = some_weights(builder)
    confirmed = Builder(config, "r").evaluator().assess(1, weights, (1, 2))
    evaluator = builder.evaluator()
    evaluator.set_weights(1, weights)
    assert confirmed == {**evaluator.evaluate(20, (1, 2, 1)), "league": []}


@pytest.mark.parametrize("name", ["minmax", "mcts", "mcts:", "mcts:0", "mcts:-1", "mcts:1.5", "", "Random"])
def test_an_opponent_that_is_not_known_is_refused(name):
    with pytest.raises(ConfigError, match=r"evaluator: opponent .*: expected random, minimax or mcts:SIMS"):
        make_config(SMALL, {"evaluator": {"opponent": name}})


@pytest.mark.parametrize(("key", "value"), [("league_games", 3), ("league_games", 0), ("league_size", -1)])
def test_an_impossible_league_is_refused(key, value):
    with pytest.raises(ConfigError, match=rf"evaluator.{key}: .*; got {value}"):
        make_config(SMALL, {"evaluator": {key: value}})


def test_who_needs_the_rules_is_refused_where_nobody_knows_them():
    with pytest.raises(
        ConfigError, match=r"mcts:5 knows the rules of openspiel: .* is CartPole-v1; set it to ran"
    ):
        make_config({"evaluator": {"opponent": "mcts:5"}})


def test_minimax_is_refused_for_a_game_that_is_too_large():
    environment = {"id": "openspiel:connect_four"}
    large = Builder(make_config(SMALL, {"environment": environment}), "r")
    with pytest.raises(EnvironmentFailure, match="more than 5,000 positions: too many"):
        make_opponent("minimax", large.environment, 5000)


# The league -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_as_strong_as_itself(builder):
    """Both play the same in the same position, and each opening with both colours: half of the points, exactly."""
    weights, arrays = some_weights(builder)
    rival = Rival(Member(10, 140.0), arrays)
    (met,) = evaluator_with(builder, league_games=12).assess(1, weights, (1,), [rival])["league"]
    assert met == {"step": 10, "elo": 140.0, "games": 12, "points": 6.0}
    assert fit_rating([(met["elo"], met["games"], met["points"])]) == pytest.approx(140.0, abs=1e-6)


def weights_that_learnt_from_the_solution(builder):
    """The policy head trained on what is best in the positions of random games; the rest is as it was."""
    rng, env = np.random.default_rng(4), builder.environment()
    solution = solve(rules_of(env, "the test"))
    observations, targets = [], []
    for _ in range(500):
        game = Game(env, 1, 0)
        while not game.is_over:
            best = np.zeros(9, np.float32)
            best[solution.optimal_actions(env.state)] = 1
            observations.append(game.history.copy())
            targets.append(best / best.sum())
            game.move(rng.choice(np.flatnonzero(game.read_mask())))
    networks = builder.networks()
    flat = FlatWeights(networks)
    optimizer = torch.optim.Adam([flat.vector], lr=5e-3)
    seen, wanted = torch.from_numpy(np.stack(observations)), torch.from_numpy(np.stack(targets))
    for _ in range(400):
        rows = rng.integers(len(seen), size=128)
        flat.zero_grad()
        logits = networks.policy(networks.representation(seen[rows]))
        torch.nn.functional.cross_entropy(logits, wanted[rows]).backward()
        optimizer.step()
    return flat.read().numpy()


@pytest.mark.usefixtures("one_thread")
def test_trained_weights_are_rated_above_those_that_have_learnt_nothing(builder):
    weights, (_, untrained) = weights_that_learnt_from_the_solution(builder), some_weights(builder)
    evaluator = evaluator_with(builder, league_games=40, num_episodes=60)
    (met,) = evaluator.assess(1, weights, (11,), [Rival(Member(0, 0.0), untrained)])["league"]
    assert met["points"] > 28
    assert fit_rating([(met["elo"], met["games"], met["points"])]) > 140
    better = evaluator.assess(1, weights, (12,))["score"]
    assert better > evaluator.assess(1, some_weights(builder)[0], (12,))["score"]


def test_weights_of_another_network_are_refused(builder):
    weights, _ = some_weights(builder)
    other = Builder(make_config(SMALL, {"network": {"embedding_size": 16}}), "r")
    _, theirs = some_weights(other)
    with pytest.raises(CheckpointError, match="don't fit this network"):
        builder.evaluator().assess(1, weights, (1,), [Rival(Member(10, 0.0), theirs)])


def test_pettingzoo_games_have_a_league_as_well():
    pytest.importorskip("pettingzoo")
    sections = {**SMALL, "environment": {"id": "pettingzoo:tictactoe_v3"}}
    builder = Builder(make_config(sections, {"evaluator": {"num_episodes": 4, "league_games": 4}}), "r")
    weights, arrays = some_weights(builder)
    result = builder.evaluator().assess(1, weights, (1,), [Rival(Member(10, 0.0), arrays)])
    assert sum(result[name] for name in ("wins", "draws", "losses")) == 4
    assert result["league"][0]["points"] == 2.0


# A run ------------------------------------------------------------------------------------------------------------

OPTIONS = (
    "--env", "openspiel:tic_tac_toe", "--in-process", "--name", "ttt", "--seed", 1,
    "--set", "network.hidden_sizes=[32]", "--set", "search.num_simulations=4",
    "--set", "replay.min_size_to_sample=200", "--set", "learner.keep_checkpoints=1",
    "--set", "learner.batch_size=32", "--set", "replay.samples_per_insert=32",
    "--set", "evaluator.interval_seconds=0", "--set", "evaluator.league_size=3",
    "--set", "evaluator.num_episodes=4", "--set", "evaluator.league_games=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few seconds, and what its evaluations were before it went on."""
    runs = tmp_path_factory.mktemp("runs")
    first = processes.run("train", *OPTIONS, "--runs-dir", runs, "--max-train-steps", 250)
    assert first.returncode == 0, first.stderr
    folder = open_run("ttt", runs)
    before = folder.read_evaluations()
    league = unsealed((folder.path / "league.json").read_bytes())
    again = processes.run("resume", "ttt", "--runs-dir", runs, "--in-process", "--max-train-steps", 350)
    assert again.returncode == 0, again.stderr
    return folder, before, league


@pytest.mark.slow
def test_each_evaluation_of_a_run_has_a_rating_by_games_against_earlier_checkpoints(trained):
    folder, _, _ = trained
    evaluations = folder.read_evaluations()
    assert len(evaluations) >= 5
    assert evaluations[0]["elo"] == 0 and evaluations[0]["league"] == []
    ratings: dict[int, float] = {}
    for line in evaluations:
        step, met = line["learner_steps"], line["league"]
        assert not ratings or step >= max(ratings)
        assert len(met) == min(len(ratings.keys() - {step}), 3)
        for games in met:
            assert games["step"] < step and games["elo"] == ratings[games["step"]]
            assert games["games"] == 4 and 0 <= games["points"] <= 4
        if met:
            assert met[0]["step"] == min(ratings), "the first one stays"
            newest = max(met, key=lambda games: games["step"])
            played = [(games["elo"], games["games"], games["points"]) for games in met]
            assert line["elo"] == pytest.approx(fit_rating([*played, (newest["elo"], 1, 0.5)]), abs=0.05)
        ratings[step] = line["elo"]


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_league(trained):
    folder, before, league = trained
    after = folder.read_evaluations()
    assert after[: len(before)] == before and len(after) > len(before)
    members = {member.step: member.elo for member in league}
    own_step = after[len(before)]["learner_steps"]
    assert {games["step"]: games["elo"] for games in after[len(before)]["league"]} == {
        step: elo for step, elo in members.items() if step != own_step
    }


@pytest.mark.slow
def test_its_league_is_bounded_and_its_checkpoints_are_there(trained):
    folder, _, _ = trained
    members = unsealed((folder.path / "league.json").read_bytes())
    evaluated = [line["learner_steps"] for line in folder.read_evaluations()]
    assert len(members) == 3
    assert (members[0].step, members[-1].step) == (evaluated[0], evaluated[-1])
    for member in members:
        checkpoint.read_checkpoint(folder.checkpoints / f"step_{member.step:08d}")
    best = checkpoint.best_checkpoint(folder.checkpoints)
    left = list(folder.checkpoints.glob("step_*"))
    assert best is not None and len(left) <= 3 + 2


@pytest.mark.slow
def test_a_run_shows_its_rating_wherever_it_shows_its_return(trained):
    folder, _, _ = trained
    last = folder.read_evaluations()[-1]
    status = folder.read_status()
    assert (status["elo"], status["score"]) == (last["elo"], last["score"])
    runs = ("--runs-dir", folder.path.parent)
    shown = processes.run("status", "ttt", *runs)
    assert shown.returncode == 0, shown.stderr
    assert "Elo" in shown.stdout and "score" in shown.stdout
    watched = processes.run("watch", "ttt", *runs)
    assert f"score {last['score']:.3g}" in watched.stdout and "Elo" in watched.stdout
    accumulator = EventAccumulator(str(folder.tensorboard))
    accumulator.Reload()
    drawn = [event.value for event in accumulator.Scalars("eval/elo")]
    assert drawn == pytest.approx([line["elo"] for line in folder.read_evaluations()])
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    assert lines[-1]["league/members"] == 3 and lines[-1]["league/lost_members"] == 0
