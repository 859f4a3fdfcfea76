"""`gluon_sparse_attention.attend_kernel` with warps that only load, and rows in two halves with softmaxes of their own.

One warp walks the stream of key tiles for the keys and one for the values, and has the bulk copy engine fetch their
runs into a ring; each half of the queries has a warpgroup. So the softmax of one half runs under the products of the
other (FlashAttention-3, arXiv 2407.08608, section 3.1) as well as under its own values' (section 3.2).

The halves agree on the stop after each bundle by their worst rows. A half that has voted goes on with the scores of
the next tile; if the vote is to stop, it hides them all, which leaves its softmax as it was. The loading warps may by
then have begun tiles that are not read: a flag tells them before they would wait for ever, and they wait for the loads
that they have begun.
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

from s2o_inductor.kernels.gluon_sparse_attention import RUN, _hide, _report, _store_rows, _tile_of
from s2o_inductor.kernels.launching import UNSPECIALIZED
from s2o_inductor.kernels.primitives import LOG2_E

# Bulk loads, and memory seen otherwise, have one name in Triton 3.6 and another in 3.9.
_fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_memory = gl.shared_memory_descriptor
_reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret
# Columns of a piece of a run: a row of the shared layout, of 128 bytes.
PIECE = gl.constexpr(64)


@gluon.jit
def _turn(ring, number):
    """Place and parity of turn `number` in a ring of barriers, from 0."""
    return number % ring.shape[0], number // ring.shape[0] & 1


@gluon.jit
def _await(ring, number):
    """Waits until turn `number` of a ring of barriers is complete."""
    place, parity = _turn(ring, number)
    mbarrier.wait(ring.index(place), parity)


@gluon.jit
def _await_room(ring, number):
    """Waits until the turn before `number` in the same place is complete, which there need not have been."""
    place, parity = _turn(ring, number)
    mbarrier.wait(ring.index(place), parity ^ 1)


@gluon.jit
def _pass(ring, number):
    """Arrives for turn `number` of a ring of barriers, unless that is negative."""
    place, _ = _turn(ring, gl.maximum(number, 0))
    mbarrier.arrive(ring.index(place), pred=number >= 0)


@gluon.jit
def _matrix(ring, tile):
    """A tile (keys, columns) of a ring, where it lies run by run, and the PIECE columns of a run together."""
    split = ring.index(tile % ring.shape[0])
    KEYS: gl.constexpr = split.shape[0] * split.shape[2]
    COLUMNS: gl.constexpr = split.shape[1] * split.shape[3]
    return split.permute((0, 2, 1, 3)).reshape([KEYS, COLUMNS])


@gluon.jit
def _scores(q, k_ring, tile, LAYOUT: gl.constexpr):
    """Starts the products of the queries with a tile of keys."""
    k = _matrix(k_ring, tile).permute((1, 0))
    nothing = gl.full([q.shape[0], k.shape[1]], 0.0, gl.float32, LAYOUT)
    return warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)


@gluon.jit
def _load(descriptor, pieces, full, empty, flag, stream, batch, kv_head, BN: gl.constexpr, D: gl.constexpr):
    """A warp that loads the tiles of the stream, of the keys or of the values, until the flag says to stop."""
    table, own, own_tiles, listed_from, end = stream
    COUNT: gl.constexpr = BN // RUN
    DEPTH: gl.constexpr = full.shape[0]
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    BYTES: gl.constexpr = BN * D * descriptor.dtype.primitive_bitwidth // 8
    tile = end * 0
    going = end > 0
    while going:
        listed = tile >= listed_from
        # What is not listed lies in order: from `own` on the first tiles, from 0 on the others.
        first = gl.where(tile < own_tiles, own // RUN + tile * COUNT, (tile - own_tiles) * COUNT)
        runs = ()
        for of_tile in gl.static_range(COUNT):
            found = gl.load(table + (tile - listed_from) * COUNT + of_tile, mask=listed, other=0)
            runs += (gl.where(listed, found, first + of_tile),)  # type: ignore[assignment]
        _await_room(empty, tile)
        going = gl.max(flag.load(ONE), 0) == 0
        if going:
            place, _ = _turn(full, tile)
            mbarrier.expect(full.index(place), BYTES)
            for of_tile in gl.static_range(COUNT):  # zeros beyond the last key
                start = [batch, kv_head, 0, runs[of_tile] * RUN, 0]
                _fetch(descriptor, start, full.index(place), pieces.index(place * COUNT + of_tile))
            tile += 1
            going = tile < end
    # The memory may be another program's once this one ends.
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
def _weigh(weights, v_ring, tile, acc, OUTPUT: gl.constexpr):
    """Starts adding the weights times the values of a tile."""
    weights = gl.convert_layout(weights.to(v_ring.dtype), gl.DotOperandLayout(0, OUTPUT, 2), assert_trivial=True)
    return warpgroup_mma(weights, _matrix(v_ring, tile), acc, is_async=True)


@gluon.jit
def _vote(ballot, number, worst, HALF: gl.constexpr):
    """Casts vote `number` of a half: the share that its worst row may have left."""
    votes, voted, _ = ballot
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    place, _ = _turn(voted, number)
    votes.index(2 * place + HALF).store(gl.full([1], worst, gl.float32, ONE))
    _pass(voted, number)


@gluon.jit
def _agree(ballot, number, worst, budget, HALF: gl.constexpr):
    """Whether to go on after vote `number`, in which this half cast `worst`; raises the flag if not."""
    votes, voted, flag = ballot
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    place, _ = _turn(voted, number)
    _await(voted, number)
    other = gl.max(votes.index(2 * place + 1 - HALF).load(ONE), 0)
    going = gl.maximum(worst, other) > budget
    flag.store(gl.full([1], 1 - going.to(gl.int32), gl.int32, ONE))
    return going


@gluon.jit
def _step(
    state, tile, vote, fixed, SCORES: gl.constexpr, OUTPUT: gl.constexpr, MASKED: gl.constexpr, VOTING: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    """(state, whether to go on): weights of tile `tile` times their values, under these the softmax of the next tile.

    MASKED says that the next tile is one of the queries' own, VOTING that it is read only if the vote (number, worst)
    is to go on; if not, the state is as if it had no keys.
    """
    acc, weights, peak, total = state
    q, rings, bars, ballot, budget, own, position, scale2 = fixed
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = bars
    _await(k_full, tile + 1)
    _await(v_full, tile)
    scores = _scores(q, k_ring, tile + 1, SCORES)
    acc = _weigh(weights, v_ring, tile, acc, OUTPUT)
    # Not at the end of the step before: there ptxas would wait for the product before the softmax that is to run
    # under it.
    _pass(v_empty, tile - 1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    going = tile >= 0
    if VOTING:
        going = _agree(ballot, vote[0], vote[1], budget, HALF)
        scores = gl.where(going, scores, float("-inf"))
    if MASKED:
        scores = _hide(scores, own + (tile + 1) * scores.shape[1], position, SCORES)
    _pass(k_empty, tile + 1)  # after the flag: the loading warp that this lets go on must see it
    weights, decay, peak, total = _softmax(scores, peak, total, scale2, OUTPUT)
    acc = warpgroup_mma_wait(0, deps=[acc])
    return (acc * gl.expand_dims(decay, 1), weights, peak, total), going


@gluon.jit
def _attend(call, memory, BUNDLE: gl.constexpr, HORIZON: gl.constexpr, HALF: gl.constexpr):
    """Half of the rows: writes output, log-sum-exp and `sums` for the statistics; bundles and ranked keys it read."""
    pointers, steps, sizes, where, stream, counts, budget, scale2 = call
    q_halves, rings, bars, ballot, sums = memory
    q_ptr, out_ptr, lse_ptr = pointers
    heads, queries, keys = sizes
    batch, head, begin, start, end = where
    _, own, own_tiles, _, _ = stream
    sunk, ranked, listed = counts
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = bars
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = q_halves.shape[1]
    D: gl.constexpr = q_halves.shape[2]
    BN: gl.constexpr = k_ring.shape[1] * k_ring.shape[3]
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])

    begin += HALF * ROWS
    position = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    of_load = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOAD))
    column = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, LOAD)), 0)
    of_head = q_ptr + batch.to(gl.int64) * steps[0] + head.to(gl.int64) * steps[1]
    place = gl.expand_dims((of_load - (keys - queries)).to(gl.int64), 1) * steps[2] + column
    there = gl.expand_dims((of_load >= start) & (of_load < end), 1)
    q = q_halves.index(HALF)
    q.store(gl.load(of_head + place, mask=there, other=0.0))
    fence_async_shared()

    zero = start * 0
    _await(k_full, zero)
    scores = warpgroup_mma_wait(0, deps=[_scores(q, k_ring, zero, SCORES)])
    _pass(k_empty, zero)
    peak = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, SCORES))
    scores = _hide(scores, own, position, SCORES)
    weights, _, peak, total = _softmax(scores, peak, total, scale2, OUTPUT)
    state = (gl.zeros([ROWS, D], gl.float32, layout=OUTPUT), weights, peak, total)
    # A tile's softmax is taken one step ahead of its product with the values.
    fixed = (q, rings, bars, ballot, budget, own, position, scale2)
    for now in range(0, own_tiles - 1):
        state = _step(state, now, None, fixed, SCORES, OUTPUT, True, False, HALF)[0]
    at = own_tiles - 1 + sunk // BN
    for now in range(own_tiles - 1, at):
        state = _step(state, now, None, fixed, SCORES, OUTPUT, False, False, HALF)[0]

    exists = (position >= start) & (position < end)
    left = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, SCORES))
    bundles = zero
    read = zero
    worst = gl.to_tensor(float("inf"))  # the first bundle is always read
    stopped = zero != 0
    reading = listed > 0
    if reading:
        _vote(ballot, bundles, worst, HALF)
    while reading:
        peak0 = state[2]
        total0 = state[3]
        size = gl.minimum(listed - read, BUNDLE)
        state, going = _step(state, at, (bundles, worst), fixed, SCORES, OUTPUT, False, True, HALF)
        stopped = ~going
        if going:
            for now in range(at + 1, at + size // BN):
                state = _step(state, now, None, fixed, SCORES, OUTPUT, False, False, HALF)[0]
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
            if read < listed:
                _vote(ballot, bundles, worst, HALF)
        reading = going & (read < listed)

    acc, weights, peak, total = state
    if stopped:
        _pass(v_empty, at)  # lets the loading warp see the flag
    else:
        _await(v_full, at)
        acc = warpgroup_mma_wait(0, deps=[_weigh(weights, v_ring, at, acc, OUTPUT)])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    seen = gl.sum((exists & (total > 0.0)).to(gl.float32), 0)
    sums.index(2 * HALF).store(gl.full([1], gl.sum(left, 0), gl.float32, ONE))
    sums.index(2 * HALF + 1).store(gl.full([1], seen, gl.float32, ONE))
    _store_rows(
        (acc, peak, total), out_ptr, lse_ptr, batch, head, heads, (start, end), begin, queries, keys, SCORES, OUTPUT
    )
    return bundles, read


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def attend_kernel(
    q_ptr, q_steps, k_desc, v_desc, out_ptr, lse_ptr, table_ptr, listed_ptr, budgets_ptr, bundles_ptr,
    tail_ptr, pairs_ptr, visible_ptr, heads, group, queries, keys, window, sink, first_tile, tiles, tile0, count,
    places, section, scale, TILE: gl.constexpr, UNIT: gl.constexpr, BUNDLE: gl.constexpr, HORIZON: gl.constexpr,
    D: gl.constexpr, BN: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Output, log-sum-exp and statistics of one tile of one query head, before the tail.

    Causal, without window or padding; keys and values are equally wide, and bundles are whole key tiles. The rings hold
    AHEAD tiles, at least 2; `k_desc` and `v_desc` are what `hopper_sparse.runs_of` returns.
    """
    gl.static_assert(BUNDLE % BN == 0 and UNIT % BN == 0)
    gl.static_assert(gl.num_warps() * 32 == TILE)
    TYPE: gl.constexpr = k_desc.dtype
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE // 2, D], TYPE)
    COUNT: gl.constexpr = BN // RUN
    SPLIT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)  # see `_matrix`

    scale2 = gl.cast(scale, gl.float32) * LOG2_E
    at, positions, stream, counts, budget = _tile_of(
        table_ptr, listed_ptr, budgets_ptr, heads, group, queries, keys, window, sink, first_tile, tile0, count, places,
        section, TILE, UNIT, BN,
    )  # fmt: skip
    tile, _, batch, head, kv_head = at
    start, end = positions
    _, ranked, _ = counts

    q_halves = gl.allocate_shared_memory(TYPE, [2, TILE // 2, D], SHARED)
    k_pieces = gl.allocate_shared_memory(TYPE, [AHEAD * COUNT, 1, 1, D // PIECE, RUN, PIECE], k_desc.layout)
    v_pieces = gl.allocate_shared_memory(TYPE, [AHEAD * COUNT, 1, 1, D // PIECE, RUN, PIECE], v_desc.layout)
    rings = (
        _reinterpret(k_pieces, TYPE, [AHEAD, COUNT, D // PIECE, RUN, PIECE], SPLIT),
        _reinterpret(v_pieces, TYPE, [AHEAD, COUNT, D // PIECE, RUN, PIECE], SPLIT),
    )
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], BARRIER)
    voted = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for place in gl.static_range(AHEAD):
        mbarrier.init(k_full.index(place), count=1)
        mbarrier.init(v_full.index(place), count=1)
        mbarrier.init(k_empty.index(place), count=2)
        mbarrier.init(v_empty.index(place), count=2)
    for place in gl.static_range(2):
        mbarrier.init(voted.index(place), count=2)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    flag = gl.allocate_shared_memory(gl.int32, [1], PLAIN, gl.full([1], 0, gl.int32, ONE))
    votes = gl.allocate_shared_memory(gl.float32, [4, 1], PLAIN)
    sums = gl.allocate_shared_memory(gl.float32, [4, 1], PLAIN)

    begin = (first_tile + tile) * TILE
    call = (
        (q_ptr, out_ptr, lse_ptr), q_steps, (heads, queries, keys), (batch, head, begin, start, end), stream,
        counts, budget, scale2,
    )  # fmt: skip
    memory = (q_halves, rings, (k_full, k_empty, v_full, v_empty), (votes, voted, flag), sums)
    bundles, read = gl.warp_specialize(
        [
            (_attend, (call, memory, BUNDLE, HORIZON, 0)),
            (_attend, (call, memory, BUNDLE, HORIZON, 1)),
            (_load, (k_desc, k_pieces, k_full, k_empty, flag, stream, batch, kv_head, BN, D)),
            (_load, (v_desc, v_pieces, v_full, v_empty, flag, stream, batch, kv_head, BN, D)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )

    left = gl.max(sums.index(0).load(ONE), 0) + gl.max(sums.index(2).load(ONE), 0)
    seen = gl.max(sums.index(1).load(ONE), 0) + gl.max(sums.index(3).load(ONE), 0)
    pointers = (bundles_ptr, tail_ptr, pairs_ptr, visible_ptr)
    _report(pointers, at, positions, tiles, ranked, read, bundles, left / gl.maximum(seen, 1.0))
