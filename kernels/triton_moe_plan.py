"""The order in which routed experts are computed: choices by expert, and the tiles of rows that programs take.

A choice is a pair (t, k), numbered t * K + k. Its place in the order is its row; an expert's rows follow one
another, in the order of the tokens. Nothing is decided on the host, so nothing waits for the device: sizes
are bounds that hold for any routing, and the device counts what is needed. Nothing is added up by
atomics either: equal calls give equal plans.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_inductor.kernels.launching import UNSPECIALIZED, Config, ceil_div, launch, power_of_2

# Measured on an H100: up to so many choices a launch that compares all with all is fastest, fewer of few experts,
_RANKED_CHOICES = 2048
_RANKED_OF_FEW = 1024
_FEW_EXPERTS = 128
# and up to so many, or so many times experts, one that counts all in every program beats a sort of several launches.
_COUNTED_CHOICES = 32768
_COUNTED_TOGETHER = 6 << 20
_COUNTED_EXPERTS = 1024
# Choices up to which each is compared with all others by every program, rather than counted in a histogram.
_COMPARED_CHOICES = 64
# Choices that a program ranks, or experts whose first row and tiles it finds.
_RANKED_TOGETHER = 16
# Choices that are compared at once with those that a program counts rows for.
_COMPARED_TOGETHER = tl.constexpr(32)
# Sort keys of 16 bits take half the passes of 32.
_NARROW_EXPERTS = torch.iinfo(torch.int16).max


@triton.jit
def _experts_of(ids_ptr, ids_steps, pair, pairs, CHOICES: tl.constexpr, EXPERTS: tl.constexpr):
    """The experts of choices, int32, EXPERTS where there is none; of those from `pairs` on, any."""
    place = (pair // CHOICES).to(tl.int64) * ids_steps[0] + (pair % CHOICES).to(tl.int64) * ids_steps[1]
    expert = tl.load(ids_ptr + place, mask=pair < pairs, other=0).to(tl.int64)
    return tl.where((expert >= 0) & (expert < EXPERTS), expert, EXPERTS).to(tl.int32)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _keys_kernel(ids_ptr, ids_steps, keys_ptr, pairs, CHOICES: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr):  # fmt: skip
    """The expert of each choice, EXPERTS where there is none."""
    pair = tl.program_id(0) * BM + tl.arange(0, BM)
    expert = _experts_of(ids_ptr, ids_steps, pair, pairs, CHOICES, EXPERTS)
    tl.store(keys_ptr + pair, expert.to(keys_ptr.dtype.element_ty), mask=pair < pairs)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _count_kernel(ids_ptr, ids_steps, keys_ptr, order_ptr, firsts_ptr, tiles_ptr, pairs, CHOICES: tl.constexpr,
                  EXPERTS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr):  # fmt: skip
    """What `_rank_kernel` does, for more choices: every program counts all, BN at a time, and finds BM rows."""
    first = tl.program_id(0) * BM
    counts = tl.zeros((2 * BINS,), tl.int32)
    for start in tl.range(0, pairs, BN):
        other = start + tl.arange(0, BN)
        expert = _experts_of(ids_ptr, ids_steps, other, pairs, CHOICES, EXPERTS)
        # Choices before this program's own and the others are counted apart.
        place = expert + tl.where(other < first, 0, BINS)
        counts += tl.histogram(place, 2 * BINS, mask=(other < pairs) & (expert < EXPERTS))
    before, others = tl.split(tl.reshape(counts, (2, BINS)).trans())
    rows = before + others
    end = tl.cumsum(rows, 0)
    needed = (rows + ROWS - 1) // ROWS
    tiles_end = tl.cumsum(needed, 0)

    pair = first + tl.arange(0, BM)
    inside = pair < pairs
    expert = _experts_of(ids_ptr, ids_steps, pair, pairs, CHOICES, EXPERTS)
    # How many come before with the same expert, and which row that makes.
    place = tl.zeros((BM,), tl.int32)
    for start in tl.range(first, first + BM, _COMPARED_TOGETHER):
        other = start + tl.arange(0, _COMPARED_TOGETHER)
        same = _experts_of(ids_ptr, ids_steps, other, pairs, CHOICES, EXPERTS)[None, :] == expert[:, None]
        place += tl.sum((same & (other[None, :] < pair[:, None])).to(tl.int32), 1)
    routed = expert < EXPERTS
    known = tl.where(routed, expert, 0)
    place += tl.where(routed, tl.gather(before, known, 0), first - tl.sum(before, 0))
    row = place + tl.where(routed, tl.gather(end - rows, known, 0), tl.sum(rows, 0))
    tl.store(order_ptr + row, pair, mask=inside)
    tl.store(keys_ptr + pair, expert, mask=inside)
    # Where those before fill whole tiles, a tile begins.
    begins = inside & routed & (place % ROWS == 0)
    entry = tiles_ptr + (1 + tl.gather(tiles_end - needed, known, 0) + place // ROWS) * 4
    tl.store(entry, expert, mask=begins)
    tl.store(entry + 1, row, mask=begins)
    tl.store(entry + 2, tl.gather(end, known, 0), mask=begins)
    if first == 0:
        bins = tl.arange(0, BINS)
        tl.store(firsts_ptr + bins, end - rows, mask=bins < EXPERTS)
        tl.store(firsts_ptr + EXPERTS, tl.sum(rows, 0))
        tl.store(tiles_ptr, tl.sum(needed, 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rank_kernel(ids_ptr, ids_steps, keys_ptr, order_ptr, firsts_ptr, tiles_ptr, pairs, CHOICES: tl.constexpr,
                 EXPERTS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr):  # fmt: skip
    """`_keys_kernel`, a stable sort, `_tiles_kernel` and the first row of each expert for at most BN choices, at once.

    The row of a choice is how many come before it, so every program counts by itself. The first
    programs do so for BM choices each, the others for BM experts, in BINS bins or, where BINS is 0, without.
    """
    other = tl.arange(0, BN)
    expert = _experts_of(ids_ptr, ids_steps, other, pairs, CHOICES, EXPERTS)
    # Distinct numbers that sort by expert, then by choice; E * BN is at most 2^26.
    number = tl.where(other < pairs, expert * BN + other, 0x7FFFFFFF)
    blocks = tl.cdiv(pairs, BM)
    if tl.program_id(0) < blocks:
        pair = tl.program_id(0) * BM + tl.arange(0, BM)
        own = tl.sum(tl.where(other[None, :] == pair[:, None], number[None, :], 0), 1)
        row = tl.sum((number[None, :] < own[:, None]).to(tl.int32), 1)
        tl.store(order_ptr + row, pair, mask=pair < pairs)
        tl.store(keys_ptr + pair, own // BN, mask=pair < pairs)
    else:
        mine = (tl.program_id(0) - blocks) * BM + tl.arange(0, BM)
        chosen = (other < pairs) & (expert < EXPERTS)
        if BINS == 0:
            # A choice begins a tile if those before it with its expert fill whole ones.
            alike = (expert[None, :] == expert[:, None]) & (other[None, :] < other[:, None])
            begins = chosen & (tl.sum(alike.to(tl.int32), 1) % ROWS == 0)
            earlier = expert[None, :] < mine[:, None]
            same = expert[None, :] == mine[:, None]
            rows = chosen.to(tl.int32)
            needed = begins.to(tl.int32)
        else:
            bins = tl.arange(0, BINS)
            rows = tl.histogram(expert, BINS, mask=chosen)
            needed = (rows + ROWS - 1) // ROWS
            earlier = bins[None, :] < mine[:, None]
            same = bins[None, :] == mine[:, None]
        first = tl.sum(tl.where(earlier, rows[None, :], 0), 1)
        tl.store(firsts_ptr + mine, first, mask=mine <= EXPERTS)
        end = first + tl.sum(tl.where(same, rows[None, :], 0), 1)
        before = tl.sum(tl.where(earlier, needed[None, :], 0), 1)
        count = tl.sum(tl.where(same, needed[None, :], 0), 1)
        for tile in tl.range(0, tl.max(count, 0)):
            entry = tiles_ptr + (1 + before + tile) * 4
            tl.store(entry, mine, mask=tile < count)
            tl.store(entry + 1, first + tile * ROWS, mask=tile < count)
            tl.store(entry + 2, end, mask=tile < count)
        tl.store(tiles_ptr + mine * 0, before, mask=mine == EXPERTS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _tiles_kernel(firsts_ptr, tiles_ptr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr):  # fmt: skip
    """The tiles of ROWS rows of one expert; see `Plan.tiles`."""
    mine = tl.program_id(0)
    expert = tl.arange(0, BN)
    begin = tl.load(firsts_ptr + expert, mask=expert < EXPERTS, other=0)
    end = tl.load(firsts_ptr + expert + 1, mask=expert < EXPERTS, other=0)
    needed = (end - begin + ROWS - 1) // ROWS
    before = tl.sum(tl.where(expert < mine, needed, 0), 0)
    count = tl.sum(tl.where(expert == mine, needed, 0), 0)
    first_row = tl.load(firsts_ptr + mine)
    last_row = tl.load(firsts_ptr + mine + 1)
    for start in tl.range(0, count, BM):
        tile = start + tl.arange(0, BM)
        entry = tiles_ptr + (1 + before + tile) * 4
        inside = tile < count
        tl.store(entry, tile * 0 + mine, mask=inside)
        tl.store(entry + 1, first_row + tile * ROWS, mask=inside)
        tl.store(entry + 2, tile * 0 + last_row, mask=inside)
    if mine == EXPERTS - 1:
        tl.store(tiles_ptr, before + count)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of a call.

    Attributes:
        choices: K.
        experts: E.
        keys: (T * K), the expert of each choice, `experts` for none.
        order: int32 or int64 (T * K), the choice of each row; choices of no expert come last.
        firsts: int32 (E + 1), the first row of each expert, and the end of the last one's.
        made: what `tiles` has made, by its argument.
    """

    choices: int
    experts: int
    keys: Tensor
    order: Tensor
    firsts: Tensor
    made: dict[int, Tensor] = dataclasses.field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, ids: Tensor, experts: int, rows: int) -> Plan:
        """The plan of ids (T, K), of any integer dtype and strides; T * K is at least 1.

        Up to 32,768 choices one launch does it all, tiles of `rows` rows included: then the device waits for the host,
        which launches. More are sorted: a million keys take some tens of microseconds, where the products that follow
        take milliseconds.
        """
        pairs, choices = ids.numel(), ids.shape[1]
        way = _way(pairs, experts)
        if way is None:
            return cls._sorted(ids, experts)
        sizes = ((pairs,), (pairs,), (experts + 1,), (1 + _bound(pairs, experts, rows), 4))
        keys, order, firsts, tiles = [ids.new_empty(size, dtype=torch.int32) for size in sizes]
        kernel, config, bins = way
        programs = ceil_div(pairs, config.rows)
        if kernel is _rank_kernel:
            programs += ceil_div(experts + 1, config.rows)
        launch(
            kernel, [config], lambda _: programs,
            lambda _: {
                "ids_ptr": ids, "ids_steps": ids.stride(), "pairs": pairs, "CHOICES": choices, "EXPERTS": experts,
                "keys_ptr": keys, "order_ptr": order, "firsts_ptr": firsts, "tiles_ptr": tiles, "BINS": bins,
                "ROWS": rows,
            },
        )  # fmt: skip
        return cls(choices, experts, keys, order, firsts, {rows: tiles})

    @classmethod
    def _sorted(cls, ids: Tensor, experts: int) -> Plan:
        """`of`, by a sort, without tiles."""
        pairs, choices = ids.numel(), ids.shape[1]
        kind = torch.int16 if experts < _NARROW_EXPERTS else torch.int32
        keys = torch.empty(pairs, dtype=kind, device=ids.device)
        launch(
            _keys_kernel, [Config(1024, 1, 4, 1)], lambda config: ceil_div(pairs, config.rows),
            lambda _: {
                "ids_ptr": ids, "ids_steps": ids.stride(), "pairs": pairs, "CHOICES": choices, "EXPERTS": experts,
                "keys_ptr": keys,
            },
        )  # fmt: skip
        ordered, order = torch.sort(keys, stable=True)
        numbers = torch.arange(experts + 1, dtype=kind, device=ids.device)
        firsts = torch.searchsorted(ordered, numbers, out_int32=True)
        return cls(choices, experts, keys, order, firsts)

    def bound(self, rows: int) -> int:
        """Most tiles of `rows` rows: every expert that is chosen has at most one that is not full."""
        return _bound(self.order.shape[0], self.experts, rows)

    def tiles(self, rows: int) -> Tensor:
        """Int32 (1 + bound, 4), tiles of at most `rows` rows of one expert, in the order of the rows.

        After the number of tiles, in row 0, each is (expert, first row, end of that expert's rows, nothing).
        """
        if rows not in self.made:
            tiles = torch.empty((1 + self.bound(rows), 4), dtype=torch.int32, device=self.order.device)
            arguments: dict[str, Any] = {
                "firsts_ptr": self.firsts, "tiles_ptr": tiles, "EXPERTS": self.experts, "ROWS": rows,
            }  # fmt: skip
            config = Config(256, max(16, power_of_2(self.experts)), 4, 1)
            launch(_tiles_kernel, [config], lambda _: self.experts, lambda _: arguments)
            self.made[rows] = tiles
        return self.made[rows]


def _bound(pairs: int, experts: int, rows: int) -> int:
    return (pairs + (rows - 1) * min(experts, pairs)) // rows


@functools.lru_cache(maxsize=1024)
def _way(pairs: int, experts: int) -> tuple[Any, Config, int] | None:
    """The kernel that makes a plan in one launch, how it runs, and bins for experts; None where a sort is faster."""
    bins, block = max(16, power_of_2(experts)), max(16, power_of_2(pairs))
    if pairs <= (_RANKED_OF_FEW if experts <= _FEW_EXPERTS else _RANKED_CHOICES) and experts < _NARROW_EXPERTS:
        return _rank_kernel, Config(_RANKED_TOGETHER, block, 4, 1), 0 if block <= _COMPARED_CHOICES else bins
    if pairs > _COUNTED_CHOICES or experts > _COUNTED_EXPERTS or pairs * experts > _COUNTED_TOGETHER:
        return None
    return _count_kernel, Config(max(64, block // 128), min(block, 4096), 4 if block < 4096 else 8, 1), bins
