"""The image: linted, pinned, without root, and made of no more than it needs. Nothing here can build it."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import ray

from distributed_muzero.mirror.uri import STATE_VARIABLE

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
TEXT = DOCKERFILE.read_text(encoding="utf-8")
HADOLINT = Path(sys.executable).parent / "hadolint"


def instructions(name: str) -> list[str]:
    joined = re.sub(r"\\\n\s*", "", TEXT)
    return re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)


def lint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HADOLINT, "-"], input=text, capture_output=True, text=True, timeout=60)


def in_context(path: Path) -> bool:
    """Whether .dockerignore lets a file into the context: the last pattern that fits it or a parent decides."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    names = [str(parent) for parent in [path, *path.parents][:-1]]
    kept = True
    for pattern in [line for line in lines if line and not line.startswith("#")]:
        anywhere = pattern.lstrip("!").removeprefix("**/")
        depth_matters = "**/" not in pattern
        fits = any(fnmatch(name if depth_matters else Path(name).name, anywhere) for name in names)
        kept = pattern.startswith("!") if fits else kept
    return kept


def context() -> list[Path]:
    tops = [path for path in ROOT.iterdir() if in_context(path.relative_to(ROOT))]
    found = [file for top in tops for file in [top, *top.rglob("*")] if file.is_file()]
    return [file for file in found if in_context(file.relative_to(ROOT))]


def test_hadolint_has_nothing_to_say():
    done = lint(TEXT)
    assert done.returncode == 0, done.stdout
    assert not list(ROOT.glob(".hadolint.y*ml")), "nothing is silenced"


@pytest.mark.parametrize("slip", ["RUN pip install torch", "RUN apt-get update", "FROM ubuntu", "USER root"])
def test_hadolint_finds_a_slip(slip):
    assert lint(f"{TEXT}\n{slip}\n").returncode == 1


def test_bases_are_rays_images_of_our_version():
    bases = [base.split()[0] for base in instructions("FROM")]
    assert bases.pop() == "${DEVICE}"
    tags = {f"rayproject/ray:{ray.__version__}-py311-{device}" for device in ("cpu", "gpu")}
    assert set(bases) == tags
    assert instructions("ARG") == ["DEVICE=cpu", "TORCH_INDEX"]


def test_the_user_is_no_root_and_named_by_number():
    [user] = instructions("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_torch_comes_first_and_installs_are_constrained_and_leave_no_cache():
    *torches, wheel, project = instructions("RUN")
    assert all(line.startswith("pip install ") and line.endswith(" torch") for line in torches)
    assert ["TORCH_INDEX" in line for line in torches] == [True, False]
    assert all("--no-cache-dir" in line for line in [*torches, wheel, project])
    assert all("-c /tmp/constraints.txt" in line for line in [*torches, project])
    assert "--no-deps" in wheel


def test_what_is_written_goes_where_a_read_only_root_lets_it():
    [variables] = instructions("ENV")
    for name in ("NUMBA_CACHE_DIR", STATE_VARIABLE):
        assert re.search(rf"\b{name}=/tmp/\w+", variables), name


def test_the_context_is_small_and_holds_what_an_installation_needs():
    files = context()
    names = {str(file.relative_to(ROOT)) for file in files}
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= names
    assert {"distributed_muzero/presets/cartpole.yaml", "distributed_muzero/py.typed"} <= names
    packaged = {name for name in names if "/" in name}
    assert packaged == {
        str(file.relative_to(ROOT))
        for file in (ROOT / "distributed_muzero").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert len(names - packaged) == 4
    assert sum(file.stat().st_size for file in files) < 5 * 2**20


@pytest.mark.parametrize(
    "path", [".git/config", "runs/a/config.yaml", "tests/games.py", "distributed_muzero.egg-info/PKG-INFO"]
)
def test_what_no_image_needs_stays_out(path):
    assert not in_context(Path(path))
