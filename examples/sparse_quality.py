"""How far a sparse attention is from dense attention: exact tiles, the tail of what was skipped, errors, curves.

A selection (`sparse_baselines.py`) looks at a `Tile`, 128 query positions of the heads that share one key/value head,
and says for a whole sweep of thresholds which tokens of the prefix each head reads. `evaluate` turns that into errors.
Every method reads the same keys densely (the sinks and the tile's own positions) and runs through the same arithmetic,
so that only the selection, or only the tail, differs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s2o_inductor.kernels.tail_groups import tail_groups
from s2o_inductor.sparse_policy import Geometry

ROWS = 128  # query positions of a tile
GEOMETRY = Geometry()
FLOOR = 1e-6  # relative squared error of rounding an output to bfloat16; nobody gains from less


@dataclass(frozen=True)
class Tile:
    """The queries of one tile, the prefix that they may choose from, and their exact attention.

    G query heads share one key/value head, R rows, N prefix tokens, widths D and Dv; all float32. The prefix is
    the positions [sink, start): wholly visible, so no mask appears anywhere but here.

    Attributes:
        q: (G, R, D), scaled by D ** -0.5.
        k: (N, D).
        v: (N, Dv).
        sink_k: (sink, D), the keys before the prefix.
        own_k: (O, D), the keys behind the prefix, from the tile's first position on unless it shares its order.
        last_q: (G, L, D), the last queries of the sequence, scaled: what PBS-Attn ranks keys with.
        order_q: (G, R', D), scaled: the queries that the order is made for, those of the tile or of several.
        weights: (G, N, R), exp(score - peak).
        peak: (G, R), each row's largest score.
        dense_mass: (G, R), sum of exp(score - peak) over the keys that every method reads.
        dense_sum: (G, R, Dv), the same times values.
        exact: (G, R, Dv), dense attention.
        dense_pairs: visible (row, key) pairs of one head outside the prefix.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sink_k: Tensor
    own_k: Tensor
    last_q: Tensor
    order_q: Tensor
    weights: Tensor
    peak: Tensor
    dense_mass: Tensor
    dense_sum: Tensor
    exact: Tensor
    dense_pairs: int

    @property
    def visible_pairs(self) -> int:
        """Visible (row, key) pairs of one head."""
        return self.dense_pairs + self.q.shape[1] * self.k.shape[0]


def make_tile(
    q: Tensor, k: Tensor, v: Tensor, start: int, sink: int = 128, rows: int = ROWS, last: int = 128, shared: int = 1,
    at: Tensor | None = None,
) -> Tile:  # fmt: skip
    """The tile at positions [start, start + rows) of heads that share a key/value head.

    Args:
        q: (G, S, D) queries as attention sees them (rotated), not scaled.
        k: (S, D).
        v: (S, Dv).
        start: past `sink`, at most S - rows.
        sink: keys at the start that are read densely.
        rows: query positions.
        last: queries at the end of the sequence to keep.
        shared: tiles, aligned to as many, that share one order: the prefix ends where the first of them starts.
        at: int64 (G, rows), positions inside those tiles of the queries of each head, which then have an order of
            their own; None is [start, start + rows).

    Raises:
        ValueError: the tile does not fit.
    """
    first = start // (shared * rows) * shared * rows
    end = first + shared * rows
    if not sink < first <= end <= k.shape[0]:
        raise ValueError(
            f"a tile, or {shared} that share an order, start past {sink} sinks and end inside {k.shape[0]} keys; "
            f"got {first} to {end}"
        )
    q, k, v = q * q.shape[-1] ** -0.5, k.float(), v.float()
    own_at = torch.arange(start, start + rows).expand(q.shape[0], -1) if at is None else at
    mine = q.gather(1, own_at[..., None].expand(-1, -1, q.shape[2])).float()
    order_q = q[:, first:end].float() if at is None else mine
    prefix, own = slice(sink, first), slice(first, int(own_at.max()) + 1)
    future = torch.arange(own.start, own.stop) > own_at[..., None]
    read = torch.cat([mine @ k[:sink].T, (mine @ k[own].T).masked_fill(future, -math.inf)], dim=2)
    scores = torch.einsum("nd,grd->gnr", k[prefix], mine)
    peak = torch.maximum(scores.amax(dim=1), read.amax(dim=2))
    weights, read = scores.sub_(peak[:, None]).exp_(), (read - peak[..., None]).exp()
    dense_mass, dense_sum = read.sum(dim=2), read @ torch.cat([v[:sink], v[own]])
    exact = dense_sum + weights.transpose(1, 2) @ v[prefix]
    exact /= (dense_mass + weights.sum(dim=1))[..., None]
    pairs = rows * sink + int((own_at + 1 - first).sum()) // q.shape[0]
    return Tile(
        mine, k[prefix], v[prefix], k[:sink], k[own], q[:, -last:].float(), order_q, weights, peak, dense_mass,
        dense_sum, exact, pairs,
    )  # fmt: skip


def built_tile(q: Tensor, k: Tensor, v: Tensor, start: int, rows: int = ROWS, geometry: Geometry = GEOMETRY) -> Tile:
    """The tile as the kernels cut it: their sinks, and a prefix of whole blocks; what lies behind is read densely."""
    at = torch.arange(start, start + rows).expand(q.shape[0], -1)
    return make_tile(q, k, v, start, geometry.sink, rows, shared=max(geometry.block // rows, 1), at=at)


# ---------------------------------------------------------------- the tail


@dataclass(frozen=True)
class PseudoKeys:
    """What stands in for the tokens that were not read: P groups of tokens, each one key with a count.

    A group with mean key m, per-channel variance s of its keys and n tokens left gives the logit
    q.m + min(sum_d q_d^2 s_d / 2, limit) + log n: the second-order expansion of log sum exp(q.k) over the group for
    independent channels (first order, Jensen's lower bound, with limit 0). It takes the mean value of the group.

    Attributes:
        group: int64 (N,), the group of each prefix token.
        k: (P, D), mean keys.
        v: (P, Dv), mean values.
        variance: (P, D), of the keys.
        limit: of the second-order term, in nats.
        exact: the means are those of the tokens left, not of all tokens of the group. A kernel would have to
            subtract what each tile read; without it the groups belong to the key/value head alone.
        lighter: the tokens left are the lighter ones of their group, and weighed as `tail_groups.tail_logits` does.
    """

    group: Tensor
    k: Tensor
    v: Tensor
    variance: Tensor
    limit: float = 0.0
    exact: bool = False
    lighter: bool = False

    def masses(self, tile: Tile, head: int, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Mass (T, R) and mass times value (T, R, Dv) of what T selections left, rest (T, N) in {0, 1}."""
        q, groups = tile.q[head], self.k.shape[0]
        count = torch.zeros(rest.shape[0], groups).index_add_(1, self.group, rest)
        if self.exact:
            means = []
            for x in (tile.k, tile.v):
                left = [torch.zeros(groups, x.shape[1]).index_add_(0, self.group, x * w[:, None]) for w in rest]
                means.append(torch.stack(left) / count.clamp(min=1)[..., None])
            k, v = means
            logits = q @ k.transpose(1, 2)
        else:
            v, logits = self.v, q @ self.k.T
            spread = q.square() @ self.variance.T / 2
            if self.lighter:
                size = torch.bincount(self.group, minlength=groups)
                unread = count / size.clamp(min=1)
                spread = spread * (1 - 2 * (1 - unread).clamp(min=0.0).sqrt()).clamp(min=0.0)[:, None]
                count = count * unread
            if self.limit:
                logits = logits + spread.clamp(max=self.limit)
        weight = (logits + count.log()[:, None] - tile.peak[head][:, None]).exp()
        return weight.sum(dim=2), weight @ v


def _pseudo_keys(group: Tensor, k: Tensor, v: Tensor, limit: float, exact: bool = False) -> PseudoKeys:
    groups = int(group.max()) + 1
    count = torch.zeros(groups).index_add_(0, group, torch.ones(group.shape[0])).clamp(min=1)[:, None]
    mean_k, square, mean_v = (
        torch.zeros(groups, x.shape[1]).index_add_(0, group, x) / count for x in (k, k.square(), v)
    )
    return PseudoKeys(group, mean_k, mean_v, (square - mean_k.square()).clamp(min=0), limit, exact)


def runs(tile: Tile, pool: int, limit: float = 0.0, exact: bool = False) -> PseudoKeys:
    """One pseudo-key per `pool` consecutive positions."""
    return _pseudo_keys(torch.arange(tile.k.shape[0]) // pool, tile.k, tile.v, limit, exact)


def clusters(
    tile: Tile, block: int, per_block: int, limit: float = 3.0, values: bool = True, rounds: int = 4
) -> PseudoKeys:
    """Pseudo-keys by k-means inside blocks of positions, so that a group holds tokens that are alike.

    Blocks are aligned to absolute positions. A block that the prefix holds only partly is cut into blocks of 128,
    with proportionally fewer clusters: those are complete at any tile edge, so all statistics can be made once per
    key/value head, whatever the tile.

    Args:
        tile: the tile.
        block: positions, a multiple of 128.
        per_block: clusters of a block.
        limit: see `PseudoKeys`.
        values: cluster keys and values together, each scaled to unit variance, not keys alone.
        rounds: Lloyd iterations, from evenly spaced tokens.

    Raises:
        ValueError: `block` or the end of the prefix is no multiple of 128.
    """
    sink, end = tile.sink_k.shape[0], tile.sink_k.shape[0] + tile.k.shape[0]
    if block % ROWS or end % ROWS:
        raise ValueError(f"clusters need a block and a tile start that are multiples of {ROWS}; got {block} and {end}")
    aligned = min(-(-sink // ROWS) * ROWS, end)
    first = min(-(-sink // block) * block, end)
    last = max(end // block * block, first)
    spans = [(sink, aligned, max(aligned - sink, 1)), (aligned, first, ROWS), (first, last, block), (last, end, ROWS)]
    features = torch.cat([tile.k / tile.k.std(), tile.v / tile.v.std()], dim=1) if values else tile.k
    labels: list[Tensor] = []
    groups = 0
    for low, high, size in spans:
        if low < high:
            label = (
                k_means(features[low - sink : high - sink], size, max(1, per_block * size // block), rounds) + groups
            )
            groups = int(label.max()) + 1
            labels.append(label)
    return _pseudo_keys(torch.cat(labels), tile.k, tile.v, limit)


def built(tile: Tile, geometry: Geometry = GEOMETRY) -> PseudoKeys:
    """The pseudo-keys of the kernels: `tail_groups`.

    Raises:
        ValueError: the sinks or the prefix are not whole blocks.
    """
    if tile.sink_k.shape[0] % geometry.block or tile.k.shape[0] % geometry.block:
        raise ValueError(
            f"sinks and a prefix must be whole blocks of {geometry.block} positions; "
            f"got {tile.sink_k.shape[0]} and {tile.k.shape[0]}"
        )
    groups = tail_groups(tile.k, tile.v, None, geometry)
    return PseudoKeys(groups.member, groups.k, groups.v, groups.variance, geometry.limit, lighter=True)


def k_means(x: Tensor, block: int, count: int, rounds: int) -> Tensor:
    """int64 (N,), the cluster of each row of x (N, F), numbered block by block; N is a multiple of `block`."""
    x = x.unflatten(0, (-1, block))
    seeds = ((torch.arange(count) + 0.5) * block / count).long()
    centres = x[:, seeds]
    for step in range(rounds):
        nearest = (centres.square().sum(dim=2)[:, None] - 2 * x @ centres.transpose(1, 2)).argmin(dim=2)
        if step < rounds - 1:
            member = F.one_hot(nearest, count).to(x.dtype)
            size = member.sum(dim=1)[..., None]
            centres = torch.where(size > 0, member.transpose(1, 2) @ x / size.clamp(min=1), centres)
    return (nearest + count * torch.arange(x.shape[0])[:, None]).flatten()


# ---------------------------------------------------------------- errors


@dataclass(frozen=True)
class Selection:
    """Which tokens each head reads at each of T thresholds: the first steps of an order.

    Attributes:
        order: int64 (G, N), prefix tokens in the order of reading.
        step: tokens per step.
        taken: int64 (G, T), steps read.
    """

    order: Tensor
    step: int
    taken: Tensor

    @property
    def tokens(self) -> Tensor:
        """int64 (G, T), tokens read."""
        return (self.taken * self.step).clamp(max=self.order.shape[1])


def evaluate(tile: Tile, selection: Selection, tail: PseudoKeys | None = None) -> Tensor:
    """(G, T), the relative squared error sum |o - exact|^2 / sum |exact|^2 of each head over the tile.

    Args:
        tile: the tile.
        selection: what is read.
        tail: what stands in for the rest; None drops it.
    """
    errors = []
    for head, (order, tokens) in enumerate(zip(selection.order, selection.tokens, strict=True)):
        stops, which = tokens.unique(return_inverse=True)
        masses, sums, low = [], [], 0
        for high in stops.tolist():  # the tokens between two stops are multiplied once, whatever the number of stops
            read = order[low:high]
            weights, low = tile.weights[head][read], high
            masses.append(weights.sum(dim=0))
            sums.append(weights.T @ tile.v[read])
        mass = tile.dense_mass[head] + torch.stack(masses).cumsum(dim=0)
        summed = tile.dense_sum[head] + torch.stack(sums).cumsum(dim=0)
        if tail is not None:
            rank = torch.empty_like(order)
            rank[order] = torch.arange(order.numel())
            more, more_sum = tail.masses(tile, head, (rank >= stops[:, None]).to(mass.dtype))
            mass, summed = mass + more, summed + more_sum
        error = (summed / mass[..., None] - tile.exact[head]).square().sum(dim=(1, 2))
        errors.append((error / tile.exact[head].square().sum())[which])
    return torch.stack(errors)


# ---------------------------------------------------------------- curves


def sample_starts(length: int, tiles: int, seed: int, consecutive: int = 1) -> list[int]:
    """One random tile in each of `tiles` equal ranges of a sequence, none in the first 1,024 positions.

    With `consecutive` it is that many tiles in a row, the first at a multiple of as many.
    """
    generator = torch.Generator().manual_seed(seed)
    size = ROWS * consecutive
    edges = torch.linspace(-(-1024 // size), length // size, tiles + 1).long().tolist()
    runs = [int(torch.randint(low, high, (), generator=generator)) for low, high in itertools.pairwise(edges)]
    return [run * size + i * ROWS for run in runs for i in range(consecutive)]


def groups_of(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int]
) -> Iterator[tuple[int, int, tuple[Tensor, Tensor, Tensor]]]:
    """(first query head, start, operands of `make_tile`) for every key/value head and start.

    Args:
        q: (Hq, S, D).
        k: (Hkv, S, D).
        v: (Hkv, S, Dv).
        starts: of tiles.
    """
    group = q.shape[0] // k.shape[0]
    for head in range(k.shape[0]):
        for start in starts:
            yield head * group, start, (q[head * group : (head + 1) * group], k[head], v[head])


@dataclass(frozen=True)
class Curve:
    """Error against density of one method over H heads at T thresholds.

    Attributes:
        density: (T,), mean over heads of computed pairs / visible pairs.
        error: (H, T), relative squared error, mean over the tiles of a head, at least `FLOOR`.
    """

    density: Tensor
    error: Tensor

    def level(self, mean: str) -> Tensor:
        """(T,), natural logarithm of the error over heads: "geometric", "arithmetic", "median" or "worst"."""
        if mean == "geometric":
            return self.error.log().mean(dim=0)
        if mean == "arithmetic":
            return self.error.mean(dim=0).log()
        return (self.error.median(dim=0).values if mean == "median" else self.error.amax(dim=0)).log()

    def error_at(self, density: float, mean: str) -> float:
        """Error at a density, log-linear between measured thresholds; NaN outside their range."""
        return math.exp(_between(self.density.log().tolist(), self.level(mean).tolist(), math.log(density)))

    def density_at(self, error: float, mean: str) -> float:
        """Density at an error, the same way."""
        return math.exp(_between(self.level(mean).tolist(), self.density.log().tolist(), math.log(error)))


def _between(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    points = sorted(zip(xs, ys, strict=True))
    for (a, c), (b, d) in itertools.pairwise(points):
        if a <= x <= b:
            return c if a == b else c + (d - c) * (x - a) / (b - a)
    return math.nan
