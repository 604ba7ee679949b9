"""Which of a run's checkpoints a command takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distributed_muzero.errors import CheckpointError

if TYPE_CHECKING:
    from distributed_muzero import checkpoint
    from distributed_muzero.run_folder import RunFolder

BEST, LATEST = "best", "latest"
STEP = re.compile(r"(?:step_)?(\d{1,18})")
NAMED_STEPS = 12  # in an error

Checkpoint = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        metavar="best|latest|STEP",
        help="best: the one whose evaluation was best, or the latest if none was evaluated. Or a learner step.",
    ),
]


def load_checkpoint(folder: RunFolder, which: str) -> checkpoint.Checkpoint:
    """The checkpoint `best`, `latest` or of a learner step, written `400` or `step_00000400`.

    Raises CheckpointError, with what there is, if there is none like it or it is damaged.
    """
    from distributed_muzero.checkpoint import best_or_latest, latest_checkpoint, read_checkpoint

    if which in (BEST, LATEST):
        saved = (best_or_latest if which == BEST else latest_checkpoint)(folder.checkpoints)
        if saved is None:
            raise CheckpointError(_none_yet(folder))
        return saved
    found = _steps(folder.checkpoints)
    match = STEP.fullmatch(which)
    if match is None:
        raise CheckpointError(
            f"--checkpoint {which!r}: expected best, latest or a learner step. {_what_there_is(folder, found)}"
        )
    path = found.get(int(match[1]))
    if path is None:
        raise CheckpointError(
            f"run {folder.name} has no checkpoint of step {int(match[1])}. {_what_there_is(folder, found)}"
        )
    return read_checkpoint(path)


def _steps(checkpoints: Path) -> dict[int, Path]:
    """Of all checkpoints by their step, oldest first; one that is being replaced, only until its successor is there."""
    from distributed_muzero.checkpoint import FOLDER

    found = {}
    for path in sorted(checkpoints.iterdir(), reverse=True) if checkpoints.is_dir() else []:
        if match := FOLDER.fullmatch(path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def _what_there_is(folder: RunFolder, found: dict[int, Path]) -> str:
    if not found:
        return _none_yet(folder)
    steps = [str(step) for step in found]
    shown = steps if len(steps) <= NAMED_STEPS else [*steps[:2], "…", *steps[3 - NAMED_STEPS :]]
    return f"There are best, latest and the steps {', '.join(shown)}"


def _none_yet(folder: RunFolder) -> str:
    return f"run {folder.name} has no checkpoint yet in {folder.checkpoints}; train it for longer"
