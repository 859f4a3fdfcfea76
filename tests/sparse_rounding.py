"""How far rounding may move the scores that rank keys, derived: what the order of a kernel is checked against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from s2o_inductor.kernels.tail_groups import Groups
from s2o_inductor.sparse_policy import Geometry

# What sums, exponentials and logarithms in float32 add to the logarithm of a share, whatever the type of the operands.
FLOAT32_NOISE = 1e-4
# Standard deviations of rounding that are allowed for: one of 3.5 million normal numbers lies beyond.
SIGMAS = 5.0


def rounding_of_scores(
    means: Tensor, k: Tensor, scale: float, geometry: Geometry, groups: Groups, hidden: Tensor, dtype: torch.dtype,
    copies: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """How far rounding to `dtype` may move what `reference_sparse.run_scores` returns for these arguments: (N / run,).

    Kernels hold representatives, mean keys and variances in half precision. A rounding changes a number by a relative
    error of standard deviation u / sqrt(3), with u = eps / 2, so a sum of products with n rounded factors each moves by
    u / sqrt(3) sqrt(n sum (q_d k_d)^2): n is 1 for a key, 2 for the mean of a group, 4 for its spread (a square counts
    its factor twice). A logarithm that moves by d changes its exponential by a factor up to exp(d). A score is the
    difference of two such shares, each of which may move by itself, in units of the mass, which moves both.

    With keys and representatives read as `copies`, that is what moves a key's score: see `_rounding_of_copies`.
    """
    if hidden.all():
        return torch.zeros(k.shape[0] // geometry.run)
    deviation = torch.finfo(dtype).eps / 2 / math.sqrt(3)
    size = groups.member[~hidden].bincount(minlength=groups.k.shape[0])
    spread = means.square() @ groups.variance.T * (scale**2 / 2)
    of_groups = means @ groups.k.T * scale + spread.clamp(max=geometry.limit)
    total = (of_groups + size.to(k.dtype).log()).logsumexp(dim=1, keepdim=True)
    square = means.square() * scale**2
    of_key = (square @ k.square().T).sqrt() * deviation
    of_group = 2 * square @ groups.k.square().T
    moves = (spread < 2 * geometry.limit).to(k.dtype)  # far above the limit, a spread is the limit
    of_group += moves * 4 * (square.square() @ groups.variance.square().T) / 4
    of_group = of_group.sqrt() * deviation
    of_mass = ((of_groups - total).exp() * size * of_group).sum(dim=1, keepdim=True)
    key, group, mass = (SIGMAS * x + FLOAT32_NOISE for x in (of_key, of_group, of_mass))
    if copies is not None:
        key = _rounding_of_copies(means * scale, k, geometry, groups, total, (dtype, copies)) + FLOAT32_NOISE
    key, group, mass = key.expm1(), group.expm1(), mass.expm1()
    share = (means @ k.T * scale - total).exp()
    expected, group = ((of_groups - total).exp()[:, groups.member], group[:, groups.member])
    moved = share * key + expected * group + (share - expected).abs() * mass
    moved = moved.mean(dim=0).masked_fill(hidden, 0.0).unflatten(0, (-1, geometry.run)).amax(dim=1)
    beside = torch.nn.functional.pad(moved, (1, 1))
    return moved.maximum(beside[:-2].maximum(beside[2:]) / 2)


def _rounding_of_copies(
    means: Tensor, k: Tensor, geometry: Geometry, groups: Groups, total: Tensor, dtypes: tuple[torch.dtype, torch.dtype]
) -> Tensor:
    """How far a product moves when both factors are rounded to the second of `dtypes`, (M, N) in nats.

    A key is rounded less the centre c of its block, and its score is r.c - total plus the product of what was rounded:
    the deviation of `rounding_of_scores` with k - c for k and n = 2, for r that were of the first type before. Below
    the least normal number the error is at most half a step, in units of the copies. The first part has two bfloat16
    terms, 16 bits; tensor cores add float8 products to it 32 channels at a time, and keep 13 bits behind the leading
    one of the largest term (DeepSeek-V3, arXiv 2412.19437, section 3.5.2).
    """
    from s2o_inductor.kernels.triton_sparse_scores import KEY_UNIT

    dtype, copies = dtypes
    centre = groups.k.unflatten(0, (-1, geometry.clusters)).mean(dim=1).repeat_interleave(geometry.block, dim=0)
    away, unit, kind = k - centre, KEY_UNIT.value, torch.finfo(copies)
    step = kind.smallest_normal * kind.eps / 2
    of_keys = (away * kind.eps / 2).square() + (step * unit) ** 2
    of_means = means.square() * ((kind.eps / 2) ** 2 + (torch.finfo(dtype).eps / 2) ** 2)
    of_means += (step / unit / math.log2(math.e)) ** 2
    deviation = ((means.square() @ of_keys.T + of_means @ away.square().T) / 3).sqrt()
    first = (means @ centre.T - total).abs()
    lost = first * 2.0**-15
    if kind.bits == 8:
        lost += math.ceil(k.shape[1] / 32) * 2.0**-13 * (first + means.abs() @ away.abs().T)
    return SIGMAS * deviation + lost
