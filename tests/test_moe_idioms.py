"""Mixtures of experts as people write them: which a graph gives up to the operator, and why the others stay."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import moe_idioms
import pytest
import torch
import torch.nn.functional as F
from capture import capture
from torch import Tensor, nn

import s2o_inductor
from s2o_inductor.config import S2OConfig
from s2o_inductor.passes import pipeline
from s2o_inductor.report import GraphReport
from s2o_inductor.testing import assert_close_to_gold


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


def results(model: nn.Module, x: Tensor, call: Any = None) -> dict[str, Tensor]:
    """The output and, in training, every gradient."""
    x = x.clone().requires_grad_(model.training)
    with torch.set_grad_enabled(model.training):
        y = (model if call is None else call)(x)
    if not model.training:
        return {"output": y}
    names, leaves = zip(("x", x), *model.named_parameters(), strict=True)
    grads = torch.autograd.grad(y.square().sum(), leaves)
    return {"output": y.detach(), **dict(zip(names, grads, strict=True))}


WHOLE = {**moe_idioms.CAPTURED, **moe_idioms.UNROLLED}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_an_idiom_becomes_the_operator_and_is_as_exact_as_it_was(name: str, training: bool) -> None:
    model, x = WHOLE[name]().train(training), torch.randn(3, 5, 24)
    gold_model = copy.deepcopy(model).double()
    expected, gold = results(model, x), results(gold_model, x.double())
    compiled = torch.compile(model, backend="s2o", options={"inner": "aot_eager", "experts": True}, fullgraph=True)
    actual = results(model, x, compiled)
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert (site["status"], site["route"]) == ("rewritten", "cpu-grouped"), site["reason"]
    assert site["verified"].startswith("verified")
    for key, value in actual.items():
        # The router's bfloat16 gradients are sums of rounded terms.
        assert_close_to_gold(value, expected[key], gold[key], what=key, condition=8.0)


REASONS = {
    "slots": "bounded number of slots",
    "soft mixture": "there is nothing to leave out",
}


def rewritten(function: Any, *args: Tensor) -> list[tuple[str, str]]:
    """Stage 1; (status, reason) of every site. A graph without a rewritten site must be what it was."""
    gm, inputs = capture(function, *args)
    before, report, expected = str(gm.graph), GraphReport(), gm(*inputs)
    pipeline.rewrite_dynamo_graph(gm, S2OConfig(experts=True), report)
    found = [(site.status, site.reason or "") for site in report.sites]
    assert (str(gm.graph) == before) == all(status == "declined" for status, _ in found)
    for one, other in zip(gm(*inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize("name", moe_idioms.DECLINED)
def test_what_no_operator_computes_is_declined_with_the_reason(name: str) -> None:
    ((status, reason),) = rewritten(moe_idioms.DECLINED[name](), torch.randn(2, 6, 24))
    assert status == "declined" and REASONS[name] in reason


# ---------------------------------------------------------- near misses of routing weights for all experts


def dense(scores: Any) -> Any:
    """Experts that all run, with routing weights (T, E) made by `scores` of the router's logits."""

    def layer(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        h = torch.bmm(x.unsqueeze(0).expand(w1.shape[0], -1, -1), w1).relu()
        return (torch.bmm(h, w2) * scores(logits).t().unsqueeze(-1)).sum(0)

    return layer


def sparse(logits: Tensor) -> Tensor:
    top, ids = logits.topk(2, dim=-1)
    return torch.full_like(logits, float("-inf")).scatter(-1, ids, top).softmax(dim=-1)


def half_elsewhere(logits: Tensor) -> Tensor:
    top, ids = logits.topk(2, dim=-1)
    return torch.zeros_like(logits).scatter(1, ids, top).sigmoid()


def into_ones(logits: Tensor) -> Tensor:
    top, ids = logits.topk(2, dim=-1)
    return torch.ones_like(logits).scatter(1, ids, top)


def repeating(logits: Tensor) -> Tensor:
    ids = (logits[:, :2] * 10).long().remainder(logits.shape[1])
    return torch.zeros_like(logits).scatter(1, ids, logits[:, :2])


def by_token(logits: Tensor) -> Tensor:
    top, ids = logits.topk(2, dim=0)
    return torch.zeros_like(logits).scatter(0, ids, top)


def padded(logits: Tensor) -> Tensor:
    top, ids = logits.topk(2, dim=-1)
    return torch.zeros_like(logits).scatter(1, ids.masked_fill(logits[:, :1] > 0, 0), top)


def beside_a_finite_fill(logits: Tensor) -> Tensor:
    top, ids = logits.topk(2, dim=-1)
    return torch.full_like(logits, -1000.0).scatter(-1, ids, top).softmax(dim=-1)


def everywhere(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


DENSE = {
    half_elsewhere: "not zero",
    into_ones: "something other than a constant",
    repeating: "other than the choices of a top-k",
    by_token: "other than the choices of a top-k",
    padded: "other than the choices of a top-k",
    beside_a_finite_fill: "not zero",
    everywhere: "there is nothing to leave out",
}


def operands(experts: int = 5) -> tuple[Tensor, ...]:
    return torch.randn(7, 6), torch.randn(7, experts), torch.randn(experts, 6, 4), torch.randn(experts, 4, 6)


def test_weights_that_are_zero_outside_the_choices_make_a_site() -> None:
    assert rewritten(dense(sparse), *operands()) == [("rewritten", "")]


def test_a_dense_layer_that_reads_another_ones_output_follows_it() -> None:
    def layers(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        one = dense(sparse)
        return one(one(x, logits, w1, w2), logits, w1, w2)

    assert rewritten(layers, *operands()) == [("rewritten", "")] * 2


def test_places_in_a_column_are_no_choices_of_a_token() -> None:
    def layer(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        top, ids = logits.topk(4, dim=0)
        return dense(lambda scores: torch.zeros_like(scores).scatter(1, ids.clamp(max=4), top))(x, logits[:4], w1, w2)

    x, logits, w1, w2 = operands()
    ((status, reason),) = rewritten(layer, x[:4], logits, w1, w2)
    assert status == "declined" and "other than the choices of a top-k" in reason


@pytest.mark.parametrize("scores", DENSE, ids=lambda scores: scores.__name__)
def test_weights_that_are_not_zero_outside_the_choices_decline_it(scores: Any) -> None:
    ((status, reason),) = rewritten(dense(scores), *operands())
    assert status == "declined" and DENSE[scores] in reason


def test_products_of_attention_and_of_ensembles_are_no_candidates() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(q, k).softmax(-1), v)

    def ensemble(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x, w1).relu(), w2)

    assert not rewritten(ensemble, *(torch.randn(3, 4, 4) for _ in range(3)))
    gm, _ = capture(attention, *(torch.randn(3, 4, 4) for _ in range(3)))
    report = GraphReport()
    pipeline.rewrite_dynamo_graph(gm, S2OConfig(experts=True), report)
    assert not [site for site in report.sites if site.kind == "moe"]


def scattered(into: Any) -> Any:
    def layer(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Any:
        p, ids = logits.softmax(-1).topk(2, dim=-1)
        chosen, token = ids.reshape(-1), torch.arange(x.shape[0]).repeat_interleave(2)
        h = torch.bmm(x[token].unsqueeze(1), w1[chosen]).relu()
        return into(x, token, torch.bmm(h, w2[chosen]).squeeze(1) * p.reshape(-1, 1))

    return layer


def test_choices_that_index_from_the_end_are_those_experts() -> None:
    def layer(x: Tensor, ids: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        p, chosen, token = x[:, :2].exp(), ids.reshape(-1), torch.arange(x.shape[0]).repeat_interleave(2)
        y = torch.bmm(torch.bmm(x[token].unsqueeze(1), w1[chosen]).relu(), w2[chosen]).squeeze(1)
        return torch.zeros_like(x).index_add(0, token, y * p.reshape(-1, 1))

    x, _, w1, w2 = operands()
    assert rewritten(layer, x, torch.randint(-5, 5, (7, 2)), w1, w2) == [("rewritten", "")]


def test_a_sum_into_another_tensor_is_added_to_it_unless_it_is_changed_in_place() -> None:
    assert rewritten(scattered(lambda x, at, y: F.gelu(x).index_add(0, at, y)), *operands()) == [("rewritten", "")]

    def in_place(x: Tensor, at: Tensor, y: Tensor) -> Any:
        total = F.gelu(x)
        seen = total.view(-1)
        total.index_add_(0, at, y)
        return total, seen

    ((status, reason),) = rewritten(scattered(in_place), *operands())
    assert status == "declined" and "used elsewhere" in reason
