"""Exact attention on CUDA: which kernel runs a call, and the calls of those that torch brings.

Routes, fastest first where each applies:

    cudnn      torch's cuDNN kernel: no mask or the plain causal one, float16 and bfloat16, long
    flash      torch's FlashAttention-2: the same where it is short, on GPUs before Hopper, and one query without a mask
    efficient  torch's memory-efficient kernel: the same in float32
    decode     our split-KV kernel: few queries, any mask
    triton     our kernel: any mask, length and head size up to 512, dropout
    math       matrix products on blocks: float64 and what no kernel takes

Forward and backward share nothing but output and log-sum-exp, so each picks its own kernel.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s2o_inductor.kernels.operands import aligned, positive_scale

if TYPE_CHECKING:
    from s2o_inductor.kernels.dense import Call, Facts
    from s2o_inductor.kernels.launching import TileMask

# All figures: H200, bfloat16, 32 query heads on 8 of size 128. Work is counted in floating-point
# operations of a forward pass over the visible positions.
#
# cuDNN plans a kernel for every new shape, 40 to 70 ms for each direction and seconds the first time.
# Against our kernel it gains 6 % forward from 16,384 tokens on (1 % at 4,096) and 10 to 15 % backward. It
# is worth a plan where 300 calls, ten passes of a 32-layer model, save that much.
_CUDNN_WORK = {"forward": 2e12, "backward": 4e11}
# A call of ours keeps the host busy for 70 us forward and 210 backward, of FlashAttention for 20 and 50.
# Below this much work that is longer than the kernels differ on the device.
_FLASH_WORK = {"forward": 1e9, "backward": 2.5e9}
# The same for one query: entries of the keys up to which the host matters more.
_FLASH_DECODE_ENTRIES = 16 << 20
# Head sizes that cuDNN takes without compiling a kernel at run time, and that FlashAttention-2 and we take.
_CUDNN_WIDTH = 128
_FLASH_WIDTH = 256
_TRITON_WIDTH = 512
# Rows (queries times heads of a group) up to which splitting the keys pays.
_DECODE_ROWS = 64
_HALF = (torch.float16, torch.bfloat16)


def choose_route(facts: Facts) -> str:
    """The route of the forward pass for a call with these facts; see the module's table."""
    widest = max(facts.head_dim, facts.value_dim)
    if facts.dtype not in (*_HALF, torch.float32) or widest > _TRITON_WIDTH or (facts.capability or (0, 0)) < (8, 0):
        return "math"
    plain = not (facts.terms or facts.dense or facts.dropout) and _is_plain(
        facts.dtype, facts.head_dim, facts.value_dim, facts.queries, facts.keys, facts.lower, facts.upper
    )
    if facts.queries * facts.query_heads // facts.kv_heads <= _DECODE_ROWS and not facts.dropout:
        entries = facts.batch * facts.kv_heads * facts.keys * facts.head_dim
        small = facts.queries == 1 and entries <= _FLASH_DECODE_ENTRIES
        return "flash" if plain and small and facts.dtype in _HALF else "decode"
    if not plain:
        return "triton"
    work = _work(facts.batch, facts.query_heads, facts.queries, facts.keys, facts.head_dim, facts.upper)
    return _plain_route("forward", facts.dtype, facts.capability, facts.head_dim, work)


def backward_route(call: Call, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The route of the backward pass.

    Torch's kernels add up dq in any order, so they are left out where torch must repeat results.
    """
    if call.route == "math":
        return "math"
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    plain = call.mask is None and not call.plan and call.dropout_p == 0.0
    plain = plain and _is_plain(q.dtype, width, v.shape[3], queries, keys, call.lower, call.upper)
    if not plain or torch.are_deterministic_algorithms_enabled():
        return "triton"
    work = _work(batch, heads, queries, keys, width, call.upper)
    return _plain_route("backward", q.dtype, torch.cuda.get_device_capability(q.device), width, work)


def _is_plain(
    dtype: torch.dtype, width: int, v_width: int, queries: int, keys: int, lower: int | None, upper: int | None
) -> bool:
    """Whether torch's fused kernels know the band and take the operands, given that there is no other term."""
    causal = upper == 0 and queries == keys
    narrow = width == v_width and width % 8 == 0 and width <= _FLASH_WIDTH
    return dtype != torch.float64 and narrow and lower is None and (upper is None or causal)


def _work(batch: int, heads: int, queries: int, keys: int, width: int, upper: int | None) -> float:
    return 4.0 * batch * heads * queries * keys * width * (1.0 if upper is None else 0.5)


def _plain_route(
    direction: str, dtype: torch.dtype, capability: tuple[int, int] | None, width: int, work: float
) -> str:  # fmt: skip
    """The route of a plain call of so much work."""
    if dtype == torch.float32:
        return "efficient"
    if capability is None or capability < (9, 0) or work <= _FLASH_WORK[direction]:
        return "flash"
    fits = width <= _CUDNN_WIDTH and torch.backends.cuda.cudnn_sdp_enabled()
    return "cudnn" if fits and work >= _CUDNN_WORK[direction] else "triton"


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """output (B, Hq, Sq, Dv) and lse (B, Hq, Sq); a row that sees no key gets 0 and -inf."""
    with torch.cuda.device_of(q):
        if call.route == "math":
            from s2o_inductor.kernels import cpu

            return cpu.forward(dataclasses.replace(call, route="cpu-math"), q, k, v)
        if call.route in ("cudnn", "flash", "efficient"):
            return _torch_forward(call, q, k, v)
        if call.route == "decode":
            from s2o_inductor.kernels import triton_decode

            return triton_decode.forward(q, k, v, tile_mask(call), call.scale)
        from s2o_inductor.kernels import triton_attention

        return triton_attention.forward(q, k, v, tile_mask(call), call.scale, call.dropout_p, call.seed)


def backward(
    call: Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; a row with lse -inf sends none."""
    with torch.cuda.device_of(q):
        route = backward_route(call, q, k, v)
        if route == "math":
            from s2o_inductor.kernels import cpu

            return cpu.backward(dataclasses.replace(call, route="cpu-math"), grad, q, k, v, output, lse)
        if route in ("cudnn", "flash", "efficient"):
            return _torch_backward(route, call, grad, q, k, v, output, lse)
        from s2o_inductor.kernels import triton_attention_backward

        return triton_attention_backward.backward(
            grad, q, k, v, output, lse, tile_mask(call), call.scale, call.dropout_p, call.seed
        )


def _torch_forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Torch's fused kernels take maxima before they scale, like ours, and so need a positive scale."""
    q, scale, _ = positive_scale(q, call.scale)
    causal, aten = call.upper is not None, torch.ops.aten
    if call.route == "efficient":
        k, v = _repeat(k, q), _repeat(v, q)
    operands = (aligned(q), aligned(k), aligned(v))
    if call.route == "cudnn":
        results = aten._scaled_dot_product_cudnn_attention(*operands, None, True, 0.0, causal, False, scale=scale)
        return results[0], results[1].view(q.shape[:3])
    if call.route == "flash":
        results = aten._scaled_dot_product_flash_attention(*operands, 0.0, causal, False, scale=scale)
        return results[0], results[1]
    results = aten._scaled_dot_product_efficient_attention(*operands, None, True, 0.0, causal, scale=scale)
    return results[0], results[1][..., : q.shape[2]]


def _torch_backward(
    route: str, call: Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, scale, sign = positive_scale(q, call.scale)
    causal, aten = call.upper is not None, torch.ops.aten
    lengths = (None, None, q.shape[2], k.shape[2])
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # state of a random generator
    kv_heads = k.shape[1]
    if route == "efficient":
        k, v = _repeat(k, q), _repeat(v, q)
    grad, q, k, v, output = (aligned(x) for x in (grad, q, k, v, output))
    if route == "cudnn":
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, output, lse.unsqueeze(-1), unused, unused, None, *lengths, 0.0, causal, scale=scale
        )
    elif route == "flash":
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, output, lse, *lengths, 0.0, causal, unused, unused, scale=scale
        )
    else:
        # Rows of lse come in whole tiles of 32.
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))
        wanted = [True, True, True, False]
        grads = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, output, lse, unused, unused, 0.0, wanted, causal, scale=scale
        )
    grad_q, grad_k, grad_v = grads[:3]
    if grad_k.shape[1] != kv_heads:
        grad_k, grad_v = (x.unflatten(1, (kv_heads, -1)).sum(dim=2) for x in (grad_k, grad_v))
    return grad_q if sign == 1.0 else grad_q * sign, grad_k, grad_v


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values repeated for every query head, for a kernel that knows no groups."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def tile_mask(call: Call) -> TileMask:
    """The mask of a call as our kernels take it."""
    from s2o_inductor.kernels.launching import TileMask

    if not call.plan:
        return TileMask(call.lower, call.upper)
    query_terms, key_terms, row_tiles, key_tiles = (x.contiguous() for x in call.plan)
    spec = call.spec
    return TileMask(
        call.lower,
        call.upper,
        query_terms,
        key_terms,
        row_tiles,
        key_tiles,
        equal=any((spec.keys, spec.rows, spec.equal)),
        at_most=spec.at_most is not None,
        dense=call.mask,
    )
