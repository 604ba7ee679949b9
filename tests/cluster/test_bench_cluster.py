"""The data plane's benchmarks measure what they say, and what was acknowledged under load is stored, once."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from distributed_muzero.benchmarks import broadcast, cluster
from distributed_muzero.benchmarks.replay import CARTPOLE, FRAMES, make_episode
from distributed_muzero.errors import ConfigError
from distributed_muzero.workers.replay_shard import ReplayShard


def counts(acknowledged):
    return SimpleNamespace(acknowledged=acknowledged, left=0, statuses=Counter())


def test_the_books_notice_what_is_lost_and_what_is_there_twice():
    kept = cluster.conserved(counts(["a", "b", "c"]), ["a", "b", "b", "d"], [{"evicted_transitions": 0}])
    assert (kept["acknowledged"], kept["stored"]) == (3, 4)
    assert (kept["lost"], kept["twice"], kept["unacknowledged"]) == (1, 1, 1)


@pytest.mark.parametrize("wrong", [{"actors": (0,)}, {"shards": (0, 1)}, {"seconds": 0}, {"repeats": 0}])
def test_impossible_numbers_are_errors(wrong):
    with pytest.raises(ConfigError, match="above 0"):
        cluster.run(None, None, **wrong)


@pytest.mark.parametrize(
    "wrong", [{"num_actors": 0}, {"repeats": 0}, {"sizes": ()}, {"sizes": ((0, "float32"),)}]
)
def test_impossible_broadcasts_are_errors(wrong):
    with pytest.raises(ConfigError, match="above 0"):
        broadcast.run(None, **wrong)


@pytest.mark.parametrize("megabytes", [0.1, 5, 100])
def test_a_network_of_the_size_that_is_asked_for(megabytes, monkeypatch):
    asked = []
    monkeypatch.setattr(broadcast, "make_broadcast_config", note(asked, broadcast.make_broadcast_config))
    with pytest.raises(ZeroDivisionError):
        broadcast.measure_size(lambda *_: 1 / 0, megabytes, "float32", 8, 10)
    width = asked[-1][0]
    assert broadcast.num_bytes(width - 1) < megabytes * 1e6 <= broadcast.num_bytes(width)


def note(calls, function):
    def noted(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return noted


def out_of_band(thing):
    """Bytes inside the pickle, and of the arrays that travel beside it as they are."""
    buffers = []
    inside = pickle.dumps(thing, protocol=5, buffer_callback=buffers.append)
    return len(inside), sum(buffer.raw().nbytes for buffer in buffers)


@pytest.mark.parametrize("spec", [CARTPOLE, FRAMES])
def test_arrays_leave_a_process_as_contiguous_buffers_and_nothing_else_is_large(spec, tmp_path):
    episode = make_episode(spec, 20)
    config = cluster.make_simulation_config(cluster.Setting(spec, 1, 1, None))
    shard = ReplayShard(spec, config, 0, tmp_path)
    shard.insert([replace(episode, episode_id=f"r/0/0/{i}") for i in range(101)])
    batches = shard.sample_many(2)
    shard.close()
    assert len(batches) == 2
    for thing, arrays in ((episode, vars(episode).values()), (batches, [a for b in batches for a in b])):
        inside, beside = out_of_band(thing)
        assert beside == sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
        assert inside < 3000


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.long
def test_what_twenty_actors_were_told_is_stored_lies_in_two_shards_once():
    from distributed_muzero.cluster.session import ray_session
    from distributed_muzero.cluster.simulation import Players, simulate

    with ray_session(1):
        result = cluster.run(simulate, Players, (20,), (2,), seconds=3.0, repeats=1, specs=(CARTPOLE,))
    (loaded,), (paced,) = result["shards"], result["actors"]
    assert (loaded["actors"], loaded["shards"], paced["actors"], paced["shards"]) == (20, 2, 20, 1)
    for row in (loaded, paced):
        assert row["acknowledged"] == row["stored"] > 0
        assert (row["lost"], row["twice"], row["unacknowledged"], row["left"], row["refused"]) == (0,) * 5
        assert row["evicted_transitions"] == 0
        assert row["episodes_per_second"] > 0 and row["batches_per_second"] > 0
        assert row["transitions_per_second"] == pytest.approx(200 * row["episodes_per_second"])
        assert 0 < row["driver_cpu"] < 2 and row["cpu"]["ReplayShardWorker"] > 0
        # An actor is asked four times a second; loaded shards may keep it from answering in time.
        assert 0 < row["play_calls_per_second"] <= 4 * 20 + 1
    assert 30 < paced["episodes_per_second"] < 70
    text = io.StringIO()
    cluster.print_table(result, Console(file=text, width=120))
    assert "4 float32" in text.getvalue() and "slow actors" in text.getvalue()


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.long
def test_a_version_reaches_all_actors_and_its_moments_come_in_order():
    from distributed_muzero.cluster.broadcasting import measure
    from distributed_muzero.cluster.session import ray_session

    with ray_session(2):
        result = broadcast.run(measure, 2, ((5.0, "float32"), (5.0, "bfloat16")), repeats=3)
    for row, dtype in zip(result["sizes"], ("float32", "bfloat16"), strict=True):
        assert row["dtype"] == dtype and 5e6 <= row["float32_bytes"] < 5.1e6
        for way in (row["quiet"], row["busy"]):
            medians = [way[moment]["median"] for moment in broadcast.MOMENTS]
            assert medians[0] > 0 and medians == sorted(medians)
        for name in ("alone", "giving", "sending"):
            steps = row[f"learner_{name}"]
            assert steps["steps"] >= 3 and 0 < steps["setting_aside"]["median"] < steps["step"]["median"]
        # What lies in the object store is nobody's own.
        assert abs(row["private_bytes"]["by_viewing"]) < 2.5e6
    text = io.StringIO()
    broadcast.print_table(result, Console(file=text, width=120))
    assert "bfloat16" in text.getvalue()
