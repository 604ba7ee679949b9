"""Episodes outside of a run: one Parquet file, one row for each episode, readable by anything that reads Parquet.

The columns are those of `schema.EPISODES`, with observations as a list of their own type. The footer's metadata holds

    distributed_muzero          JSON: format version, environment, shapes, counts, version of the package
    distributed_muzero.sha256   of the whole file, with 64 zeros in place of this digest

so that no flipped bit, in a page, a page's header or the footer, goes unnoticed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distributed_muzero.config import Config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import RunError
from distributed_muzero.files import sync_folder
from distributed_muzero.replay.index import shard_of
from distributed_muzero.replay.inspection import held_episodes, shard_folders
from distributed_muzero.replay.log import ReplayLog
from distributed_muzero.replay.recordings import check_columns, check_players, is_recording, read_recording
from distributed_muzero.replay.schema import EPISODES, StoredEpisode, episodes_from_arrow, episodes_to_arrow
from distributed_muzero.types import Episode
from distributed_muzero.version import __version__

FORMAT_VERSION = 1
ROW_GROUP_BYTES = 16 * 1024**2  # of episodes in memory, uncompressed
INSERT_BYTES = 4 * 1024**2  # of episodes offered to the shards at once
LOCK_SECONDS = 0.5

_INFO_KEY = b"distributed_muzero"
_DIGEST_KEY = b"distributed_muzero.sha256"
_NO_DIGEST = b"0" * 64
# Thrift's compact protocol: a string's field header and length stand between key and value.
_DIGEST_FIELD = re.compile(re.escape(_DIGEST_KEY) + rb"\x18\x40([0-9a-f]{64})")
_TAIL_BYTES = 8  # length of the footer, magic


class Facts(NamedTuple):
    """What decides whether episodes can be learnt from together."""

    environment_ids: tuple[str, ...]  # sorted; a run with a curriculum may have several
    observation_shape: tuple[int, ...]
    observation_dtype: str
    num_actions: int

    def __str__(self) -> str:
        return (
            f"{', '.join(self.environment_ids)} with observations {self.observation_shape} {self.observation_dtype} "
            f"and {self.num_actions} actions"
        )

    def with_environments(self, *ids: str) -> Facts:
        return self._replace(environment_ids=tuple(sorted({*self.environment_ids, *ids})))


class DatasetInfo(NamedTuple):
    facts: Facts
    num_episodes: int
    num_transitions: int
    package_version: str  # that wrote it


class ImportCounts(NamedTuple):
    offered: int  # episodes
    stored: int
    duplicates: int
    rejected: dict[str, int]  # by reason
    stored_transitions: int
    evicted_transitions: int  # gave way meanwhile: the buffer holds no more


# Writing ------------------------------------------------------------------------------------------------------


def write_dataset(
    path: Path, episodes: Iterable[StoredEpisode], row_group_bytes: int = ROW_GROUP_BYTES
) -> DatasetInfo:
    """Writes episodes of one run to a .parquet file, all or nothing; an old file is replaced.

    Holds about `row_group_bytes` of episodes at a time. Raises RunError for no episodes, for episodes that don't
    fit together, and for a disk that refuses.
    """
    if path.suffix != ".parquet":
        raise RunError(f"{path}: a dataset's name ends in .parquet")
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        info = _write(temporary, iter(episodes), row_group_bytes)
        _sign(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"can't write the dataset {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return info


def _write(path: Path, episodes: Iterator[StoredEpisode], row_group_bytes: int) -> DatasetInfo:
    first = next(episodes, None)
    if first is None:
        raise RunError("there are no episodes to write: none is held, or none was chosen")
    facts = _facts_of(first.episode)
    schema = _schema(np.dtype(facts.observation_dtype))
    num_episodes = num_transitions = 0
    with pq.ParquetWriter(
        path, schema, compression="zstd", use_dictionary=_with_dictionary(schema), write_page_checksum=True
    ) as writer:
        for group in _groups(itertools.chain([first], episodes), row_group_bytes):
            for stored in group:
                found = _facts_of(stored.episode)
                facts = facts.with_environments(*found.environment_ids)
                _check_facts(f"episode {stored.episode.episode_id}", found, facts)
            writer.write_batch(_to_columns(group, schema))
            num_episodes += len(group)
            num_transitions += sum(stored.episode.num_steps for stored in group)
        info = DatasetInfo(facts, num_episodes, num_transitions, __version__)
        writer.add_key_value_metadata({_INFO_KEY: _info_to_json(info), _DIGEST_KEY: _NO_DIGEST})
    return info


def _sign(path: Path) -> None:
    """Puts the file's digest into its footer, and makes the file durable."""
    place, _ = _find_digest(path)
    digest = _digest(path, place)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def _groups(episodes: Iterable[StoredEpisode], max_bytes: int) -> Iterator[list[StoredEpisode]]:
    """Neighbours that take `max_bytes` together, or little more."""
    group: list[StoredEpisode] = []
    num_bytes = 0
    for stored in episodes:
        group.append(stored)
        num_bytes += sum(array.nbytes for array in vars(stored.episode).values() if hasattr(array, "nbytes"))
        if num_bytes >= max_bytes:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


# Reading ------------------------------------------------------------------------------------------------------


def read_info(path: Path) -> DatasetInfo:
    """Checks every byte of a dataset, and says what it holds.

    Raises RunError for a file that can't be read, isn't a dataset, is one of another format, or is damaged.
    """
    try:
        place, digest = _find_digest(path)
        if place and _digest(path, place) != digest:
            raise RunError(
                f"{path} is damaged: its SHA-256 isn't the one written in it; take another copy of it"
            )
        # Only what is known to be intact is handed to the parser.
        metadata = pq.read_metadata(path).metadata if place else {}
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"can't read {path}: {error}") from error
    return _info_from_json(path, metadata.get(_INFO_KEY, b"null"))


def read_dataset(path: Path) -> Iterator[Episode]:
    """The episodes of a dataset, one row group in memory at a time. Raises RunError as `read_info` does, at once."""
    read_info(path)
    return (stored.episode for stored in _read_rows(path))


def _read_rows(path: Path) -> Iterator[StoredEpisode]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for number in range(file.num_row_groups):
                yield from _from_columns(file.read_row_group(number))
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"can't read {path}: {error}; take another copy of it") from error


def _find_digest(path: Path) -> tuple[int, bytes]:
    """Where the digest stands in the file, and the digest; 0 if there is none."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _TAIL_BYTES, 0))
        footer_bytes = int.from_bytes(file.read(4), "little")
        begin = max(size - _TAIL_BYTES - footer_bytes, 0)
        file.seek(begin)
        found = _DIGEST_FIELD.search(file.read())
    return (begin + found.start(1), found[1]) if found else (0, b"")


def _digest(path: Path, place: int) -> bytes:
    """SHA-256 of the file with zeros in place of the digest in it, in hexadecimal digits."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        left = place
        while left:
            chunk = file.read(min(left, 2**20))
            sha256.update(chunk)
            left -= len(chunk)
        sha256.update(_NO_DIGEST)
        file.seek(place + len(_NO_DIGEST))
        while chunk := file.read(2**20):
            sha256.update(chunk)
    return sha256.hexdigest().encode()


def _info_to_json(info: DatasetInfo) -> bytes:
    fields = {
        "format_version": FORMAT_VERSION,
        **info.facts._asdict(),
        "environment_id": ", ".join(info.facts.environment_ids),  # for versions that know of one only
        "num_episodes": info.num_episodes,
        "num_transitions": info.num_transitions,
        "package_version": info.package_version,
    }
    return json.dumps(fields).encode()


def _info_from_json(path: Path, data: bytes) -> DatasetInfo:
    """Raises RunError for what isn't a dataset of this format."""
    fields = json.loads(data)
    if fields is None:
        raise RunError(
            f"{path} is no dataset of distributed_muzero, or its end is damaged; make one with `replay export`"
        )
    if fields["format_version"] != FORMAT_VERSION:
        raise RunError(
            f"{path} is a dataset of format {fields['format_version']}, this version reads format {FORMAT_VERSION}; "
            "export it again with this version"
        )
    facts = Facts(
        tuple(fields.get("environment_ids") or [fields["environment_id"]]),
        tuple(fields["observation_shape"]),
        fields["observation_dtype"],
        fields["num_actions"],
    )
    return DatasetInfo(facts, fields["num_episodes"], fields["num_transitions"], fields["package_version"])


# Columns ------------------------------------------------------------------------------------------------------


def _schema(dtype: np.dtype) -> pa.Schema:
    place = EPISODES.get_field_index("observations")
    return EPISODES.set(place, pa.field("observations", _observation_type(dtype)))


def _observation_type(dtype: np.dtype) -> pa.DataType:
    """A list where Parquet keeps the dtype bit for bit, else bytes."""
    if dtype.kind in "biuf" and dtype.itemsize <= 8 and dtype.isnative:
        return pa.list_(pa.from_numpy_dtype(dtype))
    return EPISODES.field("observations").type


def _with_dictionary(schema: pa.Schema) -> list[str]:
    """Parquet stores small integers in 32 bits; a dictionary makes bytes of them again. Floats stay as they are."""
    kind = schema.field("observations").type
    is_small = (
        pa.types.is_list(kind) and pa.types.is_integer(kind.value_type) and kind.value_type.bit_width == 8
    )
    return ["observations.list.element"] if is_small else []


def _to_columns(stored: Sequence[StoredEpisode], schema: pa.Schema) -> pa.RecordBatch:
    batch = episodes_to_arrow(stored)
    kind = schema.field("observations").type
    if pa.types.is_list(kind):
        arrays = [item.episode.observations for item in stored]
        offsets = np.cumsum([0, *(array.size for array in arrays)], dtype=np.int32)
        flat = pa.array(np.concatenate([array.ravel() for array in arrays]), kind.value_type)
        values = pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind)
        batch = batch.set_column(
            EPISODES.get_field_index("observations"), schema.field("observations"), values
        )
    return batch


def _from_columns(table: pa.Table) -> list[StoredEpisode]:
    [batch] = table.combine_chunks().to_batches()
    place = EPISODES.get_field_index("observations")
    column = batch.column(place)
    if pa.types.is_list(column.type):
        flat = column.values.to_numpy(zero_copy_only=False)
        offsets = column.offsets.to_numpy().astype(np.int64) * flat.itemsize
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(flat))]
        values = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(column), buffers)
        batch = batch.set_column(place, EPISODES.field(place), values)
    return episodes_from_arrow(batch)


# Into a run ---------------------------------------------------------------------------------------------------


class Reply(Protocol):
    """A shard's answer to one episode."""

    @property
    def status(self) -> str: ...
    @property
    def reason(self) -> str: ...


class Shard(Protocol):
    """What is needed of a replay shard."""

    rejects: Counter[str]

    def insert(self, episodes: list[Episode]) -> Sequence[Reply]: ...
    def stats(self) -> dict[str, float]: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class ShardMaker(Protocol):
    """What is needed of the workers' Builder. Its config is offline, or the shards' limiters would hold back."""

    config: Config
    spec: EnvironmentSpec

    def replay_shard(self, index: int, folder: Path) -> Shard: ...


class Source(NamedTuple):
    path: Path
    facts: Facts
    read: Callable[[], Iterator[StoredEpisode]]


def open_sources(path: Path) -> list[Source]:
    """What a dataset's path names: a .parquet file, a run or its replay folder, or a folder of .parquet files.

    Checks every byte of the files. Raises RunError for a path that is none of these, or that can't be used.
    """
    if path.is_file():
        return [Source(path, read_info(path).facts, lambda: _read_rows(path))]
    for replay in (path / "replay", path):
        if any(replay.glob("shard_*")):
            return [_open_replay(replay)]
    if files := sorted(path.glob("*.parquet")):
        return [source for file in files for source in open_sources(file)]
    raise RunError(
        f"no dataset at {path}: expected a .parquet file of `replay export`, a folder of them, a run's folder, or "
        "a folder that RLlib recorded episodes in"
    )


def never() -> bool:
    return False


def check_datasets(paths: Sequence[Path], spec: EnvironmentSpec, config: Config) -> list[Source]:
    """What they are made of. Raises RunError for one that can't be read or is of another environment.

    spec: of the run's environment; those of its curriculum's stages fit, too. A recording of RLlib's doesn't say what
    environment it is of: its episodes are refused one by one where they don't fit.
    """
    sources = []
    for path in paths:
        if is_recording(path):
            check_players(path, spec)
            check_columns(path)
            read = partial(read_recording, path, spec, config.algorithm.discount)
            sources.append(Source(path, _facts_of_spec(spec), read))
        else:
            sources += open_sources(path)
    expected = _facts_of_spec(spec).with_environments(*(stage.id for stage in config.stages))
    for source in sources:
        _check_facts(str(source.path), source.facts, expected)
    return sources


def import_datasets(
    paths: Sequence[Path], folder: Path, builder: ShardMaker, stop_requested: Callable[[], bool] = never
) -> ImportCounts:
    """Puts the episodes of all datasets into the shards under a run's replay `folder`, as if they had been played.

    Each is stored once, however often it comes. Checks all datasets before it changes anything: raises RunError
    for one that doesn't fit the builder's environment, LogError while the run goes on. When a stop is requested, what
    was counted is stored, and the rest isn't.
    """
    sources = check_datasets(paths, builder.spec, builder.config)
    num_shards = builder.config.replay.num_shards
    _check_nobody_writes(folder, builder.config)
    with ExitStack() as stack:
        shards = []
        for index in range(num_shards):
            shards.append(builder.replay_shard(index, folder))
            stack.callback(shards[-1].close)
        return _insert_all(sources, shards, stop_requested)


def _open_replay(replay: Path) -> Source:
    def read() -> Iterator[StoredEpisode]:
        return itertools.chain.from_iterable(map(held_episodes, shard_folders(replay).values()))

    first = next(read(), None)
    if first is None:
        raise RunError(f"{replay} holds no episodes")
    return Source(replay, _facts_of(first.episode), read)


def _check_nobody_writes(folder: Path, config: Config) -> None:
    """Raises LogError while another process holds a shard; the shards themselves would wait for long."""
    for index in range(config.replay.num_shards):
        log = folder / f"shard_{index}" / "episodes"
        ReplayLog(log, config.replay.segment_bytes, LOCK_SECONDS).close()


def _insert_all(
    sources: Sequence[Source], shards: Sequence[Shard], stop_requested: Callable[[], bool]
) -> ImportCounts:
    rejects, evicted = _sum_rejects(shards), _sum_stat(shards, "evicted_transitions")
    transitions = _sum_stat(shards, "inserted_transitions")
    statuses: Counter[str] = Counter()
    for source in sources:
        for group in itertools.takewhile(
            lambda _: not stop_requested(), _groups(source.read(), INSERT_BYTES)
        ):
            # Versions count the weights of one run: what another one knew is older than anything here.
            episodes = [replace(stored.episode, weights_version=0) for stored in group]
            statuses.update(_insert(episodes, shards))
    for shard in shards:
        shard.flush()
    if _sum_stat(shards, "log_failures"):
        raise RunError("the disk refused the shards' counters; make room or check it, then import again")
    return ImportCounts(
        offered=statuses.total(),
        stored=statuses["stored"],
        duplicates=statuses["duplicate"],
        rejected=dict(_sum_rejects(shards) - rejects),
        stored_transitions=_sum_stat(shards, "inserted_transitions") - transitions,
        evicted_transitions=_sum_stat(shards, "evicted_transitions") - evicted,
    )


def _insert(episodes: list[Episode], shards: Sequence[Shard]) -> Iterator[str]:
    """The status of each. Raises RunError where a shard takes nothing."""
    by_shard: dict[int, list[Episode]] = {}
    for episode in episodes:
        by_shard.setdefault(shard_of(episode.episode_id, len(shards)), []).append(episode)
    for index, group in by_shard.items():
        for reply in shards[index].insert(group):
            if reply.status == "wait":
                raise RunError(
                    f"shard {index} takes no episodes: {reply.reason or 'its limiter holds them back'}; "
                    "what was imported before is stored, importing again goes on from there"
                )
            yield reply.status


def _sum_stat(shards: Sequence[Shard], name: str) -> int:
    return sum(int(shard.stats()[name]) for shard in shards)


def _sum_rejects(shards: Sequence[Shard]) -> Counter[str]:
    return sum((shard.rejects for shard in shards), Counter())


# What fits together -------------------------------------------------------------------------------------------


def _facts_of(episode: Episode) -> Facts:
    observations = episode.observations
    return Facts(
        (episode.environment_id,), observations.shape[1:], str(observations.dtype), episode.policies.shape[1]
    )


def _facts_of_spec(spec: EnvironmentSpec) -> Facts:
    return Facts(
        (spec.id,), tuple(spec.observation_shape), str(np.dtype(spec.observation_dtype)), spec.num_actions
    )


def _check_facts(what: str, facts: Facts, expected: Facts) -> None:
    if facts.with_environments(*expected.environment_ids) != expected:
        raise RunError(f"{what} doesn't fit: it is of {facts}; expected {expected}")
