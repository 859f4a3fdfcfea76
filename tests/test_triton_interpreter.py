"""The Triton kernels on CPU, in Triton's interpreter (see tests/interpreter.py), against the float64 reference.

The interpreter cannot multiply bfloat16: cases are float16 and float32. What it cannot show, a GPU does: see tests/gpu.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import interpreter
import pytest
import torch
from test_dense_numerics import SPECS, Problem, leaves_for, problem
from torch import Tensor

from s2o_inductor.kernels import dense, reference
from s2o_inductor.mask_spec import MaskSpec
from s2o_inductor.testing import assert_close_to_gold, in_memory

LEAST = torch.finfo(torch.float32).min


def case(name: str = "causal", dtype: torch.dtype = torch.float16, **fields: Any) -> Problem:
    """A problem with the mask `name`; two tiles of queries, three of keys, the last of each ragged."""
    fields = {"batch": 2, "heads": (2, 1), "lengths": (140, 150), "widths": (16, 16), **fields}
    lengths = fields["lengths"]
    fields.setdefault("spec", SPECS[name])
    fields.setdefault("leaves", leaves_for(fields["batch"], *lengths))
    return problem(dtype=dtype, params=(lengths[1] - lengths[0], 70), **fields)


def with_mask(mask: Tensor, *, dtype: torch.dtype = torch.float16, **terms: Any) -> Problem:
    names = {f.name for f in dataclasses.fields(MaskSpec)}
    spec = MaskSpec(dense=True, **{name: terms.pop(name) for name in list(terms) if name in names})
    return case(spec=spec, mask=mask, dtype=dtype, **terms)


def random_mask(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.6


def additive_mask(*shape: int) -> Tensor:
    """Ordinary numbers, -inf, and the least float32; one row holds nothing but the latter."""
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    mask = mask.masked_fill(random_mask(*shape), float("-inf")).masked_fill(random_mask(*shape[:2], 1, shape[3]), LEAST)
    mask[0, 0, 7] = LEAST
    return mask


CASES: dict[str, Callable[[], Problem]] = {
    **{name: (lambda name=name: case(name)) for name in SPECS},
    "float32": lambda: case("all", torch.float32),
    "float32, no mask, wide": lambda: case("full", torch.float32, widths=(40, 72), batch=1),
    "sizes that fill their tiles": lambda: case("causal", lengths=(128, 128), heads=(4, 4), batch=1),
    "one query tile, widths apart": lambda: case("window", widths=(24, 48), lengths=(100, 100)),
    "more queries than keys": lambda: case("causal with offset", lengths=(150, 70)),
    "rows without a key": lambda: case(spec=MaskSpec(upper="-60"), lengths=(140, 140)),
    "no key for anyone": lambda: case(spec=MaskSpec(upper="-500"), batch=1),
    "boolean mask": lambda: with_mask(random_mask(2, 2, 140, 150)),
    "boolean mask of keys, and causal": lambda: with_mask(random_mask(2, 1, 1, 150), upper="p0"),
    "boolean causal mask": lambda: with_mask(torch.ones(140, 150, dtype=torch.bool).tril(10)[None, None]),
    "additive mask": lambda: with_mask(additive_mask(2, 2, 140, 150)),
    "additive mask, float32": lambda: with_mask(additive_mask(1, 1, 140, 150), dtype=torch.float32, batch=1),
    "negative scale": lambda: case("causal with offset", scale=-0.3),
    "scale zero": lambda: case("padding", scale=0.0),
    "decode": lambda: case("full", lengths=(1, 700), heads=(6, 2)),
    "decode, padding, per head mask": lambda: with_mask(
        random_mask(2, 6, 3, 700), upper="p0 - 100", keys="L0[b, k]", lengths=(3, 700), heads=(6, 2)
    ),
    "decode, cache positions": lambda: case("cache positions", lengths=(2, 700), heads=(4, 2), widths=(24, 40)),
    "decode, nothing visible": lambda: case(spec=MaskSpec(keys="k < 0"), lengths=(2, 300)),
}
LAYOUTS = ("gaps", "odd_offset", "fused", "width_first")
for _layout in LAYOUTS:
    CASES[f"layout {_layout}"] = lambda layout=_layout: dataclasses.replace(
        base := case("causal, padding", widths=(20, 20), lengths=(90, 140)),
        **{name: in_memory(getattr(base, name), layout) for name in ("q", "k", "v", "grad")},
    )


def run_kernels(case: Problem, dropout_p: float = 0.0, seed: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
    """Output, lse and gradients from the kernels that a GPU would run."""
    from s2o_inductor.kernels import cuda, triton_attention_backward

    call = dense.Call.of(
        case.q, case.k, case.v, case.mask, case.leaves, (), case.params, case.spec, None, seed,
        case.q.shape[3] ** -0.5 if case.scale is None else case.scale, dropout_p,
    )  # fmt: skip
    few = case.q.shape[2] * case.q.shape[1] // case.k.shape[1] <= 64 and dropout_p == 0.0
    call = dataclasses.replace(call, route="decode" if few else "triton")
    output, lse = cuda.forward(call, case.q, case.k, case.v)
    grads = triton_attention_backward.backward(
        case.grad, case.q, case.k, case.v, output, lse, cuda.tile_mask(call), call.scale, dropout_p, seed
    )
    return output, lse, grads


def check(case: Problem) -> None:
    output, lse, grads = run_kernels(case)
    gold, gold_lse, gold_grads = case.reference(torch.float64)
    low, low_lse, low_grads = case.reference(case.q.dtype)
    assert_close_to_gold(output, low, gold, what="output")
    huge = gold_lse.isfinite() & (gold_lse < -1e30)  # rows of nothing but LEAST; in base 2 it would overflow
    assert torch.equal(huge, lse.isfinite() & (lse < -1e30))
    lse, low_lse, gold_lse = (x.masked_fill(huge, 0.0) for x in (lse, low_lse.float(), gold_lse))
    assert_close_to_gold(lse, low_lse, gold_lse, what="lse", dtype=case.q.dtype)
    for name, actual, ordinary, exact in zip("qkv", grads, low_grads, gold_grads, strict=True):
        assert_close_to_gold(actual, ordinary, exact, what=f"gradient of {name}")


def check_dropout() -> None:
    """The weights dropped, read off by values that are unit vectors, are the same in forward and backward."""
    seed, p = torch.tensor([1234567890123]), 0.3
    base = case("causal", lengths=(64, 64), batch=2)
    unit = torch.eye(64, dtype=torch.float16).expand(2, 1, 64, 64)
    weights, _, _ = run_kernels(dataclasses.replace(base, v=unit, grad=base.q.new_ones(2, 2, 64, 64)), p, seed)
    seen = torch.ones(64, 64, dtype=torch.bool).tril()
    kept = weights > 0
    assert abs(float(kept[..., seen].float().mean()) - (1 - p)) < 0.02
    assert not torch.equal(kept[0, 0], kept[0, 1]) and not torch.equal(kept[0], kept[1])

    output, _, grads = run_kernels(base, p, seed)

    def of(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        inputs = [x.detach().to(dtype, copy=True).requires_grad_() for x in (base.q, base.k, base.v)]
        out, _ = reference.attention(*inputs, visible=seen, dropout_keep=kept, dropout_p=p)
        return out.detach(), list(torch.autograd.grad(out, inputs, base.grad.to(dtype)))

    (gold, gold_grads), (low, low_grads) = of(torch.float64), of(torch.float16)
    assert_close_to_gold(output, low, gold, what="output")
    for name, actual, ordinary, exact in zip("qkv", grads, low_grads, gold_grads, strict=True):
        assert_close_to_gold(actual, ordinary, exact, what=f"gradient of {name}")


def check_repeats() -> None:
    base = case("documents")
    first, second = run_kernels(base), run_kernels(base)
    assert all(torch.equal(a, b) for a, b in zip((*first[:2], *first[2]), (*second[:2], *second[2]), strict=True))


def check_stray_addresses() -> None:
    """`checked_addresses` lets a kernel read and write its tensors, and nothing one element beyond either end."""
    import triton
    import triton.language as tl

    @triton.jit
    def move(x_ptr, y_ptr, read, write):  # type: ignore[no-untyped-def]
        at = tl.arange(0, 16)
        tl.store(y_ptr + write + at, tl.load(x_ptr + read + at))

    whole = torch.arange(64.0)
    x, y = whole[:40], whole[40:].new_zeros(16)
    move[(1,)](x, y, 24, 0)
    assert torch.equal(y, x[24:])
    for read, write, what in ((25, 0, r"load of bytes \[100, 164\) of 160"), (0, 1, "store"), (0, -1, "store")):
        with pytest.raises(Exception, match=what):
            move[(1,)](x, y, read, write)


CHECKS: dict[str, Callable[[], None]] = {
    **{name: (lambda make=make: check(make())) for name, make in CASES.items()},
    "dropout": check_dropout,
    "bitwise repeatable": check_repeats,
    "addresses beyond tensors": check_stray_addresses,
}


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    return interpreter.report_of(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_in_the_interpreter(name: str, report: dict[str, str]) -> None:
    assert report[name] == "", report[name]


if __name__ == "__main__":
    interpreter.main(CHECKS)
