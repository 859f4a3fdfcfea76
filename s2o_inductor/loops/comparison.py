"""A module before and after a change: runs it on varied inputs and compares values, gradients and buffers.

The bound is that of DESIGN.md, "Verified rewriting", with the unchanged module in float64 as the truth;
modules too large to copy in float64 are compared with themselves in their own dtype.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from s2o_inductor.passes import verify

# By how much outliers exceed other values: beyond limits such as the 7 of GPT-OSS, within float16.
LARGE = 30.0
# Positional and keyword arguments of one call of a module.
Inputs: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def call(module: nn.Module, run: Inputs) -> Any:
    """What a module's forward returns; its own hooks, which are the user's, do not run."""
    return module.forward(*run[0], **run[1])


def runs(module: nn.Module, run: Inputs) -> bool:
    """Whether a module takes inputs."""
    try:
        with torch.no_grad():
            call(module, run)
    except Exception:  # made-up inputs: that they do not fit is expected
        return False
    return True


def moved(run: Inputs, device: torch.device | str, dtype: torch.dtype | None = None) -> Inputs:
    """The same inputs on a device; floating ones in another dtype, if one is given."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype if dtype is not None and x.is_floating_point() else x.dtype)

    return tuple(map(one, run[0])), {name: one(x) for name, x in run[1].items()}


def on_cpu(module: nn.Module, dtype: torch.dtype | None = None, stacked: tuple[int, int] | None = None) -> nn.Module:
    """A copy on the CPU, in another floating dtype if one is given; with `stacked` (E, e) of the first e experts alone.

    Nothing is allocated on the module's own device.
    """
    many, few = stacked or (1, 1)

    def copied(x: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and x.is_floating_point() else x.dtype
        return x.detach().to("cpu", wanted, copy=True)

    def kept(x: Tensor) -> Tensor:
        return x[: x.shape[0] * few // many] if stacked and x.dim() > 1 else x

    # Tensors that are attributes and no buffers lie on the device as well.
    others = (x for one in module.modules() for x in vars(one).values() if isinstance(x, Tensor))
    memo: dict[int, Any] = {id(x): copied(x) for x in itertools.chain(module.buffers(), others)}
    memo |= {id(x): nn.Parameter(copied(kept(x.detach())), x.requires_grad) for x in module.parameters()}
    found = copy.deepcopy(module, memo)
    for one in found.modules() if stacked else ():
        vars(one).update({name: few for name, value in vars(one).items() if type(value) is int and value == many})
    return found


def variants(run: Inputs) -> Iterator[Inputs]:
    """A run on other values, on large ones, on a single token, on tokens all alike, and with all choices on one expert.

    What a module does with outliers, or with experts of few tokens, shows in no other run. A module that is
    made for more than one token may not take a single one.
    """
    generator = torch.Generator().manual_seed(1)

    def changed(x: Any, kind: str) -> Any:
        if not isinstance(x, Tensor) or x.numel() == 0:
            return x
        if x.is_floating_point():
            fresh = torch.randn(x.shape, generator=generator, dtype=torch.float64) * x.double().std().nan_to_num(1.0)
            fresh = (fresh * LARGE if kind == "large" else fresh).to(x.device, x.dtype)
            flat = fresh.reshape(-1, x.shape[-1])
            fresh = flat[:1].expand_as(flat).reshape(x.shape) if kind == "alike" else fresh
        else:
            fresh = torch.full_like(x, int(x.max())) if kind == "one" else x
        return fresh[(slice(1),) * max(x.dim() - 1, 1)] if kind == "single" else fresh

    for kind in ("random", "alike", "one", "large", "single"):
        yield tuple(changed(x, kind) for x in run[0]), {name: changed(x, kind) for name, x in run[1].items()}


def results(module: nn.Module, run: Inputs, training: bool) -> list[Tensor | None]:
    """Outputs, gradients with respect to float inputs and parameters, and what buffers hold afterwards."""
    module.train(training)
    args, kwargs = run
    leaves: list[Tensor] = []
    buffers = [(x, x.detach().clone()) for x in module.buffers()]

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        leaves.append(x.detach().clone().requires_grad_())
        return leaves[-1] * 1.0  # a module may write to its inputs, but not to leaves

    torch.manual_seed(0)
    result = module.forward(*map(leaf, args), **{name: leaf(x) for name, x in kwargs.items()})
    outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    wanted = [*leaves, *(x for x in module.parameters() if x.requires_grad)]
    differentiable = [x for x in outputs if x.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if differentiable:
        generator = torch.Generator().manual_seed(2)
        seeds = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in differentiable]
        grads = torch.autograd.grad(differentiable, wanted, seeds, allow_unused=True)
    seen = [x.detach().clone() for x, _ in buffers]
    with torch.no_grad():
        for x, before in buffers:
            x.copy_(before)
    return [*(x.detach() for x in outputs), *grads, *seen]


def compare(
    actual: Sequence[list[Tensor | None]], expected: Sequence[tuple[list[Tensor | None], list[Tensor | None] | None]]
) -> verify.Outcome:
    """Results after a change against those before it, each with those of the float64 copy where there is one."""
    for ours, (theirs, gold) in zip(actual, expected, strict=True):
        if len(ours) != len(theirs):
            return verify.Outcome(False, f"{len(ours)} results in place of {len(theirs)}")
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a is None and b is None:
                continue
            # A loop leaves experts without tokens without a gradient, which means zero.
            a = torch.zeros_like(b) if a is None and b is not None else a
            b = torch.zeros_like(a) if b is None and a is not None else b
            assert a is not None and b is not None
            if not b.is_floating_point():
                outcome = verify.Outcome(bool(torch.equal(a, b)), "expert numbers differ")
            elif gold is not None:
                exact = gold[index]
                truth = torch.zeros_like(b, dtype=torch.float64) if exact is None else exact.to(b.device)
                # Gradients are sums over tokens and choices in another order.
                outcome = verify.within_bound(a, b, truth, terms=b.shape[-1] if b.dim() else 1, condition=8.0)
            else:
                outcome = verify.Outcome(close(a, b), "not equal up to rounding")
            if not outcome.passed:
                return outcome
    return verify.Outcome(True, "values and gradients verified" + (" in float64" if expected[0][1] is not None else ""))


def close(actual: Tensor, expected: Tensor) -> bool:
    """Equal up to the rounding of a sum of few terms in their dtype; parts in float32 are allowed to be."""
    eps = max(torch.finfo(expected.dtype).eps, 1e-7)
    error = (actual.double() - expected.double()).square().mean().sqrt()
    return bool(error <= 8 * eps * expected.double().square().mean().sqrt())
