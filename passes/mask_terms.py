"""Sorts the conditions of a mask into the terms of a `MaskSpec`.

A condition is a disjunction of comparisons. One that reads only keys, or only queries, is a key or
row condition whatever it says. One that reads both must be a band (a limit on k - q), an equality of
a query's value and a key's, or an upper limit that a query's value sets on a key's.
"""

from __future__ import annotations

import dataclasses

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from s2o_inductor.mask_spec import MaskSpec
from s2o_inductor.passes.index_math import ZERO, Expr, linear_terms
from s2o_inductor.passes.mask_text import Writer
from s2o_inductor.passes.predicates import FALSE, Comparison, Logic, Predicate

Clause = tuple[Comparison, ...]
# Packed values stay below this, so that int64 holds them.
_LARGEST = 2**62
_LEAST_INT64, _MOST_INT64 = -(2**63), 2**63 - 1


class Dense(Exception):
    """The mask stays a tensor; the message says why."""


@dataclasses.dataclass(frozen=True)
class _Limit:
    """key_value <= query_value, or any_key, or any_query: conditions under which the limit does not apply."""

    query_value: Expr
    key_value: Expr
    any_key: Predicate = FALSE
    any_query: Predicate = FALSE


class Classifier:
    """Collects the terms of one mask. `index` is (b, h, q, k), 0 for a dimension of size 1."""

    def __init__(self, logic: Logic, index: tuple[Expr, Expr, Expr, Expr], writer: Writer) -> None:
        self.logic, self.math, self.writer = logic, logic.math, writer
        self.b, self.h, self.q, self.k = index
        self.lowers: list[Expr] = []
        self.uppers: list[Expr] = []
        self.keys: list[Predicate] = []
        self.rows: list[Predicate] = []
        self.equals: list[tuple[Expr, Expr]] = []
        self.limits: list[_Limit] = []

    def spec(self, predicate: Predicate) -> MaskSpec:
        """The spec that holds exactly where the predicate does; `empty` and `dense` at their defaults.

        Raises:
            Dense: there is none.
        """
        if predicate == FALSE:
            return MaskSpec(keys="False")
        clauses = self.logic.clauses(predicate)
        if clauses is None:
            raise Dense("the mask is too intricate a combination of conditions")
        for clause in clauses:
            self._take(clause)
        self._merge_equals()
        limit = self._merged_limit()
        lower = upper = None
        for bound in self.lowers:
            lower = bound if lower is None else self.math.maximum(lower, bound)
        for bound in self.uppers:
            upper = bound if upper is None else self.math.minimum(upper, bound)
        write = self.writer.integer
        return MaskSpec(
            lower=None if lower is None else write(lower),
            upper=None if upper is None else write(upper),
            keys=self._joined(self.keys),
            rows=self._joined(self.rows),
            equal=None if not self.equals else (write(self.equals[0][0]), write(self.equals[0][1])),
            at_most=None if limit is None else self._limit_text(limit),
        )

    def _joined(self, conditions: list[Predicate]) -> str | None:
        if not conditions:
            return None
        return self.writer.predicate(self.logic.all_of(conditions))

    # ---- one condition ------------------------------------------------------------------------

    def _reads(self, comparison: Comparison) -> tuple[bool, bool]:
        """Whether it depends on the query and on the key."""
        symbols = comparison.expr.free_symbols
        return self.q in symbols, self.k in symbols

    def _take(self, clause: Clause) -> None:
        if any(self.h in literal.expr.free_symbols for literal in clause):
            raise Dense("the mask differs between heads")
        if len(clause) == 1 and self._take_band(clause[0]):
            return
        by_query = [literal for literal in clause if self._reads(literal) == (True, False)]
        mixed = [literal for literal in clause if self._reads(literal) == (True, True)]
        by_key = [literal for literal in clause if not self._reads(literal)[0]]
        if not mixed and not by_query:
            self.keys.append(self.logic.any_of(by_key))
        elif not mixed and not by_key:
            self.rows.append(self.logic.any_of(by_query))
        elif len(clause) == 1:
            self._take_mixed(clause[0])
        else:
            self._take_alternatives(mixed, by_key, by_query, clause)

    def _take_band(self, literal: Comparison) -> bool:
        """k - q against sizes. With one query (or key) its position is 0, and the other alone is a band."""
        terms = linear_terms(literal.expr)
        query, key = terms.get(self.q, 0), terms.get(self.k, 0)
        if literal.relation == "!=" or abs(query) > 1 or abs(key) > 1:
            return False
        if not (query == -key != 0 or (key != 0 and self.q == ZERO) or (query != 0 and self.k == ZERO)):
            return False
        rest = literal.expr - query * self.q - key * self.k
        sign = key if key != 0 else -query
        if not self.math.is_size(rest):
            return False
        # sign * (k - q) + rest relation 0
        bound = sympy.expand(-sign * rest)
        if literal.relation == "==" or sign > 0:
            self.lowers.append(bound)
        if literal.relation == "==" or sign < 0:
            self.uppers.append(bound)
        return True

    def _separate(self, expr: Expr) -> tuple[Expr, Expr] | None:
        """expr = part over (b, q) + part over (b, k), what reads neither going to the query."""
        by_query, by_key = ZERO, ZERO
        for atom, coefficient in linear_terms(expr).items():
            symbols = atom.free_symbols
            if self.q in symbols and self.k in symbols:
                return None
            if self.k in symbols:
                by_key = by_key + coefficient * atom
            else:
                by_query = by_query + coefficient * atom
        return by_query, by_key

    def _take_mixed(self, literal: Comparison) -> None:
        parts = self._separate(literal.expr)
        if parts is not None and literal.relation == ">=":
            self.limits.append(_Limit(parts[0], -parts[1]))
            return
        if literal.relation == "==":
            pair = self._periodic(literal.expr) if parts is None else (parts[0], -parts[1])
            if pair is not None:
                # Either sign will do: the key's side is written as plainly as possible.
                flipped = (sympy.expand(-pair[0]), sympy.expand(-pair[1]))
                self.equals.append(flipped if pair[1].could_extract_minus_sign() else pair)
                return
        raise Dense(f"its condition {_shown((literal,))} is no band, equality or limit between a query and a key")

    def _periodic(self, expr: Expr) -> tuple[Expr, Expr] | None:
        """(q + k) % m == c as an equality of remainders."""
        terms = linear_terms(expr)
        atoms = [atom for atom in terms if atom != 1]
        if len(atoms) != 1 or not isinstance(atoms[0], (Mod, PythonMod)) or abs(terms[atoms[0]]) != 1:
            return None
        inner, period = atoms[0].args
        parts = self._separate(sympy.expand(inner))
        target = -terms.get(sympy.S.One, ZERO) * terms[atoms[0]]  # (query part + key part) % period == target
        if parts is None or not (self.math.is_size(period) and self.math.nonnegative(period - 1)):
            return None
        if not (self.math.nonnegative(target) and self.math.nonnegative(period - 1 - target)):
            return None
        by_query, by_key = target - parts[0], parts[1]
        if by_key.could_extract_minus_sign():
            by_query, by_key = -by_query, -by_key
        return self.math.remainder(sympy.expand(by_query), period), self.math.remainder(sympy.expand(by_key), period)

    def _take_alternatives(
        self, mixed: list[Comparison], by_key: list[Comparison], by_query: list[Comparison], clause: Clause
    ) -> None:
        """A disjunction of limits that nest: the greatest of the queries' values, or the least of the keys'.

        Alternatives that read one side only lift the limit for the keys (queries) that they choose.
        """
        if not mixed:
            # 0 <= -1 never holds.
            self.limits.append(_Limit(sympy.Integer(-1), ZERO, self.logic.any_of(by_key), self.logic.any_of(by_query)))
            return
        limit: tuple[Expr, Expr] | None = None
        for literal in mixed:
            pair = self._limit_of(literal)
            limit = pair if limit is None else None if pair is None else self._wider(limit, pair)
            if pair is None or limit is None:
                raise Dense(f"its condition {_shown(clause)} is an alternative that no limit on keys expresses")
        assert limit is not None
        free: tuple[list[Predicate], list[Predicate]] = ([], [])
        for side, literals in enumerate((by_key, by_query)):
            for literal in literals:
                pair = self._limit_of(literal)
                wider = None if pair is None else self._wider(limit, pair)
                if wider is None:
                    free[side].append(literal)
                else:
                    limit = wider
        self.limits.append(_Limit(*limit, self.logic.any_of(free[0]), self.logic.any_of(free[1])))

    def _limit_of(self, literal: Comparison) -> tuple[Expr, Expr] | None:
        """(query value, key value) of a literal that says key value <= query value."""
        parts = self._separate(literal.expr) if literal.relation == ">=" else None
        return None if parts is None else (parts[0], sympy.expand(-parts[1]))

    def _wider(self, one: tuple[Expr, Expr], two: tuple[Expr, Expr]) -> tuple[Expr, Expr] | None:
        """The limit that holds where either does, when they share the key's or the query's value."""
        shift = sympy.expand(two[1] - one[1])
        if self.math.is_size(shift):
            return self.math.maximum(one[0], sympy.expand(two[0] - shift)), one[1]
        shift = sympy.expand(two[0] - one[0])
        if self.math.is_size(shift):
            return one[0], self.math.minimum(one[1], sympy.expand(two[1] - shift))
        return None

    # ---- several conditions of one kind -------------------------------------------------------

    def _merged_limit(self) -> _Limit | None:
        """One limit that says what all say: the least of the queries' values, or the greatest of the keys'."""
        merged: list[_Limit] = []
        for limit in self.limits:
            for at, other in enumerate(merged):
                if (limit.any_key, limit.any_query) != (other.any_key, other.any_query):
                    continue
                shift = sympy.expand(limit.key_value - other.key_value)
                if self.math.is_size(shift):
                    least = self.math.minimum(other.query_value, sympy.expand(limit.query_value - shift))
                    merged[at] = dataclasses.replace(other, query_value=least)
                    break
                shift = sympy.expand(limit.query_value - other.query_value)
                if self.math.is_size(shift):
                    most = self.math.maximum(other.key_value, sympy.expand(limit.key_value - shift))
                    merged[at] = dataclasses.replace(other, key_value=most)
                    break
            else:
                merged.append(limit)
        if len(merged) > 1:
            raise Dense(f"{len(merged)} of its conditions limit keys by different values of the query")
        return merged[0] if merged else None

    def _limit_text(self, limit: _Limit) -> tuple[str, str]:
        """Both sides, with the least (greatest) possible value where the key (query) needs no limit."""
        write, enclosed, negate = self.writer.integer, self.writer.enclosed, self.logic.negate
        if limit.key_value == ZERO and limit.query_value == -1:
            return self.writer.predicate(limit.any_query), self.writer.predicate(negate(limit.any_key))
        query_side, key_side = write(limit.query_value), write(limit.key_value)
        least, most = self.math.bounds(limit.query_value)[0], self.math.bounds(limit.key_value)[1]
        most = sympy.Integer(_MOST_INT64) if most is None else most
        least = sympy.Integer(_LEAST_INT64) if least is None else least
        if FALSE not in (limit.any_key, limit.any_query):
            least = self.math.minimum(least, most)  # a free key is below a free query, too
        if limit.any_key != FALSE:
            limited, free = enclosed(negate(limit.any_key)), enclosed(limit.any_key)
            key_side = f"{limited} * ({key_side}) + {free} * ({write(least)})"
        if limit.any_query != FALSE:
            limited, free = enclosed(negate(limit.any_query)), enclosed(limit.any_query)
            query_side = f"{limited} * ({query_side}) + {free} * ({write(most)})"
        return query_side, key_side

    def _merge_equals(self) -> None:
        """One equality that says what all say, by packing their values into one integer."""
        if len(self.equals) < 2:
            return
        if self._pack_equals():
            return
        # Below the diagonal a value that never falls is the same exactly where the key's is not less.
        causal = any(self.math.nonnegative(-upper) for upper in self.uppers)
        remaining = []
        for query_value, key_value in self.equals:
            if causal and not self.limits and self._never_falls(query_value, key_value):
                self.limits.append(_Limit(-query_value, -key_value))
            else:
                remaining.append((query_value, key_value))
        self.equals = remaining
        if len(remaining) > 1 and not self._pack_equals():
            raise Dense(f"{len(remaining)} equalities between queries and keys do not fit into one")

    def _pack_equals(self) -> bool:
        packed_query, packed_key, count = ZERO, ZERO, sympy.S.One
        for query_value, key_value in self.equals:
            (low, high), (key_low, key_high) = self.math.bounds(query_value), self.math.bounds(key_value)
            if low is None or high is None or key_low is None or key_high is None:
                return False
            low, high = self.math.minimum(low, key_low), self.math.maximum(high, key_high)
            packed_query = packed_query + count * (query_value - low)
            packed_key = packed_key + count * (key_value - low)
            count = sympy.expand(count * (high - low + 1))
            most = self.math.numeric_bounds(count)[1]
            if most is None or most > _LARGEST:
                return False
        self.equals = [(sympy.expand(packed_query), sympy.expand(packed_key))]
        return True

    def _never_falls(self, query_value: Expr, key_value: Expr) -> bool:
        """Whether both sides are one function of the position that never falls."""
        if self.q == ZERO or self.k == ZERO or sympy.expand(key_value.subs(self.k, self.q) - query_value) != 0:
            return False

        def rises(expr: Expr) -> bool:
            for atom, coefficient in linear_terms(expr).items():
                if self.k not in atom.free_symbols:
                    continue
                if coefficient < 0 or (atom != self.k and not isinstance(atom, FloorDiv)):
                    return False
                if isinstance(atom, FloorDiv) and (
                    self.k in atom.args[1].free_symbols
                    or not self.math.nonnegative(atom.args[1] - 1)
                    or not rises(sympy.expand(atom.args[0]))
                ):
                    return False
            return True

        return rises(key_value)


def _shown(clause: Clause) -> str:
    """A condition for a message."""
    texts = [f"{literal.expr} {literal.relation} 0" for literal in clause]
    return "'" + " or ".join(texts) + "'"
