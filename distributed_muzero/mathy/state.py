"""A mathy problem in the middle of an episode, and what a policy/value model sees of it.

Nodes stand in order, as one reads the expression ("4x + 2" is 4 · x + 2), and so does the mask: what rule r does to
node i is the action i · num_rules + r.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from mathy_core.expressions import ConstantExpression, MathExpression, MathTypeKeys
from mathy_core.parser import ExpressionParser
from torch import Tensor

from distributed_muzero.environments.mathy_tokens import in_order
from distributed_muzero.errors import ContractError

RNN_SIZE = 128  # of an observation's recurrent states, unless a model asks for others
NO_NODE = int(MathTypeKeys["empty"])  # the node type where no node is
CONSTANT = int(MathTypeKeys["constant"])
NUM_NODE_TYPES = max(MathTypeKeys.values()) + 1
HASH_LIMIT = 2**24  # whole numbers below it are exact in float32

MathyInputs = list[Tensor]  # a tensor for each of ObservationFeatureIndices, in their order


class ObservationFeatureIndices(IntEnum):
    """Where a feature stands in an observation, a window and a model's inputs."""

    nodes = 0
    mask = 1
    values = 2
    type = 3
    time = 4
    rnn_state_h = 5
    rnn_state_c = 6
    rnn_history_h = 7


class MathyObservation(NamedTuple):
    """What a model sees of one state with n nodes."""

    nodes: list[int]  # [n] types of the nodes, in order; 0 = no node
    mask: list[int]  # [n · num_rules] 1 = this rule can be applied to this node
    values: list[float]  # [n] of the constants; 0.0 at all other nodes
    type: list[int]  # [2] hash of the problem's type
    time: list[float]  # [1] share of the allowed moves that are made, 0.0 to 1.0
    rnn_state_h: list[float]  # [D] the recurrent state before this observation
    rnn_state_c: list[float]  # [D]
    rnn_history_h: list[float]  # [D] mean of the episode's earlier rnn_state_h


class MathyWindowObservation(NamedTuple):
    """A sequence of n observations, each padded to the longest: L nodes."""

    nodes: list[list[int]]  # [n, L]
    mask: list[list[int]]  # [n, L · num_rules]
    values: list[list[float]]  # [n, L]
    type: list[list[int]]  # [n, 2]
    time: list[list[float]]  # [n, 1]
    rnn_state_h: list[list[float]]  # [n, D]
    rnn_state_c: list[list[float]]  # [n, D]
    rnn_history_h: list[list[float]]  # [n, D]

    def to_inputs(self) -> MathyInputs:
        """For a model: nodes and type as int64, all else as float32."""
        whole = (ObservationFeatureIndices.nodes, ObservationFeatureIndices.type)
        return [
            torch.from_numpy(np.array(rows, np.int64 if index in whole else np.float32))
            for index, rows in enumerate(self)
        ]


class MathyEnvStateStep(NamedTuple):
    """An earlier timestep in short, so that what follows can be told by its history."""

    raw: str  # the text that the action led to
    focus: int  # the node that was acted on; -1 in the beginning
    action: int  # -1 in the beginning


class MathyAgentState:
    """What changes from one state of an episode to the next."""

    def __init__(
        self,
        moves_remaining: int,
        problem: str,
        problem_type: str,
        reward: float = 0.0,
        history: list[MathyEnvStateStep] | None = None,
        focus_index: int = 0,
        last_action: int | None = None,
    ):
        self.moves_remaining = moves_remaining
        self.problem = problem
        self.problem_type = problem_type
        self.reward = reward
        # The first state counts among those that may be visited again.
        self.history = [MathyEnvStateStep(problem, -1, -1)] if history is None else history[:]
        self.focus_index = focus_index
        self.last_action = last_action

    @classmethod
    def copy(cls, from_state: MathyAgentState) -> MathyAgentState:
        return cls(**vars(from_state))


class MathyEnvState:
    """A state of an environment, and its features for a model. Mutating operations return a copy."""

    def __init__(
        self,
        state: MathyEnvState | None = None,
        problem: str | None = None,
        max_moves: int = 10,
        num_rules: int = 0,
        problem_type: str = "mathy.unknown",
    ):
        """Of a new `problem`, or a copy of `state`. Raises ContractError for none or both."""
        if (state is None) == (problem is None):
            raise ContractError(
                "a MathyEnvState is made of a problem's text or of another state; give one of both"
            )
        self.max_moves: int
        self.num_rules: int
        self.agent: MathyAgentState
        if state is not None:
            self.max_moves, self.num_rules = state.max_moves, state.num_rules
            self.agent = MathyAgentState.copy(state.agent)
        elif problem is not None:
            self.max_moves, self.num_rules = max_moves, num_rules
            self.agent = MathyAgentState(max_moves, problem, problem_type)

    @classmethod
    def copy(cls, from_state: MathyEnvState) -> MathyEnvState:
        return cls(state=from_state)

    def clone(self) -> MathyEnvState:
        return MathyEnvState(state=self)

    def get_out_state(
        self, problem: str, action: int, focus_index: int, moves_remaining: int
    ) -> MathyEnvState:
        """The next state, after an action at the node `focus_index` that led to `problem`."""
        out_state = self.clone()
        agent = out_state.agent
        agent.history.append(MathyEnvStateStep(problem, focus_index, action))
        agent.problem = problem
        agent.focus_index = focus_index
        agent.last_action = action
        agent.moves_remaining = moves_remaining
        return out_state

    def get_problem_hash(self) -> list[int]:
        """Two signed whole numbers that stand for the type of problem, the same in every process."""
        return list(_hash_of(self.agent.problem_type))

    def to_start_observation(
        self, rnn_state_h: Sequence[float], rnn_state_c: Sequence[float]
    ) -> MathyObservation:
        """What stands before an episode's first state: one empty node, at which nothing can be done.

        Raises ContractError for recurrent states of different sizes.
        """
        return MathyObservation(
            nodes=[NO_NODE],
            mask=[0] * self.num_rules,
            values=[0.0],
            type=self.get_problem_hash(),
            time=[0.0],
            **_recurrent(rnn_state_h, rnn_state_c, None),
        )

    def to_observation(
        self,
        move_mask: Sequence[int],
        parser: ExpressionParser,
        rnn_state_h: Sequence[float],
        rnn_state_c: Sequence[float],
        rnn_history_h: Sequence[float] | None = None,
    ) -> MathyObservation:
        """move_mask: [n · num_rules].   rnn_history_h: zeros without it.

        Raises ContractError for another number of nodes than the mask's, or recurrent states of different sizes.
        """
        nodes, _ = in_order(parser.parse(self.agent.problem))
        if len(move_mask) != len(nodes) * self.num_rules:
            raise ContractError(
                f"a mask of {len(move_mask)} actions came for {len(nodes)} nodes × {self.num_rules} rules; make it "
                "for this state"
            )
        passed = (self.max_moves - self.agent.moves_remaining) / max(self.max_moves, 1)
        return MathyObservation(
            nodes=[int(node.type_id) for node in nodes],
            mask=list(move_mask),
            values=[_value_of(node) for node in nodes],
            type=self.get_problem_hash(),
            time=[min(max(passed, 0.0), 1.0)],
            **_recurrent(rnn_state_h, rnn_state_c, rnn_history_h),
        )


def rnn_placeholder_state(rnn_size: int = RNN_SIZE) -> list[float]:
    """[rnn_size] zeros: a recurrent state where there is none yet."""
    return [0.0] * rnn_size


def observations_to_window(observations: Sequence[MathyObservation]) -> MathyWindowObservation:
    """A sequence of n observations as one; shorter ones are padded with zeros behind their nodes.

    Raises ContractError for none at all, one without nodes, masks that don't fit their nodes, and recurrent states of
    different sizes.
    """
    if not observations:
        raise ContractError("no observations came; a window needs one at least")
    for number, observation in enumerate(observations):
        if not observation.nodes or len(observation.mask) % len(observation.nodes):
            raise ContractError(
                f"observation {number} has {len(observation.nodes)} nodes and a mask of {len(observation.mask)} "
                "actions; expected a node at least, and as many actions for each"
            )
    num_rules = {len(observation.mask) // len(observation.nodes) for observation in observations}
    rnn_sizes = {len(state) for observation in observations for state in observation[-3:]}
    if len(num_rules) > 1 or len(rnn_sizes) > 1:
        raise ContractError(
            f"the observations have {sorted(num_rules)} actions a node and recurrent states of sizes "
            f"{sorted(rnn_sizes)}; those of a window must agree"
        )
    longest = max(len(observation.nodes) for observation in observations)
    longest_mask = max(len(observation.mask) for observation in observations)
    return MathyWindowObservation(
        nodes=[_padded(o.nodes, longest, NO_NODE) for o in observations],
        mask=[_padded(o.mask, longest_mask, 0) for o in observations],
        values=[_padded(o.values, longest, 0.0) for o in observations],
        type=[list(o.type) for o in observations],
        time=[list(o.time) for o in observations],
        rnn_state_h=[list(o.rnn_state_h) for o in observations],
        rnn_state_c=[list(o.rnn_state_c) for o in observations],
        rnn_history_h=[list(o.rnn_history_h) for o in observations],
    )


def _padded(values: Sequence, size: int, padding: float) -> list:
    return [*values, *[padding] * (size - len(values))]


def _value_of(node: MathExpression) -> float:
    return float(node.value or 0) if isinstance(node, ConstantExpression) else 0.0


def _recurrent(
    state_h: Sequence[float], state_c: Sequence[float], history_h: Sequence[float] | None
) -> dict[str, list[float]]:
    """The recurrent features by name, zeros for a history that is None. Raises ContractError for different sizes."""
    history_h = rnn_placeholder_state(len(state_h)) if history_h is None else history_h
    if not len(state_h) == len(state_c) == len(history_h):
        raise ContractError(
            f"recurrent states of sizes {len(state_h)}, {len(state_c)} and {len(history_h)} came; they must agree"
        )
    return {
        "rnn_state_h": list(state_h), "rnn_state_c": list(state_c), "rnn_history_h": list(history_h)
    }  # fmt: skip


@lru_cache(maxsize=1024)
def _hash_of(problem_type: str) -> tuple[int, int]:
    """Python's own hash differs from process to process; this one is saved with models that learnt it."""
    digest = hashlib.blake2b(problem_type.encode(), digest_size=8).digest()
    first, second = (int.from_bytes(part, "big", signed=True) for part in (digest[:4], digest[4:]))
    return first % (2 * HASH_LIMIT) - HASH_LIMIT, second % (2 * HASH_LIMIT) - HASH_LIMIT
