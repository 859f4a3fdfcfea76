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
from s2o_inductor.passes.graph_utils import Refusal, fake
from s2o_inductor.passes.records import ExpertsSite

# Elements, of all operands together or of any one intermediate, from which a site is run at shortened sizes, and
# the most with which it is run where that cannot be.
SHORTEN_ABOVE = 2**22
MAX_ELEMENTS = 2**25
_outcomes: dict[str, verify.Outcome] = {}


def check_experts(graph: fx.Graph, site: ExpertsSite, *, always: bool = False) -> verify.Outcome:
    """Runs a site's own nodes and the op on the same random inputs, under random and under adversarial routing.

    A large site is run with fewer experts, fewer tokens and narrower matrices (see `shortened`). Outcomes are
    kept per distinct structure unless `always`.

    Raises:
        Refusal: the site has more than `MAX_ELEMENTS` elements and cannot be shortened.
    """
    operands = sum(_elements(node) for node in dict.fromkeys(site.operands()))
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
            # A matrix of routing weights has one entry per expert, so its choices cannot repeat one.
            routings = ("random", "same") if site.dense else ("random", "same", "one")
            found = [_run(site, routing, sizes or {}) for routing in routings]
        outcome = next((outcome for outcome in found if not outcome.passed), found[0])
        _outcomes[key] = dataclasses.replace(outcome, detail=outcome.detail + ", at shortened sizes" * bool(sizes))
    return _outcomes[key]


def shortened(site: ExpertsSite) -> dict[int, int] | None:
    """Which size and literal of a site stands for which in a cheaper replay of the same nodes.

    A captured graph holds its sizes as literals: views, the bins of a histogram, the last expert of a clamp. Each
    of them is a number of experts, tokens or columns, or follows from one; the choices of a token stay. A size with
    two meanings keeps both, as where the experts are as wide as the tokens.

    Returns:
        Replacements, or None where one number would need two.
    """
    tokens, width = _hinted(site.tokens)
    choices = _hinted(site.ids)[1]
    experts, *matrix = _hinted(site.w2)
    inner, halves = matrix[0 if site.spec.transposed else 1], site.spec.halves
    replaced: dict[int, int] = {}

    def replace(value: int, short: int, *derived: tuple[int, int]) -> None:
        short = replaced.get(value, min(short, value))
        for old, new in ((value, short), *((value * a + b, short * a + b) for a, b in derived)):
            if replaced.setdefault(old, new) != new:
                raise ValueError

    try:
        replace(experts, max(8, choices + choices // 2), (1, -1))
        replace(inner, 40, (halves, 0))
        replace(tokens, 24, (choices, 0))
        replace(width, 48)
    except ValueError:
        return None
    # Small numbers have meanings of their own, such as dimensions and the parts of a gate.
    replaced = {old: new for old, new in replaced.items() if old != new}
    return None if choices in replaced or any(old < 8 for old in replaced) else replaced


def _hinted(node: fx.Node) -> tuple[int, ...]:
    return tuple(map(verify.hint, node.meta["example_value"].shape))


def _elements(node: fx.Node | None) -> int:
    value = fake(node)
    return 0 if value is None else math.prod(map(verify.hint, value.shape))


def _run(site: ExpertsSite, routing: str, sizes: Mapping[int, int]) -> verify.Outcome:
    generator = torch.Generator().manual_seed(0)
    inputs = {node: _example(node, site, routing, sizes, generator) for node in _inputs(site)}
    if site.dense:
        weights, ids = inputs[site.weights], inputs[site.ids]
        inputs[site.weights] = torch.zeros_like(weights).scatter(1, ids, weights.gather(1, ids))
    original = _replay(site, inputs, sizes, verify.as_written)
    gold = _replay(site, {node: verify.to_double(value) for node, value in inputs.items()}, sizes, _in_double)
    values = [None if node is None else inputs[node] for node in site.operands()]
    values[0] = inputs[site.tokens].to(inputs[site.w1].dtype)
    if site.dense:
        values[-1] = inputs[site.weights].gather(1, inputs[site.ids])
    with torch.autocast(original.device.type, enabled=False):
        actual = torch.ops.s2o.moe_experts(*values, site.spec.text(), False, "")[0].to(original.dtype)
    actual = actual.reshape(original.shape)
    actual = actual if site.base is None else inputs[site.base] + actual
    return verify.within_bound(actual, original, gold, terms=sum(inputs[site.w2].shape[1:]))


def _inputs(site: ExpertsSite) -> list[fx.Node]:
    inside = set(site.region)
    read = {source: None for node in site.region for source in node.all_input_nodes if source not in inside}
    return list(read | {node: None for node in site.operands() if node is not None})


def _example(
    node: fx.Node, site: ExpertsSite, routing: str, sizes: Mapping[int, int], generator: torch.Generator
) -> Any:
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        return sizes.get(hint := verify.hint(value), hint) if isinstance(value, torch.SymInt) else value
    shape = tuple(sizes.get(size, size) for size in map(verify.hint, value.shape))
    if node is site.ids:
        experts = site.w2.meta["example_value"].shape[0]
        experts = sizes.get(experts, experts)
        ids = torch.rand(shape[0], experts, generator=generator).topk(min(shape[1], experts)).indices
        ids = ids[:, torch.arange(shape[1]) % experts]
        if routing == "same":
            ids = ids[:1].expand(shape)
        ids = torch.full(shape, experts - 1) if routing == "one" else ids
        return ids.to(value.device, value.dtype).contiguous()
    if node is site.weights:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(value.device, value.dtype)
    scale = shape[-2 if site.spec.transposed else -1] ** -0.5 if len(shape) == 3 else 1.0
    return (torch.randn(shape, generator=generator, dtype=torch.float32) * scale).to(value.device, value.dtype)


def _replay(
    site: ExpertsSite, inputs: dict[fx.Node, Any], sizes: Mapping[int, int], call: Callable[..., Any]
) -> Tensor:
    def short(value: Any) -> Any:
        return sizes.get(value, value) if type(value) is int else value

    values = {node: value.clone() if isinstance(value, Tensor) else value for node, value in inputs.items()}
    for node in site.region:
        # Literals alone: a size that the nodes compute follows from replaced ones already.
        literals = fx.node.map_aggregate((node.args, dict(node.kwargs)), short)
        values[node] = call(node, *fx.node.map_arg(literals, values.__getitem__))
    found = values[site.output]
    assert isinstance(found, Tensor)
    return found


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
