"""How the trials of a search stand, for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

MAX_ROWS = 30
WIDE = 200


class TrialsTable:
    """A table that changes on a terminal, a line for each evaluation elsewhere; always on standard error."""

    def __init__(self, names: Sequence[str], console: Console | None = None):
        """names: of the settings that are searched over."""
        self._console = console or Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._told: dict[str, tuple[Any, ...]] = {}
        self._names = list(names)

    def __enter__(self) -> TrialsTable:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """rows: of all trials, as `tuning.Watcher` makes them."""
        if self._live:
            self._live.update(table_of(rows), refresh=True)
            return
        for row in rows:
            told = (row["iterations"], row["state"])
            if self._told.get(row["trial"]) != told and row["iterations"]:
                self._told[row["trial"]] = told
                line = " · ".join(f"{name} {shown(value)}" for name, value in row.items())
                self._console.print(line, soft_wrap=True, highlight=False)


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The best first."""
    table = Table()
    for name in rows[0] if rows else ():
        table.add_column(name, justify="left" if name in ("trial", "state") else "right", no_wrap=True)
    ranked = sorted(rows, key=lambda row: (row["evaluation"] is None, -(row["evaluation"] or 0.0)))
    for row in ranked[:MAX_ROWS]:
        table.add_row(*(shown(value) for value in row.values()))
    if len(ranked) > MAX_ROWS:
        table.caption = f"and {len(ranked) - MAX_ROWS} more"
    return table


def print_trials(rows: Sequence[Mapping[str, Any]]) -> None:
    """The last word on all trials, on standard output; whole, where that is no terminal."""
    console = Console()
    Console(width=None if console.is_terminal else WIDE).print(table_of(rows))


def shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
