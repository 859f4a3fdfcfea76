"""The order in which tiles of queries read their prefix, in Triton: scores, bins of falling score, page tables.

`kernels/reference_sparse.py` says what is scored and how. A sort of every prefix would cost more than the attention
that it saves, so runs of keys are only told apart by bins, eight to a factor of two of their score: bins in falling
order, positions rising inside one. That is enough: any order inside a bundle is as good as another, and scores in a
bin differ by an eighth at most. Six kernels, none of which waits for the host:

    representatives   mean queries of the parts of each tile, for all query heads of a key/value head
    masses            log-sum-exp of each representative's scores over the groups of its prefix
    scores            how far keys are from their group, mean over representatives and runs, as bins; reads all keys
    histogram         runs in each bin, per segment of the prefix
    offsets, place    a counting sort by bin: where each bin of each segment starts, then the page table

Everything but the first two works on a range of tiles whose tables fit the workspace.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import dataclasses
import fractions
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_inductor.kernels import triton_sparse_table as sorting
from s2o_inductor.kernels.launching import UNSPECIALIZED, Config, block_width, launch, tiles_of
from s2o_inductor.kernels.primitives import LOG2_E, load_tile
from s2o_inductor.kernels.triton_sparse_groups import LEAST_ROWS, GroupTable
from s2o_inductor.kernels.triton_sparse_table import BINS, HIDDEN_BIN, SEGMENT, bins_of
from s2o_inductor.kernels.triton_sparse_tiles import (
    Padding,
    Tiling,
    gather_rows,
    load_allowed,
    packed_keys,
    steps_of,
    tile_keys,
)

# Keys that one program scores.
_SPAN = tl.constexpr(2048)
# Most runs that one program sorts at a time.
_SORTED = 1024
# Rows of the products of representatives and keys: below that, tensor cores wait for their operands.
_ROWS = 128


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _representatives_kernel(
    q_ptr, q_steps, means_ptr, heads, group, queries, keys, first_tile, tiles, D: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """Mean queries of one query head and tile: rows [member * SUB, (member + 1) * SUB) of means (.., MEANS, D).

    A tile of fewer than SUB queries has fewer parts; rows without one are zero.
    """
    members = MEANS // SUB
    member = tl.program_id(0) % members
    row = tl.program_id(0) // members
    tile = row % tiles
    kv_head = row // tiles % (heads // group)
    batch = row // tiles // (heads // group)
    start = tl.maximum((first_tile + tile) * TILE, keys - queries)
    size = tl.minimum((first_tile + tile + 1) * TILE, keys) - start
    parts = tl.minimum(SUB, size)
    at = tl.arange(0, TILE // SUB)
    column = tl.arange(0, BLOCK_D)
    base = q_ptr + batch.to(tl.int64) * q_steps[0] + (kv_head * group + member).to(tl.int64) * q_steps[1]
    for part in tl.static_range(SUB):
        # As torch's tensor_split: the first parts take one query more.
        length = size // parts + tl.where(size % parts > part, 1, 0)
        length = tl.where((parts > part) & (member < group), length, 0)
        begin = start - (keys - queries) + (size // parts) * part + tl.minimum(size % parts, part)
        place = base + (begin + at).to(tl.int64)[:, None] * q_steps[2] + column[None, :]
        values = tl.load(place, mask=(at < length)[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
        mean = tl.sum(values, 0) / tl.maximum(length, 1).to(tl.float32)
        to = means_ptr + (row.to(tl.int64) * MEANS + member * SUB + part) * D + column
        tl.store(to, mean.to(means_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def _load_means(means_ptr, kv_bh, tile, mean, tiles, MEANS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Representatives (rows, BLOCK_D): number `mean` of tile `tile`, zero beyond the last tile."""
    column = tl.arange(0, BLOCK_D)
    row = (kv_bh.to(tl.int64) * tiles + tile) * MEANS + mean
    inside = (tile < tiles)[:, None] & (column < D)[None, :]
    return tl.load(means_ptr + row[:, None] * D + column[None, :], mask=inside, other=0.0)


@triton.jit
def _group_scores(
    means, squares, kv_bh, number, there, groups, mean_k_ptr, variance_ptr, scale2, limit, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Base-2 scores (BM, groups) of one key of each group: its mean's, and what its spread adds, to second order."""
    steps = (groups.to(tl.int64) * D, 0, D)
    k = gather_rows(mean_k_ptr, steps, kv_bh, kv_bh * 0, number, there, True, D, BLOCK_D)
    variance = gather_rows(variance_ptr, steps, kv_bh, kv_bh * 0, number, there, True, D, BLOCK_D)
    spread = tl.dot(squares, variance.T, input_precision=PRECISION)
    return tl.dot(means, k.T, input_precision="ieee") * scale2 + tl.minimum(spread, limit * LOG2_E)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _masses_kernel(
    means_ptr, mean_k_ptr, variance_ptr, size_ptr, shift_ptr, documents_ptr, heads, group, queries, keys, window,
    sink, first_tile, tiles, groups, scale, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    UNIT: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr, SUB: tl.constexpr,
    MEANS: tl.constexpr, GROUPED: tl.constexpr, CLUSTERS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """What to subtract from base-2 scores of the representatives of GROUPED tiles: exp2 is then a share of the mean.

    log2 of the mass of their prefix and of the number of representatives; +inf for rows that are none.
    """
    scale2 = tl.cast(scale, tl.float32) * LOG2_E
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
    squares = _squares(means, variance_ptr, scale, scale2)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for begin in tl.range(tl.min(tl.where(used, low, groups)), tl.max(tl.where(used, high, 0)), BN):
        number = begin + tl.arange(0, BN)
        size = tl.load(size_ptr + kv_bh.to(tl.int64) * groups + number, mask=number < groups, other=0)
        scores = _group_scores(
            means, squares, kv_bh, number, number < groups, groups, mean_k_ptr, variance_ptr, scale2, limit,
            PRECISION, D, BLOCK_D,
        )  # fmt: skip
        scores += tl.log2(tl.maximum(size, 1).to(tl.float32))[None, :]
        inside = (number[None, :] >= low[:, None]) & (number[None, :] < high[:, None]) & (size > 0)[None, :]
        scores = tl.where(inside, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - origin) + tl.sum(tl.exp2(scores - origin[:, None]), 1)
        peak = new_peak
    representatives = tl.maximum(group * parts, 1).to(tl.float32)
    shift = peak + tl.log2(tl.where(total > 0.0, total, 1.0)) + tl.log2(representatives)
    to = shift_ptr + (kv_bh.to(tl.int64) * tiles + tile) * MEANS + mean
    tl.store(to, tl.where(counts & (total > 0.0), shift, float("inf")), mask=there)


@triton.jit
def _squares(means, variance_ptr, scale, scale2):
    """Squares of queries in the type of the variances, by which a spread is a sum of products."""
    wide = means.to(tl.float32)
    return (wide * wide * (0.5 * scale * scale2)).to(variance_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _scores_kernel(
    means_ptr, shift_ptr, k_tiles, mean_k_ptr, variance_ptr, member_ptr, allowed_ptr, before_ptr, documents_ptr,
    bins_ptr, heads, group, queries, keys, window, sink, first_tile, tiles, tile0, count, base, room, blocks, groups,
    scale, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, RUN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr, MEANS: tl.constexpr,
    GROUPED: tl.constexpr, CLUSTERS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Bins (rows, room) of the runs of _SPAN keys for GROUPED of the tiles [tile0, tile0 + count)."""
    scale2 = tl.cast(scale, tl.float32) * LOG2_E
    spans = tl.cdiv(room * RUN, _SPAN)
    span = tl.program_id(0) % spans
    parts = tl.cdiv(count, GROUPED)
    first = tile0 + tl.program_id(0) // spans % parts * GROUPED
    kv_bh = tl.program_id(0) // spans // parts
    batch = kv_bh // (heads // group)
    kv_head = kv_bh % (heads // group)
    row = tl.arange(0, BM)
    of_row = first + row // MEANS
    means = _load_means(means_ptr, kv_bh, of_row, row % MEANS, tiles, MEANS, D, BLOCK_D)
    squares = _squares(means, variance_ptr, scale, scale2)
    place = (kv_bh.to(tl.int64) * tiles + of_row) * MEANS + row % MEANS
    shift = tl.load(shift_ptr + place, mask=of_row < tiles, other=float("inf"))
    tile = first + tl.arange(0, GROUPED)
    _, _, low, high = tile_keys(first_tile + tile, queries, keys, window, sink, TILE, UNIT, CAUSAL, WINDOWED)
    low, high = packed_keys(documents_ptr, batch, tile, tiles, low, high, PACKED)
    high = tl.where(tile < tile0 + count, high, low)
    used = high > low
    begin = tl.maximum(base + span * _SPAN, tl.min(tl.where(used, low, keys)))
    end = tl.minimum(base + span * _SPAN + _SPAN, tl.max(tl.where(used, high, 0)))
    to = bins_ptr + (kv_bh.to(tl.int64) * count + tile - tile0) * room - base // RUN
    near = tl.arange(0, LEAST_ROWS)
    of_part = tl.arange(0, BN)
    members = member_ptr + kv_bh.to(tl.int64) * blocks * UNIT
    member = tl.load(members + begin + of_part, mask=begin + of_part < end, other=0)
    # Whole blocks, so that a NaN in the groups of one reaches no other's keys.
    for block in tl.range(begin, end, UNIT):
        number = block // UNIT * CLUSTERS + near
        scores = _group_scores(
            means, squares, kv_bh, number, near < CLUSTERS, groups, mean_k_ptr, variance_ptr, scale2, limit,
            PRECISION, D, BLOCK_D,
        )  # fmt: skip
        shares = tl.exp2(scores - shift[:, None])
        for part in tl.static_range(UNIT // BN):
            at = block + part * BN
            of_key = (near[:, None] == member.to(tl.int32)[None, :]).to(tl.float32)
            ahead = at + BN + of_part  # a step, so that nothing waits for it
            member = tl.load(members + ahead, mask=ahead < end, other=0)
            expected = tl.dot(shares, of_key, input_precision=PRECISION)
            k = load_tile(k_tiles, batch, kv_head, at, BN, BLOCK_D)
            products = tl.dot(means, k.T, input_precision="ieee")
            apart = tl.abs(tl.exp2(products * scale2 - shift[:, None]) - expected)
            run = at // RUN + tl.arange(0, BN // RUN)
            if KEYS:
                key = at + tl.arange(0, BN)
                allowed = load_allowed(allowed_ptr, batch, keys, key, key < keys, KEYS)
                apart = tl.where(allowed[None, :], apart, 0.0)
            of_keys = tl.sum(apart.reshape(GROUPED, MEANS, BN), 1)
            number = bins_of(tl.max(of_keys.reshape(GROUPED, BN // RUN, RUN), 2))
            if KEYS:
                seen = tl.max(allowed.to(tl.int32).reshape(BN // RUN, RUN), 1) > 0
                number = tl.where(seen[None, :], number, HIDDEN_BIN)
            inside = (run[None, :] * RUN >= low[:, None]) & (run[None, :] * RUN < tl.minimum(high, end)[:, None])
            tl.store(to[:, None] + run[None, :], number.to(tl.uint8), mask=inside)


@dataclasses.dataclass(frozen=True)
class Order:
    """What tiles [tile0, tile0 + count) may read, in which order; a row is a batch entry, key/value head and tile.

    Attributes:
        table: int32 (B, Hkv, count, places), numbers of runs (their first position over `run`) by falling score; -1
            beyond `listed`. Places are a multiple of a bundle.
        listed: int32 (B, Hkv, count), runs.
        bundle_of: int16 (B, Hkv, count, room), the bundle of the run at position base + i * run, `UNLISTED` if it is
            in none; None without a tail, the only one who asks.
        tile0: first tile, counted from `Tiling.first`.
        base: first position of `bundle_of`.
    """

    table: Tensor
    listed: Tensor
    bundle_of: Tensor | None
    tile0: int
    base: int


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Representatives of all tiles with their masses: all that an order of any range of tiles needs.

    Attributes:
        means: (B * Hkv, tiles, MEANS, D), of the type of q.
        shift: float32 (B * Hkv, tiles, MEANS).
        arguments: what all kernels take.
    """

    means: Tensor
    shift: Tensor
    arguments: dict[str, Any]


def _configs(k: Tensor, rows: int) -> list[Config]:
    """Ways to run the two kernels of products, fastest first: representatives, and groups or keys at a time."""
    if k.dtype == torch.float32 or rows > _ROWS:
        return [Config(rows, 32, 8, 2), Config(rows, 16, 8, 1)]
    if k.shape[3] <= 128:
        return [Config(rows, 128, 8, 2), Config(rows, 64, 8, 2), Config(rows, 64, 8, 1)]
    return [Config(rows, 64, 8, 2), Config(rows, 32, 8, 1)]


def rank(q: Tensor, k: Tensor, scale: float, tiling: Tiling, padding: Padding, groups: GroupTable) -> Ranking:
    """Representatives and masses of all tiles.

    Args:
        q: (B, Hq, Sq, D), `aligned`, like k.
        k: (B, Hkv, Sk, D).
        scale: of the scores, above 0.
        tiling: of Sq and Sk.
        padding: of the keys.
        groups: of the keys.
    """
    batch, heads, _, width = q.shape
    kv_heads, sub = k.shape[1], tiling.geometry.sub_means
    group = heads // kv_heads
    means_count = triton.next_power_of_2(group * sub)
    grouped = max(1, _ROWS // means_count)
    rows = batch * kv_heads
    means = torch.empty((rows, tiling.count, means_count, width), dtype=q.dtype, device=q.device)
    shift = torch.empty((rows, tiling.count, means_count), dtype=torch.float32, device=q.device)
    shared = {
        "means_ptr": means, "shift_ptr": shift, "heads": heads, "group": group, "tiles": tiling.count,
        "scale": scale, "limit": tiling.geometry.limit, "D": width, "BLOCK_D": block_width(width), "SUB": sub,
        "MEANS": means_count, "GROUPED": grouped, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "blocks": tiling.keys // tiling.geometry.block, **tiling.arguments(), **padding.arguments(),
        **groups.arguments(),
    }  # fmt: skip
    launch(
        _representatives_kernel, [Config(0, 0, 4, 1)], lambda _: rows * tiling.count * (means_count // sub),
        lambda _: {**shared, "q_ptr": q, "q_steps": steps_of(q)},
    )  # fmt: skip
    launch(
        _masses_kernel, [dataclasses.replace(x, keys=min(x.keys, 64)) for x in _configs(k, means_count * grouped)],
        lambda _: rows * triton.cdiv(tiling.count, grouped), lambda _: shared,
    )  # fmt: skip
    return Ranking(means, shift, shared)


def span_of(tiling: Tiling, tile0: int, count: int) -> tuple[int, int, int]:
    """(base, room, most) of a range of tiles: their prefixes lie in `room` runs from position `base` on, whole
    segments; none is longer than `most` keys."""
    prefixes = [tiling.prefix(tile) for tile in range(tile0, tile0 + count)]
    present = [(low, high) for low, high in prefixes if low < high]
    if not present:
        return 0, SEGMENT.value, 0
    base = min(low for low, _ in present)
    runs = (max(high for _, high in present) - base) // tiling.geometry.run
    return base, triton.cdiv(runs, SEGMENT.value) * SEGMENT.value, max(high - low for low, high in present)


def row_bytes(tiling: Tiling, tile0: int, count: int, density: fractions.Fraction) -> int:
    """Bytes of workspace that one key/value head takes per tile of a range."""
    _, room, most = span_of(tiling, tile0, count)
    run = 4 + 1 + 2  # packed for sorting, bin, bundle
    return room * run + room // SEGMENT.value * BINS.value * 4 + tiling.listed(most, density) * 4


def order(
    ranking: Ranking, k: Tensor, tiling: Tiling, density: fractions.Fraction, tile0: int, count: int
) -> Order:  # fmt: skip
    """The order of tiles [tile0, tile0 + count).

    Args:
        ranking: of the same call.
        k: (B, Hkv, Sk, D), as `rank` had it.
        tiling: of the call.
        density: largest share of its prefix that a tile may read.
        tile0: first tile, counted from `Tiling.first`.
        count: tiles.
    """
    batch, kv_heads = k.shape[:2]
    rows = batch * kv_heads * count
    base, room, most = span_of(tiling, tile0, count)
    geometry, device = tiling.geometry, k.device
    places = max(tiling.listed(most, density), geometry.bundle // geometry.run)
    segments = room // SEGMENT.value
    bins = torch.empty((rows, room), dtype=torch.uint8, device=device)
    kept = torch.empty((rows, room), dtype=torch.int32, device=device)
    starts = torch.empty((rows, segments, BINS.value), dtype=torch.int32, device=device)
    table = torch.full((batch, kv_heads, count, places), -1, dtype=torch.int32, device=device)
    listed = torch.empty((batch, kv_heads, count), dtype=torch.int32, device=device)
    bundle_of = torch.empty((batch, kv_heads, count, room), dtype=torch.int16, device=device)
    shared = {
        **ranking.arguments, "bins_ptr": bins, "starts_ptr": starts, "listed_ptr": listed, "tile0": tile0,
        "count": count, "base": base, "room": room, "places": places, "segments": segments, "table_ptr": table,
        "bundle_of_ptr": bundle_of, "kept_ptr": kept, "numerator": density.numerator,
        "denominator": density.denominator, "BUNDLE": geometry.bundle,
    }  # fmt: skip
    grouped = ranking.arguments["GROUPED"]
    configs = _configs(k, ranking.arguments["MEANS"] * grouped)
    launch(
        _scores_kernel, [dataclasses.replace(x, keys=min(x.keys, geometry.block)) for x in configs],
        lambda _: batch * kv_heads * triton.cdiv(count, grouped) * triton.cdiv(room * geometry.run, _SPAN.value),
        lambda config: {**shared, "k_tiles": tiles_of(k, config.keys)},
    )  # fmt: skip
    launch(sorting.histogram_kernel, [Config(0, 0, 4, 1)], lambda _: rows * segments, lambda _: shared)
    launch(sorting.offsets_kernel, [Config(0, 0, 4, 1)], lambda _: rows, lambda _: shared)
    sorted_at_once = min(_SORTED, triton.next_power_of_2(places))
    launch(sorting.place_kernel, [Config(0, sorted_at_once, 4, 1)], lambda _: rows * segments, lambda _: shared)
    return Order(table, listed, bundle_of, tile0, base)
