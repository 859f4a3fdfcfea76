"""Routed experts in C++ on CPU: against float64 for all sizes and layouts, and beside what torch code gives."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import separate_experts, typed
from test_moe_op import ROUTINGS, Problem, problem, specs
from torch import Tensor

from s2o_inductor.kernels import moe_cpu, moe_cpu_native, moe_routing, native, reference_moe
from s2o_inductor.moe_ops import moe_experts
from s2o_inductor.moe_spec import ExpertSpec
from s2o_inductor.testing import assert_close_to_gold

SIZES = st.sampled_from((1, 3, 16, 17, 33, 65, 130))  # around whole vectors of 4, 8 and 16 numbers
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _always() -> Iterator[None]:
    """However many rows there are; the library must be there."""
    assert moe_cpu_native._library() is not None, "no C++ compiler here can build the kernel"
    with mock.patch.object(moe_cpu_native, "_few", lambda *_: float("inf")):
        yield


def scaled(case: Problem) -> Problem:
    """With weights as a model starts with: hidden rows and outputs of order one."""
    for x in (case.w1, case.w2, case.w3):
        if x is not None:
            x.mul_(x.shape[1 if case.spec.transposed else 2] ** -0.5)
    return case


def run(case: Problem, function: Any = None) -> Tensor:
    """One call without a gradient, which C++ must have made."""
    more = {"w3": case.w3, "b1": case.b1, "b2": case.b2}
    with torch.no_grad(), mock.patch.object(moe_cpu, "_route", None):  # what sorts for torch's products
        return (function or moe_experts)(case.z, case.w1, case.w2, case.ids, case.p, spec=case.spec, **more)


def reference(case: Problem) -> Tensor:
    return reference_moe.experts(
        case.z, case.w1, case.w2, case.ids, case.p, case.spec, w3=case.w3, b1=case.b1, b2=case.b2
    )


@settings(max_examples=60)
@given(
    spec=specs(), tokens=st.integers(1, 9), choices=st.integers(1, 4), extra=st.integers(0, 9), width=SIZES,
    inner=SIZES, routing=st.sampled_from(ROUTINGS), bias=st.booleans(), separate=st.booleans(),
    dtype=st.sampled_from((torch.float32, *HALF)), seed=st.integers(0, 99),
)  # fmt: skip
def test_values_are_those_of_the_definition(
    spec: ExpertSpec, tokens: int, choices: int, extra: int, width: int, inner: int, routing: str, bias: bool,
    separate: bool, dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    case = scaled(problem(spec, tokens, choices, choices + extra, width, inner, routing=routing, bias=bias, seed=seed))
    case = typed(case, dtype)
    gold = reference(case.to(torch.float64)).detach()
    actual = run(case, separate_experts if separate else None)
    assert_close_to_gold(actual, reference(case), gold, what=f"{spec}", condition=8.0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_every_number_in_half_precision_is_read_as_what_it_is(dtype: torch.dtype, transposed: bool) -> None:
    """Subnormal, infinite and NaN, too, by vectors and one by one: outputs are the weights, and the bias by itself."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    w2, zeros, ones = every.view(1, -1, 1), torch.zeros(1, every.numel(), dtype=dtype), torch.ones(1, 1, dtype=dtype)
    w1, ids, p = zeros.view(1, 1, -1), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    spec = ExpertSpec("identity", transposed=transposed)
    w1, w2 = (w1.mT.contiguous(), w2.mT.contiguous()) if transposed else (w1, w2)
    found = moe_experts(zeros, w1, w2, ids, p, spec=spec, b1=ones)
    torch.testing.assert_close(found[0], every + 0.0, rtol=0, atol=0, equal_nan=True)
    biased = moe_experts(zeros, w1, torch.zeros_like(w2), ids, p, spec=spec, b1=ones, b2=every[None])
    torch.testing.assert_close(biased[0], every + 0.0, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_result_depends_on_nothing_beside_it(transposed: bool) -> None:
    """Neither on the number of threads, nor on which tokens share a call, nor on how weights are held."""
    spec = ExpertSpec("gelu", "half", transposed=transposed)
    case = scaled(problem(spec, 23, 3, 6, 200, 170, bias=True))
    whole, threads = run(case), torch.get_num_threads()
    try:
        for number in (2, 3):
            torch.set_num_threads(number)
            assert torch.equal(run(case), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(run(case, separate_experts), whole)
    for rows in (slice(0, 1), slice(4, 9), slice(9, 23)):
        part = dataclasses.replace(case, z=case.z[rows], ids=case.ids[rows], p=case.p[rows])
        assert torch.equal(run(part), whole[rows])


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_not_finite_stays_where_it_is(transposed: bool) -> None:
    spec = ExpertSpec("relu", transposed=transposed)
    case = scaled(problem(spec, 9, 2, 5, 19, 21, bias=True))
    clean = run(case)
    for x in (case.w1, case.w2, case.b1, case.b2):
        assert x is not None
        x[3] = float("nan")
    case.z[4] = float("nan")
    touched = (case.ids == 3).any(dim=1)
    touched[4] = True
    found = run(case)
    assert found[touched].isnan().all() and torch.equal(found[~touched], clean[~touched])


def test_an_infinite_weight_gives_an_infinite_result() -> None:
    """The last numbers of a row are read together with some that were counted before."""
    for width in (3, 17, 40):
        w2 = torch.ones(1, 2, width)
        w2[0, 1] = float("inf")
        given = (
            torch.zeros(1, 2),
            torch.zeros(1, width, 2),
            w2,
            torch.zeros(1, 1, dtype=torch.int64),
            torch.ones(1, 1),
        )
        found = moe_experts(*given, spec=ExpertSpec("identity"), b1=torch.ones(1, width))
        assert found.tolist() == [[width, float("inf")]]


def test_matrices_with_gaps_everywhere_are_left_to_torch() -> None:
    case = problem(ExpertSpec("silu", "half"), strided=True)
    assert moe_cpu_native.forward(experts_of(case), case.z, case.ids, case.p) is None
    torch.testing.assert_close(moe_experts(case.z, case.w1, case.w2, case.ids, case.p, spec=case.spec), reference(case))


def experts_of(case: Problem) -> moe_routing.Experts:
    return moe_routing.Experts.of(case.spec, case.w1, case.w2, case.w3, case.b1, case.b2)


def test_many_rows_of_one_expert_are_left_to_torch() -> None:
    case = problem(ExpertSpec("silu", "half"), tokens=40, choices=1, experts=8, routing="one_expert")
    given = (experts_of(case), case.z, case.ids, case.p)
    with mock.patch.object(moe_cpu_native, "_few", lambda *_: 39.0):
        assert moe_cpu_native.forward(*given) is None
    with mock.patch.object(moe_cpu_native, "_few", lambda *_: 40.0):
        assert moe_cpu_native.forward(*given) is not None


@settings(max_examples=60)
@given(
    spec=specs(), rows=st.integers(0, 5), inner=SIZES, weighted=st.booleans(), large=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)), seed=st.integers(0, 99),
)  # fmt: skip
def test_activations_of_rows(
    spec: ExpertSpec, rows: int, inner: int, weighted: bool, large: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(rows, spec.halves * inner, generator=generator) * (30.0 if large else 1.0)
    weights = torch.rand(rows, 1, generator=generator) if weighted else None
    pre = pre.to(dtype)
    actual = moe_cpu_native.hidden(pre, spec, weights)
    assert actual is not None
    low, gold = moe_cpu.hidden(pre, spec), reference_moe.hidden(pre.double(), spec)
    low, gold = (x if weights is None else x * weights for x in (low, gold))
    assert_close_to_gold(actual, low.to(dtype), gold, what=f"{spec}", condition=8.0)


@settings(max_examples=60)
@given(
    spec=specs(), rows=st.integers(0, 5), inner=SIZES, weighted=st.booleans(), large=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)), seed=st.integers(0, 99),
)  # fmt: skip
def test_gradients_of_activations(
    spec: ExpertSpec, rows: int, inner: int, weighted: bool, large: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pre = (torch.randn(rows, spec.halves * inner, generator=generator) * (30.0 if large else 1.0)).to(dtype)
    grad = torch.randn(rows, inner, generator=generator).to(dtype)
    weights = torch.rand(rows, 1, generator=generator) if weighted else None
    actual = moe_cpu_native.hidden_backward(grad, pre, spec, weights)
    assert actual is not None
    with mock.patch.object(native, "library", lambda *_: None):
        low = moe_cpu._hidden_backward(grad, pre, spec, weights)
        gold = moe_cpu._hidden_backward(
            grad.double(), pre.double(), spec, None if weights is None else weights.double()
        )
    for name, *found in zip(("pre", "hidden", "weights"), actual, low, gold, strict=True):
        assert_close_to_gold(*found, what=f"{name} of {spec}", condition=8.0)


@pytest.mark.parametrize("activation", ["identity", "relu", "relu2", "silu", "gelu", "gelu_tanh"])
def test_activations_of_what_is_not_finite(activation: Any) -> None:
    pre = torch.tensor([[float("inf"), float("-inf"), float("nan"), 88.0, -88.0, 1e30, -1e30, 0.0]])
    actual = moe_cpu_native.hidden(pre, ExpertSpec(activation), None)
    gold = moe_cpu.hidden(pre.double(), ExpertSpec(activation))  # torch's float32 has gelu(inf) = NaN
    torch.testing.assert_close(actual, gold.float(), equal_nan=True)


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 6), choices=st.integers(1, 4), width=SIZES, weighted=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)), experts=st.integers(1, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_sorting_and_summing(
    tokens: int, choices: int, width: int, weighted: bool, dtype: torch.dtype, experts: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts + 1, (tokens, choices), generator=generator).int()
    expected, routing = moe_routing.Routing.of(ids, experts), moe_cpu_native.route(ids, experts)
    assert routing is not None and routing.counts == expected.counts and routing.choices == expected.choices
    assert torch.equal(routing.order, expected.order) and torch.equal(routing.place, expected.place)
    y = torch.randn(tokens * choices, width, generator=generator).to(dtype)
    weights = torch.rand(tokens * choices, 1, generator=generator) if weighted else None
    actual = moe_cpu_native.weighted_sum(y, routing.place.view(tokens, choices), weights)
    assert actual is not None

    def summed(rows: Tensor) -> Tensor:
        rows = rows[expected.place]
        rows = rows if weights is None else rows * weights.to(rows.dtype)
        return rows.view(tokens, choices, width).sum(dim=1)

    if tokens:
        assert_close_to_gold(actual, summed(y.float()).to(dtype), summed(y.double()), condition=4.0)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_compiler_torch_gives_the_same(dtype: torch.dtype, tokens: int) -> None:
    case = typed(scaled(problem(ExpertSpec("silu", "half"), tokens, 3, 48, 20, 12, bias=True)), dtype)
    gold, expected = reference(case.to(torch.float64)).detach(), run(case)
    with mock.patch.object(native, "library", lambda *_: None):
        found = moe_experts(case.z, case.w1, case.w2, case.ids, case.p, spec=case.spec, b1=case.b1, b2=case.b2)
    for one in (found, expected):
        assert_close_to_gold(one, reference(case), gold, condition=8.0)


def test_an_option_that_a_compiler_does_not_know_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2O_CACHE_DIR", str(tmp_path))
    assert native.library.__wrapped__("cpu_moe", ("-fno-such-option",)) is not None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are options of compilers for x86-64")
@pytest.mark.parametrize("option", ["-mno-avx512f", "-mno-avx"])
def test_narrower_vectors_give_the_same(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{native._compiler()[0]} {option}")
    monkeypatch.setenv("S2O_CACHE_DIR", str(tmp_path))
    narrow = native.library.__wrapped__("cpu_moe")
    assert narrow is not None
    for dtype in (torch.float32, *HALF):
        for transposed in (False, True):
            spec = ExpertSpec("gelu", "interleaved", transposed=transposed)
            case = typed(scaled(problem(spec, 7, 2, 5, 37, 21, bias=True)), dtype)
            gold = reference(case.to(torch.float64)).detach()
            with mock.patch.object(native, "library", lambda *_: narrow):
                assert_close_to_gold(run(case), reference(case), gold, condition=8.0)
