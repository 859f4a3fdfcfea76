"""Verified rewriting: a rewrite is kept only if the code it replaces gives the same numbers.

A site is checked by running its own nodes, as captured, beside the op on random inputs; a lifted
mask by running the mask's own nodes beside the predicate. Neither check looks at how the site or
the mask was read, so a misreading cannot agree with itself. The bound is that of DESIGN.md,
section 7: the op may be at most twice as far from a float64 run of the original nodes as the
original nodes are in their own precision.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from s2o_inductor import ops
from s2o_inductor.mask_spec import MaskSpec
from s2o_inductor.passes.records import AttentionSite, MaskOperand, Operand

# Largest score matrix, in elements, that is run at its real size; above, sequences are shortened.
MAX_SCORES = 2**20
_LOW_TO_DOUBLE = ("float", "half", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether a check passed, and what it did or found, for the report."""

    passed: bool
    detail: str


_sites: dict[str, Outcome] = {}


def check_site(graph: fx.Graph, site: AttentionSite, *, always: bool = False) -> Outcome:
    """Runs a site's own nodes and the op that would replace them on the same random inputs.

    Sequences are shortened where the scores would pass `MAX_SCORES` elements; one row of every
    boolean mask is hidden altogether. Outcomes are kept per distinct structure unless `always`.
    """
    closure = _closure(graph, site)
    autocast = autocast_regions(graph, site.output)
    key = f"{_structure(closure, site)}\n{autocast} {ambient_autocast()}"
    if always or key not in _sites:
        with torch.no_grad(), _disable_current_modes():
            _sites[key] = _run_check_somewhere(closure, site, autocast)
    return _sites[key]


def _run_check_somewhere(closure: list[fx.Node], site: AttentionSite, autocast: list[tuple[Any, ...]]) -> Outcome:
    """A site of a GPU is checked on the CPU: what is checked is how it was read, not a kernel.

    On a fresh GPU the first run of every kernel loads it, or compiles it if it is ours, which takes longer than all
    passes together. Autocast does not round alike on both, and code that names its GPU runs there alone.
    """
    device = site.q.node.meta["example_value"].device
    if device.type == "cuda" and not autocast and not torch.is_autocast_enabled("cuda"):
        with contextlib.suppress(RuntimeError, ValueError, TypeError), torch.autocast("cpu", enabled=False):
            return _run_check(closure, site, autocast, torch.device("cpu"))
    return _run_check(closure, site, autocast, device)


def autocast_regions(graph: fx.Graph, output: fx.Node) -> list[tuple[Any, ...]]:
    """The arguments of the autocast regions that are open where the output is computed, outermost first."""
    regions: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        if node is output:
            break
        if node.target is torch.amp.autocast_mode._enter_autocast:
            regions.append(node.args)
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            regions.pop()
    return regions


def ambient_autocast() -> list[tuple[bool, torch.dtype]]:
    """Autocast around the compiled function: it leaves no node in the graph."""
    return [(torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in ("cpu", "cuda")]


def _run_check(
    closure: list[fx.Node], site: AttentionSite, autocast: list[tuple[Any, ...]], device: torch.device
) -> Outcome:
    sizes = _Changes.of(site, device)
    if sizes is None:
        return Outcome(True, "unverified: too large to run, and its sizes cannot be told apart to shorten it")
    # A generator of our own: the user's random state is not ours to advance.
    generator = torch.Generator(device).manual_seed(0)
    inputs = {node: _example(node, site, sizes, generator) for node in _inputs(closure, site)}
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        with contextlib.ExitStack() as regions:
            for arguments in autocast:
                regions.enter_context(torch.autocast(*arguments))
            original = _replay(closure, inputs, sizes, as_written)[site.output]
        gold_inputs = {node: to_double(value) for node, value in inputs.items()}
        gold = _replay(closure, gold_inputs, sizes, in_double)[site.output]
        actual = _run_op(site, inputs)
    q, k = (_stepped(inputs[one.node], one) for one in (site.q, site.k))
    return within_bound(actual, original, gold, terms=q.shape[-1] + k.shape[-2])


def _closure(graph: fx.Graph, site: AttentionSite) -> list[fx.Node]:
    """The nodes between the site's operands and its output, in graph order.

    Not the site's region: a node that others read as well, such as an expanded key, is outside the
    region and yet part of what must be replayed.
    """
    operands = _operand_nodes(site)
    downstream: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in operands and any(source in operands or source in downstream for source in node.all_input_nodes):
            downstream.add(node)
        if node is site.output:
            break
    wanted, pending = {site.output}, [site.output]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in wanted and source not in operands and (source in downstream or source in site.region):
                wanted.add(source)
                pending.append(source)
    return [node for node in graph.nodes if node in wanted]


def _operand_nodes(site: AttentionSite) -> set[fx.Node]:
    nodes = {site.q.node, site.k.node, site.v.node, *(mask.node for mask in site.masks)}
    return nodes if site.sinks is None else nodes | {site.sinks}


def _inputs(closure: list[fx.Node], site: AttentionSite) -> list[fx.Node]:
    inside = set(closure)
    read = {source: None for node in closure for source in node.all_input_nodes if source not in inside}
    return list(read | dict.fromkeys(_operand_nodes(site)))


def _structure(closure: list[fx.Node], site: AttentionSite) -> str:
    placed: list[Operand | MaskOperand] = [site.q, site.k, site.v, *site.masks]
    roles = [(one.node, one.steps) for one in placed], site.sinks
    kinds = [mask.kind for mask in site.masks]
    rest = repr((site.out_steps, kinds, site.scale, site.causal, site.empty, site.dropout > 0))
    return f"{structure(closure, _inputs(closure, site), roles)}\n{rest}"


def structure(closure: Iterable[fx.Node], inputs: Iterable[fx.Node], roles: Any) -> str:
    """Text that is equal for regions which compute the same thing on operands of the same kind.

    Args:
        closure: the nodes that are replayed, in graph order.
        inputs: what they and the op read.
        roles: nested tuples and lists of nodes: which input is which operand of the op.
    """
    names: dict[fx.Node, str] = {}

    def name(node: fx.Node) -> str:
        return names.setdefault(node, f"n{len(names)}")

    lines = []
    for node in closure:
        arguments = fx.node.map_arg((node.args, dict(node.kwargs)), name)
        lines.append(f"{name(node)}={node.op} {node.target} {arguments}")
    for node in inputs:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor):
            lines.append(f"{name(node)}:{value.dtype}{tuple(value.shape)}{value.stride()}{value.device}")
    return "\n".join([*lines, repr(fx.node.map_arg(roles, name))])


@dataclasses.dataclass(frozen=True)
class _Changes:
    """How the sizes and the device of a captured site are replaced in a replay."""

    replaced: Mapping[int, int]
    device: torch.device

    @classmethod
    def of(cls, site: AttentionSite, device: torch.device) -> _Changes | None:
        """None when the site is too large to run as it is and shortening it would be ambiguous."""
        q, k = (_view(_hinted(one.node), one) for one in (site.q, site.k))
        queries, keys = q[2], k[2]
        if q[0] * q[1] * queries * keys <= MAX_SCORES:
            return cls({}, device)
        others = {*q[:2], *k[:2], q[3], q[0] * q[1], k[0] * k[1], q[1] // max(k[1], 1)}
        if queries in others or keys in others:
            return cls({}, device) if q[0] * q[1] * queries * keys <= 64 * MAX_SCORES else None
        free = (size for size in (61, 59, 53, 47) if size not in others)
        short_keys = next(free)
        short_queries = short_keys if queries == keys else min(queries, next(free))
        return cls({queries: short_queries, keys: short_keys}, device)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return self.device
        return self.replaced.get(value, value) if type(value) is int else value


def _hinted(node: fx.Node) -> tuple[int, ...]:
    return tuple(hint(size) for size in node.meta["example_value"].shape)


def hint(size: Any) -> int:
    """A size as an int, a symbolic one at its hint."""
    return size if isinstance(size, int) else int(size.node.hint)


def _view(shape: tuple[int, ...], operand: Operand | MaskOperand) -> tuple[int, ...]:
    """The shape of an operand after its steps."""
    value = torch.empty(shape, device="meta")
    for method, args in operand.steps:
        value = getattr(value, method)(*(hint(arg) if isinstance(arg, torch.SymInt) else arg for arg in args))
    return tuple(value.shape)


def _example(node: fx.Node, site: AttentionSite, sizes: _Changes, generator: torch.Generator) -> Any:
    """A random value for an input of the replay: masks hide about a third and one whole row."""
    value = node.meta.get("example_value")
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return sizes(hint(value)) if isinstance(value, torch.SymInt) else float(value.node.hint)
    if not isinstance(value, Tensor):
        return value
    shape = tuple(sizes(size) for size in _hinted(node))
    if value.dtype == torch.bool:
        kind = next((mask.kind for mask in site.masks if mask.node is node), "visible")
        visible = torch.rand(shape, device=sizes.device, generator=generator) > 0.3
        if len(shape) >= 2 and shape[-2] > 1:
            visible[..., 0, :] = False
        return visible if kind != "hidden" else ~visible
    if not value.dtype.is_floating_point:
        return torch.randint(0, 2, shape, dtype=value.dtype, device=sizes.device, generator=generator)
    return torch.randn(shape, device=sizes.device, dtype=torch.float64, generator=generator).to(value.dtype)


def _replay(closure: list[fx.Node], inputs: Mapping[fx.Node, Any], sizes: _Changes, call: Callable[..., Any]) -> Any:
    values = dict(inputs)
    for node in closure:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        args, kwargs = fx.node.map_aggregate((args, kwargs), sizes)
        values[node] = call(node, args, kwargs)
    return values


def as_written(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs one captured node, dropout off: two random patterns cannot be compared."""
    target = node.target
    if target is F.dropout or target is torch.dropout:
        return args[0]
    if target is F.scaled_dot_product_attention:
        kwargs = {**kwargs, "dropout_p": 0.0}
        args = args[:4] + ((0.0, *args[5:]) if len(args) > 4 else ())
        kwargs = {key: value for key, value in kwargs.items() if not (key == "dropout_p" and len(args) > 4)}
    if node.op == "call_method":
        assert isinstance(target, str)
        return getattr(args[0], target)(*args[1:], **kwargs)
    if node.op == "call_function":
        return target(*args, **kwargs)  # type: ignore[operator]
    raise ValueError(f"cannot replay a {node.op} node")


def in_double(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs one captured node with every cast to a floating type turned into a cast to float64."""
    args, kwargs = fx.node.map_aggregate((args, kwargs), _double_type)
    if node.op == "call_method" and node.target in _LOW_TO_DOUBLE:
        return args[0].double()
    if node.op == "call_method" and node.target == "type_as":
        return args[0].double() if args[1].is_floating_point() else args[0].type_as(args[1])
    return as_written(node, args, kwargs)


def _double_type(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def to_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _run_op(site: AttentionSite, inputs: Mapping[fx.Node, Any]) -> Tensor:
    """The op as `rewrite.replace_attention` will call it, on these inputs, without dropout.

    On a GPU it computes in float64, which runs in matrix products: what is checked is how the site was read, and a
    kernel for this mask, which a lifted mask will not need, would take longer to compile than all passes together.
    """
    q, k, v = (_stepped(inputs[one.node], one) for one in (site.q, site.k, site.v))
    visible: Tensor | None = None
    additive: Tensor | None = None
    for mask in site.masks:
        value = _stepped(inputs[mask.node], mask)
        if mask.kind == "additive":
            additive = value if additive is None else additive + value
        else:
            value = ~value if mask.kind == "hidden" else value
            visible = value if visible is None else visible & value
    if visible is not None and additive is not None:
        additive = torch.where(visible, additive, -math.inf)
    tensor = visible if additive is None else additive
    spec = MaskSpec(upper="0" if site.causal else None, dense=tensor is not None, empty=site.empty)
    low = min((q.dtype, k.dtype, v.dtype), key=lambda dtype: dtype.itemsize)
    sinks = None if site.sinks is None else inputs[site.sinks].reshape(-1)
    q, k, v = q.to(low), k.to(low), v.to(low)
    if q.is_cuda:
        q, k, v, tensor = q.double(), k.double(), v.double(), None if tensor is None else to_double(tensor)
    output, _ = ops.attention(q, k, v, tensor, spec=spec.text(), scale=site.scale, sinks=sinks)
    for method, args in site.out_steps:
        output = getattr(output, method)(*args)
    return output.to(site.output.meta["example_value"].dtype)


def _stepped(value: Tensor, operand: Operand | MaskOperand) -> Tensor:
    for method, args in operand.steps:
        value = getattr(value, method)(*args)
    return value


def within_bound(actual: Tensor, original: Tensor, gold: Tensor, terms: int, condition: float = 1.0) -> Outcome:
    """max |actual - gold| <= 2 (max |original - gold| + eps max |gold|), rms likewise with 1.5; same NaNs.

    With `condition`, the terms of a sum count and not the sum: eps is multiplied by it.

    Code in float64 is its own gold, which hides its error: sums of `terms` products, whose rounding
    errors grow like sqrt(terms), stand in for it.
    """
    if actual.shape != original.shape or actual.dtype != original.dtype:
        return Outcome(
            False, f"the op gives {actual.dtype}{tuple(actual.shape)}, the code {original.dtype}{tuple(original.shape)}"
        )
    finite = torch.isfinite(gold)
    if not torch.equal(torch.isfinite(actual), torch.isfinite(original)):
        return Outcome(False, "the op is not finite where the code is, or the other way round")
    gold_finite, ours, theirs = (value.double()[finite] for value in (gold, actual, original))
    if gold_finite.numel() == 0:
        return Outcome(True, "verified")
    band = condition * torch.finfo(original.dtype).eps * gold_finite.abs().max()
    if original.dtype == torch.float64:
        band = band * math.sqrt(terms)
    error, allowed = (ours - gold_finite).abs(), (theirs - gold_finite).abs()
    largest, limit = error.max().item(), 2 * (allowed.max() + band).item()
    rms, rms_limit = error.square().mean().sqrt().item(), 1.5 * (allowed.square().mean().sqrt() + band).item()
    if not (largest <= limit and rms <= rms_limit):
        return Outcome(
            False,
            f"the op differs from the code it would replace: max error {largest:.3g} (allowed {limit:.3g}), "
            f"rms {rms:.3g} (allowed {rms_limit:.3g})",
        )
    return Outcome(True, f"verified, max error {largest:.2g} of {limit:.2g} allowed")
