"""What stands in for keys that sparse attention does not read: groups of like keys, made once per key/value head.

Shared by the reference and the kernels, which must group alike to compute the same.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from s2o_inductor.sparse_policy import Geometry


@dataclasses.dataclass(frozen=True)
class Groups:
    """The keys of whole blocks in groups of like keys: what stands in for a tail.

    Attributes:
        member: int64 (..., N), the group of each key, N whole blocks; groups of a block are numbered in a row.
        k: (..., P, D), mean key of each group, P = blocks x clusters.
        variance: (..., P, D), of its keys, per channel.
        v: (..., P, Dv), mean value.
    """

    member: Tensor
    k: Tensor
    variance: Tensor
    v: Tensor


def tail_groups(k: Tensor, v: Tensor, hidden: Tensor | None, geometry: Geometry) -> Groups:
    """Groups the keys of each block by k-means, once for all tiles: a group knows nothing of who reads what.

    Features are keys and values, each scaled to unit variance in its block; centres begin at evenly spaced keys and
    move `rounds - 1` times (Lloyd, 1982). Everything follows from the block alone, so no tile sees a later key, and
    chunks of a prefill group alike. Assignments are made in float32 whatever the dtype, the same for all.

    Args:
        k: (..., S, D).
        v: (..., S, Dv).
        hidden: bool, broadcastable to (..., S), keys in no group; they count nowhere. None hides nothing.
        geometry: sizes; clusters at least 1.
    """
    block, clusters = geometry.block, geometry.clusters
    whole = k.shape[-2] // block * block
    k, v = (x[..., :whole, :].unflatten(-2, (-1, block)) for x in (k, v))
    shown = torch.ones(*k.shape[:-1], 1, dtype=torch.bool, device=k.device)
    if hidden is not None:
        shown = ~hidden[..., :whole].expand(*k.shape[:-3], whole).unflatten(-1, (-1, block))[..., None]
    k, v = k.masked_fill(~shown, 0.0), v.masked_fill(~shown, 0.0)
    features = torch.cat([_unit(k.float(), shown), _unit(v.float(), shown)], dim=-1)
    seeds = ((torch.arange(clusters, device=k.device) + 0.5) * block / clusters).long()
    centres = features[..., seeds, :]
    for step in range(geometry.rounds):
        distance = centres.square().sum(dim=-1)[..., None, :] - 2 * features @ centres.transpose(-1, -2)
        nearest = distance.argmin(dim=-1)
        member = torch.nn.functional.one_hot(nearest, clusters) * shown
        if step < geometry.rounds - 1:
            size = member.sum(dim=-2)[..., None]
            moved = member.to(features.dtype).transpose(-1, -2) @ features / size.clamp(min=1)
            centres = torch.where(size > 0, moved, centres)
    share = member.to(k.dtype) / member.sum(dim=-2, keepdim=True).clamp(min=1)
    mean_k, mean_v = (share.transpose(-1, -2) @ x for x in (k, v))
    spread = share.transpose(-1, -2) @ (k - mean_k.gather(-2, nearest[..., None].expand_as(k))).square()
    numbers = nearest + clusters * torch.arange(whole // block, device=k.device)[:, None]
    return Groups(numbers.flatten(-2), *(x.flatten(-3, -2) for x in (mean_k, spread, mean_v)))


def _unit(x: Tensor, shown: Tensor) -> Tensor:
    """x (..., blocks, block, D) over the root mean square of its deviation from the block's mean."""
    count = shown.sum(dim=(-1, -2), keepdim=True).clamp(min=1)
    centred = (x - x.sum(dim=-2, keepdim=True) / count).masked_fill(~shown, 0.0)
    square = centred.square().sum(dim=(-1, -2), keepdim=True) / (count * x.shape[-1])
    return x / square.clamp(min=torch.finfo(x.dtype).tiny).sqrt()


def groups_within(groups: Groups | None, prefix: slice, geometry: Geometry) -> Groups | None:
    """The groups of one head's keys in `prefix`, which is whole blocks, numbered from 0; None where there are none."""
    if groups is None:
        return None
    first, end = (at // geometry.block * geometry.clusters for at in (prefix.start, prefix.stop))
    members = groups.member[prefix] - first
    return Groups(members, groups.k[first:end], groups.variance[first:end], groups.v[first:end])


def tail_logits(q: Tensor, groups: Groups, left: Tensor, size: Tensor, scale: float, limit: float) -> Tensor:
    """The scores of a tail: log of the mass of each group's keys that were not read, to second order.

    log sum exp(scale q.k) over n keys with mean m and variance s is scale q.m + log n (Jensen's lower bound) plus,
    to second order, scale^2 sum_d q_d^2 s_d / 2 for independent channels; far from flat the expansion overshoots,
    so `limit` caps that term.

    The keys left are not like all keys of their group: the heaviest were read. Of normally distributed scores with
    deviation s, the part below the upper share r has the log mean s^2 / 2 + log(Phi(t - s) / Phi(t)) over that of the
    mean, Phi(t) = 1 - r; for s around 1 that is (1 - 2 sqrt(r)) s^2 / 2 + log(1 - r), which is what is taken, the first
    not below 0: 0.20 for 0.21 at r = 1/16, -0.69 for -0.65 at r = 1/2.

    Args:
        q: (R, D).
        groups: P of them.
        left: (P,), keys not read.
        size: (P,), keys of each, read or not.
        scale: of the scores.
        limit: in nats.

    Returns:
        (R, P), -inf where nothing is left.
    """
    unread = left.to(q.dtype) / size.clamp(min=1)
    shrunk = (1 - 2 * (1 - unread).sqrt()).clamp(min=0.0)
    spread = (q.square() @ groups.variance.T * (scale**2 / 2) * shrunk).clamp(max=limit)
    return q @ groups.k.T * scale + spread + (left * unread).log()
