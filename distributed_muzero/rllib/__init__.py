"""Ray RLlib and Tune: what of theirs is used here, and what of ours is used there.

Names are loaded on first use: workers that look up an environment here load neither of them.
"""

from __future__ import annotations

from typing import Any

_PLACES = {
    "MuZeroConfig": "distributed_muzero.rllib.algorithm",  # which tells Tune its name, too
    "DistributedMuZero": "distributed_muzero.rllib.algorithm",
    "register_with_rllib": "distributed_muzero.rllib.to_rllib",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)
