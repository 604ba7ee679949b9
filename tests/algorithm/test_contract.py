"""The signatures that never change, and what the three functions promise together (docs/algorithm.md)."""

import inspect

import numpy as np
import pytest
import torch

import distributed_muzero
from distributed_muzero import Step, acting, planning, training
from distributed_muzero.algorithm.returns import n_step_returns
from tests.games import Nim, Script, constant_functions, nim_functions

NETWORKS = ["h", "g_r", "g_s", "f_v", "f_p"]


@pytest.mark.parametrize(
    ("function", "positional"),
    [
        (planning, [*NETWORKS, "o", "mask"]),
        (acting, ["env", *NETWORKS]),
        (training, ["observations", "target_policies", "target_actions", "target_returns", *NETWORKS]),
    ],
)
def test_positional_signature_is_that_of_the_contract(function, positional):
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    extensions = [p for p in parameters if p.name not in positional]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in extensions)
    assert all(p.default is p.empty for p in parameters if p.name in positional)


def test_step_is_a_tuple_of_exactly_five():
    assert Step._fields == ("observation", "policy", "action", "reward", "value")


def test_the_three_functions_are_importable_from_the_package():
    assert set(distributed_muzero.__all__) == {"Step", "__version__", "acting", "planning", "training"}


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3), ()])
def test_observations_and_actions_of_any_shape_travel_from_acting_to_training(shape):
    """O is `shape`, N is 2, A is 2 × 2, K is 1: everything is read from the tensors (decisions 1, 2 and 8)."""
    seen = []

    def h(o):
        seen.append(tuple(o.shape))
        return torch.zeros(len(o), 1)

    weight = torch.ones(1, requires_grad=True)
    _, g_r, g_s, _, f_p = constant_functions(4)
    functions = h, g_r, g_s, lambda s: weight * torch.ones(len(s)), f_p
    episode = acting(Script(3, [np.ones((2, 2))] * 3, shape=shape), *functions, history_length=2)
    assert seen == [(1, 2, *shape)] * 3
    assert all(step.policy.shape == (2, 2) and step.observation.shape == shape for step in episode)

    policies = torch.stack([step.policy.flatten() for step in episode[:2]])
    loss = training(
        torch.stack([episode[0].observation, episode[1].observation])[None],
        policies[None],
        torch.tensor([[step.action for step in episode[:2]]]),
        torch.zeros(1, 2),
        *functions,
    )
    assert seen[-1] == (1, 2, *shape) and np.isfinite(loss)


@pytest.mark.parametrize("first_player", [0, 1])
def test_two_players_of_nim_by_hand(first_player):
    """From 4, leave 3; whatever the other does, take the last. The winner's view alternates, whoever begins."""
    env = Nim(4, first_player)
    steps = acting(
        env, *nim_functions(), discount=1.0, temperature=0, noise=False, rng=np.random.default_rng(0)
    )
    assert [steps[0].action, len(steps), steps[-1].reward] == [0, 3, 1]
    assert [np.sign(step.value) for step in steps] == [1, -1, 1]
    to_play = np.array([0, 1, 0, 1]) ^ first_player
    rewards = np.array([step.reward for step in steps])
    assert n_step_returns(rewards, np.zeros(4), 1.0, 9, to_play).tolist() == [1, -1, 1, 0]


def test_nothing_but_the_three_functions_learns_which_action_pays():
    """One step; action 1 of 2 pays 1. acting and training in turn find it from a random start."""

    class OneStep(Script):
        def step(self, action):
            return (float(action == 1), *super().step(action)[1:])

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    reward = torch.nn.Linear(3, 1)
    value = torch.nn.Linear(1, 1)
    policy = torch.nn.Linear(1, 2)
    functions = (
        lambda o: o.flatten(1),
        lambda s, a: reward(torch.cat([s, torch.nn.functional.one_hot(a, 2)], 1)),
        lambda s, a: s * 0,
        value,
        policy,
    )
    optimizer = torch.optim.Adam([*reward.parameters(), *value.parameters(), *policy.parameters()], lr=0.03)
    for _ in range(150):
        (step,) = acting(OneStep(1), *functions, rng=rng)
        training(
            step.observation[None, None],
            torch.stack([step.policy, torch.zeros(2)])[None],
            torch.tensor([[step.action, 0]]),
            torch.tensor([[step.reward, 0.0]]),
            *functions,
            optimizer=optimizer,
        )
    estimate, weights = planning(*functions, torch.ones(1, 1), torch.ones(2))
    assert weights[1] > 0.7 and estimate > 0.5
