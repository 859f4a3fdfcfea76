"""Verified rewriting of routed experts: the site's own nodes beside the op, as in `verify.py`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from s2o_inductor.passes import verify
from s2o_inductor.passes.graph_utils import Refusal, fake
from s2o_inductor.passes.records import ExpertsSite

# Largest number of elements, of all operands together and of any one intermediate, with which a site is run: it
# cannot be shortened, since the number of experts and the choices of a token are part of what it computes.
MAX_ELEMENTS = 2**25
_outcomes: dict[str, verify.Outcome] = {}


def check_experts(graph: fx.Graph, site: ExpertsSite, *, always: bool = False) -> verify.Outcome:
    """Runs a site's own nodes and the op on the same random inputs, under random and under adversarial routing.

    Outcomes are kept per distinct structure unless `always`.

    Raises:
        Refusal: the site has more than `MAX_ELEMENTS` elements.
    """
    operands = sum(_elements(node) for node in dict.fromkeys(site.operands()))
    if max(operands, *map(_elements, site.region)) > MAX_ELEMENTS:
        raise Refusal("too large to verify in this version")
    autocast = verify.autocast_regions(graph, site.output)
    structure = verify.structure(site.region, _inputs(site), site.operands())
    key = f"{structure}\n{site.spec.text()}\n{autocast} {verify.ambient_autocast()}"
    if always or key not in _outcomes:
        with torch.no_grad(), _disable_current_modes(), contextlib.ExitStack() as regions:
            for arguments in autocast:
                regions.enter_context(torch.autocast(*arguments))
            found = [_run(site, routing) for routing in ("random", "same", "one")]
        _outcomes[key] = next((outcome for outcome in found if not outcome.passed), found[0])
    return _outcomes[key]


def _elements(node: fx.Node | None) -> int:
    value = fake(node)
    return 0 if value is None else math.prod(map(verify.hint, value.shape))


def _run(site: ExpertsSite, routing: str) -> verify.Outcome:
    generator = torch.Generator().manual_seed(0)
    inputs = {node: _example(node, site, routing, generator) for node in _inputs(site)}
    original = _replay(site, inputs, verify.as_written)
    gold = _replay(site, {node: verify.to_double(value) for node, value in inputs.items()}, _in_double)
    values = [None if node is None else inputs[node] for node in site.operands()]
    values[0] = inputs[site.tokens].to(inputs[site.w1].dtype)
    with torch.autocast(original.device.type, enabled=False):
        actual = torch.ops.s2o.moe_experts(*values, site.spec.text(), False, "")[0].to(original.dtype)
    return verify.within_bound(actual, original, gold, terms=sum(inputs[site.w2].shape[1:]))


def _inputs(site: ExpertsSite) -> list[fx.Node]:
    inside = set(site.region)
    read = {source: None for node in site.region for source in node.all_input_nodes if source not in inside}
    return list(read | {node: None for node in site.operands() if node is not None})


def _example(node: fx.Node, site: ExpertsSite, routing: str, generator: torch.Generator) -> Any:
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        return verify.hint(value) if isinstance(value, torch.SymInt) else value
    shape = tuple(verify.hint(size) for size in value.shape)
    if node is site.ids:
        experts = site.w2.meta["example_value"].shape[0]
        ids = torch.rand(shape[0], experts, generator=generator).topk(min(shape[1], experts)).indices
        ids = ids[:, torch.arange(shape[1]) % experts]
        if routing == "same":
            ids = ids[:1].expand(shape)
        return (torch.full(shape, experts - 1) if routing == "one" else ids).to(value.dtype).contiguous()
    if node is site.weights:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(value.dtype)
    scale = shape[-2 if site.spec.transposed else -1] ** -0.5 if len(shape) == 3 else 1.0
    return (torch.randn(shape, generator=generator, dtype=torch.float32) * scale).to(value.dtype)


def _replay(site: ExpertsSite, inputs: dict[fx.Node, Any], call: Callable[..., Any]) -> Tensor:
    values = {node: value.clone() if isinstance(value, Tensor) else value for node, value in inputs.items()}
    for node in site.region:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        values[node] = call(node, args, kwargs)
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
