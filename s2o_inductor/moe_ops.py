"""The operators of routed experts: schema, fake kernels, autograd, autocast.

    moe_experts           every token's chosen experts and their weighted sum
    moe_experts_backward  its gradients

As in `ops.py`, importing needs torch alone, and shapes and strides of outputs follow from input
shapes, never from the routing: no host synchronisation, no data-dependent size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from s2o_inductor.dispatch import NAMESPACE, register_autograd
from s2o_inductor.moe_spec import ExpertSpec, parse
from s2o_inductor.ops import observed

# Kernels take every stride as it comes, so Inductor need not make copies.
_TAGS = (torch.Tag.flexible_layout,)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Device types that have kernels, and what these take.
_KERNELS = {"cpu": _DTYPES, "cuda": _DTYPES[:3]}
# Device types on which passes put the operator in place of a model's own experts.
ROUTED_DEVICES = ("cpu", "cuda")
_OPERANDS = "Tensor z, Tensor w1, Tensor w2, Tensor? w3, Tensor? b1, Tensor? b2, Tensor ids, Tensor p"

torch.library.define(
    f"{NAMESPACE}::moe_experts",
    f"({_OPERANDS}, str spec, bool keep, str site) -> (Tensor output, Tensor kept)",
    tags=_TAGS,
)
torch.library.define(
    f"{NAMESPACE}::moe_experts_backward",
    f"(Tensor grad, {_OPERANDS}, Tensor kept, str spec, bool[] wanted) "
    "-> (Tensor z, Tensor w1, Tensor w2, Tensor w3, Tensor b1, Tensor b2, Tensor p)",
    tags=_TAGS,
)


def moe_experts(
    z: Tensor,
    w1: Tensor,
    w2: Tensor,
    ids: Tensor,
    p: Tensor,
    *,
    spec: ExpertSpec | str,
    w3: Tensor | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    keep: bool | None = None,
    site: str = "",
) -> Tensor:
    """u[t] = sum over k of p[t, k] * expert ids[t, k] of z[t]: the routed core of a mixture of experts.

    Products accumulate in at least float32; the hidden rows and each expert's output are rounded to
    z's dtype at most once, weights are multiplied and choices summed in at least float32, and the sum is
    rounded once. A LatentMoE layer calls this between its two projections.

    Args:
        z: (T, l), any strides, float16, bfloat16, float32 or float64.
        w1: (E, halves * I, l) in z's dtype, or (E, I, l) with gate "separate". With `spec.transposed` the
            last two axes of this, w2 and w3 are swapped.
        w2: (E, l, I).
        ids: (T, K), integers. A choice outside 0 ... E - 1 contributes nothing and gets no gradient.
        p: (T, K), floating point, routing weights; gradients to them are exact.
        spec: the formula of an expert, or its text: code that torch.compile captures needs the latter.
        w3: (E, I, l), the up projection, exactly with gate "separate".
        b1: (E, halves * I).
        b2: (E, l).
        keep: store the first product, (T * K, halves * I), or what says as much, for the backward pass rather than
            compute it again. By default where a gradient is needed.
        site: name under which a report finds this call.

    Returns:
        (T, l) in z's dtype. Weights of experts that no token chose get zero gradients, not None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        NotImplementedError: the device has no kernel; CUDA has none for float64.
    """
    if keep is None:
        keep = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (z, w1, w2, w3, b1, b2, p)
        )  # fmt: skip
    text = spec if isinstance(spec, str) else spec.text()
    return torch.ops.s2o.moe_experts(z, w1, w2, w3, b1, b2, ids, p, text, keep, site)[0]


def hidden_rows(pre: Tensor, spec: ExpertSpec) -> Tensor:
    """The activation of a formula by itself, for passes that compare: (rows, halves * I) -> (rows, I).

    With gate "separate" the gate's columns come first, then those of the up projection.
    """
    from s2o_inductor.kernels import moe_cpu

    return moe_cpu.hidden(pre, spec)


def is_routed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether passes put `moe_experts` in place of a model's own experts; see `ROUTED_DEVICES`."""
    return device.type in ROUTED_DEVICES and dtype in _KERNELS[device.type]


def check_operands(
    z: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, b1: Tensor | None, b2: Tensor | None, ids: Tensor, p: Tensor,
    spec: ExpertSpec,
) -> None:  # fmt: skip
    """Raises ValueError unless the operands of `moe_experts` fit together; reads shapes and dtypes alone."""
    # Lists and loops rather than generators: every call of a layer comes here, and at times its device waits.
    floats = [("z", z), ("w1", w1), ("w2", w2), ("w3", w3), ("b1", b1), ("b2", b2)]
    given = [(name, x) for name, x in floats if x is not None]
    dtype, device = z.dtype, z.device
    if dtype not in _DTYPES or [name for name, x in given if x.dtype != dtype]:
        kinds = ", ".join(f"{name} {x.dtype}" for name, x in given)
        raise ValueError(f"experts need tokens and weights of one floating dtype; got {kinds}: cast them first")
    if ids.device != device or p.device != device or [name for name, x in given if x.device != device]:
        raise ValueError(
            "experts need all tensors on one device; got " + ", ".join(f"{n} {x.device}" for n, x in given)
        )
    if ids.is_floating_point() or ids.dtype == torch.bool or not p.is_floating_point():
        raise ValueError(f"ids are integers and p is floating point; got {ids.dtype} and {p.dtype}")
    if (w3 is not None) != (spec.gate == "separate"):
        raise ValueError(
            f"w3 and gate 'separate' go together; got gate {spec.gate!r} {'with' if w3 is not None else 'without'} w3"
        )
    if z.dim() != 2 or w1.dim() != 3 or w2.dim() != 3 or ids.dim() != 2 or ids.shape != p.shape:
        raise ValueError(
            "experts need z (T, l), w1 and w2 of 3 dimensions, ids and p (T, K); got "
            f"{tuple(z.shape)}, {tuple(w1.shape)}, {tuple(w2.shape)}, {tuple(ids.shape)} and {tuple(p.shape)}"
        )
    number, width, inner = w2.shape[0], *(w2.shape[:0:-1] if spec.transposed else w2.shape[1:])
    columns = inner if spec.gate == "separate" else spec.halves * inner
    wanted = {
        "z": (ids.shape[0], width),
        "w1": (number, width, columns) if spec.transposed else (number, columns, width),
        "w3": tuple(w1.shape),
        "b1": (number, spec.halves * inner),
        "b2": (number, width),
    }
    for name, x in given:
        if name in wanted and x.shape != wanted[name]:
            raise ValueError(
                f"with w2 {tuple(w2.shape)} and ids {tuple(ids.shape)}, {name} must be {wanted[name]}; "
                f"got {tuple(x.shape)}"
            )


def _impl(
    z: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, b1: Tensor | None, b2: Tensor | None, ids: Tensor, p: Tensor,
    spec: str, keep: bool, site: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    formula = parse(spec)
    check_operands(z, w1, w2, w3, b1, b2, ids, p, formula)
    kernels = kernels_of(z.device, site)
    found: tuple[Tensor, Tensor] = kernels.forward(kernels.Experts.of(formula, w1, w2, w3, b1, b2), z, ids, p, keep)
    return found


def _backward_impl(
    grad: Tensor, z: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, b1: Tensor | None, b2: Tensor | None,
    ids: Tensor, p: Tensor, kept: Tensor, spec: str, wanted: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    formula, kernels = parse(spec), kernels_of(z.device)
    empty = _gradients(z, w1, w2, w3, b1, b2, p, wanted)
    into = [x if needed and x.numel() else None for x, needed in zip(empty, wanted, strict=True)]
    weights = [x.mT if x is not None and formula.transposed else x for x in into[1:4]]
    first = (weights[0],) if w3 is None else (weights[0], weights[2])
    kernels.backward(
        kernels.Experts.of(formula, w1, w2, w3, b1, b2), grad, z, ids, p, kept,
        kernels.Gradients(into[0], first, weights[1], into[4], into[5], into[6]),
    )  # fmt: skip
    return empty


def kernels_of(device: torch.device, site: str = "") -> ModuleType:
    """The module that runs experts on a device, as the report of `site` then says: `forward`, `backward`, `Experts`."""
    if device.type not in _KERNELS:
        raise NotImplementedError(
            f"s2o::moe_experts has no {device.type} kernel in this version; leave the layer as it is there "
            "(option 'exclude' with its path)"
        )
    if site and observed.get(site) is None:
        observed[site] = ("triton" if device.type == "cuda" else "cpu-grouped", "")
    return _imported(device.type)


@functools.cache
def _imported(device_type: str) -> ModuleType:
    if device_type != "cuda":
        from s2o_inductor.kernels import moe_cpu

        return moe_cpu
    from s2o_inductor.kernels import cuda_moe

    return cuda_moe


def _gradients(
    z: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, b1: Tensor | None, b2: Tensor | None, p: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """One contiguous tensor per operand, empty for what is absent or not wanted."""
    return tuple(
        torch.empty(x.shape if x is not None and needed else (0,), dtype=(z if x is None else x).dtype, device=z.device)
        for x, needed in zip((z, w1, w2, w3, b1, b2, p), wanted, strict=True)
    )


torch.library.impl(f"{NAMESPACE}::moe_experts", "CompositeExplicitAutograd", _impl)
torch.library.impl(f"{NAMESPACE}::moe_experts_backward", "CompositeExplicitAutograd", _backward_impl)


@torch.library.register_fake(f"{NAMESPACE}::moe_experts")
def _fake(
    z: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, b1: Tensor | None, b2: Tensor | None, ids: Tensor, p: Tensor,
    spec: str, keep: bool, site: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    formula = parse(spec)
    check_operands(z, w1, w2, w3, b1, b2, ids, p, formula)
    inner = w2.shape[1] if formula.transposed else w2.shape[2]
    rows = ids.shape[0] * ids.shape[1] if keep else 0
    return z.new_empty(z.shape), z.new_empty(rows, formula.halves * inner)


@torch.library.register_fake(f"{NAMESPACE}::moe_experts_backward")
def _backward_fake(
    grad: Tensor, z: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, b1: Tensor | None, b2: Tensor | None,
    ids: Tensor, p: Tensor, kept: Tensor, spec: str, wanted: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    return _gradients(z, w1, w2, w3, b1, b2, p, wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, spec, _keep, _site = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])
    ctx.spec = spec


def _backward(ctx: Any, grad: Tensor | None, _grad_kept: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 11
    *operands, kept = ctx.saved_tensors
    # In the order of the schema, ids left out.
    needs = [*ctx.needs_input_grad[:6], ctx.needs_input_grad[7]]
    found = torch.ops.s2o.moe_experts_backward(grad, *operands, kept, ctx.spec, needs)
    gradients = [x if needed else None for x, needed in zip(found, needs, strict=True)]
    return (*gradients[:6], None, gradients[6], None, None, None)


register_autograd("moe_experts", _impl, _backward, _setup_context)


def _autocast_rule(device_type: str) -> Any:
    """The weights' dtype decides, as in Hugging Face's grouped products: tokens and biases are cast to it.

    Weights of experts are most of a model: a cast to the autocast dtype in every step would cost more
    than the products it speeds up, and `torch.nn.functional.grouped_mm` makes none either.
    """

    def experts_autocast(
        z: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None, b1: Tensor | None, b2: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        biases = [None if x is None else x.to(w1.dtype) for x in (b1, b2)]
        with torch.autocast(device_type, enabled=False):
            return torch.ops.s2o.moe_experts(z.to(w1.dtype), w1, w2, w3, *biases, *rest)

    return experts_autocast


for _device_type in ("cpu", "cuda"):
    torch.library.impl(f"{NAMESPACE}::moe_experts", f"Autocast{_device_type.upper()}", _autocast_rule(_device_type))
