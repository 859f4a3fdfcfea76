"""Finds attention in a Dynamo graph, whatever its spelling: stage 1 of the pipeline.

A candidate is a call of scaled_dot_product_attention, or a softmax between two matrix products
(`written_out.py`). Scale, masks, casts, grouped heads, sinks and dropout are fields to fill, not
patterns to enumerate; what axes stand for is followed by `axes.py` and settled by `operands.py`.
Whatever the op does not say ends a candidate with a reason. The graph is never edited.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import torch
from torch import fx

from s2o_inductor.passes import canonical
from s2o_inductor.passes.axes import Axes, Factor, broadcast, divide, fresh
from s2o_inductor.passes.canonical import Softmax
from s2o_inductor.passes.flow import Flow, written
from s2o_inductor.passes.graph_utils import (
    Refusal,
    Size,
    argument,
    dtype_of,
    fake,
    is_contiguous,
    op_name,
    plain,
    product_of_sizes,
    ratio,
    same,
    shape_of,
    size_of,
    where,
)
from s2o_inductor.passes.operands import Arrangement, Problem, Reading, arrange, mask_taps, trace
from s2o_inductor.passes.records import AttentionSite, Declined, MaskOperand, Operand, Step
from s2o_inductor.passes.written_out import after_product, reaches, read_written_out

_AnyOperand = TypeVar("_AnyOperand", Operand, MaskOperand)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def find_attention(graph: fx.Graph) -> tuple[list[AttentionSite], list[Declined]]:
    """Every attention site of a graph in graph order, and every candidate that is none, with its reason.

    Args:
        graph: a Dynamo graph whose nodes hold fake tensors under meta["example_value"]. Sizes may be
            symbolic; nothing here adds a guard.
    """
    flow = Flow(graph)
    sites: list[AttentionSite] = []
    declined: list[Declined] = []
    for node in flow.nodes:
        try:
            site = _read_candidate(flow, node)
        except Refusal as refusal:
            declined.append(Declined("attention", where(node), str(refusal), node))
            continue
        if site is not None:
            sites.append(site)
    return sites, declined


def _read_candidate(flow: Flow, node: fx.Node) -> AttentionSite | None:
    name = op_name(node)
    if name == "scaled_dot_product_attention":
        return _site(flow, node, _read_call(flow, node))
    if name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        raise Refusal("fused encoder layer; torch.backends.mha.set_fastpath_enabled(False) leaves its operators apart")
    found = canonical.softmax(flow, node)
    if found is not None and _between_products(flow, found):
        return _site(flow, node, read_written_out(flow, found))
    return None


def _between_products(flow: Flow, found: Softmax) -> bool:
    """Whether a softmax stands between two matrix products, whatever happens in between.

    Classifiers and routers do not: their logits come from a linear layer, or no product follows.
    """
    first = flow.read(found.reader, found.source) or found.source
    return after_product(flow, first) and reaches(found.nodes[-1], flow.readers, at_start=False)


# ---------------------------------------------------------------------------------- attention calls


def _read_call(flow: Flow, node: fx.Node) -> Reading:
    """Reads a call of scaled_dot_product_attention."""
    q, k, v = (argument(node, at, name) for at, name in enumerate(("query", "key", "value")))
    for operand in (q, k, v, node):
        if (reason := plain(operand)) is not None:
            raise Refusal(reason)
    mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", default=False)
    grouped = argument(node, 7, "enable_gqa", default=False)
    if not isinstance(causal, bool) or not isinstance(grouped, bool):
        raise Refusal("is_causal is not a constant yet")
    full, width, length = shape_of(node), shape_of(q)[-1], shape_of(k)[-2]
    batch = fresh(full[:-2])
    queries, values, keys, inner = ((Factor(size),) for size in (full[-2], full[-1], length, width))
    lead = [_leading_axes(batch, full[:-2], shape_of(operand)[:-2], grouped) for operand in (q, k, v)]
    wanted = dtype_of(node)
    problem = Problem(
        batch, (queries,), keys, inner, values, (*batch, queries, values),
        trace(flow, node, q, (*lead[0], queries, inner), wanted, folding=True),
        trace(flow, node, k, (*lead[1], keys, inner), wanted, folding=True),
        trace(flow, node, v, (*lead[2], keys, values), wanted, folding=False),
    )  # fmt: skip
    if mask is not None:
        kind = "visible" if dtype_of(mask) == torch.bool else "additive"
        problem.masks.append(mask_taps(flow, node, mask, kind, (*batch, queries, keys), (*full[:-1], length)))
    rate = canonical.dropout_probability(argument(node, 4, "dropout_p", default=0.0))
    return Reading(node, [node], problem, _call_scale(node, width), causal, dropout=rate)


def _call_scale(node: fx.Node, width: Size) -> float:
    scale = argument(node, 6, "scale")
    if scale is None and isinstance(width, int) and width > 0:
        return float(width) ** -0.5
    if not isinstance(scale, (int, float)):
        raise Refusal("scale is not a constant yet")
    return float(scale)


def _leading_axes(batch: Axes, full: tuple[Size, ...], shape: tuple[Size, ...], grouped: bool) -> Axes:
    """The axes of an operand in front of its last two; `grouped` lets a head serve neighbouring query heads."""
    times = ratio(full[-1], shape[-1]) if grouped and shape else None
    heads = None if times is None else divide(batch[-1], (shape[-1], times))
    if heads is not None:
        rest = broadcast(batch[:-1], full[:-1], shape[:-1])
        found = None if rest is None else (*rest, heads[0])
    else:
        found = broadcast(batch, full, shape)
    if found is None:
        raise Refusal("the shapes of queries, keys and values do not fit together")
    return found


# ------------------------------------------------------------------------ from a reading to a site


def _site(flow: Flow, anchor: fx.Node, reading: Reading) -> AttentionSite:
    """The site of a reading.

    Raises:
        Refusal: replacing it would change what the graph computes.
    """
    output, problem = reading.output, reading.problem
    if dtype_of(output) not in _DTYPES:
        raise Refusal(f"attention in {dtype_of(output)} is not supported")
    for name, taps in (("queries", problem.q), ("keys", problem.k), ("values", problem.v)):
        if not taps:
            raise Refusal(f"the {name} are not in the dtype of the result, {dtype_of(output)}")
    found = arrange(problem)
    if found is None:
        raise Refusal("queries, keys, values and masks do not line up as (batch, heads, queries, keys)")
    scale = reading.scale * found.scale
    if not math.isfinite(scale):
        raise Refusal(f"the scale {scale} is not a number")
    operands = (found.q.node, found.k.node, found.v.node, *(mask.node for mask in found.masks))
    for node in (*operands, *([found.sinks] if found.sinks else []), output):
        if (reason := plain(node)) is not None:
            raise Refusal(reason)
    region = _region(flow, anchor, reading.core, found.passed, output)
    _check_writes(flow, reading.core, found.passed, region, output)
    if found.sinks is not None and _kept_apart(flow, sinks := Operand(found.sinks), output) is not sinks:
        raise Refusal("the sink logits are changed in place before the backward pass")
    q, k, v = (_kept_apart(flow, one, output) for one in (found.q, found.k, found.v))
    masks = tuple(_kept_apart(flow, one, output) for one in found.masks)
    return AttentionSite(
        where(anchor), output, region, q, k, v, scale, reading.causal, masks,
        reading.empty, reading.dropout, found.sinks, (*found.out_steps, *_layout_steps(flow, found, output)),
    )  # fmt: skip


def _region(
    flow: Flow, anchor: fx.Node, core: list[fx.Node], passed: tuple[fx.Node, ...], output: fx.Node
) -> tuple[fx.Node, ...]:
    """The core, dead readers of it, and those of the passed nodes that nothing else reads.

    Raises:
        Refusal: something outside reads the core, or the core is not computed under one mode.
    """
    region = _with_dead(flow, set(core), output)
    for node in core:
        if node is not output and any(user not in region for user in node.users):
            late = flow.position[node] >= flow.position[anchor]
            raise Refusal(f"attention {'weights' if late else 'scores'} are used elsewhere")
        if flow.ambient[node] != flow.ambient[output]:
            raise Refusal("the gradient mode or autocast changes within the attention")
    for node in sorted(passed, key=flow.position.__getitem__, reverse=True):
        if all(user in region or not flow.is_live(user) for user in node.users):
            region.add(node)
    return tuple(sorted(_with_dead(flow, region, output), key=flow.position.__getitem__))


def _with_dead(flow: Flow, region: set[fx.Node], output: fx.Node) -> set[fx.Node]:
    """A region and the nodes that look at it without anyone looking at them."""
    whole = set(region)
    for node in flow.dead:
        if any(source in whole and source is not output for source in node.all_input_nodes):
            whole.add(node)
    return whole


def _check_writes(
    flow: Flow, core: list[fx.Node], passed: tuple[fx.Node, ...], region: tuple[fx.Node, ...], output: fx.Node
) -> None:
    """Raises Refusal when the op, which reads its operands where the output stands, would see other values."""
    inside = {*core, *passed}
    for node in (*core, *passed):
        for source in node.all_input_nodes:
            if source not in inside and flow.written_between(source, node, output, core):
                raise Refusal(f"'{source.name}' is changed in place while the attention is computed")
        if written(node) and any(other not in region for other in flow.names_of(node)):
            raise Refusal(f"'{node.name}' writes in place to a tensor that is used elsewhere")


# Methods that fail, or mean something else, on other strides than those they were written for.
_STRIDE_BOUND = frozenset(("view", "view_as", "as_strided"))
# What looks at a tensor where its strides allow it, and copies it elsewhere.
_LOOKS_OR_COPIES = frozenset(("reshape", "reshape_as", "flatten", "ravel", "contiguous"))


def _layout_steps(flow: Flow, found: Arrangement, output: fx.Node) -> tuple[Step, ...]:
    """Copies of the output where the graph depends on its strides, or on what shares its memory.

    The op gives (B, H, S, D) over memory in the order (B, S, H, D), and keeps that memory for its backward pass.

    Raises:
        Refusal: the strides that the graph counts on are neither the op's nor contiguous ones.
    """
    value, changed = fake(output), _is_told_from_a_copy(flow, output)
    viewed = any(op_name(node) in _STRIDE_BOUND for node in flow.names_of(output) if node is not output)
    if value is None or not (viewed or changed):
        return ()
    kept: tuple[Step, ...] = (("clone", ()),) if changed and value.requires_grad else ()
    shape, strides = shape_of(output), tuple(size_of(stride) for stride in value.stride())
    if not found.out_steps and len(shape) == 4:
        heads, width = shape[1], shape[3]
        if all(map(same, strides, (product_of_sizes(shape[1:]), width, heads * width, 1))):
            return kept
    if is_contiguous(output):
        return (("contiguous", ()), *kept)
    raise Refusal("what follows the attention output counts on its memory layout")


def _is_told_from_a_copy(flow: Flow, output: fx.Node) -> bool:
    """Whether the memory of the output, or of what may look at it, is written to or leaves the graph by two names."""
    names: set[fx.Node] = set()
    pending = [output]
    while pending:
        for name in flow.names_of(pending.pop()):
            if name not in names and flow.position[name] >= flow.position[output]:
                names.add(name)
                pending += [user for user in name.users if op_name(user) in _LOOKS_OR_COPIES]
    shown = sum(any(user.op == "output" for user in name.users) for name in names)
    return shown > 1 or any(flow.written_after(name, output) for name in names)


def _kept_apart(flow: Flow, operand: _AnyOperand, output: fx.Node) -> _AnyOperand:
    """An operand as a copy where its memory is written to before the backward pass of the op reads it.

    The source may not have kept that tensor: it kept a wider copy, or nothing of an added mask.
    """
    value = fake(output)
    if value is None or not value.requires_grad or not flow.written_after(operand.node, output):
        return operand
    return dataclasses.replace(operand, steps=(("clone", ()), *operand.steps))
