"""What the axes of a tensor stand for, followed through views.

Attention is written with batch and heads apart or merged, with the heads of a group as an axis of
their own, with keys transposed or not. Instead of a pattern for each layout, every axis is a
product of *factors* (major first), and a view is a rule for factors: a reshape regroups them, a
permutation moves them, an expansion adds one that its source lacks. For example, `repeat_kv` read
backwards, with one letter per factor:

    (b, h, s, d)  --reshape-->  (b, [kv g], s, d)  --expand-->  (b, kv, 1, s, d)

after which it is known that h = kv * g and that the source has no g: query head h reads
key/value head h // g. Two layouts agree when their resolved factors are the same objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from torch import fx

from s2o_inductor.passes.graph_utils import (
    Size,
    argument,
    dtype_of,
    fake,
    integers,
    op_name,
    product_of_sizes,
    ratio,
    same,
    shape_of,
    tensor_argument,
)
from s2o_inductor.passes.records import Step


class Factor:
    """A part of an axis, compared by identity. Once split, it stands for its parts, major first."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.parts: tuple[Factor, ...] = ()

    def split(self, major: Size, minor: Size) -> None:
        """Names two parts whose sizes multiply to this one's."""
        self.parts = (Factor(major), Factor(minor))


Axis: TypeAlias = tuple[Factor, ...]
Axes: TypeAlias = tuple[Axis, ...]


def fresh(shape: Iterable[Size]) -> Axes:
    """Axes of which nothing is known yet."""
    return tuple((Factor(size),) for size in shape)


def resolve(axis: Axis) -> Axis:
    """An axis down to the parts known so far, without those of size one, which carry no meaning."""
    leaves: list[Factor] = []
    for factor in axis:
        leaves += resolve(factor.parts) if factor.parts else [] if same(factor.size, 1) else [factor]
    return tuple(leaves)


def factors(axes: Axes) -> tuple[Factor, ...]:
    """All resolved factors of a layout."""
    return tuple(factor for axis in axes for factor in resolve(axis))


def divide(axis: Axis, sizes: Sequence[Size]) -> list[Axis] | None:
    """An axis as consecutive axes of these sizes, splitting factors as needed; None when it cannot be."""
    pending, parts = list(resolve(axis)), []
    for size in sizes:
        part: list[Factor] = []
        left = size
        while not same(left, 1):
            if not pending:
                return None
            head = pending[0]
            whole, rest = ratio(left, head.size), ratio(head.size, left)
            if whole is not None:
                part.append(pending.pop(0))
                left = whole
            elif rest is not None:
                head.split(left, rest)
                pending[:1] = head.parts
            else:
                return None
        parts.append(tuple(part))
    return None if pending else parts


def regroup(axes: Axes, old: Sequence[Size], new: Sequence[Size]) -> Axes | None:
    """The axes after a reshape from `old` to `new` (row-major); None when factors would straddle axes."""
    result: list[Axis] = []
    i = j = 0
    while i < len(old) or j < len(new):
        found = _smallest_match(old[i:], new[j:])
        if found is None:
            return None
        merged = tuple(factor for axis in axes[i : i + found[0]] for factor in resolve(axis))
        parts = divide(merged, new[j : j + found[1]])
        if parts is None:
            return None
        result += parts
        i, j = i + found[0], j + found[1]
    return tuple(result)


def _smallest_match(old: Sequence[Size], new: Sequence[Size]) -> tuple[int, int] | None:
    """How many leading sizes of either shape have the same product, the fewest there are."""
    counts = sorted(
        ((a, b) for a in range(len(old) + 1) for b in range(len(new) + 1) if a + b > 0), key=lambda pair: sum(pair)
    )
    # (1, 1) goes first: a size that stays keeps its meaning, units beside it are dropped after.
    counts.sort(key=lambda pair: pair != (1, 1))
    return next(((a, b) for a, b in counts if same(product_of_sizes(old[:a]), product_of_sizes(new[:b]))), None)


def broadcast(axes: Axes, full: Sequence[Size], shape: Sequence[Size]) -> Axes | None:
    """Axes of an operand of `shape` that is broadcast, aligned right, to a result with `axes` of sizes `full`."""
    if len(shape) > len(full):
        return None
    offset = len(full) - len(shape)
    result: list[Axis] = []
    for index, size in enumerate(shape):
        if same(size, full[offset + index]):
            result.append(axes[offset + index])
        elif same(size, 1):
            result.append(())
        else:
            return None
    return tuple(result)


# ------------------------------------------------------------------------------------------- views

_REGROUPING = frozenset(
    ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "getitem")
)
_REPEATING = frozenset(("expand", "expand_as", "repeat", "repeat_interleave"))
_COPYING = frozenset(("contiguous", "clone"))


def undo_view(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """The source of a view and its axes, from the axes of the view; None when the node is no known view.

    Copies that keep the values (`contiguous`, `repeat`) count as views. An expansion gives a source
    that lacks a factor.
    """
    source, name = tensor_argument(node), op_name(node)
    if source is None or fake(source) is None or fake(node) is None or dtype_of(source) != dtype_of(node):
        return None
    order = permutation(node)
    if order is not None:
        before: list[Axis] = [()] * len(order)
        for position, origin in enumerate(order):
            before[origin] = axes[position]
        return source, tuple(before)
    if name in _COPYING:
        return source, axes
    if name in _REPEATING:
        repeated = _undo_repeat(node, source, axes)
        return None if repeated is None else (source, repeated)
    if _regroups(node, source):
        regrouped = regroup(axes, shape_of(node), shape_of(source))
        return None if regrouped is None else (source, regrouped)
    return None


def apply_view(node: fx.Node, axes: Axes) -> Axes | None:
    """The axes of a view, from those of its source; None when the node is no permutation, reshape or copy."""
    source = tensor_argument(node)
    if source is None or fake(source) is None or fake(node) is None or dtype_of(source) != dtype_of(node):
        return None
    order = permutation(node)
    if order is not None:
        return tuple(axes[origin] for origin in order)
    if op_name(node) in _COPYING:
        return axes
    return regroup(axes, shape_of(source), shape_of(node)) if _regroups(node, source) else None


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """For a node that only reorders dimensions: the source dimension of each of its own, else None."""
    source, name = tensor_argument(node), op_name(node)
    value = None if source is None else fake(source)
    if value is None:
        return None
    rank = value.dim()
    if name == "permute":
        order = integers(node, 1, "dims")
        return tuple(dim % rank for dim in order) if _all_ints(order) else None
    if name in ("T", "H"):
        return tuple(reversed(range(rank)))
    if name == "movedim":
        return _moved(rank, argument(node, 1, "source"), argument(node, 2, "destination"))
    if name in ("mT", "mH"):
        pair: tuple[Any, ...] = (-2, -1)
    elif name == "transpose":
        pair = (argument(node, 1, "dim0", "axis0"), argument(node, 2, "dim1", "axis1"))
    else:
        return None
    if not _all_ints(pair):
        return None
    dims = list(range(rank))
    a, b = (dim % rank for dim in pair)
    dims[a], dims[b] = b, a
    return tuple(dims)


def _moved(rank: int, origin: Any, target: Any) -> tuple[int, ...] | None:
    if not _all_ints((origin, target)):
        return None
    order = [dim for dim in range(rank) if dim != origin % rank]
    order.insert(target % rank, origin % rank)
    return tuple(order)


def _all_ints(values: Iterable[Any]) -> bool:
    return all(type(value) is int for value in values)


def _regroups(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node keeps every element in row-major order."""
    if op_name(node) not in _REGROUPING:
        return False
    if op_name(node) == "getitem" and not _takes_all(argument(node, 1)):
        return False
    return same(product_of_sizes(shape_of(node)), product_of_sizes(shape_of(source)))


def _takes_all(index: Any) -> bool:
    """Whether an index holds only None, Ellipsis, and ints or forward slices (all of a size then, or of one)."""
    items = index if isinstance(index, tuple) else (index,)
    return all(
        item is None or item is Ellipsis or type(item) is int or (isinstance(item, slice) and item.step in (None, 1))
        for item in items
    )


def _undo_repeat(node: fx.Node, source: fx.Node, axes: Axes) -> Axes | None:
    old, new = shape_of(source), shape_of(node)
    offset = len(new) - len(old)
    interleaved = op_name(node) == "repeat_interleave"
    if interleaved and not _interleaves_one_dim(node):
        return None
    result: list[Axis] = []
    for index, size in enumerate(old):
        axis, full = axes[offset + index], new[offset + index]
        if same(size, full):
            result.append(axis)
            continue
        times = ratio(full, size)
        parts = None if times is None else divide(axis, (size, times) if interleaved else (times, size))
        if parts is None:
            return None
        result.append(parts[0 if interleaved else 1])
    return tuple(result)


def _interleaves_one_dim(node: fx.Node) -> bool:
    """Whether every entry is repeated equally often, along one dimension."""
    return fake(argument(node, 1, "repeats")) is None and type(argument(node, 2, "dim")) is int


# ------------------------------------------------------------------------------------------- steps


def steps_between(source: Axes, target: Axes) -> tuple[Step, ...] | None:
    """View methods from one layout to another; None when there are none.

    A target axis of which the source has no factor becomes a dimension of size one; one of which it
    has only some cannot be had.
    """
    have = [resolve(axis) for axis in source]
    present = set(factors(source))
    want: list[Axis] = []
    for axis in map(resolve, target):
        held = sum(factor in present for factor in axis)
        if held not in (0, len(axis)):
            return None
        want.append(axis if held else ())
    place = {factor: (home, rank) for home, axis in enumerate(want) for rank, factor in enumerate(axis)}
    if len(place) != len(present):
        return None
    if have == want:
        return ()
    runs = [_runs(axis, place) for axis in have]
    split = _split_steps(runs)
    if split is None:
        return None
    steps = list(split)
    flat: list[Axis] = []
    for axis_runs in runs:
        flat += axis_runs or [()]
    aligned = _align_units(flat, want)
    if aligned is not None:
        return (*steps, *aligned)
    steps += [("squeeze", (dim,)) for dim in reversed(range(len(flat))) if not flat[dim]]
    flat = [run for run in flat if run]
    order = sorted(range(len(flat)), key=lambda dim: place[flat[dim][0]])
    steps += _permute_step(order)
    flat = [flat[dim] for dim in order]
    return (*steps, *_merge_steps([place[run[0]][0] for run in flat], len(want)))


def _runs(axis: Axis, place: dict[Factor, tuple[int, int]]) -> list[Axis]:
    """An axis cut wherever two neighbours do not stay neighbours."""
    runs: list[list[Factor]] = []
    for factor in axis:
        home, rank = place[factor]
        if runs and place[runs[-1][-1]] == (home, rank - 1):
            runs[-1].append(factor)
        else:
            runs.append([factor])
    return [tuple(run) for run in runs]


def _split_steps(runs: list[list[Axis]]) -> list[Step] | None:
    steps: list[Step] = []
    dim = 0
    for axis in runs:
        if len(axis) > 1:
            sizes = [product_of_sizes(factor.size for factor in run) for run in axis]
            unknown = [index for index, size in enumerate(sizes) if not isinstance(size, int)]
            if len(unknown) > 1:
                return None  # two symbolic sizes: a step holds integers, of which one may be -1
            steps.append(("unflatten", (dim, tuple(size if isinstance(size, int) else -1 for size in sizes))))
        dim += max(len(axis), 1)
    return steps


def _align_units(have: list[Axis], want: list[Axis]) -> list[Step] | None:
    """Steps that only add and drop dimensions of size one; None when more is needed."""
    steps: list[Step] = []
    left = list(have)
    for dim, axis in enumerate(want):
        while left and left[0] == () and axis != ():
            steps.append(("squeeze", (dim,)))
            left.pop(0)
        if left and left[0] == axis:
            left.pop(0)
        elif axis == ():
            steps.append(("unsqueeze", (dim,)))
        else:
            return None
    if any(left):
        return None
    return [*steps, *[("squeeze", (len(want),)) for _ in left]]


def _permute_step(order: list[int]) -> list[Step]:
    moved = [dim for dim, origin in enumerate(order) if dim != origin]
    if not moved:
        return []
    if len(moved) == 2:
        return [("transpose", (moved[0], moved[1]))]
    return [("permute", tuple(order))]


def _merge_steps(homes: list[int], rank: int) -> list[Step]:
    steps: list[Step] = []
    for home in range(rank):
        count = homes.count(home)
        if count > 1:
            steps.append(("flatten", (home, home + count - 1)))
        elif count == 0:
            steps.append(("unsqueeze", (home,)))
    return steps
