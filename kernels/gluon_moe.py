"""Products of rows with their experts' weights for Hopper in Gluon: loads, tensor cores and stores run side by side.

Both products of the forward pass, and the gradients of the rows that entered them. Triton's kernels
(`triton_moe_first`, `triton_moe_second`, `triton_moe_backward`) issue loads between products, and their warps wait
together. Here one warp does nothing but load, into a ring of stages, and runs ahead across tiles; groups of four warps,
each with 64 rows of the tile, multiply and store, each as soon as its own rows are done.

Programs take tiles from a counter. With shares of their own they drift apart, those with experts of few rows ahead of
others, and what they read in common is no longer in the L2 cache. Which program makes a tile changes none of its bits,
and each element of a product is summed by one thread in the order of the depth: equal calls give equal bits.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import dataclasses
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from s2o_inductor.kernels.gluon_moe_ring import ROWS, copy, following, hear, make_barriers, put, stored, tell
from s2o_inductor.kernels.launching import UNSPECIALIZED
from s2o_inductor.kernels.triton_moe_tiles import OUT_IN, halves, kept_backward, place_of, plain_backward, plain_hidden

# Groups of four warps that share the weights of a tile.
GROUPS = gl.constexpr(2)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What `grouped_kernel` hands to its parts, constexpr: its parameters, and what follows from them."""

    depth: Any
    out: Any
    layout: Any
    activation: Any
    limited: Any
    keep: Any
    hidden: Any
    by_choice: Any
    back: Any
    from_hidden: Any
    scored: Any
    group: Any
    stages: Any
    step: Any
    width: Any

    @property
    def blocks(self):
        """Tiles side by side."""
        return (self.out + self.width - 1) // self.width

    @property
    def steps(self):
        """Stages that a tile goes through."""
        return (self.depth + self.step - 1) // self.step

    @property
    def part(self):
        """Columns that are stored at once: what all of them need at once does not fit the registers."""
        return self.width // 4


@gluon.constexpr_function
def _call(*fields):
    return _Call(*map(gl.constexpr, fields))


@gluon.jit
def _load(rings, barriers, numbers, tiles_ptr, taken_ptr, count, a, w, CALL: gl.constexpr):
    """One warp: takes tile after tile, and loads all steps of each, as soon as the ring has room."""
    a_ring, w_ring = rings
    ready = barriers[0]
    free = barriers[1]
    slot = count * 0
    phase = slot + 1  # a ring that nothing was loaded into has room
    turn = slot
    number = gl.program_id(0)
    while number < count * CALL.blocks:
        tell(numbers, barriers, number, turn)
        tile, block, _ = place_of(number, CALL.blocks, 1, count, CALL.group)
        entry = tiles_ptr + 4 + tile * 4
        expert = gl.load(entry)
        first = gl.load(entry + 1)
        groups = gl.minimum((gl.load(entry + 2) - first + ROWS - 1) // ROWS, GROUPS)
        for depth in range(0, CALL.depth, CALL.step):
            done = ready.index(slot)
            mbarrier.wait(free.index(slot), phase)
            for i in gl.static_range(GROUPS):
                mbarrier.expect(done, w.block_type.nbytes + (i + 1) * a.block_type.nbytes, pred=groups == i + 1)
            for i in gl.static_range(GROUPS):
                copy(a, [first + i * ROWS, depth], done, a_ring.index(slot * GROUPS + i), pred=i < groups)
            if CALL.layout == OUT_IN:
                copy(w, [expert, block * CALL.width, depth], done, w_ring.index(slot))
            else:
                copy(w, [expert, depth, block * CALL.width], done, w_ring.index(slot))
            slot, phase = following(slot, phase, CALL.stages)
        number = gl.num_programs(0) + gl.atomic_add(taken_ptr, 1, sem="relaxed")
        turn += 1
    tell(numbers, barriers, number, turn)


@gluon.jit
def _step(acc, rings, barriers, slot, phase, WHICH: gl.constexpr, ADD: gl.constexpr, CALL: gl.constexpr):
    """Begins the product of one stage as soon as that is loaded."""
    a_ring, w_ring = rings
    mbarrier.wait(barriers[0].index(slot), phase)
    rows = a_ring.index(slot * GROUPS + WHICH)
    if CALL.layout == OUT_IN:
        weights = w_ring.index(slot).reshape([CALL.width, CALL.step]).permute((1, 0))
    else:
        weights = w_ring.index(slot).reshape([CALL.step, CALL.width])
    acc = warpgroup_mma(rows, weights, acc, use_acc=ADD, is_async=True)
    # One product is always in flight; the one before it is done.
    return warpgroup_mma_wait(1, deps=[acc])


@gluon.jit
def _product(rings, barriers, slot, phase, WHICH: gl.constexpr, CALL: gl.constexpr):
    """(the product of a tile's rows, the slot after its steps, the phase of that)."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CALL.width, 16])
    acc = gl.zeros([ROWS, CALL.width], gl.float32, ACC)
    acc = _step(acc, rings, barriers, slot, phase, WHICH, False, CALL)
    before = slot
    slot, phase = following(slot, phase, CALL.stages)
    for _ in range(1, CALL.steps):
        acc = _step(acc, rings, barriers, slot, phase, WHICH, True, CALL)
        mbarrier.arrive(barriers[1].index(before))
        before = slot
        slot, phase = following(slot, phase, CALL.stages)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(barriers[1].index(before))
    return acc, slot, phase


@gluon.jit
def _kept(kept_ptr, row, inside, block, CALL: gl.constexpr):
    """What the forward pass kept of a tile's rows, in four parts: loaded in front of a product, which hides it."""
    return (
        _kept_part(kept_ptr, row, inside, block * CALL.width, CALL),
        _kept_part(kept_ptr, row, inside, block * CALL.width + CALL.part, CALL),
        _kept_part(kept_ptr, row, inside, block * CALL.width + 2 * CALL.part, CALL),
        _kept_part(kept_ptr, row, inside, block * CALL.width + 3 * CALL.part, CALL),
    )


@gluon.jit
def _kept_part(kept_ptr, row, inside, column, CALL: gl.constexpr):
    """Columns [column, column + part) of what was kept of rows; 0 beyond the edge."""
    index = column + gl.arange(0, CALL.part, layout=gl.SliceLayout(0, stored(CALL.part)))
    place = kept_ptr + gl.expand_dims(row.to(gl.int64) * CALL.out, 1) + gl.expand_dims(index, 0)
    return gl.load(place, mask=gl.expand_dims(inside, 1) & (column < CALL.out), other=0.0)


@gluon.jit
def _finish_back(acc, kept, block, first, end, row, inside, order_ptr, results, CALL: gl.constexpr):
    """Stores gradients of the first product, and h if HIDDEN, where `acc` are those of h.

    As `triton_moe_backward._through`, but for what was kept of the rows, which is in `kept`.
    """
    _, out_ptr, out_step, numbers, p_ptr, share_ptr, h_ptr, h_step = results
    left, right = halves(acc)
    parts = halves(left) + halves(right)
    LAYOUT: gl.constexpr = parts[0].type.layout
    own = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    pair = gl.load(order_ptr + own, mask=own < end, other=0).to(gl.int64)
    share = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LAYOUT))
    factor = share + 1.0
    if CALL.scored:
        factor = gl.load(p_ptr + pair, mask=own < end, other=0.0).to(gl.float32)
    for i in gl.static_range(4):
        column = block * CALL.width + i * CALL.part
        if column < CALL.out:
            x = gl.convert_layout(kept[i], LAYOUT).to(gl.float32)
            if CALL.from_hidden:
                h, slope = kept_backward(x, CALL.activation)
            else:
                h, slope = plain_backward(x, numbers, CALL.activation, CALL.limited)
            share += gl.sum(parts[i] * h, 1)
            weighted = parts[i] * gl.expand_dims(factor, 1)
            put(weighted * slope, out_ptr, out_step, row, inside, column)
            if CALL.hidden:
                put(h * gl.expand_dims(factor, 1), h_ptr, h_step, row, inside, column)
    if CALL.scored:
        gl.store(share_ptr + pair * CALL.blocks + block, share, mask=own < end)


@gluon.jit
def _finish(acc, block, row, inside, results, CALL: gl.constexpr):
    """Activation, and stores of a tile's rows `row`, where they are `inside`."""
    pre_ptr, out_ptr, out_step, numbers, _, _, _, _ = results
    left, right = halves(acc)
    parts = halves(left) + halves(right)
    for i in gl.static_range(4):
        column = block * CALL.width + i * CALL.part
        if column < CALL.out:
            x = parts[i]
            if CALL.keep:
                put(x, pre_ptr, CALL.out, row, inside, column)
            if CALL.hidden:
                x = plain_hidden(x, numbers, CALL.activation, CALL.limited)
            if CALL.hidden or not CALL.keep:
                put(x, out_ptr, out_step, row, inside, column)


@gluon.jit
def _multiply(rings, barriers, numbers, tiles_ptr, count, order_ptr, results, WHICH: gl.constexpr, CALL: gl.constexpr):
    """Four warps: rows [64 * WHICH, 64 * WHICH + 64) of every tile of the program."""
    slot = count * 0
    phase = slot
    turn = slot
    number = hear(numbers, barriers, turn)
    while number < count * CALL.blocks:
        tile, block, _ = place_of(number, CALL.blocks, 1, count, CALL.group)
        entry = tiles_ptr + 4 + tile * 4
        first = gl.load(entry + 1) + WHICH * ROWS
        end = gl.load(entry + 2)
        if first < end:
            row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, stored(CALL.part)))
            inside = row < end
            if CALL.back:
                kept = _kept(results[0], row, inside, block, CALL)
                acc, slot, phase = _product(rings, barriers, slot, phase, WHICH, CALL)
                _finish_back(acc, kept, block, first, end, row, inside, order_ptr, results, CALL)
            else:
                acc, slot, phase = _product(rings, barriers, slot, phase, WHICH, CALL)
                if CALL.by_choice:
                    row = gl.load(order_ptr + row, mask=inside, other=0).to(gl.int32)
                _finish(acc, block, row, inside, results, CALL)
        else:
            # The expert has no rows for these warps.
            for _ in range(0, CALL.steps):
                mbarrier.wait(barriers[0].index(slot), phase)
                mbarrier.arrive(barriers[1].index(slot))
                slot, phase = following(slot, phase, CALL.stages)
        turn += 1
        number = hear(numbers, barriers, turn)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def grouped_kernel(
    a, w, tiles_ptr, taken_ptr, order_ptr, pre_ptr, out_ptr, out_steps, p_ptr, share_ptr, h_ptr, h_steps, alpha, limit,
    shift, DEPTH: gl.constexpr, OUT: gl.constexpr, LAYOUT: gl.constexpr, ACTIVATION: gl.constexpr,
    LIMITED: gl.constexpr, KEEP: gl.constexpr, HIDDEN: gl.constexpr, BY_CHOICE: gl.constexpr, BACK: gl.constexpr,
    FROM_HIDDEN: gl.constexpr, SCORED: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, BK: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """All tiles of BM rows of an expert by BN columns of the product, shared by all programs.

    `taken_ptr` holds 0. With KEEP the product goes to `pre_ptr`, with HIDDEN its activation to `out_ptr`, without
    either the product does; by row of the plan, or to the places of their choices with BY_CHOICE.

    With BACK, the product is the gradient of h, and what goes to `out_ptr` is that of the first product, which
    `pre_ptr` holds, or h itself if FROM_HIDDEN. With HIDDEN, h goes to `h_ptr`. With SCORED, both are multiplied with
    their routing weights, and the shares of dp go to `share_ptr`, one for each block of BN columns.
    """
    gl.static_assert(BM == GROUPS * ROWS)
    gl.static_assert(OUT % (BN // 4) == 0)  # a part is inside of the result, or beyond its edge
    CALL: gl.constexpr = _call(
        DEPTH, OUT, LAYOUT, ACTIVATION, LIMITED, KEEP, HIDDEN, BY_CHOICE, BACK, FROM_HIDDEN, SCORED, GROUP, STAGES, BK,
        BN,
    )  # fmt: skip
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES * GROUPS, ROWS, BK], a.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)  # noqa: RUF005 - Triton's tuple
    barriers, numbers = make_barriers(STAGES, GROUPS)
    rings = (a_ring, w_ring)
    count = gl.load(tiles_ptr)
    scalars = (gl.cast(alpha, gl.float32), gl.cast(limit, gl.float32), gl.cast(shift, gl.float32))
    results = (pre_ptr, out_ptr, out_steps[0], scalars, p_ptr, share_ptr, h_ptr, h_steps[0])
    # Those who multiply leave those who load 24 registers each, the fewest there are.
    gl.warp_specialize(
        [
            (_multiply, (rings, barriers, numbers, tiles_ptr, count, order_ptr, results, 0, CALL)),
            (_multiply, (rings, barriers, numbers, tiles_ptr, count, order_ptr, results, 1, CALL)),
            (_load, (rings, barriers, numbers, tiles_ptr, taken_ptr, count, a, w, CALL)),
        ],
        [4, 1], [232, 24],
    )  # fmt: skip
