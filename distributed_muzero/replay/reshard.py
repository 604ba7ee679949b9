"""Another number of replay shards: what is stored is laid out anew while no shard is open.

    replay/                       what counts, whole
    replay.resharding/            the new layout, while it is being written
    replay.before-resharding/     the old layout, from the switch until it is removed

Two renames switch: replay → replay.before-resharding, then replay.resharding → replay. While both other names are
there, a kill came between the two, and `finish_or_undo` makes up for the second.
"""

from __future__ import annotations

import heapq
import logging
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero.config import Config
from distributed_muzero.errors import LogError
from distributed_muzero.files import sync_folder
from distributed_muzero.replay import log_format, schema
from distributed_muzero.replay.index import shard_of
from distributed_muzero.replay.inspection import counters, shard_numbers
from distributed_muzero.replay.log import ReplayLog
from distributed_muzero.replay.log_format import Damage, list_segments, read_segment, reported
from distributed_muzero.replay.recovery import decode, find_episodes, fold_journal, remember
from distributed_muzero.replay.schema import Kind, Priorities, StoredEpisode, Targets
from distributed_muzero.types import Episode

logger = logging.getLogger(__name__)

RECORD_BYTES = 2**16  # of episodes in memory, for one record of the log
SYNC_BYTES = 64 * 1024**2  # at most written and not synced


class ReshardCounts(NamedTuple):
    num_shards_before: int
    num_shards: int
    episodes: int  # laid out anew
    transitions: int
    remembered_ids: int  # of evicted episodes
    missing_episodes: int  # held by the old shards' last states, and no longer in their logs
    damaged_records: int  # of the old logs, left behind


def num_shards_of(replay: Path) -> int:
    """How many shards a run's replay folder is laid out for; 0 where none has been made."""
    return max(shard_numbers(replay), default=-1) + 1


def finish_or_undo(replay: Path) -> None:
    """Settles a resharding that was cut short: afterwards `replay` is the old layout, or the new one, and whole.

    Cheap where there was none; comes before the shards at every start. Raises LogError for a disk that refuses, and
    where shards were made anew between the two renames.
    """
    replay = replay.resolve()
    writing, before = _other_names(replay)
    if before.exists() and not replay.exists():
        with reported(f"can't finish the resharding of {replay}"):
            (writing if writing.exists() else before).rename(replay)
            sync_folder(replay.parent)
    elif before.exists() and writing.exists():
        raise LogError(
            f"{replay} was made although its episodes lie in {writing}, whose renaming to it was cut short, "
            f"and in {before}; move the new {replay.name} away, then go on"
        )
    # What can't be removed now is in nobody's way before the next resharding.
    for leftover in (before, writing):
        shutil.rmtree(leftover, ignore_errors=True)


def reshard(replay: Path, before: Config, after: Config) -> ReshardCounts:
    """Lays out what the shards under `replay` hold for `after.replay.num_shards`, whatever their number was.

    Comes while no shard is open. Episodes keep their order (across shards as far as weights versions tell it), bits,
    refreshed targets and priorities, and get keys above all old ones. Ids of evicted episodes stay known. Counters are
    split so that their sums stay, and so is the limiters' balance, as far as their new slack allows. A shard whose
    share is too small for its episodes evicts the oldest when it opens, and counts them.

    before: tells the limits of shards that never wrote a state; all others know their own.

    Needs the disk space of what is held a second time and, in memory, the ids of all episodes and two segments of each
    old shard's logs. Raises LogError for a shard that is in use, a log that can't be read, and a disk that refuses:
    after the next `finish_or_undo`, the old layout is there as it was, or else the whole new one.
    """
    replay = replay.resolve()
    finish_or_undo(replay)
    writing, leftover = _other_names(replay)
    for path in (writing, leftover):
        if path.exists():
            raise LogError(f"can't remove {path}, left by an earlier resharding; remove it, then try again")
    with ExitStack() as opened:
        old = [_OldShard(replay / f"shard_{index}", before, opened) for index in range(num_shards_of(replay))]
        if not old:
            return ReshardCounts(0, after.replay.num_shards, 0, 0, 0, 0, 0)
        try:
            counts = _lay_out(old, writing, after)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        _switch(replay)
    # After the locks in it are free: some file systems keep an open file's folder.
    finish_or_undo(replay)
    if counts.missing_episodes:
        logger.error(
            "%s: %d episodes that its shards held were no longer in their logs; it goes on without them",
            replay, counts.missing_episodes,
        )  # fmt: skip
    return counts


def _other_names(replay: Path) -> tuple[Path, Path]:
    return replay.with_name(f"{replay.name}.resharding"), replay.with_name(f"{replay.name}.before-resharding")


def _switch(replay: Path) -> None:
    writing, before = _other_names(replay)
    with reported(f"can't put the new shards in place of {replay}, the next start settles it"):
        # The new logs, and the folders that they made, are durable by now.
        replay.rename(before)
        sync_folder(replay.parent)
        writing.rename(replay)
        sync_folder(replay.parent)


# Reading and writing ------------------------------------------------------------------------------------------


class _Item(NamedTuple):
    """A held episode on its way."""

    newest_version: int  # of all that came to its shard until then
    key: int
    shard: _OldShard
    episode: Episode


class _OldShard:
    """A shard's logs, locked, and what is known of them without episodes, targets and priorities."""

    def __init__(self, folder: Path, config: Config, opened: ExitStack):
        self.folder = folder
        self.damage = Damage()
        for name in ("episodes", "journal"):
            opened.callback(ReplayLog(folder / name, config.replay.segment_bytes).close)
        records = log_format.read(folder / "journal", self.damage)
        self.journal = fold_journal((r for r in records if r.kind in (Kind.STATE, Kind.IDS)), folder)
        self.state = self.journal.state
        self.limiter = {"limits": _limits(config), "settled": 0.0, **self.state.get("limiter", {})}
        fresh = {"ratio": config.reanalyse.ratio, "first": [0, 0]}
        self.refresh_limiter = {**fresh, **self.state.get("refresh_limiter", {})}
        self.evicted_ids = self.journal.gone_ids.copy()
        self.new_episodes = self.new_transitions = 0  # stored after the state was written
        self.num_known = 0  # of the held ones, before it
        # Of each held episode, in order: its key, new shard, and new key.
        self.keys, self.shards, self.new_keys = array("q"), array("q"), array("q")

    def next_key(self) -> int:
        """Above every key that it gave."""
        folder = self.folder / "episodes"
        for number in reversed(list_segments(folder)):
            with reported(f"can't read {folder}"):
                records = list(read_segment(folder, number, True, Damage()))
            if records:
                return max(
                    self.state.get("next_key", 0), 1 + max(key for key, _ in decode(records[-1], folder))
                )
        return self.state.get("next_key", 0)

    def held(self) -> Iterator[_Item]:
        """Its held episodes, oldest first."""
        records = log_format.read(self.folder / "episodes", self.damage)
        first_new, newest_version = self.state.get("next_key", 0), 0
        for key, episode, _, fate in find_episodes(records, self.journal, self.folder):
            if fate == "evicted":
                remember(self.evicted_ids, [episode.episode_id])
            if fate == "held":
                is_new = key >= first_new
                self.num_known += not is_new
                self.new_episodes += is_new
                self.new_transitions += episode.num_steps * is_new
                newest_version = max(newest_version, episode.weights_version)
                yield _Item(newest_version, key, self, episode)

    def place(self, key: int, shard: int, new_key: int) -> None:
        self.keys.append(key)
        self.shards.append(shard)
        self.new_keys.append(new_key)

    def changes(self) -> Iterator[tuple[int, Kind, bytes]]:
        """Targets and priorities of the episodes that were placed, record by record, each with its new shard."""
        places = dict(zip(self.keys, zip(self.shards, self.new_keys, strict=True), strict=True))
        for record in log_format.read(self.folder / "journal"):
            if record.kind in (Kind.STATE, Kind.IDS):
                continue
            content = decode(record, self.folder)
            if record.kind == Kind.TARGETS:
                by_shard: dict[int, list[Targets]] = {}
                for item in content:
                    if place := places.get(item.key):
                        by_shard.setdefault(place[0], []).append(item._replace(key=place[1]))
                yield from (
                    (shard, Kind.TARGETS, schema.encode_targets(items)) for shard, items in by_shard.items()
                )
            elif record.kind == Kind.PRIORITIES:
                yield from self._priorities(content)

    def _priorities(self, update: Priorities) -> Iterator[tuple[int, Kind, bytes]]:
        keys, shards, new_keys = (np.asarray(a) for a in (self.keys, self.shards, self.new_keys))
        which = np.minimum(np.searchsorted(keys, update.keys), len(keys) - 1)
        is_held = keys[which] == update.keys if len(keys) else np.zeros(len(update.keys), bool)
        for shard in np.unique(shards[which[is_held]]):
            rows = np.flatnonzero(is_held & (shards[which] == shard))
            part = Priorities(new_keys[which[rows]], *(column[rows] for column in update[1:]))
            yield int(shard), Kind.PRIORITIES, schema.encode_priorities(part)


class _NewShard:
    """Writes a shard's logs."""

    def __init__(self, folder: Path, config: Config, opened: ExitStack):
        self.episodes, self.journal = (
            ReplayLog(folder / name, config.replay.segment_bytes) for name in ("episodes", "journal")
        )
        opened.callback(self.episodes.close)
        opened.callback(self.journal.close)
        self.num_episodes = self.num_transitions = 0
        self._waiting: list[StoredEpisode] = []
        self._waiting_bytes = 0
        self._unsynced = Counter[ReplayLog]()

    def add(self, stored: StoredEpisode) -> None:
        self.num_episodes += 1
        self.num_transitions += stored.episode.num_steps
        self._waiting.append(stored)
        self._waiting_bytes += sum(getattr(value, "nbytes", 0) for value in vars(stored.episode).values())
        if self._waiting_bytes >= RECORD_BYTES:
            self.write_waiting()

    def write_waiting(self) -> None:
        if self._waiting:
            self._write(self.episodes, Kind.EPISODES, schema.encode_episodes(self._waiting))
        self._waiting, self._waiting_bytes = [], 0

    def note(self, kind: Kind, payload: bytes) -> None:
        self._write(self.journal, kind, payload)

    def _write(self, log: ReplayLog, kind: Kind, payload: bytes) -> None:
        log.append(kind, payload)
        log.write()
        self._unsynced[log] += len(payload)
        if self._unsynced[log] >= SYNC_BYTES:
            log.sync()
            self._unsynced[log] = 0


def _lay_out(old: Sequence[_OldShard], writing: Path, config: Config) -> ReshardCounts:
    """Writes the new layout and syncs it, but for the name of its folder."""
    num_shards = config.replay.num_shards
    first_key = next_key = max(shard.next_key() for shard in old)
    held: set[str] = set()
    with ExitStack() as opened:
        new = [_NewShard(writing / f"shard_{index}", config, opened) for index in range(num_shards)]
        # Among shards that began together, keys grow alike: they settle who came first where versions don't.
        for item in heapq.merge(*(shard.held() for shard in old), key=lambda item: item[:2]):
            if item.episode.episode_id in held:
                continue
            held.add(item.episode.episode_id)
            index = shard_of(item.episode.episode_id, num_shards)
            item.shard.place(item.key, index, next_key)
            new[index].add(StoredEpisode(next_key, item.episode))
            next_key += 1
        evicted_ids: list[list[str]] = [[] for _ in new]
        for episode_id in _newest_last([shard.evicted_ids for shard in old]):
            if episode_id not in held:
                evicted_ids[shard_of(episode_id, num_shards)].append(episode_id)
        for shard, ids in zip(new, evicted_ids, strict=True):
            shard.write_waiting()
            shard.note(Kind.IDS, schema.encode_ids(ids))
        for index, kind, payload in (change for shard in old for change in shard.changes()):
            new[index].note(kind, payload)
        states = _split_states(old, new, config)
        for shard, state in zip(new, states, strict=True):
            own = {"next_key": next_key, "oldest_key": first_key, "held_episodes": shard.num_episodes}
            shard.note(Kind.STATE, schema.encode_state({**state, **own}))
    return ReshardCounts(
        len(old),
        num_shards,
        episodes=len(held),
        transitions=sum(shard.num_transitions for shard in new),
        remembered_ids=sum(map(len, evicted_ids)),
        missing_episodes=sum(max(s.state.get("held_episodes", 0) - s.num_known, 0) for s in old),
        damaged_records=sum(shard.damage.corrupt_records + shard.damage.torn_tails for shard in old),
    )


def _newest_last(lists: Sequence[Iterable[str]]) -> list[str]:
    """All ids of lists that each end with the newest; the last of each list come last."""
    groups = zip_longest(*(reversed(list(ids)) for ids in lists))
    return [episode_id for group in groups for episode_id in group if episode_id is not None][::-1]


# Counters and limits ------------------------------------------------------------------------------------------


def _split_states(old: Sequence[_OldShard], new: Sequence[_NewShard], config: Config) -> list[dict[str, Any]]:
    """What ReplayShard.state() would say in each new shard, and how much was evicted."""
    total: Counter[str] = sum(map(_counts, old), Counter())
    even = [1] * len(new)
    steps, episodes = [s.num_transitions for s in new], [s.num_episodes for s in new]
    inserted = _with_share(steps, total["inserted_transitions"])
    inserted_episodes = _with_share(episodes, total["inserted_episodes"])
    by_name = {name: _shares(total[name], even) for name in ("evicted_transitions", "evicted_episodes")}
    sampled, refreshed, first_inserted, first_refreshed = (
        _shares(total[name], inserted)
        for name in ("sampled_rows", "refreshed_transitions", "first_inserted", "first_refreshed")
    )
    ratios = {shard.refresh_limiter["ratio"] for shard in old}
    # Of several, none: both sides are then counted from now on.
    ratio = ratios.pop() if len(ratios) == 1 else None
    rejects = sum((Counter(shard.state.get("rejects", {})) for shard in old), Counter())
    balance = _balance(old) / len(new)
    states = []
    for index in range(len(new)):
        entropy = [config.run.seed, index, total["inserted_transitions"], total["sampled_rows"]]
        states.append(
            {
                "limiter": _limiter_state(inserted[index], sampled[index], balance, config),
                "generator": np.random.default_rng(entropy).bit_generator.state,
                "inserted_episodes": inserted_episodes[index],
                "refreshed_transitions": refreshed[index],
                "refresh_limiter": {"ratio": ratio, "first": [first_inserted[index], first_refreshed[index]]},
                # Nothing follows from these, so they stay in one piece.
                "duplicates": total["duplicates"] if index == 0 else 0,
                "rejects": dict(rejects) if index == 0 else {},
                **{name: shares[index] for name, shares in by_name.items()},
            }
        )
    return states


def _counts(shard: _OldShard) -> Counter[str]:
    """Its counters, as a restart would find them."""
    found = counters(shard.state)
    found.pop("rejected")
    found["inserted_transitions"] += shard.new_transitions
    found["inserted_episodes"] += shard.new_episodes
    found["first_inserted"], found["first_refreshed"] = shard.refresh_limiter["first"]
    return Counter(found)


def _balance(old: Sequence[_OldShard]) -> float:
    """That of one limiter in place of all: what the inserts allow beyond the samples taken."""
    owed = rest = 0.0
    for shard in old:
        count, (samples_per_insert, min_size, _) = _counts(shard), shard.limiter["limits"]
        owed += (count["inserted_transitions"] - min_size) * samples_per_insert
        rest += shard.limiter["settled"] - count["sampled_rows"]
    return max(owed, 0.0) + rest


def _limiter_state(inserted: int, sampled: int, balance: float, config: Config) -> dict[str, Any]:
    """A RateLimiter's state with that balance. It names no slack: the limiter takes what its own allows of it."""
    samples_per_insert, min_size, slack = _limits(config)
    owed = max(inserted - min_size, 0) * samples_per_insert
    return {
        "inserted": inserted,
        "sampled": sampled,
        "limits": [samples_per_insert, min_size, slack],
        "settled": balance - owed + sampled,
    }


def _limits(config: Config) -> tuple[float, int, None]:
    """Ratio and minimum size of a shard's limiter; where nobody plays, nothing is held back."""
    replay = config.replay
    if config.is_offline:
        return 1.0, 1, None
    return replay.samples_per_insert, max(replay.min_size_to_sample // replay.num_shards, 1), None


def _with_share(parts: Sequence[int], total: int) -> list[int]:
    """The parts, and what the total has beyond them in even shares."""
    rest = _shares(total - sum(parts), [1] * len(parts))
    return [part + share for part, share in zip(parts, rest, strict=True)]


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to the weights, within one, that add up to the total."""
    ends = list(accumulate(weights if any(weights) else [1] * len(weights), initial=0))
    return [total * end // ends[-1] - total * begin // ends[-1] for begin, end in pairwise(ends)]
