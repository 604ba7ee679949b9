import json
from contextlib import closing
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest

from distributed_muzero.chaos.history import check
from distributed_muzero.chaos.log_faults import SPEC, _shard
from distributed_muzero.chaos.mutators import make_episode
from distributed_muzero.replay.schema import Kind, StoredEpisode, Targets, encode_episodes
from distributed_muzero.workers.history import History, RecordedInsert, content_hash
from distributed_muzero.workers.replay_shard import InsertReply

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
    verdict = check(told(("invoke", EPISODES), ("ok", EPISODES[:3]), ("fail", EPISODES[3:])), [folder])
    assert verdict == (3, 3, 0, 0, 0, 0, 0, 0, ()) and verdict.is_good


def test_an_acknowledged_episode_that_is_not_there_is_lost(told, folder):
    verdict = check(told(("invoke", EPISODES), ("ok", EPISODES)), [folder])
    assert verdict.lost == 1 and not verdict.is_good and verdict.examples == ("run/0/0/3 is lost",)


def test_unless_it_was_damaged_on_purpose(told, folder):
    assert check(told(("invoke", EPISODES), ("ok", EPISODES)), [folder], {"run/0/0/3"}).is_good


def test_unknown_is_never_lost_and_may_be_stored(told, folder):
    verdict = check(told(("invoke", EPISODES), ("unknown", EPISODES)), [folder])
    assert (verdict.acknowledged, verdict.stored, verdict.unknown, verdict.lost) == (0, 3, 4, 0)
    assert verdict.is_good


def test_what_nobody_offered_is_uninvited(told, folder):
    verdict = check(told(("invoke", EPISODES[:2]), ("ok", EPISODES[:2])), [folder])
    assert verdict.uninvited == 1 and not verdict.is_good


def test_an_episode_stored_with_another_content_is_changed(told, folder):
    other = replace(EPISODES[1], rewards=EPISODES[1].rewards + 1)
    verdict = check(told(("invoke", [EPISODES[0], other, EPISODES[2]])), [folder])
    assert verdict.changed == 1 and not verdict.is_good


def test_a_second_record_of_an_episode_is_a_duplicate(told, folder):
    with closing(_shard(folder)) as shard:
        shard.store.log.append(Kind.EPISODES, encode_episodes([StoredEpisode(9, EPISODES[0])]))
        shard.commit()
    assert check(told(("invoke", EPISODES)), [folder]).duplicates == 1


def test_an_episode_in_two_shards_is_a_duplicate(told, folder, tmp_path):
    with closing(_shard(tmp_path / "other")) as shard:
        shard.insert(EPISODES[2:])
    verdict = check(told(("invoke", EPISODES), ("ok", EPISODES)), [folder, tmp_path / "other"])
    assert (verdict.stored, verdict.lost, verdict.duplicates) == (4, 0, 1)


def test_refreshed_targets_are_no_change(told, folder):
    with closing(_shard(folder)) as shard:
        policies, values = EPISODES[0].policies, EPISODES[0].root_values * np.float32(2)
        assert shard.update_targets([Targets(0, 100, policies, values)]) == 1
    verdict = check(told(("invoke", EPISODES), ("ok", EPISODES[:3])), [folder])
    assert verdict.is_good and verdict.changed == 0


def test_the_checked_folder_stays_as_it_is(told, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    check(told(("invoke", EPISODES)), [folder])
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    assert check(paths, [folder]).is_good
