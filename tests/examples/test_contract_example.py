"""examples/contract.py, run as a person would."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "contract.py"


@pytest.mark.slow
def test_five_plain_functions_learn_to_reach_the_better_end_from_every_cell():
    done = subprocess.run([sys.executable, EXAMPLE, "1"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    returns = [float(number) for number in re.findall(r"mean return (\d\.\d\d)", done.stdout)]
    assert len(returns) == 7
    assert (
        returns[0] == 0.2
    )  # untrained: all actions look alike, and the first one walks to the nearer, poorer end
    assert max(returns) == 1.0  # the known optimum from all eight cells
    assert returns[-1] >= 0.9  # at most one cell is left where it was


def test_the_example_stays_at_forty_lines():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 40
