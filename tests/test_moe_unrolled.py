"""Unrolled loops over experts: near misses, each with its reason, and what may stand around a loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture import capture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import s2o_inductor
from s2o_inductor.config import S2OConfig
from s2o_inductor.passes import moe, moe_verify, pipeline
from s2o_inductor.report import GraphReport

EXPERTS = 4
Lists = list[Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


def operands(
    tokens: int = 7, experts: int = EXPERTS, width: int = 6, inner: int = 5, grad: bool = True
) -> tuple[Any, ...]:
    """Tokens, logits, and per expert a first and a second matrix."""
    w1 = [torch.randn(inner, width, requires_grad=grad) for _ in range(experts)]
    w2 = [torch.randn(width, inner, requires_grad=grad) for _ in range(experts)]
    return torch.randn(tokens, width), torch.randn(tokens, experts), w1, w2


def rewritten(layer: Callable[..., Any], *args: Any, **how: Any) -> list[tuple[str, str]]:
    """Stage 1; (status, reason) of every site. Values stay, and a graph without a rewritten site is what it was."""
    gm, inputs = capture(layer, *args, **how)
    torch.manual_seed(1)
    before, report, expected = str(gm.graph), GraphReport(), gm(*[_copied(x) for x in inputs])
    pipeline.rewrite_dynamo_graph(gm, S2OConfig(experts=True), report)
    found = [(site.status, site.reason or "") for site in report.sites if site.kind == "moe"]
    assert (str(gm.graph) == before) == all(status == "declined" for status, _ in found)
    torch.manual_seed(1)
    for one, other in zip(gm(*inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    return found


def _copied(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def route(logits: Tensor, choices: int = 2) -> tuple[Tensor, Tensor]:
    p, ids = logits.softmax(dim=-1).topk(choices, dim=-1)
    return p, ids


def expert(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return F.linear(F.linear(x, w1).relu(), w2)


def loop(x: Tensor, logits: Tensor, w1: Lists, w2: Lists) -> Tensor:
    """Looked up and added in place."""
    p, ids = route(logits)
    out = torch.zeros_like(x)
    for number in range(len(w1)):
        token, slot = torch.where(ids == number)
        out.index_add_(0, token, expert(x[token], w1[number], w2[number]) * p[token, slot, None])
    return out


def columns(x: Tensor, logits: Tensor, w1: Lists, w2: Lists) -> Tensor:
    """All on all tokens, weighted by columns."""
    p, ids = route(logits)
    gates = torch.zeros_like(logits).scatter(1, ids, p)
    return sum(gates[:, number, None] * expert(x, w1[number], w2[number]) for number in range(len(w1)))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------ what may be


def test_the_last_experts_may_be_left_out_where_tokens_are_looked_up() -> None:
    x, logits, w1, w2 = operands()
    assert rewritten(loop, x, logits, w1[:-1], w2[:-1]) == [("rewritten", "")]
    ((status, reason),) = rewritten(columns, x, logits, w1[:-1], w2[:-1])
    assert status == "declined" and "runs over 3 experts, and 4 have routing weights" in reason


def test_experts_may_share_a_matrix_and_come_in_any_order() -> None:
    def layer(x: Tensor, logits: Tensor, w1: Lists, w2: Lists) -> Tensor:
        p, ids = route(logits)
        out = torch.zeros_like(x)
        for number in (2, 0, 3, 1):
            token, slot = torch.where(ids == number)
            out.index_add_(0, token, expert(x[token], w1[number], w2[number % 2]) * p[token, slot, None])
        return out

    x, logits, w1, w2 = operands()
    options = {"inner": "aot_eager", "experts": True}
    compiled = torch.compile(layer, backend="s2o", options=options, fullgraph=True)
    leaves = [*w1, *w2[:2]]
    actual, expected = (torch.autograd.grad(f(x, logits, w1, w2).square().sum(), leaves) for f in (compiled, layer))
    assert [site["status"] for site in s2o_inductor.last_report().to_dict()["sites"]] == ["rewritten"]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_choices_that_repeat_an_expert_are_added_as_often_as_the_loop_adds_them() -> None:
    def layer(added: Callable[..., None]) -> Callable[..., Tensor]:
        def repeating(x: Tensor, logits: Tensor, w1: Lists, w2: Lists) -> Tensor:
            ids, out = (logits[:, :2] * 10).long().remainder(EXPERTS), torch.zeros_like(x)
            for number in range(EXPERTS):
                token, slot = torch.where(ids == number)
                added(out, token, expert(x[token], w1[number], w2[number]) * logits[token, slot, None])
            return out

        # The weights are logits (T, E): of two columns, as the choices are.
        return lambda x, logits, w1, w2: repeating(x, logits[:, :2], w1, w2)

    def once(out: Tensor, token: Tensor, y: Tensor) -> None:
        out[token] += y

    def often(out: Tensor, token: Tensor, y: Tensor) -> None:
        out.index_add_(0, token, y)

    assert rewritten(layer(often), *operands()) == [("rewritten", "")]
    ((status, reason),) = rewritten(layer(once), *operands())
    assert status == "declined" and "adds once where a token chose an expert twice" in reason


@pytest.mark.parametrize(
    "changed", [lambda ids, logits: ids.masked_fill(logits[:, :1] > 0, 0), lambda ids, _: ids.view(4, 4)]
)
def test_a_top_k_that_is_changed_may_repeat_an_expert(changed: Callable[..., Tensor]) -> None:
    def layer(x: Tensor, logits: Tensor, w1: Lists, w2: Lists) -> Tensor:
        p, ids = route(logits)
        ids, out = changed(ids, logits), torch.zeros_like(x)
        for number in range(EXPERTS):
            token, slot = torch.where(ids == number)
            out[token] += expert(x[token], w1[number], w2[number]) * p.view(ids.shape)[token, slot, None]
        return out

    x, logits, w1, w2 = operands(tokens=8)
    rows = changed(route(logits)[1], logits).shape[0]
    ((status, _),) = rewritten(layer, x[:rows], logits, w1, w2)
    assert status == "declined"


def test_weights_that_change_before_the_backward_pass_are_not_those_that_it_would_read() -> None:
    def layer(x: Tensor, logits: Tensor, w1: Lists, w2: Lists) -> Tensor:
        rows = x + 1
        out = loop(rows, logits, w1, w2)
        rows.zero_()
        return out

    ((status, reason),) = rewritten(layer, *operands())
    assert status == "declined" and "changed in place before the backward pass" in reason
    assert rewritten(layer, *operands(grad=False)) == [("rewritten", "")]


def test_a_sum_of_other_strides_than_the_operators_is_none_of_its() -> None:
    def layer(x: Tensor, logits: Tensor, w1: Lists, w2: Lists) -> Tensor:
        out = loop(x.t().contiguous().t(), logits, w1, w2)
        out.reshape(-1).mul_(2.0)  # a copy: `out` is like the tokens, whose columns are apart
        return out

    ((status, reason),) = rewritten(layer, *operands())
    assert status == "declined" and "does not lie contiguously" in reason


def test_what_surrounds_a_loop_stays() -> None:
    def surrounded(x: Tensor, logits: Tensor, w1: Lists, w2: Lists) -> Any:
        hidden = x.tanh()
        out = loop(hidden, logits, w1, w2)
        seen = out.view(-1)
        out.mul_(2.5)  # changes what `seen` shows
        gate = logits.sum(dim=-1, keepdim=True).sigmoid()
        return out + gate * expert(x, w1[0], w2[1]) + hidden, seen

    assert rewritten(surrounded, *operands()) == [("rewritten", "")]


def test_two_layers_of_loops_are_two_sites() -> None:
    def layers(x: Tensor, logits: Tensor, w1: Lists, w2: Lists) -> Tensor:
        y = x + loop(x, logits, w1, w2)
        return y + columns(y, logits, w1, w2)

    assert rewritten(layers, *operands()) == [("rewritten", "")] * 2


@settings(max_examples=6, deadline=None)
@given(
    experts=st.integers(2, 5), choices=st.integers(1, 2), tokens=st.sampled_from([1, 3, 8]), data=st.data(),
)  # fmt: skip
def test_any_loop_of_like_experts_is_rewritten(experts: int, choices: int, tokens: int, data: st.DataObject) -> None:
    draw = data.draw
    act = draw(st.sampled_from([F.silu, F.gelu, torch.relu, lambda h: h.relu().square()]))
    looked_up, added = draw(st.booleans()), draw(st.sampled_from(["index_add_", "index_add", "assigned"]))
    placed, halved = draw(st.sampled_from(["input", "hidden", "output"])), draw(st.booleans())
    order = draw(st.permutations(range(experts)))

    def run(rows: Tensor, weight: Tensor, first: Tensor, last: Tensor) -> Tensor:
        h = F.linear(rows * weight if placed == "input" else rows, first)
        h = act(h[:, :4]) * h[:, 4:] if halved else act(h)
        y = F.linear(h * weight if placed == "hidden" else h, last[:, : h.shape[1]])
        return weight * y if placed == "output" else y

    def layer(x: Tensor, logits: Tensor, w1: Lists, w2: Lists) -> Tensor:
        p, ids = route(logits, choices)
        out, gates = torch.zeros_like(x), torch.zeros_like(logits).scatter(1, ids, p)
        for number in order:
            if not looked_up:
                out = out + run(x, gates[:, number : number + 1], w1[number], w2[number])
                continue
            token, slot = torch.where(ids == number)
            y = run(x[token], p[token, slot].unsqueeze(-1), w1[number], w2[number])
            if added == "assigned":
                out[token] += y
            else:
                out = getattr(out, added)(0, token, y)
        return out

    assert rewritten(layer, *operands(tokens, experts, inner=8)) == [("rewritten", "")]


# ----------------------------------------------------------------------------- what may not, and why


def varied(**knobs: Any) -> Callable[..., Any]:
    """`loop` with something in it that is not as it should be."""

    def layer(x: Tensor, logits: Tensor, w1: Lists, w2: Lists) -> Any:
        p, ids = route(logits)
        p = knobs.get("weights", lambda p: p)(p)
        out = knobs.get("into", torch.zeros_like)(x)
        seen = knobs["seen"](out) if "seen" in knobs else x.sum()
        for number in knobs.get("numbers", range(EXPERTS)):
            token, slot = torch.where(knobs.get("lookup", lambda ids, p, e: ids == e)(ids, p, number))
            rows = knobs.get("rows", lambda x, token, e: x[token])(x, token, number)
            y = knobs.get("expert", lambda e: expert)(number)(rows, w1[number], w2[number])
            y = knobs.get("weighted", lambda y, weight: y * weight)(y, p[token, slot, None])
            out.index_add_(0, knobs.get("at", lambda token: token)(token), y)
            knobs.get("between", lambda w2, e: None)(w2, number)
        return out, seen

    return layer


def other_activation(number: int) -> Any:
    return expert if number < 3 else lambda x, w1, w2: F.linear(F.linear(x, w1).sigmoid(), w2)


def without_gradient(number: int) -> Any:
    def frozen(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        with torch.no_grad():
            return expert(x, w1, w2)

    return expert if number != 1 else frozen


def dropping(number: int) -> Any:
    return lambda x, w1, w2: F.linear(F.dropout(F.linear(x, w1).relu(), 0.3, True), w2)


def changes_the_first(w2: Lists, number: int) -> None:
    if number == 2:
        w2[0].mul_(0.5)


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "another activation": ({"expert": other_activation}, "'relu' in one, 'sigmoid' in another"),
    "an expert left out": ({"numbers": (0, 1, 3)}, "over experts 0, 1, 3, not over each"),
    "an expert twice": ({"numbers": (0, 1, 2, 3, 1)}, "over experts 0, 1, 2, 3, 1, not over each"),
    "weighted twice": ({"weighted": lambda y, weight: y * weight * weight}, "applied twice"),
    "squared weights": ({"weighted": lambda y, weight: y * (weight * weight)}, "'mul' takes part in the routing"),
    "no weights": ({"weighted": lambda y, weight: y}, "without routing weights"),
    "detached weights": ({"weighted": lambda y, weight: y * weight.detach()}, "'detach' takes part in the routing"),
    "a threshold": ({"lookup": lambda ids, p, e: (ids == e) & (p > 0.2)}, "takes part in the routing"),
    "no choice": ({"lookup": lambda ids, p, e: p > 0.1 * e}, "'gt' with 0.0 and with 0.1"),
    "other rows": ({"rows": lambda x, token, e: x[token] + e}, "not from a gather of tokens"),
    "added elsewhere": ({"at": lambda token: (token + 1) % 7}, "takes part in the routing"),
    "dropout": ({"expert": dropping}, "dropout"),
    "a frozen expert": ({"expert": without_gradient}, "gradient mode"),
    "into a copy": ({"into": torch.clone}, "in place into a tensor that is used elsewhere"),
    "an old view": ({"seen": lambda out: out.view(-1)}, "'out', computed within the experts, is used elsewhere"),
    "changed weights": ({"between": changes_the_first}, "changed in place while the experts run"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_loop_that_is_no_routed_sum_is_declined(name: str) -> None:
    knobs, reason = NEAR_MISSES[name]
    found = rewritten(varied(**knobs), *operands(grad=False))
    assert found and all(status == "declined" for status, _ in found)
    assert any(reason in given for _, given in found), found


def test_the_plain_variant_of_the_near_misses_is_a_site() -> None:
    assert rewritten(varied(), *operands()) == [("rewritten", "")]


def test_experts_of_different_widths_are_declined() -> None:
    x, logits, w1, w2 = operands()
    ((status, reason),) = rewritten(loop, x, logits, [torch.randn(8, 6), *w1[1:]], [torch.randn(6, 8), *w2[1:]])
    assert status == "declined" and "differ in shape or dtype" in reason


def test_a_sum_that_is_also_read_on_its_way_is_none() -> None:
    def layer(x: Tensor, logits: Tensor, w1: Lists, w2: Lists) -> Any:
        p, ids = route(logits)
        out, steps = torch.zeros_like(x), []
        for number in range(EXPERTS):
            token, slot = torch.where(ids == number)
            out = out.index_add(0, token, expert(x[token], w1[number], w2[number]) * p[token, slot, None])
            steps.append(out)
        return steps

    assert {status for status, _ in rewritten(layer, *operands())} == {"declined"}


def test_sums_and_stacks_of_layers_are_no_candidates() -> None:
    def parallel(x: Tensor, logits: Tensor, w1: Lists, w2: Lists) -> Any:
        blocks = x + expert(x, w1[0], w2[0]) + expert(x, w1[1], w2[1])
        return blocks, torch.stack([F.linear(x, w1[2]), F.linear(x, w1[3])])

    assert not rewritten(parallel, *operands())


# --------------------------------------------------------------------------------------- verification


@pytest.mark.parametrize("layer", [loop, columns])
def test_large_loops_are_verified_at_shortened_sizes(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_verify, "SHORTEN_ABOVE", 1000)
    monkeypatch.setattr(moe_verify, "MAX_ELEMENTS", 1000)
    gm, _ = capture(layer, *operands(tokens=50, experts=9, width=96, inner=72))
    (site,), declined = moe.find_experts(gm.graph)
    assert not declined
    outcome = moe_verify.check_experts(gm.graph, site, always=True)
    assert outcome.passed and outcome.detail.endswith("at shortened sizes")
    misread = dataclasses.replace(site, spec=dataclasses.replace(site.spec, activation="silu"))
    assert not moe_verify.check_experts(gm.graph, misread, always=True).passed
    swapped = dataclasses.replace(site, w1=(site.w1[1], site.w1[0], *site.w1[2:]))
    assert not moe_verify.check_experts(gm.graph, swapped, always=True).passed
