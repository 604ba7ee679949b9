"""A game for two that needs no extra: the one of the example."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

EXAMPLES = Path(__file__).parents[2] / "examples"

Nim = run_path(str(EXAMPLES / "nim.py"))["Nim"]
