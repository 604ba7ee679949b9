"""Exported modules play what the run's own evaluation plays, in RLlib's evaluation too."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gymnasium import spaces
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModule

from distributed_muzero.algorithm.acting import Game, decide
from distributed_muzero.checkpoint import latest_checkpoint
from distributed_muzero.errors import CheckpointError, ConfigError, ContractError
from distributed_muzero.matches.players import PriorPlayer
from distributed_muzero.rllib.export import export_rl_module, rl_module_spec
from distributed_muzero.rllib.module import MuZeroModule
from distributed_muzero.workers.actor import PolicyModel
from distributed_muzero.workers.builder import Builder
from tests.rllib.runs import opinionated_run

CARTPOLE = {"environment": {"id": "CartPole-v1"}, "network": {"hidden_sizes": [16], "embedding_size": 8}}
TIC_TAC_TOE = {**CARTPOLE, "environment": {"id": "openspiel:tic_tac_toe"}}


def export(tmp_path, settings, num_simulations=0):
    run = opinionated_run(tmp_path / "runs", "some", settings)
    return run, export_rl_module(run.path, tmp_path / "module", num_simulations=num_simulations)


def model_of(run):
    model = PolicyModel(Builder(run.config, run.name).networks())
    model.load_checkpoint(latest_checkpoint(run.checkpoints))
    return model.search_model


def asked(run, num_simulations):
    """What `evaluate` would play at each step of a random game: observations, what is legal, and the actions."""
    game = Game(Builder(run.config, run.name).environment(), run.config.environment.history_length, 7)
    model, rng = model_of(run), np.random.default_rng(0)
    actions = []
    while not game.is_over:
        if num_simulations:
            search = run.config.search, run.config.algorithm.discount, 0.0
            made = decide([game], model, *search, noise=False, rng=rng, num_simulations=num_simulations)
            actions.append(int(made.actions[0]))
        else:
            actions += PriorPlayer("prior", model).choose([game], rng)
        game.play(game.read_mask(), np.zeros(1), int(rng.choice(np.flatnonzero(game.read_mask()))), 0.0)
    assert len(set(actions)) > 1
    return np.stack(game.observations[:-1]), np.stack(game.legal_masks), actions


def chosen(module, batch):
    output = module.forward_inference(batch)
    if Columns.ACTIONS in output:
        return output[Columns.ACTIONS].flatten().tolist()
    return output[Columns.ACTION_DIST_INPUTS].argmax(-1).flatten().tolist()


@pytest.mark.parametrize("num_simulations", [0, 8])
@pytest.mark.parametrize("policy", ["muzero", "gumbel"])
def test_plays_what_evaluate_plays(tmp_path, num_simulations, policy):
    run, folder = export(tmp_path, {**CARTPOLE, "search": {"policy": policy}}, num_simulations)
    observations, _, actions = asked(run, num_simulations)
    module = RLModule.from_checkpoint(str(folder))
    assert chosen(module, {Columns.OBS: torch.from_numpy(observations)}) == actions


@pytest.mark.parametrize("num_simulations", [0, 8])
def test_plays_legal_moves_only_for_the_player_to_move(tmp_path, num_simulations):
    run, folder = export(tmp_path, TIC_TAC_TOE, num_simulations)
    observations, legal, actions = asked(run, num_simulations)
    shown = {"observations": torch.from_numpy(observations), "action_mask": torch.from_numpy(legal).float()}
    module = MuZeroModule.from_checkpoint(folder)
    assert chosen(module, {Columns.OBS: shown}) == actions
    renamed = {"board": shown["observations"], "action_mask": shown["action_mask"]}
    assert chosen(module, {Columns.OBS: renamed}) == actions
    probabilities = module.forward_exploration({Columns.OBS: shown})[Columns.ACTION_DIST_INPUTS].softmax(-1)
    assert probabilities[~torch.from_numpy(legal)].max() == 0


def test_stacks_observations_in_its_state(tmp_path):
    settings = {**CARTPOLE, "environment": {"id": "CartPole-v1", "history_length": 3}}
    run, folder = export(tmp_path, settings)
    observations, _, actions = asked(run, 0)
    module = MuZeroModule.from_checkpoint(folder)
    state = {name: torch.from_numpy(zeros)[None] for name, zeros in module.get_initial_state().items()}
    whole = {Columns.OBS: torch.from_numpy(observations)[None], Columns.STATE_IN: state}
    assert chosen(module, whole) == actions
    step_by_step = []
    for observation in observations:
        batch = {Columns.OBS: torch.from_numpy(observation)[None, None], Columns.STATE_IN: state}
        step_by_step += chosen(module, batch)
        state = module.forward_inference(batch)[Columns.STATE_OUT]
    assert step_by_step == actions


def test_reads_discrete_observations_as_numbers_and_one_hot(tmp_path):
    settings = {**CARTPOLE, "environment": {"id": "FrozenLake-v1"}}
    _, folder = export(tmp_path, settings)
    one_hot = MuZeroModule.from_checkpoint(folder)
    as_number = MuZeroModule.from_checkpoint(folder, observation_space=spaces.Discrete(16))
    expected = one_hot.forward_inference({Columns.OBS: torch.eye(16)})
    found = as_number.forward_inference({Columns.OBS: torch.arange(16)})
    assert torch.equal(found[Columns.ACTION_DIST_INPUTS], expected[Columns.ACTION_DIST_INPUTS])
    masked = spaces.Dict(place=spaces.Discrete(16), action_mask=spaces.MultiBinary(4))
    module = MuZeroModule.from_checkpoint(folder, observation_space=masked)
    shown = {"place": torch.arange(16), "action_mask": torch.ones(16, 4)}
    found = module.forward_inference({Columns.OBS: shown})
    assert torch.equal(found[Columns.ACTION_DIST_INPUTS], expected[Columns.ACTION_DIST_INPUTS])


def test_a_search_sees_weights_that_were_set_later(tmp_path):
    _, folder = export(tmp_path, CARTPOLE, 4)
    batch = {Columns.OBS: torch.randn(20, 4, generator=torch.Generator().manual_seed(0))}
    module, other = MuZeroModule.from_checkpoint(folder), MuZeroModule.from_checkpoint(folder)
    state = {
        name: -np.asarray(array) if name.endswith("weight") else array
        for name, array in module.get_state().items()
    }
    before = chosen(module, batch)
    module.set_state(state)
    other.set_state(state)
    assert chosen(module, batch) == chosen(other, batch) != before


def test_training_gives_logits_and_values_with_gradients(tmp_path):
    _, folder = export(tmp_path, CARTPOLE)
    module = MuZeroModule.from_checkpoint(folder)
    batch = {Columns.OBS: torch.randn(5, 4)}
    output = module.forward_train(batch)
    values = module.compute_values(batch, output[Columns.EMBEDDINGS])
    assert values.shape == (5,) and torch.allclose(values, module.compute_values(batch))
    (output[Columns.ACTION_DIST_INPUTS].sum() + values.sum()).backward()
    assert module.networks.representation_layers[0].weight.grad.abs().sum() > 0


def test_all_but_rllibs_own_file_is_json_and_safetensors(tmp_path):
    _, folder = export(tmp_path, CARTPOLE)
    names = {path.name for path in folder.iterdir()}
    assert names == {"module.json", "weights.safetensors", "metadata.json", "class_and_ctor_args.pkl"}
    (folder / "class_and_ctor_args.pkl").unlink()
    MuZeroModule.from_checkpoint(folder)
    assert json.loads((folder / "module.json").read_text())["muzero"]["spec"]["id"] == "CartPole-v1"


def test_what_does_not_fit_is_said(tmp_path):
    _, folder = export(tmp_path, CARTPOLE)
    with pytest.raises(CheckpointError, match="holds no exported module"):
        rl_module_spec(tmp_path)
    with pytest.raises(ConfigError, match=r"flat actions, Discrete\(2\)"):
        MuZeroModule.from_checkpoint(folder, action_space=spaces.Discrete(3))
    with pytest.raises(ConfigError, match="shaped alike"):
        MuZeroModule.from_checkpoint(folder, observation_space=spaces.Discrete(3))
    with pytest.raises(ConfigError, match="rl_module_spec"):
        MuZeroModule(observation_space=spaces.Discrete(3), action_space=spaces.Discrete(2))
    with pytest.raises(ContractError, match=r"came as \(5, 3\)"):
        MuZeroModule.from_checkpoint(folder).forward_inference({Columns.OBS: torch.zeros(5, 3)})
    settings = {**TIC_TAC_TOE, "environment": {"id": "openspiel:tic_tac_toe", "history_length": 2}}
    with pytest.raises(ConfigError, match="both players"):
        export(tmp_path / "two", settings)
