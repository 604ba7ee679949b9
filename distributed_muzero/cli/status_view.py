"""A run's status, and lists of runs, as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from distributed_muzero.cli.watch_view import stage_text

# Label -> keys of a status, with their units; see Bookkeeper.write_status.
ROWS = (
    ("env steps", "env_steps", ""),
    ("env steps/s", "env_steps_per_second", ""),
    ("episodes", "episodes", ""),
    ("learner steps", "learner_steps", ""),
    ("learner steps/s", "learner_steps_per_second", ""),
    ("weights version", "weights_version", ""),
    ("staleness", "staleness", " versions"),
    ("mean return", "mean_return", ""),
    ("evaluation", "evaluation", ""),
    ("score", "score", ""),
    ("solved", "solved", ""),
    ("Elo", "elo", ""),
    ("samples/insert", "samples_per_insert", ""),
    ("shards", "shards", ""),
    ("reanalysers", "reanalysers", ""),
    ("restarts", "restarts", ""),
    ("undelivered games", "undelivered_episodes", ""),
    ("time", "seconds", " s"),
    ("metrics", "metrics", ""),
    ("reason", "reason", ""),
    ("folder", "folder", ""),
)

PIPED_WIDTH = 200  # no name is broken
TIMES = ("started", "ended")


def show(statuses: Iterable[Mapping[str, Any]]) -> None:
    """Each status in the place of the last one on a terminal, one below the other elsewhere."""
    console = Console()
    if not console.is_terminal:
        for status in statuses:
            console.print(status_table(status))
        return
    with Live(console=console, auto_refresh=False) as live:
        for status in statuses:
            live.update(status_table(status), refresh=True)


def status_table(status: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("run", str(status["run"]))
    table.add_row("state", str(status["state"]))
    if actors := status.get("actors"):
        more = [f"{actors[name]} {name}" for name in ("pending", "draining") if actors[name]]
        table.add_row("actors", ", ".join([f"{actors['live']} of {actors['desired']} live", *more]))
    if curriculum := status.get("curriculum"):
        table.add_row("stage", stage_text(curriculum))
    for label, key, unit in ROWS:
        if status.get(key) is not None:
            table.add_row(label, _text(status[key]) + unit)
    return table


def show_runs(runs: Sequence[Mapping[str, Any]]) -> None:
    if not runs:
        print("none")
        return
    table = Table(box=None, pad_edge=False)
    for name in runs[0]:
        table.add_column(name, overflow="fold")
    for run in runs:
        table.add_row(*(_time(value) if name in TIMES else str(value) for name, value in run.items()))
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(table)


def _time(iso: str | None) -> str:
    return iso[:19].replace("T", " ") if iso else "–"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
