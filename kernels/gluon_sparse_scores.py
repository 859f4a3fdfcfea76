"""`triton_sparse_scores.scores_kernel` of float8 keys for Hopper in Gluon: less around each exponential.

In Triton's kernel a warp issues 7 instructions for one exponential, and programs of 128 registers stop seven times a
step for what goes through shared memory. Here it is 4. What products with one-hot vectors take is made once for a
program and stays in shared memory; the vectors are made in the registers in which the tensor cores read them; signs
are dropped by the addition itself; and bins are stored from where they are. Four programs share a multiprocessor, whose
special function units are then at work most of the time: one program's exponentials run under another's products.
Products under the exponentials of the same program were no faster, as they leave registers for three (BENCHMARKS.md).
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from s2o_inductor.kernels.launching import UNSPECIALIZED
from s2o_inductor.kernels.primitives import LEAST_SCORE, LN_2, LOG2_E
from s2o_inductor.kernels.triton_sparse_scores import SPAN_GROUPS, columns, head, sums_by_tile
from s2o_inductor.kernels.triton_sparse_table import bins_of
from s2o_inductor.kernels.triton_sparse_tiles import tile_keys

# A bulk load has one name in Triton 3.6 and another in 3.9.
_fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# Groups of a block, and blocks of a program.
CLUSTERS = gl.constexpr(8)
_BLOCKS = gl.constexpr(SPAN_GROUPS // CLUSTERS)
# Columns of one-hot vectors, as many as a product has at least: two terms for each group, four for each block.
_DEPTH = gl.constexpr(2 * CLUSTERS)
_TERMS = gl.constexpr(_DEPTH // _BLOCKS)


@gluon.jit
def _rows(pointer, row, inside, D: gl.constexpr, LOAD: gl.constexpr):
    """Rows (.., D) of a contiguous matrix, zero where not inside."""
    column = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, LOAD)), 0)
    place = pointer + gl.expand_dims(row, 1) * D + column
    return gl.load(place, mask=gl.expand_dims(inside, 1), other=0.0)


@gluon.jit
def _places(column, kv_bh, first, tiles, MEANS: gl.constexpr, GROUPED: gl.constexpr):
    """Places of the representatives of tiles from `first` on that are columns of a product, and whether they exist."""
    tile, mean = columns(column, GROUPED, MEANS)
    return (kv_bh.to(gl.int64) * tiles + first + tile) * MEANS + mean, first + tile < tiles


@gluon.jit
def _fill_terms(
    origins, shares, means_ptr, shift_ptr, mean_k, variance, kv_bh, first, tiles, limit, START: gl.constexpr,
    ROWS: gl.constexpr, MEANS: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """Rows [START, START + ROWS) of the operands of products with one-hot vectors.

    `shares` (_BLOCKS, representatives, _DEPTH) are minus the shares of each block's groups, in two terms each, and
    `origins` (representatives, _DEPTH) what the centre of each block adds to scores less the shift, in three and 0.
    """
    TYPE: gl.constexpr = variance.dtype
    GROUPS: gl.constexpr = mean_k.shape[0]
    OF_GROUPS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, GROUPS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OF_GROUPS, 2)
    column = START + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OPERAND))
    place, there = _places(column, kv_bh, first, tiles, MEANS, GROUPED)
    means = _rows(means_ptr, place, there, mean_k.shape[1], OPERAND)
    nothing = gl.zeros([ROWS, GROUPS], gl.float32, layout=OF_GROUPS)
    of_means = warpgroup_mma(means, mean_k.permute((1, 0)), nothing, use_acc=False, is_async=True)
    of_means = warpgroup_mma_wait(0, deps=[of_means])
    wide = means.to(gl.float32)
    squares = (wide * wide * (0.5 * LN_2)).to(TYPE)
    spread = warpgroup_mma(squares, variance.permute((1, 0)), nothing, use_acc=False, is_async=True)
    spread = warpgroup_mma_wait(0, deps=[spread])
    column = START + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OF_GROUPS))
    place, there = _places(column, kv_bh, first, tiles, MEANS, GROUPED)
    shift = gl.load(shift_ptr + place, mask=there, other=float("inf"))
    of_means = of_means - gl.expand_dims(shift, 1)
    minus_shares = -gl.exp2(of_means + gl.minimum(spread, limit * LOG2_E))
    group = gl.expand_dims(gl.arange(0, GROUPS, layout=gl.SliceLayout(0, OF_GROUPS)), 0)
    for block in gl.static_range(_BLOCKS):
        # Selected, not multiplied: a NaN in the groups of one block reaches no other's keys.
        here = gl.where(group // CLUSTERS == block, minus_shares, 0.0)
        here = gl.sum(gl.reshape(here, [ROWS, _BLOCKS, CLUSTERS]), 1)
        greatest = head(here)
        terms = gl.reshape(gl.join(greatest, head(here - greatest)), [ROWS, _DEPTH])
        shares.index(block).slice(START, ROWS).store(terms.to(TYPE))
    # A maximum drops NaN, which times 0 would reach the keys of other blocks; those of its own are NaN themselves.
    of_centres = gl.sum(gl.reshape(of_means, [ROWS, _BLOCKS, CLUSTERS]), 2) / CLUSTERS
    of_centres = gl.maximum(of_centres, LEAST_SCORE)
    greatest = head(of_centres)
    second = head(of_centres - greatest)
    third = of_centres - greatest - second
    terms = gl.join(gl.join(greatest, third), gl.join(second, third * 0.0))
    origins.slice(START, ROWS).store(gl.reshape(terms, [ROWS, _DEPTH]).to(TYPE))


@gluon.jit
def _load_keys(k_tiles, row, step, steps, k_ring, full):
    """Starts the bulk load of the keys of a step, if there is one."""
    there = step < steps
    slot = step % k_ring.shape[0]
    BYTES: gl.constexpr = k_ring.shape[1] * k_ring.shape[2]
    mbarrier.expect(full.index(slot), BYTES, pred=there)
    _fetch(k_tiles, [row + step * k_ring.shape[1], 0], full.index(slot), k_ring.index(slot), pred=there)


@gluon.jit
def _store_bins(
    apart, bins_ptr, at, end, first, kv_bh, queries, keys, window, sink, first_tile, tile0, count, base, room,
    TILE: gl.constexpr, UNIT: gl.constexpr, RUN: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr,
    MEANS: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """Stores the bins of the runs of the keys from `at` on: how far each key is from its group, (keys, columns)."""
    # A modifier of the instruction that adds; `abs` would be one of its own.
    apart = gl.inline_asm_elementwise("abs.f32 $0, $1;", "=f,f", [apart], gl.float32, True, 1)
    of_keys = sums_by_tile(apart, GROUPED, MEANS)
    bins = bins_of(gl.max(gl.reshape(of_keys, [apart.shape[0] // RUN, RUN, GROUPED]), 1))
    KEPT: gl.constexpr = bins.type.layout
    tile = first + gl.arange(0, GROUPED, layout=gl.SliceLayout(0, KEPT))
    _, _, low, high = tile_keys(first_tile + tile, queries, keys, window, sink, TILE, UNIT, CAUSAL, WINDOWED)
    high = gl.minimum(gl.where(tile < tile0 + count, high, low), end)
    run = gl.expand_dims(at // RUN + gl.arange(0, bins.shape[0], layout=gl.SliceLayout(1, KEPT)), 1)
    inside = (run * RUN >= gl.expand_dims(low, 0)) & (run * RUN < gl.expand_dims(high, 0))
    to = bins_ptr + (kv_bh.to(gl.int64) * count + tile - tile0) * room - base // RUN
    gl.store(gl.expand_dims(to, 0) + run, bins.to(gl.uint8), mask=inside)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def scores_kernel(
    means_ptr, rounded_means_ptr, shift_ptr, k_tiles, mean_k_ptr, variance_ptr, member_ptr, bins_ptr, heads, group,
    queries, keys, window, sink, first_tile, tiles, tile0, count, base, room, blocks, groups, limit, D: gl.constexpr,
    TILE: gl.constexpr, UNIT: gl.constexpr, RUN: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr,
    MEANS: gl.constexpr, GROUPED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Bins as `triton_sparse_scores.scores_kernel` stores them, without padding or documents.

    `k_tiles` is `hopper_sparse.rows_of` the keys that `rounded_keys_kernel` left, of which STAGES tiles are in flight.
    """
    WARPS: gl.constexpr = gl.num_warps()
    SPAN: gl.constexpr = UNIT * _BLOCKS
    TYPE: gl.constexpr = variance_ptr.dtype.element_ty
    KIND: gl.constexpr = mean_k_ptr.dtype.element_ty
    FLOAT8: gl.constexpr = rounded_means_ptr.dtype.element_ty
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    LOAD8: gl.constexpr = gl.BlockedLayout([1, 16], [512 // D, D // 16], [WARPS, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    # Both say which registers hold what, and the same: but a product of float8 numbers is twice as deep.
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 32])
    OF_TERMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    ONE_HOT: gl.constexpr = gl.DotOperandLayout(0, OF_TERMS, 2)
    K_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], FLOAT8)
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SPAN_GROUPS, D], KIND)
    TERMS_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, _DEPTH], TYPE)

    spans = gl.cdiv(room * RUN, SPAN)
    start = base + gl.program_id(0) % spans * SPAN
    parts = gl.cdiv(count, GROUPED)
    first = tile0 + gl.program_id(0) // spans % parts * GROUPED
    kv_bh = gl.program_id(0) // spans // parts
    tile = first + gl.arange(0, GROUPED, layout=LINE)
    _, _, low, high = tile_keys(first_tile + tile, queries, keys, window, sink, TILE, UNIT, CAUSAL, WINDOWED)
    high = gl.where(tile < tile0 + count, high, low)
    used = high > low
    begin = gl.maximum(start, gl.min(gl.where(used, low, keys), 0))
    end = gl.minimum(start + SPAN, gl.max(gl.where(used, high, 0), 0))
    if begin >= end:  # half of the programs of a causal call
        return
    steps = (end - begin) // BN
    k_ring = gl.allocate_shared_memory(FLOAT8, [STAGES, BN, D], K_SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
    fence_async_shared()
    row = kv_bh * blocks * UNIT + begin
    for ahead in gl.static_range(STAGES):
        _load_keys(k_tiles, row, ahead, steps, k_ring, full)

    number = start // UNIT * CLUSTERS + gl.arange(0, SPAN_GROUPS, layout=gl.SliceLayout(1, LOAD))
    place = kv_bh.to(gl.int64) * groups + number
    there = number < groups
    mean_k = gl.allocate_shared_memory(KIND, [SPAN_GROUPS, D], SHARED, _rows(mean_k_ptr, place, there, D, LOAD))
    variance = gl.allocate_shared_memory(TYPE, [SPAN_GROUPS, D], SHARED, _rows(variance_ptr, place, there, D, LOAD))
    origins = gl.allocate_shared_memory(TYPE, [BM, _DEPTH], TERMS_SHARED)
    shares = gl.allocate_shared_memory(TYPE, [_BLOCKS, BM, _DEPTH], TERMS_SHARED)
    fence_async_shared()
    for part in gl.static_range(BM // (16 * WARPS)):  # the registers hold no more representatives at a time
        _fill_terms(
            origins, shares, means_ptr, shift_ptr, mean_k, variance, kv_bh, first, tiles, limit, part * 16 * WARPS,
            16 * WARPS, MEANS, GROUPED,
        )  # fmt: skip
    column = gl.arange(0, BM, layout=gl.SliceLayout(1, LOAD8))
    place, there = _places(column, kv_bh, first, tiles, MEANS, GROUPED)
    loaded = _rows(rounded_means_ptr, place, there, D, LOAD8)
    rounded = gl.allocate_shared_memory(FLOAT8, [BM, D], K_SHARED, loaded)
    fence_async_shared()

    term = gl.expand_dims(gl.arange(0, _DEPTH, layout=gl.SliceLayout(0, ONE_HOT)), 0)
    of_step = gl.arange(0, BN, layout=gl.SliceLayout(1, ONE_HOT))
    members = member_ptr + kv_bh.to(gl.int64) * blocks * UNIT
    member = gl.load(members + begin + of_step)
    empty = gl.zeros([BN, BM], gl.float32, layout=OF_TERMS)
    for step in range(steps):
        at = begin + step * BN
        block = (at - start) // UNIT
        of_block = gl.where(term // _TERMS == block, 1.0, 0.0).to(TYPE).broadcast_to(BN, _DEPTH)
        of_group = gl.where(term // 2 == gl.expand_dims(member.to(gl.int32), 1), 1.0, 0.0).to(TYPE)
        member = gl.load(members + gl.minimum(at + BN, end - BN) + of_step)  # a step ahead: nothing waits for it
        origin = warpgroup_mma(of_block, origins.permute((1, 0)), empty, use_acc=False, is_async=True)
        mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
        origin = gl.convert_layout(warpgroup_mma_wait(0, deps=[origin]), SCORES, assert_trivial=True)
        scores = warpgroup_mma(k_ring.index(step % STAGES), rounded.permute((1, 0)), origin, is_async=True)
        of_keys = gl.exp2(warpgroup_mma_wait(0, deps=[scores]))
        of_keys = gl.convert_layout(of_keys, OF_TERMS, assert_trivial=True)
        apart = warpgroup_mma(of_group, shares.index(block).permute((1, 0)), of_keys, is_async=True)
        _load_keys(k_tiles, row, step + STAGES, steps, k_ring, full)
        apart = warpgroup_mma_wait(0, deps=[apart])
        _store_bins(
            apart, bins_ptr, at, end, first, kv_bh, queries, keys, window, sink, first_tile, tile0, count, base, room,
            TILE, UNIT, RUN, CAUSAL, WINDOWED, MEANS, GROUPED,
        )  # fmt: skip
