"""Stored episodes that a run is given to learn from: datasets, or other runs' replay."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

from distributed_muzero.errors import RunError
from distributed_muzero.mirror.uri import is_uri
from distributed_muzero.replay.dataset import import_datasets
from distributed_muzero.run_folder import RunFolder
from distributed_muzero.workers.builder import Builder
from distributed_muzero.workers.run_copy import Copies
from distributed_muzero.workers.runs import open_to_read

NOT_LEARNT_FROM = ("checkpoints", "tensorboard", "history")  # of a run at a URI that is a dataset


@cache
def dataset_path(dataset: Path | str) -> Path:
    """Where a dataset lies on this machine: a run at a URI is fetched, once. Raises RunError."""
    return open_to_read(str(dataset), "", NOT_LEARNT_FROM).path if is_uri(dataset) else Path(dataset)


@contextmanager
def dataset_paths(datasets: Sequence[Path | str]) -> Iterator[list[Path]]:
    """The last use of them in this process: what was fetched is removed afterwards. Raises RunError."""
    paths = [dataset_path(dataset) for dataset in datasets]
    try:
        yield paths
    finally:
        for dataset, path in zip(datasets, paths, strict=True):
            if is_uri(dataset):
                shutil.rmtree(path, ignore_errors=True)
        dataset_path.cache_clear()


def import_stored(
    folder: RunFolder,
    datasets: Sequence[Path | str],
    copies: Copies | None,
    tell: Callable[[str], None],
    stop_requested: Callable[[], bool],
) -> None:
    """Puts the datasets' episodes into the run's replay; those that it holds already are not stored twice.

    What a stop or a kill leaves out is imported when the run goes on, here or elsewhere. Raises RunError if nothing can
    be learnt from.
    """
    if not datasets:
        check_can_learn(folder, copies)
        return
    folder.write_datasets(datasets)
    if copies:
        copies.push()
    pushing = copies.keep_pushing(once_more=False) if copies else nullcontext()
    with pushing, dataset_paths(datasets) as paths:
        counts = import_datasets(paths, folder.replay, Builder(folder.config, folder.name), stop_requested)
    if copies:
        # Before the copy may say that nothing is left to import.
        copies.push()
    if stop_requested():
        tell("the import was stopped; it goes on when the run does")
        return
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts.rejected.items())
    if not counts.stored + counts.duplicates:
        raise RunError(
            f"none of the {counts.offered} stored episodes can be learnt from ({reasons}); "
            "choose other datasets, or settings that fit them"
        )
    folder.write_datasets([])
    tell(
        f"{counts.offered} stored episodes: {counts.stored} new ({counts.stored_transitions} transitions), "
        f"{counts.duplicates} known, {sum(counts.rejected.values())} refused"
        + (f" ({reasons})" if reasons else "")
    )
    if counts.evicted_transitions:
        tell(
            f"{counts.evicted_transitions} transitions didn't fit; raise replay.max_transitions to use them all"
        )


def check_can_learn(folder: RunFolder, copies: Copies | None) -> None:
    """Raises RunError for a run that learns from stored episodes alone, and has none: it would wait for ever."""
    if not folder.config.is_offline:
        return
    has_episodes = copies.has_episodes() if copies else any(folder.replay.glob("shard_*/episodes/segment_*"))
    if not has_episodes:
        raise RunError(
            f"run {folder.name!r} learns from stored episodes alone, and {folder.place} holds none: put some in with "
            f"`replay import {folder.name} DATASET`, or start another run with --offline DATASET"
        )
