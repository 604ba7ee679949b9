"""A replay shard under fire: killed, its power cut, replies lost, bits flipped; then its history is checked.

Promises P2, P6 and P15 without Ray: a real shard in a process of its own, real outboxes before it.
"""

from __future__ import annotations

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
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa

from distributed_muzero.chaos.bad_disk import cut_to_synced
from distributed_muzero.chaos.history import MAX_EXAMPLES, Verdict, check
from distributed_muzero.chaos.mutators import make_episode
from distributed_muzero.chaos.shard_process import SPEC, Protection, make_storm_config, taken_out
from distributed_muzero.chaos.storm_watch import BATCHES_PER_CALL, MAX_STEPS, LimiterWatch, ResourceWatch
from distributed_muzero.errors import DistributedMuZeroError
from distributed_muzero.replay import log_format, schema
from distributed_muzero.replay.schema import Kind, Priorities, StoredEpisode, Targets
from distributed_muzero.types import Episode
from distributed_muzero.workers.history import RecordedInsert
from distributed_muzero.workers.outbox import Outbox
from distributed_muzero.workers.replay_shard import InsertReply
from distributed_muzero.workers.run_state import ActorReport

Mode = Literal["kill", "power_cut", "bad_disk"]
MODES: tuple[Mode, ...] = get_args(Mode)
# From an incarnation's first acknowledgement to its end. A disk needs some time to fail in many ways.
LIFE_SECONDS = {"kill": (0.02, 0.4), "power_cut": (0.02, 0.4), "bad_disk": (0.1, 2.0)}
SHARE_OF_LOST_REPLIES = 0.1
SHARE_OF_REPETITIONS = 0.2  # offers that are made again before the first has an answer
MAX_AT_ONCE = 4  # games that end together
MAX_DELAY_SECONDS = 0.005
FLIPS = 3  # records damaged at each kill
CALL_SECONDS = 30.0
START_SECONDS = 60.0
WRONG = ("lost", "duplicates", "changed", "uninvited")  # of a verdict
CONSUMER = (-1, 0)

Client = tuple[int, int]  # a producer, and which of its pipes


class StormResult(NamedTuple):
    """What the history checker found at the end, or at the worst of `kills` kills, and what was measured meanwhile."""

    kills: int
    acknowledged: int
    stored: int
    evicted: int
    lost: int
    duplicates: int
    changed: int
    uninvited: int
    unknown: int
    recovery_seconds: list[float]  # from each restart to the first acknowledgement after it
    limiter_violations: int
    lost_replies: int
    damaged: int  # episodes in whose records bits were flipped; they don't count as lost
    damage_seen: int  # damaged places that the restarted shards counted
    crashes: int  # ends of the shard's process that nobody asked for; the first one ends the storm
    failures: int  # calls that it answered with an exception
    leaked: int  # files that it had open beyond those that it needs
    disk_faults: int  # calls of the operating system that were made to fail
    examples: tuple[str, ...]

    @property
    def wrong(self) -> int:
        """How much of it must not be; the limiter's bounds are another promise."""
        episodes = self.lost + self.duplicates + self.changed + self.uninvited
        return episodes + self.crashes + self.failures + (self.leaked > 0)


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

    folder: new or empty.   mode: `power_cut` also takes back whatever no fsync has covered; in `bad_disk`, writes and
    fsyncs fail at random, and half of the kills are power cuts.
    without: the protection that is taken out, to see the campaign fail; "checksum" flips bits as `flips_bits` does.
    flips_bits: between kill and restart, damages some acknowledged records.
    Raises DistributedMuZeroError if nothing is acknowledged for a minute.
    """
    folder.mkdir(parents=True, exist_ok=True)
    storm = _Storm(folder.resolve(), seed, num_producers, mode, without)
    try:
        for number in range(num_kills):
            storm.wait_for_acknowledgement()
            time.sleep(storm.rng.uniform(*LIFE_SECONDS[mode]))
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
    if mode != "kill":
        storm.cut_power()
    storm.judge()
    return storm.result()


class _Storm:
    def __init__(self, folder: Path, seed: int, num_producers: int, mode: Mode, without: Protection | None):
        self.folder = folder
        self.seed = seed
        self.mode = mode
        self.rng = np.random.default_rng([seed, 0])
        self.without = without
        config = make_storm_config(seed)
        self.capacity = config.replay.max_transitions
        self.shard = ShardHandle(folder, config, without, num_producers)
        self.damaged: list[StoredEpisode] = []
        self.verdicts: list[Verdict] = []
        self.recovery_seconds: list[float] = []
        self.started_at: float | None = None  # after a kill, until something is acknowledged
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
        if self.num_kills:
            self.started_at = time.monotonic()
        # Each incarnation fails at other calls.
        self.shard.start(1000 * self.seed + self.num_kills if self.mode == "bad_disk" else None)

    def wait_for_acknowledgement(self) -> None:
        """Until this incarnation of the shard has acknowledged something, or crashed."""
        deadline = time.monotonic() + START_SECONDS
        while (when := self.shard.first_acknowledgement) is None and not self.shard.has_crashed:
            if time.monotonic() > deadline:
                raise DistributedMuZeroError(f"the shard in {self.folder} acknowledged nothing for a minute")
            time.sleep(0.002)
        if when is not None and self.started_at is not None:
            self.recovery_seconds.append(when - self.started_at)
            self.started_at = None

    def kill(self, flips_bits: bool) -> None:
        self.shard.kill()
        self.num_kills += 1
        if self.mode == "power_cut" or (self.mode == "bad_disk" and self.num_kills % 2):
            self.cut_power()
        self.judge()
        if flips_bits:
            with taken_out(self.without):
                self.damaged += flip_bits(self.shard.data / "episodes", self.rng, self.without == "checksum")

    def cut_power(self) -> None:
        cut_to_synced(self.shard.data, self.shard.synced)

    def stop(self) -> None:
        self.stopping.set()
        self.shard.kill()
        for thread in [*self.producers, self.consumer]:
            if thread.ident is not None:
                thread.join()

    def judge(self) -> None:
        """Checks the history as it is. At the end, what was wrong may have been evicted."""
        # Bytes that were written with other checksums can't be judged by the real ones.
        with taken_out("checksum" if self.without == "checksum" else None):
            self.verdicts.append(check(self.histories, [self.shard.data], self.capacity, self.damaged))

    def result(self) -> StormResult:
        worst = {name: max(getattr(verdict, name) for verdict in self.verdicts) for name in WRONG}
        examples = [
            example for verdict in self.verdicts for example in verdict.examples
        ] + self.shard.failures
        if leaked := self.consumer.resources.num_leaked:
            examples.append(f"{leaked} files too many were open")
        verdict = self.verdicts[-1]._replace(**worst, examples=tuple(dict.fromkeys(examples))[:MAX_EXAMPLES])
        return StormResult(
            kills=self.num_kills,
            recovery_seconds=self.recovery_seconds,
            limiter_violations=self.consumer.watch.num_violations,
            lost_replies=sum(producer.num_lost_replies for producer in self.producers),
            damaged=len(self.damaged),
            damage_seen=self.consumer.damage_seen,
            crashes=self.shard.num_crashes,
            failures=len(self.shard.failures),
            leaked=leaked,
            disk_faults=self.consumer.resources.num_faults,
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
        self.failures: list[str] = []  # what the shard said of calls that it didn't carry out
        self._clients = [*((index, turn) for index in range(num_producers) for turn in range(2)), CONSUMER]
        self._pipes: dict[Client, Connection] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def has_crashed(self) -> bool:
        """Whether the process ended although nobody killed it."""
        if self._process is not None and self._process.poll() is not None:
            self.num_crashes = 1
        return self.num_crashes > 0

    def start(self, faults: int | None = None) -> None:
        """faults: the seed of a disk that fails at random."""
        ends = {client: Pipe() for client in self._clients}
        numbers = [theirs.fileno() for _, theirs in ends.values()]
        command = [sys.executable, "-m", "distributed_muzero.chaos.shard_process", "--folder", str(self.data)]
        command += ["--config", str(self._config), "--synced", str(self.synced)]
        command += ["--connections", ",".join(map(str, numbers))]
        command += ["--without", self._without] if self._without else []
        command += ["--faults", str(faults)] if faults is not None else []
        with self._errors.open("ab") as errors:
            self._process = subprocess.Popen(command, pass_fds=numbers, stderr=errors)
        with self._lock:
            self.first_acknowledgement = None
            self._pipes = {client: ours for client, (ours, _) in ends.items()}
        for _, theirs in ends.values():
            theirs.close()

    def kill(self) -> None:
        """SIGKILL. The process is gone afterwards."""
        has_crashed, process = self.has_crashed, self._process
        if process is not None and not has_crashed:
            os.kill(process.pid, signal.SIGKILL)
        if process is not None:
            process.wait()
        self._process = None

    def call(self, client: Client, method: str, *arguments: Any) -> Any:
        """The shard's answer. Raises ShardLost without one, or where it says that it failed; that is counted."""
        return self.receive(client, self.send(client, method, *arguments))

    def send(self, client: Client, method: str, *arguments: Any) -> Connection:
        """Begins a call; `receive` takes its answer from the pipe. Raises ShardLost."""
        with self._lock:
            pipe = self._pipes.get(client)
        if pipe is None:
            raise ShardLost
        try:
            pipe.send((method, arguments))
        except OSError as error:
            self._forget(client, pipe)
            raise ShardLost from error
        return pipe

    def receive(self, client: Client, pipe: Connection) -> Any:
        try:
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
            with self._lock:
                self.failures.append(answer)
            raise ShardLost(answer)
        if _acknowledges(answer):
            self._note_acknowledgement(client, pipe)
        return answer

    def _note_acknowledgement(self, client: Client, pipe: Connection) -> None:
        with self._lock:
            # Not one that the last incarnation had still sent.
            if self._pipes.get(client) is pipe and self.first_acknowledgement is None:
                self.first_acknowledgement = time.monotonic()

    def _forget(self, client: Client, pipe: Connection) -> None:
        with self._lock:
            if self._pipes.get(client) is pipe:
                del self._pipes[client]
        pipe.close()


class _Producer(threading.Thread):
    """An actor's outbox, fed with made-up games. Some answers are thrown away; some offers are made twice."""

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
            for _ in range(0 if outbox.is_blocked else int(self._rng.integers(1, MAX_AT_ONCE + 1))):
                steps = int(self._rng.integers(2, MAX_STEPS + 1))
                name = f"storm/{self._index}/0/{number}"
                outbox.put(make_episode(self._rng, SPEC, steps, name))
                number += 1
            outbox.flush(report)
            time.sleep(MAX_DELAY_SECONDS * self._rng.random())
        self._insert.close()

    def _offer(self, offers: dict[int, list[Episode]]) -> dict[int, list[InsertReply]]:
        try:
            replies = self._insert_once_or_twice(offers[0])
        except ShardLost:
            return {}
        if self._rng.random() < SHARE_OF_LOST_REPLIES:
            self.num_lost_replies += 1
            return {}
        return {0: replies}

    def _insert_once_or_twice(self, episodes: list[Episode]) -> list[InsertReply]:
        """Like an actor whose patience ends before the first answer comes; either answer may be the one that counts."""
        if self._rng.random() >= SHARE_OF_REPETITIONS:
            return self._shard.call((self._index, 0), "insert", episodes)
        first = self._shard.send((self._index, 0), "insert", episodes)
        time.sleep(MAX_DELAY_SECONDS * self._rng.random())
        second = self._shard.send((self._index, 1), "insert", episodes)
        answers = [
            self._shard.receive((self._index, turn), pipe) for turn, pipe in enumerate((first, second))
        ]
        return answers[int(self._rng.integers(2))]


class _Consumer(threading.Thread):
    """A learner and a reanalyser: samples, sends priorities and targets back, and watches the limiter."""

    def __init__(self, shard: ShardHandle, mode: Mode, stopping: threading.Event):
        super().__init__(daemon=True)
        self.damage_seen = 0
        # A sync that fails takes the journal back to the one before.
        self.watch = LimiterWatch(journal_may_be_cut=mode != "kill")
        self.resources = ResourceWatch()
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
        self.resources.see(answer)
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
            if stats["flushed"]:
                self.watch.flushed(int(stats["sampled_rows"]))
            self.damage_seen = max(self.damage_seen, int(stats["corrupt_records"]))

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._shard.call(CONSUMER, method, *arguments)


def flip_bits(folder: Path, rng: np.random.Generator, must_decode: bool) -> list[StoredEpisode]:
    """Flips a bit in each of a few records of episodes, and returns what they held.

    must_decode: only flips that leave an episode of the same form, which nothing but a checksum can notice.
    """
    records = [record for record in log_format.read(folder) if record.kind == Kind.EPISODES]
    damaged: list[StoredEpisode] = []
    # The newer half: older ones are evicted soon, so that nothing could come of it.
    for index in len(records) - 1 - rng.permutation((len(records) + 1) // 2)[:FLIPS]:
        payload = bytes(records[index].payload)
        flipped = _flip(payload, rng, must_decode)
        if flipped is not None:
            path = folder / f"segment_{records[index].segment:08d}.log"
            path.write_bytes(path.read_bytes().replace(payload, flipped))
            damaged += schema.decode_episodes(payload)
    return damaged


def _acknowledges(answer: Any) -> bool:
    return isinstance(answer, list) and any(
        isinstance(reply, InsertReply) and reply.status in ("stored", "duplicate") for reply in answer
    )


def _flip(payload: bytes, rng: np.random.Generator, must_decode: bool) -> bytes | None:
    for _ in range(100):
        flipped = bytearray(payload)
        flipped[rng.integers(len(payload))] ^= 1 << int(rng.integers(8))
        if not must_decode or _has_same_form(payload, bytes(flipped)):
            return bytes(flipped)
    return None


def _has_same_form(payload: bytes, flipped: bytes) -> bool:
    try:
        schema._unpack(flipped, schema.EPISODES, schema.SPARSE_EPISODES).validate(full=True)
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
