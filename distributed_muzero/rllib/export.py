"""A trained run as a module of RLlib's: the folder that `RLModule.from_checkpoint` loads, and the spec of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from distributed_muzero.checkpoint import Checkpoint, best_or_latest, latest_checkpoint, read_checkpoint
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import CheckpointError
from distributed_muzero.networks.flat import FlatWeights
from distributed_muzero.rllib.module import MuZeroModule
from distributed_muzero.rllib.module_files import SETTINGS, model_config, read_settings
from distributed_muzero.rllib.module_settings import settings_of
from distributed_muzero.run_folder import RunFolder
from distributed_muzero.workers.builder import Builder
from distributed_muzero.workers.runs import open_to_read


def export_rl_module(
    run: str,
    path: str | Path,
    checkpoint: str | int = "best",
    num_simulations: int = 0,
    runs_dir: str = "runs",
) -> Path:
    """Writes a checkpoint of a run as a module of RLlib's, and returns the folder.

    run: its name in `runs_dir`, or the path or URI of its folder.   checkpoint: best, latest or a learner step.
    num_simulations: of the search for each action; 0: the prior alone.
    Raises RunError, CheckpointError and ConfigError.
    """
    folder = open_to_read(run, runs_dir, exclude=("replay",))
    return export_checkpoint(folder, _load(folder, checkpoint), path, num_simulations)


def export_checkpoint(folder: RunFolder, saved: Checkpoint, path: str | Path, num_simulations: int) -> Path:
    """As `export_rl_module`, of a checkpoint that was read."""
    spec = Builder(folder.config, folder.name).spec
    settings = settings_of(folder, spec, num_simulations)
    module = MuZeroModule(
        observation_space=_observation_space(spec),
        action_space=spaces.Discrete(spec.num_actions),
        model_config=model_config({SETTINGS: settings.to_dict()}),
    )
    flat = FlatWeights(module.networks)
    flat.write(flat.vector_of(saved.tensors["weights"]))
    try:
        return Path(module.save_to_path(path))
    except OSError as error:
        raise CheckpointError(f"can't write the module to {path}: {error}") from None


def rl_module_spec(path: str | Path) -> RLModuleSpec:
    """For `config.rl_module(rl_module_spec=…)`: an exported module, weights included, with the spaces of the
    algorithm's environment. Raises CheckpointError."""
    place = str(path) if "://" in str(path) else str(Path(path).absolute())
    return RLModuleSpec(
        module_class=MuZeroModule, model_config=model_config(read_settings(place)), load_state_path=place
    )


def _load(folder: RunFolder, which: str | int) -> Checkpoint:
    if str(which).isdecimal():
        return read_checkpoint(folder.checkpoints / f"step_{int(which):08d}")
    if which not in ("best", "latest"):
        raise CheckpointError(f"checkpoint {which!r}: expected best, latest or a learner step")
    saved = (best_or_latest if which == "best" else latest_checkpoint)(folder.checkpoints)
    if saved is None:
        raise CheckpointError(
            f"run {folder.name} has no checkpoint yet in {folder.checkpoints}; train it for longer"
        )
    return saved


def _observation_space(spec: EnvironmentSpec) -> spaces.Box:
    dtype: Any = np.dtype(spec.observation_dtype)
    if dtype.kind == "f":
        return spaces.Box(-np.inf, np.inf, spec.observation_shape, dtype)
    low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return spaces.Box(low, high, spec.observation_shape, dtype)
