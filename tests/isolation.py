"""Runs a command where it can reach nothing else on the machine, and where nothing that it starts outlives it.

It gets processes, network, mounts, shared memory and a host name of its own (Linux namespaces). Some tests need that
for Ray: `ray stop` ends every Ray that it sees, and ports and /tmp/ray are the same for all. When the command ends, or
the process that started it is killed, the kernel ends what is left and takes the network down with it.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INSIDE = "DISTRIBUTED_MUZERO_TEST_IS_ISOLATED"
TOOLS = ("unshare", "setpriv", "ip", "mount")
NAMESPACES = ("--net", "--pid", "--mount", "--uts", "--ipc", "--mount-proc", "--propagation", "private")
# Ray takes the address that leads out of the machine, so there has to be one. The shell stays (`exit` is for that): as
# process 1 it buries what the command's processes leave behind.
SETUP = """
set -e
ip link set lo up
ip link add inside type veth peer name other
ip addr add 10.213.0.1/24 dev inside
ip link set inside up
ip link set other up
ip route add default via 10.213.0.2
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
"$@"
exit
"""


def why_not_isolated(*tools: str) -> str | None:
    """What is missing here for a command of its own world, with these further tools in it; None if nothing is."""
    if not sys.platform.startswith("linux"):
        return "this needs Linux namespaces"
    if os.geteuid() != 0:
        return "this needs root, for namespaces and mounts"
    if missing := [tool for tool in (*TOOLS, *tools) if shutil.which(tool, path=search_path()) is None]:
        return f"this needs {', '.join(missing)} (Debian: apt-get install openssh-server rsync iproute2 util-linux)"
    tried = subprocess.run(isolated(["true"]), capture_output=True, text=True, timeout=30)
    return f"namespaces can't be made here: {tried.stderr.strip()}" if tried.returncode else None


def search_path() -> str:
    """PATH with the folders of an administrator's tools."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def isolated(command: Sequence[str]) -> list[str]:
    """The command line that runs a command in a world of its own; it ends when whoever started it does."""
    return in_namespaces(["bash", "-c", SETUP, "isolated", *command])


def in_namespaces(command: Sequence[str]) -> list[str]:
    """The same, with a network that has no devices yet, and mounts that are still those of the caller."""
    return ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child", *NAMESPACES, *command]


def in_isolation(test: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a test run isolated: in a pytest of its own, whose output is the failure's message."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        if INSIDE in os.environ:
            test(*args, **kwargs)
            return
        test_id = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        pytest = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", test_id]
        done = subprocess.run(
            isolated(pytest),
            cwd=ROOT,
            # Nobody else can reach a Ray that is started there.
            env={**os.environ, "PATH": search_path(), "RAY_AUTH_MODE": "disabled", INSIDE: "1"},
            capture_output=True,
            text=True,
        )
        print(done.stdout)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    return run
