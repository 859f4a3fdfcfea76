"""Routed experts in Triton, backward: grouped products over the plan of the forward pass, without atomics.

With du the gradient of a token's output, and the first product `pre` kept or computed again:

    dh      = du W2                gathered by token; its epilogue makes h, dpre and dp = dh . h, so y is not needed;
                                   where h was kept, which a root turns into act'(pre), it makes the latter two
    dW2     = du^T (p h)           or (p du)^T h; a sum over the expert's rows, zero for an expert without any
    dx      = dpre W1              `triton_moe_second.second`, then `combine`
    dW1     = dpre^T x             as dW2

The identity dp = sum of du * y = sum of (du W2) * h holds without b2; `share_kernel` adds what b2 is due.
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

from s2o_inductor.kernels.launching import UNSPECIALIZED, Config, launch
from s2o_inductor.kernels.triton_moe_addresses import Addresses, Matrices, address_of
from s2o_inductor.kernels.triton_moe_plan import Plan
from s2o_inductor.kernels.triton_moe_tiles import (
    ALTERNATING,
    PLAIN,
    Tile,
    Weights,
    formula,
    gated_backward,
    halves,
    kept_backward,
    load_rows,
    load_weights,
    place_of,
    plain_backward,
    rows_in_tiles,
    scaled,
    weights_of,
)
from s2o_inductor.moe_spec import ExpertSpec

# Blocks of a weight's gradient that one program makes at most: enough to hide where its pipeline begins, few enough
# that all multiprocessors have work where one expert has all rows; and programs that each of these has before that.
_BLOCKS = 8
_PROGRAMS = 4


@triton.jit
def _through(
    dh, factor, numbers, row, inside, column, pre_ptr, dpre_ptr, dpre_steps, h_ptr, h_steps, INNER: tl.constexpr,
    GATE_AT: tl.constexpr, UP_AT: tl.constexpr, TO_GATE: tl.constexpr, TO_UP: tl.constexpr, ACTIVATION: tl.constexpr,
    GATE: tl.constexpr, LIMITED: tl.constexpr, HIDDEN: tl.constexpr, FROM_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Writes gradients of the first product, and h if HIDDEN, where dh (BM, BN) are those of h at `column`: dh . h.

    `pre_ptr` holds the first product, or h if FROM_HIDDEN.
    """
    BM: tl.constexpr = dh.shape[0]
    BN: tl.constexpr = dh.shape[1]
    index = column + tl.arange(0, BN)
    keep = inside[:, None] & (index < INNER)[None, :]
    COLUMNS: tl.constexpr = INNER if GATE == PLAIN else 2 * INNER
    pre = pre_ptr + row.to(tl.int64)[:, None] * COLUMNS
    dpre = dpre_ptr + row.to(tl.int64)[:, None] * dpre_steps[0]
    kind = dpre_ptr.dtype.element_ty
    weighted = dh * factor[:, None]
    if GATE == ALTERNATING:
        wide = 2 * column + tl.arange(0, 2 * BN)
        among = inside[:, None] & (wide < 2 * INNER)[None, :]
        both = tl.load(pre + wide[None, :], mask=among, other=0.0).to(tl.float32)
        gate, up = tl.split(both.reshape(BM, BN, 2))
        h, of_gate, of_up = gated_backward(gate, up, numbers, ACTIVATION, LIMITED)
        both = tl.join(weighted * of_gate, weighted * of_up).reshape(BM, 2 * BN)
        tl.store(dpre + wide[None, :], both.to(kind), mask=among)
    elif GATE != PLAIN:
        gate = tl.load(pre + (GATE_AT + index)[None, :], mask=keep, other=0.0).to(tl.float32)
        up = tl.load(pre + (UP_AT + index)[None, :], mask=keep, other=0.0).to(tl.float32)
        h, of_gate, of_up = gated_backward(gate, up, numbers, ACTIVATION, LIMITED)
        tl.store(dpre + (TO_GATE + index)[None, :], (weighted * of_gate).to(kind), mask=keep)
        tl.store(dpre + (TO_UP + index)[None, :], (weighted * of_up).to(kind), mask=keep)
    else:
        x = tl.load(pre + index[None, :], mask=keep, other=0.0).to(tl.float32)
        if FROM_HIDDEN:
            h, slope = kept_backward(x, ACTIVATION)
        else:
            h, slope = plain_backward(x, numbers, ACTIVATION, LIMITED)
        tl.store(dpre + index[None, :], (weighted * slope).to(kind), mask=keep)
    if HIDDEN:
        place = h_ptr + row.to(tl.int64)[:, None] * h_steps[0] + index[None, :]
        tl.store(place, (h * factor[:, None]).to(kind), mask=keep)
    return tl.sum(tl.where(keep, dh * h, 0.0), 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _hidden_kernel(
    grad_ptr, grad_steps, du_tiles, w, w_steps, order_ptr, tiles_ptr, p_ptr, pre_ptr, dpre_ptr, dpre_steps, h_ptr,
    h_steps, share_ptr, alpha, limit, shift, CHOICES: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
    GATE_AT: tl.constexpr, UP_AT: tl.constexpr, TO_GATE: tl.constexpr, TO_UP: tl.constexpr, LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, LIMITED: tl.constexpr, SCORE: tl.constexpr, HIDDEN: tl.constexpr,
    FROM_HIDDEN: tl.constexpr, GATHERED: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Gradients of BM rows of the first product of an expert, BN hidden columns; h, weighted, if HIDDEN.

    With GATHERED, rows of du are those of `du_tiles`, gathered before; otherwise of their tokens' gradients.
    """
    blocks = tl.cdiv(INNER, BN)
    count = tl.load(tiles_ptr)
    if tl.program_id(0) < count * blocks:
        tile, block, _ = place_of(tl.program_id(0), blocks, 1, count, GROUP)
        entry = tiles_ptr + 4 + tile * 4
        expert = tl.load(entry)
        first = tl.load(entry + 1)
        row = first + tl.arange(0, BM)
        inside = row < tl.load(entry + 2)
        pair = tl.load(order_ptr + row, mask=inside, other=0).to(tl.int32)
        rows = grad_ptr + (pair // CHOICES).to(tl.int64) * grad_steps[0]
        column = block * BN
        dh = tl.zeros((BM, BN), tl.float32)
        source = weights_of(w, w_steps, expert, LAYOUT, grad_ptr.dtype.element_ty)
        for depth in tl.range(0, WIDTH, BK):
            if GATHERED:
                du = du_tiles.load([first, depth])
            else:
                du = load_rows(rows, depth, inside, False, WIDTH, BK)
            weights = load_weights(source, w_steps, expert, column, depth, LAYOUT, INNER, WIDTH, BN, BK)
            dh = tl.dot(du, weights, dh, input_precision="ieee")

        numbers = (tl.cast(alpha, tl.float32), tl.cast(limit, tl.float32), tl.cast(shift, tl.float32))
        factor = tl.zeros((BM,), tl.float32) + 1.0
        if SCORE != "input":
            factor = tl.load(p_ptr + pair).to(tl.float32)
        # In quarters: what all columns need at once does not fit the registers.
        left, right = halves(dh)
        parts = halves(left) + halves(right)
        share = tl.zeros((BM,), tl.float32)
        for i in tl.static_range(4):
            share += _through(
                parts[i], factor, numbers, row, inside, column + i * (BN // 4), pre_ptr, dpre_ptr, dpre_steps, h_ptr,
                h_steps, INNER, GATE_AT, UP_AT, TO_GATE, TO_UP, ACTIVATION, GATE, LIMITED, HIDDEN,
                FROM_HIDDEN,
            )  # fmt: skip
        if SCORE != "input":
            tl.store(share_ptr + pair.to(tl.int64) * blocks + block, share, mask=inside)


@triton.jit
def _rows_of(pointer, steps, order_ptr, row, inside, CHOICES: tl.constexpr, GATHERED: tl.constexpr):
    """(where `row` begins, the choices): of the rows themselves, or of their tokens if GATHERED."""
    pair = tl.load(order_ptr + row, mask=inside, other=0).to(tl.int32)
    place = pointer + row.to(tl.int64) * steps[0]
    if GATHERED:
        place = pointer + (pair // CHOICES).to(tl.int64) * steps[0]
    return place, pair


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _outer_kernel(
    left_ptr, left_steps, right_ptr, right_steps, order_ptr, firsts_ptr, p_ptr, out_ptr, CHOICES: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, LEFT_GATHERED: tl.constexpr, RIGHT_GATHERED: tl.constexpr,
    LEFT_SCALED: tl.constexpr, RIGHT_SCALED: tl.constexpr, ADDRESSED: tl.constexpr, BLOCKS: tl.constexpr,
    BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[expert] (LEFT, RIGHT) = left^T right over the rows of an expert: up to BLOCKS blocks of BM by BN, in turn.

    An expert's rows make a short sum, so the sums of a program are one loop, whose pipeline fetches across
    their borders. With ADDRESSED, `out_ptr` is a table of where the matrix of each expert begins.
    """
    kind = left_ptr.dtype.element_ty
    rights = tl.cdiv(RIGHT, BN)
    blocks = tl.cdiv(LEFT, BM) * rights
    programs = tl.cdiv(blocks, BLOCKS)
    expert = tl.program_id(0) // programs
    first = tl.program_id(0) % programs * BLOCKS
    begin = tl.load(firsts_ptr + expert)
    end = tl.load(firsts_ptr + expert + 1)
    steps = tl.maximum(tl.cdiv(end - begin, BK), 1)  # one without rows where there are none: it stores zeros
    acc = tl.zeros((BM, BN), tl.float32)
    out = out_ptr
    if ADDRESSED:
        out = address_of(out_ptr, expert, kind)
    for number in tl.range(0, tl.minimum(BLOCKS, blocks - first) * steps):
        block = first + number // steps
        step = number % steps
        left_at = block // rights * BM
        right_at = block % rights * BN
        row = begin + step * BK + tl.arange(0, BK)
        inside = row < end
        # Both sides are masked: a row of another expert may hold NaN, which no zero would undo.
        place, pair = _rows_of(left_ptr, left_steps, order_ptr, row, inside, CHOICES, LEFT_GATHERED)
        left = load_rows(place, left_at, inside, True, LEFT, BM)
        place, pair = _rows_of(right_ptr, right_steps, order_ptr, row, inside, CHOICES, RIGHT_GATHERED)
        right = load_rows(place, right_at, inside, True, RIGHT, BN)
        if LEFT_SCALED:
            left = scaled(left, tl.load(p_ptr + pair).to(tl.float32))
        if RIGHT_SCALED:
            right = scaled(right, tl.load(p_ptr + pair).to(tl.float32))
        acc = tl.dot(left.T, right, acc, input_precision="ieee")
        if step == steps - 1:
            i = left_at + tl.arange(0, BM)
            j = right_at + tl.arange(0, BN)
            rows = i.to(tl.int64)
            if not ADDRESSED:
                rows = expert.to(tl.int64) * LEFT + i
            here = out + rows[:, None] * RIGHT + j[None, :]
            if ADDRESSED and RIGHT * kind.primitive_bitwidth % 128 == 0:
                here = tl.multiple_of(here, (16, 16))  # bytes; see `Addresses`
            tl.store(here, acc.to(kind), mask=(i < LEFT)[:, None] & (j < RIGHT)[None, :])
            acc = tl.zeros((BM, BN), tl.float32)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sums_kernel(
    rows_ptr, rows_steps, order_ptr, firsts_ptr, p_ptr, out_ptr, out_steps, CHOICES: tl.constexpr,
    WIDTH: tl.constexpr, GATHERED: tl.constexpr, WEIGHTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[expert] (WIDTH), the sum of the rows of an expert, BN columns of it."""
    blocks = tl.cdiv(WIDTH, BN)
    expert = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BN
    end = tl.load(firsts_ptr + expert + 1)
    total = tl.zeros((BN,), tl.float32)
    for start in tl.range(tl.load(firsts_ptr + expert), end, BM):
        row = start + tl.arange(0, BM)
        inside = row < end
        place, pair = _rows_of(rows_ptr, rows_steps, order_ptr, row, inside, CHOICES, GATHERED)
        rows = load_rows(place, column, inside, True, WIDTH, BN).to(tl.float32)
        if WEIGHTED:
            rows = rows * tl.load(p_ptr + pair).to(tl.float32)[:, None]
        total += tl.sum(rows, 0)
    index = column + tl.arange(0, BN)
    place = out_ptr + expert.to(tl.int64) * out_steps[0] + index
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=index < WIDTH)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _share_kernel(
    share_ptr, keys_ptr, grad_ptr, grad_steps, b2_ptr, b2_steps, dp_ptr, pairs, CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dp of BM choices: the sum of their COUNT shares, and with BIAS du . b2; 0 for a choice without an expert."""
    pair = tl.program_id(0) * BM + tl.arange(0, BM)
    expert = tl.load(keys_ptr + pair, mask=pair < pairs, other=EXPERTS)
    there = expert < EXPERTS
    block = tl.arange(0, PADDED)
    place = share_ptr + pair.to(tl.int64)[:, None] * COUNT + block[None, :]
    total = tl.sum(tl.load(place, mask=there[:, None] & (block < COUNT)[None, :], other=0.0), 1)
    if BIAS:
        rows = grad_ptr + (pair // CHOICES).to(tl.int64) * grad_steps[0]
        biases = b2_ptr + expert.to(tl.int64) * b2_steps[0]
        for depth in tl.range(0, WIDTH, BN):
            k = depth + tl.arange(0, BN)
            du = load_rows(rows, depth, there, True, WIDTH, BN).to(tl.float32)
            bias = tl.load(biases[:, None] + (k.to(tl.int64) * b2_steps[1])[None, :],
                           mask=there[:, None] & (k < WIDTH)[None, :], other=0.0)  # fmt: skip
            total += tl.sum(du * bias.to(tl.float32), 1)
    tl.store(dp_ptr + pair, total.to(dp_ptr.dtype.element_ty), mask=pair < pairs)


# -------------------------------------------------------------------------------------------- host


@dataclasses.dataclass(frozen=True)
class Rows:
    """One side of a product over the rows of an expert.

    Attributes:
        x: (T * K, n) in the order of the plan or, `by_token`, (T, n); rows of unit stride.
        by_token: whether rows are gathered by token.
        weight: (T * K), contiguous, by which rows are multiplied and then rounded, or None.
    """

    x: Tensor
    by_token: bool = False
    weight: Tensor | None = None


def hidden_backward(
    spec: ExpertSpec, grad: Rows, w2: Matrices, plan: Plan, p: Tensor, pre: Tensor, from_hidden: bool, dpre: Tensor,
    up_at: int, h: Tensor | None, share: Tensor | None, configs: Sequence[Tile],
) -> None:  # fmt: skip
    """Fills dpre, and where wanted h times its routing weight and the shares of the gradient of p.

    Args:
        spec: the formula of an expert.
        grad: of the outputs, by token, or made by `rows_like` in the order of the plan; without a weight.
        w2: (E, l, I), any strides; a tensor or a table of addresses.
        plan: of the call.
        p: (T * K), contiguous.
        pre: (T * K, halves * I), contiguous, the first product; its activation if
        from_hidden: which is for relu and its square alone, without a gate.
        dpre: the first product's gradient, rows of unit stride; as `pre`, but for the column at which
        up_at: the second half begins.
        h: (T * K, I), rows of unit stride.
        share: float32 (T * K, blocks), one for each block of columns of the first config.
        configs: ways to run the kernel, fastest first.
    """
    inner, swapped = w2.shape[2], spec.gate == "half_swapped"

    def arguments(config: Config) -> dict[str, Any]:
        assert isinstance(config, Tile)
        weights = Weights.of(w2.mT, config.keys, config.depth)
        return {
            "grad_ptr": grad.x, "grad_steps": grad.x.stride()[:1], "GATHERED": not grad.by_token,
            "du_tiles": None if grad.by_token else rows_in_tiles(grad.x, config.rows, config.depth),
            "w": weights.source, "w_steps": weights.steps,
            "LAYOUT": weights.layout, "order_ptr": plan.order, "tiles_ptr": plan.tiles(config.rows), "p_ptr": p,
            "pre_ptr": pre, "dpre_ptr": dpre, "dpre_steps": dpre.stride()[:1], "h_ptr": h,
            "h_steps": (0,) if h is None else h.stride()[:1], "share_ptr": share,
            "CHOICES": plan.choices, "WIDTH": grad.x.shape[1], "INNER": inner,
            "GATE_AT": inner if swapped else 0, "UP_AT": 0 if swapped else inner,
            "TO_GATE": up_at if swapped else 0, "TO_UP": 0 if swapped else up_at, "SCORE": spec.score,
            "HIDDEN": h is not None, "FROM_HIDDEN": from_hidden, "GROUP": config.group, "BK": config.depth,
            **formula(spec),
        }  # fmt: skip

    launch(_hidden_kernel, configs, lambda c: plan.bound(c.rows) * triton.cdiv(inner, c.keys), arguments)


def outer(
    left: Rows, right: Rows, plan: Plan, out: Matrices, configs: Sequence[Tile], processors: int,
) -> None:  # fmt: skip
    """Fills out (E, m, n), contiguous: left (rows, m) transposed times right (rows, n), over each expert's rows.

    `processors` are those of the device, which decide how many blocks a program makes.
    """
    experts, m, n = out.shape
    weight = left.weight if left.weight is not None else right.weight

    def blocks(config: Config) -> tuple[int, int]:
        """Those of an expert, and how many a program makes."""
        found = triton.cdiv(m, config.rows) * triton.cdiv(n, config.keys)
        return found, max(1, min(_BLOCKS, experts * found // (_PROGRAMS * processors)))

    def arguments(config: Config) -> dict[str, Any]:
        assert isinstance(config, Tile)
        return {
            "left_ptr": left.x, "left_steps": left.x.stride()[:1], "right_ptr": right.x,
            "right_steps": right.x.stride()[:1], "order_ptr": plan.order, "firsts_ptr": plan.firsts, "p_ptr": weight,
            "out_ptr": out.table if isinstance(out, Addresses) else out, "ADDRESSED": isinstance(out, Addresses),
            "CHOICES": plan.choices, "LEFT": m, "RIGHT": n, "LEFT_GATHERED": left.by_token,
            "RIGHT_GATHERED": right.by_token, "LEFT_SCALED": left.weight is not None,
            "RIGHT_SCALED": right.weight is not None, "BLOCKS": blocks(config)[1], "BK": config.depth,
        }  # fmt: skip

    launch(_outer_kernel, configs, lambda c: experts * triton.cdiv(*blocks(c)), arguments)


def sums(rows: Rows, plan: Plan, out: Tensor) -> None:
    """Fills out (E, n), rows of unit stride, with the sums of each expert's rows, weighted but not rounded."""
    experts, width = out.shape
    arguments = {
        "rows_ptr": rows.x, "rows_steps": rows.x.stride()[:1], "order_ptr": plan.order, "firsts_ptr": plan.firsts,
        "p_ptr": rows.weight, "out_ptr": out, "out_steps": out.stride()[:1], "CHOICES": plan.choices, "WIDTH": width,
        "GATHERED": rows.by_token, "WEIGHTED": rows.weight is not None,
    }  # fmt: skip
    launch(_sums_kernel, [Config(64, 64, 4, 1)], lambda c: experts * triton.cdiv(width, c.keys), lambda _: arguments)


def weight_gradient(share: Tensor, plan: Plan, grad: Tensor, b2: Tensor | None, dp: Tensor) -> None:
    """Fills dp (T * K), contiguous: each choice's shares (T * K, blocks) added up, and du . b2 where b2 is weighted."""
    pairs, count = share.shape
    arguments = {
        "share_ptr": share, "keys_ptr": plan.keys, "grad_ptr": grad, "grad_steps": grad.stride()[:1], "b2_ptr": b2,
        "b2_steps": (0, 0) if b2 is None else b2.stride(), "dp_ptr": dp, "pairs": pairs, "CHOICES": plan.choices,
        "EXPERTS": plan.experts, "COUNT": count, "PADDED": triton.next_power_of_2(count), "WIDTH": grad.shape[1],
        "BIAS": b2 is not None,
    }  # fmt: skip
    launch(_share_kernel, [Config(32, 128, 4, 1)], lambda c: triton.cdiv(pairs, c.rows), lambda _: arguments)
