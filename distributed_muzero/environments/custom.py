"""An environment by the path to its factory, `package.module:factory`, for code that no installed package declares."""

from __future__ import annotations

import importlib
import re
import sys

from distributed_muzero.config import TRUST_VARIABLE, EnvironmentConfig
from distributed_muzero.environments.base import Environment
from distributed_muzero.errors import EnvironmentFailure, UnknownEnvironmentError

PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
MEMBERS = ("spec", "initial_state", "step", "mask", "to_play", "truncated", "close")


def is_path(id: str) -> bool:
    return PATH.fullmatch(id) is not None


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
    if config.code_folder not in sys.path:
        sys.path.append(config.code_folder)
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise UnknownEnvironmentError(
            f"{config.id}: {error}; looked among what is installed and in {config.code_folder}"
        ) from error
    except AttributeError as error:
        raise UnknownEnvironmentError(f"{config.id}: {error}") from error
    except Exception as error:
        raise _failure(config.id, "the import", error) from error
    try:
        environment = factory(config)
    except EnvironmentFailure:
        raise
    except Exception as error:
        raise _failure(config.id, f"{name}(config)", error) from error
    missing = [member for member in MEMBERS if not hasattr(environment, member)]
    if missing:
        raise EnvironmentFailure(
            f"{config.id} returned {type(environment).__name__}, which lacks {', '.join(missing)}; expected an "
            "Environment as in distributed_muzero/environments/base.py"
        )
    return environment


def _failure(id: str, what: str, error: Exception) -> EnvironmentFailure:
    return EnvironmentFailure(f"{id}: {what} raised {type(error).__name__}: {error}")
