import json
from contextlib import closing
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest

from distributed_muzero.chaos.history import check
from distributed_muzero.chaos.log_faults import SPEC, _shard
from distributed_muzero.chaos.mutators import make_episode
from distributed_muzero.config import make_config
from distributed_muzero.replay.log import ReplayLog
from distributed_muzero.replay.schema import Kind, StoredEpisode, Targets, encode_episodes, encode_ids
from distributed_muzero.replay.store import EpisodeStore
from distributed_muzero.workers.history import History, RecordedInsert, content_hash
from distributed_muzero.workers.replay_shard import InsertReply, ReplayShard

CAPACITY = 100_000  # rows, as the shards here have it
EPISODES = [make_episode(np.random.default_rng(i), SPEC, 5, f"run/0/0/{i}") for i in range(4)]


@pytest.fixture
def told(tmp_path):
    """Writes a producer's history: what happened, to which episodes."""

    def write(*events):
        history = History(tmp_path / "history.jsonl")
        for event, episodes in events:
            history.write(event, episodes)
        history.close()
        return [tmp_path / "history.jsonl"]

    return write


@pytest.fixture
def folder(tmp_path):
    """A shard's folder that holds the first three episodes."""
    with closing(_shard(tmp_path / "shard")) as shard:
        shard.insert(EPISODES[:3])
    return tmp_path / "shard"


def test_all_is_well(told, folder):
    verdict = check(
        told(("invoke", EPISODES), ("ok", EPISODES[:3]), ("fail", EPISODES[3:])), [folder], CAPACITY
    )
    assert verdict == (3, 3, 0, 0, 0, 0, 0, 0, ()) and verdict.is_good


def test_an_acknowledged_episode_that_is_not_there_is_lost(told, folder):
    verdict = check(told(("invoke", EPISODES), ("ok", EPISODES)), [folder], CAPACITY)
    assert verdict.lost == 1 and not verdict.is_good and verdict.examples == ("run/0/0/3 is lost",)


def test_unless_it_was_damaged_on_purpose(told, folder):
    paths = told(("invoke", EPISODES), ("ok", EPISODES))
    assert check(paths, [folder], CAPACITY, [StoredEpisode(3, EPISODES[3])]).is_good


def test_unknown_is_never_lost_and_may_be_stored(told, folder):
    verdict = check(told(("invoke", EPISODES), ("unknown", EPISODES)), [folder], CAPACITY)
    assert (verdict.acknowledged, verdict.stored, verdict.unknown, verdict.lost) == (0, 3, 4, 0)
    assert verdict.is_good


def test_what_nobody_offered_is_uninvited(told, folder):
    verdict = check(told(("invoke", EPISODES[:2]), ("ok", EPISODES[:2])), [folder], CAPACITY)
    assert verdict.uninvited == 1 and not verdict.is_good


def test_an_episode_stored_with_another_content_is_changed(told, folder):
    other = replace(EPISODES[1], rewards=EPISODES[1].rewards + 1)
    verdict = check(told(("invoke", [EPISODES[0], other, EPISODES[2]])), [folder], CAPACITY)
    assert verdict.changed == 1 and not verdict.is_good


def test_a_second_record_of_an_episode_is_a_duplicate(told, folder):
    with closing(_shard(folder)) as shard:
        shard.store.log.append(Kind.EPISODES, encode_episodes([StoredEpisode(9, EPISODES[0])]))
        shard.commit()
    assert check(told(("invoke", EPISODES)), [folder], CAPACITY).duplicates == 1


def test_an_episode_in_two_shards_is_a_duplicate(told, folder, tmp_path):
    with closing(_shard(tmp_path / "other")) as shard:
        shard.insert(EPISODES[2:])
    verdict = check(told(("invoke", EPISODES), ("ok", EPISODES)), [folder, tmp_path / "other"], CAPACITY)
    assert (verdict.stored, verdict.lost, verdict.duplicates) == (4, 0, 1)


def test_refreshed_targets_are_no_change(told, folder):
    with closing(_shard(folder)) as shard:
        policies, values = EPISODES[0].policies, EPISODES[0].root_values * np.float32(2)
        assert shard.update_targets([Targets(0, 100, policies, values)]) == 1
    verdict = check(told(("invoke", EPISODES), ("ok", EPISODES[:3])), [folder], CAPACITY)
    assert verdict.is_good and verdict.changed == 0


def test_the_checked_folder_stays_as_it_is(told, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    check(told(("invoke", EPISODES)), [folder], CAPACITY)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def filled(tmp_path):
    """Offers 5-step episodes, 6 rows each, to a shard that is closed then; returns histories and folders."""

    def fill(capacity=CAPACITY, num_episodes=20, segment_bytes=2**20, num_steps=(5,)):
        replay = {"max_transitions": capacity, "min_size_to_sample": 1, "error_buffer": 1e9}
        config = make_config({"replay": replay, "algorithm": {"num_unroll_steps": 2}})
        with (
            closing(ReplayShard(SPEC, config, 0, tmp_path / "filled")) as shard,
            closing(
                RecordedInsert(lambda offers: {0: shard.insert(offers[0])}, tmp_path / "filled.jsonl")
            ) as recorded,
        ):
            shard.store.log.segment_bytes = segment_bytes
            for number in range(num_episodes):
                steps = num_steps[number % len(num_steps)]
                episode = make_episode(np.random.default_rng(number), SPEC, steps, f"run/0/0/{number}")
                assert recorded({0: [episode]})[0][0].status == "stored"
        return [tmp_path / "filled.jsonl"], [tmp_path / "filled"]

    return fill


@pytest.mark.parametrize("segment_bytes", [2**20, 2500])
@pytest.mark.parametrize("num_steps", [(5,), (2, 9, 4, 17), (12, 2, 2, 2)])
@pytest.mark.parametrize("capacity", [31, 60, 67])
def test_what_there_was_no_room_for_is_evicted(filled, capacity, num_steps, segment_bytes):
    verdict = check(*filled(capacity, 60, segment_bytes, num_steps), capacity)
    assert verdict.is_good and verdict.evicted + verdict.stored == 60 and verdict.evicted > 30


def forgetting(num_too_many):
    """A state by which a restarted shard has evicted more than it should."""
    real = EpisodeStore._with_own

    def with_own(self, state):
        own = real(self, state)
        return own | {"oldest_key": min(own["oldest_key"] + num_too_many, max(own["next_key"] - 1, 0))}

    return with_own


def test_a_shard_with_room_may_evict_nothing(filled, monkeypatch):
    monkeypatch.setattr(EpisodeStore, "_with_own", forgetting(10**6))
    verdict = check(*filled(), CAPACITY)
    assert (verdict.acknowledged, verdict.stored, verdict.evicted, verdict.lost) == (20, 1, 0, 19)


def test_a_full_shard_may_evict_no_more_than_it_must(filled, monkeypatch):
    monkeypatch.setattr(EpisodeStore, "_with_own", forgetting(4))
    # Ten episodes fit. Of four too many, the oldest might have been in the way where the ring wraps.
    assert check(*filled(capacity=60), 60).lost == 3


@pytest.mark.parametrize("segment_bytes", [2**20, 2500])
def test_a_ring_that_is_smaller_than_it_should_be_is_noticed(filled, segment_bytes):
    verdict = check(*filled(60, 60, segment_bytes), 200)
    assert verdict.lost >= 20 and verdict.stored + verdict.evicted + verdict.lost == 60


def test_what_was_offered_last_can_not_be_evicted_first(filled):
    histories, (folder,) = filled(capacity=60)
    young = make_episode(np.random.default_rng(20), SPEC, 5, "run/0/0/20")
    history = History(histories[0])
    history.write("invoke", [young])
    history.write("ok", [young])
    history.close()
    with closing(ReplayLog(folder / "journal", 2**20)) as journal:
        list(journal.recover())
        journal.append(Kind.IDS, encode_ids([young.episode_id]))
    verdict = check(histories, [folder], 60)
    assert verdict.examples == ("run/0/0/20 is lost",)


@pytest.mark.parametrize("name", [field.name for field in fields(EPISODES[0])])
def test_the_hash_covers_every_field(name):
    value = getattr(EPISODES[0], name)
    if isinstance(value, np.ndarray):
        other = value.copy()
        other.flat[0] = not other.flat[0] if value.dtype == bool else other.flat[0] + 1
    else:
        other = not value if isinstance(value, bool) else value * 2 + type(value)(1)
    assert content_hash(replace(EPISODES[0], **{name: other})) != content_hash(EPISODES[0])


def test_a_recorded_insert_writes_before_and_after(tmp_path):
    path = tmp_path / "history.jsonl"
    answers = [InsertReply("stored"), InsertReply("rejected", "no"), InsertReply("wait")]

    def insert(offers):
        # The invocation is on the disk's side before the call goes out.
        assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["invoke"] * 4
        return {0: answers}

    recorded = RecordedInsert(insert, path)
    assert recorded({0: EPISODES[:3], 1: EPISODES[3:]}) == {0: answers}
    recorded.close()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(event["event"], event["id"][-1]) for event in events[4:]] == [
        ("ok", "0"),
        ("fail", "1"),
        ("unknown", "3"),
    ]
    assert all(event["time"] <= later["time"] for event, later in pairwise(events))


def test_a_line_that_its_producer_died_in_is_skipped(told, folder):
    paths = told(("invoke", EPISODES), ("ok", EPISODES[:3]))
    with paths[0].open("a") as file:
        file.write('{"event": "ok", "id": "run/0/')
    assert check(paths, [folder], CAPACITY).is_good
