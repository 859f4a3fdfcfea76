"""Calls of routed experts for the tests of the CUDA kernels: drawn from a seed, and compared with float64."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import torch
from test_moe_op import ROUTINGS, Problem, problem
from torch import Tensor

from s2o_inductor.kernels import reference_moe
from s2o_inductor.moe_list_ops import moe_experts_list
from s2o_inductor.moe_ops import moe_experts
from s2o_inductor.moe_spec import ExpertSpec
from s2o_inductor.testing import assert_close_to_gold


def on_device(case: Problem, device: str) -> Problem:
    """The same values there; strides are kept."""
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    return Problem(**{name: _moved(x, device) if isinstance(x, Tensor) else x for name, x in fields.items()})


def _moved(x: Tensor, device: str) -> Tensor:
    if device == "cpu":
        return x
    base = x if x._base is None else x._base
    return base.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def random_spec(draw: random.Random) -> ExpertSpec:
    gate = draw.choice(("none", "half", "half_swapped", "interleaved", "separate"))
    return ExpertSpec(
        activation=draw.choice(("identity", "relu", "relu2", "relu2", "silu", "silu", "gelu", "gelu_tanh")),
        gate=gate,
        score=draw.choice(("output", "output", "hidden", "input")),
        transposed=draw.random() < 0.4,
        alpha=draw.choice((1.0, 1.702)),
        limit=draw.choice((None, None, 1.5)),
        shift=0.0 if gate == "none" else draw.choice((0.0, 1.0)),
    )


def random_case(seed: int, *, device: str = "cpu") -> tuple[Problem, bool]:
    """A problem, small where an interpreter runs it, and whether the first product is kept."""
    draw = random.Random(seed)
    large = device != "cpu"
    experts = draw.choice((1, 3, 8, 40) if large else (1, 3, 8))
    choices = draw.randint(1, min(experts, 6))
    tokens = draw.choice((1, 2, 17, 33, 64, 100, 513, 2000) if large else (1, 7, 40))
    sizes = (16, 24, 64, 100, 128, 200, 321, 512) if large else (8, 16, 24, 37, 48)
    width, inner = draw.choice(sizes), draw.choice(sizes)
    dtypes = [torch.bfloat16] * 4 + [torch.float16, torch.float32] if large else [torch.float16, torch.float32]
    case = problem(
        random_spec(draw), tokens, choices, experts, width, inner, routing=draw.choice(ROUTINGS),
        bias=draw.random() < 0.4, seed=seed, strided=draw.random() < 0.15,
    )  # fmt: skip
    # Weights as a model starts with: outputs of order one, which float16 holds whatever the activation.
    for name, fan_in in (("w1", width), ("w3", width), ("w2", inner)):
        if (x := getattr(case, name)) is not None:
            x.mul_(fan_in**-0.5)
    return on_device(typed(case, draw.choice(dtypes)), device), draw.random() < 0.7


def typed(case: Problem, dtype: torch.dtype) -> Problem:
    """In another dtype, with strides as they are."""
    changed = {name: torch.empty_like(_whole(x), dtype=dtype) for name, x in case.tensors().items()}
    for name, x in case.tensors().items():
        changed[name] = changed[name].copy_(_whole(x)).as_strided(x.shape, x.stride(), x.storage_offset())
    return dataclasses.replace(case, **changed)


def _whole(x: Tensor) -> Tensor:
    return x if x._base is None else x._base


def leaves(case: Problem) -> Problem:
    """The same tensors, each a leaf that wants a gradient."""
    return dataclasses.replace(case, **{name: x.detach().requires_grad_() for name, x in case.tensors().items()})


def check(case: Problem, keep: bool = True, function: Any = None) -> None:
    """Output and gradients against float64, beside those of ordinary torch of the same dtype.

    They are those of `moe_experts`, which keeps the first product or not, or of another function.
    """
    run = functools.partial(moe_experts, keep=keep) if function is None else function
    case = leaves(case)
    gold, low = case.to(torch.float64).run(reference_moe.experts), case.run(reference_moe.experts)
    for name, actual in case.run(run).items():
        # A sum over tokens and choices in another order: the rounding of its terms, not of its result, counts.
        condition = 8.0 * (_cancelled(case, gold["p"]) if name == "p" else 1.0)
        assert_close_to_gold(actual, low[name], gold[name], what=f"{name} of {case.spec}", condition=condition)


def _cancelled(case: Problem, gold: Tensor) -> float:
    """How many times smaller than usual the gradient of `p` is, whose every number is one sum of random signs.

    Among many numbers the largest is no smaller than usual; a single one can be, and its terms round as ever.
    """
    if not 0 < gold.numel() <= 16 or not gold.any():
        return 1.0
    usual = [case.to(torch.float64).run(reference_moe.experts, draw=draw)["p"].square().mean() for draw in range(2, 10)]
    return max(1.0, float(torch.stack(usual).mean().sqrt() / gold.abs().max()))


def separate_experts(
    z: Tensor, w1: Tensor, w2: Tensor, ids: Tensor, p: Tensor, *, spec: ExpertSpec, **optional: Tensor | None
) -> Tensor:
    """`moe_experts` with a tensor for each expert, so that gradients of the operands can be compared."""

    def each(x: Tensor | None) -> list[Tensor]:
        return [] if x is None else [_alone(one) for one in x.unbind()]

    return moe_experts_list(
        z, each(w1), each(w2), ids, p, spec=spec, **{name: each(x) for name, x in optional.items()}
    )  # fmt: skip


def _alone(x: Tensor) -> Tensor:
    """A copy, with the strides of x, that shares its memory with no other tensor."""
    size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    base = x.new_empty(size).as_strided(x.shape, x.stride())
    return base.copy_(x)
