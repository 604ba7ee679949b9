"""Mathy's environments, behind the `Environment` protocol: `mathy:poly-easy` and 23 others.

An expression such as 4x + 2x + 7 is rewritten by rules of algebra, each applied to one of its nodes, until nothing is
left to simplify (or what else the topic asks for).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from mathy_core import expressions as ex
from mathy_core.parser import ExpressionParser
from mathy_core.util import get_term_ex, get_terms
from mathy_envs.env import MathyEnv
from mathy_envs.state import MathyEnvState, MathyEnvStateStep
from mathy_envs.types import MathyEnvProblem, MathyEnvProblemArgs

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.environments.mathy_games import (
    Options,
    make_rules,
    read_name,
    read_options,
    trainable_games,
)
from distributed_muzero.environments.mathy_moves import Moves, Tree
from distributed_muzero.environments.mathy_problems import draw_problem
from distributed_muzero.environments.mathy_rewards import MAX_VISITS, judge
from distributed_muzero.environments.mathy_tokens import (
    OF_THE_GAME,
    OF_TOKENS,
    columns_of,
    describe_game,
    describe_nodes,
    in_order,
)
from distributed_muzero.environments.mathy_values import check_readable, keeping_value
from distributed_muzero.environments.mathy_writing import changed_part, written
from distributed_muzero.errors import EnvironmentFailure, first_line

__all__ = ["MathyEnvironment", "make", "trainable_games"]


class MathyEnvironment:
    """One topic in one difficulty: rewrite an expression until the topic's aim is reached.

    Observation [max_nodes, C]: a row for each node of the expression in order, columns as in mathy_tokens.
    Actions (max_nodes, R): the rule r at the token t is t · R + r; rules in the order of mathy's own list.

    Rewards, aims and limits are mathy's own: more than 1 for reaching the aim, and the more the sooner; -1 for running
    out of moves, or for a fourth visit to one expression; ±0.01 for a move, less for coming back. Two endings are
    added, both losses: an expression of more than max_nodes nodes, and one to which no rule applies.
    """

    def __init__(
        self,
        id: str,
        mathy: MathyEnv,
        arguments: MathyEnvProblemArgs,
        options: Options,
        max_episode_steps: int,
    ):
        self._mathy, self._arguments, self._options = mathy, arguments, options
        self._max_episode_steps = max_episode_steps
        self._moves = Moves(mathy.rules)
        self._parser = ExpressionParser()
        columns = columns_of(mathy.rules)
        self.spec = EnvironmentSpec(
            id=id,
            observation_shape=(options.max_nodes, len(columns)),
            observation_dtype=np.dtype(np.float32),
            action_shape=(options.max_nodes, len(mathy.rules)),
            token_columns=columns,
        )
        self._problem = None if options.problem is None else self._read_problem(options.problem)
        self._state: Any = None  # a MathyEnvState
        self._counts: Counter[str] = Counter()  # how often each text came up
        # of each expression of this game, its legal moves (token, rule) and what they lead to; None: mathy fails there
        self._results: dict[str, dict[tuple[int, int], str | None]] = {}
        self._visits = 0
        self._nodes: Tree = []
        self._mask = np.zeros(self.spec.action_shape, bool)
        self._rows = np.zeros(self.spec.observation_shape, np.float32)
        self._num_steps = 0
        self._truncated = False
        self.end: str | None = None  # why it is over: won, moves, visits, nodes or stuck

    def initial_state(self, seed: int | None = None) -> np.ndarray:
        problem = self._problem or self._draw(seed)
        self._mathy.parser.clear_cache()
        self._state = MathyEnvState(
            problem=problem.text,
            max_moves=self._options.max_moves or self._mathy.max_moves_fn(problem, self._arguments),
            num_rules=self._num_rules,
            problem_type=problem.type,
        )
        self._counts = Counter([problem.text])
        self._results.clear()
        self._num_steps, self._truncated, self.end = 0, False, None
        self._enter(*in_order(self._parse(problem.text)))
        return self._observe()

    def step(self, action: int) -> tuple[float, np.ndarray, bool]:
        if self._state is None or self.end is not None or self._truncated:
            raise self._failure("step() without a game: call initial_state() first, also after a game's end")
        token, rule = divmod(int(action), self._num_rules)
        if not (0 <= token < len(self._nodes) and self._mask[token, rule]):
            raise self._failure(f"action {action} is forbidden here")
        self._num_steps += 1
        before = self.expression
        try:
            with np.errstate(all="ignore"):  # mathy sets numpy's, and leaves it at that
                reward = self._move(token, rule)
        except Exception as error:
            name = self._mathy.rules[rule].name.lower()
            raise self._failure(
                f"mathy fails at {name} of token {token} in {before}: {type(error).__name__}: {first_line(error)}"
            ) from error
        self._truncated = self.end is None and self._num_steps >= self._max_episode_steps
        return reward, self._observe(), self.end is not None or self._truncated

    def mask(self) -> np.ndarray:
        return self._mask.copy()

    def to_play(self) -> int:
        return 0

    @property
    def truncated(self) -> bool:
        return self._truncated

    @property
    def won(self) -> bool:
        return self.end == "won"

    @property
    def expression(self) -> str:
        """The current text; after a move that made too many nodes, the text before it."""
        return self._state.agent.problem

    @property
    def written(self) -> str:
        """The current expression, with brackets also where mathy leaves them out: (-2)^2, where it writes -2^2."""
        return written(_root(self._nodes))

    def describe(self) -> str:
        agent = self._state.agent
        return f"{agent.problem}\n{agent.moves_remaining} of {self._state.max_moves} moves left"

    def action_name(self, action: int) -> str:
        rule, token = self.read_action(action)
        return f"{rule} at {token}: {self.part(action)}"

    def read_action(self, action: int) -> tuple[str, int]:
        """The rule's name and the token's number."""
        token, rule = divmod(int(action), self._num_rules)
        return self._mathy.rules[rule].name.lower(), token

    def part(self, action: int) -> str:
        """What the action would change: in 7 + 6x + -3, a swap at the second + changes 6x + -3.

        Raises EnvironmentFailure if there is no such token.
        """
        token, rule = divmod(int(action), self._num_rules)
        if not 0 <= token < len(self._nodes):
            raise self._failure(f"token {token}; expected 0 to {len(self._nodes) - 1}")
        return changed_part(self._mathy.rules[rule], self._nodes[token])

    def close(self) -> None:
        pass

    @property
    def _num_rules(self) -> int:
        return self.spec.action_shape[1]

    def _move(self, token: int, rule: int) -> float:
        """Applies a rule and returns the reward. The changed tree is read anew from its text: only that is mathy's next
        expression, as brackets may fall away."""
        agent = self._state.agent
        text = self._results[self.expression][token, rule] or self._moves.result(self._nodes, token, rule)
        root = self._parse(text)
        nodes, depths = in_order(root)
        agent.moves_remaining -= 1
        if len(nodes) > self._options.max_nodes:
            self.end = "nodes"
            self._enter(*in_order(self._parse(self.expression)))
            return self._mathy.get_lose_signal(self._state)
        agent.history.append(MathyEnvStateStep(text, (rule, token)))
        agent.problem = text
        self._counts[text] += 1
        self._enter(nodes, depths)
        reward, self.end = judge(self._mathy, self._state, root, self._visits)
        if self.end is None and not self._mask.any():
            self.end = "stuck"
            return self._mathy.get_lose_signal(self._state)
        return reward

    def _enter(self, nodes: Tree, depths: list[int]) -> None:
        """Looks once at the expression that is current now, for masks and observations."""
        self._nodes = nodes
        # As mathy counts: of the expression written out, which a problem may have come in other brackets than.
        self._visits = self._counts[str(nodes[depths.index(0)])]
        self._rows = np.zeros(self.spec.observation_shape, np.float32)
        self._rows[: len(nodes), : len(OF_TOKENS)] = describe_nodes(nodes, depths)
        of_moves = self._rows[:, len(OF_TOKENS) : len(OF_TOKENS) + self._num_rules]
        for (token, rule), text in self._find_results(nodes).items():
            of_moves[token, rule] = 1 + min(self._counts[text], MAX_VISITS - 1) if text else 1
        self._mask = of_moves > 0

    def _find_results(self, nodes: Tree) -> dict[tuple[int, int], str | None]:
        """The legal moves of the expression that is current now, looked for once in a game."""
        if self.expression not in self._results:
            self._results[self.expression] = self._results_of(nodes)
        return self._results[self.expression]

    def _results_of(self, nodes: Tree) -> dict[tuple[int, int], str | None]:
        results = {move: self._result(nodes, *move) for move in self._moves.of(nodes)}
        return keeping_value(_root(nodes), results, self._parse) if self._options.sound else results

    def _result(self, nodes: Tree, token: int, rule: int) -> str | None:
        try:
            with np.errstate(all="ignore"):
                return self._moves.result(nodes, token, rule)
        except Exception:  # what it is, the one who plays this move is told
            return None

    def _observe(self) -> np.ndarray:
        observation = self._rows.copy()
        observation[:, -len(OF_THE_GAME) :] = describe_game(self._state, self._visits)
        return observation

    def _draw(self, seed: int | None) -> MathyEnvProblem:
        try:
            return draw_problem(self._mathy, self._arguments, seed, self._options.constants, self._fits)
        except EnvironmentFailure as error:
            raise EnvironmentFailure(f"{self.spec.id}: {error}") from error

    def _fits(self, text: str) -> bool:
        nodes, _ = in_order(self._parse(text))
        return len(nodes) <= self._options.max_nodes and len(self._moves.of(nodes)) > 0

    def _read_problem(self, text: str) -> MathyEnvProblem:
        """A given problem, as mathy's generators would return it: it has as many moves as one of so many terms."""
        try:
            root = self._parse(text)
            # What moves will be read from: mathy writes -(-x) as --x, which it can't read.
            again = self._parse(str(root))
        except Exception as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
            raise EnvironmentFailure(
                f"{self.spec.id}: the problem {text!r} is no expression ({problem}); write it as '4x + 2x^2 + 7'"
            ) from error
        nodes, _ = in_order(root)
        if len(nodes) > self._options.max_nodes:
            raise EnvironmentFailure(
                f"{self.spec.id}: the problem {text!r} has {len(nodes)} nodes, max_nodes is {self._options.max_nodes}; "
                "give a shorter one, or set environment.kwargs.max_nodes higher (for `solve`: in a run)"
            )
        try:
            if self._options.sound:
                check_readable(text, root, again)
            self._check_has_move(text, nodes)
        except EnvironmentFailure as error:
            raise EnvironmentFailure(f"{self.spec.id}: {error}") from error
        return MathyEnvProblem(text, len(get_terms(root)), self._mathy.get_env_namespace())

    def _check_has_move(self, text: str, nodes: Tree) -> None:
        moves = self._moves.of(nodes)
        if not moves and get_term_ex(_root(nodes)) is not None:
            raise EnvironmentFailure(
                f"there is nothing to simplify in {text!r}, a single term; expected several, such as '4x + 2x'"
            )
        if not moves:
            raise EnvironmentFailure(
                f"mathy knows no rule that can be applied to '{written(_root(nodes))}'; expected sums or products, "
                "such as '4x + 2x'"
            )
        if not self._results_of(nodes):
            token, rule = moves[0]
            result = self._result(nodes, token, rule)
            raise EnvironmentFailure(
                f"mathy can't compute {text!r}: its {self._mathy.rules[rule].name.lower()} "
                f"{'fails' if result is None else f'gives {result}, which is wrong'}; give smaller numbers, exponents "
                "from 0 on, or write it in another way"
            )

    def _parse(self, text: str) -> ex.MathExpression:
        """A tree of one's own: mathy's cache would hand out the one that rules have changed."""
        try:
            return self._parser.parse(text)
        finally:
            self._parser.clear_cache()

    def _failure(self, problem: str) -> EnvironmentFailure:
        return EnvironmentFailure(f"{self.spec.id}, step {self._num_steps}: {problem}")


def _root(nodes: Tree) -> ex.MathExpression:
    return nodes[0].get_root()


def make(config: EnvironmentConfig) -> MathyEnvironment:
    """Makes `mathy:TOPIC-DIFFICULTY`; the section's kwargs are those of mathy_games.Options.

    Raises UnknownEnvironmentError (no such topic or difficulty) and EnvironmentFailure (kwargs that can't be had).
    """
    topic, arguments = read_name(config.id)
    options = read_options(config, topic)
    mathy = make_rules(topic, options)
    return MathyEnvironment(config.id, mathy, arguments, options, config.max_episode_steps)
