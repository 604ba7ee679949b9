"""Joining a Ray, with errors that a person can act on."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from distributed_muzero.cluster.run_control import NAMESPACE
from distributed_muzero.errors import ClusterError, first_line

CONNECT_SECONDS = 5.0


def connect(address: str, **options: Any) -> None:
    """`ray.init` at `address`: HOST:PORT of a cluster whose node this is, `auto`, or `local` for a new one.

    Raises ClusterError if no cluster answers there, it wants another token or has other versions, or none starts here.
    """
    check_answers(address)
    try:
        ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR, **options
        )
    # Ray raises a bare Exception where its processes don't start in time.
    except Exception as error:
        raise ClusterError(why_not(address, error)) from None


def why_not(address: str, error: Exception) -> str:
    """What `ray.init` said at an address, and what to do about it."""
    if address == "local":
        return (
            f"Ray can't be started on this machine: {first_line(error)}; --in-process trains without it. A machine "
            "that is busy may need longer: RAY_raylet_start_wait_time_s=200"
        )
    if str(error).startswith("Version mismatch"):
        versions = " ".join(str(error).split())
        return f"can't join the Ray cluster at {address}: {versions}; --address http://HOST:8265 takes any version"
    advice = "give its address with --address http://HOST:8265 or RAY_ADDRESS"
    if not isinstance(error, (ConnectionError, AuthenticationError)):
        return f"can't join a Ray cluster at {address}: {first_line(error)}; {advice}"
    # Ray reports a token that the cluster refuses as a cluster that doesn't answer.
    has_token = "another token than this one may be the cause" if uses_token() else "it may want a token"
    return (
        f"no Ray cluster answers at {address}: {first_line(error)}; {advice}. If it is up, {has_token}: "
        "RAY_AUTH_MODE=token, with RAY_AUTH_TOKEN or ~/.ray/auth_token"
    )


def check_answers(address: str) -> None:
    """Raises ClusterError for a HOST:PORT where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "//" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}: {first_line(error)}; where the dashboard is meant, write "
            "http://HOST:8265"
        ) from None


def uses_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
