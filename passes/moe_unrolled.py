"""Unrolled loops over separate experts: `for e, expert in enumerate(experts)`, one branch of nodes per expert.

The tokens of an expert are looked up in the choices and its rows added in place to where they belong
(transformers 4.40, mistral-inference); or every expert runs on every token, weighted by a column of a
matrix (makeMoE), or stacked and chosen from afterwards. The first branch is read as any other pair of
products, with linear layers for products by expert; `moe_branches.py` has shown that the others are
alike, and the replay of the whole loop shows what its index arithmetic means (`moe_verify.py`).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import fx

from s2o_inductor.passes.flow import Flow, written
from s2o_inductor.passes.graph_utils import Refusal, argument, fake, op_name, same, shape_of, where
from s2o_inductor.passes.moe import ZEROS, Combine, as_large, check_fill, inner_width, make_site, rows_and_factor
from s2o_inductor.passes.moe_activation import read_activation
from s2o_inductor.passes.moe_branches import Branches, Loop, find_loops, rows_of
from s2o_inductor.passes.moe_dense import TURNS, are_distinct, chosen_places
from s2o_inductor.passes.moe_products import INTEGERS, Product, is_idle_dropout, read_linear
from s2o_inductor.passes.records import Declined, ExpertsSite, PerExpert, each

# From a weight of a row, or the position of a token, back to the routing: what neither adds nor learns anything.
_ROUTING = TURNS | {
    "select", "eq", "where", "nonzero", "any", "bool", "int", "long", "sum", "mul", "one_hot",
}  # fmt: skip
# From one expert's choices back to those of all.
_CHOICES = TURNS | {"one_hot", "int", "long"}
# A node, and how it names something that it reads.
_Read: TypeAlias = tuple[fx.Node, fx.Node]


def find_unrolled(flow: Flow) -> tuple[list[ExpertsSite], list[Declined], set[fx.Node]]:
    """The sites and the candidates that are none, and where the loops look up tokens."""
    sites: list[ExpertsSite] = []
    declined: list[Declined] = []
    lookups: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    for loop in find_loops(flow):
        try:
            branches = Branches(flow, loop)
            if loop.sure or branches.numbered:
                _note_lookups(loop, seen, lookups)
                sites.append(_read_site(flow, loop, branches))
        except Refusal as refusal:
            if not loop.sure:
                continue
            _note_lookups(loop, seen, lookups)
            declined.append(Declined("moe", where(loop.terms[0].node), str(refusal), loop.output))
    return sites, declined, lookups


def _note_lookups(loop: Loop, seen: set[fx.Node], lookups: set[fx.Node]) -> None:
    """Notes the nodes behind a loop that find the tokens of an expert."""
    pending = [node for term in loop.terms for node in (term.node, *each(term.index))]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if op_name(node) in ("where", "nonzero"):
            lookups.add(node)
        else:
            pending += node.all_input_nodes


def _read_site(flow: Flow, loop: Loop, branches: Branches) -> ExpertsSite:
    """The site of one loop.

    Raises:
        Refusal: it is no routed sum of like experts.
    """
    last, factor = _second_product(flow, loop)
    first = _first_products(flow, branches, last)
    tokens, scale, at = _read_tokens(flow, branches, first)
    if (loop.terms[0].index is None) != (at is None):
        raise Refusal("the experts of the unrolled loop do not take the tokens that their outputs are added to")
    output, looked_up = loop.output, at
    if loop.stacked:
        if factor is not None:
            raise Refusal("routing weights are applied before the experts' outputs are stacked")
        output, factor, looked_up = _read_stack(flow, loop, tokens)
    routing = _Routing(flow, branches, tokens)
    indices = [*each(loop.terms[0].index), *(() if looked_up is None else [flow.read(*looked_up)])]
    ids = _one([routing.choices(index) for index in indices])
    weighted = factor or scale
    if ids is None and weighted is None:
        weighted = read_activation(flow, [one.node for one in first], last.node, last.rows, inner_width(last)).scores
    if ids is None and weighted is None:
        raise Refusal("the experts' outputs are summed without routing weights")
    if weighted is not None:
        _, beside = routing.weights(*weighted)
        ids = _one([*beside, *each(ids)])
    dense = ids is None
    if ids is None:
        assert weighted is not None
        ids = _chosen_columns(flow, routing.weights(*weighted)[0], len(loop.terms))
    choices, distinct = ids, dense or are_distinct(flow, ids)
    if loop.output.target is operator.setitem and not distinct:
        raise Refusal("'out[index] += ...' adds once where a token chose an expert twice, and no top-k rules that out")

    def read_scores(reader: fx.Node, node: fx.Node) -> fx.Node:
        found, beside = routing.weights(reader, node)
        if not dense and not (_one([choices, *beside]) and same(shape_of(found)[-1], shape_of(choices)[-1])):
            raise Refusal("the weight of a row does not come from a matrix (tokens, choices) of routing weights")
        return found

    combine = Combine(output, factor, None, _base(flow, loop))
    site = make_site(flow, first, last, tokens, ids, combine, scale, read_scores, _owner(branches, [*first, last]))
    numbered = frozenset(branches.numbered.intersection(site.region))
    return dataclasses.replace(site, dense=dense, distinct=distinct, numbered=numbered)


def _chosen_columns(flow: Flow, weights: fx.Node, experts: int) -> fx.Node:
    """The choices outside of which a matrix with a column for each expert is zero."""
    columns = shape_of(weights)[-1]
    if not same(columns, experts):
        raise Refusal(f"the unrolled loop runs over {experts} experts, and {columns} have routing weights")
    return chosen_places(flow, weights)


def _second_product(flow: Flow, loop: Loop) -> tuple[Product, _Read | None]:
    """The product of which the first term is made, and what multiplies its rows."""
    node = flow.read(loop.terms[0].reader, loop.terms[0].node)
    factor: _Read | None = None
    while node is not None:
        product = read_linear(flow, node)
        if product is not None:
            return product, factor
        if op_name(node) == "mul":
            if factor is not None:
                raise Refusal("routing weights are applied twice")
            factor = (node, rows_and_factor(node)[1])
        _check_step(node)
        rows = rows_of(node)
        node = None if rows is None else flow.read(node, rows)
    raise Refusal("an expert of the unrolled loop does not end in a linear layer")


def _check_step(node: fx.Node) -> None:
    check_fill(node)
    if op_name(node) == "dropout" and not is_idle_dropout(node):
        raise Refusal("the experts have dropout")


def _first_products(flow: Flow, branches: Branches, last: Product) -> list[Product]:
    """The nearest products, one or two, from which the rows of the last one are computed."""
    found: dict[fx.Node, Product] = {}
    pending, seen = [flow.read(last.node, last.rows)], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node is None or node in seen or node not in branches.first:
            continue
        seen.add(node)
        product = read_linear(flow, node)
        if product is not None:
            found[node] = product
        else:
            pending += [flow.read(node, source) for source in node.all_input_nodes]
    if len(found) not in (1, 2):
        raise Refusal(
            f"an expert of the unrolled loop has {1 + len(found)} linear layers, not two, or three with a gate"
        )
    return [found[node] for node in sorted(found, key=flow.position.__getitem__)]


def _read_tokens(flow: Flow, branches: Branches, first: list[Product]) -> tuple[fx.Node, _Read | None, _Read | None]:
    """The tokens of all branches, what multiplies an expert's rows of them, and what gathers these."""
    sources = {flow.read(product.node, product.rows) for product in first}
    node, scale, at = next(iter(sources)), None, None
    if len(sources) != 1:
        raise Refusal("the products by expert do not share their rows")
    while node is not None and node in branches.first:
        _check_step(node)
        rows, name = rows_of(node), op_name(node)
        if name == "mul" and scale is None and rows is not None:
            scale = (node, rows_and_factor(node)[1])
        elif name in ("getitem", "index_select") and at is None:
            rows, index = _gathered(node)
            at = (node, index)
        elif rows is None or name == "mul":
            raise Refusal(f"the rows of the experts come from '{name or node.name}', not from a gather of tokens")
        node = flow.read(node, rows)
    if node is None:
        raise Refusal("the rows of the experts are changed in place through a view")
    return node, scale, at


def _gathered(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Whole rows of a matrix and their positions: `x[index]`, `x[None, index]`, `x.index_select(0, index)`."""
    source, index = argument(node, 0, "input", "self"), argument(node, 2, "index")
    if op_name(node) == "getitem":
        given = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        given = tuple(one for one in given if one is not None)
        index = given[0] if len(given) == 1 else None
    elif argument(node, 1, "dim") != 0:
        index = None
    if not isinstance(source, fx.Node) or fake(index) is None or len(shape_of(source)) != 2:
        raise Refusal("tokens are not gathered from a matrix (tokens, width)")
    return source, index


def _base(flow: Flow, loop: Loop) -> fx.Node | None:
    """What the sum is added to, None for zeros of the site's own."""
    if loop.base is None or op_name(loop.base) in ZEROS:
        return None
    if any(written(term.reader) for term in loop.terms) or written(loop.output):
        raise Refusal("the experts are summed in place into a tensor that is used elsewhere")
    return loop.base


def _owner(branches: Branches, products: list[Product]) -> Callable[[fx.Node], PerExpert]:
    """From weights of the first branch to those of all: to the stack whose parts they are, if all have one."""
    nodes = [node for product in products for node in (product.weight, product.bias) if node is not None]
    stacks = {node: _stack_of(branches.own(node)) for node in nodes}
    if any(stack is None for stack in stacks.values()):
        return branches.own
    return lambda node: stacks[node] or branches.own(node)


def _stack_of(parts: tuple[fx.Node, ...]) -> fx.Node | None:
    """The tensor of which these are the parts along its first axis, all of them and in order."""
    sources = {part.args[0] if op_name(part) == "getitem" else None for part in parts}
    source = next(iter(sources))
    if len(sources) != 1 or not isinstance(source, fx.Node) or [part.args[1] for part in parts] != [*range(len(parts))]:
        return None
    if op_name(source) == "unbind" and argument(source, 1, "dim", default=0) == 0:
        source = argument(source, 0, "input", "self")
    return (
        source
        if isinstance(source, fx.Node) and fake(source) is not None and same(shape_of(source)[0], len(parts))
        else None
    )


def _read_stack(flow: Flow, loop: Loop, tokens: fx.Node) -> tuple[fx.Node, _Read, _Read | None]:
    """The weighted sum over a stack of all experts' outputs, the weights, and what chooses from the stack if any.

    Raises:
        Refusal: it is none.
    """
    node, summed = loop.output, False
    factor: _Read | None = None
    picked: _Read | None = None
    while not summed or not as_large(node, tokens):
        readers = list(dict.fromkeys(flow.readers(node)))
        if len(readers) != 1 or readers[0].op == "output":
            raise Refusal("what single experts give is used other than in a weighted sum")
        reader = readers[0]
        name = op_name(reader)
        others = [one for one in reader.all_input_nodes if flow.read(reader, one) is not node]
        if name in ("mul", "einsum", "matmul", "bmm") and factor is None and len(others) == 1:
            factor, summed = (reader, others[0]), name != "mul"
        elif name in ("gather", "take_along_dim") and picked is None and len(others) == 1 and not summed:
            picked = (reader, others[0])
        elif name == "sum":
            summed = True
        elif name not in TURNS or others:
            raise Refusal(f"'{name or reader.name}' follows the experts, not a weighted sum over a token's choices")
        node = reader
    if factor is None:
        raise Refusal("the experts' outputs are summed without routing weights")
    return node, factor, picked


class _Routing:
    """Finds the choices and the routing weights that all branches share."""

    def __init__(self, flow: Flow, branches: Branches, tokens: fx.Node) -> None:
        self._flow = flow
        self._inside = branches.first
        self._leading = shape_of(tokens)[:-1]

    def choices(self, index: fx.Node | None) -> fx.Node:
        """The choices (T, K) that alone decide an index.

        Raises:
            Refusal: something else takes part.
        """
        found = [self._choices(leaf) for leaf in self._shared(index)]
        chosen = _one([one for one in found if one is not None])
        if chosen is None or None in found:
            raise Refusal("the tokens of an expert are not those that have it among their choices")
        return chosen

    def weights(self, reader: fx.Node, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """The one matrix of floating-point numbers, (T, K) or (T, E), behind a weight per row, and choices beside it.

        Raises:
            Refusal: there is none, or something else takes part.
        """
        choices: list[fx.Node] = []
        weights: list[fx.Node | None] = []
        for leaf in self._shared(self._flow.read(reader, node)):
            chosen = self._choices(leaf)
            if chosen is None:
                weights.append(self._matrix(leaf))
            else:
                choices.append(chosen)
        if len(set(weights)) != 1 or weights[0] is None:
            raise Refusal("the weight of a row does not come from a matrix (tokens, choices) of routing weights")
        return weights[0], list(dict.fromkeys(choices))

    def _shared(self, start: fx.Node | None) -> list[fx.Node]:
        """What all branches read in common, of what a value is computed from."""
        found: dict[fx.Node, None] = {}
        pending, seen = [start], set[fx.Node]()
        while pending:
            value = pending.pop()
            if value is None:
                raise Refusal("the routing is changed in place through a view")
            if value in seen or isinstance(value.meta.get("example_value"), (int, torch.SymInt)):
                continue
            seen.add(value)
            if value not in self._inside:
                found[value] = None
            elif op_name(value) in _ROUTING and not _squares(value):
                pending += [self._flow.read(value, source) for source in value.all_input_nodes]
            else:
                raise Refusal(f"'{op_name(value) or value.name}' takes part in the routing")
        return list(found)

    def _choices(self, leaf: fx.Node) -> fx.Node | None:
        node: fx.Node | None = leaf
        while node is not None and (value := fake(node)) is not None and not value.is_floating_point():
            if value.dtype in INTEGERS and self._by_token(node):
                return node
            source = argument(node, 0, "input", "self")
            node = self._flow.read(node, source) if op_name(node) in _CHOICES else None
        return None

    def _matrix(self, leaf: fx.Node) -> fx.Node | None:
        node: fx.Node | None = leaf
        while node is not None and not self._by_token(node):
            source = argument(node, 0, "input", "self")
            node = self._flow.read(node, source) if op_name(node) in TURNS else None
        value = fake(node)
        return node if value is not None and value.is_floating_point() else None

    def _by_token(self, node: fx.Node) -> bool:
        shape = shape_of(node)
        return len(shape) == len(self._leading) + 1 and all(map(same, shape[:-1], self._leading))


def _squares(node: fx.Node) -> bool:
    """Whether a node multiplies routing weights by one another, rather than by who chose the expert."""
    values = [value for source in node.all_input_nodes if (value := fake(source)) is not None]
    return op_name(node) == "mul" and not any(value.dtype in (*INTEGERS, torch.bool) for value in values)


def _one(found: list[fx.Node]) -> fx.Node | None:
    if len(set(found)) > 1:
        raise Refusal("the products by expert follow different choices")
    return found[0] if found else None
