"""Where networks compute."""

from __future__ import annotations

import torch

from distributed_muzero.errors import ConfigError


def choose_device(name: str, setting: str) -> torch.device:
    """`auto` takes a GPU if torch sees one. Raises ConfigError, naming the setting, for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{setting} is cuda, but torch sees no GPU here; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of the learner's arithmetic; `auto` takes bfloat16 where the device has instructions for it."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # elsewhere a CPU computes in it by way of float32, many times slower
        is_native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if is_native else torch.float32


def choose_devices(name: str, setting: str, number: int) -> list[torch.device]:
    """One for each of `number` processes of a machine: the first GPUs that torch sees, or the CPU for all.

    Raises ConfigError, naming the setting, where there are GPUs, but fewer.
    """
    device = choose_device(name, setting)
    if device.type == "cpu":
        return [device] * number
    if (seen := torch.cuda.device_count()) < number:
        raise ConfigError(
            f"{number} GPUs are asked for, but torch sees {seen} here; lower the number of devices, or set "
            f"{setting} to cpu"
        )
    return [torch.device(device.type, index) for index in range(number)]
