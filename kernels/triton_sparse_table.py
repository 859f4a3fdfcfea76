"""From scores to page tables in Triton: a counting sort by bins of falling score, for `triton_sparse_order.py`."""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from s2o_inductor.kernels.launching import UNSPECIALIZED
from s2o_inductor.kernels.triton_sparse_tiles import UNLISTED, load_allowed, tile_keys

BINS = tl.constexpr(256)
HIDDEN_BIN = tl.constexpr(255)  # not a token of the prefix, or not to be seen
# A positive float32 shifted right by this leaves its exponent and three bits of its mantissa: eight bins to a factor
# of two, of even width inside it. 1.0 is then 127 * 8; 255 bins reach down to 2^-32.
_BIN_SHIFT = tl.constexpr(20)
_FIRST_BIN = tl.constexpr(1016)
# Keys of the segments that programs share a prefix out in.
SEGMENT = tl.constexpr(4096)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def bins_kernel(
    scores_ptr, allowed_ptr, before_ptr, bins_ptr, starts_ptr, heads, group, queries, keys, window, sink, first_tile,
    tile0, count, base, room, TILE: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, KEYS: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Smoothed scores of one segment as bins, and how many tokens each bin has."""
    segments = room // SEGMENT
    segment = tl.program_id(0) % segments
    row = (tl.program_id(0) // segments).to(tl.int64)
    tile = tile0 + row % count
    batch = row // count // (heads // group)
    _, _, low, high = tile_keys(
        first_tile + tile.to(tl.int32), queries, keys, window, sink, TILE, UNIT, CAUSAL, WINDOWED
    )
    key = base + segment * SEGMENT + tl.arange(0, SEGMENT)
    here = scores_ptr + row * room - base
    total = tl.zeros((SEGMENT,), tl.float32)
    for step in tl.static_range(SMOOTHING):
        near = key + step - SMOOTHING // 2
        total += tl.load(here + near, mask=(near >= low) & (near < high), other=0.0)
    span = tl.minimum(key + SMOOTHING // 2, high - 1) - tl.maximum(key - SMOOTHING // 2, low) + 1
    score = total / tl.maximum(span, 1).to(tl.float32)
    number = _FIRST_BIN - (score.to(tl.int32, bitcast=True) >> _BIN_SHIFT)
    number = tl.minimum(tl.maximum(number, 0), HIDDEN_BIN - 1)
    token = load_allowed(allowed_ptr, batch, keys, key, (key >= low) & (key < high), KEYS)
    number = tl.where(token, number, HIDDEN_BIN)
    tl.store(bins_ptr + row * room + key - base, number.to(tl.uint8))
    to = starts_ptr + (row * segments + segment) * BINS + tl.arange(0, BINS)
    tl.store(to, tl.histogram(number, BINS))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def offsets_kernel(starts_ptr, listed_ptr, segments, numerator, denominator, BUNDLE: tl.constexpr):
    """Counts per bin and segment become places in the order; and how many tokens of it the table lists.

    That is the share numerator / denominator of a tile's tokens, rounded up to a bundle.
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
    tokens = tl.sum(totals, 0)
    share = tl.cdiv(tokens.to(tl.int64) * numerator, denominator)
    tl.store(listed_ptr + row, tl.minimum(tokens, tl.cdiv(share, BUNDLE) * BUNDLE).to(tl.int32))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def place_kernel(
    bins_ptr, starts_ptr, listed_ptr, kept_ptr, bundle_of_ptr, table_ptr, base, room, places, BUNDLE: tl.constexpr,
    TAIL: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The tokens of one segment to their places in the page table, and their bundles to `bundle_of`.

    Tokens that the table has room for are first packed, as bin and position, into `kept` (the memory of the scores,
    which are no longer needed): what then has to be sorted is as small as the density.
    """
    segments = room // SEGMENT
    segment = tl.program_id(0) % segments
    row = (tl.program_id(0) // segments).to(tl.int64)
    at = tl.arange(0, SEGMENT)
    here = row * room + segment * SEGMENT
    listed = tl.load(listed_ptr + row)
    place = tl.load(starts_ptr + (row * segments + segment) * BINS + tl.arange(0, BINS))
    number = tl.load(bins_ptr + here + at).to(tl.int32)
    keep = (number < HIDDEN_BIN) & (tl.gather(place, number, 0) < listed)
    slot = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(kept_ptr + here + slot, number * SEGMENT + at, mask=keep)
    if TAIL:
        tl.store(bundle_of_ptr + here + at, tl.full((SEGMENT,), UNLISTED, tl.int16))
    tl.debug_barrier()  # what is read below was written by other threads
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
        tl.store(table_ptr + row * places + to, base + position, mask=fits)
        if TAIL:
            tl.store(bundle_of_ptr + row * room + position, (to // BUNDLE).to(tl.int16), mask=fits)
        place += sizes
