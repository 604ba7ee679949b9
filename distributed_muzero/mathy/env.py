"""A mathy environment as a function from states to states: `get_next_state` changes nothing but what it returns."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mathy_envs
import numpy as np
from mathy_core.rule import BaseRule, ExpressionChangeRule
from mathy_envs.time_step import TimeStep, is_terminal_transition, termination

from distributed_muzero.errors import ContractError, EnvironmentFailure
from distributed_muzero.mathy.state import (
    RNN_SIZE,
    MathyEnvState,
    MathyObservation,
    nodes_in_order,
    rnn_placeholder_state,
)


class MathyEnv:
    """The rules of a game of mathy_envs, over the states of this package.

    Actions are node · action_size + rule, and nodes stand in order.
    """

    def __init__(self, game: mathy_envs.MathyEnv, max_nodes: int = 128):
        """max_nodes: a move that would make more nodes loses the game."""
        self.game = game
        self.max_nodes = max_nodes

    @property
    def action_size(self) -> int:
        """What can be done to each node: the number of rules."""
        return len(self.game.rules)

    @property
    def rules(self) -> list[BaseRule]:
        return self.game.rules

    def get_env_namespace(self) -> str:
        """The type of problem, e.g. mathy.polynomials.simplify."""
        return self.game.get_env_namespace()

    def get_initial_state(
        self, params: mathy_envs.MathyEnvProblemArgs | None = None, seed: int | None = None
    ) -> tuple[MathyEnvState, mathy_envs.MathyEnvProblem]:
        """A new problem. params: its difficulty, else easy.   The same seed makes the same problem.

        Raises EnvironmentFailure if it has more than max_nodes nodes.
        """
        with seeded(seed):
            state, problem = self.game.get_initial_state(params, print_problem=False)
        num_nodes = self._num_nodes(problem.text)
        if num_nodes > self.max_nodes:
            raise EnvironmentFailure(
                f"{problem.text!r} has {num_nodes} nodes, max_nodes is {self.max_nodes}; raise it, or choose easier "
                "problems"
            )
        start = MathyEnvState(
            problem=problem.text,
            max_moves=state.max_moves,
            num_rules=self.action_size,
            problem_type=self.get_env_namespace(),
        )
        return start, problem

    def get_valid_moves(self, state: MathyEnvState) -> list[int]:
        """[n · action_size] 1 = this rule can be applied to this node."""
        by_rule = np.array(self.game.get_actions_for_node(self.game.parser.parse(state.agent.problem)))
        return by_rule.T.ravel().tolist()

    def state_to_observation(
        self,
        state: MathyEnvState,
        rnn_size: int = RNN_SIZE,
        rnn_state_h: Sequence[float] | None = None,
        rnn_state_c: Sequence[float] | None = None,
        rnn_history_h: Sequence[float] | None = None,
    ) -> MathyObservation:
        """What a model sees of a state. Recurrent states that aren't given are zeros of size `rnn_size`."""
        empty = rnn_placeholder_state(rnn_size)
        return state.to_observation(
            self.get_valid_moves(state),
            self.game.parser,
            empty if rnn_state_h is None else rnn_state_h,
            empty if rnn_state_c is None else rnn_state_c,
            empty if rnn_history_h is None else rnn_history_h,
        )

    def get_action_indices(self, action: int) -> tuple[int, int]:
        """(rule, node) of an action."""
        node, rule = divmod(int(action), self.action_size)
        return rule, node

    def get_next_state(
        self, state: MathyEnvState, action: int
    ) -> tuple[MathyEnvState, TimeStep, ExpressionChangeRule]:
        """The state that an action leads to, the transition to it (with its observation), and what was changed.

        Raises ContractError for an action that isn't valid in this state.
        """
        rule, focus = self.get_action_indices(action)
        token = self.game.get_token_at_index(self.game.parser.parse(state.agent.problem), focus)
        num_nodes = self._num_nodes(state.agent.problem)
        if not 0 <= focus < num_nodes or token is None or not self.rules[rule].can_apply_to(token):
            raise ContractError(
                f"action {action} ({self.rules[rule].name} at node {focus}) can't be applied to "
                f"{state.agent.problem!r} with {num_nodes} nodes; take one that the mask allows"
            )
        change = self.rules[rule].apply_to(token.clone_from_root())
        if change.result is None:
            raise EnvironmentFailure(f"{self.rules[rule].name} made nothing of {state.agent.problem!r}")
        out_state = state.get_out_state(
            problem=str(change.result.get_root()),
            action=int(action),
            focus_index=focus,
            moves_remaining=state.agent.moves_remaining - 1,
        )
        transition = self.get_state_transition(out_state)
        out_state.agent.reward = float(transition.reward)
        return out_state, transition, change

    def get_state_transition(self, state: MathyEnvState) -> TimeStep:
        """Reward and end of the step that led to a state, with its observation."""
        observation: Any = self.state_to_observation(state)  # theirs is an array
        if len(observation.nodes) > self.max_nodes:
            return termination(observation, self.game.get_lose_signal(self._theirs(state)))
        return self.game.get_state_transition(self._theirs(state))._replace(observation=observation)

    def is_terminal_state(self, state: MathyEnvState) -> bool:
        return is_terminal_transition(self.get_state_transition(state))

    def _num_nodes(self, problem: str) -> int:
        return len(nodes_in_order(self.game.parser.parse(problem)))

    def _theirs(self, state: MathyEnvState) -> mathy_envs.MathyEnvState:
        """A state as the game knows it, whose actions are (rule, node)."""
        theirs = _Unobserved(
            problem=state.agent.problem,
            max_moves=state.max_moves,
            num_rules=state.num_rules,
            problem_type=state.agent.problem_type,
        )
        theirs.agent.moves_remaining = state.agent.moves_remaining
        theirs.agent.history = [
            mathy_envs.MathyEnvStateStep(
                step.raw, (-1, -1) if step.action < 0 else self.get_action_indices(step.action)
            )
            for step in state.agent.history
        ]
        return theirs


class _Unobserved(mathy_envs.MathyEnvState):
    """Rewards don't need the observation, which is slow to make and holds 128 nodes at most."""

    def to_observation(self, *args: Any, **kwargs: Any) -> Any:
        return None


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """mathy draws from `random` and `np.random`: both begin at `seed`, and go on afterwards where they were.

    None: nothing is changed.
    """
    if seed is None:
        yield
        return
    before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)  # noqa: NPY002
