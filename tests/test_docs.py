"""What is written down stays true: commands, links, presets, the numbers of decisions."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import typer

from distributed_muzero.cli.main import app
from distributed_muzero.config import preset_names

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "deploy" / "README.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def shell_lines(text: str) -> list[list[str]]:
    lines = [line for block in fenced(text, "sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [
    (name_of(page), words[1:])
    for page in PAGES
    for words in shell_lines(page.read_text(encoding="utf-8"))
    if words[0] == "distributed-muzero"
]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: str(value)[:60])
def test_commands_and_options_exist(page, words):
    command: click.Command = typer.main.get_command(app)
    context = click.Context(command, info_name="distributed-muzero")
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None, f"{page}: no command {name}"
        command, context = found, click.Context(found, info_name=name, parent=context)
    command.make_context(context.info_name, list(words))  # parses, runs nothing; raises for an unknown option


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("#"):
            path = (page.parent / target.split("#")[0]).resolve()
            assert path.exists(), f"{name_of(page)} links to {target}, which doesn't exist"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_as_code_exist(page):
    package = ROOT / "distributed_muzero"
    for target in re.findall(r"`([a-z_]+/[a-z_/]+\.py)\b", page.read_text(encoding="utf-8")):
        assert (ROOT / target).exists() or (package / target).exists(), f"{name_of(page)} names {target}"


@pytest.mark.parametrize("page", DECISIONS, ids=lambda path: path.name)
def test_decisions_name_tests_that_exist(page):
    text = page.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("- `tests/")]
    assert lines, "a decision says where it is tested"
    for line in lines:
        path, *tests = re.findall(r"`([^`]+)`", line)
        source = (ROOT / path).read_text(encoding="utf-8")
        for test in tests:
            assert f"def {test}(" in source, f"{page.name}: {path} has no {test}"


def test_decisions_are_numbered_without_gaps_and_short():
    assert [int(path.name[:4]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))
    for path in DECISIONS:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith(f"# {int(path.name[:4])}. ")
        assert len(lines) < 40


def test_readme_names_every_preset_and_no_other():
    named = re.search(r"`config` shows presets \(([^)]*)\)", README)
    assert named is not None
    assert sorted(re.findall(r"`([\w-]+)`", named[1])) == preset_names()
    assert set(re.findall(r"--preset ([\w-]+)", README)) <= set(preset_names())


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        for words in shell_lines(page.read_text(encoding="utf-8")):
            if words[0] == "make":
                assert words[1] in targets, f"{name_of(page)}: make {words[1]}"


@pytest.mark.slow
def test_the_readmes_environment_can_be_trained_as_it_says(tmp_path, monkeypatch):
    [code] = [block for block in fenced(README, "python") if "EnvironmentSpec" in block]
    [declared] = [tomllib.loads(block) for block in fenced(README, "toml")]
    [command] = [words for words in shell_lines(README) if "coin" in words]
    (tmp_path / "my_package.py").write_text(code, encoding="utf-8")
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n", encoding="utf-8"
    )
    [(group, entries)] = declared["project"]["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = ["--in-process", "--runs-dir", str(tmp_path / "runs"), "--name", "coin"]
    done = subprocess.run(
        [sys.executable, "-m", "distributed_muzero", *command[1:], *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "mean return 1.0" in done.stdout.splitlines()[-1]  # it sees the side, so it can always guess it
