"""An environment by the path to its factory, `package.module:factory`, for code that no installed package declares."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from distributed_muzero.config import TRUST_VARIABLE, EnvironmentConfig
from distributed_muzero.environments.base import Environment
from distributed_muzero.errors import DistributedMuZeroError, EnvironmentFailure, UnknownEnvironmentError

Factory = Callable[[EnvironmentConfig], Environment]

MODULE = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
PATH = re.compile(rf"{MODULE}:[^\W\d]\w*")
MEMBERS = ("spec", "initial_state", "step", "mask", "to_play", "truncated", "close")


def is_path(id: str) -> bool:
    return PATH.fullmatch(id) is not None


def is_module(name: str) -> bool:
    """Whether this can be a module's name."""
    return re.fullmatch(MODULE, name) is not None


def how_to_trust(id: str) -> str:
    module, _, name = id.partition(":")
    return (
        f"If it is code of your own, training it imports the module {module} and calls its {name}: allow that with "
        f"--trust-env-code (or {TRUST_VARIABLE}=1)"
    )


def make_custom(config: EnvironmentConfig) -> Environment:
    """Imports the module and calls its factory with the section: it must return an `Environment`.

    The module is looked for among what is installed, then in the folder in which the command was given. Raises
    UnknownEnvironmentError unless the code is trusted and there, and EnvironmentFailure for what goes wrong in it.
    """
    module_name, _, name = config.id.partition(":")
    if config.code_folder is None:
        raise UnknownEnvironmentError(
            f"{config.id} isn't installed as an environment. {how_to_trust(config.id)}"
        )
    module = import_module(config, module_name)
    try:
        factory = getattr(module, name)
    except AttributeError as error:
        raise UnknownEnvironmentError(f"{config.id}: {error}") from error
    return call_factory(factory, config)


def import_module(config: EnvironmentConfig, name: str) -> ModuleType:
    """A module of trusted code: installed, or in `config.code_folder`, which must not be None.

    Raises UnknownEnvironmentError where it isn't there, and EnvironmentFailure for what its import raises.
    """
    assert config.code_folder is not None
    if config.code_folder not in sys.path:
        sys.path.append(config.code_folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UnknownEnvironmentError(
            f"{config.id}: {error}; looked among what is installed and in {config.code_folder}"
        ) from error
    except Exception as error:
        raise EnvironmentFailure(f"{config.id}: the import raised {_told(error)}") from error


def call_factory(factory: Factory, config: EnvironmentConfig) -> Environment:
    """What a factory that others wrote makes of the section.

    Raises EnvironmentFailure for whatever it raises, unless that is an error of ours, and unless it returns an
    `Environment`.
    """
    try:
        environment = factory(config)
    except DistributedMuZeroError:
        raise
    except Exception as error:
        kwargs = f" with kwargs {config.kwargs}" if config.kwargs else ""
        name = getattr(factory, "__name__", type(factory).__name__)
        raise EnvironmentFailure(f"{config.id}{kwargs}: {name}(config) raised {_told(error)}") from error
    missing = [member for member in MEMBERS if not _has(environment, member)]
    if missing:
        raise EnvironmentFailure(
            f"{config.id} returned {type(environment).__name__}, which lacks {', '.join(missing)}; expected an "
            "Environment as in distributed_muzero/environments/base.py"
        )
    return environment


def _has(environment: Any, member: str) -> bool:
    """Looks at the class first, as a property such as `truncated` may have no answer before a game."""
    kind = type(environment)
    if hasattr(kind, member) or (member == "truncated" and hasattr(kind, "__getattr__")):
        return True
    try:
        return hasattr(environment, member)
    except Exception:
        return False


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
