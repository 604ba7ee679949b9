"""A real server on this machine that speaks S3, for tests of what lies at a URI."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from urllib.parse import quote

import boto3
from moto.server import ThreadedMotoServer

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    # Nobody is asked for credentials or settings but these.
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


class ObjectStore:
    """Its content outlives `stop` and `start`, as long as this process lives. Set CREDENTIALS to use it."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.port = 0
        self.start()

    def start(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        with contextlib.redirect_stdout(io.StringIO()):
            self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self):
        """boto3's client: another implementation than the one under test."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def new_bucket(self) -> str:
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name

    def uri(self, bucket: str, *parts: str) -> str:
        path = "/".join(["s3:/", bucket, *parts])
        return f"{path}?region=us-east-1&endpoint_override={quote(self.url, safe='')}"

    def names(self, bucket: str) -> list[str]:
        """Of all objects, but for the empty ones that stand for folders."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return sorted(
            item["Key"] for page in pages for item in page.get("Contents", []) if item["Key"][-1] != "/"
        )

    @contextlib.contextmanager
    def asking_for_permission(self) -> Iterator[None]:
        """From now on, only users that were given a right may do anything; nobody was."""
        self._set_free_requests(0)
        try:
            yield
        finally:
            self._set_free_requests(float("inf"))

    def _set_free_requests(self, number: float) -> None:
        request = urllib.request.Request(
            f"{self.url}/moto-api/reset-auth",
            data=str(number).encode(),
            headers={"Content-Type": "text/plain"},
            method="POST",
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert json.loads(answer.read())["status"] == "ok"


def environment(store: ObjectStore) -> Mapping[str, str]:
    """For a process that is to find the store without a query in its URIs."""
    return {**CREDENTIALS, "AWS_ENDPOINT_URL": store.url, "AWS_REGION": "us-east-1"}
