"""Finds what routers of routed experts compute in a roundabout way, in a functional graph: a part of stage 2.

Reads backwards from the choices and weights of each `s2o::moe_experts`, through what a router does with its scores, to
the product that made them. On the way it finds

* a product in float32 whose operands were bfloat16 or float16, for `s2o::mm_float32`, which sums the same terms in
  another order. In training its gradients are products of their own, of operands in float32, and stay;
* `torch.topk` over few columns, for `s2o::top_k`;
* `torch.topk` over one column, as of a router with a single group of experts: that is the column itself.

Only routers are looked at, where all this was measured: it is no rule about products and selections as such. A router
of a few tokens outside of CUDA graphs waits for the host, which launches torch's own kernels faster: there only what is
left out is a gain.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import config as inductor_config

from s2o_inductor.passes import rewrite
from s2o_inductor.passes.graph_utils import argument, same, size_of
from s2o_inductor.router_ops import HALVES, is_multiplied, is_selected

aten = torch.ops.aten
# As both compilers of a joint graph write them.
_VIEWS: frozenset[Any] = frozenset(
    (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default, aten.t.default,
     aten.transpose.int, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
)  # fmt: skip
_CASTS: frozenset[Any] = frozenset((torch.ops.prims.convert_element_type.default, aten._to_copy.default))
_PRODUCTS: frozenset[Any] = frozenset((aten.mm.default, aten.addmm.default))
_TOP_K = aten.topk.default
# What a router does with scores besides arithmetic on each of them. All else ends the search.
_ROUTING: frozenset[Any] = _VIEWS | _CASTS | {
    operator.getitem, _TOP_K, aten.gather.default, aten.scatter.value, aten.scatter.src, aten.scatter_add.default,
    aten.sum.dim_IntList, aten.amax.default, aten._softmax.default, aten.clone.default, aten.detach.default,
    aten.slice.Tensor, aten.select.int,
}  # fmt: skip
# Rows up to which the host takes longer to launch our kernels than the device takes to run torch's.
_FEW_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Unwidened:
    """A tensor that a product reads in float32, as it was in half precision.

    Attributes:
        source: what was cast.
        views: the nodes from the cast to the product, each with its fake value in that precision.
    """

    source: fx.Node
    views: tuple[tuple[fx.Node, Tensor], ...]


@dataclasses.dataclass(frozen=True)
class Selection:
    """A top-k that `s2o::top_k` takes: k of so many columns."""

    columns: int
    k: int


@dataclasses.dataclass(frozen=True)
class Router:
    """What may change in front of one op of routed experts.

    Attributes:
        name: of the op's site.
        products: aten.mm or aten.addmm in float32, with both factors as they were.
        selections: aten.topk over more than one column, with its columns and k.
        only: aten.topk over one column, with a node of as many rows and at least one column; None is what it reads.
    """

    name: str
    products: tuple[tuple[fx.Node, Unwidened, Unwidened], ...]
    selections: tuple[tuple[fx.Node, Selection], ...]
    only: tuple[tuple[fx.Node, fx.Node | None], ...]

    def describe(self) -> list[str]:
        """What changes, for the report."""
        text = [
            f"scores from {str(_value(left.source).dtype).removeprefix('torch.')}: exact products, summed in float32"
            for _, left, _ in self.products
        ]
        text += [f"the largest {one.k} of {one.columns} in one launch" for _, one in self.selections]
        return text + ["no choice of one among one"] * len(self.only)


def find_routers(graph: fx.Graph) -> list[Router]:
    """The routers in which something may change, with fake values under meta["val"]; a node belongs to one alone."""
    routers: list[Router] = []
    seen: set[fx.Node] = set()
    order = {node: index for index, node in enumerate(graph.nodes)}
    for op in rewrite.experts(graph):
        nodes = sorted(_behind(op, seen), key=order.__getitem__)
        waits = _waits_for_the_host(op)
        products = tuple(found for node in nodes if not waits and (found := _product(node)) is not None)
        chosen = [(node, selection) for node in nodes if (selection := _selection(node)) is not None]
        selections = tuple((node, selection) for node, selection in chosen if not waits and selection.columns > 1)
        only = tuple((node, _as_many(node, nodes)) for node, selection in chosen if selection.columns == 1)
        if selections or only or products:
            routers.append(Router(rewrite.experts_site(op), products, selections, only))
    return routers


def _waits_for_the_host(op: fx.Node) -> bool:
    """Whether an op of routed experts is known to get few tokens, and no CUDA graph launches its router."""
    tokens = _value(rewrite.routing(op)[0]).shape[0]
    return isinstance(tokens, int) and tokens <= _FEW_ROWS and not inductor_config.triton.cudagraphs


def _behind(op: fx.Node, seen: set[fx.Node]) -> Iterator[fx.Node]:
    """The nodes of a router, the products that end it included."""
    pending = list(rewrite.routing(op))
    while pending:
        node = pending.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node.target in _PRODUCTS:
            yield node
        elif node.target in _ROUTING or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            yield node
            # Which of one column is chosen depends on nothing.
            only = _selection(node) == Selection(1, 1) and all(reader.args[1] == 1 for reader in node.users)
            pending += [] if only else node.all_input_nodes


def _product(node: fx.Node) -> tuple[fx.Node, Unwidened, Unwidened] | None:
    """A product that may read its factors as they were, with these."""
    if node.target not in _PRODUCTS or node.kwargs:  # beta and alpha of addmm
        return None
    value, depth = _value(node), _value(node.args[-1]).shape[0]
    constant = isinstance(depth, int) and isinstance(value.shape[1], int)
    if value.dtype != torch.float32 or not constant or not is_multiplied(value.device, depth):
        return None
    left, right = map(_unwidened, node.args[-2:])
    if left is None or right is None or _value(left.source).dtype != _value(right.source).dtype:
        return None
    return node, left, right


def _unwidened(node: Any) -> Unwidened | None:
    """What a tensor in float32 was in half precision; None where it was something else, or cannot be viewed so."""
    views: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.target in _VIEWS:
        views.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target not in _CASTS:
        return None
    source, made = node.args[0], _value(node)
    value: Any = _value(source)
    if value.dtype not in HALVES or made.dtype != torch.float32 or value.device != made.device:
        return None
    viewed: list[tuple[fx.Node, Tensor]] = []
    for view in reversed(views):
        rest = fx.node.map_arg((view.args[1:], view.kwargs), lambda one: one.meta["val"])
        try:
            with value.fake_mode:
                value = view.target(value, *rest[0], **rest[1])  # type: ignore[operator]
        except (RuntimeError, ValueError):  # a cast is also a copy: what it read may have other strides
            return None
        viewed.append((view, value))
    assert isinstance(source, fx.Node)
    return Unwidened(source, tuple(viewed))


def _selection(node: fx.Node) -> Selection | None:
    """What an aten.topk chooses, if `s2o::top_k` takes it."""
    if node.target is not _TOP_K:
        return None
    x, k = _value(node.args[0]), node.args[1]
    last = x.dim() > 0 and argument(node, 2, "dim", default=-1) in (-1, x.dim() - 1)
    largest = argument(node, 3, "largest", default=True)
    if not last or largest is not True or not isinstance(k, int) or not is_selected(x, k):
        return None
    return Selection(int(x.shape[-1]), k)


def _as_many(node: fx.Node, nodes: list[fx.Node]) -> fx.Node | None:
    """The first node before a top-k with as many rows as it reads: a router's scores, where these are (T, E)."""
    shape = _value(node.args[0]).shape[:-1]
    for other in nodes[: nodes.index(node)]:
        value = other.meta.get("val")
        # What reads another top-k may be gone when this one is rewritten.
        if other.target is operator.getitem or not isinstance(value, Tensor) or value.dim() != len(shape) + 1:
            continue
        rows, columns = value.shape[:-1], value.shape[-1]
        if isinstance(columns, int) and columns > 0 and all(map(same, map(size_of, rows), map(size_of, shape))):
            return other
    return None


def _value(node: Any) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value
