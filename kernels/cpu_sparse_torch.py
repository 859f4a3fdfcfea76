"""S2O sparse attention on CPU in torch: what `s2o_inductor.kernels.cpu_sparse` runs without a C++ compiler.

Tile by tile with an online softmax; all query heads of a group that have not stopped share a gathered bundle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from s2o_inductor.kernels.documents import Documents
from s2o_inductor.kernels.reference_sparse import Sparse, representatives, run_order, run_scores, tiles_of
from s2o_inductor.kernels.stop_rule import expected_share
from s2o_inductor.kernels.tail_groups import Groups, groups_within, tail_groups, tail_logits
from s2o_inductor.sparse_policy import Geometry

_HIDDEN = float("-inf")


class _Softmax:
    """An online softmax over keys, for the rows of a group of heads, (G, R).

    Attributes:
        q: (G, R, D), scaled.
        peak, mass: (G, R), largest score so far and sum of exp(score - peak).
        added: (G, R), the part of `mass` that came since it was last set to 0.
        output: (G, R, Dv), sum of exp(score - peak) times value.
    """

    def __init__(self, q: Tensor, value_width: int) -> None:
        self.q = q
        self.peak = q.new_full(q.shape[:2], _HIDDEN)
        self.mass, self.added = q.new_zeros(q.shape[:2]), q.new_zeros(q.shape[:2])
        self.output = q.new_zeros(*q.shape[:2], value_width)

    def add(self, heads: Tensor, k: Tensor, v: Tensor, sees: Tensor | None = None) -> None:
        """Keys k (N, D) with values v (N, Dv), for the heads with these numbers.

        Args:
            heads: int64 (A,).
            k: (N, D).
            v: (N, Dv).
            sees: bool (R, N), or None where every row sees every key.
        """
        self.add_scores(heads, self.q[heads] @ k.T, v, sees)

    def add_scores(self, heads: Tensor, scores: Tensor, v: Tensor, sees: Tensor | None = None) -> None:
        """The same for keys whose scores (A, R, N) are known."""
        broken = None
        if sees is not None:
            scores.masked_fill_(~sees, _HIDDEN)
            broken = (~v.isfinite().all(dim=1)).nonzero().flatten()
        peak = scores.amax(dim=2).maximum(self.peak[heads])
        base = peak.masked_fill(peak == _HIDDEN, 0.0)
        shrink = (self.peak[heads] - base).exp()
        weights = (scores - base[..., None]).exp()
        sums = weights.sum(dim=2)
        if sees is None or broken is None or not broken.numel():
            output = weights @ v
        else:  # those who may not see a value weigh it with 0, and 0 times NaN is NaN
            output = weights @ v.index_fill(0, broken, 0.0)
            output += torch.where(sees[:, broken, None], weights[:, :, broken, None] * v[broken], 0.0).sum(dim=2)
        self.output[heads] = self.output[heads] * shrink[..., None] + output
        self.mass[heads] = self.mass[heads] * shrink + sums
        self.added[heads] = self.added[heads] * shrink + sums
        self.peak[heads] = peak


def run(
    result: Sparse, q: Tensor, k: Tensor, v: Tensor, scale: float, budgets: Sequence[float], causal: bool,
    window: int | None, keys: Tensor | None, documents: Documents | None, max_density: float, full: float,
    geometry: Geometry,
) -> None:  # fmt: skip
    """Fills `result`, whose pairs and visible are per tile, (B, Hq, tiles).

    The arguments are those of `cpu_sparse.forward` but for q, k and v, which are float32 or float64, k and v with
    zeros at hidden keys, for the budgets, one for each query head, and for the documents.
    """
    groups = None
    if geometry.clusters and 0 not in (*q.shape, *k.shape):
        groups = tail_groups(k, v, None if keys is None else ~keys[:, None], geometry)
    batch, heads, queries, _ = q.shape
    kv_heads, length = k.shape[1:3]
    group = heads // kv_heads
    limits = q.new_tensor(budgets).unflatten(0, (kv_heads, group))
    for b in range(batch):
        allowed = torch.ones(length, dtype=torch.bool) if keys is None else keys[b]
        for head in range(kv_heads):
            of_head = None
            if groups is not None:
                of_head = Groups(*(x[b, head] for x in (groups.member, groups.k, groups.variance, groups.v)))
            of_group = slice(head * group, (head + 1) * group)
            for t, (start, end) in enumerate(tiles_of(queries, length, geometry.tile)):
                rows = slice(start - (length - queries), end - (length - queries))
                first, low = (0, 0) if documents is None else documents.tiles[b, t].tolist()
                spans = _spans(start, end, length, causal, window, first, low, geometry)
                tile = _Softmax(q[b, of_group, rows] * scale, v.shape[3])
                every = torch.arange(group)
                dense = torch.cat([torch.arange(first, last) for first, last in (spans[0], spans[2])])
                dense = dense[allowed[dense]]
                sees = _visible(torch.arange(start, end), dense, causal, window)
                if documents is not None:
                    sees &= documents.queries[b, rows, None] == documents.keys[b, dense]
                    some = sees.any(dim=0)
                    dense, sees = dense[some], sees[:, some]
                if dense.numel():
                    tile.add(every, k[b, head, dense], v[b, head, dense], sees)
                prefix = slice(*spans[1])
                hidden = ~allowed[prefix]
                # Of runs that are listed: all of them, by position, where the order does not matter.
                order, budget = (
                    run_order(torch.zeros(hidden.numel() // geometry.run), geometry.run, hidden),
                    limits[head],
                )
                ranked = q[b, of_group, rows], k[b, head, prefix]
                share = 0.0
                if full < 1 and max_density == 1 and order.numel() > geometry.bundle:
                    lse = tile.peak + tile.mass.log()
                    share = expected_share(*ranked, lse, scale, budget.tolist(), prefix.start, hidden, geometry)
                in_prefix = groups_within(of_head, prefix, geometry)
                if share > full:
                    budget = torch.zeros_like(budget)
                else:
                    means = representatives(ranked[0], geometry).flatten(0, 1)
                    scores = run_scores(means, ranked[1], scale, geometry, in_prefix, hidden)
                    order = run_order(scores, geometry.run, hidden)
                shown = ~hidden[order]
                read, left = _bundles(
                    tile, ranked[1], v[b, head, prefix], order, shown, budget, max_density, geometry.bundle,
                    geometry.horizon,
                )  # fmt: skip
                if in_prefix is not None:
                    _tails(tile, in_prefix, order[shown], _edges(shown, read, geometry.bundle), geometry)
                nothing = tile.mass == 0
                result.output[b, of_group, rows] = tile.output / tile.mass.masked_fill(nothing, 1.0)[..., None]
                result.lse[b, of_group, rows] = tile.peak + tile.mass.log()
                result.bundles[b, of_group, t] = read
                result.tail[b, of_group, t] = left
                result.pairs[b, of_group, t] = sees.sum() + _edges(shown, read, geometry.bundle) * (end - start)
                result.visible[b, of_group, t] = sees.sum() + shown.sum() * (end - start)


def _spans(
    start: int, end: int, length: int, causal: bool, window: int | None, first: int, low: int, geometry: Geometry
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Keys that the tile [start, end) of queries reads densely before its prefix, the prefix, and those after it.

    `first` is the least key that it may see at all, `low` the least that it may rank.
    """
    unit = geometry.block
    low = max(low, geometry.sink)
    if window is not None:
        low, first = max(low, -(-(end - window) // unit) * unit), max(start - window + 1, first)
    high = max(low, (start // geometry.tile * geometry.tile if causal else length) // unit * unit)
    last = end if causal else length
    return (first, max(first, min(low, last))), (low, high), (max(first, high), max(first, high, last))


def _visible(queries: Tensor, keys: Tensor, causal: bool, window: int | None) -> Tensor:
    """bool (R, N) for positions of queries (R,) and keys (N,)."""
    sees = torch.ones(queries.numel(), keys.numel(), dtype=torch.bool)
    if causal:
        sees = keys <= queries[:, None]
    return sees if window is None else sees & (keys > queries[:, None] - window)


def _edges(shown: Tensor, read: Tensor, bundle: int) -> Tensor:
    """How many visible keys, int64 (G,), are in so many bundles of an order of which bool (N,) are visible."""
    return torch.cat([read.new_zeros(1), shown.cumsum(0)])[(read * bundle).clamp(max=shown.numel())]


def _bundles(
    tile: _Softmax, k: Tensor, v: Tensor, order: Tensor, shown: Tensor, budgets: Tensor, max_density: float,
    bundle: int, horizon: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Reads bundles of a prefix until each head's rule stops it: bundles read, int64 (G,), tail estimates (G,).

    A key of the order that is not `shown` has a place in its bundle and is not read.
    """
    total, group = order.numel(), budgets.numel()
    read, estimate = torch.zeros(group, dtype=torch.int64), torch.zeros_like(budgets)
    active = torch.arange(group)
    for number in range(math.ceil(math.ceil(max_density * total) / bundle)):
        places = slice(number * bundle, (number + 1) * bundle)
        tokens = order[places]
        read_now = tokens[shown[places]]
        tile.added.zero_()
        tile.add(active, k[read_now], v[read_now])
        ratio = max(total - (number + 1) * bundle, 0) / tokens.numel()
        left, assumed = (
            torch.where(reach == 0, 0.0, reach / (tile.mass[active] + reach))
            for reach in (ratio * tile.added[active], (max(ratio, horizon) if ratio else 0.0) * tile.added[active])
        )
        read[active] = number + 1
        estimate[active] = left.mean(dim=1)
        # Written so that NaN goes on; a budget of 0 is no threshold, since a share may underflow to it.
        stops = (budgets[active] > 0) & (assumed <= budgets[active, None]).all(dim=1)
        active = active[~stops]
        if not active.numel():
            break
    return read, estimate


def _tails(tile: _Softmax, groups: Groups, order: Tensor, read: Tensor, geometry: Geometry) -> None:
    """Adds the tail of a prefix, once for all heads that stopped after the same keys of the order, all visible."""
    size = groups.member[order].bincount(minlength=groups.k.shape[0])
    for count in read.unique().tolist():
        left = groups.member[order[count:]].bincount(minlength=groups.k.shape[0])
        some = left > 0
        if not some.any():
            continue
        heads = (read == count).nonzero().flatten()
        standing = Groups(groups.member, groups.k[some], groups.variance[some], groups.v[some])
        q = tile.q[heads].flatten(0, 1)  # scaled already
        scores = tail_logits(q, standing, left[some], size[some], 1.0, geometry.limit)
        scores = scores.unflatten(0, (heads.numel(), -1))
        tile.add_scores(heads, scores, standing.v)
