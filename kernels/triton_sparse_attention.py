"""S2O sparse attention in Triton: the keys of a tile's order, bundle by bundle, until what is left is not worth it.

Keys and values stay where they are: each key tile is loaded through a page table of runs of keys (see
`kernels/triton_sparse_order.py`, but any table will do). Three kernels:

    attend   the dense part of a tile of queries, then its bundles, with the stop test between them: output, log-sum-exp
    unread   what of each group of like keys was not read
    tail     the groups stand in for that: folded into the output by its log-sum-exp

Groups are made once per key/value head, by `kernels/triton_sparse_groups.py`. A tile of a query head, which stops by
itself, adds only how many keys of each group it did not read.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from s2o_inductor.kernels.launching import UNSPECIALIZED
from s2o_inductor.kernels.primitives import LN_2, LOG2_E, schedule, store_tile
from s2o_inductor.kernels.triton_sparse_table import SEGMENT
from s2o_inductor.kernels.triton_sparse_tiles import (
    gather_rows,
    load_allowed,
    packed_keys,
    ranked_keys,
    ranked_runs,
    tile_keys,
)

# How much more than what was read a tail may weigh before the maximum of its scores has to be followed: a weight in
# float16 is at most 65504.
_MOST = tl.constexpr(32768.0)


@triton.jit
def _update(state, products, v, scale2):
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
    """`_update` with the keys at positions `key`; with MASKED, only where `visible` (BN,)."""
    k = gather_rows(k_ptr, k_steps, batch, kv_head, key, visible, MASKED, D, BLOCK_D)
    products = tl.dot(q, k.T, input_precision="ieee")
    if MASKED:
        products = tl.where(visible[None, :], products, float("-inf"))
    v = gather_rows(v_ptr, v_steps, batch, kv_head, key, visible, MASKED, DV, BLOCK_DV)
    return _update(state, products, v, scale2)


@triton.jit
def _finish(state, out_ptr, lse_ptr, batch, head, heads, query, queries, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
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
        acc, peak, total = _update((acc, peak, total), tl.where(visible, products, float("-inf")), v, scale2)

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

    _finish((acc, peak, total), out_ptr, lse_ptr, batch, head, heads, query, queries, DV, BLOCK_DV)
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


@triton.jit
def _has_tail(listed, bundles, ranked, budget, BUNDLE: tl.constexpr, RUN: tl.constexpr):
    """Whether a head left some of its `ranked` runs unread, and may."""
    return (tl.minimum(listed, bundles * (BUNDLE // RUN)) < ranked) & (budget >= 0.0)


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
        if _has_tail(listed, bundles, ranked, tl.load(budgets_ptr + head % heads), BUNDLE, RUN):
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
    q, squares, left, shrunk, mean_k_ptr, variance_ptr, mean_v_ptr, kv_bh, number, high, groups, scale2, most,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """What stands in for the groups at `number` (BN,) below `high`.

    Returns:
        base-2 scores of one key of each, what its `shrunk` spread adds to them at most `most` and -inf where no key is
        `left`: products of q and mean keys, to be scaled by `scale2`, and what is to be added to that; and mean values.
    """
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
    return products, spread, v


@triton.jit(do_not_specialize=UNSPECIALIZED)
def tail_kernel(
    q_ptr, q_steps, out_ptr, lse_ptr, listed_ptr, unread_ptr, mean_k_ptr, variance_ptr, mean_v_ptr, runs_ptr,
    documents_ptr, budgets_ptr, bundles_ptr, heads, group, queries, keys, window, sink, first_tile, tiles, tile0,
    count, base, room, groups, section, scale, limit, TILE: tl.constexpr, UNIT: tl.constexpr, RUN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr, BUNDLE: tl.constexpr,
    CLUSTERS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Folds the tail of BM rows of a tile of one query head into output and log-sum-exp, BN groups at a time.

    See `tail_groups.tail_logits`, and `GroupTable` and `unread_kernel` for what it reads. Weights are relative to the
    mass of what was read, which a tail seldom outweighs: no maximum has to be followed. Where it does, by more than
    _MOST, the tile is done again and the maximum followed.
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
    if _has_tail(listed, bundles, ranked, tl.load(budgets_ptr + head), BUNDLE, RUN):
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
        for group0 in tl.range(first_group, end_group, BN):
            number = group0 + of_step
            left, shrunk = _load_unread(of_unread, span, number, end_group)
            products, spread, v = _stand_in(
                q, squares, left, shrunk, mean_k_ptr, variance_ptr, mean_v_ptr, kv_bh, number, end_group, groups,
                scale2, most, D, DV, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            # Times what is left, not plus its logarithm, which would be more instructions than all else here.
            weights = tl.exp2(products * scale2 + (spread - origin[:, None])) * left[None, :]
            total += tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        peak = origin
        outweighed = exists & ((total > _MOST) | (before == 0.0))
        if tl.sum(outweighed.to(tl.int32), 0) > 0:
            acc = gather_rows(out_ptr, steps, batch, head, query, exists, True, DV, BLOCK_DV).to(tl.float32)
            peak = lse
            total = before
            # More stages would cost the first loop registers.
            for group0 in tl.range(first_group, end_group, BN, num_stages=1):
                number = group0 + of_step
                left, shrunk = _load_unread(of_unread, span, number, end_group)
                products, spread, v = _stand_in(
                    q, squares, left, shrunk, mean_k_ptr, variance_ptr, mean_v_ptr, kv_bh, number, end_group, groups,
                    scale2, most, D, DV, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
                scores = products * scale2 + spread + tl.log2(tl.maximum(left, 1e-6))[None, :]
                acc, peak, total = _update((acc, peak, total), scores, v, 1.0)
        _finish((acc, peak, total), out_ptr, lse_ptr, batch, head, heads, query, queries, DV, BLOCK_DV)
