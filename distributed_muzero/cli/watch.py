"""`watch`: how a run stands, again and again, until it has ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from distributed_muzero.cli import cluster, options
from distributed_muzero.cli.watch_view import Trails, plain_line, view
from distributed_muzero.observability.progress import PLAIN_SECONDS

MAX_WIDTH = 110


def watch(
    run: Annotated[
        str | None, typer.Argument(help="A run's name; default: the one that goes on, or the last.")
    ] = None,
    address: cluster.Address = None,
    runs_dir: options.RunsDir = options.RUNS,
) -> None:
    """Watch a run live, in a cluster or on this machine, until it ends. Ctrl-C ends the view and not the run.

    Where standard output is no terminal, it gets a line every few seconds. `status --watch --json` is for programs.
    """
    try:
        with closing(cluster.watched(run, address, runs_dir, True, None)) as statuses:
            show(statuses, Console())
    except KeyboardInterrupt:
        print("no longer watching; the run is left alone", file=sys.stderr)


def show(
    statuses: Iterable[Mapping[str, Any]], console: Console, clock: Callable[[], float] = time.monotonic
) -> None:
    """Each status in the place of the last one on a terminal; elsewhere a line every PLAIN_SECONDS, and the last."""
    trails = Trails()
    if console.is_terminal:
        first = Text("asking; a cluster that is asked from outside answers in 5 to 30 s", style="dim")
        with Live(first, console=console, auto_refresh=False) as live:
            live.refresh()
            for status in statuses:
                trails.add(status)
                live.update(view(status, trails, min(console.width, MAX_WIDTH)), refresh=True)
        return
    shown_at = None
    for status in statuses:
        trails.add(status)
        is_over = status["state"] not in cluster.AT_WORK
        if is_over or shown_at is None or clock() - shown_at >= PLAIN_SECONDS:
            shown_at = clock()
            console.print(plain_line(status, trails), markup=False, highlight=False, soft_wrap=True)
