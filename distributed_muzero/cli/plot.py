"""`plot`: curves of one or several runs as a picture."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distributed_muzero.cli import options
from distributed_muzero.errors import ConfigError, RunError

if TYPE_CHECKING:
    from distributed_muzero.observability.curves import Records

NOT_NEEDED = ("replay", "checkpoints", "tensorboard", "history")  # of a run at a URI


class Over(StrEnum):
    env_steps = "env_steps"
    minutes = "minutes"
    learner_steps = "learner_steps"


def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Runs' names, or their folders or URIs.")],
    runs_dir: options.RunsDir = options.RUNS,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to; its suffix says what kind of picture. Default: RUN.png here."),
    ] = None,
    over: Annotated[
        Over | None,
        typer.Option(help="Default: env_steps; learner_steps where none of the runs plays."),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Draw this one instead of the usual panels; may be repeated.")
    ] = None,
) -> None:
    """Draw returns, losses, throughput and more of one or several runs.

    Runs that differ only in their seed become one curve: their mean, in a band of one standard deviation.
    """
    from distributed_muzero.files import write_atomically
    from distributed_muzero.observability.curves import group_by_seed, read_records
    from distributed_muzero.observability.plotting import draw
    from distributed_muzero.workers.runs import open_to_read

    folders = {folder.path: folder for folder in (open_to_read(run, runs_dir, NOT_NEEDED) for run in runs)}
    records = [read_records(folder) for folder in folders.values()]
    path = Path(_default_name(records)) if out is None else out
    image_format = check_out(path)
    over = default_axis(records) if over is None else over
    _check_metrics(records, metric or [], over)
    existed = path.exists()
    try:
        write_atomically(path, draw(group_by_seed(records), over.value, metric or [], image_format))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"can't write {path}: {error}; choose another --out") from None
    print(f"{'replaced' if existed else 'wrote'} {path}")


def default_axis(records: Sequence[Records]) -> Over:
    """What grows: without actors, that is the learner's steps alone."""
    return Over.learner_steps if all(one.config.is_offline for one in records) else Over.env_steps


def _default_name(records: Sequence[Records]) -> str:
    first, *others = (one.name for one in records)
    return f"{first}_and_{len(others)}_more.png" if others else f"{first}.png"


def check_out(path: Path) -> str:
    """The picture's format. Raises ConfigError before anything is drawn."""
    from distributed_muzero.observability.plotting import image_formats

    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(
            f"--out {path}: {'that is a folder' if path.is_dir() else f'there is no folder {path.parent}'}; "
            "name a file in a folder that exists"
        )
    image_format, formats = path.suffix.removeprefix(".").lower(), image_formats()
    if image_format not in formats:
        raise ConfigError(
            f"--out {path}: {f'no picture is known by .{image_format}' if image_format else 'it has no suffix'}; "
            f"choose one of {', '.join(sorted(formats))}"
        )
    return image_format


def _check_metrics(records: Sequence[Records], metrics: Sequence[str], over: str) -> None:
    """Raises ConfigError for what is no metric, RunError for one that no run has recorded."""
    from distributed_muzero.observability.metrics import METRICS

    recorded = sorted({name for one in records for name in one.names})
    for name in metrics:
        if any(len(one.curve(name, over).x) for one in records):
            continue
        labelled = [other for other in recorded if other.startswith(f"{name}/")]
        if labelled:
            raise ConfigError(f"--metric {name}: name one of {', '.join(labelled)}")
        if not _is_metric(name):
            close = difflib.get_close_matches(name, recorded, n=1) or difflib.get_close_matches(
                name, METRICS, n=1
            )
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(f"unknown metric {name!r}{hint}; recorded are {', '.join(recorded)}")
        raise RunError(
            f"no numbers of {name!r} over {over} yet in {', '.join(one.name for one in records)}; recorded are "
            f"{', '.join(recorded)}"
        )


def _is_metric(name: str) -> bool:
    from distributed_muzero.observability.metrics import metric_of

    try:
        metric_of(name)
    except ValueError:
        return False
    return True
