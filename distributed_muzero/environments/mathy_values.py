"""Whether a move keeps an expression's value: mathy's arithmetic has 64 bits for powers and double precision for
fractions, some of its rules are wrong (x - 4^2 becomes x + -4^2), and some brackets get lost when it writes."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from mathy_core import expressions as ex
from mathy_core.tokenizer import TOKEN_TYPES, Tokenizer

from distributed_muzero.errors import EnvironmentFailure

MAX_BITS = 2**15  # of a power
MAX_FACTORIAL = 1000
ROUNDING = Fraction(1, 10**14)  # of decimals and roots, in their own unit
MAX_ERROR = 1e-6  # of a problem: beyond it, a wrong move would pass for a right one
BINARY: dict[type[ex.MathExpression], Callable[[Value, Value], Value]] = {
    ex.AddExpression: lambda one, two: Value(one.number + two.number, one.error + two.error),
    ex.SubtractExpression: lambda one, two: Value(one.number - two.number, one.error + two.error),
    ex.MultiplyExpression: lambda one, two: _product(one, two),
    ex.DivideExpression: lambda one, two: _product(one, _power(two, Value(Fraction(-1)))),
    ex.PowerExpression: lambda one, two: _power(one, two),
}


class Value(NamedTuple):
    """A number, and how far mathy's rounding may have moved it."""

    number: Any  # a Fraction, or with roots a complex; Python has no type of both
    error: Any = 0


def value_of(node: ex.MathExpression) -> Value:
    """What an expression is worth, where each letter has some value. It is exact, but for decimals and roots.

    Raises ArithmeticError where there is none, or only one that is too large.
    """
    value = _operate(node, [value_of(side) for side in (node.left, node.right) if side is not None])
    is_exact = isinstance(value.number, Fraction)
    return value if is_exact else value._replace(error=value.error + ROUNDING * abs(value.number))


def are_equal(one: Value, other: Value) -> bool:
    return abs(one.number - other.number) <= one.error + other.error


def check_readable(text: str, root: ex.MathExpression, again: ex.MathExpression) -> None:
    """Raises EnvironmentFailure for a problem without a value, and for one of which mathy would solve another.

    root: what mathy reads.   again: what it reads of what it writes of that.
    """
    try:
        value = value_of(root)
        is_kept = are_equal(value, value_of(again))
    except ArithmeticError as error:
        why = "it divides by zero" if isinstance(error, ZeroDivisionError) else error
        raise EnvironmentFailure(
            f"the problem {text!r} has no value, or too large a one ({why}); expected one that can be computed"
        ) from error
    if value.error > MAX_ERROR:
        raise EnvironmentFailure(
            f"the problem {text!r} has decimals or roots beside numbers so large that wrong moves would pass for "
            f"right ones: its value isn't known within {MAX_ERROR:g}; give smaller ones"
        )
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
    value = value_of(root)

    def is_equal(text: str | None) -> bool:
        try:
            return text is not None and are_equal(value, value_of(parse(text)))
        except Exception:  # what mathy can't read, and what has no value
            return False

    return {move: text for move, text in results.items() if is_equal(text)}


def _operate(node: ex.MathExpression, sides: list[Value]) -> Value:
    if isinstance(node, ex.ConstantExpression):
        return _constant(node.value)
    if isinstance(node, ex.VariableExpression):
        return Value(
            Fraction(ord(node.identifier) ** 3, 10**6 + 3)
        )  # cubes: no sum of two letters is another's double
    if isinstance(node, ex.BinaryExpression):
        return BINARY[type(node)](*sides)
    [(side, error)] = sides
    if isinstance(node, ex.NegateExpression):
        return Value(-side, error)
    if isinstance(side, complex):
        raise ArithmeticError(f"{node} is of no real number")
    if isinstance(node, ex.SgnExpression):
        return Value(Fraction((side > 0) - (side < 0)))
    if side != int(side) or not 0 <= side <= MAX_FACTORIAL:
        raise ArithmeticError(f"{node} is no factorial of a whole number from 0 to {MAX_FACTORIAL}")
    return Value(Fraction(math.factorial(int(side))))


def _constant(value: float) -> Value:
    if not isinstance(value, float):
        return Value(Fraction(value))
    if not math.isfinite(value):
        raise OverflowError(f"{value} is no number")
    number = Fraction(str(value))  # as it is written, which its bits only come close to
    return Value(number, ROUNDING * abs(number))


def _product(one: Value, two: Value) -> Value:
    error = abs(one.number) * two.error + abs(two.number) * one.error if one.error or two.error else 0
    return Value(one.number * two.number, error)


def _power(one: Value, two: Value) -> Value:
    base, exponent = one.number, two.number
    if not (isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1):
        number: Any = complex(base) ** complex(exponent)
    elif abs(exponent) * max(abs(base.numerator), base.denominator).bit_length() > MAX_BITS:
        raise OverflowError("a power is too large")
    else:
        number = base**exponent
    if not (one.error or two.error) or base == 0:
        return Value(number, one.error)
    change = abs(exponent) * one.error / abs(base)
    if two.error:
        change += abs(cmath.log(complex(base))) * float(two.error)
    return Value(number, abs(number) * change)
