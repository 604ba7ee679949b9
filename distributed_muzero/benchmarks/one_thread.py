"""A benchmark in a process of its own: numeric libraries read their number of threads when they are loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from distributed_muzero.errors import DistributedMuZeroError

ONE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
}


def run_on_one_thread(module: str, order: dict[str, Any]) -> dict[str, Any]:
    """Runs `python -m module ORDER`, which prints its result as JSON on the last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(order)],
        env=os.environ | ONE_THREAD,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise DistributedMuZeroError(f"the benchmark's process ended with code {done.returncode}; see above")
    return json.loads(done.stdout.splitlines()[-1])
