"""Runs folders at a URI: which text is one, how it is put together, and where on this machine its runs lie."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

STATE_VARIABLE = "DISTRIBUTED_MUZERO_STATE_DIR"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def is_uri(text: str | Path) -> bool:
    """Whether a runs folder or run is named by a URI, such as s3://bucket/prefix, and not by a path or name."""
    return _SCHEME.match(str(text)) is not None


def join(uri: str, *names: str) -> str:
    """A folder below a URI's; its query (?region=…) stays at the end."""
    parts = urlsplit(uri)
    return parts._replace(path="/".join([parts.path.rstrip("/"), *names])).geturl()


def split_name(uri: str) -> tuple[str, str]:
    """The URI of the folder that a URI's folder lies in, and its name there: of a run, its runs folder."""
    parts = urlsplit(uri)
    parent, _, name = parts.path.rstrip("/").rpartition("/")
    return parts._replace(path=parent).geturl(), name


def shown(uri: str) -> str:
    """As people read it: without the query."""
    return urlsplit(join(uri))._replace(query="").geturl()


def local_runs_dir(uri: str) -> Path:
    """The folder on this machine for the runs of a URI: one for each URI, with a name that tells which.

    It lies in $DISTRIBUTED_MUZERO_STATE_DIR, else in $XDG_STATE_HOME or ~/.local/state: no cache, as until the next
    copy it is the only place of what the run has just done.
    """
    uri = join(uri)
    parts = urlsplit(uri)
    readable = re.sub(r"[^A-Za-z0-9]+", "-", parts.netloc.rpartition("@")[2] + parts.path).strip("-")[:48]
    short_hash = hashlib.sha256(uri.encode()).hexdigest()[:8]
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    state = Path(os.environ.get(STATE_VARIABLE) or home / "distributed_muzero")
    return state.expanduser().absolute() / f"{readable}-{short_hash}"
