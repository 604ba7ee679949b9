"""A replay shard under fire: killed, its power cut, replies lost, bits flipped; then its history is checked.

Promises P2, P6 and P15 without Ray: a real shard in a process of its own, real outboxes before it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from distributed_muzero.chaos.history import check
from distributed_muzero.chaos.mutators import make_episode
from distributed_muzero.chaos.shard_process import BATCH_ROWS, SPEC, Protection, make_storm_config, taken_out
from distributed_muzero.errors import DistributedMuZeroError
from distributed_muzero.replay import log, schema
from distributed_muzero.replay.schema import Kind, Priorities, Targets
from distributed_muzero.types import Episode
from distributed_muzero.workers.history import RecordedInsert
from distributed_muzero.workers.outbox import Outbox
from distributed_muzero.workers.replay_shard import InsertReply
from distributed_muzero.workers.run_state import ActorReport

Mode = Literal["kill", "power_cut"]
SHARE_OF_LOST_REPLIES = 0.1
MAX_DELAY_SECONDS = 0.005
MAX_STEPS = 15  # of an episode
FLIPS = 3  # records damaged at each kill
CALL_SECONDS = 10.0
BATCHES_PER_CALL = 2
START_SECONDS = 60.0
CONSUMER = "consumer"


class StormResult(NamedTuple):
    """What the history checker found after `kills` kills, and what was measured meanwhile."""

    kills: int
    acknowledged: int
    stored: int
    evicted: int
    lost: int
    duplicates: int
    changed: int
    uninvited: int
    unknown: int
    recovery_seconds: list[float]  # from each kill to the first acknowledgement after it
    limiter_violations: int
    lost_replies: int
    damaged: int  # episodes in whose records bits were flipped; they don't count as lost
    damage_seen: int  # damaged places that the restarted shards counted
    crashes: int  # ends of the shard's process that nobody asked for; the first one ends the storm
    examples: tuple[str, ...]


class ShardLost(Exception):
    """The shard gave no answer."""


def run_storm(
    folder: Path,
    *,
    seed: int,
    num_kills: int = 20,
    num_producers: int = 4,
    mode: Mode = "kill",
    without: Protection | None = None,
    flips_bits: bool = False,
    progress: Callable[[str], None] | None = None,
) -> StormResult:
    """Kills a shard `num_kills` times while it is written to and read from, once more at the end, and checks.

    folder: new or empty.   mode: `power_cut` also takes back whatever no fsync has covered.
    without: the protection that is taken out, to see the campaign fail; "checksum" flips bits as `flips_bits` does.
    flips_bits: between kill and restart, damages some acknowledged records.
    Raises DistributedMuZeroError if nothing is acknowledged for a minute.
    """
    folder.mkdir(parents=True, exist_ok=True)
    storm = _Storm(folder.resolve(), seed, num_producers, mode, without)
    try:
        for number in range(num_kills):
            storm.wait_for_acknowledgement()
            time.sleep(storm.rng.uniform(0.02, 0.4))
            if storm.shard.has_crashed:
                break
            storm.kill(flips_bits or without == "checksum")
            storm.start()
            if progress:
                progress(f"kill {number + 1} of {num_kills}")
        storm.wait_for_acknowledgement()
        time.sleep(0.1)
    finally:
        storm.stop()
    if mode == "power_cut":
        storm.cut_power()
    return storm.result()


class _Storm:
    def __init__(self, folder: Path, seed: int, num_producers: int, mode: Mode, without: Protection | None):
        self.folder = folder
        self.mode = mode
        self.rng = np.random.default_rng([seed, 0])
        self.without = without
        self.shard = ShardHandle(folder, make_storm_config(seed), without, num_producers)
        self.damaged: set[str] = set()
        self.recovery_seconds: list[float] = []
        self.killed_at: float | None = None
        self.num_kills = 0
        self.stopping = threading.Event()
        self.histories = [folder / f"producer_{index}.jsonl" for index in range(num_producers)]
        self.producers = [
            _Producer(self.shard, index, seed, path, self.stopping)
            for index, path in enumerate(self.histories)
        ]
        self.consumer = _Consumer(self.shard, mode, self.stopping)
        self.start()
        for thread in [*self.producers, self.consumer]:
            thread.start()

    def start(self) -> None:
        self.shard.start()

    def wait_for_acknowledgement(self) -> None:
        """Until this incarnation of the shard has acknowledged something, or crashed."""
        deadline = time.monotonic() + START_SECONDS
        while (when := self.shard.first_acknowledgement) is None and not self.shard.has_crashed:
            if time.monotonic() > deadline:
                raise DistributedMuZeroError(f"the shard in {self.folder} acknowledged nothing for a minute")
            time.sleep(0.002)
        if when is not None and self.killed_at is not None:
            self.recovery_seconds.append(when - self.killed_at)
            self.killed_at = None

    def kill(self, flips_bits: bool) -> None:
        self.killed_at = self.shard.kill()
        self.num_kills += 1
        if self.mode == "power_cut":
            self.cut_power()
        if flips_bits:
            with taken_out(self.without):
                self.damaged |= flip_bits(self.shard.data / "episodes", self.rng, self.without == "checksum")

    def cut_power(self) -> None:
        cut_to_synced(self.shard.data, self.shard.synced)

    def stop(self) -> None:
        self.stopping.set()
        self.shard.kill()
        for thread in [*self.producers, self.consumer]:
            if thread.ident is not None:
                thread.join()

    def result(self) -> StormResult:
        # Bytes that were written with other checksums can't be judged by the real ones.
        with taken_out("checksum" if self.without == "checksum" else None):
            verdict = check(self.histories, [self.shard.data], self.damaged)
        return StormResult(
            kills=self.num_kills,
            recovery_seconds=self.recovery_seconds,
            limiter_violations=self.consumer.watch.num_violations,
            lost_replies=sum(producer.num_lost_replies for producer in self.producers),
            damaged=len(self.damaged),
            damage_seen=self.consumer.damage_seen,
            crashes=self.shard.num_crashes,
            **verdict._asdict(),
        )


class ShardHandle:
    """The shard's process, one incarnation after the other; each client has its own pipe to it."""

    def __init__(self, folder: Path, config: Any, without: Protection | None, num_producers: int):
        self.data = folder / "shard_0"
        self.synced = folder / "synced.jsonl"
        self.first_acknowledgement: float | None = None
        self.num_crashes = 0
        self._config = folder / "config.json"
        self._config.write_text(config.model_dump_json())
        self._errors = folder / "shard_errors.txt"
        self._without = without
        self._clients: list[int | str] = [*range(num_producers), CONSUMER]
        self._pipes: dict[int | str, Connection] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def has_crashed(self) -> bool:
        """Whether the process ended although nobody killed it."""
        if self._process is not None and self._process.poll() is not None:
            self.num_crashes = 1
        return self.num_crashes > 0

    def start(self) -> None:
        ends = {client: Pipe() for client in self._clients}
        numbers = [theirs.fileno() for _, theirs in ends.values()]
        command = [sys.executable, "-m", "distributed_muzero.chaos.shard_process", "--folder", str(self.data)]
        command += ["--config", str(self._config), "--synced", str(self.synced)]
        command += ["--connections", ",".join(map(str, numbers))]
        command += ["--without", self._without] if self._without else []
        with self._errors.open("ab") as errors:
            self._process = subprocess.Popen(command, pass_fds=numbers, stderr=errors)
        with self._lock:
            self.first_acknowledgement = None
            self._pipes = {client: ours for client, (ours, _) in ends.items()}
        for _, theirs in ends.values():
            theirs.close()

    def kill(self) -> float:
        """SIGKILL; returns when. The process is gone afterwards."""
        has_crashed, process = self.has_crashed, self._process
        now = time.monotonic()
        if process is not None and not has_crashed:
            os.kill(process.pid, signal.SIGKILL)
        if process is not None:
            process.wait()
        self._process = None
        return now

    def call(self, client: int | str, method: str, *arguments: Any) -> Any:
        """The shard's answer. Raises ShardLost without one, DistributedMuZeroError for one that says it failed."""
        with self._lock:
            pipe = self._pipes.get(client)
        if pipe is None:
            raise ShardLost
        try:
            pipe.send((method, arguments))
            if not pipe.poll(CALL_SECONDS):
                raise ShardLost
            succeeded, answer = pipe.recv()
        except (EOFError, OSError) as error:
            self._forget(client, pipe)
            raise ShardLost from error
        except ShardLost:
            # A late answer must not be taken for the next call's.
            self._forget(client, pipe)
            raise
        if not succeeded:
            raise DistributedMuZeroError(f"the shard failed: {answer}")
        if method == "insert" and any(reply.status in ("stored", "duplicate") for reply in answer):
            self._note_acknowledgement(client, pipe)
        return answer

    def _note_acknowledgement(self, client: int | str, pipe: Connection) -> None:
        with self._lock:
            # Not one that the last incarnation had still sent.
            if self._pipes.get(client) is pipe and self.first_acknowledgement is None:
                self.first_acknowledgement = time.monotonic()

    def _forget(self, client: int | str, pipe: Connection) -> None:
        with self._lock:
            if self._pipes.get(client) is pipe:
                del self._pipes[client]
        pipe.close()


class _Producer(threading.Thread):
    """An actor's outbox, fed with made-up games. Some answers to it are thrown away, some come late."""

    def __init__(self, shard: ShardHandle, index: int, seed: int, history: Path, stopping: threading.Event):
        super().__init__(daemon=True)
        self.num_lost_replies = 0
        self._shard = shard
        self._index = index
        self._rng = np.random.default_rng([seed, 1, index])
        self._insert = RecordedInsert(self._offer, history)
        self._stopping = stopping

    def run(self) -> None:
        outbox, report = Outbox(self._insert, num_shards=1, limit=4), ActorReport()
        number = 0
        while not self._stopping.is_set():
            if not outbox.is_blocked:
                steps = int(self._rng.integers(2, MAX_STEPS + 1))
                name = f"storm/{self._index}/0/{number}"
                outbox.put(make_episode(self._rng, SPEC, steps, name))
                number += 1
            outbox.flush(report)
            time.sleep(MAX_DELAY_SECONDS * self._rng.random())
        self._insert.close()

    def _offer(self, offers: dict[int, list[Episode]]) -> dict[int, list[InsertReply]]:
        try:
            replies = self._shard.call(self._index, "insert", offers[0])
        except ShardLost:
            return {}
        if self._rng.random() < SHARE_OF_LOST_REPLIES:
            self.num_lost_replies += 1
            return {}
        return {0: replies}


class _Consumer(threading.Thread):
    """A learner and a reanalyser: samples, sends priorities and targets back, and watches the limiter."""

    def __init__(self, shard: ShardHandle, mode: Mode, stopping: threading.Event):
        super().__init__(daemon=True)
        self.damage_seen = 0
        self.watch = LimiterWatch(journal_may_be_cut=mode == "power_cut")
        self._shard = shard
        self._stopping = stopping

    def run(self) -> None:
        version = 1
        while not self._stopping.is_set():
            try:
                self._turn(version)
            except ShardLost:
                time.sleep(0.01)
            version += 1

    def _turn(self, version: int) -> None:
        answer = self._call("sample", BATCHES_PER_CALL)
        self.watch.see(answer)
        for positions, _ in answer["batches"]:
            keys, steps = positions[:, 0], positions[:, 1].astype(np.int32)
            versions = np.full(len(keys), version)
            self._call(
                "update_priorities", Priorities(keys, steps, (0.1 + steps % 3).astype(np.float32), versions)
            )
        refreshed = [
            Targets(key, version, episode.policies, episode.root_values * np.float32(0.5))
            for key, episode in self._call("take_for_reanalyse", 20)
        ]
        self._call("update_targets", refreshed)
        if version % 8 == 0:
            stats = self._call("flush")
            self.watch.flushed(int(stats["sampled_rows"]))
            self.damage_seen = max(self.damage_seen, int(stats["corrupt_records"]))

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._shard.call(CONSUMER, method, *arguments)


class LimiterWatch:
    """Counts answers of a shard after which its limiter stood outside its bounds, or had forgotten samples.

    After a power cut a shard may have forgotten what it gave out since the last flush, so its balance may stand that
    much higher.
    """

    def __init__(self, journal_may_be_cut: bool):
        self.num_violations = 0
        self._journal_may_be_cut = journal_may_be_cut
        self._incarnation: int | None = None
        self._sampled = self._sampled_at_flush = 0
        self._forgiven = 0

    def see(self, limits: dict[str, Any]) -> None:
        """limits: what ShardServer.limits() says."""
        if limits["incarnation"] != self._incarnation:
            self._incarnation = limits["incarnation"]
            self._restored(limits["sampled"])
        self._sampled = limits["sampled"]
        slack = limits["error_buffer"]
        highest = slack + MAX_STEPS * limits["samples_per_insert"] + self._forgiven
        self.num_violations += not (limits["balance"] <= highest)
        self.num_violations += self._sampled > 0 and limits["balance"] < -slack

    def flushed(self, sampled: int) -> None:
        self._sampled_at_flush = sampled

    def _restored(self, sampled: int) -> None:
        forgotten = self._sampled - sampled
        may_forget = self._sampled - self._sampled_at_flush if self._journal_may_be_cut else 0
        self.num_violations += forgotten > may_forget
        if self._journal_may_be_cut:
            # With what the call in flight may have drawn.
            self._forgiven += max(forgotten, 0) + BATCHES_PER_CALL * BATCH_ROWS


def cut_to_synced(shard_folder: Path, synced: Path) -> None:
    """What a power cut leaves of a shard's logs: bytes and names that an fsync has covered, by `record_syncs`."""
    lengths: dict[str, int] = {}
    names: dict[str, set[str]] = {}
    lines = synced.read_bytes().splitlines(keepends=True) if synced.exists() else []
    for line in lines:
        if not line.endswith(b"\n"):
            continue
        durable = json.loads(line)
        if "file" in durable:
            lengths[durable["file"]] = durable["length"]
        else:
            names[durable["folder"]] = set(durable["names"])
    for path in shard_folder.glob("*/segment_*.log"):
        if str(path) not in lengths or path.name not in names.get(str(path.parent), ()):
            path.unlink()
        elif lengths[str(path)] < path.stat().st_size:
            os.truncate(path, lengths[str(path)])


def flip_bits(folder: Path, rng: np.random.Generator, must_decode: bool) -> set[str]:
    """Flips a bit in each of a few records of episodes, and returns the ids that they hold.

    must_decode: only flips that leave an episode of the same form, which nothing but a checksum can notice.
    """
    records = [record for record in log.read(folder) if record.kind == Kind.EPISODES]
    damaged: set[str] = set()
    # The newer half: older ones are evicted soon, so that nothing could come of it.
    for index in len(records) - 1 - rng.permutation((len(records) + 1) // 2)[:FLIPS]:
        payload = bytes(records[index].payload)
        flipped = _flip(payload, rng, must_decode)
        if flipped is not None:
            path = folder / f"segment_{records[index].segment:08d}.log"
            path.write_bytes(path.read_bytes().replace(payload, flipped))
            damaged |= {item.episode.episode_id for item in schema.decode_episodes(payload)}
    return damaged


def _flip(payload: bytes, rng: np.random.Generator, must_decode: bool) -> bytes | None:
    for _ in range(100):
        flipped = bytearray(payload)
        flipped[rng.integers(len(payload))] ^= 1 << int(rng.integers(8))
        if not must_decode or _has_same_form(payload, bytes(flipped)):
            return bytes(flipped)
    return None


def _has_same_form(payload: bytes, flipped: bytes) -> bool:
    try:
        schema._unpack(flipped, schema.EPISODES).validate(full=True)
        return _forms(flipped) == _forms(payload)
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError):
        return False


def _forms(payload: bytes) -> list[tuple]:
    """Of each episode all but the numbers in its arrays."""
    forms = []
    for key, episode in schema.decode_episodes(payload):
        values = {field.name: getattr(episode, field.name) for field in fields(episode)}
        shapes = [
            (value.shape, value.dtype.str) if isinstance(value, np.ndarray) else value
            for value in values.values()
        ]
        forms.append((key, *shapes))
    return forms
