"""Exact attention in Triton, forward: any mask that `s2o_inductor.mask_spec` can name, without building it.

One program owns a tile of query rows and walks its key tiles in two loops: first those that are
wholly visible, which pay nothing for the mask, then the few at the borders, where every term is
evaluated. Which tiles those are comes from plan tensors (see `kernels/mask.py`) or, when the mask is
only a band ``lower <= k - q <= upper``, from arithmetic in the kernel.

The recurrence is the online softmax of FlashAttention (Dao et al., arXiv 2205.14135, algorithm 1)
with base-2 exponentials.
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
    launch,
    section_heads,
    tiles_of,
)
from s2o_inductor.kernels.operands import aligned, positive_scale
from s2o_inductor.kernels.primitives import (
    ALWAYS,
    BORDER,
    DENSE,
    LN_2,
    LOG2_E,
    LOWER,
    NEVER,
    UPPER,
    hide,
    kept,
    key_range,
    load_terms,
    load_tile,
    schedule,
    store_tile,
)


@triton.jit
def attend(
    state, q, k_tiles, v_tiles, tile, full, side_q, kv_head, where, mask, dropout, scale2, TERMS: tl.constexpr,
    DROPOUT: tl.constexpr, MASKING: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the state after key tile `tile`.

    `state` is (acc, peak, total): weighted values, greatest base-2 score and sum of weights, both
    relative to it. `scale2` is the factor of the scores times log2(e); tiles [full[0], full[1]) are
    wholly visible; see `hide` and `kept` for the rest. MASKING is NEVER, BORDER or ALWAYS.
    """
    acc, peak, total = state
    k_index = tile * BN + tl.arange(0, BN)
    side_k = (tile * BN, k_index)
    k = load_tile(k_tiles, where[0], kv_head, tile * BN, BN, BLOCK_D)
    scores = tl.dot(q, k.T, input_precision="ieee")
    if MASKING == ALWAYS:
        scores = hide(scores * scale2, side_q, side_k, where, mask, TERMS, True)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen nothing yet keeps the peak -inf; -inf - -inf would be NaN.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
    else:
        if MASKING == BORDER:  # noqa: SIM102 - one is known to the compiler, the other is not
            if (tile < full[0]) | (tile >= full[1]):
                scores = hide(scores, side_q, side_k, where, mask, TERMS, True)
        # The scale is positive (the launcher sees to it), so it may follow the maximum: one fused
        # multiply-add per score.
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale2)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores * scale2 - base[:, None])
    decay = tl.exp2(peak - base)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    if DROPOUT:
        weights = tl.where(kept(dropout, side_q[1], k_index, True), weights / (1.0 - dropout[1]), 0.0)
    v = load_tile(v_tiles, where[0], kv_head, tile * BN, BN, BLOCK_DV)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new_peak, total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    q_tiles, k_tiles, v_tiles, out_ptr, lse_ptr, query_terms_ptr, key_terms_ptr, tiles_ptr, tiles_heads, dense, steps,
    seed_ptr, lower, upper, heads, group, queries, keys, section, scale,
    dropout_p, TERMS: tl.constexpr, DROPOUT: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out, lse = attention(q, k, v) for one tile of BM query rows of one head."""
    scale2 = tl.cast(scale, tl.float32) * LOG2_E
    # Where late queries see more keys than early ones, the last tiles are the longest.
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
    acc = tl.zeros((BM, BLOCK_DV), tl.float32)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if DENSE & TERMS:
        # Tiles that read a mask tensor get a loop of their own, whose pipeline fetches it ahead. Other
        # masks are a branch in one loop for all tiles, whose pipeline never drains.
        for tile in tl.range(first_full, end_full):
            acc, peak, total = attend(
                (acc, peak, total), q, k_tiles, v_tiles, tile, full, side_q, head // group, where, mask, dropout,
                scale2, TERMS, DROPOUT, NEVER, BLOCK_D, BLOCK_DV, BM, BN,
            )  # fmt: skip
        before = first_full - first
        for masked in tl.range(0, before + end - end_full):
            tile = tl.where(masked < before, first, end_full - before) + masked
            acc, peak, total = attend(
                (acc, peak, total), q, k_tiles, v_tiles, tile, full, side_q, head // group, where, mask, dropout,
                scale2, TERMS, DROPOUT, ALWAYS, BLOCK_D, BLOCK_DV, BM, BN,
            )  # fmt: skip
    else:
        for tile in tl.range(first, end):
            acc, peak, total = attend(
                (acc, peak, total), q, k_tiles, v_tiles, tile, full, side_q, head // group, where, mask, dropout,
                scale2, TERMS, DROPOUT, BORDER, BLOCK_D, BLOCK_DV, BM, BN,
            )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN_2)
    store_tile(out_ptr, batch, head, heads, q_index, queries, acc / total[:, None], DV, BLOCK_DV)
    tl.store(lse_ptr + bh.to(tl.int64) * queries + q_index, lse, mask=q_index < queries)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TileMask,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    configs: list[Config] | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T, masked) v and the log-sum-exp of the scores.

    Args:
        q: (B, Hq, Sq, D), float16, bfloat16 or float32, any strides, like k and v.
        k: (B, Hkv, Sk, D).
        v: (B, Hkv, Sk, Dv).
        mask: which positions are visible.
        scale: factor of the scores.
        dropout_p: probability of zeroing a weight.
        seed: int64 (1,), with dropout_p > 0.
        configs: instead of `forward_configs`.

    Returns:
        out (B, Hq, Sq, Dv) in memory of (B, Sq, Hq, Dv), zero in rows that see no key, and lse
        (B, Hq, Sq), float32, natural logarithm, -inf there.
    """
    batch, heads, queries, width = q.shape
    keys, v_width, group = k.shape[2], v.shape[3], heads // k.shape[1]
    out = heads_last(q, heads, queries, v_width)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    q, scale, _ = positive_scale(q, scale)
    q, k, v = aligned(q), aligned(k), aligned(v)
    section = section_heads(keys, (width + v_width) * k.element_size()) * group

    def arguments(config: Config) -> dict[str, Any]:
        return {
            "q_tiles": tiles_of(q, config.rows),
            "k_tiles": tiles_of(k, config.keys),
            "v_tiles": tiles_of(v, config.keys),
            "out_ptr": out,
            "lse_ptr": lse,
            "seed_ptr": seed,
            "heads": heads,
            "group": group,
            "queries": queries,
            "keys": keys,
            "section": section,
            "scale": scale,
            "dropout_p": dropout_p,
            "DROPOUT": dropout_p > 0.0,
            "DV": v_width,
            "BLOCK_D": block_width(width),
            "BLOCK_DV": block_width(v_width),
            **mask.arguments(queries, keys, mask.row_tiles, (config.rows, config.keys)),
        }

    launch(
        _forward_kernel,
        configs or forward_configs(q.dtype, max(width, v_width), mask.dense is not None),
        lambda config: triton.cdiv(queries, config.rows) * batch * heads,
        arguments,
    )
    return out, lse
