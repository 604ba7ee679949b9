"""The search benchmark measures what it says it measures."""

import importlib.util
import io
import itertools

import numpy as np
import pytest
import torch
from rich.console import Console

from distributed_muzero.algorithm.planning import plan_batch
from distributed_muzero.benchmarks import search, yardstick
from distributed_muzero.benchmarks.recording import Recording
from distributed_muzero.config import SearchConfig
from distributed_muzero.errors import ConfigError
from distributed_muzero.networks.inference import make_search_model


def test_e64_is_the_yardstick_network():
    networks = yardstick.make_e64()
    assert sum(parameter.numel() for parameter in networks.parameters()) == 28_268
    assert yardstick.multiply_adds(networks) == 23_424


def test_making_e64_leaves_torchs_random_numbers_alone():
    before = torch.random.get_rng_state()
    yardstick.make_e64()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_t64_is_as_large_as_tic_tac_toe():
    """h 27·64+64 + 64·64+64 = 5952;  g 73·64+64 + 64·64+64 = 8896;  reward and value 5525 each;
    policy 64·64+64 + 64·9+9 = 4745."""
    networks = yardstick.make_network(yardstick.YARDSTICKS["T64"].spec)
    assert sum(p.numel() for p in networks.parameters()) == 5952 + 8896 + 2 * 5525 + 4745
    assert yardstick.YARDSTICKS.keys() == set(search.NETWORKS)


def test_a_run_reports_a_speed_for_each_network_policy_and_batch():
    policies, networks = ("muzero", "gumbel"), ("E64", "T64")
    result = search.run(
        batches=(1, 9), simulations=5, repeats=1, seconds=0.001, policies=policies, networks=networks
    )
    assert result["threads"] == 1 and all(load >= 0 for load in result["load"])
    cases = [(row["network"], row["policy"], row["batch"]) for row in result["rows"]]
    assert cases == list(itertools.product(networks, policies, (1, 9)))
    for row in result["rows"]:
        assert row["simulations"] == 5
        assert row["sims_per_second"] > 0 and row["tree_sims_per_second"] > 0
        assert row["mctx_sims_per_second"] is None and row["ratio"] is None
    text = io.StringIO()
    search.print_table(result, Console(file=text, width=100))
    assert "1 thread" in text.getvalue() and "T64" in text.getvalue()


def test_without_a_network_a_search_is_faster():
    (row,) = search.run(batches=(9,), simulations=50, repeats=3, seconds=0.02)["rows"]
    assert row["sims_per_second"] < row["tree_sims_per_second"]


def test_each_network_is_searched_as_often_as_its_game_asks_for():
    result = search.run(batches=(1,), repeats=1, seconds=0.001, networks=("E64", "T64"))
    assert [row["simulations"] for row in result["rows"]] == [50, 200]


@pytest.mark.parametrize("batch", [2, 40])  # compiled into the search, and not
@pytest.mark.parametrize("policy", ["muzero", "gumbel"])
def test_a_search_of_a_recording_is_the_search_that_was_recorded(policy, batch):
    model = make_search_model(yardstick.make_e64())
    recording = Recording(model)
    observations, legal = yardstick.make_observations(batch), np.ones((batch, 2), bool)
    config = SearchConfig(policy=policy, num_simulations=12)

    def plan(model):
        return plan_batch(model, observations, legal, config, 0.997, rng=None, noise=False).result

    for result in (plan(recording), plan(recording), plan(recording)):
        for ours, theirs in zip(result, plan(model), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_no_batch_sizes_is_an_error():
    with pytest.raises(ConfigError, match="above 0"):
        search.run(batches=())


def test_unknown_names_are_errors():
    with pytest.raises(ConfigError, match="policy 'alphazero': expected muzero or gumbel"):
        search.run(policies=("muzero", "alphazero"))
    with pytest.raises(ConfigError, match="network 'E65': expected E64 or T64"):
        search.run(networks=("E65",))


@pytest.mark.skipif(importlib.util.find_spec("mctx") is not None, reason="mctx is installed")
def test_without_mctx_the_error_names_the_extra():
    with pytest.raises(ConfigError, match=r"distributed_muzero\[bench\]"):
        search.run(against_mctx=True)


def test_mctx_is_timed_beside_ours_when_it_is_there():
    pytest.importorskip("mctx")
    (row,) = search.run(batches=(2,), simulations=4, against_mctx=True, repeats=1, seconds=0.001)["rows"]
    assert row["ratio"] == pytest.approx(row["sims_per_second"] / row["mctx_sims_per_second"])


@pytest.mark.parametrize("name", search.NETWORKS)
def test_mctxs_network_is_ours(name):
    pytest.importorskip("mctx")
    from distributed_muzero.benchmarks import mctx_search

    spec = yardstick.YARDSTICKS[name].spec
    networks = yardstick.make_network(spec)
    model = make_search_model(networks)
    observations, actions = yardstick.make_observations(4, spec=spec), np.array([0, 1, 1, 0], np.int32)
    weights = mctx_search.copy_weights(networks)
    support = np.linspace(-10, 10, 21, dtype=np.float32)
    values, logits = model.initial(observations, 2)
    theirs = mctx_search.initial_inference(weights, support, observations)
    np.testing.assert_allclose(theirs[0], values, atol=1e-3)
    np.testing.assert_allclose(theirs[1], logits, atol=1e-5)
    ours = model.expand(np.zeros(4, np.int32), actions, np.ones(4, np.int32))
    theirs = mctx_search.recurrent_inference(weights, support, spec.num_actions, theirs[2], actions)
    np.testing.assert_allclose(theirs[0], ours.rewards, atol=1e-3)
    np.testing.assert_allclose(theirs[1], ours.values, atol=1e-3)
    np.testing.assert_allclose(theirs[2], ours.prior_logits, atol=1e-5)
