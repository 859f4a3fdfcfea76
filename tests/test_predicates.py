"""The proofs under mask lifting, against brute force over all index values."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Max, Min, PythonMod

from s2o_inductor.passes.index_math import IndexMath
from s2o_inductor.passes.mask_text import Writer
from s2o_inductor.passes.predicates import FALSE, TRUE, AllOf, Comparison, Logic, Predicate

QUERIES, KEYS = 5, 7
# Entries of a 0/1 leaf and of one of unknown integers, both read at the key.
FLAGS = (1, 0, 0, 1, 1, 0, 1)
NUMBERS = (3, -2, 0, 7, 7, -5, 1)


_EVALUATE: dict[str, Callable[..., int]] = {
    "Add": lambda *args: sum(args),
    "Mul": lambda *args: math.prod(args),
    "FloorDiv": operator.floordiv,
    "PythonMod": operator.mod,
    "Max": max,
    "Min": min,
    "F": FLAGS.__getitem__,
    "N": NUMBERS.__getitem__,
}


def _worth(expr: Any, place: dict[Any, int]) -> int:
    if expr.is_Integer:
        return int(expr)
    return place[expr] if expr in place else _EVALUATE[expr.func.__name__](*(_worth(x, place) for x in expr.args))


class World:
    """Expressions over q, k, F(k) in {0, 1} and N(k), and their values."""

    def __init__(self) -> None:
        self.math = IndexMath(None)
        self.logic = Logic(self.math)
        self.q = self.math.variable("q", sympy.Integer(QUERIES))
        self.k = self.math.variable("k", sympy.Integer(KEYS))
        flags, numbers = sympy.Function("F", integer=True), sympy.Function("N", integer=True)
        self.math.leaf_ranges = {"F": (sympy.S.Zero, sympy.S.One), "N": (None, None)}
        self.flag, self.number = flags(self.k), numbers(self.k)

    def value(self, expr: Any, q: int, k: int) -> int:
        return _worth(sympy.sympify(expr), {self.q: q, self.k: k})

    def holds(self, predicate: Predicate, q: int, k: int) -> bool:
        if isinstance(predicate, Comparison):
            relation = {">=": operator.ge, "==": operator.eq, "!=": operator.ne}[predicate.relation]
            return bool(relation(self.value(predicate.expr, q, k), 0))
        parts = (self.holds(part, q, k) for part in predicate.parts)
        return all(parts) if isinstance(predicate, AllOf) else any(parts)


def places() -> Iterator[tuple[int, int]]:
    return itertools.product(range(QUERIES), range(KEYS))


# Expressions are drawn as functions of a World, paired with what they must be worth: (build, evaluate).
Drawn = tuple[Callable[[World], Any], Callable[[int, int], int]]
ATOMS: list[Drawn] = [
    (lambda w: w.q, lambda q, k: q),
    (lambda w: w.k, lambda q, k: k),
    (lambda w: w.flag, lambda q, k: FLAGS[k]),
    (lambda w: w.number, lambda q, k: NUMBERS[k]),
]


def _binary(name: str, one: Drawn, two: Drawn) -> Drawn:
    build = {
        "+": lambda w, x, y: x + y,
        "-": lambda w, x, y: sympy.expand(x - y),
        "max": lambda w, x, y: w.math.maximum(x, y),
        "min": lambda w, x, y: w.math.minimum(x, y),
    }[name]
    value: Any = {"+": operator.add, "-": operator.sub, "max": max, "min": min}[name]
    return (lambda w: build(w, one[0](w), two[0](w))), (lambda q, k: value(one[1](q, k), two[1](q, k)))


def _by_number(name: str, one: Drawn, number: int) -> Drawn:
    build = {
        "*": lambda w, x: sympy.expand(x * number),
        "//": lambda w, x: w.math.floor_div(x, sympy.Integer(number)),
        "%": lambda w, x: w.math.remainder(x, sympy.Integer(number)),
        "+": lambda w, x: x + number,
        "abs": lambda w, x: w.math.absolute(x),
    }[name]
    value: Any = {
        "*": operator.mul,
        "//": operator.floordiv,
        "%": operator.mod,
        "+": operator.add,
        "abs": lambda x, _: abs(x),
    }[name]
    return (lambda w: build(w, one[0](w))), (lambda q, k: value(one[1](q, k), number))


EXPRESSIONS: st.SearchStrategy[Drawn] = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.builds(_binary, st.sampled_from("+-") | st.sampled_from(["max", "min"]), inner, inner),
        st.builds(_by_number, st.sampled_from(["*", "//", "%", "+", "abs"]), inner, st.integers(1, 5)),
    ),
    max_leaves=5,
)


@settings(max_examples=250, deadline=None)
@given(EXPRESSIONS)
def test_expressions_bounds_and_proofs(drawn: Drawn) -> None:
    world = World()
    expr = drawn[0](world)
    values = [drawn[1](q, k) for q, k in places()]
    assert [world.value(expr, q, k) for q, k in places()] == values
    low, high = world.math.bounds(expr)
    assert low is None or low <= min(values)
    assert high is None or high >= max(values)
    # A proof speaks of every possible tensor: it must hold for these.
    assert not world.math.nonnegative(expr) or min(values) >= 0


DrawnPredicate = tuple[Callable[[World], Predicate], Callable[[int, int], bool]]


def _comparison(expr: Drawn, is_zero: bool) -> DrawnPredicate:
    if is_zero:
        return (lambda w: w.logic.is_zero(expr[0](w))), (lambda q, k: expr[1](q, k) == 0)
    return (lambda w: w.logic.at_least_zero(expr[0](w))), (lambda q, k: expr[1](q, k) >= 0)


_CONNECTIVES: dict[str, tuple[Callable[[Logic, list[Predicate]], Predicate], Callable[[list[bool]], bool]]] = {
    "all": (lambda logic, parts: logic.all_of(parts), all),
    "any": (lambda logic, parts: logic.any_of(parts), any),
    "not": (lambda logic, parts: logic.negate(parts[0]), lambda values: not values[0]),
    "same": (lambda logic, parts: logic.same(parts[0], parts[-1]), lambda values: values[0] == values[-1]),
    "choose": (
        lambda logic, parts: logic.choose(parts[0], parts[-1], logic.all_of(parts[:-1])),
        lambda values: values[-1] if values[0] else all(values[:-1]),
    ),
}


def _connected(name: str, parts: list[DrawnPredicate]) -> DrawnPredicate:
    build, value = _CONNECTIVES[name]
    return (
        lambda w: build(w.logic, [part[0](w) for part in parts]),
        lambda q, k: value([part[1](q, k) for part in parts]),
    )


PREDICATES: st.SearchStrategy[DrawnPredicate] = st.recursive(
    st.builds(_comparison, EXPRESSIONS, st.booleans()),
    lambda inner: st.builds(_connected, st.sampled_from(sorted(_CONNECTIVES)), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=250, deadline=None)
@given(PREDICATES)
def test_predicates_keep_their_meaning(drawn: DrawnPredicate) -> None:
    world = World()
    predicate = drawn[0](world)
    expected = [drawn[1](q, k) for q, k in places()]
    assert [world.holds(predicate, q, k) for q, k in places()] == expected
    clauses = world.logic.clauses(predicate)
    if clauses is not None and predicate not in (TRUE, FALSE):
        spread = [all(any(world.holds(literal, q, k) for literal in c) for c in clauses) for q, k in places()]
        assert spread == expected
    diagonal = world.logic.substitute(predicate, {world.k: world.q})
    assert [world.holds(diagonal, q, q) for q in range(QUERIES)] == [drawn[1](q, q) for q in range(QUERIES)]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_reshapes(old: list[int], random: Any) -> None:
    """Any factorisation of the same number of elements, with the index as expressions."""
    count = torch.Size(old).numel()
    new, rest = [], count
    while rest > 1 or not new:
        factor = random.choice([f for f in range(1, rest + 1) if rest % f == 0])
        new.append(factor)
        rest //= factor
    index_math = IndexMath(None)
    index = [index_math.variable(f"i{at}", sympy.Integer(size)) for at, size in enumerate(new)]
    place = index_math.reshape_index(index, [sympy.Integer(n) for n in new], [sympy.Integer(n) for n in old])
    assert place is not None
    x = torch.arange(count).reshape(old)
    for at in itertools.product(*map(range, new)):
        values = {variable: i for variable, i in zip(index, at, strict=True) if variable != 0}
        assert x[tuple(int(p.subs(values)) for p in place)] == x.reshape(new)[at]


@pytest.fixture
def sizes() -> tuple[IndexMath, Any, Any]:
    """Two dynamic sizes of at least 2."""
    from torch._dynamo.source import ConstantSource

    shape_env = ShapeEnv()
    make = lambda name, hint: shape_env.create_symbol(hint, ConstantSource(name), dynamic_dim=_dynamic())  # noqa: E731
    return IndexMath(shape_env), make("a", 5), make("b", 11)


def _dynamic() -> Any:
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    return DimDynamic.DYNAMIC


def test_symbolic_sizes(sizes: tuple[IndexMath, Any, Any]) -> None:
    proofs, s, t = sizes
    q, k = proofs.variable("q", s), proofs.variable("k", s + 1)
    assert proofs.nonnegative(s - k) and not proofs.nonnegative(s - 1 - k)
    assert not proofs.nonnegative(q - k) and not proofs.nonnegative(k - q)
    assert proofs.nonnegative(s * t - q * t - t) and not proofs.nonnegative(s * t - q * t - t - 1)
    assert proofs.nonnegative(proofs.maximum(s - 7, sympy.S.Zero) - s + 7)
    assert proofs.equal(proofs.floor_div(q * 4 + 3, sympy.Integer(4)), q)
    assert proofs.reshape_index([q, k], [s, s + 1], [s * (s + 1)]) is not None
    flat = proofs.variable("f", s * t)
    rows = proofs.reshape_index([flat], [s * t], [s, t])
    assert rows is not None
    for at in range(6):
        assert [int(p.subs({flat: at, s: 2, t: 3})) for p in rows] == [at // 3, at % 3]


def test_sizes_are_not_compared_by_their_example_values(sizes: tuple[IndexMath, Any, Any]) -> None:
    """5 < 11 in the example that was traced; nothing guards it."""
    proofs, s, t = sizes
    assert not proofs.nonnegative(t - s) and not proofs.nonnegative(s - t)
    assert not proofs.shape_env.guards
    assert proofs.nonnegative(s - 2) and proofs.nonnegative(s * t - 4)


TEXTS = IndexMath(None)
Q, K = (TEXTS.variable(name, sympy.Integer(41)) for name in "qk")


def expressions() -> st.SearchStrategy[sympy.Expr]:
    """Integer expressions of two positions, as masks are made of."""
    small = st.integers(1, 5).map(sympy.Integer)

    def larger(part: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
        return st.one_of(
            st.builds(operator.add, part, part),
            st.builds(operator.sub, part, part),
            st.builds(operator.mul, part, part),
            st.builds(operator.neg, part),
            st.builds(FloorDiv, part, small),
            st.builds(PythonMod, part, small),
            st.builds(Max, part, part),
            st.builds(Min, part, part),
        )

    return st.recursive(st.sampled_from([Q, K, *map(sympy.Integer, range(-3, 4))]), larger, max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(expressions(), st.integers(0, 40), st.integers(0, 40))
@example(-FloorDiv(Q, sympy.Integer(2)), 3, 0)
@example(-PythonMod(Q + K, sympy.Integer(3)), 3, 1)
def test_text_of_an_expression_means_the_expression(expr: sympy.Expr, q: int, k: int) -> None:
    text = Writer(Logic(TEXTS), {}, lambda node: (), lambda size: None).integer(expr)
    assert eval(text, {"q": q, "k": k, "max": max, "min": min}) == int(expr.subs({Q: q, K: k})), text
