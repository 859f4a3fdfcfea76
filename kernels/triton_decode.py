"""Exact attention in Triton for few queries and many keys, as in decoding with a cache.

Such a call only has to read keys and values once, as fast as memory gives them. So all query heads of
a group share one tile (each key is loaded once, not once per head), and the keys of one head are
split over enough programs to fill the device; a second kernel joins the parts by their log-sum-exp
(the split-KV scheme of Flash-Decoding). Masks are those of `kernels/triton_attention.py`: the keys to
split are those the mask leaves, so a cache that is longer than its content costs nothing.
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
    heads_last,
    launch,
    tiles_of,
)
from s2o_inductor.kernels.operands import aligned, positive_scale
from s2o_inductor.kernels.primitives import (
    ALWAYS,
    LN_2,
    LOG2_E,
    LOWER,
    TILE_KEYS,
    TILE_QUERIES,
    TILES,
    UPPER,
    load_terms,
    tile_rows,
)
from s2o_inductor.kernels.triton_attention import attend

# Rows (queries times heads of a group) that one program takes.
MAX_ROWS = 64
# Keys below which another program costs more than it saves, and parts that one program joins.
_LEAST_KEYS = 256
_MOST_SPLITS = 128


@triton.jit
def _visited_keys(where, group_heads, tiles_ptr, tiles_heads, lower, upper, TERMS: tl.constexpr, BN: tl.constexpr):
    """Tiles [first, end) of BN keys outside which no query of the group's heads sees a key."""
    batch, _, queries, keys = where
    first = 0
    end = keys
    if TILES & TERMS:  # all queries lie in the first tile of queries
        entry = tiles_ptr + tile_rows(batch, group_heads, tiles_heads, tl.cdiv(queries, TILE_QUERIES)) * 4
        firsts = tl.load(entry)
        ends = tl.load(entry + 3)
        end = tl.minimum(tl.max(ends, 0) * TILE_KEYS, keys)
        first = tl.minimum(tl.min(tl.where(ends > firsts, firsts, 1 << 24), 0) * TILE_KEYS, end)
    else:
        if LOWER & TERMS:
            first = tl.minimum(tl.maximum(lower, 0), keys)
        if UPPER & TERMS:
            end = tl.maximum(tl.minimum(queries + upper, keys), 0)
    return first // BN, tl.cdiv(end, BN)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _split_kernel(
    q_ptr, k_tiles, v_tiles, part_ptr, part_lse_ptr, query_terms_ptr, key_terms_ptr, tiles_ptr, tiles_heads,
    dense, steps, lower, upper, heads, group, queries, keys, splits, scale,
    TERMS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Attention of all queries of one key/value head over one part of the keys.

    Writes part (B, Hkv, splits, Sq * group, Dv) and its base-2 log-sum-exp; row = query * group + member.
    """
    scale2 = tl.cast(scale, tl.float32) * LOG2_E
    split = tl.program_id(0) % splits
    kv_bh = tl.program_id(0) // splits
    batch = kv_bh // (heads // group)
    kv_head = kv_bh % (heads // group)
    rows = queries * group
    row = tl.arange(0, BM)
    q_index = row // group
    head = kv_head * group + row % group
    where = (batch, head[:, None], queries, keys)
    terms = load_terms(query_terms_ptr, batch, q_index, queries, TERMS)
    mask = (dense, steps, lower, upper, terms, key_terms_ptr)
    side_q = (0, q_index)
    first, end = _visited_keys(where, head, tiles_ptr, tiles_heads, lower, upper, TERMS, BN)
    each = tl.cdiv(tl.maximum(end - first, 0), splits)

    column = tl.arange(0, BLOCK_D)
    place = ((batch.to(tl.int64) * queries + q_index) * heads + head)[:, None] * D + column[None, :]
    q = tl.load(q_ptr + place, mask=(row < rows)[:, None] & (column < D)[None, :], other=0.0)
    acc = tl.zeros((BM, BLOCK_DV), tl.float32)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for tile in tl.range(first + split * each, tl.minimum(first + split * each + each, end)):
        acc, peak, total = attend(
            (acc, peak, total), q, k_tiles, v_tiles, tile, (0, 0), side_q, kv_head, where, mask, (0, 0, 0), scale2,
            TERMS, False, ALWAYS, BLOCK_D, BLOCK_DV, BM, BN,
        )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    at = (kv_bh.to(tl.int64) * splits + split) * rows + row
    column = tl.arange(0, BLOCK_DV)
    inside = (row < rows)[:, None] & (column < DV)[None, :]
    tl.store(part_ptr + at[:, None] * DV + column[None, :], acc / total[:, None], mask=inside)
    tl.store(part_lse_ptr + at, tl.where(empty, float("-inf"), peak + tl.log2(total)), mask=row < rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _join_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, heads, group, queries, splits, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out and lse of one row from its parts, of which there are at most BN."""
    rows = queries * group
    row = tl.program_id(0) % rows
    kv_bh = tl.program_id(0) // rows
    batch = kv_bh // (heads // group)
    head = kv_bh % (heads // group) * group + row % group
    query = row // group
    split = tl.arange(0, BN)
    column = tl.arange(0, BLOCK_DV)
    at = (kv_bh.to(tl.int64) * splits + split) * rows + row
    part_lse = tl.load(part_lse_ptr + at, mask=split < splits, other=float("-inf"))
    peak = tl.max(part_lse, 0)
    shares = tl.exp2(part_lse - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(shares, 0)
    inside = (split < splits)[:, None] & (column < DV)[None, :]
    parts = tl.load(part_ptr + at[:, None] * DV + column[None, :], mask=inside, other=0.0)
    out = tl.sum(parts * shares[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), (peak + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN_2)
    place = ((batch.to(tl.int64) * queries + query) * heads + head) * DV
    tl.store(out_ptr + place + column, out.to(out_ptr.dtype.element_ty), mask=column < DV)
    tl.store(lse_ptr + (batch.to(tl.int64) * heads + head) * queries + query, lse)


def _splits(k: Tensor, programs: int, keys: int) -> int:
    """Parts to split the keys into: two programs per multiprocessor in all."""
    processors = torch.cuda.get_device_properties(k.device).multi_processor_count if k.is_cuda else 4
    return max(1, min(triton.cdiv(2 * processors, programs), triton.cdiv(keys, _LEAST_KEYS), _MOST_SPLITS))


def forward(q: Tensor, k: Tensor, v: Tensor, mask: TileMask, scale: float) -> tuple[Tensor, Tensor]:
    """`kernels.triton_attention.forward` for Sq * Hq / Hkv <= `MAX_ROWS`, without dropout."""
    batch, heads, queries, width = q.shape
    kv_heads, keys, v_width = k.shape[1], k.shape[2], v.shape[3]
    group = heads // kv_heads
    out = heads_last(q, heads, queries, v_width)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    q, scale, _ = positive_scale(q, scale)
    q, k, v = q.transpose(1, 2).contiguous(), aligned(k), aligned(v)  # q as it lies in memory
    rows = queries * group
    splits = _splits(k, batch * kv_heads, keys)
    part = torch.empty((batch * kv_heads, splits, rows, v_width), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((batch * kv_heads, splits, rows), dtype=torch.float32, device=q.device)
    sizes = {"heads": heads, "group": group, "queries": queries, "splits": splits}
    shape = {"DV": v_width, "BLOCK_DV": block_width(v_width)}

    def arguments(config: Config) -> dict[str, Any]:
        return {
            "q_ptr": q, "k_tiles": tiles_of(k, config.keys), "v_tiles": tiles_of(v, config.keys), "part_ptr": part,
            "part_lse_ptr": part_lse, "keys": keys, "scale": scale, "D": width, "BLOCK_D": block_width(width),
            **sizes, **shape, **mask.arguments(queries, keys, mask.row_tiles),
        }  # fmt: skip

    block = max(16, triton.next_power_of_2(rows))
    configs = [Config(block, 64, 4, stages) for stages in (3, 2, 1)] + [Config(block, 32, 4, 1)]
    launch(_split_kernel, configs, lambda _: batch * kv_heads * splits, arguments)
    launch(
        _join_kernel, [Config(1, triton.next_power_of_2(splits), 4, 1)], lambda _: batch * kv_heads * rows,
        lambda _: {"part_ptr": part, "part_lse_ptr": part_lse, "out_ptr": out, "lse_ptr": lse, **sizes, **shape},
    )  # fmt: skip
    return out, lse
