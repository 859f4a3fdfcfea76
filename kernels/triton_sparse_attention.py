"""S2O sparse attention in Triton: the keys of a tile's order, bundle by bundle, until what is left is not worth it.

Keys and values stay where they are: each key tile is loaded through a page table of runs of keys (see
`kernels/triton_sparse_order.py`, but any table will do): first the dense part of a tile of queries, then its bundles,
with the stop test between them. What stands in for the rest is folded in by `kernels/triton_sparse_tail.py`.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from s2o_inductor.kernels.launching import UNSPECIALIZED
from s2o_inductor.kernels.primitives import LN_2, LOG2_E, schedule, store_tile
from s2o_inductor.kernels.triton_sparse_tiles import (
    gather_rows,
    load_allowed,
    packed_keys,
    ranked_keys,
    ranked_runs,
    tile_keys,
)


@triton.jit
def update(state, products, v, scale2):
    """One step of the online softmax: (acc, peak, total) after keys with these products with the queries, and values.

    Hidden products are -inf; `scale2` is above 0, so that it may follow the maximum.
    """
    acc, peak, total = state
    new_peak = tl.maximum(peak, tl.max(products, 1) * scale2)
    # A row that has seen nothing yet keeps the peak -inf; -inf - -inf would be NaN.
    origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(products * scale2 - origin[:, None])
    decay = tl.exp2(peak - origin)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def _read(
    state, q, k_ptr, k_steps, v_ptr, v_steps, batch, kv_head, key, visible, scale2, MASKED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """`update` with the keys at positions `key`; with MASKED, only where `visible` (BN,)."""
    k = gather_rows(k_ptr, k_steps, batch, kv_head, key, visible, MASKED, D, BLOCK_D)
    products = tl.dot(q, k.T, input_precision="ieee")
    if MASKED:
        products = tl.where(visible[None, :], products, float("-inf"))
    v = gather_rows(v_ptr, v_steps, batch, kv_head, key, visible, MASKED, DV, BLOCK_DV)
    return update(state, products, v, scale2)


@triton.jit
def finish(state, out_ptr, lse_ptr, batch, head, heads, query, queries, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Output and log-sum-exp of the queries at `query` that exist; 0 and -inf where nothing was seen."""
    acc, peak, total = state
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN_2)
    at = tl.where(query < 0, queries, query)  # a short first tile begins before the first query
    store_tile(out_ptr, batch, head, heads, at, queries, acc / total[:, None], DV, BLOCK_DV)
    place = (batch.to(tl.int64) * heads + head) * queries + query
    tl.store(lse_ptr + place, lse, mask=(query >= 0) & (query < queries))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attend_kernel(
    q_ptr, q_steps, k_ptr, k_steps, v_ptr, v_steps, out_ptr, lse_ptr, table_ptr, listed_ptr, allowed_ptr, before_ptr,
    runs_ptr, documents_ptr, query_documents_ptr, key_documents_ptr, budgets_ptr, bundles_ptr, tail_ptr, pairs_ptr,
    visible_ptr, heads, group, queries, keys, window, sink, first_tile, tiles, tile0, count, places, section, scale,
    TILE: tl.constexpr, UNIT: tl.constexpr, RUN: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    KEYS: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, BUNDLE: tl.constexpr, HORIZON: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Output, log-sum-exp and statistics of one tile of one query head, before the tail.

    A head with a budget below 0 reads its whole prefix in place, whatever the table lists. RAGGED says that the keys of
    listed runs need not be a multiple of BN.
    """
    scale2 = tl.cast(scale, tl.float32) * LOG2_E
    of_range, bh = schedule(count, section, CAUSAL)
    tile = tile0 + of_range
    batch = bh // heads
    head = bh % heads
    kv_head = head // group
    start, end, low, high = tile_keys(first_tile + tile, queries, keys, window, sink, TILE, UNIT, CAUSAL, WINDOWED)
    low, high = packed_keys(documents_ptr, batch, tile, tiles, low, high, PACKED)
    ranked = ranked_keys(before_ptr, batch, keys, low, high, KEYS)
    places_ranked = ranked_runs(runs_ptr, batch, keys, low, high, RUN, KEYS) * RUN
    row = ((batch * (heads // group) + kv_head) * count + of_range).to(tl.int64)
    listed = tl.load(listed_ptr + row) * RUN
    budget = tl.load(budgets_ptr + head)

    position = (first_tile + tile) * TILE + tl.arange(0, TILE)
    exists = (position >= start) & (position < end)
    query = position - (keys - queries)
    q = gather_rows(q_ptr, q_steps, batch, head, query, exists, True, D, BLOCK_D)
    acc = tl.zeros((TILE, BLOCK_DV), tl.float32)
    peak = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)

    # The dense part: [first, low) and [high, last), each in whole key tiles; most of them lie on an edge of the mask.
    last = end if CAUSAL else keys
    first = tl.maximum(start - window + 1, 0) if WINDOWED else start * 0
    if PACKED:
        first = tl.maximum(first, tl.minimum(tl.load(documents_ptr + (batch.to(tl.int64) * tiles + tile) * 2), last))
        of_query = tl.load(query_documents_ptr + batch.to(tl.int64) * queries + query, mask=exists, other=-1)
    before = tl.cdiv(tl.maximum(tl.minimum(low, last) - first, 0), BN)
    after = tl.cdiv(tl.maximum(last - tl.maximum(high, first), 0), BN)
    if low == high:  # no prefix: one run of keys
        before = 0
        after = tl.cdiv(last - first, BN)
    pairs = tl.zeros((TILE,), tl.int32)
    for step in tl.range(0, before + after):
        from_start = (step < before) | (low == high)
        key = tl.where(from_start, first + step * BN, tl.maximum(high, first) + (step - before) * BN) + tl.arange(0, BN)
        there = load_allowed(allowed_ptr, batch, keys, key, key < tl.where(step < before, low, last), KEYS)
        k = gather_rows(k_ptr, k_steps, batch, kv_head, key, there, True, D, BLOCK_D)
        products = tl.dot(q, k.T, input_precision="ieee")
        if PACKED:  # a key that is not there has no query's document, and a query that is not there no key's
            of_key = tl.load(key_documents_ptr + batch.to(tl.int64) * keys + key, mask=there, other=-2)
            visible = of_key[None, :] == of_query[:, None]
        else:
            visible = there[None, :] & exists[:, None]
        if CAUSAL:
            visible = visible & (key[None, :] <= position[:, None])
        if WINDOWED:
            visible = visible & (key[None, :] > position[:, None] - window)
        pairs += tl.sum(visible.to(tl.int32), 1)
        v = gather_rows(v_ptr, v_steps, batch, kv_head, key, there, True, DV, BLOCK_DV)
        acc, peak, total = update((acc, peak, total), tl.where(visible, products, float("-inf")), v, scale2)

    bundles = start * 0
    left = tl.zeros((TILE,), tl.float32)
    tokens = start * 0  # places of the order, in which some keys may be hidden
    read = start * 0
    if budget < 0.0:
        for key0 in tl.range(low, high, BN):
            key = key0 + tl.arange(0, BN)
            # Prefixes need not be a multiple of BN.
            there = load_allowed(allowed_ptr, batch, keys, key, key < high, KEYS)
            acc, peak, total = _read(
                (acc, peak, total), q, k_ptr, k_steps, v_ptr, v_steps, batch, kv_head, key, there, scale2, True,
                D, DV, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        read = ranked
        bundles = tl.cdiv(places_ranked, BUNDLE)
    else:
        going = listed > 0
        while going:
            peak0 = peak
            total0 = total
            size = tl.minimum(listed - tokens, BUNDLE)
            here = table_ptr + row * places + tokens // RUN
            of_step = tl.arange(0, BN)
            run = tl.load(here + of_step // RUN)
            for step in tl.range(0, tl.cdiv(size, BN)):
                there = step * BN + of_step < size
                if RAGGED:
                    run = tl.where(there, run, 0)
                if RUN > BN:  # a run takes several steps
                    key = run * RUN + (step * BN + of_step) % RUN
                else:
                    key = run * RUN + of_step % RUN
                # The next step's runs, a step ahead: a load whose address another load of the same step brings
                # would leave the pipeline one stage for the two of them.
                ahead = (step + 1) * BN + of_step
                run = tl.load(here + ahead // RUN, mask=ahead < size, other=0)
                if KEYS:
                    there = load_allowed(allowed_ptr, batch, keys, key, there, KEYS)
                    read += tl.sum(there.to(tl.int32), 0)
                acc, peak, total = _read(
                    (acc, peak, total), q, k_ptr, k_steps, v_ptr, v_steps, batch, kv_head, key, there, scale2, RAGGED,
                    D, DV, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
            bundles += 1
            tokens += size
            if not KEYS:
                read += size
            # What is left if later tokens weigh as much as this bundle's (`stop_rule.stop_after`, "tail").
            kept = total0 * tl.exp2(peak0 - tl.where(peak == float("-inf"), 0.0, peak))
            gain = 1.0 - tl.minimum(kept / tl.where(total > 0.0, total, 1.0), 1.0)
            ratio = (places_ranked - tokens).to(tl.float32) / size.to(tl.float32)
            counts = exists & (total > 0.0)
            left = tl.where(counts, ratio * gain / (1.0 + ratio * gain), 0.0)
            assumed = tl.where(ratio > 0.0, tl.maximum(ratio, HORIZON), 0.0) * gain
            worst = tl.max(tl.where(counts, assumed / (1.0 + assumed), 0.0), 0)
            going = (tokens < listed) & (worst > budget)

    finish((acc, peak, total), out_ptr, lse_ptr, batch, head, heads, query, queries, DV, BLOCK_DV)
    place = bh.to(tl.int64) * tiles + tile
    rows = (end - start).to(tl.int64)
    seen = tl.sum((exists & (total > 0.0)).to(tl.int32), 0)
    dense = tl.sum(pairs.to(tl.int64), 0)
    tl.store(bundles_ptr + place, bundles.to(tl.int64))
    tl.store(tail_ptr + place, tl.sum(left, 0) / tl.maximum(seen, 1).to(tl.float32))
    tl.store(pairs_ptr + place, dense + read * rows)
    tl.store(visible_ptr + place, dense + ranked * rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def bundle_of_kernel(
    table_ptr, listed_ptr, bundle_of_ptr, places, room, base, RUN: tl.constexpr, BUNDLE: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Bundles by run from a page table that came without, BN places of one row."""
    blocks = tl.cdiv(places, BN)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    there = place < tl.load(listed_ptr + row)
    run = tl.load(table_ptr + row * places + place, mask=there, other=0)
    to = bundle_of_ptr + row * room + run - base // RUN
    tl.store(to, (place // (BUNDLE // RUN)).to(tl.int16), mask=there)
