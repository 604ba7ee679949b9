"""Processes that the checks start: a check in a process of its own, and the end of a whole tree."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from distributed_muzero.errors import DistributedMuZeroError

CHILD_TIMEOUT_SECONDS = 300.0
DEATH_SECONDS = 10.0


def run_with_offsets(module: str, folder: Path, seed: int, n: int) -> dict[str, Any]:
    """What `python -m module` prints as JSON. Raises DistributedMuZeroError if it fails."""
    arguments = [f"--folder={folder}", f"--seed={seed}", f"--offsets={n}"]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=CHILD_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise DistributedMuZeroError(f"{module} in {folder} ended with code {done.returncode}: {done.stderr}")
    return json.loads(done.stdout)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kills a process that was started here and all below it, at once, and waits until they are gone."""
    with suppress(psutil.NoSuchProcess):
        doomed = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in doomed:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(doomed, timeout=DEATH_SECONDS)
    process.wait()
