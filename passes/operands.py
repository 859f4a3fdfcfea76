"""From what the axes of a candidate mean to operands in the layout of the op.

`trace` lists the places at which an operand may be taken out of the graph, `arrange` picks the
places and the split of the leading axes into batch and heads that need the fewest view methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import fx

from s2o_inductor.mask_spec import EmptyRows
from s2o_inductor.passes.axes import Axes, Axis, Factor, broadcast, factors, resolve, steps_between, undo_view
from s2o_inductor.passes.canonical import cast, scaled, widens
from s2o_inductor.passes.flow import Flow, written
from s2o_inductor.passes.graph_utils import Refusal, Size, dtype_of, fake, shape_of
from s2o_inductor.passes.records import MaskOperand, Operand, Step


@dataclasses.dataclass(frozen=True)
class Tap:
    """A node from which an operand can be had.

    Attributes:
        node: the node.
        axes: what its axes stand for.
        passed: the nodes between it and the reader, which the op makes unnecessary.
        scale: what the passed nodes multiply it by.
        folds: how many of them do.
        after: steps that follow those into the op's layout: a cast that autocast makes, a sign.
    """

    node: fx.Node
    axes: Axes
    passed: tuple[fx.Node, ...] = ()
    scale: float = 1.0
    folds: int = 0
    after: tuple[Step, ...] = ()


def trace_views(flow: Flow, reader: fx.Node, source: fx.Node, axes: Axes) -> list[Tap]:
    """The taps of an operand of which only views may be undone, nearest to the reader first."""
    return list(_walk(flow, reader, Tap(source, axes), folding=False, casting=False))


def trace(flow: Flow, reader: fx.Node, source: fx.Node, axes: Axes, wanted: torch.dtype, *, folding: bool) -> list[Tap]:
    """The taps of a query, key or value operand, nearest to the reader first.

    Args:
        flow: the graph.
        reader: the matrix product or attention call that reads it.
        source: the operand as the reader names it.
        axes: what its axes stand for.
        wanted: the dtype of the op; taps that cannot be had in it are left out.
        folding: whether factors by which it is multiplied may be undone (they join the scale).
    """
    own = dtype_of(source)
    converted = own != dtype_of(reader)
    taps = []
    for tap in _walk(flow, reader, Tap(source, axes), folding=folding, casting=True):
        if dtype_of(tap.node) == wanted:
            taps.append(tap)
        elif converted and dtype_of(tap.node) == own and dtype_of(reader) == wanted:
            taps.append(dataclasses.replace(tap, after=(("to", (wanted,)),)))
    return taps


def _walk(flow: Flow, reader: fx.Node, tap: Tap, *, folding: bool, casting: bool) -> Iterator[Tap]:
    surroundings = flow.ambient[reader]
    while True:
        yield tap
        node = tap.node
        if flow.read(reader, node) is not node or written(node) or flow.ambient[node] != surroundings:
            return
        step = _undo(flow, node, tap, folding=folding, casting=casting)
        if step is None:
            return
        reader, tap = node, dataclasses.replace(step, passed=(*tap.passed, node))


def _undo(flow: Flow, node: fx.Node, tap: Tap, *, folding: bool, casting: bool) -> Tap | None:
    view = undo_view(node, tap.axes)
    if view is not None:
        return dataclasses.replace(tap, node=view[0], axes=view[1])
    source = cast(node) if casting else None
    if source is not None and widens(dtype_of(source), dtype_of(node)):
        return dataclasses.replace(tap, node=source)
    product = scaled(flow, node) if folding else None
    if product is not None and product.factor is not None and dtype_of(product.source) == dtype_of(node):
        return dataclasses.replace(
            tap, node=product.source, scale=tap.scale * product.factor, folds=tap.folds + 1
        )  # fmt: skip
    return None


def mask_taps(
    flow: Flow, reader: fx.Node, mask: fx.Node, kind: str, axes: Axes, full: Sequence[Size], *, negated: bool = False
) -> tuple[str, list[Tap]]:
    """(kind, taps) of a mask that is applied to scores with these axes and sizes; `negated`: it is subtracted.

    Raises:
        Refusal: it does not broadcast to them, or it is added and is no constant bias.
    """
    value = fake(mask)
    aligned = None if value is None else broadcast(axes, full, shape_of(mask))
    if value is None or aligned is None:
        raise Refusal(f"the mask '{mask.name}' does not broadcast to the scores")
    if kind == "additive" and not value.dtype.is_floating_point:
        raise Refusal(f"the added mask '{mask.name}' is {value.dtype}, not floating point")
    if kind == "additive" and value.requires_grad:
        raise Refusal("the additive bias needs a gradient")
    after: tuple[Step, ...] = (("neg", ()),) if negated else ()
    return kind, [dataclasses.replace(tap, after=after) for tap in trace_views(flow, reader, mask, aligned)]


@dataclasses.dataclass
class Problem:
    """The operands of a candidate and what the axes of its scores stand for.

    Attributes:
        batch: the axes that scores share with keys or are broadcast over, in order.
        queries: the axes that only queries have.
        keys, inner, values: what is summed over by the softmax, by the scores, and what values add.
        result: the axes of the node to replace.
        q, k, v, sinks: taps of the operands.
        masks: (kind, taps), see `mask_taps`.
    """

    batch: Axes
    queries: Axes
    keys: Axis
    inner: Axis
    values: Axis
    result: Axes
    q: list[Tap]
    k: list[Tap]
    v: list[Tap]
    masks: list[tuple[str, list[Tap]]] = dataclasses.field(default_factory=list)
    sinks: list[Tap] | None = None


@dataclasses.dataclass
class Reading:
    """A candidate as its spelling says it.

    Attributes:
        output: the node to replace.
        core: the nodes between the operands and the output, in graph order, output included.
        scale, causal, empty, dropout: as in `AttentionSite`; factors on operands are not in the scale yet.
    """

    output: fx.Node
    core: list[fx.Node]
    problem: Problem
    scale: float
    causal: bool = False
    empty: EmptyRows = "zero"
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """The operands that a site is made of, the nodes that they make unnecessary, and what they scale by."""

    q: Operand
    k: Operand
    v: Operand
    masks: tuple[MaskOperand, ...]
    sinks: fx.Node | None
    out_steps: tuple[Step, ...]
    passed: tuple[fx.Node, ...]
    scale: float

    def cost(self) -> int:
        """How many view methods it takes."""
        operands: tuple[Operand | MaskOperand, ...] = (self.q, self.k, self.v, *self.masks)
        return sum(len(operand.steps) for operand in operands) + len(self.out_steps)


def arrange(problem: Problem) -> Arrangement | None:
    """The cheapest arrangement that shares keys and values between as many query heads as possible.

    Query heads are ordered so that the heads of a group are neighbours, as the op wants them.
    """
    everything = factors((*problem.batch, *problem.queries))
    shared = {_lacking(tap, everything) for tap in problem.k} & {_lacking(tap, everything) for tap in problem.v}
    for lacking in sorted(shared, key=len, reverse=True):
        roles = _roles(problem, lacking)
        fits = [fit for one in roles if (fit := _fit(problem, everything, lacking, *one)) is not None]
        if fits:
            return min(fits, key=Arrangement.cost)
    return None


def _lacking(tap: Tap, everything: Sequence[Factor]) -> tuple[Factor, ...]:
    held = set(factors(tap.axes))
    return tuple(factor for factor in everything if factor not in held)


# What the leading axes are: batch, shared heads, heads of a group, queries.
_Roles = tuple[Axis, Axis, Axis, Axis]


def _roles(problem: Problem, lacking: tuple[Factor, ...]) -> list[_Roles]:
    """The roles that the leading axes may have: ways to split them into batch and heads, the usual one first.

    Of several axes that only queries have, the last is that of the queries and the others are the
    heads of a group.
    """
    if not set(factors(problem.queries)) <= set(lacking):
        return []
    queries = _units(problem.queries)[-1] if problem.queries else ()
    group = tuple(factor for factor in lacking if factor not in queries)
    units = [unit for unit in _units(problem.batch) if not set(unit) & set(group)]
    splits = sorted(range(len(units) + 1), key=lambda size: abs(size - 1))
    return [(_joined(units[:split]), _joined(units[split:]), group, queries) for split in splits]


def _units(axes: Axes) -> list[Axis]:
    """One entry per factor, and an empty one for an axis of size one: a batch of one is a batch."""
    units: list[Axis] = []
    for axis in axes:
        units += [(factor,) for factor in resolve(axis)] or [()]
    return units


def _joined(units: list[Axis]) -> Axis:
    return tuple(factor for unit in units for factor in unit)


def _fit(
    problem: Problem,
    everything: tuple[Factor, ...],
    lacking: tuple[Factor, ...],
    batch: Axis,
    heads: Axis,
    group: Axis,
    queries: Axis,
) -> Arrangement | None:
    all_heads = (*heads, *group)
    q = _choose(problem.q, (batch, all_heads, queries, problem.inner), everything, ())
    k = _choose(problem.k, (batch, heads, problem.keys, problem.inner), everything, lacking)
    v = _choose(problem.v, (batch, heads, problem.keys, problem.values), everything, lacking)
    masks = [
        (kind, _choose(taps, (batch, all_heads, queries, problem.keys), everything, None))
        for kind, taps in problem.masks
    ]
    sinks = _choose_sinks(problem.sinks or [], all_heads)
    out_steps = steps_between((batch, all_heads, queries, problem.values), problem.result)
    if q is None or k is None or v is None or out_steps is None or (problem.sinks is not None and sinks is None):
        return None
    chosen = [pick for _, pick in masks]
    if any(pick is None for pick in chosen):
        return None
    taps = [q[0], k[0], v[0], *(pick[0] for pick in chosen if pick is not None), *([sinks] if sinks else [])]
    return Arrangement(
        q=Operand(q[0].node, q[1]),
        k=Operand(k[0].node, k[1]),
        v=Operand(v[0].node, v[1]),
        masks=tuple(MaskOperand(pick[0].node, kind, pick[1]) for kind, pick in masks if pick is not None),
        sinks=sinks.node if sinks else None,
        out_steps=out_steps,
        passed=tuple(dict.fromkeys(node for tap in taps for node in tap.passed)),
        scale=q[0].scale * k[0].scale,
    )


def _choose(
    taps: list[Tap], target: Axes, everything: tuple[Factor, ...], lacking: tuple[Factor, ...] | None
) -> tuple[Tap, tuple[Step, ...]] | None:
    """The tap that folds most into the scale, then needs the fewest steps, then is nearest to the reader.

    Only taps that lack exactly `lacking` qualify (None: whatever they lack).
    """
    best: tuple[Tap, tuple[Step, ...]] | None = None
    for tap in taps:
        if lacking is not None and _lacking(tap, everything) != lacking:
            continue
        steps = steps_between(tap.axes, target)
        if steps is not None and (best is None or (-tap.folds, len(steps)) < (-best[0].folds, len(best[1]))):
            best = tap, steps
    return None if best is None else (best[0], (*best[1], *best[0].after))


def _choose_sinks(taps: list[Tap], heads: Axis) -> Tap | None:
    """The tap that holds one logit per query head and nothing else."""
    return next((tap for tap in taps if len(tap.axes) == 1 and resolve(tap.axes[0]) == resolve(heads)), None)
