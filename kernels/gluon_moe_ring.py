"""What the Gluon kernels of routed experts share: a ring of stages, tiles from a counter, and stores by threads.

One warp loads into the ring and tells the groups of four warps that multiply which tile comes next.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

# A load by the copy engine has one name in Triton 3.6 and another in 3.9.
copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# Rows that a group of four warps multiplies: those of one matrix instruction.
ROWS = gl.constexpr(64)


@gluon.constexpr_function
def stored(columns, turned=False):
    """A layout (ROWS, columns) in which a thread stores 16 bytes at once: of a row or, if `turned`, of a column.

    Where a matrix instruction leaves its sums, a thread has pairs of neighbours; the four threads that share a row
    exchange theirs among one another.
    """
    if turned:
        registers = [[1, 0], [2, 0], [4, 0]]
        width = 16
        while width < columns:
            registers.append([0, width])
            width *= 2
        lanes = [[8, 0], [16, 0], [32, 0], [0, 1], [0, 2]]
        return gl.DistributedLinearLayout(registers, lanes, [[0, 4], [0, 8]], [], [64, columns])
    registers = [[0, 1], [0, 2], [0, 4]]
    width = 32
    while width < columns:
        registers.append([0, width])
        width *= 2
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([*registers, [8, 0]], lanes, [[16, 0], [32, 0]], [], [64, columns])


@gluon.jit
def make_barriers(STAGES: gl.constexpr, GROUPS: gl.constexpr):
    """((ready, free, told, heard), numbers): barriers of the stages and the tiles of a program; its tiles' numbers."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(2):
        mbarrier.init(told.index(i), count=1)
        mbarrier.init(heard.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    fence_async_shared()  # the copy engine counts on them, too
    return (ready, free, told, heard), numbers


@gluon.jit
def following(slot, phase, STAGES: gl.constexpr):
    """The place in the ring after `slot`, and the parity of its turn."""
    turned = slot + 1 == STAGES
    return gl.where(turned, 0, slot + 1), gl.where(turned, phase ^ 1, phase)


@gluon.jit
def tell(numbers, barriers, number, turn):
    """Hands the number of the program's tile `turn` to the warps that multiply."""
    told = barriers[2]
    heard = barriers[3]
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(heard.index(turn % 2), turn // 2 + 1 & 1)
    numbers.index(turn % 2).store(gl.full([1], number, gl.int32, ONE))
    mbarrier.arrive(told.index(turn % 2))


@gluon.jit
def hear(numbers, barriers, turn):
    """The number of the program's tile `turn`."""
    told = barriers[2]
    heard = barriers[3]
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(told.index(turn % 2), turn // 2 & 1)
    number = gl.sum(numbers.index(turn % 2).load(ONE), 0)
    mbarrier.arrive(heard.index(turn % 2))
    return number


@gluon.jit
def put(x, out_ptr, step, row, inside, column):
    """Stores x (ROWS, n) from `column` on in rows `row`, where they are `inside`."""
    STORED: gl.constexpr = stored(x.shape[1])
    x = gl.convert_layout(x.to(out_ptr.dtype.element_ty), STORED)
    # Whatever the number of columns, a thread has the same rows.
    row = gl.convert_layout(row, gl.SliceLayout(1, STORED), assert_trivial=True)
    keep = gl.expand_dims(gl.convert_layout(inside, gl.SliceLayout(1, STORED), assert_trivial=True), 1)
    index = column + gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, STORED))
    place = out_ptr + gl.expand_dims(row.to(gl.int64) * step, 1) + gl.expand_dims(index, 0)
    gl.store(place, x, mask=keep)


@gluon.jit
def put_turned(x, out_ptr, step, row, inside, column):
    """Stores x (ROWS, n) as its transpose: from `column` on in rows, `row` in columns, where they are `inside`."""
    STORED: gl.constexpr = stored(x.shape[1], True)
    x = gl.convert_layout(x.to(out_ptr.dtype.element_ty), STORED)
    index = column + gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, STORED))
    place = out_ptr + gl.expand_dims(row, 1) + gl.expand_dims(index.to(gl.int64) * step, 0)
    gl.store(place, x, mask=gl.expand_dims(inside, 1))
