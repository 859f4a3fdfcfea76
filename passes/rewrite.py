"""The only file that edits graphs: sites become ops, lifted masks replace mask tensors."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

import s2o_inductor.moe_list_ops
import s2o_inductor.moe_ops
import s2o_inductor.ops
import s2o_inductor.router_ops  # noqa: F401  registers the operators named below
from s2o_inductor.mask_spec import MaskSpec
from s2o_inductor.passes.graph_utils import made
from s2o_inductor.passes.records import AttentionSite, ExpertsSite, MaskOperand, Operand, Site, each

MOE_EXPERTS = torch.ops.s2o.moe_experts.default
MOE_EXPERTS_LIST = torch.ops.s2o.moe_experts_list.default
ATTENTION = torch.ops.s2o.attention.default
ATTENTION_BACKWARD = torch.ops.s2o.attention_backward.default
MM_FLOAT32 = torch.ops.s2o.mm_float32.default
TOP_K = torch.ops.s2o.top_k.default
SPARSE_ATTENTION = torch.ops.s2o.sparse_attention.default
ATTENTION_MASK = torch.ops.s2o.attention_mask.default
# Argument positions in the schemas of ops.py.
_Q_AT = {ATTENTION: 0, ATTENTION_BACKWARD: 1}
_MASK_AT = {ATTENTION: 3, ATTENTION_BACKWARD: 6}
_ROUTING_AT = slice(6, 8)
# Metadata that belongs to one node's own schema and must not travel to another node.
_OWN_META = ("val", "tensor_meta", "example_value", "eager_input_vals", "original_aten", "unbacked_bindings")


def replace_attention(graph: fx.Graph, site: AttentionSite, name: str) -> fx.Node:
    """Puts one `s2o::attention` in place of a site, erases the site's own nodes, and returns the new output.

    Nodes are inserted directly in front of the output they replace: nothing else moves, so writers
    in place, autocast regions and gradient modes around the site keep their order.
    """
    output = site.output
    with graph.inserting_before(output):
        q, k, v = (_apply(graph, operand) for operand in (site.q, site.k, site.v))
        mask = _one_mask(graph, site.masks)
        seed = _seed(graph, site, q) if site.dropout > 0.0 else None
        spec = MaskSpec(
            upper="0" if site.causal else None,
            dense=mask is not None,
            empty=site.empty if site.masks else "zero",
        )
        pair = graph.call_function(
            ATTENTION,
            (q, k, v, mask, [], [], [], spec.text(), site.sinks, seed, site.scale, site.dropout, name),
        )
        result = graph.call_function(operator.getitem, (pair, 0))
        for method, args in site.out_steps:
            result = graph.call_method(method, (result, *args))
        wanted = output.meta["example_value"].dtype
        if any(operand.node.meta["example_value"].dtype != wanted for operand in (site.q, site.k, site.v)):
            result = graph.call_method("to", (result, wanted))
    for node in (pair, result):
        node.meta.update(_shared_meta(output))
    result.meta["example_value"] = output.meta["example_value"]
    output.replace_all_uses_with(result)
    for node in sorted(site.region, key=_position(graph), reverse=True):
        graph.erase_node(node)
    return result


def replace_experts(graph: fx.Graph, site: ExpertsSite, name: str) -> fx.Node:
    """Puts one `s2o::moe_experts` in place of a site, erases the site's own nodes, and returns the new output.

    Experts that are separate tensors go to `s2o::moe_experts_list`.
    """
    output, separate = made(site.output), isinstance(site.w2, tuple)
    keep = site.needs_gradient
    added: list[fx.Node] = []

    def call(method: str, node: fx.Node, *args: Any) -> fx.Node:
        added.append(graph.call_method(method, (node, *args)))
        return added[-1]

    def matrix(node: fx.Node, like: fx.Node) -> fx.Node:
        """A tensor (T, n) from one that may be (B, S, n), as `like` is."""
        shape = like.meta["example_value"].shape
        return node if len(shape) == 2 else call("reshape", node, -1, shape[-1])

    with graph.inserting_before(site.output):
        computed = site.last.meta["example_value"].dtype
        operands: list[Any] = list(site.operands()[1:6])
        if separate:
            operands = [list(each(operand)) for operand in operands]
        tokens, weights = site.tokens, site.weights
        if site.dense:
            weights = call("gather", weights, -1, site.ids)
        ids = matrix(site.ids, site.ids)
        if site.wraps:
            ids = call("where", ids, call("ge", ids, 0), call("add", ids, site.experts))
        if tokens.meta["example_value"].dtype != computed:
            tokens = call("to", tokens, computed)
        tokens, weights = matrix(tokens, site.tokens), matrix(weights, site.ids)
        target = MOE_EXPERTS_LIST if separate else MOE_EXPERTS
        pair = graph.call_function(target, (tokens, *operands, ids, weights, site.spec.text(), keep, name))
        result = graph.call_function(operator.getitem, (pair, 0))
        added += [pair, result]
        if output.meta["example_value"].dtype != computed:
            result = call("to", result, output.meta["example_value"].dtype)
        shape = output.meta["example_value"].shape
        if len(shape) != 2:
            # At most one size is symbolic: the finder has seen to that.
            result = call("reshape", result, tuple(size if isinstance(size, int) else -1 for size in shape))
        if site.base is not None:
            result = graph.call_function(torch.add, (site.base, result))
            added.append(result)
    for node in added:
        node.meta.update(_shared_meta(site.output))
    result.meta["example_value"] = output.meta["example_value"]
    region = set(site.region)
    # After writers in place the output goes by other names too; what reads them is behind it, `region_of` has seen.
    for node in site.region:
        for user in [user for user in node.users if user not in region]:
            user.replace_input_with(node, result)
    for node in sorted(site.region, key=_position(graph), reverse=True):
        graph.erase_node(node)
    return result


def replace_site(graph: fx.Graph, site: Site, name: str) -> fx.Node:
    """Puts the op of its kind in place of a site and returns the new output."""
    if isinstance(site, AttentionSite):
        return replace_attention(graph, site, name)
    return replace_experts(graph, site, name)


def follow(site: Site, moved: Mapping[fx.Node, fx.Node]) -> Site:
    """A site whose operands may be outputs of other sites, with what has taken their place."""

    def now(one: Any) -> Any:
        if isinstance(one, (Operand, MaskOperand)):
            return dataclasses.replace(one, node=now(one.node))
        if isinstance(one, tuple):
            return tuple(map(now, one))
        return moved.get(one, one)

    if isinstance(site, AttentionSite):
        return dataclasses.replace(
            site, q=now(site.q), k=now(site.k), v=now(site.v), masks=tuple(map(now, site.masks)), sinks=now(site.sinks)
        )
    names = ("tokens", "w1", "w2", "ids", "weights", "w3", "b1", "b2", "base")
    return dataclasses.replace(site, **{name: now(getattr(site, name)) for name in names})


def _apply(graph: fx.Graph, operand: Operand | MaskOperand) -> fx.Node:
    node = operand.node
    for method, args in operand.steps:
        node = graph.call_method(method, (node, *args))
    return node


def _one_mask(graph: fx.Graph, masks: tuple[MaskOperand, ...]) -> fx.Node | None:
    """One visible or additive mask out of all that a site applies."""
    visible: fx.Node | None = None
    additive: fx.Node | None = None
    for mask in masks:
        node = _apply(graph, mask)
        if mask.kind == "additive":
            additive = node if additive is None else graph.call_function(torch.add, (additive, node))
            continue
        if mask.kind == "hidden":
            node = graph.call_function(torch.logical_not, (node,))
        visible = node if visible is None else graph.call_function(torch.logical_and, (visible, node))
    if additive is None or visible is None:
        return additive if visible is None else visible
    hidden = graph.call_function(torch.logical_not, (visible,))
    # where, not masked_fill: the two masks may broadcast in different dimensions.
    return graph.call_function(torch.where, (hidden, float("-inf"), additive))


def _seed(graph: fx.Graph, site: AttentionSite, q: fx.Node) -> fx.Node:
    """The dropout seed, drawn in the graph from the default generator: `torch.manual_seed` governs it."""
    device = site.q.node.meta["example_value"].device
    return graph.call_function(torch.randint, (2**62, (1,)), {"device": device, "dtype": torch.int64})


def _position(graph: fx.Graph) -> Any:
    order = {node: index for index, node in enumerate(graph.nodes)}
    return order.__getitem__


def _shared_meta(node: fx.Node) -> dict[str, Any]:
    return {key: value for key, value in node.meta.items() if key not in _OWN_META}


def masked_attention(graph: fx.Graph) -> Iterable[tuple[fx.Node, fx.Node]]:
    """(attention or attention_backward node, its mask node) for every one that has a mask tensor."""
    for target, position in _MASK_AT.items():
        for node in graph.find_nodes(op="call_function", target=target):
            mask = node.args[position]
            if isinstance(mask, fx.Node):
                yield node, mask


def attention_spec(node: fx.Node) -> str:
    """The mask spec text of an attention or attention_backward node."""
    text = node.args[_MASK_AT[node.target] + 4]  # type: ignore[index]
    assert isinstance(text, str)
    return text


def attention_site(node: fx.Node) -> str:
    """The site name that an attention or attention_backward node carries."""
    name = node.args[-1]
    assert isinstance(name, str)
    return name


def insert_plan(
    graph: fx.Graph,
    before: fx.Node,
    mask: fx.Node | None,
    leaves: Iterable[fx.Node],
    params: Iterable[Any],
    spec: MaskSpec,
) -> list[fx.Node]:
    """One `s2o::attention_mask` for every attention that has the same mask and sizes as `before`.

    Args:
        graph: the functional joint graph.
        before: the first attention in graph order that uses the mask; its mask's ancestors stand in
            front of it, so everything that the plan reads does.
        mask: the mask tensor, where it stays one.
        leaves: as in `s2o::attention_mask`, and so are
        params: its integers, and
        spec: its terms.

    Returns:
        The op's four outputs, with fake values.
    """
    q, k = operands(before)
    values = q.meta["val"], k.meta["val"]
    shared = _shared_meta(before)
    with graph.inserting_before(before):
        batch, queries, keys = (_size(graph, node, dim) for node, dim in ((q, 0), (q, 2), (k, 2)))
        args = (mask, list(leaves), list(params), spec.text(), batch, queries, keys, values[0].device)
        plan = graph.call_function(ATTENTION_MASK, args)
        plan.meta.update(shared)
        with values[0].fake_mode:
            plan.meta["val"] = ATTENTION_MASK(*fx.node.map_arg(args, lambda node: node.meta["val"]))
        outputs = []
        for index, value in enumerate(plan.meta["val"]):
            output = graph.call_function(operator.getitem, (plan, index))
            output.meta.update(shared, val=value)
            outputs.append(output)
    return outputs


def use_plan(
    node: fx.Node, mask: fx.Node | None, leaves: Iterable[fx.Node], plan: Iterable[fx.Node], params: Iterable[Any],
    spec: MaskSpec,
) -> None:  # fmt: skip
    """Gives an attention or attention_backward node a predicate (or a planned mask) for its mask tensor."""
    at = _MASK_AT[node.target]  # type: ignore[index]
    args = list(node.args)
    args[at : at + 5] = [mask, list(leaves), list(plan), list(params), spec.text()]
    node.args = tuple(args)
    # Written by AOTAutograd for the old operands; Inductor would match them against the new ones.
    node.meta.pop("eager_input_vals", None)


def use_sparse(node: fx.Node, policy: str) -> None:
    """Turns an attention node without a mask tensor and without dropout into its sparse form.

    Args:
        node: an `s2o::attention`.
        policy: the text of a `SparsePolicy`.
    """
    q, k, v, _, leaves, plan, params, spec, sinks, _, scale, _, site = node.args
    node.target = SPARSE_ATTENTION
    node.args = (q, k, v, leaves, plan, params, spec, sinks, scale, policy, site)
    node.meta.pop("eager_input_vals", None)


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """q and k of an attention or attention_backward node."""
    at = _Q_AT[node.target]  # type: ignore[index]
    q, k = node.args[at], node.args[at + 1]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node)
    return q, k


def sizes(node: fx.Node) -> tuple[Any, Any, Any, Any]:
    """(B, Hq, Sq, Sk) of an attention or attention_backward node, symbolic where the graph is."""
    q, k = operands(node)
    return (*q.meta["val"].shape[:3], k.meta["val"].shape[2])


def _size(graph: fx.Graph, tensor: fx.Node, dim: int) -> int | fx.Node:
    """A dimension as an int or, where it is symbolic, as a node that holds it."""
    size = tensor.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    node = graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
    node.meta["val"] = size
    return node


def experts(graph: fx.Graph) -> Iterable[fx.Node]:
    """Every op of routed experts in a graph."""
    for target in (MOE_EXPERTS, MOE_EXPERTS_LIST):
        yield from graph.find_nodes(op="call_function", target=target)


def experts_site(node: fx.Node) -> str:
    """The site name that an op of routed experts carries."""
    return str(node.args[-1])


def routing(node: fx.Node) -> tuple[fx.Node, ...]:
    """The choices and the weights of an op of routed experts."""
    return tuple(one for one in node.args[_ROUTING_AT] if isinstance(one, fx.Node))


def use_halves(graph: fx.Graph, node: fx.Node, factors: Iterable[tuple[fx.Node, Any]]) -> None:
    """Lets an aten.mm or aten.addmm in float32 read its factors as they were before a cast.

    Args:
        graph: a functional graph.
        node: the product.
        factors: for both, what was cast, and the (node, fake value) of each view that leads from there to the product.
    """
    dead, aten = node.args[-2:], torch.ops.aten
    with graph.inserting_before(node):
        read = []
        for factor, views in factors:
            for view, value in views:
                factor = graph.call_function(view.target, (factor, *view.args[1:]), view.kwargs)
                factor.meta.update(_shared_meta(view), val=value)
            read.append(factor)
        if node.target is aten.mm.default:
            node.target, node.args = MM_FLOAT32, tuple(read)
        else:
            product = graph.call_function(MM_FLOAT32, tuple(read))
            product.meta.update(_shared_meta(node), val=node.meta["val"])
            node.target, node.args = aten.add.Tensor, (product, node.args[0])
    node.meta.pop("eager_input_vals", None)
    erase_dead_ancestors(graph, [one for one in dead if isinstance(one, fx.Node)])


def use_top_k(node: fx.Node, k: int) -> None:
    """Turns an aten.topk over the last dimension into an `s2o::top_k`."""
    node.target, node.args, node.kwargs = TOP_K, (node.args[0], k), {}
    node.meta.pop("eager_input_vals", None)


def use_only_column(graph: fx.Graph, node: fx.Node, scores: fx.Node | None) -> None:
    """Gives readers of an aten.topk over one column that column, and zeros, as many as `scores`, if given, has rows."""
    scores = scores or node.all_input_nodes[0]
    for reader in list(node.users):
        result = node.all_input_nodes[0]
        if reader.args[1] == 1:
            value = reader.meta["val"]
            with graph.inserting_before(reader):
                sizes = [*(_size(graph, scores, dim) for dim in range(value.dim() - 1)), 1]
                # As traced graphs hold it: full_like, which would do, is an operator that Inductor decomposes before.
                layout = {"dtype": value.dtype, "layout": torch.strided, "device": value.device, "pin_memory": False}
                result = graph.call_function(torch.ops.aten.full.default, (sizes, 0), layout)
            result.meta.update(_shared_meta(reader), val=value)
        reader.replace_all_uses_with(result)
        graph.erase_node(reader)
    erase_dead_ancestors(graph, [node])


def erase_dead_ancestors(graph: fx.Graph, nodes: Iterable[fx.Node]) -> int:
    """Erases nodes that nothing reads any more and, in turn, what only they read; returns how many.

    Only for functional graphs; operators that write, draw random numbers or have effects stay.
    """
    pending, erased = list(nodes), 0
    while pending:
        node = pending.pop()
        if node._erased or node.users or node.op != "call_function" or not _is_pure(node):
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        erased += 1
        pending.extend(inputs)
    return erased


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
