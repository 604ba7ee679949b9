"""Another number of shards: nothing is lost, doubled or changed, whatever ends the resharding early."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import shutil
import tempfile
from contextlib import ExitStack, closing, contextmanager
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_muzero.chaos.bad_disk import cut_to_synced, record_syncs
from distributed_muzero.config import make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import LogError
from distributed_muzero.replay import recovery
from distributed_muzero.replay import reshard as reshard_module
from distributed_muzero.replay import store as store_module
from distributed_muzero.replay.index import shard_of
from distributed_muzero.replay.inspection import held_episodes, read_journal, replay_stats, verify_replay
from distributed_muzero.replay.log import ReplayLog
from distributed_muzero.replay.reshard import finish_or_undo, num_shards_of, reshard
from distributed_muzero.replay.schema import Kind, Priorities, StoredEpisode, Targets, encode_episodes
from distributed_muzero.workers.replay_shard import ReplayShard, make_limiter
from tests.episodes import make_episode

CARTPOLE = EnvironmentSpec("CartPole-v1", (4,), np.dtype(np.float32), (2,))
CHAIN = EnvironmentSpec("chain", (10,), np.dtype(np.float32), (3,))
LONGEST = 20
# What the shards' sums say of the run, whatever their number.
OF_THE_RUN = (
    "inserted_transitions", "inserted_episodes", "sampled_rows", "refreshed_transitions", "duplicates",
    "rejected_episodes",
)  # fmt: skip


@pytest.fixture(autouse=True)
def records_are_small_and_journals_written_anew_often(monkeypatch):
    monkeypatch.setattr(store_module, "MIN_JOURNAL_BYTES", 2**14)
    monkeypatch.setattr(reshard_module, "RECORD_BYTES", 6000)
    monkeypatch.setattr(ReplayLog.__init__, "__defaults__", (0.0,))


def config_of(num_shards, capacity=3000, exponent=0.6, slack=1e6, ratio=0.5, **options):
    replay = {
        "num_shards": num_shards,
        "max_transitions": capacity,
        "min_size_to_sample": 12,
        "samples_per_insert": 2.0,
        "error_buffer": slack,
        "priority_exponent": exponent,
        "segment_bytes": 2**16,
    }
    sections = {
        "algorithm": {"num_unroll_steps": 2, "td_steps": 3},
        "replay": {**replay, **options},
        "reanalyse": {"ratio": ratio},
        "learner": {"batch_size": 4},
    }
    return make_config(sections)


def folder_of(replay, index):
    return replay / f"shard_{index}"


@contextmanager
def opened(replay, config, spec=CARTPOLE):
    with ExitStack() as stack:
        shards = []
        for index in range(config.replay.num_shards):
            shards.append(ReplayShard(spec, config, index, folder_of(replay, index)))
            stack.callback(shards[-1].close)
        yield shards


class Hand:
    """Does to open shards what a run does, and knows all episodes that they stored."""

    def __init__(self, seed=0, spec=CARTPOLE):
        self.rng = np.random.default_rng(seed)
        self.spec = spec
        self.episodes = {}  # in the order of their arrival
        self.version = 0
        self.numbers = count()

    def insert(self, shards, number):
        self.version += 1
        made = [self.make_episode() for _ in range(number)]
        for shard in shards:
            mine = [episode for episode in made if self.shard(shards, episode.episode_id) is shard]
            for episode, reply in zip(mine, shard.insert(mine), strict=True):
                assert reply.status in ("stored", "wait")
                if reply.status == "stored":
                    self.episodes[episode.episode_id] = episode

    def make_episode(self):
        number = next(self.numbers)
        return make_episode(
            int(self.rng.integers(3, LONGEST)),
            name=f"run/{number % 3}/0/{number}",
            seed=number,
            version=self.version,
            terminated=bool(self.rng.random() < 0.7),
            spec=self.spec,
        )

    def offer_again(self, shards, number):
        for name in list(self.episodes)[-number:]:
            assert self.shard(shards, name).insert([self.episodes[name]])[0].status == "duplicate"

    def reject(self, shards, number):
        for index in range(number):
            episode = make_episode(1, name=f"short/{index}", terminated=False, spec=self.spec)
            assert self.shard(shards, episode.episode_id).insert([episode])[0].status == "rejected"

    def sample(self, shards, number):
        for shard in shards:
            shard.sample_many(number)

    def prioritize(self, shards, number):
        self.version += 1
        for shard in shards:
            for entry in list(shard.ring)[-number:]:
                steps = np.arange(entry.num_starts, dtype=np.int32)
                keys, versions = np.full(len(steps), entry.key), np.full(len(steps), self.version)
                shard.update_priorities(
                    Priorities(keys, steps, self.rng.random(len(steps), np.float32), versions)
                )

    def refresh(self, shards, number):
        self.version += 1
        for shard in shards:
            for key, episode in shard.take_for_reanalyse(10 * number):
                values = episode.root_values * np.float32(0.5)
                shard.update_targets([Targets(key, self.version, episode.policies[:, ::-1].copy(), values)])

    def flush(self, shards, number):
        for shard in shards:
            shard.flush()

    def fill(self, shards, rounds=4):
        for _ in range(rounds):
            for action in (
                self.insert,
                self.prioritize,
                self.refresh,
                self.insert,
                self.sample,
                self.offer_again,
            ):
                action(shards, 3)
        self.reject(shards, 2)

    @staticmethod
    def shard(shards, name):
        return shards[shard_of(name, len(shards))]


def learnt(shards):
    """Targets and priorities of every held episode, by id; each id in one shard, the one that it belongs to."""
    found = {}
    for shard in shards:
        for entry in shard.ring:
            assert entry.episode_id not in found
            assert shard_of(entry.episode_id, len(shards)) == shard.index
            episode, sampler = shard.ring.episode(entry), shard.store.sampler
            arrays = [episode.policies, episode.root_values]
            if hasattr(sampler, "priorities"):
                arrays += [sampler.priorities[entry.starts], sampler.versions[entry.starts]]
            found[entry.episode_id] = (entry.targets_version, [array.tobytes() for array in arrays])
    return found


def as_played(replay):
    """Every held episode as its actor played it, by id, bit for bit, from the logs themselves."""
    found = {}
    for shard in sorted(replay.glob("shard_*")):
        journal = read_journal(shard)
        journal.targets.clear()
        for _, episode in held_episodes(shard, journal):
            assert episode.episode_id not in found
            found[episode.episode_id] = bits(episode)
    return found


def bits(episode):
    return [
        (value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value
        for value in vars(episode).values()
    ]


def sums(shards):
    return {name: sum(shard.stats()[name] for shard in shards) for name in OF_THE_RUN}


def balance(shards):
    return sum(shard.limiter.balance for shard in shards)


def check_bounds(shards):
    for shard in shards:
        limiter = shard.limiter
        if limiter.inserted >= limiter.min_size:
            highest = limiter.error_buffer + LONGEST * limiter.samples_per_insert
            assert -limiter.error_buffer - 1e-6 <= limiter.balance <= highest + 1e-6


def check_all_known(shards, episodes):
    for name, episode in episodes.items():
        assert Hand.shard(shards, name).insert([episode])[0].status == "duplicate", name


def filled(replay, num_shards, spec=CARTPOLE, rounds=4, **options):
    hand = Hand(spec=spec)
    with opened(replay, config_of(num_shards, **options), spec) as shards:
        hand.fill(shards, rounds)
        return hand, learnt(shards), sums(shards)


# What stays ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [CARTPOLE, CHAIN], ids=lambda spec: spec.id)
@pytest.mark.parametrize("exponent", [0.0, 0.6])
@pytest.mark.parametrize(("one", "other"), [(1, 2), (2, 3), (3, 1), (2, 5), (2, 2)])
def test_there_and_back(tmp_path, one, other, exponent, spec):
    replay = tmp_path / "replay"
    hand, before, total = filled(replay, one, spec=spec, exponent=exponent)
    played = as_played(replay)
    assert played == {name: bits(episode) for name, episode in hand.episodes.items()}
    for num_before, num_shards in [(one, other), (other, one)]:
        config = config_of(num_shards, exponent=exponent)
        counts = reshard(replay, config_of(num_before, exponent=exponent), config)
        assert counts == (
            num_before, num_shards, len(played), sum(e.num_steps for e in hand.episodes.values()), 0, 0, 0,
        )  # fmt: skip
        assert [path.name for path in tmp_path.iterdir()] == ["replay"]
        assert num_shards_of(replay) == num_shards
        assert as_played(replay) == played
        # Its environment isn't one that can be made here.
        assert verify_replay(replay, num_shards, spec, LONGEST)["ok"]
        with opened(replay, config, spec) as shards:
            assert learnt(shards) == before
            assert sums(shards) == total
            for shard in shards:
                assert shard.ring.num_transitions == shard.limiter.inserted
                assert shard.ring.num_episodes == shard.inserted_episodes
                assert shard.stats()["missing_episodes"] == shard.stats()["corrupt_records"] == 0
            check_all_known(shards, hand.episodes)
            total["duplicates"] += len(hand.episodes)


def test_a_new_shard_goes_on_like_any_other(tmp_path):
    replay = tmp_path / "replay"
    hand, *_ = filled(replay, 2)
    reshard(replay, config_of(2), config_of(3))
    with opened(replay, config_of(3)) as shards:
        hand.fill(shards)
        after, total = learnt(shards), sums(shards)
    with opened(replay, config_of(3)) as shards:
        assert learnt(shards) == after and sums(shards) == total
        assert after.keys() == hand.episodes.keys()


def test_several_without_a_shard_between_them(tmp_path):
    replay = tmp_path / "replay"
    hand, before, total = filled(replay, 1, slack=2000)
    numbers = [1, 3, 2, 7, 1]
    for one, other in pairwise(numbers):
        reshard(replay, config_of(one, slack=2000), config_of(other, slack=2000))
    with opened(replay, config_of(1, slack=2000)) as shards:
        assert learnt(shards) == before and sums(shards) == total
        check_all_known(shards, hand.episodes)


def test_a_state_holds_what_a_shard_writes(tmp_path):
    replay = tmp_path / "replay"
    filled(replay, 1)
    written = read_journal(folder_of(replay, 0)).state
    reshard(replay, config_of(1), config_of(2))
    for index in range(2):
        state = read_journal(folder_of(replay, index)).state
        assert state.keys() == written.keys()
        assert state["limiter"].keys() == written["limiter"].keys()
        assert state["refresh_limiter"].keys() == written["refresh_limiter"].keys()


def test_generators_of_new_shards_differ_from_each_other_and_from_before(tmp_path):
    replay = tmp_path / "replay"
    filled(replay, 2)
    states = []
    for one, other in [(2, 3), (3, 2)]:
        states += [str(read_journal(folder_of(replay, i)).state["generator"]) for i in range(one)]
        reshard(replay, config_of(one), config_of(other))
    assert len(set(states)) == 5


def test_episodes_stay_in_the_order_of_their_arrival(tmp_path):
    """As versions tell it across shards, and within one for certain."""
    replay, hand = tmp_path / "replay", Hand()
    with opened(replay, config_of(3)) as shards:
        for _ in range(60):
            hand.insert(shards, 1)
    reshard(replay, config_of(3), config_of(1))
    names = [stored.episode.episode_id for stored in held_episodes(folder_of(replay, 0))]
    assert names == list(hand.episodes)
    reshard(replay, config_of(1), config_of(4))
    for index in range(4):
        names = [stored.episode.episode_id for stored in held_episodes(folder_of(replay, index))]
        assert names == [name for name in hand.episodes if shard_of(name, 4) == index]


def test_no_key_is_given_again(tmp_path):
    """A priority or target that was on its way meanwhile must not meet another episode."""
    replay = tmp_path / "replay"
    hand, *_ = filled(replay, 2)
    old = {stored.key for index in range(2) for stored in held_episodes(folder_of(replay, index))}
    reshard(replay, config_of(2), config_of(3))
    with opened(replay, config_of(3)) as shards:
        hand.insert(shards, 10)
        new = [entry.key for shard in shards for entry in shard.ring]
        assert min(new) > max(old)
        key = np.array([max(old)])
        late = Priorities(key, np.zeros(1, np.int32), np.ones(1, np.float32), np.full(1, 10**6))
        assert [shard.store.update_priorities(late) for shard in shards] == [1, 1, 1]


def test_a_folder_without_shards_stays_empty(tmp_path):
    (tmp_path / "replay").mkdir()
    assert num_shards_of(tmp_path / "replay") == 0
    assert reshard(tmp_path / "replay", config_of(1), config_of(2)) == (0, 2, 0, 0, 0, 0, 0)
    assert list(tmp_path.rglob("*")) == [tmp_path / "replay"]


def test_shards_without_an_episode(tmp_path):
    replay = tmp_path / "replay"
    with opened(replay, config_of(2)):
        pass
    reshard(replay, config_of(2), config_of(3))
    hand = Hand()
    with opened(replay, config_of(3)) as shards:
        assert set(sums(shards).values()) == {0}
        hand.fill(shards)
        assert learnt(shards).keys() == hand.episodes.keys()


def test_what_a_killed_run_left(tmp_path):
    """Episodes since the last state count as a restart counts them, and a shard that never wrote one too."""
    replay, killed, hand = tmp_path / "live", tmp_path / "replay", Hand()
    with opened(replay, config_of(2)) as shards:
        hand.insert(shards[:1], 5)
        shards[0].flush()
        hand.insert(shards[:1], 5)
        hand.insert(shards[1:], 7)
        shutil.copytree(replay, killed)
        total = sums(shards)
    assert read_journal(folder_of(killed, 1)).state == {}
    reshard(killed, config_of(2), config_of(3))
    with opened(killed, config_of(3)) as shards:
        assert sums(shards) == total
        assert learnt(shards).keys() == hand.episodes.keys()
        assert sum(shard.ring.num_transitions for shard in shards) == total["inserted_transitions"]
        check_bounds(shards)


# What no longer fits, and what went before --------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), [(1, 2), (1, 3), (3, 1), (3, 2), (2, 7)])
def test_a_share_that_is_too_small_evicts_its_oldest_and_counts_them(tmp_path, one, other):
    replay = tmp_path / "replay"
    hand, before, total = filled(replay, one, rounds=8, capacity=300, exponent=0.0)
    assert 0 < len(before) < len(hand.episodes)
    counts = reshard(replay, config_of(one, 300, 0.0), config_of(other, 300, 0.0))
    assert counts.episodes == len(before)
    assert counts.episodes + counts.remembered_ids == len(hand.episodes)
    with opened(replay, config_of(other, 300, 0.0)) as shards:
        held = learnt(shards)
        assert held == {name: before[name] for name in held}
        assert sums(shards) == total
        for shard in shards:
            ring = shard.ring
            assert ring.num_transitions + ring.num_evicted_transitions == shard.limiter.inserted
            assert ring.num_episodes + ring.num_evicted_episodes == shard.inserted_episodes
            mine = [name for name in before if shard_of(name, other) == shard.index]
            newest = [name for name in mine if name in held]
            by_version = [hand.episodes[name].weights_version for name in mine if name not in held]
            oldest_kept = min((hand.episodes[name].weights_version for name in newest), default=0)
            assert max(by_version, default=0) <= oldest_kept
            if by_version:
                # Only where there was no room for another one.
                assert ring.num_transitions + ring.num_episodes > ring.capacity - 2 * LONGEST
        check_all_known(shards, hand.episodes)
    with opened(replay, config_of(other, 300, 0.0)) as shards:
        assert learnt(shards) == held


def test_an_episode_that_is_longer_than_a_share_counts_as_evicted(tmp_path):
    replay = tmp_path / "replay"
    with opened(replay, config_of(1, 100)) as shards:
        for number, num_steps in enumerate([60, 10, 10]):
            shards[0].insert([make_episode(num_steps, name=f"run/{number}", seed=number, spec=CARTPOLE)])
    reshard(replay, config_of(1, 100), config_of(2, 100))
    for _ in range(2):
        with opened(replay, config_of(2, 100)) as shards:
            assert learnt(shards).keys() == {"run/1", "run/2"}
            assert sum(shard.stats()["evicted_transitions"] for shard in shards) == 60
            assert sum(shard.stats()["inserted_transitions"] for shard in shards) == 80
            assert Hand.shard(shards, "run/0").store.knows("run/0")


def test_ids_of_dropped_segments_stay_known(tmp_path):
    replay, wide = tmp_path / "replay", EnvironmentSpec("wide", (64,), np.dtype(np.float32), (3,))
    hand = Hand(spec=wide)
    with opened(replay, config_of(2, 300), wide) as shards:
        for _ in range(8):
            hand.insert(shards, 25)
            hand.flush(shards, 1)
    gone = [set(read_journal(folder_of(replay, index)).gone_ids) for index in range(2)]
    assert min(map(len, gone)) > 20
    for one, other in [(2, 3), (3, 1)]:
        counts = reshard(replay, config_of(one, 300), config_of(other, 300))
        assert counts.episodes + counts.remembered_ids == len(hand.episodes)
    assert gone[0] | gone[1] <= set(read_journal(folder_of(replay, 0)).gone_ids)
    with opened(replay, config_of(1, 300), wide) as shards:
        check_all_known(shards, hand.episodes)


def test_of_too_many_remembered_ids_the_newest_stay(tmp_path, monkeypatch):
    replay = tmp_path / "replay"
    hand, before, _ = filled(replay, 2, capacity=100)
    evicted = [
        [name for name in hand.episodes if name not in before and shard_of(name, 2) == index]
        for index in (0, 1)
    ]
    assert min(map(len, evicted)) > 2
    reshard(replay, config_of(2, 100), config_of(1, 100))
    monkeypatch.setattr(recovery, "MAX_REMEMBERED_IDS", 4)
    found = read_journal(folder_of(replay, 0)).gone_ids
    assert set(found) == {*evicted[0][-2:], *evicted[1][-2:]}


def test_an_id_is_never_both_held_and_remembered(tmp_path):
    """A disk that kept a refused record: the copy's key is older than all that is held."""
    replay = tmp_path / "replay"
    episode, other = (make_episode(10, name=name, spec=CARTPOLE) for name in ("run/x", "run/y"))
    with opened(replay, config_of(1)) as [shard]:
        shard.store.log.append(Kind.EPISODES, encode_episodes([StoredEpisode(0, episode)]))
        shard.store._next_key = 1
        assert [reply.status for reply in shard.insert([other, episode])] == ["stored", "stored"]
    counts = reshard(replay, config_of(1), config_of(2))
    assert (counts.episodes, counts.remembered_ids) == (2, 0)
    with opened(replay, config_of(2)) as shards:
        assert learnt(shards).keys() == {"run/x", "run/y"}


def test_an_id_that_two_shards_hold_is_laid_out_once(tmp_path):
    replay = tmp_path / "replay"
    hand, *_ = filled(replay, 2)
    name, episode = next(iter(hand.episodes.items()))
    with opened(replay, config_of(2)) as shards:
        assert shards[1 - shard_of(name, 2)].insert([episode])[0].status == "stored"
    counts = reshard(replay, config_of(2), config_of(3))
    assert counts.episodes == len(hand.episodes)
    with opened(replay, config_of(3)) as shards:
        assert learnt(shards).keys() == hand.episodes.keys()
        assert not any(shard.num_missing_episodes for shard in shards)


def test_damage_is_left_behind_and_counted(tmp_path, caplog):
    replay = tmp_path / "replay"
    hand, before, total = filled(replay, 1)
    segment = folder_of(replay, 0) / "episodes" / "segment_00000001.log"
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    counts = reshard(replay, config_of(1), config_of(2))
    assert counts.damaged_records == 1 and counts.missing_episodes == len(hand.episodes) - counts.episodes > 0
    assert f"{counts.missing_episodes} episodes that its shards held were no longer in" in caplog.text
    assert verify_replay(replay, 2, CARTPOLE, LONGEST)["ok"]
    with opened(replay, config_of(2)) as shards:
        held = learnt(shards)
        assert held == {name: before[name] for name in held} and len(held) == counts.episodes
        assert sums(shards) == total


# The limiters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), [(1, 2), (2, 4), (4, 1), (3, 2), (1, 4)])
def test_the_balance_of_the_run_stays(tmp_path, one, other):
    replay, hand = tmp_path / "replay", Hand()
    with opened(replay, config_of(one, slack=240)) as shards:
        for _ in range(6):
            hand.insert(shards, 30)
            hand.sample(shards, 100)
        hand.insert(shards, 8)
        assert all(shard.limiter.inserted >= shard.limiter.min_size for shard in shards)
        before, total = balance(shards), sums(shards)
    reshard(replay, config_of(one, slack=240), config_of(other, slack=240))
    with opened(replay, config_of(other, slack=240)) as shards:
        assert balance(shards) == pytest.approx(before)
        assert sums(shards) == total and total["sampled_rows"] > 0
        check_bounds(shards)
        # What is stored before the first state of a new shard is owed its samples, also after a kill.
        owed = shards[0].limiter.balance
        episode = next(
            make_episode(9, name=n, spec=CARTPOLE) for n in map(str, range(99)) if not shard_of(n, other)
        )
        assert shards[0].insert([episode])[0].status == "stored"
        shutil.copytree(replay, tmp_path / "killed")
    with opened(tmp_path / "killed", config_of(other, slack=240)) as shards:
        assert shards[0].limiter.balance == pytest.approx(owed + 9 * 2.0)


def test_a_balance_beyond_the_new_slack_is_cut_to_it(tmp_path):
    replay, hand = tmp_path / "replay", Hand()
    with opened(replay, config_of(4, slack=None, exponent=0.0)) as shards:
        while any(shard.limiter.can_insert() for shard in shards):
            for shard in shards:
                if shard.limiter.can_insert():
                    hand.insert([shard], 1)
        assert balance(shards) > 4 * shards[0].limiter.error_buffer
    reshard(replay, config_of(4, slack=None), config_of(1, slack=None))
    with opened(replay, config_of(1, slack=None)) as [shard]:
        assert shard.limiter.balance == shard.limiter.error_buffer


def test_before_the_minimum_size_nobody_is_owed_anything(tmp_path):
    replay, hand = tmp_path / "replay", Hand()
    with opened(replay, config_of(1, min_size_to_sample=1000)) as shards:
        hand.insert(shards, 10)
        inserted = shards[0].limiter.inserted
    reshard(replay, config_of(1, min_size_to_sample=1000), config_of(2, min_size_to_sample=1000))
    with opened(replay, config_of(2, min_size_to_sample=1000)) as shards:
        assert sum(shard.limiter.inserted for shard in shards) == inserted
        for shard in shards:
            assert not shard.limiter.can_sample(4) and shard.limiter.can_insert()
            assert shard.limiter.balance == pytest.approx((shard.limiter.inserted - 500) * 2.0)


@pytest.mark.parametrize("num_actors", [0, 1])
@pytest.mark.parametrize("num_shards", [1, 3, 50])
def test_the_limits_are_those_of_the_shards(num_shards, num_actors):
    """Stated a second time, since what stores lies below who works with it."""
    config = config_of(num_shards, min_size_to_sample=40)
    config = config.model_copy(update={"actor": config.actor.model_copy(update={"num_actors": num_actors})})
    assert config.is_offline == (num_actors == 0)
    limiter = make_limiter(config)
    assert reshard_module._limits(config)[:2] == (limiter.samples_per_insert, limiter.min_size)


def test_reanalysis_is_owed_what_it_was(tmp_path):
    """Also where the run has begun with another ratio, and both sides are counted from the change on."""

    def owed(shard):
        first_inserted, first_refreshed = shard.refresh_limiter.state()["first"]
        new = shard.limiter.inserted - first_inserted
        return 0.8 * new - 0.2 * (shard.refresh_limiter.refreshed - first_refreshed)

    replay, hand = tmp_path / "replay", Hand()
    for ratio in (0.5, 0.8):
        with opened(replay, config_of(2, ratio=ratio)) as shards:
            hand.insert(shards, 40)
            hand.refresh(shards, 4)
            before = sum(map(owed, shards))
    assert before > 100 and all(shard.refresh_limiter.state()["first"][0] > 100 for shard in shards)
    reshard(replay, config_of(2, ratio=0.8), config_of(3, ratio=0.8))
    with opened(replay, config_of(3, ratio=0.8)) as shards:
        assert sum(map(owed, shards)) == pytest.approx(before)
        inserted = [shard.limiter.inserted for shard in shards]
        for shard, part in zip(shards, inserted, strict=True):
            assert owed(shard) == pytest.approx(before * part / sum(inserted), abs=2)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["insert", "insert", "sample", "prioritize", "refresh", "flush", "offer_again", "reshard"]
        ),
        st.integers(1, 6),
    ),
    min_size=2,
    max_size=25,
)


@settings(deadline=None, max_examples=30)
@given(
    operations=OPERATIONS,
    num_shards=st.integers(1, 3),
    exponent=st.sampled_from([0.0, 0.6]),
    capacity=st.sampled_from([250, 3000]),
    slack=st.sampled_from([40.0, None]),
)
def test_a_run_that_is_laid_out_anew_again_and_again(operations, num_shards, exponent, capacity, slack):
    with tempfile.TemporaryDirectory() as temporary:
        replay, hand = Path(temporary) / "replay", Hand()
        layouts = [[("insert", 3)]]
        for name, number in operations:
            if name == "reshard":
                layouts.append([("reshard", number)])
            else:
                layouts[-1].append((name, number))
        config = config_of(num_shards, capacity, exponent, slack)
        before, total = {}, None
        for layout in layouts:
            if layout[0][0] == "reshard":
                old, config = config, config_of(layout.pop(0)[1], capacity, exponent, slack)
                reshard(replay, old, config)
            with opened(replay, config) as shards:
                held = learnt(shards)
                assert held == {name: before[name] for name in held}
                assert total is None or sums(shards) == total
                if capacity == 3000:
                    assert held.keys() == hand.episodes.keys()
                check_bounds(shards)
                assert all(Hand.shard(shards, name).store.knows(name) for name in hand.episodes)
                for name, number in layout:
                    getattr(hand, name)(shards, number)
                    check_bounds(shards)
                before, total = learnt(shards), sums(shards)
            for name, bits_of_it in as_played(replay).items():
                assert bits_of_it == bits(hand.episodes[name])


@given(total=st.integers(0, 10**9), weights=st.lists(st.integers(0, 1000), min_size=1, max_size=9))
def test_shares_add_up_and_follow_the_weights(total, weights):
    shares = reshard_module._shares(total, weights)
    assert sum(shares) == total and min(shares) >= 0
    if any(weights):
        for share, weight in zip(shares, weights, strict=True):
            assert abs(share - total * weight / sum(weights)) < 1 + 1e-6


# Kills --------------------------------------------------------------------------------------------------------

BOUNDARIES = ("mkdir", "write", "fsync", "rename", "unlink", "rmdir")
KILLED = 9


def in_child(action):
    """The exit code of a forked process that does it."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def die_at(number, names=BOUNDARIES):
    """From now on, this process ends before the given one of its calls, counted from 0; a write is cut in half."""
    calls = count()

    def deadly(name, real):
        def call(*args, **kwargs):
            if next(calls) >= number:
                if name == "write":
                    real(args[0], memoryview(args[1]).cast("B")[: len(args[1]) // 2])
                os._exit(KILLED)
            return real(*args, **kwargs)

        return call

    if "fsync" in names:
        # A kill takes nothing of what the operating system has: syncing would cost time only.
        os.fsync = lambda descriptor: None
    for name in names:
        setattr(os, name, deadly(name, getattr(os, name)))


def digest(folder):
    """Of all files below a folder, their names included; locks hold nothing."""
    sha256 = hashlib.sha256()
    for path in sorted(folder.rglob("*.log")):
        sha256.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return sha256.hexdigest()


class Layouts:
    """A run's old layout and its new one, both looked at, to tell what is left of them by its bits."""

    def __init__(self, folder, one, other):
        self.whole = folder / "whole"
        self.one, self.other = one, other
        self.hand, self.before, self.total = filled(self.whole, one)
        copy = folder / "looked_at" / "replay"
        shutil.copytree(self.whole, copy)
        reshard(copy, config_of(one), config_of(other))
        self.known = {digest(self.whole): one, digest(copy): other}
        assert len(self.known) == 2
        self.look_at(copy, other)

    def look_at(self, replay, num_shards):
        with opened(replay, config_of(num_shards)) as shards:
            assert learnt(shards) == self.before and sums(shards) == self.total
            check_all_known(shards, self.hand.episodes)

    def reshard(self, replay):
        reshard(replay, config_of(self.one), config_of(self.other))

    def settled(self, replay):
        """As the next start does it: nothing but one of the layouts is there. Returns its number of shards."""
        finish_or_undo(replay)
        assert [path.name for path in replay.parent.iterdir()] == ["replay"]
        num_shards = num_shards_of(replay)
        assert {path.name for path in replay.iterdir()} == {f"shard_{index}" for index in range(num_shards)}
        assert self.known[digest(replay)] == num_shards
        return num_shards


@pytest.mark.parametrize(("one", "other"), [(2, 3), (3, 1)])
def test_a_kill_at_any_moment_leaves_the_old_layout_or_the_new_one(tmp_path, one, other):
    layouts = Layouts(tmp_path, one, other)
    found = []
    code = KILLED
    while code == KILLED:
        replay = tmp_path / "killed" / "replay"
        shutil.copytree(layouts.whole, replay)

        def reshard_and_die(replay=replay):
            die_at(len(found))
            layouts.reshard(replay)

        code = in_child(reshard_and_die)
        found.append(layouts.settled(replay))
        shutil.rmtree(replay.parent)
    assert code == 0 and len(found) > 60
    assert found == sorted(found, key=lambda number: number == other), "the switch happens once"
    assert found[0] == one and found[-1] == other


def test_a_kill_while_it_is_settled(tmp_path):
    """Whatever a first kill left, a second one in finish_or_undo takes nothing either."""
    layouts = Layouts(tmp_path, 2, 3)
    states = set()
    for first in count():
        killed = tmp_path / "killed"
        shutil.copytree(layouts.whole, killed / "replay")

        def reshard_and_die(first=first, killed=killed):
            die_at(first, ("rename", "unlink"))
            layouts.reshard(killed / "replay")

        code = in_child(reshard_and_die)
        state = tuple(sorted(path.name.removeprefix("replay") for path in killed.iterdir()))
        if state not in states:
            states.add(state)
            kill_while_settling(layouts, killed, tmp_path / "again")
        shutil.rmtree(killed)
        if code == 0:
            break
    assert states == {
        ("", ".resharding"), (".before-resharding", ".resharding"), ("", ".before-resharding"), ("",),
    }  # fmt: skip


def kill_while_settling(layouts, killed, again):
    code = KILLED
    for number in count():
        shutil.copytree(killed, again)

        def settle_and_die(number=number):
            die_at(number)
            finish_or_undo(again / "replay")

        code = in_child(settle_and_die)
        layouts.settled(again / "replay")
        shutil.rmtree(again)
        if code == 0:
            return
        assert code == KILLED


def test_all_is_synced_before_the_first_rename(tmp_path):
    """A power cut at that moment takes nothing of the new layout."""
    layouts = Layouts(tmp_path, 2, 3)
    replay, synced = tmp_path / "run" / "replay", tmp_path / "synced"
    shutil.copytree(layouts.whole, replay)

    def reshard_and_die():
        record_syncs(synced, syncs=True)
        die_at(0, ("rename",))
        layouts.reshard(replay)

    assert in_child(reshard_and_die) == KILLED
    writing = tmp_path / "run" / "replay.resharding"
    whole = digest(writing)
    for shard in writing.iterdir():
        cut_to_synced(shard, synced)
    assert digest(writing) == whole
    lines = synced.read_text()
    for folder in [tmp_path / "run", writing, *(path for path in writing.rglob("*") if path.is_dir())]:
        names = [line for line in lines.splitlines() if f'"folder": "{folder}"' in line][-1]
        assert all(f'"{path.name}"' in names for path in folder.iterdir() if path.name != "lock")
    # It is whole, as the switch would find it.
    replay.rename(tmp_path / "run" / "replay.before-resharding")
    assert layouts.settled(replay) == 3


def test_each_rename_is_synced_before_what_builds_on_it(tmp_path, monkeypatch):
    replay = tmp_path / "replay"
    filled(replay, 2)
    events = []

    def noting(name):
        real = getattr(os, name)

        def call(target, *args, **kwargs):
            path = os.readlink(f"/proc/self/fd/{target}") if name == "fsync" else target
            events.append((name, str(path)))
            return real(target, *args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in ("rename", "fsync", "unlink"):
        noting(name)
    reshard(replay, config_of(2), config_of(3))
    first = next(place for place, (name, _) in enumerate(events) if name == "rename")
    sync = ("fsync", str(tmp_path))
    assert events[first : first + 4] == [
        ("rename", str(replay)),
        sync,
        ("rename", f"{replay}.resharding"),
        sync,
    ]
    assert events[first + 4][0] == "unlink"
    assert not any(name == "unlink" for name, _ in events[:first])


# Refusals -----------------------------------------------------------------------------------------------------


def make_disk_full(monkeypatch, num_bytes):
    """A write beyond so many bytes writes what fits, and is refused."""
    real, left = os.write, [num_bytes]

    def write(descriptor, data):
        view = memoryview(data).cast("B")
        written = real(descriptor, view[: left[0]]) if left[0] else 0
        left[0] -= written
        if written < len(view):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written

    monkeypatch.setattr(os, "write", write)


def test_a_disk_that_is_full_at_20_offsets(tmp_path):
    layouts = Layouts(tmp_path, 2, 3)
    replay = tmp_path / "run" / "replay"
    shutil.copytree(layouts.whole, replay)
    size = sum(path.stat().st_size for path in replay.rglob("*.log"))
    for offset in [0, 1, 15, 16, 17, *(int(size * share) for share in np.linspace(0.02, 0.6, 15))]:
        with pytest.MonkeyPatch.context() as patch:
            make_disk_full(patch, offset)
            with pytest.raises(LogError, match=r"can't write the replay log .*No space left"):
                layouts.reshard(replay)
        assert [path.name for path in replay.parent.iterdir()] == ["replay"]
        assert layouts.known[digest(replay)] == 2
    layouts.reshard(replay)
    assert layouts.settled(replay) == 3


@pytest.mark.parametrize("name", ["fsync", "rename", "mkdir"])
def test_a_disk_that_refuses_once(tmp_path, name):
    """Every call in turn; the old layout or the new one is what the next start finds."""
    layouts = Layouts(tmp_path, 2, 3)
    real, found = getattr(os, name), []
    while True:
        replay = tmp_path / "run" / "replay"
        shutil.copytree(layouts.whole, replay)
        calls = []

        def refusing(*args, calls=calls, **kwargs):
            calls.append(args)
            if len(calls) == len(found) + 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, name, refusing)
            try:
                layouts.reshard(replay)
            except LogError as error:
                assert "Input/output error" in str(error)
        found.append(layouts.settled(replay))
        shutil.rmtree(replay.parent)
        if len(calls) < len(found):
            break
    assert 2 in found and found[-1] == 3 and len(found) > 2


def test_open_shards_keep_their_layout(tmp_path):
    replay = tmp_path / "replay"
    hand, *_ = filled(replay, 2)
    with opened(replay, config_of(2)) as shards:
        with pytest.raises(LogError, match=r"in use by another process.*stop the run"):
            reshard(replay, config_of(2), config_of(3))
        assert [path.name for path in tmp_path.iterdir()] == ["replay"]
        hand.insert(shards, 3)
    reshard(replay, config_of(2), config_of(3))
    with opened(replay, config_of(3)) as shards:
        assert learnt(shards).keys() == hand.episodes.keys()


def test_another_format_is_refused(tmp_path):
    replay = tmp_path / "replay"
    filled(replay, 1)
    newer = folder_of(replay, 0) / "episodes" / "segment_00000002.log"
    newer.write_bytes(b"DMZ-RLOG" + b"\x02\0\0\0" + bytes.fromhex("a07298a2"))
    whole = digest(replay)
    with pytest.raises(LogError, match="format 2, this version reads format 1"):
        reshard(replay, config_of(1), config_of(2))
    assert digest(replay) == whole and [path.name for path in tmp_path.iterdir()] == ["replay"]


def test_shards_that_were_made_between_the_renames_are_never_mixed_in(tmp_path):
    layouts = Layouts(tmp_path, 2, 3)
    replay = tmp_path / "run" / "replay"
    shutil.copytree(layouts.whole, replay)

    def reshard_and_die():
        die_at(1, ("rename",))
        layouts.reshard(replay)

    assert in_child(reshard_and_die) == KILLED
    assert not replay.exists()
    with opened(replay, config_of(3)):
        pass
    names = {path.name: digest(path) for path in replay.parent.iterdir()}
    assert len(names) == 3
    for refused in (lambda: finish_or_undo(replay), lambda: layouts.reshard(replay)):
        with pytest.raises(LogError, match=r"move the new replay away, then go on"):
            refused()
        assert {path.name: digest(path) for path in replay.parent.iterdir()} == names
    shutil.rmtree(replay)
    assert layouts.settled(replay) == 3


def test_what_can_not_be_removed_keeps_the_next_one_from_beginning(tmp_path, monkeypatch):
    layouts = Layouts(tmp_path, 2, 3)
    replay = tmp_path / "run" / "replay"
    shutil.copytree(layouts.whole, replay)

    def refuse(*args, **kwargs):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        layouts.reshard(replay)
        assert (tmp_path / "run" / "replay.before-resharding").exists()
        with pytest.raises(LogError, match=r"can't remove .*before-resharding.*then try again"):
            reshard(replay, config_of(3), config_of(1))
    assert layouts.settled(replay) == 3


def test_a_replay_folder_behind_a_link(tmp_path):
    _, before, _ = filled(tmp_path / "disk" / "replay", 2)
    link = tmp_path / "run" / "replay"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "disk" / "replay")
    reshard(link, config_of(2), config_of(3))
    assert link.is_symlink() and num_shards_of(link) == 3
    with closing(ReplayShard(CARTPOLE, config_of(3), 0, folder_of(link, 0))) as shard:
        assert {entry.episode_id for entry in shard.ring} == {n for n in before if shard_of(n, 3) == 0}


def test_statistics_of_the_run_stay(tmp_path):
    replay = tmp_path / "replay"
    filled(replay, 2, rounds=8, capacity=300)
    old = replay_stats(replay)["total"]
    reshard(replay, config_of(2, 300), config_of(5, 300))
    new = replay_stats(replay)["total"]
    assert {k: v for k, v in new.items() if k != "log_bytes"} == {
        k: v for k, v in old.items() if k != "log_bytes"
    }
