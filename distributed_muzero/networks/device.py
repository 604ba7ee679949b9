"""Where networks compute."""

from __future__ import annotations

import torch

from distributed_muzero.errors import ConfigError


def choose_device(name: str, setting: str) -> torch.device:
    """`auto` takes a GPU if torch sees one. Raises ConfigError, naming the setting, for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{setting} is cuda, but torch sees no GPU here; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
