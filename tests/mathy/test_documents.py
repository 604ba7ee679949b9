"""The examples of mathy's documents, with the imports of this package (docs/mathy.md)."""

from __future__ import annotations

import shutil
import tempfile

import pytest

from distributed_muzero.mathy import envs
from distributed_muzero.mathy.agents.a3c import A3CAgent, A3CConfig
from distributed_muzero.mathy.agents.base_config import BaseConfig
from distributed_muzero.mathy.agents.policy_value_model import PolicyValueModel, get_or_create_policy_model
from distributed_muzero.mathy.env import MathyEnv
from distributed_muzero.mathy.envs import PolySimplify
from distributed_muzero.mathy.state import MathyObservation, observations_to_window


def test_call_the_model():
    args = BaseConfig()
    env: MathyEnv = envs.PolySimplify()
    observation: MathyObservation = env.state_to_observation(env.get_initial_state()[0])
    model = PolicyValueModel(args, predictions=env.action_size)
    inputs = observations_to_window([observation]).to_inputs()
    # the policy of the last observation alone, masked and normalised
    policy, value = model.predict_next(inputs)
    assert policy.ndim == 1
    assert policy.shape == (env.action_size * len(observation.nodes),)
    assert value.ndim == 0
    assert isinstance(float(value.numpy()), float)


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=[pytest.mark.cluster, pytest.mark.long])])
def test_save_a_model_with_its_optimizer(num_workers):
    model_folder = tempfile.mkdtemp()
    args = A3CConfig(
        max_eps=3,
        topics=["poly"],
        model_dir=model_folder,
        update_gradients_every=4,
        num_workers=num_workers,
        units=4,
        embedding_units=4,
        lstm_units=4,
    )
    instance = A3CAgent(args)
    instance.train()
    model_two = get_or_create_policy_model(args=args, predictions=PolySimplify().action_size, is_main=True)
    assert model_two.counts == instance.model.counts
    assert model_two.counts["episodes"] >= 3
    shutil.rmtree(model_folder)
