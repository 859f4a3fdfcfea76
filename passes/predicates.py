"""Predicates over index variables: comparisons with zero, joined by and / or, simplified by proofs.

Negation is pushed into the comparisons, which is exact on integers: not (e >= 0) is -e - 1 >= 0.
`Logic` builds predicates in simplified form. What it cannot prove it leaves as it is, so a predicate
always equals what it was built from.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import TypeAlias

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from s2o_inductor.passes.index_math import (
    ONE,
    ZERO,
    Expr,
    IndexMath,
    is_leaf_read,
    leaf_reads,
    linear_terms,
    split_extremum,
)

# A conjunction of more clauses than this is nothing that a mask spec could hold.
MAX_CLAUSES = 64


@dataclasses.dataclass(frozen=True)
class Comparison:
    """``expr relation 0`` with relation ">=", "==" or "!="."""

    relation: str
    expr: Expr


@dataclasses.dataclass(frozen=True)
class AllOf:
    """A conjunction; true when it has no part."""

    parts: tuple[Predicate, ...] = ()


@dataclasses.dataclass(frozen=True)
class AnyOf:
    """A disjunction; false when it has no part."""

    parts: tuple[Predicate, ...] = ()


Predicate: TypeAlias = "Comparison | AllOf | AnyOf"
TRUE: Predicate = AllOf()
FALSE: Predicate = AnyOf()


def comparisons(predicate: Predicate) -> Iterable[Comparison]:
    """Every comparison inside a predicate."""
    if isinstance(predicate, Comparison):
        yield predicate
        return
    for part in predicate.parts:
        yield from comparisons(part)


class Logic:
    """Builds simplified predicates; `index_math` knows the ranges of what they compare."""

    def __init__(self, index_math: IndexMath) -> None:
        self.math = index_math
        self._implied: dict[tuple[Comparison, Comparison], bool] = {}
        self._at_least: dict[Expr, Predicate] = {}
        self._zero: dict[Expr, Predicate] = {}

    # ---- comparisons --------------------------------------------------------------------------

    def at_least_zero(self, expr: Expr) -> Predicate:
        """expr >= 0."""
        expr = sympy.expand(expr)
        found = self._at_least.get(expr)
        if found is None:
            found = self._at_least[expr] = self._build_at_least_zero(expr)
        return found

    def _build_at_least_zero(self, expr: Expr) -> Predicate:
        if expr.is_number:
            return TRUE if expr >= 0 else FALSE
        split = split_extremum(expr)
        if split is not None:
            cases, disjunctive = split
            parts = [self.at_least_zero(case) for case in cases]
            return self.any_of(parts) if disjunctive else self.all_of(parts)
        terms = linear_terms(expr)
        common = sympy.igcd(0, 0, *(c for atom, c in terms.items() if atom != 1))
        if common > 1:
            expr = sympy.Add(*(c // common * atom for atom, c in terms.items()))
        undivided = self._undivided(expr)
        if undivided is not None:
            return self.at_least_zero(undivided)
        if self.math.nonnegative(expr):
            return TRUE
        if self.math.nonnegative(-expr - 1):
            return FALSE
        flag = self._flag(expr)
        if flag is not None:
            # Neither always nor never: a flag with coefficient 1 must be set, with -1 clear.
            return Comparison("!=" if linear_terms(expr)[flag] > 0 else "==", flag)
        return Comparison(">=", expr)

    def _undivided(self, expr: Expr) -> Expr | None:
        """x // d + c >= 0 as x + c * d >= 0 and c - x // d >= 0 as (c + 1) * d - 1 - x >= 0, for sizes c and d."""
        quotients = [term for term in linear_terms(expr).items() if isinstance(term[0], FloorDiv)]
        if len(quotients) != 1 or abs(quotients[0][1]) != 1:
            return None
        (quotient, sign), (numerator, divisor) = quotients[0], quotients[0][0].args
        rest = expr - sign * quotient
        if not self.math.is_size(rest) or self.math.is_size(quotient) or not self.math.nonnegative(divisor - 1):
            return None
        return numerator + rest * divisor if sign > 0 else (rest + 1) * divisor - 1 - numerator

    def is_zero(self, expr: Expr) -> Predicate:
        """expr == 0."""
        expr = sympy.expand(expr)
        found = self._zero.get(expr)
        if found is None:
            found = self._zero[expr] = self._build_is_zero(expr)
        return found

    def _build_is_zero(self, expr: Expr) -> Predicate:
        if expr.is_number:
            return TRUE if expr == 0 else FALSE
        terms = linear_terms(expr)
        common = sympy.igcd(0, 0, *(c for atom, c in terms.items() if atom != 1))
        if terms.get(ONE, 0) % common != 0:
            return FALSE
        expr = sympy.Add(*(c // common * atom for atom, c in terms.items()))
        if expr.could_extract_minus_sign():
            expr = sympy.expand(-expr)
        if self.math.nonnegative(expr - 1) or self.math.nonnegative(-expr - 1):
            return FALSE
        above, below = self.math.nonnegative(expr), self.math.nonnegative(-expr)
        if above and below:
            return TRUE
        flag = self._flag(expr)
        if flag is not None:
            return Comparison("==" if linear_terms(expr).get(ONE, ZERO) == 0 else "!=", flag)
        if (above or below) and not leaf_reads(expr) and not expr.has(Mod, PythonMod):
            # An index at the edge of its range: an inequality says it, and inequalities merge.
            return self.at_least_zero(-expr if above else expr)
        return Comparison("==", expr)

    def _flag(self, expr: Expr) -> Expr | None:
        """x of an expression +-x + constant, x being an entry of a 0/1 tensor."""
        atoms = [atom for atom in linear_terms(expr) if atom != 1]
        return atoms[0] if len(atoms) == 1 and self.is_flag(atoms[0]) else None

    def is_flag(self, expr: Expr) -> bool:
        """Whether an expression is one entry of a 0/1 tensor."""
        return is_leaf_read(expr) and self.math.bounds(expr) == (ZERO, ONE)

    def at_most(self, left: Expr, right: Expr) -> Predicate:
        """left <= right."""
        return self.at_least_zero(right - left)

    def is_set(self, flag: Expr) -> Predicate:
        """Whether an integer is not 0."""
        return self.negate(self.is_zero(flag))

    # ---- connectives --------------------------------------------------------------------------

    def negate(self, predicate: Predicate) -> Predicate:
        """Exactly the other positions."""
        if isinstance(predicate, Comparison):
            if predicate.relation == ">=":
                return self.at_least_zero(-predicate.expr - 1)
            return Comparison("!=" if predicate.relation == "==" else "==", predicate.expr)
        parts = tuple(self.negate(part) for part in predicate.parts)
        return AnyOf(parts) if isinstance(predicate, AllOf) else AllOf(parts)

    def any_of(self, parts: Iterable[Predicate]) -> Predicate:
        """The disjunction."""
        return self.negate(self.all_of([self.negate(part) for part in parts]))

    def all_of(self, parts: Iterable[Predicate]) -> Predicate:
        """The conjunction: what other parts imply is dropped, what they contradict makes it false."""
        pending = list(parts)
        units: list[Comparison] = []
        clauses: list[AnyOf] = []
        while pending:
            for part in pending:
                for piece in part.parts if isinstance(part, AllOf) else (part,):
                    if isinstance(piece, AnyOf):
                        clauses.append(piece)
                    elif isinstance(piece, AllOf):
                        raise AssertionError("conjunctions are flat")
                    elif not self._add_unit(units, piece):
                        return FALSE
            pending, kept = [], []
            for clause in clauses:
                reduced = self._under(units, clause)
                if isinstance(reduced, AnyOf):
                    if not reduced.parts:
                        return FALSE
                    kept.append(reduced)
                else:
                    pending.append(reduced)
            clauses = kept
        clauses = [c for i, c in enumerate(clauses) if not _subsumed(c, clauses[:i], clauses[i + 1 :])]
        joined: tuple[Predicate, ...] = (*units, *clauses)
        return joined[0] if len(joined) == 1 else AllOf(joined)

    def _add_unit(self, units: list[Comparison], new: Comparison) -> bool:
        """Adds a comparison to those that hold together; false when they contradict one another."""
        opposite = self.negate(new)
        for old in units:
            if self.implies(old, new):
                return True
            if isinstance(opposite, Comparison) and self.implies(old, opposite):
                return False
        units[:] = [old for old in units if not self.implies(new, old)]
        for old in list(units):
            if old.relation == new.relation == ">=" and sympy.expand(old.expr + new.expr) == 0:
                units.remove(old)
                both = self.is_zero(new.expr)
                return isinstance(both, Comparison) and self._add_unit(units, both)
            # e != 0 together with e >= 0 is e - 1 >= 0.
            edge, bound = (new, old) if new.relation == "!=" else (old, new)
            if edge.relation != "!=" or bound.relation != ">=":
                continue
            for expr in (edge.expr, -edge.expr):
                if sympy.expand(expr - bound.expr) == 0:
                    units.remove(old)
                    tight = self.at_least_zero(bound.expr - 1)
                    return tight == TRUE or (isinstance(tight, Comparison) and self._add_unit(units, tight))
        units.append(new)
        return True

    def _under(self, units: list[Comparison], predicate: Predicate) -> Predicate:
        """The predicate, simplified where all `units` hold."""
        if isinstance(predicate, Comparison):
            opposite = self.negate(predicate)
            for unit in units:
                if self.implies(unit, predicate):
                    return TRUE
                if isinstance(opposite, Comparison) and self.implies(unit, opposite):
                    return FALSE
            return self._at_edge(units, predicate)
        parts = [self._under(units, part) for part in predicate.parts]
        if parts == list(predicate.parts):
            return predicate
        return self.all_of(parts) if isinstance(predicate, AllOf) else self.any_of(parts)

    def _at_edge(self, units: list[Comparison], predicate: Comparison) -> Predicate:
        """e == 0 where e <= 0 is known is e >= 0, and so on: inequalities nest where equalities do not."""
        if predicate.relation == ">=":
            return predicate
        for expr in (predicate.expr, sympy.expand(-predicate.expr)):
            if any(self.implies(unit, Comparison(">=", expr)) for unit in units):
                return self.at_least_zero(expr - 1 if predicate.relation == "!=" else -expr)
        return predicate

    def implies(self, known: Comparison, wanted: Comparison) -> bool:
        """Whether `known` proves `wanted`."""
        if known == wanted:
            return True
        key = (known, wanted)
        found = self._implied.get(key)
        if found is None:
            found = self._implied[key] = self._prove_implied(known, wanted)
        return found

    def _prove_implied(self, known: Comparison, wanted: Comparison) -> bool:
        if not (linear_terms(known.expr).keys() & linear_terms(wanted.expr).keys()) - {ONE}:
            return False
        nonnegative = self.math.nonnegative
        forms = {">=": [known.expr], "==": [known.expr, -known.expr], "!=": []}[known.relation]
        if wanted.relation == ">=":
            return any(nonnegative(wanted.expr - form) for form in forms)
        if wanted.relation == "==":
            return known.relation == "==" and any(sympy.expand(wanted.expr - form) == 0 for form in forms)
        if known.relation == "!=":
            return sympy.expand(known.expr - wanted.expr) == 0 or sympy.expand(known.expr + wanted.expr) == 0
        return any(nonnegative(sign * wanted.expr - form - 1) for form in forms for sign in (1, -1))

    def choose(self, condition: Predicate, then: Predicate, otherwise: Predicate) -> Predicate:
        """`then` where the condition holds, `otherwise` elsewhere."""
        return self.all_of([self.any_of([self.negate(condition), then]), self.any_of([condition, otherwise])])

    def same(self, left: Predicate, right: Predicate) -> Predicate:
        """Whether both hold or neither does."""
        return self.choose(left, right, self.negate(right))

    def substitute(self, predicate: Predicate, values: dict[Expr, Expr]) -> Predicate:
        """The predicate with index variables replaced."""
        if isinstance(predicate, Comparison):
            expr = predicate.expr.subs(values, simultaneous=True)
            if predicate.relation == ">=":
                return self.at_least_zero(expr)
            return self.is_zero(expr) if predicate.relation == "==" else self.is_set(expr)
        parts = [self.substitute(part, values) for part in predicate.parts]
        return self.all_of(parts) if isinstance(predicate, AllOf) else self.any_of(parts)

    def pinned(self, guard: Predicate) -> dict[Expr, Expr]:
        """Index variables for which the guard leaves one value, with that value."""
        limits: dict[Expr, tuple[list[Expr], list[Expr]]] = {}
        for unit in guard.parts if isinstance(guard, AllOf) else (guard,):
            if not isinstance(unit, Comparison) or unit.relation == "!=":
                continue
            terms = linear_terms(unit.expr)
            variables = [atom for atom in terms if atom in self.math.ranges]
            if len(variables) != 1 or abs(terms[variables[0]]) != 1:
                continue
            variable, sign = variables[0], terms[variables[0]]
            value = sympy.expand((sign * variable - unit.expr) * sign)
            if not self.math.is_size(value):
                continue
            low, high = self.math.ranges[variable]
            lows, highs = limits.setdefault(variable, ([low], [high]))
            if unit.relation == "==" or sign > 0:
                lows.append(value)
            if unit.relation == "==" or sign < 0:
                highs.append(value)
        return {
            variable: low
            for variable, (lows, highs) in limits.items()
            for low, high in itertools.product(lows, highs)
            if sympy.expand(low - high) == 0
        }

    def clauses(self, predicate: Predicate) -> list[tuple[Comparison, ...]] | None:
        """The predicate as a conjunction of disjunctions of comparisons; None when there are too many."""
        spread = self._distribute(predicate)
        if spread is None:
            return None
        result = spread
        while True:
            joined = self.all_of([self.any_of(clause) for clause in result])
            result = []
            for clause in joined.parts if isinstance(joined, AllOf) else (joined,):
                literals = (clause,) if isinstance(clause, Comparison) else clause.parts
                if not all(isinstance(literal, Comparison) for literal in literals):
                    return None
                result.append(tuple(literal for literal in literals if isinstance(literal, Comparison)))
            shorter = self._resolved(result)
            if shorter == result:
                return self._without_consensus(result)
            result = shorter

    def _resolved(self, clauses: list[tuple[Comparison, ...]]) -> list[tuple[Comparison, ...]]:
        """(x or a) and (not x or a or b) as (x or a) and (a or b)."""
        clauses = list(clauses)
        for one, two in itertools.permutations(range(len(clauses)), 2):
            for pivot in clauses[one]:
                opposite = self.negate(pivot)
                if opposite in clauses[two] and set(clauses[one]) - {pivot} <= set(clauses[two]):
                    clauses[two] = tuple(literal for literal in clauses[two] if literal != opposite)
        return clauses

    def _distribute(self, predicate: Predicate) -> list[tuple[Comparison, ...]] | None:
        if isinstance(predicate, Comparison):
            return [(predicate,)]
        inner = [self._distribute(part) for part in predicate.parts]
        known = [part for part in inner if part is not None]
        if len(known) < len(inner):
            return None
        if isinstance(predicate, AllOf):
            return list(itertools.chain.from_iterable(known))
        if math.prod(len(part) for part in known) > MAX_CLAUSES:
            return None
        return [tuple(itertools.chain(*choice)) for choice in itertools.product(*known)]

    def _without_consensus(self, clauses: list[tuple[Comparison, ...]]) -> list[tuple[Comparison, ...]]:
        """Drops a clause that two others imply: (x or a) and (not x or b) imply (a or b)."""

        def redundant(clause: tuple[Comparison, ...], others: list[tuple[Comparison, ...]]) -> bool:
            held = set(clause)
            for one, two in itertools.permutations(others, 2):
                for pivot in one:
                    rest = self.negate(pivot)
                    if rest in two and ((set(one) - {pivot}) | (set(two) - {rest})) <= held:
                        return True
            return False

        kept = list(clauses)
        for clause in clauses:
            others = [other for other in kept if other is not clause]
            if len(clause) > 1 and redundant(clause, others):
                kept = others
        return kept


def _subsumed(clause: AnyOf, earlier: list[AnyOf], later: list[AnyOf]) -> bool:
    """Whether another clause has only parts of this one; of equal ones the first stays."""
    parts = set(clause.parts)
    return any(set(other.parts) <= parts for other in earlier) or any(set(other.parts) < parts for other in later)
