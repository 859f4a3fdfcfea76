"""Captures what a backend receives, and replays what a site record says against what the graph computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from s2o_inductor.passes.records import AttentionSite, MaskOperand, Operand


def capture_all(function: Callable[..., Any], *args: Any, **options: Any) -> list[tuple[fx.GraphModule, list[Any]]]:
    """Every Dynamo graph of one call of `function`, each with copies of the inputs it is run on.

    Args:
        function: what to compile.
        *args: its arguments.
        **options: go to torch.compile.
    """
    captured: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            copies = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
            captured.append((gm, copies))
            return gm(*inputs)

        return run

    torch._dynamo.reset()
    without_guards = {"guard_filter_fn": lambda entries: [False] * len(entries)}  # each graph runs once
    torch.compile(function, backend=backend, **{"dynamic": False, "options": without_guards, **options})(*args)
    return captured


def capture(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[fx.GraphModule, list[Any]]:
    """The one Dynamo graph of a function without graph breaks, and its inputs."""
    captured = capture_all(function, *args, **{"fullgraph": True, **options})
    assert len(captured) == 1, f"expected one graph, got {len(captured)}"
    return captured[0]


def assert_means_what_it_says(gm: fx.GraphModule, sites: Iterable[AttentionSite], inputs: list[Any]) -> None:
    """Runs the graph and compares the value of every output node with what the site's record defines.

    The record is evaluated in float64 on the operands as they stand when the output is computed,
    which is when the op would read them. Sites with dropout are skipped: their values are random.
    """
    _Comparison(gm, sites).run(*inputs)


class _Comparison(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, sites: Iterable[AttentionSite]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.sites = {site.output: site for site in sites if site.dropout == 0.0}

    def run_node(self, n: fx.Node) -> Any:
        site = self.sites.get(n)
        expected = None if site is None else _defined_by(site, self.env)
        value = super().run_node(n)
        if expected is not None:
            loose = value.dtype in (torch.float16, torch.bfloat16)
            assert expected.shape == value.shape, f"{site}: shape {expected.shape}, the graph has {value.shape}"
            torch.testing.assert_close(
                expected, value.double(), rtol=5e-2 if loose else 2e-5, atol=5e-2 if loose else 2e-5, equal_nan=True
            )
        return value


def _defined_by(site: AttentionSite, env: dict[fx.Node, Any]) -> Tensor:
    """The output of a site by the definition in `AttentionSite`, in float64."""
    q, k, v = (_applied(env[operand.node], operand) for operand in (site.q, site.k, site.v))
    assert q.dim() == k.dim() == v.dim() == 4
    assert q.dtype == k.dtype == v.dtype
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    assert group * k.shape[1] == q.shape[1] and k.shape[1] == v.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * site.scale
    hidden = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if site.causal:
        hidden |= torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    for mask in site.masks:
        value = _applied(env[mask.node], mask)
        assert value.dim() == 4, f"a mask of {value.dim()} dimensions"
        if mask.kind == "additive":
            scores = scores + value.double()
        else:
            hidden |= ~value if mask.kind == "visible" else value
    scores = scores.masked_fill(hidden, -math.inf)
    if site.sinks is not None:
        column = env[site.sinks].double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(dim=-1)[..., : k.shape[2]]
    output = weights @ v
    instead = {"zero": torch.zeros_like(output), "mean": v.mean(dim=2, keepdim=True), "nan": output * math.nan}
    output = torch.where(empty, instead[site.empty], output)
    return _applied(output, Operand(site.output, site.out_steps))


def _applied(value: Tensor, operand: Operand | MaskOperand) -> Tensor:
    for method, args in operand.steps:
        value = getattr(value, method)(*args)
    return value
