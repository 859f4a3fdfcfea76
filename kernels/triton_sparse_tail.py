"""What stands in for the keys that a tile did not read, in Triton: the tail of S2O sparse attention.

Groups of like keys are made once per key/value head, by `kernels/triton_sparse_groups.py`. A tile of a query head,
which stops by itself, adds only how many keys of each group it did not read. Two kernels, after attention:

    unread   what of each group was not read, for each tile and query head
    tail     the groups stand in for that: folded into the output by its log-sum-exp

On Hopper the second has a twin, `kernels/gluon_sparse_tail.py`.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from s2o_inductor.kernels.launching import UNSPECIALIZED
from s2o_inductor.kernels.primitives import LOG2_E, schedule
from s2o_inductor.kernels.triton_sparse_attention import finish, update
from s2o_inductor.kernels.triton_sparse_table import SEGMENT
from s2o_inductor.kernels.triton_sparse_tiles import gather_rows, packed_keys, ranked_runs, tile_keys

# How much more than what was read a tail may weigh before the maximum of its scores has to be followed: a weight in
# float16 is at most 65504.
MOST = tl.constexpr(32768.0)


@triton.jit
def has_tail(listed, bundles, ranked, budget, BUNDLE: tl.constexpr, RUN: tl.constexpr):
    """Whether a head left some of its `ranked` runs unread, and may."""
    return (tl.minimum(listed, bundles * (BUNDLE // RUN)) < ranked) & (budget >= 0.0)


@triton.jit
def unit_of(largest):
    """A power of two over which numbers up to `largest` end in [128, 256], of float8's (e4m3) 448."""
    return tl.exp2(tl.floor(tl.log2(tl.minimum(tl.maximum(largest, 1e-30), 1e30))) - 7.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def round_kernel(x_ptr, rounded_ptr, units_ptr, rows, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """BM of the rows of x (rows, D), none below 0, in float8, each over a unit of its own: for Hopper's kernel."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    place = row[:, None] * D + tl.arange(0, D)[None, :]
    x = tl.load(x_ptr + place, mask=(row < rows)[:, None], other=0.0).to(tl.float32)
    unit = unit_of(tl.max(x, 1))
    tl.store(rounded_ptr + place, (x / unit[:, None]).to(rounded_ptr.dtype.element_ty), mask=(row < rows)[:, None])
    tl.store(units_ptr + row, unit, mask=row < rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def unread_kernel(
    unread_ptr, listed_ptr, bundle_of_ptr, counts_ptr, size_ptr, runs_ptr, documents_ptr, budgets_ptr, bundles_ptr,
    heads, group, queries, keys, window, sink, first_tile, tiles, tile0, count, base, room, groups,
    TILE: tl.constexpr, UNIT: tl.constexpr, RUN: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    KEYS: tl.constexpr, PACKED: tl.constexpr, BUNDLE: tl.constexpr, CLUSTERS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What `tail_groups.tail_logits` makes of the keys of BN groups that a tile did not read, for each query head.

    Tables are read once for all heads of a key/value head; in `tail_kernel`, counting would cost as much as a product.
    `unread_ptr` (B, Hq, count, 2, room * RUN // UNIT * CLUSTERS) begins with the groups at position `base`: how many
    keys a group counts for, and by what its spread shrinks. Heads without a tail have nothing written.
    """
    span = room // (UNIT // RUN) * CLUSTERS
    parts = tl.cdiv(span, BN)
    row = (tl.program_id(0) // parts).to(tl.int64)
    of_range = (row % count).to(tl.int32)
    kv_bh = row // count
    batch = (kv_bh // (heads // group)).to(tl.int32)
    tile = tile0 + of_range
    _, _, low, high = tile_keys(first_tile + tile, queries, keys, window, sink, TILE, UNIT, CAUSAL, WINDOWED)
    low, high = packed_keys(documents_ptr, batch, tile, tiles, low, high, PACKED)
    first_group, end_group = low // UNIT * CLUSTERS, high // UNIT * CLUSTERS
    begin = base // UNIT * CLUSTERS + tl.program_id(0) % parts * BN
    if (begin >= end_group) | (begin + BN <= first_group):  # half of the programs of a causal call
        return
    number = begin + tl.arange(0, BN)
    there = (number >= first_group) & (number < end_group)
    of_span = number - base // UNIT * CLUSTERS
    RUNS: tl.constexpr = UNIT // RUN
    run = tl.arange(0, RUNS)[None, :]
    of_row = bundle_of_ptr + row * (room // SEGMENT * SEGMENT)  # room is whole segments: several runs at a time
    of_bundle = of_row + (of_span // CLUSTERS * RUNS)[:, None] + run
    bundle = tl.load(of_bundle, mask=there[:, None], other=0).to(tl.int32)
    place = kv_bh * groups + number
    counts = tl.load(counts_ptr + place[:, None] * RUNS + run, mask=there[:, None], other=0).to(tl.int32)
    size = tl.maximum(tl.load(size_ptr + place, mask=there, other=0), 1).to(tl.float32)
    ranked = ranked_runs(runs_ptr, batch, keys, low, high, RUN, KEYS)
    listed = tl.load(listed_ptr + row)
    TYPE: tl.constexpr = unread_ptr.dtype.element_ty
    counted = listed * 0 - 1
    weight, shrunk = tl.zeros((BN,), TYPE), tl.zeros((BN,), TYPE)
    for head in tl.range(kv_bh * group, kv_bh * group + group):
        bundles = tl.load(bundles_ptr + head * tiles + tile).to(tl.int32)
        if has_tail(listed, bundles, ranked, tl.load(budgets_ptr + head % heads), BUNDLE, RUN):
            if bundles != counted:  # heads that a density stopped have read the same
                left = tl.sum(tl.where(bundle >= bundles, counts, 0), 1).to(tl.float32)
                read = size - left
                weight = (left * left / size).to(TYPE)
                # 1 - 2 sqrt(share read), without the difference: a device's square root of 1 / 4 is not 1 / 2, and a
                # sharp head multiplies what is left of it by a spread of hundreds.
                shrunk = (tl.maximum(size - 4.0 * read, 0.0) / (size + 2.0 * tl.sqrt(read * size))).to(TYPE)
                counted = bundles
            to = unread_ptr + (head * count + of_range) * 2 * span + of_span
            tl.store(to, weight, mask=there)
            tl.store(to + span, shrunk, mask=there)


@triton.jit
def _load_unread(of_unread, span, number, high):
    """How many keys the groups at `number` below `high` count for, and by what their spread shrinks."""
    left = tl.load(of_unread + number, mask=number < high, other=0.0)
    return left.to(tl.float32), tl.load(of_unread + span + number, mask=number < high, other=0.0).to(tl.float32)


@triton.jit
def _stand_in(
    q, squares, of_unread, span, mean_k_ptr, variance_ptr, mean_v_ptr, kv_bh, number, high, groups, most,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """What stands in for the groups at `number` (BN,) below `high`.

    Returns:
        how many keys each counts for; base-2 scores of one key of each, in two parts: products of q and mean keys, to
        be scaled, and what the spread adds, at most `most`, -inf where no key is left; and mean values.
    """
    left, shrunk = _load_unread(of_unread, span, number, high)
    there = number < high
    steps = (groups.to(tl.int64) * D, 0, D)
    variance = gather_rows(variance_ptr, steps, kv_bh, kv_bh * 0, number, there, True, D, BLOCK_D)
    spread = tl.dot(squares, variance.T, input_precision="ieee")
    k = gather_rows(mean_k_ptr, steps, kv_bh, kv_bh * 0, number, there, True, D, BLOCK_D)
    products = tl.dot(q, k.T, input_precision="ieee")
    # Hidden by the limit, which is taken anyway: that costs nothing for each score.
    spread = tl.minimum(spread * shrunk[None, :], tl.where(left > 0.0, most, float("-inf"))[None, :])
    steps = (groups.to(tl.int64) * DV, 0, DV)
    v = gather_rows(mean_v_ptr, steps, kv_bh, kv_bh * 0, number, there, True, DV, BLOCK_DV)
    return left, products, spread, v


@triton.jit(do_not_specialize=UNSPECIALIZED)
def tail_kernel(
    q_ptr, q_steps, out_ptr, lse_ptr, listed_ptr, unread_ptr, mean_k_ptr, variance_ptr, mean_v_ptr, runs_ptr,
    documents_ptr, budgets_ptr, bundles_ptr, marks_ptr, heads, group, queries, keys, window, sink, first_tile, tiles,
    tile0, count, base, room, groups, section, scale, limit, TILE: tl.constexpr, UNIT: tl.constexpr, RUN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr, BUNDLE: tl.constexpr,
    CLUSTERS: tl.constexpr, MARKED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Folds the tail of BM rows of a tile of one query head into output and log-sum-exp, BN groups at a time.

    See `tail_groups.tail_logits`, and `GroupTable` and `unread_kernel` for what it reads. Weights are relative to the
    mass of what was read, which a tail seldom outweighs: no maximum has to be followed. Where it does, by more than
    MOST, the tile is done again and the maximum followed. MARKED leaves only that to be done, for the rows that
    `marks_ptr`, int8 (B, Hq, count, TILE / BM), marks.
    """
    part, bh = schedule(count * (TILE // BM), section, CAUSAL)
    of_range = part // (TILE // BM)
    tile = tile0 + of_range
    batch = bh // heads
    head = bh % heads
    kv_bh = (batch * (heads // group) + head // group).to(tl.int64)
    start, end, low, high = tile_keys(first_tile + tile, queries, keys, window, sink, TILE, UNIT, CAUSAL, WINDOWED)
    low, high = packed_keys(documents_ptr, batch, tile, tiles, low, high, PACKED)
    ranked = ranked_runs(runs_ptr, batch, keys, low, high, RUN, KEYS)
    listed = tl.load(listed_ptr + kv_bh * count + of_range)
    bundles = tl.load(bundles_ptr + bh.to(tl.int64) * tiles + tile).to(tl.int32)
    wanted = has_tail(listed, bundles, ranked, tl.load(budgets_ptr + head), BUNDLE, RUN)
    if MARKED:
        mark = tl.load(marks_ptr + bh.to(tl.int64) * count * (TILE // BM) + part, mask=wanted, other=0)
        wanted = wanted & (mark > 0)
    if wanted:
        position = (first_tile + tile) * TILE + part % (TILE // BM) * BM + tl.arange(0, BM)
        exists = (position >= start) & (position < end)
        query = position - (keys - queries)
        q = gather_rows(q_ptr, q_steps, batch, head, query, exists, True, D, BLOCK_D)
        scale2 = tl.cast(scale, tl.float32) * LOG2_E
        wide = q.to(tl.float32)
        squares = (wide * wide * (0.5 * scale * scale2)).to(variance_ptr.dtype.element_ty)
        most = tl.cast(limit, tl.float32) * LOG2_E
        # The state of the softmax that `attend_kernel` left, with the output for its sum and 1 for its total.
        place = (batch.to(tl.int64) * heads + head) * queries + query
        lse = tl.load(lse_ptr + place, mask=exists, other=float("-inf")) * LOG2_E
        before = tl.where(lse == float("-inf"), 0.0, 1.0)
        steps = (queries.to(tl.int64) * heads * DV, DV, heads.to(tl.int64) * DV)
        acc = gather_rows(out_ptr, steps, batch, head, query, exists, True, DV, BLOCK_DV).to(tl.float32)
        origin = tl.where(lse == float("-inf"), 0.0, lse)
        total = before
        first_group, end_group = low // UNIT * CLUSTERS, high // UNIT * CLUSTERS
        span = room // (UNIT // RUN) * CLUSTERS
        of_unread = unread_ptr + (bh.to(tl.int64) * count + of_range) * 2 * span - base // UNIT * CLUSTERS
        of_step = tl.arange(0, BN)
        peak = origin
        again = tl.sum(exists.to(tl.int32), 0)
        if not MARKED:
            for group0 in tl.range(first_group, end_group, BN):
                left, products, spread, v = _stand_in(
                    q, squares, of_unread, span, mean_k_ptr, variance_ptr, mean_v_ptr, kv_bh, group0 + of_step,
                    end_group, groups, most, D, DV, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
                # Times what is left, not plus its logarithm, which would be more instructions than all else here.
                weights = tl.exp2(products * scale2 + (spread - origin[:, None])) * left[None, :]
                total += tl.sum(weights, 1)
                acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
            again = tl.sum((exists & ((total > MOST) | (before == 0.0))).to(tl.int32), 0)
        if again > 0:
            acc = gather_rows(out_ptr, steps, batch, head, query, exists, True, DV, BLOCK_DV).to(tl.float32)
            peak = lse
            total = before
            # More stages would cost the first loop registers.
            for group0 in tl.range(first_group, end_group, BN, num_stages=1):
                left, products, spread, v = _stand_in(
                    q, squares, of_unread, span, mean_k_ptr, variance_ptr, mean_v_ptr, kv_bh, group0 + of_step,
                    end_group, groups, most, D, DV, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
                scores = products * scale2 + spread + tl.log2(tl.maximum(left, 1e-6))[None, :]
                acc, peak, total = update((acc, peak, total), scores, v, 1.0)
        finish((acc, peak, total), out_ptr, lse_ptr, batch, head, heads, query, queries, DV, BLOCK_DV)
