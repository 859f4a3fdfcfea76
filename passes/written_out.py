"""Reads attention that is written out: a softmax between two matrix products.

From the softmax the scores are followed back to the product of queries and keys, and the weights
forward to the product with the values. What is met on the way is a scale, a mask, a cast, a view,
a sink or dropout, each with its reader; anything else is a reason to leave the candidate alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
from torch import fx

from s2o_inductor.mask_spec import EmptyRows
from s2o_inductor.passes import canonical
from s2o_inductor.passes.axes import Axes, Axis, Factor, apply_view, broadcast, factors, fresh, resolve, undo_view
from s2o_inductor.passes.canonical import Product, Softmax
from s2o_inductor.passes.flow import Flow
from s2o_inductor.passes.graph_utils import (
    Refusal,
    Size,
    argument,
    dtype_of,
    fake,
    op_name,
    product_of_sizes,
    same,
    shape_of,
)
from s2o_inductor.passes.operands import Problem, Reading, Tap, mask_taps, trace, trace_views

# A finite number at or below this hides a position: exp(-1e4) is zero in every dtype.
HIDING = -1.0e4


def read_written_out(flow: Flow, found: Softmax) -> Reading:
    """The reading of the attention around a softmax.

    Raises:
        Refusal: it is no attention that the op can stand for.
    """
    axes = fresh(shape_of(found.nodes[-1]))
    if found.dim != len(axes) - 1:
        raise Refusal(f"the softmax runs over dimension {found.dim}, not over the last one")
    scores = _Scores(axes[-1], nodes=list(found.nodes), later=[dtype_of(found.nodes[-1])])
    scored, score_axes = _walk_back(flow, scores, flow.read(found.reader, found.source), axes)
    weights = _Weights(found.nodes[-1], axes)
    output = _walk_forward(flow, weights, scores)
    problem = _problem(flow, scores, (scored, score_axes), weights, output)
    product = canonical.product(scored)
    assert product is not None
    return Reading(
        output,
        sorted({*scores.nodes, *weights.nodes, output}, key=flow.position.__getitem__),
        problem,
        scores.scale * product.alpha,
        empty=_empty_rows(scores, found.safe),
        dropout=weights.dropout,
    )


def after_product(flow: Flow, node: fx.Node) -> bool:
    """Whether a node holds scores: going back over nodes of its size, a matrix product is reached."""
    return reaches(node, lambda at: (flow.read(at, source) for source in at.all_input_nodes), at_start=True)


def reaches(node: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node | None]], *, at_start: bool) -> bool:
    """Whether steps between nodes of one size lead to a matrix product; the first one counts if `at_start`."""
    pending, seen = [node], {node}
    while pending:
        at = pending.pop()
        if (at_start or at is not node) and canonical.product(at) is not None:
            return True
        for other in step(at):
            if other is not None and other not in seen and fake(other) is not None and _akin(at, other):
                seen.add(other)
                pending.append(other)
    return False


def _akin(node: fx.Node, other: fx.Node) -> bool:
    """Whether two neighbours may hold the same scores: as many of them, or one a part or a product of the other."""
    if fake(node) is None or op_name(node) == "cat":
        return True
    if canonical.last_slice(other) is not None or canonical.product(other) is not None:
        return True
    return same(product_of_sizes(shape_of(node)), product_of_sizes(shape_of(other)))


# --------------------------------------------------------------------------- from the softmax backwards


@dataclasses.dataclass
class _Scores:
    """What happens to scores between their product and the softmax, collected walking back.

    Attributes:
        keys: the axis of the keys.
        nodes: the nodes walked over, and those that only serve them.
        later: factors and casts met so far, in program order: what is still to happen to the scores.
        fills: what masked scores are when they reach the softmax.
        masks: (kind, taps).
        sinks: taps of the sink logits, if any; `sink_first` says on which side their column stands.
    """

    keys: Axis
    nodes: list[fx.Node] = dataclasses.field(default_factory=list)
    later: list[float | torch.dtype] = dataclasses.field(default_factory=list)
    fills: list[float] = dataclasses.field(default_factory=list)
    masks: list[tuple[str, list[Tap]]] = dataclasses.field(default_factory=list)
    sinks: list[Tap] | None = None
    sink_first: bool = False

    @property
    def scale(self) -> float:
        """The product of the factors met."""
        return math.prod(step for step in self.later if isinstance(step, float))


# The argument to go on with, as the node names it, and its axes; None when the reader does not apply.
_Back = tuple[fx.Node, Axes] | None


def _walk_back(flow: Flow, scores: _Scores, node: fx.Node | None, axes: Axes) -> tuple[fx.Node, Axes]:
    """From the argument of the softmax back to the product of queries and keys; that node and its axes."""
    while True:
        if node is None:
            raise Refusal("the scores are changed in place through a view")
        scores.nodes.append(node)
        if canonical.product(node) is not None:
            return node, axes
        step = next((step for reader in _READERS if (step := reader(flow, scores, node, axes)) is not None), None)
        if step is None:
            raise Refusal(_obstacle(node))
        node, axes = flow.read(node, step[0]), step[1]


def _obstacle(node: fx.Node) -> str:
    name = op_name(node) or getattr(node.target, "__name__", str(node.target))
    if name == "tanh":
        return "the scores are soft-capped"
    if name in ("mul", "div"):
        return "the scores are multiplied by a tensor"
    return f"the scores pass through '{name}'"


def _back_over_view(flow: Flow, scores: _Scores, node: fx.Node, axes: Axes) -> _Back:
    return undo_view(node, axes)


def _back_over_cast(flow: Flow, scores: _Scores, node: fx.Node, axes: Axes) -> _Back:
    source = canonical.cast(node)
    if source is None:
        return None
    scores.later.insert(0, dtype_of(node))
    return source, axes


def _back_over_scale(flow: Flow, scores: _Scores, node: fx.Node, axes: Axes) -> _Back:
    found = canonical.scaled(flow, node)
    if found is None:
        return None
    if found.factor is None:
        raise Refusal("scale is not a constant yet")
    scores.later.insert(0, found.factor)
    return found.source, axes


def _back_over_maximum(flow: Flow, scores: _Scores, node: fx.Node, axes: Axes) -> _Back:
    """Subtracting the maximum of a row changes nothing that the softmax sees."""
    found = canonical.less_maximum(flow, node)
    if found is None:
        return None
    scores.nodes += found[1]
    return found[0], axes


def _back_over_fill(flow: Flow, scores: _Scores, node: fx.Node, axes: Axes) -> _Back:
    found = canonical.filled(flow, node, lambda one: _is_score(flow, node, one))
    if found is None:
        return None
    value = found.value
    for step in scores.later:
        value = value * step if isinstance(step, float) else canonical.rounded(value, step)
    if not value <= HIDING:
        raise Refusal(f"masked scores are set to {value:g}, which does not hide them")
    full = shape_of(found.source) if op_name(node) == "setitem" else shape_of(node)
    scores.fills.append(value)
    scores.masks.append(mask_taps(flow, node, found.mask, found.kind, axes, full))
    return found.source, _operand_axes(axes, full, found.source)


def _back_over_sum(flow: Flow, scores: _Scores, node: fx.Node, axes: Axes) -> _Back:
    subtracted = op_name(node) == "sub"
    if op_name(node) != "add" and not subtracted:
        return None
    first, second = argument(node, 0, "input"), argument(node, 1, "other")
    score, mask = (first, second) if subtracted or _is_score(flow, node, first) else (second, first)
    if argument(node, 2, "alpha", default=1) != 1 or fake(mask) is None or not _is_score(flow, node, score):
        raise Refusal("something other than a mask is added to the scores")
    _add_mask(flow, scores, node, mask, axes, negated=subtracted)
    return score, _operand_axes(axes, shape_of(node), score)


def _back_over_sinks(flow: Flow, scores: _Scores, node: fx.Node, axes: Axes) -> _Back:
    """A column of logits without values beside the scores, one logit per head."""
    columns, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", "axis", default=0)
    if op_name(node) != "cat" or not isinstance(columns, (tuple, list)) or len(columns) != 2:
        return None
    if type(dim) is not int or dim % len(axes) != len(axes) - 1:
        return None
    if scores.masks or scores.scale != 1.0 or scores.sinks is not None:
        raise Refusal("the sink logits are masked or scaled along with the scores")
    scores.sink_first = not _is_score(flow, node, columns[0])
    sink, score = columns if scores.sink_first else reversed(columns)
    if not same(shape_of(sink)[-1], 1):
        raise Refusal("several logits without values are appended to the scores")
    scores.sinks = trace_views(flow, node, sink, (*axes[:-1], ()))
    scores.keys = (Factor(shape_of(score)[-1]),)
    return score, (*axes[:-1], scores.keys)


_READERS = (
    _back_over_view, _back_over_cast, _back_over_scale, _back_over_maximum, _back_over_fill, _back_over_sum,
    _back_over_sinks,
)  # fmt: skip


def _is_score(flow: Flow, reader: fx.Node, source: object) -> bool:
    value = flow.read(reader, source)
    return value is not None and fake(source) is not None and after_product(flow, value)


def _operand_axes(axes: Axes, full: tuple[Size, ...], source: fx.Node) -> Axes:
    found = broadcast(axes, full, shape_of(source))
    if found is None:
        raise Refusal("the scores are broadcast to a larger shape")
    return found


def _add_mask(flow: Flow, scores: _Scores, node: fx.Node, mask: fx.Node, axes: Axes, *, negated: bool = False) -> None:
    if scores.scale != 1.0:
        raise Refusal("the scores are scaled after a mask was added to them")
    scores.masks.append(mask_taps(flow, node, mask, "additive", axes, shape_of(node), negated=negated))


def _empty_rows(scores: _Scores, safe: bool) -> EmptyRows:
    """What the spelling gives for a row that sees no key.

    Raises:
        Refusal: that depends on the values of the masks.
    """
    if scores.sinks is not None:
        return "zero"  # the sink takes all the weight
    added = any(kind == "additive" for kind, _ in scores.masks)
    if any(math.isfinite(value) for value in scores.fills):
        if added or len(set(scores.fills)) > 1:
            raise Refusal("a finite fill value meets another mask: a row without keys depends on their values")
        return "mean"
    return "nan" if (scores.fills or added) and not safe else "zero"


# --------------------------------------------------------------------------- from the softmax forwards


@dataclasses.dataclass
class _Weights:
    """The weights on their way to the values: the node that holds them, its axes, and what was met."""

    node: fx.Node
    axes: Axes
    nodes: list[fx.Node] = dataclasses.field(default_factory=list)
    dropout: float = 0.0


def _walk_forward(flow: Flow, weights: _Weights, scores: _Scores) -> fx.Node:
    """From the softmax to the product with the values, which it returns."""
    while True:
        weights.nodes.append(weights.node)
        readers = flow.readers(weights.node)
        if len(readers) != 1 or readers[0].op == "output":
            raise Refusal("attention weights are used elsewhere")
        node = readers[0]
        if canonical.product(node) is not None:
            return node
        rate = canonical.dropout(node)
        if rate is not None:
            if rate > 0.0 and weights.dropout > 0.0:
                raise Refusal("the attention weights are dropped out twice")
            weights.dropout = max(weights.dropout, rate)
        elif _drops_sinks(node, scores):
            weights.axes = (*weights.axes[:-1], scores.keys)
        elif canonical.cast(node) is None:
            axes = apply_view(node, weights.axes)
            if axes is None:
                name = op_name(node) or getattr(node.target, "__name__", str(node.target))
                raise Refusal(f"the attention weights are changed before they reach the values ('{name}')")
            weights.axes = axes
        weights.node = node


def _drops_sinks(node: fx.Node, scores: _Scores) -> bool:
    start = canonical.last_slice(node)
    if scores.sinks is None or start is None or not same(shape_of(node)[-1], scores.keys[0].size):
        return False
    return start == (1 if scores.sink_first else 0)


# ---------------------------------------------------------------------------------- the two products


def _problem(flow: Flow, scores: _Scores, scored: tuple[fx.Node, Axes], weights: _Weights, output: fx.Node) -> Problem:
    """Operands and roles of the axes, from both matrix products."""
    (node, axes), wanted = scored, dtype_of(output)
    product = canonical.product(node)
    assert product is not None
    if product.added is not None:
        _add_mask(flow, scores, node, product.added, axes)
    known = {label: (axis, size) for label, axis, size in zip(product.result_labels, axes, shape_of(node), strict=True)}
    left, right = (_side_axes(product, side, known) for side in (0, 1))
    q_at, k_at = (0, 1) if _holds_keys(scores, right, left, product) else (1, 0)
    labels = (product.left_labels, product.right_labels)
    sides, q_labels, k_labels = ((product.left, left), (product.right, right)), labels[q_at], labels[k_at]
    only = [[label for label in mine if label in product.result_labels and label not in other]
            for mine, other in ((q_labels, k_labels), (k_labels, q_labels))]  # fmt: skip
    if _joined(known, only[1]) != resolve(scores.keys):
        raise Refusal("the softmax does not run over the keys")
    both = [label for label in product.result_labels if label in q_labels and label in k_labels]
    values, v_axes, result, v = _values(flow, weights, scores, output)
    return Problem(
        tuple(known[label][0] for label in both), tuple(known[label][0] for label in only[0]), scores.keys,
        _joined(known, product.summed()), values, result,
        trace(flow, node, sides[q_at][0], sides[q_at][1], wanted, folding=True),
        trace(flow, node, sides[k_at][0], sides[k_at][1], wanted, folding=True),
        trace(flow, output, v, v_axes, wanted, folding=False),
        scores.masks, scores.sinks,
    )  # fmt: skip


_Known = dict[str, tuple[Axis, Size]]


def _side_axes(product: Product, side: int, known: _Known) -> Axes:
    """The axes of one side of a product; labels that are new to `known` are added to it."""
    node, labels = (product.left, product.left_labels) if side == 0 else (product.right, product.right_labels)
    axes: list[Axis] = []
    for label, size in zip(labels, shape_of(node), strict=True):
        axis, full = known.setdefault(label, ((Factor(size),), size))
        if not same(size, full) and (label in product.summed() or not same(size, 1)):
            raise Refusal(f"the sides of the product '{node.name}' do not fit together")
        axes.append(axis if same(size, full) else ())
    return tuple(axes)


def _joined(known: _Known, labels: Iterable[str]) -> Axis:
    return tuple(factor for label in labels for factor in resolve(known[label][0]))


def _holds_keys(scores: _Scores, side: Axes, other: Axes, product: Product) -> bool:
    keys = set(resolve(scores.keys))
    if not keys:  # one key: only its place tells
        return product.result_labels[-1] in product.right_labels
    return keys <= set(factors(side)) and not keys & set(factors(other))


def _values(flow: Flow, weights: _Weights, scores: _Scores, output: fx.Node) -> tuple[Axis, Axes, Axes, fx.Node]:
    """(what values add, the axes of the values, the axes of the result, the values) of the second product."""
    product = canonical.product(output)
    assert product is not None
    if product.alpha != 1.0 or product.added is not None:
        raise Refusal("something is added to the attention output within the product")
    holds = [flow.read(output, side) is weights.node for side in (product.left, product.right)]
    if sum(holds) != 1:
        raise Refusal("the attention weights are not multiplied by values")
    side = holds.index(True)
    labels = (product.left_labels, product.right_labels)[side]
    known: _Known = dict(zip(labels, zip(weights.axes, shape_of(weights.node), strict=True), strict=True))
    if _joined(known, product.summed()) != resolve(scores.keys):
        raise Refusal("the attention weights are not summed over the keys")
    v_axes = _side_axes(product, 1 - side, known)
    added = [label for label in (product.right_labels, product.left_labels)[side] if label not in labels]
    result = tuple(known[label][0] for label in product.result_labels)
    return _joined(known, added), v_axes, result, (product.right, product.left)[side]
