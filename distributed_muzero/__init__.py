"""MuZero that anyone can train on any environment, from one laptop core to a Ray cluster.

`planning`, `acting` and `training` are the public contract (docs/algorithm.md); they are loaded on first use, so that
`import distributed_muzero` alone costs nothing.
"""

from typing import TYPE_CHECKING

from distributed_muzero.version import __version__

if TYPE_CHECKING:
    from distributed_muzero.algorithm.acting import acting
    from distributed_muzero.algorithm.planning import planning
    from distributed_muzero.algorithm.training import training
    from distributed_muzero.types import Step

_HOMES = {
    "planning": "distributed_muzero.algorithm.planning",
    "acting": "distributed_muzero.algorithm.acting",
    "training": "distributed_muzero.algorithm.training",
    "Step": "distributed_muzero.types",
}

__all__ = ["Step", "__version__", "acting", "planning", "training"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
