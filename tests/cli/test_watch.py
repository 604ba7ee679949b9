"""`watch`: the view by hand, and of real runs in a terminal of its own."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
from contextlib import suppress

import pytest
from rich.console import Console

from distributed_muzero.cli.watch import show
from distributed_muzero.cli.watch_view import (
    TRAIL_SECONDS,
    TRAIL_WIDTH,
    Trails,
    copy_text,
    duration,
    plain_line,
    restarts,
    size,
    waiting,
)
from distributed_muzero.config import make_config
from distributed_muzero.run_folder import create_run
from tests.isolation import in_isolation, why_not_isolated
from tests.processes import command, run, started, status, wait_for

why_not = why_not_isolated()
STATUS = {
    "run": "first",
    "state": "running",
    "folder": "/data/runs/first",
    "actors": {"desired": 4, "live": 3, "pending": 1, "draining": 2},
    "reanalysers": 2,
    "shards": 1,
    "env_steps": 51_200,
    "env_steps_per_second": 2310.4,
    "episodes": 400,
    "learner_steps": 4000,
    "learner_steps_per_second": 180.25,
    "weights_version": 80,
    "staleness": 3,
    "samples_per_insert": 7.96,
    "actors_waiting": 0.4,
    "learner_waiting": 0.0,
    "mean_return": 211.44,
    "evaluation": 431.25,
    "losses": {"loss": 2.5, "value_loss": 0.8, "reward_loss": 0.0123, "policy_loss": 1.69},
    "restarts": 3,
    "restarts_by_role": {"actor": 2, "learner": 0, "replay_shard": 1},
    "undelivered_episodes": 5,
    "rejected_episodes": 1,
    "checkpoint_age_seconds": 34.2,
    "disk_free_bytes": 12.34e9,
    "seconds": 134.0,
}


def console(is_terminal, width=100):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=width, color_system=None)


def shown(statuses, is_terminal=True, **kwargs):
    target = console(is_terminal)
    show(statuses, target, **kwargs)
    return target.file.getvalue()


def test_the_view_names_everything_with_its_unit():
    text = shown([STATUS])
    for expected in (
        "first", "running · 2 min 14 s", "51,200", "2,310 /s", "4,000", "180.2 /s", "400", "211.4", "431.2",
        "3 of 4 actors live, 1 pending, 2 draining · 2 reanalysers · 1 shard",
        "the actors wait 40% of the time for the learner",
        "total 2.5 · value 0.8 · reward 0.0123 · policy 1.69",
        "3 versions of the weights", "7.96", "2 actors, 1 replay shard", "5 undelivered, 1 rejected",
        "12.3 GB free", "34 s ago", "/data/runs/first",
    ):  # fmt: skip
        assert expected in text, expected


def test_a_terminal_has_the_newest_numbers_in_the_place_of_older_ones():
    text = shown([STATUS, {**STATUS, "env_steps": 60_000}])
    assert re.search(r"51,200.*\x1b\[1A.*60,000", text, re.DOTALL)


@pytest.mark.parametrize(
    "early", [{"run": "first", "state": "starting"}, {"run": "first", "state": "pending"}]
)
def test_what_is_not_known_yet_is_left_out(early):
    text = shown([early])
    assert early["state"] in text and "None" not in text and "losses" not in text
    assert plain_line(early, Trails()) == f"first {early['state']}"


@pytest.mark.parametrize(
    ("state", "meaning"),
    [
        ("finished", "reached one of its limits"),
        ("stopped", "asked to stop"),
        ("failed", "an error ended it"),
        ("lost", "its process is gone"),
    ],
)
def test_the_end_is_told_in_words(state, meaning):
    ended = {**STATUS, "state": state, "env_steps_per_second": None, "learner_steps_per_second": None}
    for is_terminal in (True, False):
        assert f"{state}: " in (text := shown([ended], is_terminal)) and meaning in text


def test_elsewhere_a_line_comes_every_five_seconds_and_the_last_always():
    now = 0

    def statuses():
        nonlocal now
        for now in range(0, 12, 2):
            yield {"run": "r", "state": "running", "env_steps": now}
        yield {"run": "r", "state": "stopped", "env_steps": 11}

    assert shown(statuses(), is_terminal=False, clock=lambda: now).splitlines() == [
        "r running · env steps 0",
        "r running · env steps 6",
        "r stopped: it was asked to stop; `resume` goes on with it · env steps 11",
    ]


def test_a_plain_line_holds_all_that_matters():
    trails = Trails()
    trails.add(STATUS)
    assert plain_line(STATUS, trails) == (
        "first running · time 2 min 14 s · env steps 51,200 (2,310 /s) · learner steps 4,000 (180.2 /s) · "
        "episodes 400 · mean return 211.4 · evaluation 431.2 · processes 3 of 4 actors live, 1 pending, 2 draining · "
        "2 reanalysers · 1 shard · losses total 2.5 · value 0.8 · reward 0.0123 · policy 1.69 · "
        "staleness 3 versions of the weights · samples/insert 7.96 · restarts 2 actors, 1 replay shard · "
        "games lost 5 undelivered, 1 rejected · disk 12.3 GB free · checkpoint 34 s ago · "
        "the actors wait 40% of the time for the learner"
    )


def test_score_and_rating_are_shown_for_two_players():
    of_two = {**STATUS, "score": 0.75, "elo": 321.46}
    text = shown([of_two])
    assert re.search(r"score +0\.75", text) and re.search(r"Elo +321\.5", text)
    assert "evaluation 431.2 · score 0.75 · Elo 321.5 · processes" in plain_line(of_two, Trails())
    of_one = {**STATUS, "score": None, "elo": None}
    assert "Elo" not in shown([of_one]) and plain_line(of_one, Trails()) == plain_line(STATUS, Trails())


def trail(key, *points):
    trails = Trails()
    for seconds, value in points:
        trails.add({"seconds": seconds, key: value})
    return trails


SLOT = TRAIL_SECONDS / TRAIL_WIDTH


def test_a_sparkline_by_hand():
    """0, 50 and 100 of 100 over eight bars: the first, the fourth or fifth, and the last."""
    assert trail("rate", (0, 0), (SLOT, 50), (2 * SLOT, 100)).sparkline("rate", lowest=0) == "▁▅█"
    assert trail("rate", (0, 50), (SLOT, 100)).sparkline("rate", lowest=0) == "▅█"
    assert trail("return", (0, -500), (SLOT, -100)).sparkline("return") == "▁█"


def test_a_sparkline_shows_means_gaps_and_the_last_minutes_only():
    assert trail("rate", (0, 0), (SLOT, 40), (SLOT + 1, 60)).sparkline("rate") == "▁█"
    assert trail("rate", (0, 0), (3 * SLOT, 60)).sparkline("rate") == "▁  █"
    assert trail("rate", (0, 100), (TRAIL_SECONDS + 1, 5)).sparkline("rate") == "▁"
    assert trail("rate", *((second, second) for second in range(10_000))).sparkline("rate").count("▁") >= 1
    assert trail("rate", (0, None)).sparkline("rate") == ""


def test_what_earlier_launches_did_is_forgotten():
    trails = trail("rate", (100, 7), (1, 3))
    assert trails.mean("rate") == 3


def test_who_waits_for_whom():
    def told(actors, learner):
        trails = Trails()
        trails.add({"seconds": 1.0, "actors_waiting": actors, "learner_waiting": learner})
        return waiting(trails)

    assert told(0.4, 0.0) == "the actors wait 40% of the time for the learner"
    assert told(0.0, 0.25) == "the learner waits 25% of the time for the actors"
    assert told(0.02, 0.05) == "nobody waits long"
    assert told(None, None) == ""
    assert waiting(trail("actors_waiting", (0, 1.0), (10, 0.0))).startswith("the actors wait 50%")
    assert waiting(trail("actors_waiting", (0, 1.0), (60, 0.0))) == "nobody waits long"


def test_times_sizes_and_counts():
    assert [duration(seconds) for seconds in (0, 59.6, 134, 11_520, 183_600)] == [
        "0 s", "1 min 0 s", "2 min 14 s", "3 h 12 min", "2 d 3 h",
    ]  # fmt: skip
    assert [size(number) for number in (0, 999, 12_340_000_000, 5e15)] == [
        "0 B",
        "999 B",
        "12.3 GB",
        "5,000 TB",
    ]
    assert restarts({"restarts": 0, "restarts_by_role": {"actor": 0}}) == "none"
    assert restarts({"restarts": 2}) == "2"  # of an older version
    assert copy_text({"seconds_since_push": 12.0, "failures": 1}) == "12 s ago, 1 failure"
    assert copy_text({"seconds_since_push": None, "failures": 0}) == "none yet, 0 failures"


@pytest.mark.slow
@pytest.mark.skipif(why_not is not None, reason=str(why_not))
@in_isolation  # from clusters on this machine
def test_a_run_that_has_ended_is_shown_once_and_one_that_is_not_there_is_told(tmp_path):
    folder = create_run(tmp_path, "first", make_config({}))
    folder.write_status({**STATUS, "state": "stopped"})
    done = run("watch", "first", "--runs-dir", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith("first stopped: it was asked to stop")
    done = run("watch", "frist", "--runs-dir", tmp_path)
    assert done.returncode == 2 and "did you mean 'first'?" in done.stderr and "Traceback" not in done.stderr


class Terminal:
    """A command with a terminal of its own."""

    def __init__(self, *arguments):
        self._end, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command(*arguments), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
        )  # fmt: skip
        os.close(theirs)
        self.text = ""

    def shows(self, pattern):
        """Whether it has shown that by now, colours apart."""
        while select.select([self._end], [], [], 0.1)[0]:
            try:
                more = os.read(self._end, 65536)
            except OSError:  # it has ended
                break
            self.text += more.decode(errors="replace")
        return re.search(pattern, re.sub(r"\x1b\[[\d;]*m", "", self.text))

    def close(self):
        self.process.kill()
        self.process.wait()
        with suppress(OSError):
            os.close(self._end)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_trains_is_watched_left_and_watched_to_its_end(tmp_path):
    limits = ("--set", "run.max_train_steps=null", "--max-minutes", 3)
    with started(
        "train", "--preset", "debug", "--in-process", "--runs-dir", tmp_path, "--name", "r", *limits
    ) as training:
        wait_for("learner steps", lambda: status(tmp_path / "r").get("learner_steps"))
        first = Terminal("watch", "r", "--runs-dir", tmp_path)
        try:
            wait_for("three pictures", lambda: first.shows(r"(?s)(learner steps.*){3}[▁-█]{2}"))
            assert "1 of 1 actor live" in first.text and "value " in first.text and "B free" in first.text
            first.process.send_signal(signal.SIGINT)
            wait_for("its end", lambda: first.shows("the run is left alone"))
            assert first.process.wait(timeout=20) == 0
        finally:
            first.close()
        assert "Traceback" not in first.text
        steps = status(tmp_path / "r")["learner_steps"]
        wait_for("more learner steps", lambda: status(tmp_path / "r")["learner_steps"] > steps)
        assert training.poll() is None

        with started("watch", "r", "--runs-dir", tmp_path) as piped:
            first_line = piped.stdout.readline()
            second = Terminal("watch", "r", "--runs-dir", tmp_path)
            try:
                wait_for("a picture", lambda: second.shows("running"))
                training.send_signal(signal.SIGINT)
                wait_for("the end in words", lambda: second.shows("stopped: it was asked to stop"))
                assert second.process.wait(timeout=30) == 0
            finally:
                second.close()
            rest, errors = piped.communicate(timeout=30)
        assert first_line.startswith("r running · time ") and "losses total " in first_line
        assert rest.splitlines()[-1].startswith("r stopped: it was asked to stop")
        assert (piped.returncode, errors) == (0, "")
        assert training.wait(timeout=60) == 0
    last = json.loads((tmp_path / "r" / "status.json").read_text())
    assert last["losses"].keys() >= {"loss", "value_loss"} and last["rejected_episodes"] == 0
    assert last["disk_free_bytes"] is None and last["restarts_by_role"]["actor"] == 0
