"""A run's shards as they lie on disk, read without their locks: also while the run goes on.

Nothing here changes a file. What is held is what a restarted shard would hold by the last state that it wrote: the
episodes from its oldest key on, each id once, with the newest targets.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import LogError, RejectedEpisode, RunError
from distributed_muzero.files import folder_bytes
from distributed_muzero.replay import log_format
from distributed_muzero.replay.log_format import Damage, Record
from distributed_muzero.replay.recovery import Journal, decode, find_episodes, fold_journal, kind_name
from distributed_muzero.replay.schema import Kind, StoredEpisode
from distributed_muzero.replay.validation import validate
from distributed_muzero.types import Episode

SECOND_LOOK_SECONDS = 0.2  # after it, a record that was half written is whole


class Held(NamedTuple):
    """A held episode in short."""

    weights_version: int
    key: int
    shard: int
    episode_id: str
    num_steps: int
    episode_return: float
    targets_version: int | None  # of the weights that searched it anew; None = as played

    @property
    def place(self) -> tuple[int, int]:
        return self.shard, self.key


def shard_numbers(replay: Path) -> list[int]:
    """Of the shards under a run's replay folder, in order; empty where there is none."""
    names = (re.fullmatch(r"shard_(\d+)", path.name) for path in replay.glob("shard_*"))
    return sorted(int(match[1]) for match in names if match)


def shard_folders(replay: Path) -> dict[int, Path]:
    """The shards under a run's replay folder, by number. Raises RunError where there is none."""
    found = {number: replay / f"shard_{number}" for number in shard_numbers(replay)}
    if not found:
        raise RunError(
            f"{replay} holds no replay shards; a run makes them when it begins to play, and old versions kept none"
        )
    return found


def read_journal(shard: Path) -> Journal:
    """Raises LogError for a journal that can't be read."""
    folder = shard / "journal"
    while True:
        before = _segments(folder)
        damage = Damage()
        journal = fold_journal(_records(folder, damage), folder)
        # Written anew meanwhile: what was read may lack what went with the old segments.
        if before <= _segments(folder):
            journal.damage = damage
            return journal


def held_episodes(
    shard: Path, journal: Journal | None = None, damage: Damage | None = None
) -> Iterator[StoredEpisode]:
    """The held episodes of a shard's folder, oldest first, one record in memory at a time.

    Adds what isn't intact in the log of episodes to `damage`. Raises LogError for a log that can't be read.
    """
    journal = journal or read_journal(shard)
    for key, episode, _, fate in find_episodes(_records(shard / "episodes", damage), journal, shard):
        if fate == "held":
            if targets := journal.targets.get(key):
                episode = replace(episode, policies=targets.policies, root_values=targets.root_values)
            yield StoredEpisode(key, episode)


def list_held(index: int, shard: Path, journal: Journal, damage: Damage | None = None) -> list[Held]:
    """The held episodes of a shard in short, oldest first."""
    found = []
    for key, episode in held_episodes(shard, journal, damage):
        targets = journal.targets.get(key)
        found.append(
            Held(
                episode.weights_version, key, index, episode.episode_id, episode.num_steps,
                episode.episode_return, targets.version if targets else None,
            )
        )  # fmt: skip
    return found


def list_all_held(replay: Path) -> list[Held]:
    """The held episodes of all shards, oldest first: by weights version, then by the shards' own numbers."""
    found = []
    for index, shard in shard_folders(replay).items():
        found += list_held(index, shard, read_journal(shard))
    return sorted(found)


def select_episodes(
    replay: Path, min_return: float | None = None, last: int | None = None
) -> Iterator[StoredEpisode]:
    """The held episodes of all shards that return at least `min_return`, of these the `last` ones.

    Streams; with `last`, it reads everything twice.
    """
    chosen = None
    if last is not None:
        good = [
            held for held in list_all_held(replay) if min_return is None or held.episode_return >= min_return
        ]
        chosen = {held.place for held in good[max(len(good) - last, 0) :]}
    for index, shard in shard_folders(replay).items():
        for stored in held_episodes(shard):
            if chosen is not None and (index, stored.key) not in chosen:
                continue
            if min_return is None or stored.episode.episode_return >= min_return:
                yield stored


def find_episode(replay: Path, place: tuple[int, int]) -> Episode | None:
    """The episode at (shard, key), or None where it is no longer held."""
    shard, key = place
    return next((s.episode for s in held_episodes(replay / f"shard_{shard}") if s.key == key), None)


# Statistics ---------------------------------------------------------------------------------------------------


def replay_stats(replay: Path) -> dict[str, Any]:
    """Of every shard, and of all together; plain values."""
    shards, everything = [], []
    for index, shard in shard_folders(replay).items():
        journal, damage = read_journal(shard), Damage()
        held = list_held(index, shard, journal, damage)
        everything += held
        shards.append(
            {
                "shard": index,
                **_summary(held),
                "log_bytes": folder_bytes(shard),
                **counters(journal.state),
                "damage": asdict(_sum(damage, journal.damage)),
            }
        )
    total = _summary(sorted(everything))
    for name in ("log_bytes", *counters({})):
        if name != "rejected":
            total[name] = sum(shard[name] for shard in shards)
    total["rejected"] = dict(sum((Counter(shard["rejected"]) for shard in shards), Counter()))
    total["damage"] = {name: sum(s["damage"][name] for s in shards) for name in asdict(Damage())}
    return {"shards": shards, "total": total}


def _summary(held: list[Held]) -> dict[str, Any]:
    """Of episodes that are sorted oldest first; None where a number needs one."""
    returns = np.array([episode.episode_return for episode in held])
    lengths = np.array([episode.num_steps for episode in held])
    versions = [episode.weights_version for episode in held]
    return {
        "episodes": len(held),
        "transitions": int(lengths.sum()),
        "oldest_episode": held[0].episode_id if held else None,
        "newest_episode": held[-1].episode_id if held else None,
        "mean_return": float(returns.mean()) if held else None,
        "min_return": float(returns.min()) if held else None,
        "max_return": float(returns.max()) if held else None,
        "mean_length": float(lengths.mean()) if held else None,
        "min_length": int(lengths.min()) if held else None,
        "max_length": int(lengths.max()) if held else None,
        "oldest_version": min(versions, default=None),
        "newest_version": max(versions, default=None),
        "refreshed_episodes": sum(episode.targets_version is not None for episode in held),
    }


def counters(state: dict[str, Any]) -> dict[str, Any]:
    """As of the last state that the shard wrote."""
    limiter = state.get("limiter", {})
    return {
        "inserted_transitions": limiter.get("inserted", 0),
        "inserted_episodes": state.get("inserted_episodes", 0),
        "sampled_rows": limiter.get("sampled", 0),
        "evicted_transitions": state.get("evicted_transitions", 0),
        "evicted_episodes": state.get("evicted_episodes", 0),
        "refreshed_transitions": state.get("refreshed_transitions", 0),
        "duplicates": state.get("duplicates", 0),
        "rejected": state.get("rejects", {}),
    }


# Verification -------------------------------------------------------------------------------------------------


def verify_replay(
    replay: Path, num_shards: int, spec: EnvironmentSpec | None, max_steps: int
) -> dict[str, Any]:
    """Reads and decodes every record of all shards. Without a spec, episodes are decoded but not validated.

    Returns plain values; `ok` says that nothing is missing, damaged, undecodable, invalid or there twice.
    Raises LogError for logs of another format.
    """
    folders = shard_folders(replay)
    seen: set[str] = set()
    shards: list[dict[str, Any]] = []
    for index, folder in folders.items():
        logs: dict[str, dict[str, Any]] = {}
        for name in ("episodes", "journal"):
            result, ids = _verify_log(folder / name, spec, max_steps)
            result["duplicate_ids"] = [episode_id for episode_id in ids if _seen_before(episode_id, seen)]
            logs[name] = result
        shards.append({"shard": index, "missing_episodes": _num_missing(folder), **logs})
    missing = sorted(set(range(num_shards)) - folders.keys())
    is_good = all(_is_good(shard[name]) for shard in shards for name in ("episodes", "journal"))
    return {
        "ok": is_good and not missing and not any(shard["missing_episodes"] for shard in shards),
        "missing_shards": missing,
        "validated_against": spec.id if spec else None,
        "shards": shards,
    }


def _num_missing(shard: Path) -> int:
    """Episodes that were held by the last state and aren't in the log.

    0 where the state changes meanwhile, or a record can't be decoded, which is told elsewhere.
    """
    try:
        journal = read_journal(shard)
        found = find_episodes(_records(shard / "episodes", None), journal, shard)
        next_key = journal.state.get("next_key", 0)
        num_known = sum(fate == "held" and key < next_key for key, _, _, fate in found)
    except LogError:
        return 0
    num_missing = max(journal.state.get("held_episodes", 0) - num_known, 0)
    return num_missing if read_journal(shard).state == journal.state else 0


def _verify_log(
    folder: Path, spec: EnvironmentSpec | None, max_steps: int
) -> tuple[dict[str, Any], list[str]]:
    """What one log holds, and the ids of its episodes. A log that is just being written gets a second look."""
    result, ids = _look_at_log(folder, spec, max_steps)
    if result["damage"]["torn_tails"]:
        time.sleep(SECOND_LOOK_SECONDS)
        result, ids = _look_at_log(folder, spec, max_steps)
    return result, ids


def _look_at_log(
    folder: Path, spec: EnvironmentSpec | None, max_steps: int
) -> tuple[dict[str, Any], list[str]]:
    damage = Damage()
    kinds: Counter[str] = Counter()
    invalid: dict[str, str] = {}
    ids: list[str] = []
    num_undecodable = 0
    for record in _records(folder, damage):
        kinds[kind_name(record.kind)] += 1
        try:
            decoded = decode(record, folder)
        except LogError:
            num_undecodable += 1
            continue
        for _, episode in decoded if record.kind == Kind.EPISODES else ():
            ids.append(episode.episode_id)
            if spec is not None and (reason := _fault(episode, spec, max_steps)):
                invalid[episode.episode_id] = reason
    result = {
        "segments": len(_segments(folder)),
        "bytes": folder_bytes(folder),
        "records": dict(kinds),
        "episodes": len(ids),
        "damage": asdict(damage),
        "undecodable_records": num_undecodable,
        "invalid_episodes": invalid,
    }
    return result, ids


def _fault(episode: Episode, spec: EnvironmentSpec, max_steps: int) -> str:
    try:
        validate(episode, spec, max_steps)
    except RejectedEpisode as error:
        return f"{error.reason}: {error.detail}"
    return ""


def _seen_before(episode_id: str, seen: set[str]) -> bool:
    if episode_id in seen:
        return True
    seen.add(episode_id)
    return False


def _is_good(result: dict[str, Any]) -> bool:
    faults = result["undecodable_records"], result["invalid_episodes"], result["duplicate_ids"]
    return not any(faults) and not any(result["damage"].values())


# Records ------------------------------------------------------------------------------------------------------


def _records(folder: Path, damage: Damage | None) -> Iterable[Record]:
    """A log's records; none where it isn't there yet."""
    return log_format.read(folder, damage) if folder.is_dir() else ()


def _segments(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("segment_*.log")}


def _sum(one: Damage, other: Damage) -> Damage:
    return Damage(**{name: value + getattr(other, name) for name, value in asdict(one).items()})
