"""The policy/value model on windows of observations."""

from __future__ import annotations

import pytest
import torch

from distributed_muzero.errors import ConfigError, ContractError
from distributed_muzero.mathy.agents.a3c import A3CConfig
from distributed_muzero.mathy.agents.base_config import BaseConfig
from distributed_muzero.mathy.agents.games import batch_of
from distributed_muzero.mathy.agents.policy_value_model import PolicyValueModel, random_observation
from distributed_muzero.mathy.envs import PolySimplify
from distributed_muzero.mathy.state import MathyEnvState, observations_to_window

SMALL = {"units": 8, "embedding_units": 4, "lstm_units": 4, "rnn_size": 6}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return PolicyValueModel(BaseConfig(**SMALL), predictions=7)


@pytest.fixture(scope="module")
def observations():
    env = PolySimplify()
    texts = ["4x + 2x", "4x + 2x + 7 + y", "3 + 2"]
    return [env.state_to_observation(MathyEnvState(problem=text, num_rules=7), 6) for text in texts]


def inputs_of(observations):
    return observations_to_window(observations).to_inputs()


def test_a_window_gives_logits_a_value_each_and_masked_logits(model, observations):
    logits, values, masked_logits = model(inputs_of(observations))
    longest = max(len(observation.nodes) for observation in observations)
    assert logits.shape == masked_logits.shape == (3, longest * 7)
    assert values.shape == (3,) and len(set(values.tolist())) == 3
    mask = inputs_of(observations)[1] == 1
    torch.testing.assert_close(masked_logits[mask], logits[mask])
    policies = torch.softmax(masked_logits, -1)
    assert (policies[~mask] == 0).all() and (policies[mask] > 0).all()


def test_the_next_policy_sums_to_1_and_is_0_where_masked(model, observations):
    for last in range(1, 4):
        policy, value = model.predict_next(inputs_of(observations[:last]))
        observation = observations[last - 1]
        assert policy.shape == (7 * len(observation.nodes),) and value.shape == ()
        assert policy.sum().item() == pytest.approx(1.0)
        assert ((policy > 0) == (torch.tensor(observation.mask) == 1)).all()


def test_padding_changes_nothing(model, observations):
    alone = model.read(inputs_of(observations[:1]))
    beside_longer = model.read(inputs_of(observations))
    num_actions = len(observations[0].mask)
    torch.testing.assert_close(alone.logits[0], beside_longer.logits[0, :num_actions])
    torch.testing.assert_close(alone.values[0], beside_longer.values[0])


def test_a_batch_of_windows_is_as_each_alone(model, observations):
    windows = [observations, observations[1:]]
    batch = model.read(batch_of(windows))
    for row, window in enumerate(windows):
        alone = model.read(inputs_of(window))
        torch.testing.assert_close(batch.values[row, : len(window)], alone.values)
        torch.testing.assert_close(batch.rnn_state_h[row, : len(window)], alone.rnn_state_h)


def test_a_window_is_as_its_observations_one_after_the_other(model, observations):
    whole = model.read(inputs_of(observations))
    state_h, state_c = [0.0] * 6, [0.0] * 6
    for position, observation in enumerate(observations):
        now = observation._replace(rnn_state_h=state_h, rnn_state_c=state_c)
        one = model.read(inputs_of([now]))
        torch.testing.assert_close(one.values[0], whole.values[position])
        state_h, state_c = one.rnn_state_h[0].tolist(), one.rnn_state_c.tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"rnn_state_h": [1.0] * 6},
        {"rnn_state_c": [1.0] * 6},
        {"rnn_history_h": [1.0] * 6},
        {"time": [0.5]},
        {"type": [1, 2]},
        {"values": [9.0] + [0.0] * 6},
        {"nodes": [30] * 7},
        {"mask": [1] * 49},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_feature_matters(model, observations, change):
    before = model(inputs_of(observations[:1]))[1]
    after = model(inputs_of([observations[0]._replace(**change)]))[1]
    assert before.item() != after.item()


def test_a_gradient_reaches_every_weight(observations):
    model = PolicyValueModel(BaseConfig(**SMALL), predictions=7)
    logits, values, _ = model(inputs_of(observations))
    (logits.sum() + values.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_observation_at_which_nothing_is_allowed_has_no_policy(model, observations):
    start = MathyEnvState(problem="4x", num_rules=7).to_start_observation([0.0] * 6, [0.0] * 6)
    assert model(inputs_of([start]))[1].shape == (1,)
    with pytest.raises(ContractError, match="allows no action"):
        model.predict_next(inputs_of([start]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (lambda model: inputs_of([random_observation(model)])[:5], "5 inputs came"),
        (
            lambda model: inputs_of([random_observation(PolicyValueModel(BaseConfig(**SMALL), predictions=6))]),
            "predictions is 7, rnn_size 6",
        ),
        (lambda model: inputs_of([PolySimplify().state_to_observation(MathyEnvState(problem="x+1", num_rules=7))]),
         "rnn_size 6"),
    ],
)  # fmt: skip
def test_inputs_of_another_model_are_refused(model, inputs, message):
    with pytest.raises(ContractError, match=message):
        model(inputs(model))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"unit": 3}, "unknown name 'unit'. Known here: topics"),
        ({"units": 0}, "units: Input should be greater than 0; got 0"),
        ({"topics": ["algebra"]}, "topics.0: Input should be 'poly'"),
        ({"model_name": "../x"}, "model_name"),
    ],
)
def test_a_config_that_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        A3CConfig(**values)
