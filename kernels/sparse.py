"""Sparse attention: which calls may run it, and what all devices share around the kernels.

A call that is short, that a mask keeps from being ranked, or that its budget makes exact runs the dense route:
the choice is made here, from sizes alone, so that a graph with symbolic lengths has it too.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s2o_inductor.kernels import cpu_sparse, dense, reference
from s2o_inductor.kernels import mask as masks
from s2o_inductor.kernels.mask import HIDDEN_KEY
from s2o_inductor.sparse_policy import Geometry, SparsePolicy, geometry_of, most_means


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What one call read, per query head, on the device of the call: reading it waits for that.

    Attributes:
        pairs: int64 (B, Hq), visible (query, key) pairs whose score was computed.
        visible: int64 (B, Hq), visible pairs.
        bundles: (B, Hq, tiles), bundles of keys that a tile read.
        tail: (B, Hq, tiles), estimated share of the softmax mass that a tile left unread, mean of its rows.
        geometry: sizes that the call ran with.
        error: (B, Hq), squared error of the audited rows relative to their squared norm; None without an audit.
    """

    pairs: Tensor
    visible: Tensor
    bundles: Tensor
    tail: Tensor
    geometry: Geometry
    error: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a budget would have cost and changed in one call, per query head, for calibration.

    Attributes:
        budget: the budget tried.
        density: (B, Hq), computed pairs over visible pairs.
        error: (B, Hq), squared error of the output, and
        norm: (B, Hq), squared norm of the exact output.
    """

    budget: float
    density: Tensor
    error: Tensor
    norm: Tensor


def why_dense(call: dense.Call, q: Tensor, k: Tensor, v: Tensor, policy: SparsePolicy) -> str | None:
    """Why a call must be computed exactly, or None when it may be approximated; reads sizes alone."""
    queries, keys = q.shape[2], k.shape[2]
    geometry = geometry_for(q, k)
    if geometry is None:
        return f"no sparse kernel for {q.device.type!r} in this version"
    if all(budget == 0.0 for budget in policy.budgets) and not policy.candidates:
        return "budget 0"
    if call.mask is not None or call.spec.rows or call.spec.at_most:
        return f"mask terms {call.spec.terms()} are not ranked"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{q.dtype} is computed exactly"
    if call.dropout_p > 0.0:
        return "dropout"
    if call.upper is None and call.spec.equal is not None:
        return "documents without causality"
    if call.upper is None and call.lower is not None:
        return "a window without causality"
    if call.upper is not None and not 0 <= call.upper <= keys - queries:
        return "queries that stand before the first or behind the last key"
    if queries < geometry.tile:
        return f"{queries} queries are fewer than a tile"
    if _end(call, queries, keys) < max(policy.min_seq, 2 * geometry.tile):
        return f"shorter than min_seq={policy.min_seq}"
    return _why_not_cuda(call, q, k, v, geometry) if q.device.type == "cuda" else None


def forward(
    call: dense.Call, q: Tensor, k: Tensor, v: Tensor, policy: SparsePolicy
) -> tuple[Tensor, Tensor, str, Statistics | list[Trial] | None]:
    """Output and lse as `dense.forward`, the route taken, and what it read; None for the dense route.

    Under a policy with candidates the result is exact and the last item lists what each would have given.
    """
    if why_dense(call, q, k, v, policy) is not None:
        return *dense.forward(call, q, k, v), call.route, None
    if policy.candidates:
        output, lse = dense.forward(call, q, k, v)
        return output, lse, call.route, [_try(call, q, k, v, budget, policy, output) for budget in policy.candidates]
    output, lse, statistics = _sparse(call, q, k, v, policy.budgets, policy.max_density)
    output, lse = dense.finish(call, output, lse, v)
    if policy.audit:
        statistics = dataclasses.replace(statistics, error=_audit(call, q, k, v, output, policy.audit))
    return output, lse, f"{q.device.type}-s2o", statistics


def geometry_for(q: Tensor, k: Tensor) -> Geometry | None:
    """The sizes for operands like these; None where there is no kernel."""
    most = most_means(q.dtype == torch.float32, q.shape[3])
    return geometry_of(q.device.type, q.shape[1] // k.shape[1], most)


def _why_not_cuda(call: dense.Call, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> str | None:
    """Why the Triton kernels cannot run a call that is otherwise fit for them."""
    if not _has_triton():
        return "the sparse CUDA kernels need triton, which is not installed"
    if call.route == "math":
        return "the dense route takes no Triton kernel here either"
    from s2o_inductor.kernels import cuda_sparse

    return cuda_sparse.why_not(q, k, v, geometry)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _kernel(device: str) -> Callable[..., Any]:
    """The kernels of a device type; those of CUDA import triton, which not everyone has."""
    if device == "cpu":
        return cpu_sparse.forward
    from s2o_inductor.kernels import cuda_sparse

    return cuda_sparse.forward


def _end(call: dense.Call, queries: int, keys: int) -> int:
    """Keys that some query sees: a static cache is longer than what it holds."""
    return keys if call.upper is None else min(keys, queries + call.upper)


def _visible_keys(call: dense.Call, end: int) -> Tensor | None:
    """bool (B, end), the keys that are not padding; None where all are seen."""
    return None if call.spec.keys is None else call.plan[1][:, 0, :end] != HIDDEN_KEY


def _documents(call: dense.Call, q: Tensor, end: int) -> tuple[Tensor, Tensor] | None:
    """(B, Sq) and (B, end), the documents of queries and keys; None where there is one."""
    if call.spec.equal is None:
        return None
    return masks.documents(call.spec, call.leaves, call.params, q.shape[0], q.shape[2], end, q.device)


def _sparse(
    call: dense.Call, q: Tensor, k: Tensor, v: Tensor, budgets: tuple[float, ...], max_density: float
) -> tuple[Tensor, Tensor, Statistics]:
    end = _end(call, q.shape[2], k.shape[2])
    window = None if call.lower is None or call.upper is None else call.upper - call.lower + 1
    geometry = geometry_for(q, k)
    assert geometry is not None  # `why_dense` has seen to that
    result = _kernel(q.device.type)(
        q, k[:, :, :end], v[:, :, :end], scale=call.scale, budgets=budgets, causal=call.upper is not None,
        window=window, keys=_visible_keys(call, end), documents=_documents(call, q, end), max_density=max_density,
        geometry=geometry,
    )  # fmt: skip
    return result.output, result.lse, Statistics(result.pairs, result.visible, result.bundles, result.tail, geometry)


def _try(
    call: dense.Call, q: Tensor, k: Tensor, v: Tensor, budget: float, policy: SparsePolicy, exact: Tensor
) -> Trial:
    output, lse, read = _sparse(call, q, k, v, (budget,), policy.max_density)
    output, _ = dense.finish(call, output, lse, v)
    error = (output.float() - exact.float()).square().sum(dim=(2, 3))
    return Trial(budget, read.pairs / read.visible.clamp(min=1), error, exact.float().square().sum(dim=(2, 3)))


def _audit(call: dense.Call, q: Tensor, k: Tensor, v: Tensor, output: Tensor, rows: int) -> Tensor:
    """(B, Hq): relative squared error of evenly spaced rows, which are computed exactly for it."""
    queries, keys = q.shape[2], k.shape[2]
    end = _end(call, queries, keys)
    at = torch.linspace(0, queries - 1, min(rows, queries), device=q.device).round().long()
    key = torch.arange(end, device=q.device)
    visible = torch.ones(1, 1, at.numel(), end, dtype=torch.bool, device=q.device)
    if call.upper is not None:
        visible = visible & (key - at[:, None] <= call.upper)
    if call.lower is not None:
        visible = visible & (key - at[:, None] >= call.lower)
    documents = _documents(call, q, end)
    if documents is not None:
        visible = visible & (documents[0][:, at, None] == documents[1][:, None])[:, None]
    padding = _visible_keys(call, end)
    if padding is not None:
        visible = visible & padding[:, None, None]
    exact, _ = reference.attention(
        q[:, :, at].float(), k[:, :, :end].float(), v[:, :, :end].float(), visible=visible, scale=call.scale,
        sinks=call.sinks, empty=call.spec.empty,
    )  # fmt: skip
    error = (output[:, :, at].float() - exact).square().sum(dim=(2, 3))
    return error / exact.square().sum(dim=(2, 3)).clamp(min=torch.finfo(torch.float32).tiny)
