"""The first half of routed experts in Triton: rows of z, by token, times W1; bias, activation, perhaps routing weight.

Programs take tiles of rows of one expert (see `kernels/triton_moe_plan.py`), so that each computes with the
weights of one expert alone. There are two ways to hide what surrounds a product: several programs on a
multiprocessor, each of one tile, whose rows are gathered while they are read; or one, which goes through many
tiles in one pipeline, for which rows are gathered before.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from s2o_inductor.kernels.launching import UNSPECIALIZED, Config, ceil_div, launch, power_of_2
from s2o_inductor.kernels.triton_moe_addresses import Matrices
from s2o_inductor.kernels.triton_moe_plan import Plan
from s2o_inductor.kernels.triton_moe_tiles import (
    ALTERNATING,
    HALVES,
    NO_WEIGHTS,
    PLAIN,
    SEPARATE,
    Tile,
    Weights,
    formula,
    gated_hidden,
    grid_of,
    halves,
    load_bias,
    load_halves,
    load_rows,
    load_weights,
    place_of,
    plain_hidden,
    rows_in_tiles,
    rows_like,
    scaled,
    weights_of,
)
from s2o_inductor.moe_spec import ExpertSpec


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _gather_kernel(
    z_ptr, z_steps, order_ptr, p_ptr, x_ptr, x_steps, pairs, CHOICES: tl.constexpr, WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM rows of x, in the order of the plan, by BN columns: those of z by token, times their weights if WEIGHTED."""
    blocks = tl.cdiv(WIDTH, BN)
    row = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    inside = row < pairs
    pair = tl.load(order_ptr + row, mask=inside, other=0).to(tl.int32)
    column = tl.program_id(0) % blocks * BN
    x = load_rows(z_ptr + (pair // CHOICES).to(tl.int64) * z_steps[0], column, inside, True, WIDTH, BN)
    if WEIGHTED:
        x = scaled(x, tl.load(p_ptr + pair).to(tl.float32))
    index = column + tl.arange(0, BN)
    place = x_ptr + row.to(tl.int64)[:, None] * x_steps[0] + index[None, :]
    tl.store(place, x, mask=inside[:, None] & (index < WIDTH)[None, :])


@triton.jit
def _first_tile(
    number, count, source, order_ptr, tiles_ptr, all_weights, biases, p_ptr, pre_ptr, h_ptr, h_step, numbers,
    CHOICES: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr, GATE_AT: tl.constexpr, UP_AT: tl.constexpr,
    LAYOUT: tl.constexpr, UP_LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    LIMITED: tl.constexpr, SCORE: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, HIDDEN: tl.constexpr,
    GATHERED: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Tile `number` of `_first_kernel`.

    `source` is (z_ptr, its step from row to row, x in tiles), `all_weights` is (w, steps, up, steps), and `biases` is
    (b1_ptr, steps).
    """
    tile, block, _ = place_of(number, tl.cdiv(INNER, BN), 1, count, GROUP)
    entry = tiles_ptr + 4 + tile * 4
    expert = tl.load(entry)
    first_row = tl.load(entry + 1)
    row = first_row + tl.arange(0, BM)
    inside = row < tl.load(entry + 2)
    # Rows beyond the expert's compute something that nobody keeps.
    pair = tl.load(order_ptr + row, mask=inside, other=0).to(tl.int32)
    rows = source[0] + (pair // CHOICES).to(tl.int64) * source[1]
    if SCORE != "output":
        weight = tl.load(p_ptr + pair).to(tl.float32)
    column = block * BN
    # Gate and up from one tensor are one product of twice as many columns.
    WIDE: tl.constexpr = BN if GATE == PLAIN or GATE == SEPARATE else 2 * BN  # noqa: SIM109 - for the compiler
    acc = tl.zeros((BM, WIDE), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    kind = source[0].dtype.element_ty
    main = weights_of(all_weights[0], all_weights[1], expert, LAYOUT, kind)
    if GATE == SEPARATE:
        other = weights_of(all_weights[2], all_weights[3], expert, UP_LAYOUT, kind)
    for depth in tl.range(0, WIDTH, BK):
        if GATHERED:
            x = source[2].load([first_row, depth])
        else:
            x = load_rows(rows, depth, inside, False, WIDTH, BK)
            if SCORE == "input":
                x = scaled(x, weight)
        if GATE == HALVES:
            w = load_halves(main, all_weights[1], expert, column, depth, LAYOUT, INNER, WIDTH, BN, BK)
        elif GATE == ALTERNATING:
            w = load_weights(main, all_weights[1], expert, 2 * column, depth, LAYOUT, 2 * INNER, WIDTH, WIDE, BK)
        else:
            w = load_weights(main, all_weights[1], expert, column, depth, LAYOUT, INNER, WIDTH, BN, BK)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if GATE == SEPARATE:
            w = load_weights(other, all_weights[3], expert, column, depth, UP_LAYOUT, INNER, WIDTH, BN, BK)
            up = tl.dot(x, w, up, input_precision="ieee")

    index = column + tl.arange(0, BN)
    keep = inside[:, None] & (index < INNER)[None, :]
    if GATE == ALTERNATING:
        wide = 2 * column + tl.arange(0, WIDE)
        if BIAS:
            acc += load_bias(biases[0], biases[1], expert, wide, 2 * INNER)[None, :]
        if KEEP:
            place = pre_ptr + row.to(tl.int64)[:, None] * (2 * INNER) + wide[None, :]
            among = inside[:, None] & (wide < 2 * INNER)[None, :]
            tl.store(place, acc.to(pre_ptr.dtype.element_ty), mask=among)
        gate, up = tl.split(acc.reshape(BM, BN, 2))
    else:
        gate = acc
        if GATE == HALVES:
            gate, up = halves(acc)
            if UP_AT == 0:
                gate, up = up, gate
        COLUMNS: tl.constexpr = INNER if GATE == PLAIN else 2 * INNER
        if BIAS:
            gate += load_bias(biases[0], biases[1], expert, GATE_AT + index, GATE_AT + INNER)[None, :]
            if GATE != PLAIN:
                up += load_bias(biases[0], biases[1], expert, UP_AT + index, UP_AT + INNER)[None, :]
        if KEEP:
            place = pre_ptr + row.to(tl.int64)[:, None] * COLUMNS + index[None, :]
            tl.store(place + GATE_AT, gate.to(pre_ptr.dtype.element_ty), mask=keep)
            if GATE != PLAIN:
                tl.store(place + UP_AT, up.to(pre_ptr.dtype.element_ty), mask=keep)
    if HIDDEN:
        if GATE == PLAIN:
            h = plain_hidden(gate, numbers, ACTIVATION, LIMITED)
        else:
            h = gated_hidden(gate, up, numbers, ACTIVATION, LIMITED)
        if SCORE == "hidden":
            h = h * weight[:, None]
        place = h_ptr + row.to(tl.int64)[:, None] * h_step + index[None, :]
        tl.store(place, h.to(h_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _first_kernel(
    z_ptr, z_steps, x_tiles, order_ptr, tiles_ptr, w, w_steps, up_w, up_steps, b1_ptr, b1_steps, p_ptr, pre_ptr, h_ptr,
    h_steps, alpha, limit, shift, CHOICES: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
    GATE_AT: tl.constexpr, UP_AT: tl.constexpr, LAYOUT: tl.constexpr, UP_LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, LIMITED: tl.constexpr, SCORE: tl.constexpr, BIAS: tl.constexpr,
    KEEP: tl.constexpr, HIDDEN: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM rows of an expert by BN hidden columns: of h if HIDDEN, of the first product in `pre_ptr` if KEEP.

    With SHARED, programs share all tiles, of rows gathered before; otherwise each finds one, or none.
    """
    count = tl.load(tiles_ptr)
    total = count * tl.cdiv(INNER, BN)
    source = (z_ptr, z_steps[0], x_tiles)
    all_weights = (w, w_steps, up_w, up_steps)
    biases = (b1_ptr, b1_steps)
    numbers = (tl.cast(alpha, tl.float32), tl.cast(limit, tl.float32), tl.cast(shift, tl.float32))
    if SHARED:
        # Flattened, a program's tiles are one loop, whose pipeline fetches across their borders.
        for number in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=True):
            _first_tile(
                number, count, source, order_ptr, tiles_ptr, all_weights, biases, p_ptr, pre_ptr, h_ptr, h_steps[0],
                numbers, CHOICES, WIDTH, INNER, GATE_AT, UP_AT, LAYOUT, UP_LAYOUT, ACTIVATION, GATE, LIMITED, SCORE,
                BIAS, KEEP, HIDDEN, True, GROUP, BK, BM, BN,
            )  # fmt: skip
    elif tl.program_id(0) < total:
        _first_tile(
            tl.program_id(0), count, source, order_ptr, tiles_ptr, all_weights, biases, p_ptr, pre_ptr, h_ptr,
            h_steps[0], numbers, CHOICES, WIDTH, INNER, GATE_AT, UP_AT, LAYOUT, UP_LAYOUT, ACTIVATION, GATE, LIMITED,
            SCORE, BIAS, KEEP, HIDDEN, False, GROUP, BK, BM, BN,
        )  # fmt: skip


# -------------------------------------------------------------------------------------------- host


def gather(z: Tensor, plan: Plan, weight: Tensor | None) -> Tensor:
    """Rows of z (T, l) in the order of the plan, (T * K, l); times weight (T * K) and then rounded, if given."""
    x = rows_like(z, plan.order.shape[0], z.shape[1])
    arguments = {
        "z_ptr": z, "z_steps": z.stride()[:1], "order_ptr": plan.order, "p_ptr": weight, "x_ptr": x,
        "x_steps": x.stride()[:1], "pairs": x.shape[0], "CHOICES": plan.choices, "WIDTH": x.shape[1],
        "WEIGHTED": weight is not None,
    }  # fmt: skip
    launch(
        _gather_kernel, [Config(16, min(512, power_of_2(x.shape[1])), 4, 1)],
        lambda c: ceil_div(x.shape[0], c.rows) * ceil_div(x.shape[1], c.keys), lambda _: arguments,
    )  # fmt: skip
    return x


def first(
    spec: ExpertSpec, w1: Sequence[Matrices], b1: Tensor | None, z: Tensor, plan: Plan, p: Tensor, pre: Tensor | None,
    h: Tensor | None, configs: Sequence[Tile],
) -> None:  # fmt: skip
    """Fills h (T * K, I), and the first product `pre` (T * K, halves * I), row by row of the plan, each where wanted.

    Args:
        spec: the formula of an expert.
        w1: (E, halves * I, l), or two of (E, I, l) with gate "separate", any strides; tensors or tables of addresses.
        b1: (E, halves * I).
        z: (T, l), rows of unit stride.
        plan: of the call.
        p: (T * K) or (T, K), contiguous.
        pre: contiguous, columns as those of w1, one tensor after the other.
        h: rows of unit stride.
        configs: ways to run the kernel, fastest first; with a gate they compute two columns for each hidden one.
    """
    inner = w1[0].shape[1] * len(w1) // spec.halves
    swapped = spec.gate == "half_swapped"

    def arguments(config: Config) -> dict[str, Any]:
        assert isinstance(config, Tile)
        columns = config.keys * 2 if spec.gate == "interleaved" else config.keys
        w = Weights.of(w1[0], columns, config.depth, halves=spec.gate in ("half", "half_swapped"))
        up = Weights.of(w1[1], columns, config.depth) if len(w1) == 2 else NO_WEIGHTS
        x_tiles = None
        if config.programs:
            x = gather(z, plan, p if spec.score == "input" else None)
            x_tiles = rows_in_tiles(x, config.rows, config.depth)
        return {
            "z_ptr": z, "z_steps": z.stride()[:1], "x_tiles": x_tiles, "SHARED": config.programs > 0,
            "order_ptr": plan.order, "tiles_ptr": plan.tiles(config.rows), "w": w.source, "w_steps": w.steps,
            "LAYOUT": w.layout, "up_w": up.source, "up_steps": up.steps, "UP_LAYOUT": up.layout, "b1_ptr": b1,
            "b1_steps": (0, 0) if b1 is None else b1.stride(), "p_ptr": p, "pre_ptr": pre, "h_ptr": h,
            "h_steps": (0,) if h is None else h.stride()[:1], "CHOICES": plan.choices, "WIDTH": z.shape[1],
            "INNER": inner, "GATE_AT": inner if swapped else 0, "UP_AT": 0 if swapped else inner,
            "SCORE": spec.score, "BIAS": b1 is not None, "KEEP": pre is not None, "HIDDEN": h is not None,
            "GROUP": config.group, "BK": config.depth, **formula(spec),
        }  # fmt: skip

    launch(_first_kernel, configs, grid_of(plan, inner), arguments)
