"""S2O sparse attention for Hopper in Gluon: `triton_sparse_attention.attend_kernel` with products under the softmax.

Triton waits for the scores of a tile of keys before their softmax begins, and for that before the next product. Here
the weights of tile t times their values run under the softmax of tile t + 1, whose scores were begun just before
(FlashAttention-3, arXiv 2407.08608, section 3.2). No product is in flight where one step ends and the next begins:
ptxas then puts all of them one after another.

The key tiles of one program are one stream: the queries' own keys, the sink, then the order, bundle by bundle. So the
stop test stands between two tiles whose loads are under way; if it stops, they are thrown away.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from s2o_inductor.kernels.launching import UNSPECIALIZED
from s2o_inductor.kernels.primitives import LN_2, LOG2_E, schedule
from s2o_inductor.kernels.triton_sparse_tiles import tile_keys

# A load into shared memory has one name in Triton 3.6 and another in 3.9.
_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
# Keys of a run: a warp loads whole ones, so that a thread needs a single number of the page table for a tile.
RUN = gl.constexpr(8)


@gluon.jit
def _runs(stream, tile, ROWS: gl.constexpr, BN: gl.constexpr):
    """Numbers (BN // RUN, 1) of the runs of a tile of the stream; any that exist for a tile beyond its end."""
    table, own, own_tiles, listed_from, end, keys = stream
    COUNT: gl.constexpr = BN // RUN
    of_tile = gl.arange(0, COUNT, layout=gl.SliceLayout(1, ROWS))
    listed = (tile >= listed_from) & (tile < end)
    found = gl.load(table + (tile - listed_from) * COUNT + of_tile, mask=listed, other=0)
    # What is not listed lies in order: from `own` on the first tiles, from 0 on the others.
    first = gl.where(tile < own_tiles, own // RUN + tile * COUNT, (tile - own_tiles) * COUNT)
    run = gl.where(listed, found, gl.minimum(first + of_tile, (keys - 1) // RUN))
    return gl.expand_dims(run, 1)


@gluon.jit
def _load(rings, operands, stream, tile, run, ROWS: gl.constexpr, LOAD: gl.constexpr, BN: gl.constexpr):
    """Starts loading keys and values of the runs of a tile into its places in the rings; nothing beyond the stream."""
    k_ring, v_ring = rings
    k_ptr, k_step, v_ptr, v_step = operands
    _, _, _, _, end, keys = stream
    of_run = gl.arange(0, RUN, layout=gl.SliceLayout(0, ROWS))
    key = gl.reshape(run * RUN + gl.expand_dims(of_run, 0), [BN])
    key = gl.convert_layout(key, gl.SliceLayout(1, LOAD), assert_trivial=True)
    # The last run may be cut short by the end of the keys; the mask hides what stands in for the rest.
    key = gl.expand_dims(gl.minimum(key, keys - 1).to(gl.int64), 1)
    column = gl.expand_dims(gl.arange(0, k_ring.shape[2], layout=gl.SliceLayout(0, LOAD)), 0)
    _copy(k_ring.index(tile % k_ring.shape[0]), k_ptr + key * k_step + column, mask=tile < end)
    _copy(v_ring.index(tile % v_ring.shape[0]), v_ptr + key * v_step + column, mask=tile < end)
    async_copy.commit_group()


@gluon.jit
def _scores(q, k_ring, tile, LAYOUT: gl.constexpr):
    """Starts the products of the queries with a tile of keys."""
    k = k_ring.index(tile % k_ring.shape[0]).permute((1, 0))
    nothing = gl.full([q.shape[0], k.shape[1]], 0.0, gl.float32, LAYOUT)
    return warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)


@gluon.jit
def _softmax(scores, peak, total, scale2, OUTPUT: gl.constexpr, TYPE: gl.constexpr):
    """(weights, decay, peak, total) of the online softmax after these scores, unscaled and -inf where hidden.

    Weights are an operand of the next product, decay is what the output so far shrinks by.
    """
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale2)
    # A row that has seen nothing yet keeps the peak -inf; -inf - -inf would be NaN.
    origin = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = gl.exp2(scores * scale2 - gl.expand_dims(origin, 1))
    decay = gl.exp2(peak - origin)
    total = total * decay + gl.sum(weights, 1)
    weights = gl.convert_layout(weights.to(TYPE), gl.DotOperandLayout(0, OUTPUT, 2), assert_trivial=True)
    return weights, gl.convert_layout(decay, gl.SliceLayout(1, OUTPUT), assert_trivial=True), new_peak, total


@gluon.jit
def _hide(scores, first, position, SCORES: gl.constexpr):
    """Scores with -inf at the keys, `first` and those after it, that come after their query."""
    key = first + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, SCORES))
    return gl.where(gl.expand_dims(key, 0) <= gl.expand_dims(position, 1), scores, float("-inf"))


@gluon.jit
def _step(
    state, tile, q, rings, operands, stream, position, scale2, ROWS: gl.constexpr, LOAD: gl.constexpr,
    SCORES: gl.constexpr, OUTPUT: gl.constexpr, BN: gl.constexpr, AHEAD: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Weights of tile `tile` times their values, and under these the softmax of the next tile; MASKED says that it
    is one of the queries' own."""
    acc, weights, peak, total, run, later = state
    k_ring, v_ring = rings
    async_copy.wait_group(AHEAD - 2)  # for the next tile
    fence_async_shared()
    scores = _scores(q, k_ring, tile + 1, SCORES)
    acc = warpgroup_mma(weights, v_ring.index(tile % v_ring.shape[0]), acc, is_async=True)
    # All warps are done with the keys of this tile, and with the values of the one before.
    _load(rings, operands, stream, tile + AHEAD, run, ROWS, LOAD, BN)
    run = later
    later = _runs(stream, tile + AHEAD + 2, ROWS, BN)
    scores = warpgroup_mma_wait(1, deps=[scores])
    if MASKED:
        scores = _hide(scores, stream[1] + (tile + 1) * BN, position, SCORES)
    following, decay, peak, total = _softmax(scores, peak, total, scale2, OUTPUT, v_ring.dtype)
    acc = warpgroup_mma_wait(0, deps=[acc])
    return acc * gl.expand_dims(decay, 1), following, peak, total, run, later


@gluon.jit
def _tile_of(
    table_ptr, listed_ptr, budgets_ptr, heads, group, queries, keys, window, sink, first_tile, tile0, count, places,
    section, TILE: gl.constexpr, UNIT: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """The tile of this program.

    Returns:
        (tile, batch and head as one, batch, query head, key/value head), (first position, the one after its last),
        its stream of key tiles (page table, first own key, own tiles, tiles before those that the table lists, tiles),
        how many keys are (sinks, ranked, listed), and the budget of the head.
    """
    of_range, bh = schedule(count, section, True)
    tile = tile0 + of_range
    batch = bh // heads
    head = bh % heads
    kv_head = head // group
    start, end, low, high = tile_keys(first_tile + tile, queries, keys, window, sink, TILE, UNIT, True, False)
    ranked = high - low
    row = ((batch * (heads // group) + kv_head) * count + of_range).to(gl.int64)
    budget = gl.load(budgets_ptr + head)
    exact = budget < 0.0
    listed = gl.where(exact, ranked, gl.load(listed_ptr + row) * RUN)
    # The stream: own keys, sink, order. An exact head's sink goes on to the end of its prefix.
    own = gl.where(ranked > 0, high, 0)
    sunk = gl.where(ranked > 0, low, 0)
    own_tiles = gl.cdiv(end - own, BN)
    sink_end = own_tiles + sunk // BN
    last = sink_end + listed // BN
    stream = (table_ptr + row * places, own, own_tiles, gl.where(exact, last, sink_end), last)
    return (tile, bh, batch, head, kv_head), (start, end), stream, (sunk, ranked, listed), budget


@gluon.jit
def _store_rows(
    state, out_ptr, lse_ptr, batch, head, heads, positions, begin, queries, keys, SCORES: gl.constexpr,
    OUTPUT: gl.constexpr,
):  # fmt: skip
    """Stores output and log-sum-exp of the rows from position `begin` on that lie in a tile's (first, end) positions.

    `state` is what a softmax leaves: sums of weighted values (rows, D), the peak and the total of each row.
    """
    acc, peak, total = state
    start, end = positions
    ROWS: gl.constexpr = acc.shape[0]
    position = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    empty = total == 0.0
    whole = gl.where(empty, 1.0, total)
    lse = gl.where(empty, float("-inf"), (peak + gl.log2(whole)) * LN_2)
    query = position - (keys - queries)
    exists = (position >= start) & (position < end)
    gl.store(lse_ptr + (batch.to(gl.int64) * heads + head) * queries + query, lse, mask=exists)
    acc = acc / gl.expand_dims(gl.convert_layout(whole, gl.SliceLayout(1, OUTPUT), assert_trivial=True), 1)
    query = begin - (keys - queries) + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUTPUT))
    there = (query >= start - (keys - queries)) & (query < end - (keys - queries))
    column = gl.expand_dims(gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, OUTPUT)), 0)
    place = ((batch.to(gl.int64) * queries + query) * heads + head) * acc.shape[1]
    out = acc.to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + gl.expand_dims(place, 1) + column, out, mask=gl.expand_dims(there, 1))


@gluon.jit
def _report(pointers, at, positions, tiles, ranked, read, bundles, left):
    """Stores the statistics of a tile: `left` is the mean share that its rows are estimated to leave."""
    bundles_ptr, tail_ptr, pairs_ptr, visible_ptr = pointers
    tile, bh, _, _, _ = at
    start, end = positions
    place = bh.to(gl.int64) * tiles + tile
    rows = (end - start).to(gl.int64)
    dense = rows * (start + 1 + end) // 2 - ranked * rows
    gl.store(bundles_ptr + place, bundles.to(gl.int64))
    gl.store(tail_ptr + place, left)
    gl.store(pairs_ptr + place, dense + read * rows)
    gl.store(visible_ptr + place, dense + ranked * rows)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def attend_kernel(
    q_ptr, q_steps, k_ptr, k_steps, v_ptr, v_steps, out_ptr, lse_ptr, table_ptr, listed_ptr, budgets_ptr, bundles_ptr,
    tail_ptr, pairs_ptr, visible_ptr, heads, group, queries, keys, window, sink, first_tile, tiles, tile0, count,
    places, section, scale, TILE: gl.constexpr, UNIT: gl.constexpr, BUNDLE: gl.constexpr, HORIZON: gl.constexpr,
    D: gl.constexpr, BN: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Output, log-sum-exp and statistics of one tile of one query head, before the tail.

    Causal, without window or padding; keys and values are equally wide, and bundles are whole key tiles. Loads run
    AHEAD tiles, at least 2, before the scores.
    """
    gl.static_assert(BUNDLE % BN == 0 and UNIT % BN == 0)
    WARPS: gl.constexpr = gl.num_warps()
    LANES: gl.constexpr = D // 8  # that load one row, 16 bytes each
    RUN_ROWS: gl.constexpr = RUN * LANES // 32
    LOAD: gl.constexpr = gl.BlockedLayout([RUN_ROWS, 8], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(
        2, gl.BlockedLayout([1, RUN_ROWS, 8], [1, 32 // LANES, LANES], [WARPS, 1, 1], [2, 1, 0])
    )
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    TYPE: gl.constexpr = k_ptr.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], TYPE)

    scale2 = gl.cast(scale, gl.float32) * LOG2_E
    where, positions, stream, sizes, budget = _tile_of(
        table_ptr, listed_ptr, budgets_ptr, heads, group, queries, keys, window, sink, first_tile, tile0, count, places,
        section, TILE, UNIT, BN,
    )  # fmt: skip
    tile, _, batch, head, kv_head = where
    start, end = positions
    sunk, ranked, listed = sizes
    _, own, own_tiles, _, _ = stream
    stream = stream + (keys,)  # noqa: RUF005 - Triton's tuple

    begin = (first_tile + tile) * TILE
    position = begin + gl.arange(0, TILE, layout=gl.SliceLayout(1, SCORES))
    of_load = begin + gl.arange(0, TILE, layout=gl.SliceLayout(1, LOAD))
    column = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, LOAD)), 0)
    of_head = q_ptr + batch.to(gl.int64) * q_steps[0] + head.to(gl.int64) * q_steps[1]
    place = gl.expand_dims((of_load - (keys - queries)).to(gl.int64), 1) * q_steps[2] + column
    there = gl.expand_dims((of_load >= start) & (of_load < end), 1)
    loaded = gl.load(of_head + place, mask=there, other=0.0)
    q = gl.allocate_shared_memory(TYPE, [TILE, D], SHARED, loaded)
    k_ring = gl.allocate_shared_memory(TYPE, [AHEAD, BN, D], SHARED)
    v_ring = gl.allocate_shared_memory(TYPE, [AHEAD + 1, BN, D], SHARED)
    rings = (k_ring, v_ring)
    operands = (
        k_ptr + batch.to(gl.int64) * k_steps[0] + kv_head.to(gl.int64) * k_steps[1], k_steps[2],
        v_ptr + batch.to(gl.int64) * v_steps[0] + kv_head.to(gl.int64) * v_steps[1], v_steps[2],
    )  # fmt: skip

    for first in gl.static_range(AHEAD):
        _load(rings, operands, stream, start * 0 + first, _runs(stream, first, ROWS, BN), ROWS, LOAD, BN)
    async_copy.wait_group(AHEAD - 1)
    fence_async_shared()
    scores = warpgroup_mma_wait(0, deps=[_scores(q, k_ring, start * 0, SCORES)])
    peak = gl.full([TILE], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.zeros([TILE], gl.float32, layout=gl.SliceLayout(1, SCORES))
    scores = _hide(scores, own, position, SCORES)
    weights, _, peak, total = _softmax(scores, peak, total, scale2, OUTPUT, TYPE)
    acc = gl.zeros([TILE, D], gl.float32, layout=OUTPUT)
    state = (acc, weights, peak, total, _runs(stream, AHEAD, ROWS, BN), _runs(stream, AHEAD + 1, ROWS, BN))
    # A tile's softmax is taken one step ahead of its product with the values.
    for now in range(0, own_tiles - 1):
        state = _step(
            state, now, q, rings, operands, stream, position, scale2, ROWS, LOAD, SCORES, OUTPUT, BN, AHEAD, True
        )

    exists = (position >= start) & (position < end)
    left = gl.zeros([TILE], gl.float32, layout=gl.SliceLayout(1, SCORES))
    bundles = start * 0
    read = start * 0
    at = own_tiles - 1
    size = sunk  # the sink first, which no test follows
    tested = start * 0
    going = ranked > 0
    while going:
        peak0 = state[2]
        total0 = state[3]
        stop = at + size // BN
        for now in range(at, stop):
            state = _step(
                state, now, q, rings, operands, stream, position, scale2, ROWS, LOAD, SCORES, OUTPUT, BN, AHEAD, False
            )
        at = stop
        bundles += tested
        read += size * tested
        # What is left if later tokens weigh as much as this bundle's (`stop_rule.stop_after`, "tail").
        peak = state[2]
        total = state[3]
        kept = total0 * gl.exp2(peak0 - gl.where(peak == float("-inf"), 0.0, peak))
        gain = 1.0 - gl.minimum(kept / gl.where(total > 0.0, total, 1.0), 1.0)
        ratio = (ranked - read).to(gl.float32) / gl.maximum(size, 1).to(gl.float32)
        counts = exists & (total > 0.0)
        left = gl.where(counts & (tested > 0), ratio * gain / (1.0 + ratio * gain), 0.0)
        assumed = gl.where(ratio > 0.0, gl.maximum(ratio, HORIZON), 0.0) * gain
        worst = gl.max(gl.where(counts, assumed / (1.0 + assumed), 0.0), 0)
        going = (read < listed) & ((worst > budget) | (tested == 0))
        size = gl.minimum(listed - read, BUNDLE)
        tested = start * 0 + 1

    acc, weights, peak, total, _, _ = state
    async_copy.wait_group(0)  # of a bundle that the test did not let through, too
    fence_async_shared()
    acc = warpgroup_mma(weights, v_ring.index(at % v_ring.shape[0]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    seen = gl.sum((exists & (total > 0.0)).to(gl.int32), 0)
    _store_rows(
        (acc, peak, total), out_ptr, lse_ptr, batch, head, heads, positions, begin, queries, keys, SCORES, OUTPUT
    )

    pointers = (bundles_ptr, tail_ptr, pairs_ptr, visible_ptr)
    share = gl.sum(left, 0) / gl.maximum(seen, 1).to(gl.float32)
    _report(pointers, where, positions, tiles, ranked, read, bundles, share)
