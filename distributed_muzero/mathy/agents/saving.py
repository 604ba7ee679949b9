"""A policy/value model on disk: weights, optimizer and counts together, as checkpoints without pickle.

model_dir/model.config.json          the agent's config and `predictions`
model_dir/model.checkpoints/step_…   weights.safetensors, optimizer.safetensors, state.json, checksums
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distributed_muzero.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    prune_checkpoints,
    write_checkpoint,
)
from distributed_muzero.errors import CheckpointError
from distributed_muzero.files import to_json, write_atomically
from distributed_muzero.mathy.agents.base_config import SHAPES, BaseConfig

if TYPE_CHECKING:
    from distributed_muzero.mathy.agents.policy_value_model import PolicyValueModel

KEPT = 2  # checkpoints: one to fall back to
ADAM = ("step", "exp_avg", "exp_avg_sq")


def config_path(args: BaseConfig) -> Path:
    return Path(args.model_dir) / f"{args.model_name}.config.json"


def checkpoints_path(folder: str | Path, model_name: str) -> Path:
    return Path(folder) / f"{model_name}.checkpoints"


def has_saved_model(args: BaseConfig) -> bool:
    folder = checkpoints_path(args.model_dir, args.model_name)
    return folder.is_dir() and any(folder.glob("step_*"))


def require_saved(args: BaseConfig) -> None:
    """Raises CheckpointError if no model was saved."""
    if not has_saved_model(args):
        raise CheckpointError(
            f"no model {args.model_name!r} in {args.model_dir}; train one there, or leave out `required`"
        )


def make_folder(args: BaseConfig) -> None:
    """model_dir. Raises CheckpointError if the disk refuses."""
    try:
        Path(args.model_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"can't make {args.model_dir}: {error}; choose another model_dir, or mend its permissions"
        ) from error


def write_config(args: BaseConfig, predictions: int) -> None:
    """model.config.json. Raises CheckpointError if the disk refuses."""
    path = config_path(args)
    try:
        write_atomically(
            path, to_json({**args.model_dump(mode="json"), "predictions": predictions}, indent=2)
        )
    except OSError as error:
        raise CheckpointError(
            f"can't write {path}: {error}; choose another model_dir, or mend its permissions"
        ) from error


def check_config(args: BaseConfig, predictions: int) -> None:
    """Raises CheckpointError if the folder's model has other shapes than `args` ask for, or its config is damaged."""
    path = config_path(args)
    try:
        saved = json.loads(path.read_bytes())
        asked = {**args.model_dump(include=set(SHAPES)), "predictions": predictions}
        different = [
            f"{name} {saved[name]}, not {value}" for name, value in asked.items() if saved[name] != value
        ]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"can't read {path} ({error!r}); restore it, or choose another model_dir"
        ) from error
    if different:
        raise CheckpointError(
            f"the model in {args.model_dir} has {', '.join(different)}; ask for the same, or choose another model_dir"
        )


def save_model(model: PolicyValueModel) -> Path:
    """A checkpoint in model_dir, durable when this returns. Raises CheckpointError if the disk refuses."""
    folder = checkpoints_path(model.args.model_dir, model.args.model_name)
    tensors = {"weights": _arrays(model.state_dict()), "optimizer": _optimizer_arrays(model)}
    path = write_checkpoint(folder, model.counts["updates"], tensors, {"counts": model.counts})
    prune_checkpoints(folder, KEPT)
    return path


def restore_model(model: PolicyValueModel) -> None:
    """Weights, optimizer and counts of the newest intact checkpoint. Raises CheckpointError."""
    saved = _newest(checkpoints_path(model.args.model_dir, model.args.model_name))
    _load_weights(model, saved)
    _load_optimizer(model, saved)
    counts = saved.state.get("counts", {})
    if counts.keys() != model.counts.keys():
        raise CheckpointError(f"{saved.path} holds the counts {counts}, expected {sorted(model.counts)}")
    model.counts = {name: int(count) for name, count in counts.items()}


def load_first_weights(model: PolicyValueModel, folder: str) -> None:
    """The weights alone of another folder's model: what comes is a training of its own. Raises CheckpointError."""
    path = checkpoints_path(folder, model.args.model_name)
    if not path.is_dir():
        raise CheckpointError(
            f"init_model_from {folder!r}: no model {model.args.model_name!r} was saved there; give the model_dir of "
            "one that was"
        )
    _load_weights(model, _newest(path))


def _newest(folder: Path) -> Checkpoint:
    saved = latest_checkpoint(folder)
    if saved is None or not saved.tensors.keys() >= {"weights", "optimizer"}:
        raise CheckpointError(f"{folder} holds no saved model; restore it, or choose another model_dir")
    return saved


def _load_weights(model: PolicyValueModel, saved: Checkpoint) -> None:
    _check_shapes(saved, "weights", {name: tuple(value.shape) for name, value in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(array) for name, array in saved.tensors["weights"].items()})


def _load_optimizer(model: PolicyValueModel, saved: Checkpoint) -> None:
    """Adam's moments; none where it was saved before its first step."""
    arrays = saved.tensors["optimizer"]
    named = list(model.named_parameters()) if arrays else []
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in named:
        shapes |= {f"{name}/{part}": () if part == "step" else tuple(parameter.shape) for part in ADAM}
    _check_shapes(saved, "optimizer", shapes)
    model.optimizer.state.clear()
    for name, parameter in named:
        model.optimizer.state[parameter] = {
            part: torch.from_numpy(arrays[f"{name}/{part}"].copy()) for part in ADAM
        }


def _check_shapes(saved: Checkpoint, stem: str, expected: dict[str, tuple[int, ...]]) -> None:
    found = {name: tuple(array.shape) for name, array in saved.tensors[stem].items()}
    if found != expected:
        different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise CheckpointError(
            f"the {stem} of {saved.path} don't fit this model: {', '.join(different[:4])} differ; ask for the "
            f"{', '.join(SHAPES)} and predictions that it was made with"
        )


def _optimizer_arrays(model: PolicyValueModel) -> dict[str, np.ndarray]:
    state: dict[Any, dict[str, Any]] = dict(model.optimizer.state)
    return _arrays(
        {
            f"{name}/{part}": state[parameter][part]
            for name, parameter in model.named_parameters()
            if parameter in state
            for part in ADAM
        }
    )


def _arrays(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
