"""`gluon_sparse_attention.attend_kernel` in specialised warps: one loads keys and values, the others multiply.

One warp walks the stream of key tiles and has the bulk copy engine fetch its runs; the rows of a tile of queries are
shared out between warpgroups, each with a softmax and products of its own. So one's softmax can run under the other's
products (FlashAttention-3, arXiv 2407.08608, section 3.1), as well as under its own values' (section 3.2).

The halves agree on the stop after each bundle by their worst rows. A half that has voted goes on with the scores of
the next tile; if the vote is to stop, it hides them all, which leaves its softmax as it was. The loading warp runs
ahead by at most the tiles of its rings, less than a bundle may be: it learns of the stop by a flag, and waits for what
it has begun.
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

from s2o_inductor.kernels.gluon_sparse_attention import RUN, _hide
from s2o_inductor.kernels.launching import UNSPECIALIZED
from s2o_inductor.kernels.primitives import LN_2, LOG2_E, schedule
from s2o_inductor.kernels.triton_sparse_tiles import tile_keys

# Bulk loads, and memory seen otherwise, have one name in Triton 3.6 and another in 3.9.
_fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_memory = gl.shared_memory_descriptor
_reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret
# Columns of a piece of a run: a row of the shared layout, of 128 bytes.
PIECE = gl.constexpr(64)


@gluon.jit
def _turn(ring, number):
    """The place of tile `number` in a ring of barriers, and the parity of its turn there."""
    return number % ring.shape[0], number // ring.shape[0] & 1


@gluon.jit
def _await(ring, number, OTHER: gl.constexpr = 0):
    """Waits for turn `number` of a ring of barriers; for the turn before if OTHER, as done if there is none."""
    place, parity = _turn(ring, number)
    mbarrier.wait(ring.index(place), parity ^ OTHER)


@gluon.jit
def _pass(ring, number):
    """Arrives for turn `number` of a ring of barriers, if it is not negative."""
    place, _ = _turn(ring, gl.maximum(number, 0))
    mbarrier.arrive(ring.index(place), pred=number >= 0)


@gluon.jit
def _fetch_tile(descriptor, pieces, full, tile, runs, batch, head, BN: gl.constexpr, D: gl.constexpr):
    """Starts loading the runs of a tile into its place in a ring, given in pieces of one run."""
    COUNT: gl.constexpr = BN // RUN
    place, _ = _turn(full, tile)
    bar = full.index(place)
    mbarrier.expect(bar, BN * D * 2)
    for of_tile in gl.static_range(COUNT):
        _fetch(descriptor, [batch, head, 0, runs[of_tile] * RUN, 0], bar, pieces.index(place * COUNT + of_tile))


@gluon.jit
def _tile_of(ring, tile):
    """A tile of a ring of pieces as a matrix (keys, columns)."""
    split = ring.index(tile % ring.shape[0])
    COUNT: gl.constexpr = split.shape[0]
    HALVES: gl.constexpr = split.shape[1]
    return split.permute((0, 2, 1, 3)).reshape([COUNT * RUN, HALVES * PIECE])


@gluon.jit
def _products(q, k_ring, tile, LAYOUT: gl.constexpr):
    """Starts the products of the queries with a tile of keys."""
    k = _tile_of(k_ring, tile).permute((1, 0))
    nothing = gl.full([q.shape[0], k.shape[1]], 0.0, gl.float32, LAYOUT)
    return warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)


@gluon.jit
def _load(
    k_desc, v_desc, k_pieces, v_pieces, bars, flag, stream, batch, kv_head, BN: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The loading warp."""
    k_full, k_empty, v_full, v_empty = bars
    table, own, own_tiles, listed_from, end = stream
    COUNT: gl.constexpr = BN // RUN
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    tile = end * 0
    going = end > 0
    while going:
        listed = tile >= listed_from
        first = gl.where(tile < own_tiles, own // RUN + tile * COUNT, (tile - own_tiles) * COUNT)
        runs = ()
        for of_tile in gl.static_range(COUNT):
            found = gl.load(table + (tile - listed_from) * COUNT + of_tile, mask=listed, other=0)
            runs = runs + (gl.where(listed, found, first + of_tile),)
        _await(k_empty, tile, 1)
        _fetch_tile(k_desc, k_pieces, k_full, tile, runs, batch, kv_head, BN, D)
        _await(v_empty, tile, 1)
        stopped = gl.max(flag.load(ONE), 0)
        _fetch_tile(v_desc, v_pieces, v_full, tile, runs, batch, kv_head, BN, D)
        tile += 1
        going = (tile < end) & (stopped == 0)
    # Nothing may still be written when the program ends.
    DEPTH: gl.constexpr = k_full.shape[0]
    for back in gl.static_range(DEPTH):
        if tile > back:
            _await(k_full, tile - 1 - back)
            _await(v_full, tile - 1 - back)


@gluon.jit
def _load_one(
    descriptor, pieces, full, empty, flag, stream, batch, kv_head, BN: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """A loading warp, of the keys or of the values."""
    table, own, own_tiles, listed_from, end = stream
    COUNT: gl.constexpr = BN // RUN
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    tile = end * 0
    going = end > 0
    while going:
        listed = tile >= listed_from
        first = gl.where(tile < own_tiles, own // RUN + tile * COUNT, (tile - own_tiles) * COUNT)
        runs = ()
        for of_tile in gl.static_range(COUNT):
            found = gl.load(table + (tile - listed_from) * COUNT + of_tile, mask=listed, other=0)
            runs = runs + (gl.where(listed, found, first + of_tile),)
        _await(empty, tile, 1)
        going = gl.max(flag.load(ONE), 0) == 0
        if going:
            _fetch_tile(descriptor, pieces, full, tile, runs, batch, kv_head, BN, D)
            tile += 1
            going = tile < end
    # Nothing may still be written when the program ends.
    DEPTH: gl.constexpr = full.shape[0]
    for back in gl.static_range(DEPTH):
        if tile > back:
            _await(full, tile - 1 - back)


@gluon.jit
def _softmax(scores, peak, total, scale2, OUTPUT: gl.constexpr):
    """(weights, decay, peak, total) of the online softmax after these scores, unscaled and -inf where hidden.

    Decay is what the output so far shrinks by. Weights stay in float32 until their product: 16-bit numbers that a loop
    carries lie one in a register, and are packed and unpacked in every step.
    """
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale2)
    # A row that has seen nothing yet keeps the peak -inf; -inf - -inf would be NaN.
    origin = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = gl.exp2(scores * scale2 - gl.expand_dims(origin, 1))
    decay = gl.exp2(peak - origin)
    total = total * decay + gl.sum(weights, 1)
    return weights, gl.convert_layout(decay, gl.SliceLayout(1, OUTPUT), assert_trivial=True), new_peak, total


@gluon.jit
def _operand(weights, TYPE: gl.constexpr, OUTPUT: gl.constexpr):
    """Weights as what the product with values takes."""
    return gl.convert_layout(weights.to(TYPE), gl.DotOperandLayout(0, OUTPUT, 2), assert_trivial=True)


@gluon.jit
def _vote(votes, voted, number, mine, PART: gl.constexpr, PARTS: gl.constexpr):
    """Casts vote `number` of this part, the share that its worst row may have left."""
    if PARTS > 1:
        ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        place, _ = _turn(voted, number)
        votes.index(place * PARTS + PART).store(gl.full([1], mine, gl.float32, ONE))
        _pass(voted, number)


@gluon.jit
def _worst(votes, voted, number, mine, PART: gl.constexpr, PARTS: gl.constexpr):
    """The largest of all parts' votes `number`."""
    if PARTS > 1:
        ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        place, _ = _turn(voted, number)
        _await(voted, number)
        mine = gl.maximum(mine, gl.max(votes.index(place * PARTS + (1 - PART)).load(ONE), 0))
    return mine


@gluon.jit
def _step(
    state, tile, q, rings, bars, turns, ballot, own, position, scale2, SCORES: gl.constexpr, OUTPUT: gl.constexpr,
    BN: gl.constexpr, MASKED: gl.constexpr, VOTING: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """Weights of tile `tile` times their values, and under these the softmax of the next tile.

    MASKED says that it is one of the queries' own, VOTING that it is the first of a bundle, which may be stopped.
    """
    acc, weights, peak, total = state
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = bars
    _await(k_full, tile + 1)
    _await(v_full, tile)
    if TURNS:
        mbarrier.wait(turns.index(PART), (tile & 1) ^ (1 - PART))
    scores = _products(q, k_ring, tile + 1, SCORES)
    operand = _operand(weights, v_ring.dtype, OUTPUT)
    acc = warpgroup_mma(operand, _tile_of(v_ring, tile), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turns.index(1 - PART))
    # Not where that product ended: ptxas would wait for it before the softmax that was to run under it.
    _pass(v_empty, tile - 1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    going = tile >= 0
    if not VOTING:
        _pass(k_empty, tile + 1)
    if MASKED:
        scores = _hide(scores, own + (tile + 1) * BN, position, SCORES)
    if VOTING:
        votes, voted, number, mine, budget, flag = ballot
        ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        going = _worst(votes, voted, number, mine, PART, PARTS) > budget
        flag.store(gl.full([1], 1 - going.to(gl.int32), gl.int32, ONE))
        _pass(k_empty, tile + 1)  # after the flag, so that what waits for this sees it
        scores = gl.where(going, scores, float("-inf"))
    scores, decay, peak, total = _softmax(scores, peak, total, scale2, OUTPUT)
    acc = warpgroup_mma_wait(0, deps=[acc])
    return (acc * gl.expand_dims(decay, 1), scores, peak, total), going


@gluon.jit
def _attend(
    pointers, steps, sizes, tile_of, stream, counts, q_tiles, rings, bars, turns, votes, voted, flag, sums,
    budget, scale2, BUNDLE: gl.constexpr, HORIZON: gl.constexpr, D: gl.constexpr, BN: gl.constexpr,
    PART: gl.constexpr, PARTS: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """The warps of one part of the rows: output, log-sum-exp and sums; (bundles, keys of the order) that were read."""
    q_ptr, out_ptr, lse_ptr = pointers
    heads, queries, keys = sizes
    batch, head, begin, start, end = tile_of
    _, own, own_tiles, _, _ = stream
    sunk, ranked, listed = counts
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = bars
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = WARPS * 16
    TYPE: gl.constexpr = k_ring.dtype
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])

    begin = begin + PART * ROWS
    position = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    of_load = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOAD))
    column = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, LOAD)), 0)
    of_head = q_ptr + batch.to(gl.int64) * steps[0] + head.to(gl.int64) * steps[1]
    place = gl.expand_dims((of_load - (keys - queries)).to(gl.int64), 1) * steps[2] + column
    there = gl.expand_dims((of_load >= start) & (of_load < end), 1)
    q = q_tiles.index(PART)
    q.store(gl.load(of_head + place, mask=there, other=0.0))
    fence_async_shared()

    zero = start * 0
    _await(k_full, zero)
    scores = warpgroup_mma_wait(0, deps=[_products(q, k_ring, zero, SCORES)])
    _pass(k_empty, zero)
    peak = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, SCORES))
    scores = _hide(scores, own, position, SCORES)
    weights, _, peak, total = _softmax(scores, peak, total, scale2, OUTPUT)
    state = (gl.zeros([ROWS, D], gl.float32, layout=OUTPUT), weights, peak, total)
    # A tile's softmax is taken one step ahead of its product with the values.
    for now in range(0, own_tiles - 1):
        state = _step(
            state, now, q, rings, bars, turns, None, own, position, scale2, SCORES, OUTPUT, BN, True, False, PART,
            PARTS, TURNS,
        )[0]  # fmt: skip
    at = own_tiles - 1 + sunk // BN
    for now in range(own_tiles - 1, at):
        state = _step(
            state, now, q, rings, bars, turns, None, own, position, scale2, SCORES, OUTPUT, BN, False, False, PART,
            PARTS, TURNS,
        )[0]  # fmt: skip

    exists = (position >= start) & (position < end)
    left = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, SCORES))
    bundles = zero
    read = zero
    cast = zero  # votes
    worst = gl.to_tensor(float("inf"))  # the first bundle is always read
    stopped = zero != 0
    reading = listed > 0
    if reading:
        _vote(votes, voted, cast, worst, PART, PARTS)
    while reading:
        peak0 = state[2]
        total0 = state[3]
        size = gl.minimum(listed - read, BUNDLE)
        state, going = _step(
            state, at, q, rings, bars, turns, (votes, voted, cast, worst, budget, flag), own, position, scale2,
            SCORES, OUTPUT, BN, False, True, PART, PARTS, TURNS,
        )  # fmt: skip
        stopped = ~going
        if going:
            for now in range(at + 1, at + size // BN):
                state = _step(
                    state, now, q, rings, bars, turns, None, own, position, scale2, SCORES, OUTPUT, BN, False, False,
                    PART, PARTS, TURNS,
                )[0]  # fmt: skip
            at += size // BN
            bundles += 1
            read += size
            # What is left if later tokens weigh as much as this bundle's (`stop_rule.stop_after`, "tail").
            peak = state[2]
            total = state[3]
            kept = total0 * gl.exp2(peak0 - gl.where(peak == float("-inf"), 0.0, peak))
            gain = 1.0 - gl.minimum(kept / gl.where(total > 0.0, total, 1.0), 1.0)
            ratio = (ranked - read).to(gl.float32) / size.to(gl.float32)
            voters = exists & (total > 0.0)
            left = gl.where(voters, ratio * gain / (1.0 + ratio * gain), 0.0)
            assumed = gl.where(ratio > 0.0, gl.maximum(ratio, HORIZON), 0.0) * gain
            worst = gl.max(gl.where(voters, assumed / (1.0 + assumed), 0.0), 0)
            cast += 1
            if read < listed:
                _vote(votes, voted, cast, worst, PART, PARTS)
        reading = going & (read < listed)

    acc, weights, peak, total = state
    if stopped:
        _pass(v_empty, at)  # lets the loading warp see the flag
    else:
        _await(v_full, at)
        last_weights = _operand(weights, TYPE, OUTPUT)
        acc = warpgroup_mma(last_weights, _tile_of(v_ring, at), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    empty = total == 0.0
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    seen = gl.sum((exists & (total > 0.0)).to(gl.float32), 0)
    sums.index(2 * PART).store(gl.full([1], gl.sum(left, 0), gl.float32, ONE))
    sums.index(2 * PART + 1).store(gl.full([1], seen, gl.float32, ONE))
    whole = gl.where(empty, 1.0, total)
    lse = gl.where(empty, float("-inf"), (peak + gl.log2(whole)) * LN_2)
    query = position - (keys - queries)
    gl.store(lse_ptr + (batch.to(gl.int64) * heads + head) * queries + query, lse, mask=exists)
    acc = acc / gl.expand_dims(gl.convert_layout(whole, gl.SliceLayout(1, OUTPUT), assert_trivial=True), 1)
    query = begin - (keys - queries) + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUTPUT))
    there = (query >= start - (keys - queries)) & (query < end - (keys - queries))
    column = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, OUTPUT)), 0)
    place = ((batch.to(gl.int64) * queries + query) * heads + head) * D
    gl.store(out_ptr + gl.expand_dims(place, 1) + column, acc.to(TYPE), mask=gl.expand_dims(there, 1))
    return bundles, read


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def attend_kernel(
    q_ptr, q_steps, k_desc, v_desc, out_ptr, lse_ptr, table_ptr, listed_ptr, budgets_ptr, bundles_ptr,
    tail_ptr, pairs_ptr, visible_ptr, heads, group, queries, keys, window, sink, first_tile, tiles, tile0, count,
    places, section, scale, TILE: gl.constexpr, UNIT: gl.constexpr, BUNDLE: gl.constexpr, HORIZON: gl.constexpr,
    D: gl.constexpr, BN: gl.constexpr, AHEAD: gl.constexpr, PARTS: gl.constexpr, TURNS: gl.constexpr,
    LOADERS: gl.constexpr,
):  # fmt: skip
    """Output, log-sum-exp and statistics of one tile of one query head, before the tail.

    Causal, without window or padding; keys and values are equally wide, and bundles are whole key tiles. Descriptors
    are of one run and PIECE columns. The rings hold AHEAD tiles; the rows go to PARTS of warps.
    """
    gl.static_assert(BUNDLE % BN == 0 and UNIT % BN == 0)
    gl.static_assert(TILE == PARTS * gl.num_warps() * 16)
    TYPE: gl.constexpr = k_desc.dtype
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], TYPE)
    COUNT: gl.constexpr = BN // RUN
    SPLIT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)

    scale2 = gl.cast(scale, gl.float32) * LOG2_E
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

    q_tiles = gl.allocate_shared_memory(TYPE, [PARTS, TILE // PARTS, D], SHARED)
    k_pieces = gl.allocate_shared_memory(TYPE, [AHEAD * COUNT] + k_desc.block_type.shape, k_desc.layout)
    v_pieces = gl.allocate_shared_memory(TYPE, [AHEAD * COUNT] + v_desc.block_type.shape, v_desc.layout)
    rings = (
        _reinterpret(k_pieces, TYPE, [AHEAD, COUNT, D // PIECE, RUN, PIECE], SPLIT),
        _reinterpret(v_pieces, TYPE, [AHEAD, COUNT, D // PIECE, RUN, PIECE], SPLIT),
    )
    k_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    voted = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for of_ring in gl.static_range(AHEAD):
        mbarrier.init(k_full.index(of_ring), count=1)
        mbarrier.init(v_full.index(of_ring), count=1)
        mbarrier.init(k_empty.index(of_ring), count=PARTS)
        mbarrier.init(v_empty.index(of_ring), count=PARTS)
    for of_ring in gl.static_range(2):
        mbarrier.init(voted.index(of_ring), count=PARTS)
        mbarrier.init(turns.index(of_ring), count=1)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    flag = gl.allocate_shared_memory(gl.int32, [1], PLAIN, gl.full([1], 0, gl.int32, ONE))
    votes = gl.allocate_shared_memory(gl.float32, [2 * PARTS, 1], PLAIN)
    sums = gl.allocate_shared_memory(gl.float32, [2 * PARTS, 1], PLAIN)

    begin = (first_tile + tile) * TILE
    bars = (k_full, k_empty, v_full, v_empty)
    tile_of = (batch, head, begin, start, end)
    pointers = (q_ptr, out_ptr, lse_ptr)
    sizes = (heads, queries, keys)
    counts = (sunk, ranked, listed)
    if PARTS == 2 and LOADERS == 1:
        bundles, read = gl.warp_specialize([
            (_attend, (
                pointers, q_steps, sizes, tile_of, stream, counts, q_tiles, rings, bars, turns, votes, voted, flag,
                sums, budget, scale2, BUNDLE, HORIZON, D, BN, 0, PARTS, TURNS,
            )),
            (_attend, (
                pointers, q_steps, sizes, tile_of, stream, counts, q_tiles, rings, bars, turns, votes, voted, flag,
                sums, budget, scale2, BUNDLE, HORIZON, D, BN, 1, PARTS, TURNS,
            )),
            (_load, (k_desc, v_desc, k_pieces, v_pieces, bars, flag, stream, batch, kv_head, BN, D)),
        ], [4, 1], [240, 24])  # fmt: skip
    elif PARTS == 2:
        bundles, read = gl.warp_specialize([
            (_attend, (
                pointers, q_steps, sizes, tile_of, stream, counts, q_tiles, rings, bars, turns, votes, voted, flag,
                sums, budget, scale2, BUNDLE, HORIZON, D, BN, 0, PARTS, TURNS,
            )),
            (_attend, (
                pointers, q_steps, sizes, tile_of, stream, counts, q_tiles, rings, bars, turns, votes, voted, flag,
                sums, budget, scale2, BUNDLE, HORIZON, D, BN, 1, PARTS, TURNS,
            )),
            (_load_one, (k_desc, k_pieces, k_full, k_empty, flag, stream, batch, kv_head, BN, D)),
            (_load_one, (v_desc, v_pieces, v_full, v_empty, flag, stream, batch, kv_head, BN, D)),
        ], [4, 1, 1], [240, 24, 24])  # fmt: skip
    elif LOADERS == 1:
        bundles, read = gl.warp_specialize([
            (_attend, (
                pointers, q_steps, sizes, tile_of, stream, counts, q_tiles, rings, bars, turns, votes, voted, flag,
                sums, budget, scale2, BUNDLE, HORIZON, D, BN, 0, PARTS, TURNS,
            )),
            (_load, (k_desc, v_desc, k_pieces, v_pieces, bars, flag, stream, batch, kv_head, BN, D)),
        ], [1], [24])  # fmt: skip
    else:
        bundles, read = gl.warp_specialize([
            (_attend, (
                pointers, q_steps, sizes, tile_of, stream, counts, q_tiles, rings, bars, turns, votes, voted, flag,
                sums, budget, scale2, BUNDLE, HORIZON, D, BN, 0, PARTS, TURNS,
            )),
            (_load_one, (k_desc, k_pieces, k_full, k_empty, flag, stream, batch, kv_head, BN, D)),
            (_load_one, (v_desc, v_pieces, v_full, v_empty, flag, stream, batch, kv_head, BN, D)),
        ], [1, 1], [24, 24])  # fmt: skip

    left = 0.0
    seen = 0.0
    for part in gl.static_range(PARTS):
        left += gl.max(sums.index(2 * part).load(ONE), 0)
        seen += gl.max(sums.index(2 * part + 1).load(ONE), 0)
    place = bh.to(gl.int64) * tiles + tile
    rows = (end - start).to(gl.int64)
    dense = rows * (start + 1 + end) // 2 - ranked * rows
    gl.store(bundles_ptr + place, bundles.to(gl.int64))
    gl.store(tail_ptr + place, left / gl.maximum(seen, 1.0))
    gl.store(pairs_ptr + place, dense + read * rows)
    gl.store(visible_ptr + place, dense + ranked * rows)
