"""Routed experts become ops: find, verify, replace, report. Stage 1 of the pipeline."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from s2o_inductor.config import S2OConfig
from s2o_inductor.errors import DeclinedError, VerificationError
from s2o_inductor.passes import moe, rewrite, verify
from s2o_inductor.passes.records import Declined, ExpertsSite, Recorder

log = logging.getLogger("s2o_inductor")
# Largest number of elements, of weights and rows together, with which a site is run at its own size.
MAX_ELEMENTS = 2**25


def rewrite_experts(gm: fx.GraphModule, config: S2OConfig, recorder: Recorder, new_name: Callable[[str], str]) -> None:
    """Every found site of one graph becomes an op, in place; the others stay node for node.

    Raises:
        DeclinedError: under `strict`, a candidate was declined.
        VerificationError: under `strict`, the op disagrees with the code it would replace.
    """
    try:
        sites, declined = moe.find_experts(gm.graph)
    except Exception:  # a defect of ours must not become the user's crash
        log.exception("the search for experts failed; please report this. The graph stays as it was")
        return
    changed = False
    for site in sites:
        if any(fnmatch.fnmatch(site.where, pattern) for pattern in config.exclude):
            recorder.declined(Declined("moe", site.where, "excluded by option 'exclude'", site.output))
            continue
        outcome = verify.Outcome(True, "off") if config.verify == "off" else check(gm.graph, site)
        if not outcome.passed:
            if config.strict:
                raise VerificationError(f"{site.where}: {outcome.detail}")
            declined.append(Declined("moe", site.where, outcome.detail, site.output))
            continue
        name = new_name(site.where)
        recorder.rewrote_experts(site, name, outcome.detail)
        rewrite.replace_experts(gm.graph, site, name)
        log.info("rewrote experts at %s as %s", site.where, name)
        changed = True
    for refusal in declined:
        recorder.declined(refusal)
        log.info("declined %s at %s: %s", refusal.kind, refusal.where, refusal.reason)
    if config.strict and declined:
        raise DeclinedError("; ".join(f"{refusal.where}: {refusal.reason}" for refusal in declined))
    if changed:
        gm.graph.lint()
        gm.recompile()


def check(graph: fx.Graph, site: ExpertsSite) -> verify.Outcome:
    """Runs a site's own nodes and the op on the same random inputs, under random and under adversarial routing."""
    elements = sum(
        math.prod(verify.hint(size) for size in node.meta["example_value"].shape)
        for node in (site.w1, site.w2, site.tokens)
    )
    if elements > MAX_ELEMENTS:
        return verify.Outcome(True, "unverified: too large to run at compile time")
    try:
        with torch.no_grad(), _disable_current_modes(), contextlib.ExitStack() as regions:
            for arguments in verify.autocast_regions(graph, site.output):
                regions.enter_context(torch.autocast(*arguments))
            outcomes = [_run(site, routing) for routing in ("random", "same", "one")]
    except Exception as error:  # a user's code on made-up inputs: any failure only means "not proved"
        log.exception("verification of the experts at %s failed to run", site.where)
        return verify.Outcome(False, f"could not be verified: {type(error).__name__}: {error}")
    return next((outcome for outcome in outcomes if not outcome.passed), outcomes[0])


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


def _inputs(site: ExpertsSite) -> Iterable[fx.Node]:
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
