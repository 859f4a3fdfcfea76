"""Experts that all run on all tokens, most of them with a routing weight of zero: GPT-OSS and Llama 4.

The batch of the products is the experts, and the routing weights are a matrix (T, E) that a scatter
filled at the chosen places. That every other entry is zero is proved by running what lies between the
scatter and the weights on numbers.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from s2o_inductor.passes import verify
from s2o_inductor.passes.flow import Flow
from s2o_inductor.passes.graph_utils import Refusal, Size, argument, dtype_of, op_name, product_of_sizes, same, shape_of
from s2o_inductor.passes.moe import MOVES, make_site, read_combine, rows_and_factor
from s2o_inductor.passes.moe_activation import ROWWISE
from s2o_inductor.passes.moe_products import INTEGERS, Product, read_dense_product
from s2o_inductor.passes.records import ExpertsSite

TURNS = MOVES | {"transpose", "T", "mT", "permute", "getitem", "expand"}
# What leaves the choices of a token what they are, if the last dimension keeps its size and numbers stay integers.
_KEEPS_ROWS = MOVES - {"masked_fill"}
# Between the scatter and the weights: what acts on every entry alone, and the softmax over a row.
_POINTWISE = frozenset(("sigmoid", "softmax", "mul", "div", "exp", "to", "float", "type_as", "bfloat16", "half"))


def dense_products(flow: Flow) -> dict[fx.Node, Product]:
    """Batched products, first ones on copies of the tokens and second ones behind those."""
    found: dict[fx.Node, Product] = {}
    derived: set[fx.Node] = set()
    for node in flow.nodes:
        product, follows = read_dense_product(flow, node), any(source in derived for source in node.all_input_nodes)
        if product is not None and (follows or _read_tokens(flow, product) is not None):
            found[node] = product
        if node in found or (follows and op_name(node) in ROWWISE | MOVES):
            derived.add(node)
    return found


def read_site(flow: Flow, first: list[Product], last: Product) -> ExpertsSite:
    """The site of one or two first products and the second one.

    Raises:
        Refusal: what surrounds them is not a routed sum that the op computes.
    """
    sources = dict.fromkeys(_read_tokens(flow, one) for one in first)
    source = next(iter(sources))
    if len(first) > 2 or len(sources) != 1 or source is None:
        raise Refusal("the products by expert do not share their rows")
    tokens, factor = source
    combine = read_combine(flow, last, tokens)
    weighted = factor if combine.factor is None else combine.factor
    if weighted is None:
        raise Refusal("the experts' outputs are summed without routing weights")
    matrix = _read_matrix(flow, *weighted, shape_of(tokens)[0], shape_of(last.weight)[0])
    ids = chosen_places(flow, matrix)
    site = make_site(flow, first, last, tokens, ids, combine, factor, lambda reader, node: matrix)
    return dataclasses.replace(site, dense=True, distinct=True)


def _read_tokens(flow: Flow, product: Product) -> tuple[fx.Node, tuple[fx.Node, fx.Node] | None] | None:
    """The tokens (T, l) of which every expert takes a copy, and what multiplies the copies; None for other rows."""
    experts, _, width = shape_of(product.rows)
    every, factor = product_of_sizes(shape_of(product.rows)), None
    node = flow.read(product.node, product.rows)
    while node is not None:
        shape, name = shape_of(node), op_name(node)
        if len(shape) == 2 and same(shape[1], width) and same(shape[0] * experts * width, every):
            return node, factor
        if name == "mul" and factor is None:
            try:
                rows, scale = rows_and_factor(node)
            except Refusal:
                return None
            factor, node = (node, scale), flow.read(node, rows)
        elif name in MOVES | {"repeat", "expand"}:
            node = flow.read(node, argument(node, 0, "input", "self"))
        else:
            return None
    return None


def _read_matrix(flow: Flow, reader: fx.Node, factor: fx.Node, tokens: Size, experts: Size) -> fx.Node:
    """The routing weights (T, E) behind one number per copy of a token."""
    node = flow.read(reader, factor)
    while node is not None:
        shape = shape_of(node)
        if len(shape) == 2 and same(shape[0], tokens) and same(shape[1], experts):
            return node
        if op_name(node) not in TURNS:
            break
        node = flow.read(node, argument(node, 0, "input", "self"))
    raise Refusal("the weight of a row does not come from a matrix (tokens, experts) of routing weights")


def chosen_places(flow: Flow, matrix: fx.Node) -> fx.Node:
    """The choices (T, K), none of them twice, outside of which a matrix (T, E) is zero; both may be (B, S, .).

    Raises:
        Refusal: there are none.
    """
    between: list[fx.Node] = []
    node: fx.Node | None = matrix
    while node is not None and op_name(node) in _POINTWISE:
        between.append(node)
        node = flow.read(node, argument(node, 0, "input", "self"))
    if node is None or op_name(node) != "scatter":
        raise Refusal("every expert runs on every token with a weight of its own: there is nothing to leave out")
    base, dim, ids = (argument(node, at, name) for at, name in enumerate(("self", "dim", "index")))
    base = flow.read(node, base)
    last = len(shape_of(node)) - 1
    if dim not in (last, -1) or base is None or not are_distinct(flow, flow.read(node, ids)):
        raise Refusal("the routing weights are scattered by something other than the choices of a top-k")
    fill = 0.0 if op_name(base) in ("zeros_like", "zeros", "new_zeros") else argument(base, 1, "fill_value")
    if op_name(base) not in ("zeros_like", "zeros", "new_zeros", "full_like") or not isinstance(fill, (int, float)):
        raise Refusal("the routing weights are scattered into something other than a constant")
    if not _zero_outside(between[::-1], node, float(fill)):
        raise Refusal("the routing weights of experts that were not chosen are not zero")
    return ids


def are_distinct(flow: Flow, ids: fx.Node | None) -> bool:
    """Whether no token's choices repeat an expert, because they come from a top-k or are one."""
    node = ids
    if node is not None and len(shape_of(node)) > 1 and same(shape_of(node)[-1], 1):
        return True
    while node is not None and op_name(node) in _KEEPS_ROWS:
        source = argument(node, 0, "input", "self")
        if dtype_of(node) not in INTEGERS or not same(shape_of(node)[-1], shape_of(source)[-1]):
            return False
        node = flow.read(node, source)
    if node is None or op_name(node) not in ("getitem", "indices"):
        return False
    source, places = node.args[0], op_name(node) == "indices" or node.args[1] == 1
    if not places or not isinstance(source, fx.Node) or op_name(source) != "topk":
        return False
    return argument(source, 2, "dim", default=-1) in (-1, len(shape_of(node)) - 1)


def _zero_outside(between: list[fx.Node], scattered: fx.Node, fill: float) -> bool:
    """Runs what follows a scatter on numbers, 8 rows with 3 of 7 places chosen."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(8, 7, generator=generator).topk(3).indices
    values = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    chosen = torch.zeros(8, 7, dtype=torch.bool).scatter(1, ids, True)
    # Beside low scores too: a softmax forgets a finite fill only as long as it is far below all of them.
    for shift in (0.0, -5e3):
        known = {scattered: torch.full((8, 7), fill, dtype=torch.float64).scatter(1, ids, values + shift)}
        with torch.no_grad(), _disable_current_modes():
            for node in between:
                try:
                    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
                    known[node] = verify.in_double(node, args, kwargs)
                except Exception:  # it reads something else, or other sizes: nothing is proved then
                    return False
        if not (known[between[-1] if between else scattered][~chosen] == 0).all():
            return False
    return True
