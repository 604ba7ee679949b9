"""How an exported module lies on disk.

    FOLDER/module.json              the settings, and which class reads them
    FOLDER/weights.safetensors      all weights by name
    FOLDER/metadata.json            RLlib's: versions
    FOLDER/class_and_ctor_args.pkl  RLlib's, a pickle: class, spaces and settings, for `RLModule.from_checkpoint`

Only RLlib's own `RLModule.from_checkpoint` unpickles; `MuZeroModule.from_checkpoint`, `rl_module_spec` and whatever
restores weights into a module that is there read JSON and safetensors.
"""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors.numpy
from pyarrow import ArrowException, fs
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.utils.numpy import convert_to_numpy
from ray.rllib.utils.serialization import gym_space_from_dict, gym_space_to_dict

from distributed_muzero.errors import CheckpointError
from distributed_muzero.rllib.module_settings import ModuleSettings

SETTINGS = "muzero"  # in model_config
SETTINGS_FILE, WEIGHTS_FILE = "module.json", "weights.safetensors"
MAX_SEQ_LEN = 20  # RLlib's own; of the pieces in which a stateful module is trained


class ModuleFiles(TorchRLModule):
    """What RLlib asks of a Checkpointable, with safetensors in place of pickled weights."""

    settings: ModuleSettings
    observation_space: Any
    action_space: Any

    def save_to_path(
        self,
        path: str | Path | None = None,
        *,
        state: Mapping[str, Any] | None = None,
        filesystem: fs.FileSystem | None = None,
        use_msgpack: bool = False,
    ) -> str:
        """Writes the folder, and returns its path. state: in place of the module's own weights."""
        files, place = _place(path or tempfile.mkdtemp(), filesystem)
        files.create_dir(place, recursive=True)
        construction = {"class": type(self), "ctor_args_and_kwargs": self.get_ctor_args_and_kwargs()}
        settings = {
            SETTINGS: self.settings.to_dict(),
            "observation_space": gym_space_to_dict(self.observation_space),
            "action_space": gym_space_to_dict(self.action_space),
        }
        weights: Any = convert_to_numpy(dict(state or self.get_state()))
        contents = {
            SETTINGS_FILE: json.dumps(settings, indent=2).encode(),
            WEIGHTS_FILE: safetensors.numpy.save({name: np.array(array) for name, array in weights.items()}),
            self.METADATA_FILE_NAME: json.dumps(self.get_metadata()).encode(),
            self.CLASS_AND_CTOR_ARGS_FILE_NAME: pickle.dumps(construction),
        }
        for name, data in contents.items():
            with files.open_output_stream(f"{place}/{name}") as file:
                file.write(data)
        return place

    def restore_from_path(
        self, path: str | Path, *, filesystem: fs.FileSystem | None = None, **kwargs: Any
    ) -> None:
        """Takes the weights of a folder. Raises CheckpointError for weights of other networks."""
        weights = safetensors.numpy.load(read_file(path, WEIGHTS_FILE, filesystem))
        expected = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        if {name: array.shape for name, array in weights.items()} != expected:
            raise CheckpointError(
                f"the weights in {path} are of other networks than this module has; make its spec with "
                "distributed_muzero.rllib.export.rl_module_spec(FOLDER)"
            )
        self.set_state(weights)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, filesystem: fs.FileSystem | None = None, **kwargs: Any
    ) -> Self:
        """The module of a folder, without a pickle. kwargs: in place of the constructor's own."""
        found = read_settings(path, filesystem)
        module = cls(
            **{
                "observation_space": gym_space_from_dict(found["observation_space"]),
                "action_space": gym_space_from_dict(found["action_space"]),
                "model_config": model_config(found),
                **kwargs,
            }
        )
        module.restore_from_path(path, filesystem=filesystem)
        return module


def model_config(found: Mapping[str, Any]) -> dict[str, Any]:
    """For a module's constructor, from what `read_settings` found."""
    return {SETTINGS: found[SETTINGS], "max_seq_len": MAX_SEQ_LEN}


def read_settings(path: str | Path, filesystem: fs.FileSystem | None = None) -> dict[str, Any]:
    """What module.json holds. Raises CheckpointError."""
    try:
        found = json.loads(read_file(path, SETTINGS_FILE, filesystem))
        if not {SETTINGS, "observation_space", "action_space"} <= found.keys():
            raise ValueError("something is missing in it")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"can't read {path}/{SETTINGS_FILE}: {error}; export the module again"
        ) from None
    return found


def read_file(path: str | Path, name: str, filesystem: fs.FileSystem | None) -> bytes:
    """Raises CheckpointError for a folder without it."""
    files, place = _place(path, filesystem)
    try:
        with files.open_input_stream(f"{place}/{name}") as file:
            return file.read()
    except (OSError, ArrowException) as error:
        raise CheckpointError(
            f"{path} holds no exported module ({error}); make one with `distributed-muzero export rlmodule RUN FOLDER`"
        ) from None


def _place(path: str | Path, filesystem: fs.FileSystem | None) -> tuple[fs.FileSystem, str]:
    if filesystem is not None:
        return filesystem, str(path)
    if "://" in str(path):
        return fs.FileSystem.from_uri(str(path))
    return fs.LocalFileSystem(), str(Path(path).absolute())
