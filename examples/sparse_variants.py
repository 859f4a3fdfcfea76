"""Alternatives to what s2o's sparse attention does, an experiment each, for `bench.py quality --experiment`.

Every row reads through the same tail and stop rule, so that rows differ in one thing only. But for the experiment on
groups, these are those of blocks of 128 keys, finer than the kernels', so that the figures of BENCHMARKS.md, which says
what came of each, stay right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sparse_baselines import METHODS, Method, built_score, by_tokens, represented, smooth, true_mass
from sparse_quality import ROWS, PseudoKeys, Tile, built, built_tile, k_means, make_tile
from torch import Tensor

from s2o_inductor.sparse_policy import Geometry

KNOBS = (0.97, 0.94, 0.9, 0.85, 0.78, 0.7, 0.6, 0.5, 0.4)
_FINE = Geometry(sink=128, block=128)
_TAIL = functools.partial(built, geometry=_FINE)


Score = Callable[[Tile], Tensor]


def _row(score: Score, scoring: float, **options: object) -> Method:
    select = functools.partial(by_tokens, score=score, rule="tail", horizon=_FINE.horizon)
    return Method(select, KNOBS, _TAIL, scoring=scoring, **options)  # type: ignore[arg-type]


def _means(count: int, **options: object) -> Score:
    return functools.partial(represented, count=count, **options)


# ---------------------------------------------------------------- cheaper scores


def merged(tile: Tile, count: int) -> Tensor:
    """(1, N), as `represented`, of the mean queries of all heads together: one score where there were G."""
    rows = tile.order_q.unflatten(1, (count, -1)).mean(dim=(0, 2))
    return smooth((rows @ tile.k.T).softmax(dim=1).mean(dim=0, keepdim=True), 9)


def every(tile: Tile, count: int, stride: int) -> Tensor:
    """(1, N), as `represented`, from one key in `stride`, whose neighbours share its score."""
    keys = tile.k[stride // 2 :: stride]
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
    groups = _TAIL(tile)
    return _group_shares(tile, count, groups)[2].mean(dim=(0, 1))[groups.group][None]


def group_normalised(tile: Tile, count: int, smoothing: int = 9) -> Tensor:
    """(1, N), as `represented`, but each softmax is over the mass of the groups: one pass over the keys, not two."""
    rows, total, _ = _group_shares(tile, count, _TAIL(tile))
    return smooth((rows @ tile.k.T - total).exp().mean(dim=(0, 1))[None], smoothing)


def shortlisted(tile: Tile, groups_by: int, count: int, share: float) -> Tensor:
    """(1, N): groups are ranked by `groups_by` sub-means, and the tokens of the best of them by `count` sub-means."""
    groups = _TAIL(tile)
    coarse = _group_shares(tile, groups_by, groups)[2].mean(dim=(0, 1))[groups.group]
    best = coarse.topk(int(share * coarse.numel())).indices
    rows, total, _ = _group_shares(tile, count, groups)
    fine = coarse.clone()
    fine[best] = (rows @ tile.k[best].T - total).exp().mean(dim=(0, 1))
    return smooth(fine[None], 9)


# ---------------------------------------------------------------- what the tail gets wrong


def apart(tile: Tile, count: int, stride: int = 1, merge: bool = False) -> Tensor:
    """(1, N): how far a token's share is from that of its group, which stands in for it when it is not read.

    Args:
        tile: the tile.
        count: sub-means.
        stride: one key in so many is scored and its neighbours share its score.
        merge: the mean queries of all heads are averaged before they score.
    """
    groups = _TAIL(tile)
    rows, total, shares = _group_shares(tile, count, groups, merge)
    scored = slice(stride // 2, None, stride)
    distance = (rows @ tile.k[scored].T - total).exp() - shares[:, :, groups.group[scored]]
    return distance.abs().mean(dim=(0, 1)).repeat_interleave(stride)[None]


def _apart(count: int, **options: object) -> Score:
    return functools.partial(apart, count=count, **options)


def averaged(tile: Tile, score: Score, neighbours: int = 9, peak: float = 0.0) -> Tensor:
    """(1, N): a moving average of a score; so much of a token's own score counts at least, whatever its neighbours'."""
    raw = score(tile)
    return torch.maximum(smooth(raw, neighbours), peak * raw)


def in_runs(tile: Tile, score: Score, run: int = 8, how: str = "mean", beside: float = 0.0) -> Tensor:
    """(1, N): one score for a run of neighbouring keys, which are then read together.

    Args:
        tile: the tile.
        score: of single keys.
        run: keys of a run.
        how: "mean", "max" or "rms" over the run.
        beside: so much of the scores of the runs before and after is added.
    """
    runs = score(tile).unflatten(1, (-1, run))
    if how == "max":
        one = runs.amax(dim=2)
    else:
        one = runs.mean(dim=2) if how == "mean" else runs.square().mean(dim=2).sqrt()
    if beside:
        wide = F.pad(one, (1, 1))
        one = one + beside * (wide[:, :-2] + wide[:, 2:])
    return one.repeat_interleave(run, dim=1)


def _averaged(score: Score, **options: object) -> Score:
    return functools.partial(averaged, score=score, **options)


def _in_runs(score: Score, **options: object) -> Score:
    return functools.partial(in_runs, score=score, **options)


# ---------------------------------------------------------------- experiments

_TWO, _FOUR = functools.partial(make_tile, shared=2), functools.partial(make_tile, shared=4)
_FORMER = _row(_means(8), 8)  # the score of the first kernels
_SCORE = functools.partial(built_score, geometry=_FINE)
_BUILT = _row(_SCORE, 2 * 33 / 32)


def _ranking() -> dict[str, Method]:
    rows = {f"{n} sub-means": _row(_means(n), n) for n in (8, 4, 2, 1)}
    for n in (8, 2):
        rows[f"{n} sub-means of all heads together"] = _row(functools.partial(merged, count=n), n / 4)
    for n, tile, size in ((4, _TWO, 256), (1, _TWO, 256), (8, _FOUR, 512), (4, _FOUR, 512), (1, _FOUR, 512)):
        rows[f"order for {size} rows, {n} sub-means"] = _row(_means(n), n * 128 / size, tile=tile)
    for stride in (2, 4):
        rows[f"8 sub-means, one key in {stride}"] = _row(functools.partial(every, count=8, stride=stride), 8 / stride)
    for share in (0.3, 0.12):
        rows[f"1 sub-mean, then 8 on the best {share:.0%}"] = _row(
            functools.partial(two_stages, first=1, then=8, share=share), 1 + 8 * share
        )
    for n in (8, 32):
        rows[f"groups alone, {n} sub-means"] = _row(functools.partial(by_group, count=n), n / 32)
    rows["2 sub-means, mass from groups"] = _row(functools.partial(group_normalised, count=2), 2 * 33 / 32)
    rows["groups by 8, 2 sub-means on the best 40 %"] = _row(
        functools.partial(shortlisted, groups_by=8, count=2, share=0.4), 8 / 32 + 2 * 0.4
    )
    for n in (8, 4, 2, 1):
        rows[f"difference, {n} sub-means"] = _row(_averaged(_apart(n)), n * 33 / 32)
    for n, tile, size in ((2, _TWO, 256), (1, _TWO, 256), (4, _FOUR, 512), (2, _FOUR, 512), (1, _FOUR, 512)):
        rows[f"difference, order for {size} rows, {n} sub-means"] = _row(
            _averaged(_apart(n)), n * 33 / 32 * 128 / size, tile=tile
        )
    for n in (4, 2):
        rows[f"difference, {n} sub-means, one key in 2"] = _row(_averaged(_apart(n, stride=2)), n * 17 / 32)
    rows["difference, 2 sub-means of all heads together"] = _row(_averaged(_apart(2, merge=True)), 2 * 33 / 32 / 4)
    return rows


def _peaks() -> dict[str, Method]:
    rows = {"8 sub-means": _FORMER, "8 sub-means, peaks": _row(_averaged(_means(8, smoothing=1), peak=1.0), 8)}
    for n in (8, 4, 2):
        for peak in (0.0, 0.5, 1.0):
            rows[f"difference, {n} sub-means, peak {peak:g}"] = _row(_averaged(_apart(n), peak=peak), n * 33 / 32)
    for n in (8, 4):
        rows[f"difference, {n} sub-means, not averaged"] = _row(_apart(n), n * 33 / 32)
        rows[f"difference, {n} sub-means of all heads together"] = _row(
            _averaged(_apart(n, merge=True)), n * 33 / 32 / 4
        )
    rows["token oracle"] = _row(true_mass, 0, oracle=True)
    return rows


def _runs() -> dict[str, Method]:
    rows = {"8 sub-means": _FORMER, "as built": _BUILT}
    for n in (2, 4):
        for how in ("mean", "rms", "max"):
            rows[f"runs of 8, {how}, {n} sub-means"] = _row(_in_runs(_apart(n), how=how), n * 33 / 32)
    for how in ("mean", "max"):
        for n in (2, 4):
            rows[f"runs of 8, {how}, half of those beside, {n} sub-means"] = _row(
                _in_runs(_apart(n), how=how, beside=0.5), n * 33 / 32
            )
    for how in ("rms", "max"):
        rows[f"runs of 4, {how}, 2 sub-means"] = _row(_in_runs(_apart(2), run=4, how=how), 2 * 33 / 32)
    for how in ("mean", "rms"):
        rows[f"runs of 8, {how}, 8 sub-means of all heads together"] = _row(
            _in_runs(_apart(8, merge=True), how=how), 2 * 33 / 32
        )
    rows["peaks, 2 sub-means"] = _row(_averaged(_apart(2), peak=1.0), 2 * 33 / 32)
    return rows


def binned(tile: Tile, score: Score, bits: int) -> Tensor:
    """Scores cut to their exponent and so many bits of their mantissa, as a counting sort has them; -1 halves the
    exponent's resolution too. Equal scores are read by position."""
    return (score(tile).float().clamp(min=2.0**-31).view(torch.int32) >> (23 - bits)).float()


def _bins() -> dict[str, Method]:
    rows = {"as built": _BUILT}
    for bits, name in ((3, "eight bins to a factor of 2"), (1, "two"), (0, "one"), (-1, "one to a factor of 4")):
        rows[name] = _row(functools.partial(binned, score=_SCORE, bits=bits), 2 * 33 / 32)
    return rows


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
    rows = {"as built": _BUILT}
    for guide in ("position", "k-means", "key", "norm"):
        rows[f"dense from 1,024 rows on, by {guide}"] = _row(
            _SCORE, 2 * 33 / 32, tile=functools.partial(permuted, guide=guide)
        )
    return rows


def _slash() -> dict[str, Method]:
    rows = {"as built": _BUILT, "single keys averaged over 9, 8 sub-means": _FORMER}
    for n in (4, 8, 32):
        rows[f"{n} sub-means"] = _row(_in_runs(_apart(n)), n * 33 / 32)
    rows["max, half of the runs beside"] = _row(_in_runs(_apart(2), how="max", beside=0.5), 2 * 33 / 32)
    for size in (64, 32):
        rows[f"tiles of {size} rows"] = _row(
            _SCORE, 2 * 33 / 32 * 128 / size, tile=functools.partial(make_tile, rows=size)
        )
    for name in ("block mean", "XAttention", "block oracle"):
        base = METHODS[name]
        rows[f"{name}, groups as tail"] = Method(base.select, base.knobs, _TAIL, base.scoring, oracle=base.oracle)
    rows["token oracle"] = _row(true_mass, 0, oracle=True)
    return rows


def _groups() -> dict[str, Method]:
    """Groups, and sinks, of several sizes: each reads the same share of a prefix, which begins and ends with blocks."""
    rows = {}
    for clusters, block, sink in ((4, 256, 256), (4, 256, 0), (8, 512, 512), (8, 512, 0), (16, 1024, 1024)):
        sizes = Geometry(clusters=clusters, block=block, sink=sink)
        rows[f"{clusters} of {block}, {sink} sinks"] = Method(
            functools.partial(by_tokens, score=functools.partial(built_score, geometry=sizes), rule="count"),
            (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.09, 0.1, 0.12, 0.15),
            functools.partial(built, geometry=sizes),
            scoring=4 * 65 / 64,
            tile=functools.partial(built_tile, geometry=sizes),
        )
    return rows


EXPERIMENTS: dict[str, dict[str, Method]] = {
    "ranking": _ranking(),
    "peaks": _peaks(),
    "runs": _runs(),
    "bins": _bins(),
    "permutation": _permutation(),
    "slash": _slash(),
    "groups": _groups(),
}
