"""Exact attention in Triton, backward: gradients of q, k and v without atomics, so bitwise repeatable.

Three kernels, after FlashAttention-2 (Dao, arXiv 2307.08691, algorithm 2): one pass over the output
for delta = rowsum(grad * out); dk and dv, one program per tile of keys that walks the queries of every
query head of its group; dq, one program per tile of queries. Both recompute the weights from lse.
Keys and values are never expanded to the query heads.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_inductor.kernels.launching import (
    UNSPECIALIZED,
    Config,
    TileMask,
    block_width,
    forward_configs,
    heads_last,
    key_value_configs,
    launch,
    query_configs,
    rows_of,
    section_heads,
    tiles_of,
)
from s2o_inductor.kernels.operands import aligned, positive_scale
from s2o_inductor.kernels.primitives import (
    ADDITIVE,
    ALWAYS,
    AT_MOST,
    BORDER,
    DENSE,
    EQUAL,
    LOG2_E,
    LOWER,
    NEVER,
    UPPER,
    base2_scores,
    hide,
    kept,
    key_range,
    load_row,
    load_terms,
    load_tile,
    query_range,
    schedule,
    store_tile,
)

# Rows of a program of the delta kernel; the rows of every other tile divide it.
_DELTA_ROWS = tl.constexpr(128)
# Base-2 log-sum-exp from which on float32 leaves too few bits to the sum of weights.
_HUGE_SCORE = 1024.0


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _delta_kernel(
    out_tiles, grad_tiles, lse_ptr, delta_ptr, peak_ptr, heads, queries, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(grad * out) and peak = lse in base 2, both (B * Hq, Sq rounded up to BM).

    0 and inf where there is no row or the row sees no key: its weights exp2(score - peak) are then 0.
    """
    tiles = tl.cdiv(queries, BM)
    tile, bh = schedule(tiles, 1, False)
    index = tile * BM + tl.arange(0, BM)
    out = load_tile(out_tiles, bh // heads, bh % heads, tile * BM, BM, BLOCK_DV).to(tl.float32)
    grad = load_tile(grad_tiles, bh // heads, bh % heads, tile * BM, BM, BLOCK_DV).to(tl.float32)
    lse = tl.load(lse_ptr + bh.to(tl.int64) * queries + index, mask=index < queries, other=float("-inf"))
    empty = lse == float("-inf")
    place = bh.to(tl.int64) * tiles * BM + index
    tl.store(delta_ptr + place, tl.where(empty, 0.0, tl.sum(out * grad, 1)))
    tl.store(peak_ptr + place, tl.where(empty, float("inf"), lse * LOG2_E))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _absorbed_kernel(
    q_tiles, k_tiles, peak_ptr, norm_ptr, query_terms_ptr, key_terms_ptr, tiles_ptr, tiles_heads, dense, steps, lower,
    upper, heads, group, queries, keys, section, scale, limit, TERMS: tl.constexpr, BLOCK_D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Replaces `peak`, where it is the lse of huge scores, by the greatest score, and `norm` by 1 / sum of weights.

    An additive mask may hold the least float32 in all of a row. An lse of that size has lost the sum
    that it should carry, so the row is summed again; other tiles of rows return at once.
    """
    scale2 = tl.cast(scale, tl.float32) * LOG2_E
    row_tile, bh = schedule(tl.cdiv(queries, BM), section, False)
    batch = bh // heads
    head = bh % heads
    row = row_tile * BM
    q_index = row + tl.arange(0, BM)
    place = bh.to(tl.int64) * tl.cdiv(queries, _DELTA_ROWS) * _DELTA_ROWS + q_index
    old = tl.load(peak_ptr + place)
    huge = (tl.abs(old) > limit) & (old != float("inf"))
    if tl.max(huge.to(tl.int32), 0) > 0:
        where = (batch, head, queries, keys)
        terms = load_terms(query_terms_ptr, batch, q_index, queries, TERMS)
        mask = (dense, steps, lower, upper, terms, key_terms_ptr)
        side_q = (row, q_index)
        first, _, _, end = key_range(row, where, tiles_ptr, tiles_heads, lower, upper, TERMS, BM, BN)
        q = load_tile(q_tiles, batch, head, row, BM, BLOCK_D)
        peak = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        for tile in tl.range(first, end):
            k_index = tile * BN + tl.arange(0, BN)
            k = load_tile(k_tiles, batch, head // group, tile * BN, BN, BLOCK_D)
            scores = tl.dot(q, k.T, input_precision="ieee") * scale2
            side_k = (tile * BN, k_index)
            scores = hide(scores, side_q, side_k, where, mask, TERMS, True)
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
            peak = new_peak
        tl.store(peak_ptr + place, tl.where(huge, peak, old))
        tl.store(norm_ptr + place, tl.where(huge, 1.0 / total, 1.0))


@triton.jit
def _key_step(
    dk, dv, k, v, q_tiles, grad_tiles, row_stats, tile, full, side_k, where, mask, dropout, scale2,
    TERMS: tl.constexpr, DROPOUT: tl.constexpr, MASKING: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """(dk, dv) with the share of query tile `tile`; scores lie (keys, queries).

    `row_stats` are `peak`, `delta` and `norm` of the rows, each (B * Hq, Sq); for the rest see
    `kernels.triton_attention.attend`.
    """
    batch, head, _, _ = where
    bh = dropout[2]
    q_index = tile * BM + tl.arange(0, BM)
    side_q = (tile * BM, q_index)
    q = load_tile(q_tiles, batch, head, tile * BM, BM, BLOCK_D)
    scores = tl.dot(k, q.T, input_precision="ieee")
    scores = base2_scores(scores, scale2, tile, full, side_q, side_k, where, mask, TERMS, MASKING, False)
    weights = tl.exp2(scores - load_row(row_stats[0], bh, tile * BM, BM)[None, :])
    if ADDITIVE & TERMS:
        weights *= load_row(row_stats[2], bh, tile * BM, BM)[None, :]
    grad = load_tile(grad_tiles, batch, head, tile * BM, BM, BLOCK_DV)
    d_weights = tl.dot(v, grad.T, input_precision="ieee")
    dropped = weights
    if DROPOUT:
        survivors = tl.where(kept(dropout, q_index, side_k[1], False), 1.0 / (1.0 - dropout[1]), 0.0)
        dropped = weights * survivors
        d_weights *= survivors
    d_scores = weights * (d_weights - load_row(row_stats[1], bh, tile * BM, BM)[None, :])
    # Both left operands are ready before either product starts: a register written while one runs
    # would make the compiler run all of them one after the other.
    dropped = dropped.to(grad.dtype)
    d_scores = d_scores.to(q.dtype)
    dv = tl.dot(dropped, grad, dv, input_precision="ieee")
    dk = tl.dot(d_scores, q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _key_value_kernel(
    q_tiles, k_tiles, v_tiles, grad_tiles, peak_rows, delta_rows, norm_rows, dk_ptr, dv_ptr,
    query_terms_ptr, key_terms_ptr, tiles_ptr, tiles_heads, dense, steps, seed_ptr, lower, upper, heads,
    group, queries, keys, section, scale, dropout_p, TERMS: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of BN keys of one key/value head."""
    scale = tl.cast(scale, tl.float32)
    scale2 = scale * LOG2_E
    # Where early keys are seen by more queries than late ones, the first tiles are the longest.
    key_tile, kv_bh = schedule(tl.cdiv(keys, BN), section, ((LOWER | UPPER) & TERMS) == LOWER)
    batch = kv_bh // (heads // group)
    kv_head = kv_bh % (heads // group)
    column = key_tile * BN
    k_index = column + tl.arange(0, BN)
    terms = load_terms(key_terms_ptr, batch, k_index, keys, TERMS)
    mask = (dense, steps, lower, upper, terms, query_terms_ptr)
    row_stats = (peak_rows, delta_rows, norm_rows)
    side_k = (column, k_index)
    k = load_tile(k_tiles, batch, kv_head, column, BN, BLOCK_D)
    v = load_tile(v_tiles, batch, kv_head, column, BN, BLOCK_DV)
    dk = tl.zeros((BN, BLOCK_D), tl.float32)
    dv = tl.zeros((BN, BLOCK_DV), tl.float32)
    for member in tl.range(0, group):
        head = kv_head * group + member
        where = (batch, head, queries, keys)
        dropout = (seed_ptr, tl.cast(dropout_p, tl.float32), batch * heads + head)
        first, first_full, end_full, end = query_range(
            column, where, tiles_ptr, tiles_heads, lower, upper, TERMS, BM, BN
        )
        full = (first_full, end_full)
        if DENSE & TERMS:  # in two loops, see the forward kernel
            for tile in tl.range(first_full, end_full):
                dk, dv = _key_step(
                    dk, dv, k, v, q_tiles, grad_tiles, row_stats, tile, full, side_k, where, mask, dropout,
                    scale2, TERMS, DROPOUT, NEVER, BLOCK_D, BLOCK_DV, BM, BN,
                )  # fmt: skip
            before = first_full - first
            for masked in tl.range(0, before + end - end_full):
                tile = tl.where(masked < before, first, end_full - before) + masked
                dk, dv = _key_step(
                    dk, dv, k, v, q_tiles, grad_tiles, row_stats, tile, full, side_k, where, mask, dropout,
                    scale2, TERMS, DROPOUT, ALWAYS, BLOCK_D, BLOCK_DV, BM, BN,
                )  # fmt: skip
        else:
            for tile in tl.range(first, end):
                dk, dv = _key_step(
                    dk, dv, k, v, q_tiles, grad_tiles, row_stats, tile, full, side_k, where, mask, dropout,
                    scale2, TERMS, DROPOUT, BORDER, BLOCK_D, BLOCK_DV, BM, BN,
                )  # fmt: skip
    store_tile(dk_ptr, batch, kv_head, heads // group, k_index, keys, dk * scale, D, BLOCK_D)
    store_tile(dv_ptr, batch, kv_head, heads // group, k_index, keys, dv, DV, BLOCK_DV)


@triton.jit
def _query_step(
    dq, q, grad, peak, delta, norm, k_tiles, v_tiles, tile, full, side_q, kv_head, where, mask, dropout, scale2,
    TERMS: tl.constexpr, DROPOUT: tl.constexpr, MASKING: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq with the share of key tile `tile`; arguments as in `kernels.triton_attention.attend`."""
    k_index = tile * BN + tl.arange(0, BN)
    side_k = (tile * BN, k_index)
    k = load_tile(k_tiles, where[0], kv_head, tile * BN, BN, BLOCK_D)
    scores = tl.dot(q, k.T, input_precision="ieee")
    scores = base2_scores(scores, scale2, tile, full, side_q, side_k, where, mask, TERMS, MASKING, True)
    weights = tl.exp2(scores - peak[:, None])
    if ADDITIVE & TERMS:
        weights *= norm[:, None]
    v = load_tile(v_tiles, where[0], kv_head, tile * BN, BN, BLOCK_DV)
    d_weights = tl.dot(grad, v.T, input_precision="ieee")
    if DROPOUT:
        d_weights *= tl.where(kept(dropout, side_q[1], k_index, True), 1.0 / (1.0 - dropout[1]), 0.0)
    d_scores = weights * (d_weights - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _query_kernel(
    q_tiles, k_tiles, v_tiles, grad_tiles, peak_rows, delta_rows, norm_rows, dq_ptr, query_terms_ptr,
    key_terms_ptr, tiles_ptr, tiles_heads, dense, steps, seed_ptr, lower, upper, heads, group, queries,
    keys, section, scale, dropout_p, TERMS: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq of one tile of BM query rows of one head."""
    scale = tl.cast(scale, tl.float32)
    scale2 = scale * LOG2_E
    row_tile, bh = schedule(tl.cdiv(queries, BM), section, ((LOWER | UPPER) & TERMS) != LOWER)
    batch = bh // heads
    head = bh % heads
    row = row_tile * BM
    q_index = row + tl.arange(0, BM)
    where = (batch, head, queries, keys)
    terms = load_terms(query_terms_ptr, batch, q_index, queries, TERMS)
    mask = (dense, steps, lower, upper, terms, key_terms_ptr)
    dropout = (seed_ptr, tl.cast(dropout_p, tl.float32), bh)
    first, first_full, end_full, end = key_range(row, where, tiles_ptr, tiles_heads, lower, upper, TERMS, BM, BN)
    full = (first_full, end_full)
    side_q = (row, q_index)
    q = load_tile(q_tiles, batch, head, row, BM, BLOCK_D)
    grad = load_tile(grad_tiles, batch, head, row, BM, BLOCK_DV)
    peak = load_row(peak_rows, bh, row, BM)
    delta = load_row(delta_rows, bh, row, BM)
    norm = load_row(norm_rows, bh, row, BM) if ADDITIVE & TERMS else peak
    dq = tl.zeros((BM, BLOCK_D), tl.float32)
    # Two loops wherever the mask loads: with loads in a branch of the one loop, the compiler gives up
    # keeping the product into dq in flight, and runs all products one after the other.
    if (DENSE | EQUAL | AT_MOST) & TERMS:
        for tile in tl.range(first_full, end_full):
            dq = _query_step(
                dq, q, grad, peak, delta, norm, k_tiles, v_tiles, tile, full, side_q, head // group, where, mask,
                dropout, scale2, TERMS, DROPOUT, NEVER, BLOCK_D, BLOCK_DV, BM, BN,
            )  # fmt: skip
        before = first_full - first
        for masked in tl.range(0, before + end - end_full):
            tile = tl.where(masked < before, first, end_full - before) + masked
            dq = _query_step(
                dq, q, grad, peak, delta, norm, k_tiles, v_tiles, tile, full, side_q, head // group, where, mask,
                dropout, scale2, TERMS, DROPOUT, ALWAYS, BLOCK_D, BLOCK_DV, BM, BN,
            )  # fmt: skip
    else:
        for tile in tl.range(first, end):
            dq = _query_step(
                dq, q, grad, peak, delta, norm, k_tiles, v_tiles, tile, full, side_q, head // group, where, mask,
                dropout, scale2, TERMS, DROPOUT, BORDER, BLOCK_D, BLOCK_DV, BM, BN,
            )  # fmt: skip
    store_tile(dq_ptr, batch, head, heads, q_index, queries, dq * scale, D, BLOCK_D)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: TileMask,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    key_value: list[Config] | None = None,
    query: list[Config] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `kernels.triton_attention.forward`.

    Args:
        grad: (B, Hq, Sq, Dv), gradient of the output.
        q: (B, Hq, Sq, D), as in the forward, like the following.
        k: (B, Hkv, Sk, D).
        v: (B, Hkv, Sk, Dv).
        out: (B, Hq, Sq, Dv); with `lse` it may have been rescaled by a further term of the softmax.
        lse: (B, Hq, Sq), float32, natural logarithm; a row at -inf gets and gives no gradient.
        mask: which positions are visible.
        scale: factor of the scores.
        dropout_p: probability of zeroing a weight.
        seed: int64 (1,), with dropout_p > 0.
        key_value: instead of `key_value_configs`.
        query: instead of `query_configs`.

    Returns:
        Gradients of q, k and v, each in memory of (B, S, H, D).
    """
    batch, heads, queries, width = q.shape
    kv_heads, keys, v_width = k.shape[1], k.shape[2], v.shape[3]
    group = heads // kv_heads
    dq = heads_last(q, heads, queries, width)
    dk = heads_last(k, kv_heads, keys, width)
    dv = heads_last(v, kv_heads, keys, v_width)
    if 0 in (batch, heads, queries, keys, width, v_width):
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, scale, sign = positive_scale(q, scale)
    grad, q, k, v, out = (aligned(x) for x in (grad, q, k, v, out))
    # One value per row of whole tiles: the kernels fetch them like any tile.
    padded = triton.cdiv(queries, _DELTA_ROWS.value) * _DELTA_ROWS.value
    delta, peak = torch.empty((2, batch * heads, padded), dtype=torch.float32, device=q.device)
    norm = torch.ones_like(peak) if mask.is_additive else peak
    sizes = {"heads": heads, "queries": queries}
    common = {
        **sizes, "group": group, "keys": keys, "scale": scale,
        "BLOCK_D": block_width(width),
    }  # fmt: skip
    row_bytes = (width + v_width) * k.element_size()

    def rows(config: Config) -> int:
        return triton.cdiv(queries, config.rows) * batch * heads

    def by_row(config: Config) -> dict[str, Any]:
        rest = mask.arguments(queries, keys, mask.row_tiles, (config.rows, config.keys))
        return {"section": section_heads(keys, row_bytes) * group, **rest}

    def operands(config: Config) -> dict[str, Any]:
        return {
            "q_tiles": tiles_of(q, config.rows), "k_tiles": tiles_of(k, config.keys),
            "v_tiles": tiles_of(v, config.keys), "grad_tiles": tiles_of(grad, config.rows),
            "peak_rows": rows_of(peak, config.rows), "delta_rows": rows_of(delta, config.rows),
            "norm_rows": rows_of(norm, config.rows), "seed_ptr": seed, "dropout_p": dropout_p,
            "DROPOUT": dropout_p > 0.0, "D": width, "BLOCK_DV": block_width(v_width), **common,
        }  # fmt: skip

    launch(
        _delta_kernel, [Config(_DELTA_ROWS.value, 0, 8, 1)], rows,
        lambda config: {
            "out_tiles": tiles_of(out, config.rows), "grad_tiles": tiles_of(grad, config.rows),
            "lse_ptr": lse.contiguous(), "delta_ptr": delta, "peak_ptr": peak, "BLOCK_DV": block_width(v_width),
            **sizes,
        },
    )  # fmt: skip
    if mask.is_additive:
        launch(
            _absorbed_kernel, forward_configs(q.dtype, max(width, v_width), True), rows,
            lambda config: {
                "q_tiles": tiles_of(q, config.rows), "k_tiles": tiles_of(k, config.keys), "peak_ptr": peak,
                "norm_ptr": norm, "limit": _HUGE_SCORE, **common, **by_row(config),
            },
        )  # fmt: skip
    launch(
        _key_value_kernel, key_value or key_value_configs(q.dtype, max(width, v_width)),
        lambda config: triton.cdiv(keys, config.keys) * batch * kv_heads,
        lambda config: {
            "dk_ptr": dk, "dv_ptr": dv, "DV": v_width, "section": section_heads(queries, row_bytes * group),
            **operands(config), **mask.arguments(queries, keys, mask.key_tiles, (config.rows, config.keys)),
        },
    )  # fmt: skip
    launch(
        _query_kernel,
        query or query_configs(q.dtype, max(width, v_width)),
        rows,
        lambda config: {"dq_ptr": dq, **operands(config), **by_row(config)},
    )
    return dq if sign == 1.0 else dq.mul_(sign), dk, dv
