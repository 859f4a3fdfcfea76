"""Values of mask tensors at one index: predicates for booleans, integers or constants by case for numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import sympy
import torch
from torch.utils._python_dispatch import _disable_current_modes

from s2o_inductor.passes.index_math import ONE, ZERO, Expr
from s2o_inductor.passes.predicates import FALSE, TRUE, AnyOf, Comparison, Logic, Predicate, comparisons

# A value of more cases than this is nothing that a mask spec could hold.
MAX_CASES = 16
# Integers up to 2 ** digits are exact in the floating-point type.
_DIGITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# An integer-valued expression, or a float that is infinite, NaN, fractional or huge.
Scalar: TypeAlias = "Expr | float"


class Unreadable(Exception):
    """A node is no function of the index that could be understood; the message says which and why.

    Attributes:
        final: the node must not be read as a tensor either.
    """

    def __init__(self, reason: str, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


@dataclasses.dataclass(frozen=True)
class Cases:
    """A number by case: the guards exclude one another and cover every index."""

    parts: tuple[tuple[Predicate, Scalar], ...]

    @property
    def single(self) -> Expr | None:
        """The integer expression, when there is but one case."""
        return self.parts[0][1] if len(self.parts) == 1 and not isinstance(self.parts[0][1], float) else None


Value: TypeAlias = "Predicate | Cases"


def atoms_of(value: Value) -> Iterable[Expr]:
    """Every expression inside a value."""
    if not isinstance(value, Cases):
        return (comparison.expr for comparison in comparisons(value))
    guards = (comparison.expr for guard, _ in value.parts for comparison in comparisons(guard))
    return itertools.chain(guards, (scalar for _, scalar in value.parts if not isinstance(scalar, float)))


def is_constant(scalar: Scalar) -> bool:
    """Whether a scalar is a plain number."""
    return isinstance(scalar, float) or bool(scalar.is_number)


def from_python(number: float | bool) -> Scalar:
    """A Python number as a scalar: exact integers as sympy integers, other floats as they are."""
    if isinstance(number, float) and not (math.isfinite(number) and number.is_integer() and abs(number) <= 2**53):
        return number
    return sympy.Integer(int(number))


def to_python(scalar: Scalar) -> int | float:
    """The number that a constant scalar stands for."""
    return scalar if isinstance(scalar, float) else int(scalar)


def _in_dtype(operation: Callable[..., torch.Tensor], dtype: torch.dtype, *scalars: Scalar) -> Scalar:
    """What torch itself computes on constants of that dtype."""
    with _disable_current_modes():
        operands = [torch.tensor(to_python(scalar), dtype=dtype, device="cpu") for scalar in scalars]
        return from_python(operation(*operands).item())


_FOLD: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "neg": torch.neg,
    "abs": torch.abs,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "true_divide": torch.true_divide,
    "floor_div": torch.floor_divide,
    "remainder": torch.remainder,
}


class Values:
    """Arithmetic on cases, exact or `Unreadable`."""

    def __init__(self, logic: Logic) -> None:
        self.logic, self.math = logic, logic.math

    # ---- building -----------------------------------------------------------------------------

    def constant(self, scalar: Scalar) -> Cases:
        return Cases(((TRUE, scalar),))

    def cases(self, parts: Iterable[tuple[Predicate, Scalar]]) -> Cases:
        """Joins equal values, drops impossible cases, and uses what a guard says about its value."""
        merged: dict[Scalar, Predicate] = {}
        for guard, scalar in parts:
            if guard == FALSE:
                continue
            if not isinstance(scalar, float) and not scalar.is_number:
                scalar = sympy.expand(scalar.subs(self.logic.pinned(guard)))
            merged[scalar] = self.logic.any_of([merged[scalar], guard]) if scalar in merged else guard
        if len(merged) > MAX_CASES:
            raise Unreadable("its values differ in too many regions")
        if len(merged) == 1:
            return self.constant(next(iter(merged)))
        return Cases(tuple((guard, scalar) for scalar, guard in merged.items()))

    def piecewise(self, parts: Sequence[tuple[Predicate, Value]]) -> Value:
        """One of several values, by guards that exclude one another and cover every index."""
        parts = [(guard, value) for guard, value in parts if guard != FALSE]
        if not parts:
            raise Unreadable("it holds nothing")
        if len(parts) == 1:
            return parts[0][1]
        numbers = [(guard, value) for guard, value in parts if isinstance(value, Cases)]
        if not numbers:
            any_of, negate = self.logic.any_of, self.logic.negate
            flags = [(guard, value) for guard, value in parts if not isinstance(value, Cases)]
            return self.logic.all_of([any_of([negate(guard), value]) for guard, value in flags])
        if len(numbers) < len(parts):
            raise Unreadable("it mixes booleans and numbers")
        return self.cases(
            (self.logic.all_of([guard, inner]), scalar) for guard, value in numbers for inner, scalar in value.parts
        )

    def number(self, value: Value) -> Cases:
        """A boolean as 0 or 1."""
        if isinstance(value, Cases):
            return value
        if isinstance(value, Comparison) and value.relation != ">=" and self.logic.is_flag(value.expr):
            return self.constant(value.expr if value.relation == "!=" else 1 - value.expr)
        return self.cases([(value, ONE), (self.logic.negate(value), ZERO)])

    def truth(self, value: Value) -> Predicate:
        """Whether a value is not 0."""
        if not isinstance(value, Cases):
            return value
        return self.compare("!=", value, self.constant(ZERO))

    # ---- computing ----------------------------------------------------------------------------

    def _combine(self, operands: Sequence[Cases], operation: Callable[..., Scalar]) -> Cases:
        if math.prod(len(operand.parts) for operand in operands) > MAX_CASES**2:
            raise Unreadable("its values differ in too many regions")
        return self.cases(
            (self.logic.all_of(guard for guard, _ in choice), operation(*(scalar for _, scalar in choice)))
            for choice in itertools.product(*(operand.parts for operand in operands))
            if self.logic.all_of(guard for guard, _ in choice) != FALSE
        )

    def arithmetic(self, name: str, dtype: torch.dtype, *operands: Cases) -> Cases:
        """An operation on operands of that dtype, with a result of that dtype."""
        return self._combine(operands, lambda *scalars: self._arithmetic(name, dtype, scalars))

    def _arithmetic(self, name: str, dtype: torch.dtype, scalars: Sequence[Scalar]) -> Scalar:
        if dtype.is_floating_point and all(map(is_constant, scalars)):
            return _in_dtype(_FOLD[name], dtype, *scalars)
        if any(isinstance(scalar, float) for scalar in scalars) or name == "true_divide":
            raise Unreadable("it computes with floating-point values that depend on positions")
        return self.exact(self._integer_arithmetic(name, *scalars), dtype)

    def _integer_arithmetic(self, name: str, left: Expr, right: Expr = ZERO) -> Expr:
        if name in ("floor_div", "remainder"):
            if not self.math.nonnegative(right - 1):
                raise Unreadable("it divides by what may not be positive")
            divide = self.math.floor_div if name == "floor_div" else self.math.remainder
            return sympy.expand(divide(left, right))
        if name in ("maximum", "minimum"):
            return self.math.maximum(left, right) if name == "maximum" else self.math.minimum(left, right)
        if name == "abs":
            return self.math.absolute(left)
        if name == "neg":
            return sympy.expand(-left)
        return sympy.expand(left + right if name == "add" else left - right if name == "sub" else left * right)

    def exact(self, scalar: Scalar, dtype: torch.dtype) -> Scalar:
        """The scalar, when the dtype holds all its values exactly.

        int64 is taken not to overflow: positions are far below its limits.
        """
        if isinstance(scalar, float):
            return scalar
        if dtype in _DIGITS:
            most = 2 ** _DIGITS[dtype]
            least = -most
        elif dtype in _INTEGERS:
            least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        else:
            raise Unreadable(f"it has dtype {dtype}")
        low, high = self.math.numeric_bounds(scalar)
        unknown_fits = dtype == torch.int64
        if (unknown_fits if low is None else low >= least) and (unknown_fits if high is None else high <= most):
            return scalar
        raise Unreadable(f"positions may not be exact in {dtype}")

    def convert(self, value: Value, dtype: torch.dtype) -> Value:
        """The value in another dtype."""
        if dtype == torch.bool:
            return self.truth(value)
        parts = list(self.number(value).parts)
        if dtype.is_floating_point:
            # Arithmetic on floats is on constants: a 0/1 entry becomes two cases.
            parts = [case for guard, scalar in parts for case in self._split(guard, scalar)]
        return self.cases((guard, self._converted(scalar, dtype)) for guard, scalar in parts)

    def _split(self, guard: Predicate, scalar: Scalar) -> list[tuple[Predicate, Scalar]]:
        if is_constant(scalar) or self.math.bounds(scalar) != (ZERO, ONE):
            return [(guard, scalar)]
        is_set = self.logic.is_set(scalar)
        parts = ((is_set, ONE), (self.logic.negate(is_set), ZERO))
        return [(self.logic.all_of([guard, condition]), value) for condition, value in parts]

    def _converted(self, scalar: Scalar, dtype: torch.dtype) -> Scalar:
        if is_constant(scalar) and dtype.is_floating_point:
            return _in_dtype(lambda x: x, dtype, scalar)
        if isinstance(scalar, float):
            raise Unreadable("it rounds floating-point values to integers")
        return self.exact(scalar, dtype)

    def compare(self, relation: str, left: Cases, right: Cases) -> Predicate:
        """left relation right, for <, <=, >, >=, == and !=."""
        negate, any_of = self.logic.negate, self.logic.any_of
        if len(left.parts) * len(right.parts) > MAX_CASES:
            raise Unreadable("its values differ in too many regions")
        cases = [
            (self.logic.all_of([one, two]), self._relation(relation, x, y))
            for one, x in left.parts
            for two, y in right.parts
        ]
        true = [guard for guard, holds in cases if holds == TRUE]
        if len(true) <= sum(holds == FALSE for _, holds in cases) == len(cases) - len(true):
            return any_of(true)
        return self.logic.all_of(any_of([negate(guard), holds]) for guard, holds in cases)

    def _relation(self, relation: str, left: Scalar, right: Scalar) -> Predicate:
        if relation in (">", ">="):
            return self._relation("<" if relation == ">" else "<=", right, left)
        if relation == "!=":
            return self.logic.negate(self._relation("==", left, right))
        if is_constant(left) and is_constant(right):
            x, y = to_python(left), to_python(right)
            return TRUE if (x < y if relation == "<" else x <= y if relation == "<=" else x == y) else FALSE
        if isinstance(left, float) or isinstance(right, float):
            return self._relation_to_float(relation, left, right)
        if relation == "==":
            return self.logic.is_zero(right - left)
        return self.logic.at_least_zero(right - left - (1 if relation == "<" else 0))

    def _relation_to_float(self, relation: str, left: Scalar, right: Scalar) -> Predicate:
        """An integer expression against an infinite, fractional, huge or NaN float."""
        number = left if isinstance(left, float) else right
        if math.isnan(number) or relation == "==":
            return AnyOf()
        if math.isinf(number):
            return TRUE if (number > 0) == (number is right) else FALSE
        if number is right:
            return self.logic.at_least_zero(math.floor(number) - left)
        return self.logic.at_least_zero(right - math.ceil(number))
