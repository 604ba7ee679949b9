"""What a producer of episodes offered and what it was told, written down to be checked against what the shards hold.

JSON lines: `invoke` before an offer leaves; then `ok` (acknowledged), `fail` (refused for good), `unknown` (no answer),
or nothing (to be offered again).

    {"event": "invoke", "id": "run/0/0/1", "hash": "sha256 of the episode", "time": 12.5}
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Literal

import numpy as np

from distributed_muzero.types import Episode
from distributed_muzero.workers.outbox import Insert
from distributed_muzero.workers.replay_shard import InsertReply

Event = Literal["invoke", "ok", "fail", "unknown"]


def content_hash(episode: Episode) -> str:
    """sha256 over the names and contents of all fields; arrays with dtype and shape."""
    digest = hashlib.sha256()
    for field, value in zip(fields(episode), _values(episode), strict=True):
        if isinstance(value, np.ndarray):
            digest.update(f"{field.name} {value.dtype.str} {value.shape} ".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        else:
            digest.update(f"{field.name} {value!r} ".encode(errors="backslashreplace"))
    return digest.hexdigest()


class History:
    """Writes one producer's history. A line is with the operating system when the call returns."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._clock = clock

    def write(self, event: Event, episodes: Iterable[Episode]) -> None:
        for episode in episodes:
            line = {"event": event, "id": episode.episode_id, "time": self._clock()}
            if event == "invoke":
                line["hash"] = content_hash(episode)
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class RecordedInsert:
    """An outbox's way to the shards, with its history written to `path`."""

    def __init__(self, insert: Insert, path: Path):
        self._insert = insert
        self._history = History(path)

    def __call__(self, offers: dict[int, list[Episode]]) -> dict[int, list[InsertReply]]:
        for episodes in offers.values():
            self._history.write("invoke", episodes)
        replies = self._insert(offers)
        for shard, episodes in offers.items():
            if shard not in replies:
                self._history.write("unknown", episodes)
                continue
            for episode, reply in zip(episodes, replies[shard], strict=False):
                if reply.status in ("stored", "duplicate"):
                    self._history.write("ok", [episode])
                elif reply.status == "rejected":
                    self._history.write("fail", [episode])
        return replies

    def close(self) -> None:
        self._history.close()


def _values(episode: Episode) -> tuple:
    return tuple(getattr(episode, field.name) for field in fields(episode))
