"""What attention means, in plain torch: the oracle that every kernel is compared against.

Every step keeps the dtype of its inputs, so the same function gives the truth (float64 inputs) and
the error that ordinary torch makes in a low precision (the same inputs in bfloat16).
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    empty: str = "zero",
    dropout_keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + bias, over the visible keys) v, and the log-sum-exp of its scores.

    Differentiable in q, k, v, bias and sinks by ordinary autograd.

    Args:
        q: (B, Hq, Sq, D), floating point.
        k: (B, Hkv, Sk, D); query head h reads key/value head h // (Hq / Hkv).
        v: (B, Hkv, Sk, Dv).
        visible: boolean, broadcastable to (B, Hq, Sq, Sk), True where the key is seen.
        bias: floating point, broadcastable likewise, added to the scaled scores; -inf hides.
        scale: defaults to D ** -0.5.
        sinks: (Hq,), one logit per query head that joins the softmax and has no value.
        empty: output of a row that sees no key and has no sink: "zero", "mean" (of all values),
            "shifted" (the same, with gradients to q and k) or "nan"; see `MaskSpec.empty`.
        dropout_keep: boolean, (B, Hq, Sq, Sk), the weights that survive dropout.
        dropout_p: probability of dropping; survivors are divided by 1 - dropout_p.

    Returns:
        output (B, Hq, Sq, Dv) and lse (B, Hq, Sq), natural logarithm, sinks included, -inf where
        there is nothing to sum.

    Raises:
        ValueError: `empty` is none of these.
    """
    if empty not in ("zero", "mean", "shifted", "nan"):
        raise ValueError(f'empty must be "zero", "mean", "shifted" or "nan"; got {empty!r}')
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    raw = scores
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    lse = scores.logsumexp(dim=-1)
    # A row without a key takes finite scores through the softmax, so that no NaN enters its gradient.
    nothing = (lse == float("-inf"))[..., None]
    weights = scores.masked_fill(nothing, 0.0).softmax(dim=-1).masked_fill(nothing, 0.0)
    weights = weights[..., : k.shape[2]]
    if dropout_keep is not None:
        weights = weights * dropout_keep / (1.0 - dropout_p)
    output = weights @ v
    if k.shape[2] == 0:  # without keys every spelling of attention sums nothing
        return output, lse
    if empty == "mean":
        output = torch.where(nothing, v.mean(dim=2, keepdim=True), output)
    elif empty == "shifted":
        # Scores that differ by less than the rounding of the number added to them: equal, yet they
        # are what the weights are differentiated through.
        uniform = raw - raw.detach()
        output = torch.where(nothing, uniform.softmax(dim=-1) @ v, output)
    elif empty == "nan":
        output = output.masked_fill(nothing, float("nan"))
    return output, lse
