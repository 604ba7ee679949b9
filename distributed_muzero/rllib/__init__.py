"""The face that RLlib's and Tune's users know. Names are loaded on first use: workers that look up an environment here
load neither of them."""

from __future__ import annotations

from typing import Any

_PLACES = {
    "MuZeroConfig": "distributed_muzero.rllib.config",
    "DistributedMuZero": "distributed_muzero.rllib.algorithm",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)
