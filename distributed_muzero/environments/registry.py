"""From an id to an environment: own ones, installed ones (entry points), families by prefix, Gymnasium's.

Gymnasium is imported on first use only, torch and ray never.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.base import Environment
from distributed_muzero.environments.chain import make_chain
from distributed_muzero.errors import EnvironmentFailure, UnknownEnvironmentError

Factory = Callable[[EnvironmentConfig], Environment]

ENTRY_POINTS = "distributed_muzero.environments"

_factories: dict[str, Factory] = {"chain": make_chain}

# What of Gymnasium's own can be trained: name -> (family, kwargs that it needs). A test holds this against
# the spaces; making all of them here to look would take seconds.
_GYMNASIUM: dict[str, tuple[str, dict[str, Any]]] = {
    "Acrobot": ("classic control", {}),
    "CartPole": ("classic control", {}),
    "MountainCar": ("classic control", {}),
    "CliffWalking": ("toy text", {}),
    "CliffWalkingSlippery": ("toy text", {}),
    "FrozenLake": ("toy text", {}),
    "FrozenLake8x8": ("toy text", {}),
    "Taxi": ("toy text", {}),
    "CarRacing": ("box2d", {"continuous": False}),
    "LunarLander": ("box2d", {}),
}
_PACKAGES = {
    "box2d": ("Box2D", "pip install 'distributed_muzero[box2d]'")
}  # family -> (package, its command)


class EnvironmentEntry(NamedTuple):
    """One line of `environment_ids()`."""

    id: str
    family: str
    kwargs: dict[str, Any]  # that it can't be trained without
    missing: str | None  # the command that installs what it lacks; None = ready


def register_environment(name: str, factory: Factory) -> None:
    """Makes `name`, and every id `name:…`, reach the factory, which gets the whole EnvironmentConfig.

    It holds for this process. The actors of a run are processes of their own: for them, let a package declare
    the factory as an entry point of the group `distributed_muzero.environments`. Raises EnvironmentFailure
    for a name that is taken, or that isn't made of letters, digits and `_ . -`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise EnvironmentFailure(f"environment name {name!r}: expected letters, digits and _ . - only")
    if _factories.get(name, factory) is not factory:
        raise EnvironmentFailure(f"environment {name!r} is registered already; choose another name")
    _factories[name] = factory


def make_environment(config: EnvironmentConfig) -> Environment:
    """Makes the environment of `config.id`.

    Raises UnknownEnvironmentError (no such id, or its package is missing) and EnvironmentFailure (refused
    kwargs, actions or observations that can't be trained).
    """
    prefix, colon, _ = config.id.partition(":")
    factory = _factories.get(prefix) or _installed_factory(prefix)
    if factory is not None:
        return factory(config)
    if colon:  # Gymnasium would import a module of that name
        known = ", ".join(_own_names())
        raise UnknownEnvironmentError(f"{config.id}: no family {prefix!r}. Families here: {known}")
    from distributed_muzero.environments.gymnasium import make_gymnasium

    _check_registered(config.id)
    return make_gymnasium(config)


def environment_ids() -> list[EnvironmentEntry]:
    """What can be trained here, own ones first. Makes none of them: ids that other packages have registered
    with Gymnasium are listed by name, and whether their spaces fit shows when they are made."""
    import gymnasium

    entries = [EnvironmentEntry(name, "own", {}, None) for name in _own_names()]
    for name, (family, kwargs) in _GYMNASIUM.items():
        newest = _versions(name)[-1:]
        entries += [EnvironmentEntry(id, family, kwargs, _missing(family)) for id in newest]
    for spec in gymnasium.registry.values():
        if not _is_gymnasiums_own(spec) and spec.namespace != "ALE":
            entries.append(EnvironmentEntry(spec.id, spec.namespace or "registered", {}, None))
    return entries


def _own_names() -> list[str]:
    installed = {entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    return sorted(installed | set(_factories))


def _installed_factory(name: str) -> Factory | None:
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        try:
            return entry.load()
        except Exception as error:
            message = f"environment {name!r} of {entry.value!r} can't be loaded: {error}"
            raise EnvironmentFailure(message) from error
    return None


def _check_registered(id: str) -> None:
    """Raises UnknownEnvironmentError, with what is near and what exists, unless Gymnasium knows the id."""
    import gymnasium

    if id in gymnasium.registry:
        return
    if id.startswith("ALE/"):
        raise UnknownEnvironmentError(f"{id}: Atari games can't be trained yet. Here are: {_known()}")
    name = _without_version(id)
    versions = _versions(name)
    if versions:
        problem = "the id needs its version" if name == id else "no such version, or it is out of date"
        raise UnknownEnvironmentError(f"{id}: {problem}; use {versions[-1]}")
    raise UnknownEnvironmentError(f"no environment {id!r}{_suggest(name)}. Here are: {_known()}")


def _versions(name: str) -> list[str]:
    """Registered ids `name-v…`, oldest first."""
    import gymnasium

    specs = [spec for spec in gymnasium.registry.values() if _without_version(spec.id) == name]
    return [spec.id for spec in sorted(specs, key=lambda spec: spec.version or 0)]


def _without_version(id: str) -> str:
    return re.sub(r"-v\d+$", "", id)


def _known() -> str:
    return ", ".join(entry.id for entry in environment_ids())


def _suggest(name: str) -> str:
    """` (did you mean 'CartPole-v1'?)`, blind to case and version; empty if nothing is near."""
    known = {_without_version(entry.id).lower(): entry.id for entry in environment_ids()}
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(known[match]) for match in close)}?)" if close else ""


def _missing(family: str) -> str | None:
    package, command = _PACKAGES.get(family, (None, None))
    return command if package and importlib.util.find_spec(package) is None else None


def _is_gymnasiums_own(spec: Any) -> bool:
    # Its entries that are functions stand for environments that have left it, and only raise.
    entry_point = spec.entry_point
    module = entry_point if isinstance(entry_point, str) else getattr(entry_point, "__module__", "")
    return module.startswith("gymnasium.") and spec.namespace in (None, "phys2d", "tabular")
