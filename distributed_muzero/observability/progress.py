"""What a person sees of a run while it goes on, always on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.live import Live
from rich.table import Table

from distributed_muzero.config import RunConfig

LIVE_SECONDS = 0.25  # between two pictures on a terminal
PLAIN_SECONDS = 5.0  # between two lines elsewhere


class Progress:
    """A live table on a terminal, one line every few seconds elsewhere. A context manager.

    limits: what the run stops at, shown beside what it has reached.   clock: monotonic seconds.
    """

    def __init__(
        self,
        console: Console | None = None,
        limits: RunConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._limits = limits or RunConfig()
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._metrics: dict[str, float] = {}
        self._last_shown: float | None = None
        self._pending = False
        # Standard output stays untouched: --json goes there.
        self._live = (
            Live(console=self._console, auto_refresh=False, redirect_stdout=False)
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pending:
            self._show()
        if self._live:
            self._live.stop()

    def update(self, metrics: Mapping[str, float]) -> None:
        """Takes new metrics (others stay as they were) and shows them when it is time to."""
        self._metrics.update(metrics)
        self._pending = True
        interval = LIVE_SECONDS if self._live else PLAIN_SECONDS
        if self._last_shown is None or self._clock() - self._last_shown >= interval:
            self._show()

    def message(self, text: str) -> None:
        """Prints a line of its own, at once."""
        self._print(text)

    def _show(self) -> None:
        self._last_shown, self._pending = self._clock(), False
        if self._live:
            self._live.update(live_table(self._metrics, self._limits), refresh=True)
        else:
            self._print(plain_line(self._metrics, self._limits))

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def fields(metrics: Mapping[str, float], limits: RunConfig) -> list[tuple[str, str]]:
    """(label, text) of everything that is shown, in order; a dash for what isn't known yet."""

    def show(name: str, unit: str = "", limit: float | None = None) -> str:
        return number(metrics.get(name)) + unit + (f" of {number(limit)}{unit}" if limit is not None else "")

    minutes = limits.max_minutes
    of_a_curriculum = (
        ("stage", show("curriculum/stage", limit=metrics.get("curriculum/stages"))),
        ("won", share(metrics.get("curriculum/win_rate"))),
    )
    of_two_players = (("score", show("eval/score")), ("Elo", show("eval/elo")))
    return [
        ("time", show("time/seconds", " s", minutes and 60 * minutes)),
        ("env steps", show("rollout/env_steps", limit=limits.max_env_steps)),
        ("env steps/s", show("rollout/env_steps_per_second")),
        ("simulations/s", show("search/simulations_per_second")),
        ("learner steps", show("train/learner_steps", limit=limits.max_train_steps)),
        ("learner steps/s", show("train/learner_steps_per_second")),
        ("return", show("rollout/ep_rew_mean")),
        *(row for row in of_a_curriculum if "curriculum/stage" in metrics),
        ("evaluation", show("eval/mean_return", limit=limits.stop_at_return)),
        *(row for row in of_two_players if "eval/score" in metrics),
        *([("solved", show("eval/solved"))] if "eval/solved" in metrics else ()),
        ("loss", show("train/loss")),
        ("value", show("train/value_loss")),
        ("reward", show("train/reward_loss")),
        ("policy", show("train/policy_loss")),
        ("staleness", show("train/staleness")),
        ("samples/insert", show("replay/samples_per_insert")),
        ("actors", show("actors/live", limit=metrics.get("actors/desired"))),
    ]


def plain_line(metrics: Mapping[str, float], limits: RunConfig) -> str:
    """One plain line; what isn't known yet is left out."""
    return " · ".join(
        f"{label} {text}" for label, text in fields(metrics, limits) if not text.startswith("–")
    )


def live_table(metrics: Mapping[str, float], limits: RunConfig) -> Table:
    """Three columns of label and number."""
    shown = fields(metrics, limits)
    num_rows = -(-len(shown) // 3)
    grid = Table.grid(padding=(0, 2))
    for _ in range(3):
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(justify="right", no_wrap=True)
    for row in range(num_rows):
        grid.add_row(*(text for column in shown[row::num_rows] for text in column))
    return grid


def share(value: float | None) -> str:
    """87%; a dash for None and NaN."""
    return "–" if value is None or value != value else f"{value:.0%}"


def number(value: float | None) -> str:
    """Short: 12,345 and 271.3 and 0.0123; a dash for None."""
    if value is None:
        return "–"
    if value != value or abs(value) == float("inf"):
        return str(value)
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
