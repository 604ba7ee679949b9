"""Every `distributed-muzero …` line of what is deployed is one that the program knows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests import test_docs

ROOT = Path(__file__).parent.parent.parent
SHIPPED = [
    ROOT / "cluster.yaml",
    *sorted(path for path in (ROOT / "deploy").rglob("*") if path.suffix in (".yaml", ".md")),
    *sorted((ROOT / "docker").iterdir()),
]


def command_lines(text: str) -> list[list[str]]:
    """Lines that begin with the program's name, be they comments or the first line of a folded YAML text."""
    found = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        begun = re.match(r"(?P<indent>\s*)(?:#\s*)?(?:exec )?distributed-muzero (?P<rest>.*)", line)
        if begun is None:
            continue
        # A folded text goes on in the lines below, at the same indent.
        going_on = []
        for later in lines[number + 1 :] if begun["indent"] and "#" not in line else []:
            if not re.match(rf"{begun['indent']}\S", later):
                break
            going_on.append(later)
        found.append(shlex.split(" ".join([begun["rest"], *going_on]), comments=True))
    return found


COMMANDS = [
    (str(path.relative_to(ROOT)), words)
    for path in SHIPPED
    for words in command_lines(path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: str(value)[:60])
def test_commands_and_options_exist(page, words):
    test_docs.test_commands_and_options_exist(page, words)


def test_the_files_that_run_something_were_looked_at():
    pages = {page for page, _ in COMMANDS}
    jobs = {"deploy/kuberay/job/rayjob.yaml", "deploy/kuberay/minikube/kustomization.yaml"}
    assert {"cluster.yaml", "deploy/README.md", *jobs} <= pages
    words = [words for page, words in COMMANDS if page in jobs]
    assert all(line[0] == "train" and line[-2] == "--set" for line in words)
