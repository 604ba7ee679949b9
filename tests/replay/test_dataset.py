"""Datasets: bit for bit out of a run and into another; what is damaged is never read silently."""

from __future__ import annotations

import itertools
import json
import shutil
import time
import zlib
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distributed_muzero.config import Config, make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import LogError, RunError
from distributed_muzero.replay import dataset
from distributed_muzero.replay.dataset import (
    held_episodes,
    import_datasets,
    read_dataset,
    read_info,
    shard_of,
    write_dataset,
)
from distributed_muzero.replay.inspection import replay_stats, select_episodes, verify_replay
from distributed_muzero.replay.log import ReplayLog
from distributed_muzero.replay.log_format import Damage
from distributed_muzero.replay.schema import Kind, StoredEpisode, Targets, encode_episodes
from distributed_muzero.types import Episode
from distributed_muzero.workers.replay_shard import ReplayShard
from tests.episodes import SPEC, make_episode


class Parts(NamedTuple):
    """Makes the shards of a made-up environment."""

    config: Config
    spec: EnvironmentSpec = SPEC

    def replay_shard(self, index: int, folder: Path) -> ReplayShard:
        return ReplayShard(self.spec, self.config, index, folder / f"shard_{index}")


def parts(num_actors=0, spec=SPEC, **replay):
    replay = {"max_transitions": 10_000, "min_size_to_sample": 10, **replay}
    sections = {"actor": {"num_actors": num_actors}, "replay": replay, "learner": {"batch_size": 4}}
    return Parts(make_config(sections), spec)


def episodes(number, num_steps=10, first=0, **options):
    return [
        make_episode(num_steps, name=f"run/0/0/{i}", seed=i, **options) for i in range(first, first + number)
    ]


def stored(items):
    return [StoredEpisode(key, episode) for key, episode in enumerate(items)]


def fill(folder, items, **options):
    shard = parts(**options).replay_shard(0, folder)
    assert {reply.status for reply in shard.insert(items)} <= {"stored"}
    shard.close()


def assert_same(found, expected):
    """Bit for bit, also where a float isn't equal to itself."""
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for field in fields(Episode):
            a, b = getattr(one, field.name), getattr(other, field.name)
            if isinstance(b, np.ndarray):
                assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), field.name
            else:
                assert type(a) is type(b) and a == b, field.name


def random_bits(rng, dtype, shape):
    if np.dtype(dtype) == bool:
        return rng.random(shape) < 0.5
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(rng.bytes(size), dtype).reshape(shape)


# Files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (2,), (3, 4, 2)], ids=str)
@pytest.mark.parametrize(
    "dtype", ["?", "u1", "i1", "u2", "i4", "i8", "u8", "f2", "f4", "f8", ">f4", "c8"], ids=str
)
def test_every_bit_comes_back(tmp_path, dtype, shape):
    rng = np.random.default_rng(1)
    items = [
        replace(
            episode,
            observations=random_bits(rng, dtype, (episode.num_steps + 1, *shape)),
            rewards=random_bits(rng, "f4", episode.num_steps),
            root_values=random_bits(rng, "f4", episode.num_steps + 1),
            policies=random_bits(rng, "f4", (episode.num_steps, 3)),
        )
        for episode in [*episodes(3), *episodes(2, num_steps=1, first=3, terminated=False, two_players=True)]
    ]
    path = tmp_path / "set.parquet"
    write_dataset(path, stored(items), row_group_bytes=1000)
    assert_same(read_dataset(path), items)
    is_list = pa.types.is_list(pq.read_schema(path).field("observations").type)
    assert is_list == (dtype not in (">f4", "c8"))


def test_pandas_reads_the_columns(tmp_path):
    items = episodes(3)
    write_dataset(tmp_path / "set.parquet", stored(items))
    frame = pd.read_parquet(tmp_path / "set.parquet")
    assert frame["episode_id"].tolist() == [episode.episode_id for episode in items]
    for row, episode in enumerate(items):
        flat = frame["observations"][row]
        assert flat.dtype == np.float32
        shape = (-1, *frame["observation_shape"][row])
        np.testing.assert_array_equal(flat.reshape(shape), episode.observations)
        np.testing.assert_array_equal(frame["rewards"][row], episode.rewards)
        np.testing.assert_array_equal(frame["policies"][row].reshape(-1, 3), episode.policies)


def test_the_file_says_what_it_holds(tmp_path):
    path = tmp_path / "set.parquet"
    written = write_dataset(path, stored([*episodes(3), *episodes(1, num_steps=4, first=3)]))
    assert read_info(path) == written
    assert (written.num_episodes, written.num_transitions) == (4, 34)
    assert written.facts == (("made-up",), (2,), "float32", 3)
    column = pq.read_metadata(path).row_group(0).column(0)
    assert column.compression == "ZSTD"


def test_row_groups_are_bounded_and_written_while_episodes_come(tmp_path):
    path, drawn = tmp_path / "set.parquet", []
    sizes_seen = []

    def draw():
        for item in stored(episodes(200, num_steps=50)):
            drawn.append(item)
            sizes_seen.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
            yield item

    one = sum(
        array.nbytes for array in vars(episodes(1, num_steps=50)[0]).values() if hasattr(array, "nbytes")
    )
    write_dataset(path, draw(), row_group_bytes=10 * one)
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [10] * 20
    # Half of the rows were in the file when half of the episodes had been drawn.
    assert sizes_seen[100] > 0.4 * path.stat().st_size
    assert len(list(read_dataset(path))) == 200


def test_any_flipped_bit_is_found(tmp_path):
    path = tmp_path / "set.parquet"
    write_dataset(path, stored(episodes(2, num_steps=3)))
    data = path.read_bytes()
    for place, bit in itertools.product(range(len(data)), (0, 5)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place + bit) % 8
        path.write_bytes(flipped)
        with pytest.raises(RunError, match=r"set\.parquet"):
            list(read_dataset(path))


def test_page_checksums_are_verified_besides(tmp_path):
    path = tmp_path / "set.parquet"
    write_dataset(path, stored(episodes(2, num_steps=30)))
    columns = pq.read_metadata(path).row_group(0)
    by_name = {
        columns.column(i).path_in_schema.split(".")[0]: columns.column(i) for i in range(columns.num_columns)
    }
    column = by_name["rewards"]
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    place = data.rindex(read_digest(path))
    data[place : place + 64] = b"0" * 64
    path.write_bytes(data)
    dataset._sign(path)
    read_info(path)  # the digest is right for what lies there now
    with pytest.raises(RunError, match=r"set\.parquet.*(?i:crc|checksum)"):
        list(read_dataset(path))


def read_digest(path):
    return pq.read_metadata(path).metadata[b"distributed_muzero.sha256"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_that_was_cut_is_refused(tmp_path, share):
    path = tmp_path / "set.parquet"
    write_dataset(path, stored(episodes(2)))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(RunError, match=r"set\.parquet"):
        read_dataset(path)


def test_what_is_no_dataset_is_refused(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(RunError, match=r"other\.parquet is no dataset of distributed_muzero"):
        read_dataset(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("hello, this is a text that is longer than a footer")
    with pytest.raises(RunError, match=r"text\.parquet"):
        read_dataset(tmp_path / "text.parquet")
    with pytest.raises(RunError, match=r"missing\.parquet"):
        read_dataset(tmp_path / "missing.parquet")


def test_another_format_is_refused_and_both_are_named(tmp_path, monkeypatch):
    path = tmp_path / "set.parquet"
    monkeypatch.setattr(dataset, "FORMAT_VERSION", 7)
    write_dataset(path, stored(episodes(1)))
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"format 7, this version reads format 1"):
        read_dataset(path)


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "set.parquet"
    write_dataset(path, stored(episodes(1)))
    before = path.read_bytes()

    def break_off():
        yield from stored(episodes(5))
        raise LogError("the log is gone")

    with pytest.raises(LogError, match="the log is gone"):
        write_dataset(path, break_off(), row_group_bytes=100)
    other = make_episode(5, spec=SPEC._replace(observation_shape=(3,)))
    with pytest.raises(RunError, match=r"\(3,\) float32.*\(2,\) float32"):
        write_dataset(path, stored([*episodes(1), other]))
    with pytest.raises(RunError, match="no episodes"):
        write_dataset(path, [])
    with pytest.raises(RunError, match=r"nowhere"):
        write_dataset(tmp_path / "nowhere" / "set.parquet", stored(episodes(1)))
    with pytest.raises(RunError, match=r"config\.yaml.*\.parquet"):
        write_dataset(tmp_path / "config.yaml", stored(episodes(1)))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["set.parquet"]


# What a shard holds -------------------------------------------------------------------------------------------


def reopened(folder, **options):
    """What a restarted shard holds."""
    shard = parts(**options).replay_shard(0, folder)
    held = [StoredEpisode(entry.key, shard.ring.episode(entry)) for entry in shard.ring]
    shard.close()
    return held


def assert_held(folder, **options):
    found, expected = list(held_episodes(folder / "shard_0")), reopened(folder, **options)
    assert [item.key for item in found] == [item.key for item in expected]
    assert_same((item.episode for item in found), (item.episode for item in expected))
    return found


def test_held_is_what_a_restarted_shard_holds_after_evictions_and_dropped_segments(tmp_path):
    options = {"max_transitions": 200, "segment_bytes": 2**16}
    shard = parts(**options).replay_shard(0, tmp_path)
    for begin in range(0, 400, 5):
        shard.insert(episodes(5, first=begin))
        shard.sample()
    shard.close()
    numbers = [int(path.stem[-8:]) for path in (tmp_path / "shard_0" / "episodes").glob("segment_*.log")]
    assert min(numbers) > 1
    held = assert_held(tmp_path, **options)
    assert len(held) == 18 and held[-1].episode.episode_id == "run/0/0/399"


def test_the_newest_targets_are_applied(tmp_path):
    shard = parts().replay_shard(0, tmp_path)
    played = episodes(4)
    shard.insert(played)
    for version in (3, 5):
        other = make_episode(10, seed=version)
        shard.update_targets([Targets(1, version, played[1].policies[::-1].copy(), other.root_values)])
        shard.flush()
    shard.close()
    held = assert_held(tmp_path)
    np.testing.assert_array_equal(held[1].episode.root_values, make_episode(10, seed=5).root_values)
    np.testing.assert_array_equal(held[1].episode.policies, played[1].policies[::-1])
    assert_same([held[0].episode, held[2].episode], [played[0], played[2]])
    assert replay_stats(tmp_path)["total"]["refreshed_episodes"] == 1


def test_an_id_that_is_there_twice_counts_once_and_is_told(tmp_path):
    fill(tmp_path, episodes(3))
    log = ReplayLog(tmp_path / "shard_0" / "episodes", 2**20)
    assert len(list(log.recover())) == 1
    log.append(Kind.EPISODES, encode_episodes([StoredEpisode(3, make_episode(4, name="run/0/0/1", seed=9))]))
    log.close()
    held = assert_held(tmp_path)
    assert_same([item.episode for item in held], episodes(3))
    report = verify_replay(tmp_path, 1, SPEC, 1000)
    assert not report["ok"]
    assert report["shards"][0]["episodes"]["duplicate_ids"] == ["run/0/0/1"]


def test_damage_is_counted_and_the_rest_is_held(tmp_path):
    shard = parts().replay_shard(0, tmp_path)
    for episode in episodes(5):
        shard.insert([episode])
    shard.close()
    assert verify_replay(tmp_path, 1, SPEC, 1000)["ok"]
    [segment] = (tmp_path / "shard_0" / "episodes").glob("segment_*.log")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 4
    segment.write_bytes(data)
    damage = Damage()
    assert len(list(held_episodes(tmp_path / "shard_0", damage=damage))) == 4
    assert damage.corrupt_records == 1
    assert replay_stats(tmp_path)["total"]["damage"]["corrupt_records"] == 1
    report = verify_replay(tmp_path, 1, SPEC, 1000)
    assert not report["ok"] and report["shards"][0]["episodes"]["damage"]["corrupt_records"] == 1


def test_verify_finds_invalid_episodes_and_missing_shards(tmp_path):
    fill(tmp_path, episodes(2))
    assert verify_replay(tmp_path, 1, SPEC, 10)["ok"]
    report = verify_replay(tmp_path, 1, SPEC, 9)
    assert not report["ok"] and report["shards"][0]["episodes"]["invalid_episodes"].keys() == {
        "run/0/0/0",
        "run/0/0/1",
    }
    assert verify_replay(tmp_path, 2, SPEC, 10) | {"shards": []} == {
        "ok": False,
        "missing_shards": [1],
        "validated_against": "made-up",
        "shards": [],
    }


def test_verify_counts_records_of_no_known_kind(tmp_path):
    fill(tmp_path, episodes(2))
    log = ReplayLog(tmp_path / "shard_0" / "journal", 2**20)
    list(log.recover())
    log.append(200, b"from the future")
    log.append(Kind.TARGETS, b"not an Arrow batch")
    log.close()
    report = verify_replay(tmp_path, 1, SPEC, 1000)
    assert not report["ok"] and report["shards"][0]["journal"]["undecodable_records"] == 2


def test_select_takes_good_ones_and_of_these_the_newest(tmp_path):
    items = [replace(episode, weights_version=i // 2) for i, episode in enumerate(episodes(10))]
    fill(tmp_path, items)
    good = [episode for episode in items if episode.episode_return >= 0]
    assert 3 < len(good) < 10
    assert_same((item.episode for item in select_episodes(tmp_path, 0.0)), good)
    assert_same((item.episode for item in select_episodes(tmp_path, 0.0, 3)), good[-3:])
    assert_same((item.episode for item in select_episodes(tmp_path, last=100)), items)


# Into a run ---------------------------------------------------------------------------------------------------


def test_the_shard_of_an_id_is_the_outboxes():
    for number in range(100):
        name = f"run/{number}/0/1"
        assert shard_of(name, 7) == zlib.crc32(name.encode()) % 7


def test_an_import_is_stored_once_in_the_right_shards_and_counted_by_the_limiter(tmp_path):
    items = episodes(40)
    write_dataset(tmp_path / "set.parquet", stored(items))
    builder, folder = parts(num_shards=3), tmp_path / "replay"
    counts = import_datasets([tmp_path / "set.parquet"], folder, builder)
    assert counts == (40, 40, 0, {}, 400, 0)
    for index in range(3):
        mine = [episode for episode in items if shard_of(episode.episode_id, 3) == index]
        assert mine
        assert_same((item.episode for item in held_episodes(folder / f"shard_{index}")), mine)
        shard = builder.replay_shard(index, folder)
        assert shard.limiter.inserted == 10 * len(mine)
        assert shard.stats()["inserted_episodes"] == len(mine)
        shard.close()
    again = import_datasets([tmp_path / "set.parquet"] * 2, folder, builder)
    assert again == (80, 0, 80, {}, 0, 0)
    assert replay_stats(folder)["total"]["episodes"] == 40


def test_invalid_episodes_are_counted_by_reason(tmp_path):
    good, bad, worse = episodes(3)
    bad = replace(bad, rewards=np.full(10, np.nan, np.float32))
    worse = replace(worse, actions=worse.actions + 9)
    write_dataset(tmp_path / "set.parquet", stored([good, bad, worse]))
    counts = import_datasets([tmp_path / "set.parquet"], tmp_path / "replay", parts())
    assert (counts.stored, counts.rejected) == (1, {"not_finite": 1, "action": 1})
    # Counted are those of this import only.
    again = import_datasets([tmp_path / "set.parquet"], tmp_path / "replay", parts())
    assert (again.duplicates, again.rejected) == (1, {"not_finite": 1, "action": 1})


def test_what_the_buffer_can_not_hold_gives_way_and_is_told(tmp_path):
    write_dataset(tmp_path / "set.parquet", stored(episodes(40)))
    options = {"max_transitions": 110}
    counts = import_datasets([tmp_path / "set.parquet"], tmp_path / "replay", parts(**options))
    assert (counts.stored, counts.stored_transitions, counts.evicted_transitions) == (40, 400, 300)
    assert len(assert_held(tmp_path / "replay", **options)) == 10


def test_runs_and_folders_of_files_are_datasets_too(tmp_path):
    fill(tmp_path / "run" / "replay", episodes(5))
    (tmp_path / "files").mkdir()
    for number in range(2):
        write_dataset(tmp_path / "files" / f"{number}.parquet", stored(episodes(4, first=3 + 3 * number)))
    builder = parts()
    assert import_datasets([tmp_path / "run"], tmp_path / "a", builder).stored == 5
    assert import_datasets([tmp_path / "run" / "replay"], tmp_path / "b", builder).stored == 5
    both = import_datasets([tmp_path / "run", tmp_path / "files"], tmp_path / "c", builder)
    assert (both.offered, both.stored, both.duplicates) == (13, 10, 3)
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "missing"):
        with pytest.raises(RunError, match=f"no dataset at .*{nothing}"):
            import_datasets([tmp_path / nothing], tmp_path / "d", builder)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "other",
    [
        SPEC._replace(id="another"),
        SPEC._replace(observation_shape=(3,)),
        SPEC._replace(observation_dtype=np.dtype(np.uint8)),
        SPEC._replace(action_shape=(2, 2)),
    ],
    ids=["id", "shape", "dtype", "actions"],
)
def test_a_dataset_of_another_environment_changes_nothing(tmp_path, other):
    write_dataset(tmp_path / "good.parquet", stored(episodes(2)))
    write_dataset(tmp_path / "other.parquet", stored(episodes(2, spec=other)))
    with pytest.raises(RunError) as caught:
        import_datasets([tmp_path / "good.parquet", tmp_path / "other.parquet"], tmp_path / "replay", parts())
    for facts in (dataset._facts_of_spec(SPEC), dataset._facts_of_spec(other)):
        assert str(facts) in str(caught.value)
    assert "other.parquet" in str(caught.value)
    assert not (tmp_path / "replay").exists()


def test_a_damaged_dataset_changes_nothing(tmp_path):
    for name in ("good", "bad"):
        write_dataset(tmp_path / f"{name}.parquet", stored(episodes(2)))
    data = bytearray((tmp_path / "bad.parquet").read_bytes())
    data[200] ^= 1
    (tmp_path / "bad.parquet").write_bytes(data)
    with pytest.raises(RunError, match=r"bad\.parquet is damaged"):
        import_datasets([tmp_path / "good.parquet", tmp_path / "bad.parquet"], tmp_path / "replay", parts())
    assert not (tmp_path / "replay").exists()


def test_nothing_is_imported_while_the_run_goes_on(tmp_path):
    write_dataset(tmp_path / "set.parquet", stored(episodes(4)))
    builder, folder = parts(num_shards=2), tmp_path / "replay"
    running = builder.replay_shard(1, folder)
    begin = time.monotonic()
    with pytest.raises(LogError, match="in use by another process"):
        import_datasets([tmp_path / "set.parquet"], folder, builder)
    assert time.monotonic() - begin < 5
    running.close()
    assert replay_stats(folder)["total"]["episodes"] == 0
    assert import_datasets([tmp_path / "set.parquet"], folder, builder).stored == 4


def test_a_shard_that_takes_nothing_ends_the_import(tmp_path):
    write_dataset(tmp_path / "set.parquet", stored(episodes(40)))
    builder = parts(num_actors=1, samples_per_insert=1.0, error_buffer=4.0)
    with pytest.raises(RunError, match="shard 0 takes no episodes"):
        import_datasets([tmp_path / "set.parquet"], tmp_path / "replay", builder)
    # The locks are free again, and what was taken is there.
    counts = import_datasets([tmp_path / "set.parquet"], tmp_path / "replay", parts())
    assert counts.stored + counts.duplicates == 40 and counts.duplicates > 0


def test_out_and_in_again_is_the_same_dataset(tmp_path):
    fill(tmp_path / "a", episodes(20))
    write_dataset(tmp_path / "a.parquet", select_episodes(tmp_path / "a"))
    import_datasets([tmp_path / "a.parquet"], tmp_path / "b", parts())
    write_dataset(tmp_path / "b.parquet", select_episodes(tmp_path / "b"))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    shutil.copy(tmp_path / "a.parquet", tmp_path / "copy.parquet")
    assert_same(read_dataset(tmp_path / "copy.parquet"), episodes(20))
    json.dumps(replay_stats(tmp_path / "b"), allow_nan=False)


def test_episodes_of_a_curriculums_stages_travel_together(tmp_path):
    stages = [SPEC, SPEC._replace(id="harder")]
    played = [
        episode for number, spec in enumerate(stages) for episode in episodes(2, first=2 * number, spec=spec)
    ]
    written = write_dataset(tmp_path / "both.parquet", stored(played))
    assert written == read_info(tmp_path / "both.parquet")
    assert written.facts.environment_ids == ("harder", "made-up")
    sections = {"actor": {"num_actors": 0}, "curriculum": {"stages": [{"id": "made-up"}, {"id": "harder"}]}}
    counts = import_datasets([tmp_path / "both.parquet"], tmp_path / "replay", Parts(make_config(sections)))
    assert counts.stored == 4
    with pytest.raises(RunError, match=r"both\.parquet doesn't fit"):
        import_datasets([tmp_path / "both.parquet"], tmp_path / "other", parts())
