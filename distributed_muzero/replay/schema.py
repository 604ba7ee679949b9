"""Episodes and what is later learnt of them, as Arrow record batches: the payloads of a shard's two logs.

The schemas belong to the log's format and travel with the code, so that a record of short episodes isn't mostly
schema. Observations keep their own dtype, as bytes beside its name. A payload is an Arrow IPC record batch,
compressed as a whole by zstd, behind its length (8 bytes, little-endian).

Policies of many actions that are mostly zero are written as their other numbers, with how many zeros lie before,
between and behind them. The highest bit of the length tells; to versions that don't know it, it's no length at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from distributed_muzero.types import Episode

ZSTD_LEVEL = 1
MIN_SPARSE_ACTIONS = 100  # below it, zstd does as well
MAX_SPARSE_SHARE = 1 / 8  # of numbers other than 0, in a record
_IS_SPARSE = 1 << 63  # beside a payload's length


class Kind(IntEnum):
    """What a record holds."""

    EPISODES = 1
    TARGETS = 2
    PRIORITIES = 3
    STATE = 4
    IDS = 5


class StoredEpisode(NamedTuple):
    key: int  # the shard's own number of it, never given twice
    episode: Episode


class Targets(NamedTuple):
    """What a search with newer weights says of a stored episode; replaces what its actor's search said."""

    key: int
    version: int  # of the weights that searched
    policies: np.ndarray  # [T, A] float32
    root_values: np.ndarray  # [T+1] float32


class Priorities(NamedTuple):
    """Priorities of single steps, n in all."""

    keys: np.ndarray  # [n] int64
    steps: np.ndarray  # [n] int32
    priorities: np.ndarray  # [n] float32
    versions: np.ndarray  # [n] int64, of the weights that they come from


# Fields of an episode that hold one number, and those that hold an array.
_SCALARS = {
    "episode_id": pa.string(),
    "environment_id": pa.string(),
    "seed": pa.int64(),
    "weights_version": pa.int64(),
    "terminated": pa.bool_(),
    "truncated": pa.bool_(),
}
_ARRAYS = {
    "legal_masks": pa.list_(pa.uint8()),
    "actions": pa.list_(pa.int32()),
    "rewards": pa.list_(pa.float32()),
    "policies": pa.list_(pa.float32()),
    "root_values": pa.list_(pa.float32()),
    "to_play": pa.list_(pa.int8()),
}
EPISODES = pa.schema(
    [
        ("key", pa.int64()),
        *_SCALARS.items(),
        ("num_actions", pa.int32()),
        ("observation_dtype", pa.string()),
        ("observation_shape", pa.list_(pa.int32())),
        ("observations", pa.large_binary()),
        *_ARRAYS.items(),
    ]
)
TARGETS = pa.schema(
    [
        ("key", pa.int64()),
        ("version", pa.int64()),
        ("policies", pa.list_(pa.float32())),
        ("root_values", pa.list_(pa.float32())),
    ]
)
PRIORITIES = pa.schema(
    [("key", pa.int64()), ("step", pa.int32()), ("priority", pa.float32()), ("version", pa.int64())]
)
IDS = pa.schema([("episode_id", pa.string())])
_ZEROS = pa.field("zeros", pa.list_(pa.uint16()))
SPARSE_EPISODES = EPISODES.append(_ZEROS)
SPARSE_TARGETS = TARGETS.append(EPISODES.field("num_actions")).append(_ZEROS)
_STATE_ENCODER = json.JSONEncoder(allow_nan=False)


def encode_episodes(stored: Sequence[StoredEpisode]) -> bytes:
    policies = [item.episode.policies for item in stored]
    return _encode(_columns(stored), policies, EPISODES, SPARSE_EPISODES)


def episodes_to_arrow(stored: Sequence[StoredEpisode]) -> pa.RecordBatch:
    """One row for each episode; policies are dense."""
    policies = [item.episode.policies for item in stored]
    return _batch(_columns(stored) | {"policies": _lists(policies, _ARRAYS["policies"])}, EPISODES)


def _columns(stored: Sequence[StoredEpisode]) -> dict[str, Any]:
    """All but the policies."""
    episodes = [item.episode for item in stored]
    columns: dict[str, Any] = {"key": [item.key for item in stored]}
    for name in _SCALARS:
        columns[name] = [getattr(episode, name) for episode in episodes]
    columns["num_actions"] = [episode.policies.shape[1] for episode in episodes]
    columns["observation_dtype"] = [str(episode.observations.dtype) for episode in episodes]
    columns["observation_shape"] = [list(episode.observations.shape[1:]) for episode in episodes]
    columns["observations"] = _binary([episode.observations for episode in episodes])
    for name in _ARRAYS.keys() - {"policies"}:
        columns[name] = _lists([getattr(episode, name) for episode in episodes], _ARRAYS[name])
    return columns


def decode_episodes(payload: bytes | memoryview) -> list[StoredEpisode]:
    return episodes_from_arrow(_unpack(payload, EPISODES, SPARSE_EPISODES))


def episodes_from_arrow(batch: pa.RecordBatch) -> list[StoredEpisode]:
    """The inverse of `episodes_to_arrow`; the arrays are views of the batch's memory, but for sparse policies."""
    keys = batch.column("key").to_pylist()
    scalars = {name: batch.column(name).to_pylist() for name in _SCALARS}
    dtypes = batch.column("observation_dtype").to_pylist()
    shapes = batch.column("observation_shape").to_pylist()
    num_actions = batch.column("num_actions").to_pylist()
    observations = batch.column("observations")
    arrays = {name: _unlist(batch.column(name)) for name in _ARRAYS} | {"policies": _policies(batch)}
    stored = []
    for row, key in enumerate(keys):
        fields: dict[str, Any] = {name: values[row] for name, values in scalars.items()}
        fields |= {name: values[row] for name, values in arrays.items()}
        buffer = observations[row].as_buffer()
        fields["observations"] = np.frombuffer(buffer, dtypes[row]).reshape(-1, *shapes[row])
        fields["policies"] = fields["policies"].reshape(-1, num_actions[row])
        fields["legal_masks"] = fields["legal_masks"].view(bool).reshape(-1, num_actions[row])
        stored.append(StoredEpisode(key, Episode(**fields)))
    return stored


def encode_targets(targets: Sequence[Targets]) -> bytes:
    columns = {
        "key": [item.key for item in targets],
        "version": [item.version for item in targets],
        "root_values": _lists([item.root_values for item in targets], _ARRAYS["root_values"]),
    }
    return _encode(columns, [item.policies for item in targets], TARGETS, SPARSE_TARGETS)


def decode_targets(payload: bytes | memoryview) -> list[Targets]:
    batch = _unpack(payload, TARGETS, SPARSE_TARGETS)
    keys, versions = batch.column("key").to_pylist(), batch.column("version").to_pylist()
    policies, values = _policies(batch), _unlist(batch.column("root_values"))
    return [
        Targets(key, version, policy.reshape(len(value) - 1, -1), value)
        for key, version, policy, value in zip(keys, versions, policies, values, strict=True)
    ]


def encode_priorities(priorities: Priorities) -> bytes:
    columns = dict(zip(PRIORITIES.names, priorities, strict=True))
    return _pack(_batch(columns, PRIORITIES))


def decode_priorities(payload: bytes | memoryview) -> Priorities:
    batch = _unpack(payload, PRIORITIES)
    return Priorities(*(batch.column(name).to_numpy() for name in PRIORITIES.names))


def encode_ids(ids: Iterable[str]) -> bytes:
    return _pack(_batch({"episode_id": list(ids)}, IDS))


def decode_ids(payload: bytes | memoryview) -> list[str]:
    return _unpack(payload, IDS).column("episode_id").to_pylist()


def encode_state(state: dict[str, Any]) -> bytes:
    return _STATE_ENCODER.encode(state).encode()


def decode_state(payload: bytes | memoryview) -> dict[str, Any]:
    return json.loads(bytes(payload))


def _encode(
    columns: dict[str, Any], policies: Sequence[np.ndarray], dense: pa.Schema, sparse: pa.Schema
) -> bytes:
    """The payload of columns and policies [T, A], which become sparse where that saves most of them."""
    thinned = _thinned(policies)
    if thinned is None:
        return _pack(_batch(columns | {"policies": _lists(policies, _ARRAYS["policies"])}, dense))
    return _pack(_batch(columns | thinned, sparse), _IS_SPARSE)


def _thinned(policies: Sequence[np.ndarray]) -> dict[str, Any] | None:
    """The columns of sparse policies, or None where they would save little."""
    num_actions = [policy.shape[1] for policy in policies]
    if min(num_actions) < MIN_SPARSE_ACTIONS:
        return None
    flat = [np.ascontiguousarray(policy, np.float32).ravel() for policy in policies]
    # By their bits: −0 is a number, too.
    places = [np.flatnonzero(numbers.view(np.uint32) != 0) for numbers in flat]
    if sum(map(len, places)) > MAX_SPARSE_SHARE * sum(map(len, flat)):
        return None
    values, zeros = [], []
    for numbers, at in zip(flat, places, strict=True):
        values.append(numbers[at])
        zeros.append(np.diff(at, prepend=-1, append=len(numbers)) - 1)
    if max(gaps.max() for gaps in zeros) > np.iinfo(np.uint16).max:
        return None
    lists = {"policies": _lists(values, _ARRAYS["policies"]), "zeros": _lists(zeros, _ZEROS.type)}
    return lists | {"num_actions": num_actions}


def _policies(batch: pa.RecordBatch) -> list[np.ndarray]:
    """The policies [T·A] of each row. Raises ValueError for sparse ones that don't add up to that."""
    policies = _unlist(batch.column("policies"))
    if "zeros" not in batch.schema.names:
        return policies
    num_steps = [len(values) - 1 for values in _unlist(batch.column("root_values"))]
    num_actions = batch.column("num_actions").to_pylist()
    sizes = [steps * actions for steps, actions in zip(num_steps, num_actions, strict=True)]
    zeros = _unlist(batch.column("zeros"))
    return [_dense(*row) for row in zip(policies, zeros, sizes, strict=True)]


def _dense(values: np.ndarray, zeros: np.ndarray, size: int) -> np.ndarray:
    ends = np.cumsum(zeros.astype(np.int64) + 1) - 1
    if len(zeros) != len(values) + 1 or ends[-1] != size:
        raise ValueError(f"{len(values)} numbers and {zeros.sum()} zeros are no policies of {size}")
    policies = np.zeros(size, np.float32)
    policies[ends[:-1]] = values
    return policies


def _batch(columns: dict[str, Any], schema: pa.Schema) -> pa.RecordBatch:
    arrays = []
    for field in schema:
        values = columns[field.name]
        arrays.append(values if isinstance(values, pa.Array) else pa.array(values, field.type))
    return pa.record_batch(arrays, schema=schema)


def _binary(arrays: Sequence[np.ndarray]) -> pa.LargeBinaryArray:
    data = b"".join(np.ascontiguousarray(array).data.cast("B") for array in arrays)
    offsets = _offsets([array.nbytes for array in arrays], np.int64)
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(arrays), [None, offsets, pa.py_buffer(data)]
    )


def _lists(arrays: Sequence[np.ndarray], kind: pa.ListType) -> pa.ListArray:
    flat = np.concatenate([array.ravel() for array in arrays])
    dtype = kind.value_type.to_pandas_dtype()
    flat = flat.view(np.uint8) if flat.dtype == bool else flat.astype(dtype, copy=False)
    values = pa.Array.from_buffers(kind.value_type, len(flat), [None, pa.py_buffer(flat)])
    offsets = _offsets([array.size for array in arrays], np.int32)
    return pa.Array.from_buffers(kind, len(arrays), [None, offsets], children=[values])


def _offsets(sizes: Sequence[int], dtype: type) -> pa.Buffer:
    """Where each of them begins, and where the last one ends."""
    return pa.py_buffer(np.array([0, *accumulate(sizes)], dtype))


def _unlist(column: pa.ListArray) -> list[np.ndarray]:
    values = column.values.to_numpy()
    offsets = column.offsets.to_numpy()
    return [values[begin:end] for begin, end in pairwise(offsets)]


def _pack(batch: pa.RecordBatch, flags: int = 0) -> bytes:
    raw = batch.serialize()
    codec = pa.Codec("zstd", compression_level=ZSTD_LEVEL)
    return (raw.size | flags).to_bytes(8, "little") + codec.compress(raw, asbytes=True)


def _unpack(payload: bytes | memoryview, dense: pa.Schema, sparse: pa.Schema | None = None) -> pa.RecordBatch:
    view = memoryview(payload)
    size = int.from_bytes(view[:8], "little")
    is_sparse = sparse is not None and size & _IS_SPARSE
    raw = pa.Codec("zstd").decompress(view[8:], size & ~_IS_SPARSE if is_sparse else size)
    return pa.ipc.read_record_batch(raw, sparse if is_sparse else dense)
