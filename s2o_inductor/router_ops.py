"""The operator that routers call: the largest of few numbers, schema, fake kernel and autograd.

    top_k  the k largest numbers of each row, in order, and their places

As in `ops.py`, importing needs torch alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s2o_inductor.ops import NAMESPACE

# What one CUDA launch takes: rows that fit the registers of a few warps, and choices that a router makes.
MAX_COLUMNS = 1024
MAX_CHOICES = 64
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Kernels take every stride as it comes, so Inductor need not make copies.
torch.library.define(
    f"{NAMESPACE}::top_k", "(Tensor x, int k) -> (Tensor values, Tensor indices)", tags=(torch.Tag.flexible_layout,)
)


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


def _impl(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check(x, k)
    if x.device.type == "cuda":
        from s2o_inductor.kernels import triton_top_k

        return triton_top_k.top_k(x, k)
    ordered, places = torch.sort(x, dim=-1, descending=True, stable=True)
    return ordered[..., :k].contiguous(), places[..., :k].contiguous()


torch.library.impl(f"{NAMESPACE}::top_k", "CompositeExplicitAutograd", _impl)


@torch.library.register_fake(f"{NAMESPACE}::top_k")
def _fake(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check(x, k)
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.columns = inputs[0].shape[-1]


def _backward(ctx: Any, grad: Tensor, _grad_indices: Tensor | None) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    return grad.new_zeros((*grad.shape[:-1], ctx.columns)).scatter(-1, indices, grad), None


torch.library.register_autograd(f"{NAMESPACE}::top_k", _backward, setup_context=_setup_context)
