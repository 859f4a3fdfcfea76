"""What routed experts and a LatentMoE layer mean, in plain torch: the oracle for `s2o::moe_experts`.

Every step keeps the dtype of its inputs, except for the weighted sum, which torch code too makes
in at least float32. The same functions so give the truth (float64 inputs) and the error that
ordinary torch makes in a low precision. Differentiable by ordinary autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from s2o_inductor.moe_spec import ExpertSpec


def hidden(pre: Tensor, spec: ExpertSpec) -> Tensor:
    """The activation: (..., halves * I) -> (..., I); "separate" is laid out as "half" here."""
    limit = float("inf") if spec.limit is None else spec.limit
    if spec.gate == "none":
        return _activate(pre.clamp(max=limit), spec)
    if spec.gate == "interleaved":
        gate, up = pre[..., ::2], pre[..., 1::2]
    else:
        gate, up = pre.chunk(2, dim=-1)
        if spec.gate == "half_swapped":
            gate, up = up, gate
    return _activate(gate.clamp(max=limit), spec) * (up.clamp(-limit, limit) + spec.shift)


def _activate(x: Tensor, spec: ExpertSpec) -> Tensor:
    if spec.activation == "identity":
        return x
    if spec.activation in ("relu", "relu2"):
        return x.relu() if spec.activation == "relu" else x.relu().square()
    if spec.activation == "silu":
        return x * torch.sigmoid(spec.alpha * x)
    return F.gelu(x, approximate="tanh" if spec.activation == "gelu_tanh" else "none")


def experts(
    z: Tensor,
    w1: Tensor,
    w2: Tensor,
    ids: Tensor,
    p: Tensor,
    spec: ExpertSpec,
    *,
    w3: Tensor | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
) -> Tensor:
    """u[t] = sum over k of p[t, k] * expert ids[t, k] of z[t], with p where `spec.score` puts it.

    Args:
        z: (T, l), floating point.
        w1: (E, halves * I, l), or (E, I, l) with gate "separate"; last two axes swapped if `spec.transposed`.
        w2: (E, l, I), likewise.
        ids: (T, K), integers; a choice outside 0 ... E - 1 contributes nothing and gets no gradient.
        p: (T, K), floating point.
        spec: the formula of an expert.
        w3: (E, I, l), the up projection, exactly with gate "separate".
        b1: (E, halves * I).
        b2: (E, l).

    Returns:
        (T, l) in z's dtype.
    """
    if spec.transposed:
        w1, w2, w3 = w1.mT, w2.mT, None if w3 is None else w3.mT
    if w3 is not None:
        w1 = torch.cat([w1, w3], dim=1)
    total = z.new_zeros(z.shape, dtype=z.dtype if z.dtype == torch.float64 else torch.float32)
    for expert in range(w1.shape[0]):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        x, weight = z[token], p[token, choice, None]
        pre = F.linear(x * weight.to(x.dtype) if spec.score == "input" else x, w1[expert])
        pre = pre if b1 is None else pre + b1[expert]
        h = hidden(pre, spec)
        y = F.linear(h * weight.to(h.dtype) if spec.score == "hidden" else h, w2[expert])
        y = y if b2 is None else y + b2[expert]
        y = y.to(total.dtype)
        total = total.index_add(0, token, y * weight.to(y.dtype) if spec.score == "output" else y)
    return total.to(z.dtype)


def latent_moe(
    x: Tensor,
    router: Tensor,
    w_down: Tensor,
    w1: Tensor,
    w2: Tensor,
    w_up: Tensor,
    spec: ExpertSpec,
    *,
    top_k: int,
    correction: Tensor | None = None,
    scale: float = 1.0,
    shared: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A LatentMoE layer (arXiv 2601.18089, router as in the Nemotron 3 Super report, arXiv 2604.12374).

    The router and the shared expert see the full width d, the routed experts the latent width l:

        s = sigmoid(router x),  S = top k of s + correction,  p = scale * s[S] / (sum s[S] + 1e-20)
        y = w_up sum over S of p * expert(w_down x) + shared(x)

    Args:
        x: (T, d).
        router: (E, d); its product is made in at least float32.
        w_down: (l, d).
        w1: as in `experts`.
        w2: as in `experts`.
        w_up: (d, l).
        spec: the formula of routed and shared experts.
        top_k: experts per token.
        correction: (E,), takes part in the choice alone.
        scale: of the routing weights.
        shared: (halves * J, d) and (d, J) of the shared expert.

    Returns:
        (T, d) in x's dtype.
    """
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    scores = torch.sigmoid(F.linear(x.to(wide), router.to(wide)))
    choice = scores if correction is None else scores + correction
    ids = choice.topk(top_k, dim=-1).indices
    p = scores.gather(1, ids)
    p = scale * p / (p.sum(dim=-1, keepdim=True) + 1e-20)
    y = F.linear(experts(F.linear(x, w_down), w1, w2, ids, p, spec), w_up)
    if shared is not None:
        y = y + F.linear(hidden(F.linear(x, shared[0]), spec), shared[1])
    return y
