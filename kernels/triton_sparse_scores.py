"""How far keys are from their groups, in Triton: the products that `triton_sparse_order.py` ranks keys by.

Keys are rows of the products and representatives their columns. Nearly all time goes into `scores_kernel`, and there
into products, exponentials and what surrounds them, so tensor cores do what else they can, and products with keys are
of float8 numbers where the device multiplies them at twice the rate. An order does not ask for more: a product of
128 channels with two rounded factors each moves by a tenth of a factor of two, and bins are an eighth wide. What all
keys of a block have in common would make most of that error where projections have a bias, and tells none of them
apart, so it is taken out of what is rounded and added exactly.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from s2o_inductor.kernels.launching import UNSPECIALIZED
from s2o_inductor.kernels.primitives import LEAST_SCORE, LN_2, LOG2_E, load_tile
from s2o_inductor.kernels.triton_sparse_groups import LEAST_ROWS
from s2o_inductor.kernels.triton_sparse_table import HIDDEN_BIN, bins_of
from s2o_inductor.kernels.triton_sparse_tiles import gather_rows, load_allowed, packed_keys, tile_keys

# Groups of the blocks that one program scores.
SPAN_GROUPS = tl.constexpr(32)
# Keys in float8 are divided by this and representatives multiplied: those of queries and keys of a standard deviation
# around 1, with the usual scale, then both lie near 1/2, 30 times e4m3's least normal number and a thousandth of its
# largest. A larger one counts as that.
KEY_UNIT = tl.constexpr(4.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def representatives_kernel(
    q_ptr, q_steps, means_ptr, rounded_means_ptr, heads, group, queries, keys, first_tile, tiles, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr, MEANS: tl.constexpr,
    ROUNDS: tl.constexpr, FLOAT8: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Mean queries of one query head and tile: rows [member * SUB, (member + 1) * SUB) of means (.., MEANS, D).

    Of equal parts of its queries, BM of them at a time, and then ROUNDS times of those nearest to each mean; distances
    are from means rounded to the type of the queries. They come times scale * log2(e), so that their products with keys
    are scores in base 2. A tile of fewer than SUB queries has fewer parts; rows without one are zero. With FLOAT8 they
    come a second time in float8, times KEY_UNIT.
    """
    CENTRES: tl.constexpr = SUB if SUB > LEAST_ROWS else LEAST_ROWS
    members = MEANS // SUB
    member = tl.program_id(0) % members
    row = tl.program_id(0) // members
    tile = row % tiles
    kv_head = row // tiles % (heads // group)
    batch = row // tiles // (heads // group)
    start = tl.maximum((first_tile + tile) * TILE, keys - queries)
    size = tl.minimum((first_tile + tile + 1) * TILE, keys) - start
    parts = tl.minimum(SUB, size)
    each, more = size // parts, size % parts  # as torch's tensor_split: the first parts take one query more
    head = kv_head * group + member
    from_query = start - (keys - queries)
    size = tl.where(member < group, size, 0)
    at = tl.arange(0, BM)
    q = gather_rows(q_ptr, q_steps, batch, head, from_query + at, at < size, True, D, BLOCK_D)
    # Centres are columns: the products of either kind have the queries' rows or channels, many, as rows.
    centre = tl.arange(0, CENTRES)
    means = tl.zeros((BLOCK_D, CENTRES), tl.float32)
    for step in tl.range(0, ROUNDS + 1, num_stages=1):
        rounded = means.to(q_ptr.dtype.element_ty)
        wide = rounded.to(tl.float32)
        square = tl.where(centre < parts, tl.sum(wide * wide, 0), float("inf"))
        sums = tl.zeros((BLOCK_D, CENTRES), tl.float32)
        count = tl.zeros((CENTRES,), tl.int32)
        for first in tl.range(0, TILE, BM, num_stages=1):
            at = first + tl.arange(0, BM)
            if BM < TILE:  # else they stay where they are
                q = gather_rows(q_ptr, q_steps, batch, head, from_query + at, at < size, True, D, BLOCK_D)
            if step == 0:
                longer = more * (each + 1)
                nearest = tl.where(at < longer, at // (each + 1), more + (at - longer) // each)
            else:
                nearest = tl.argmin(square[None, :] - 2.0 * tl.dot(q, rounded, input_precision="ieee"), 1)
            near = (nearest[:, None] == centre[None, :]) & (at < size)[:, None]
            sums = tl.dot(q.T, near.to(q.dtype), sums, input_precision="ieee")
            count += tl.sum(near.to(tl.int32), 0)
        means = tl.where((count > 0)[None, :], sums / tl.maximum(count, 1).to(tl.float32)[None, :], means)
    scale2 = tl.cast(scale, tl.float32) * LOG2_E
    column = tl.arange(0, BLOCK_D)
    to = (row.to(tl.int64) * MEANS + member * SUB + centre)[None, :] * D + column[:, None]
    mean = tl.where((centre < parts)[None, :], means * scale2, 0.0)
    keep = (centre < SUB)[None, :] & (column < D)[:, None]
    tl.store(means_ptr + to, mean.to(means_ptr.dtype.element_ty), mask=keep)
    if FLOAT8:
        tl.store(rounded_means_ptr + to, (mean * KEY_UNIT).to(rounded_means_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rounded_keys_kernel(
    k_ptr, k_steps, mean_k_ptr, rounded_k_ptr, heads, group, blocks, UNIT: tl.constexpr, CLUSTERS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Keys less the centre of their block, the mean of its groups' means, over KEY_UNIT in float8; one block, BM keys
    at a time. Rows of `rounded_k_ptr` (B, Hkv, blocks * UNIT, D) follow each other."""
    block = tl.program_id(0) % blocks
    kv_bh = tl.program_id(0) // blocks
    kv_heads = heads // group
    column = tl.arange(0, BLOCK_D)
    of_block = (kv_bh.to(tl.int64) * blocks + block) * CLUSTERS + tl.arange(0, CLUSTERS)
    means = tl.load(mean_k_ptr + of_block[:, None] * D + column[None, :], mask=(column < D)[None, :], other=0.0)
    centre = tl.sum(means.to(tl.float32), 0) / CLUSTERS
    for first in tl.range(block * UNIT, block * UNIT + UNIT, BM, num_stages=1):
        at = first + tl.arange(0, BM)
        k = gather_rows(k_ptr, k_steps, kv_bh // kv_heads, kv_bh % kv_heads, at, at >= 0, False, D, BLOCK_D)
        k = (k.to(tl.float32) - centre[None, :]) / KEY_UNIT
        to = rounded_k_ptr + (kv_bh.to(tl.int64) * blocks * UNIT + at)[:, None] * D + column[None, :]
        tl.store(to, k.to(rounded_k_ptr.dtype.element_ty), mask=(at >= 0)[:, None] & (column < D)[None, :])


@triton.jit
def _load_means(means_ptr, kv_bh, tile, mean, tiles, MEANS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Representatives (rows, BLOCK_D): number `mean` of tile `tile`, zero beyond the last tile."""
    column = tl.arange(0, BLOCK_D)
    row = (kv_bh.to(tl.int64) * tiles + tile) * MEANS + mean
    inside = (tile < tiles)[:, None] & (column < D)[None, :]
    return tl.load(means_ptr + row[:, None] * D + column[None, :], mask=inside, other=0.0)


@triton.jit
def _group_scores(
    means, squares, kv_bh, number, there, groups, mean_k_ptr, variance_ptr, limit, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Base-2 scores (BM, groups) of a key of each group: its mean's; with what its spread adds, to second order."""
    steps = (groups.to(tl.int64) * D, 0, D)
    k = gather_rows(mean_k_ptr, steps, kv_bh, kv_bh * 0, number, there, True, D, BLOCK_D)
    variance = gather_rows(variance_ptr, steps, kv_bh, kv_bh * 0, number, there, True, D, BLOCK_D)
    spread = tl.dot(squares, variance.T, input_precision=PRECISION)
    of_means = tl.dot(means, k.T, input_precision="ieee")
    return of_means, of_means + tl.minimum(spread, limit * LOG2_E)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def masses_kernel(
    means_ptr, mean_k_ptr, variance_ptr, size_ptr, shift_ptr, documents_ptr, heads, group, queries, keys, window, sink,
    first_tile, tiles, groups, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    UNIT: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr, SUB: tl.constexpr,
    MEANS: tl.constexpr, GROUPED: tl.constexpr, CLUSTERS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """What to subtract from base-2 scores of the representatives of GROUPED tiles: exp2 is then a share of the mean.

    log2 of the mass of their prefix and of the number of representatives; +inf for rows that are none.
    """
    kv_total = tl.num_programs(0) // tl.cdiv(tiles, GROUPED)
    kv_bh = tl.program_id(0) % kv_total
    first = (tl.cdiv(tiles, GROUPED) - 1 - tl.program_id(0) // kv_total) * GROUPED  # late tiles are the longest
    row = tl.arange(0, BM)
    tile = first + row // MEANS
    mean = row % MEANS
    start, stop, low, high = tile_keys(first_tile + tile, queries, keys, window, sink, TILE, UNIT, CAUSAL, WINDOWED)
    low, high = packed_keys(documents_ptr, kv_bh // (heads // group), tile, tiles, low, high, PACKED)
    there = tile < tiles
    parts = tl.minimum(stop - start, SUB)
    counts = there & (mean < group * SUB) & (mean % SUB < parts)
    low = low // UNIT * CLUSTERS
    high = tl.where(there, high // UNIT * CLUSTERS, low)
    used = high > low
    means = _load_means(means_ptr, kv_bh, tile, mean, tiles, MEANS, D, BLOCK_D)
    squares = _squares(means, variance_ptr)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for begin in tl.range(tl.min(tl.where(used, low, groups)), tl.max(tl.where(used, high, 0)), BN):
        number = begin + tl.arange(0, BN)
        size = tl.load(size_ptr + kv_bh.to(tl.int64) * groups + number, mask=number < groups, other=0)
        _, scores = _group_scores(
            means, squares, kv_bh, number, number < groups, groups, mean_k_ptr, variance_ptr, limit,
            PRECISION, D, BLOCK_D,
        )  # fmt: skip
        inside = (number[None, :] >= low[:, None]) & (number[None, :] < high[:, None]) & (size > 0)[None, :]
        scores = tl.where(inside, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        # Of its mean key, times its size: that needs no logarithm of the size.
        mass = tl.exp2(scores - origin[:, None]) * size.to(tl.float32)[None, :]
        total = total * tl.exp2(peak - origin) + tl.sum(mass, 1)
        peak = new_peak
    representatives = tl.maximum(group * parts, 1).to(tl.float32)
    shift = peak + tl.log2(tl.where(total > 0.0, total, 1.0)) + tl.log2(representatives)
    to = shift_ptr + (kv_bh.to(tl.int64) * tiles + tile) * MEANS + mean
    tl.store(to, tl.where(counts & (total > 0.0), shift, float("inf")), mask=there)


@triton.jit
def _squares(means, variance_ptr):
    """Squares of representatives in the type of the variances, by which a spread is a sum of products, in base 2."""
    wide = means.to(tl.float32)
    return (wide * wide * (0.5 * LN_2)).to(variance_ptr.dtype.element_ty)


@triton.jit
def _term(x, number):
    """Term `number` of float32 x as an exact sum of three numbers that bfloat16 holds, 0 from the third on."""
    first = head(x)
    second = head(x - first)
    third = x - first - second
    return tl.where(number == 0, first, tl.where(number == 1, second, tl.where(number == 2, third, 0.0)))


@triton.jit
def head(x):
    """x without the bits that bfloat16 has no room for: cheaper than to round it."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def scores_kernel(
    means_ptr, rounded_means_ptr, shift_ptr, k_tiles, mean_k_ptr, variance_ptr, member_ptr, allowed_ptr, documents_ptr,
    bins_ptr, heads, group, queries, keys, window, sink, first_tile, tiles, tile0, count, base, room, blocks, groups,
    limit, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, RUN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr, MEANS: tl.constexpr,
    GROUPED: tl.constexpr, CLUSTERS: tl.constexpr, PRECISION: tl.constexpr, FLOAT8: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Bins (rows, room) of the runs of `SPAN_GROUPS` groups' blocks for GROUPED of the tiles [tile0, tile0 + count).

    Tensor cores do what they can beside the products: an accumulator begins at minus the shift, and when its
    exponential is taken, minus the share of each key's group is added, as a product of the key's one-hot vector. Sums
    over representatives stay in a thread: keys are rows, representatives columns in the order of `columns`.

    With FLOAT8, `k_tiles` are `rounded_keys_kernel`'s, and an accumulator begins at what the centre of the block adds,
    too: the products of its groups' means are needed anyway.
    """
    SPAN: tl.constexpr = UNIT * (SPAN_GROUPS // CLUSTERS)
    spans = tl.cdiv(room * RUN, SPAN)
    start = base + tl.program_id(0) % spans * SPAN
    parts = tl.cdiv(count, GROUPED)
    first = tile0 + tl.program_id(0) // spans % parts * GROUPED
    kv_bh = tl.program_id(0) // spans // parts
    tile = first + tl.arange(0, GROUPED)
    _, _, low, high = tile_keys(first_tile + tile, queries, keys, window, sink, TILE, UNIT, CAUSAL, WINDOWED)
    low, high = packed_keys(documents_ptr, kv_bh // (heads // group), tile, tiles, low, high, PACKED)
    high = tl.where(tile < tile0 + count, high, low)
    used = high > low
    begin = tl.maximum(start, tl.min(tl.where(used, low, keys)))
    end = tl.minimum(start + SPAN, tl.max(tl.where(used, high, 0)))
    if begin >= end:  # half of the programs of a causal call
        return
    TYPE: tl.constexpr = variance_ptr.dtype.element_ty
    of_column, mean = columns(tl.arange(0, BM), GROUPED, MEANS)
    means = _load_means(means_ptr, kv_bh, first + of_column, mean, tiles, MEANS, D, BLOCK_D)
    place = (kv_bh.to(tl.int64) * tiles + first + of_column) * MEANS + mean
    shift = tl.load(shift_ptr + place, mask=first + of_column < tiles, other=float("inf"))
    of_span = tl.arange(0, SPAN_GROUPS)
    number = start // UNIT * CLUSTERS + of_span
    of_means, scores = _group_scores(
        means, _squares(means, variance_ptr), kv_bh, number, number < groups, groups, mean_k_ptr, variance_ptr, limit,
        PRECISION, D, BLOCK_D,
    )  # fmt: skip
    minus_shares = -tl.exp2(scores - shift[:, None])
    BLOCKS: tl.constexpr = SPAN_GROUPS // CLUSTERS
    TERMS: tl.constexpr = LEAST_ROWS // BLOCKS if LEAST_ROWS > 2 * BLOCKS else 2
    term = tl.arange(0, TERMS * BLOCKS)[None, :]
    if FLOAT8:
        of_centres = tl.sum(of_means.reshape(BM, BLOCKS, CLUSTERS), 2) / CLUSTERS
        # A maximum drops NaN, which times 0 would reach the keys of other blocks; those of its own are NaN themselves.
        of_centres = tl.maximum(of_centres - shift[:, None], LEAST_SCORE)
        of_centres = of_centres[:, None, :].broadcast_to(BM, TERMS, BLOCKS).reshape(BM, TERMS * BLOCKS)
        origins = _term(of_centres, term // BLOCKS).to(TYPE)
        means = _load_means(rounded_means_ptr, kv_bh, first + of_column, mean, tiles, MEANS, D, BLOCK_D)
    else:
        term = tl.arange(0, LEAST_ROWS)[None, :]
        origins = _term(tl.maximum(-shift, LEAST_SCORE)[:, None], term).to(TYPE)
        ones = tl.full((BN, LEAST_ROWS), 1.0, TYPE)
    NEAR: tl.constexpr = 2 * CLUSTERS if 2 * CLUSTERS > LEAST_ROWS else LEAST_ROWS
    near = tl.arange(0, NEAR)
    part = tl.arange(0, BN)
    batch = kv_bh // (heads // group)
    kv_head = kv_bh % (heads // group)
    to = bins_ptr + (kv_bh.to(tl.int64) * count + tile - tile0) * room - base // RUN
    members = member_ptr + kv_bh.to(tl.int64) * blocks * UNIT
    member = tl.load(members + begin + part)
    for at in tl.range(begin, end, BN):
        # Selected, not multiplied: a NaN in the groups of one block reaches no other's keys.
        here = tl.where((of_span // CLUSTERS == (at - start) // UNIT)[None, :], minus_shares, 0.0)
        here = tl.sum(here.reshape(BM, SPAN_GROUPS // CLUSTERS, CLUSTERS), 1)
        here = here[:, None, :].broadcast_to(BM, NEAR // CLUSTERS, CLUSTERS).reshape(BM, NEAR)
        here = _term(here, (near // CLUSTERS)[None, :]).to(TYPE)
        of_key = (near % CLUSTERS)[None, :] == member.to(tl.int32)[:, None]
        member = tl.load(members + tl.minimum(at + BN, end - BN) + part)  # a step ahead, so that nothing waits for it
        k = load_tile(k_tiles, batch, kv_head, at, BN, BLOCK_D)
        if FLOAT8:
            ones = tl.where(term % BLOCKS == (at - start) // UNIT, 1.0, 0.0).to(TYPE).broadcast_to(BN, TERMS * BLOCKS)
        products = tl.dot(ones, origins.T, input_precision="ieee")
        apart = tl.exp2(tl.dot(k, means.T, products, input_precision="ieee"))
        apart = tl.dot(tl.where(of_key, 1.0, 0.0).to(TYPE), here.T, apart, input_precision="ieee")
        if KEYS:
            key = at + part
            allowed = load_allowed(allowed_ptr, batch, keys, key, key < keys, KEYS)
            apart = tl.where(allowed[:, None], apart, 0.0)
        of_keys = sums_by_tile(tl.abs(apart), GROUPED, MEANS)
        bins = bins_of(tl.max(of_keys.reshape(BN // RUN, RUN, GROUPED), 1))
        if KEYS:
            seen = tl.max(allowed.to(tl.int32).reshape(BN // RUN, RUN), 1) > 0
            bins = tl.where(seen[:, None], bins, HIDDEN_BIN)
        run = at // RUN + tl.arange(0, BN // RUN)
        inside = (run[:, None] * RUN >= low[None, :]) & (run[:, None] * RUN < tl.minimum(high, end)[None, :])
        tl.store(to[None, :] + run[:, None], bins.to(tl.uint8), mask=inside)


@triton.jit
def columns(column, GROUPED: tl.constexpr, MEANS: tl.constexpr):
    """(tile, mean) of columns of a product of GROUPED * MEANS, such that one thread holds all of a tile.

    In the accumulators of tensor cores four threads share a row, and each holds two neighbours of every eight columns.
    """
    LANES: tl.constexpr = 4 if GROUPED > 4 else GROUPED
    PAIR: tl.constexpr = 8 // LANES if MEANS > 8 // LANES else MEANS
    tile = column // (LANES * MEANS) * LANES + column // PAIR % LANES
    return tile, column // (LANES * PAIR) % (MEANS // PAIR) * PAIR + column % PAIR


@triton.jit
def sums_by_tile(x, GROUPED: tl.constexpr, MEANS: tl.constexpr):
    """Sums (rows, GROUPED) of x (rows, GROUPED * MEANS) over the columns of each tile; see `columns`."""
    LANES: tl.constexpr = 4 if GROUPED > 4 else GROUPED
    PAIR: tl.constexpr = 8 // LANES if MEANS > 8 // LANES else MEANS
    x = x.reshape(x.shape[0], GROUPED // LANES, MEANS // PAIR, LANES, PAIR)
    return tl.sum(tl.sum(x, 4), 2).reshape(x.shape[0], GROUPED)
