"""Mixtures of experts that stay with Inductor unless option `experts` says True: what it runs faster, by measurement.

BENCHMARKS.md, "Mixture of experts on CPU", has the figures.
"""

from __future__ import annotations

import math

import torch

from s2o_inductor.passes.graph_utils import fake
from s2o_inductor.passes.records import ExpertsSite

# Below so many tokens Inductor's loops over gathered matrices, fused and without a copy, are the faster ones on CPU.
FEW_TOKENS = 16
_GROUPED = ("grouped_mm", "_grouped_mm")
_GATHERED = ("bmm", "matmul", "einsum")


def better_left(site: ExpertsSite) -> str | None:
    """Why a site stays as it is where the user does not ask for it; None where it is rewritten."""
    weights, tokens = fake(site.last), fake(site.tokens)
    assert weights is not None and tokens is not None
    if weights.device.type != "cpu":
        return None
    names = {getattr(node.target, "__name__", "").split(".")[0] for node in site.region}
    training = site.needs_gradient
    if training and weights.dtype != torch.float32 and names.intersection(_GROUPED):
        return "Inductor trains grouped products in half precision faster on CPU; option experts=True rewrites them"
    number = math.prod(tokens.shape[:-1])
    gathered = not site.dense and not isinstance(site.w2, tuple) and names.intersection(_GATHERED)
    if gathered and not training and isinstance(number, int) and number < FEW_TOKENS:
        return f"Inductor runs {number} tokens on gathered matrices faster on CPU; option experts=True rewrites them"
    return None
