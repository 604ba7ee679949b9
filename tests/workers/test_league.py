"""Who is in a run's league, and what a checkpoint is worth by its games there."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest

from distributed_muzero import checkpoint
from distributed_muzero.config import Config, make_config
from distributed_muzero.matches.elo import elo_difference, expected_score
from distributed_muzero.observability.progress import Progress
from distributed_muzero.run_folder import Launch, create_run
from distributed_muzero.workers.bookkeeper import Bookkeeper, why_over
from distributed_muzero.workers.league import League, Member, sealed, thinned, unsealed


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path, "r", Config())


def members(*steps):
    return [Member(step, step / 10) for step in steps]


def steps(of):
    return [member.step for member in of]


def write(run, *steps):
    """Checkpoints whose weights are their step."""
    for step in steps:
        arrays = {"weights": {"w": np.full(3, step, np.float32)}}
        checkpoint.write_checkpoint(run.checkpoints, step, arrays, {"learner_steps": step})


def league(run, size=4):
    told = []
    return League(run, size, told.append), told


# Who joins and leaves ---------------------------------------------------------------------------------------------


def test_the_one_leaves_whose_neighbours_lie_closest_together():
    assert steps(thinned(members(0, 10, 20, 50, 60), 4)) == [0, 20, 50, 60]  # 0 … 20 is the shortest
    assert steps(thinned(members(0, 30, 50, 60, 100), 4)) == [0, 30, 60, 100]  # 30 … 60
    assert steps(thinned(members(50, 0), 1)) == [50]
    assert thinned(members(0, 10), 0) == []
    assert thinned(members(0, 10, 20), 4) == members(0, 10, 20)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("longest", [1, 20])
def test_a_long_run_keeps_the_first_the_newest_and_a_spread_between(size, longest):
    rng, league, step = random.Random(size), [], 0
    first = None
    for _ in range(700):
        step += rng.randint(1, longest)
        first = step if first is None else first
        league = thinned([*league, Member(step, float(rng.random()))], size)
        assert len(league) <= size and league[-1].step == step
        assert steps(league) == sorted(set(steps(league)))
        if size > 1:
            assert league[0].step == first or step == first
        if size > 3 and len(league) == size:
            gaps = np.diff(steps(league))
            assert gaps.max() <= 2.5 * (step - first) / (size - 1)


def test_a_checkpoint_that_is_rated_again_is_in_it_once(run):
    league_of_run, _ = league(run)
    for elo in (0.0, 50.0):
        league_of_run.join(10, elo)
    assert league_of_run.members == [Member(10, 50.0)]


def test_what_joined_is_there_after_a_restart_and_fits_another_size(run):
    for step in (10, 20, 30, 40, 50, 60):
        league(run)[0].join(step, step / 10)
    assert steps(league(run)[0].members) == [10, 30, 50, 60]
    assert steps(league(run, 2)[0].members) == [10, 60]
    assert league(run, 0)[0].members == []


# Its file ---------------------------------------------------------------------------------------------------------


def test_every_change_of_its_file_is_found():
    data = sealed(members(10, 25, 300))
    assert unsealed(data) == members(10, 25, 300)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(ValueError, match=r"."):
            unsealed(bytes(changed))
        with pytest.raises(ValueError, match=r"."):
            unsealed(data[:place])


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"members": 3, "sha256": ""}', b"\xff", b"null"])
def test_a_damaged_file_is_told_and_the_league_begun_anew(run, content):
    (run.path / "league.json").write_bytes(content)
    begun, told = league(run)
    assert begun.members == []
    assert len(told) == 1 and "the league begins anew" in told[0] and "league.json" in told[0]
    begun.join(10, 0.0)
    assert unsealed((run.path / "league.json").read_bytes()) == [Member(10, 0.0)]


# Who is met -------------------------------------------------------------------------------------------------------


def test_each_member_is_met_with_its_own_weights_but_never_by_itself(run):
    write(run, 10, 20, 30)
    of_run, told = league(run)
    for step in (10, 20, 30):
        of_run.join(step, 0.0)
    met = list(of_run.rivals(30))
    assert steps(rival.member for rival in met) == [10, 20]
    for rival in met:
        assert (rival.weights["w"] == rival.member.step).all()
    assert not told


def test_a_member_whose_checkpoint_is_gone_or_damaged_leaves_is_told_and_counted(run):
    write(run, 10, 20, 30)
    of_run, told = league(run)
    for step in (10, 20, 30):
        of_run.join(step, 0.0)
    shutil.rmtree(run.checkpoints / "step_00000010")
    (run.checkpoints / "step_00000020" / "weights.safetensors").write_bytes(b"flipped")
    assert steps(rival.member for rival in of_run.rivals(40)) == [30]
    assert of_run.num_lost == 2 and len(told) == 2
    assert "checkpoint 10 leaves the league" in told[0] and "step_00000020" in told[1]
    assert league(run)[0].members == [Member(30, 0.0)]


# Ratings ----------------------------------------------------------------------------------------------------------


def test_a_rating_explains_the_games_against_the_members_own(run):
    of_run, _ = league(run)
    # 7 of 8 points and half of a further game: 7.5 of 9.
    games = [{"step": 10, "elo": 100.0, "games": 8, "points": 7.0}]
    assert of_run.rate(games) == pytest.approx(100 + elo_difference(7.5 / 9), abs=0.05)
    # As strong as both of them.
    games += [{"step": 20, "elo": 100.0, "games": 8, "points": 1.0}]
    assert of_run.rate(games) == pytest.approx(100.0, abs=0.05)


def test_ratings_keep_up_with_a_run_that_grows_stronger_and_stand_still_with_one_that_does_not(run):
    """Points as expected, without luck: 60 more in each of 20 evaluations, then none for as many."""
    of_run, _ = league(run)
    ratings, strengths = [], [60.0 * min(number, 20) for number in range(40)]
    for number, strength in enumerate(strengths):
        games = [
            {
                "step": member.step,
                "elo": member.elo,
                "games": 8,
                "points": 8 * expected_score(strength - strengths[member.step]),
            }
            for member in of_run.members
        ]
        ratings.append(of_run.rate(games))
        of_run.join(number, ratings[-1])
    assert ratings[20] == pytest.approx(1200, rel=0.1)
    assert ratings[39] == pytest.approx(1200, rel=0.1) and abs(ratings[39] - ratings[30]) < 20


def test_the_first_has_0_and_a_league_begun_anew_goes_on_from_the_last_rating(run):
    of_run, _ = league(run)
    assert of_run.rate([]) == 0.0
    lines = [{"mean_return": 0.5, "elo": 120.5}, {"mean_return": 0.5, "elo": 240.25}, {"mean_return": 0.5}]
    run.evaluations_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert of_run.rate([]) == 240.25


# In a run's books -------------------------------------------------------------------------------------------------


def evaluation(mean_return, games=(), **more):
    return {"mean_return": mean_return, "std_return": 0.0, "returns": [], "league": list(games), **more}


def against(elo, points):
    return [{"step": 10, "elo": elo, "games": 8, "points": points}]


class Books:
    """A bookkeeper that evaluates one checkpoint after the other."""

    def __init__(self, run, launch=0, **evaluator):
        sections = {"evaluator": evaluator, "learner": {"keep_checkpoints": 1}}
        config = make_config({"environment": {"id": "openspiel:tic_tac_toe"}}, sections)
        self.run = run
        self.book = Bookkeeper(config, run, Progress(), launch=Launch(launch, 0))

    def evaluate(self, step, result):
        arrays = {"weights": {"w": np.zeros(2, np.float32)}}
        path = self.book.write_checkpoint(arrays, {"learner_steps": step, "weights_version": step})
        self.book.begin_evaluation(step)
        self.book.add_evaluation(result, path, step)

    def steps(self):
        return [int(path.name.removeprefix("step_")) for path in sorted(self.run.checkpoints.glob("step_*"))]

    def best(self):
        return checkpoint.best_checkpoint(self.run.checkpoints).step

    def close(self):
        self.book.close("stopped")


def test_members_are_spared_from_pruning_for_as_long_as_they_are_members(run):
    books = Books(run, league_size=3)
    for step in range(10, 210, 10):
        books.evaluate(step, evaluation(0.0, against(0.0, 4.0)))
    in_league = set(steps(books.book.league.members))
    assert 10 in in_league and 200 in in_league and len(in_league) == 3
    assert in_league <= set(books.steps())
    # Beside them: the best, and those from before the last one joined.
    assert len(books.steps()) <= 3 + 2
    books.close()


@pytest.mark.parametrize("league_size", [0, 4])
def test_the_best_has_the_highest_mean_return_and_a_tie_goes_to_the_newer(run, league_size):
    books = Books(run, league_size=league_size)
    books.evaluate(10, evaluation(0.5, against(0.0, 8.0)))
    books.evaluate(20, evaluation(1.0, against(0.0, 4.0)))
    assert books.best() == 20
    books.evaluate(30, evaluation(0.5, against(0.0, 8.0)))
    assert books.best() == 20
    # The opponent is always beaten by now, and the ratings are those of a few games.
    books.evaluate(40, evaluation(1.0, against(0.0, 3.0)))
    assert books.best() == 40
    books.close()
    assert (run.path / "league.json").exists() == (league_size > 0)
    assert any("elo" in line for line in run.read_evaluations()) == (league_size > 0)


def test_mean_returns_against_another_opponent_count_for_nothing(run):
    books = Books(run, league_size=0)
    books.evaluate(10, evaluation(1.0, opponent="random"))
    books.close()
    goal = {"run": {"stop_at_return": 0.9}}
    same, other = ({"evaluator": {"opponent": name}, **goal} for name in ("random", "minimax"))
    other["environment"] = same["environment"] = {"id": "openspiel:tic_tac_toe"}
    assert "mean return of 1.0" in why_over(replace(run, config=make_config(same)))
    assert why_over(replace(run, config=make_config(other))) is None
    run = replace(run, config=make_config(other))
    books = Books(run, launch=1, league_size=0, opponent="minimax")
    books.evaluate(20, evaluation(-0.5, opponent="minimax"))
    assert books.best() == 20
    books.close()


def test_one_player_has_no_league(run):
    books = Books(run)
    for step, mean_return in ((10, 5.0), (20, 4.0)):
        books.evaluate(step, {"mean_return": mean_return, "std_return": 0.0, "returns": [mean_return]})
    assert books.best() == 10
    assert not (run.path / "league.json").exists()
    books.close()
    status = run.read_status()
    assert status["score"] is None and status["elo"] is None
    assert "league/" not in run.metrics_file.read_text()


def test_status_and_records_tell_score_and_rating(run):
    books = Books(run)
    books.evaluate(10, evaluation(1.0, score=1.0, wins=2, draws=0, losses=0, opponent="random"))
    books.evaluate(20, evaluation(0.0, against(0.0, 8.0), score=0.5, wins=1, draws=0, losses=1))
    books.close()
    rating = elo_difference(8.5 / 9)
    first, second = run.read_evaluations()
    assert (first["elo"], first["league"], first["opponent"]) == (0.0, [], "random")
    assert second["elo"] == pytest.approx(rating, abs=0.05) and second["league"] == against(0.0, 8.0)
    status = run.read_status()
    assert status["score"] == 0.5 and status["elo"] == pytest.approx(rating, abs=0.05)
    last = json.loads(run.metrics_file.read_text().splitlines()[-1])
    assert last["league/members"] == 2 and last["league/lost_members"] == 0
