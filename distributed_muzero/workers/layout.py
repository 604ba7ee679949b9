"""Brings a run's replay into the layout that its config asks for, before its shards open."""

from __future__ import annotations

import time
from pathlib import Path

from distributed_muzero.config import Config
from distributed_muzero.errors import LogError
from distributed_muzero.replay.reshard import finish_or_undo, num_shards_of, reshard

RETRY_SECONDS = 0.25


def with_shards(config: Config, num_shards: int) -> Config:
    """The config with another number of shards, checked like any."""
    replay = {**config.replay.model_dump(), "num_shards": num_shards}
    return Config.model_validate({**config.model_dump(), "replay": replay})


def lay_out(replay: Path, config: Config, patience_seconds: float = 0.0) -> None:
    """Settles what a kill left of an earlier change, and lays the episodes out anew if they lie otherwise.

    patience_seconds: for shards that are just ending. Raises LogError; the episodes are as they were then.
    """
    finish_or_undo(replay)
    num_shards = num_shards_of(replay)
    deadline = time.monotonic() + patience_seconds
    while num_shards not in (0, config.replay.num_shards):
        try:
            reshard(replay, with_shards(config, num_shards), config)
            return
        except LogError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(RETRY_SECONDS)
