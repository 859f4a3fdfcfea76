"""Groups of like keys in Triton: k-means inside blocks, as `kernels/tail_groups.py` says, one program a block.

A block's keys and values are read once where shared memory holds them, else a few times through the caches; what is
written is small. Sums are in float32, but centres are rounded to the type of the keys, so a key that lies between two
groups may join the other one than in the reference: either stands for it equally well.
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
        counts: uint8 (B, Hkv, blocks * block / run, clusters), visible keys of each run in each group of its block.
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

    Centres (width, LEAST_ROWS) of the type of x: rounded ones are as good as any, if their norms are rounded with them.
    """
    products = tl.dot(x, centres, input_precision="ieee")
    wide = centres.to(tl.float32)
    return (tl.sum(wide * wide, 0)[None, :] - 2.0 * products) * factor


@triton.jit
def _nearest(k, v, centre_k, centre_v, of_k, of_v, CLUSTERS: tl.constexpr):
    """The nearest group of each key (PART,)."""
    distance = _distance(k, centre_k, of_k) + _distance(v, centre_v, of_v)
    return tl.argmin(tl.where((tl.arange(0, LEAST_ROWS) < CLUSTERS)[None, :], distance, float("inf")), 1)


@triton.jit
def _factor(total, square, count, width):
    """1 over the mean square of `count` vectors' deviations from their mean, from their sum and sum of squares."""
    count = tl.maximum(count, 1.0)
    spread = (tl.sum(square, 0) - tl.sum(total * total, 0) / count) / (count * width)
    return 1.0 / tl.maximum(spread, 1.1754943508222875e-38)


@triton.jit
def _read_part(
    whole, pointer, steps, allowed_ptr, batch, head, first, keys, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Rows [first, first + BM) of one head, zeros where hidden: `whole`, if that is the block."""
    if BM == UNIT:
        return whole
    else:
        at = first + tl.arange(0, BM)
        shown = load_allowed(allowed_ptr, batch, keys, at, at < keys, KEYS)
        return gather_rows(pointer, steps, batch, head, at, shown, True, WIDTH, BLOCK)


@triton.jit
def _squares_apart(
    k_ptr, k_steps, allowed_ptr, batch, head, start, keys, members, centres, dtype: tl.constexpr, UNIT: tl.constexpr,
    KEYS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """(BLOCK_D, LEAST_ROWS): sums over the keys of each group of squared distances from its centre, by channel."""
    group = tl.arange(0, LEAST_ROWS)
    sums = tl.zeros((BLOCK_D, LEAST_ROWS), tl.float32)
    for first in tl.range(start, start + UNIT, BN, num_stages=1):
        at = first + tl.arange(0, BN)
        shown = load_allowed(allowed_ptr, batch, keys, at, at < keys, KEYS)
        k = gather_rows(k_ptr, k_steps, batch, head, at, shown, True, D, BLOCK_D)
        nearest = tl.load(members + at).to(tl.int32)
        member = (nearest[:, None] == group[None, :]) & shown[:, None]
        apart = k.to(tl.float32) - tl.dot(member.to(k.dtype), centres.T, input_precision="ieee")
        square = (apart * apart).to(dtype)
        sums = tl.dot(square.T, member.to(dtype), sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _groups_kernel(
    k_ptr, k_steps, v_ptr, v_steps, allowed_ptr, before_ptr, member_ptr, counts_ptr, size_ptr, mean_k_ptr,
    variance_ptr, mean_v_ptr, heads, keys, blocks, UNIT: tl.constexpr, RUN: tl.constexpr, ROUNDS: tl.constexpr,
    CLUSTERS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One block of one of `heads` key/value heads, BM keys at a time, BN for the variances.

    A block that shared memory holds, BM = UNIT, is read once for all rounds; the caches hold another's parts.
    """
    block = tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    batch = bh // heads
    head = bh % heads
    start = block * UNIT
    at = tl.arange(0, BM)
    shown = load_allowed(allowed_ptr, batch, keys, start + at, start + at < keys, KEYS)
    whole_k = gather_rows(k_ptr, k_steps, batch, head, start + at, shown, True, D, BLOCK_D)
    whole_v = gather_rows(v_ptr, v_steps, batch, head, start + at, shown, True, DV, BLOCK_DV)
    total_k, square_k = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    total_v, square_v = tl.zeros((BLOCK_DV,), tl.float32), tl.zeros((BLOCK_DV,), tl.float32)
    count = tl.sum(total_k, 0)
    for first in tl.range(start, start + UNIT, BM, num_stages=1):
        shown = load_allowed(allowed_ptr, batch, keys, first + at, first + at < keys, KEYS)
        k = _read_part(whole_k, k_ptr, k_steps, allowed_ptr, batch, head, first, keys, KEYS, D, BLOCK_D, BM, UNIT)
        v = _read_part(whole_v, v_ptr, v_steps, allowed_ptr, batch, head, first, keys, KEYS, DV, BLOCK_DV, BM, UNIT)
        k, v = k.to(tl.float32), v.to(tl.float32)
        total_k, square_k = total_k + tl.sum(k, 0), square_k + tl.sum(k * k, 0)
        total_v, square_v = total_v + tl.sum(v, 0), square_v + tl.sum(v * v, 0)
        count += tl.sum(shown.to(tl.float32), 0)
    of_k = _factor(total_k, square_k, count, D)
    of_v = _factor(total_v, square_v, count, DV)

    # Centres are columns: then both products of a round have enough rows for the largest matrix instructions.
    group = tl.arange(0, LEAST_ROWS)
    exists = group < CLUSTERS
    seed = start + (2 * group + 1) * UNIT // (2 * CLUSTERS)
    seeded = load_allowed(allowed_ptr, batch, keys, seed, exists, KEYS)
    centre_k = gather_rows(k_ptr, k_steps, batch, head, seed, seeded, True, D, BLOCK_D).T
    centre_v = gather_rows(v_ptr, v_steps, batch, head, seed, seeded, True, DV, BLOCK_DV).T
    size = tl.zeros((LEAST_ROWS,), tl.float32)
    members = member_ptr + bh.to(tl.int64) * blocks * UNIT
    for step in tl.range(0, ROUNDS, num_stages=1):
        sums_k = tl.zeros((BLOCK_D, LEAST_ROWS), tl.float32)
        sums_v = tl.zeros((BLOCK_DV, LEAST_ROWS), tl.float32)
        size = tl.zeros((LEAST_ROWS,), tl.float32)
        for first in tl.range(start, start + UNIT, BM, num_stages=1):
            shown = load_allowed(allowed_ptr, batch, keys, first + at, first + at < keys, KEYS)
            k = _read_part(whole_k, k_ptr, k_steps, allowed_ptr, batch, head, first, keys, KEYS, D, BLOCK_D, BM, UNIT)
            v = _read_part(whole_v, v_ptr, v_steps, allowed_ptr, batch, head, first, keys, KEYS, DV, BLOCK_DV, BM, UNIT)
            nearest = _nearest(k, v, centre_k, centre_v, of_k, of_v, CLUSTERS)
            member = (nearest[:, None] == group[None, :]) & shown[:, None]
            sums_k = tl.dot(k.T, member.to(k.dtype), sums_k, input_precision="ieee")
            sums_v = tl.dot(v.T, member.to(v.dtype), sums_v, input_precision="ieee")
            size += tl.sum(member.to(tl.float32), 0)
            if step == ROUNDS - 1:
                tl.store(members + first + at, nearest.to(tl.uint8))
                counts = tl.sum(member.to(tl.int32).reshape(BM // RUN, RUN, LEAST_ROWS), 1)
                run = bh.to(tl.int64) * blocks * (UNIT // RUN) + first // RUN + tl.arange(0, BM // RUN)
                to = counts_ptr + run[:, None] * CLUSTERS + group[None, :]
                tl.store(to, counts.to(tl.uint8), mask=(run >= 0)[:, None] & exists[None, :])
        divisor = tl.maximum(size, 1.0)[None, :]
        # After the last round, the means are of its groups, empty ones too.
        moved = (size > 0.0)[None, :] | (step == ROUNDS - 1)
        centre_k = tl.where(moved, (sums_k / divisor).to(centre_k.dtype), centre_k)
        centre_v = tl.where(moved, (sums_v / divisor).to(centre_v.dtype), centre_v)

    tl.debug_barrier()  # the members that are read below were written by other threads
    sums = _squares_apart(
        k_ptr, k_steps, allowed_ptr, batch, head, start, keys, members, centre_k, variance_ptr.dtype.element_ty,
        UNIT, KEYS, D, BLOCK_D, BN,
    )  # fmt: skip
    variance = (sums / tl.maximum(size, 1.0)[None, :]).to(variance_ptr.dtype.element_ty)
    number = (bh.to(tl.int64) * blocks + block) * CLUSTERS + group
    column = tl.arange(0, BLOCK_D)
    keep = (column < D)[:, None] & exists[None, :]
    tl.store(mean_k_ptr + number[None, :] * D + column[:, None], centre_k, mask=keep)
    tl.store(variance_ptr + number[None, :] * D + column[:, None], variance, mask=keep)
    column = tl.arange(0, BLOCK_DV)
    keep = (column < DV)[:, None] & exists[None, :]
    tl.store(mean_v_ptr + number[None, :] * DV + column[:, None], centre_v, mask=keep)
    tl.store(size_ptr + number, size.to(tl.int32), mask=exists)


def configs(dtype: torch.dtype, widths: tuple[int, int], geometry: Geometry) -> list[Config]:
    """Ways to run the kernel: keys of a block at a time, whole runs, and the same when variances are made.

    Products of 64 rows and LEAST_ROWS columns get four warps. For eight, Triton 3.6 emits Hopper's matrix instruction
    of 8 columns on a layout swizzled in 16s, and only calls compiled so ranked wrongly or faulted on an H100.

    Args:
        dtype: of keys and values.
        widths: of keys and of values.
        geometry: sizes.
    """
    least = max(16, geometry.run)
    wide = dtype == torch.float32 or max(widths) > 128
    rows = max(least, min(32, geometry.block)) if wide else min(128, geometry.block)
    sizes = {rows, *map(block_width, widths)}
    warps = 4 if dtype != torch.float32 and sizes & {16, 64} else 8
    small = [Config(rows, rows, warps, 1), Config(least, least, 4, 1)]
    return small if wide else [Config(geometry.block, max(least, min(64, geometry.block)), warps, 1), *small]


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
        torch.empty((*shape, blocks * geometry.block // geometry.run, clusters), dtype=torch.uint8, device=device),
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
    ways = configs(k.dtype, (width, v.shape[3]), geometry)
    launch(_groups_kernel, ways, lambda _: batch * heads * blocks, lambda _: fixed)
    return table
