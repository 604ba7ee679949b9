"""Runs with a checkpoint of networks as they were made: enough where it doesn't matter how well they play."""

from __future__ import annotations

from distributed_muzero.checkpoint import write_checkpoint
from distributed_muzero.config import make_config
from distributed_muzero.run_folder import create_run
from distributed_muzero.workers.builder import Builder


def untrained_run(runs_dir, name, settings):
    """A run of that config, with a checkpoint of step 0."""
    folder = create_run(runs_dir, name, make_config(settings))
    learner = Builder(folder.config, name).learner()
    try:
        arrays, state = learner.state()
    finally:
        learner.close()
    write_checkpoint(folder.checkpoints, 0, arrays, state)
    return folder
