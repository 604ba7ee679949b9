"""What an algorithm saves, for itself in another process and for Tune.

FOLDER/muzero/ run/         the run's folder as it was at one moment, from which `resume` could go on, too
               config.yaml  of MuZeroConfig
               state.json   training_iteration, time_total_s

It is replaced as a whole: a save that is broken off leaves the one before.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distributed_muzero.errors import RunError
from distributed_muzero.files import sync_folder, to_json, write_atomically
from distributed_muzero.mirror.uri import is_uri
from distributed_muzero.run_folder import RunFolder, open_run
from distributed_muzero.workers.snapshot import copy_run

CONTENT, ASIDE, NEW = "muzero", ".muzero.replaced", ".muzero-"
RUN_FOLDER, SETTINGS_FILE, STATE_FILE = "run", "config.yaml", "state.json"


class Saved(NamedTuple):
    run: RunFolder
    settings: str  # YAML
    training_iteration: int
    time_total_s: float


def folder_at(path: Any) -> Path:
    """Raises RunError for a URI."""
    if is_uri(str(path)):
        raise RunError(
            f"{path}: an algorithm is saved in a folder, not at a URI; copy it there, or let Tune do it"
        )
    return Path(path).expanduser()


def write_saved(
    folder: Path, run: RunFolder, left_out: Collection[str], settings: str, state: Mapping[str, Any]
) -> None:
    """left_out: folders of the run's. Raises RunError."""
    content, aside, new = folder / CONTENT, folder / ASIDE, folder / f"{NEW}{uuid.uuid4().hex[:8]}"
    try:
        for leftover in folder.glob(f"{NEW}*"):  # of a save that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        copy_run(run.path, new / RUN_FOLDER, left_out)
        open_run(str(new / RUN_FOLDER)).write_counts("stopped", "this copy of the run was saved")
        write_atomically(new / SETTINGS_FILE, settings.encode())
        write_atomically(new / STATE_FILE, to_json(state))
        if content.exists():
            shutil.rmtree(aside, ignore_errors=True)
            content.rename(aside)
        new.rename(content)
        sync_folder(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise RunError(f"can't save to {folder}: {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def run_in(folder: str | Path) -> Path:
    """The run of what was saved in this folder. Raises RunError."""
    return _content(Path(folder)) / RUN_FOLDER


def read_saved(folder: Path) -> Saved:
    """Raises RunError."""
    content = _content(folder)
    try:
        settings = (content / SETTINGS_FILE).read_text()
        state = json.loads((content / STATE_FILE).read_text())
        iteration, seconds = int(state["training_iteration"]), float(state["time_total_s"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"can't read what is saved in {content}: {error}") from None
    return Saved(open_run(str(content / RUN_FOLDER)), settings, iteration, seconds)


def _content(folder: Path) -> Path:
    for content in (folder / CONTENT, folder / ASIDE):  # the latter where a save was broken off
        if content.is_dir():
            return content
    raise RunError(
        f"{folder} holds no saved DistributedMuZero: {CONTENT} is not there; expected a folder that save_to_path() or "
        "a trial of Tune has written"
    )
