"""Rules for operators that compute: arithmetic, comparisons, connectives, sums. See `mask_moves`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from s2o_inductor.passes.index_math import ZERO, Expr
from s2o_inductor.passes.mask_moves import Arguments, Index, axis, replaced, rule
from s2o_inductor.passes.mask_values import Cases, Unreadable, Value, atoms_of

if TYPE_CHECKING:
    from s2o_inductor.passes.mask_reader import Reader

# Reductions over at most this many entries are written out.
MAX_REDUCED = 8


def _name(node: fx.Node) -> str:
    assert isinstance(node.target, OpOverload)
    return str(node.target._schema.name).removeprefix("aten::").strip("_")


# ---- elementwise ----------------------------------------------------------------------------------


@rule("_to_copy", "to", "prims::convert_element_type", "prims::device_put")
def _cast(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return r.values.convert(r.broadcast(a["self"] if "self" in a else a["a"], index), r.dtype(node))


@rule("add", "sub", "rsub")
def _add(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dtype = r.dtype(node)
    if dtype == torch.bool:
        return r.logic.any_of([r.flag(a["self"], index), r.flag(a["other"], index)])
    left, right = r.operand(a["self"], index, dtype), r.operand(a["other"], index, dtype)
    name = _name(node)
    if name == "rsub":
        left, right, name = right, left, "sub"
    if a["alpha"] != 1:
        right = r.values.arithmetic("mul", dtype, right, r.operand(a["alpha"], index, dtype))
    return r.values.arithmetic(name, dtype, left, right)


@rule("mul", "maximum", "minimum", "remainder", "floor_divide", "div")
def _binary(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dtype = r.dtype(node)
    name = _name(node)
    if dtype == torch.bool:
        join = r.logic.any_of if name == "maximum" else r.logic.all_of
        return join([r.flag(a["self"], index), r.flag(a["other"], index)])
    left, right = r.operand(a["self"], index, dtype), r.operand(a["other"], index, dtype)
    if name == "div":
        mode = a.get("rounding_mode")
        positive = all(not isinstance(x, float) and r.math.nonnegative(x) for _, x in left.parts)
        if mode == "trunc" and not positive:
            raise Unreadable("it rounds a negative quotient towards zero")
        name = "true_divide" if mode is None else "floor_div"
    return r.values.arithmetic("floor_div" if name == "floor_divide" else name, dtype, left, right)


@rule("neg", "abs")
def _unary(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dtype = r.dtype(node)
    name = _name(node)
    return r.values.arithmetic(name, dtype, r.operand(a["self"], index, dtype))


@rule("clamp", "clamp_min", "clamp_max")
def _clamp(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dtype = r.dtype(node)
    value = r.operand(a["self"], index, dtype)
    for name, limit in (("maximum", a.get("min")), ("minimum", a.get("max"))):
        if limit is not None:
            value = r.values.arithmetic(name, dtype, value, r.operand(limit, index, dtype))
    return value


_RELATIONS = {"le": "<=", "lt": "<", "ge": ">=", "gt": ">", "eq": "==", "ne": "!="}


@rule(*_RELATIONS)
def _compare(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    relation = _RELATIONS[node.target._schema.name.removeprefix("aten::")]  # type: ignore[union-attr]
    dtype = r.common_dtype(a["self"], a["other"])
    if dtype != torch.bool:
        return r.values.compare(relation, r.operand(a["self"], index, dtype), r.operand(a["other"], index, dtype))
    left, right = r.flag(a["self"], index), r.flag(a["other"], index)
    numbers = r.values.number(left), r.values.number(right)
    if relation in ("==", "!=") and any(number.single is None for number in numbers):
        return r.logic.same(left, right if relation == "==" else r.logic.negate(right))
    return r.values.compare(relation, *numbers)


@rule("logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__")
def _connective(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    if r.dtype(node) != torch.bool:
        raise Unreadable("it combines the bits of integers")
    left, right = r.flag(a["self"], index), r.flag(a["other"], index)
    name = _name(node)
    if "xor" in name:
        return r.logic.same(left, r.logic.negate(right))
    return (r.logic.all_of if "and" in name else r.logic.any_of)([left, right])


@rule("logical_not", "bitwise_not")
def _not(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    if r.dtype(node) != torch.bool:
        raise Unreadable("it combines the bits of integers")
    return r.logic.negate(r.flag(a["self"], index))


# ---- sums -----------------------------------------------------------------------------------------


@rule("cumsum")
def _cumsum(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    """Of entries that do not depend on the dimension; others are leaves."""
    if not index:
        return r.operand(a["self"], index, r.dtype(node))
    dim = axis(a["dim"], len(index))
    running = r.running(node, dim, r.sizes(node)[dim])
    entry = r.operand(a["self"], replaced(index, dim, running), r.dtype(node))
    return _times(r, entry, running, index[dim] + 1, r.dtype(node))


def _times(r: Reader, entry: Cases, running: Expr, count: Expr, dtype: torch.dtype) -> Value:
    """The sum of `count` entries that do not depend on `running`."""
    if any(running in expr.free_symbols for expr in atoms_of(entry)):
        raise Unreadable("it sums entries that differ")
    return r.values.arithmetic("mul", dtype, entry, r.values.constant(r.values.exact(count, dtype)))


@rule("sum", "any", "all")
def _reduce(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    source, sizes, name = a["self"], r.sizes(a["self"]), _name(node)
    dims = a.get("dim")
    dims = list(range(len(sizes))) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    reduced: Sequence[int] = sorted(axis(dim, len(sizes)) for dim in dims)
    outer = iter(index if not a.get("keepdim", False) else [i for d, i in enumerate(index) if d not in reduced])
    place = [ZERO if dim in reduced else next(outer) for dim in range(len(sizes))]
    counts = [sizes[dim] for dim in reduced]
    if all(count.is_Integer for count in counts) and math.prod(map(int, counts)) <= MAX_REDUCED:
        entries = []
        for choice in itertools.product(*(range(int(count)) for count in counts)):
            for dim, at in zip(reduced, choice, strict=True):
                place[dim] = sympy.Integer(at)
            entries.append(r.read(source, place))
        if name != "sum":
            join = r.logic.any_of if name == "any" else r.logic.all_of
            return r.values.convert(join(r.values.truth(entry) for entry in entries), r.dtype(node))
        if r.dtype(node).is_floating_point and len(entries) > 2:
            raise Unreadable("it sums floating-point values in an order of its own")
        total = r.values.constant(ZERO)
        for entry in entries:
            number = r.values.convert(entry, r.dtype(node))
            assert isinstance(number, Cases)
            total = r.values.arithmetic("add", r.dtype(node), total, number)
        return total
    if len(reduced) != 1:
        raise Unreadable("it reduces several dimensions")
    place[reduced[0]] = running = r.running(node, reduced[0], counts[0])
    entry = r.read(source, place)
    if name == "sum":
        return _times(r, r.operand(source, tuple(place), r.dtype(node)), running, counts[0], r.dtype(node))
    if any(running in expr.free_symbols for expr in atoms_of(entry)) or not r.math.nonnegative(counts[0] - 1):
        raise Unreadable("it reduces entries that differ")
    return r.values.convert(r.values.truth(entry), r.dtype(node))
