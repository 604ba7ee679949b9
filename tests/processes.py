"""Runs the command line as a user would, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "distributed_muzero", *map(str, arguments)]


def run(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout)


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on meanwhile; with its own folder for Ray, and ended with everything it started."""
    # Sockets live in Ray's folder, and their paths may not be longer than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="dm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_TMPDIR": folder},
        )
        try:
            yield process
        finally:
            left = descendants(process.pid)
            process.kill()
            for child in left:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            process.communicate()


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def find_role(pid: int, role: str) -> list[psutil.Process]:
    """The processes of a Ray class (its name begins the title that Ray gives them) below the process `pid`."""
    found = []
    for process in descendants(pid):
        try:
            if " ".join(process.cmdline()).startswith(f"ray::{role}"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_for(what: str, condition: Callable[[], Any], timeout: float = 90) -> Any:
    """Polls until the condition gives something true, and returns that."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited {timeout:g} s in vain for: {what}")


def status(run_folder: Path) -> dict[str, Any]:
    """The run's last status; empty before the first."""
    try:
        return json.loads((run_folder / "status.json").read_text())
    except FileNotFoundError:
        return {}
