"""When a tile of queries stops reading its prefix, and from a sample of the prefix a forecast of that.

Shared by the reference, `s2o_inductor.kernels.reference_sparse`, and the kernels' code in torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from s2o_inductor.sparse_policy import Geometry

# Parts of a tile whose last rows vote in a forecast, each for its part. A tile stops when its worst row may, and the
# worst of two, of the parts that rank, is seldom the worst of the tile.
_VOTERS = 8


def stop_after(
    masses: Tensor, remaining: Tensor, sizes: Tensor, rule: str, budget: float, seen: Tensor,
    most: int | None = None, horizon: int = 1,
) -> tuple[int, Tensor]:  # fmt: skip
    """How many bundles a tile reads, and the estimated share of its mass that it then leaves, per row.

    With `gain` the share of the mass so far that bundle u brought:

        "tail"  r gain / (1 + r gain), r = tokens left / tokens of the bundle: the share that is left if later
                tokens weigh as much as the last bundle's. Stop when the worst row's, with r at least `horizon`,
                is at most the budget.
        "gain"  the paper's rule: added mass / mass before it. Stop when its mean over rows is under the budget.

    Args:
        masses: (R, U + 1), the mass of the dense part and of each bundle, relative to one peak per row.
        remaining: (U,), tokens of the order that are left after each bundle.
        sizes: (U,), tokens of each bundle.
        rule: "tail" or "gain".
        budget: the threshold.
        seen: bool (R,), rows that exist and see a key; the others do not vote.
        most: bundles that may be read at all; None is all of them.
        horizon: see `Geometry`.

    Returns:
        bundles read, 0 to U, and the tail estimate (R,) at that point.

    Raises:
        ValueError: there is no such rule.
    """
    if rule not in ("tail", "gain"):
        raise ValueError(f'rule must be "tail" or "gain"; got {rule!r}')
    total = masses.cumsum(dim=1)
    added, before, after = masses[:, 1:], total[:, :-1], total[:, 1:]
    gain = torch.where(after > 0, added / after, 0.0)
    ratio = (remaining / sizes).to(gain.dtype)
    left = ratio * gain / (1 + ratio * gain)
    assumed = ratio.clamp(min=horizon).where(ratio > 0, 0.0) * gain
    nothing = torch.zeros_like(masses[:, 0])
    if not seen.any() or not added.shape[1]:
        return 0, nothing
    if rule == "tail":
        fine = (assumed / (1 + assumed))[seen].amax(dim=0) <= budget
    else:
        fine = torch.where(before > 0, added / before, math.inf)[seen].mean(dim=0) < budget
    fine[-1] = True  # nothing is left
    read = int(fine.to(torch.int8).argmax()) + 1
    read = read if most is None else min(read, most)
    return read, left[:, read - 1].masked_fill(~seen, 0.0)


def expected_share(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, budgets: Sequence[float], low: int, hidden: Tensor,
    geometry: Geometry,
) -> float:  # fmt: skip
    """The share of its prefix that a tile can be expected to read under the rule "tail", mean of its heads.

    The rule is tried on a sample of the prefix, a sixteenth of every block. Its keys are ranked one by one, by
    their share for the mean queries of eight parts of the tile; each stands for as many as there are keys to one of the
    sample, and the last row of each part votes.

    Args:
        q: (G, R, D), the queries of a tile.
        k: (N, D), the prefix, from position `low` on.
        lse: (G, R), log-sum of what the rows read densely.
        scale: of the scores.
        budgets: one for each of the G heads.
        low: first position of the prefix.
        hidden: bool (N,), keys that no row sees.
        geometry: sizes.

    Returns:
        0 to 1; 0 where no key is sampled.
    """
    at = torch.arange(low, low + k.shape[0], device=k.device)
    sampled = (at % geometry.block < max(1, geometry.block // 16)) & ~hidden
    total, count, bundle = int((~hidden).sum()), int(sampled.sum()), geometry.bundle
    if not count:
        return 0.0
    parts = q.tensor_split(min(_VOTERS, q.shape[1]), dim=1)
    ends = torch.tensor([part.shape[1] for part in parts], device=q.device).cumsum(0) - 1
    means = torch.stack([part.mean(dim=1) for part in parts], dim=1).flatten(0, 1)
    shares = (means @ k[sampled].T * scale).softmax(dim=1).mean(dim=0)
    order = shares.argsort(descending=True, stable=True)
    logits = (q[:, ends] @ k[sampled].T * scale)[..., order]
    top = logits.amax(dim=2).maximum(lse[:, ends])
    weights = (logits - top[..., None]).exp() * (total / count)
    starts = torch.arange(0, total, bundle)
    sizes = (total - starts).clamp(max=bundle)
    edges = [int(start) * count // total for start in starts] + [count]
    masses = torch.stack(
        [(lse[:, ends] - top).exp(), *(weights[..., i:j].sum(dim=2) for i, j in itertools.pairwise(edges))], dim=2
    )
    expected = []
    for head, budget in enumerate(budgets):
        read, _ = stop_after(
            masses[head], (total - starts - sizes).to(q.device), sizes.to(q.device), "tail", budget,
            torch.ones_like(ends, dtype=torch.bool), None, geometry.horizon,
        )  # fmt: skip
        expected.append(min(read * bundle, total) / total if budget > 0 else 1.0)
    return sum(expected) / len(expected)
