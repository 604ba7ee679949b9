"""Runs whose networks prefer this or that, without having learnt anything."""

from __future__ import annotations

import numpy as np

from distributed_muzero.checkpoint import write_checkpoint
from distributed_muzero.config import make_config
from distributed_muzero.run_folder import create_run
from distributed_muzero.workers.builder import Builder


def opinionated_run(runs_dir, name, settings):
    """A run with a checkpoint of step 0, random in all layers: fresh networks rate all actions alike."""
    folder = create_run(runs_dir, name, make_config(settings))
    learner = Builder(folder.config, name).learner()
    arrays, state = learner.state()
    learner.close()
    rng = np.random.default_rng(8)
    weights = dict(arrays["weights"])
    for key, array in weights.items():
        if key.endswith("weight"):
            weights[key] = array + rng.standard_normal(array.shape).astype(array.dtype)
        elif key.endswith("variance"):
            weights[key] = array / 100  # small differences matter
    write_checkpoint(folder.checkpoints, 0, {**arrays, "weights": weights}, state)
    return folder
