"""Reads what RLlib has recorded (`offline_data(output=…)`) as episodes of ours; ray isn't needed for it.

RLlib writes folders of Parquet files in two forms, and both are read:

    item                                    a SingleAgentEpisode in msgpack (output_write_episodes=True)
    eps_id, obs, actions, rewards, new_obs  a row for each step (output_write_episodes=False), where nothing is
    terminateds, truncateds, …              compressed: RLlib compresses pickles, and those are never read

A search's policies and values are not in there: `Piece.episode` says what stands for them. Whatever doesn't fit the
environment is refused by the shard, with its reason, as all episodes are that can't be learnt from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import RunError
from distributed_muzero.replay.msgpack_arrays import UnreadableError, unpack
from distributed_muzero.replay.recorded_pieces import LOGITS, VALUES, Piece
from distributed_muzero.replay.schema import StoredEpisode

STEPS = frozenset({"eps_id", "obs", "actions", "rewards", "new_obs"})
EPISODES = "item"
OWN = b"distributed_muzero"  # in the footer of our own datasets
TAIL_BYTES = 2**16
BATCH_ROWS = 64  # in memory
TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
TENSOR = "ray.data.arrow_tensor"  # and _v2


def is_recording(path: Path) -> bool:
    """Whether it is a Parquet file of RLlib's, or a folder with such files anywhere below it."""
    files = _files(path)
    if not files:
        return False
    try:
        with files[0].open("rb") as file:
            file.seek(max(files[0].stat().st_size - TAIL_BYTES, 0))
            if OWN in file.read():
                return False  # it has a checksum, to be asked before any parser is
        names = set(pq.read_schema(files[0]).names)
    except (pa.ArrowException, OSError):
        return False
    return names == {EPISODES} or names >= STEPS


def read_recording(path: Path, spec: EnvironmentSpec, discount: float) -> Iterator[StoredEpisode]:
    """All episodes, those that RLlib recorded in several pieces as one. Raises RunError for files that can't be read.

    A game that the recording doesn't end is cut there, as by a time limit.
    """
    for key, piece in enumerate(_joined(_folders(path))):
        yield StoredEpisode(key, piece.episode(spec, discount))


def check_columns(path: Path) -> None:
    """Raises RunError for files whose observations or actions can't be read: they are pickles."""
    for file in _files(path):
        try:
            schema = pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            raise RunError(f"can't read {file}: {error}; take another copy of it") from error
        for name in {"obs", "new_obs", "actions"} & set(schema.names):
            kind = schema.field(name).type
            kind = kind.storage_type if isinstance(kind, pa.ExtensionType) else kind
            if any(is_text(kind) for is_text in TEXTS):
                raise RunError(
                    f"{file}: column {name} holds pickles, compressed or not, which are never read: record with "
                    "offline_data(output_compress_columns=[]), and observations that are arrays"
                )


def check_players(path: Path, spec: EnvironmentSpec) -> None:
    """Raises RunError for an environment whose games RLlib's episodes can't tell."""
    if spec.num_players == 2:
        raise RunError(
            f"{path} is a recording of RLlib's, whose episodes hold one player's turns, and {spec.id} is for two; "
            "record games for two with distributed_muzero"
        )


def _joined(folders: Iterator[Iterator[Piece]]) -> Iterator[Piece]:
    """Pieces of one game put together: they come in order, and others may come between them. Each game once."""
    unfinished: dict[str, Piece] = {}
    finished: set[str] = set()
    parts: Counter[str] = Counter()
    for piece in chain.from_iterable(map(_joined_once, folders)):
        if piece.game in finished:
            continue
        before = unfinished.pop(piece.game, None)
        # Rewritten rows first: a game may come back to where it began.
        if before is not None and not before.begins(piece):
            if (both := _together(before, piece)) is None:
                parts[piece.game] += 1
                yield before
            piece = (both or piece)._replace(part=parts[piece.game])
        if piece.is_over:
            finished.add(piece.game)
            yield piece
        else:
            unfinished[piece.game] = piece
    yield from unfinished.values()


def _joined_once(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The pieces of what was written at once, in which nothing comes twice, as far as they go on with one another."""
    unfinished: dict[str, Piece] = {}
    for piece in pieces:
        if before := unfinished.pop(piece.game, None):
            if (both := _together(before, piece)) is None and not before.begins(piece):
                yield before
            piece = both or piece
        if piece.is_over:
            yield piece
        else:
            unfinished[piece.game] = piece
    yield from unfinished.values()


def _together(before: Piece, piece: Piece) -> Piece | None:
    """None for two fragments of a game, with a gap between them."""
    if before.goes_on_with(piece):
        return before.joined(piece)
    return before if before.holds(piece) else None


def _folders(path: Path) -> Iterator[Iterator[Piece]]:
    """RLlib makes a folder each time that it writes. Where it is to write rows without output_max_rows_per_file, all
    that it has written before is in there once more."""
    for _, files in groupby(_files(path), key=lambda file: file.parent):
        yield chain.from_iterable(map(_pieces, files))


def _pieces(file: Path) -> Iterator[Piece]:
    check_columns(file)
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(BATCH_ROWS):
                yield from (
                    _recorded_episodes(batch) if batch.schema.names == [EPISODES] else _recorded_steps(batch)
                )
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"can't read {file}: {error}; take another copy of it") from error
    except (UnreadableError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunError(
            f"{file} holds what RLlib 2.60 doesn't write ({type(error).__name__}: {error}); record it anew"
        ) from error


def _files(path: Path) -> list[Path]:
    """In the order in which they were written."""
    return sorted(path.rglob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []


# A row for each episode ---------------------------------------------------------------------------------------


def _items(state: Mapping[str, Any]) -> list[Any]:
    """Of one of RLlib's buffers, without what belongs to the piece before."""
    return _rows(state["data"])[state["lookback"] :]


def _rows(data: Any) -> list[Any]:
    """A list of items, from a list or from arrays that hold them back to back."""
    if isinstance(data, Mapping):
        columns = {name: _rows(column) for name, column in data.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return list(data)


def _recorded_episodes(batch: pa.RecordBatch) -> Iterator[Piece]:
    for packed in batch.column(EPISODES).to_pylist():
        state = unpack(packed)
        extra = state["extra_model_outputs"] or {}
        yield Piece(
            game=str(state["id_"]),
            begin=int(state["t_started"]),
            observations=_items(state["observations"]),
            actions=_items(state["actions"]),
            rewards=_items(state["rewards"]),
            extra={name: _items(extra[name]) for name in (LOGITS, VALUES) if extra.get(name)},
            terminated=bool(state["is_terminated"]),
            truncated=bool(state["is_truncated"]),
        )


# A row for each step ------------------------------------------------------------------------------------------


def _recorded_steps(batch: pa.RecordBatch) -> Iterator[Piece]:
    """A piece for each step; where a step begins is not told, so that a game is told by what it shows."""
    ends = {"terminateds", "truncateds"} & set(batch.schema.names)
    names = [*STEPS, *ends, *({LOGITS, VALUES} & set(batch.schema.names))]
    for row in zip(*(_plain(batch, name) for name in names), strict=True):
        step = dict(zip(names, row, strict=True))
        yield Piece(
            game=str(step["eps_id"]),
            begin=None,
            observations=[step["obs"], step["new_obs"]],
            actions=[step["actions"]],
            rewards=[step["rewards"]],
            extra={name: [step[name]] for name in (LOGITS, VALUES) if name in step},
            terminated=bool(step.get("terminateds")),
            truncated=bool(step.get("truncateds")),
        )


def _plain(batch: pa.RecordBatch, name: str) -> list[Any]:
    """Python's values, but arrays for lists of numbers; ray's tensors in their own shape."""
    column = batch.column(name)
    column = column.storage if isinstance(column, pa.ExtensionArray) else column
    items = _arrays(column) if _holds_numbers(column) else column.to_pylist()
    shape = _tensor_shape(batch.schema.field(name))
    return items if shape is None else [np.reshape(item, shape) for item in items]


def _holds_numbers(column: pa.Array) -> bool:
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    is_plain = is_list and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type))
    return is_plain and not column.null_count and not column.values.null_count


def _arrays(column: pa.ListArray) -> list[np.ndarray]:
    """Copies: a view of one row would keep the whole batch."""
    values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
    return [values[begin:end].copy() for begin, end in pairwise(offsets)]


def _tensor_shape(field: pa.Field) -> list[int] | None:
    """Of each of ray's tensors, which lie there flat. None for anything else, and for what isn't JSON: pickles."""
    if isinstance(field.type, pa.ExtensionType):  # ray has made them known in this process
        name, shape = field.type.extension_name, getattr(field.type, "shape", None)
        return list(shape) if name.startswith(TENSOR) and shape and None not in shape else None
    metadata = field.metadata or {}
    if not metadata.get(b"ARROW:extension:name", b"").startswith(TENSOR.encode()):
        return None
    try:
        return json.loads(metadata[b"ARROW:extension:metadata"])
    except ValueError:
        return None
