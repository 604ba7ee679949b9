import hashlib
import logging
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed_muzero.checkpoint import read_checkpoint
from distributed_muzero.config import LearnerConfig, make_config
from distributed_muzero.environments.chain import make_chain, solve
from distributed_muzero.errors import CheckpointError, ConfigError, NonFiniteError
from distributed_muzero.networks.device import choose_device, choose_dtype
from distributed_muzero.workers.builder import Builder
from distributed_muzero.workers.learner import Learner, learning_rate
from distributed_muzero.workers.local import no_sleep, ready_batches
from distributed_muzero.workers.outbox import Outbox
from tests.episodes import make_episode

GOLDEN = Path(__file__).parent.parent / "fixtures" / "checkpoints"
SMALL = {
    "environment": {"id": "chain"},
    "network": {"hidden_sizes": [16], "embedding_size": 8},
    "algorithm": {"num_unroll_steps": 3, "td_steps": 10, "discount": 0.95},
    "search": {"num_simulations": 8},
    "replay": {"min_size_to_sample": 100, "max_transitions": 5000, "samples_per_insert": 8.0},
    "learner": {"batch_size": 16, "publish_interval": 4, "warmup_steps": 3, "device": "cpu"},
}


def make_builder(**sections):
    return Builder(make_config(SMALL, sections), "run")


def make_batches(builder, number, seed=0):
    spec = builder.spec._replace(observation_dtype=np.dtype(np.float32))
    with tempfile.TemporaryDirectory() as folder:
        shard = builder.replay_shard(0, Path(folder))
        shard.insert([make_episode(12, name=str(i), seed=seed + i, spec=spec) for i in range(30)])
        batches = shard.sample_many(number)
        shard.close()
    assert len(batches) == number
    return batches


def digest(learner):
    arrays, state = learner.state()
    h = hashlib.sha256(repr(sorted(state.items())).encode())
    for file in sorted(arrays):
        for name in sorted(arrays[file]):
            h.update(f"{file}/{name}".encode() + np.ascontiguousarray(arrays[file][name]).tobytes())
    return h.hexdigest()


@pytest.mark.parametrize("steps_before", [0, 1, 6])
def test_a_restored_learner_goes_on_bit_for_bit(steps_before):
    builder = make_builder()
    batches = make_batches(builder, 14)
    learner = builder.learner()
    for batch in batches[:steps_before]:
        learner.step(batch)
    saved = learner.state()
    for batch in batches[steps_before:]:
        learner.step(batch)  # what was saved must not move along
    restored = builder.learner()
    restored.restore(*saved)
    for batch in batches[steps_before:]:
        restored.step(batch)
    assert digest(restored) == digest(learner)


def test_a_restored_learner_publishes_what_was_saved_under_a_version_that_never_goes_back():
    builder = make_builder()
    learner, restored = builder.learner(), builder.learner()
    for batch in make_batches(builder, 6):
        learner.step(batch)
    restored.begin(*learner.state(), 7)
    version, weights = restored.weights()
    assert version == 7 and (weights == learner.average_weights()).all()
    restored.begin(*learner.state(), 0)
    assert restored.weights()[0] == 1
    anew = builder.learner()
    anew.begin(None, None, 5)
    assert (anew.version, anew.num_steps) == (5, 0)


def test_priorities_are_how_wrong_the_values_were_before_the_step():
    builder = make_builder()
    learner = builder.learner()
    (batch,) = make_batches(builder, 1)
    with torch.no_grad():
        embeddings = learner.networks.representation(torch.from_numpy(batch.observations))
        values = learner.networks.value(embeddings).numpy()
    given = []
    learner.learn([batch], lambda shard, update: given.append((shard, update)))
    ((shard, update),) = given
    assert shard == batch.shard
    np.testing.assert_allclose(
        update.priorities, np.abs(values - batch.target_returns[:, 0]), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_array_equal(np.stack([update.keys, update.steps], 1), batch.positions)
    assert (update.versions == learner.version).all()


def test_average_and_raw_weights_are_restored_each_with_its_own_running_statistics():
    builder = make_builder()
    learner, restored = builder.learner(), builder.learner()
    for batch in make_batches(builder, 6):
        learner.step(batch)
    arrays, state = learner.state()
    restored.restore(arrays, state)
    raw = learner.flat.named_arrays(learner.flat.read().numpy())
    assert raw["normalizer.num_batches"] == 6 and arrays["weights"]["normalizer.num_batches"] < 6
    for name in ("normalizer.mean", "normalizer.variance"):
        assert (raw[name] != arrays["weights"][name]).any()
        assert (restored.networks.get_buffer(name).numpy() == raw[name]).all()
    assert torch.equal(restored.flat.read(), learner.flat.read())
    assert torch.equal(restored.average, learner.average)


def test_buffers_that_a_float32_vector_would_round_are_restored_exactly():
    builder = make_builder()
    learners = [Learner(with_buffers(builder.networks()), builder.config.learner) for _ in range(2)]
    learners[0].networks.count += 2**40 + 1
    learners[0].networks.share += 1 / 3
    learners[0].networks.on |= True
    learners[1].restore(*learners[0].state())
    restored = learners[1].networks
    assert (int(restored.count), float(restored.share), bool(restored.on)) == (2**40 + 1, 1 / 3, True)


def with_buffers(networks):
    networks.register_buffer("count", torch.zeros((), dtype=torch.int64))
    networks.register_buffer("share", torch.zeros((), dtype=torch.float64))
    networks.register_buffer("on", torch.zeros((), dtype=torch.bool))
    return networks


def test_torch_goes_on_drawing_the_same_numbers():
    learner = make_builder().learner()
    arrays, state = learner.state()
    drawn = torch.rand(5)
    assert arrays["generators"]["cpu"].dtype == np.uint8
    learner.restore(arrays, state)
    assert torch.equal(torch.rand(5), drawn)


def test_generators_of_another_torch_start_anew_and_say_so(caplog):
    learner = make_builder().learner()
    arrays, state = learner.state()
    learner.restore({**arrays, "generators": {"cpu": np.zeros(7, np.uint8)}}, state)
    assert "of another torch" in caplog.text


@pytest.mark.parametrize("version", [1, 2])
def test_golden_checkpoints_go_on(version):
    network = {"hidden_sizes": [4], "embedding_size": 3, "support_size": 5}
    builder = make_builder(network=network)
    saved = read_checkpoint(GOLDEN / f"format_{version}" / "step_00000006")
    learner = builder.learner()
    torch.manual_seed(5)
    learner.restore(saved.tensors, saved.state)
    published = hashlib.sha256(learner.weights()[1].tobytes()).hexdigest()
    assert published == "734c673f64ef6aa4457ad962435ba11f79bdf06705de6e78fe9444e44438c9dc"
    assert (learner.num_steps, learner.weights()[0]) == (6, 1)
    generator = (
        torch.Generator().manual_seed(5).get_state() if version == 1 else saved.tensors["generators"]["cpu"]
    )
    assert np.array_equal(torch.get_rng_state(), generator)
    assert np.isfinite(learner.step(make_batches(builder, 1)[0])["train/loss"])
    assert learner.optimizer.state[learner.flat.vector]["step"] == 7


def test_what_other_writers_add_is_passed_over():
    builder = make_builder()
    learner, restored = builder.learner(), builder.learner()
    learner.step(make_batches(builder, 1)[0])
    arrays, state = learner.state()
    more = {**arrays, "shards": {"a": np.ones(3)}, "optimizer": {**arrays["optimizer"], "new": np.ones(2)}}
    restored.restore(more, {**state, "env_steps": 7, "shards": [1]})
    assert digest(restored) == digest(learner)


def test_other_settings_than_the_checkpoints_are_told(caplog):
    learner = make_builder().learner()
    with caplog.at_level(logging.WARNING):
        learner.restore(*learner.state())
        assert caplog.messages == []
        make_builder(learner={**SMALL["learner"], "average_decay": 0.5}).learner().restore(*learner.state())
    assert len(caplog.messages) == 1 and "average_decay 0.99 → 0.5" in caplog.messages[0]


def without(arrays, file, name):
    return {**arrays, file: {key: array for key, array in arrays[file].items() if key != name}}


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing():
    builder = make_builder()
    learner = builder.learner()
    learner.step(make_batches(builder, 1)[0])
    arrays, state = learner.state()
    other = make_builder(network={"hidden_sizes": [16], "embedding_size": 9}).learner().state()[0]
    bias = {"policy_layers.2.bias": np.zeros(99, np.float32)}
    wrong = [
        (
            {**arrays, "weights": other["weights"]},
            state,
            r"representation_layers\.2\.weight .*is \[9, 16\], .*\[8, 16\]",
        ),
        (
            without(arrays, "weights", "value_layers.0.bias"),
            state,
            r"value_layers\.0\.bias .*missing, .*\[16\]",
        ),
        (
            {**arrays, "weights": {**arrays["weights"], "x": np.ones(2)}},
            state,
            r"x of its weights .*nothing of that",
        ),
        ({**arrays, "weights": {**arrays["weights"], **bias}}, state, r"policy_layers\.2\.bias .*\[99\]"),
        ({**arrays, "optimizer": other["optimizer"]}, state, "vector of its optimizer"),
        (without(arrays, "optimizer", "exp_avg"), state, "exp_avg of its optimizer is missing"),
        ({**arrays, "buffers": {"count": np.ones(1)}}, state, "count of its buffers"),
        ({"weights": arrays["weights"]}, state, "vector of its optimizer is missing"),
        (arrays, {"learner_steps": 1}, "needs a whole number weights_version; got None"),
    ]
    before = digest(learner)
    for tensors, numbers, message in wrong:
        with pytest.raises(CheckpointError, match=message):
            learner.restore(tensors, numbers)
        assert digest(learner) == before


def test_a_version_is_published_every_interval_and_its_weights_are_a_copy():
    builder = make_builder()
    learner = builder.learner()
    batches = iter(make_batches(builder, 10))
    first = learner.learn(batches)
    version, weights = learner.weights()
    assert (first.learner_steps, first.weights_version, version) == (4, 1, 1)
    kept = weights.copy()
    second = learner.learn(batches)
    assert (second.learner_steps, second.weights_version) == (8, 2) and (weights == kept).all()
    assert (learner.weights()[1] != kept).any()
    last = learner.learn(batches)  # two batches are left: no new version
    assert (last.learner_steps, last.weights_version) == (10, 2)
    assert learner.learn(batches).metrics == {}


def test_published_weights_are_the_mean_of_the_first_steps_by_hand():
    # decay = steps / (steps + 10): after one step 1/11, so the average is 1/11 start + 10/11 now.
    builder = make_builder()
    learner = builder.learner()
    start = learner.flat.read()
    learner.step(make_batches(builder, 1)[0])
    np.testing.assert_allclose(
        learner.average_weights(), start / 11 + learner.flat.read() * 10 / 11, rtol=1e-6, atol=1e-7
    )


def test_learning_from_one_batch_lowers_its_loss():
    builder = make_builder(learner={"learning_rate": 0.01, "final_learning_rate": 0.01})
    learner = builder.learner()
    (batch,) = make_batches(builder, 1)
    losses = [learner.step(batch)["train/loss"] for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


def test_arithmetic_in_bfloat16_gives_nearly_the_same_losses_and_gradients_to_float32_weights():
    exact = make_builder().learner()
    coarse = make_builder(learner={"compute_dtype": "bfloat16"}).learner()
    (batch,) = make_batches(make_builder(), 1)
    # From where the first steps left one of them: heads of zeros would say the same in any arithmetic.
    for _ in range(20):
        exact.step(batch)
    coarse.flat.write(exact.flat.read())
    metrics, about = exact.step(batch), coarse.step(batch)
    assert metrics["train/loss"] != about["train/loss"] == pytest.approx(metrics["train/loss"], rel=0.02)
    gradients = [learner.flat.vector.grad for learner in (exact, coarse)]
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    assert coarse.flat.vector.dtype == coarse.average.dtype == torch.float32


def test_auto_takes_bfloat16_only_where_the_device_has_instructions_for_it(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_dtype("float32", cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: including_emulation)
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda supported=supported: supported)
        assert choose_dtype("auto", cpu) == dtype
    assert choose_dtype("auto", gpu) == torch.float32


def test_read_only_batches_are_learnt_from_without_being_written_to():
    builder = make_builder()
    one, other = builder.learner(), builder.learner()
    (batch,) = make_batches(builder, 1)
    one.step(batch)
    for array in batch[:-1]:
        array.flags.writeable = False
    other.step(batch)
    assert digest(one) == digest(other)


def test_staleness_is_the_distance_in_versions():
    builder = make_builder()
    learner = builder.learner()
    learner.version = 9
    (batch,) = make_batches(builder, 1)
    batch = batch._replace(weights_versions=np.array([4] * 8 + [8] * 8))
    assert learner.step(batch)["train/staleness"] == 3


def test_exploding_weights_stop_the_learner_and_change_nothing():
    builder = make_builder()
    learner = builder.learner()
    batch = make_batches(builder, 1)[0]
    learner.flat.write(np.full(learner.flat.size, 1e30, np.float32))
    before = learner.flat.read()
    with pytest.raises(NonFiniteError):
        learner.step(batch)
    assert (learner.flat.read() == before).all() and learner.num_steps == 0


def test_learning_rate_warms_up_and_falls_by_hand():
    config = LearnerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4, decay_steps=100)
    rates = [learning_rate(config, step) for step in (0, 3, 4, 54, 104, 10_000)]
    assert rates == pytest.approx([0.25, 1.0, 1.0, 0.55, 0.1, 0.1])


def test_cuda_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        choose_device("cuda", "learner.device")
    for name in ("auto", "cpu"):
        assert choose_device(name, "learner.device").type == "cpu"


def test_the_whole_loop_reaches_the_optimum_of_the_chain(tmp_path):
    """Ten states: greedy for the near end earns 0.2, the best play earns 1 after four steps (JUMP, …, RIGHT)."""
    builder = make_builder(
        network={"hidden_sizes": [32], "embedding_size": 16},
        algorithm={"td_steps": 50},
        replay={"max_transitions": 1500},
        actor={"envs_per_actor": 16, "temperatures": [[0, 1.0], [200, 0.25]]},
        learner={"batch_size": 64, "learning_rate": 0.01, "final_learning_rate": 0.003, "average_decay": 0.9},
    )
    shard, learner, actor = builder.replay_shard(0, tmp_path), builder.learner(), builder.actor(0, 0)
    evaluator = builder.evaluator()
    outbox = Outbox(lambda offers: {0: shard.insert(offers[0])}, 1, 64)
    while learner.num_steps < 800:
        actor.set_weights(*learner.weights(), learner.num_steps)
        turns = iter((False, True))
        actor.play(outbox, lambda turns=turns: next(turns), no_sleep)
        learner.learn(ready_batches([shard]))

    evaluator.set_weights(*learner.weights())
    result = evaluator.evaluate(3, (1,))
    chain = make_chain(builder.config.environment)
    solution = solve(chain, 0.95)
    assert result["returns"] == [1.0] * 3
    # The learnt value of the start is near the best one; it is of play with noise, hence a little lower.
    value = evaluator.model.search_model.initial(chain.initial_state()[None, None], 1)[0][0]
    assert value == pytest.approx(solution.values[chain.start], abs=0.1)
    for worker in (actor, evaluator):
        worker.close()
