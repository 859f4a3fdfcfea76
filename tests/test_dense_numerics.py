"""Exact attention on CPU against the float64 reference, for every mask term, layout, dtype and edge."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from dense_cases import CAUSAL, DTYPES, SPECS, Problem, leaves_for, ops_plan, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2o_inductor import ops
from s2o_inductor.kernels import mask as masks
from s2o_inductor.kernels import reference
from s2o_inductor.mask_spec import MaskSpec
from s2o_inductor.testing import LAYOUTS, assert_close_to_gold, in_memory

LENGTHS = (1, 17, 63, 64, 65, 127, 129, 300)
WIDTHS = (16, 24, 64, 80, 128)
GRID = list(itertools.product(LENGTHS, WIDTHS, (1, 4, 8), DTYPES))


@pytest.mark.parametrize(
    ("length", "width", "group", "dtype", "name"),
    # The specs take turns along the grid, whose size is no multiple of their number.
    [(*cell, list(SPECS)[i % len(SPECS)]) for i, cell in enumerate(GRID, start=len(GRID) % len(SPECS))],
)
def test_every_size_and_dtype(length: int, width: int, group: int, dtype: torch.dtype, name: str) -> None:
    problem(
        1 + length % 2, (group, 1), (length, length), (width, width), dtype, spec=SPECS[name],
        leaves=leaves_for(1 + length % 2, length, length), params=(0, 70),
    ).check()  # fmt: skip


@pytest.mark.parametrize("lengths", [(300, 300), (65, 300), (300, 65), (1, 300)])
@pytest.mark.parametrize("name", SPECS)
def test_every_mask_term(name: str, lengths: tuple[int, int]) -> None:
    for batch, empty, sinks in ((3, "shifted", False), (1, "mean", False), (2, "zero", True)):
        problem(
            batch, lengths=lengths, spec=dataclasses.replace(SPECS[name], empty=empty),
            leaves=leaves_for(batch, *lengths), params=(lengths[1] - lengths[0], 70),
            sinks=torch.randn(4, generator=torch.Generator().manual_seed(1)) if sinks else None,
        ).check()  # fmt: skip


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("name", ["full", "causal", "window", "all"])
def test_scores_may_be_negated_or_all_alike(name: str, scale: float) -> None:
    leaves = leaves_for(2, 65, 65)
    problem(lengths=(65, 65), spec=SPECS[name], leaves=leaves, params=(0, 20), scale=scale).check()


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    batch, group, kv_heads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2))
    queries, keys = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    widths = draw(st.sampled_from([(8, 8), (24, 16), (16, 24), (20, 20), (1, 1)]))
    seed = draw(st.integers(0, 2**16))
    some = draw(st.sets(st.sampled_from(["keys", "rows", "equal", "at_most", "lower", "upper"]), max_size=4))
    every = SPECS["all"]
    spec = MaskSpec(
        **{name: getattr(every, name) for name in some}, empty=draw(st.sampled_from(["zero", "mean", "shifted"]))
    )
    generator = torch.Generator().manual_seed(seed)
    mask = None
    if draw(st.booleans()):
        shape = tuple(draw(st.sampled_from([1, n])) for n in (batch, group * kv_heads, queries, keys))
        if draw(st.booleans()):
            mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.02, 0.5, 0.98]))
        else:
            mask = torch.randn(shape, generator=generator)
            hide = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
            mask = mask.masked_fill(hide, draw(st.sampled_from([float("-inf"), torch.finfo(torch.float32).min])))
        if draw(st.booleans()):
            mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
        spec = dataclasses.replace(spec, dense=True)
    return problem(
        batch, (group * kv_heads, kv_heads), (queries, keys), widths, seed=seed, spec=spec, mask=mask,
        leaves=leaves_for(batch, queries, keys, seed), params=(keys - queries, 70), with_plan=draw(st.booleans()),
        sinks=torch.randn(group * kv_heads, generator=generator) if draw(st.booleans()) else None,
        scale=draw(st.sampled_from([None, 0.3])), layouts=draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 4)),
    )  # fmt: skip


@settings(max_examples=250)
@given(problems())
def test_random_conjunctions_layouts_and_shapes(case: Problem) -> None:
    case.check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["full", "causal", "window", "causal, padding"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_layouts(layout: str, name: str, dtype: torch.dtype) -> None:
    base = problem(lengths=(140, 140), dtype=dtype, spec=SPECS[name], leaves=leaves_for(2, 140, 140), params=(0, 70))
    for operand in range(4):
        layouts = tuple(layout if i == operand else "contiguous" for i in range(4))
        dataclasses.replace(base, layouts=layouts).check()


def test_broadcast_operands() -> None:
    """Operands with stride 0: batch, heads or length that expand() made."""
    base = problem(spec=CAUSAL)
    for shape in ((1, 2, 300, 16), (2, 1, 300, 16), (2, 2, 1, 16)):
        k = torch.randn(shape, generator=torch.Generator().manual_seed(3)).expand(2, 2, 300, 16)
        dataclasses.replace(base, k=k, v=k).check_values()
    dataclasses.replace(base, grad=torch.ones(()).expand(base.grad.shape)).check_values()


# Rows without a key.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("empty", ["zero", "mean", "shifted", "nan"])
@pytest.mark.parametrize(
    "spec", [MaskSpec(upper="-3"), MaskSpec(upper="0", keys="k >= 150 * b + 5"), MaskSpec(rows="q % 3 > 0")]
)
def test_rows_without_a_key(spec: MaskSpec, empty: str, dtype: torch.dtype) -> None:
    case = problem(dtype=dtype, spec=dataclasses.replace(spec, empty=empty))
    if empty != "nan":
        case.check()
    output, lse, (grad_q, grad_k, grad_v) = case.run()
    gold, gold_lse, _ = case.reference(torch.float64)
    nothing = gold_lse == float("-inf")
    assert nothing.any() and not nothing.all()
    assert torch.equal(lse == float("-inf"), nothing)
    assert grad_q[nothing].eq(0).all() == (empty != "shifted") and grad_k.isfinite().all()
    if empty == "zero":
        assert output[nothing].eq(0).all()
    if empty == "nan":
        assert torch.equal(output.isnan().all(-1), nothing)
        assert grad_v.isnan().all(), "a row of NaN weights sends NaN to every value, as in the source"
        low, _, _ = case.reference(dtype)
        assert_close_to_gold(output, low, gold)


def test_one_batch_entry_without_a_key() -> None:
    """Seven others see the same keys, so that all eight share their blocks."""
    problem(8, lengths=(300, 320), spec=MaskSpec(rows="b > 0")).check()


def test_sinks_fill_rows_without_a_key() -> None:
    for empty in ("zero", "mean", "shifted", "nan"):
        case = problem(spec=MaskSpec(upper="-3", empty=empty), sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))
        case.check()
        output, lse, _ = case.run()
        assert output[:, :, :3].eq(0).all() and torch.equal(lse[0, :, 0], torch.tensor([0.5, -1.0, 2.0, 0.0]))


def test_a_sink_of_minus_infinity_is_none() -> None:
    sinks = torch.tensor([0.5, float("-inf"), 2.0, float("-inf")])
    case = problem(spec=MaskSpec(upper="-3"), sinks=sinks)
    output, lse, grads = case.run()
    gold, gold_lse, gold_grads = case.reference(torch.float64)
    torch.testing.assert_close((output, lse), (gold.float(), gold_lse.float()))
    torch.testing.assert_close(grads[:3], [x.float() for x in gold_grads[:3]], atol=2e-6, rtol=1e-4)
    assert grads[3].isfinite().all() and grads[3][1] == grads[3][3] == 0
    # The output of such a row may be NaN, but the sink has no part in it.
    *_, grads = dataclasses.replace(case, spec=MaskSpec(upper="-3", empty="nan")).run()
    assert grads[3].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_are_a_column_without_value(dtype: torch.dtype) -> None:
    """Against a key of its own: score = sink for every query, value 0."""
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(1))
    case = problem(heads=(4, 4), dtype=dtype, sinks=sinks, spec=CAUSAL)
    case.check()
    q, k, v = (x.double() for x in (case.q, case.k, case.v))
    scores = (q @ k.transpose(-1, -2) / 4.0).masked_fill(torch.ones(300, 300, dtype=torch.bool).triu(1), float("-inf"))
    column = sinks.double()[None, :, None, None].expand(2, 4, 300, 1)
    weights = torch.cat([scores, column], -1).softmax(-1)
    gold = weights @ torch.cat([v, torch.zeros(2, 4, 1, 16, dtype=torch.float64)], 2)
    low, _, _ = case.reference(dtype)
    assert_close_to_gold(case.run()[0], low, gold)


# Additive masks.


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 4, 90, 140), (1, 1, 90, 140), (2, 1, 1, 140), (1, 4, 90, 1)])
def test_additive_masks(shape: tuple[int, ...], dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(mask_dtype)
    for spec in (MaskSpec(dense=True), MaskSpec(upper="p0", keys="L0[b, k]", dense=True)):
        problem(
            lengths=(90, 140), dtype=dtype, spec=spec, mask=mask, leaves=leaves_for(2, 90, 140), params=(50,)
        ).check()  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_additive_masks(layout: str) -> None:
    mask = torch.randn(2, 4, 90, 140, generator=torch.Generator().manual_seed(2))
    for spec in (MaskSpec(dense=True), MaskSpec(upper="p0", dense=True)):
        problem(lengths=(90, 140), spec=spec, mask=in_memory(mask, layout), params=(50,)).check()


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_hidden_by_the_lowest_number_are_uniform(sinks: bool) -> None:
    """finfo.min absorbs every score of such a row: the softmax is uniform, in the gradient as well."""
    mask = torch.zeros(2, 1, 300, 300)
    mask[0, :, :7] = torch.finfo(torch.float32).min
    mask[1, :, :, 200:] = torch.finfo(torch.float32).min
    case = problem(spec=MaskSpec(dense=True), mask=mask, sinks=torch.zeros(4) if sinks else None)
    output, _, grads = case.run()
    gold = case.reference(torch.float32)  # in float64 the scores would survive: the source ran in float32
    torch.testing.assert_close(output, gold[0], atol=2e-6, rtol=1e-5)
    for actual, expected in zip(grads, gold[2], strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    if not sinks:
        mean = case.v[0].mean(1, keepdim=True).repeat_interleave(2, 0).expand(4, 7, 16)
        torch.testing.assert_close(output[0, :, :7], mean, atol=1e-6, rtol=1e-5)


# Float64 and derivatives.


@pytest.mark.parametrize("name", SPECS)
def test_float64_is_float64(name: str) -> None:
    lengths = (140, 180)
    case = problem(lengths=lengths, widths=(16, 24), dtype=torch.float64, spec=SPECS[name], params=(40, 70),
                   leaves=leaves_for(2, *lengths), sinks=torch.randn(4, dtype=torch.float64))  # fmt: skip
    output, lse, grads = case.run()
    gold, gold_lse, gold_grads = case.reference(torch.float64)
    torch.testing.assert_close((output, lse, grads), (gold, gold_lse, gold_grads), atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(
    ("name", "sinks"),
    [
        ("full", False),
        ("causal", True),
        ("window", False),
        ("causal, padding", True),
        ("documents", False),
        ("rows", False),
    ],
)
def test_gradients_are_derivatives(name: str, sinks: bool, dropout_p: float) -> None:
    """Central differences in float64; with dropout they also prove that backward drops what forward dropped."""
    case = problem(
        2, (2, 1), (5, 7), (3, 2), torch.float64, spec=SPECS[name], params=(2, 3), leaves=leaves_for(2, 5, 7)
    )
    spec = dataclasses.replace(case.spec, empty="mean")
    seed = torch.tensor([11])

    def function(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None) -> Tensor:
        return ops.attention(
            q, k, v, leaves=case.leaves, params=case.params, spec=spec.text(), sinks=s, seed=seed, dropout_p=dropout_p
        )[0]

    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    logits = torch.randn(2, dtype=torch.float64, requires_grad=True) if sinks else None
    assert torch.autograd.gradcheck(function, (*inputs, logits))


def test_additive_mask_has_no_gradient() -> None:
    case = problem(spec=MaskSpec(dense=True))
    mask = torch.zeros(1, 1, 300, 300, requires_grad=True)
    output, _ = ops.attention(case.q.requires_grad_(), case.k, case.v, mask, spec=case.spec.text())
    with pytest.raises(NotImplementedError, match="no gradient for an additive mask"):
        output.sum().backward()


# Dropout.


def dropped(case: Problem, seed: int, p: float) -> Tensor:
    plan = () if case.spec.is_band else ops_plan(None, case.leaves, case.params, case.spec, *case.sizes)
    return ops.attention(
        case.q, case.k, case.v, leaves=case.leaves, params=case.params, plan=plan, spec=case.spec.text(),
        seed=torch.tensor([seed]), dropout_p=p,
    )[0]  # fmt: skip


@pytest.mark.parametrize("name", ["full", "causal", "window", "causal, padding"])
def test_dropout_drops_its_share_of_weights(name: str) -> None:
    """Values that are unit vectors show the weights themselves."""
    keys, p = 300, 0.3
    case = problem(
        1, (4, 1), (300, keys), (16, keys), spec=SPECS[name], leaves=leaves_for(1, 300, keys), params=(0, 70)
    )
    case = dataclasses.replace(case, v=torch.eye(keys).expand(1, 1, keys, keys))
    weights, kept = dropped(case, 5, 0.0), dropped(case, 5, p)
    alive = kept != 0
    seen = weights != 0
    torch.testing.assert_close(kept[alive], weights[alive] / (1 - p), atol=1e-6, rtol=1e-4)
    share = alive[seen].double().mean().item()
    deviation = (p * (1 - p) / int(seen.sum())) ** 0.5
    assert abs(share - (1 - p)) < 4 * deviation, (share, deviation)
    # Neighbouring rows, heads and blocks of rows have patterns of their own.
    for a, b in (
        (alive[0, 0], alive[0, 1]),
        (alive[0, :, :-1], alive[0, :, 1:]),
        (alive[0, :, :128], alive[0, :, 128:256]),
    ):
        both = a & b
        assert both.sum() < 0.9 * torch.minimum(a.sum(), b.sum())
    assert torch.equal(kept, dropped(case, 5, p)) and not torch.equal(kept, dropped(case, 6, p))


def test_dropout_of_everything_and_nothing() -> None:
    case = problem(spec=CAUSAL)
    assert dropped(case, 1, 1.0).eq(0).all()
    torch.testing.assert_close(dropped(case, 1, 1e-12), dropped(case, 1, 0.0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_numerics(dtype: torch.dtype) -> None:
    """The pattern read off one call, given to the reference, explains another call and its gradients."""
    case = problem(2, (4, 2), (200, 300), (16, 16), dtype, spec=MaskSpec(upper="100", keys="L0[b, k]"),
                   leaves=leaves_for(2, 200, 300))  # fmt: skip
    show = torch.eye(300, dtype=dtype).expand(2, 2, 300, 300)
    keep = dropped(dataclasses.replace(case, v=show), 9, 0.25) != 0
    inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    output, _ = ops.attention(
        *inputs, leaves=case.leaves, spec=case.spec.text(), seed=torch.tensor([9]), dropout_p=0.25
    )  # fmt: skip
    actual = [output.detach(), *torch.autograd.grad(output, inputs, case.grad)]
    visible = masks.evaluate(case.spec, None, case.leaves, (), *case.sizes)
    results = []
    for precision in (dtype, torch.float64):
        wide = [x.detach().to(precision, copy=True).requires_grad_() for x in (case.q, case.k, case.v)]
        expected, _ = reference.attention(*wide, visible=visible, dropout_keep=keep, dropout_p=0.25)
        results.append([expected.detach(), *torch.autograd.grad(expected, wide, case.grad.to(precision))])
    for got, low, gold in zip(actual, *results, strict=True):
        assert_close_to_gold(got, low, gold)
