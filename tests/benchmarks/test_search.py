"""The search benchmark measures what it says it measures."""

import importlib.util
import io

import numpy as np
import pytest
import torch
from rich.console import Console

from distributed_muzero.benchmarks import search, yardstick
from distributed_muzero.errors import ConfigError
from distributed_muzero.networks.inference import make_search_model
from distributed_muzero.search.simulate import Expansion


def test_e64_is_the_yardstick_network():
    networks = yardstick.make_e64()
    assert sum(parameter.numel() for parameter in networks.parameters()) == 28_268
    assert yardstick.multiply_adds(networks) == 23_424


def test_making_e64_leaves_torchs_random_numbers_alone():
    before = torch.random.get_rng_state()
    yardstick.make_e64()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_run_reports_a_speed_for_each_batch():
    result = search.run(batches=(1, 3), simulations=5, repeats=1, seconds=0.001)
    assert {key: result[key] for key in ("network", "simulations", "threads")} == {
        "network": "E64",
        "simulations": 5,
        "threads": 1,
    }
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert 0 < row["sims_per_second"] < row["tree_sims_per_second"]
        assert row["mctx_sims_per_second"] is None and row["ratio"] is None
    text = io.StringIO()
    search.print_table(result, Console(file=text, width=100))
    assert "E64, 5 simulations, 1 thread" in text.getvalue()


def test_a_recording_repeats_what_the_model_said():
    model = make_search_model(yardstick.make_e64())
    recording = search.Recording(model)
    parents, actions, children = np.zeros(2, np.int32), np.array([0, 1], np.int32), np.ones(2, np.int32)
    heard = []
    for _ in range(2):
        recording.initial(yardstick.make_observations(2), 2)
        heard.append(recording.expand(parents, actions, children))
    assert heard[0] is heard[1]
    assert isinstance(heard[0], Expansion)


def test_no_batch_sizes_is_an_error():
    with pytest.raises(ConfigError, match="above 0"):
        search.run(batches=())


@pytest.mark.skipif(importlib.util.find_spec("mctx") is not None, reason="mctx is installed")
def test_without_mctx_the_error_names_the_extra():
    with pytest.raises(ConfigError, match=r"distributed_muzero\[bench\]"):
        search.run(against_mctx=True)


def test_mctx_is_timed_beside_ours_when_it_is_there():
    pytest.importorskip("mctx")
    (row,) = search.run(batches=(2,), simulations=4, against_mctx=True, repeats=1, seconds=0.001)["rows"]
    assert row["ratio"] == pytest.approx(row["sims_per_second"] / row["mctx_sims_per_second"])


def test_mctxs_network_is_ours():
    pytest.importorskip("mctx")
    from distributed_muzero.benchmarks import mctx_search

    networks = yardstick.make_e64()
    model = make_search_model(networks)
    observations, actions = yardstick.make_observations(4), np.array([0, 1, 1, 0], np.int32)
    weights = mctx_search.copy_weights(networks)
    support = np.linspace(-10, 10, 21, dtype=np.float32)
    values, logits = model.initial(observations, 2)
    theirs = mctx_search.initial_inference(weights, support, observations)
    np.testing.assert_allclose(theirs[0], values, atol=1e-3)
    np.testing.assert_allclose(theirs[1], logits, atol=1e-5)
    ours = model.expand(np.zeros(4, np.int32), actions, np.ones(4, np.int32))
    theirs = mctx_search.recurrent_inference(weights, support, 2, theirs[2], actions)
    np.testing.assert_allclose(theirs[0], ours.rewards, atol=1e-3)
    np.testing.assert_allclose(theirs[1], ours.values, atol=1e-3)
    np.testing.assert_allclose(theirs[2], ours.prior_logits, atol=1e-5)
