"""The second half of routed experts in Triton: hidden rows times W2, and a weighted sum per token.

    second   each row of the product is written to the place of its choice; also the backward pass of the first product
    combine  a token's K rows, which so lie together, summed in the order of k

Where experts have few rows the product does nothing but stream weights, and its sum is cut into parts if there are
too few tiles for all multiprocessors.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from s2o_inductor.kernels.launching import UNSPECIALIZED, Config, ceil_div, launch, power_of_2
from s2o_inductor.kernels.triton_moe_addresses import Matrices
from s2o_inductor.kernels.triton_moe_plan import Plan
from s2o_inductor.kernels.triton_moe_tiles import (
    NO_WEIGHTS,
    Tile,
    Weights,
    grid_of,
    load_bias,
    load_weights,
    place_of,
    rows_in_tiles,
    weights_of,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _second_kernel(
    a_tiles, w, w_steps, a2_tiles, w2, w2_steps, order_ptr, tiles_ptr, bias_ptr, bias_steps, x_ptr, x_steps, p_ptr,
    share_ptr, y_ptr, pairs, CHOICES: tl.constexpr, DEPTH: tl.constexpr, OUT: tl.constexpr, LAYOUT: tl.constexpr,
    LAYOUT2: tl.constexpr, BIAS: tl.constexpr, TWO: tl.constexpr, SCORED: tl.constexpr, SPLITS: tl.constexpr,
    SHARED: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y[choice] = a[row] W^T (+ a2[row] W2^T) for BM rows of an expert by BN columns, or one part of SPLITS of it.

    SCORED is the backward pass of weights on the input: the rows of y, gradients of weighted rows x, leave
    multiplied with their weight, and what they have in common with x goes to `share_ptr` (T * K, blocks).
    With SHARED, programs share all tiles; otherwise each finds one, or none.
    """
    blocks = tl.cdiv(OUT, BN)
    count = tl.load(tiles_ptr)
    # Flattened, a program's tiles are one loop, whose pipeline fetches across their borders.
    for number in tl.range(tl.program_id(0), count * blocks * SPLITS, tl.num_programs(0), flatten=SHARED):
        tile, block, split = place_of(number, blocks, SPLITS, count, GROUP)
        entry = tiles_ptr + 4 + tile * 4
        expert = tl.load(entry)
        first = tl.load(entry + 1)
        column = block * BN
        EACH: tl.constexpr = (DEPTH + BK * SPLITS - 1) // (BK * SPLITS) * BK
        acc = tl.zeros((BM, BN), tl.float32)
        source = weights_of(w, w_steps, expert, LAYOUT, a_tiles.dtype)
        if SPLITS == 1:
            for depth in tl.range(0, DEPTH, BK):
                weights = load_weights(source, w_steps, expert, column, depth, LAYOUT, OUT, DEPTH, BN, BK)
                acc = tl.dot(a_tiles.load([first, depth]), weights, acc, input_precision="ieee")
        else:
            for depth in tl.range(split * EACH, tl.minimum(split * EACH + EACH, DEPTH), BK):
                weights = load_weights(source, w_steps, expert, column, depth, LAYOUT, OUT, DEPTH, BN, BK)
                acc = tl.dot(a_tiles.load([first, depth]), weights, acc, input_precision="ieee")
        if TWO:
            source2 = weights_of(w2, w2_steps, expert, LAYOUT2, a_tiles.dtype)
            for depth in tl.range(0, DEPTH, BK):
                weights = load_weights(source2, w2_steps, expert, column, depth, LAYOUT2, OUT, DEPTH, BN, BK)
                acc = tl.dot(a2_tiles.load([first, depth]), weights, acc, input_precision="ieee")

        row = first + tl.arange(0, BM)
        inside = row < tl.load(entry + 2)
        index = column + tl.arange(0, BN)
        pair = tl.load(order_ptr + row, mask=inside, other=0).to(tl.int32)
        keep = inside[:, None] & (index < OUT)[None, :]
        if BIAS:
            bias = load_bias(bias_ptr, bias_steps, expert, index, OUT)
            acc += tl.where(split == 0, bias, 0.0)[None, :]
        if SCORED:
            x = x_ptr + (pair // CHOICES).to(tl.int64)[:, None] * x_steps[0] + index[None, :]
            share = tl.sum(acc * tl.load(x, mask=keep, other=0.0).to(tl.float32), 1)
            tl.store(share_ptr + pair.to(tl.int64) * blocks + block, share, mask=inside)
            acc = acc * tl.load(p_ptr + pair).to(tl.float32)[:, None]
        place = y_ptr + (split.to(tl.int64) * pairs + pair)[:, None] * OUT + index[None, :]
        tl.store(place, acc.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _combine_kernel(
    y_ptr, keys_ptr, p_ptr, out_ptr, pairs, CHOICES: tl.constexpr, EXPERTS: tl.constexpr, WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN columns of the sum of one token's rows of y (SPLITS, T * K, WIDTH), BM choices at a time."""
    blocks = tl.cdiv(WIDTH, BN)
    token = tl.program_id(0) // blocks
    index = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for start in tl.static_range(0, CHOICES, BM):
        choice = start + tl.arange(0, BM)
        pair = token.to(tl.int64) * CHOICES + choice
        there = choice < CHOICES
        # Nobody wrote the row of a choice without an expert.
        there = there & (tl.load(keys_ptr + pair, mask=there, other=EXPERTS) < EXPERTS)
        mask = there[:, None] & (index < WIDTH)[None, :]
        rows = tl.zeros((BM, BN), tl.float32)
        for split in tl.static_range(SPLITS):
            place = y_ptr + (pair + split * pairs.to(tl.int64))[:, None] * WIDTH + index[None, :]
            rows += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            rows = rows * tl.load(p_ptr + pair, mask=there, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(rows, 0)
    place = out_ptr + token.to(tl.int64) * WIDTH + index
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=index < WIDTH)


# -------------------------------------------------------------------------------------------- host


@dataclasses.dataclass(frozen=True)
class Scored:
    """What `second` needs to pass gradients through weights on the input.

    Attributes:
        x: (T, l), the input before it was weighted, rows of unit stride.
        p: (T * K), contiguous.
        share: float32 (T * K, blocks of columns): x times its gradient, summed over each block.
    """

    x: Tensor
    p: Tensor
    share: Tensor


def second(
    a: Sequence[Tensor], w: Sequence[Matrices], bias: Tensor | None, plan: Plan, y: Tensor, configs: Sequence[Tile],
    scored: Scored | None = None,
) -> None:  # fmt: skip
    """Fills y (parts, T * K, out), by choice: rows a, in the order of the plan, times their experts' weights w.

    Args:
        a: one or two of (T * K, in), made by `rows_like` or a part of one, whose products are added up.
        w: as many of (E, out, in), any strides; tensors or tables of addresses.
        bias: (E, out).
        plan: of the call.
        y: contiguous; with several parts each holds the product over a part of `in`.
        configs: ways to run the kernel, fastest first.
        scored: see there; all configs have as many columns as its blocks then.
    """
    parts, pairs, out = y.shape

    def arguments(config: Config) -> dict[str, Any]:
        assert isinstance(config, Tile)
        one, two, a2_tiles = Weights.of(w[0], config.keys, config.depth), NO_WEIGHTS, None
        if len(w) == 2:
            two = Weights.of(w[1], config.keys, config.depth)
            a2_tiles = rows_in_tiles(a[1], config.rows, config.depth)
        return {
            "a_tiles": rows_in_tiles(a[0], config.rows, config.depth), "w": one.source, "w_steps": one.steps,
            "LAYOUT": one.layout, "a2_tiles": a2_tiles, "w2": two.source, "w2_steps": two.steps,
            "LAYOUT2": two.layout, "order_ptr": plan.order, "tiles_ptr": plan.tiles(config.rows),
            "bias_ptr": bias, "bias_steps": (0, 0) if bias is None else bias.stride(),
            "x_ptr": scored and scored.x, "x_steps": scored.x.stride()[:1] if scored else (0,),
            "p_ptr": scored and scored.p, "share_ptr": scored and scored.share, "y_ptr": y, "pairs": pairs,
            "CHOICES": plan.choices, "DEPTH": w[0].shape[2], "OUT": out, "SHARED": config.programs > 0,
            "BIAS": bias is not None, "TWO": len(w) == 2, "SCORED": scored is not None, "SPLITS": parts,
            "GROUP": config.group, "BK": config.depth,
        }  # fmt: skip

    launch(_second_kernel, configs, grid_of(plan, out, parts), arguments)


def combine(y: Tensor, p: Tensor | None, plan: Plan, out: Tensor) -> None:
    """Fills out (T, l), contiguous, with the sum over parts and choices of y (parts, T * K, l), weighted by p if given.

    The sum is made in float32, in an order that depends on nothing but K, and rounded once.
    """
    parts, pairs, width = y.shape
    # A thread sums columns of its own, for which nothing is exchanged; of several parts it could not hold as many rows.
    rows = min(8 if parts == 1 else 32, power_of_2(plan.choices))
    config = Config(rows, min(1024, 8192 // rows, power_of_2(width)), 4, 1)
    launch(
        _combine_kernel, [config], lambda c: out.shape[0] * ceil_div(width, c.keys),
        lambda _: {
            "y_ptr": y, "keys_ptr": plan.keys, "p_ptr": p, "out_ptr": out, "pairs": pairs, "CHOICES": plan.choices,
            "EXPERTS": plan.experts, "WIDTH": width, "WEIGHTED": p is not None, "SPLITS": parts,
        },
    )  # fmt: skip
