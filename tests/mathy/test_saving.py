"""A model goes on where it stopped."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from distributed_muzero.errors import CheckpointError
from distributed_muzero.mathy.agents.base_config import BaseConfig
from distributed_muzero.mathy.agents.policy_value_model import get_or_create_policy_model, random_observation
from distributed_muzero.mathy.state import observations_to_window

SMALL = {"units": 8, "embedding_units": 4, "lstm_units": 4, "rnn_size": 6}


def args_of(folder, **values):
    return BaseConfig(**{**SMALL, "model_dir": str(folder), **values})


def make(folder, predictions=7, required=False, **values):
    return get_or_create_policy_model(
        args_of(folder, **values), predictions=predictions, is_main=True, required=required
    )


def step(model, seed):
    logits, values, _ = model(inputs_of(model, seed))
    model.optimizer.zero_grad()
    (logits.square().mean() + (values - 1).square().mean()).backward()
    model.optimizer.step()
    model.counts["updates"] += 1


def inputs_of(model, seed):
    return observations_to_window([random_observation(model, seed=seed)]).to_inputs()


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def test_a_folder_is_made_with_the_config(tmp_path):
    make(tmp_path / "new" / "model")
    config = json.loads((tmp_path / "new" / "model" / "model.config.json").read_text())
    assert config["predictions"] == 7 and config["units"] == 8


def test_another_process_makes_the_folder_and_writes_nothing(tmp_path):
    get_or_create_policy_model(args_of(tmp_path / "new" / "m"), predictions=7)
    assert list((tmp_path / "new" / "m").iterdir()) == []


def test_a_saved_model_goes_on_with_the_same_next_steps(tmp_path):
    model = make(tmp_path)
    for seed in range(3):
        step(model, seed)
    model.save()
    again = make(tmp_path, required=True)
    assert again.counts == model.counts
    for one, other in zip(model(inputs_of(model, 9)), again(inputs_of(model, 9)), strict=True):
        assert torch.equal(one, other)
    for seed in range(3, 6):
        step(model, seed)
        step(again, seed)
        assert torch.equal(weights(model), weights(again))


def test_a_model_saved_before_its_first_step_has_no_moments(tmp_path):
    model = make(tmp_path)
    model.save()
    again = make(tmp_path)
    step(model, 0)
    step(again, 0)
    assert torch.equal(weights(model), weights(again))


def test_the_same_seed_makes_the_same_model(tmp_path):
    before = torch.random.get_rng_state()
    first, second, other = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", seed=1)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_pickle_is_written(tmp_path):
    model = make(tmp_path)
    step(model, 0)
    model.save()
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {name.rpartition(".")[2] for name in names} == {"json", "safetensors", "DONE"}


def test_a_model_that_must_be_there_and_is_not(tmp_path):
    with pytest.raises(CheckpointError, match="no model 'model' in"):
        make(tmp_path, required=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rnn_size": 7}, "rnn_size 6, not 7"),
        ({"units": 9}, "units 8, not 9"),
        ({"predictions": 6}, "predictions 7, not 6"),
    ],
)
def test_a_model_of_other_shapes_is_refused(tmp_path, change, message):
    make(tmp_path).save()
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path, **change)


def test_other_hyperparameters_are_taken(tmp_path):
    make(tmp_path).save()
    assert make(tmp_path, learning_rate=0.5).optimizer.param_groups[0]["lr"] == 0.5


def test_weights_of_other_shapes_without_a_config_are_refused(tmp_path):
    make(tmp_path).save()
    (tmp_path / "model.config.json").unlink()
    with pytest.raises(CheckpointError, match="don't fit this model"):
        make(tmp_path, rnn_size=7)


def test_a_damaged_config_is_refused(tmp_path):
    make(tmp_path)
    (tmp_path / "model.config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"can't read .*model\.config\.json"):
        make(tmp_path)


def test_a_damaged_model_falls_back_to_the_one_before_or_is_refused(tmp_path, caplog):
    model = make(tmp_path)
    for seed in range(2):
        step(model, seed)
        newest = model.save()
    (newest / "weights.safetensors").write_bytes(b"x")
    assert make(tmp_path).counts["updates"] == 1
    assert "fell back to step 1" in caplog.text
    shutil.rmtree(newest.with_name("step_00000001"))
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        make(tmp_path)


def test_two_checkpoints_are_kept(tmp_path):
    model = make(tmp_path)
    for seed in range(4):
        step(model, seed)
        model.save()
    assert sorted(path.name for path in (tmp_path / "model.checkpoints").iterdir()) == [
        "step_00000003", "step_00000004",
    ]  # fmt: skip


def test_a_model_may_begin_with_anothers_weights(tmp_path):
    model = make(tmp_path / "a", seed=5)
    step(model, 0)
    model.save()
    new = make(tmp_path / "b", init_model_from=str(tmp_path / "a"))
    assert torch.equal(weights(new), weights(model))
    assert not new.optimizer.state and new.counts["updates"] == 0
    step(new, 1)
    new.save()
    assert make(tmp_path / "b", init_model_from=str(tmp_path / "a")).counts["updates"] == 1


def test_first_weights_that_are_not_there_or_do_not_fit(tmp_path):
    with pytest.raises(CheckpointError, match="init_model_from"):
        make(tmp_path / "b", init_model_from=str(tmp_path / "a"))
    make(tmp_path / "a", rnn_size=7).save()
    with pytest.raises(CheckpointError, match="don't fit this model"):
        make(tmp_path / "b", init_model_from=str(tmp_path / "a"))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"can't (read|make)"):
        make(tmp_path / "file" / "model")
