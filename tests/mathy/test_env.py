"""MathyEnv: mathy's rules over states that are never changed."""

from __future__ import annotations

import random

import mathy_envs
import numpy as np
import pytest
from mathy_envs.time_step import is_terminal_transition

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.registry import make_environment
from distributed_muzero.errors import ContractError
from distributed_muzero.mathy.env import KEPT
from distributed_muzero.mathy.envs import TOPICS, PolyHaystackLikeTerms, PolySimplify
from distributed_muzero.mathy.state import MathyEnvState


def valid(env, state):
    return np.flatnonzero(env.get_valid_moves(state)).tolist()


def of(problem, env, max_moves=20):
    return MathyEnvState(
        problem=problem, max_moves=max_moves, num_rules=env.action_size, problem_type=env.get_env_namespace()
    )


@pytest.mark.parametrize("topic", TOPICS)
def test_a_game_earns_what_the_projects_environment_says(topic):
    env, other = TOPICS[topic](max_nodes=64), make_environment(EnvironmentConfig(id=f"mathy:{topic}-easy"))
    for seed in range(3):
        other.initial_state(seed)
        state, problem = env.get_initial_state(seed=seed)
        assert problem.text == state.agent.problem == other.expression
        rng = np.random.default_rng(seed)
        is_over = False
        while not is_over:
            assert valid(env, state) == np.flatnonzero(other.mask()).tolist()
            action = int(rng.choice(valid(env, state)))
            state, step, _ = env.get_next_state(state, action)
            reward, _, is_over = other.step(action)
            assert reward == step.reward == state.agent.reward
            assert is_over == is_terminal_transition(step) == env.is_terminal_state(state)
            assert step.observation == env.state_to_observation(state)


def test_a_seed_makes_one_problem_and_leaves_the_generators_alone():
    before = random.getstate()
    first, second = (PolySimplify().get_initial_state(seed=3)[1] for _ in range(2))
    assert first == second and random.getstate() == before


def test_difficulties_differ():
    hard = mathy_envs.MathyEnvProblemArgs(mathy_envs.MathyEnvDifficulty.hard)
    env = PolySimplify()
    lengths = [
        np.mean([len(env.get_initial_state(params, seed)[1].text) for seed in range(20)])
        for params in (None, hard)
    ]
    assert lengths[0] < lengths[1]


def test_an_action_is_node_times_rules_plus_rule():
    env = PolySimplify()
    state = of("4x + 2x", env)
    names = {(env.rules[rule].name, node) for rule, node in map(env.get_action_indices, valid(env, state))}
    assert ("Distributive Factoring", 3) in names  # 4 · x + 2 · x: node 3 is the +
    rules = [rule.name for rule in env.rules]
    action = 3 * env.action_size + rules.index("Distributive Factoring")
    after, _, change = env.get_next_state(state, action)
    assert after.agent.problem == "(4 + 2) * x" == str(change.result.get_root())
    assert (after.agent.focus_index, after.agent.last_action) == (3, action)
    assert state.agent.problem == "4x + 2x" and len(state.agent.history) == 1


@pytest.mark.parametrize("action", [0, 10_000, -1])
def test_an_action_that_is_not_valid_is_refused(action):
    env = PolySimplify()
    with pytest.raises(ContractError, match="can't be applied to '4x \\+ 2x' with 7 nodes"):
        env.get_next_state(of("4x + 2x", env), action)


def test_an_expression_that_grows_too_long_loses():
    env = PolySimplify(max_nodes=7)
    state = of("(4 + 2) * x", env)
    multiply = next(
        action
        for action in valid(env, state)
        if env.rules[env.get_action_indices(action)[0]].name == "Distributive Multiply"
    )
    after, step, _ = env.get_next_state(state, multiply)
    assert not is_terminal_transition(step)
    env = PolySimplify(max_nodes=6)
    _, step, _ = env.get_next_state(state, multiply)
    assert is_terminal_transition(step) and step.reward == -1
    assert after.agent.problem == "4x + 2x"


def test_a_haystack_can_be_won():
    env = PolyHaystackLikeTerms()
    state, _ = env.get_initial_state(seed=0)
    steps = [env.get_next_state(state, action)[1] for action in valid(env, state)]
    assert any(is_terminal_transition(step) and step.reward > 0 for step in steps)


def test_a_search_from_one_state_keeps_few_expressions():
    env = PolySimplify()
    start, _ = env.get_initial_state(seed=0)
    found, states = set(), [start]
    while len(found) < 3 * KEPT:
        state = states.pop(0)
        for action in valid(env, state):
            after, step, _ = env.get_next_state(state, action)
            found.add(after.agent.problem)
            if not is_terminal_transition(step):
                states.append(after)
            assert len(env.game.parser._parse_cache) <= KEPT


def test_recurrent_states_of_an_observation_are_zeros_unless_given():
    env = PolySimplify()
    state, _ = env.get_initial_state(seed=0)
    assert env.state_to_observation(state).rnn_state_h == [0.0] * 128
    given = env.state_to_observation(state, 2, rnn_state_h=[1.0, 2.0])
    assert (given.rnn_state_h, given.rnn_state_c, given.rnn_history_h) == ([1.0, 2.0], [0.0] * 2, [0.0] * 2)
