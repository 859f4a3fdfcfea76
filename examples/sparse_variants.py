"""Alternatives to what s2o's sparse attention does, an experiment each, for `bench.py quality --experiment`.

Every row reads through the same tail and stop rule as the kernels, so that rows differ in one thing only. BENCHMARKS.md
holds what came of each, and the decision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from sparse_baselines import METHODS, Method, by_tokens, represented, smooth, true_mass
from sparse_quality import ROWS, PseudoKeys, Tile, built, k_means, make_tile
from torch import Tensor

from s2o_inductor.sparse_policy import Geometry

KNOBS = (0.97, 0.94, 0.9, 0.85, 0.78, 0.7, 0.6, 0.5, 0.4)
_HORIZON = Geometry().horizon


def _row(score: Callable[[Tile], Tensor], scoring: float, **options: object) -> Method:
    select = functools.partial(by_tokens, score=score, rule="tail", horizon=_HORIZON)
    return Method(select, KNOBS, built, scoring=scoring, **options)  # type: ignore[arg-type]


def _means(count: int, **options: object) -> Callable[[Tile], Tensor]:
    return functools.partial(represented, count=count, **options)


# ---------------------------------------------------------------- cheaper scores


def merged(tile: Tile, count: int) -> Tensor:
    """(1, N), as `represented`, of the mean queries of all heads together: one score where there were G."""
    rows = tile.order_q.unflatten(1, (count, -1)).mean(dim=(0, 2))
    return smooth((rows @ tile.k.T).softmax(dim=1).mean(dim=0, keepdim=True), 9)


def every(tile: Tile, count: int, stride: int, pooled: bool) -> Tensor:
    """(1, N), as `represented`, from one key in `stride` or their mean, which its neighbours share."""
    keys = tile.k.unflatten(0, (-1, stride))
    keys = keys.mean(dim=1) if pooled else keys[:, stride // 2]
    rows = tile.order_q.unflatten(1, (count, -1)).mean(dim=2)
    scores = (rows @ keys.T).softmax(dim=2).mean(dim=(0, 1))
    return smooth(scores.repeat_interleave(stride)[None], 9)


def two_stages(tile: Tile, first: int, then: int, share: float) -> Tensor:
    """(1, N): `first` sub-means rank all tokens; `then` sub-means rank the best share of them once more."""
    scores = represented(tile, first)[0]
    best = scores.topk(int(share * scores.numel())).indices
    rows = tile.order_q.unflatten(1, (then, -1)).mean(dim=2)
    finer = scores.clone()
    finer[best] = (rows @ tile.k[best].T).softmax(dim=2).mean(dim=(0, 1))
    finer = smooth(finer[None], 9)[0]
    rank = torch.zeros_like(scores)
    rank[best] = 1 + finer[best] / finer[best].amax()
    return torch.where(rank > 0, rank, scores / scores.amax())[None]


def _group_shares(tile: Tile, count: int, groups: PseudoKeys, merge: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Representatives (G, count, D), the log-sum-exp of each over the groups, and shares (G, count, P) of one key."""
    size = torch.zeros(groups.k.shape[0]).index_add_(0, groups.group, torch.ones(groups.group.shape[0]))
    rows = tile.order_q.unflatten(1, (count, -1)).mean(dim=2)
    rows = rows.mean(dim=0, keepdim=True) if merge else rows
    logits = rows @ groups.k.T + (rows.square() @ groups.variance.T / 2).clamp(max=groups.limit)
    total = (logits + size.log()).logsumexp(dim=2, keepdim=True)
    return rows, total, (logits - total).exp()


def by_group(tile: Tile, count: int) -> Tensor:
    """(1, N): a token scores as the group of like keys that it belongs to; a thirty-second of the keys is scored."""
    groups = built(tile)
    return _group_shares(tile, count, groups)[2].mean(dim=(0, 1))[groups.group][None]


def group_normalised(tile: Tile, count: int, smoothing: int = 9) -> Tensor:
    """(1, N), as `represented`, but each softmax is over the mass of the groups: one pass over the keys, not two."""
    rows, total, _ = _group_shares(tile, count, built(tile))
    return smooth((rows @ tile.k.T - total).exp().mean(dim=(0, 1))[None], smoothing)


def shortlisted(tile: Tile, groups_by: int, count: int, share: float) -> Tensor:
    """(1, N): groups are ranked by `groups_by` sub-means, and the tokens of the best of them by `count` sub-means."""
    groups = built(tile)
    coarse = _group_shares(tile, groups_by, groups)[2].mean(dim=(0, 1))[groups.group]
    best = coarse.topk(int(share * coarse.numel())).indices
    rows, total, _ = _group_shares(tile, count, groups)
    fine = coarse.clone()
    fine[best] = (rows @ tile.k[best].T - total).exp().mean(dim=(0, 1))
    return smooth(fine[None], 9)


def difference(
    tile: Tile, count: int, smoothing: int = 9, stride: int = 1, merge: bool = False, inside: bool = False,
    peak: float = 0.0,
) -> Tensor:  # fmt: skip
    """(1, N): how far a token's share is from that of its group, which stands in for it when it is not read.

    Args:
        tile: the tile.
        count: sub-means.
        smoothing: neighbours in a moving average, odd.
        stride: one key in so many is scored and its neighbours share its score.
        merge: the mean queries of all heads are averaged before they score.
        peak: so much of a token's own score counts at least, whatever its neighbours'.
        inside: the absolute value is of the mean over sub-means and heads, not the other way round.
    """
    groups = built(tile)
    rows, total, shares = _group_shares(tile, count, groups, merge)
    scored = slice(stride // 2, None, stride)
    apart = (rows @ tile.k[scored].T - total).exp() - shares[:, :, groups.group[scored]]
    score = apart.mean(dim=(0, 1)).abs() if inside else apart.abs().mean(dim=(0, 1))
    score = score.repeat_interleave(stride)[None]
    return torch.maximum(smooth(score, smoothing), peak * score)


_TWO, _FOUR = functools.partial(make_tile, shared=2), functools.partial(make_tile, shared=4)


def _ranking() -> dict[str, Method]:
    rows = {f"{n} sub-means": _row(_means(n), n) for n in (8, 4, 2, 1)}
    for n in (8, 2):
        rows[f"{n} sub-means of all heads together"] = _row(functools.partial(merged, count=n), n / 4)
    for n, tile, size in ((4, _TWO, 256), (1, _TWO, 256), (8, _FOUR, 512), (4, _FOUR, 512), (1, _FOUR, 512)):
        rows[f"order for {size} rows, {n} sub-means"] = _row(_means(n), n * 128 / size, tile=tile)
    for stride in (2, 4):
        rows[f"8 sub-means, one key in {stride}"] = _row(
            functools.partial(every, count=8, stride=stride, pooled=False), 8 / stride
        )
    for share in (0.3, 0.12):
        rows[f"1 sub-mean, then 8 on the best {share:.0%}"] = _row(
            functools.partial(two_stages, first=1, then=8, share=share), 1 + 8 * share
        )
    rows["groups alone, 8 sub-means"] = _row(functools.partial(by_group, count=8), 8 / 32)
    rows["groups alone, 32 sub-means"] = _row(functools.partial(by_group, count=32), 1)
    rows["2 sub-means, mass from groups"] = _row(functools.partial(group_normalised, count=2), 2 * 33 / 32)
    rows["groups by 8, 2 sub-means on the best 40 %"] = _row(
        functools.partial(shortlisted, groups_by=8, count=2, share=0.4), 1.1
    )
    for n, smoothing in ((8, 9), (4, 9), (2, 9), (1, 9), (1, 5), (1, 17)):
        rows[f"difference to the group, {n} sub-means, over {smoothing}"] = _row(
            functools.partial(difference, count=n, smoothing=smoothing), n * 33 / 32
        )
    for n, tile, size in ((2, _TWO, 256), (1, _TWO, 256), (4, _FOUR, 512), (2, _FOUR, 512), (1, _FOUR, 512)):
        rows[f"difference to the group, order for {size} rows, {n} sub-means"] = _row(
            functools.partial(difference, count=n), n * 33 / 32 * 128 / size, tile=tile
        )
    for n in (2, 4):
        rows[f"difference to the group, {n} sub-means, one key in 2"] = _row(
            functools.partial(difference, count=n, stride=2), n * 17 / 32
        )
    rows["difference to the group, 2 sub-means of all heads together"] = _row(
        functools.partial(difference, count=2, merge=True), 2 * 33 / 32 / 4
    )
    rows["difference to the group, absolute value of the mean, 2 sub-means"] = _row(
        functools.partial(difference, count=2, inside=True), 2 * 33 / 32
    )
    return rows


# ---------------------------------------------------------------- bins instead of a sort


def binned(tile: Tile, score: Callable[[Tile], Tensor], bits: int) -> Tensor:
    """Scores cut to their exponent and so many bits of their mantissa, as a counting sort has them; -1 halves the
    exponent's resolution too. Equal scores are read by position."""
    raw = score(tile).float().clamp(min=2.0**-31).view(torch.int32)
    return (raw >> (23 - bits)).float()


def _bins() -> dict[str, Method]:
    rows = {"sorted": _row(_means(8), 8)}
    for bits, name in ((3, "eight bins to a factor of two"), (1, "two"), (0, "one"), (-1, "one to a factor of four")):
        rows[name] = _row(functools.partial(binned, score=_means(8), bits=bits), 8)
    finer = functools.partial(difference, count=2)
    rows["difference to the group, sorted"] = _row(finer, 2)
    rows["difference to the group, eight bins"] = _row(functools.partial(binned, score=finer, bits=3), 2)
    return rows


# ---------------------------------------------------------------- permuted queries

_SEGMENT = 8  # tiles inside which queries may move


def permuted(q: Tensor, k: Tensor, v: Tensor, start: int, guide: str) -> Tile:
    """A tile of queries that are alike: those of 1,024 positions are put in order and cut into tiles of 128.

    Every tile has an order of its own; its prefix ends where the 1,024 positions start.

    Args:
        q: (G, S, D).
        k: (S, D).
        v: (S, Dv).
        start: the tile at (start modulo 1,024) / 128 of the permuted ones.
        guide: what queries are ordered by: "k-means" of eight clusters, "key": product with the mean key, "norm", or
            "position", which leaves them.
    """
    first = start // (ROWS * _SEGMENT) * ROWS * _SEGMENT
    segment = q[:, first : first + ROWS * _SEGMENT].float()
    if guide == "k-means":
        by = torch.stack([k_means(x, x.shape[0], 8, 8) for x in segment])
    elif guide == "key":
        by = segment @ k[:first].float().mean(dim=0)
    elif guide == "norm":
        by = segment.norm(dim=2)
    else:
        by = torch.arange(segment.shape[1]).expand(segment.shape[:2])
    at = first + by.argsort(dim=1, stable=True)[:, start - first : start - first + ROWS]
    return make_tile(q, k, v, start, shared=_SEGMENT, at=at)


def _permutation() -> dict[str, Method]:
    rows = {"as built": _row(_means(8), 8)}
    for guide in ("position", "k-means", "key", "norm"):
        rows[f"dense from 1,024 rows, by {guide}"] = _row(_means(8), 8, tile=functools.partial(permuted, guide=guide))
    return rows


# ---------------------------------------------------------------- slash heads


def _slash() -> dict[str, Method]:
    rows = {f"{n} sub-means": _row(_means(n), n) for n in (8, 1, 32, 128)}
    rows["difference to the group, 2 sub-means"] = _row(functools.partial(difference, count=2), 2)
    for size in (64, 32):
        rows[f"tiles of {size} rows, 8 sub-means"] = _row(
            _means(8), 8 * 128 / size, tile=functools.partial(make_tile, rows=size)
        )
    for name in ("block mean", "XAttention", "block oracle"):
        base = METHODS[name]
        rows[f"{name}, groups as tail"] = Method(base.select, base.knobs, built, base.scoring, oracle=base.oracle)
    rows["token oracle, groups as tail"] = _row(true_mass, 0, oracle=True)
    return rows


EXPERIMENTS: dict[str, dict[str, Method]] = {
    "ranking": _ranking(),
    "bins": _bins(),
    "permutation": _permutation(),
    "slash": _slash(),
}
