"""Routed experts: values and gradients against float64, whatever the formula, the routing and the memory layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2o_inductor.kernels import moe_cpu, moe_routing, reference_moe
from s2o_inductor.moe_ops import moe_experts
from s2o_inductor.moe_spec import ExpertSpec, parse
from s2o_inductor.testing import assert_close_to_gold

ROUTINGS = ("random", "one_expert", "same_choices", "sorted", "few", "outside")


@dataclasses.dataclass
class Problem:
    """Operands of one call, w3 and biases possibly None."""

    spec: ExpertSpec
    z: Tensor
    w1: Tensor
    w2: Tensor
    w3: Tensor | None
    b1: Tensor | None
    b2: Tensor | None
    p: Tensor
    ids: Tensor

    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in ("z", "w1", "w2", "w3", "b1", "b2", "p")}
        return {name: x for name, x in found.items() if x is not None}

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in another dtype, each tensor a leaf that wants a gradient."""
        changed = {name: x.detach().to(dtype).requires_grad_() for name, x in self.tensors().items()}
        return dataclasses.replace(self, **changed)

    def run(self, function: Any, *, draw: int = 1, **more: Any) -> dict[str, Tensor]:
        """The output and the gradient of every operand, for the gradient of the output that `draw` seeds."""
        optional = {"w3": self.w3, "b1": self.b1, "b2": self.b2}
        output = function(self.z, self.w1, self.w2, self.ids, self.p, spec=self.spec, **optional, **more)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(draw)).to(output)
        names, leaves = zip(*self.tensors().items(), strict=True)
        return {"output": output.detach(), **dict(zip(names, torch.autograd.grad(output, leaves, grad), strict=True))}


def problem(
    spec: ExpertSpec, tokens: int = 9, choices: int = 3, experts: int = 5, width: int = 6, inner: int = 4, *,
    routing: str = "random", bias: bool = False, seed: int = 0, strided: bool = False,
) -> Problem:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        if not strided:
            return torch.randn(shape, generator=generator)
        return torch.randn(*shape[:-1], shape[-1] * 2 + 1, generator=generator)[..., 1::2]

    columns = inner if spec.gate == "separate" else spec.halves * inner
    shapes = [(experts, columns, width), (experts, width, inner), (experts, inner, width)]
    w1, w2, w3 = (normal(*((s[0], s[2], s[1]) if spec.transposed else s)) for s in shapes)
    ids = torch.stack(
        [torch.randperm(experts, generator=generator)[:choices] for _ in range(tokens)] or [torch.empty(0)]
    )
    ids = ids.reshape(tokens, choices).long()
    if routing == "one_expert":
        ids = torch.full_like(ids, experts - 1)
    elif routing == "same_choices":
        ids = ids[:1].expand(tokens, choices)
    elif routing == "sorted":
        ids = ids.sort().values.int()
    elif routing == "few":
        ids = ids % 2
    elif routing == "outside":
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, torch.tensor([experts, -1])[ids % 2])
    return Problem(
        spec, normal(tokens, width), w1, w2, w3 if spec.gate == "separate" else None,
        normal(experts, spec.halves * inner) if bias else None, normal(experts, width) if bias else None,
        torch.rand(tokens, choices, generator=generator), ids,
    )  # fmt: skip


@st.composite
def specs(draw: st.DrawFn) -> ExpertSpec:
    gate = draw(st.sampled_from(("none", "half", "half_swapped", "interleaved", "separate")))
    return ExpertSpec(
        activation=draw(st.sampled_from(("identity", "relu", "relu2", "silu", "gelu", "gelu_tanh"))),
        gate=gate,
        score=draw(st.sampled_from(("output", "hidden", "input"))),
        transposed=draw(st.booleans()),
        alpha=draw(st.sampled_from((1.0, 1.702))),
        limit=draw(st.sampled_from((None, 1.5))),
        shift=0.0 if gate == "none" else draw(st.sampled_from((0.0, 1.0))),
    )


@settings(max_examples=80)
@given(
    spec=specs(), sizes=st.tuples(*(st.integers(1, 7) for _ in range(4))), extra=st.integers(0, 3),
    routing=st.sampled_from(ROUTINGS), bias=st.booleans(), strided=st.booleans(), keep=st.booleans(),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)), seed=st.integers(0, 99),
)  # fmt: skip
def test_values_and_gradients_are_those_of_the_definition(
    spec: ExpertSpec, sizes: tuple[int, ...], extra: int, routing: str, bias: bool, strided: bool, keep: bool,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    tokens, choices, width, inner = sizes
    case = problem(
        spec, tokens, choices, choices + extra, width, inner, routing=routing, bias=bias, seed=seed, strided=strided
    ).to(dtype)
    gold, low = case.to(torch.float64).run(reference_moe.experts), case.run(reference_moe.experts)
    for name, actual in case.run(moe_experts, keep=keep).items():
        # A sum over tokens and choices in another order: the rounding of its terms, not of its result, counts.
        assert_close_to_gold(actual, low[name], gold[name], what=f"{name} of {spec}", condition=8.0)


@pytest.mark.parametrize("routing", ["random", "outside", "same_choices"])
@pytest.mark.parametrize("score", ["output", "hidden", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoding_step_is_what_the_definition_says(dtype: torch.dtype, score: Any, routing: str) -> None:
    for tokens in (1, 4):  # fewer choices than a quarter of the experts: nothing is sorted
        case = problem(ExpertSpec("silu", "half", score), tokens, 3, 48, 6, 4, routing=routing, bias=True)
        low, gold = case.to(dtype), case.to(dtype).to(torch.float64)
        with torch.no_grad():
            given = (low.z, low.w1, low.w2, low.ids, low.p)
            actual = moe_experts(*given, spec=case.spec, b1=low.b1, b2=low.b2)
            original, truth = (
                reference_moe.experts(one.z, one.w1, one.w2, one.ids, one.p, one.spec, b1=one.b1, b2=one.b2)
                for one in (low, gold)
            )
        assert_close_to_gold(actual, original, truth, what=f"{tokens} tokens", condition=8.0)


@pytest.mark.parametrize("score", ["output", "hidden", "input"])
@pytest.mark.parametrize("gate", ["none", "half", "separate"])
def test_gradients_match_finite_differences(score: Any, gate: Any) -> None:
    case = problem(ExpertSpec("silu", gate, score), 4, 2, 3, 3, 2, bias=True).to(torch.float64)
    names, leaves = zip(*case.tensors().items(), strict=True)

    def call(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return moe_experts(
            given.pop("z"), given.pop("w1"), given.pop("w2"), case.ids, given.pop("p"), spec=case.spec, **given
        )

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("spec", [ExpertSpec("relu2"), ExpertSpec("silu", "separate", transposed=True)])
@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(spec: ExpertSpec, keep: bool) -> None:
    case = problem(spec, bias=True).to(torch.float32)
    args = (case.z, case.w1, case.w2, case.w3, case.b1, case.b2, case.ids, case.p, spec.text(), keep, "")
    torch.library.opcheck(torch.ops.s2o.moe_experts.default, args)
    kept = torch.ops.s2o.moe_experts(*args)[1].detach()
    operands = [None if x is None else x.detach() for x in args[:8]]
    torch.library.opcheck(
        torch.ops.s2o.moe_experts_backward.default, (torch.ones_like(case.z), *operands, kept, spec.text(), [True] * 7)
    )


def test_experts_without_tokens_get_zero_gradients() -> None:
    case = problem(ExpertSpec("silu", "half"), routing="one_expert", bias=True).to(torch.float32)
    found = case.run(moe_experts)
    for name in ("w1", "w2", "b1", "b2"):
        assert found[name][-1].abs().sum() > 0
        assert not found[name][:-1].any(), name


def test_only_wanted_gradients_are_computed() -> None:
    case = problem(ExpertSpec("silu", "half")).to(torch.float32)
    for name, x in case.tensors().items():
        frozen = {other: y.detach() for other, y in case.tensors().items() if other != name}
        part = dataclasses.replace(case, **frozen)
        out = moe_experts(part.z, part.w1, part.w2, part.ids, part.p, spec=part.spec)
        (alone,) = torch.autograd.grad(out, [x], torch.ones_like(out))
        whole = moe_experts(case.z, case.w1, case.w2, case.ids, case.p, spec=case.spec)
        (among,) = torch.autograd.grad(whole, [x], torch.ones_like(whole))
        torch.testing.assert_close(alone, among, atol=0, rtol=0)


def test_the_same_call_gives_the_same_bits() -> None:
    case = problem(ExpertSpec("silu", "half"), 300, 4, 16, 32, 16).to(torch.float32)
    first, second = case.run(moe_experts), case.run(moe_experts)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_renaming_experts_and_reordering_tokens_changes_nothing_else() -> None:
    case = problem(ExpertSpec("silu", "half"), 40, 3, 8, 16, 8).to(torch.float64)
    experts, tokens = torch.randperm(8), torch.randperm(40)
    renamed = dataclasses.replace(
        case, w1=case.w1[experts], w2=case.w2[experts], ids=experts.argsort()[case.ids][tokens], z=case.z[tokens],
        p=case.p[tokens],
    )  # fmt: skip
    expected = moe_experts(case.z, case.w1, case.w2, case.ids, case.p, spec=case.spec)[tokens]
    actual = moe_experts(renamed.z, renamed.w1, renamed.w2, renamed.ids, renamed.p, spec=case.spec)
    torch.testing.assert_close(actual, expected)


def test_many_experts_share_blocks_and_a_large_one_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_routing, "BLOCK_BYTES", 64)
    ids = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 4], [0, 1]])
    blocks = list(moe_cpu.Routing.of(ids, 6).blocks(row_bytes=16))
    assert [rows for rows, _ in blocks] == [slice(0, 5), slice(5, 9), slice(9, 10)]
    assert [[expert for expert, _ in parts] for _, parts in blocks] == [[0], [1, 2, 3], [4]]


def test_no_tokens_and_no_choices() -> None:
    for tokens, choices in ((0, 2), (3, 0)):
        case = problem(ExpertSpec("silu", "half"), tokens, choices).to(torch.float32)
        found = case.run(moe_experts)
        assert all(not x.any() for x in found.values())
        assert found["output"].shape == (tokens, 6)


def test_the_weights_decide_the_dtype_under_autocast() -> None:
    case = problem(ExpertSpec("silu", "half")).to(torch.float32)
    plain = moe_experts(case.z, case.w1, case.w2, case.ids, case.p, spec=case.spec)
    with torch.autocast("cpu", torch.bfloat16):
        same = moe_experts(case.z, case.w1, case.w2, case.ids, case.p, spec=case.spec)
        mixed = moe_experts(case.z.bfloat16(), case.w1, case.w2, case.ids, case.p, spec=case.spec)
    assert torch.equal(plain, same)
    assert mixed.dtype == torch.float32


def test_a_latent_layer_is_its_projections_around_the_op() -> None:
    spec, generator = ExpertSpec("relu2"), torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, router, down, up = normal(11, 16), normal(8, 16), normal(6, 16), normal(16, 6)
    w1, w2, shared, correction = normal(8, 5, 6), normal(8, 6, 5), (normal(7, 16), normal(16, 7)), normal(8)
    expected = reference_moe.latent_moe(
        x, router, down, w1, w2, up, spec, top_k=3, correction=correction, scale=2.5, shared=shared
    )
    scores = (x @ router.T).sigmoid()
    ids = (scores + correction).topk(3).indices
    p = scores.gather(1, ids)
    routed = moe_experts(x @ down.T, w1, w2, ids, 2.5 * p / (p.sum(1, keepdim=True) + 1e-20), spec=spec) @ up.T
    torch.testing.assert_close(routed + (x @ shared[0].T).relu().square() @ shared[1].T, expected)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"z": torch.randn(9, 7)}, r"z must be \(9, 6\); got \(9, 7\)"),
        ({"w1": torch.randn(5, 7, 6)}, r"w1 must be \(5, 8, 6\)"),
        ({"w2": torch.randn(5, 6, 4).double()}, "one floating dtype.*cast them first"),
        ({"ids": torch.zeros(9, 3)}, "ids are integers"),
        ({"p": torch.rand(9, 2)}, r"ids and p \(T, K\)"),
        ({"w3": torch.randn(5, 4, 6)}, "w3 and gate 'separate' go together"),
        ({"b2": torch.randn(5, 4)}, r"b2 must be \(5, 6\)"),
    ],
)
def test_wrong_operands_are_named(changed: dict[str, Tensor], says: str) -> None:
    case = dataclasses.replace(problem(ExpertSpec("silu", "half")), **changed)
    with pytest.raises(ValueError, match=says):
        moe_experts(case.z, case.w1, case.w2, case.ids, case.p, spec=case.spec, w3=case.w3, b2=case.b2)


@given(spec=specs())
def test_a_spec_survives_its_text(spec: ExpertSpec) -> None:
    assert parse(spec.text()) == spec


def test_wrong_specs_are_named() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of .*got 'tanh'"):
        ExpertSpec("tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit must be positive"):
        ExpertSpec(limit=0.0)
    with pytest.raises(ValueError, match="not the text of an expert spec"):
        parse("silu")
