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
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from s2o_inductor.moe_ops import is_routed
from s2o_inductor.moe_spec import Score
from s2o_inductor.passes import canonical
from s2o_inductor.passes.flow import Flow, written
from s2o_inductor.passes.graph_utils import (
    Refusal,
    Size,
    argument,
    dtype_of,
    fake,
    is_contiguous,
    made,
    op_name,
    plain,
    product_of_sizes,
    same,
    shape_of,
    where,
)
from s2o_inductor.passes.moe_activation import read_activation
from s2o_inductor.passes.moe_products import INTEGERS, Product, gather, read_bias, read_product
from s2o_inductor.passes.moe_region import region_of
from s2o_inductor.passes.records import Declined, ExpertsSite, PerExpert, each

CASTS = frozenset(("to", "type", "type_as", "float", "half", "bfloat16", "double"))
# What moves rows or fills those of no expert, and computes nothing.
MOVES = CASTS | {
    "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "clone", "masked_fill",
}  # fmt: skip
_GATHERS = frozenset(("getitem", "index_select", "repeat_interleave", "gather"))
_SUMS = frozenset(("sum", "index_add", "scatter_add"))
# What never stands between the two products of an expert: behind it lie other layers.
_OUTSIDE = _SUMS | {"layer_norm", "rms_norm", "linear", "repeat", "expand"}
ZEROS = frozenset(("zeros", "zeros_like", "new_zeros"))


@dataclasses.dataclass(frozen=True)
class Combine:
    """From the second product to the sum over a token's choices.

    Attributes:
        factor: what multiplies single outputs, as (reader, node).
        base: what the sum is added to, where that is no fresh zeros.
    """

    output: fx.Node
    factor: tuple[fx.Node, fx.Node] | None
    bias: fx.Node | None
    base: fx.Node | None


def find_experts(graph: fx.Graph) -> tuple[list[ExpertsSite], list[Declined]]:
    """Every site of routed experts in graph order, and every candidate that is none, with its reason.

    Args:
        graph: a Dynamo graph whose nodes hold fake tensors under meta["example_value"].
    """
    from s2o_inductor.passes import moe_candidates, moe_dense, moe_unrolled

    flow = Flow(graph)
    read = ((node, read_product(flow, node)) for node in flow.nodes)
    products = {node: product for node, product in read if product is not None}
    sites, declined, used = read_pairs(flow, products, _read_site)
    for node in products.keys() - used:
        declined.append(Declined("moe", where(node), "no second product by expert follows the activation", node))
    dense, refused, of_dense = read_pairs(flow, moe_dense.dense_products(flow), moe_dense.read_site)
    unrolled, others, lookups = moe_unrolled.find_unrolled(flow)
    declined += refused + others + moe_candidates.find_candidates(flow, used | of_dense | lookups)
    return sorted([*sites, *dense, *unrolled], key=lambda site: flow.position[site.output]), declined


def read_pairs(
    flow: Flow, products: dict[fx.Node, Product], read: Callable[[Flow, list[Product], Product], ExpertsSite]
) -> tuple[list[ExpertsSite], list[Declined], set[fx.Node]]:
    """The sites of first and second products, the pairs that are none, and the products of either."""
    sites: list[ExpertsSite] = []
    declined: list[Declined] = []
    used: set[fx.Node] = set()
    for last in products.values():
        try:
            first = _first_products(flow, last, products)
            if not first:
                continue  # the first of its pair, or a product that feeds none
            used.update((last.node, *(product.node for product in first)))
            sites.append(read(flow, first, last))
        except Refusal as refusal:
            used.add(last.node)
            declined.append(Declined("moe", where(last.node), str(refusal), last.node))
    return sites, declined, used


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
        elif gather(node) is None and op_name(node) not in _OUTSIDE:
            pending += [flow.read(node, source) for source in node.all_input_nodes]
    return [products[node] for node in sorted(found, key=flow.position.__getitem__)]


def _read_site(flow: Flow, first: list[Product], last: Product) -> ExpertsSite:
    """The site of one or two first products and the second one.

    Raises:
        Refusal: what surrounds them is not a routed sum that the op computes.
    """
    sources = dict.fromkeys(_read_tokens(flow, one) for one in first)
    if len(first) > 2 or len(sources) != 1 or len({one.transposed for one in first}) != 1:
        raise Refusal("the products by expert do not share their rows")
    tokens, factor = next(iter(sources))
    ids = _read_choices(flow, (*(one.routing for one in first), last.routing), shape_of(tokens)[0])
    combine = read_combine(flow, last, tokens)
    site = make_site(
        flow, first, last, tokens, ids, combine, factor, lambda reader, node: _read_scores(flow, reader, node, ids)
    )
    return dataclasses.replace(site, wraps=_may_wrap(flow, site, last.routing))


def _may_wrap(flow: Flow, site: ExpertsSite, index: fx.Node | None) -> bool:
    """Whether choices index the weights as they are, and may be negative: those of a top-k are not."""
    node, gathers = _moved(flow, site.ids), [gather(one) for one in site.region if op_name(one) == "getitem"]
    if (site.last, index) not in gathers or _moved(flow, index) is not node:
        return False
    if node is None or op_name(node) not in ("getitem", "indices"):
        return node is None or op_name(node) not in ("argmax", "argsort")
    source, places = node.args[0], op_name(node) == "indices" or node.args[1] == 1
    return not (places and isinstance(source, fx.Node) and op_name(source) in ("topk", "sort", "max"))


def _moved(flow: Flow, node: fx.Node | None) -> fx.Node | None:
    """What integers are a view or a copy of."""
    while node is not None and op_name(node) in MOVES - {"masked_fill"} and dtype_of(node) in INTEGERS:
        node = flow.read(node, argument(node, 0, "input", "self"))
    return node


def make_site(
    flow: Flow, first: list[Product], last: Product, tokens: fx.Node, ids: fx.Node, combine: Combine,
    factor: tuple[fx.Node, fx.Node] | None, read_scores: Callable[[fx.Node, fx.Node], fx.Node],
    own: Callable[[fx.Node], PerExpert] | None = None,
) -> ExpertsSite:  # fmt: skip
    """The site out of its parts.

    Args:
        flow: of the graph.
        first: one or two products, and
        last: what follows them: of all experts, or of the first of those that `own` tells apart.
        tokens: as in `ExpertsSite`, and so are
        ids: the choices.
        combine: what follows the second product.
        factor: what multiplies the tokens.
        read_scores: leads from a factor to its matrix.
        own: from a weight of the first expert to those of all.

    Raises:
        Refusal: the parts make no site.
    """
    if any(one.transposed != last.transposed for one in first):
        raise Refusal("first and second weights are stored in different orders, (in, out) and (out, in)")
    activation = read_activation(flow, [one.node for one in first], last.node, last.rows, inner_width(last))
    found: list[tuple[Score, tuple[fx.Node, fx.Node]]] = []
    placed: tuple[tuple[Score, Any], ...] = (
        ("output", combine.factor), ("input", factor), ("hidden", activation.scores),
    )  # fmt: skip
    found = [(score, one) for score, one in placed if one is not None]
    if len(found) != 1:
        raise Refusal(
            "routing weights are applied twice" if found else "the experts' outputs are summed without routing weights"
        )
    score, (reader, node) = found[0]
    weights = read_scores(reader, node)
    shape = shape_of(made(combine.output))
    if not same(shape[-1], shape_of(tokens)[-1]):
        raise Refusal("the experts change the width of a token")
    if not is_contiguous(made(combine.output)):
        raise Refusal("the experts' sum does not lie contiguously in memory, as that of the op does")
    if len(shape) != 2 and sum(not isinstance(size, int) for size in shape) > 1:
        raise Refusal("the experts' sum has more than one symbolic size")
    w1, w3 = first[0].weight, None
    if len(first) == 2:
        w1, w3 = (one.weight for one in (first if not activation.swapped else first[::-1]))
    spec = dataclasses.replace(activation.spec, score=score, transposed=last.transposed)
    bias = activation.bias if first[0].bias is None else first[0].bias
    if len(first) == 2 and any(one.bias is not None for one in first):
        raise Refusal("gate and up projection have a bias each")
    matrices = [w1, last.weight, w3, bias, combine.bias if last.bias is None else last.bias]
    _check_operands([tokens, made(combine.output), ids, weights, *matrices], first[0].node)
    _check_dtypes([*first, last], matrices)
    w1s, w2s, w3s, b1s, b2s = (one if one is None or own is None else own(one) for one in matrices)
    assert w1s is not None and w2s is not None
    site = ExpertsSite(
        where(first[0].node), combine.output, (), tokens, w1s, w2s, ids, weights, spec, w3s, b1s, b2s,
        base=combine.base,
    )  # fmt: skip
    operands = {*site.operand_nodes(), *each(combine.base)}
    return dataclasses.replace(site, region=region_of(flow, combine.output, operands))


def inner_width(last: Product) -> int:
    inner = shape_of(last.weight)[-2 if last.transposed else -1]
    if not isinstance(inner, int):
        raise Refusal("the width of the experts is not a constant")
    return inner


def _read_tokens(flow: Flow, product: Product) -> tuple[fx.Node, tuple[fx.Node, fx.Node] | None]:
    """The tokens (T, l) whose rows are gathered, and the routing weights on them, as (reader, node), if any."""
    scores, spread = None, product.shared
    node = flow.read(product.node, product.rows)
    while node is not None:
        name = op_name(node)
        if spread and len(shape_of(node)) == 2:
            return node, scores
        if name in _GATHERS and (gathered := gather(node)) is not None:
            if len(shape_of(gathered[0])) != 2:
                raise Refusal("tokens are not gathered from a matrix (tokens, width)")
            return gathered[0], scores
        if name == "mul" and scores is None:
            rows, factor = rows_and_factor(node)
            scores, node = (node, factor), flow.read(node, rows)
        elif name == "expand" and len(shape_of(node)) == 3:  # each token once for each of its choices
            spread, node = True, flow.read(node, argument(node, 0, "input", "self"))
        elif name in MOVES:
            check_fill(node)
            node = flow.read(node, argument(node, 0, "input", "self"))
        else:
            raise Refusal(f"the rows of the experts come from '{name or node.name}', not from a gather of tokens")
    raise Refusal("the rows of the experts are changed in place through a view")


def check_fill(node: fx.Node) -> None:
    if op_name(node) == "masked_fill" and argument(node, 2, "value") != 0:
        raise Refusal("masked rows are filled with a value other than 0")


def rows_and_factor(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The sides of a product of rows (n, width) with one number per row (n, 1)."""
    left, right = argument(node, 0, "input", "self"), argument(node, 1, "other")
    for rows, factor in ((left, right), (right, left)):
        if fake(rows) is not None and fake(factor) is not None and shape_of(factor)[-1] == 1 != shape_of(rows)[-1]:
            return rows, factor
    raise Refusal("the experts' rows are multiplied by something other than one weight per row")


def _read_choices(flow: Flow, routings: Iterable[fx.Node | None], tokens: Size) -> fx.Node:
    """The matrix (T, K) of expert numbers from which offsets and indices are computed.

    Raises:
        Refusal: there is none, or the two products disagree about it.
    """
    found = set()
    for routing in routings:
        layer: list[fx.Node] = [] if routing is None else [routing]
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
    return value is not None and value.dtype in INTEGERS and value.dim() == 2 and same(shape_of(node)[0], tokens)


def _read_scores(flow: Flow, reader: fx.Node, factor: fx.Node, ids: fx.Node) -> fx.Node:
    """The routing weights (T, K) behind one weight per row."""
    node, shape = flow.read(reader, factor), shape_of(ids)
    while node is not None:
        found = shape_of(node)
        if len(found) == 2 and all(map(same, found, shape)):
            return node
        if op_name(node) not in MOVES | _GATHERS:
            break
        node = flow.read(node, argument(node, 0, "input", "self"))
    raise Refusal("the weight of a row does not come from a matrix (tokens, choices) of routing weights")


def read_combine(flow: Flow, last: Product, tokens: fx.Node) -> Combine:
    """What happens to the second product until the sum over a token's choices.

    Raises:
        Refusal: it is no weighted sum.
    """
    node, factor, bias, base, summed = last.node, None, None, None, False
    while not summed or not as_large(node, tokens):
        readers = list(dict.fromkeys(flow.readers(node)))
        if len(readers) != 1 or readers[0].op == "output":
            raise Refusal("what single experts give is used other than in a weighted sum")
        reader = readers[0]
        name = op_name(reader)
        if name == "mul" and factor is None and not summed:
            factor = (reader, rows_and_factor(reader)[1])
        elif name == "einsum" and factor is None and not summed:
            factor, summed = (reader, _summed_factor(flow, reader, node)), True
        elif name == "add" and bias is None and factor is None:
            bias = read_bias(flow, reader, node)
        elif name == "masked_fill":
            check_fill(reader)
        elif name in _SUMS and not summed:
            summed, base = True, None if name == "sum" else _summed_into(flow, reader)
        elif name not in MOVES and gather(reader) is None:
            raise Refusal(f"'{name or reader.name}' follows the experts, not a weighted sum over a token's choices")
        node = reader
    readers = list(dict.fromkeys(flow.readers(node)))
    if dtype_of(node) != dtype_of(tokens) and len(readers) == 1 and op_name(readers[0]) in CASTS and base is None:
        node = readers[0]
    return Combine(node, factor, bias, base)


def as_large(node: fx.Node, tokens: fx.Node) -> bool:
    """Whether a node holds one row per token, as (T, l) or (B, S, l)."""
    shape, wanted = shape_of(node), shape_of(tokens)
    return same(shape[-1], wanted[-1]) and same(product_of_sizes(shape), product_of_sizes(wanted))


def _summed_factor(flow: Flow, reader: fx.Node, rows: fx.Node) -> fx.Node:
    """The weights (T, K) of an einsum that multiplies rows (T, K, l) with them and sums over K."""
    found = canonical.product(reader)
    for left, labels, right, others in () if found is None else (
        (found.left, found.left_labels, found.right, found.right_labels),
        (found.right, found.right_labels, found.left, found.left_labels),
    ):  # fmt: skip
        given = flow.read(reader, left) is rows and len(labels) == 3 and others == labels[:2]
        if given and found is not None and found.result_labels == (labels[0], labels[2]):
            return right
    raise Refusal("an einsum follows the experts that is no weighted sum over a token's choices")


def _summed_into(flow: Flow, reader: fx.Node) -> fx.Node | None:
    """What index_add or scatter_add adds to, None where it is zeros of the site's own."""
    base = flow.read(reader, argument(reader, 0, "input", "self"))
    if base is None or op_name(base) in ZEROS:
        return None
    if written(reader):
        raise Refusal("the experts are summed in place into a tensor that is used elsewhere")
    return base


def _check_operands(operands: Iterable[fx.Node | None], product: fx.Node) -> None:
    for node in (*operands, product):
        if node is not None and (reason := plain(node)) is not None:
            raise Refusal(reason)


def _check_dtypes(products: Iterable[Product], matrices: Iterable[fx.Node | None]) -> None:
    """Products run in the dtype of the weights, or where autocast lowers them, in a shorter one.

    The operator keeps the dtype of the weights, as it does under autocast by itself: to lower those of all experts in
    every step takes longer than their products, and to lower copies of the chosen ones, longer still.

    Raises:
        Refusal: the products run in another dtype for another reason.
    """
    weights = {dtype_of(node) for node in matrices if node is not None}
    runs = {dtype_of(one.node) for one in products}
    lowered = len(runs) == 1 and max(run.itemsize for run in runs) < min(weight.itemsize for weight in weights)
    if len(weights) != 1 or not (weights == runs or lowered):
        raise Refusal("the products by expert do not run in the dtype of their weights and biases")
    value = fake(next(node for node in matrices if node is not None))
    assert value is not None
    if not is_routed(value.device, value.dtype):
        raise Refusal(f"no {value.device.type.upper()} kernel for experts in {value.dtype} in this version")
