"""Opens up `nn.MultiheadAttention`, which Dynamo captures as one node, into projections and attention.

`multi_head_attention_forward` becomes linear projections, an attention that `find_attention` can
read, and the output projection. A call that asks for the weights is written out, since its rows
without keys are NaN; one that does not becomes scaled_dot_product_attention, which gives zeros.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from s2o_inductor.passes.attention import find_attention
from s2o_inductor.passes.canonical import dropout_probability
from s2o_inductor.passes.graph_utils import Refusal, argument, dtype_of, fake, plain, shape_of, where
from s2o_inductor.passes.records import Declined

_KIND = "multi-head attention"
# The parameters of multi_head_attention_forward, in order.
_PARAMETERS = (
    "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
    "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask", "need_weights",
    "attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k", "static_v",
    "average_attn_weights", "is_causal",
)  # fmt: skip
_DEFAULTS = {"training": True, "need_weights": True, "is_causal": False, "use_separate_proj_weight": False}


def find_mha(graph: fx.Graph) -> list[fx.Node]:
    """The calls of multi_head_attention_forward, in graph order."""
    return list(graph.find_nodes(op="call_function", target=F.multi_head_attention_forward))


def expand_all(graph: fx.Graph) -> tuple[int, list[Declined]]:
    """Opens every multi-head attention whose attention is then found; leaves the others as they are.

    Returns:
        How many were opened, and why the others were not.
    """
    expansions: list[Expansion] = []
    declined: list[Declined] = []
    for node in find_mha(graph):
        opened = expand_mha(graph, node)
        if isinstance(opened, Expansion):
            expansions.append(opened)
        else:
            declined.append(opened)
    if not expansions:
        return 0, declined
    sites, refused = find_attention(graph)
    found = {node for site in sites for node in site.region}
    for expansion in expansions:
        if found.isdisjoint(expansion.inserted):
            inside = [refusal.reason for refusal in refused if refusal.node in expansion.inserted]
            expansion.undo(graph)
            declined.append(Declined(_KIND, where(expansion.node), "; ".join(inside) or "not found", expansion.node))
        else:
            expansion.commit(graph)
    return sum(expansion.committed for expansion in expansions), declined


@dataclasses.dataclass
class Expansion:
    """A multi-head attention that was opened; its call is still in the graph, without readers.

    Attributes:
        node: the call.
        inserted: the nodes in front of it that compute the same.
        result: the one of them that stands for the attention output.
        reader: the getitem node that it took the readers of.
    """

    node: fx.Node
    inserted: tuple[fx.Node, ...]
    result: fx.Node
    reader: fx.Node
    committed: bool = False

    def undo(self, graph: fx.Graph) -> None:
        """Makes the graph what it was, node for node."""
        self.result.replace_all_uses_with(self.reader)
        for node in reversed(self.inserted):
            graph.erase_node(node)

    def commit(self, graph: fx.Graph) -> None:
        """Removes the call."""
        for reader in list(self.node.users):
            graph.erase_node(reader)
        graph.erase_node(self.node)
        self.committed = True


def expand_mha(graph: fx.Graph, node: fx.Node) -> Expansion | Declined:
    """Opens one call of multi_head_attention_forward; if it declines, the graph is as it was.

    Args:
        graph: a Dynamo graph.
        node: the call, on (L, N, E) or unbatched (L, E) tensors.
    """
    build = _Builder(graph, node)
    try:
        call = {name: argument(node, at, name, default=_DEFAULTS.get(name)) for at, name in enumerate(_PARAMETERS)}
        reader = _check(node, call)
        result = _build(build, call)
        before, after = fake(reader), fake(result)
        if before is None or after is None or shape_of(reader) != shape_of(result) or before.dtype != after.dtype:
            raise Refusal("the opened form has another shape or dtype")
    except Exception as error:  # computing example values runs arbitrary torch code; the graph must be restored
        for inserted in reversed(build.inserted):
            graph.erase_node(inserted)
        reason = str(error) if isinstance(error, Refusal) else f"could not be opened: {type(error).__name__}: {error}"
        return Declined(_KIND, where(node), reason, node)
    reader.replace_all_uses_with(result)
    return Expansion(node, tuple(build.inserted), result, reader)


def _check(node: fx.Node, call: dict[str, Any]) -> fx.Node:
    """The getitem node that reads the output; raises Refusal for what cannot be opened."""
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if call[name] is not None:
            raise Refusal(f"{name} is not supported")
    if call["add_zero_attn"]:
        raise Refusal("add_zero_attn is not supported")
    for name in ("num_heads", "training", "need_weights", "is_causal", "use_separate_proj_weight"):
        if not isinstance(call[name], int):
            raise Refusal(f"{name} is not a constant yet")
    for name in ("query", "key", "value", "out_proj_weight"):
        if (reason := plain(call[name])) is not None:
            raise Refusal(reason)
    for name in ("attn_mask", "key_padding_mask"):
        mask = fake(call[name])
        if call[name] is not None and (mask is None or not (mask.dtype == torch.bool or mask.is_floating_point())):
            raise Refusal(f"{name} is neither boolean nor floating point")
    readers = list(node.users)
    if any(reader.target is not operator.getitem for reader in readers):
        raise Refusal("attention weights are used elsewhere")
    if any(reader.args[1] == 1 and reader.users for reader in readers):
        raise Refusal("attention weights are used elsewhere")
    outputs = [reader for reader in readers if reader.args[1] == 0]
    if len(outputs) != 1:
        raise Refusal("the attention output is not read")
    return outputs[0]


class _Builder:
    """Inserts nodes in front of a call, with example values."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph = graph
        self.node = node
        self.inserted: list[fx.Node] = []

    def __call__(self, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function, or of a method given by name."""
        with self.graph.inserting_before(self.node):
            if isinstance(target, str):
                made = self.graph.call_method(target, args, kwargs)
            else:
                made = self.graph.call_function(target, args, kwargs)
        self.inserted.append(made)
        made.meta.update(
            {key: self.node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in self.node.meta}
        )
        values, options = fx.node.map_arg((args, kwargs), lambda one: one.meta["example_value"])
        with self._modes(values):
            call = getattr(values[0], target) if isinstance(target, str) else target
            made.meta["example_value"] = call(*(values[1:] if isinstance(target, str) else values), **options)
        return made

    @contextlib.contextmanager
    def _modes(self, values: Any) -> Iterator[None]:
        """Fake tensors, no guards, and the autocast that the call itself was captured under."""
        tensors = [value for value in torch.utils._pytree.tree_leaves(values) if isinstance(value, Tensor)]
        mode = next((value.fake_mode for value in tensors if isinstance(value, FakeTensor)), contextlib.nullcontext())
        result = self.node.meta["example_value"][0]
        operands = [fake(node) for node in self.node.all_input_nodes]
        floating = {value.dtype for value in operands if value is not None and value.is_floating_point()}
        cast = result.dtype in (torch.float16, torch.bfloat16) and floating != {result.dtype}
        shapes = getattr(mode, "shape_env", None)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(result.device.type, result.dtype if cast else None, enabled=cast))
            if shapes is not None:
                stack.enter_context(shapes.suppress_guards())
            stack.enter_context(mode)
            yield


def _build(build: _Builder, call: dict[str, Any]) -> fx.Node:
    """The attention output as a new node, (L, N, E) or (L, E)."""
    batched = len(shape_of(call["query"])) == 3
    inputs: dict[fx.Node, fx.Node] = {}
    for name in ("query", "key", "value"):
        if call[name] not in inputs:
            inputs[call[name]] = call[name] if batched else build("unsqueeze", call[name], 1)
    projected = _project(build, call, [inputs[call[name]] for name in ("query", "key", "value")])
    heads = call["num_heads"]
    width = shape_of(projected[0])[-1]
    if not isinstance(width, int) or width % heads != 0:
        raise Refusal(f"an embedding of {width} is not divisible by {heads} heads")
    q, k, v = (
        build("permute", build("unflatten", one, -1, (heads, width // heads)), 1, 2, 0, 3) for one in projected
    )  # (N, H, L, D)
    padding = call["key_padding_mask"]
    if padding is not None:
        if not batched:
            padding = build("unsqueeze", padding, 0)
        padding = build("unsqueeze", build("unsqueeze", padding, 1), 1)
    causal = bool(call["is_causal"]) and padding is None and not call["need_weights"]
    mask = None if causal else call["attn_mask"]
    if mask is not None and len(shape_of(mask)) == 3:
        mask = build("unflatten", mask, 0, (-1, heads))
    masks = [one for one in (mask, padding) if one is not None]
    rate = dropout_probability(call["dropout_p"]) if call["training"] else 0.0
    attend = _written_out if call["need_weights"] else _called
    output = attend(build, q, k, v, masks, rate, causal)
    merged = build("flatten", build("permute", output, 2, 0, 1, 3), 2)
    result = build(F.linear, merged, call["out_proj_weight"], call["out_proj_bias"])
    return result if batched else build("squeeze", result, 1)


def _project(build: _Builder, call: dict[str, Any], inputs: list[fx.Node]) -> list[fx.Node]:
    """Queries, keys and values, (L, N, E); inputs that are one tensor share a product."""
    bias = call["in_proj_bias"]
    if call["use_separate_proj_weight"]:
        weights = [call[f"{name}_proj_weight"] for name in "qkv"]
        biases = [None] * 3 if bias is None else _pieces(build, bias, 3, 0)
        return [build(F.linear, *parts) for parts in zip(inputs, weights, biases, strict=True)]
    if inputs[0] is inputs[1] is inputs[2]:
        return _pieces(build, build(F.linear, inputs[0], call["in_proj_weight"], bias), 3, -1)
    weights = _pieces(build, call["in_proj_weight"], 3, 0)
    biases = [None] * 3 if bias is None else _pieces(build, bias, 3, 0)
    return [build(F.linear, *parts) for parts in zip(inputs, weights, biases, strict=True)]


def _pieces(build: _Builder, node: fx.Node, count: int, dim: int) -> list[fx.Node]:
    chunks = build("chunk", node, count, dim)
    return [build(operator.getitem, chunks, index) for index in range(count)]


def _is_bool(mask: fx.Node) -> bool:
    return dtype_of(mask) == torch.bool


def _called(
    build: _Builder, q: fx.Node, k: fx.Node, v: fx.Node, masks: list[fx.Node], rate: float, causal: bool
) -> fx.Node:  # fmt: skip
    """As scaled_dot_product_attention; a boolean mask of nn.MultiheadAttention marks what is hidden."""
    combined: fx.Node | None = None
    if all(_is_bool(mask) for mask in masks):
        for mask in masks:
            visible = build(torch.logical_not, mask)
            combined = visible if combined is None else build(torch.logical_and, combined, visible)
    else:
        for mask in masks:
            added = _as_added(build, mask, dtype_of(q)) if _is_bool(mask) else mask
            combined = added if combined is None else build(torch.add, combined, added)
    return build(F.scaled_dot_product_attention, q, k, v, attn_mask=combined, dropout_p=rate, is_causal=causal)


def _as_added(build: _Builder, mask: fx.Node, dtype: torch.dtype) -> fx.Node:
    return build("masked_fill", build(torch.zeros_like, mask, dtype=dtype), mask, -math.inf)


def _written_out(
    build: _Builder, q: fx.Node, k: fx.Node, v: fx.Node, masks: list[fx.Node], rate: float, causal: bool
) -> fx.Node:  # fmt: skip
    """As two products around a softmax."""
    assert not causal
    width = shape_of(q)[-1]
    assert isinstance(width, int)
    scores = build("mul", build(torch.matmul, q, build("transpose", k, -2, -1)), 1.0 / math.sqrt(width))
    for mask in masks:
        if _is_bool(mask):
            scores = build("masked_fill", scores, mask, -math.inf)
        else:
            scores = build(torch.add, scores, mask)
    weights = build(F.softmax, scores, dim=-1)
    if rate > 0.0:
        weights = build(F.dropout, weights, p=rate)
    return build(torch.matmul, weights, v)
