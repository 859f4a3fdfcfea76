"""Rules for operators that make, move and paste entries, by which `mask_reader` follows masks through a graph.

A rule gets the node, its arguments by name and an index into its result, and answers with the value
there, read from the operands. Rules raise `Unreadable` for what they do not cover.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from s2o_inductor.passes.index_math import ONE, ZERO, Expr
from s2o_inductor.passes.mask_values import Unreadable, Value, from_python
from s2o_inductor.passes.predicates import FALSE, TRUE, Predicate

if TYPE_CHECKING:
    from s2o_inductor.passes.mask_reader import Reader

Index = tuple[Expr, ...]
Arguments = dict[str, Any]
Rule = Callable[["Reader", fx.Node, Arguments, Index], Value]

# How torch spells "to the end" of a slice.
_END = 2**63 - 1

RULES: dict[str, Rule] = {}
# Operators that only move entries: a leaf is better taken behind them, where other readers find it too.
LOOKED_THROUGH: set[str] = set()


def rule(*names: str, moves: bool = False) -> Callable[[Rule], Rule]:
    """Registers a rule for operators by schema name, without overload."""

    def register(function: Rule) -> Rule:
        for name in names:
            full = name if "::" in name else f"aten::{name}"
            RULES[full] = function
            if moves:
                RULES[f"{full}_copy"] = function  # what functionalisation of views makes of it
                LOOKED_THROUGH.update((full, f"{full}_copy"))
        return function

    return register


def axis(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def replaced(index: Index, dim: int, value: Expr) -> Index:
    return (*index[:dim], value, *index[dim + 1 :])


# ---- constants and index tensors ------------------------------------------------------------------


@rule("arange", "prims::iota")
def _arange(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    start, step = (r.integer(a.get(name, default)) for name, default in (("start", 0), ("step", 1)))
    return r.values.constant(r.values.exact(sympy.expand(start + step * index[0]), r.dtype(node)))


@rule("full", "full_like", "new_full", "scalar_tensor")
def _full(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    value = a["fill_value"] if "fill_value" in a else a["s"]
    return r.values.convert(r.values.constant(r.scalar(value)), r.dtype(node))


@rule("ones", "ones_like", "new_ones")
def _ones(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return r.values.convert(r.values.constant(ONE), r.dtype(node))


@rule("zeros", "zeros_like", "new_zeros")
def _zeros(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return r.values.convert(r.values.constant(ZERO), r.dtype(node))


@rule("eye")
def _eye(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return r.values.convert(r.logic.is_zero(index[0] - index[1]), r.dtype(node))


@rule("lift_fresh_copy", "lift_fresh", "lift", moves=True)
def _lifted_constant(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    """`torch.tensor(0.0)` in traced code: a constant that the graph owns and nothing else can reach."""
    source = a["self"]
    module = source.graph.owning_module
    held = getattr(module, source.target, None) if source.op == "get_attr" and module is not None else None
    if not isinstance(held, torch.Tensor) or held.numel() != 1 or isinstance(held, torch._subclasses.FakeTensor):
        return r.read(source, index)
    with _disable_current_modes():
        return r.values.convert(r.values.constant(from_python(held.item())), r.dtype(node))


# ---- movement -------------------------------------------------------------------------------------


@rule("clone", "alias", "detach", "contiguous", "prims::view_of", moves=True)
def _same(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return r.read(a["self"] if "self" in a else a["a"], index)


@rule("expand", moves=True)
def _expand(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return r.broadcast(a["self"], index)


@rule("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten", moves=True)
def _reshape(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    place = r.math.reshape_index(index, r.sizes(node), r.sizes(a["self"]))
    if place is None:
        raise Unreadable("its reshape is not understood")
    return r.read(a["self"], place)


@rule("permute", moves=True)
def _permute(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    place = [ZERO] * len(index)
    for out, dim in enumerate(a["dims"]):
        place[axis(dim, len(index))] = index[out]
    return r.read(a["self"], place)


@rule("transpose", "t", moves=True)
def _transpose(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    place = list(index)
    if len(place) > 1:
        one, two = (axis(a.get(name, default), len(place)) for name, default in (("dim0", 0), ("dim1", 1)))
        place[one], place[two] = place[two], place[one]
    return r.read(a["self"], place)


def _slice_limits(r: Reader, a: Arguments, size: Expr) -> tuple[Expr, Expr]:
    """start and end of a slice within [0, size]."""

    def limit(argument: Any, default: Expr) -> Expr:
        if argument is None or (isinstance(argument, int) and argument >= _END):
            return default
        value = r.integer(argument)
        if r.math.nonnegative(-value - 1):
            return r.math.maximum(value + size, ZERO)
        if not r.math.nonnegative(value):
            raise Unreadable("it slices from a position of unknown sign")
        return r.math.minimum(value, size)

    return limit(a["start"], ZERO), limit(a["end"], size)


@rule("slice", moves=True)
def _slice(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dim = axis(a["dim"], len(index))
    start, _ = _slice_limits(r, a, r.sizes(a["self"])[dim])
    return r.read(a["self"], replaced(index, dim, start + r.integer(a["step"]) * index[dim]))


@rule("select", moves=True)
def _select(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dim = axis(a["dim"], len(index) + 1)
    return r.read(a["self"], (*index[:dim], _wrapped(r, r.integer(a["index"]), r.sizes(a["self"])[dim]), *index[dim:]))


def _wrapped(r: Reader, position: Expr, size: Expr) -> Expr:
    """A position that may count from the end, as one from the start."""
    if r.math.nonnegative(position):
        return position
    if r.math.nonnegative(-position - 1):
        return position + size
    raise Unreadable("it reads at a position of unknown sign")


@rule("flip", "prims::rev", moves=True)
def _flip(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    place, sizes = list(index), r.sizes(node)
    for dim in (axis(dim, len(index)) for dim in a["dims"]):
        place[dim] = sizes[dim] - 1 - place[dim]
    return r.read(a["self"] if "self" in a else a["a"], place)


@rule("roll", moves=True)
def _roll(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    if not a["dims"]:
        raise Unreadable("it rolls a flattened tensor")
    place, sizes = list(index), r.sizes(node)
    for shift, dim in zip(a["shifts"], a["dims"], strict=True):
        dim = axis(dim, len(index))
        place[dim] = r.math.remainder(place[dim] - r.integer(shift), sizes[dim])
    return r.read(a["self"], place)


@rule("repeat", moves=True)
def _repeat(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    sizes = r.sizes(a["self"])
    own = index[len(index) - len(sizes) :]
    place = [i if size == 1 else r.math.remainder(i, size) for i, size in zip(own, sizes, strict=True)]
    return r.read(a["self"], place)


@rule("index", "_unsafe_index", moves=True)
def _index(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    """Advanced indexing: the index tensors broadcast together, in place of the dimensions they index."""
    source, given = a["self"], list(a["indices"])
    positions = [dim for dim, tensor in enumerate(given) if tensor is not None]
    tensors = [given[dim] for dim in positions]
    if any(r.dtype(tensor) in (torch.bool, torch.uint8) for tensor in tensors):
        raise Unreadable("it selects by a boolean tensor")
    rank = max(len(r.sizes(tensor)) for tensor in tensors)
    adjacent = positions == list(range(positions[0], positions[-1] + 1))
    start = positions[0] if adjacent else 0
    inner, outer = index[start : start + rank], iter((*index[:start], *index[start + rank :]))
    sizes = r.sizes(source)
    kept = {dim: next(outer) for dim in range(len(sizes)) if dim not in positions}
    parts = []
    for choice in itertools.product(*(r.operand(tensor, inner, torch.int64).parts for tensor in tensors)):
        guard = r.logic.all_of(condition for condition, _ in choice)
        if guard == FALSE:
            continue
        at = dict(kept)
        for dim, (_, position) in zip(positions, choice, strict=True):
            at[dim] = _wrapped(r, position, sizes[dim])
        parts.append((guard, r.read(source, [at[dim] for dim in range(len(sizes))])))
    return r.values.piecewise(parts)


# ---- piecewise ------------------------------------------------------------------------------------


@rule("cat")
def _cat(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dim, offset, parts = axis(a["dim"], len(index)), ZERO, []
    for tensor in a["tensors"]:
        sizes = r.sizes(tensor)
        if len(sizes) < len(index):  # torch ignores empty one-dimensional tensors
            continue
        inside = _between(r, index[dim], offset, offset + sizes[dim])
        if inside != FALSE:
            value = r.read(tensor, replaced(index, dim, sympy.expand(index[dim] - offset)))
            parts.append((inside, r.values.convert(value, r.dtype(node))))
        offset = offset + sizes[dim]
    return r.values.piecewise(parts)


@rule("stack")
def _stack(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dim = axis(a["dim"], len(index))
    rest = (*index[:dim], *index[dim + 1 :])
    parts = [(r.logic.is_zero(index[dim] - at), at) for at in range(len(a["tensors"]))]
    return r.values.piecewise([(here, r.read(a["tensors"][at], rest)) for here, at in parts if here != FALSE])


def _between(r: Reader, position: Expr, start: Expr, end: Expr) -> Predicate:
    """start <= position < end."""
    return r.logic.all_of([r.logic.at_most(start, position), r.logic.at_most(position, end - 1)])


@rule("constant_pad_nd")
def _pad(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    source, place, inside = a["self"], list(index), TRUE
    sizes = r.sizes(source)
    for pair in range(len(a["pad"]) // 2):
        dim, before = len(index) - 1 - pair, r.integer(a["pad"][2 * pair])
        place[dim] = sympy.expand(index[dim] - before)
        inside = r.logic.all_of([inside, _between(r, place[dim], ZERO, sizes[dim])])
    fill = r.values.convert(r.values.constant(r.scalar(a["value"])), r.dtype(node))
    if inside == FALSE:
        return fill
    return _choose(r, inside, r.read(source, place), fill)


def _choose(r: Reader, condition: Predicate, then: Value, otherwise: Value) -> Value:
    return r.values.piecewise([(condition, then), (r.logic.negate(condition), otherwise)])


@rule("slice_scatter")
def _slice_scatter(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dim, step = axis(a["dim"], len(index)), r.integer(a["step"])
    start, end = _slice_limits(r, a, r.sizes(node)[dim])
    shifted = sympy.expand(index[dim] - start)
    inside = _between(r, index[dim], start, end)
    if step != 1:
        inside = r.logic.all_of([inside, r.logic.is_zero(r.math.remainder(shifted, step))])
        shifted = r.math.floor_div(shifted, step)
    return _scattered(r, node, a, index, inside, replaced(index, dim, shifted))


@rule("select_scatter")
def _select_scatter(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    dim = axis(a["dim"], len(index))
    inside = r.logic.is_zero(index[dim] - _wrapped(r, r.integer(a["index"]), r.sizes(node)[dim]))
    return _scattered(r, node, a, index, inside, (*index[:dim], *index[dim + 1 :]))


def _scattered(r: Reader, node: fx.Node, a: Arguments, index: Index, inside: Predicate, place: Index) -> Value:
    """The source where `inside` holds, what was there before elsewhere."""
    if inside == FALSE:
        return r.read(a["self"], index)
    written = r.values.convert(r.read(a["src"], place), r.dtype(node))
    return written if inside == TRUE else _choose(r, inside, written, r.read(a["self"], index))


@rule("where")
def _where(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return _selected(r, node, r.flag(a["condition"], index), a["self"], a["other"], index)


@rule("masked_fill")
def _masked_fill(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return _selected(r, node, r.flag(a["mask"], index), a["value"], a["self"], index)


def _selected(r: Reader, node: fx.Node, condition: Predicate, then: Any, otherwise: Any, index: Index) -> Value:
    """Reads only the branches that can be taken."""
    dtype = r.dtype(node)
    chosen = [(condition, then), (r.logic.negate(condition), otherwise)]
    return r.values.piecewise(
        [(guard, r.values.convert(r.broadcast(x, index), dtype)) for guard, x in chosen if guard != FALSE]
    )


@rule("index_put")
def _index_put(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    """`x[flags] = number` only."""
    flags = a["indices"][0]
    whole = flags is not None and len(a["indices"]) == 1 and len(r.sizes(flags)) == len(index)
    if a["accumulate"] or not whole or r.dtype(flags) != torch.bool or r.sizes(a["values"]) not in ((), (ONE,)):
        raise Unreadable("it writes at positions given by a tensor")
    value = r.read(a["values"], (ZERO,) * len(r.sizes(a["values"])))
    return _choose(r, r.flag(flags, index), r.values.convert(value, r.dtype(node)), r.read(a["self"], index))


@rule("copy", "fill")
def _copy(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    return r.values.convert(r.broadcast(a["src"] if "src" in a else a["value"], index), r.dtype(node))


@rule("tril", "triu")
def _triangle(r: Reader, node: fx.Node, a: Arguments, index: Index) -> Value:
    above = sympy.expand(index[-1] - index[-2] - r.integer(a["diagonal"]))
    lower = node.target._schema.name == "aten::tril"  # type: ignore[union-attr]
    kept = r.logic.at_least_zero(-above if lower else above)
    zero = r.values.convert(r.values.constant(ZERO), r.dtype(node))
    return zero if kept == FALSE else _choose(r, kept, r.read(a["self"], index), zero)
