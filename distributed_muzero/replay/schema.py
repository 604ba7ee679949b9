"""Episodes and what is later learnt of them, as Arrow record batches: the payloads of a shard's two logs.

The schemas belong to the log's format and travel with the code, so that a record of short episodes isn't mostly
schema. Observations keep their own dtype, as bytes beside its name. A payload is an Arrow IPC record batch,
compressed as a whole by zstd, behind its length (8 bytes, little-endian).
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
_STATE_ENCODER = json.JSONEncoder(allow_nan=False)


def encode_episodes(stored: Sequence[StoredEpisode]) -> bytes:
    return _pack(episodes_to_arrow(stored))


def episodes_to_arrow(stored: Sequence[StoredEpisode]) -> pa.RecordBatch:
    """One row for each episode."""
    episodes = [item.episode for item in stored]
    columns: dict[str, Any] = {"key": [item.key for item in stored]}
    for name in _SCALARS:
        columns[name] = [getattr(episode, name) for episode in episodes]
    columns["num_actions"] = [episode.policies.shape[1] for episode in episodes]
    columns["observation_dtype"] = [str(episode.observations.dtype) for episode in episodes]
    columns["observation_shape"] = [list(episode.observations.shape[1:]) for episode in episodes]
    columns["observations"] = _binary([episode.observations for episode in episodes])
    for name in _ARRAYS:
        columns[name] = _lists([getattr(episode, name) for episode in episodes], _ARRAYS[name])
    return _batch(columns, EPISODES)


def decode_episodes(payload: bytes | memoryview) -> list[StoredEpisode]:
    return episodes_from_arrow(_unpack(payload, EPISODES))


def episodes_from_arrow(batch: pa.RecordBatch) -> list[StoredEpisode]:
    """The inverse of `episodes_to_arrow`; the arrays are views of the batch's memory."""
    keys = batch.column("key").to_pylist()
    scalars = {name: batch.column(name).to_pylist() for name in _SCALARS}
    dtypes = batch.column("observation_dtype").to_pylist()
    shapes = batch.column("observation_shape").to_pylist()
    num_actions = batch.column("num_actions").to_pylist()
    observations = batch.column("observations")
    arrays = {name: _unlist(batch.column(name)) for name in _ARRAYS}
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
        "policies": _lists([item.policies for item in targets], _ARRAYS["policies"]),
        "root_values": _lists([item.root_values for item in targets], _ARRAYS["root_values"]),
    }
    return _pack(_batch(columns, TARGETS))


def decode_targets(payload: bytes | memoryview) -> list[Targets]:
    batch = _unpack(payload, TARGETS)
    keys, versions = batch.column("key").to_pylist(), batch.column("version").to_pylist()
    policies, values = _unlist(batch.column("policies")), _unlist(batch.column("root_values"))
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


def _pack(batch: pa.RecordBatch) -> bytes:
    raw = batch.serialize()
    codec = pa.Codec("zstd", compression_level=ZSTD_LEVEL)
    return raw.size.to_bytes(8, "little") + codec.compress(raw, asbytes=True)


def _unpack(payload: bytes | memoryview, schema: pa.Schema) -> pa.RecordBatch:
    view = memoryview(payload)
    size = int.from_bytes(view[:8], "little")
    return pa.ipc.read_record_batch(pa.Codec("zstd").decompress(view[8:], size), schema)
