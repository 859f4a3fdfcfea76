"""Routers: what changes in front of routed experts, what stays, and that the choices are the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import moe_idioms
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import s2o_inductor
from s2o_inductor.moe_ops import moe_experts
from s2o_inductor.moe_spec import ExpertSpec
from s2o_inductor.passes import moe_router, pipeline
from s2o_inductor.report import GraphReport, Site
from s2o_inductor.router_ops import mm_float32, top_k

aten = torch.ops.aten
MM_FLOAT32 = torch.ops.s2o.mm_float32.default
WIDTH, EXPERTS, TOKENS, SITE = 16, 12, 20, "layer#1@0"
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


def inputs(tokens: Any = TOKENS, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    shapes = ((1, tokens, width), (EXPERTS, width), (EXPERTS, 4, width), (EXPERTS, width, 4))
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def traced(
    route: Route,
    *,
    symbolic: bool = False,
    decompose: bool = True,
    device: str = "cuda",
    tokens: Any = TOKENS,
    **how: Any,
) -> fx.GraphModule:
    """The functional graph of a layer that says that its tensors are on a GPU, and runs here."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    if symbolic:
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        tokens = mode.from_tensor(torch.empty(TOKENS), symbolic_context=context).shape[0]
    with mode:
        data = inputs(tokens, **how)
    table = select_decomp_table() if decompose else {}
    gm = make_fx(layer(route), decomposition_table=table, tracing_mode="fake")(*data)
    gm.graph.eliminate_dead_code()  # as AOTAutograd does
    return on(device, gm)


def on(device: str, gm: fx.GraphModule) -> fx.GraphModule:
    """The graph, saying that its tensors are there."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            with value.fake_mode:  # type: ignore[attr-defined]
                node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return gm


def targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


class Here(fx.Interpreter):
    """Runs on the CPU what says that it is on a GPU."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, args, {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs)


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
    data = inputs()
    expected = Here(gm).run(*data)
    said = rewritten(gm)
    found = targets(gm)
    assert found.count(torch.ops.s2o.top_k.default) == selections
    # Without decompositions the scores of the only group still give a tensor of zeros their shape.
    assert found.count(aten.topk.default) == (groups == 1 and not decompose)
    assert found.count(MM_FLOAT32) == 1 and aten.mm.default not in found
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    assert len(said) == 1 + found.count(torch.ops.s2o.top_k.default) + (groups == 1), said
    assert_same(Here(gm).run(*data), expected)


def biased(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    bias = torch.arange(EXPERTS, dtype=torch.float32)
    return chosen(F.linear(x.flatten(0, 1).float(), weight.float(), bias))


def test_a_bias_is_added_behind_the_product() -> None:
    gm, data = traced(biased), inputs()
    expected = Here(gm).run(*data)
    assert len(rewritten(gm)) == 2
    assert MM_FLOAT32 in targets(gm) and aten.addmm.default not in targets(gm)
    assert_same(Here(gm).run(*data), expected)


def test_the_score_of_an_only_group_may_be_read() -> None:
    def route(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        scores = scores_of(x, weight)
        best = scores.view(-1, 1, EXPERTS).topk(2, dim=-1)[0].sum(-1)
        score, index = torch.topk(best, k=1, dim=-1)
        ids, p = chosen(scores)
        return ids + index, p * score

    gm, data = traced(route), inputs()
    expected = Here(gm).run(*data)
    said = rewritten(gm)
    assert said[1:] == ["the largest 2 of 12 in one launch", "the largest 3 of 12 in one launch", said[-1]]
    assert aten.topk.default not in targets(gm)
    assert_same(Here(gm).run(*data), expected)


@pytest.mark.parametrize("symbolic", [True, False])
@pytest.mark.parametrize("choices", ["one", "of a choice", "of its score"])
def test_the_only_expert_is_chosen_by_nothing_else(choices: str, symbolic: bool) -> None:
    """Nothing else has as many rows: sizes of the zeros cannot come from what follows a choice, or goes with it."""

    def route(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        scores = scores_of(x, weight).sum(-1, keepdim=True)
        score, index = torch.topk(scores, k=1, dim=-1)
        if choices == "of a choice":
            index = index + torch.topk(scores.sigmoid() * index, k=1, dim=-1)[1]
        if choices == "of its score":
            index = torch.topk(score, k=1, dim=-1)[1]
        return index, torch.ones_like(index, dtype=x.dtype)

    gm, data = traced(route, symbolic=symbolic), inputs()
    expected = Here(gm).run(*data)
    assert set(rewritten(gm)) == {"no choice of one among one"}
    assert_same(Here(gm).run(*data), expected)


def test_a_cast_with_other_readers_stays() -> None:
    def route(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ids, p = plain(x, weight)
        return ids, p * x.flatten(0, 1).float().square().mean(-1, keepdim=True)

    gm, data = traced(route), inputs()
    expected = Here(gm).run(*data)
    rewritten(gm)
    assert MM_FLOAT32 in targets(gm) and torch.ops.prims.convert_element_type.default in targets(gm)
    assert_same(Here(gm).run(*data), expected)


def of_float32_weights(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return chosen(F.linear(x.flatten(0, 1).float(), weight.float() * 1.5))


def of_a_scaled_input(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return chosen(F.linear(x.flatten(0, 1).float() * 0.5, weight.float()))


def in_bfloat16(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return chosen(F.linear(x.flatten(0, 1), weight).float())


def of_a_strided_input(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The cast makes a copy, of which the view is one; of its source there is no such view."""
    rows = x[..., :WIDTH].float().view(2, -1).view(-1, WIDTH)
    return chosen(F.linear(rows, weight[:, :WIDTH].float()))


def scaled_bias(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    bias = torch.zeros(EXPERTS)
    return chosen(torch.addmm(bias, x.flatten(0, 1).float(), weight.float().T, alpha=2.0))


@pytest.mark.parametrize("route", [of_float32_weights, of_a_scaled_input, in_bfloat16, of_a_strided_input, scaled_bias])
def test_products_that_stay(route: Route) -> None:
    gm = traced(route, width=2 * WIDTH)
    before = [target for target in targets(gm) if target is not aten.topk.default]
    said = rewritten(gm)
    assert [target for target in targets(gm) if target is not torch.ops.s2o.top_k.default] == before
    assert said == ["the largest 3 of 12 in one launch"]


def smallest(scores: Tensor) -> tuple[Tensor, Tensor]:
    return torch.topk(scores, 3, largest=False)


def of_columns(scores: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(x.T for x in torch.topk(scores.T.contiguous(), 3, dim=0))  # type: ignore[return-value]


def in_float64(scores: Tensor) -> tuple[Tensor, Tensor]:
    return torch.topk(scores.double(), 3)


def of_many(scores: Tensor) -> tuple[Tensor, Tensor]:
    p, ids = torch.topk(torch.cat([scores] * 100, dim=-1), 3)
    return p, ids % EXPERTS


@pytest.mark.parametrize("choose", [smallest, of_columns, in_float64, of_many])
def test_selections_that_stay(choose: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    def route(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        p, ids = choose(F.linear(x.flatten(0, 1), weight).float())
        return ids, p.float()

    gm = traced(route)
    before = str(gm.graph)
    assert not rewritten(gm) and str(gm.graph) == before


@pytest.mark.parametrize("how", [{"device": "cpu"}, {"width": 24}, {"dtype": torch.float32}, {"dtype": torch.float64}])
def test_where_there_is_nothing_to_gain(how: dict[str, Any]) -> None:
    gm = traced(plain, **how)
    rewritten(gm)
    assert MM_FLOAT32 not in targets(gm)
    assert (torch.ops.s2o.top_k.default in targets(gm)) == ("device" not in how)


@pytest.mark.parametrize(("graphs", "symbolic"), [(False, False), (True, False), (False, True)])
def test_few_tokens_outside_of_cuda_graphs(graphs: bool, symbolic: bool) -> None:
    gm = traced(grouped(1, 1), tokens=4, symbolic=symbolic)
    with torch._inductor.config.patch("triton.cudagraphs", graphs):
        said = rewritten(gm)
    assert said[-1] == "no choice of one among one" and len(said) == (3 if graphs or symbolic else 1)
    assert targets(gm).count(aten.topk.default) == (0 if graphs or symbolic else 1)


def test_what_is_inserted_is_ours_or_in_such_graphs() -> None:
    """Inductor neither decomposes nor always lowers what a pass inserts behind its decompositions."""
    gm = traced(grouped(1, 1))
    before = set(targets(gm))
    rewritten(gm)
    assert set(targets(gm)) - before == {MM_FLOAT32, torch.ops.s2o.top_k.default}


def test_what_is_no_router_stays() -> None:
    def run(x: Tensor, weight: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return torch.topk(scores_of(x, weight), 3)

    gm = make_fx(run, tracing_mode="fake")(*inputs())
    before = str(gm.graph)
    assert pipeline.lower_routers(gm.graph) == 0 and str(gm.graph) == before


def test_gradients_of_the_scores_stay_in_float32() -> None:
    """A joint graph: the forward product changes, those of the gradient do not."""

    def step(x: Tensor, weight: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        leaves = [one.detach().requires_grad_() for one in (x, weight, w1, w2)]
        out, ids, p = layer(plain)(*leaves)
        return out.detach(), ids, p.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)

    gm = make_fx(step, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs())
    gm.graph.eliminate_dead_code()
    data = inputs()
    expected = Here(gm).run(*data)
    on("cuda", gm)
    products = targets(gm).count(aten.mm.default)
    assert rewritten(gm) and targets(gm).count(aten.mm.default) == products - 1
    actual = Here(gm).run(*data)
    assert_same(actual[:3], expected[:3])
    for one, other in zip(actual[3:], expected[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))


@given(
    rows=st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, math.nan]), min_size=1, max_size=9),
    k=st.integers(1, 9), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
@settings(max_examples=40)
def test_the_operator_is_a_top_k(rows: list[float], k: int, dtype: torch.dtype) -> None:
    x = torch.tensor([rows, rows[::-1]], dtype=dtype)
    k = min(k, len(rows))
    values, ids = top_k(x, k)
    torch.testing.assert_close(values, torch.topk(x, k)[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values, x.gather(-1, ids), rtol=0, atol=0, equal_nan=True)
    for row, found in zip(x.tolist(), ids.tolist(), strict=True):
        # Of those that are equal, the first ones and in order.
        for value in {str(abs(one) if one == 0 else one) for one in row}:
            places = [i for i, one in enumerate(row) if str(abs(one) if one == 0 else one) == value]
            chosen = [i for i in found if i in places]
            assert chosen == places[: len(chosen)]


def half_precision(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return chosen(F.linear(x.flatten(0, 1).float(), weight.half().float()))


@pytest.mark.parametrize(("dtype", "found"), [(torch.float16, True), (torch.bfloat16, False)])
def test_both_operands_have_one_dtype(dtype: torch.dtype, found: bool) -> None:
    gm = traced(half_precision, dtype=dtype)
    rewritten(gm)
    assert (MM_FLOAT32 in targets(gm)) == found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_product_and_its_gradients_are_those_of_float32(dtype: torch.dtype) -> None:
    a, b = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((3, 7), (7, 5)))
    torch.library.opcheck(torch.ops.s2o.mm_float32.default, (a, b))
    grad = torch.randn(3, 5)
    cast, found = a.float() @ b.float(), mm_float32(a, b)
    assert torch.equal(found, cast)
    for one, other in zip(*(torch.autograd.grad(y, (a, b), grad) for y in (found, cast)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.bfloat16)])
def test_a_product_of_other_operands_is_refused(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    with pytest.raises(ValueError, match=r"mm_float32 takes \(T, K\) and \(K, N\)"):
        mm_float32(torch.zeros(2, 3, dtype=dtypes[0]), torch.zeros(3, 2, dtype=dtypes[1]))


def test_opcheck_and_gradients() -> None:
    x = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.s2o.top_k.default, (x, 3))
    assert torch.autograd.gradcheck(lambda one: top_k(one, 3)[0], x)


@pytest.mark.parametrize(("x", "k"), [(torch.zeros(()), 1), (torch.zeros(3), 4), (torch.zeros(3), 0),
                                      (torch.zeros(3, dtype=torch.int64), 1)])  # fmt: skip
def test_bad_input_is_refused(x: Tensor, k: int) -> None:
    with pytest.raises(ValueError, match="top_k takes k from 1 to n of floats"):
        top_k(x, k)


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_layer(training: bool, inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_selected", "is_multiplied"):
        monkeypatch.setattr(moe_router, name, lambda *_: True)  # as on a GPU
    torch.manual_seed(0)
    model, x = moe_idioms.CAPTURED["latent"]().bfloat16(), torch.randn(2, TOKENS, 24).bfloat16()
    said, results = [], []
    for disable in ([], ["router"]):
        torch._dynamo.reset()
        call = torch.compile(model, backend="s2o", options={"inner": inner, "experts": True, "disable": disable})
        with torch.set_grad_enabled(training):
            y = call(x)
        leaves = list(model.parameters()) if training else []
        results.append([y, *(torch.autograd.grad(y.float().square().sum(), leaves) if training else ())])
        report = s2o_inductor.last_report()
        said.append([site["router"] for site in report.to_dict()["sites"]])
        assert ("router: scores" in str(report)) == (not disable)
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
    assert said == [[[said[0][0][0], "the largest 2 of 6 in one launch"]], [[]]]
    assert said[0][0][0].startswith("scores from bfloat16")
