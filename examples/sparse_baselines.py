"""Which tokens of a prefix a sparse attention reads: published selections, oracles and ours, behind one interface.

A method takes a `Tile` and a sweep of thresholds and answers with a `Selection`: an order of the prefix and how much
of it each head reads at each threshold. Thresholds are global over heads, so that adaptivity counts. Block methods
order blocks of 128 keys, token methods order tokens and stop by bundles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sparse_quality import GEOMETRY, PseudoKeys, Selection, Tile, built, built_tile, clusters, make_tile, runs
from torch import Tensor

from s2o_inductor.kernels.reference_sparse import representatives, run_scores
from s2o_inductor.kernels.tail_groups import tail_groups
from s2o_inductor.sparse_policy import Geometry

BLOCK = 128  # keys per block of the block methods

SHARES = (0.3, 0.45, 0.6, 0.7, 0.78, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)
ALPHAS = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
BUDGETS = (0.97, 0.94, 0.9, 0.85, 0.78, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.14, 0.1, 0.07, 0.05)
GAINS = (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.04, 0.03, 0.02, 0.015, 0.01, 0.005)


# ---------------------------------------------------------------- block methods


def _means(x: Tensor, size: int) -> Tensor:
    """Means of runs of `size` rows of x (..., N, D); N is a multiple of it."""
    return x.unflatten(-2, (-1, size)).mean(dim=-2)


def _edges(tile: Tile) -> Tensor:
    """(2, D), mean keys of the blocks that every method reads: the sinks' and the tile's own."""
    return torch.stack([tile.sink_k.mean(dim=0), tile.own_k.mean(dim=0)])


def top_p(shares: Tensor, knobs: Sequence[float], tokens: Tensor | None = None) -> Selection:
    """The fewest blocks whose shares reach each knob, those that are read anyway counted, as the publications do.

    Args:
        shares: (G, 2 + blocks), softmax over the two blocks that are read anyway, then the blocks of the prefix.
        knobs: cumulative shares.
        tokens: (G, N), which tokens the blocks hold; None is in order.
    """
    ordered, rank = shares.sort(dim=1, descending=True, stable=True)
    before = torch.empty_like(shares).scatter_(1, rank, ordered.cumsum(dim=1) - ordered)[:, 2:]
    taken = torch.stack([(before < knob).sum(dim=1) for knob in knobs], dim=1)
    return _by_blocks(shares[:, 2:], taken, tokens)


def _by_blocks(scores: Tensor, taken: Tensor, tokens: Tensor | None = None) -> Selection:
    order = scores.argsort(dim=1, descending=True, stable=True)
    at = (order[..., None] * BLOCK + torch.arange(BLOCK, device=order.device)).flatten(1)
    return Selection(at if tokens is None else tokens.gather(1, at), BLOCK, taken)


def block_mean(tile: Tile, knobs: Sequence[float]) -> Selection:
    """Mean query against the mean key of each block, softmax, top-p."""
    keys = torch.cat([_edges(tile), _means(tile.k, BLOCK)])
    return top_p((tile.q.mean(dim=1) @ keys.T).softmax(dim=1), knobs)


def block_oracle(tile: Tile, knobs: Sequence[float]) -> Selection:
    """The true attention mass of each block, mean over the rows, top-p: what no block method can beat."""
    mass = true_mass(tile).unflatten(1, (-1, BLOCK)).sum(dim=2)
    rest = 1 - mass.sum(dim=1, keepdim=True)
    return top_p(torch.cat([rest, torch.zeros_like(rest), mass], dim=1), knobs)


def pbs(tile: Tile, knobs: Sequence[float], segment: int = 2 * BLOCK, whole: bool = True) -> Selection:
    """PBS-Attn (arXiv 2510.21270): keys sorted inside segments by one global importance, then `block_mean`.

    A key's importance is its mean softmax over the last queries of the sequence. Segments are aligned to absolute
    positions; one that the prefix holds only partly (sinks, diagonal) is sorted in that part.

    Args:
        tile: the tile.
        knobs: cumulative shares.
        segment: positions.
        whole: the blocks that are read anyway take part in the softmax, as in the paper; without them the sum is
            over the prefix alone, which spends more on heads that look at sinks.
    """
    order = segment_order(importance_of(tile.last_q, tile.k), tile.sink_k.shape[0], segment)
    query = tile.q.mean(dim=1)
    scores = torch.stack([_means(tile.k[o], BLOCK) @ x for o, x in zip(order, query, strict=True)])
    edges = query @ _edges(tile).T if whole else torch.full((query.shape[0], 2), -math.inf)
    return top_p(torch.cat([edges, scores], dim=1).softmax(dim=1), knobs, order)


def importance_of(last_q: Tensor, k: Tensor) -> Tensor:
    """(G, N): PBS-Attn's importance of keys (N, D), their mean softmax over the last queries (G, L, D), scaled."""
    return (last_q @ k.T).softmax(dim=2).mean(dim=1)


def segment_order(importance: Tensor, first: int, segment: int = 2 * BLOCK) -> Tensor:
    """int64 (G, N): keys at positions from `first` on by falling importance inside segments of positions."""
    order = importance.argsort(dim=1, descending=True, stable=True)
    of_segment = (order + first) // segment
    return order.gather(1, of_segment.argsort(dim=1, stable=True))


def xattention(tile: Tile, knobs: Sequence[float], stride: int = 8) -> Selection:
    """XAttention (arXiv 2503.16428): sums over antidiagonals of stride x stride patches, softmax, top-p of blocks."""
    keys = torch.cat([tile.sink_k[:BLOCK], tile.own_k, tile.k])
    q, k = (x.unflatten(-2, (-1, stride)) for x in (tile.q, keys))
    patches = torch.einsum("gasd,bsd->gab", q, k.flip(1)) / stride
    return top_p(patches.softmax(dim=2).mean(dim=1).unflatten(1, (-1, BLOCK // stride)).sum(dim=2), knobs)


def flash_prefill(tile: Tile, knobs: Sequence[float]) -> Selection:
    """FlashPrefill: each row's softmax over mean keys, mean over rows; blocks of at least knob * the largest."""
    scores = (tile.q @ torch.cat([_edges(tile), _means(tile.k, BLOCK)]).T).softmax(dim=2).mean(dim=1)
    best, scores = scores.amax(dim=1), scores[:, 2:]
    return _by_blocks(scores, torch.stack([(scores >= alpha * best[:, None]).sum(dim=1) for alpha in knobs], dim=1))


# ---------------------------------------------------------------- token scores


def true_mass(tile: Tile) -> Tensor:
    """(G, N), the attention that a tile really pays to each token, mean over its rows: the token oracle."""
    return (tile.weights / (tile.dense_mass + tile.weights.sum(dim=1))[:, None]).mean(dim=2)


def represented(tile: Tile, count: int = 8, smoothing: int = 9, share: bool = True, sampled: bool = False) -> Tensor:
    """(G, N) or (1, N): mean softmax of representatives of the tile's rows, then a moving average over positions.

    Args:
        tile: the tile.
        count: representatives per head.
        smoothing: neighbours in the average, odd.
        share: one score for all heads of the group.
        sampled: the middle row of each of `count` runs of rows represents it, not the mean of its rows.
    """
    parts = tile.order_q.unflatten(1, (count, -1))
    rows = parts[:, :, parts.shape[2] // 2] if sampled else parts.mean(dim=2)
    scores = (rows @ tile.k.T).softmax(dim=2).mean(dim=1)
    return smooth(scores.mean(dim=0, keepdim=True) if share else scores, smoothing)


def smooth(scores: Tensor, neighbours: int) -> Tensor:
    """Moving average of (G, N) over an odd number of neighbours, fewer at the ends."""
    return F.avg_pool1d(scores[:, None], neighbours, 1, neighbours // 2, count_include_pad=False)[:, 0]


def built_score(tile: Tile, geometry: Geometry = GEOMETRY) -> Tensor:
    """(1, N): the kernels' score, by its definition; all keys of a run share it."""
    groups = tail_groups(tile.k, tile.v, None, geometry)
    means = representatives(tile.order_q, geometry).flatten(0, 1)
    return run_scores(means, tile.k, 1.0, geometry, groups, None).repeat_interleave(geometry.run)[None]


def by_tokens(
    tile: Tile, knobs: Sequence[float], *, score: Callable[[Tile], Tensor], rule: str, bundle: int = 512,
    horizon: int = 1,
) -> Selection:  # fmt: skip
    """Tokens by falling score, equal scores by position, until a stop rule is content."""
    order = score(tile).argsort(dim=1, descending=True, stable=True).expand(tile.q.shape[0], -1)
    return Selection(order, bundle, stop(tile, order, bundle, rule, knobs, horizon))


# ---------------------------------------------------------------- stop rules


def step_masses(tile: Tile, order: Tensor, step: int) -> Tensor:
    """(G, U + 1, R), the mass of the dense part, then of each step of the order (G, N)."""
    gathered = torch.stack([weights[o] for weights, o in zip(tile.weights, order, strict=True)])
    gathered = F.pad(gathered, (0, 0, 0, -order.shape[1] % step)).unflatten(1, (-1, step))
    return torch.cat([tile.dense_mass[:, None], gathered.sum(dim=2)], dim=1)


def stop(tile: Tile, order: Tensor, bundle: int, rule: str, knobs: Sequence[float], horizon: int = 1) -> Tensor:
    """int64 (G, T), bundles that each head reads at each knob.

    A row's tail estimate after a bundle is r gain / (1 + r gain): gain is the share of the mass so far that the
    bundle brought, r the tokens left / the bundle's tokens (`stop_after` of kernels/stop_rule.py).

    Args:
        tile: the tile.
        order: (G, N).
        bundle: tokens between two tests.
        rule: "tail": the worst row's estimate; "tail_rms": its root mean square over rows; "tail_mean"; "gain": the
            paper's, mean over rows of added mass / mass before; "true": the worst row's true tail, an oracle;
            "count": a fixed share of the prefix.
        knobs: thresholds.
        horizon: least r of the rules "tail".

    Raises:
        ValueError: there is no such rule.
    """
    length = order.shape[1]
    if rule == "count":
        taken = [math.ceil(math.ceil(share * length) / bundle) for share in knobs]
        return torch.tensor(taken).expand(order.shape[0], -1)
    masses = step_masses(tile, order, bundle)
    total = masses.cumsum(dim=1)
    added, before, after = masses[:, 1:], total[:, :-1], total[:, 1:]
    if rule == "gain":
        value = (added / before).mean(dim=2)
    elif rule == "true":
        value = 1 - (after / total[:, -1:]).amin(dim=2)
    elif rule in ("tail", "tail_rms", "tail_mean"):
        done = bundle * torch.arange(1, added.shape[1] + 1)
        size = torch.full_like(done, bundle)
        size[-1] = length - bundle * (len(done) - 1)
        ratio = (length - done).clamp(min=0) / size
        odds = ratio.clamp(min=horizon).where(ratio > 0, 0.0)[:, None] * added / after
        left = odds / (1 + odds)
        if rule == "tail":
            value = left.amax(dim=2)
        else:
            value = left.square().mean(dim=2).sqrt() if rule == "tail_rms" else left.mean(dim=2)
    else:
        raise ValueError(f"rule must be tail, tail_rms, tail_mean, gain, true or count; got {rule!r}")
    value[:, -1] = -math.inf  # nothing is left
    return torch.stack([(value <= knob).int().argmax(dim=1) + 1 for knob in knobs], dim=1)


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        select: the selection.
        knobs: its thresholds.
        tail: makes what stands in for the rest; None drops it.
        scoring: rows of scores against every token of the prefix that the selection costs per tile and head.
        tile: makes the tiles it is measured on, where they are not those of everybody else.
        oracle: it looks at the exact attention, so that it is a bound and not a method.
    """

    select: Callable[[Tile, Sequence[float]], Selection]
    knobs: Sequence[float]
    tail: Callable[[Tile], PseudoKeys] | None = None
    scoring: float = 0.0
    tile: Callable[..., Tile] = make_tile
    oracle: bool = False


def _tokens(rule: str = "tail", **options: object) -> Callable[[Tile, Sequence[float]], Selection]:
    return functools.partial(by_tokens, score=functools.partial(represented, **options), rule=rule)


_ORACLE = functools.partial(by_tokens, score=true_mass, rule="tail")
_POOLED = functools.partial(runs, pool=64, exact=True)
_SECOND = functools.partial(runs, pool=64, limit=3.0)
_CLUSTERS = functools.partial(clusters, block=1024, per_block=32)

_BUILT_COST = GEOMETRY.sub_means * (1 + GEOMETRY.clusters / GEOMETRY.block)
_AS_BUILT = functools.partial(by_tokens, score=built_score, rule="tail", horizon=GEOMETRY.horizon)

METHODS: dict[str, Method] = {
    "PBS-Attn": Method(pbs, SHARES),
    "PBS-Attn, shares of the prefix alone": Method(functools.partial(pbs, whole=False), SHARES),
    "block mean": Method(block_mean, SHARES),
    "XAttention": Method(xattention, SHARES, scoring=16),
    "FlashPrefill": Method(flash_prefill, ALPHAS, scoring=1),
    "block oracle": Method(block_oracle, SHARES, oracle=True),
    "mean query, paper's rule": Method(_tokens("gain", count=1, smoothing=1, share=False), GAINS, scoring=1),
    "S2O, tail dropped": Method(_tokens(), BUDGETS, scoring=8),
    "S2O, pooled by 64": Method(_tokens(), BUDGETS, _POOLED, scoring=8),
    "S2O, pooled by 64, second order": Method(_tokens(), BUDGETS, _SECOND, scoring=8),
    "S2O, as built": Method(_AS_BUILT, BUDGETS, built, scoring=_BUILT_COST, tile=built_tile),
    "S2O, clusters": Method(_tokens(), BUDGETS, _CLUSTERS, scoring=8),
    "S2O, clusters, rms rule": Method(_tokens("tail_rms"), BUDGETS, _CLUSTERS, scoring=8),
    "token oracle, tail dropped": Method(_ORACLE, BUDGETS, oracle=True),
    "token oracle, pooled by 64": Method(_ORACLE, BUDGETS, _POOLED, oracle=True),
    "token oracle, clusters": Method(_ORACLE, BUDGETS, _CLUSTERS, oracle=True),
}
