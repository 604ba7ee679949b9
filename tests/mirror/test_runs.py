"""A tiny run, checkpoints and a real shard, with its copies: killed at any point, nothing that was copied is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from distributed_muzero import checkpoint
from distributed_muzero.config import make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.mirror import uri
from distributed_muzero.mirror.mirror import Mirror
from distributed_muzero.replay import store as replay_store
from distributed_muzero.workers.replay_shard import ReplayShard
from tests.episodes import make_episode
from tests.mirror.folders import killed_at

SPEC = EnvironmentSpec("mirrored", (64,), np.dtype(np.float32), (3,))
STEPS = 40  # of an episode: five of them fill a segment
SMALL_JOURNAL_BYTES = 3_000
CONFIG = make_config(
    {
        "replay": {
            "max_transitions": 40 * STEPS,
            "min_size_to_sample": 20,
            "segment_bytes": 2**16,
            "error_buffer": 10**9,
        },
        "learner": {"batch_size": 4},
    }
)


@pytest.fixture(autouse=True)
def small_journals(monkeypatch):
    monkeypatch.setattr(replay_store, "MIN_JOURNAL_BYTES", SMALL_JOURNAL_BYTES)


class MirroredRun:
    """A tiny run: episodes into a real shard, checkpoints of a few numbers, and the mirrors of both."""

    def __init__(self, folder: Path, place: str, name: str):
        self.folder = folder
        self.name = name
        self.run_mirror = Mirror(folder, place, exclude=("replay",))
        self.shard_mirror = Mirror(folder / "replay/shard_0", uri.join(place, "replay", "shard_0"))
        self.found = [mirror.claim() for mirror in self.mirrors]
        self.shard = ReplayShard(SPEC, CONFIG, 0, folder / "replay/shard_0")
        saved = checkpoint.latest_checkpoint(folder / "checkpoints")
        self.step = saved.step if saved else 0
        self.number = 0

    @property
    def mirrors(self) -> list[Mirror]:
        return [self.run_mirror, self.shard_mirror]

    def play(self, num_episodes: int) -> list[str]:
        """Ids of stored, acknowledged episodes."""
        played = [
            make_episode(STEPS, name=f"{self.name}/{self.number + i}", seed=i, spec=SPEC)
            for i in range(num_episodes)
        ]
        self.number += num_episodes
        assert {reply.status for reply in self.shard.insert(played)} == {"stored"}
        self.shard.sample()
        self.shard.flush()
        return [episode.episode_id for episode in played]

    def save(self, step: int) -> None:
        folder = self.folder / "checkpoints"
        weights = np.full(1000, step, np.float32)
        checkpoint.write_checkpoint(folder, step, {"weights": {"w": weights}}, {"note": time.time()})
        checkpoint.prune_checkpoints(folder, 2)
        if step % 2:
            checkpoint.mark_best(folder, step, float(step))
        self.step = step


def check_run(run: MirroredRun, acknowledged: list[str], step: int) -> None:
    """What a machine finds that has nothing but the copy."""
    saved = checkpoint.latest_checkpoint(run.folder / "checkpoints")
    assert (saved.step if saved else 0) >= step
    if saved:
        assert (saved.tensors["weights"]["w"] == saved.step).all()
    best = run.folder / "checkpoints/best.json"
    if best.exists():
        assert checkpoint.best_checkpoint(best.parent) is not None
    stats = run.shard.stats()
    assert stats["missing_episodes"] == 0
    assert run.shard.store.log.damage.corrupt_records == run.shard.store.journal.damage.corrupt_records == 0
    assert [name for name in acknowledged if not run.shard.store.has_stored(name)] == []


def test_a_kill_at_any_point_of_a_push_leaves_a_copy_that_a_run_goes_on_from(a_uri, tmp_path, monkeypatch):
    run = MirroredRun(tmp_path / "first", a_uri, "first")
    acknowledged = run.play(30)
    run.save(1)
    run.save(2)
    for mirror in run.mirrors:
        assert mirror.push()
    # Dropped segments, a journal written anew, a checkpoint written again, one pruned, another best one.
    segments = sorted((run.folder / "replay/shard_0/journal").glob("segment_*"))
    later = [name for _ in range(12) for name in run.play(5)]
    run.save(2)
    run.save(3)
    assert sorted((run.folder / "replay/shard_0/journal").glob("segment_*"))[0] not in segments
    there = Path(a_uri.removeprefix("file://"))
    shutil.copytree(there, tmp_path / "before")
    copied = {mirror: dict(mirror._copied) for mirror in run.mirrors}
    num_points = 0
    for mirror, work in ((run.shard_mirror, "shard"), (run.run_mirror, "run")):
        for point in range(200):
            shutil.rmtree(there)
            shutil.copytree(tmp_path / "before", there)
            mirror._copied = dict(copied[mirror])
            was_killed = killed_at(point, monkeypatch, mirror, mirror.push)
            found = MirroredRun(tmp_path / f"{work}-{point}", a_uri, "found")
            check_run(found, acknowledged + (later if work == "shard" and not was_killed else []), 2)
            found.shard.close()
            shutil.rmtree(found.folder)
            num_points += 1
            if not was_killed:
                break
        else:
            raise AssertionError("no end of the push in sight")
    assert num_points > 30
    run.shard.close()


def play_and_push(folder: Path, place: str, name: str, notes: Path) -> None:
    """Plays for ever, and pushes meanwhile; notes what is acknowledged, and what was when a whole push began.

    In a process of its own.
    """
    replay_store.MIN_JOURNAL_BYTES = SMALL_JOURNAL_BYTES
    run = MirroredRun(folder, place, name)
    noted = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(*line: object) -> None:
        os.write(noted, json.dumps(line).encode() + b"\n")

    note("claimed", *run.found)
    acknowledged: list[str] = []

    def push_on() -> None:
        while True:
            number, step = len(acknowledged), run.step
            are_whole = [mirror.push() for mirror in run.mirrors]
            if all(are_whole) and number and step:
                note("pushed", acknowledged[:number], step)

    threading.Thread(target=push_on, daemon=True).start()
    rng = random.Random(name)
    while True:
        new = run.play(rng.randint(1, 4))
        acknowledged += new
        note("acknowledged", new)
        if rng.random() < 0.2:
            run.save(run.step + rng.randint(0, 1) or 1)
        time.sleep(0.01)


@pytest.mark.slow
def test_kill_9_and_going_on_here_or_elsewhere_loses_nothing_that_was_pushed(any_uri, tmp_path):
    rng = random.Random(0)
    context = multiprocessing.get_context("spawn")
    known: list[str] = []
    step = 0
    folder = tmp_path / "machine-0"
    for number, is_elsewhere in enumerate([True, False, True, True]):
        if is_elsewhere:
            folder = tmp_path / f"machine-{number}"
        notes = tmp_path / f"notes-{number}"
        process = context.Process(target=play_and_push, args=(folder, any_uri, f"run/{number}", notes))
        process.start()
        try:
            wait_for(notes, "pushed", process)
            time.sleep(rng.uniform(0.1, 1.5))
        finally:
            process.kill()
            process.join(20)
        lines = [json.loads(line) for line in notes.read_text().splitlines()]
        assert [line[1:] for line in lines if line[0] == "claimed"] == [
            ["new", "new"] if number == 0 else ["fetched", "fetched"] if is_elsewhere else ["kept", "kept"]
        ]
        whole = [line for line in lines if line[0] == "pushed"]
        # The next machine is lost with its disk; the disk of this one holds all that it acknowledged.
        stays = number == 0
        known += (
            [name for line in lines if line[0] == "acknowledged" for name in line[1]]
            if stays
            else whole[-1][1]
        )
        step = whole[-1][2]
        if stays:
            continue
        found = MirroredRun(tmp_path / f"found-{number}", any_uri, "found")
        assert found.found == ["fetched", "fetched"]
        check_run(found, known, step)
        found.shard.close()


def wait_for(notes: Path, kind: str, process) -> None:
    deadline = time.monotonic() + 60
    while not (notes.exists() and f'["{kind}"' in notes.read_text()):
        assert process.is_alive() and time.monotonic() < deadline, f"nothing was {kind}"
        time.sleep(0.02)
