"""Finds routed experts in a Dynamo graph by their structure: stage 1 of the pipeline.

A candidate is a product whose weights are indexed by expert: a grouped product with offsets, or a batched
one with gathered weights. From there the finder reads outwards: back to the gather of tokens and the
choices (T, K), forward through activation, second product and routing weights to the sum over each
token's choices. No module name counts. What an activation means is settled by running its nodes on
numbers (`moe_activation.py`), and what the index arithmetic means by replaying the whole site beside
the op (`moe_verify.py`). The graph is never edited.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import fx

from s2o_inductor.moe_ops import is_routed
from s2o_inductor.moe_spec import Score
from s2o_inductor.passes.flow import Flow
from s2o_inductor.passes.graph_utils import (
    Refusal,
    Size,
    argument,
    dtype_of,
    fake,
    op_name,
    plain,
    same,
    shape_of,
    where,
)
from s2o_inductor.passes.moe_activation import read_activation
from s2o_inductor.passes.moe_region import region_of
from s2o_inductor.passes.records import Declined, ExpertsSite

_CASTS = frozenset(("to", "type", "type_as", "float", "half", "bfloat16", "double"))
# What moves rows or fills those of no expert, and computes nothing.
_MOVES = _CASTS | {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "unsqueeze",
    "squeeze",
    "contiguous",
    "clone",
    "masked_fill",
}
_GATHERS = frozenset(("getitem", "index_select", "repeat_interleave"))
_SUMS = frozenset(("sum", "index_add", "scatter_add"))
_INTEGERS = (torch.int32, torch.int64)


@dataclasses.dataclass(frozen=True)
class Product:
    """Rows times the matrix of their expert.

    Attributes:
        rows: the operand that holds one row per choice.
        weight: (E, ., .), before it is indexed by expert.
        transposed: the weight is stored (E, in, out).
        routing: offsets, or the expert of each row.
    """

    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    transposed: bool
    routing: fx.Node


def find_experts(graph: fx.Graph) -> tuple[list[ExpertsSite], list[Declined]]:
    """Every site of routed experts in graph order, and every candidate that is none, with its reason.

    Args:
        graph: a Dynamo graph whose nodes hold fake tensors under meta["example_value"].
    """
    flow = Flow(graph)
    products: dict[fx.Node, Product] = {}
    for node in flow.nodes:
        found = _read_product(flow, node)
        if found is not None:
            products[node] = found
    sites: list[ExpertsSite] = []
    declined: list[Declined] = []
    used: set[fx.Node] = set()
    for last in products.values():
        try:
            first = _first_products(flow, last, products)
            if not first:
                continue  # the first of its pair, or a product that feeds none
            used.update((last.node, *(product.node for product in first)))
            sites.append(_read_site(flow, first, last))
        except Refusal as refusal:
            used.add(last.node)
            declined.append(Declined("moe", where(last.node), str(refusal), last.node))
    for node in products.keys() - used:
        declined.append(Declined("moe", where(node), "no second product by expert follows the activation", node))
    return sites, declined


def _read_product(flow: Flow, node: fx.Node) -> Product | None:
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
    return None


def _untransposed(flow: Flow, reader: fx.Node, weight: fx.Node) -> tuple[fx.Node, bool]:
    """The tensor of which a weight (E, in, out) is the transpose, if it is one."""
    if op_name(weight) in ("transpose", "mT") and flow.read(reader, weight) is weight:
        dims = {argument(weight, 1, "dim0"), argument(weight, 2, "dim1")}
        source = weight.args[0]
        if (op_name(weight) == "mT" or dims in ({-1, -2}, {1, 2})) and isinstance(source, fx.Node):
            return source, True
    return weight, False


def _gathered_weight(flow: Flow, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """weights[expert of each row], as (weights, index)."""
    gathered = _gather(node)
    if gathered is None or gathered[1] is None or len(shape_of(gathered[0])) != 3:
        return None
    index = gathered[1]
    return (gathered[0], index) if len(shape_of(index)) == 1 else None


def _gather(node: fx.Node) -> tuple[fx.Node, fx.Node | None] | None:
    """What is gathered along its first axis and by which index; repeat_interleave has none."""
    name, source = op_name(node), argument(node, 0, "input", "self")
    if not isinstance(source, fx.Node) or fake(source) is None:
        return None
    if name == "repeat_interleave":
        return (source, None) if argument(node, 2, "dim") == 0 else None
    if name == "index_select":
        index = argument(node, 2, "index") if argument(node, 1, "dim") == 0 else None
    elif name == "getitem":
        index = node.args[1]
        index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    else:
        return None
    value = fake(index)
    return (source, index) if value is not None and value.dtype in _INTEGERS else None


def _first_products(flow: Flow, last: Product, products: dict[fx.Node, Product]) -> list[Product]:
    """The products from which the rows of another one are computed, nearest only, in graph order."""
    found: set[fx.Node] = set()
    pending, seen = [flow.read(last.node, last.rows)], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in products:
            found.add(node)
        elif _gather(node) is None and op_name(node) not in ("layer_norm", "rms_norm", "linear"):
            pending += [flow.read(node, source) for source in node.all_input_nodes]
    return [products[node] for node in sorted(found, key=flow.position.__getitem__)]


def _read_site(flow: Flow, first: list[Product], last: Product) -> ExpertsSite:
    """The site of one or two first products and the second one.

    Raises:
        Refusal: what surrounds them is not a routed sum that the op computes.
    """
    if len(first) > 2 or len({(flow.read(one.node, one.rows), one.transposed) for one in first}) != 1:
        raise Refusal("the products by expert do not share their rows")
    if first[0].transposed != last.transposed:
        raise Refusal("first and second weights are stored in different orders, (in, out) and (out, in)")
    tokens, scores = _read_tokens(flow, first[0])
    width = shape_of(tokens)[-1]
    ids = _read_choices(flow, (first[0].routing, last.routing), shape_of(tokens)[0])
    output, weights, b2 = _read_combine(flow, last, tokens, ids)
    score: Score = "output"
    if scores is not None:
        if weights is not None:
            raise Refusal("routing weights are applied twice")
        weights, score = _read_scores(flow, *scores, ids), "input"
    activation = read_activation(flow, [one.node for one in first], last.node, last.rows, _inner(last))
    if activation.scores is not None:
        if weights is not None:
            raise Refusal("routing weights are applied twice")
        weights, score = _read_scores(flow, *activation.scores, ids), "hidden"
    if weights is None:
        raise Refusal("the experts' outputs are summed without routing weights")
    if not same(shape_of(output)[-1], width):
        raise Refusal("the experts change the width of a token")
    w1, w3 = first[0].weight, None
    if len(first) == 2:
        w1, w3 = (one.weight for one in (first if not activation.swapped else first[::-1]))
    spec = dataclasses.replace(activation.spec, score=score, transposed=last.transposed)
    operands = [tokens, w1, last.weight, ids, weights, w3, activation.bias, b2]
    _check_operands(operands, first[0].node, output)
    region = region_of(flow, output, {one for one in operands if one is not None})
    return ExpertsSite(
        where(first[0].node), output, region, tokens, w1, last.weight, ids, weights, spec, w3, activation.bias, b2
    )


def _inner(last: Product) -> int:
    inner = shape_of(last.weight)[1 if last.transposed else 2]
    if not isinstance(inner, int):
        raise Refusal("the width of the experts is not a constant")
    return inner


def _read_tokens(flow: Flow, product: Product) -> tuple[fx.Node, tuple[fx.Node, fx.Node] | None]:
    """The tokens (T, l) whose rows are gathered, and the routing weights on them, as (reader, node), if any."""
    scores = None
    node = flow.read(product.node, product.rows)
    while node is not None:
        name = op_name(node)
        if name in _GATHERS and (gathered := _gather(node)) is not None:
            if len(shape_of(gathered[0])) != 2:
                raise Refusal("tokens are not gathered from a matrix (tokens, width)")
            return gathered[0], scores
        if name == "mul" and scores is None:
            rows, factor = _rows_and_factor(node)
            scores, node = (node, factor), flow.read(node, rows)
        elif name in _MOVES:
            _check_fill(node)
            node = flow.read(node, argument(node, 0, "input", "self"))
        else:
            raise Refusal(f"the rows of the experts come from '{name or node.name}', not from a gather of tokens")
    raise Refusal("the rows of the experts are changed in place through a view")


def _check_fill(node: fx.Node) -> None:
    if op_name(node) == "masked_fill" and argument(node, 2, "value") != 0:
        raise Refusal("masked rows are filled with a value other than 0")


def _rows_and_factor(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The sides of a product of rows (n, width) with one number per row (n, 1)."""
    left, right = argument(node, 0, "input", "self"), argument(node, 1, "other")
    for rows, factor in ((left, right), (right, left)):
        if fake(rows) is not None and fake(factor) is not None and shape_of(factor)[-1] == 1 != shape_of(rows)[-1]:
            return rows, factor
    raise Refusal("the experts' rows are multiplied by something other than one weight per row")


def _read_choices(flow: Flow, routings: Iterable[fx.Node], tokens: Size) -> fx.Node:
    """The matrix (T, K) of expert numbers from which offsets and indices are computed.

    Raises:
        Refusal: there is none, or the two products disagree about it.
    """
    found = set()
    for routing in routings:
        layer: list[fx.Node] = [routing]
        seen = set(layer)
        while layer:
            hits = [node for node in layer if _is_choices(node, tokens)]
            if hits:
                found.update(hits)
                break
            values = [flow.read(node, source) for node in layer for source in node.all_input_nodes]
            layer = [node for node in dict.fromkeys(values) if node is not None and node not in seen]
            seen.update(layer)
        else:
            raise Refusal("no matrix (tokens, choices) of expert numbers leads to the products by expert")
    if len(found) != 1:
        raise Refusal("the products by expert follow different choices")
    return found.pop()


def _is_choices(node: fx.Node, tokens: Size) -> bool:
    value = fake(node)
    return value is not None and value.dtype in _INTEGERS and value.dim() == 2 and same(shape_of(node)[0], tokens)


def _read_scores(flow: Flow, reader: fx.Node, factor: fx.Node, ids: fx.Node) -> fx.Node:
    """The routing weights (T, K) behind one weight per row."""
    node, shape = flow.read(reader, factor), shape_of(ids)
    while node is not None:
        found = shape_of(node)
        if len(found) == 2 and all(map(same, found, shape)):
            return node
        if op_name(node) not in _MOVES | _GATHERS:
            break
        node = flow.read(node, argument(node, 0, "input", "self"))
    raise Refusal("the weight of a row does not come from a matrix (tokens, choices) of routing weights")


def _read_combine(
    flow: Flow, last: Product, tokens: fx.Node, ids: fx.Node
) -> tuple[fx.Node, fx.Node | None, fx.Node | None]:
    """From the second product to the sum over a token's choices: (output, routing weights or None, bias or None)."""
    node, weights, bias, summed = last.node, None, None, False
    while not summed or not all(map(same, shape_of(node), shape_of(tokens))):
        readers = list(dict.fromkeys(flow.readers(node)))
        if len(readers) != 1 or readers[0].op == "output":
            raise Refusal("what single experts give is used other than in a weighted sum")
        reader = readers[0]
        name = op_name(reader)
        if name == "mul" and weights is None and not summed:
            weights = _read_scores(flow, reader, _rows_and_factor(reader)[1], ids)
        elif name == "add" and bias is None and weights is None:
            bias = read_bias(flow, reader, node)
        elif name == "masked_fill":
            _check_fill(reader)
        elif name in _SUMS and not summed:
            summed = True
        elif name not in _MOVES and _gather(reader) is None:
            raise Refusal(f"'{name or reader.name}' follows the experts, not a weighted sum over a token's choices")
        node = reader
    readers = list(dict.fromkeys(flow.readers(node)))
    if dtype_of(node) != dtype_of(tokens) and len(readers) == 1 and op_name(readers[0]) in _CASTS:
        node = readers[0]
    return node, weights, bias


def read_bias(flow: Flow, node: fx.Node, rows: fx.Node) -> fx.Node:
    """The biases (E, n) of which a sum adds one to each row.

    Raises:
        Refusal: it adds something else.
    """
    for at in (0, 1):
        value = flow.read(node, argument(node, at, *(("input", "self") if at == 0 else ("other",))))
        if value is not None and value is not rows:
            gathered = _gather(value)
            if gathered is not None and gathered[1] is not None and len(shape_of(gathered[0])) == 2:
                return gathered[0]
    raise Refusal("something other than a bias by expert is added to the experts' rows")


def _check_operands(operands: Iterable[fx.Node | None], product: fx.Node, output: fx.Node) -> None:
    tokens, *others = operands
    assert tokens is not None
    for node in (tokens, output, *others):
        if node is not None and (reason := plain(node)) is not None:
            raise Refusal(reason)
    w1, w2, _, _, w3, b1, b2 = others
    assert w1 is not None
    kinds = {dtype_of(node) for node in (w1, w2, w3, b1, b2) if node is not None}
    if kinds != {dtype_of(product)}:
        raise Refusal("the products by expert do not run in the dtype of their weights and biases")
    value = fake(w1)
    assert value is not None
    if not is_routed(value.device):
        raise Refusal(f"no {value.device.type.upper()} kernel that is known to be faster in this version")
