"""A mathy environment as a function from states to states: `get_next_state` changes nothing but what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mathy_envs
import numpy as np
from mathy_core.expressions import MathExpression
from mathy_core.parser import ExpressionParser
from mathy_core.rule import BaseRule, ExpressionChangeRule
from mathy_envs.time_step import TimeStep, is_terminal_transition, termination, transition

from distributed_muzero.environments.mathy_moves import Moves, Tree
from distributed_muzero.environments.mathy_problems import draw_problem
from distributed_muzero.environments.mathy_rewards import judge
from distributed_muzero.environments.mathy_tokens import in_order
from distributed_muzero.errors import ContractError, EnvironmentFailure, first_line
from distributed_muzero.mathy.state import RNN_SIZE, MathyEnvState, MathyObservation, rnn_placeholder_state

KEPT = 32  # expressions that were read, at most: an episode's next step begins with the last one's


class MathyEnv:
    """The rules of a game of mathy_envs, over the states of this package.

    Actions are node · action_size + rule, and nodes stand in order.
    """

    def __init__(self, game: mathy_envs.MathyEnv, max_nodes: int = 128):
        """max_nodes: a move that would make more nodes loses the game."""
        self.game = game
        self.max_nodes = max_nodes
        self._moves = Moves(game.rules)
        self._num_read = 0

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
        """A new problem. params: its difficulty, else easy.

        The same seed makes the same problem, that of `initial_state(seed)` in the environment `mathy:…` with as many
        max_nodes. Raises EnvironmentFailure if no problem is short enough.
        """
        params = mathy_envs.MathyEnvProblemArgs() if params is None else params
        problem = draw_problem(self.game, params, seed, constants=False, fits=self._fits)
        state = MathyEnvState(
            problem=problem.text,
            max_moves=self.game.max_moves_fn(problem, params),
            num_rules=self.action_size,
            problem_type=self.get_env_namespace(),
        )
        return state, problem

    def get_valid_moves(self, state: MathyEnvState) -> list[int]:
        """[n · action_size] 1 = this rule can be applied to this node."""
        nodes = self._nodes(state.agent.problem)
        mask = [0] * (len(nodes) * self.action_size)
        for node, rule in self._moves.of(nodes):
            mask[node * self.action_size + rule] = 1
        return mask

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
            self._parser(),
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
        nodes = self._nodes(state.agent.problem)
        if not 0 <= focus < len(nodes) or not self.rules[rule].can_apply_to(nodes[focus]):
            raise ContractError(
                f"action {action} ({self.rules[rule].name} at node {focus}) can't be applied to "
                f"{state.agent.problem!r} with {len(nodes)} nodes; take one that the mask allows"
            )
        change = self._apply(rule, nodes[focus])
        out_state = state.get_out_state(
            problem=str(change.result.get_root()),
            action=int(action),
            focus_index=focus,
            moves_remaining=state.agent.moves_remaining - 1,
        )
        step = self.get_state_transition(out_state)
        out_state.agent.reward = float(step.reward)
        return out_state, step, change

    def get_state_transition(self, state: MathyEnvState) -> TimeStep:
        """Reward and end of the step that led to a state, with its observation.

        Mathy's own; and an expression that is too long, or to which no rule applies, loses.
        """
        observation: Any = self.state_to_observation(state)  # mathy_envs' own are arrays
        theirs = self._theirs(state)
        if len(observation.nodes) > self.max_nodes:
            return termination(observation, self.game.get_lose_signal(theirs))
        root = self._parser().parse(state.agent.problem)
        visits = sum(step.raw == str(root) for step in state.agent.history)
        reward, end = judge(self.game, theirs, root, visits)
        if end is not None:
            return termination(observation, reward)
        if not any(observation.mask):
            return termination(observation, self.game.get_lose_signal(theirs))
        return transition(observation, reward, self.game.discount)

    def is_terminal_state(self, state: MathyEnvState) -> bool:
        return is_terminal_transition(self.get_state_transition(state))

    def _nodes(self, problem: str) -> Tree:
        return in_order(self._parser().parse(problem))[0]

    def _parser(self) -> ExpressionParser:
        """The game's, to read one expression with. It keeps what it reads without end, unless it is cleared."""
        self._num_read += 1
        if self._num_read % KEPT == 0:
            self.game.parser.clear_cache()
        return self.game.parser

    def _fits(self, problem: str) -> bool:
        nodes = self._nodes(problem)
        return len(nodes) <= self.max_nodes and bool(self._moves.of(nodes))

    def _apply(self, rule: int, node: MathExpression) -> Any:
        """A rule at a node of a copy: mathy changes the tree that it is given, and the parser keeps this one."""
        try:
            with np.errstate(all="ignore"):  # mathy sets numpy's, and leaves it at that
                return self.rules[rule].apply_to(node.clone_from_root())
        except Exception as error:
            raise EnvironmentFailure(
                f"mathy fails at {self.rules[rule].name} of {node} in {node.get_root()}: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error

    def _theirs(self, state: MathyEnvState) -> mathy_envs.MathyEnvState:
        """A state as the game knows it, whose actions are (rule, node)."""
        theirs = mathy_envs.MathyEnvState(
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
