"""Records of episodes and targets: bit for bit, whether their policies are sparse or dense."""

from contextlib import closing
from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_muzero.config import make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import LogError
from distributed_muzero.replay import log_format, schema
from distributed_muzero.replay.inspection import verify_replay
from distributed_muzero.replay.log import ReplayLog
from distributed_muzero.replay.reshard import reshard
from distributed_muzero.replay.schema import (
    Kind,
    StoredEpisode,
    Targets,
    decode_episodes,
    decode_targets,
    encode_episodes,
    encode_targets,
)
from distributed_muzero.workers.replay_shard import ReplayShard
from tests.episodes import make_episode

MANY = EnvironmentSpec("many", (5,), np.dtype(np.float32), (448,))


def spec_of(num_actions):
    return EnvironmentSpec("made-up", (5,), np.dtype(np.float32), (num_actions,))


def make_thin(num_steps, num_legal=12, spec=MANY, **named):
    """An episode of which few actions are legal, and fewer have a part of the policy."""
    rng = np.random.default_rng(named.get("seed", 0))
    legal = np.zeros((num_steps, spec.num_actions), bool)
    policies = np.zeros(legal.shape, np.float32)
    for row in range(num_steps):
        allowed = rng.permutation(spec.num_actions)[:num_legal]
        legal[row, allowed] = True
        policies[row, allowed[: num_legal // 2 + 1]] = rng.dirichlet(np.ones(num_legal // 2 + 1))
    actions = policies.argmax(1).astype(np.int32)
    episode = make_episode(num_steps, spec=spec, **named)
    return replace(episode, legal_masks=legal, policies=policies, actions=actions)


def is_sparse(payload):
    return bool(payload[7] >> 7)


def with_policies(policies):
    episode = make_episode(len(policies), spec=spec_of(3))
    return replace(episode, policies=policies, legal_masks=policies != 0)


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def assert_same_episodes(found, expected):
    assert [item.key for item in found] == [item.key for item in expected]
    for one, other in zip(found, expected, strict=True):
        for field in fields(one.episode):
            value, wanted = getattr(one.episode, field.name), getattr(other.episode, field.name)
            if isinstance(wanted, np.ndarray):
                assert_same_bits(value, wanted)
            else:
                assert value == wanted


@st.composite
def any_policies(draw, num_actions):
    """[T, A] of any bits; whole rows, or all of them, may be zero or dense."""
    num_steps = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shares = st.sampled_from(draw(st.sampled_from([(0, 0.004, 0.02), (0, 0.02, 0.3, 1)])))
    share = draw(st.lists(shares, min_size=num_steps, max_size=num_steps))
    bits = rng.integers(1, 2**32, (num_steps, num_actions), np.uint32)
    bits[rng.random(bits.shape) >= np.array(share)[:, None]] = 0
    for row, place in draw(
        st.lists(st.tuples(st.integers(0, num_steps - 1), st.sampled_from([0, -1])), max_size=4)
    ):
        bits[row, place] = draw(st.sampled_from([0x80000000, 1, 0x3F800000]))  # −0, the smallest, 1
    policies = bits.view(np.float32)
    return np.asfortranarray(policies) if draw(st.booleans()) else policies


@st.composite
def records(draw):
    num_actions = st.sampled_from([1, 2, 99, 100, 101, 448])
    sizes = draw(
        st.lists(num_actions, min_size=1, max_size=4)
        | st.tuples(num_actions).map(lambda one: list(one) * 3)
        | st.just([70_000])
    )
    return [draw(any_policies(size)) for size in sizes]


@settings(deadline=None, max_examples=100)
@given(records())
def test_policies_of_any_bits_come_back(record):
    stored = [StoredEpisode(3 * i, with_policies(policies)) for i, policies in enumerate(record)]
    assert_same_episodes(decode_episodes(encode_episodes(stored)), stored)
    targets = [Targets(key, 7, episode.policies, episode.root_values) for key, episode in stored]
    found = decode_targets(encode_targets(targets))
    assert [item[:2] for item in found] == [item[:2] for item in targets]
    for one, other in zip(found, targets, strict=True):
        assert_same_bits(one.policies, other.policies)
        assert_same_bits(one.root_values, other.root_values)


def test_a_sparse_record_by_hand():
    policies = np.zeros((2, 100), np.float32)
    policies[0, 2], policies[0, 3], policies[1, 99] = 0.25, 0.75, 1
    payload = encode_targets([Targets(5, 6, policies, np.zeros(3, np.float32))])
    row = schema._unpack(payload, schema.TARGETS, schema.SPARSE_TARGETS).to_pylist()
    assert is_sparse(payload) and row == [
        {
            "key": 5, "version": 6, "policies": [0.25, 0.75, 1], "root_values": [0, 0, 0],
            "num_actions": 100, "zeros": [2, 0, 195, 0],
        }
    ]  # fmt: skip


@pytest.mark.parametrize("num_zeros", [65_535, 65_536])
def test_more_zeros_than_16_bits_count_stay_dense(num_zeros):
    policies = np.zeros((1, num_zeros + 1), np.float32)
    policies[0, -1] = 1
    payload = encode_targets([Targets(0, 0, policies, np.zeros(2, np.float32))])
    assert is_sparse(payload) == (num_zeros < 2**16)
    assert_same_bits(decode_targets(payload)[0].policies, policies)


@pytest.mark.parametrize(
    ("num_actions", "num_legal", "sparse"),
    [(2, 1, False), (9, 1, False), (99, 1, False), (100, 20, True), (448, 12, True), (448, 120, False)],
)
def test_few_actions_and_full_policies_stay_dense_byte_for_byte(num_actions, num_legal, sparse):
    stored = [
        StoredEpisode(0, make_thin(9, num_legal, spec_of(num_actions))),
        StoredEpisode(1, make_thin(4, num_legal, spec_of(num_actions), seed=1)),
    ]
    targets = [Targets(key, 2, episode.policies, episode.root_values) for key, episode in stored]
    for payload, dense in (
        (encode_episodes(stored), schema._pack(schema.episodes_to_arrow(stored))),
        (encode_targets(targets), dense_targets(targets)),
    ):
        assert is_sparse(payload) == sparse
        assert len(payload) < len(dense) if sparse else payload == dense


def dense_targets(targets):
    """As versions without sparse policies wrote them."""
    arrays = ([item.policies.ravel() for item in targets], [item.root_values for item in targets])
    columns = [[item.key for item in targets], [item.version for item in targets], *arrays]
    return schema._pack(pa.record_batch(columns, schema=schema.TARGETS))


def test_dense_records_of_many_actions_are_still_read():
    stored = [StoredEpisode(4, make_thin(7))]
    assert_same_episodes(decode_episodes(schema._pack(schema.episodes_to_arrow(stored))), stored)
    (found,) = decode_targets(
        dense_targets([Targets(4, 2, stored[0].episode.policies, np.zeros(8, np.float32))])
    )
    assert_same_bits(found.policies, stored[0].episode.policies)


def test_to_versions_that_do_not_know_sparse_policies_a_sparse_record_is_none():
    """They take the first 8 bytes for the length, and refuse a record that can't be decoded."""
    payload = encode_episodes([StoredEpisode(0, make_thin(7))])
    with pytest.raises(OverflowError):
        pa.Codec("zstd").decompress(payload[8:], int.from_bytes(payload[:8], "little"))


# Damage -------------------------------------------------------------------------------------------------------


def forged(payload, dense, sparse, **columns):
    """The sparse payload with other columns."""
    batch = schema._unpack(payload, dense, sparse)
    arrays = [columns.get(field.name, batch.column(field.name).to_pylist()) for field in sparse]
    return schema._pack(pa.record_batch(arrays, schema=sparse), schema._IS_SPARSE)


def damages(values, zeros):
    """Of one policy: its numbers and zeros that don't add up."""
    yield values, [*zeros[:-1], zeros[-1] + 1]
    yield values, [*zeros[:-2], zeros[-2] + 448, zeros[-1]]
    yield values, [*zeros[:-1], zeros[-1] - 1 if zeros[-1] else 65_535]
    yield values, [0 for _ in zeros]
    yield values, [65_535 for _ in zeros]
    yield values, zeros[:-1]
    yield values, [*zeros, 0]
    yield values, []
    yield values[:-1], zeros
    yield [], zeros
    yield [], []


def test_sparse_policies_that_do_not_add_up_are_refused(tmp_path):
    episode = make_thin(7)
    payload = encode_episodes([StoredEpisode(0, episode)])
    of_targets = encode_targets([Targets(0, 1, episode.policies, episode.root_values)])
    batch = schema._unpack(payload, schema.EPISODES, schema.SPARSE_EPISODES)
    values, zeros = batch.column("policies")[0].as_py(), batch.column("zeros")[0].as_py()
    bad = [{"policies": [v], "zeros": [z]} for v, z in damages(values, zeros)]
    bad += [{"num_actions": [number]} for number in (-448, 0, 1, 447, 449, 2**31 - 1)]
    shard = tmp_path / "shard_0"
    with (
        closing(ReplayLog(shard / "episodes", 2**20)) as episodes,
        closing(ReplayLog(shard / "journal", 2**20)) as journal,
    ):
        for columns in bad:
            other = forged(payload, schema.EPISODES, schema.SPARSE_EPISODES, **columns)
            with pytest.raises(ValueError, match=r"numbers and .* zeros are no policies of"):
                decode_episodes(other)
            episodes.append(Kind.EPISODES, other)
            other = forged(of_targets, schema.TARGETS, schema.SPARSE_TARGETS, **columns)
            with pytest.raises(ValueError, match=r"numbers and .* zeros are no policies of"):
                decode_targets(other)
            journal.append(Kind.TARGETS, other)
    (report,) = verify_replay(tmp_path, 1, MANY, 1000)["shards"]
    counts = [report[name]["undecodable_records"] for name in ("episodes", "journal")]
    assert counts == [len(bad)] * 2
    with pytest.raises(LogError, match="can't be decoded"):
        make_shard(shard)


def test_a_flipped_bit_of_a_sparse_record_is_counted_and_costs_its_record_only(tmp_path):
    stored = [StoredEpisode(key, make_thin(5, name=f"run/0/0/{key}", seed=key)) for key in range(3)]
    with closing(ReplayLog(tmp_path, 2**20)) as log:
        for item in stored:
            log.append(Kind.EPISODES, encode_episodes([item]))
    (path,) = tmp_path.glob("segment_*.log")
    data = path.read_bytes()
    payload = encode_episodes(stored[1:2])
    begin = data.index(payload)
    for place in np.random.default_rng(0).integers(0, 8 * len(payload), 200):
        flipped = bytearray(data)
        flipped[begin + place // 8] ^= 1 << int(place % 8)
        path.write_bytes(flipped)
        damage = log_format.Damage()
        found = [
            item for record in log_format.read(tmp_path, damage) for item in decode_episodes(record.payload)
        ]
        assert damage.corrupt_records == 1
        assert_same_episodes(found, [stored[0], stored[2]])


# A shard ------------------------------------------------------------------------------------------------------


def make_shard(folder):
    return ReplayShard(MANY, config_of(1), 0, folder)


def config_of(num_shards):
    replay = {
        "num_shards": num_shards,
        "max_transitions": 1000,
        "min_size_to_sample": 10,
        "error_buffer": 1e6,
    }
    return make_config({"replay": replay, "reanalyse": {"ratio": 0.5}, "learner": {"batch_size": 4}})


def test_a_shard_and_another_number_of_shards_keep_sparse_episodes_and_targets(tmp_path):
    given = {f"run/0/0/{i}": make_thin(8, name=f"run/0/0/{i}", seed=i) for i in range(9)}
    # A full one among them: their record is dense only where they share it.
    given["run/0/0/full"] = make_thin(8, 400, name="run/0/0/full", seed=70)
    given["run/0/0/refreshed"] = make_thin(8, name="run/0/0/refreshed", seed=71)
    newer = make_thin(8, 30, seed=72)
    with closing(make_shard(tmp_path / "replay/shard_0")) as shard:
        for episode in given.values():
            assert [reply.status for reply in shard.insert([episode])] == ["stored"]
        not_finite = replace(make_thin(8, name="run/0/0/nan"), policies=np.full((8, 448), np.nan, np.float32))
        assert [reply.status for reply in shard.insert([not_finite])] == ["rejected"]
        shard.update_targets([Targets(10, 3, newer.policies, newer.root_values)])
        shard.flush()
    refreshed = given["run/0/0/refreshed"]
    given["run/0/0/refreshed"] = replace(refreshed, policies=newer.policies, root_values=newer.root_values)
    for name, payloads in (("episodes", 11), ("journal", 1)):
        found = log_format.read(tmp_path / "replay/shard_0" / name)
        kinds = [is_sparse(r.payload) for r in found if r.kind in (Kind.EPISODES, Kind.TARGETS)]
        assert len(kinds) == payloads and sum(kinds) == (10 if name == "episodes" else 1)
    reshard(tmp_path / "replay", config_of(1), config_of(2))
    assert verify_replay(tmp_path / "replay", 2, MANY, 1000)["ok"]
    held = {}
    for index in range(2):
        with closing(ReplayShard(MANY, config_of(2), index, tmp_path / f"replay/shard_{index}")) as shard:
            held |= {entry.episode_id: shard.ring.episode(entry) for entry in shard.ring}
    assert held.keys() == given.keys()
    for name, episode in given.items():
        assert_same_episodes([StoredEpisode(0, held[name])], [StoredEpisode(0, episode)])
