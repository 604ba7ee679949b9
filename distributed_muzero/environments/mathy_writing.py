"""Mathy's expressions for people: with the brackets by which mathy reads them; and the part that a rule changes."""

from __future__ import annotations

from operator import attrgetter

from mathy_core import expressions as ex
from mathy_core import rules
from mathy_core.rule import BaseRule

# The two terms that a rule picks, where they aren't the node's own two sides; under mathy's names for where they are.
PICKED = {
    (rules.DistributiveFactorOutRule, "chained_both"): attrgetter("left.right", "right.left"),
    (rules.DistributiveFactorOutRule, "chained_left"): attrgetter("left.right", "right"),
    (rules.DistributiveFactorOutRule, "chained_left_right"): attrgetter("left.right.right", "right"),
    (rules.DistributiveFactorOutRule, "chained_right"): attrgetter("left", "right.left"),
    (rules.DistributiveFactorOutRule, "chained_right_left"): attrgetter("left", "right.left.left"),
    (rules.VariableMultiplyRule, "chained"): attrgetter("left", "right.left"),
    (rules.VariableMultiplyRule, "chained_left_right"): attrgetter("left.right", "right"),
}
CHAINS = (ex.AddExpression, ex.MultiplyExpression)


def written(node: ex.MathExpression) -> str:
    """As mathy writes it, and with brackets in (-2)^2, x^(2y) and 1 / (2x), where it has none."""
    if isinstance(node, ex.NegateExpression):
        text = written(node.right)
        text = (
            f"-({text})" if isinstance(node.right, (ex.AddExpression, ex.SubtractExpression)) else f"-{text}"
        )
    elif isinstance(node, ex.BinaryExpression):
        text = f"{written(node.left)}{_sign(node)}{written(node.right)}"
    else:
        text = str(node)
    return f"({text})" if _is_in_brackets(node) else text


def changed_part(rule: BaseRule, node: ex.MathExpression) -> str:
    """What a rule changes at a node: of a chain such as a + b + c, the two terms that it picks; else all that the node
    holds together."""
    if isinstance(rule, rules.RestateSubtractionRule) and isinstance(node, ex.BinaryExpression):
        return f"{node.name} {written(node.right)}"
    terms = _picked(rule, node)
    return f" {node.name} ".join(map(written, terms)) if terms else written(node)


def _picked(rule: BaseRule, node: ex.MathExpression) -> tuple[ex.MathExpression, ...]:
    if isinstance(rule, rules.CommutativeSwapRule):
        is_chain = any(isinstance(node, chain) and isinstance(node.left, chain) for chain in CHAINS)
        return (node.left.right, node.right) if is_chain else ()
    get_type = getattr(rule, "get_type", None)
    if get_type is None or (found := get_type(node)) is None:
        return ()
    if isinstance(rule, rules.ConstantsSimplifyRule) and not found[0].endswith("simple"):
        return found[1:]
    pick = PICKED.get((type(rule), found[0]))
    return pick(node) if pick else ()


def _sign(node: ex.MathExpression) -> str:
    if isinstance(node, ex.PowerExpression):
        return node.name
    base = node.right.left if isinstance(node.right, ex.PowerExpression) else node.right
    is_coefficient = isinstance(node.left, ex.ConstantExpression) and isinstance(base, ex.VariableExpression)
    return "" if is_coefficient and isinstance(node, ex.MultiplyExpression) else f" {node.name} "


def _is_in_brackets(node: ex.MathExpression) -> bool:
    parent = node.parent
    if isinstance(parent, ex.PowerExpression):
        is_number = isinstance(node, ex.ConstantExpression) and (node is parent.right or node.value >= 0)
        return not (is_number or isinstance(node, ex.VariableExpression))
    if isinstance(parent, ex.DivideExpression) and node is parent.right:
        return isinstance(node, ex.BinaryExpression) and not isinstance(node, ex.PowerExpression)
    return isinstance(node, ex.BinaryExpression) and node.self_parens()
