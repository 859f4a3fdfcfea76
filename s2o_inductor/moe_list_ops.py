"""Routed experts that are separate modules: the operators of `moe_ops.py` with one tensor per expert.

    moe_experts_list           every token's chosen experts and their weighted sum
    moe_experts_list_backward  its gradients

A list of `nn.Linear`s need not be stacked: weights are read, and gradients written, wherever they lie. On CPU each
expert is a product of its own; on CUDA the kernels take a table of addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from s2o_inductor import moe_ops
from s2o_inductor.dispatch import NAMESPACE, register_autograd
from s2o_inductor.moe_spec import ExpertSpec, parse

_TAGS = (torch.Tag.flexible_layout,)
_OPERANDS = "Tensor z, Tensor[] w1, Tensor[] w2, Tensor[] w3, Tensor[] b1, Tensor[] b2, Tensor ids, Tensor p"

torch.library.define(
    f"{NAMESPACE}::moe_experts_list",
    f"({_OPERANDS}, str spec, bool keep, str site) -> (Tensor output, Tensor kept)",
    tags=_TAGS,
)
torch.library.define(
    f"{NAMESPACE}::moe_experts_list_backward",
    f"(Tensor grad, {_OPERANDS}, Tensor kept, str spec) "
    "-> (Tensor z, Tensor[] w1, Tensor[] w2, Tensor[] w3, Tensor[] b1, Tensor[] b2, Tensor p)",
    tags=_TAGS,
)


def moe_experts_list(
    z: Tensor,
    w1: Sequence[Tensor],
    w2: Sequence[Tensor],
    ids: Tensor,
    p: Tensor,
    *,
    spec: ExpertSpec | str,
    w3: Sequence[Tensor] = (),
    b1: Sequence[Tensor] = (),
    b2: Sequence[Tensor] = (),
    site: str = "",
) -> Tensor:
    """`moe_ops.moe_experts` with one tensor per expert in place of each stacked one.

    Args:
        z: (T, l).
        w1: E matrices (halves * I, l), or (I, l) with gate "separate"; the other way round if `spec.transposed`.
        w2: E matrices (l, I), likewise.
        ids: (T, K), integers.
        p: (T, K), floating point.
        spec: the formula of an expert, or its text.
        w3: E matrices (I, l) of the up projections, exactly with gate "separate".
        b1: E vectors (halves * I), or none.
        b2: E vectors (l), or none.
        site: name under which a report finds this call.

    Returns:
        (T, l) in z's dtype. Weights of experts that no token chose get zero gradients, not None.

    Raises:
        ValueError: shapes, dtypes, devices or numbers of tensors do not fit together.
        NotImplementedError: the device has no kernel.
    """
    keep = torch.is_grad_enabled() and (
        z.requires_grad or p.requires_grad or any(x.requires_grad for xs in (w1, w2, w3, b1, b2) for x in xs)
    )
    text = spec if isinstance(spec, str) else spec.text()
    operands = (list(w1), list(w2), list(w3), list(b1), list(b2), ids, p)
    return torch.ops.s2o.moe_experts_list(z, *operands, text, keep, site)[0]


def _check(
    z: Tensor, w1: Sequence[Tensor], w2: Sequence[Tensor], w3: Sequence[Tensor], b1: Sequence[Tensor],
    b2: Sequence[Tensor], ids: Tensor, p: Tensor, spec: ExpertSpec,
) -> None:  # fmt: skip
    if not w2:
        raise ValueError("experts need at least one expert; w2 is an empty list")
    for name, given in (("w1", w1), ("w2", w2), ("w3", w3), ("b1", b1), ("b2", b2)):
        if given and len(given) != len(w2):
            raise ValueError(f"{name} must have a tensor for each of the {len(w2)} experts; got {len(given)}")
        odd = next((x for x in given if not _alike(x, given[0])), None)
        if odd is not None:
            raise ValueError(f"the experts' {name} must be alike; got {_describe(given[0])} and {_describe(odd)}")
    if not w1:
        raise ValueError("experts need first products; w1 is an empty list")
    one = [None if not given else given[0].expand(len(w2), *given[0].shape) for given in (w1, w2, w3, b1, b2)]
    assert one[0] is not None and one[1] is not None
    moe_ops.check_operands(z, one[0], one[1], one[2], one[3], one[4], ids, p, spec)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _describe(x: Tensor) -> str:
    return f"{x.dtype}{tuple(x.shape)} on {x.device}"


def _impl(
    z: Tensor, w1: list[Tensor], w2: list[Tensor], w3: list[Tensor], b1: list[Tensor], b2: list[Tensor],
    ids: Tensor, p: Tensor, spec: str, keep: bool, site: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    formula = parse(spec)
    _check(z, w1, w2, w3, b1, b2, ids, p, formula)
    kernels = moe_ops.kernels_of(z.device, site)
    experts = kernels.Experts.of(formula, w1, w2, w3 or None, b1 or None, b2 or None)
    found: tuple[Tensor, Tensor] = kernels.forward(experts, z, ids, p, keep)
    return found


def _backward_impl(
    grad: Tensor, z: Tensor, w1: list[Tensor], w2: list[Tensor], w3: list[Tensor], b1: list[Tensor],
    b2: list[Tensor], ids: Tensor, p: Tensor, kept: Tensor, spec: str,
) -> tuple[Any, ...]:  # fmt: skip
    from s2o_inductor.kernels import moe_cpu, moe_routing

    formula = parse(spec)
    found = _gradients(z, w1, w2, w3, b1, b2, p)
    # Neither what is absent nor what has no numbers is computed.
    lists = [given if given and given[0].numel() else None for given in found[1:6]]
    turned = [moe_routing.flipped(x) if x is not None and formula.transposed else x for x in lists[:3]]
    first = (turned[0], turned[2]) if w3 else (turned[0],)
    moe_ops.kernels_of(z.device).backward(
        moe_routing.Experts.of(formula, w1, w2, w3 or None, b1 or None, b2 or None), grad, z, ids, p, kept,
        moe_cpu.Gradients(found[0], first, turned[1], lists[3], lists[4], found[6]),
    )  # fmt: skip
    return found


def _gradients(
    z: Tensor, w1: Sequence[Tensor], w2: Sequence[Tensor], w3: Sequence[Tensor], b1: Sequence[Tensor],
    b2: Sequence[Tensor], p: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """One contiguous tensor per operand."""

    def like(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    return (like(z), *([like(x) for x in given] for given in (w1, w2, w3, b1, b2)), like(p))


torch.library.impl(f"{NAMESPACE}::moe_experts_list", "CompositeExplicitAutograd", _impl)
torch.library.impl(f"{NAMESPACE}::moe_experts_list_backward", "CompositeExplicitAutograd", _backward_impl)


@torch.library.register_fake(f"{NAMESPACE}::moe_experts_list")
def _fake(
    z: Tensor, w1: list[Tensor], w2: list[Tensor], w3: list[Tensor], b1: list[Tensor], b2: list[Tensor],
    ids: Tensor, p: Tensor, spec: str, keep: bool, site: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    formula = parse(spec)
    _check(z, w1, w2, w3, b1, b2, ids, p, formula)
    inner = w2[0].shape[0 if formula.transposed else 1]
    rows = ids.shape[0] * ids.shape[1] if keep else 0
    return z.new_empty(z.shape), z.new_empty(rows, formula.halves * inner)


@torch.library.register_fake(f"{NAMESPACE}::moe_experts_list_backward")
def _backward_fake(
    grad: Tensor, z: Tensor, w1: list[Tensor], w2: list[Tensor], w3: list[Tensor], b1: list[Tensor],
    b2: list[Tensor], ids: Tensor, p: Tensor, kept: Tensor, spec: str,
) -> tuple[Any, ...]:  # fmt: skip
    return _gradients(z, w1, w2, w3, b1, b2, p)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, *lists, ids, p, spec, _keep, _site = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.lengths = [len(given) for given in lists]
    ctx.save_for_backward(z, ids, p, output[1], *(x for given in lists for x in given))
    ctx.spec = spec


def _backward(ctx: Any, grad: Tensor | None, _grad_kept: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None, *([None] * length for length in ctx.lengths), None, None, None, None, None)
    z, ids, p, kept, *flat = ctx.saved_tensors
    lists, start = [], 0
    for length in ctx.lengths:
        lists.append(flat[start : start + length])
        start += length
    dz, *found, dp = torch.ops.s2o.moe_experts_list_backward(grad, z, *lists, ids, p, kept, ctx.spec)
    return (dz, *found, None, dp, None, None, None)


register_autograd("moe_experts_list", _impl, _backward, _setup_context)


def _autocast_rule(device_type: str) -> Any:
    """As in `moe_ops`: the weights' dtype decides."""

    def experts_autocast(
        z: Tensor, w1: list[Tensor], w2: list[Tensor], w3: list[Tensor], b1: list[Tensor], b2: list[Tensor],
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        biases = [[x.to(w2[0].dtype) for x in given] for given in (b1, b2)]
        with torch.autocast(device_type, enabled=False):
            return torch.ops.s2o.moe_experts_list(z.to(w2[0].dtype), w1, w2, w3, *biases, *rest)

    return experts_autocast


for _device_type in ("cpu", "cuda"):
    torch.library.impl(
        f"{NAMESPACE}::moe_experts_list", f"Autocast{_device_type.upper()}", _autocast_rule(_device_type)
    )
