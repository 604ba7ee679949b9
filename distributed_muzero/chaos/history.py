"""What producers of episodes were told (workers/history.py), against what the shards hold; as Jepsen does it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from math import inf
from pathlib import Path
from typing import NamedTuple

from distributed_muzero.config import AlgorithmConfig, ReplayConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.replay import log_format, schema
from distributed_muzero.replay.schema import Kind, StoredEpisode
from distributed_muzero.replay.store import EpisodeStore
from distributed_muzero.workers.history import content_hash

MAX_EXAMPLES = 10


class Verdict(NamedTuple):
    """Numbers of episodes. All is well if `lost`, `duplicates`, `changed` and `uninvited` are 0."""

    acknowledged: int
    stored: int  # a restarted shard holds them
    evicted: int  # it remembers that it held them, and there was no room
    lost: int  # acknowledged, yet neither stored nor evicted
    duplicates: int  # copies beyond the first, in the logs or in a restarted shard
    changed: int  # stored with another content than was offered
    uninvited: int  # stored, yet never offered
    unknown: int  # offered, and never answered for good
    examples: tuple[str, ...] = ()  # what is wrong, for the first few

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.duplicates or self.changed or self.uninvited)


def check(
    histories: Sequence[Path],
    shard_folders: Sequence[Path],
    capacity: int,
    damaged: Sequence[StoredEpisode] = (),
) -> Verdict:
    """Compares what was acknowledged with what a restart of the shards would find.

    shard_folders: with `episodes/` and `journal/`; they are copied, and only read.
    capacity: rows that a shard's ring holds (`EpisodeRing.capacity`); an episode of T steps takes T + 1.
    damaged: episodes whose record was damaged on purpose; they may be missing.
    The histories' clocks must be one clock. Raises LogError for a folder that can't be recovered.
    """
    told = _read_histories(histories)
    invoked, acknowledged = told.hashes, told.acknowledged
    found = Findings(told, capacity, damaged)
    for folder in shard_folders:
        found.read(folder)
    excused = found.held | found.evicted | {item.episode.episode_id for item in damaged}
    lost = [name for name in acknowledged if name not in excused]
    duplicates = sum(count - 1 for count in found.copies.values() if count > 1)
    uninvited = found.hashes.keys() - invoked.keys()
    changed = [
        name
        for name, hashes in found.hashes.items()
        if name in invoked and (hashes != {invoked[name]} or name in found.changed)
    ]
    examples = [f"{name} is lost" for name in lost]
    examples += [f"{name} is stored {count} times" for name, count in found.copies.items() if count > 1]
    examples += [f"{name} was changed" for name in changed]
    examples += [f"{name} was never offered" for name in uninvited]
    return Verdict(
        acknowledged=len(acknowledged),
        stored=len(found.held),
        evicted=len(found.evicted),
        lost=len(lost),
        duplicates=duplicates,
        changed=len(changed),
        uninvited=len(uninvited),
        unknown=len(invoked.keys() - acknowledged.keys() - told.failed),
        examples=tuple(examples[:MAX_EXAMPLES]),
    )


class Told(NamedTuple):
    """What the histories say, by episode id; times in seconds."""

    hashes: dict[str, str]
    invoked: dict[str, float]  # when it was offered first
    acknowledged: dict[str, float]  # when that was answered first
    failed: set[str]


class Findings:
    """What lies in the shards' folders, by episode id."""

    def __init__(self, told: Told, capacity: int, damaged: Sequence[StoredEpisode]) -> None:
        self.told = told
        self.capacity = capacity
        self.damaged = damaged
        self.hashes: dict[str, set[str]] = {}  # of every record
        self.copies: Counter[str] = Counter()  # records, or what a restarted shard holds if that is more
        self.held: set[str] = set()
        self.evicted: set[str] = set()  # for want of room
        self.changed: set[str] = set()  # held otherwise than its record says

    def read(self, folder: Path) -> None:
        """Adds a shard's folder."""
        with tempfile.TemporaryDirectory() as temporary:
            copy = Path(temporary) / "shard"
            shutil.copytree(folder, copy)
            records = read_episodes(copy)
            copies = Counter(item.episode.episode_id for item in records)
            for item in records:
                self.hashes.setdefault(item.episode.episode_id, set()).add(content_hash(item.episode))
            if records:
                self._recover(copy, records, copies)
            self.copies.update(copies)

    def _recover(self, folder: Path, records: list[StoredEpisode], copies: Counter[str]) -> None:
        first_stored = {item.key: item.episode for item in records}
        with _recovered(folder, records) as store:
            held = [store.ring.episode(entry) for entry in store.ring]
            keys = [entry.key for entry in store.ring]
            in_ring = Counter(episode.episode_id for episode in held)
            self.held |= in_ring.keys()
            known = {name for name in self.told.hashes if store.knows(name)}
        # An episode younger than the oldest that is held can't have been evicted for want of room.
        young = {item.episode.episode_id for item in records if item.key >= min(keys, default=0)}
        self.evicted |= self._without_room(known - young - in_ring.keys(), records)
        for name, count in in_ring.items():
            copies[name] = max(copies[name], count)
        for key, episode in zip(keys, held, strict=True):
            first = first_stored[key]
            untouched = replace(episode, policies=first.policies, root_values=first.root_values)
            if content_hash(untouched) != content_hash(first):
                self.changed.add(episode.episode_id)

    def _without_room(self, gone: Set[str], records: list[StoredEpisode]) -> set[str]:
        """Of the episodes that a shard says it evicted, those that don't fit together with everything younger.

        Where the ring wraps, it may leave almost as much unused as the episode takes that didn't fit there. One whose
        segment was dropped is older than all that have a record; of its size, nothing but theirs is known.
        """
        items = sorted([*records, *self.damaged], key=lambda item: item.key, reverse=True)
        rows = [item.episode.num_steps + 1 for item in items]
        longest = max(rows)
        filled = {item.episode.episode_id: total for item, total in zip(items, accumulate(rows), strict=True)}
        without_record = sum(rows) + longest
        times = (self.told.acknowledged.get(item.episode.episode_id, inf) for item in records)
        first_acknowledged = min(times)
        return {
            name
            for name in gone
            if filled.get(name, without_record) + longest > self.capacity
            and (name in filled or self.told.invoked[name] <= first_acknowledged)
        }


def read_episodes(folder: Path) -> list[StoredEpisode]:
    """All episodes of a shard's log as first stored, in the order of writing; evicted ones too."""
    records = log_format.read(folder / "episodes")
    return [
        item
        for record in records
        if record.kind == Kind.EPISODES
        for item in schema.decode_episodes(record.payload)
    ]


@contextmanager
def _recovered(folder: Path, records: list[StoredEpisode]) -> Iterator[EpisodeStore]:
    """A store with room for all records, so that it evicts no more than the shard itself had."""
    episode = records[0].episode
    shape, num_actions = episode.observations.shape[1:], episode.policies.shape[1]
    spec = EnvironmentSpec(episode.environment_id, shape, episode.observations.dtype, (num_actions,))
    num_rows = sum(item.episode.num_steps + 1 for item in records)
    config = ReplayConfig(max_transitions=max(num_rows, 2), max_bytes=2**62)
    store = EpisodeStore(folder, spec, config, AlgorithmConfig())
    try:
        store.recover()
        yield store
    finally:
        store.close()


def _read_histories(paths: Iterable[Path]) -> Told:
    told = Told({}, {}, {}, set())
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            # The producer may have died in the middle of its last line.
            if not line.endswith("\n"):
                continue
            event = json.loads(line)
            name, time = event["id"], event["time"]
            if event["event"] == "invoke":
                told.hashes[name] = event["hash"]
                told.invoked[name] = min(time, told.invoked.get(name, inf))
            elif event["event"] == "ok":
                told.acknowledged[name] = min(time, told.acknowledged.get(name, inf))
            elif event["event"] == "fail":
                told.failed.add(name)
    return told
