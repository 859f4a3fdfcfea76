"""Integer expressions over index variables, sizes and tensor entries, and what is provable about them.

Expressions are sympy expressions with integer values. Their atoms are index variables with a known
range (batch, head, query, key), sizes (symbols of the ShapeEnv) and leaf reads, which are entries
of small tensors whose values only run time knows. Every answer here is a proof: "no" means "not proved".
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

Expr = Any  # sympy.Expr; sympy has no type stubs
Bounds = tuple[Expr | None, Expr | None]

MAXIMA = (Max, sympy.Max)
MINIMA = (Min, sympy.Min)
ZERO, ONE = sympy.S.Zero, sympy.S.One
# No dimension of an attention mask exceeds this: one boolean row alone would take 1 GiB.
LARGEST_SIZE = 2**30


def size_expr(size: int | torch.SymInt) -> Expr:
    """A size as sympy: an integer, or the ShapeEnv's expression with its known replacements made."""
    return sympy.sympify(size.node.expr) if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def linear_terms(expr: Expr) -> dict[Expr, Expr]:
    """{atom or product of atoms: integer coefficient} of an expanded expression; the constant is under 1."""
    return dict(expr.as_coefficients_dict())


def is_leaf_read(expr: Expr) -> bool:
    """Whether the expression is one entry of a leaf tensor."""
    return isinstance(expr, AppliedUndef)


def leaf_reads(expr: Expr) -> set[Expr]:
    """All leaf reads inside an expression."""
    return set(expr.atoms(AppliedUndef))


class IndexMath:
    """Builds and bounds integer expressions.

    Attributes:
        ranges: inclusive range of every index variable, in terms of sizes.
        leaf_ranges: inclusive range of the entries of a leaf, by leaf name; None where unknown.
    """

    def __init__(self, shape_env: Any | None) -> None:
        self.shape_env = shape_env
        self.ranges: dict[Expr, tuple[Expr, Expr]] = {}
        self.leaf_ranges: dict[str, Bounds] = {}
        self._bounds: dict[Expr, Bounds] = {}
        self._nonnegative: dict[Expr, bool] = {}
        self._fresh = itertools.count()

    def variable(self, name: str, size: Expr) -> Expr:
        """An index variable in [0, size); 0 itself when there is only one index."""
        if size == 1:
            return ZERO
        symbol = sympy.Symbol(name, integer=True, nonnegative=True)
        self.ranges[symbol] = (ZERO, size - 1)
        return symbol

    def fresh_variable(self, size: Expr) -> Expr:
        """An index variable that no other expression uses."""
        return self.variable(f"j{next(self._fresh)}", size)

    def is_size(self, expr: Expr) -> bool:
        """Whether the expression depends on sizes alone."""
        return not (expr.free_symbols & self.ranges.keys()) and not leaf_reads(expr)

    # ---- proofs ---------------------------------------------------------------------------

    def bounds(self, expr: Expr) -> Bounds:
        """(least, greatest) over all index values, in terms of sizes; None where not known."""
        found = self._bounds.get(expr)
        if found is None:
            found = self._bounds[expr] = self._find_bounds(expr)
        return found

    def _find_bounds(self, expr: Expr) -> Bounds:
        if self.is_size(expr):
            return expr, expr
        if expr in self.ranges:
            return self.ranges[expr]
        if is_leaf_read(expr):
            return self.leaf_ranges.get(expr.func.__name__, (None, None))
        if expr.is_Add:
            parts = [self.bounds(part) for part in expr.args]
            return _total([low for low, _ in parts]), _total([high for _, high in parts])
        if expr.is_Mul:
            return self._product_bounds(expr)
        if isinstance(expr, FloorDiv) and self.nonnegative(expr.args[1] - 1):
            low, high = self.bounds(expr.args[0])
            divisor = expr.args[1]
            return (
                None if low is None else self.floor_div(low, divisor),
                None if high is None else self.floor_div(high, divisor),
            )
        if isinstance(expr, (Mod, PythonMod)) and self.nonnegative(expr.args[1] - 1):
            return ZERO, expr.args[1] - 1
        if isinstance(expr, MAXIMA + MINIMA):
            parts = [self.bounds(part) for part in expr.args]
            lows, highs = [low for low, _ in parts], [high for _, high in parts]
            if isinstance(expr, MAXIMA):
                return _any_of(Max, lows), _all_of(Max, highs)
            return _all_of(Min, lows), _any_of(Min, highs)
        return None, None

    def _product_bounds(self, expr: Expr) -> Bounds:
        factor, rest = expr.as_coeff_Mul()
        low, high = ONE, ONE
        for part in sympy.Mul.make_args(rest):
            part_low, part_high = self.bounds(part)
            if len(sympy.Mul.make_args(rest)) > 1 and not (part_low is not None and self.nonnegative(part_low)):
                return None, None
            low = None if low is None or part_low is None else low * part_low
            high = None if high is None or part_high is None else high * part_high
        low = None if low is None else sympy.expand(factor * low)
        high = None if high is None else sympy.expand(factor * high)
        return (low, high) if factor > 0 else (high, low)

    def nonnegative(self, expr: Expr) -> bool:
        """Whether expr >= 0 is proved for all index values, sizes and leaf entries."""
        expr = sympy.expand(expr)
        if expr.is_number:
            return bool(expr >= 0)
        found = self._nonnegative.get(expr)
        if found is None:
            found = self._nonnegative[expr] = self._prove_nonnegative(expr)
        return found

    def _prove_nonnegative(self, expr: Expr) -> bool:
        split = split_extremum(expr)
        if split is not None:
            cases, disjunctive = split
            return any(map(self.nonnegative, cases)) if disjunctive else all(map(self.nonnegative, cases))
        low = self.bounds(expr)[0]
        if low is None:
            return False
        low = sympy.expand(low)
        if low == expr or split_extremum(low) is None:
            return self._size_nonnegative(low)
        return self.nonnegative(low)

    def _size_nonnegative(self, expr: Expr) -> bool:
        if expr.is_number:
            return bool(expr >= 0)
        low, high = self._size_interval(expr, None)
        if low is not None and low >= 0:
            return True
        if self.shape_env is None or (high is not None and high < 0):
            return False
        # Relations between sizes that guards established, such as s0 >= s1.
        return bool(self.shape_env._maybe_evaluate_static(sympy.Ge(expr, 0)) == sympy.true)

    def equal(self, left: Expr, right: Expr) -> bool:
        """Whether left == right is proved."""
        difference = sympy.expand(left - right)
        return difference == 0 or (
            not difference.is_number and self.nonnegative(difference) and self.nonnegative(-difference)
        )

    def numeric_bounds(self, expr: Expr) -> tuple[int | None, int | None]:
        """(least, greatest) as numbers, no size being larger than `LARGEST_SIZE`."""
        low, high = self.bounds(expr)
        return (
            None if low is None else self._size_interval(sympy.expand(low), LARGEST_SIZE)[0],
            None if high is None else self._size_interval(sympy.expand(high), LARGEST_SIZE)[1],
        )

    def _size_interval(self, expr: Expr, largest: int | None) -> tuple[int | None, int | None]:
        """Interval of an expanded expression in sizes; `largest` is assumed for sizes without a limit."""
        low: int | None = 0
        high: int | None = 0
        for atom, coefficient in linear_terms(expr).items():
            least, most = self._atom_interval(atom, largest)
            if coefficient < 0:
                least, most = most, least
            low = None if low is None or least is None else low + int(coefficient) * least
            high = None if high is None or most is None else high + int(coefficient) * most
        return low, high

    def _atom_interval(self, atom: Expr, largest: int | None) -> tuple[int | None, int | None]:
        if atom.is_number:
            return int(atom), int(atom)
        if atom.is_Symbol:
            known = None if self.shape_env is None else self.shape_env.var_to_range.get(atom)
            if known is None:
                return None, largest
            least = int(known.lower) if known.lower.is_Integer else None if largest is None else -largest
            return least, int(known.upper) if known.upper.is_Integer else largest
        if atom.is_Mul or (atom.is_Pow and atom.exp.is_Integer and atom.exp > 0):
            low: int = 1
            high: int | None = 1
            for factor in [atom.base] * int(atom.exp) if atom.is_Pow else atom.args:
                least, most = self._size_interval(factor, largest)
                if least is None or least < 0:
                    return None, None
                low = low * least
                high = None if high is None or most is None else high * most
            return low, high
        if isinstance(atom, (FloorDiv, Mod, PythonMod)) and atom.args[1].is_Integer and atom.args[1] > 0:
            divisor = int(atom.args[1])
            if not isinstance(atom, FloorDiv):
                return 0, divisor - 1
            least, most = self._size_interval(sympy.expand(atom.args[0]), largest)
            return None if least is None else least // divisor, None if most is None else most // divisor
        if isinstance(atom, MAXIMA + MINIMA):
            pairs = [self._size_interval(sympy.expand(part), largest) for part in atom.args]
            lows, highs = [low for low, _ in pairs], [high for _, high in pairs]
            if isinstance(atom, MAXIMA):
                return _any_of(max, lows), _all_of(max, highs)
            return _all_of(min, lows), _any_of(min, highs)
        return None, None

    # ---- constructors that simplify -----------------------------------------------------------

    def maximum(self, left: Expr, right: Expr) -> Expr:
        if self.nonnegative(left - right):
            return left
        return right if self.nonnegative(right - left) else Max(left, right)

    def minimum(self, left: Expr, right: Expr) -> Expr:
        if self.nonnegative(right - left):
            return left
        return right if self.nonnegative(left - right) else Min(left, right)

    def absolute(self, expr: Expr) -> Expr:
        return self.maximum(expr, sympy.expand(-expr))

    def floor_div(self, expr: Expr, divisor: Expr) -> Expr:
        """floor(expr / divisor) of a divisor that is proved positive by the caller."""
        if divisor == 1:
            return expr
        whole, rest = self._divide(expr, divisor)
        if self.nonnegative(rest) and self.nonnegative(divisor - 1 - rest):
            return whole
        return whole + FloorDiv(rest, divisor)

    def remainder(self, expr: Expr, divisor: Expr) -> Expr:
        """expr - divisor * floor(expr / divisor), likewise."""
        if divisor == 1:
            return ZERO
        _, rest = self._divide(expr, divisor)
        if self.nonnegative(rest) and self.nonnegative(divisor - 1 - rest):
            return rest
        return PythonMod(rest, divisor)

    def _divide(self, expr: Expr, divisor: Expr) -> tuple[Expr, Expr]:
        """(whole, rest) with expr == whole * divisor + rest, by the terms that divide exactly."""
        whole, rest = ZERO, ZERO
        for term, coefficient in linear_terms(sympy.expand(expr)).items():
            part = coefficient * term
            if divisor.is_Integer:
                # Towards zero, so that (k - left) // 8 keeps its shape.
                quotient = int(abs(coefficient) // divisor) * (1 if coefficient > 0 else -1)
                whole, rest = whole + quotient * term, rest + (coefficient - quotient * divisor) * term
                continue
            quotient = part / divisor
            if sympy.denom(sympy.together(quotient)) == 1:
                whole = whole + sympy.cancel(quotient)
            else:
                rest = rest + part
        return sympy.expand(whole), sympy.expand(rest)

    # ---- reshapes -----------------------------------------------------------------------------

    def reshape_index(self, index: Sequence[Expr], new: Sequence[Expr], old: Sequence[Expr]) -> tuple[Expr, ...] | None:
        """Where `x.reshape(new)[index]` lies in x of shape `old`, both row-major; None when not understood."""
        result: list[Expr] = []
        pairs = [(i, size) for i, size in zip(index, new, strict=True) if size != 1]
        sizes = [size for size in old if size != 1]
        while pairs or sizes:
            group = self._matching_group([size for _, size in pairs], sizes)
            if group is None:
                return None
            taken, filled = group
            linear = ZERO
            for i, size in pairs[:taken]:
                linear = linear * size + i
            parts: list[Expr] = []
            for size in reversed(sizes[1:filled]):
                parts.append(self.remainder(linear, size))
                linear = self.floor_div(linear, size)
            result += [linear, *reversed(parts)]
            pairs, sizes = pairs[taken:], sizes[filled:]
        squeezed = iter(result)
        return tuple(ZERO if size == 1 else next(squeezed) for size in old)

    def _matching_group(self, new: Sequence[Expr], old: Sequence[Expr]) -> tuple[int, int] | None:
        """The least leading numbers of dimensions of both shapes that hold equally many elements."""
        counts = [(a, b) for a in range(1, len(new) + 1) for b in range(1, len(old) + 1)]
        for a, b in sorted(counts, key=sum):
            if self.equal(sympy.Mul(*new[:a]), sympy.Mul(*old[:b])):
                return a, b
        return None


def split_extremum(expr: Expr) -> tuple[list[Expr], bool] | None:
    """expr >= 0 as cases without its first Max or Min: (cases, whether one case suffices); None without any."""
    for atom, coefficient in linear_terms(expr).items():
        if isinstance(atom, MAXIMA + MINIMA):
            rest = expr - coefficient * atom
            cases = [sympy.expand(rest + coefficient * part) for part in atom.args]
            return cases, isinstance(atom, MAXIMA) == bool(coefficient > 0)
    return None


def _total(parts: Sequence[Expr | None]) -> Expr | None:
    if any(part is None for part in parts):
        return None
    return sympy.expand(sympy.Add(*parts))


def _all_of(extremum: Any, parts: Sequence[Any]) -> Any:
    """max or min of values that must all be known."""
    return None if any(part is None for part in parts) else _any_of(extremum, parts)


def _any_of(extremum: Any, parts: Sequence[Any]) -> Any:
    """max or min of the known ones."""
    known = [part for part in parts if part is not None]
    return None if not known else known[0] if len(known) == 1 else extremum(*known)
