"""From scores to page tables in Triton: a counting sort by bins of falling score, for `triton_sparse_order.py`."""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from s2o_inductor.kernels.launching import UNSPECIALIZED
from s2o_inductor.kernels.triton_sparse_tiles import UNLISTED, packed_keys, tile_keys

BINS = tl.constexpr(256)
HIDDEN_BIN = tl.constexpr(255)  # not a run of the prefix, or not to be seen
# A positive float32 shifted right by this leaves its exponent and three bits of its mantissa: eight bins to a factor
# of two, of even width inside it. 255 of them reach from 2^9, as groups can make too little of the mass, to 2^-23.
_BIN_SHIFT = tl.constexpr(20)
_HALF = tl.constexpr(8)
_FIRST_BIN = tl.constexpr((127 + 8) * 8)
# Runs of the segments that programs share a prefix out in.
SEGMENT = tl.constexpr(2048)


@triton.jit
def bins_of(scores):
    """Bins of scores of at least 0, falling; 0 is the last before HIDDEN_BIN."""
    number = _FIRST_BIN - (scores.to(tl.int32, bitcast=True) >> _BIN_SHIFT)
    return tl.minimum(tl.maximum(number, 0), HIDDEN_BIN - 1)


@triton.jit
def _load_bins(
    bins_ptr, documents_ptr, row, segment, heads, group, queries, keys, window, sink, first_tile, tiles, tile0, count,
    base, room, TILE: tl.constexpr, UNIT: tl.constexpr, RUN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The bins (SEGMENT,) of one segment of a row, HIDDEN_BIN outside the tile's prefix, where nothing was written.

    A run counts at least half of what a run beside it counts: half a score is eight bins further, exactly.
    """
    tile = tile0 + (row % count).to(tl.int32)
    _, _, low, high = tile_keys(first_tile + tile, queries, keys, window, sink, TILE, UNIT, CAUSAL, WINDOWED)
    low, high = packed_keys(documents_ptr, row // count // (heads // group), tile, tiles, low, high, PACKED)
    at = segment * SEGMENT + tl.arange(0, SEGMENT)
    first, last = (low - base) // RUN, (high - base) // RUN
    bins = bins_ptr + row * (room // SEGMENT) * SEGMENT + at
    # Without a mask, and so sixteen at a time; what was not written does not count.
    own = tl.where((at >= first) & (at < last), tl.load(bins).to(tl.int32), HIDDEN_BIN)
    before = tl.load(bins - 1, mask=(at > first) & (at <= last), other=HIDDEN_BIN).to(tl.int32)
    after = tl.load(bins + 1, mask=(at + 1 >= first) & (at + 1 < last), other=HIDDEN_BIN).to(tl.int32)
    return tl.where(own == HIDDEN_BIN, own, tl.minimum(own, tl.minimum(before, after) + _HALF))


@triton.jit
def _is_ranked(
    row, segment, queries, keys, window, sink, first_tile, tile0, count, base, TILE: tl.constexpr, UNIT: tl.constexpr,
    RUN: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Whether a segment has runs of the row's prefix: in a causal call half of them have none."""
    tile = first_tile + tile0 + (row % count).to(tl.int32)
    _, _, low, high = tile_keys(tile, queries, keys, window, sink, TILE, UNIT, CAUSAL, WINDOWED)
    start = base + segment * SEGMENT * RUN
    return (start < high) & (start + SEGMENT * RUN > low)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def histogram_kernel(
    bins_ptr, starts_ptr, documents_ptr, heads, group, queries, keys, window, sink, first_tile, tiles, tile0, count,
    base, room, TILE: tl.constexpr, UNIT: tl.constexpr, RUN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """How many runs of one segment each bin has."""
    segments = room // SEGMENT
    segment = tl.program_id(0) % segments
    row = (tl.program_id(0) // segments).to(tl.int64)
    to = starts_ptr + (row * segments + segment) * BINS + tl.arange(0, BINS)
    if not _is_ranked(
        row, segment, queries, keys, window, sink, first_tile, tile0, count, base, TILE, UNIT, RUN, CAUSAL, WINDOWED
    ):  # fmt: skip
        tl.store(to, tl.zeros((BINS,), tl.int32))
        return
    number = _load_bins(
        bins_ptr, documents_ptr, row, segment, heads, group, queries, keys, window, sink, first_tile, tiles, tile0,
        count, base, room, TILE, UNIT, RUN, CAUSAL, WINDOWED, PACKED,
    )  # fmt: skip
    tl.store(to, tl.histogram(number, BINS))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def offsets_kernel(starts_ptr, listed_ptr, segments, numerator, denominator, BUNDLE: tl.constexpr, RUN: tl.constexpr):
    """Counts per bin and segment become places in the order; and how many runs of it the table lists.

    That is the share numerator / denominator of a tile's runs, rounded up to a bundle.
    """
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BINS)
    here = starts_ptr + row * segments * BINS + number
    totals = tl.zeros((BINS,), tl.int32)
    for segment in tl.range(0, segments):
        totals += tl.load(here + segment * BINS)
    totals = tl.where(number == HIDDEN_BIN, 0, totals)
    place = tl.cumsum(totals, 0) - totals
    for segment in tl.range(0, segments):
        size = tl.load(here + segment * BINS)
        tl.store(here + segment * BINS, place)
        place += size
    runs = tl.sum(totals, 0)
    share = tl.cdiv(runs.to(tl.int64) * numerator, denominator)
    tl.store(listed_ptr + row, tl.minimum(runs, tl.cdiv(share, BUNDLE // RUN) * (BUNDLE // RUN)).to(tl.int32))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def place_kernel(
    bins_ptr, starts_ptr, listed_ptr, kept_ptr, bundle_of_ptr, table_ptr, documents_ptr, heads, group, queries, keys,
    window, sink, first_tile, tiles, tile0, count, base, room, places, TILE: tl.constexpr, UNIT: tl.constexpr,
    RUN: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr, BUNDLE: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The runs of one segment to their places in the page table, and their bundles to `bundle_of`.

    Runs that the table has room for are first packed, as bin and position, into `kept`: what then has to be sorted is
    as small as the density.
    """
    segments = room // SEGMENT
    segment = tl.program_id(0) % segments
    row = (tl.program_id(0) // segments).to(tl.int64)
    at = tl.arange(0, SEGMENT)
    here = (row * segments + segment) * SEGMENT
    tl.store(bundle_of_ptr + here + at, tl.full((SEGMENT,), UNLISTED, tl.int16))
    if not _is_ranked(
        row, segment, queries, keys, window, sink, first_tile, tile0, count, base, TILE, UNIT, RUN, CAUSAL, WINDOWED
    ):  # fmt: skip
        return
    listed = tl.load(listed_ptr + row)
    place = tl.load(starts_ptr + (row * segments + segment) * BINS + tl.arange(0, BINS))
    number = _load_bins(
        bins_ptr, documents_ptr, row, segment, heads, group, queries, keys, window, sink, first_tile, tiles, tile0,
        count, base, room, TILE, UNIT, RUN, CAUSAL, WINDOWED, PACKED,
    )  # fmt: skip
    keep = (number < HIDDEN_BIN) & (tl.gather(place, number, 0) < listed)
    slot = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(kept_ptr + here + slot, number * SEGMENT + at, mask=keep)
    tl.debug_barrier()  # what is read and overwritten below was written by other threads
    of_block = tl.arange(0, BN)
    kept = tl.sum(keep.to(tl.int32), 0)
    for first in tl.range(0, kept, BN):
        packed = tl.load(kept_ptr + here + first + of_block, mask=first + of_block < kept, other=HIDDEN_BIN * SEGMENT)
        packed = tl.sort(packed)
        sorted_bins = packed // SEGMENT
        sizes = tl.histogram(sorted_bins, BINS)
        to = tl.gather(place - (tl.cumsum(sizes, 0) - sizes), sorted_bins, 0) + of_block
        fits = (sorted_bins < HIDDEN_BIN) & (to < listed)
        position = segment * SEGMENT + packed % SEGMENT
        tl.store(table_ptr + row * places + to, base // RUN + position, mask=fits)
        tl.store(bundle_of_ptr + row * room + position, (to // (BUNDLE // RUN)).to(tl.int16), mask=fits)
        place += sizes
