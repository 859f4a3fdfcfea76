"""What S2O sparse attention means, in plain torch: the oracle of the sparse kernels.

S2O (arXiv 2602.22575) lets every tile of queries read the tokens of its prefix in falling order of importance,
through an index, until what is left is not worth reading. The steps, each a function below:

    mean    queries of the tile that are alike, so that each of their means is of few   `representatives`
    score   these mean queries rank the runs of neighbouring keys of the prefix         `run_scores`
    order   the prefix by falling score                                                 `run_order`
    attend  the dense part, then bundle after bundle of the order, until the stop rule  `sparse_attention`
    tail    groups of like keys stand in for those of them that were skipped             `tail_groups`

Two variants matter. The paper's: one mean query per segment of queries ranks single tokens by their share, stop when
a bundle's share of the mass so far falls under tau, the tail dropped (`rule="gain"`, `sub_means=1`, `run=1`,
`clusters=0`). Ours: a tail of grouped keys, which on the heads of a trained model divides the error at equal density
by five to eight (BENCHMARKS.md); runs of keys ranked by what that tail gets wrong about them; stop when the worst
row's estimated tail falls under the budget.

Everything keeps the dtype of its inputs, so float64 gives the truth for a given selection.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from s2o_inductor.kernels.stop_rule import expected_share, stop_after
from s2o_inductor.kernels.tail_groups import Groups, groups_within, tail_groups, tail_logits
from s2o_inductor.sparse_policy import Geometry

_HIDDEN = float("-inf")


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A result of `sparse_attention`.

    Attributes:
        output: (B, Hq, Sq, Dv).
        lse: (B, Hq, Sq), natural logarithm of the mass of what was read and of the tail.
        bundles: int64 (B, Hq, tiles), bundles read.
        tail: (B, Hq, tiles), mean over the rows of the estimated share of the mass that was not read.
        pairs: int64 (B, Hq), visible (query, key) pairs whose score was computed.
        visible: int64 (B, Hq), visible pairs.
    """

    output: Tensor
    lse: Tensor
    bundles: Tensor
    tail: Tensor
    pairs: Tensor
    visible: Tensor


def representatives(q: Tensor, geometry: Geometry) -> Tensor:
    """The mean queries that rank for a tile: of clusters of its rows, by k-means.

    A key that one row looks up is lost in a mean of rows that look elsewhere, and rows that stand together need not be
    alike. Means begin as those of `sub_means` equal parts (fewer where a tile is short) and move `rounds` times to the
    mean of the rows nearest to them (Lloyd, 1982); one that is nearest to none stays where it is.

    Args:
        q: (G, R, D), the queries of a tile; each head has clusters of its own.
        geometry: sizes.

    Returns:
        (G, parts, D).
    """
    parts = q.tensor_split(min(geometry.sub_means, q.shape[1]), dim=1)
    means = torch.stack([part.mean(dim=1) for part in parts], dim=1)
    for _ in range(geometry.rounds):
        distance = means.square().sum(dim=2)[:, None] - 2 * q @ means.transpose(1, 2)
        member = torch.nn.functional.one_hot(distance.argmin(dim=2), len(parts)).to(q.dtype)
        size = member.sum(dim=1)[..., None]
        means = torch.where(size > 0, member.transpose(1, 2) @ q / size.clamp(min=1), means)
    return means


def run_scores(
    means: Tensor, k: Tensor, scale: float, geometry: Geometry, groups: Groups | None, hidden: Tensor | None
) -> Tensor:
    """Importance of every run of neighbouring keys of a prefix for a tile of queries.

    For each mean query, a key's share of the softmax over the prefix is compared with the share of one key of its
    group: a key that is like its group loses nothing if the group stands in for it, so what counts is how far the two
    lie apart. Means over the queries are taken; the score of a run is the largest of its visible keys, or half the
    score of a run beside it if that is more: what a heavy key is to tell often stands just behind it, and the end of a
    run must not cut it off. The mass of the prefix, which shares are of, is that of its groups. Without groups a key's
    score is its share.

    Args:
        means: (M, D), the `representatives` of all heads that share the order.
        k: (N, D), the prefix, whole runs.
        scale: of the scores.
        geometry: sizes.
        groups: of the prefix's keys alone, numbered from 0; None without a tail.
        hidden: bool (N,), keys that no row sees; they do not count. None hides nothing.

    Returns:
        (N / run,); 0 where no key of the run is visible.
    """
    shown = torch.ones(k.shape[0], dtype=torch.bool, device=k.device) if hidden is None else ~hidden
    logits = (means @ k.T * scale).masked_fill(~shown, _HIDDEN)
    if groups is None:
        apart = logits.softmax(dim=1)
    else:
        size = groups.member[shown].bincount(minlength=groups.k.shape[0])
        of_groups = tail_logits(means, groups, size, size, scale, geometry.limit)
        total = of_groups.logsumexp(dim=1, keepdim=True)
        share = (of_groups - size.to(k.dtype).log() - total).exp()
        apart = ((logits - total).exp() - share[:, groups.member]).abs()
    score = apart.mean(dim=0).masked_fill(~shown, 0.0).unflatten(0, (-1, geometry.run)).amax(dim=1)
    beside = torch.nn.functional.pad(score, (1, 1))
    score = score.maximum(beside[:-2].maximum(beside[2:]) / 2)
    return score.masked_fill(~shown.unflatten(0, (-1, geometry.run)).any(dim=1), 0.0)


def run_order(scores: Tensor, run: int, hidden: Tensor | None = None) -> Tensor:
    """The keys of runs by falling score, equal scores by position; a run without a visible key is left out.

    A hidden key of a run that is listed takes a place in its bundle and no part in anything else.

    Args:
        scores: (N / run,).
        run: keys of a run.
        hidden: bool (N,), or None.

    Returns:
        int64, positions of keys, `run` for each run that is left.
    """
    order = scores.argsort(descending=True, stable=True)
    if hidden is not None:
        order = order[~hidden.unflatten(0, (-1, run)).all(dim=1)[order]]
    return (order[:, None] * run + torch.arange(run, device=order.device)).flatten()


def tiles_of(queries: int, keys: int, tile: int) -> list[tuple[int, int]]:
    """The absolute positions [start, end) of the queries of each tile; the first and last may be short."""
    first = keys - queries
    edges = [first, *range((first // tile + 1) * tile, keys, tile), keys]
    return list(itertools.pairwise(edges)) if queries else []


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    budgets: Sequence[float],
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    keys: Tensor | None = None,
    documents: tuple[Tensor, Tensor] | None = None,
    rule: str = "tail",
    max_density: float = 1.0,
    share_order: bool = True,
    full: float = 1.0,
    geometry: Geometry | None = None,
) -> Sparse:
    """S2O attention, tile by tile.

    A tile at absolute positions [start, end) reads the `sink` first keys and all keys from `start` on densely, as
    far as they are visible; with a window also the keys that only some of its rows see. The rest of what lies
    before `start`, visible to every row, is its prefix: ranked, and read bundle by bundle until the rule stops it.
    Without causality the prefix is all keys but the sinks and a last incomplete block.

    Of packed documents, the one that holds the last key of that prefix begins anew: its first `sink` keys, up to the
    next whole block, are read densely and what follows is ranked, if all rows of the tile are of that document. A
    tile that straddles documents ranks nothing. Either way a row reads keys of its own document alone, wherever they
    are: an id that comes back after others is read densely where it was before.

    Args:
        q: (B, Hq, Sq, D), floating point.
        k: (B, Hkv, Sk, D), Sq <= Sk; query head h reads key/value head h // (Hq / Hkv).
        v: (B, Hkv, Sk, Dv).
        budgets: thresholds of the stop rule, one for all query heads or one per query head; 0 reads everything.
        scale: defaults to D ** -0.5.
        causal: query i of Sq sees keys up to i + Sk - Sq.
        window: with `causal`, it sees the last `window` of these alone.
        keys: bool (B, Sk), keys that may be seen at all; None is all of them.
        documents: with `causal`, integers (B, Sq) and (B, Sk), the documents of queries and keys: a query sees keys of
            an equal number alone. None is one document.
        rule: see `stop_after`.
        max_density: largest share of a prefix that a tile reads, rounded up to a bundle.
        share_order: query heads of one key/value head rank tokens together; each still stops by itself.
        full: a tile whose `expected_share` is above this reads all of its prefix with all heads that rank together; 1
            never does. For the rule "tail" without a `max_density`.
        geometry: sizes; None is the default ones.

    Returns:
        `Sparse`; a row that sees no key gets output 0 and lse -inf.

    Raises:
        ValueError: sizes, budgets, density, window or documents are out of range.
    """
    geometry = geometry or Geometry()
    batch, heads, queries, width = q.shape
    kv_heads, length = k.shape[1:3]
    if queries > length:
        raise ValueError(f"sparse attention needs at least as many keys as queries; got {queries} and {length}")
    if len(budgets) not in (1, heads) or min(budgets) < 0:
        raise ValueError(f"budgets must be at least 0, one or one for each of {heads} query heads; got {budgets}")
    if not 0 < max_density <= 1:
        raise ValueError(f"max_density must be in (0, 1]; got {max_density}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window goes with causal attention and is at least 1; got {window}, causal={causal}")
    if documents is not None and (not causal or [x.shape for x in documents] != [(batch, queries), (batch, length)]):
        raise ValueError(
            f"documents go with causal attention and are (B, Sq) and (B, Sk); got causal={causal} and "
            f"{', '.join(str(tuple(x.shape)) for x in documents)} for B={batch}, Sq={queries} and Sk={length}"
        )
    scale = width**-0.5 if scale is None else scale
    group = heads // kv_heads
    spans = tiles_of(queries, length, geometry.tile)
    output = q.new_zeros(batch, heads, queries, v.shape[3])
    lse = q.new_full((batch, heads, queries), _HIDDEN)
    bundles = torch.zeros(batch, heads, len(spans), dtype=torch.int64)
    tail = q.new_zeros(batch, heads, len(spans))
    pairs, visible = (torch.zeros(batch, heads, dtype=torch.int64) for _ in range(2))
    for b in range(batch):
        allowed = torch.ones(length, dtype=torch.bool, device=q.device) if keys is None else keys[b]
        for head in range(kv_heads):
            groups = tail_groups(k[b, head], v[b, head], ~allowed, geometry) if geometry.clusters else None
            for t, (start, end) in enumerate(spans):
                rows = slice(start - (length - queries), end - (length - queries))
                of_group = slice(head * group, (head + 1) * group)
                packed = None if documents is None else (documents[0][b, rows], documents[1][b])
                sees = _visible(start, end, length, causal, window, allowed, packed)
                low, high = _prefix(start, end, length, causal, window, geometry, packed)
                prefix = slice(low, high)
                hidden = ~allowed[prefix]
                orders: list[Tensor] = []
                limits = [budgets[h % len(budgets)] for h in range(head * group, (head + 1) * group)]
                for members in [slice(0, group)] if share_order else [slice(i, i + 1) for i in range(group)]:
                    scores = run_scores(
                        representatives(q[b, of_group, rows][members], geometry).flatten(0, 1), k[b, head, prefix],
                        scale, geometry, groups_within(groups, prefix, geometry), hidden,
                    )  # fmt: skip
                    orders += [run_order(scores, geometry.run, hidden)] * (members.stop - members.start)
                    if full < 1 and rule == "tail" and max_density == 1:
                        queries_here = q[b, of_group, rows][members]
                        logits = (queries_here @ k[b, head].T * scale).masked_fill(~sees, _HIDDEN)
                        logits[..., prefix] = _HIDDEN
                        if full < expected_share(
                            queries_here, k[b, head, prefix], logits.logsumexp(dim=2), scale, limits[members], low,
                            hidden, geometry,
                        ):  # fmt: skip
                            limits[members] = [-1.0] * (members.stop - members.start)  # no tail is within it
                for i, (order, budget) in enumerate(zip(orders, limits, strict=True)):
                    h = head * group + i
                    read, estimate, chosen = _choose(
                        q[b, h, rows], k[b, head], sees, prefix, order, scale, rule, budget, max_density, geometry
                    )
                    output[b, h, rows], lse[b, h, rows] = _attend(
                        q[b, h, rows], k[b, head], v[b, head], sees, prefix, chosen, scale, groups, geometry.limit
                    )
                    bundles[b, h, t], tail[b, h, t] = read, estimate
                    pairs[b, h] += sees[:, chosen].sum().cpu()
                    visible[b, h] += sees.sum().cpu()
    return Sparse(output, lse, bundles, tail, pairs, visible)


def chosen_keys(
    q: Tensor, k: Tensor, v: Tensor, *, budget: float, geometry: Geometry, scale: float | None = None
) -> Tensor:
    """Which keys every tile of one causal head reads, for pictures: bool (tiles, Sk).

    Args:
        q: (Sq, D).
        k: (Sk, D), Sq <= Sk.
        v: (Sk, Dv).
        budget: threshold of the rule "tail".
        geometry: sizes.
        scale: defaults to D ** -0.5.
    """
    queries, length = q.shape[0], k.shape[0]
    scale = q.shape[1] ** -0.5 if scale is None else scale
    allowed = torch.ones(length, dtype=torch.bool, device=q.device)
    groups = tail_groups(k, v, None, geometry) if geometry.clusters else None
    chosen = []
    for start, end in tiles_of(queries, length, geometry.tile):
        rows = q[start - (length - queries) : end - (length - queries)]
        sees = _visible(start, end, length, True, None, allowed)
        prefix = slice(*_prefix(start, end, length, True, None, geometry))
        means, in_prefix = representatives(rows[None], geometry)[0], groups_within(groups, prefix, geometry)
        scores = run_scores(means, k[prefix], scale, geometry, in_prefix, None)
        order = run_order(scores, geometry.run)
        _, _, read = _choose(rows, k, sees, prefix, order, scale, "tail", budget, 1.0, geometry)
        chosen.append(read & sees.any(dim=0))
    return torch.stack(chosen)


def _visible(
    start: int, end: int, length: int, causal: bool, window: int | None, allowed: Tensor,
    documents: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """bool (R, Sk): what each row of a tile sees; `documents` (R,) and (Sk,)."""
    at = torch.arange(start, end, device=allowed.device)[:, None]
    key = torch.arange(length, device=allowed.device)
    sees = allowed.expand(end - start, length)
    if causal:
        sees = sees & (key <= at)
    if documents is not None:
        sees = sees & (documents[0][:, None] == documents[1])
    return sees if window is None else sees & (key > at - window)


def _prefix(
    start: int, end: int, length: int, causal: bool, window: int | None, geometry: Geometry,
    documents: tuple[Tensor, Tensor] | None = None,
) -> tuple[int, int]:  # fmt: skip
    """The keys [low, high) that a tile ranks: visible to all its rows, whole blocks, behind the sinks."""
    unit = geometry.block
    low = geometry.sink if window is None else max(geometry.sink, -(-(end - window) // unit) * unit)
    high = (start // geometry.tile * geometry.tile if causal else length) // unit * unit
    if documents is not None and high > 0:
        rows, keys = documents
        others = (keys[:high] != keys[high - 1]).nonzero()
        first = int(others[-1]) + 1 if len(others) else 0  # of the document that holds the last key
        low = max(low, -(-(first + geometry.sink) // unit) * unit if (rows == keys[high - 1]).all() else high)
    return low, max(low, high)


def _choose(
    q: Tensor, k: Tensor, sees: Tensor, prefix: slice, order: Tensor, scale: float, rule: str, budget: float,
    max_density: float, geometry: Geometry,
) -> tuple[int, float, Tensor]:  # fmt: skip
    """(bundles read, mean tail estimate, bool (Sk,): keys that are read, densely or through the order)."""
    bundle = geometry.bundle
    logits = (q @ k.T * scale).masked_fill(~sees, _HIDDEN)
    read_densely = torch.ones(k.shape[0], dtype=torch.bool, device=k.device)
    read_densely[prefix] = False
    starts = torch.arange(0, order.numel(), bundle)
    sizes = (order.numel() - starts).clamp(max=bundle)
    peak = logits.amax(dim=1, keepdim=True)
    weights = (logits - peak.masked_fill(peak == _HIDDEN, 0.0)).exp()
    ordered = weights[:, prefix][:, order]
    masses = [weights[:, read_densely].sum(dim=1)]
    masses += [ordered[:, i : i + bundle].sum(dim=1) for i in starts.tolist()]
    remaining = order.numel() - starts - sizes
    device = weights.device
    most = math.ceil(math.ceil(max_density * order.numel()) / bundle)
    read, left = stop_after(
        torch.stack(masses, dim=1), remaining.to(device), sizes.to(device), rule, budget, sees.any(dim=1), most,
        geometry.horizon,
    )  # fmt: skip
    chosen = read_densely
    chosen[order[: read * bundle] + prefix.start] = True
    seen = max(int(sees.any(dim=1).sum()), 1)
    return read, float(left.sum() / seen), chosen


def _attend(
    q: Tensor, k: Tensor, v: Tensor, sees: Tensor, prefix: slice, chosen: Tensor, scale: float,
    groups: Groups | None, limit: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax over the chosen keys and the groups that stand in for the rest."""
    read = (sees & chosen).any(dim=0)  # no other key is touched: a weight of 0 would not stop a NaN
    logits, values = (q @ k[read].T * scale).masked_fill(~sees[:, read], _HIDDEN), v[read]
    if groups is not None:
        seen, rest = (x[prefix] for x in (sees.any(dim=0), sees.any(dim=0) & ~chosen))
        size, left = (groups.member[prefix][x].bincount(minlength=groups.k.shape[0]) for x in (seen, rest))
        some = left > 0
        standing = Groups(groups.member, groups.k[some], groups.variance[some], groups.v[some])
        logits = torch.cat([logits, tail_logits(q, standing, left[some], size[some], scale, limit)], dim=1)
        values = torch.cat([values, standing.v])
    lse = logits.logsumexp(dim=1)
    nothing = (lse == _HIDDEN)[:, None]
    return logits.masked_fill(nothing, 0.0).softmax(dim=1).masked_fill(nothing, 0.0) @ values, lse
