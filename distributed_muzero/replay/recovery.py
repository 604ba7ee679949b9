"""What a shard's two logs say: the journal folded into one, and which of the logged episodes are held.

A shard that starts again and everybody who reads its folder meanwhile go by these rules.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distributed_muzero.errors import LogError
from distributed_muzero.replay import schema
from distributed_muzero.replay.log_format import Damage, Record
from distributed_muzero.replay.schema import Kind, Priorities, Targets
from distributed_muzero.types import Episode

_DECODERS: dict[int, Callable[[Any], Any]] = {
    Kind.EPISODES: schema.decode_episodes,
    Kind.TARGETS: schema.decode_targets,
    Kind.PRIORITIES: schema.decode_priorities,
    Kind.STATE: schema.decode_state,
    Kind.IDS: schema.decode_ids,
}

MAX_REMEMBERED_IDS = 100_000  # of evicted episodes; far more than all actors may hold unacknowledged


@dataclass
class Journal:
    """What a shard's journal says of its episodes."""

    state: dict[str, Any] = field(default_factory=dict)  # the last one written; empty before the first
    targets: dict[int, Targets] = field(default_factory=dict)  # by episode key, the newest
    priorities: list[Priorities] = field(default_factory=list)  # in the order of writing
    gone_ids: OrderedDict[str, None] = field(default_factory=OrderedDict)  # of evicted episodes, oldest first
    damage: Damage = field(default_factory=Damage)


class Found(NamedTuple):
    """An episode in the log; its policies and values are those that it was played with."""

    key: int
    episode: Episode
    segment: int
    fate: Literal["held", "evicted", "repeated"]


def fold_journal(records: Iterable[Record], folder: Path) -> Journal:
    """Raises LogError for a record that can't be decoded, as if it were in `folder`."""
    journal = Journal()
    for record in records:
        content = decode(record, folder)
        if record.kind == Kind.STATE:
            journal.state = content
        elif record.kind == Kind.IDS:
            remember(journal.gone_ids, content)
        elif record.kind == Kind.TARGETS:
            journal.targets.update((item.key, item) for item in content)
        elif record.kind == Kind.PRIORITIES:
            journal.priorities.append(content)
    return journal


def find_episodes(records: Iterable[Record], journal: Journal, folder: Path) -> Iterator[Found]:
    """Every episode of a shard's log, in the order of writing.

    Held is what came with the oldest key of the last state or later: each id once, none that the journal calls gone.
    A copy with an older key doesn't count: where a disk refused a write, the log may hold what was given up, and then
    offered again. Raises LogError for a record that can't be decoded.
    """
    oldest = journal.state.get("oldest_key", 0)
    held: set[str] = set()
    for record in records:
        for key, episode in decode(record, folder):
            fate: Literal["held", "evicted", "repeated"] = "held"
            if key < oldest:
                fate = "evicted"
            elif episode.episode_id in held or episode.episode_id in journal.gone_ids:
                fate = "repeated"
            else:
                held.add(episode.episode_id)
            yield Found(key, episode, record.segment, fate)


def remember(ids: OrderedDict[str, None], new: Iterable[str]) -> None:
    """Adds ids of evicted episodes to those in `ids`, and forgets the first that are too many."""
    ids.update(dict.fromkeys(new))
    while len(ids) > MAX_REMEMBERED_IDS:
        ids.popitem(last=False)


def decode(record: Record, folder: Path) -> Any:
    """What an intact record holds. Raises LogError if it isn't what its kind says."""
    try:
        return _DECODERS[record.kind](record.payload)
    except Exception as error:
        raise LogError(
            f"{folder}: an intact record in segment {record.segment} of kind {kind_name(record.kind)} can't be "
            f"decoded ({error!r}): this version didn't write it; use the one that did"
        ) from error


def kind_name(kind: int) -> str:
    return Kind(kind).name.lower() if kind in _DECODERS else f"unknown_{kind}"
