"""`triton_sparse_tail.tail_kernel` with warps that only load, as in `gluon_sparse_special.py`.

A step of a half of the rows is three products, which follow from each other: what the spread adds to the scores, which
is limited and becomes the accumulator of the products with the mean keys, whose exponentials weigh the mean values. The
exponentials of one step run under the first product of the next, and the limit under the product with the values.

The first product is of numbers in float8 (e4m3): 128 of them, none below 0, whose errors average out.

A half whose tail outweighs what it read writes a mark and nothing else, and is left to the Triton kernel.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from s2o_inductor.kernels.gluon_sparse_special import _await, _await_room, _fetch, _pass, _turn
from s2o_inductor.kernels.launching import UNSPECIALIZED
from s2o_inductor.kernels.primitives import LN_2, LOG2_E, schedule
from s2o_inductor.kernels.triton_sparse_tail import MOST, has_tail, unit_of
from s2o_inductor.kernels.triton_sparse_tiles import tile_keys


@gluon.jit
def _load_tile(descriptor, ring, bars, kv_bh, group, step):
    """Starts loading the tile of groups from `group` on, for step `step`; zeros where there are none."""
    full, empty = bars
    BYTES: gl.constexpr = ring.shape[2] * ring.shape[3] * ring.dtype.primitive_bitwidth // 8
    _await_room(empty, step)
    place, _ = _turn(full, step)
    mbarrier.expect(full.index(place), BYTES)
    _fetch(descriptor, [kv_bh, group, 0], full.index(place), ring.index(place))


@gluon.jit
def _load(descriptors, rings, bars, kv_bh, of_groups):
    """A warp that loads variances, mean keys and mean values, the last groups first.

    So a step begins before the first group, if anywhere, and no group is read whose keys come after the queries.
    """
    _, end_group, steps = of_groups
    for step in range(steps):
        group = end_group - (step + 1) * rings[1].shape[2]
        for i in gl.static_range(3):
            _load_tile(descriptors[i], rings[i], bars[i], kv_bh, group, step)


@gluon.jit
def _load_unread(of_unread, span, of_units, rings, bars, of_groups, scale2):
    """A warp that loads what `unread_kernel` wrote of the same groups: none is left of those before the first."""
    first_group, end_group, steps = of_groups
    full, empty = bars[3]
    ring = rings[3]
    BN: gl.constexpr = ring.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([BN // 32], [32], [gl.num_warps()], [0])
    for step in range(steps):
        group = end_group - (step + 1) * BN + gl.arange(0, BN, layout=LAYOUT)
        there = group >= first_group
        left = gl.load(of_unread + group, mask=there, other=0.0).to(gl.float32)
        shrunk = gl.load(of_unread + span + group, mask=there, other=0.0).to(gl.float32)
        unit = gl.load(of_units + group, mask=there, other=0.0)
        _await_room(empty, step)
        place, _ = _turn(full, step)
        ring.index(2 * place).store(gl.log2(left) / scale2)
        ring.index(2 * place + 1).store(shrunk * unit)
        _pass(full, step)


@gluon.jit
def _matrix(ring, step):
    """A tile (groups, columns) of a ring."""
    tile = ring.index(step % ring.shape[0])
    return tile.reshape([tile.shape[1], tile.shape[2]])


@gluon.jit
def _start_spread(fixed, step, LAYOUT: gl.constexpr):
    """Starts the products of squares and variances, over the units of both."""
    rows, rings, bars, _ = fixed
    _await(bars[0][0], step)
    nothing = gl.full([rows[1].shape[0], rings[0].shape[2]], 0.0, gl.float32, LAYOUT)
    return warpgroup_mma(rows[1], _matrix(rings[0], step).permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _start_scores(fixed, step, spread, LAYOUT: gl.constexpr):
    """Starts the scores over scale2: log of the keys left, spread up to its limit, and products with mean keys."""
    rows, rings, bars, numbers = fixed
    unit, limit, _, _ = numbers
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    spread = gl.convert_layout(spread, LAYOUT, assert_trivial=True)  # both products leave their results alike
    _pass(bars[0][1], step)
    full, empty = bars[3]
    place, _ = _turn(full, step)
    _await(full, step)
    left = rings[3].index(2 * place).load(COLUMNS)
    shrunk = rings[3].index(2 * place + 1).load(COLUMNS) * unit
    _pass(empty, step)
    # A sum and a limit for each group cost less than more instructions for each score.
    most = gl.expand_dims(left + limit, 0)
    scores = gl.minimum(spread * gl.expand_dims(shrunk, 0) + gl.expand_dims(left, 0), most)
    _await(bars[1][0], step)
    return warpgroup_mma(rows[0], _matrix(rings[1], step).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _start_output(fixed, step, scores, acc, total, OUTPUT: gl.constexpr):
    """Starts adding the mean values times the weights: (output, total with the sums of the weights)."""
    _, rings, bars, numbers = fixed
    _, _, scale2, origin = numbers
    weights = gl.exp2(scores * scale2 - gl.expand_dims(origin, 1))
    total += gl.sum(weights, 1)
    weights = gl.convert_layout(weights.to(rings[2].dtype), gl.DotOperandLayout(0, OUTPUT, 2), assert_trivial=True)
    _await(bars[2][0], step)
    return warpgroup_mma(weights, _matrix(rings[2], step), acc, is_async=True), total


@gluon.jit
def _fold(call, memory, HALF: gl.constexpr):
    """Half of the rows: folds their tail into output and log-sum-exp, or marks that it outweighs what was read."""
    pointers, steps, sizes, where, scale, limit = call
    q_ptr, out_ptr, lse_ptr, mark_ptr = pointers
    heads, queries, keys = sizes
    batch, head, begin, start, end, last = where
    halves, rings, bars = memory
    WARPS: gl.constexpr = gl.num_warps()
    q = halves[0].index(HALF)
    squares = halves[1].index(HALF)
    ROWS: gl.constexpr = q.shape[0]
    D: gl.constexpr = q.shape[1]
    BN: gl.constexpr = rings[1].shape[2]
    TYPE: gl.constexpr = q.dtype
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    SPREAD: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 32])

    if last >= 0:
        first = begin + HALF * ROWS - (keys - queries)
        from_query = start - (keys - queries)
        to_query = end - (keys - queries)
        query = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOAD))
        column = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, LOAD)), 0)
        of_head = q_ptr + batch.to(gl.int64) * steps[0] + head.to(gl.int64) * steps[1]
        there = gl.expand_dims((query >= from_query) & (query < to_query), 1)
        loaded = gl.load(of_head + gl.expand_dims(query.to(gl.int64), 1) * steps[2] + column, mask=there, other=0.0)
        q.store(loaded)
        wide = loaded.to(gl.float32)
        wide = wide * wide * (0.5 * scale)
        # A row that is not finite is no measure for the others.
        unit = unit_of(gl.max(gl.max(gl.where(wide < 1e30, wide, 0.0), 1), 0))
        squares.store((wide / unit).to(squares.dtype))
        fence_async_shared()

        # The state of the softmax that `attend_kernel` left, with the output for its sum and 1 for its total.
        query = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
        exists = (query >= from_query) & (query < to_query)
        to_lse = lse_ptr + (batch.to(gl.int64) * heads + head) * queries + query
        lse = gl.load(to_lse, mask=exists, other=float("-inf")) * LOG2_E
        unseen = lse == float("-inf")
        origin = gl.where(unseen, 0.0, lse)
        total = gl.where(unseen, 0.0, 1.0)
        query = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUTPUT))
        column = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, OUTPUT)), 0)
        place = ((batch.to(gl.int64) * queries + query) * heads + head) * D
        to_out = out_ptr + gl.expand_dims(place, 1) + column
        there = gl.expand_dims((query >= from_query) & (query < to_query), 1)
        acc = gl.load(to_out, mask=there, other=0.0).to(gl.float32)

        zero = start * 0
        fixed = ((q, squares), rings, bars, (unit, limit / scale, scale * LOG2_E, origin))
        spread = warpgroup_mma_wait(0, deps=[_start_spread(fixed, zero, SPREAD)])
        scores = warpgroup_mma_wait(0, deps=[_start_scores(fixed, zero, spread, SCORES)])
        _pass(bars[1][1], zero)
        for now in range(0, last):
            spread = _start_spread(fixed, now + 1, SPREAD)
            acc, total = _start_output(fixed, now, scores, acc, total, OUTPUT)
            spread = warpgroup_mma_wait(1, deps=[spread])
            scores = _start_scores(fixed, now + 1, spread, SCORES)
            scores, acc = warpgroup_mma_wait(0, deps=[scores, acc])
            _pass(bars[2][1], now)
            _pass(bars[1][1], now + 1)
        acc, total = _start_output(fixed, last, scores, acc, total, OUTPUT)
        acc = warpgroup_mma_wait(0, deps=[acc])

        outweighed = gl.sum((exists & ((total > MOST) | unseen)).to(gl.int32), 0) > 0
        gl.store(mark_ptr + HALF, outweighed.to(gl.int8))
        if not outweighed:
            gl.store(to_lse, (origin + gl.log2(total)) * LN_2, mask=exists)
            share = gl.convert_layout(1.0 / total, gl.SliceLayout(1, OUTPUT), assert_trivial=True)
            gl.store(to_out, (acc * gl.expand_dims(share, 1)).to(TYPE), mask=there)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def tail_kernel(
    q_ptr, q_steps, out_ptr, lse_ptr, listed_ptr, unread_ptr, variance_desc, k_desc, v_desc, units_ptr, budgets_ptr,
    bundles_ptr, marks_ptr, heads, group, queries, keys, window, sink, first_tile, tiles, tile0, count, base, room,
    groups, section, scale, limit, TILE: gl.constexpr, UNIT: gl.constexpr, RUN: gl.constexpr, BUNDLE: gl.constexpr,
    CLUSTERS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Folds the tail of one tile of one query head into output and log-sum-exp.

    Causal, without window or padding; keys and values are equally wide. `marks_ptr`, int8 (B, Hq, count, 2), says which
    halves of the tiles that have a tail are left to `triton_sparse_tail.tail_kernel`. The descriptors are what
    `hopper_sparse.tiles_of` returns, that of the variances of what `round_kernel` made of them, with `units_ptr`
    (B * Hkv, P), and the rings hold AHEAD of their tiles.
    """
    gl.static_assert(gl.num_warps() * 32 == TILE)
    of_range, bh = schedule(count, section, True)
    tile = tile0 + of_range
    batch = bh // heads
    head = bh % heads
    kv_bh = batch * (heads // group) + head // group
    start, end, low, high = tile_keys(first_tile + tile, queries, keys, window, sink, TILE, UNIT, True, False)
    listed = gl.load(listed_ptr + kv_bh.to(gl.int64) * count + of_range)
    bundles = gl.load(bundles_ptr + bh.to(gl.int64) * tiles + tile).to(gl.int32)
    budget = gl.load(budgets_ptr + head)
    first_group = low // UNIT * CLUSTERS
    end_group = high // UNIT * CLUSTERS
    some = has_tail(listed, bundles, (high - low) // RUN, budget, BUNDLE, RUN)
    steps = gl.where(some, gl.cdiv(end_group - first_group, BN), 0)
    span = room // (UNIT // RUN) * CLUSTERS
    of_range = bh.to(gl.int64) * count + of_range

    TYPE: gl.constexpr = k_desc.dtype
    SQUARE: gl.constexpr = variance_desc.dtype
    q_halves = gl.allocate_shared_memory(
        TYPE, [2, TILE // 2, D], gl.NVMMASharedLayout.get_default_for([TILE // 2, D], TYPE)
    )
    squares_halves = gl.allocate_shared_memory(
        SQUARE, [2, TILE // 2, D], gl.NVMMASharedLayout.get_default_for([TILE // 2, D], SQUARE)
    )
    rings = (
        gl.allocate_shared_memory(SQUARE, [AHEAD, 1, BN, D], variance_desc.layout),
        gl.allocate_shared_memory(TYPE, [AHEAD, 1, BN, D], k_desc.layout),
        gl.allocate_shared_memory(TYPE, [AHEAD, 1, BN, D], v_desc.layout),
        gl.allocate_shared_memory(gl.float32, [2 * AHEAD, BN], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    bars = ()
    for _ in gl.static_range(4):
        full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], BARRIER)
        empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], BARRIER)
        for place in gl.static_range(AHEAD):
            mbarrier.init(full.index(place), count=1)
            mbarrier.init(empty.index(place), count=2)
        bars += ((full, empty),)  # type: ignore[assignment]

    begin = (first_tile + tile) * TILE
    scale = gl.cast(scale, gl.float32)
    call = (
        (q_ptr, out_ptr, lse_ptr, marks_ptr + of_range * 2), q_steps, (heads, queries, keys),
        (batch, head, begin, start, end, steps - 1), scale, gl.cast(limit, gl.float32),
    )  # fmt: skip
    memory = ((q_halves, squares_halves), rings, bars)
    of_unread = unread_ptr + of_range * 2 * span - base // UNIT * CLUSTERS
    of_units = units_ptr + kv_bh.to(gl.int64) * groups
    of_groups = (first_group, end_group, steps)
    gl.warp_specialize(
        [
            (_fold, (call, memory, 0)),
            (_fold, (call, memory, 1)),
            (_load, ((variance_desc, k_desc, v_desc), rings, bars, kv_bh, of_groups)),
            (_load_unread, (of_unread, span, of_units, rings, bars, of_groups, scale * LOG2_E)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
