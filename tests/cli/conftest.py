"""Runs folders at a URI, and machines that know nothing but the URI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.object_store import ObjectStore, environment


@pytest.fixture(scope="module")
def object_store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    yield store
    store.stop()


@pytest.fixture
def on_machine(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Commands run on the machine of a name from now on: it has a disk of its own."""

    def go_to(name: str) -> Path:
        disk = tmp_path / name
        monkeypatch.setenv("DISTRIBUTED_MUZERO_STATE_DIR", str(disk))
        return disk

    go_to("a")
    return go_to


@pytest.fixture
def s3(object_store, monkeypatch, on_machine) -> str:
    """The runs folder, which the commands know from the environment."""
    for name, value in environment(object_store).items():
        monkeypatch.setenv(name, value)
    uri = f"s3://{object_store.new_bucket()}/runs"
    monkeypatch.setenv("DISTRIBUTED_MUZERO_RUNS_DIR", uri)
    return uri


@pytest.fixture
def there(tmp_path, monkeypatch, on_machine) -> str:
    """A runs folder in a folder (file://), copied to often."""
    monkeypatch.setenv("DISTRIBUTED_MUZERO_COPY_SECONDS", "0.3")
    uri = f"file://{tmp_path}/there"
    monkeypatch.setenv("DISTRIBUTED_MUZERO_RUNS_DIR", uri)
    return uri
