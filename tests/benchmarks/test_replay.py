"""The replay benchmark measures what it says it measures."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from distributed_muzero.benchmarks import replay
from distributed_muzero.errors import ConfigError
from distributed_muzero.workers.replay_shard import ReplayShard

SMALL = {"seconds": 0.002, "repeats": 2, "batches": (3, 8), "transitions": 1000, "frame_bytes": 2**20}


def is_spread(numbers):
    return numbers.keys() == {"median", "low", "high"} and (
        0 < numbers["low"] <= numbers["median"] <= numbers["high"]
    )


def insert_in_process(config, folder, episodes, num_producers, seconds, repeats):
    """Stands for Ray: every producer inserts once."""
    shard = ReplayShard(replay.CARTPOLE, config, 0, folder)
    for i in range(num_producers):
        named = [replace(episode, episode_id=f"{i}/{j}") for j, episode in enumerate(episodes)]
        assert [reply.status for reply in shard.insert(named)] == ["stored"] * len(episodes)
    shard.close()
    return [1000.0 + turn for turn in range(repeats)]


@pytest.fixture(scope="module")
def result():
    sampling = replay.run_sampling(**SMALL)
    return sampling | replay.run_inserts(insert_in_process, 0.01, 3, (1000, 9000), (1, 2), (1, 4))


def test_all_kinds_of_observations_and_sampling_are_measured(result):
    assert [(shard["observations"], shard["sampling"]) for shard in result["shards"]] == [
        ("4 float32", "uniform"),
        ("4 float32", "prioritised"),
        ("96×96×4 uint8", "uniform"),
        ("96×96×4 uint8", "prioritised"),
    ]
    assert [shard["transitions"] for shard in result["shards"]] == [1000, 1000, 100, 100]
    for shard in result["shards"]:
        assert shard["row_bytes"] > 0
        assert ("fill_seconds" in shard) == (shard["sampling"] == "uniform")
        assert ("recovery_seconds" in shard) == (shard["sampling"] == "prioritised")
        assert shard["journal"]["bytes"] > 100 and is_spread(shard["journal"]["microseconds"])
        assert [row["batch"] for row in shard["batches"]] == [3, 8]
        for row in shard["batches"]:
            assert all(
                is_spread(row[name]) for name in ("draw", "without_journal", "with_journal", "of_four")
            )
            assert row["batches_per_second"] == pytest.approx(1e6 / row["with_journal"]["median"])


def test_a_large_index_is_measured_without_as_much_memory(result):
    assert [index["sampling"] for index in result["index"]] == ["uniform", "prioritised"]
    for index in result["index"]:
        assert index["transitions"] == 1000 and index["frame_bytes"] == 96 * 96 * 4
        assert [row["batch"] for row in index["batches"]] == [3, 8]
        assert all(is_spread(row["without_journal"]) for row in index["batches"])
    uniform, prioritised = (index["index_bytes_per_transition"] for index in result["index"])
    assert 50 < uniform < prioritised < 200


def test_the_ratio_is_that_of_batches_to_learner_steps(result):
    learner = result["learner"]
    assert learner["batch"] == 8
    batches = result["shards"][0]["batches"][1]["batches_per_second"]
    assert learner["ratio"] == pytest.approx(batches / learner["steps_per_second"])


def test_every_combination_of_inserts_is_measured(result):
    rows = result["inserts"]
    assert [(row["producers"], row["episodes_per_call"]) for row in rows] == 2 * [
        (1, 1), (1, 4), (2, 1), (2, 4),
    ]  # fmt: skip
    for row, size in zip(rows, 4 * [1000] + 4 * [9000], strict=True):
        assert 0.9 * size < row["episode_bytes"] <= size
        assert row["episodes_per_second"] == {"median": 1001, "low": 1000, "high": 1002}
        assert row["megabytes_per_second"] == pytest.approx(1001 * row["episode_bytes"] / 1e6)
    assert is_spread(result["sync_milliseconds"])


def test_the_table_is_for_people(result):
    text = io.StringIO()
    replay.print_table(result, Console(file=text, width=80))
    assert "96×96×4 uint8" in text.getvalue() and "learner on E64, batch 8" in text.getvalue()


def test_nothing_is_left_behind(tmp_path):
    replay.run_sampling(**SMALL, folder=tmp_path)
    replay.run_inserts(insert_in_process, 0.01, 1, (1000,), (1,), (1,), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"batches": ()}, {"batches": (0,)}, {"seconds": 0}])
def test_impossible_sizes_are_errors(wrong):
    with pytest.raises(ConfigError, match="above 0"):
        replay.run_sampling(**SMALL | wrong)


def test_its_episodes_have_the_size_that_is_told():
    episode = replay.make_episode(replay.FRAMES, 3)
    assert episode.observations.dtype == np.uint8
    assert episode.observations.max() > 200
    assert replay.array_bytes(episode) == 4 * 96 * 96 * 4 + 3 * (5 + 4 + 4 + 20) + 4 * (4 + 1)


@pytest.mark.slow
@pytest.mark.cluster
def test_producers_are_processes_whose_episodes_are_durable(tmp_path):
    from distributed_muzero.cluster.session import ray_session
    from distributed_muzero.cluster.throughput import insert_speed
    from distributed_muzero.replay import log_format
    from distributed_muzero.replay.schema import decode_episodes

    episodes = [replay.make_episode(replay.CARTPOLE, 20)] * 2
    config = replay.unlimited_config(replay.CARTPOLE, 100_000)
    with ray_session(2):
        speeds = insert_speed(config, tmp_path, episodes, 2, 0.1, 3)
    assert len(speeds) == 3 and min(speeds) > 0
    records = log_format.read(Path(tmp_path) / "shard_0" / "episodes")
    ids = [episode.episode_id for record in records for _, episode in decode_episodes(record.payload)]
    # A first call of each producer, then at least one in each turn.
    assert len(ids) == len(set(ids)) >= 2 * 2 * (1 + 3)
    assert {name.rsplit("/", 1)[0] for name in ids} == {"bench/0", "bench/1"}
