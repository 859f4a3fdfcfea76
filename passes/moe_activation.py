"""What an expert's activation computes, found by running its nodes on numbers.

Between the two products of an expert stand a handful of nodes that act on each row: halves, clamps,
a sigmoid or a square. How they are written is endless; what they may compute is the short list of
`ExpertSpec`. So the nodes themselves are run on random rows in float64 and compared with each formula
of that list, with constants taken from the nodes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from s2o_inductor.moe_ops import hidden_rows
from s2o_inductor.moe_spec import Activation, ExpertSpec
from s2o_inductor.passes import verify
from s2o_inductor.passes.flow import Flow
from s2o_inductor.passes.graph_utils import Refusal, dtype_of, fake, op_name, shape_of
from s2o_inductor.passes.moe_products import is_idle_dropout, read_bias

_ROWS = 8
# What acts on every row alone, along its last axis at most.
ROWWISE = frozenset(
    ("add", "sub", "mul", "div", "neg", "pow", "square", "abs", "exp", "tanh", "sigmoid", "erf", "silu", "gelu", "relu",
     "clamp", "clamp_min", "clamp_max", "minimum", "maximum", "rsub", "masked_fill", "chunk", "split", "getitem",
     "unsqueeze", "squeeze", "contiguous", "to", "float", "double", "half", "bfloat16", "type_as", "quick_gelu")
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reading:
    """An activation.

    Attributes:
        spec: the formula; its score and storage are not read here.
        bias: (E, columns), added to the first product.
        scores: the node that multiplies each hidden row by one number, and that operand.
        swapped: of two first products, the second one is the gate.
    """

    spec: ExpertSpec
    bias: fx.Node | None = None
    scores: tuple[fx.Node, fx.Node] | None = None
    swapped: bool = False


def read_activation(flow: Flow, first: list[fx.Node], last: fx.Node, rows: fx.Node, inner: int) -> Reading:
    """The formula between the first products and the rows of the last one.

    Raises:
        Refusal: it is none of those that `ExpertSpec` can say.
    """
    nodes, given, bias, scores = _collect(flow, first, last, rows)
    columns = [shape_of(node)[-1] if shape_of(node)[-1] != 1 else shape_of(node)[-2] for node in first]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), _disable_current_modes():
        pre = []
        for node, width in zip(first, columns, strict=True):
            if not isinstance(width, int):
                raise Refusal("the width of the experts is not a constant")
            x = 4.0 * torch.randn(_ROWS, width, generator=generator, dtype=torch.float64)
            pre.append(x)
            given[node] = _placed(x, node)
        target = _run(nodes, given, rows).reshape(_ROWS, -1)
        if target.shape[1] != inner:
            raise Refusal("the rows of the second product are not as wide as its weights")
        for spec, swapped in _candidates(nodes, len(first), pre[0].shape[1] == inner):
            joined = torch.cat(pre[::-1] if swapped else pre, dim=1)
            if torch.allclose(hidden_rows(joined, spec), target, rtol=1e-9, atol=1e-9):
                return Reading(spec, bias, scores, swapped)
    raise Refusal("the activation between the experts' products is none that s2o knows")


def _placed(x: Tensor, node: fx.Node) -> Tensor:
    """Rows in the shape of a product: batched ones have an axis of size 1, or one of tokens or choices."""
    shape = shape_of(node)
    if len(shape) == 2:
        return x.clone()
    return x.clone().unsqueeze(2) if shape[2] == 1 != shape[1] else x.clone().unsqueeze(1)


def _collect(
    flow: Flow, first: list[fx.Node], last: fx.Node, rows: fx.Node
) -> tuple[list[fx.Node], dict[fx.Node, Any], fx.Node | None, tuple[fx.Node, fx.Node] | None]:
    """The nodes in between, neutral values for what else they read, the bias, and the routing weights."""
    inside: set[fx.Node] = set()
    given: dict[fx.Node, Any] = {}
    bias: fx.Node | None = None
    scores: tuple[fx.Node, fx.Node] | None = None
    derived = _derived(flow, first, last)
    pending = [one for one in (rows, flow.read(last, rows)) if one is not None]
    while pending:
        node = pending.pop()
        if node in inside or node in first:
            continue
        if op_name(node) not in ROWWISE and not is_idle_dropout(node):
            raise Refusal(f"'{op_name(node) or node.name}' stands between the experts' products")
        inside.add(node)
        for source in node.all_input_nodes:
            for value in {source, flow.read(node, source)} - {None}:
                assert value is not None
                if value in derived:
                    pending.append(value)
                elif dtype_of(value) == torch.bool and op_name(node) == "masked_fill":
                    given[value] = torch.zeros(_ROWS, 1, dtype=torch.bool)
                elif op_name(node) == "mul" and fake(value) is not None and shape_of(value)[-1] == 1 and scores is None:
                    given[value], scores = torch.ones(_ROWS, 1, dtype=torch.float64), (node, source)
                elif op_name(node) == "add" and bias is None and len(first) == 1:
                    bias = read_bias(flow, node, next(iter(first)))
                    given[value] = torch.zeros(1, dtype=torch.float64)
                else:
                    raise Refusal(f"'{value.name}' takes part in the activation")
    return sorted(inside, key=flow.position.__getitem__), given, bias, scores


def _derived(flow: Flow, first: list[fx.Node], last: fx.Node) -> set[fx.Node]:
    """The first products and every node in front of the last one that reads what comes from them."""
    found = set(first)
    for node in flow.nodes[flow.position[first[0]] : flow.position[last]]:
        values = (flow.read(node, source) for source in node.all_input_nodes)
        if node not in found and (
            any(value in found for value in values) or not found.isdisjoint(node.all_input_nodes)
        ):
            found.add(node)
    return found


def _run(nodes: list[fx.Node], given: dict[fx.Node, Any], result: fx.Node) -> Tensor:
    values = dict(given)
    for node in nodes:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        try:
            values[node] = verify.in_double(node, args, kwargs)
        except Exception as error:  # a user's code on rows of ours: that it fails only means "not recognised"
            raise Refusal(f"the activation could not be run on sample rows: {type(error).__name__}: {error}") from None
    found = values[result]
    if not isinstance(found, Tensor):
        raise Refusal("the activation is not a tensor")
    return found


def _candidates(nodes: list[fx.Node], products: int, narrow: bool) -> Iterator[tuple[ExpertSpec, bool]]:
    """Formulas with every constant of the nodes where one may stand, the simplest first."""
    constants: set[float] = set()

    def note(value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            constants.add(float(value))
        return value

    for node in nodes:
        fx.node.map_aggregate((node.args, dict(node.kwargs)), note)
    return formulas(constants, products, narrow)


def formulas(constants: Iterable[float], products: int, narrow: bool) -> Iterator[tuple[ExpertSpec, bool]]:
    """Every formula with some of these constants, the simplest first, and whether the second product is the gate.

    Args:
        constants: positive numbers that may be slope, bound or shift.
        products: first products of an expert, one or two.
        narrow: one first product is as wide as the hidden rows: there is no gate.
    """
    found = sorted(constants)
    alphas, shifts = ([start, *(one for one in found if one != start)] for start in (1.0, 0.0))
    limits: list[float | None] = [None, *found]
    gates: tuple[Any, ...] = ("none",) if narrow else ("half", "half_swapped", "interleaved")
    if products == 2:
        gates = ("separate",)
    for limit, shift, alpha in itertools.product(limits, shifts, alphas):
        for gate, activation, swapped in itertools.product(gates, get_args(Activation), (False, True)[:products]):
            if (gate == "none" and shift) or (alpha != 1.0 and activation != "silu"):
                continue
            yield ExpertSpec(activation, gate, alpha=alpha, limit=limit, shift=shift), swapped
