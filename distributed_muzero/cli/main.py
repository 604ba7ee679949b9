"""The command line: parse, call, print. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import os
import sys
from typing import Annotated

# Before numpy is loaded: its products are small here, and its threads would fight for the cores with other processes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer

from distributed_muzero.cli import (
    bench,
    chaos,
    cluster,
    configs,
    diagnose,
    envs,
    evaluate,
    export,
    play,
    plot,
    replay,
    solve,
    train,
    tune,
    watch,
)
from distributed_muzero.errors import DistributedMuZeroError
from distributed_muzero.version import __version__

app = typer.Typer(
    help="MuZero that anyone can train on any environment, from one laptop core to a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("train")(train.train)
app.command("tune")(tune.tune)
app.command("resume")(train.resume)
app.command("submit")(cluster.submit)
app.command("status")(cluster.status)
app.command("watch")(watch.watch)
app.command("logs")(cluster.logs)
app.command("scale")(cluster.scale)
app.command("stop")(cluster.stop)
app.command("runs")(cluster.runs)
app.command("evaluate")(evaluate.evaluate)
app.command("play")(play.play)
app.command("solve", cls=solve.SolveCommand)(solve.solve)
app.command("plot")(plot.plot)
app.command("diagnose")(diagnose.diagnose)
app.add_typer(envs.app, name="envs")
app.add_typer(configs.app, name="config")
app.add_typer(replay.app, name="replay")
app.add_typer(export.app, name="export")
app.command("chaos")(chaos.chaos)
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """MuZero that anyone can train on any environment, from one laptop core to a Ray cluster."""


def main() -> None:
    """Entry point. A person's mistake ends in one message and exit code 2, never in a traceback."""
    try:
        app()
    except DistributedMuZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
