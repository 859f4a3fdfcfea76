"""Groups of like keys in Triton: k-means inside blocks, as `kernels/tail_groups.py` says, one program a block.

A block's keys and values are read a few times and stay in the caches; what is written is small. Sums are in float32,
but centres are rounded to the type of the keys, so a key that lies between two groups may join the other one than in
the reference: either stands for it equally well.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_inductor.kernels.launching import UNSPECIALIZED, Config, block_width, launch
from s2o_inductor.kernels.triton_sparse_tiles import Padding, gather_rows, load_allowed, steps_of
from s2o_inductor.sparse_policy import Geometry

# Rows of a matrix product at least; groups of a block are padded to as many.
LEAST_ROWS = tl.constexpr(16)


@dataclasses.dataclass(frozen=True)
class GroupTable:
    """The groups of all whole blocks of a call, P = blocks x clusters of each key/value head.

    Attributes:
        member: uint8 (B, Hkv, blocks * block), the group of each key within its block.
        counts: uint8 (B, Hkv, blocks, clusters, block / run), visible keys of each group in each run of its block.
        size: int32 (B, Hkv, P), visible keys.
        k: (B, Hkv, P, D), mean keys, of the type of k.
        variance: (B, Hkv, P, D), per channel, bfloat16 beside half precision, which cannot hold it, else float32.
        v: (B, Hkv, P, Dv), mean values, of the type of v.
    """

    member: Tensor
    counts: Tensor
    size: Tensor
    k: Tensor
    variance: Tensor
    v: Tensor

    def arguments(self) -> dict[str, Any]:
        """What every kernel that reads groups takes."""
        return {
            "member_ptr": self.member, "counts_ptr": self.counts, "size_ptr": self.size, "mean_k_ptr": self.k,
            "variance_ptr": self.variance, "mean_v_ptr": self.v, "groups": self.k.shape[2],
            "CLUSTERS": self.counts.shape[3],
        }  # fmt: skip


@triton.jit
def _distance(x, centres, factor):
    """Squared distances (PART, LEAST_ROWS) less what does not depend on the centre, in units of `factor`.

    Centres of the type of x: rounded ones are as good as any, if their norms are rounded with them.
    """
    products = tl.dot(x, centres.T, input_precision="ieee")
    wide = centres.to(tl.float32)
    return (tl.sum(wide * wide, 1)[None, :] - 2.0 * products) * factor


@triton.jit
def _members(k, v, centre_k, centre_v, of_k, of_v, shown, CLUSTERS: tl.constexpr):
    """The nearest group of each key (PART,), and whether a visible key is in a group, (LEAST_ROWS, PART) in {0, 1}."""
    group = tl.arange(0, LEAST_ROWS)
    distance = _distance(k, centre_k, of_k) + _distance(v, centre_v, of_v)
    nearest = tl.argmin(tl.where((group < CLUSTERS)[None, :], distance, float("inf")), 1)
    return nearest, (group[:, None] == nearest[None, :]) & shown[None, :]


@triton.jit
def _factor(total, square, count, width):
    """1 over the mean square of `count` vectors' deviations from their mean, from their sum and sum of squares."""
    count = tl.maximum(count, 1.0)
    spread = (tl.sum(square, 0) - tl.sum(total * total, 0) / count) / (count * width)
    return 1.0 / tl.maximum(spread, 1.1754943508222875e-38)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _groups_kernel(
    k_ptr, k_steps, v_ptr, v_steps, allowed_ptr, before_ptr, member_ptr, counts_ptr, size_ptr, mean_k_ptr,
    variance_ptr, mean_v_ptr, heads, keys, blocks, UNIT: tl.constexpr, RUN: tl.constexpr, ROUNDS: tl.constexpr,
    CLUSTERS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One block of one of `heads` key/value heads, BM keys at a time: registers do not hold it, the caches do."""
    block = tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    batch = bh // heads
    head = bh % heads
    at = tl.arange(0, BM)
    total_k, square_k = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    total_v, square_v = tl.zeros((BLOCK_DV,), tl.float32), tl.zeros((BLOCK_DV,), tl.float32)
    count = tl.sum(total_k, 0)
    for first in tl.range(block * UNIT, block * UNIT + UNIT, BM, num_stages=1):
        shown = load_allowed(allowed_ptr, batch, keys, first + at, first + at < keys, KEYS)
        k = gather_rows(k_ptr, k_steps, batch, head, first + at, shown, True, D, BLOCK_D).to(tl.float32)
        v = gather_rows(v_ptr, v_steps, batch, head, first + at, shown, True, DV, BLOCK_DV).to(tl.float32)
        total_k, square_k = total_k + tl.sum(k, 0), square_k + tl.sum(k * k, 0)
        total_v, square_v = total_v + tl.sum(v, 0), square_v + tl.sum(v * v, 0)
        count += tl.sum(shown.to(tl.float32), 0)
    of_k = _factor(total_k, square_k, count, D)
    of_v = _factor(total_v, square_v, count, DV)

    group = tl.arange(0, LEAST_ROWS)
    exists = group < CLUSTERS
    seed = block * UNIT + (2 * group + 1) * UNIT // (2 * CLUSTERS)
    seeded = load_allowed(allowed_ptr, batch, keys, seed, exists, KEYS)
    centre_k = gather_rows(k_ptr, k_steps, batch, head, seed, seeded, True, D, BLOCK_D)
    centre_v = gather_rows(v_ptr, v_steps, batch, head, seed, seeded, True, DV, BLOCK_DV)
    size = tl.zeros((LEAST_ROWS,), tl.float32)
    for step in tl.range(0, ROUNDS, num_stages=1):
        sums_k = tl.zeros((LEAST_ROWS, BLOCK_D), tl.float32)
        sums_v = tl.zeros((LEAST_ROWS, BLOCK_DV), tl.float32)
        size = tl.zeros((LEAST_ROWS,), tl.float32)
        for first in tl.range(block * UNIT, block * UNIT + UNIT, BM, num_stages=1):
            shown = load_allowed(allowed_ptr, batch, keys, first + at, first + at < keys, KEYS)
            k = gather_rows(k_ptr, k_steps, batch, head, first + at, shown, True, D, BLOCK_D)
            v = gather_rows(v_ptr, v_steps, batch, head, first + at, shown, True, DV, BLOCK_DV)
            nearest, member = _members(k, v, centre_k, centre_v, of_k, of_v, shown, CLUSTERS)
            sums_k = tl.dot(member.to(k.dtype), k, sums_k, input_precision="ieee")
            sums_v = tl.dot(member.to(v.dtype), v, sums_v, input_precision="ieee")
            size += tl.sum(member.to(tl.float32), 1)
            if step == ROUNDS - 1:
                place = bh.to(tl.int64) * blocks * UNIT + first + at
                tl.store(member_ptr + place, nearest.to(tl.uint8))
                of_group = (nearest[:, None] == group[None, :]) & shown[:, None]
                counts = tl.sum(of_group.to(tl.int32).reshape(BM // RUN, RUN, LEAST_ROWS), 1)
                run = first // RUN % (UNIT // RUN) + tl.arange(0, BM // RUN)
                number = (bh.to(tl.int64) * blocks + block) * CLUSTERS + group
                to = counts_ptr + number[None, :] * (UNIT // RUN) + run[:, None]
                tl.store(to, counts.to(tl.uint8), mask=(run >= 0)[:, None] & exists[None, :])
        moved = (size > 0.0)[:, None]
        divisor = tl.maximum(size, 1.0)[:, None]
        keep = moved & (step < ROUNDS - 1)  # after the last round, the means are of its groups, empty ones too
        centre_k = tl.where(keep | (step == ROUNDS - 1), (sums_k / divisor).to(centre_k.dtype), centre_k)
        centre_v = tl.where(keep | (step == ROUNDS - 1), (sums_v / divisor).to(centre_v.dtype), centre_v)

    tl.debug_barrier()  # the members that are read below were written by other threads
    sums = tl.zeros((LEAST_ROWS, BLOCK_D), tl.float32)
    for first in tl.range(block * UNIT, block * UNIT + UNIT, BM, num_stages=1):
        shown = load_allowed(allowed_ptr, batch, keys, first + at, first + at < keys, KEYS)
        k = gather_rows(k_ptr, k_steps, batch, head, first + at, shown, True, D, BLOCK_D)
        nearest = tl.load(member_ptr + bh.to(tl.int64) * blocks * UNIT + first + at).to(tl.int32)
        of_group = (nearest[:, None] == group[None, :]) & shown[:, None]
        apart = k.to(tl.float32) - tl.dot(of_group.to(k.dtype), centre_k, input_precision="ieee")
        square = (apart * apart).to(variance_ptr.dtype.element_ty)
        member = (group[:, None] == nearest[None, :]) & shown[None, :]
        sums = tl.dot(member.to(square.dtype), square, sums, input_precision="ieee")
    variance = (sums / tl.maximum(size, 1.0)[:, None]).to(variance_ptr.dtype.element_ty)
    number = (bh.to(tl.int64) * blocks + block) * CLUSTERS + group
    column = tl.arange(0, BLOCK_D)
    keep = exists[:, None] & (column < D)[None, :]
    tl.store(mean_k_ptr + number[:, None] * D + column, centre_k, mask=keep)
    tl.store(variance_ptr + number[:, None] * D + column, variance, mask=keep)
    column = tl.arange(0, BLOCK_DV)
    tl.store(mean_v_ptr + number[:, None] * DV + column, centre_v, mask=exists[:, None] & (column < DV)[None, :])
    tl.store(size_ptr + number, size.to(tl.int32), mask=exists)


def _configs(dtype: torch.dtype, width: int, geometry: Geometry) -> list[Config]:
    """Ways to run the kernel, fastest first on an H100: how many keys of a block at a time, whole runs."""
    rows, warps = (64, 4) if width <= 128 and dtype != torch.float32 else (32, 8)
    rows = max(min(rows, geometry.block), geometry.run)
    # In float32 ptxas, left to choose, gives them half of the registers that there are.
    most = 255 if dtype == torch.float32 else None
    return [Config(rows, 0, warps, 1, registers=most), Config(max(16, geometry.run), 0, 4, 1)]


def group_keys(k: Tensor, v: Tensor, padding: Padding, geometry: Geometry) -> GroupTable:
    """The groups of a call's keys.

    Args:
        k: (B, Hkv, Sk, D), `aligned`, like v.
        v: (B, Hkv, Sk, Dv).
        padding: of the keys.
        geometry: clusters at least 1.
    """
    batch, heads, length, width = k.shape
    blocks, clusters = length // geometry.block, geometry.clusters
    shape, device = (batch, heads), k.device
    # Triton's interpreter has no products of bfloat16.
    wide = k.dtype == torch.float32 or triton.knobs.runtime.interpret
    table = GroupTable(
        torch.empty((*shape, blocks * geometry.block), dtype=torch.uint8, device=device),
        torch.empty((*shape, blocks, clusters, geometry.block // geometry.run), dtype=torch.uint8, device=device),
        torch.empty((*shape, blocks * clusters), dtype=torch.int32, device=device),
        torch.empty((*shape, blocks * clusters, width), dtype=k.dtype, device=device),
        torch.empty((*shape, blocks * clusters, width), dtype=torch.float32 if wide else torch.bfloat16, device=device),
        torch.empty((*shape, blocks * clusters, v.shape[3]), dtype=v.dtype, device=device),
    )
    if not blocks:
        return table
    fixed = {
        "k_ptr": k, "k_steps": steps_of(k), "v_ptr": v, "v_steps": steps_of(v), "heads": heads, "keys": length,
        "blocks": blocks, "UNIT": geometry.block, "RUN": geometry.run, "ROUNDS": geometry.rounds, "D": width,
        "DV": v.shape[3], "BLOCK_D": block_width(width), "BLOCK_DV": block_width(v.shape[3]),
        **table.arguments(), **padding.arguments(),
    }  # fmt: skip
    configs = _configs(k.dtype, max(width, v.shape[3]), geometry)
    launch(_groups_kernel, configs, lambda _: batch * heads * blocks, lambda _: fixed)
    return table
