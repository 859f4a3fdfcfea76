"""Exact attention on CPU: torch's fused kernel, run only over the keys that a block of queries sees.

The fused kernel (`aten::_scaled_dot_product_flash_attention_for_cpu`) knows no mask but the causal one
and a tensor. Here the query rows are cut into blocks; tile ranges, which on CPU may simply be read,
say which keys a block sees; K and V are sliced to them, and a mask as large as the block is built
only where they are not wholly visible. No tensor of Sq x Sk entries exists and hidden keys cost
nothing. The backward kernel takes output and log-sum-exp, so that its sums over blocks of keys
and of queries are exact too.

Dropout, which the fused kernel lacks, runs in matrix products on the same blocks. That route, "cpu-math",
takes tensors on any device; without dropout it reads none of their values on the host.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2o_inductor.kernels.cpu_blocks import HIDDEN, Block, Masks, accumulate_dtype, blocks
from s2o_inductor.kernels.dense import empty_heads_last
from s2o_inductor.kernels.operands import positive_scale

if TYPE_CHECKING:
    from s2o_inductor.kernels.dense import Call

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Above this magnitude a log-sum-exp in float32 no longer holds the weights of its row: exp(score - lse)
# is wrong by the rounding of lse. Scores of that size come from additive masks full of huge numbers.
_ABSORBING = 1e4


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """output (B, Hq, Sq, Dv) and lse (B, Hq, Sq); a row that sees no key gets 0 and -inf."""
    batch, heads, queries, _ = q.shape
    keys, value_dim = k.shape[2], v.shape[3]
    accumulate = accumulate_dtype(q.dtype)
    if 0 in (batch, queries, keys, value_dim):
        return q.new_zeros(batch, heads, queries, value_dim), q.new_full(q.shape[:3], HIDDEN, dtype=accumulate)
    q, k, v = _operands(call, q, k, v)
    if call.route == "cpu-flash":
        # The kernel hides keys before it scales, and so needs a positive scale.
        q, scale, _ = positive_scale(q, call.scale)
        output, lse = _flash(q, k, v, 0.0, call.upper is not None, scale=scale)
        return output[..., :value_dim], lse
    output = empty_heads_last((batch, heads, queries, value_dim), q)
    lse = torch.empty(batch, heads, queries, dtype=accumulate, device=q.device)
    run = _math if call.route == "cpu-math" else _fused
    masks = Masks(call, q.dtype, q.device)
    for block in blocks(call, batch, heads, queries, keys):
        at = (block.batch, slice(None), block.rows)
        if block.is_hidden:
            output[at], lse[at] = 0.0, HIDDEN
            continue
        key_at = (block.batch, slice(None), block.keys)
        mask = masks.additive(block)
        part, part_lse = run(call, block, q[at], k[key_at], v[key_at], mask)
        output[at] = part[..., :value_dim]
        if mask is not None and call.may_be_empty and block.full.start >= block.full.stop:
            part_lse = part_lse.masked_fill(mask.amax(dim=-1) == HIDDEN, HIDDEN)
        lse[at] = part_lse
    return output, lse


def backward(
    call: Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; a row with lse -inf sends none."""
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys, value_dim = v.shape[1:]
    shapes = q.shape, k.shape, v.shape
    if 0 in (batch, queries, keys, value_dim):
        return q.new_zeros(shapes[0]), k.new_zeros(shapes[1]), v.new_zeros(shapes[2])
    q, k, v = _operands(call, q, k, v)
    grad, output = (_layout(_widen(x, v.shape[3])) for x in (grad, output))
    # Hidden scores are -inf, so any finite number in place of lse = -inf makes their weights zero.
    lse = lse.to(accumulate_dtype(q.dtype))
    lse = lse.masked_fill(lse == HIDDEN, 0.0)
    if call.route == "cpu-flash":
        q, scale, sign = positive_scale(q, call.scale)
        grads = _flash_backward(grad, q, k, v, output, lse, 0.0, call.upper is not None, scale=scale)
        part_q, grad_k, grad_v = _narrow(grads, kv_heads, head_dim, value_dim)
        return part_q if sign == 1.0 else part_q * sign, grad_k, grad_v
    grad_q = empty_heads_last(shapes[0], q)
    # Sums over blocks are kept in the precision of the accumulator.
    grad_k, grad_v = (
        x.new_zeros(batch, keys, kv_heads, width, dtype=lse.dtype).transpose(1, 2)
        for x, width in ((k, head_dim), (v, value_dim))
    )
    masks = Masks(call, q.dtype, q.device)
    for block in blocks(call, batch, heads, queries, keys):
        at = (block.batch, slice(None), block.rows)
        if block.is_hidden:
            grad_q[at] = 0.0
            continue
        key_at = (block.batch, slice(None), block.keys)
        run = _fused_backward
        if call.route == "cpu-math" or (masks.bias is not None and bool((lse[at].abs() > _ABSORBING).any())):
            run = _math_backward
        grads = run(
            call, block, grad[at], q[at], k[key_at], v[key_at], output[at], lse[at], masks.additive(block)
        )  # fmt: skip
        part_q, part_k, part_v = _narrow(grads, kv_heads, head_dim, value_dim)
        grad_q[at] = part_q
        grad_k[key_at] += part_k
        grad_v[key_at] += part_v
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _layout(x: Tensor) -> Tensor:
    """x, or a copy that the fused kernel can read: it assumes unit stride in the last dimension, unchecked."""
    rows_apart = x.shape[2] == 1 or x.stride(2) >= x.shape[3]
    return x if rows_apart and (x.stride(3) == 1 or x.shape[3] == 1) else x.contiguous()


def _widen(x: Tensor, width: int) -> Tensor:
    return x if x.shape[3] == width else pad(x, (0, width - x.shape[3]))


def _operands(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the kernel takes them: one width (zeros change no score and no value), layout, heads."""
    if call.route != "cpu-math":
        width = max(q.shape[3], v.shape[3])
        q, k, v = (_widen(x, width) for x in (q, k, v))
        if q.shape[1] != k.shape[1] and not fused_kernel_groups_heads():
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return _layout(q), _layout(k), _layout(v)


def _narrow(
    grads: tuple[Tensor, Tensor, Tensor], kv_heads: int, head_dim: int, value_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients without the padding and repetition of `_operands`."""
    grad_q, grad_k, grad_v = grads
    if grad_k.shape[1] != kv_heads:
        grad_k, grad_v = (x.unflatten(1, (kv_heads, -1)).sum(dim=2) for x in (grad_k, grad_v))
    return grad_q[..., :head_dim], grad_k[..., :head_dim], grad_v[..., :value_dim]


@functools.lru_cache(maxsize=1)
def fused_kernel_groups_heads() -> bool:
    """Whether the fused kernel takes fewer key/value than query heads, found by trying it.

    A kernel that does not would read past the last head: here it stays inside a larger tensor.
    """
    q, v = torch.zeros(1, 4, 1, 1), torch.arange(4.0).reshape(1, 4, 1, 1)
    try:
        output, _ = _flash(q, q[:, :2], v[:, :2])
    except RuntimeError:
        return False
    return output.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]


def _fused(call: Call, block: Block, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    output, lse = _flash(q, k, v, attn_mask=mask, scale=call.scale)
    return output, lse


def _fused_backward(
    call: Call, block: Block, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _flash_backward(grad, q, k, v, output, lse, 0.0, False, attn_mask=mask, scale=call.scale)
    return grads[0], grads[1], grads[2]


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, R, N) as (B, Hkv, group * R, N), so that one product serves a group of query heads."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[3])


def _scores(call: Call, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = (_fold(q, k.shape[1]) @ k.transpose(-1, -2)).view(*q.shape[:3], k.shape[2]) * call.scale
    return scores if mask is None else scores + mask


def _dropped(call: Call, block: Block, weights: Tensor) -> Tensor:
    """The factor of every weight: 0, or 1 / (1 - p); a function of the seed and the block alone."""
    assert call.seed is not None
    generator = torch.Generator(weights.device).manual_seed((int(call.seed) + block.index) % 2**63)
    kept = torch.empty_like(weights).bernoulli_(1.0 - call.dropout_p, generator=generator)
    return kept.div_(max(1.0 - call.dropout_p, torch.finfo(weights.dtype).tiny))


def _math(call: Call, block: Block, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Forward of one block in matrix products; a row without a key gets weights 0 and lse -inf."""
    q, k, v_wide = (x.to(accumulate_dtype(x.dtype)) for x in (q, k, v))
    scores = _scores(call, q, k, mask)
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.masked_fill(lse == HIDDEN, 0.0)[..., None]).exp_()
    if call.dropout_p > 0.0:
        weights *= _dropped(call, block, weights)
    output = (_fold(weights, v.shape[1]) @ v_wide).view(*q.shape[:3], v.shape[3])
    return output.to(v.dtype), lse


def _math_backward(
    call: Call, block: Block, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Backward of one block in matrix products, from scores alone: lse may have absorbed them (`_ABSORBING`)."""
    kv_heads = k.shape[1]
    grad, q, k, v, output = (x.to(lse.dtype) for x in (grad, q, k, v, output))
    scores = _scores(call, q, k, mask)
    sinks = None if call.sinks is None else call.sinks.to(lse.dtype)[:, None, None]
    peak = scores.amax(dim=-1, keepdim=True)
    if sinks is not None:
        peak = peak.maximum(sinks)
    peak = peak.masked_fill(peak == HIDDEN, 0.0)
    weights = (scores - peak).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - peak).exp()
    weights = weights / total.masked_fill(total == 0.0, 1.0)
    grad_weights = (_fold(grad, kv_heads) @ v.transpose(-1, -2)).view(weights.shape)
    used = weights
    if call.dropout_p > 0.0:
        factor = _dropped(call, block, weights)
        used, grad_weights = weights * factor, grad_weights * factor
    grad_scores = weights * (grad_weights - (grad * output).sum(dim=-1, keepdim=True)) * call.scale
    grad_q = (_fold(grad_scores, kv_heads) @ k).view(q.shape)
    grad_k = _fold(grad_scores, kv_heads).transpose(-1, -2) @ _fold(q, kv_heads)
    grad_v = _fold(used, kv_heads).transpose(-1, -2) @ _fold(grad, kv_heads)
    return grad_q, grad_k, grad_v
