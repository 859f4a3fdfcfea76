"""Writes expressions and predicates in the language of `s2o_inductor.mask_spec`."""

from __future__ import annotations

from collections.abc import Callable

import sympy
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from s2o_inductor.passes.index_math import MAXIMA, MINIMA, ZERO, Expr, is_leaf_read, linear_terms
from s2o_inductor.passes.predicates import AllOf, Comparison, Logic, Predicate

# Binding strength, as in Python.
_SUM, _PRODUCT, _ATOM = 1, 2, 3
_Text = tuple[str, int]


class Unwritable(Exception):
    """An expression has no text in the language; the message says why."""


class Writer:
    """Writes text and numbers the leaves and parameters that it needs.

    Args:
        logic: negates predicates and knows index ranges.
        leaf_nodes: the tensor node behind every leaf name.
        leaf_sizes: the shape of such a node.
        find_size: (node, factor, offset) with symbol = factor * node + offset, or None, for a size.

    Attributes:
        leaves: the nodes of L0, L1, ...
        params: the nodes of p0, p1, ...
    """

    def __init__(
        self,
        logic: Logic,
        leaf_nodes: dict[str, fx.Node],
        leaf_sizes: Callable[[fx.Node], tuple[Expr, ...]],
        find_size: Callable[[Expr], tuple[fx.Node, int, int] | None],
    ) -> None:
        self.logic, self.math = logic, logic.math
        self.leaf_nodes, self.leaf_sizes, self.find_size = leaf_nodes, leaf_sizes, find_size
        self.leaves: list[fx.Node] = []
        self.params: list[fx.Node] = []

    def integer(self, expr: Expr) -> str:
        """An integer expression.

        Raises:
            Unwritable: it uses a size that no node of the graph holds, or a function outside the language.
        """
        return self._write(sympy.expand(expr))[0]

    def predicate(self, predicate: Predicate) -> str:
        """A boolean expression."""
        return self._predicate(predicate)[0]

    # ---- integers -----------------------------------------------------------------------------

    def _write(self, expr: Expr) -> _Text:
        if expr.is_Integer:
            return str(int(expr)), _ATOM if expr >= 0 else _SUM
        if expr.is_Add:
            return self._sum(expr)
        if expr.is_Mul:
            factor, rest = expr.as_coeff_Mul()
            if factor < 0:
                # -a // b is (-a) // b.
                strength = _ATOM if isinstance(-expr, (FloorDiv, Mod, PythonMod)) else _PRODUCT
                return f"-{self._tight(-expr, strength)}", _SUM
            parts = [] if factor == 1 else [str(int(factor))]
            return " * ".join([*parts, *(self._tight(p, _ATOM) for p in sympy.Mul.make_args(rest))]), _PRODUCT
        if expr.is_Symbol:
            return (expr.name, _ATOM) if expr in self.math.ranges else self._size(expr)
        if is_leaf_read(expr):
            return self._leaf(expr), _ATOM
        if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
            return " * ".join([self._tight(expr.base, _ATOM)] * int(expr.exp)), _PRODUCT
        if isinstance(expr, (FloorDiv, Mod, PythonMod)):
            sign = "//" if isinstance(expr, FloorDiv) else "%"
            return f"{self._tight(expr.args[0], _ATOM)} {sign} {self._tight(expr.args[1], _ATOM)}", _PRODUCT
        if isinstance(expr, MAXIMA + MINIMA):
            name = "max" if isinstance(expr, MAXIMA) else "min"
            first, *others = sorted((self._write(part)[0] for part in expr.args), key=lambda text: (len(text), text))
            for text in others:
                first = f"{name}({first}, {text})"
            return first, _ATOM
        raise Unwritable(f"{expr.func.__name__} is not in the mask language")

    def _tight(self, expr: Expr, strength: int) -> str:
        """Text that binds at least that strongly."""
        text, own = self._write(expr)
        return text if own >= strength else f"({text})"

    def _sum(self, expr: Expr) -> _Text:
        terms = [coefficient * atom for atom, coefficient in linear_terms(expr).items()]
        # Index variables and entries first, the constant last; a positive term leads when there is one.
        terms.sort(key=lambda term: (bool(term.is_number), bool(term.as_coeff_Mul()[0] < 0)))
        if terms[0].as_coeff_Mul()[0] < 0 and terms[-1].is_number and terms[-1] > 0:
            terms.insert(0, terms.pop())
        text = self._tight(terms[0], _PRODUCT) if terms[0].as_coeff_Mul()[0] >= 0 else self._write(terms[0])[0]
        for term in terms[1:]:
            negative = term.as_coeff_Mul()[0] < 0
            text += f" - {self._tight(-term, _PRODUCT)}" if negative else f" + {self._tight(term, _PRODUCT)}"
        return text, _SUM

    def _size(self, symbol: Expr) -> _Text:
        found = self.find_size(symbol)
        if found is None:
            raise Unwritable(f"no node of the graph holds the size {symbol}")
        node, factor, offset = found
        if node not in self.params:
            self.params.append(node)
        name = f"p{self.params.index(node)}"
        if factor < 0:
            return f"{offset} - {name}", _SUM
        return (name, _ATOM) if offset == 0 else (f"{name} {'+' if offset > 0 else '-'} {abs(offset)}", _SUM)

    def _leaf(self, read: Expr) -> str:
        node = self.leaf_nodes[read.func.__name__]
        if node not in self.leaves:
            self.leaves.append(node)
        name = f"L{self.leaves.index(node)}"
        places = []
        for place, size in zip(read.args, self.leaf_sizes(node), strict=True):
            # A read that a guard makes irrelevant may lie outside; the kernels refuse such an index.
            inside = self.math.minimum(self.math.maximum(place, ZERO), size - 1)
            places.append(self._write(inside)[0])
        return f"{name}[{', '.join(places)}]" if places else name

    # ---- predicates ---------------------------------------------------------------------------

    def _predicate(self, predicate: Predicate) -> _Text:
        if isinstance(predicate, Comparison):
            return self._comparison(predicate)
        if not predicate.parts:
            return str(isinstance(predicate, AllOf)), _ATOM
        sign = " & " if isinstance(predicate, AllOf) else " | "
        return sign.join(self.enclosed(part) for part in predicate.parts), _SUM

    def enclosed(self, predicate: Predicate) -> str:
        """A predicate as an operand."""
        text, strength = self._predicate(predicate)
        return text if strength == _ATOM else f"({text})"

    def _comparison(self, comparison: Comparison) -> _Text:
        relation, expr = comparison.relation, comparison.expr
        if relation != ">=" and is_leaf_read(expr) and self.math.leaf_ranges[expr.func.__name__] == (0, 1):
            entry = self._leaf(expr)
            if self._is_boolean(expr):
                return (entry if relation == "!=" else f"~{entry}"), _ATOM
        terms = linear_terms(expr)
        left = sympy.Add(*(c * atom for atom, c in terms.items() if c > 0))
        right = sympy.Add(*(-c * atom for atom, c in terms.items() if c < 0))
        if left.is_number:
            left, right, relation = right, left, {">=": "<="}.get(relation, relation)
        return f"{self.integer(left)} {relation} {self.integer(right)}", _SUM

    def _is_boolean(self, read: Expr) -> bool:
        return str(self.leaf_nodes[read.func.__name__].meta["val"].dtype) == "torch.bool"
