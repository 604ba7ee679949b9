import errno
import os
import shutil
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distributed_muzero.config import AlgorithmConfig, ReplayConfig, make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import LogError
from distributed_muzero.replay import log_format
from distributed_muzero.replay import store as store_module
from distributed_muzero.replay.inspection import held_episodes
from distributed_muzero.replay.log import ReplayLog
from distributed_muzero.replay.schema import Kind, Priorities, StoredEpisode, Targets, encode_episodes
from distributed_muzero.replay.store import EpisodeStore
from distributed_muzero.workers.replay_shard import ReplayShard
from tests.episodes import make_episode

SPEC = EnvironmentSpec("made-up", (64,), np.dtype(np.float32), (3,))
SMALLEST_SEGMENT = 2**16
CAPACITY = 300


@pytest.fixture(autouse=True)
def journal_is_written_anew_often(monkeypatch):
    monkeypatch.setattr(store_module, "MIN_JOURNAL_BYTES", 2**14)


def make_config_of(exponent=0.6, capacity=CAPACITY, slack=1e6):
    return make_config(
        {
            "algorithm": {"num_unroll_steps": 2, "td_steps": 3},
            "replay": {
                "max_transitions": capacity,
                "min_size_to_sample": 10,
                "samples_per_insert": 1.0,
                "error_buffer": slack,
                "priority_exponent": exponent,
                "segment_bytes": SMALLEST_SEGMENT,
            },
            "reanalyse": {"ratio": 0.5},
            "learner": {"batch_size": 4},
        }
    )


def make_shard(folder, *options, **named):
    return ReplayShard(SPEC, make_config_of(*options, **named), 0, folder)


class Driven:
    """A shard with a hand that does things to it, and remembers what a kill may not take."""

    def __init__(self, folder, exponent):
        self.folder, self.exponent = folder, exponent
        self.shard = make_shard(folder, exponent)
        self.ids = []
        self.version = 0
        self.flushed = {}

    def insert(self, number):
        rng = np.random.default_rng(len(self.ids))
        names = [f"run/0/0/{len(self.ids) + i}" for i in range(number)]
        episodes = [
            make_episode(int(rng.integers(2, 20)), name=name, seed=int(rng.integers(2**31)), spec=SPEC)
            for name in names
        ]
        first = self.first_segment()
        assert {reply.status for reply in self.shard.insert(episodes)} == {"stored"}
        if self.first_segment() != first:
            # It has flushed, to drop a segment.
            self.flushed = learnt(self.shard)
        self.ids += names

    def first_segment(self):
        return next((segment.number for segment in self.shard.store.log.segments), 1)

    def sample(self, number):
        self.shard.sample_many(number)

    def prioritize(self, number):
        entries = list(self.shard.ring)[-number:]
        self.version += 1
        for entry in entries:
            steps = np.arange(entry.num_starts, dtype=np.int32)
            values = np.random.default_rng(self.version + entry.key).random(len(steps)).astype(np.float32)
            keys, versions = np.full(len(steps), entry.key), np.full(len(steps), self.version)
            self.shard.update_priorities(Priorities(keys, steps, values, versions))

    def refresh(self, number):
        self.version += 1
        targets = []
        for key, episode in self.shard.take_for_reanalyse(10 * number):
            values = episode.root_values * np.float32(0.5)
            targets.append(Targets(key, self.version, episode.policies[:, ::-1].copy(), values))
        assert self.shard.update_targets(targets) == len(targets)

    def flush(self, number):
        self.shard.flush()
        self.flushed = learnt(self.shard)

    def killed(self):
        """The shard that starts from what a SIGKILL now would leave."""
        copy = self.folder.with_name(self.folder.name + "_killed")
        shutil.copytree(self.folder, copy)
        return make_shard(copy, self.exponent)


def learnt(shard):
    """Targets and priorities of every held episode, by key."""
    found = {}
    for entry in shard.ring:
        episode = shard.ring.episode(entry)
        found[entry.key] = [episode.policies.tobytes(), episode.root_values.tobytes(), entry.targets_version]
        if shard.store.sampler.__class__.__name__ == "PrioritizedSampler":
            sampler = shard.store.sampler
            found[entry.key] += [sampler.priorities[entry.starts].tobytes()]
            found[entry.key] += [sampler.versions[entry.starts].tobytes()]
    return found


def played(shard):
    """What actors said of every held episode, by key, in order."""
    found = {}
    for entry in shard.ring:
        e = shard.ring.episode(entry)
        arrays = (e.observations, e.legal_masks, e.actions, e.rewards, e.to_play)
        facts = (e.episode_id, e.environment_id, e.seed, e.weights_version, e.terminated, e.truncated)
        found[entry.key] = (facts, [(a.dtype, a.shape, a.tobytes()) for a in arrays])
    return found


def same_batch(one, other):
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(one, other, strict=True))


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "insert", "insert", "sample", "prioritize", "refresh", "flush"]),
        st.integers(1, 8),
    ),
    min_size=1,
    max_size=40,
)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS, exponent=st.sampled_from([0.0, 0.6]), flushes=st.booleans())
def test_a_restarted_shard_is_the_one_that_was_killed(operations, exponent, flushes):
    with tempfile.TemporaryDirectory() as temporary:
        driven = Driven(Path(temporary) / "shard", exponent)
        driven.insert(3)
        for name, number in [*operations, *([("flush", 1)] if flushes else [])]:
            getattr(driven, name)(number)
        with closing(driven.shard) as before, closing(driven.killed()) as after:
            compare(driven, before, after, exponent, flushes)


def compare(driven, before, after, exponent, flushes):
    held, again = played(before), played(after)
    # The rows are packed anew, so that a few of the oldest may go, or come back if no state was written since.
    newest = min(len(held), len(again))
    num_gone = len(held) - len(again)
    assert list(held.items())[-newest:] == list(again.items())[-newest:]
    if before.ring.num_evicted_episodes == 0:
        assert num_gone == 0
    elif num_gone > 0:
        longest = 19 + 1
        assert after.ring.num_transitions + after.ring.num_episodes > CAPACITY - 2 * longest

    assert after.limiter.state() == before.limiter.state()
    assert after.inserted_episodes == before.inserted_episodes == len(driven.ids)
    assert after.ring.num_evicted_episodes == before.ring.num_evicted_episodes + num_gone
    for ring in (before.ring, after.ring):
        assert ring.num_transitions + ring.num_evicted_transitions == before.limiter.inserted
    assert after.rng.bit_generator.state == before.rng.bit_generator.state
    assert all(after.store.knows(name) for name in driven.ids)

    now, found = learnt(before), learnt(after)
    for key, content in found.items():
        if key in driven.flushed:
            assert content == driven.flushed[key]
        elif not exponent:
            # Not flushed since it came: as its actor said.
            assert content[2] == 0
    rows_are_the_same = num_gone == 0 and (exponent == 0 or before.ring.num_evicted_episodes == 0)
    if flushes:
        assert found == {key: now[key] for key in found}
        if rows_are_the_same and (one := before.sample()) is not None:
            assert same_batch(one, after.sample())


def test_segments_roll_and_go_and_their_ids_stay_known(tmp_path):
    driven = Driven(tmp_path / "shard", 0.6)
    for _ in range(40):
        driven.insert(5)
        driven.refresh(2)
        driven.prioritize(3)
        driven.sample(1)
        driven.flush(1)
    before = driven.shard
    numbers = [segment.number for segment in before.store.log.segments]
    assert numbers[0] > 1 and before.store.journal.segments[0].number > 1
    with closing(before), closing(driven.killed()) as after:
        # Of the first half, no byte is left but the ids.
        assert all(after.store.knows(name) for name in driven.ids)
        compare(driven, before, after, 0.6, True)


def test_counters_survive_when_segments_went_since_the_last_batch(tmp_path):
    driven = Driven(tmp_path / "shard", 0.0)
    driven.insert(5)
    driven.sample(1)
    for _ in range(30):
        driven.insert(5)
    assert driven.shard.store.log.segments[0].number > 1
    with closing(driven.shard), closing(driven.killed()) as after:
        compare(driven, driven.shard, after, 0.0, False)


def test_a_segment_with_episodes_that_wait_for_their_commit_is_not_dropped(tmp_path):
    with closing(make_shard(tmp_path / "shard", capacity=3000)) as shard:
        empty = shard.begin([])
        offers = [
            shard.begin([make_episode(200, name=f"run/0/{number}", seed=number, spec=SPEC)])
            for number in range(4)
        ]
        generation = shard.commit()
        assert len(shard.store.log.segments) > 1
        for offer in (empty, *offers):
            shard.finish(offer, generation)
            shard.flush()
        shutil.copytree(tmp_path / "shard", tmp_path / "killed")
    with closing(make_shard(tmp_path / "killed", capacity=3000)) as after:
        assert [entry.episode_id for entry in after.ring] == [f"run/0/{number}" for number in range(4)]


def test_the_folder_stays_bounded(tmp_path):
    driven = Driven(tmp_path / "shard", 0.6)
    sizes = []
    # Episodes of about ten steps: fifty times the capacity.
    for _ in range(50 * CAPACITY // 100):
        driven.insert(10)
        driven.refresh(8)
        driven.prioritize(8)
        driven.sample(1)
        driven.flush(1)
        sizes.append(sum(path.stat().st_size for path in (tmp_path / "shard").rglob("*") if path.is_file()))
    with closing(driven.shard) as shard:
        assert shard.limiter.inserted > 45 * CAPACITY
        assert sizes[-1] == shard.stats()["log_bytes"]
    # What is held takes 300 · 285 B; with the segments that hold the last of the oldest and of the newest.
    assert max(sizes[50:]) < 4 * SMALLEST_SEGMENT + CAPACITY * 285
    assert max(sizes[100:]) < 1.25 * max(sizes[50:100])


def test_another_environment_is_one_clear_error(tmp_path):
    driven = Driven(tmp_path / "shard", 0.0)
    driven.insert(1)
    driven.shard.close()
    other = EnvironmentSpec("other", (7,), np.dtype(np.uint8), (3,))
    store = EpisodeStore(tmp_path / "shard", other, ReplayConfig(), AlgorithmConfig())
    with pytest.raises(LogError, match=r"observations \(64,\) float32 and 3 actions.*\(7,\) uint8"):
        store.recover()
    store.close()


def test_an_episode_whose_record_is_damaged_is_counted_and_may_come_again(tmp_path):
    driven = Driven(tmp_path / "shard", 0.0)
    for _ in range(3):
        driven.insert(1)
    driven.shard.close()
    (segment,) = (tmp_path / "shard/episodes").glob("segment_*.log")
    payload = bytes(list(log_format.read(segment.parent))[1].payload)
    segment.write_bytes(segment.read_bytes().replace(payload, payload[:-1] + bytes([payload[-1] ^ 1])))
    with closing(make_shard(tmp_path / "shard", 0.0)) as shard:
        assert [entry.episode_id for entry in shard.ring] == ["run/0/0/0", "run/0/0/2"]
        assert shard.stats()["corrupt_records"] == 1
        assert not shard.store.knows("run/0/0/1")
        assert shard.insert([make_episode(4, name="run/0/0/1", spec=SPEC)])[0].status == "stored"


# Logs and state that don't fit together ---------------------------------------------------------------------------


def test_a_copy_that_was_given_up_is_not_taken_for_the_episode(tmp_path):
    """A disk that kept a refused record: the episode's own one came later, and is held."""
    episode = make_episode(10, name="run/0/0/x", spec=SPEC)
    with closing(make_shard(tmp_path / "shard", 0.0)) as shard:
        shard.store.log.append(Kind.EPISODES, encode_episodes([StoredEpisode(0, episode)]))
        shard.store._next_key = 1
        shard.insert([make_episode(10, name="run/0/0/y", seed=1, spec=SPEC), episode])
    for _ in range(2):
        # The second time, the state's oldest key lies behind the copy.
        with closing(make_shard(tmp_path / "shard", 0.0)) as shard:
            assert {entry.episode_id for entry in shard.ring} == {"run/0/0/x", "run/0/0/y"}
            assert shard.ring.num_episodes == 2
    held = [stored.episode.episode_id for stored in held_episodes(tmp_path / "shard")]
    assert sorted(held) == ["run/0/0/x", "run/0/0/y"]


def test_a_held_episode_outlives_the_segment_of_a_copy_that_was_given_up(tmp_path):
    numbers = iter(range(10**6))

    def fill(shard, num_steps=200):
        name = f"run/0/1/{next(numbers)}"
        assert shard.insert([make_episode(num_steps, name=name, spec=SPEC)])[0].status == "stored"

    def segment_of(log):
        return log.segments[0].number

    episode = make_episode(10, name="run/0/0/x", spec=SPEC)
    with closing(make_shard(tmp_path / "shard", 0.0, 1000)) as shard:
        with_copy, _ = shard.store.log.append(Kind.EPISODES, encode_episodes([StoredEpisode(0, episode)]))
        shard.store._next_key = 1
        fill(shard, 10)
        fill(shard)
        fill(shard)
        assert shard.insert([episode])[0].status == "stored"
    with closing(make_shard(tmp_path / "shard", 0.0, 1000)) as shard:
        log, journal = shard.store.log, shard.store.journal
        assert segment_of(log) == with_copy
        while segment_of(log) == with_copy:
            fill(shard)
        assert "run/0/0/x" in [entry.episode_id for entry in shard.ring]
        shutil.copytree(tmp_path / "shard", tmp_path / "killed")
        before_anew = segment_of(journal)
        while segment_of(journal) == before_anew:
            shard.flush()
    for folder in ("killed", "shard"):
        with closing(make_shard(tmp_path / folder, 0.0, 1000)) as shard:
            assert "run/0/0/x" in [entry.episode_id for entry in shard.ring]


def test_episodes_that_are_longer_than_a_smaller_ring_count_as_evicted(tmp_path):
    with closing(make_shard(tmp_path / "shard", 0.0, 300)) as shard:
        for number, num_steps in enumerate([20, 120, 30]):
            shard.insert([make_episode(num_steps, name=f"run/0/0/{number}", spec=SPEC)])
    for _ in range(2):
        with closing(make_shard(tmp_path / "shard", 0.0, 100)) as shard:
            assert [entry.episode_id for entry in shard.ring] == ["run/0/0/0", "run/0/0/2"]
            stats = shard.stats()
            assert (stats["transitions"], stats["evicted_transitions"]) == (50, 120)
            assert stats["missing_episodes"] == 0
            assert shard.insert([make_episode(20, name="run/0/0/1", spec=SPEC)])[0].status == "duplicate"
    assert [stored.key for stored in held_episodes(tmp_path / "shard")] == [0, 2]


def test_a_shard_whose_episodes_are_gone_says_so_and_takes_new_ones(tmp_path, caplog):
    with closing(make_shard(tmp_path / "shard", slack=50)) as shard:
        for number in range(20):
            shard.insert([make_episode(10, name=f"run/0/0/{number}", spec=SPEC)])
        held = shard.ring.num_episodes
        assert shard.insert([make_episode(10, name="run/0/0/20", spec=SPEC)])[0].status == "wait"
    shutil.rmtree(tmp_path / "shard/episodes")
    with closing(make_shard(tmp_path / "shard", slack=50)) as shard:
        assert shard.stats()["missing_episodes"] == held
        assert f"{held} episodes that it held are no longer in" in caplog.text
        assert shard.sample() is None
        assert shard.insert([make_episode(10, name="run/0/0/20", spec=SPEC)])[0].status == "stored"
        assert shard.sample() is not None
    with closing(make_shard(tmp_path / "shard", slack=50)) as shard:
        assert shard.stats()["missing_episodes"] == 0


# Locks ------------------------------------------------------------------------------------------------------------


def is_free(folder):
    try:
        ReplayLog(folder, SMALLEST_SEGMENT, lock_seconds=0).close()
    except LogError:
        return False
    return True


def test_a_store_that_finds_its_journal_locked_leaves_its_log_free(tmp_path, monkeypatch):
    monkeypatch.setattr(ReplayLog.__init__, "__defaults__", (0.0,))
    with closing(ReplayLog(tmp_path / "journal", SMALLEST_SEGMENT)):
        with pytest.raises(LogError, match="journal is in use by another process"):
            EpisodeStore(tmp_path, SPEC, ReplayConfig(), AlgorithmConfig())
        assert is_free(tmp_path / "episodes")


def test_a_shard_that_can_not_recover_leaves_its_folder_free(tmp_path):
    driven = Driven(tmp_path / "shard", 0.0)
    driven.insert(1)
    driven.shard.close()
    other = EnvironmentSpec("other", (7,), np.dtype(np.uint8), (3,))
    for _ in range(2):
        with pytest.raises(LogError, match="go on with the environment that it began with"):
            ReplayShard(other, make_config_of(0.0), 0, tmp_path / "shard")
    assert is_free(tmp_path / "shard/episodes") and is_free(tmp_path / "shard/journal")


def test_a_log_that_can_not_close_keeps_no_other_from_it(tmp_path, monkeypatch):
    shard = make_shard(tmp_path / "shard")
    shard.begin([make_episode(4, spec=SPEC)])

    def refuse(descriptor):
        raise OSError(errno.EIO, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(LogError):
            shard.close()
    assert is_free(tmp_path / "shard/episodes") and is_free(tmp_path / "shard/journal")
