"""Published block selections of a whole causal sequence at once, as page tables that our attention kernels read.

Only the selection then differs from ours: tiles of 128 queries read the first block of 128 keys and their own densely,
and of the blocks between them what the selection chose. `sparse_baselines.py` has the same for single sampled tiles,
with all thresholds of a sweep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sparse_baselines import BLOCK, importance_of, segment_order
from torch import Tensor

from s2o_inductor.sparse_policy import Geometry

_SEGMENT = 2 * BLOCK  # positions that PBS-Attn sorts
_RUN = 16  # keys of a run where blocks stay whole: no more than the kernels multiply at a time
_STRIDE = 8  # of XAttention's patches
_PATCHES = 1 << 28  # most of XAttention's scores that are held at once


@dataclass(frozen=True)
class Table:
    """Keys that the tiles of H heads read besides the dense part.

    Attributes:
        places: int32 (H, tiles, P), runs of keys as their first position over `run`.
        listed: int32 (H, tiles), how many of the places count.
        run: keys of a run.
    """

    places: Tensor
    listed: Tensor
    run: int

    @property
    def geometry(self) -> Geometry:
        """Sizes under which the kernels read exactly the first and the own block of a tile densely, without a tail."""
        return Geometry(tile=BLOCK, sink=BLOCK, block=BLOCK, run=self.run, clusters=0)


# ---------------------------------------------------------------- shares of blocks
# Each takes queries (H, S, D), scaled, and keys (H, S, D), and gives (H, T, T): what block b is worth to tile t, as
# shares over the blocks up to t, zero after it.


def _means(x: Tensor) -> Tensor:
    return x.unflatten(1, (-1, BLOCK)).mean(dim=2)


def _shares(scores: Tensor, edges: bool = True) -> Tensor:
    """Softmax over the blocks up to each tile; without `edges` over those between the first and the own alone."""
    tiles = scores.shape[1]
    counts = torch.ones(tiles, tiles, dtype=torch.bool, device=scores.device).tril(0 if edges else -1)
    if not edges:
        counts[:, 0] = False
    return scores.masked_fill(~counts, -math.inf).softmax(dim=2).nan_to_num(0.0)


def block_mean(q: Tensor, k: Tensor) -> Tensor:
    """Mean query against mean keys."""
    return _shares(_means(q) @ _means(k).transpose(1, 2))


def _sorted(tiles: int, device: torch.device) -> Tensor:
    """bool (T, T): of tile t, block b's segment lies in the prefix as a whole, so that PBS-Attn sorts it."""
    tile = torch.arange(tiles, device=device)[:, None]
    block = torch.arange(tiles, device=device)
    per = _SEGMENT // BLOCK
    return (block >= per) & (block // per < tile // per)


def pbs(q: Tensor, k: Tensor, order: Tensor, edges: bool = True) -> Tensor:
    """`block_mean` of keys in `order` (H, S) where it is sorted, and of the keys as they stand where it is not."""
    query, at = _means(q), order[..., None].expand(-1, -1, k.shape[2])
    plain, moved = (query @ _means(x).transpose(1, 2) for x in (k, k.gather(1, at)))
    return _shares(torch.where(_sorted(query.shape[1], k.device), moved, plain), edges)


def xattention(q: Tensor, k: Tensor) -> Tensor:
    """Sums over antidiagonals of patches (arXiv 2503.16428), softmax over patches, summed over blocks."""
    patches, tiles = BLOCK // _STRIDE, q.shape[1] // BLOCK
    rows = q.unflatten(1, (-1, _STRIDE)).flatten(2)
    columns = k.unflatten(1, (-1, _STRIDE)).flip(2).flatten(2).transpose(1, 2)
    result = q.new_zeros(q.shape[0], tiles, tiles)
    size = max(1, _PATCHES // (q.shape[0] * patches * patches * tiles))
    block = torch.arange(tiles, device=q.device)
    for first in range(0, tiles, size):
        end = min(first + size, tiles)
        scores = rows[:, first * patches : end * patches] @ columns[:, :, : end * patches] / _STRIDE
        scores = scores.unflatten(2, (end, patches)).unflatten(1, (end - first, patches))
        later = block[:end] > block[first:end, None]
        scores = scores.masked_fill(later[:, None, :, None], -math.inf).flatten(3).softmax(dim=3)
        result[:, first:end, :end] = scores.mean(dim=2).unflatten(2, (end, patches)).sum(dim=3)
    return result


def flash_prefill(q: Tensor, k: Tensor) -> Tensor:
    """Each row's softmax over mean keys, mean over the rows of a tile."""
    scores = q.unflatten(1, (-1, BLOCK)) @ _means(k)[:, None].transpose(2, 3)
    tiles = scores.shape[1]
    later = torch.ones(tiles, tiles, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later[:, None], -math.inf).softmax(dim=3).mean(dim=2)


# ---------------------------------------------------------------- choices


def _top_p(shares: Tensor, knob: float) -> Tensor:
    """The fewest blocks whose shares reach `knob`, with the one that reaches it."""
    ordered, rank = shares.sort(dim=2, descending=True, stable=True)
    return torch.empty_like(shares).scatter_(2, rank, ordered.cumsum(dim=2) - ordered) < knob


def _near_best(shares: Tensor, knob: float) -> Tensor:
    """Blocks of at least `knob` times the best one's share."""
    return shares >= knob * shares.amax(dim=2, keepdim=True)


_CHOICES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, float], Tensor]]] = {
    "XAttention": (xattention, _top_p),
    "block mean": (block_mean, _top_p),
    "FlashPrefill": (flash_prefill, _near_best),
}
_PERMUTED = {"PBS-Attn": True, "PBS-Attn, shares of the prefix alone": False}  # and whether edges take part
SELECTIONS = (*_PERMUTED, *_CHOICES)


def select(name: str, q: Tensor, k: Tensor, knob: float) -> Table:
    """What a selection reads at one threshold.

    Args:
        name: one of `SELECTIONS`.
        q: (H, S, D), S a multiple of 128, any floating type, not scaled.
        k: (H, S, D): query heads that share a key/value head choose each for themselves.
        knob: the threshold.

    Raises:
        ValueError: S is not a multiple of 128.
    """
    if q.shape[1] % BLOCK:
        raise ValueError(f"block selections need a multiple of {BLOCK} tokens; got {q.shape[1]}")
    q, k = q.float() * q.shape[2] ** -0.5, k.float()
    if name in _PERMUTED:
        importance = torch.cat([importance_of(a[None], b) for a, b in zip(q[:, -BLOCK:], k, strict=True)])
        order = segment_order(importance, 0, _SEGMENT)
        return _by_keys(_between(_top_p(pbs(q, k, order, _PERMUTED[name]), knob)), order)
    shares, choose = _CHOICES[name]
    return _by_blocks(_between(choose(shares(q, k), knob)))


def _between(chosen: Tensor) -> Tensor:
    """Without the first and the own block of each tile, which are read anyway, and what comes after."""
    chosen = chosen.tril(-1)
    chosen[..., 0] = False
    return chosen


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(H, T, P) the chosen blocks by position, then others; and (H, T) how many are chosen. Waits for the device."""
    count = chosen.sum(dim=2)
    return chosen.byte().argsort(dim=2, descending=True, stable=True)[..., : max(1, int(count.max()))], count


def _by_blocks(chosen: Tensor) -> Table:
    blocks, count = _listed(chosen)
    parts = BLOCK // _RUN
    runs = blocks[..., None] * parts + torch.arange(parts, device=blocks.device)
    return Table(runs.flatten(2).int(), (count * parts).int(), _RUN)


def _by_keys(chosen: Tensor, order: Tensor) -> Table:
    heads, tiles, _ = chosen.shape
    blocks, count = _listed(chosen)
    plain = torch.arange(order.shape[1], dtype=torch.int32, device=order.device).unflatten(0, (-1, BLOCK))
    moved = order.int().unflatten(1, (-1, BLOCK))
    head = torch.arange(heads, device=order.device)[:, None, None]
    whole = _sorted(tiles, order.device).expand(heads, -1, -1).gather(2, blocks)
    keys = torch.where(whole[..., None], moved[head, blocks], plain[blocks])
    return Table(keys.flatten(2), (count * BLOCK).int(), 1)


# ---------------------------------------------------------------- attention


def attend(q: Tensor, k: Tensor, v: Tensor, table: Table) -> tuple[Tensor, int]:
    """Causal attention that reads the dense part and what a table lists, and nothing for the rest.

    Args:
        q: (1, H, S, D).
        k: (1, H, S, D), a key/value head for each query head, as each has a choice of its own.
        v: (1, H, S, Dv).
        table: of the same heads.

    Returns:
        output (1, H, S, Dv), and computed pairs.
    """
    if q.device.type == "cuda":
        from s2o_inductor.kernels import cuda_sparse

        read = cuda_sparse.attend(q, k, v, table.places[None], table.listed[None], geometry=table.geometry)
        return read.output, int(read.pairs.sum())
    output, pairs = q.new_empty(*q.shape[:3], v.shape[3]), 0
    future = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1)
    scaled, of_run = q * q.shape[3] ** -0.5, torch.arange(table.run, device=q.device)
    for head in range(q.shape[1]):
        for tile in range(q.shape[2] // BLOCK):
            own = slice(tile * BLOCK, (tile + 1) * BLOCK)
            runs = table.places[head, tile, : int(table.listed[head, tile])]
            chosen = (runs[:, None] * table.run + of_run).flatten()
            read = torch.cat([torch.arange(BLOCK if tile else 0, device=q.device), chosen])
            rows, keys, values = scaled[0, head, own], k[0, head], v[0, head]
            near = (rows @ keys[own].T).masked_fill(future, -math.inf)
            weights = torch.cat([rows @ keys[read].T, near], dim=1).softmax(dim=1)
            output[0, head, own] = weights @ torch.cat([values[read], values[own]])
            pairs += BLOCK * read.numel() + BLOCK * (BLOCK + 1) // 2
    return output, pairs
