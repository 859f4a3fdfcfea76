"""Operands as kernels, torch's and ours, can read them."""

from __future__ import annotations

import torch
from torch import Tensor


def aligned(x: Tensor) -> Tensor:
    """x, 4-D, itself, or a copy, with rows of unit stride that start at multiples of 16 bytes.

    That is what the bulk copy engine of Hopper and torch's fused kernels read. Strides of dimensions of
    size one, which mean nothing, are set right as well.
    """
    unit = 16 // x.element_size()
    a, b, c, d = x.stride()
    if d == 1 and a and b and c and not (a % unit or b % unit or c % unit or x.data_ptr() % 16):
        return x
    strides = [16 if n == 1 else s for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)]
    if (d == 1 or x.shape[3] == 1) and all(s and not s % unit for s in strides) and not x.data_ptr() % 16:
        return x.as_strided(x.shape, [*strides, 1])
    room = -(-x.shape[3] // unit) * unit
    copy = torch.empty((x.shape[0], x.shape[2], x.shape[1], room), dtype=x.dtype, device=x.device)
    return copy[..., : x.shape[3]].transpose(1, 2).copy_(x)


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """(q', scale', sign) with the same scores, q' = sign * q and scale' > 0: kernels mask and take maxima unscaled."""
    if scale > 0.0:
        return q, scale, 1.0
    return (-q, -scale, -1.0) if scale < 0.0 else (torch.zeros_like(q), 1.0, 0.0)
