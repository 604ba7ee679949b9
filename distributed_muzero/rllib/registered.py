"""What `ray.tune.register_env` has been given, read without importing Ray Tune or RLlib.

Tune keeps creators in the process until Ray is connected, then in Ray's key-value store under the job's id, where every
process of the job finds them; both forget them when Ray is shut down. Importing `ray.tune` only to look there would
take 1.6 s and 115 MB in each process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from distributed_muzero.errors import EnvironmentFailure

CATEGORY = "env_creator"

Creator = Callable[[dict[str, Any]], Any]

# Pickled creators that this process has found: a run makes environments after its Ray has ended, to evaluate.
_found: dict[str, bytes] = {}


def find_creator(name: str) -> Creator | None:
    """What was registered under this name, by this process or by another one of its Ray job; None if nothing was.

    Once found, it stays known to the process.

    Raises EnvironmentFailure for a creator that can't be unpickled here, such as one of a module that is missing.
    """
    pickled = _here().get(name) or _of_the_job(name) or _found.get(name)
    if pickled is None:
        return None
    _found[name] = pickled
    from ray import cloudpickle

    try:
        return cloudpickle.loads(pickled)
    except Exception as error:
        raise EnvironmentFailure(
            f"rllib:{name}: what is registered can't be loaded in this process: {type(error).__name__}: {error}. "
            "Its module must be importable in every process of the run"
        ) from error


def register_again() -> None:
    """Tells this job's other processes what this one has found; Tune forgets it with each Ray that ends."""
    prefix = _prefix()
    if prefix is not None:
        from ray.experimental import internal_kv

        for name, pickled in _found.items():
            internal_kv._internal_kv_put(prefix + name.encode(), pickled)


def registered_names() -> list[str]:
    """Sorted; those of this process and of its Ray job."""
    names = {*_here(), *_found}
    if prefix := _prefix():
        from ray.experimental import internal_kv

        keys = internal_kv._internal_kv_list(prefix)
        names |= {bytes(key).removeprefix(prefix).decode() for key in keys}
    return sorted(names)


def _here() -> dict[str, bytes]:
    """Pickled creators by name that wait for Ray to be connected."""
    tune = sys.modules.get("ray.tune.registry")
    if tune is None:
        return {}
    waiting = tune._global_registry._to_flush
    return {name: pickled for (category, name), pickled in waiting.items() if category == CATEGORY}


def _of_the_job(name: str) -> bytes | None:
    prefix = _prefix()
    if prefix is None:
        return None
    from ray.experimental import internal_kv

    return internal_kv._internal_kv_get(prefix + name.encode())


def _prefix() -> bytes | None:
    """Of the keys of this job's creators; None where Ray isn't connected."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    job = ray.get_runtime_context().get_job_id()
    return f"TuneRegistry:{job}:{CATEGORY}/".encode()
