"""Gradients of experts' weights for Hopper in Gluon: left^T right over the rows of each expert.

As `kernels/gluon_moe.py`, with rows for depth: one warp loads, two groups of four multiply and store, half of a block's
columns each. Both sides are read as they lie, rows of depth, of which the tensor cores take 16-bit numbers. A block is
as large as registers hold, 192 x 256, for the L2 cache's sake.

An expert's rows are no multiple of a step, and no row of another expert may count: it may hold NaN, which no zero
would undo. So the first step of an expert is what is not whole, and the copy engine fills it: its tiles have a
dimension for where an expert begins and one for rows from there on, with the same stride. What comes before row 0 is
zero.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import dataclasses
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from s2o_inductor.kernels.gluon_moe_ring import (
    ROWS,
    copy,
    following,
    hear,
    make_barriers,
    put,
    put_turned,
    stored,
    tell,
)
from s2o_inductor.kernels.launching import UNSPECIALIZED
from s2o_inductor.kernels.triton_moe_tiles import halves

GROUPS = gl.constexpr(2)
# Matrix instructions that a group's part of a block is high.
HIGH = gl.constexpr(3)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What `outer_kernel` hands to its parts, constexpr: its parameters, and what follows from them."""

    left: Any
    right: Any
    turned: Any
    stages: Any
    step: Any
    height: Any
    width: Any

    @property
    def rights(self):
        """Blocks side by side."""
        return (self.right + self.width - 1) // self.width

    @property
    def blocks(self):
        """Blocks of an expert."""
        return (self.left + self.height - 1) // self.height * self.rights

    @property
    def half(self):
        """Columns of a group."""
        return self.width // 2


@gluon.constexpr_function
def _call(*fields):
    return _Call(*map(gl.constexpr, fields))


@gluon.jit
def _place(number, firsts_ptr, CALL: gl.constexpr):
    """(expert, row and column of its block, its first row, how many it has, steps through them) of a tile."""
    expert = number // CALL.blocks
    block = number - expert * CALL.blocks
    begin = gl.load(firsts_ptr + expert)
    rows = gl.load(firsts_ptr + expert + 1) - begin
    # An expert without rows has one step, which is zero.
    steps = gl.maximum((rows + CALL.step - 1) // CALL.step, 1)
    return expert, block // CALL.rights * CALL.height, block % CALL.rights * CALL.width, begin, rows, steps


@gluon.jit
def _load(rings, barriers, numbers, firsts_ptr, taken_ptr, count, left, right, CALL: gl.constexpr):
    """One warp: takes block after block, and loads all steps of each, as soon as the ring has room."""
    left_ring, right_ring = rings
    ready = barriers[0]
    free = barriers[1]
    slot = count * 0
    phase = slot + 1  # a ring that nothing was loaded into has room
    turn = slot
    number = gl.program_id(0)
    while number < count:
        tell(numbers, barriers, number, turn)
        _, left_at, right_at, begin, rows, steps = _place(number, firsts_ptr, CALL)
        for step in range(0, steps):
            row = rows - (steps - step) * CALL.step
            done = ready.index(slot)
            mbarrier.wait(free.index(slot), phase)
            mbarrier.expect(done, GROUPS * right.block_type.nbytes + HIGH * left.block_type.nbytes)
            for i in gl.static_range(HIGH):
                copy(left, [begin, row, left_at + i * ROWS], done, left_ring.index(slot * HIGH + i))
            for i in gl.static_range(GROUPS):
                copy(right, [begin, row, right_at + i * CALL.half], done, right_ring.index(slot * GROUPS + i))
            slot, phase = following(slot, phase, CALL.stages)
        number = gl.num_programs(0) + gl.atomic_add(taken_ptr, 1, sem="relaxed")
        turn += 1
    tell(numbers, barriers, number, turn)


@gluon.jit
def _step(a, b, c, rings, barriers, slot, phase, WHICH: gl.constexpr, ADD: gl.constexpr, CALL: gl.constexpr):
    """Begins the products of one stage as soon as that is loaded."""
    left_ring, right_ring = rings
    mbarrier.wait(barriers[0].index(slot), phase)
    right = right_ring.index(slot * GROUPS + WHICH).reshape([CALL.step, CALL.half])
    left = left_ring.index(slot * HIGH).reshape([CALL.step, ROWS]).permute((1, 0))
    a = warpgroup_mma(left, right, a, use_acc=ADD, is_async=True)
    left = left_ring.index(slot * HIGH + 1).reshape([CALL.step, ROWS]).permute((1, 0))
    b = warpgroup_mma(left, right, b, use_acc=ADD, is_async=True)
    left = left_ring.index(slot * HIGH + 2).reshape([CALL.step, ROWS]).permute((1, 0))
    c = warpgroup_mma(left, right, c, use_acc=ADD, is_async=True)
    # Those of one stage are always in flight; those before are done.
    return warpgroup_mma_wait(HIGH, deps=[a, b, c])


@gluon.jit
def _store(acc, out, left_at, right_at, CALL: gl.constexpr):
    """Stores (ROWS, half) of a block of a matrix that begins at `out`."""
    parts = halves(acc)
    row = left_at + gl.arange(0, ROWS, layout=gl.SliceLayout(1, stored(CALL.half // 2, CALL.turned)))
    for i in gl.static_range(2):
        column = right_at + i * (CALL.half // 2)
        if column < CALL.right:
            if CALL.turned:
                put_turned(parts[i], out, CALL.left, row, row < CALL.left, column)
            else:
                put(parts[i], out, CALL.right, row, row < CALL.left, column)


@gluon.jit
def _multiply(rings, barriers, numbers, firsts_ptr, count, out_ptr, WHICH: gl.constexpr, CALL: gl.constexpr):
    """Four warps: half of the columns of every block of the program."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CALL.half, 16])
    free = barriers[1]
    slot = count * 0
    phase = slot
    turn = slot
    number = hear(numbers, barriers, turn)
    while number < count:
        expert, left_at, right_at, _, _, steps = _place(number, firsts_ptr, CALL)
        zero = gl.zeros([ROWS, CALL.half], gl.float32, ACC)
        a, b, c = _step(zero, zero, zero, rings, barriers, slot, phase, WHICH, False, CALL)
        before = slot
        slot, phase = following(slot, phase, CALL.stages)
        for _ in range(1, steps):
            a, b, c = _step(a, b, c, rings, barriers, slot, phase, WHICH, True, CALL)
            mbarrier.arrive(free.index(before))
            before = slot
            slot, phase = following(slot, phase, CALL.stages)
        a, b, c = warpgroup_mma_wait(0, deps=[a, b, c])
        mbarrier.arrive(free.index(before))
        out = out_ptr + expert.to(gl.int64) * CALL.left * CALL.right
        right_at += WHICH * CALL.half
        _store(a, out, left_at, right_at, CALL)
        _store(b, out, left_at + ROWS, right_at, CALL)
        _store(c, out, left_at + 2 * ROWS, right_at, CALL)
        turn += 1
        number = hear(numbers, barriers, turn)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def outer_kernel(
    left, right, firsts_ptr, taken_ptr, out_ptr, EXPERTS: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    TURNED: gl.constexpr, STAGES: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """out (EXPERTS, LEFT, RIGHT) = left^T right over the rows of each expert, in blocks of BM by BN.

    `left` and `right` are rows in the order of the plan as (first row, row from there on, column). `taken_ptr` holds 0.
    With TURNED, the matrix of each expert is stored as its transpose.
    """
    gl.static_assert(BM == HIGH * ROWS)
    gl.static_assert(RIGHT % (BN // 4) == 0)  # a part is inside of the result, or beyond its edge
    CALL: gl.constexpr = _call(LEFT, RIGHT, TURNED, STAGES, BK, BM, BN)
    left_ring = gl.allocate_shared_memory(left.dtype, [STAGES * HIGH, 1, BK, ROWS], left.layout)
    right_ring = gl.allocate_shared_memory(right.dtype, [STAGES * GROUPS, 1, BK, BN // 2], right.layout)
    barriers, numbers = make_barriers(STAGES, GROUPS)
    rings = (left_ring, right_ring)
    count = gl.cast(EXPERTS * CALL.blocks, gl.int32)
    gl.warp_specialize(
        [
            (_multiply, (rings, barriers, numbers, firsts_ptr, count, out_ptr, 0, CALL)),
            (_multiply, (rings, barriers, numbers, firsts_ptr, count, out_ptr, 1, CALL)),
            (_load, (rings, barriers, numbers, firsts_ptr, taken_ptr, count, left, right, CALL)),
        ],
        [4, 1], [232, 24],
    )  # fmt: skip
