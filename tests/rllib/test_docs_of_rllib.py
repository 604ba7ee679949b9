"""docs/rllib.md says what is there, and what it shows runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_muzero.rllib.settings import SETTINGS

PAGE = (Path(__file__).parents[2] / "docs" / "rllib.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
# Others need a run, or go on with what stands above them.
WHOLE = [block for block in BLOCKS if "MuZeroConfig(" in block or "register" in block]
WHOLE[0] += next(block for block in BLOCKS if 'from_checkpoint("saved")' in block)


def table_of_names():
    rows = ["| method | name | key of a run's config | |", "|---|---|---|---|"]
    for name, (method, key, meaning) in SETTINGS.items():
        rows.append(f"| `.{method}()` | `{name}` | {f'`{key}`' if key else ''} | {meaning} |")
    return "\n".join(rows)


def test_the_table_of_names_is_whole():
    between = PAGE.split("<!-- names: begin -->\n")[1].split("\n<!-- names: end -->")[0]
    assert between == table_of_names()


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("block", WHOLE, ids=range(len(WHOLE)))
def test_what_the_page_shows_runs(block, tmp_path):
    code = block + ("\nassert not results.errors\n" if "results =" in block else "")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_there_are_blocks_to_run():
    assert len(WHOLE) == 4
