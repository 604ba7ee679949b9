"""Places for copies: at a real server that speaks S3, and in a folder (file://)."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.object_store import CREDENTIALS, ObjectStore


@pytest.fixture(scope="module")
def object_store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    yield store
    store.stop()


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(object_store) -> str:
    return object_store.new_bucket()


@pytest.fixture
def s3_uri(object_store, bucket) -> str:
    return object_store.uri(bucket, "runs", "r")


@pytest.fixture(params=["file", "s3"])
def any_uri(request, tmp_path) -> str:
    """Where a run's copy may lie; nothing is there yet."""
    if request.param == "file":
        return f"file://{tmp_path}/there/r"
    return request.getfixturevalue("s3_uri")


@pytest.fixture
def a_uri(tmp_path) -> str:
    return f"file://{tmp_path}/there/r"


@pytest.fixture
def silent_uri() -> Iterator[str]:
    """A server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield f"s3://bucket/r?region=x&scheme=http&endpoint_override=127.0.0.1:{server.getsockname()[1]}"
