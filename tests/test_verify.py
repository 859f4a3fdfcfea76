"""Verified rewriting: a wrong rewrite, planted on purpose, never reaches the user."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture import capture
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses.fake_tensor import FakeTensorMode

import s2o_inductor
from s2o_inductor.errors import VerificationError
from s2o_inductor.mask_spec import MaskSpec
from s2o_inductor.passes import attention, masks, pipeline, verify, verify_mask
from s2o_inductor.passes.masks import LiftedMask
from s2o_inductor.passes.records import AttentionSite, MaskOperand, Operand

AOT = {"inner": "aot_eager"}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------- sites read wrongly


def grouped(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sinks: Tensor) -> Tensor:
    """Hand-written, with everything that a site record has a field for."""
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~visible, float("-inf"))
    column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    return (weights @ v).transpose(1, 2)


def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query head h reads key head h % 2: not grouped attention."""
    k, v = (x.repeat(1, 2, 1, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def called(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def hidden_by_infinity(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).masked_fill(~visible, float("-inf")).softmax(-1) @ v


def operands(kv_heads: int, *, masked: bool = True, sinks: bool = False) -> list[Tensor]:
    """q, k, v and, where wanted, a boolean mask without empty rows and attention sinks."""
    visible = torch.rand(2, 1, 12, 12) > 0.4
    visible[..., 0] = True
    args = [torch.randn(2, 4, 12, 8), torch.randn(2, kv_heads, 12, 8), torch.randn(2, kv_heads, 12, 8)]
    return [*args, *([visible] if masked else []), *([torch.randn(4)] if sinks else [])]


def replaced(**fields: Any) -> Callable[[AttentionSite], AttentionSite]:
    return lambda site: dataclasses.replace(site, **fields)


def without_negation(site: AttentionSite) -> AttentionSite:
    (mask,) = site.masks
    flipped = "visible" if mask.kind == "hidden" else "hidden"
    return dataclasses.replace(site, masks=(MaskOperand(mask.node, flipped, mask.steps),))


def in_groups(site: AttentionSite) -> AttentionSite:
    """Drops the steps that bring tiled heads into groups."""
    assert site.q.steps and site.out_steps
    return dataclasses.replace(site, q=Operand(site.q.node), out_steps=())


WRONG = {
    "scale": (grouped, lambda site: dataclasses.replace(site, scale=site.scale * 1.02)),
    "default scale": (grouped, replaced(scale=8**-0.5)),
    "causal": (grouped, replaced(causal=True)),
    "no mask": (grouped, replaced(masks=())),
    "mask polarity": (grouped, without_negation),
    "no sinks": (grouped, replaced(sinks=None)),
    "output layout": (grouped, replaced(out_steps=(("transpose", (1, 2)),))),
    "keys for values": (grouped, lambda site: dataclasses.replace(site, v=site.k)),
    "keys for queries": (called, lambda site: dataclasses.replace(site, q=site.k, k=site.q)),
    "mask polarity of a call": (called, without_negation),
    "rows without keys": (hidden_by_infinity, replaced(empty="zero")),
    "rows without keys, averaged": (called, replaced(empty="mean")),
    "grouping": (tiled, in_groups),
}


def test_a_site_of_a_gpu_is_checked_without_one() -> None:
    """The graph says CUDA, in its values and in a node; no machine with one is needed to tell right from wrong."""

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2], device=q.device)
        scores = (q @ k.mT).masked_fill(at > at[:, None], float("-inf"))
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    args = [x.bfloat16() for x in operands(4, masked=False)]
    module, _ = capture(padded, *args)
    (site,), _ = attention.find_attention(module.graph)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for node in module.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor):
                node.meta["example_value"] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device="cuda"
                )
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    outcome = verify.check_site(module.graph, site, always=True)
    assert outcome.passed and outcome.detail.startswith("verified, max error"), outcome
    wrong = dataclasses.replace(site, scale=site.scale * 1.1)
    assert not verify.check_site(module.graph, wrong, always=True).passed


def plant(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[AttentionSite], AttentionSite]) -> None:
    """Makes the finder misread every site in one way."""
    find = attention.find_attention

    def misread(graph: fx.Graph) -> Any:
        sites, declined = find(graph)
        return [wrong(site) for site in sites], declined

    monkeypatch.setattr(attention, "find_attention", misread)


@pytest.mark.parametrize("case", WRONG)
def test_a_site_read_wrongly_is_declined_and_the_result_stays_right(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, wrong = WRONG[case]
    heads = 4 if function in (called, hidden_by_infinity) else 2
    args = operands(heads, masked=function is not tiled, sinks=function is grouped)
    expected = function(*args)
    # First as it should be: what was proved of the right reading must not vouch for the wrong one.
    torch.testing.assert_close(torch.compile(function, backend="s2o", options=AOT)(*args), expected)
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert site["status"] == "rewritten" and site["verified"].startswith("verified, max error")
    plant(monkeypatch, wrong)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, backend="s2o", options=AOT)(*args), expected, rtol=0, atol=0)
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert site["status"] == "declined"
    if "rows without keys" in case:
        assert "not finite where the code is" in site["reason"] or "max error" in site["reason"]
    elif case == "output layout":
        assert "the op gives torch.float32(2, 12, 4, 8), the code torch.float32(2, 4, 12, 8)" in site["reason"]
    else:
        largest, limit = map(float, re.search(r"max error (\S+) \(allowed (\S+)\)", site["reason"]).groups())  # type: ignore[union-attr]
        assert largest > 100 * limit
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="VerificationError") as caught:
        torch.compile(function, backend="s2o", options={**AOT, "strict": True})(*args)
    assert isinstance(caught.value.inner_exception, VerificationError)
    assert site["reason"] in str(caught.value.inner_exception)


def test_a_declined_site_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, replaced(scale=3.0))
    seen: list[str] = []

    def look(gm: fx.GraphModule, _inputs: Any) -> Any:
        seen.append(str(gm.graph))
        pipeline.rewrite_dynamo_graph(gm, s2o_inductor.S2OConfig(), s2o_inductor.report.GraphReport())
        seen.append(str(gm.graph))
        return gm

    torch.compile(grouped, backend=look)(*operands(2, sinks=True))
    assert seen[0] == seen[1]


def test_a_wrong_op_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = verify.ops.attention

    def drifting(*args: Any, **kwargs: Any) -> Any:
        output, lse = run(*args, **kwargs)
        return output * 1.0001, lse

    monkeypatch.setattr(verify.ops, "attention", drifting)
    args = operands(4)
    options = {**AOT, "verify": "always"}
    torch.testing.assert_close(torch.compile(called, backend="s2o", options=options)(*args), called(*args))
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert site["status"] == "declined" and "max error" in site["reason"]


def test_an_exact_rewrite_passes_in_every_precision() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for length, width in ((1, 8), (12, 8), (70, 64), (700, 16)):
            torch._dynamo.reset()
            q, k, v = torch.randn(3, 1, 2, length, width).to(dtype)
            options = {"inner": "eager", "strict": True}
            torch.compile(F.scaled_dot_product_attention, backend="s2o", options=options)(q, k, v)
            (site,) = s2o_inductor.last_report().to_dict()["sites"]
            assert site["verified"].startswith("verified, max error"), (dtype, length)


# ---------------------------------------------------------------- when checks run


def count_checks(monkeypatch: pytest.MonkeyPatch, option: str) -> list[int]:
    """How many regions are run for two layers of one kind, and again in a second compilation."""
    checks = 0
    run = verify._run_check

    def counted(*args: Any) -> Any:
        nonlocal checks
        checks += 1
        return run(*args)

    monkeypatch.setattr(verify, "_run_check", counted)
    monkeypatch.setattr(verify, "_sites", {})

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(k, q, v)

    found = []
    for _ in range(2):
        torch._dynamo.reset()
        q, k, v = torch.randn(3, 2, 4, 12, 8)
        torch.compile(layers, backend="s2o", options={"inner": "eager", "verify": option})(q, k, v)
        found.append(checks)
    return found


@pytest.mark.parametrize(("option", "expected"), [("first", [1, 1]), ("always", [2, 4]), ("off", [0, 0])])
def test_verify_first_always_off(option: str, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_checks(monkeypatch, option) == expected


def test_another_structure_is_checked_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_sites", {})
    q, k, v = torch.randn(3, 2, 4, 12, 8)
    settings: tuple[dict[str, Any], ...] = ({}, {"scale": 0.1}, {"scale": 0.2}, {"is_causal": True})
    for setting in settings:
        torch._dynamo.reset()
        torch.compile(
            lambda q, k, v, setting=setting: F.scaled_dot_product_attention(q, k, v, **setting),
            backend="s2o", options={"inner": "eager"},
        )(q, k, v)  # fmt: skip
    assert len(verify._sites) == len(settings)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(lambda *qkv: F.scaled_dot_product_attention(*qkv), backend="s2o", options={"inner": "eager"})(
            q, k, v
        )
    assert len(verify._sites) == len(settings) + 1


@pytest.mark.parametrize("option", ["first", "always", "off"])
def test_the_random_state_of_the_user_is_not_advanced(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_sites", {})

    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        weights = (q @ k.mT).masked_fill(~padding[:, None, None, :], float("-inf")).softmax(-1)
        return F.dropout(weights, 0.0) @ v

    q, k, v = torch.randn(3, 2, 4, 12, 8)
    state = torch.get_rng_state()
    torch.compile(attend, backend="s2o", options={**AOT, "verify": option})(q, k, v, torch.rand(2, 12) > 0.2)
    torch.set_rng_state(state)
    torch.rand(2, 12)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch._dynamo.reset()
    torch.compile(attend, backend="s2o", options={**AOT, "verify": option})(q, k, v, torch.rand(2, 12) > 0.2)
    assert torch.equal(torch.get_rng_state(), after)


# ---------------------------------------------------------------- masks read wrongly


def documents(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, document: Tensor) -> Tensor:
    """A causal window over packed documents with padded keys."""
    at = torch.arange(q.shape[2])
    visible = (at[None] <= at[:, None]) & (at[None] > at[:, None] - 9)
    visible = visible[None, None] & padding[:, None, None, :] & (document[:, :, None] == document[:, None])[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def document_operands(length: int) -> list[Tensor]:
    padding = torch.ones(1, length, dtype=torch.bool)
    padding[:, -3:] = False
    document = (torch.arange(length) // 7)[None]
    return [*torch.randn(3, 1, 2, length, 8), padding, document]


def specs(spec: MaskSpec) -> dict[str, MaskSpec]:
    """A right spec, misread in one way each."""
    assert spec.lower and spec.upper == "0" and spec.keys and spec.equal
    return {
        "later keys": dataclasses.replace(spec, upper="1"),
        "narrower window": dataclasses.replace(spec, lower=f"{spec.lower} + 1"),
        "wider window": dataclasses.replace(spec, lower=f"{spec.lower} - 1"),
        "no window": dataclasses.replace(spec, lower=None),
        "no padding": dataclasses.replace(spec, keys=None),
        "padding polarity": dataclasses.replace(spec, keys=f"~({spec.keys})"),
        "no documents": dataclasses.replace(spec, equal=None),
        "other documents": dataclasses.replace(spec, equal=None, at_most=spec.equal),
        "hidden rows": dataclasses.replace(spec, rows="q != 0"),
    }


CASES = ("later keys", "narrower window", "wider window", "no window", "no padding", "padding polarity", "no documents",
         "other documents", "hidden rows")  # fmt: skip


def plant_mask(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[LiftedMask], LiftedMask]) -> None:
    lift = masks.MaskLifter.lift

    def misread(self: Any, *args: Any) -> Any:
        lifted = lift(self, *args)
        assert not isinstance(lifted, str), lifted
        return wrong(lifted)

    monkeypatch.setattr(masks.MaskLifter, "lift", misread)


@pytest.mark.parametrize("length", [40, 1100], ids=["whole", "sampled rows"])
@pytest.mark.parametrize("case", CASES)
def test_a_mask_read_wrongly_stays_a_tensor(case: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (length**2 > verify_mask.MAX_MASK) == (length == 1100)
    args = document_operands(length)
    plant_mask(monkeypatch, lambda lifted: dataclasses.replace(lifted, spec=specs(lifted.spec)[case]))
    torch.testing.assert_close(torch.compile(documents, backend="s2o", options=AOT)(*args), documents(*args))
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert (site["status"], site["mask"]) == ("rewritten", ["dense"])
    assert re.search(r"the predicate .* is not the mask at \(b, h, row, k\) = \[0, 0, \d+, \d+\]", site["reason"])
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="VerificationError: the predicate"):
        torch.compile(documents, backend="s2o", options={**AOT, "strict": True})(*args)


@pytest.mark.parametrize(("length", "says"), [(40, "verified"), (1100, r"verified on \d\d rows")])
def test_a_mask_read_rightly_is_proved(length: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[verify.Outcome] = []
    check = verify_mask.check_mask

    def recorded(*args: Any) -> verify.Outcome:
        outcomes.append(check(*args))
        return outcomes[-1]

    monkeypatch.setattr(verify_mask, "check_mask", recorded)
    args = document_operands(length)
    torch.testing.assert_close(torch.compile(documents, backend="s2o", options=AOT)(*args), documents(*args))
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert len(site["mask"]) == 4 and "dense" not in site["mask"]
    (outcome,) = outcomes
    assert outcome.passed and re.fullmatch(says, outcome.detail)


@pytest.mark.parametrize("length", [40, 1100])
def test_a_mask_read_rightly_for_one_length_alone_stays_a_tensor(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, at[:, None] - at <= q.shape[2] // 2)

    def misread(lifted: LiftedMask) -> LiftedMask:
        assert lifted.spec.lower == "-(p0 // 2)"
        return dataclasses.replace(lifted, spec=dataclasses.replace(lifted.spec, lower="-p0 // 2"))

    plant_mask(monkeypatch, misread)
    compiled = torch.compile(half, backend="s2o", options=AOT)
    for size in (length, length + 1):
        args = list(torch.randn(3, 1, 2, size, 8))
        for one in args:
            torch._dynamo.mark_dynamic(one, 2)
        torch.testing.assert_close(compiled(*args), half(*args))
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert site["mask"] == ["dense"] and site["reason"].endswith("at sizes other than those captured")


def test_a_bias_taken_for_a_mask_stays_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        distance = (at[:, None] - at[None]).float()
        return F.scaled_dot_product_attention(q, k, v, (-0.5 * distance).masked_fill(distance < 0, float("-inf")))

    causal = LiftedMask(MaskSpec(upper="0"), (), ())
    monkeypatch.setattr(masks.MaskLifter, "lift", lambda *args: causal)
    q, k, v = torch.randn(3, 1, 2, 12, 8)
    torch.testing.assert_close(torch.compile(biased, backend="s2o", options=AOT)(q, k, v), biased(q, k, v))
    (site,) = s2o_inductor.last_report().to_dict()["sites"]
    assert site["mask"] == ["dense"] and "adds" in site["reason"]


def test_with_verification_off_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault must reach the result, or the tests above would prove nothing."""
    args = document_operands(40)
    plant_mask(monkeypatch, lambda lifted: dataclasses.replace(lifted, spec=specs(lifted.spec)["no documents"]))
    out = torch.compile(documents, backend="s2o", options={**AOT, "verify": "off"})(*args)
    assert (out - documents(*args)).abs().max() > 0.1
