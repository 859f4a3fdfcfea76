"""Routed experts on CPU: choices sorted by expert, matrix products per expert, one weighted sum per token.

The choices (t, k) are sorted by expert, so that every expert's rows lie together. Consecutive experts form
blocks of a bounded number of rows: gather and activation run once per block, on data that is still
in cache, and not once per expert, which at 512 experts would be mostly overhead. Sums over a
token's choices are made in the order of k, so results do not depend on the number of threads.

Where experts have few rows, `moe_cpu_native` makes the whole call; elsewhere it makes what surrounds the products.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from s2o_inductor.kernels import moe_cpu_native
from s2o_inductor.kernels.moe_routing import Experts as Experts  # these two are part of what callers import
from s2o_inductor.kernels.moe_routing import PerExpert as PerExpert
from s2o_inductor.kernels.moe_routing import Routing, part, wide
from s2o_inductor.moe_spec import ExpertSpec


def forward(experts: Experts, z: Tensor, ids: Tensor, p: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """The output (T, l), and the first products by sorted position if they are to be kept, else none of them.

    Args:
        experts: their weights.
        z: (T, l).
        ids: (T, K).
        p: (T, K).
        keep: store what the backward pass would otherwise compute again, (T * K, columns).
    """
    if not keep and (output := moe_cpu_native.forward(experts, z, ids, p)) is not None:
        return output, z.new_empty(0, experts.columns)
    if not keep and ids.numel() and (ids.shape[0] == 1 or 4 * ids.numel() <= experts.number):
        return _few(experts, z, ids, p), z.new_empty(0, experts.columns)
    routing = _route(ids, experts.number)
    kept = torch.empty(ids.numel() if keep else 0, experts.columns, dtype=z.dtype)
    y = torch.empty(ids.numel(), z.shape[1], dtype=z.dtype)
    y[routing.routed :] = 0.0
    if keep:
        kept[routing.routed :] = 0.0
    score = experts.spec.score
    weights = p.reshape(-1, 1).to(wide(z.dtype))
    for rows, parts in routing.blocks(experts.columns * z.itemsize):
        order = routing.order[rows]
        x = z.index_select(0, order // routing.choices)
        if score == "input":
            x = (x.to(weights.dtype) * weights[order]).to(z.dtype)
        pre = _first(experts, x, parts, kept[rows] if keep else None)
        scale = weights[order] if score == "hidden" else None
        if (h := moe_cpu_native.hidden(pre, experts.spec, scale)) is None:
            h = hidden(pre, experts.spec)
            h = (h if scale is None else h * scale).to(z.dtype)
        _second(experts, h, parts, y[rows])
    return _combine(y, routing, weights if score == "output" else None, z), kept


def _route(ids: Tensor, experts: int) -> Routing:
    return moe_cpu_native.route(ids, experts) or Routing.of(ids, experts)


def _few(experts: Experts, z: Tensor, ids: Tensor, p: Tensor) -> Tensor:
    """`forward` for a decoding step: choices as they come, since hardly any two share an expert.

    With one row per product, sorting and gathering would take as long as the products.
    """
    choices = ids.shape[1]
    weights = p.reshape(-1, 1).to(wide(z.dtype))
    x = z if ids.shape[0] == 1 else z.repeat_interleave(choices, dim=0)
    if experts.spec.score == "input":
        x = (x.to(weights.dtype) * weights).to(z.dtype)
    chosen, number = ids.reshape(-1).tolist(), experts.number
    parts = [(expert, slice(row, row + 1)) for row, expert in enumerate(chosen) if 0 <= expert < number]
    pre = z.new_empty(ids.numel(), experts.columns)
    y = z.new_empty(ids.numel(), z.shape[1])
    if len(parts) < len(chosen):
        pre.zero_()
        y.zero_()
    single = z.dtype == weights.dtype  # matrix-vector products; in half precision torch has no good ones
    x, start = x.expand(ids.numel(), -1), 0
    for weight in experts.w1 if single else ():
        width = weight[0].shape[0]
        bias = None if experts.b1 is None else part(experts.b1, start, start + width)
        _vectors(weight, bias, x, parts, pre[:, start : start + width])
        start += width
    if not single:
        _first(experts, x, parts, pre)
    h = hidden(pre, experts.spec)
    h = (h * weights if experts.spec.score == "hidden" else h).to(z.dtype)
    if single:
        _vectors(experts.w2, experts.b2, h, parts, y)
    else:
        _second(experts, h, parts, y)
    place = torch.arange(ids.numel())
    return _combine(y, Routing(choices, place, place, []), weights if experts.spec.score == "output" else None, z)


def _vectors(weight: PerExpert, bias: PerExpert | None, x: Tensor, parts: list[tuple[int, slice]], out: Tensor) -> None:
    """The products of single rows with the matrix of their expert."""
    rows, results = x.unbind(), out.unbind()
    for expert, at in parts:
        if bias is None:
            torch.mv(weight[expert], rows[at.start], out=results[at.start])
        else:
            torch.addmv(bias[expert], weight[expert], rows[at.start], out=results[at.start])


def _second(experts: Experts, h: Tensor, parts: list[tuple[int, slice]], out: Tensor) -> None:
    """The second products of the hidden rows of a block."""
    for expert, at in parts:
        if experts.b2 is None:
            torch.mm(h[at], experts.w2[expert].t(), out=out[at])
        else:
            torch.addmm(experts.b2[expert], h[at], experts.w2[expert].t(), out=out[at])


def _first(experts: Experts, x: Tensor, parts: list[tuple[int, slice]], out: Tensor | None) -> Tensor:
    """The first products of the rows of a block, (rows, columns)."""
    if out is None:
        out = torch.empty(x.shape[0], experts.columns, dtype=x.dtype)
    start = 0
    for weight in experts.w1:
        width = weight[0].shape[0]
        columns = out[:, start : start + width]
        for expert, at in parts:
            if experts.b1 is None:
                torch.mm(x[at], weight[expert].t(), out=columns[at])
            else:
                torch.addmm(experts.b1[expert][start : start + width], x[at], weight[expert].t(), out=columns[at])
        start += width
    return out


def _combine(y: Tensor, routing: Routing, weights: Tensor | None, z: Tensor) -> Tensor:
    """The sum of each token's rows of y, weighted if weights (T * K, 1) are given, in z's dtype and shape."""
    tokens = z.shape[0]
    if y.numel() == 0:
        return torch.zeros_like(z, memory_format=torch.contiguous_format)
    place = routing.place.view(tokens, routing.choices)
    if (sums := moe_cpu_native.weighted_sum(y, place, weights)) is not None:
        return sums
    if y.dtype == wide(y.dtype):  # one pass; torch has it for weights of y's dtype alone
        scale = None if weights is None else weights.view(tokens, routing.choices).contiguous()
        return F.embedding_bag(place, y, mode="sum", per_sample_weights=scale)
    rows = y.index_select(0, routing.place).to(wide(y.dtype))
    rows = rows if weights is None else rows.mul_(weights)
    return rows.view(tokens, routing.choices, -1).sum(dim=1).to(z.dtype)


# -------------------------------------------------------------------------------------- activation


def _gate_up(pre: Tensor, spec: ExpertSpec) -> tuple[Tensor, Tensor]:
    if spec.gate == "interleaved":
        return pre[:, ::2], pre[:, 1::2]
    first, second = pre.chunk(2, dim=1)
    return (second, first) if spec.gate == "half_swapped" else (first, second)


def hidden(pre: Tensor, spec: ExpertSpec) -> Tensor:
    """(rows, columns) -> (rows, I), computed and returned in at least float32."""
    pre = pre.to(wide(pre.dtype))
    if spec.gate == "none":
        return _activate(pre if spec.limit is None else pre.clamp(max=spec.limit), spec)
    gate, up = _gate_up(pre, spec)
    if spec.limit is not None:
        gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
    if spec.shift:
        up = up + spec.shift
    return _activate(gate, spec).mul_(up)


def _activate(x: Tensor, spec: ExpertSpec) -> Tensor:
    """A new tensor, act(x)."""
    if spec.activation == "identity":
        return x.clone()
    if spec.activation in ("relu", "relu2"):
        return x.relu() if spec.activation == "relu" else x.relu().square_()
    if spec.activation == "silu":
        return F.silu(x) if spec.alpha == 1.0 else F.silu(spec.alpha * x).div_(spec.alpha)
    return F.gelu(x, approximate="tanh" if spec.activation == "gelu_tanh" else "none")


def _activate_backward(grad: Tensor, x: Tensor, spec: ExpertSpec) -> Tensor:
    """grad * act'(x)."""
    if spec.activation == "identity":
        return grad
    if spec.activation in ("relu", "relu2"):
        grad = grad if spec.activation == "relu" else grad * (2.0 * x)
        return torch.ops.aten.threshold_backward(grad, x, 0.0)
    if spec.activation == "silu":
        return torch.ops.aten.silu_backward(grad, x if spec.alpha == 1.0 else spec.alpha * x)
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if spec.activation == "gelu_tanh" else "none")


def hidden_backward(grad: Tensor, pre: Tensor, spec: ExpertSpec) -> Tensor:
    """The gradient of `hidden` with respect to its input: (rows, I) and (rows, columns) -> (rows, columns)."""
    pre = pre.to(grad.dtype)
    if spec.gate == "none":
        if spec.limit is None:
            return _activate_backward(grad, pre, spec)
        return _activate_backward(grad, pre.clamp(max=spec.limit), spec).masked_fill_(pre > spec.limit, 0.0)
    result = torch.empty_like(pre)
    gate, up = _gate_up(pre, spec)
    grad_gate, grad_up = _gate_up(result, spec)
    inner, outer = (gate, up)
    if spec.limit is not None:
        inner, outer = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
    torch.mul(grad, _activate(inner, spec), out=grad_up)
    grad_gate.copy_(_activate_backward(grad * (outer + spec.shift if spec.shift else outer), inner, spec))
    if spec.limit is not None:
        grad_gate.masked_fill_(gate > spec.limit, 0.0)
        grad_up.masked_fill_(up.abs() > spec.limit, 0.0)
    return result


def _hidden_backward(
    grad: Tensor, pre: Tensor, spec: ExpertSpec, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `moe_cpu_native.hidden_backward`, in torch where there is no other way."""
    if (found := moe_cpu_native.hidden_backward(grad, pre, spec, weights)) is not None:
        return found
    h, wide_grad = hidden(pre, spec), grad.to(wide(grad.dtype))
    grad_weights = (wide_grad * h).sum(dim=1)
    if weights is not None:
        wide_grad, h = wide_grad * weights, h * weights
    return hidden_backward(wide_grad, pre, spec).to(pre.dtype), h.to(pre.dtype), grad_weights


# ---------------------------------------------------------------------------------------- backward


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Where a backward pass writes; None for what nobody wants. Shapes and layouts are those of the operands."""

    z: Tensor | None
    w1: tuple[PerExpert | None, ...]
    w2: PerExpert | None
    b1: PerExpert | None
    b2: PerExpert | None
    p: Tensor | None


def backward(experts: Experts, grad: Tensor, z: Tensor, ids: Tensor, p: Tensor, kept: Tensor, into: Gradients) -> None:
    """Fills `into` with the gradients of `forward`.

    Args:
        experts: as in `forward`, and so are
        grad: (T, l), of the output.
        z: as in `forward`.
        ids: as in `forward`.
        p: as in `forward`.
        kept: the first products that `forward` stored, or an empty tensor to compute them again.
        into: its weights are (out, in) views per expert.
    """
    routing, spec = _route(ids, experts.number), experts.spec
    _zero_idle_experts(routing, into)
    weights = p.reshape(-1, 1).to(wide(z.dtype))
    grad_p = torch.zeros(ids.numel(), dtype=weights.dtype)
    grad_x = torch.empty(ids.numel() if into.z is not None else 0, z.shape[1], dtype=z.dtype)
    grad_x[routing.routed :] = 0.0
    for rows, parts in routing.blocks(experts.columns * z.itemsize):
        order = routing.order[rows]
        token, weight = order // routing.choices, weights[order]
        x, dy = z.index_select(0, token), grad.index_select(0, token)
        scaled = (x.to(weight.dtype) * weight).to(x.dtype) if spec.score == "input" else x
        pre = kept[rows] if kept.shape[0] else _first(experts, scaled, parts, None)
        dh = torch.empty(x.shape[0], experts.w2[0].shape[1], dtype=z.dtype)
        for expert, at in parts:
            torch.mm(dy[at], experts.w2[expert], out=dh[at])
        scale = None if spec.score == "input" else weight
        dpre, h, grad_scale = _hidden_backward(dh, pre, spec, scale)
        if scale is not None:
            grad_p[order] = grad_scale
        if into.z is not None or (scale is None and into.p is not None):
            dx = _first_backward(experts, dpre, parts, grad_x[rows])
            if scale is None:
                grad_p[order] = (dx.to(weight.dtype) * x).sum(dim=1)
                dx.copy_(dx.to(weight.dtype) * weight)
        _weights_backward(experts, into, parts, scaled, dpre, h, dy)
        if experts.b2 is not None:
            _second_bias_backward(experts, into, parts, dy, weight, grad_p, order)
    if into.z is not None:
        into.z.copy_(_combine(grad_x, routing, None, z))
    if into.p is not None:
        into.p.copy_(grad_p.view(p.shape))


def _zero_idle_experts(routing: Routing, into: Gradients) -> None:
    idle = [expert for expert, count in enumerate(routing.counts) if count == 0]
    for gradient in (*into.w1, into.w2, into.b1, into.b2):
        if gradient is not None:
            for expert in idle:
                gradient[expert].zero_()


def _first_backward(experts: Experts, dpre: Tensor, parts: list[tuple[int, slice]], out: Tensor) -> Tensor:
    """Gradient of the rows that entered the first product."""
    if out.shape[0] != dpre.shape[0]:
        out = torch.empty(dpre.shape[0], experts.w1[0][0].shape[1], dtype=dpre.dtype)
    start = 0
    for weight in experts.w1:
        columns = dpre[:, start : start + weight[0].shape[0]]
        for expert, at in parts:
            if start == 0:
                torch.mm(columns[at], weight[expert], out=out[at])
            else:
                out[at].addmm_(columns[at], weight[expert])
        start += weight[0].shape[0]
    return out


def _weights_backward(
    experts: Experts, into: Gradients, parts: list[tuple[int, slice]], x: Tensor, dpre: Tensor, h: Tensor, dy: Tensor
) -> None:
    for expert, at in parts:
        start = 0
        for weight, gradient in zip(experts.w1, into.w1, strict=True):
            width = weight[0].shape[0]
            if gradient is not None:
                torch.mm(dpre[at, start : start + width].t(), x[at], out=gradient[expert])
            start += width
        if into.w2 is not None:
            torch.mm(dy[at].t(), h[at], out=into.w2[expert])
        if into.b1 is not None:
            torch.sum(dpre[at], dim=0, out=into.b1[expert])


def _second_bias_backward(
    experts: Experts, into: Gradients, parts: list[tuple[int, slice]], dy: Tensor, weight: Tensor, grad_p: Tensor,
    order: Tensor,
) -> None:  # fmt: skip
    assert experts.b2 is not None
    weighted = experts.spec.score == "output"
    for expert, at in parts:
        wide_dy = dy[at].to(grad_p.dtype)
        if weighted:
            grad_p[order[at]] += wide_dy @ experts.b2[expert].to(grad_p.dtype)
        if into.b2 is not None:
            into.b2[expert].copy_((wide_dy * weight[at] if weighted else wide_dy).sum(dim=0))
