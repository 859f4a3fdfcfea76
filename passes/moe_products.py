"""Products of a Dynamo graph whose weights are indexed by expert."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from s2o_inductor.passes import canonical
from s2o_inductor.passes.flow import Flow
from s2o_inductor.passes.graph_utils import Refusal, argument, fake, op_name, same, shape_of

INTEGERS = (torch.int32, torch.int64)


@dataclasses.dataclass(frozen=True)
class Product:
    """Rows times the matrix of their expert.

    Attributes:
        rows: the operand that holds one row per choice.
        weight: (E, ., .), before it is indexed by expert.
        transposed: the weight is stored (E, in, out).
        routing: offsets, or the expert of each row; None where every expert takes every token.
        shared: rows are the tokens (T, l) themselves, one for all choices of a token.
        bias: what the product itself adds to each row.
    """

    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    transposed: bool
    routing: fx.Node | None
    shared: bool = False
    bias: fx.Node | None = None


def read_product(flow: Flow, node: fx.Node) -> Product | None:
    name = getattr(node.target, "__name__", "").split(".")[0] if node.op == "call_function" else ""
    if name in ("grouped_mm", "_grouped_mm", "grouped_mm_fallback"):
        rows, weight = argument(node, 0, "input", "mat_a", "self"), argument(node, 1, "weight", "mat_b", "mat2")
        offsets = argument(node, 2, "offs")
        given = all(isinstance(one, fx.Node) for one in (rows, weight, offsets))
        if not given or len(shape_of(weight)) != 3 or len(shape_of(rows)) != 2:
            return None
        base, flipped = _untransposed(flow, node, weight)
        return Product(node, rows, base, not flipped, offsets)
    if op_name(node) in ("bmm", "matmul"):
        left, right = argument(node, 0, "input", "self"), argument(node, 1, "mat2", "other")
        for rows, weight, transposed in ((left, right, True), (right, left, False)):
            gathered = flow.read(node, weight)
            indexed = None if gathered is None else _gathered_weight(flow, gathered)
            if indexed is not None and isinstance(rows, fx.Node):
                return Product(node, rows, indexed[0], transposed, indexed[1])
    return _read_einsum(flow, node) if op_name(node) == "einsum" else None


def read_dense_product(flow: Flow, node: fx.Node) -> Product | None:
    """A batched product (E, T, in) x (E, in, out) whose batch may be the experts."""
    if op_name(node) not in ("bmm", "matmul"):
        return None
    rows, weight = argument(node, 0, "input", "self"), argument(node, 1, "mat2", "other")
    if fake(rows) is None or fake(weight) is None or len(shape_of(rows)) != 3 or len(shape_of(weight)) != 3:
        return None
    if flow.read(node, rows) is None or flow.read(node, weight) is None:
        return None
    base, flipped = _untransposed(flow, node, weight)
    return Product(node, rows, base, not flipped, None)


def read_linear(flow: Flow, node: fx.Node) -> Product | None:
    """Rows times one matrix, which may be that of one expert."""
    name, bias = op_name(node), None
    if name == "linear":
        rows, weight, bias = (argument(node, at, key) for at, key in enumerate(("input", "weight", "bias")))
    elif name in ("matmul", "mm"):
        rows, weight = argument(node, 0, "input", "self"), argument(node, 1, "mat2", "other")
    else:
        return None
    known = all(isinstance(one, fx.Node) and fake(one) is not None for one in (rows, weight))
    if not known or len(shape_of(weight)) != 2 or len(shape_of(rows)) < 2:
        return None
    base, flipped = _untransposed(flow, node, weight)
    return Product(node, rows, base, flipped == (name == "linear"), None, bias=bias)


def is_idle_dropout(node: fx.Node) -> bool:
    """Whether a node is dropout that drops nothing."""
    idle = argument(node, 1, "p", default=0.5) == 0 or argument(node, 2, "training", "train", default=True) is False
    return op_name(node) == "dropout" and idle


def _read_einsum(flow: Flow, node: fx.Node) -> Product | None:
    """Rows (T, in) or (T, K, in) times weights[ids] (T, K, ., .)."""
    found = canonical.product(node)
    if found is None:
        return None
    sides = ((found.left, found.left_labels), (found.right, found.right_labels))
    for (rows, row_labels), (weight, labels) in (sides, sides[::-1]):
        gathered = flow.read(node, weight)
        source = None if gathered is None or len(labels) != 4 else gather(gathered)
        if source is None or source[1] is None or len(shape_of(source[0])) != 3 or len(shape_of(source[1])) != 2:
            continue
        token, choice, *matrix = labels
        summed = found.summed()
        shared = row_labels == (token, *summed)
        if len(summed) != 1 or summed[0] not in matrix or not (shared or row_labels == (token, choice, *summed)):
            continue
        out = next(label for label in matrix if label not in summed)
        if found.result_labels == (token, choice, out):
            return Product(node, rows, source[0], matrix[0] in summed, source[1], shared)
    return None


def _untransposed(flow: Flow, reader: fx.Node, weight: fx.Node) -> tuple[fx.Node, bool]:
    """The tensor of which a weight (E, in, out) or (in, out) is the transpose, if it is one."""
    if op_name(weight) in ("transpose", "mT", "T") and flow.read(reader, weight) is weight:
        last = len(shape_of(weight))
        dims = {argument(weight, 1, "dim0"), argument(weight, 2, "dim1")}
        source, whole = weight.args[0], op_name(weight) == "mT" or (op_name(weight) == "T" and last == 2)
        if (whole or dims in ({-1, -2}, {last - 2, last - 1})) and isinstance(source, fx.Node):
            return source, True
    return weight, False


def _gathered_weight(flow: Flow, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """weights[expert of each row], as (weights, index)."""
    gathered = gather(node)
    if gathered is None or gathered[1] is None or len(shape_of(gathered[0])) != 3:
        return None
    index = gathered[1]
    return (gathered[0], index) if len(shape_of(index)) == 1 else None


def gather(node: fx.Node) -> tuple[fx.Node, fx.Node | None] | None:
    """What is gathered along its first axis and by which index; repeat_interleave has none."""
    name, source = op_name(node), argument(node, 0, "input", "self")
    if not isinstance(source, fx.Node) or fake(source) is None:
        return None
    if name == "repeat_interleave":
        return (source, None) if argument(node, 2, "dim") == 0 else None
    if name == "index_select":
        index = argument(node, 2, "index") if argument(node, 1, "dim") == 0 else None
    elif name == "gather":  # of whole rows: one index per row, expanded to its width
        index = argument(node, 2, "index") if argument(node, 1, "dim") == 0 else None
        index = index if isinstance(index, fx.Node) and op_name(index) in ("expand", "expand_as") else None
    elif name == "getitem":
        index = node.args[1]
        index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    else:
        return None
    value = fake(index)
    return (source, index) if value is not None and value.dtype in INTEGERS else None


def read_bias(flow: Flow, node: fx.Node, rows: fx.Node) -> fx.Node:
    """The biases (E, n) of which a sum adds one to each row: gathered by expert, or (E, 1, n) where all experts run.

    Raises:
        Refusal: it adds something else.
    """
    for at in (0, 1):
        value = flow.read(node, argument(node, at, *(("input", "self") if at == 0 else ("other",))))
        if value is not None and value is not rows:
            gathered = gather(value)
            if gathered is not None and gathered[1] is not None and len(shape_of(gathered[0])) == 2:
                return gathered[0]
            source = flow.read(value, argument(value, 0, "input", "self"))
            added_axis = op_name(value) == "unsqueeze" or None in _index_of(value)
            if source is not None and added_axis and len(shape_of(source)) == 2:
                (many, _, columns), (number, width) = shape_of(value), shape_of(source)
                if same(many, number) and same(columns, width):
                    return source
    raise Refusal("something other than a bias by expert is added to the experts' rows")


def _index_of(node: fx.Node) -> tuple[object, ...]:
    index = node.args[1] if op_name(node) == "getitem" else ()
    return tuple(one for one in (index if isinstance(index, tuple) else (index,)) if not isinstance(one, fx.Node))
