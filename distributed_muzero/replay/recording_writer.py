"""Writes episodes as RLlib records them, for its offline algorithms: a folder of Parquet files, an episode a row.

RLlib reads it by `offline_data(input_=[FOLDER], input_read_episodes=True)`, for which it needs the package
msgpack-numpy. Observations become {"observations": …, "action_mask": [A]} where the games forbid any action. The
search's policies are there as `action_dist_inputs`, their logarithms.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distributed_muzero.errors import RunError
from distributed_muzero.files import sync_folder
from distributed_muzero.replay.msgpack_arrays import pack
from distributed_muzero.replay.recorded_pieces import LOGITS, MASK, OBSERVATIONS
from distributed_muzero.replay.schema import StoredEpisode
from distributed_muzero.types import Episode

ITEM = "item"
FILE_BYTES = 16 * 1024**2  # of packed episodes; RLlib reads files side by side


def write_recording(folder: Path, read: Callable[[], Iterable[StoredEpisode]]) -> tuple[int, int]:
    """Writes what `read()` gives, all or nothing; it is called twice. Returns how many episodes and transitions.

    Raises RunError for a folder that is there, no episodes, games for two, and a disk that refuses.
    """
    if folder.exists():
        raise RunError(f"{folder} is there already; choose another folder, or remove it")
    has_masks = any(not stored.episode.legal_masks.all() for stored in read())
    temporary = folder.with_name(f".{folder.name}.writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        counts = _write(temporary, (stored.episode for stored in read()), has_masks)
        sync_folder(temporary)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise RunError(f"can't write {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


def _write(folder: Path, episodes: Iterator[Episode], has_masks: bool) -> tuple[int, int]:
    first = next(episodes, None)
    if first is None:
        raise RunError("there are no episodes to write: none is held, or none was chosen")
    num_files = num_episodes = num_transitions = num_bytes = 0
    packed: list[bytes] = []
    for episode in chain([first], episodes):
        packed.append(pack(_state(episode, has_masks)))
        num_bytes += len(packed[-1])
        num_episodes, num_transitions = num_episodes + 1, num_transitions + episode.num_steps
        if num_bytes >= FILE_BYTES:
            _write_file(folder, num_files, packed)
            packed, num_bytes, num_files = [], 0, num_files + 1
    if packed:
        _write_file(folder, num_files, packed)
    return num_episodes, num_transitions


def _write_file(folder: Path, number: int, packed: list[bytes]) -> None:
    table = pa.table({ITEM: pa.array(packed, pa.binary())})
    pq.write_table(table, folder / f"episodes-{number:06d}.parquet", compression="zstd", use_dictionary=False)


def _state(episode: Episode, has_masks: bool) -> dict[str, Any]:
    """What `SingleAgentEpisode.from_state` of RLlib takes. Raises RunError for a game for two and unexpected masks."""
    if episode.to_play.any():
        raise RunError(
            f"episode {episode.episode_id} is of a game for two, and RLlib's episodes hold one player's turns; export "
            "it without --format"
        )
    observations: list[Any] = list(episode.observations)
    if not (has_masks or episode.legal_masks.all()):
        raise RunError(
            f"episode {episode.episode_id} forbids actions, and those that were held a moment ago didn't: the run goes "
            "on meanwhile; export again"
        )
    if has_masks:
        # What is legal after the end was never asked for.
        masks = [*episode.legal_masks.astype(np.float32), np.ones(episode.legal_masks.shape[1], np.float32)]
        observations = [{OBSERVATIONS: o, MASK: m} for o, m in zip(observations, masks, strict=True)]
    with np.errstate(divide="ignore"):
        logits = np.log(episode.policies).clip(min=np.finfo(np.float32).min)
    return {
        "id_": episode.episode_id,
        "agent_id": None,
        "module_id": None,
        "multi_agent_episode_id": None,
        "observations": _buffer(observations),
        "actions": _buffer(episode.actions.tolist()),
        "rewards": _buffer(episode.rewards.tolist()),
        "infos": _buffer([{}] * (episode.num_steps + 1)),
        "extra_model_outputs": {LOGITS: _buffer(list(logits))},
        "is_terminated": bool(episode.terminated),
        "is_truncated": bool(episode.truncated),
        "t_started": 0,
        "t": episode.num_steps,
        "_observation_space": None,
        "_action_space": None,
        "_start_time": None,
        "_last_step_time": None,
        "custom_data": {},
    }


def _buffer(items: list[Any]) -> dict[str, Any]:
    return {"data": items, "lookback": 0, "finalized": False, "space": None}
