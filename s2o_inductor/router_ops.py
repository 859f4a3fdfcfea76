"""The operators that routers call: schema, fake kernels, autograd.

    mm_float32  a product of operands in half precision, as if they had been cast to float32
    top_k       the k largest numbers of each row, in order, and their places

As in `ops.py`, importing needs torch alone.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from s2o_inductor.dispatch import NAMESPACE, register_autograd

# What one CUDA launch takes: rows that fit the registers of a few warps, and choices that a router makes.
MAX_COLUMNS = 1024
MAX_CHOICES = 64
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Dtypes of which two numbers have a product that is exact in float32.
HALVES = (torch.bfloat16, torch.float16)
# Rows that are no multiple of so many numbers are slow to read in half precision.
_LOADED_TOGETHER = 16
# Kernels take every stride as it comes, so Inductor need not make copies.
_TAGS = (torch.Tag.flexible_layout,)

torch.library.define(f"{NAMESPACE}::mm_float32", "(Tensor a, Tensor b) -> Tensor", tags=_TAGS)
torch.library.define(f"{NAMESPACE}::top_k", "(Tensor x, int k) -> (Tensor values, Tensor indices)", tags=_TAGS)


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a.float() @ b.float() without the casts, and as exact.

    Products of two such numbers are exact in float32, and sums of them are rounded to nearest. Those of
    `torch.mm(a, b, out_dtype=torch.float32)` are not: tensor cores cut off what their accumulators cannot hold.

    Args:
        a: (T, K), bfloat16 or float16, any strides.
        b: (K, N) in the same dtype, any strides.

    Returns:
        (T, N) in float32. Gradients are computed in float32 and rounded once.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    found: Tensor = torch.ops.s2o.mm_float32(a, b)
    return found


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest numbers along the last dimension, the largest first, and where they stand.

    A result of `torch.topk(x, k)` with two promises on top: of equal numbers the first comes first, so equal calls
    choose equally, and the order holds whether it was asked for or not. NaN is larger than any number, and values are
    what x holds to the bit.

    Args:
        x: (..., n), floating point, any strides. On CUDA float32, bfloat16 or float16 with n up to 1024.
        k: from 1 to n; on CUDA up to 64.

    Returns:
        Values (..., k) in x's dtype, and indices (..., k) in int64. Gradients go to the numbers that were chosen.

    Raises:
        ValueError: k is no number of columns, or the kernel does not take the sizes or the dtype.
    """
    found: tuple[Tensor, Tensor] = torch.ops.s2o.top_k(x, k)
    return found


def is_multiplied(device: torch.device, depth: int) -> bool:
    """Whether passes put `mm_float32` in place of a product of so many terms a sum."""
    return device.type == "cuda" and depth % _LOADED_TOGETHER == 0


def is_selected(x: Tensor, k: int) -> bool:
    """Whether passes put `top_k` in place of `torch.topk` over the last dimension of a tensor or fake tensor."""
    columns = x.shape[-1]
    return x.device.type == "cuda" and x.dtype in _CUDA_DTYPES and isinstance(columns, int) and _fits(columns, k)


def _fits(columns: int, k: int) -> bool:
    return 1 <= k <= min(columns, MAX_CHOICES) and columns <= MAX_COLUMNS


def _check(x: Tensor, k: int) -> None:
    if x.dim() == 0 or not x.is_floating_point() or not 1 <= k <= x.shape[-1]:
        raise ValueError(f"top_k takes k from 1 to n of floats (..., n); got {x.dtype} {tuple(x.shape)} and k {k}")
    if x.device.type == "cuda" and not (x.dtype in _CUDA_DTYPES and _fits(x.shape[-1], k)):
        raise ValueError(
            f"top_k on CUDA takes up to {MAX_CHOICES} of {MAX_COLUMNS} numbers in float32, bfloat16 or float16; got "
            f"{k} of {x.shape[-1]} in {x.dtype}: call torch.topk"
        )


def _check_product(a: Tensor, b: Tensor) -> None:
    if a.dtype not in HALVES or a.dtype != b.dtype or a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            "mm_float32 takes (T, K) and (K, N), both bfloat16 or both float16; got "
            f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        )


def _product_impl(a: Tensor, b: Tensor) -> Tensor:
    _check_product(a, b)
    if a.device.type == "cuda":
        from s2o_inductor.kernels import triton_scores

        return triton_scores.mm_float32(a, b)
    return a.float() @ b.float()


@functools.cache
def _on_cuda() -> ModuleType:
    from s2o_inductor.kernels import triton_top_k

    return triton_top_k


def _impl(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check(x, k)
    if x.device.type == "cuda":
        found: tuple[Tensor, Tensor] = _on_cuda().top_k(x, k)
        return found
    ordered, places = torch.sort(x, dim=-1, descending=True, stable=True)
    return ordered[..., :k].contiguous(), places[..., :k].contiguous()


torch.library.impl(f"{NAMESPACE}::mm_float32", "CompositeExplicitAutograd", _product_impl)
torch.library.impl(f"{NAMESPACE}::top_k", "CompositeExplicitAutograd", _impl)


@torch.library.register_fake(f"{NAMESPACE}::mm_float32")
def _product_fake(a: Tensor, b: Tensor) -> Tensor:
    _check_product(a, b)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::top_k")
def _fake(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check(x, k)
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


def _product_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad
    return (grad @ b.float().mT).to(a.dtype) if need_a else None, (a.float().mT @ grad).to(b.dtype) if need_b else None


def _setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.columns = inputs[0].shape[-1]


def _backward(ctx: Any, grad: Tensor, _grad_indices: Tensor | None) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    return grad.new_zeros((*grad.shape[:-1], ctx.columns)).scatter(-1, indices, grad), None


register_autograd("mm_float32", _product_impl, _product_backward, _product_context)
register_autograd("top_k", _impl, _backward, _setup_context)
