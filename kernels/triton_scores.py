"""A product of half precision in float32, no less exact than one of operands that were cast to float32.

Products of two bfloat16 or float16 numbers are exact in float32, so a sum of them on tensor cores has the terms that
the cast operands would have. But tensor cores cut off what a float32 accumulator cannot hold instead of rounding it,
always towards zero, and over the 4,096 terms of a router's scores that adds up to seven times the error of sums in
float32 (rms, H100). So they sum short runs of terms, whose results are added up outside, rounded to nearest: a quarter
of the error of sums in float32.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_inductor.kernels.launching import UNSPECIALIZED, Config, launch
from s2o_inductor.kernels.triton_moe_tiles import Tile

# Steps of tensor cores between two additions in float32.
_RUN = 2
# Programs per multiprocessor up to which sums are cut into parts, so that all work; their parts are added in a second
# launch, which more than 8 of them make slow (H100, 512 columns of 4,096 terms).
_PROGRAMS = 2
_MOST_PARTS = 8


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _scores_kernel(a_ptr, a_steps, b_ptr, b_steps, out_ptr, rows, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
                   PARTS: tl.constexpr, EVEN: tl.constexpr, RUN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr):  # fmt: skip
    """A part of the sums of a tile of a (T, DEPTH) @ b (DEPTH, COLUMNS); EVEN if parts are whole runs."""
    blocks: tl.constexpr = (COLUMNS + BN - 1) // BN
    runs: tl.constexpr = (DEPTH + RUN * BK * PARTS - 1) // (RUN * BK * PARTS)
    # Programs side by side read the same rows of a; b, a router's weights, stays in the L2 cache.
    program = tl.program_id(0)
    part = program // blocks % PARTS
    row = ((program // (blocks * PARTS)).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    column = ((program % blocks).to(tl.int64) * BN + tl.arange(0, BN))[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for run in tl.range(part * runs, part * runs + runs):
        total = tl.zeros((BM, BN), tl.float32)
        for step in tl.static_range(RUN):
            depth = ((run * RUN + step) * BK + tl.arange(0, BK)).to(tl.int64)
            a_mask = (row < rows) & (EVEN | (depth < DEPTH)[None, :])
            b_mask = (column < COLUMNS) & (EVEN | (depth < DEPTH)[:, None])
            a = tl.load(a_ptr + row * a_steps[0] + depth[None, :] * a_steps[1], mask=a_mask, other=0.0)
            b = tl.load(b_ptr + depth[:, None] * b_steps[0] + column * b_steps[1], mask=b_mask, other=0.0)
            total = tl.dot(a, b, total)
        acc += total
    place = out_ptr + (part.to(tl.int64) * rows + row) * COLUMNS + column
    tl.store(place, acc, mask=(row < rows) & (column < COLUMNS))


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """`router_ops.mm_float32` on CUDA.

    Args:
        a: (T, K), bfloat16 or float16, any strides.
        b: (K, N) in the same dtype, any strides.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    if rows * depth * columns == 0:
        return torch.zeros((rows, columns), dtype=torch.float32, device=a.device)
    with torch.cuda.device_of(a):
        tiles = tiles_of(rows)
        parts = parts_of(tiles[0], rows, columns, depth, _processors(a.device))
        out = torch.empty((parts, rows, columns), dtype=torch.float32, device=a.device)

        def arguments(tile: Config) -> dict[str, Any]:
            assert isinstance(tile, Tile)
            return {
                "a_ptr": a, "a_steps": a.stride(), "b_ptr": b, "b_steps": b.stride(), "out_ptr": out, "rows": rows,
                "COLUMNS": columns, "DEPTH": depth, "PARTS": parts, "RUN": _RUN, "BK": tile.depth,
                "EVEN": depth % (_RUN * tile.depth * parts) == 0,
            }  # fmt: skip

        def programs(tile: Config) -> int:
            return int(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.keys) * parts)

        launch(_scores_kernel, tiles, programs, arguments)
        return out[0] if parts == 1 else out.sum(0)


def tiles_of(rows: int) -> list[Tile]:
    """Ways to run so many rows, fastest first."""
    last = Tile(16, 32, 4, 1, depth=32)
    if rows <= 16:
        return [Tile(16, 32, 4, 3, depth=128), last]
    if rows <= 1024:
        return [Tile(64, 64, 4, 3), Tile(64, 64, 4, 1), last]
    return [Tile(128, 128, 8, stages) for stages in (3, 2)] + [Tile(64, 64, 4, 1), last]


def parts_of(tile: Tile, rows: int, columns: int, depth: int, processors: int) -> int:
    """Into how many parts sums are cut so that all multiprocessors work."""
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.keys)
    most = min(_MOST_PARTS, triton.cdiv(depth, _RUN * tile.depth))
    parts = 1
    while 2 * parts <= most and 2 * parts * tiles <= _PROGRAMS * processors and tiles < processors:
        parts *= 2
    return parts


@functools.lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    """Multiprocessors; of a small GPU where there is none and the kernel is interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
