"""Which of mathy's rules can be applied to which nodes: what mathy's own mask says, without its double work."""

from __future__ import annotations

from collections.abc import Callable

from mathy_core import expressions as ex
from mathy_core import rules
from mathy_core.rule import BaseRule
from mathy_core.util import TermEx

# All that mathy's rules apply to at most, so that they are asked of these only. A test holds it against mathy's masks.
CANDIDATES: dict[type[BaseRule], tuple[type[ex.MathExpression], ...]] = {
    rules.ConstantsSimplifyRule: (ex.BinaryExpression, ex.NegateExpression),
    rules.CommutativeSwapRule: (ex.AddExpression, ex.EqualExpression, ex.MultiplyExpression),
    rules.DistributiveMultiplyRule: (ex.MultiplyExpression,),
    rules.DistributiveFactorOutRule: (ex.AddExpression,),
    rules.AssociativeSwapRule: (ex.AddExpression, ex.MultiplyExpression),
    rules.VariableMultiplyRule: (ex.MultiplyExpression,),
    rules.RestateSubtractionRule: (ex.AddExpression, ex.SubtractExpression),
}
# Mathy looks for factors one by one, up to the root of the number: a larger one would stop everything for seconds.
MAX_FACTORED = 10**12

Test = Callable[[ex.MathExpression], bool]
Tree = list[ex.MathExpression]  # the nodes of an expression in order: its tokens from left to right


class Moves:
    """The legal moves of expressions and what they lead to, under mathy's list of rules."""

    def __init__(self, rules: list[BaseRule]):
        self._rules = rules
        self._tests: dict[type[ex.MathExpression], list[tuple[int, Test]]] = {}

    def of(self, nodes: Tree) -> list[tuple[int, int]]:
        """(token, rule) of each legal move."""
        tests = self._tests
        moves = []
        for token, node in enumerate(nodes):
            kind = type(node)
            if kind not in tests:
                tests[kind] = self._tests_of(kind)
            moves += [(token, rule) for rule, can_apply in tests[kind] if can_apply(node)]
        return moves

    def result(self, nodes: Tree, token: int, rule: int) -> str:
        """The expression that a legal move leads to; the nodes stay as they are. Raises what mathy does."""
        return str(self._rules[rule].apply_to(_copy(nodes)[token]).result.get_root())

    def _tests_of(self, kind: type[ex.MathExpression]) -> list[tuple[int, Test]]:
        return [
            (index, _test_of(rule))
            for index, rule in enumerate(self._rules)
            if issubclass(kind, CANDIDATES.get(type(rule), (ex.MathExpression,)))
        ]


def _copy(nodes: Tree) -> Tree:
    """Of a whole tree in order, numbered by `r_index`; mathy's own `clone_from_root` takes five times as long."""
    copies = [object.__new__(type(node)) for node in nodes]
    for node, original in zip(copies, nodes, strict=True):
        node.__dict__ = original.__dict__.copy()
    for node, original in zip(copies, nodes, strict=True):
        if original.left is not None:
            node.left = left = copies[original.left.r_index]
            left.parent = node
        if original.right is not None:
            node.right = right = copies[original.right.r_index]
            right.parent = node
    return copies


def _test_of(rule: BaseRule) -> Test:
    if type(rule) is rules.DistributiveFactorOutRule and not rule.constants:
        return lambda node: can_factor_out(rule, node)
    return rule.can_apply_to


def can_factor_out(rule: rules.DistributiveFactorOutRule, node: ex.MathExpression) -> bool:
    """What `rule.can_apply_to(node)` says, without looking for all factors of both numbers: these always share 1."""
    found = rule.get_type(node)
    if found is None:
        return False
    _, left, right = found
    if left.variable is None and right.variable is None:
        return False
    one, other = _coefficient(left), _coefficient(right)
    if one == 0 or other == 0 or one != one or other != other:
        return False
    if max(one, other) > MAX_FACTORED:
        return False
    if one == other and 0 < one < 1:
        return True  # the one case in which they share less than 1
    return left.variable == right.variable and (left.exponent or None) == (right.exponent or None)


def _coefficient(term: TermEx) -> float:
    return 1 if term.coefficient is None else term.coefficient
