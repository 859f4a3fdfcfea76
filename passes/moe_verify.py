"""Verified rewriting of routed experts: the site's own nodes beside the op, as in `verify.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from s2o_inductor.passes import verify
from s2o_inductor.passes.graph_utils import Refusal, fake, made
from s2o_inductor.passes.records import ExpertsSite, PerExpert, each

# Elements, of all operands together or of any one intermediate, from which a site is run at shortened sizes, and
# the most with which it is run where that cannot be.
SHORTEN_ABOVE = 2**22
MAX_ELEMENTS = 2**25
_ASSERT = torch.ops.aten._assert_scalar.default
# What torch says of an index that is too large.
_OUT_OF_BOUNDS = ("out of bounds", "out of range", "smaller than num_classes")
_outcomes: dict[str, verify.Outcome] = {}


def check_experts(graph: fx.Graph, site: ExpertsSite, *, always: bool = False) -> verify.Outcome:
    """Runs a site's own nodes and the op on the same random inputs, under random and under adversarial routing.

    A large site is run with fewer experts, fewer tokens and narrower matrices (see `shortened`). Outcomes are
    kept per distinct structure unless `always`.

    Raises:
        Refusal: the site has more than `MAX_ELEMENTS` elements and cannot be shortened.
    """
    operands = sum(map(_elements, site.operand_nodes()))
    largest = max(operands, *map(_elements, site.region))
    sizes = shortened(site) if largest > SHORTEN_ABOVE else {}
    if not sizes and largest > MAX_ELEMENTS:
        raise Refusal("too large to verify, and its sizes cannot be told apart to shorten them")
    autocast = verify.autocast_regions(graph, site.output)
    structure = verify.structure(site.region, _inputs(site), site.operands())
    key = f"{structure}\n{site.spec.text()}\n{autocast} {verify.ambient_autocast()}"
    if always or key not in _outcomes:
        with torch.no_grad(), _disable_current_modes(), contextlib.ExitStack() as regions:
            for arguments in autocast:
                regions.enter_context(torch.autocast(*arguments))
            routings = ["random", "same"]
            routings += [] if site.distinct else ["one"]
            routings += ["negative"] if site.wraps else []
            found = [_run(site, routing, sizes or {}) for routing in routings]
        outcome = next((outcome for outcome in found if not outcome.passed), found[0])
        _outcomes[key] = dataclasses.replace(outcome, detail=outcome.detail + ", at shortened sizes" * bool(sizes))
    return _outcomes[key]


def shortened(site: ExpertsSite) -> dict[int, int] | None:
    """Which size and literal of a site stands for which in a cheaper replay of the same nodes.

    A captured graph holds its sizes as literals: views, the bins of a histogram, the last expert of a clamp. Each
    of them is a number of experts, tokens or columns, or follows from one; the choices of a token stay, and so do
    experts that are separate branches of the graph. A size with two meanings keeps both, as where the experts are
    as wide as the tokens.

    Returns:
        Replacements, or None where one number would need two.
    """
    *leading, tokens, width = _hinted(site.tokens)
    choices, experts = _hinted(site.ids)[-1], site.experts
    inner, halves = _hinted(site.last)[-2 if site.spec.transposed else -1], site.spec.halves
    batch = math.prod(leading)
    replaced: dict[int, int] = {}

    def replace(value: int, short: int, *derived: tuple[int, int]) -> None:
        short = replaced.get(value, min(short, value))
        for old, new in ((value, short), *((value * a + b, short * a + b) for a, b in derived)):
            if replaced.setdefault(old, new) != new:
                raise ValueError

    try:
        replace(experts, experts if site.numbered else max(8, choices + choices // 2), (1, -1))
        replace(inner, 40, (halves, 0))
        replace(tokens, max(1, 24 // batch), (batch, 0), (batch * choices, 0))
        replace(width, 48)
    except ValueError:
        return None
    # Small numbers have meanings of their own, such as dimensions and the parts of a gate.
    replaced = {old: new for old, new in replaced.items() if old != new}
    kept = choices in replaced or any(size in replaced for size in leading)
    return None if kept or any(old < 8 for old in replaced) else replaced


def _hinted(node: fx.Node) -> tuple[int, ...]:
    return tuple(map(verify.hint, node.meta["example_value"].shape))


def _elements(node: fx.Node) -> int:
    """How many a node has; 0 where that depends on data: the rows of one expert are no more than those of all."""
    value = fake(node)
    if value is None or any(isinstance(size, torch.SymInt) and not size.node.has_hint() for size in value.shape):
        return 0
    return math.prod(map(verify.hint, value.shape))


def _run(site: ExpertsSite, routing: str, sizes: Mapping[int, int]) -> verify.Outcome:
    generator = torch.Generator().manual_seed(0)
    inputs = {node: _example(node, site, routing, sizes, generator) for node in _inputs(site)}
    if site.dense:
        weights, ids = inputs[site.weights], inputs[site.ids]
        inputs[site.weights] = torch.zeros_like(weights).scatter(-1, ids, weights.gather(-1, ids))
    if inputs[site.ids].device.type != "cpu":
        _try_on_cpu(site, inputs, sizes)
    original = _replay(site, inputs, sizes, verify.as_written)
    gold = _replay(site, {node: verify.to_double(value) for node, value in inputs.items()}, sizes, _in_double)
    with torch.autocast(original.device.type, enabled=False):
        actual = _operator(site, inputs).to(original.dtype)
    actual = actual.reshape(original.shape)
    actual = actual if site.base is None else inputs[site.base] + actual
    return verify.within_bound(actual, original, gold, terms=sum(inputs[site.last].shape[-2:]))


def _operator(site: ExpertsSite, inputs: Mapping[fx.Node, Any]) -> Tensor:
    """The operator as `rewrite.replace_experts` will call it, on these inputs."""

    def values(operand: PerExpert | None) -> Any:
        found = [inputs[node] for node in each(operand)]
        return found if isinstance(site.w2, tuple) else found[0] if found else None

    matrices = map(values, site.operands()[1:6])
    weights, ids = inputs[site.weights], inputs[site.ids]
    if site.dense:
        weights = weights.gather(-1, ids)
    if site.wraps:
        ids = torch.where(ids < 0, ids + inputs[site.last].shape[0], ids)
    z, ids, weights = (
        x.reshape(-1, x.shape[-1]) for x in (inputs[site.tokens].to(inputs[site.last].dtype), ids, weights)
    )
    call = torch.ops.s2o.moe_experts_list if isinstance(site.w2, tuple) else torch.ops.s2o.moe_experts
    found: Tensor = call(z, *matrices, ids, weights, site.spec.text(), False, "")[0]
    return found


def _inputs(site: ExpertsSite) -> list[fx.Node]:
    inside = set(site.region)
    read = {source: None for node in site.region for source in node.all_input_nodes if source not in inside}
    return list(read | dict.fromkeys(site.operand_nodes()))


def _example(
    node: fx.Node, site: ExpertsSite, routing: str, sizes: Mapping[int, int], generator: torch.Generator
) -> Any:
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        return sizes.get(hint := verify.hint(value), hint) if isinstance(value, torch.SymInt) else value
    shape = tuple(sizes.get(size, size) for size in map(verify.hint, value.shape))
    if node is site.ids:
        experts = sizes.get(site.experts, site.experts)
        ids = torch.rand(math.prod(shape[:-1]), experts, generator=generator).topk(min(shape[-1], experts)).indices
        ids = ids[:, torch.arange(shape[-1]) % experts]
        ids = ids[:1].expand_as(ids) if routing == "same" else ids
        ids = torch.full(shape, experts - 1) if routing == "one" else ids.reshape(shape)
        ids = ids - experts if routing == "negative" else ids
        return ids.to(value.device, value.dtype).contiguous()
    if node is site.weights:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(value.device, value.dtype)
    is_matrix = any(node in each(operand) for operand in (site.w1, site.w2, site.w3))
    scale = shape[-2 if site.spec.transposed else -1] ** -0.5 if is_matrix else 1.0
    return (torch.randn(shape, generator=generator, dtype=torch.float32) * scale).to(value.device, value.dtype)


def _replay(
    site: ExpertsSite, inputs: dict[fx.Node, Any], sizes: Mapping[int, int], call: Callable[..., Any]
) -> Tensor:
    def short(value: Any) -> Any:
        return sizes.get(value, value) if type(value) is int else value

    values = {node: value.clone() if isinstance(value, Tensor) else value for node, value in inputs.items()}
    for node in site.region:
        if node.target is _ASSERT:  # of the sizes that were captured
            continue
        # Literals alone: a size that the nodes compute follows from replaced ones already.
        literals: Any = (node.args, dict(node.kwargs))
        literals = literals if node in site.numbered else fx.node.map_aggregate(literals, short)
        values[node] = call(node, *fx.node.map_arg(literals, values.__getitem__))
    found = values[made(site.output)]
    assert isinstance(found, Tensor)
    return found


def _try_on_cpu(site: ExpertsSite, inputs: Mapping[fx.Node, Any], sizes: Mapping[int, int]) -> None:
    """Runs a site's nodes on the CPU, where an index out of bounds is an error: on CUDA it ends the process's work.

    What fails for another reason, such as code for a GPU alone, is left to the run that follows.

    Raises:
        Refusal: an index is out of bounds, as when a size that was shortened has another meaning as well.
    """
    moved = {node: verify.to_double(x.cpu()) if isinstance(x, Tensor) else x for node, x in inputs.items()}
    try:
        _replay(site, moved, sizes, _on_cpu)
    except Exception as error:  # a user's code on a device that it may not be for
        if any(words in str(error) for words in _OUT_OF_BOUNDS):
            raise Refusal(f"could not be verified: {error}") from error


def _on_cpu(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`_in_double` of a node that was captured on another device."""

    def here(value: Any) -> Any:
        named = isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda"))
        return torch.device("cpu") if named else value

    if node.op == "call_method" and node.target == "cuda":
        return args[0]
    args, kwargs = fx.node.map_aggregate((args, kwargs), here)
    if getattr(node.target, "__name__", node.target) == "histc":  # of integers on CUDA alone
        args = (args[0].double(), *args[1:])
    return _in_double(node, args, kwargs)


def _in_double(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One captured node in float64, which torch's grouped product does not have."""
    if getattr(node.target, "__name__", "").split(".")[0] not in ("grouped_mm", "_grouped_mm"):
        return verify.in_double(node, args, kwargs)
    rows, weight, offsets = args[0], args[1], kwargs["offs"] if "offs" in kwargs else args[2]
    result, start = rows.new_zeros(rows.shape[0], weight.shape[2]), 0
    for expert, end in enumerate(offsets.tolist()):
        result[start:end] = rows[start:end] @ weight[expert]
        start = end
    return result
