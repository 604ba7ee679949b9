"""A folder at a URI: files are listed, read, replaced at once and removed, each with a time limit."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import pyarrow.fs
from pyarrow.lib import ArrowException

from distributed_muzero.errors import RunError
from distributed_muzero.mirror.uri import shown

CONNECT_SECONDS = 3.0
REQUEST_SECONDS = 5.0  # without a byte
# So many times a request is tried. A process that ends waits for the one under way; a push is tried again anyhow.
ATTEMPTS = 2
CHUNK_BYTES = 8 * 1024**2  # what is held in memory of a file
# There, a file appears under its name when it is whole. Elsewhere it is written under another name first.
OBJECT_STORES = {"s3", "gcs", "abfs"}
S3_OPTIONS = {"region", "scheme", "endpoint_override"}
EXAMPLES = "s3://bucket/prefix, gs://bucket/prefix or file:///folder"
TEMPORARY = ".uploading-"
ADVICE = {
    "there is no such bucket: create it, or correct its name": ("NO_SUCH_BUCKET", "NoSuchBucket"),
    "the credentials are missing or may not do this: check them (AWS_ACCESS_KEY_ID, AWS_PROFILE, "
    "GOOGLE_APPLICATION_CREDENTIALS or the machine's role) and what they may read and write": (
        "ACCESS_DENIED",
        "INVALID_ACCESS_KEY_ID",
        "InvalidAccessKeyId",
        "SIGNATURE_DOES_NOT_MATCH",
        "HTTP status 401",
        "HTTP status 403",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "Permission denied",
    ),
    "it can't be reached: check the name, the region and the network": (
        "NETWORK_CONNECTION",
        "UNAVAILABLE",
        "REQUEST_TIMEOUT",
    ),
}


class RemoteError(Exception):
    """The store at a URI refused or couldn't be reached; says what was tried, what came, and what to do."""


class Remote:
    """A folder at a URI. Names are relative to it, with `/`. Whatever goes wrong raises RemoteError."""

    def __init__(self, uri: str):
        """Raises RunError for a URI that can't be one."""
        self.uri = uri
        self._files, self._root = _open(uri)
        self._is_object_store = self._files.type_name in OBJECT_STORES
        self._temporary = f"{TEMPORARY}{uuid.uuid4().hex}"

    def files(self) -> dict[str, int]:
        """Bytes by name of all files below, hidden ones too; empty if there is no such folder."""
        selector = pyarrow.fs.FileSelector(self._root, recursive=True, allow_not_found=True)
        with self._reported("list"):
            return {
                self._name(info): info.size for info in self._files.get_file_info(selector) if info.is_file
            }

    def folders(self) -> list[str]:
        """The folders in this one."""
        selector = pyarrow.fs.FileSelector(self._root, allow_not_found=True)
        with self._reported("list"):
            found = self._files.get_file_info(selector)
        return [self._name(info) for info in found if info.type == pyarrow.fs.FileType.Directory]

    def existing(self, *names: str) -> list[str]:
        """Those of the names that are files."""
        with self._reported("read"):
            found = self._files.get_file_info([self._path(name) for name in names])
        return [name for name, info in zip(names, found, strict=True) if info.is_file]

    def read(self, name: str) -> bytes | None:
        """A small file's content; None if there is none."""
        with self._reported("read", name):
            try:
                with self._files.open_input_stream(self._path(name), compression=None) as stream:
                    return stream.read()
            except FileNotFoundError:
                return None

    def changed_at(self, name: str) -> float | None:
        """When a file was written last, in seconds since 1970 by the store's clock; None if there is none."""
        with self._reported("read", name):
            info = self._files.get_file_info(self._path(name))
        return info.mtime_ns / 1e9 if info.is_file and info.mtime_ns is not None else None

    def download(self, name: str, path: Path) -> bool:
        """Copies a file, durably but for its name; False if there is none any more. Raises OSError as well."""
        with self._reported("read", name):
            try:
                stream = self._files.open_input_stream(self._path(name), compression=None)
            except FileNotFoundError:
                return False
        with stream, path.open("wb") as file:
            while True:
                with self._reported("read", name):
                    chunk = stream.read(CHUNK_BYTES)
                if not chunk:
                    break
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return True

    def write(
        self, name: str, file: BinaryIO, num_bytes: int, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """Copies the next bytes of an open file, fewer if it ends before. Until all are there, the old file stays.

        meanwhile: called between chunks of an upload that may take long, where its RemoteError ends nothing, and before
        the file gets its name; may raise. May write small files. Raises OSError if the open file can't be read.
        """
        first = file.read(min(num_bytes, CHUNK_BYTES))
        is_small = len(first) == num_bytes
        if is_small and self._is_object_store:
            with self._reported("write", name):
                self._write_stream(name, iter([first]))
            return
        # A stream that broke off may close with what it got so far: never under the file's own name.
        temporary = f"{self._temporary}-small" if is_small else self._temporary
        with self._reported("write", name):
            self._write_stream(temporary, _chunks(first, file, num_bytes, meanwhile))
        if not is_small:
            meanwhile()
        with self._reported("write", name):
            if not self._is_object_store:
                self._make_parent(name)
            self._files.move(self._path(temporary), self._path(name))

    def write_bytes(self, name: str, data: bytes) -> None:
        self.write(name, io.BytesIO(data), len(data))

    def copy(self, source: str, target: str) -> None:
        """A copy that the store makes by itself."""
        with self._reported("copy", source):
            if not self._is_object_store:
                self._make_parent(target)
            self._files.copy_file(self._path(source), self._path(target))

    def remove(self, name: str) -> None:
        with self._reported("remove", name), suppress(FileNotFoundError):
            self._files.delete_file(self._path(name))

    def remove_folder(self, name: str) -> None:
        with self._reported("remove", name), suppress(FileNotFoundError):
            self._files.delete_dir(self._path(name))

    def remove_leftovers(self) -> None:
        """What uploads that broke off, or still go on elsewhere, have written so far."""
        selector = pyarrow.fs.FileSelector(self._root, allow_not_found=True)
        with self._reported("list"):
            names = [self._name(info) for info in self._files.get_file_info(selector)]
        for name in names:
            if name.startswith(TEMPORARY):
                self.remove(name)

    def _write_stream(self, name: str, chunks: Iterator[bytes]) -> None:
        if not self._is_object_store:
            self._make_parent(name)
        with self._files.open_output_stream(self._path(name), compression=None) as stream:
            for chunk in chunks:
                stream.write(chunk)

    def _make_parent(self, name: str) -> None:
        self._files.create_dir(str(PurePosixPath(self._path(name)).parent), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _name(self, info: Any) -> str:
        return info.path.removeprefix(f"{self._root}/")

    @contextmanager
    def _reported(self, what: str, name: str = "") -> Iterator[None]:
        try:
            yield
        except _Unreadable as error:
            raise error.cause from None
        except (OSError, ArrowException) as error:
            place = "/".join(filter(None, [shown(self.uri), name]))
            raise RemoteError(f"can't {what} {place}: {_shortened(error)}; {_advice(error)}") from error


class _Unreadable(Exception):
    """The local file that is being written can't be read: not the store's fault."""

    def __init__(self, cause: OSError):
        super().__init__(str(cause))
        self.cause = cause


def _chunks(first: bytes, file: BinaryIO, num_bytes: int, meanwhile: Callable[[], None]) -> Iterator[bytes]:
    yield first
    num_left = num_bytes - len(first)
    while num_left:
        with suppress(RemoteError):
            meanwhile()
        try:
            chunk = file.read(min(num_left, CHUNK_BYTES))
        except OSError as error:
            raise _Unreadable(error) from error
        if not chunk:
            return
        num_left -= len(chunk)
        yield chunk


def _open(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it without a slash at the end."""
    parts = urlsplit(uri)
    if ":" in parts.netloc.rpartition("@")[0]:
        raise RunError(
            f"a URI of {parts.scheme}:// with a key or password in it, which logs would show; leave it out and give it "
            "by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or a credentials file"
        )
    if parts.fragment or not _is_plain(unquote(parts.path)) or "://" not in uri:
        raise RunError(f"can't use the URI {uri!r}: expected one like {EXAMPLES}, without #, .. or //")
    try:
        if parts.scheme == "s3":
            files, path = _open_s3(uri)
        else:
            files, path = pyarrow.fs.FileSystem.from_uri(_with_time_limit(uri))
    except (OSError, ArrowException) as error:
        raise RunError(
            f"can't use the URI {uri!r}: {_shortened(error)}; expected one like {EXAMPLES}"
        ) from None
    if not path.strip("/"):
        raise RunError(f"can't use the URI {uri!r}: it names no folder; expected one like {EXAMPLES}")
    return files, path.rstrip("/")


def _open_s3(uri: str) -> tuple[Any, str]:
    """As pyarrow's own reading of the URI, but with time limits, bounded memory and the environment's region."""
    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query))
    if unknown := options.keys() - S3_OPTIONS:
        raise RunError(
            f"can't use the URI {uri!r}: unknown option {', '.join(sorted(unknown))}; "
            f"an s3:// URI knows {', '.join(sorted(S3_OPTIONS))}"
        )
    if not parts.netloc:
        raise RunError(f"can't use the URI {uri!r}: it names no bucket; expected one like s3://bucket/prefix")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options.setdefault("endpoint_override", endpoint)
    known_region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if known_region:
        options.setdefault("region", known_region)
    if "endpoint_override" not in options and "region" not in options:
        options["region"] = _find_region(uri, parts.netloc)
    files = pyarrow.fs.S3FileSystem(
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        background_writes=False,
        allow_delayed_open=True,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        **options,
    )
    return files, parts.netloc + unquote(parts.path)


def _find_region(uri: str, bucket: str) -> str:
    try:
        return pyarrow.fs.resolve_s3_region(bucket)
    except (OSError, ArrowException) as error:
        raise RunError(
            f"can't find out the region of {shown(uri)}: {_shortened(error)}; {_advice(error)}, or name the region by "
            "AWS_REGION or ?region=… at the URI's end"
        ) from None


def _with_time_limit(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.scheme not in ("gs", "gcs") or "retry_limit_seconds" in parts.query:
        return uri
    limit = urlencode({"retry_limit_seconds": ATTEMPTS * REQUEST_SECONDS})
    return parts._replace(query="&".join(filter(None, [parts.query, limit]))).geturl()


def _is_plain(path: str) -> bool:
    """No part that leads elsewhere, or that a store and a file system take differently."""
    inner = path.removeprefix("/").removesuffix("/")
    return not inner or not {"", ".", ".."} & set(inner.split("/"))


def _shortened(error: BaseException) -> str:
    return str(error).splitlines()[0].partition(" (Request ID")[0].rstrip(".") if str(error) else repr(error)


def _advice(error: BaseException) -> str:
    for advice, signs in ADVICE.items():
        if any(sign in str(error) for sign in signs):
            return advice
    return "check the URI and the store behind it"
