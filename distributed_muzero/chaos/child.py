"""A check in a process of its own: limits and patches bind nobody else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from distributed_muzero.errors import DistributedMuZeroError

CHILD_TIMEOUT_SECONDS = 300.0


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
