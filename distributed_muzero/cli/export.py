"""`export rlmodule`: a run's checkpoint for other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distributed_muzero.cli import checkpoints, options

app = typer.Typer(help="Take what a run has learnt to other libraries.", no_args_is_help=True)


@app.callback()
def export() -> None:
    """Take what a run has learnt to other libraries."""


@app.command()
def rlmodule(
    run: Annotated[str, typer.Argument(help="A run's name, or the path or URI of its folder.")],
    folder: Annotated[Path, typer.Argument(help="To write; what an earlier export wrote there is replaced.")],
    checkpoint: checkpoints.Checkpoint = checkpoints.BEST,
    simulations: Annotated[
        int, typer.Option(min=0, help="Of a search for each action; 0: by the networks alone.")
    ] = 0,
    runs_dir: options.RunsDir = options.RUNS,
    trust_env_code: options.TrustEnvCode = False,
) -> None:
    """Write a checkpoint as an RLModule of RLlib's: RLModule.from_checkpoint(FOLDER)."""
    from distributed_muzero.rllib.export import export_checkpoint
    from distributed_muzero.workers.runs import open_to_read

    opened = open_to_read(run, runs_dir, exclude=("replay",))
    saved = checkpoints.load_checkpoint(opened, checkpoint)
    place = export_checkpoint(opened, saved, folder, simulations)
    by = f"a search with {simulations} simulations" if simulations else "the networks alone"
    print(f"{place}: {saved.path.name} of run {opened.name} as an RLModule that plays by {by}")
