import io
import subprocess
import sys

from rich.console import Console

from distributed_muzero.config import RunConfig
from distributed_muzero.observability.progress import Progress

METRICS = {
    "time/seconds": 61.7,
    "rollout/env_steps": 51200,
    "rollout/env_steps_per_second": 2310.4,
    "search/simulations_per_second": 57760.0,
    "train/learner_steps": 4000,
    "train/learner_steps_per_second": 180.25,
    "rollout/ep_rew_mean": 211.44,
    "train/loss": 0.0123456,
    "train/staleness": 1.5,
    "replay/samples_per_insert": 32.0,
}


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def plain(**kwargs):
    console = Console(file=io.StringIO(), force_terminal=False, width=40)
    clock = Clock()
    return Progress(console, clock=clock, **kwargs), console.file, clock


def test_a_plain_line_shows_what_is_known_and_its_limits():
    progress, out, _ = plain(limits=RunConfig(max_env_steps=100_000, max_minutes=2, stop_at_return=475))
    with progress:
        progress.update(METRICS)
    assert out.getvalue() == (
        "time 61.7 s of 120 s · env steps 51,200 of 100,000 · env steps/s 2,310 · simulations/s 57,760 · "
        "learner steps 4,000 · learner steps/s 180.2 · return 211.4 · loss 0.0123 · staleness 1.5 · "
        "samples/insert 32\n"
    )


def test_plain_lines_come_at_most_every_five_seconds():
    progress, out, clock = plain()
    with progress:
        for _ in range(21):  # seconds 0 … 20
            progress.update({"time/seconds": clock.now - 100})
            clock.now += 1
    assert out.getvalue().split("\n") == ["time 0 s", "time 5 s", "time 10 s", "time 15 s", "time 20 s", ""]


def test_the_last_state_is_shown_at_the_end_and_once():
    progress, out, clock = plain()
    with progress:
        progress.update({"rollout/env_steps": 1})
        clock.now += 1
        progress.update({"rollout/env_steps": 2})
    assert out.getvalue() == "env steps 1\nenv steps 2\n"


def test_earlier_metrics_stay_when_others_come():
    progress, out, clock = plain()
    with progress:
        progress.update({"eval/mean_return": 431.25})
        clock.now += 5
        progress.update({"train/loss": float("nan")})
    assert out.getvalue() == "evaluation 431.2\nevaluation 431.2 · loss nan\n"


def test_score_and_rating_are_shown_for_two_players():
    progress, out, _ = plain()
    with progress:
        progress.update({"eval/mean_return": 0.5, "eval/score": 0.75, "eval/elo": -12.345})
    assert out.getvalue() == "evaluation 0.5 · score 0.75 · Elo -12.3\n"


def test_messages_are_printed_as_they_are():
    progress, out, _ = plain()
    with progress:
        progress.message("pip install 'distributed_muzero[box2d]' " + "x" * 100)
    assert out.getvalue() == "pip install 'distributed_muzero[box2d]' " + "x" * 100 + "\n"


def test_a_terminal_shows_a_table_and_keeps_messages():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with Progress(console, RunConfig(max_train_steps=20_000)) as progress:
        progress.update(METRICS)
        progress.message("actor 2 was replaced")
    shown = console.file.getvalue()
    assert "actor 2 was replaced\n" in shown
    for text in ("51,200", "4,000 of 20,000", "57,760", "211.4", "staleness", "–"):
        assert text in shown


def test_everything_goes_to_standard_error():
    code = (
        "from distributed_muzero.observability.progress import Progress\n"
        "with Progress() as progress:\n"
        "    progress.update({'train/loss': 1.5})\n"
        "    progress.message('hello')\n"
        "    print('{}')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "{}\n" and result.stderr == "loss 1.5\nhello\n"
