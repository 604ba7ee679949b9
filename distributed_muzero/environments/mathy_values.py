"""Whether a move keeps an expression's value: mathy's arithmetic has 64 bits for powers and double precision for
fractions, some of its rules are wrong (x - 4^2 becomes x + -4^2), and some brackets get lost when it writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from mathy_core import expressions as ex
from mathy_core.tokenizer import TOKEN_TYPES, Tokenizer

from distributed_muzero.errors import EnvironmentFailure

Number = Any  # a Fraction, a float or a complex; Python has no type of all three
MAX_BITS = 2**15  # of a power
MAX_FACTORIAL = 1000
TOLERANCE = 1e-12  # of floats, in the unit of the largest part
BINARY: dict[type[ex.MathExpression], Callable[[Number, Number], Number]] = {
    ex.AddExpression: lambda one, two: one + two,
    ex.SubtractExpression: lambda one, two: one - two,
    ex.MultiplyExpression: lambda one, two: one * two,
    ex.DivideExpression: lambda one, two: one / two,
    ex.PowerExpression: lambda one, two: _power(one, two),
}


def values_of(root: ex.MathExpression) -> list[Number]:
    """Of all its parts, its own last, where each letter has some value. They are exact, but for decimals and roots.

    Raises ArithmeticError where there is none, or only one that is too large.
    """
    values: list[Number] = []

    def add(node: ex.MathExpression) -> Number:
        sides = [add(side) for side in (node.left, node.right) if side is not None]
        values.append(_operate(node, sides))
        return values[-1]

    add(root)
    return values


def are_equal(one: list[Number], other: list[Number]) -> bool:
    """Whether two expressions are equal, by the values of their parts."""
    if isinstance(one[-1], Fraction) and isinstance(other[-1], Fraction):
        return one[-1] == other[-1]
    return abs(one[-1] - other[-1]) <= TOLERANCE * max(map(abs, one + other))


def check_readable(text: str, root: ex.MathExpression, again: ex.MathExpression) -> None:
    """Raises EnvironmentFailure for a problem without a value, and for one of which mathy would solve another.

    root: what mathy reads.   again: what it reads of what it writes of that.
    """
    try:
        is_kept = are_equal(values_of(root), values_of(again))
    except ArithmeticError as error:
        why = "it divides by zero" if isinstance(error, ZeroDivisionError) else error
        raise EnvironmentFailure(
            f"the problem {text!r} has no value, or too large a one ({why}); expected one that can be computed"
        ) from error
    given = sum(
        token.type in (TOKEN_TYPES.Constant, TOKEN_TYPES.Variable) for token in Tokenizer().tokenize(text)
    )
    if given != sum(node.left is None and node.right is None for node in root.to_list()):
        raise EnvironmentFailure(
            f"mathy misreads the problem {text!r} as {root}; write * between factors, such as x * y^2"
        )
    if not is_kept:
        raise EnvironmentFailure(
            f"mathy loses brackets of the problem {text!r}: it writes {root}, which it reads as something else; "
            "write the problem without them"
        )


def keeping_value(
    root: ex.MathExpression,
    results: dict[tuple[int, int], str | None],
    parse: Callable[[str], ex.MathExpression],
) -> dict[tuple[int, int], str | None]:
    """Of moves, those whose result is equal to the expression that they are made in."""
    values = values_of(root)

    def is_equal(text: str | None) -> bool:
        try:
            return text is not None and are_equal(values, values_of(parse(text)))
        except Exception:  # what mathy can't read, and what has no value
            return False

    return {move: text for move, text in results.items() if is_equal(text)}


def _operate(node: ex.MathExpression, sides: list[Number]) -> Number:
    if isinstance(node, ex.ConstantExpression):
        return node.value if isinstance(node.value, float) else Fraction(node.value)
    if isinstance(node, ex.VariableExpression):
        return Fraction(
            ord(node.identifier) ** 3, 10**6 + 3
        )  # cubes: no sum of two letters is another's double
    if isinstance(node, ex.BinaryExpression):
        return BINARY[type(node)](*sides)
    [side] = sides
    if isinstance(node, ex.NegateExpression):
        return -side
    if isinstance(side, complex):
        raise ArithmeticError(f"{node} is of no real number")
    if isinstance(node, ex.SgnExpression):
        return Fraction((side > 0) - (side < 0))
    if side != int(side) or not 0 <= side <= MAX_FACTORIAL:
        raise ArithmeticError(f"{node} is no factorial of a whole number from 0 to {MAX_FACTORIAL}")
    return Fraction(math.factorial(int(side)))


def _power(one: Number, two: Number) -> Number:
    if not (isinstance(one, Fraction) and isinstance(two, Fraction) and two.denominator == 1):
        return complex(one) ** complex(two)
    if abs(two) * max(abs(one.numerator), one.denominator).bit_length() > MAX_BITS:
        raise OverflowError("a power is too large")
    return one**two
