"""The largest numbers of each row and where they stand, in one launch; see `s2o_inductor/router_ops.py`.

torch selects by radix in several passes over the rows and then sorts what it found. Rows of scores are short, a
router's have one number per expert: they are read once and stay in registers.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_inductor.kernels.launching import UNSPECIALIZED, Config, ceil_div, launch, power_of_2

# Rows from which on each has a warp, which exchanges numbers without a barrier; fewer get four, for their latency.
_MANY_ROWS = 1024
# Numbers that a program of one warp holds: 64 bits of each, 16 to a thread.
_NUMBERS = 512


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _top_k_kernel(x_ptr, x_steps, values_ptr, indices_ptr, rows, COLUMNS: tl.constexpr, CHOICES: tl.constexpr,
                  ROOM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """CHOICES of BN columns, of which the first COLUMNS exist, for BM rows; ROOM is a power of two from CHOICES on."""
    row = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    column = tl.arange(0, BN)[None, :]
    start = x_ptr + row * x_steps[0]
    x = tl.load(start + column.to(tl.int64) * x_steps[1], mask=(row < rows) & (column < COLUMNS), other=0.0)
    x = x.to(tl.float32)
    # As integers floats are in order, negative ones backwards. Both zeros are equal, and NaN is above infinity.
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    order = tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    # Below, the earlier of equal numbers is the larger one. Nothing is smaller than a column that does not exist.
    key = (tl.where(column < COLUMNS, order, -0x80000000).to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
    best = tl.topk(key, ROOM)
    found = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    choice = tl.arange(0, ROOM)[None, :]
    wanted = (row < rows) & (choice < CHOICES)
    # Read again rather than taken from the key: the bits of NaN and of the sign of zero are those of x.
    value = tl.load(start + found * x_steps[1], mask=wanted)
    place = row * CHOICES + choice
    tl.store(values_ptr + place, value, mask=wanted)
    tl.store(indices_ptr + place, found, mask=wanted)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`router_ops.top_k` on CUDA.

    Args:
        x: (..., n), float32, bfloat16 or float16, any strides; n is at most `router_ops.MAX_COLUMNS`.
        k: from 1 to n, at most `router_ops.MAX_CHOICES`.
    """
    shape = (*x.shape[:-1], k)
    values, indices = x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)
    if values.numel() == 0:
        return values, indices
    columns = x.shape[-1]
    flat = x if x.dim() == 2 else x.reshape(-1, columns)
    with torch.cuda.device_of(x):
        launch(
            _top_k_kernel, [config_of(flat.shape[0], columns)], lambda config: ceil_div(flat.shape[0], config.rows),
            lambda _: {
                "x_ptr": flat, "x_steps": flat.stride(), "values_ptr": values, "indices_ptr": indices,
                "rows": flat.shape[0], "COLUMNS": columns, "CHOICES": k, "ROOM": max(2, power_of_2(k)),
            },
        )  # fmt: skip
    return values, indices


@functools.lru_cache(maxsize=1024)
def config_of(rows: int, columns: int) -> Config:
    """How rows of so many columns are shared out."""
    block = max(2, power_of_2(columns))
    if rows < _MANY_ROWS:
        return Config(1, block, 4 if block >= 128 else 1, 1)
    return Config(max(1, _NUMBERS // block), block, 1, 1)
