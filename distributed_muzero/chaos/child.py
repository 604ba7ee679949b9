"""Processes that the checks start: a check in a process of its own, and the end of a whole session."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from distributed_muzero.errors import DistributedMuZeroError

CHILD_TIMEOUT_SECONDS = 300.0
DEATH_SECONDS = 10.0
POLL_SECONDS = 0.05


def run_with_offsets(module: str, folder: Path, seed: int, n: int) -> dict[str, Any]:
    """What `python -m module` prints as JSON. Raises DistributedMuZeroError if it fails."""
    arguments = [f"--folder={folder}", f"--seed={seed}", f"--offsets={n}"]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=CHILD_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise DistributedMuZeroError(f"{module} in {folder} ended with code {done.returncode}: {done.stderr}")
    return json.loads(done.stdout)


# A process that was started with start_new_session leads a session, and whatever it starts belongs to it: also when
# the leader has died and its children are orphans. Until it is waited for, a dead leader stays a zombie and keeps its
# number, so that no foreign session can be taken for its own. poll() and send_signal() wait for it, too.


def has_ended(leader: subprocess.Popen[bytes]) -> bool:
    """Whether it is dead, or a zombie, which it stays."""
    if leader.returncode is not None:
        return True
    return os.waitid(os.P_PID, leader.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def living(leader: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of its session that are alive, orphans too; none once it was waited for."""
    found: list[psutil.Process] = []
    if leader.returncode is not None:
        return found
    for pid in psutil.pids():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if os.getsid(pid) == leader.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_session(leader: subprocess.Popen[bytes]) -> None:
    """Kills all processes of its session and waits for it. Raises DistributedMuZeroError if one can't be killed."""
    if leader.returncode is not None:
        return
    os.kill(leader.pid, signal.SIGKILL)
    if not becomes_true(lambda: not _kill(living(leader)), DEATH_SECONDS):
        raise DistributedMuZeroError(f"these processes can't be killed: {living(leader)}")
    leader.wait()


def becomes_true(condition: Callable[[], Any], seconds: float) -> bool:
    """Whether the condition holds, now or within some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _kill(processes: list[psutil.Process]) -> list[psutil.Process]:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return processes
