"""docs/rllib.md says what is there, and what it shows runs."""

import re
from pathlib import Path

import pytest

from distributed_muzero.rllib.settings import SETTINGS

PAGE = (Path(__file__).parents[2] / "docs" / "rllib.md").read_text()


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
def test_what_the_page_shows_runs(own_ray, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    whole = [
        block for block in blocks if "MuZeroConfig(" in block or "register" in block
    ]  # others need a run
    assert len(whole) == 4
    for block in whole:
        exec(compile(block, "docs/rllib.md", "exec"), {})
    assert re.search(r"^2 [\d.]+$", capsys.readouterr().out, re.MULTILINE)
