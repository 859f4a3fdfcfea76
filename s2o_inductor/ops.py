"""The operators that rewritten graphs call: schema, fake kernels, autograd, autocast.

Importing this module needs torch alone; kernels are imported by the first call on a device. All
outputs have shapes and strides that follow from input *shapes* alone, never from values or input
strides, so graphs stay free of host synchronisation and of stride surprises: Inductor may choose
any strides for an operand of a node that a pass inserted.

    attention_mask      the tensors that a mask spec needs at run time, once per mask
    attention           softmax(scale * q k^T, masked) v, exact, and its log-sum-exp
    attention_backward  its gradients
    sparse_attention    the same, approximated as far as a policy allows; no gradients
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from s2o_inductor import sparse_policy
from s2o_inductor.dispatch import NAMESPACE, register_autograd
from s2o_inductor.mask_spec import parse

log = logging.getLogger("s2o_inductor")
# Kernels take every stride as it comes, so Inductor need not make copies.
_TAGS = (torch.Tag.flexible_layout,)
# A tile table row is (first, first_full, end_full, end): see kernels/mask.py.
TILE_QUERIES = 128
TILE_KEYS = 64

torch.library.define(
    f"{NAMESPACE}::attention_mask",
    "(Tensor? mask, Tensor[] leaves, SymInt[] params, str spec, SymInt batch, SymInt queries, SymInt keys, "
    "Device device) -> (Tensor query_terms, Tensor key_terms, Tensor row_tiles, Tensor key_tiles)",
    tags=_TAGS,
)
torch.library.define(
    f"{NAMESPACE}::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor[] leaves, Tensor[] plan, SymInt[] params, str spec, "
    "Tensor? sinks, Tensor? seed, float scale, float dropout_p, str site) -> (Tensor output, Tensor lse)",
    tags=_TAGS,
)
torch.library.define(
    f"{NAMESPACE}::attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor output, Tensor lse, Tensor? mask, Tensor[] leaves, "
    "Tensor[] plan, SymInt[] params, str spec, Tensor? sinks, Tensor? seed, float scale, float dropout_p, str site) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_sinks)",
    tags=_TAGS,
)

torch.library.define(
    f"{NAMESPACE}::sparse_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor[] leaves, Tensor[] plan, SymInt[] params, str spec, Tensor? sinks, "
    "float scale, str policy, str site) -> (Tensor output, Tensor lse)",
    tags=_TAGS,
)

# How each site really ran, by site name: (route, mask spec). Written at the first call of a
# compiled graph, so that a report stays true when a cached artifact skipped every pass.
observed: dict[str, tuple[str, str]] = {}
# What the last call of each sparse site read, a `kernels.sparse.Statistics`; its tensors are not waited for.
statistics: dict[str, Any] = {}
# The sizes of that call, None for packed documents, whose tiles only the device knows.
extents: dict[str, sparse_policy.Extent | None] = {}
# Under a policy with candidates, what every call of each site found: lists of `kernels.sparse.Trial`.
trials: dict[str, list[Any]] = {}
RECORDS: tuple[dict[str, Any], ...] = (observed, statistics, extents, trials)


def forget() -> list[dict[str, Any]]:
    """Empties `RECORDS` and returns what they held."""
    held = [dict(record) for record in RECORDS]
    for record in RECORDS:
        record.clear()
    return held


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    leaves: Sequence[Tensor] = (),
    plan: Sequence[Tensor] = (),
    params: Sequence[int] = (),
    spec: str = "",
    sinks: Tensor | None = None,
    seed: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    site: str = "",
) -> tuple[Tensor, Tensor]:
    """Exact attention, softmax(scale * q k^T + mask) v, on the fastest kernel that is right for it.

    Args:
        q: (B, Hq, Sq, D), any strides, float16, bfloat16 or float32.
        k: (B, Hkv, Sk, D); query head h reads key/value head h // (Hq / Hkv).
        v: (B, Hkv, Sk, Dv).
        mask: boolean (True is visible) or additive, 4-D, broadcastable to (B, Hq, Sq, Sk); exactly
            when the spec says `dense`.
        leaves: tensors that the spec's expressions name L0, L1, ...
        params: integers that they name p0, p1, ...
        spec: the mask as a predicate, the text of a `s2o_inductor.mask_spec.MaskSpec`.
        plan: what `s2o::attention_mask` returned for that mask; built here when left out.
        sinks: (Hq,), one logit per query head that joins the softmax without a value.
        seed: int64 (1,), needed when dropout_p > 0: the dropout pattern is a function of it.
        scale: defaults to D ** -0.5.
        dropout_p: probability of zeroing a weight.
        site: name under which a report finds this call.

    Returns:
        output (B, Hq, Sq, Dv) in q's dtype and lse (B, Hq, Sq) in float32 (float64 for float64 inputs),
        natural logarithm, sinks included, -inf for a row that sees no key and has no sink. lse carries
        no gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return torch.ops.s2o.attention(
        q, k, v, mask, list(leaves), list(plan), list(params), spec, sinks, seed, scale, dropout_p, site
    )


def visible_rows(
    spec: str, leaves: Sequence[Tensor], params: Sequence[int], batch: int, queries: int, keys: int, rows: Tensor
) -> Tensor:
    """What a predicate sees from some query positions, for verification: bool (B or 1, 1, len(rows), Sk)."""
    from s2o_inductor.kernels import mask

    return mask.evaluate(parse(spec), None, leaves, params, batch, queries, keys, rows.device, rows)


def check_operands(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, spec: str) -> None:
    """Raises ValueError unless the operands of `attention` fit together; reads shapes and dtypes alone."""
    if parse(spec).dense != (mask is not None):
        given = "no mask" if mask is None else f"a mask {tuple(mask.shape)}"
        raise ValueError(f"a mask tensor and a spec with dense=True go together; got {given} and spec {spec!r}")
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ValueError(f"attention needs 4-D q, k and v; got {q.dim()}-D, {k.dim()}-D and {v.dim()}-D")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v need one dtype; got {q.dtype}, {k.dtype} and {v.dtype}: cast them first")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k and v need one device; got {q.device}, {k.device} and {v.device}")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"attention supports float16, bfloat16, float32 and float64; got {q.dtype}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "attention needs q (B, Hq, Sq, D), k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv); got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"query heads must be a multiple of key/value heads; got {q.shape[1]} and {k.shape[1]}")
    if mask is not None and (mask.dim() != 4 or not (mask.dtype == torch.bool or mask.is_floating_point())):
        raise ValueError(f"a mask is 4-D, boolean or floating point; got {mask.dim()}-D {mask.dtype}")
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks need one logit per query head, ({q.shape[1]},); got {tuple(sinks.shape)}")


def _attention_impl(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, leaves: list[Tensor], plan: list[Tensor],
    params: list[int], spec: str, sinks: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float, site: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from s2o_inductor.kernels import dense

    check_operands(q, k, v, mask, sinks, spec)
    call = dense.Call.of(q, k, v, mask, leaves, plan, params, parse(spec), sinks, seed, scale, dropout_p)
    if site and observed.get(site) is None:
        observed[site] = (call.route, spec)
    return dense.forward(call, q, k, v)


def _attention_backward_impl(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, mask: Tensor | None,
    leaves: list[Tensor], plan: list[Tensor], params: list[int], spec: str, sinks: Tensor | None,
    seed: Tensor | None, scale: float, dropout_p: float, site: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from s2o_inductor.kernels import dense

    call = dense.Call.of(q, k, v, mask, leaves, plan, params, parse(spec), sinks, seed, scale, dropout_p)
    return dense.backward(call, grad, q, k, v, output, lse)


def _attention_mask_impl(
    mask: Tensor | None, leaves: list[Tensor], params: list[int], spec: str, batch: int, queries: int, keys: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from s2o_inductor.kernels import mask as mask_kernels

    return mask_kernels.plan(mask, leaves, params, parse(spec), batch, queries, keys, device)


@functools.cache
def _say_approximate() -> None:
    """Once per process, at the first approximate result: also where a compiled graph came out of a cache."""
    log.warning(
        "s2o: attention over long sequences is approximated where no gradients are needed; what it read is in "
        "s2o_inductor.last_report(). options={'budget': 0} makes it exact."
    )


def _sparse_attention_impl(
    q: Tensor, k: Tensor, v: Tensor, leaves: list[Tensor], plan: list[Tensor], params: list[int], spec: str,
    sinks: Tensor | None, scale: float, policy: str, site: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from s2o_inductor.kernels import dense, sparse

    check_operands(q, k, v, None, sinks, spec)
    call = dense.Call.of(q, k, v, None, leaves, plan, params, parse(spec), sinks, None, scale, 0.0)
    output, lse, route, read = sparse.forward(call, q, k, v, sparse_policy.parse(policy))
    if isinstance(read, sparse.Statistics):
        _say_approximate()
    if site:
        # A site whose lengths vary is reported as what it was at its most approximate.
        if read is not None or site not in observed:
            observed[site] = (route, spec)
        if isinstance(read, list):
            trials.setdefault(site, []).append(read)
        elif read is not None:
            statistics[site] = read
            band = sparse_policy.Extent.of_band(q.shape[2], k.shape[2], call.lower, call.upper)
            extents[site] = band if call.spec.equal is None else None
    return output, lse


for _name, _impl in (
    ("attention", _attention_impl),
    ("sparse_attention", _sparse_attention_impl),
    ("attention_backward", _attention_backward_impl),
    ("attention_mask", _attention_mask_impl),
):
    torch.library.impl(f"{NAMESPACE}::{_name}", "CompositeExplicitAutograd", _impl)


def _like_heads_last(x: Tensor, heads: Any, length: Any, width: Any) -> Tensor:
    """An empty (B, heads, length, width) whose memory is (B, length, heads, width): what projections read."""
    return x.new_empty(x.shape[0], length, heads, width).transpose(1, 2)


@torch.library.register_fake(f"{NAMESPACE}::attention")
def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, leaves: list[Tensor], plan: list[Tensor],
    params: list[int], spec: str, sinks: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float, site: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_operands(q, k, v, mask, sinks, spec)
    output = _like_heads_last(q, q.shape[1], q.shape[2], v.shape[3])
    return output, q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::sparse_attention")
def _sparse_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, leaves: list[Tensor], plan: list[Tensor], params: list[int], spec: str,
    sinks: Tensor | None, scale: float, policy: str, site: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _attention_fake(q, k, v, None, leaves, plan, params, spec, sinks, None, scale, 0.0, site)


@torch.library.register_fake(f"{NAMESPACE}::attention_backward")
def _attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, mask: Tensor | None,
    leaves: list[Tensor], plan: list[Tensor], params: list[int], spec: str, sinks: Tensor | None,
    seed: Tensor | None, scale: float, dropout_p: float, site: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_sinks = q.new_empty((0,), dtype=torch.float32) if sinks is None else sinks.new_empty(sinks.shape)
    return (
        _like_heads_last(q, *q.shape[1:]),
        _like_heads_last(k, *k.shape[1:]),
        _like_heads_last(v, *v.shape[1:]),
        grad_sinks,
    )


@torch.library.register_fake(f"{NAMESPACE}::attention_mask")
def _attention_mask_fake(
    mask: Tensor | None, leaves: list[Tensor], params: list[int], spec: str, batch: Any, queries: Any, keys: Any,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    heads = 1 if mask is None else mask.shape[1]
    row_tiles = (queries + TILE_QUERIES - 1) // TILE_QUERIES
    key_tiles = (keys + TILE_KEYS - 1) // TILE_KEYS

    def empty(*shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return (
        empty(batch, 2, queries, dtype=torch.int64),
        empty(batch, 2, keys, dtype=torch.int64),
        empty(batch, heads, row_tiles, 4, dtype=torch.int32),
        empty(batch, heads, key_tiles, 4, dtype=torch.int32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, leaves, plan, params, spec, sinks, seed, scale, dropout_p, site = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, mask, sinks, seed, *leaves, *plan)
    ctx.leaf_count = len(leaves)
    ctx.rest = (params, spec, scale, dropout_p, site)


def _backward(ctx: Any, grad: Tensor | None, _grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, mask, sinks, seed, *tensors = ctx.saved_tensors
    params, spec, scale, dropout_p, site = ctx.rest
    # One None per tensor of a tensor list. A list of integers counts as one argument, but torch
    # cannot tell an empty one from an empty list of tensors.
    none_lists: tuple[Any, ...] = (
        [None] * ctx.leaf_count,
        [None] * (len(tensors) - ctx.leaf_count),
        None if params else [],
    )
    if grad is None:
        return (None, None, None, None, *none_lists, None, None, None, None, None, None)
    if mask is not None and mask.requires_grad:
        raise NotImplementedError(
            "s2o::attention has no gradient for an additive mask; call scaled_dot_product_attention for a learned bias"
        )
    grad_q, grad_k, grad_v, grad_sinks = torch.ops.s2o.attention_backward(
        grad, q, k, v, out, lse, mask, tensors[: ctx.leaf_count], tensors[ctx.leaf_count :],
        params, spec, sinks, seed, scale, dropout_p, site,
    )  # fmt: skip
    return (grad_q, grad_k, grad_v, None, *none_lists, None, None if sinks is None else grad_sinks, *[None] * 4)


register_autograd("attention", _attention_impl, _backward, _setup_context)


def _no_gradient(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> None:
    raise NotImplementedError(
        "s2o::sparse_attention has no gradient: run it under torch.no_grad(), or call s2o::attention, which is exact"
    )


register_autograd("sparse_attention", _sparse_attention_impl, _no_gradient)


def _autocast_rule(device_type: str) -> Any:
    """What scaled_dot_product_attention does under autocast: q, k, v and an additive mask in the autocast dtype.

    `torch.library.register_autocast` casts every tensor to a dtype fixed at registration. Here the dtype
    is the one of the region, float64 stays, and neither sinks (added in float32) nor the tensors of
    a mask predicate are touched.
    """

    def cast(x: Tensor | None) -> Tensor | None:
        if x is None or not x.is_floating_point() or x.dtype == torch.float64 or x.device.type != device_type:
            return x
        return x.to(torch.get_autocast_dtype(device_type))

    def attention_autocast(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any, **fields: Any
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(device_type, enabled=False):
            return torch.ops.s2o.attention(cast(q), cast(k), cast(v), cast(mask), *rest, **fields)

    return attention_autocast


for _device_type in ("cpu", "cuda"):
    torch.library.impl(f"{NAMESPACE}::attention", f"Autocast{_device_type.upper()}", _autocast_rule(_device_type))
