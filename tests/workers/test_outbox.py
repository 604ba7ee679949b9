import pytest

from distributed_muzero.config import make_config
from distributed_muzero.workers.outbox import Outbox
from distributed_muzero.workers.replay_shard import InsertReply, ReplayShard
from distributed_muzero.workers.run_state import ActorReport
from tests.episodes import SPEC, make_episode


class Wire:
    """Carries offers to real shards; an answer may get lost on the way back, an offer on the way there."""

    def __init__(self, folder, num_shards, **options):
        replay = {"min_size_to_sample": 1000, **options}
        config = make_config({"replay": replay, "learner": {"batch_size": 4}})
        self.shards = [
            ReplayShard(SPEC, config, index, folder / f"shard_{index}") for index in range(num_shards)
        ]
        self.loses_answers = self.loses_offers = False
        self.offers = []

    def insert(self, offers):
        self.offers.append({shard: [e.episode_id for e in episodes] for shard, episodes in offers.items()})
        if self.loses_offers:
            return {}
        replies = {shard: self.shards[shard].insert(episodes) for shard, episodes in offers.items()}
        return {} if self.loses_answers else replies


def filled(wire, number=20, limit=100):
    outbox = Outbox(wire.insert, len(wire.shards), limit)
    for i in range(number):
        outbox.put(make_episode(5, name=f"run/0/0/{i}", seed=i))
    return outbox


def stored(wire):
    return sum(shard.stats()["inserted_episodes"] for shard in wire.shards)


def test_acknowledged_episodes_leave_and_all_shards_get_some(tmp_path):
    wire = Wire(tmp_path, 3)
    outbox = filled(wire)
    outbox.flush(ActorReport())
    assert len(outbox) == 0 and stored(wire) == 20
    assert all(shard.stats()["episodes"] > 0 for shard in wire.shards)


def test_lost_answers_are_asked_for_again_at_the_same_shard_and_stored_once(tmp_path):
    wire = Wire(tmp_path, 3)
    outbox = filled(wire)
    wire.loses_answers = True
    outbox.flush(ActorReport())
    assert len(outbox) == 20
    wire.loses_answers = False
    outbox.flush(ActorReport())
    assert wire.offers[1] == {
        shard: ids[:1] for shard, ids in wire.offers[0].items()
    }  # asks before it delivers
    outbox.flush(ActorReport())
    assert len(outbox) == 0 and stored(wire) == 20
    assert sum(shard.num_duplicates for shard in wire.shards) == 20
    assert wire.offers[2] == {shard: ids[1:] for shard, ids in wire.offers[0].items()}


def test_lost_offers_stay_until_they_arrive_in_their_order(tmp_path):
    wire = Wire(tmp_path, 2)
    outbox = filled(wire)
    wire.loses_offers = True
    for _ in range(3):
        outbox.flush(ActorReport())
    assert len(outbox) == 20 and stored(wire) == 0
    assert outbox.is_blocked
    wire.loses_offers = False
    outbox.flush(ActorReport())
    assert not outbox.is_blocked
    outbox.flush(ActorReport())
    assert len(outbox) == 0 and stored(wire) == 20


def test_a_shard_that_is_gone_holds_back_its_own_episodes_only(tmp_path):
    wire = Wire(tmp_path, 2)
    outbox = Outbox(lambda offers: {0: wire.insert(offers)[0]}, 2, 100)
    for i in range(20):
        outbox.put(make_episode(5, name=f"run/0/0/{i}", seed=i))
    outbox.flush(ActorReport())
    assert len(outbox) == len(wire.offers[0][1]) > 0


def test_a_failing_call_loses_nothing(tmp_path):
    def broken(offers):
        raise ConnectionError

    outbox = Outbox(broken, 1, 100)
    outbox.put(make_episode(5))
    with pytest.raises(ConnectionError):
        outbox.flush(ActorReport())
    assert len(outbox) == 1


def test_what_must_wait_stays_and_a_refusal_leaves_and_is_reported(tmp_path):
    answers = [
        InsertReply("stored"),
        InsertReply("wait"),
        InsertReply("rejected", "why"),
        InsertReply("duplicate"),
    ]
    outbox = Outbox(lambda offers: {0: answers}, 1, 100)
    for i in range(4):
        outbox.put(make_episode(5, name=str(i)))
    report = ActorReport()
    outbox.flush(report)
    assert len(outbox) == 1 and report.last_rejection == "why"


def test_full_at_its_limit(tmp_path):
    wire = Wire(tmp_path, 1)
    assert not filled(wire, number=9, limit=10).is_blocked and filled(wire, number=10, limit=10).is_blocked


def test_flushing_an_empty_outbox_asks_nobody(tmp_path):
    wire = Wire(tmp_path, 1)
    filled(wire, number=0).flush(ActorReport())
    assert wire.offers == []


def test_draining_delivers_all_that_a_returned_shard_takes(tmp_path):
    wire = Wire(tmp_path, 2)
    outbox = filled(wire)
    wire.loses_offers = True
    assert outbox.drain(lambda: False) == 20
    wire.loses_offers = False
    assert outbox.drain(lambda: True) == 20
    assert outbox.drain(lambda: False) == 0 and stored(wire) == 20
