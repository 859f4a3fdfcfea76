"""Routers: what changes in front of routed experts, what stays, and that the choices are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from s2o_inductor.moe_ops import moe_experts
from s2o_inductor.moe_spec import ExpertSpec
from s2o_inductor.passes import pipeline
from s2o_inductor.report import GraphReport, Site

aten = torch.ops.aten
WIDTH, EXPERTS, SITE = 16, 12, "layer#1@0"
Route = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def scores_of(x: Tensor, weight: Tensor) -> Tensor:
    """As Nemotron and DeepSeek compute them."""
    return F.linear(x.flatten(0, 1).to(torch.float32), weight.to(torch.float32))


def chosen(scores: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    p, ids = torch.topk(scores.softmax(-1), k, dim=-1)
    return ids, p / p.sum(-1, keepdim=True)


def plain(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return chosen(scores_of(x, weight))


def grouped(groups: int, kept: int) -> Route:
    """Choices within the groups whose two best experts are best, unsorted."""

    def route(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        scores = scores_of(x, weight).sigmoid()
        best = scores.view(-1, groups, EXPERTS // groups).topk(2, dim=-1)[0].sum(-1)
        index = torch.topk(best, k=kept, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(best).scatter(1, index, 1)
        mask = mask.unsqueeze(-1).expand(-1, groups, EXPERTS // groups).reshape(-1, EXPERTS)
        ids = torch.topk(scores.masked_fill(~mask.bool(), float("-inf")), k=3, dim=-1, sorted=False)[1]
        p = scores.gather(1, ids)
        return ids, 2.5 * p / (p.sum(-1, keepdim=True) + 1e-20)

    return route


def layer(route: Route) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    def run(x: Tensor, weight: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        ids, p = route(x, weight)
        return moe_experts(x.flatten(0, 1), w1, w2, ids, p, spec=ExpertSpec("relu2"), keep=False, site=SITE), ids, p

    return run


def inputs(tokens: Any = 6, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    shapes = ((1, tokens, width), (EXPERTS, width), (EXPERTS, 4, width), (EXPERTS, width, 4))
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def traced(
    route: Route, *, symbolic: bool = False, decompose: bool = True, device: str = "cuda", **how: Any
) -> fx.GraphModule:
    """The functional graph of a layer that says that its tensors are on a GPU, and runs here."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    tokens: Any = 6
    if symbolic:
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        tokens = mode.from_tensor(torch.empty(6), symbolic_context=context).shape[0]
    with mode:
        given = inputs(tokens, **how)
    table = select_decomp_table() if decompose else {}
    gm = make_fx(layer(route), decomposition_table=table, tracing_mode="fake")(*given)
    gm.graph.eliminate_dead_code()  # as AOTAutograd does
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            with mode:
                node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return gm


def targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


class Here(fx.Interpreter):
    """Runs a graph on the CPU; the product that only a GPU has, by its definition."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.mm.dtype:
            assert args[0].dtype == args[1].dtype == torch.bfloat16
            return args[0].float() @ args[1].float()
        return super().call_function(target, args, kwargs)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """The same choices, in whatever order, with weights and outputs summed in another order."""
    (out, ids, p), (out2, ids2, p2) = actual, expected
    at, at2 = ids.argsort(-1), ids2.argsort(-1)
    assert torch.equal(ids.gather(-1, at), ids2.gather(-1, at2))
    torch.testing.assert_close(p.gather(-1, at), p2.gather(-1, at2), rtol=1e-6, atol=0)
    torch.testing.assert_close(out, out2, rtol=2e-2, atol=2e-2)


def rewritten(gm: fx.GraphModule) -> list[str]:
    """Rewrites the graph; what the report says of its site."""
    report = GraphReport(sites=[Site("moe", "layer", "rewritten", name=SITE)])
    pipeline.lower_routers(gm.graph, report)
    gm.recompile()
    return report.sites[0].router


@pytest.mark.parametrize("decompose", [True, False])
@pytest.mark.parametrize("symbolic", [True, False])
@pytest.mark.parametrize(("groups", "selections"), [(None, 1), (4, 3), (1, 1)])
def test_routers_choose_the_same(groups: int | None, selections: int, symbolic: bool, decompose: bool) -> None:
    route = plain if groups is None else grouped(groups, max(1, groups // 2))
    gm = traced(route, symbolic=symbolic, decompose=decompose)
    given = inputs()
    expected = Here(gm).run(*given)
    said = rewritten(gm)
    found = targets(gm)
    assert found.count(torch.ops.s2o.top_k.default) == selections
    # Without decompositions the scores of the only group still give a tensor of zeros their shape.
    assert found.count(aten.topk.default) == (groups == 1 and not decompose)
    assert found.count(aten.mm.dtype) == 1 and aten.mm.default not in found
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    assert len(said) == 1 + found.count(torch.ops.s2o.top_k.default) + found.count(aten.full_like.default), said
    assert_same(Here(gm).run(*given), expected)
