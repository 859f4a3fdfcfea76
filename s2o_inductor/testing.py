"""Tools for testing kernels: the error bound, tensors in awkward memory, and NaN in unwritten memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# How `in_memory` can place a tensor. The first is what a test compares the others with.
LAYOUTS = ("contiguous", "heads_last", "gaps", "odd_offset", "fused", "width_first", "every_other")


def assert_close_to_gold(
    actual: Tensor,
    low_precision: Tensor,
    gold: Tensor,
    *,
    what: str = "result",
    dtype: torch.dtype | None = None,
    condition: float = 1.0,
) -> None:
    """Asserts that a kernel errs no more than ordinary torch code of the same precision, within a band.

    With err(x) = |x - gold| and band = condition * eps(dtype) * max|gold|:

        max err(actual) <= 2   * (max err(low_precision) + band)
        rms err(actual) <= 1.5 * (rms err(low_precision) + band)

    The first line is FlashAttention's rule (error at most twice that of plain torch); the band keeps
    it meaningful where plain torch happens to be exact, and outliers cannot hide a drift in the second.

    Args:
        actual: what is tested.
        low_precision: the same in ordinary torch code, in the precision of `actual`.
        gold: the same in float64, from the same inputs.
        what: name used in the message.
        dtype: the precision whose eps counts; that of `actual` by default.
        condition: how many times a relative error of eps in a stored intermediate grows in the result.
            Not a knob: exp(x - lse) of a log-sum-exp stored in `dtype` has the condition max|lse|.

    Raises:
        AssertionError: with both errors. Also when shape, dtype or device differ from `low_precision`,
            when `actual` is finite where gold is not or the reverse, and when infinities differ.
    """
    for name in ("shape", "dtype", "device"):
        got, wanted = getattr(actual, name), getattr(low_precision, name)
        assert got == wanted, f"{what}: {name} is {got}; torch gives {wanted}"
    assert gold.shape == actual.shape, f"{what}: shape {tuple(actual.shape)}; gold has {tuple(gold.shape)}"
    assert gold.dtype == torch.float64, f"{what}: gold must be float64; got {gold.dtype}"
    eps = torch.finfo(dtype or actual.dtype).eps
    actual, low_precision, gold = (x.detach().to("cpu", torch.float64) for x in (actual, low_precision, gold))
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(actual) != test(gold)
        assert not wrong.any(), f"{what}: {name} differs from gold at {int(wrong.sum())} places, {_first(wrong)}"
    finite = gold.isfinite()
    if not finite.any():
        return
    error = (actual - gold).where(finite, 0.0).abs()
    reference = (low_precision - gold).where(finite & low_precision.isfinite(), 0.0).abs()
    band = condition * eps * float(gold.where(finite, 0.0).abs().max())
    rows = []
    for name, factor, measure in (("max", 2.0, torch.amax), ("rms", 1.5, lambda x: x.square().mean().sqrt())):
        got, allowed = float(measure(error)), factor * (float(measure(reference)) + band)
        rows.append(
            (got <= allowed, f"{name} err {got:.3e}, allowed {allowed:.3e} (torch {float(measure(reference)):.3e})")
        )
    worst = _first(error == error.max())
    assert all(ok for ok, _ in rows), f"{what}: {'; '.join(text for _, text in rows)}; worst {worst}"


def _first(where: Tensor) -> str:
    index = tuple(where.nonzero()[0].tolist()) if where.dim() else ()
    return f"the first at {index}"


def in_memory(x: Tensor, layout: str) -> Tensor:
    """A copy of x (B, H, S, D) with the same values and a memory layout that kernels meet; gaps hold NaN.

    Args:
        x: floating point, 4-D.
        layout: one of `LAYOUTS`: "contiguous"; "heads_last", as projections leave it, (B, S, H, D);
            "gaps", a slice in every dimension of something larger; "odd_offset", starting one
            element into its storage, so that it is not aligned; "fused", one third of a fused QKV
            projection (B, S, 3, H, D); "width_first", with neighbours along S, not D, adjacent;
            "every_other", with neighbours along D two elements apart.

    Raises:
        ValueError: there is no such layout.
    """
    batch, heads, length, width = x.shape
    nan = float("nan")
    if layout == "contiguous":
        return x.contiguous().clone()
    if layout == "heads_last":
        return x.transpose(1, 2).contiguous().clone().transpose(1, 2)
    if layout == "gaps":
        room = x.new_full((batch + 1, heads + 2, length + 3, width + 4), nan)
        return room[1:, 1:-1, 1:-2, 2:-2].copy_(x)
    if layout == "odd_offset":
        room = x.new_full((x.numel() + 2,), nan)
        return room[1:-1].view(x.shape).copy_(x)
    if layout == "fused":
        room = x.new_full((batch, length, 3, heads, width), nan)
        return room[:, :, 1].transpose(1, 2).copy_(x)
    if layout == "width_first":
        return x.transpose(2, 3).contiguous().clone().transpose(2, 3)
    if layout == "every_other":
        room = x.new_full((batch, heads, length, 2 * width), nan)
        return room[..., ::2].copy_(x)
    raise ValueError(f"layout must be one of {LAYOUTS}; got {layout!r}")


def attention_inputs(
    batch: int,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) and a gradient (B, Hq, Sq, Dv), standard normal.

    Args:
        batch: B.
        heads: Hq and Hkv.
        lengths: Sq and Sk.
        widths: D and Dv.
        dtype: of all four.
        device: where they are put; the values do not depend on it.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, heads[0], lengths[0], widths[0]),
        (batch, heads[1], lengths[1], widths[0]),
        (batch, heads[1], lengths[1], widths[1]),
        (batch, heads[0], lengths[0], widths[1]),
    )
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return q, k, v, grad


@contextlib.contextmanager
def poisoned_memory(package: str = "s2o_inductor") -> Iterator[None]:
    """While active, memory that `package` allocates without writing it holds NaN (the largest value, for integers).

    Fresh memory is often zero, which hides a kernel that forgets to write a part of its output.
    Covers torch.empty, torch.empty_like and torch.empty_strided called from Python. Methods of tensors
    cannot be covered, since Dynamo does not trace a replaced one: kernels call the functions.
    """
    originals = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}
    for name, original in originals.items():
        setattr(torch, name, _poisoning(original, package))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def _poisoning(original: Callable[..., Any], package: str) -> Callable[..., Any]:
    def allocate(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # what Dynamo traces stays as it was
            return original(*args, **kwargs)
        result = original(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        # A fake tensor has no memory, and a fill would end up in the graph being traced.
        if caller.startswith(package) and type(result) is Tensor:
            if result.is_floating_point():
                result.fill_(float("nan"))
            elif result.dtype != torch.bool:
                result.fill_(torch.iinfo(result.dtype).max)
        return result

    return allocate
