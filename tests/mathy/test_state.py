"""States, observations and windows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from mathy_core.expressions import MathTypeKeys
from mathy_core.parser import ExpressionParser

from distributed_muzero.errors import ContractError
from distributed_muzero.mathy.state import (
    MathyAgentState,
    MathyEnvState,
    MathyEnvStateStep,
    MathyObservation,
    ObservationFeatureIndices,
    observations_to_window,
    rnn_placeholder_state,
)

PRINT_HASH = """
from distributed_muzero.mathy.state import MathyEnvState
print(MathyEnvState(problem="x", problem_type="a.b").get_problem_hash())
"""


def observe(problem, num_rules=2, rnn_size=3):
    state = MathyEnvState(problem=problem, num_rules=num_rules)
    num_nodes = len(ExpressionParser().parse(problem).to_list())
    states = [0.5] * rnn_size
    return state.to_observation([1] * (num_nodes * num_rules), ExpressionParser(), states, states)


def test_a_state_is_made_of_a_problem_or_of_a_state():
    with pytest.raises(ContractError, match="give one of both"):
        MathyEnvState()
    with pytest.raises(ContractError, match="give one of both"):
        MathyEnvState(state=MathyEnvState(problem="x"), problem="x")


def test_the_agents_state_has_the_documents_fields():
    agent = MathyAgentState(5, "4x + 2x", "mathy.poly")
    assert vars(agent) == {
        "moves_remaining": 5, "problem": "4x + 2x", "problem_type": "mathy.poly", "reward": 0.0,
        "history": [MathyEnvStateStep(raw="4x + 2x", focus=-1, action=-1)], "focus_index": 0, "last_action": None,
    }  # fmt: skip


def test_the_next_state_is_a_copy():
    state = MathyEnvState(problem="4x + 2x", max_moves=7, num_rules=3, problem_type="mathy.poly")
    after = state.get_out_state(problem="6x", action=10, focus_index=3, moves_remaining=6)
    assert (state.agent.problem, state.agent.moves_remaining, len(state.agent.history)) == ("4x + 2x", 7, 1)
    assert (state.agent.last_action, state.agent.focus_index) == (None, 0)
    assert after.agent.history[1:] == [MathyEnvStateStep(raw="6x", focus=3, action=10)]
    assert (after.agent.problem, after.agent.last_action, after.agent.focus_index) == ("6x", 10, 3)
    assert (after.agent.moves_remaining, after.max_moves, after.num_rules) == (6, 7, 3)
    assert after.agent.problem_type == "mathy.poly"


def test_a_clone_shares_no_history():
    state = MathyEnvState(problem="4x")
    state.clone().agent.history.append(MathyEnvStateStep("x", 0, 0))
    MathyEnvState.copy(state).agent.problem = "5x"
    assert len(state.agent.history) == 1 and state.agent.problem == "4x"


def test_a_problem_type_has_two_hashes_that_float32_holds():
    state = MathyEnvState(problem="x", problem_type="mycorp.envs.solve_impossible_problems")
    first, second = state.get_problem_hash()
    assert isinstance(first, int) and isinstance(second, int) and first != second
    assert [int(part) for part in torch.tensor([first, second], dtype=torch.float32)] == [first, second]
    assert MathyEnvState(problem="x", problem_type="mycorp.envs.other").get_problem_hash() != [first, second]


def test_a_hash_is_the_same_in_another_process():
    done = subprocess.run([sys.executable, "-c", PRINT_HASH], capture_output=True, text=True, check=True)
    here = MathyEnvState(problem="x", problem_type="a.b").get_problem_hash()
    assert done.stdout.strip() == str(here)


def test_a_hash_can_be_changed_by_its_owner_alone():
    state = MathyEnvState(problem="x")
    state.get_problem_hash().append(1)
    assert len(state.get_problem_hash()) == 2


def test_an_observation_lists_the_nodes_in_order():
    observation = observe("4x + 2")
    names = ["constant", "multiply", "variable_x", "add", "constant"]
    assert observation.nodes == [MathTypeKeys[name] for name in names]
    assert observation.values == [4.0, 0.0, 0.0, 0.0, 2.0]
    assert len(observation.mask) == 5 * 2


def test_time_goes_from_0_to_1():
    state = MathyEnvState(problem="4x", max_moves=4, num_rules=1)
    times = []
    for remaining in (4, 3, 0, -1):
        after = state.get_out_state("4x", 0, 0, remaining)
        times += after.to_observation([0] * 3, ExpressionParser(), [], []).time
    assert times == [0.0, 0.25, 1.0, 1.0]


def test_a_mask_of_another_state_is_refused():
    with pytest.raises(ContractError, match="a mask of 4 actions came for 3 nodes × 2 rules"):
        MathyEnvState(problem="4x", num_rules=2).to_observation([1] * 4, ExpressionParser(), [], [])


def test_recurrent_states_of_different_sizes_are_refused():
    with pytest.raises(ContractError, match="sizes 2, 3 and 2"):
        MathyEnvState(problem="4x").to_start_observation([0.0] * 2, [0.0] * 3)


def test_an_episode_begins_with_an_empty_node():
    state = MathyEnvState(problem="4x", num_rules=3, problem_type="a.b")
    start = state.to_start_observation([1.0, 2.0], [3.0, 4.0])
    assert start == MathyObservation(
        nodes=[0], mask=[0, 0, 0], values=[0.0], type=state.get_problem_hash(), time=[0.0],
        rnn_state_h=[1.0, 2.0], rnn_state_c=[3.0, 4.0], rnn_history_h=[0.0, 0.0],
    )  # fmt: skip


def test_a_window_is_padded_to_its_longest():
    window = observations_to_window([observe("4x + 2"), observe("4x")])
    assert [len(row) for row in window.nodes] == [5, 5]
    assert window.nodes[1][3:] == [0, 0] and window.values[1][3:] == [0.0, 0.0]
    assert window.mask[1] == [1] * 6 + [0] * 4
    shapes = [tuple(tensor.shape) for tensor in window.to_inputs()]
    assert shapes == [(2, 5), (2, 10), (2, 5), (2, 2), (2, 1), (2, 3), (2, 3), (2, 3)]


def test_features_stand_where_their_index_says():
    inputs = observations_to_window([observe("4x")]).to_inputs()
    assert [index.name for index in ObservationFeatureIndices] == list(MathyObservation._fields)
    assert inputs[ObservationFeatureIndices.nodes].dtype == torch.int64
    assert inputs[ObservationFeatureIndices.rnn_state_h].tolist() == [[0.5] * 3]
    assert inputs[ObservationFeatureIndices.rnn_history_h].tolist() == [[0.0] * 3]


@pytest.mark.parametrize(
    ("observations", "message"),
    [
        ([], "no observations came"),
        ([observe("x", num_rules=2), observe("x", num_rules=3)], r"\[2, 3\] actions a node"),
        ([observe("4x")._replace(mask=[1] * 7)], "observation 0 has 3 nodes and a mask of 7 actions"),
        ([observe("x"), observe("x")._replace(nodes=[], mask=[])], "observation 1 has 0 nodes"),
        ([observe("x", rnn_size=2), observe("x", rnn_size=3)], r"sizes \[2, 3\]"),
    ],
)
def test_windows_that_cannot_be_made_are_refused(observations, message):
    with pytest.raises(ContractError, match=message):
        observations_to_window(observations)


def test_a_placeholder_is_zeros():
    assert rnn_placeholder_state(3) == [0.0] * 3
    assert len(rnn_placeholder_state()) == 128
