"""Exact attention: the facts of one call, the choice of a kernel, and what all kernels share afterwards.

A route computes softmax(scale * q k^T, masked) v and its gradients, and gives output 0 with lse -inf
for a row that sees no key. Sinks and the other meanings of such a row are applied here, once for all
devices. Kernels are imported by the first call that needs them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from s2o_inductor.kernels import mask as masks
from s2o_inductor.mask_spec import MaskSpec


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the choice of a kernel may depend on: nothing that a tensor holds.

    Attributes:
        device: device type, "cpu" or "cuda".
        capability: CUDA compute capability, None elsewhere.
        dtype: of q, k and v.
        head_dim, value_dim: D of q and k, Dv of v.
        batch, queries, keys, query_heads, kv_heads: B, Sq, Sk, Hq, Hkv.
        lower, upper: the band lower <= k - q <= upper; None where it hides nothing at these sizes.
        terms: whether the mask has terms that tensors decide (padding, documents, ...).
        dense: "" without a dense mask, else "bool" or "additive".
        dropout: whether weights are dropped.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    batch: int
    queries: int
    keys: int
    query_heads: int
    kv_heads: int
    lower: int | None
    upper: int | None
    terms: bool
    dense: str
    dropout: bool


def choose_route(facts: Facts) -> str:
    """The name of the kernel for a call with these facts.

    On CPU "cpu-flash" is one call of torch's fused kernel, "cpu-blocks" that kernel on blocks of
    query rows over the keys they see, and "cpu-math" the same blocks in matrix products. For the
    routes of CUDA see `s2o_inductor.kernels.cuda.choose_route`.

    Raises:
        ValueError: there is no kernel for the device.
    """
    if facts.device == "cpu":
        if facts.dropout:
            return "cpu-math"
        whole = facts.lower is None and facts.upper in (None, 0)
        return "cpu-flash" if whole and not facts.terms and not facts.dense else "cpu-blocks"
    if facts.device == "cuda":
        from s2o_inductor.kernels import cuda

        return cuda.choose_route(facts)
    raise ValueError(f"s2o::attention runs on cpu and cuda; got tensors on {facts.device!r}")


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of attention, its mask reduced to what a kernel reads.

    Attributes:
        spec: the mask; its expressions are already evaluated into the fields below.
        lower, upper: the band lower <= k - q <= upper; None where it hides nothing at these sizes.
        mask: the dense mask (B or 1, Hq or 1, Sq or 1, Sk or 1), boolean or additive.
        plan: what `s2o::attention_mask` returned; empty when the band is all there is.
        leaves, params: what the expressions were evaluated with.
        sinks, seed, scale, dropout_p: as in `s2o_inductor.ops.attention`.
        may_be_empty: whether some row may see no key, as far as sizes and band tell.
        route: name of the kernel that runs it.
    """

    spec: MaskSpec
    lower: int | None
    upper: int | None
    mask: Tensor | None
    plan: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    params: tuple[int, ...]
    sinks: Tensor | None
    seed: Tensor | None
    scale: float
    dropout_p: float
    may_be_empty: bool
    route: str

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        leaves: Sequence[Tensor],
        plan: Sequence[Tensor],
        params: Sequence[int],
        spec: MaskSpec,
        sinks: Tensor | None,
        seed: Tensor | None,
        scale: float,
        dropout_p: float,
    ) -> Call:
        """The call that these operands of `s2o::attention` describe; builds the plan where one is needed and missing.

        Raises:
            ValueError: the mask does not broadcast, the plan is not one, dropout is out of range or
                has no seed, or an expression of the spec is outside its language.
        """
        batch, query_heads, queries, head_dim = q.shape
        keys = k.shape[2]
        scores = (batch, query_heads, queries, keys)
        if mask is not None and any(m not in (1, s) for m, s in zip(mask.shape, scores, strict=True)):
            raise ValueError(f"a mask must broadcast to (B, Hq, Sq, Sk) = {scores}; got {tuple(mask.shape)}")
        if len(plan) not in (0, 4):
            raise ValueError(f"a plan is the 4 tensors of s2o::attention_mask, or nothing; got {len(plan)} tensors")
        if not 0.0 <= dropout_p <= 1.0:
            raise ValueError(f"dropout_p is a probability; got {dropout_p}")
        if dropout_p > 0.0 and seed is None:
            raise ValueError(f"dropout_p = {dropout_p} needs a seed, an int64 tensor with one element; got None")
        lower, upper = masks.band(spec, params)
        may_be_empty = not spec.is_band or band_leaves_empty_rows(lower, upper, queries, keys)
        if lower is not None and lower <= 1 - queries:
            lower = None
        if upper is not None and upper >= keys - 1:
            upper = None
        if spec.is_band:
            plan = ()
        elif not plan:
            plan = masks.plan(mask, leaves, params, spec, batch, queries, keys, q.device)
        facts = Facts(
            device=q.device.type,
            capability=torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None,
            dtype=q.dtype,
            head_dim=head_dim,
            value_dim=v.shape[3],
            batch=batch,
            queries=queries,
            keys=keys,
            query_heads=query_heads,
            kv_heads=k.shape[1],
            lower=lower,
            upper=upper,
            terms=_has_terms(spec),
            dense="" if mask is None else "bool" if mask.dtype == torch.bool else "additive",
            dropout=dropout_p > 0.0,
        )
        route = choose_route(facts)
        tensors = tuple(plan), tuple(leaves)
        return cls(
            spec, lower, upper, mask, *tensors, tuple(params), sinks, seed, scale, dropout_p, may_be_empty, route
        )  # fmt: skip

    @property
    def has_terms(self) -> bool:
        """Whether the plan's query_terms and key_terms hide anything."""
        return _has_terms(self.spec)

    @property
    def replaces_empty_rows(self) -> bool:
        """Whether rows without a key may exist and mean something else than zero."""
        return self.may_be_empty and self.spec.empty != "zero"


def _has_terms(spec: MaskSpec) -> bool:
    return any((spec.keys, spec.rows, spec.equal, spec.at_most))


def band_leaves_empty_rows(lower: int | None, upper: int | None, queries: int, keys: int) -> bool:
    """Whether lower <= k - q <= upper leaves some query of these sizes without a key."""
    if queries == 0:
        return False
    if keys == 0 or (lower is not None and upper is not None and lower > upper):
        return True
    first_sees_none = upper is not None and upper < 0
    last_sees_none = lower is not None and queries - 1 + lower > keys - 1
    return first_sees_none or last_sees_none


def _module(device: str) -> Any:
    """The kernels of a device: `forward(call, q, k, v)` and `backward(call, grad, q, k, v, output, lse)`."""
    if device == "cpu":
        from s2o_inductor.kernels import cpu

        return cpu
    from s2o_inductor.kernels import cuda

    return cuda


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """output (B, Hq, Sq, Dv), stored as (B, Sq, Hq, Dv), and lse (B, Hq, Sq), contiguous.

    lse is float32, float64 for float64 inputs, so that gradients keep that precision.
    """
    output, lse = _module(q.device.type).forward(call, q, k, v)
    return finish(call, output, lse, v)


def finish(call: Call, output: Tensor, lse: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A kernel's output and lse with sinks, the meaning of empty rows and the strides that `forward` promises."""
    lse = lse.to(lse_dtype(v.dtype))
    if call.sinks is not None:
        total = torch.logaddexp(lse, call.sinks.to(lse.dtype)[:, None])
        # Without a key the output is 0 already, and with a sink of -inf the difference would be NaN.
        share = (lse - total).masked_fill(lse == float("-inf"), float("-inf")).exp()
        output, lse = output.mul_(share[..., None]), total
    if call.replaces_empty_rows and v.shape[2]:  # without keys every spelling of attention sums nothing
        output = _fill_empty_rows(call, output, lse, v)
    return heads_last(output), _packed(lse)


def _packed(lse: Tensor) -> Tensor:
    """(B, H, S) with the strides of a new tensor; `contiguous` leaves those of dimensions of size 1 as they are."""
    _, heads, length = (max(size, 1) for size in lse.shape)
    return lse if lse.stride() == (heads * length, length, 1) else lse.clone(memory_format=torch.contiguous_format)


def _fill_empty_rows(call: Call, output: Tensor, lse: Tensor, v: Tensor) -> Tensor:
    nothing = (lse == float("-inf"))[..., None]
    if nothing.device.type == "cpu" and not bool(nothing.any()):
        return output
    if call.spec.empty == "nan":
        return output.masked_fill(nothing, float("nan"))
    mean = v.mean(dim=2, keepdim=True).repeat_interleave(output.shape[1] // v.shape[1], dim=1)
    return torch.where(nothing, mean, output)


def backward(
    call: Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, stored as (B, S, H, D), and of the sinks, an empty tensor without sinks.

    With sinks, the flash backward fed the output and lse of the whole softmax gives the right
    gradients of q, k and v: a sink is a key whose value is zero.
    """
    grad_sinks = q.new_zeros((0,), dtype=torch.float32)
    if call.sinks is not None:
        weight = (call.sinks.to(lse.dtype)[:, None] - lse).exp().masked_fill(lse == float("-inf"), 0.0)
        # A row whose output was replaced has weight 0, but its output may be NaN.
        along = (grad.to(lse.dtype) * output.to(lse.dtype)).sum(dim=-1).masked_fill(weight == 0.0, 0.0)
        grad_sinks = -(weight * along).sum(dim=(0, 2)).to(call.sinks.dtype)
    extra: tuple[Tensor | None, ...] = (None, None, None)
    if call.replaces_empty_rows and k.shape[2]:
        nothing = (lse == float("-inf"))[..., None]
        if nothing.device.type != "cpu" or bool(nothing.any()):  # a GPU would have to be waited for
            extra = _through_empty_rows(call, nothing, grad, q, k, v, output)
            output = output.masked_fill(nothing, 0.0)
    grads = _module(q.device.type).backward(call, grad, q, k, v, output, lse)
    total = (one if more is None else one + more.to(one.dtype) for one, more in zip(grads, extra, strict=True))
    grad_q, grad_k, grad_v = (heads_last(one) for one in total)
    return grad_q, grad_k, grad_v, grad_sinks


def _through_empty_rows(
    call: Call, nothing: Tensor, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """What rows without a key add to the gradients of q, k and v, broadcastable; None adds nothing.

    A mean hands each value grad / Sk. A row of NaN weights hands NaN to all values. Neither reaches
    q and k, whose scores the source replaced by a constant; a "shifted" row's scores it only added
    to, so that with weights p = 1 / Sk the score gradient p (grad . v - grad . output) flows on.
    Summed over keys or rows first, that takes a Dv x D matrix per head and no Sq x Sk one.
    """
    kv_heads, keys, wide = v.shape[1], v.shape[2], lse_dtype(q.dtype)
    lost = torch.where(nothing, grad, 0.0).to(wide).unflatten(1, (kv_heads, -1))  # (B, Hkv, G, Sq, Dv)
    if call.spec.empty == "nan":
        total = torch.where(nothing, float("nan"), lost.new_zeros(())).expand(grad.shape).unflatten(1, (kv_heads, -1))
        return None, None, total.sum(dim=(2, 3))[:, :, None]
    grad_v = lost.sum(dim=(2, 3))[:, :, None] / keys
    if call.spec.empty == "mean":
        return None, None, grad_v
    q_rows = q.to(wide).unflatten(1, (kv_heads, -1))
    k_wide, v_wide = k.to(wide), v.to(wide)
    along = (lost * output.to(wide).unflatten(1, (kv_heads, -1))).sum(dim=-1, keepdim=True)
    factor = call.scale / keys
    from_values = (v_wide.transpose(-1, -2) @ k_wide)[:, :, None]  # (B, Hkv, 1, Dv, D)
    grad_q = factor * (lost @ from_values - along * k_wide.sum(dim=2)[:, :, None, None])
    from_rows = (lost.transpose(-1, -2) @ q_rows).sum(dim=2)  # (B, Hkv, Dv, D)
    grad_k = factor * (v_wide @ from_rows - (along * q_rows).sum(dim=(2, 3))[:, :, None])
    return grad_q.flatten(1, 2), grad_k, grad_v


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Data type of the log-sum-exp for inputs of a data type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def heads_last(x: Tensor) -> Tensor:
    """x (B, H, S, D) with the strides of a contiguous (B, S, H, D); x itself when it has them."""
    _, heads, length, width = (max(size, 1) for size in x.shape)
    strides = (length * heads * width, width, heads * width, 1)
    return x if x.stride() == strides else empty_heads_last(x.shape, x).copy_(x)


def empty_heads_last(shape: Sequence[int], like: Tensor) -> Tensor:
    """An unwritten (B, H, S, D) in the type and place of `like`, with the strides of a contiguous (B, S, H, D)."""
    batch, heads, length, width = shape
    return torch.empty(batch, length, heads, width, dtype=like.dtype, device=like.device).transpose(1, 2)
