"""Mixtures of experts that stay with Inductor unless option `experts` says True: what it runs faster, by measurement.

BENCHMARKS.md has the figures: "Mixture of experts on CPU" and, for CUDA, "Routed experts on a GPU".
"""

from __future__ import annotations

import math

import torch
from torch._inductor import config as inductor_config

from s2o_inductor.passes.graph_utils import fake
from s2o_inductor.passes.records import ExpertsSite
from s2o_inductor.passes.verify import hint

# Below so many tokens Inductor's loops over gathered matrices, fused and without a copy, are the faster ones on CPU.
FEW_TOKENS = 16
_GROUPED = ("grouped_mm", "_grouped_mm")
_GATHERED = ("bmm", "matmul", "einsum")


# Seconds that the products must keep a GPU busy, else calls wait for the host, where launches of the operator take more
# time than those of Inductor's code; and bytes and multiply-adds in a second, an H100's, that tell how long they do.
_HOST_SECONDS = 1e-3
_BYTES, _PRODUCTS = 3e12, 2.5e14


def better_left(site: ExpertsSite) -> str | None:
    """Why a site stays as it is where the user does not ask for it; None where it is rewritten.

    Settings of Inductor are read as they are for the graph that the site is in.
    """
    weights, tokens = fake(site.last), fake(site.tokens)
    assert weights is not None and tokens is not None
    names = {getattr(node.target, "__name__", "").split(".")[0] for node in site.region}
    grouped = names.intersection(_GROUPED)
    gathered = not site.dense and not isinstance(site.w2, tuple) and names.intersection(_GATHERED)
    if weights.device.type == "cuda":
        if (grouped or gathered) and not inductor_config.triton.cudagraphs and _waits_for_the_host(site, weights):
            return (
                "so few tokens keep a GPU waiting for the host, and launching Inductor's code takes it less time; CUDA "
                "graphs (mode='reduce-overhead') or option experts=True rewrite them"
            )
        return None
    if weights.device.type != "cpu":
        return None
    training = site.needs_gradient
    if training and weights.dtype != torch.float32 and grouped:
        return "Inductor trains grouped products in half precision faster on CPU; option experts=True rewrites them"
    number = math.prod(tokens.shape[:-1])
    if gathered and not training and isinstance(number, int) and number < FEW_TOKENS:
        return f"Inductor runs {number} tokens on gathered matrices faster on CPU; option experts=True rewrites them"
    return None


def _waits_for_the_host(site: ExpertsSite, weights: torch.Tensor) -> bool:
    """Whether a GPU is done with the site's products before the host has launched them, at the sizes captured."""
    choices = fake(site.ids)
    if choices is None or any(isinstance(n, torch.SymInt) and not n.node.has_hint() for n in choices.shape):
        return False
    rows = math.prod(hint(size) for size in choices.shape)
    of_expert = math.prod(hint(size) for size in weights.shape[-2:]) * (site.spec.halves + 1)
    read = min(rows, site.experts) * of_expert * weights.itemsize
    return max(read / _BYTES, rows * of_expert / _PRODUCTS) < _HOST_SECONDS
