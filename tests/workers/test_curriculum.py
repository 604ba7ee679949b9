"""A curriculum: by numbers worked by hand, in an actor, in a run that goes on, and in what is refused."""

from __future__ import annotations

import io
import json
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from rich.console import Console

from distributed_muzero import checkpoint
from distributed_muzero.cli.status_view import status_table
from distributed_muzero.cli.watch_view import Trails, plain_line
from distributed_muzero.config import EnvironmentConfig, load_file, make_config, parse_overrides
from distributed_muzero.environments import registry
from distributed_muzero.environments.base import EnvironmentSpec, TokenColumn
from distributed_muzero.environments.chain import ChainEnvironment, make_chain
from distributed_muzero.environments.registry import make_environment, register_environment
from distributed_muzero.errors import ConfigError, EnvironmentFailure, UnknownEnvironmentError
from distributed_muzero.observability.progress import Progress
from distributed_muzero.replay.validation import validate
from distributed_muzero.run_folder import create_run, open_run
from distributed_muzero.workers import local
from distributed_muzero.workers.bookkeeper import Bookkeeper
from distributed_muzero.workers.builder import Builder
from distributed_muzero.workers.curriculum import (
    Begun,
    Change,
    Curriculum,
    ResultsInOrder,
    draw_stage,
    facts_of,
)
from distributed_muzero.workers.environment_pool import EnvironmentPool
from distributed_muzero.workers.outbox import Outbox
from distributed_muzero.workers.replay_shard import InsertReply
from distributed_muzero.workers.run_state import ActorReport, outcome
from tests.workers.test_actor import some_weights

# A chain whose right end comes ever later; to reach it is to win.
STAGES = [{"kwargs": {"start": start}} for start in (8, 6, 3)]
SMALL = {
    "environment": {"id": "chain", "max_episode_steps": 12},
    "curriculum": {"stages": STAGES, "won_at_return": 1.0, "window": 10},
    "network": {"hidden_sizes": [16], "embedding_size": 8},
    "search": {"num_simulations": 4},
    "actor": {"envs_per_actor": 4},
    "replay": {"min_size_to_sample": 50, "samples_per_insert": 8},
    "learner": {"batch_size": 16, "publish_interval": 5},
    "evaluator": {"num_episodes": 2, "interval_seconds": 100},
}


@pytest.fixture
def own_factories(monkeypatch):
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))


def make_curriculum(num_stages=3, **options):
    section = {"window": 4, "promote_at": 0.75, "demote_at": 0.5, **options}
    stages = [{"kwargs": {"start": 1 + number}} for number in range(num_stages)]
    return Curriculum(
        make_config({"environment": {"id": "chain"}, "curriculum": {"stages": stages, **section}})
    )


def play(curriculum, results, stage=None):
    """Games of the stage (or of the present one), `1` for a won one; the changes that follow, with their places."""
    changes = []
    for place, result in enumerate(results):
        change = curriculum.record(curriculum.stage if stage is None else stage, result == "1")
        if change:
            changes.append((place, change))
    return changes


# The rules ------------------------------------------------------------------------------------------------------


def test_enough_won_games_in_a_full_window_bring_the_next_stage():
    curriculum = make_curriculum()
    assert curriculum.win_rate is None
    assert play(curriculum, "111") == [] and curriculum.win_rate == 1  # the window isn't full
    assert play(curriculum, "0") == [(0, Change(stage=1, before=0, won=0.75, num_games=4))]
    assert curriculum.stage == 1 and curriculum.win_rate is None


def test_the_window_slides_and_begins_anew_with_each_stage():
    curriculum = make_curriculum()
    # 0101 is 0.5: it stays. 1011 is 0.75: the next stage. There, three won games are no full window yet.
    assert play(curriculum, "0101") == []
    assert play(curriculum, "1") == [(0, Change(1, 0, 0.75, 4))]
    assert play(curriculum, "111") == [] and play(curriculum, "1") == [(0, Change(2, 1, 1.0, 4))]


def test_too_few_won_games_bring_the_stage_before_back():
    curriculum = make_curriculum()
    play(curriculum, "1111")
    assert play(curriculum, "0100") == [(3, Change(0, 1, 0.25, 4))]
    play(curriculum, "1111")
    assert play(curriculum, "0101") == [] and curriculum.stage == 1  # 0.5 isn't below 0.5


def test_before_the_first_stage_and_behind_the_last_one_there_is_none():
    curriculum = make_curriculum(num_stages=2)
    assert play(curriculum, "0" * 20) == [] and curriculum.win_rate == 0
    assert len(play(curriculum, "1111")) == 1
    assert play(curriculum, "1" * 20) == [] and (curriculum.stage, curriculum.win_rate) == (1, 1)
    assert play(curriculum, "0001") == [(2, Change(0, 1, 0.25, 4))]


def test_games_of_another_stage_count_for_none():
    curriculum = make_curriculum()
    play(curriculum, "1111")
    assert play(curriculum, "0" * 9, stage=0) == play(curriculum, "1" * 9, stage=2) == []
    assert (curriculum.stage, curriculum.win_rate) == (1, None)


def test_without_a_curriculum_there_is_one_stage_for_ever():
    curriculum = Curriculum(make_config({"environment": {"id": "chain"}}))
    assert play(curriculum, "1" * 300) == play(curriculum, "0" * 300) == [] and curriculum.stage == 0


def test_a_state_goes_through_json_and_goes_on():
    curriculum = make_curriculum()
    play(curriculum, "1111011")
    state = json.loads(json.dumps(curriculum.state()))
    assert state == {
        "stage": 2, "num_stages": 3, "environment": "chain", "kwargs": {"start": 2}, "win_rate": 2 / 3,
        "results": "011",
    }  # fmt: skip
    again = make_curriculum()
    again.restore(state)
    assert again.state() == state
    assert play(again, "1") == play(curriculum, "1") == [(0, Change(2, 1, 0.75, 4))]


def test_results_of_a_stage_that_has_become_another_one_are_forgotten():
    state = {**make_curriculum().state(), "stage": 3, "kwargs": {"start": 3}, "results": "110"}
    same, other, fewer = make_curriculum(), make_curriculum(), make_curriculum(num_stages=2)
    for curriculum, changed in ((same, {}), (other, {"kwargs": {"start": 9}}), (fewer, {})):
        curriculum.restore({**state, **changed})
    assert (same.stage, same.win_rate) == (2, 2 / 3)
    assert (other.stage, other.win_rate) == (2, None)
    assert (fewer.stage, fewer.win_rate) == (1, None)


def test_a_smaller_window_keeps_the_newest_results():
    curriculum = make_curriculum(window=2)
    curriculum.restore({**make_curriculum().state(), "results": "1100"})
    assert curriculum.win_rate == 0


# Who plays what -------------------------------------------------------------------------------------------------


def test_games_of_earlier_stages_have_their_share_all_alike():
    rng = np.random.default_rng(1)
    drawn = Counter(draw_stage(3, 0.3, rng) for _ in range(10_000))
    # Standard deviations: 46 games for the present stage, 30 for each of the others.
    assert abs(drawn[3] - 7000) < 5 * 46 and all(abs(drawn[stage] - 1000) < 5 * 30 for stage in range(3))


def test_the_first_stage_draws_nothing():
    """So that a run without a curriculum plays as ever."""
    rng, untouched = np.random.default_rng(1), np.random.default_rng(1)
    assert draw_stage(0, 0.9, rng) == 0 and rng.random() == untouched.random()


def test_results_come_in_the_order_in_which_games_began():
    results = ResultsInOrder(group=3)
    games = [results.begin(stage) for stage in (0, 0, 1)]
    games[1].won = True
    games += [results.begin(1)]  # takes the place of the one that ended
    games[3].won = True
    games[2].won = True
    assert results.take() == []  # the longest game of the first three goes on
    games += [results.begin(1), results.begin(0)]
    games[0].won = False
    assert results.take() == [(0, False), (0, True), (1, True)] and results.take() == []
    games[4].won = games[5].won = False
    assert results.take() == [(1, True), (1, False), (0, False)]


class Drawn(NamedTuple):
    game: Begun
    wins: bool
    ends_at: int  # step


def test_quick_wins_do_not_come_before_slow_losses():
    """Half of all games are won, after one step; the others are lost after ten."""
    rng, results = np.random.default_rng(2), ResultsInOrder(group=64)
    as_they_end, in_order = [], []
    places: list[Drawn | None] = [None] * 64
    for step in range(60):
        for place, playing in enumerate(places):
            if playing and playing.ends_at == step:
                playing.game.won = playing.wins
                as_they_end.append(playing.wins)
            if playing is None or playing.ends_at == step:
                wins = bool(rng.random() < 0.5)
                places[place] = Drawn(results.begin(0), wins, step + (1 if wins else 10))
        in_order += [won for _, won in results.take()]
    assert np.mean(as_they_end[:50]) == 1 and abs(np.mean(in_order[:50]) - 0.5) < 0.15


class Counted:
    def __init__(self, stage, log):
        self.stage, self.log = stage, log
        log.append(f"make {stage}")

    def close(self):
        self.log.append(f"close {self.stage}")


def test_a_pool_uses_environments_again_and_keeps_few_that_are_idle():
    log = []
    pool = EnvironmentPool([lambda stage=stage: Counted(stage, log) for stage in range(3)], max_idle=2)
    first, second = pool.take(0), pool.take(0)
    pool.give_back(0, first)
    assert pool.take(0) is first and log == ["make 0", "make 0"]
    pool.give_back(0, second)
    pool.give_back(0, first)
    assert pool.take(0) is first  # the one that was used last
    pool.give_back(0, first)
    third = pool.take(1)
    pool.give_back(1, third)
    assert log[2:] == ["make 1", "close 0"]
    assert pool.take(0) is first
    pool.close()
    assert Counter(log) == {"make 0": 2, "make 1": 1, "close 0": 2, "close 1": 1}


def make_builder(**sections):
    return Builder(make_config(SMALL, sections), "run")


def played(builder, stages, num_steps=60):
    """Episodes and results of an actor, with `num_steps` steps in each of the stages in turn."""
    actor = builder.actor(0, 0)
    actor.set_weights(0, some_weights(builder), 0)
    outbox = Outbox(lambda offers: {}, 1, 10**6)
    found = []
    for stage in stages:
        actor.set_stage(stage)
        episodes = []

        def take(offers, episodes=episodes):
            episodes += offers[0]
            return {0: [InsertReply("stored") for _ in offers[0]]}

        outbox = Outbox(take, 1, 10**6)
        report = actor.play(outbox, iter([False] * num_steps + [True]).__next__, lambda seconds: None)
        found.append((episodes, report))
    actor.close()
    return found


def start_of(episode):
    return int(episode.observations[0].argmax())


def test_an_actor_plays_the_present_stage_and_its_share_of_earlier_ones():
    builder = make_builder()
    (first, _), (third, report) = played(builder, (0, 2), num_steps=400)
    assert {start_of(episode) for episode in first} == {8}
    for episode in (*first, *third):
        validate(episode, builder.spec, 12)
    begun = Counter(stage for stage, _ in report.results)
    total = begun.total()
    assert total > 200
    # 20% of them are earlier, half of these each; within four standard deviations
    assert abs(begun[2] / total - 0.8) < 4 * (0.16 / total) ** 0.5
    assert abs(begun[1] / total - 0.1) < 4 * (0.09 / total) ** 0.5


def test_results_are_those_of_the_episodes():
    (episodes, report), *_ = played(make_builder(), (2,), num_steps=200)
    starts = [start["kwargs"]["start"] for start in STAGES]
    expected = Counter((starts.index(start_of(e)), e.episode_return >= 1.0) for e in episodes)
    told = Counter(report.results)
    assert told.keys() == expected.keys() and told.total() > 0.8 * len(episodes)
    assert all(told[result] <= expected[result] for result in told)


def test_a_game_that_goes_on_when_the_stage_changes_is_finished_and_counts_for_its_own_stage():
    (early, before), (late, after) = played(make_builder(), (2, 0), num_steps=40)
    begun_before = [start_of(episode) for episode in late if start_of(episode) != 8]
    assert 0 < len(begun_before) <= 4 and {start_of(episode) for episode in late} > {8}
    finished = Counter(start_of(episode) for episode in (*early, *late))
    told = Counter(STAGES[stage]["kwargs"]["start"] for stage, _ in (*before.results, *after.results))
    assert told[3] == finished[3] and told[6] == finished[6]


def test_the_same_seed_plays_the_same_curriculum_and_names_its_environments(own_factories):
    register_environment("other_chain", lambda config: make_chain(config.model_copy(update={"id": "chain"})))
    stages = [{"id": "other_chain", "kwargs": {"start": 8}}, {"kwargs": {"start": 4}}]
    builder = make_builder(curriculum={"stages": stages, "share_of_earlier": 0.5})
    once, again = (played(builder, (0, 1))[1] for _ in range(2))
    assert [e.episode_id for e in once[0]] == [e.episode_id for e in again[0]]
    assert once[1].results == again[1].results
    names = Counter((episode.environment_id, start_of(episode)) for episode in once[0])
    assert names.keys() == {("other_chain", 8), ("chain", 4)}


def test_a_curriculum_works_with_openings():
    builder = make_builder(actor={"opening_plies": 2, "envs_per_actor": 4})
    [(episodes, report)] = played(builder, (1,))
    assert len({start_of(episode) for episode in episodes}) > 2 and report.results


class Verdict(ChainEnvironment):
    """Says itself what a win is: the left end."""

    @property
    def won(self):
        return self.state == 0


def test_an_environment_says_itself_who_won_where_no_return_is_given(own_factories):
    register_environment("verdict", lambda config: Verdict(**config.kwargs))
    sections = {"environment": {"id": "verdict"}, "curriculum": {"won_at_return": None}}
    builder = make_builder(**sections)
    builder.check_stages()
    [(episodes, report)] = played(builder, (2,), num_steps=200)
    won = sum(won for _, won in report.results)
    ended_left = sum(episode.observations[-1].argmax() == 0 for episode in episodes)
    untold = len(episodes) - len(report.results)
    assert won > 0 and ended_left - untold <= won <= ended_left
    [(_, by_return)] = played(make_builder(environment={"id": "verdict"}), (2,), num_steps=200)
    assert sum(won for _, won in by_return.results) > won


# A run ----------------------------------------------------------------------------------------------------------


def launch(folder, **limits):
    """One launch of a run, to its end: its bookkeeper, and what it told."""
    folder = folder.with_config(make_config(folder.config.model_dump(), {"run": limits}))
    told = io.StringIO()
    with Progress(Console(file=told, width=300)) as progress:
        book = Bookkeeper(folder.config, folder, progress, launch=folder.begin_launch())
        began = book.curriculum.state()
        outcome(local.turns(folder.config, folder.name, book, lambda: book.curriculum.stage == 2))
        book.close("finished")
    return book, began, told.getvalue()


def test_a_run_goes_through_all_stages_and_says_so(tmp_path):
    folder = create_run(tmp_path, "r", make_config(SMALL, {"curriculum": {"demote_at": 0.0}}))
    book, began, told = launch(folder, max_train_steps=3000)
    assert (began["stage"], book.curriculum.stage) == (1, 2), told
    for number in (2, 3):
        assert (
            f"stage {number} of 3 is next, chain {{'start': {STAGES[number - 1]['kwargs']['start']}}}" in told
        )
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    assert lines[-1]["curriculum/stage"] == lines[-1]["curriculum/stages"] == 3
    status = folder.read_status()
    assert status["curriculum"] == book.curriculum.state()
    console = Console(file=io.StringIO(), width=100)
    console.print(status_table(status))
    assert "stage  " in console.file.getvalue() and "3 of 3" in console.file.getvalue()
    assert "stage 3 of 3" in plain_line(status, Trails())


def report_of(stage, results):
    return ActorReport(results=[(stage, result == "1") for result in results])


def test_a_run_that_goes_on_has_its_stage_and_its_window(tmp_path):
    folder = create_run(tmp_path, "r", make_config(SMALL))
    with Progress(Console(file=io.StringIO())) as progress:
        book = Bookkeeper(folder.config, folder, progress, launch=folder.begin_launch())
        book.add_actor_report(report_of(0, "1" * 10))
        book.add_actor_report(report_of(1, "110"))
        book.add_actor_report(report_of(0, "0000"))  # of games that were begun before
        arrays = {"weights": {"w": np.zeros(2, np.float32)}}
        book.write_checkpoint(arrays, {"learner_steps": 5, "weights_version": 1})
        book.add_actor_report(report_of(1, "01"))
        book.close("stopped")
        open_run(folder.path).write_counts("starting")  # as the next launch does
        again = Bookkeeper(folder.config, folder, progress, launch=folder.begin_launch())
        assert again.curriculum.state() == book.curriculum.state()
        assert again.curriculum.state()["results"] == "11001"
        again.close("stopped")
        folder.status_file.write_text("{")  # the checkpoint knows a little less
        older = Bookkeeper(folder.config, folder, progress, launch=folder.begin_launch())
        assert older.curriculum.state()["results"] == "110" and older.curriculum.stage == 1
        older.close("stopped")
    assert checkpoint.latest_checkpoint(folder.checkpoints).state["curriculum"]["stage"] == 2


def test_a_run_without_a_curriculum_tells_of_none(tmp_path):
    folder = create_run(tmp_path, "r", make_config(SMALL, {"curriculum": {"stages": []}}))
    _, _, told = launch(folder, max_train_steps=20)
    assert folder.read_status()["curriculum"] is None and "stage" not in told
    assert not any("curriculum" in line for line in folder.metrics_file.read_text().splitlines())


def test_where_nobody_plays_the_stage_stays(tmp_path):
    """The stages say which stored episodes may be learnt from."""
    folder = create_run(tmp_path, "r", make_config(SMALL, {"actor": {"num_actors": 0}}))
    book, began, _ = launch(folder, max_minutes=1e-4)
    assert book.curriculum.state() == began and folder.read_status()["curriculum"]["win_rate"] is None


def test_a_new_stage_is_not_shown_with_the_share_of_the_one_before():
    curriculum, told = make_curriculum(), io.StringIO()
    with Progress(Console(file=told, width=200), clock=iter(range(0, 100, 10)).__next__) as progress:
        for result in "11110":
            play(curriculum, result)
            progress.update(curriculum.metrics())
    assert told.getvalue().splitlines() == [
        *["stage 1 of 3 · won 100%"] * 3,
        "stage 2 of 3",
        "stage 2 of 3 · won 0%",
    ]


def test_the_progress_line_has_stage_and_share(tmp_path):
    told = io.StringIO()
    with Progress(Console(file=told, width=200)) as progress:
        progress.update({"curriculum/stage": 2.0, "curriculum/stages": 5.0})
        progress.update({"curriculum/win_rate": 0.874})
    assert told.getvalue() == "stage 2 of 5\nstage 2 of 5 · won 87%\n"


# What is refused ------------------------------------------------------------------------------------------------


def refused(**sections):
    with pytest.raises(ConfigError) as caught:
        make_builder(**sections).check_stages()
    return str(caught.value)


def test_stages_share_a_spec():
    text = refused(curriculum={"stages": [*STAGES, {"kwargs": {"length": 7}}]})
    assert text == (
        "stage 4 of curriculum.stages: chain {'length': 7} shows observations (7,) float32, actions (3,), 1 player; "
        "chain (environment) shows observations (10,) float32, actions (3,), 1 player: expected the same, as one "
        "network plays all of them; choose ids and kwargs that agree"
    )
    with pytest.raises(ConfigError, match="shows observations"):  # also where nobody checked before
        played(make_builder(curriculum={"stages": [{"kwargs": {"length": 7}}]}), (0,))


def test_a_stage_that_cant_be_made_is_named_with_what_it_did_not_say_itself():
    stages = [{"kwargs": {"size": 9}}, {"id": "CartPole-v1", "kwargs": {"start": 1}}]
    builder = make_builder(environment={"kwargs": {"length": 7, "start": 3}}, curriculum={"stages": stages})
    with pytest.raises(
        EnvironmentFailure, match=r"^stage 1 of curriculum.stages \(length, start from environment.kwargs\): "
    ):
        builder.stage_environment(0)
    with pytest.raises(
        EnvironmentFailure,
        match=r"stage 2 of curriculum.stages \(length from environment.kwargs\): CartPole-v1 with kwargs",
    ):
        builder.stage_environment(1)
    with pytest.raises(
        UnknownEnvironmentError, match=r"stage 1 of curriculum.stages: no environment 'chian'"
    ):
        make_builder(curriculum={"stages": [{"id": "chian"}]}).check_stages()


def test_token_columns_are_told_where_they_differ():
    letters = TokenColumn("letter", "category", 27), TokenColumn("depth", "number")
    spec = EnvironmentSpec("e", (8, 2), np.dtype(np.float32), (8, 1), 1, letters)
    shorter, other = spec._replace(observation_shape=(4, 2)), spec._replace(token_columns=letters[::-1])
    assert facts_of(spec, shorter) == "observations (8, 2) float32, actions (8, 1), 1 player"
    assert (
        facts_of(spec, other) == "observations (8, 2) float32 of letter (27), depth, actions (8, 1), 1 player"
    )


def test_games_for_two_have_no_curriculum():
    pytest.importorskip("pyspiel")
    game = "openspiel:tic_tac_toe"
    text = refused(environment={"id": game}, curriculum={"stages": [{}]})
    assert (
        f"stage 1 of curriculum.stages: {game} (environment) is a game for 2, and a curriculum is for one player"
        in text
    )


def test_somebody_must_say_what_a_win_is():
    text = refused(curriculum={"won_at_return": None})
    assert text.startswith(
        "stage 1 of curriculum.stages: chain {'start': 8} doesn't say whether a game is won; set "
    )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"demote_at": 0.95}, "demote_at 0.95 must be below promote_at 0.95"),
        ({"stages": STAGES, "share_of_earlier": 1}, "share_of_earlier 1 leaves no game to the present stage"),
        ({"window": 0}, "curriculum.window"),
        ({"stages": [{"kwarg": {}}]}, r"unknown key 'curriculum.stages.0.kwarg' \(did you mean 'kwargs'\?\)"),
        ({"stages": [{"id": 3}]}, "curriculum.stages.0.id"),
        ({"stage": []}, r"did you mean 'stages'\?"),
    ],
)
def test_impossible_values_fail_when_they_are_read(section, message):
    with pytest.raises(ConfigError, match=message):
        make_config({"curriculum": section})


def test_a_config_file_comes_back_as_it_was_shown(tmp_path):
    config = make_config(SMALL)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert make_config(load_file(file)) == config
    text = yaml.safe_dump(SMALL["curriculum"]["stages"], default_flow_style=True)
    by_hand = {name: section for name, section in SMALL.items() if name != "curriculum"}
    options = [f"curriculum.stages={text}", "curriculum.won_at_return=1.0", "curriculum.window=10"]
    assert make_config(by_hand, parse_overrides(options)) == config


def test_a_stage_takes_what_it_does_not_say_from_the_environment():
    config = make_config(
        {
            "environment": {"id": "chain", "kwargs": {"length": 9, "start": 2}, "max_episode_steps": 7},
            "curriculum": {"stages": [{"kwargs": {"start": 5}}, {"id": "chain"}]},
        }
    )
    first, second = config.stages
    assert first == EnvironmentConfig(id="chain", kwargs={"length": 9, "start": 5}, max_episode_steps=7)
    assert second == config.environment
    assert make_environment(first).start == 5
