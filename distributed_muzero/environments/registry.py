"""From an id to an environment: own ones, families by prefix, installed ones (entry points), code by its path,
Gymnasium's.

Gymnasium, OpenSpiel, PettingZoo and mathy are imported on first use only, torch and ray never; `rllib:` reads what
Ray has been given by others.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import re
import warnings
from typing import Any, NamedTuple

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.base import Environment
from distributed_muzero.environments.chain import make_chain
from distributed_muzero.environments.custom import Factory, call_factory, how_to_trust, is_path, make_custom
from distributed_muzero.errors import EnvironmentFailure, UnknownEnvironmentError

ENTRY_POINTS = "distributed_muzero.environments"

_factories: dict[str, Factory] = {"chain": make_chain}


class Family(NamedTuple):
    """Games of another package, as `prefix:game`."""

    package: str  # to import
    module: str  # with `make(config)` and `trainable_games()`, the names to list
    command: str  # that installs the package
    example: str
    if_none: str = ""  # what it takes to have games, where there are none


_FAMILIES = {
    "openspiel": Family(
        "pyspiel",
        "distributed_muzero.environments.open_spiel",
        "pip install 'distributed_muzero[openspiel]'",
        "tic_tac_toe",
    ),
    "pettingzoo": Family(
        "pettingzoo",
        "distributed_muzero.environments.pettingzoo",
        "pip install 'distributed_muzero[pettingzoo]'",
        "connect_four_v3",
    ),
    "mathy": Family(
        "mathy_envs",
        "distributed_muzero.environments.mathy",
        "pip install 'distributed_muzero[mathy]'",
        "poly-easy",
    ),
    "rllib": Family(
        "ray",
        "distributed_muzero.rllib.environments",
        "pip install distributed_muzero",
        "MODULE:NAME",
        "a module that calls ray.tune.register_env, and --trust-env-code",
    ),
}

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
    missing: str | None  # what it lacks, or the command that installs that; None = ready


def register_environment(name: str, factory: Factory) -> None:
    """Makes `name`, and every id `name:…`, reach the factory, which gets the whole EnvironmentConfig.

    It holds for this process. The actors of a run are processes of their own: for them, let a package declare
    the factory as an entry point of the group `distributed_muzero.environments`. Raises EnvironmentFailure
    for a name that is taken, or that isn't made of letters, digits and `_ . -`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise EnvironmentFailure(f"environment name {name!r}: expected letters, digits and _ . - only")
    if name in _FAMILIES or _factories.get(name, factory) is not factory:
        raise EnvironmentFailure(f"environment {name!r} is registered already; choose another name")
    _factories[name] = factory


def make_environment(config: EnvironmentConfig) -> Environment:
    """Makes the environment of `config.id`.

    Raises UnknownEnvironmentError (no such id, or its package is missing) and EnvironmentFailure (refused
    kwargs, actions or observations that can't be trained, a factory of others that fails).
    """
    prefix, colon, _ = config.id.partition(":")
    if prefix in _FAMILIES:
        return _load_family(config.id, prefix).make(config)
    factory = _factories.get(prefix) or _installed_factory(prefix)
    if factory is not None:
        return call_factory(factory, config)
    if is_path(config.id) and config.code_folder is not None:
        return make_custom(config)
    if colon:  # Gymnasium would import a module of that name
        raise UnknownEnvironmentError(_no_family(config.id, prefix))
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
    entries += [entry for prefix in _FAMILIES for entry in _games_of(prefix)]
    for spec in gymnasium.registry.values():
        if not _is_gymnasiums_own(spec) and spec.namespace != "ALE":
            entries.append(EnvironmentEntry(spec.id, spec.namespace or "registered", {}, None))
    return entries


def _own_names() -> list[str]:
    installed = {entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    return sorted(installed | set(_factories))


def _load_family(id: str, prefix: str) -> Any:
    family = _FAMILIES[prefix]
    if importlib.util.find_spec(family.package) is None:
        raise UnknownEnvironmentError(f"{id} needs the package {family.package}: {family.command}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes on the imports of third parties
            return importlib.import_module(family.module)
    except ImportError as error:
        raise UnknownEnvironmentError(f"{id} can't be made: {error}. To play it: {family.command}") from error


def _games_of(prefix: str) -> list[EnvironmentEntry]:
    """Those of a family with their default parameters; one that stands for all where it has none here."""
    family = _FAMILIES[prefix]
    if importlib.util.find_spec(family.package) is None:
        return [EnvironmentEntry(f"{prefix}:{family.example}", prefix, {}, family.command)]
    names = _load_family(prefix, prefix).trainable_games()
    if not names:
        return [EnvironmentEntry(f"{prefix}:{family.example}", prefix, {}, family.if_none)]
    return [EnvironmentEntry(f"{prefix}:{name}", prefix, {}, None) for name in names]


def _no_family(id: str, prefix: str) -> str:
    families = sorted({*_own_names(), *_FAMILIES})
    close = difflib.get_close_matches(prefix.lower(), families, n=1, cutoff=0.6)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    message = f"{id}: no family {prefix!r}{hint}. Families here: {', '.join(families)}"
    return f"{message}. {how_to_trust(id)}" if is_path(id) else message


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
    """What there is in one line: families by an example, as they are long."""
    ids = [entry.id for entry in environment_ids() if entry.family not in _FAMILIES]
    return ", ".join(
        [*ids, *(f"{prefix}:{family.example} and others" for prefix, family in _FAMILIES.items())]
    )


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
