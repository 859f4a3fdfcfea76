"""What one node, or a fixed handful, does to a score: readers that know spellings and nothing else.

Each reader takes a node and says what it means in one form whatever the spelling, or None. None of
them knows attention; `attention.py` puts their answers together.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from s2o_inductor.passes.flow import Flow
from s2o_inductor.passes.graph_utils import (
    Refusal,
    argument,
    dtype_of,
    fake,
    op_name,
    shape_of,
    tensor_argument,
)

_CASTS = frozenset(("to", "type", "type_as", "float", "half", "bfloat16", "double"))


def constant(flow: Flow, reader: fx.Node, value: Any) -> float | None:
    """A number, or a tensor that the graph fills with one number, as its dtype rounds it; else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, fx.Node) or flow.read(reader, value) is not value or fake(value) is None:
        return None
    inner: float | None = None
    name = op_name(value)
    if name in ("tensor", "scalar_tensor", "as_tensor"):
        inner = constant(flow, value, argument(value, 0, "data", "s"))
    elif name in ("full", "full_like"):
        inner = constant(flow, value, argument(value, 1, "fill_value"))
    elif name in ("new_full", "new_tensor"):
        inner = constant(flow, value, argument(value, 2 if name == "new_full" else 1, "fill_value", "data"))
    elif name in ("neg", "expand", *_CASTS) and tensor_argument(value) is not None:
        inner = constant(flow, value, tensor_argument(value))
        inner = -inner if inner is not None and name == "neg" else inner
    return None if inner is None else rounded(inner, dtype_of(value))


def rounded(value: float, dtype: torch.dtype) -> float:
    """A number as a dtype holds it; past its range it becomes an infinity."""
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))


@dataclasses.dataclass(frozen=True)
class Scaled:
    """`source * factor`; a factor of None is a number that is not known yet."""

    source: fx.Node
    factor: float | None


def scaled(flow: Flow, node: fx.Node) -> Scaled | None:
    """Reads a product with, or a quotient by, one number; None when the node is neither."""
    name, first = op_name(node), argument(node, 0, "input", "self")
    if name == "neg" and isinstance(first, fx.Node):
        return Scaled(first, -1.0)
    if name not in ("mul", "div") or argument(node, 2, "rounding_mode") is not None:
        return None
    second = argument(node, 1, "other")
    for tensor, number in ((first, second), (second, first)):
        if not isinstance(tensor, fx.Node) or fake(tensor) is None or (name == "div" and tensor is second):
            continue
        if isinstance(number, fx.Node) and isinstance(number.meta.get("example_value"), (torch.SymInt, torch.SymFloat)):
            return Scaled(tensor, None)
        factor = constant(flow, node, number)
        if factor is not None and shape_of(tensor) == shape_of(node) and dtype_of(tensor).is_floating_point:
            if name == "div" and factor == 0.0:
                return None
            return Scaled(tensor, factor if name == "mul" else 1.0 / factor)
    return None


def cast(node: fx.Node) -> fx.Node | None:
    """The source of a conversion between floating-point types on one device; None for anything else."""
    source = tensor_argument(node)
    before, after = (fake(source) if source is not None else None), fake(node)
    if op_name(node) not in _CASTS or before is None or after is None or before.device != after.device:
        return None
    return source if before.dtype.is_floating_point and after.dtype.is_floating_point else None


def widens(before: torch.dtype, after: torch.dtype) -> bool:
    """Whether a cast keeps every value and lets matrix products be no worse without it.

    Products of half-precision operands are accumulated in float32 anyway; float64 is a wish for
    more accuracy than that and is kept.
    """
    return before == after or (before in (torch.float16, torch.bfloat16) and after == torch.float32)


@dataclasses.dataclass(frozen=True)
class Filled:
    """Scores with positions replaced by one number: where `mask` holds if kind is "hidden", else elsewhere."""

    source: fx.Node
    mask: fx.Node
    kind: str
    value: float


def filled(flow: Flow, node: fx.Node, is_score: Any) -> Filled | None:
    """Reads masked_fill, where (either way round) and `x[mask] = number`; None when the node is none of them.

    Args:
        flow: the graph.
        node: the node to read.
        is_score: tells which of two tensors of a `where` the scores come through.

    Raises:
        Refusal: it is one of them, but not with one known number.
    """
    name = op_name(node)
    source: Any
    if name == "masked_fill":
        kind = "hidden"
        source, mask, value = tensor_argument(node), argument(node, 1, "mask"), argument(node, 2, "value")
    elif name == "setitem":
        kind = "hidden"
        source, mask, value = node.args[0], node.args[1], node.args[2]
        if not isinstance(mask, fx.Node) or fake(mask) is None or shape_of(mask) != shape_of(source):
            return None
    elif name == "where":
        source, mask, kind, value = _read_where(flow, node, is_score)
    else:
        return None
    if not isinstance(source, fx.Node) or not isinstance(mask, fx.Node):
        return None
    number = constant(flow, node, value)
    if number is None:
        raise Refusal(f"masked scores are replaced by a tensor ('{value}'), not by a known number")
    if fake(mask) is None or dtype_of(mask) != torch.bool:
        raise Refusal(f"the mask '{mask.name}' is not boolean")
    return Filled(source, mask, kind, rounded(number, dtype_of(source)))


def _read_where(flow: Flow, node: fx.Node, is_score: Any) -> tuple[Any, Any, str, Any]:
    if node.op == "call_method":  # x.where(condition, other)
        condition, kept, other = argument(node, 1, "condition"), node.args[0], argument(node, 2, "other")
    else:
        condition, kept, other = (argument(node, at, name) for at, name in enumerate(("condition", "input", "other")))
    if constant(flow, node, kept) is None and is_score(kept):
        return kept, condition, "visible", other
    return other, condition, "hidden", kept


@dataclasses.dataclass(frozen=True)
class Softmax:
    """A softmax over one dimension.

    Attributes:
        source: the scores, as the node that reads them (`reader`) names them.
        nodes: the nodes that make it up, the result last.
        safe: a row of -inf gives zeros, not NaN.
    """

    source: fx.Node
    reader: fx.Node
    nodes: tuple[fx.Node, ...]
    dim: int
    safe: bool = False


def softmax(flow: Flow, node: fx.Node) -> Softmax | None:
    """Reads softmax in any spelling, exp(x - max) / sum among them; None when the node is not its result."""
    name = op_name(node)
    if name in ("softmax", "_safe_softmax"):
        source, dim = tensor_argument(node), argument(node, 1, "dim")
        if source is None or fake(source) is None or type(dim) is not int:
            return None
        return Softmax(source, node, (node,), dim % max(len(shape_of(source)), 1), name == "_safe_softmax")
    return _exponentials(flow, node) if name == "div" else None


def _exponentials(flow: Flow, node: fx.Node) -> Softmax | None:
    """exp(x - max) / sum(exp(x - max)), where the subtraction is what makes it a softmax for all inputs."""
    top, bottom = (flow.read(node, argument(node, at, name)) for at, name in ((0, "input"), (1, "other")))
    if top is None or bottom is None or op_name(top) != "exp" or op_name(bottom) != "sum":
        return None
    source, dim = tensor_argument(top), _reduced_dim(bottom)
    if source is None or dim is None or flow.read(bottom, tensor_argument(bottom)) is not top:
        return None
    shifted = flow.read(top, source)
    if shifted is None or less_maximum(flow, shifted) is None:
        return None
    return Softmax(source, top, (top, bottom, node), dim)


def less_maximum(flow: Flow, node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """(x, the nodes that compute its maximum) when a node is x - max(x) over the last dimension."""
    if op_name(node) != "sub" or argument(node, 2, "alpha", default=1) != 1:
        return None
    source, peak = argument(node, 0, "input"), argument(node, 1, "other")
    value, nodes = flow.read(node, source), []
    step = flow.read(node, peak)
    while step is not None and op_name(step) in ("detach", "getitem"):
        nodes.append(step)
        if op_name(step) == "getitem" and argument(step, 1) != 0:
            return None
        step = flow.read(step, tensor_argument(step))
    if step is None or value is None or op_name(step) not in ("amax", "max"):
        return None
    inner = tensor_argument(step)
    if flow.read(step, inner) is not value or _reduced_dim(step) != len(shape_of(value)) - 1:
        return None
    return source, (step, *nodes)


def _reduced_dim(node: fx.Node) -> int | None:
    """The one dimension that a reduction runs over, when it keeps it; else None."""
    source, dims = tensor_argument(node), argument(node, 1, "dim", "axis")
    if isinstance(dims, (tuple, list)) and len(dims) == 1:
        dims = dims[0]
    if source is None or fake(source) is None or type(dims) is not int:
        return None
    if argument(node, 2, "keepdim", "keepdims", default=False) is not True:
        return None
    return dims % len(shape_of(source))


def dropout(node: fx.Node) -> float | None:
    """The probability with which a dropout node drops, 0.0 when it is switched off; None for other nodes.

    Raises:
        Refusal: the probability is not a constant below one.
    """
    if op_name(node) != "dropout":
        return None
    probability = argument(node, 1, "p", default=0.5)
    training = argument(node, 2, "training", "train", default=True)
    if not isinstance(training, bool):
        raise Refusal("whether dropout applies is not a constant yet")
    return dropout_probability(probability) if training else 0.0


def dropout_probability(value: Any) -> float:
    """A dropout probability as written.

    Raises:
        Refusal: it is not a constant in [0, 1).
    """
    if not isinstance(value, (int, float)):
        raise Refusal("the dropout probability is not a constant yet")
    if not 0.0 <= value < 1.0:
        raise Refusal(f"a dropout probability of {value} leaves no weights")
    return float(value)


@dataclasses.dataclass(frozen=True)
class Product:
    """A batched matrix product, every dimension under a label: `alpha * left @ right + added`.

    Labels of `result` that both sides have are batch dimensions; those that `result` lacks are
    summed over and stand on both sides.
    """

    left: fx.Node
    right: fx.Node
    left_labels: tuple[str, ...]
    right_labels: tuple[str, ...]
    result_labels: tuple[str, ...]
    alpha: float = 1.0
    added: fx.Node | None = None

    def summed(self) -> tuple[str, ...]:
        """The labels that are summed over, in the order of the left side."""
        return tuple(label for label in self.left_labels if label not in self.result_labels)


def product(node: fx.Node) -> Product | None:
    """Reads matmul, bmm, baddbmm and einsum of two tensors; None when the node is no product of that kind."""
    name = op_name(node)
    if name in ("matmul", "bmm"):
        left, right = argument(node, 0, "input"), argument(node, 1, "other", "mat2")
        return _matmul(left, right)
    if name == "baddbmm":
        return _baddbmm(node)
    if name == "einsum":
        return _einsum(node)
    return None


def _matmul(left: Any, right: Any) -> Product | None:
    a, b = fake(left), fake(right)
    if a is None or b is None or a.dim() < 2 or b.dim() < 2:
        return None
    batch = [f"batch{index}" for index in reversed(range(max(a.dim(), b.dim()) - 2))]
    return Product(
        left,
        right,
        (*batch[len(batch) - a.dim() + 2 :], "row", "inner"),
        (*batch[len(batch) - b.dim() + 2 :], "inner", "column"),
        (*batch, "row", "column"),
    )


def _baddbmm(node: fx.Node) -> Product | None:
    added, left, right = (argument(node, at, name) for at, name in enumerate(("input", "batch1", "batch2")))
    beta, alpha = (argument(node, at, name, default=1) for at, name in ((3, "beta"), (4, "alpha")))
    found = _matmul(left, right)
    if found is None or not all(isinstance(value, (int, float)) for value in (alpha, beta)) or beta not in (0, 1):
        return None
    return dataclasses.replace(found, alpha=float(alpha), added=added if beta == 1 else None)


def _einsum(node: fx.Node) -> Product | None:
    equation = argument(node, 0, "equation")
    operands: Sequence[Any] = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = operands[0]
    if not isinstance(equation, str) or len(operands) != 2 or any(fake(operand) is None for operand in operands):
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    left, right = (_labels(term, len(shape_of(operand))) for term, operand in zip(terms, operands, strict=True))
    longest = max((labels for labels in (left, right)), key=lambda labels: sum(label[0] == "." for label in labels))
    ellipsis = tuple(label for label in longest if label[0] == ".")
    if arrow:
        result = tuple(label for part in output.replace("...", ".") for label in (ellipsis if part == "." else (part,)))
    else:
        once = (label for label in string.ascii_letters if (label in left) != (label in right))
        result = (*ellipsis, *sorted(once))
    both = set(left) & set(right)
    sound = all(len(set(labels)) == len(labels) for labels in (left, right, result))
    sound &= all(label in both or label in result for label in (*left, *right)) and set(result) <= {*left, *right}
    return Product(operands[0], operands[1], left, right, result) if sound else None


def _labels(term: str, rank: int) -> tuple[str, ...]:
    """One label per dimension; those of an ellipsis are numbered from the right, where they align."""
    hidden = rank - len(term.replace("...", ""))
    dots = tuple(f".{index}" for index in reversed(range(hidden)))
    return tuple(label for part in term.replace("...", ".") for label in (dots if part == "." else (part,)))


def last_slice(node: fx.Node) -> int | None:
    """Where a slice of the last dimension starts, when a node takes that and all of the others; else None."""
    source = tensor_argument(node)
    if op_name(node) != "getitem" or source is None or fake(source) is None:
        return None
    index = argument(node, 1)
    items = index if isinstance(index, tuple) else (index,)
    if not items or not (Ellipsis in items[:-1] or len(items) == len(shape_of(source))):
        return None
    if any(item not in (Ellipsis, slice(None)) for item in items[:-1]) or not isinstance(items[-1], slice):
        return None
    start = items[-1].start or 0
    return start if items[-1].step in (None, 1) and type(start) is int else None
