"""The person at the keyboard, outside the cluster: types commands, and all that they print can be read."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.isolation import ROOT
from tests.processes import descendants

BIN = Path(sys.prefix) / "bin"
COLOURS = re.compile(r"\x1b\[[0-9;]*m|\r")


class Operator:
    """Has a home of its own, and what is exported in its shell. Works in the checkout's top folder."""

    def __init__(self, home: Path):
        home.mkdir()
        self.home = home
        self.environment = {
            "HOME": str(home),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "LANG": "C.UTF-8",
            "COLUMNS": "110",
            "NO_COLOR": "1",
            "RAY_TMPDIR": str(home),  # `ray up` keeps its state there
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONWARNINGS": "ignore",
            "PYTHONUNBUFFERED": "1",  # what goes to the two outputs is shown in its order
        }

    def export(self, **variables: str) -> None:
        print("$ export", shlex.join(f"{name}={value}" for name, value in variables.items()), flush=True)
        self.environment.update(variables)

    def run(
        self,
        *command: object,
        exit_code: int | None = 0,
        timeout: float = 90,
        last: int | None = None,
        **variables: str,
    ) -> str:
        """Runs a command, with these variables before it, shows it with its output, and returns the output.

        last: so many lines are shown. Raises AssertionError for another exit code; with None, any will do.
        """
        words = [*(f"{name}={value}" for name, value in variables.items()), *map(str, command)]
        tail = f" | tail -n {last}" if last else ""
        print(f"\n$ {self.readable(shlex.join(words))}{tail}", flush=True)
        begun = time.monotonic()
        done = self.quietly(*command, timeout=timeout, **variables)
        seconds = time.monotonic() - begun
        lines = self.readable(done.stdout).rstrip().splitlines()
        print(*lines[-(last or 0) :], f"[{seconds:.1f} s]", sep="\n", flush=True)
        if exit_code is not None:
            assert done.returncode == exit_code, f"exit code {done.returncode}, expected {exit_code}"
        return done.stdout

    @contextmanager
    def meanwhile(self, *command: object) -> Iterator[None]:
        """A command that goes on in another window of the terminal."""
        print(f"\n$ {self.readable(shlex.join(map(str, command)))} &", flush=True)
        process = subprocess.Popen(
            [*map(str, command)],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield
        finally:
            for one in [*descendants(process.pid), process]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait(timeout=10)

    def quietly(
        self, *command: object, timeout: float = 90, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*map(str, command)],
            cwd=ROOT,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def readable(self, text: str) -> str:
        """Text without colours, and without the paths of this machine."""
        return COLOURS.sub("", text).replace(f"{self.home}/", "~/").replace(f"{ROOT}/", "")
