"""What the Triton kernels of this package share on the device: tiles, masks, tile ranges, dropout.

Addresses are int64 throughout: a byte offset passes 2^31 long before memory runs out. Positions are
int32. `kernels/launching.py` is the host's side.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

# Plan tables count queries and keys in tiles of these sizes (s2o_inductor.ops).
TILE_QUERIES = tl.constexpr(128)
TILE_KEYS = tl.constexpr(64)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# What a mask consists of: bits of the constexpr TERMS.
LOWER = tl.constexpr(1)
UPPER = tl.constexpr(2)
EQUAL = tl.constexpr(4)
AT_MOST = tl.constexpr(8)
TILES = tl.constexpr(16)  # a table says which tiles to visit
BOOLEAN = tl.constexpr(32)
ADDITIVE = tl.constexpr(64)
DENSE = tl.constexpr(32 + 64)
ONE_ROW = tl.constexpr(128)  # the dense mask is the same for all queries
POINTERS = tl.constexpr(256)  # the dense mask is read through pointers, not in tiles
# In base 2, above the overflow of float32 and below any score that counts beside another.
LEAST_SCORE = tl.constexpr(-3.0e38)
# Which tiles of a loop take the mask: none, those outside the wholly visible run, all.
NEVER = tl.constexpr(0)
BORDER = tl.constexpr(1)
ALWAYS = tl.constexpr(2)


@triton.jit
def schedule(tiles, section, REVERSED: tl.constexpr):
    """(tile, head) of this program, head counted over batch and heads.

    Programs come in sections of `section` heads, whose operands the L2 cache holds; within one, all
    heads' first tiles go first (or last tiles, if REVERSED): put the longest there, and the last wave
    of programs is short.
    """
    program = tl.program_id(0)
    total = tl.num_programs(0) // tiles
    first = program // tiles // section * section
    within = program - first * tiles
    present = tl.minimum(section, total - first)
    tile = within // present
    if REVERSED:
        tile = tiles - 1 - tile
    return tile, first + within % present


@triton.jit
def load_tile(source, batch, head, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [start, start + ROWS) of one head, (ROWS, BLOCK), zero beyond the operand."""
    return source.load([batch, head, start, 0]).reshape(ROWS, BLOCK)


@triton.jit
def load_row(source, head, start, ROWS: tl.constexpr):
    """Numbers [start, start + ROWS) of one head, (ROWS,)."""
    return source.load([head, start]).reshape(ROWS)


@triton.jit
def store_tile(pointer, batch, head, heads, index, length, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes rows `index` below `length` of one head of a tensor whose memory is (B, length, heads, WIDTH)."""
    column = tl.arange(0, BLOCK)
    row = (batch.to(tl.int64) * length + index) * heads + head
    keep = (index < length)[:, None] & (column < WIDTH)[None, :]
    tl.store(pointer + row[:, None] * WIDTH + column[None, :], values.to(pointer.dtype.element_ty), mask=keep)


@triton.jit
def load_terms(terms_ptr, batch, index, length, TERMS: tl.constexpr):
    """Rows 0 and 1 of terms (B, 2, length) at `index`, 0 from `length` on; `index` itself for a row without meaning."""
    equal = index
    at_most = index
    place = terms_ptr
    if (EQUAL | AT_MOST) & TERMS:
        place = terms_ptr + batch.to(tl.int64) * 2 * length + index
    if EQUAL & TERMS:
        equal = tl.load(place, mask=index < length, other=0)
    if AT_MOST & TERMS:
        at_most = tl.load(place + length, mask=index < length, other=0)
    return equal, at_most


@triton.jit
def across(x, QUERIES_FIRST: tl.constexpr, OF_QUERY: tl.constexpr):
    """A vector over queries or keys as a column or row of scores that lie (queries, keys), or (keys, queries)."""
    if QUERIES_FIRST == OF_QUERY:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def load_dense(corner, q, k, where, dense, steps, TERMS: tl.constexpr, QUERIES_FIRST: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr):  # fmt: skip
    """The tile of a dense mask at `corner`, as the scores lie; 0 beyond the last query or key."""
    batch, head, queries, keys = where
    if POINTERS & TERMS:
        base = dense + batch.to(tl.int64) * steps[0] + head.to(tl.int64) * steps[1]
        place = base + q.to(tl.int64) * steps[2] + k.to(tl.int64) * steps[3]
        return tl.load(place, mask=(q < queries) & (k < keys), other=0)
    else:
        entry = dense.load([batch * steps[0], head * steps[1], corner[0] * steps[2], corner[1]])
        entry = entry.reshape(1 if ONE_ROW & TERMS else BM, BN)
        return entry if QUERIES_FIRST else entry.T


@triton.jit
def hide(scores, side_q, side_k, where, mask, TERMS: tl.constexpr, QUERIES_FIRST: tl.constexpr):
    """Scores (queries, keys), or (keys, queries) unless QUERIES_FIRST, with -inf at hidden positions.

    An additive mask is added too; the scores are then in base 2. Rows beyond the last query are left
    as they come: no kernel keeps what they produce.

    `side_q` is (first query of the tile, all of them), `side_k` the same of its keys; `where` is (batch,
    head, queries, keys) with the latter two sizes; `mask` is (dense, steps of dense, lower, upper, terms
    of the side that the program keeps, pointer to those of the side that it walks).
    """
    batch, _, queries, keys = where
    dense, steps, lower, upper, kept_terms, walked_ptr = mask
    q = across(side_q[1], QUERIES_FIRST, True)
    k = across(side_k[1], QUERIES_FIRST, False)
    visible = k < keys
    if LOWER & TERMS:
        visible = visible & (k - q >= lower)
    if UPPER & TERMS:
        visible = visible & (k - q <= upper)
    # Terms come as vectors and are spread only here, so that they, not the scores, change their layout.
    if QUERIES_FIRST:
        of_q = kept_terms
        of_k = load_terms(walked_ptr, batch, side_k[1], keys, TERMS)
    else:
        of_q = load_terms(walked_ptr, batch, side_q[1], queries, TERMS)
        of_k = kept_terms
    if EQUAL & TERMS:
        visible = visible & (across(of_k[0], QUERIES_FIRST, False) == across(of_q[0], QUERIES_FIRST, True))
    if AT_MOST & TERMS:
        visible = visible & (across(of_k[1], QUERIES_FIRST, False) <= across(of_q[1], QUERIES_FIRST, True))
    if DENSE & TERMS:
        entry = load_dense(
            (side_q[0], side_k[0]), q, k, where, dense, steps, TERMS, QUERIES_FIRST, side_q[1].shape[0],
            side_k[1].shape[0],
        )  # fmt: skip
        if BOOLEAN & TERMS:
            visible = visible & (entry != 0)
        else:
            entry = entry.to(tl.float32)
            visible = visible & (entry != float("-inf"))
            # The least float32 times log2(e) overflows; it means "hardly", not "never".
            scores = tl.maximum(scores + entry * LOG2_E, LEAST_SCORE)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def base2_scores(
    products, scale2, tile, full, side_q, side_k, where, mask, TERMS: tl.constexpr, MASKING: tl.constexpr,
    QUERIES_FIRST: tl.constexpr,
):  # fmt: skip
    """Products of queries and keys as masked scores in base 2; `full` are the bounds of the wholly visible tiles."""
    if MASKING == ALWAYS:
        return hide(products * scale2, side_q, side_k, where, mask, TERMS, QUERIES_FIRST)
    else:
        if MASKING == BORDER:  # noqa: SIM102 - one is known to the compiler, the other is not
            if (tile < full[0]) | (tile >= full[1]):
                products = hide(products, side_q, side_k, where, mask, TERMS, QUERIES_FIRST)
        # Scaled only now (scale2 is positive), so that it fuses with the subtraction that follows.
        return products * scale2


@triton.jit
def kept(dropout, q_index, k_index, QUERIES_FIRST: tl.constexpr):
    """Which weights survive dropout: a function of seed, query, key and batch * Hq + head alone.

    One Philox-4x32 counter a weight (Salmon et al., SC 2011), so that forward and backward agree
    whatever their tiles are.

    `dropout` is (seed_ptr, probability, batch * Hq + head); the indices are as in `hide`.
    """
    seed_ptr, probability, stream = dropout
    q = across(q_index, QUERIES_FIRST, True)
    k = across(k_index, QUERIES_FIRST, False)
    zero = (q + k) * 0
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), zero + q, zero + k, zero + stream, zero)
    return tl.uint_to_uniform_float(bits) >= probability


@triton.jit
def tile_range(first, first_full, end_full, end, BLOCK: tl.constexpr):
    """Positions as tiles of BLOCK: [first, first_full) and [end_full, end) masked, between them wholly visible."""
    first_tile = first // BLOCK
    end_tile = tl.maximum(tl.cdiv(end, BLOCK), first_tile)
    first_full_tile = tl.minimum(tl.maximum(tl.cdiv(first_full, BLOCK), first_tile), end_tile)
    end_full_tile = tl.minimum(tl.maximum(end_full // BLOCK, first_full_tile), end_tile)
    return first_tile, first_full_tile, end_full_tile, end_tile


@triton.jit
def tile_rows(batch, head, tiles_heads, count):
    """First row of one head in a tile table (B, tiles_heads, count, 4), whose heads are one or all."""
    return (batch.to(tl.int64) * tiles_heads + tl.where(tiles_heads > 1, head, 0)) * count


@triton.jit
def key_range(
    row, where, tiles_ptr, tiles_heads, lower, upper, TERMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """`tile_range` of the keys that rows [row, row + BM) see; BM divides TILE_QUERIES."""
    batch, head, queries, keys = where
    first = 0
    first_full = 0
    end_full = keys
    end = keys
    if TILES & TERMS:
        tile = tile_rows(batch, head, tiles_heads, tl.cdiv(queries, TILE_QUERIES)) + row // TILE_QUERIES
        entry = tiles_ptr + tile * 4
        first = tl.load(entry) * TILE_KEYS
        first_full = tl.load(entry + 1) * TILE_KEYS
        end_full = tl.load(entry + 2) * TILE_KEYS
        end = tl.load(entry + 3) * TILE_KEYS
    else:
        if LOWER & TERMS:
            first = tl.minimum(tl.maximum(row + lower, 0), keys)
            first_full = tl.maximum(tl.minimum(row + BM, queries) - 1 + lower, 0)
        if UPPER & TERMS:
            end_full = tl.maximum(tl.minimum(row + upper + 1, keys), 0)
            end = tl.maximum(tl.minimum(tl.minimum(row + BM, queries) + upper, keys), 0)
    if ADDITIVE & TERMS:  # has to be read everywhere
        end_full = first_full
    return tile_range(first, first_full, end_full, end, BN)


@triton.jit
def query_range(
    column, where, tiles_ptr, tiles_heads, lower, upper, TERMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """`tile_range` of the queries that see keys [column, column + BN); BN is a multiple of TILE_KEYS or divides it.

    The last query tile counts as masked when it is ragged.
    """
    batch, head, queries, keys = where
    first = 0
    first_full = 0
    end_full = queries
    end = queries
    if TILES & TERMS:
        COUNT: tl.constexpr = (BN + TILE_KEYS - 1) // TILE_KEYS
        tile = column // TILE_KEYS + tl.arange(0, COUNT)
        entry = tiles_ptr + (tile_rows(batch, head, tiles_heads, tl.cdiv(keys, TILE_KEYS)) + tile) * 4
        there = tile < tl.cdiv(keys, TILE_KEYS)
        firsts = tl.load(entry, mask=there, other=0)
        ends = tl.load(entry + 3, mask=there, other=0)
        # The hull of what the key tiles see, and what all of them see wholly.
        end = tl.max(ends) * TILE_QUERIES
        first = tl.minimum(tl.min(tl.where(ends > firsts, firsts, 1 << 23)) * TILE_QUERIES, end)
        first_full = tl.max(tl.load(entry + 1, mask=there, other=0)) * TILE_QUERIES
        end_full = tl.min(tl.load(entry + 2, mask=there, other=1 << 23)) * TILE_QUERIES
        end = tl.minimum(end, queries)
        end_full = tl.minimum(end_full, queries)
    else:
        if UPPER & TERMS:  # q >= k - upper
            first = tl.minimum(tl.maximum(column - upper, 0), queries)
            first_full = tl.maximum(tl.minimum(column + BN, keys) - 1 - upper, 0)
        if LOWER & TERMS:  # q <= k - lower
            end_full = tl.maximum(tl.minimum(column - lower + 1, queries), 0)
            end = tl.maximum(tl.minimum(tl.minimum(column + BN, keys) - lower, queries), 0)
    if ADDITIVE & TERMS:
        end_full = first_full
    return tile_range(first, first_full, end_full, end, BM)
