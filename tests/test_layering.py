"""Who may import whom (docs/architecture.md): arrows go down only, and heavy packages stay in their layers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "distributed_muzero"

# From the ground up. A part may import its own level's other parts only where NEIGHBOURS says so.
LEVELS = [
    {"errors", "version", "files"},
    {"config", "types"},
    {"search", "environments", "run_folder", "checkpoint", "mirror"},
    {"algorithm", "networks", "observability"},
    {"replay", "matches"},
    {"workers"},
    {"cluster", "benchmarks"},
    {"mathy", "rllib"},
    {"chaos"},
    {"cli"},
    {"__init__", "__main__"},
]
NEIGHBOURS = {
    ("algorithm", "networks"),
    ("networks", "algorithm"),  # value_transform: how heads encode a number
    ("config", "types"),
    ("observability", "run_folder"),
}
ONLY_IN = {
    "ray": {"cluster", "rllib"},
    "torch": {"algorithm", "networks", "workers", "benchmarks", "chaos", "mathy", "rllib"},
}
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            if node.module == "distributed_muzero":
                found += [f"distributed_muzero.{alias.name}" for alias in node.names]
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    part = part_of(path)
    if part == "__init__":
        return  # the public names, loaded on first use
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package in ONLY_IN:
            assert part in ONLY_IN[package], f"{path.name} imports {package}"
        if package == "distributed_muzero" and rest:
            other = rest.split(".")[0]
            allowed = part == other or LEVEL[other] < LEVEL[part] or (part, other) in NEIGHBOURS
            assert allowed, f"{part} imports {other}, which stands above or beside it"


def test_every_part_has_a_level():
    assert {part_of(path) for path in FILES} <= LEVEL.keys()


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_in_process_training_loads_no_ray():
    assert "ray" not in loaded_by("import distributed_muzero.workers.local, distributed_muzero.cli.main")


def test_search_loads_neither_torch_nor_ray():
    assert not {"torch", "ray"} & loaded_by("import distributed_muzero.search.policies")


def test_a_replay_shard_loads_no_torch():
    loaded = loaded_by("import distributed_muzero.workers.builder, distributed_muzero.workers.replay_shard")
    assert not {"torch", "numba"} & loaded


def test_a_driver_loads_no_torch():
    """Of the command line too, which stays as the driver's process."""
    statement = (
        "from distributed_muzero.cluster import driver, session; from distributed_muzero.cli.train import check_parts;"
        " from distributed_muzero.config import Config; check_parts(Config())"
    )
    assert "torch" not in loaded_by(statement)


def test_the_package_alone_loads_nothing_heavy():
    assert not {"torch", "ray", "numpy", "numba"} & loaded_by("import distributed_muzero")


def test_nothing_but_the_part_for_it_imports_rllib():
    others = [path for path in FILES if part_of(path) != "rllib"]
    assert not any(name.startswith("ray.rllib") for path in others for name in imports(path))
