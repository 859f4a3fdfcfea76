"""Exact attention on a GPU, at size: every route against float64, repeatable, and beyond 2^31 bytes.

Needs a CUDA device; `OMP_NUM_THREADS=1 pytest -n 15 tests/gpu` compiles kernels side by side.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from test_dense_numerics import SPECS, Problem, leaves_for, problem
from torch import Tensor

from s2o_inductor import ops
from s2o_inductor.kernels import cuda, dense, reference
from s2o_inductor.kernels import mask as masks
from s2o_inductor.mask_spec import MaskSpec
from s2o_inductor.testing import LAYOUTS, assert_close_to_gold, in_memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")
CAUSAL = MaskSpec(upper="0")


class GpuProblem(Problem):
    """A problem whose yardstick is the reference in low precision: torch's kernel for the CPU is not here."""

    def ordinary(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        output, lse, grads = self.reference(self.q.dtype)
        if self.sinks is not None:
            grads[3] = grads[3].to(self.sinks.dtype)
        return output, lse.to(dense.lse_dtype(self.q.dtype)), grads

    @property
    def condition(self) -> float:
        """Types that accumulate in themselves: errors of sums over keys and widths grow like the root of the terms."""
        if self.q.dtype in (torch.float16, torch.bfloat16):
            return 1.0
        return math.sqrt(self.q.shape[3] + self.k.shape[2])

    def redrawn(self, seed: int) -> Problem:
        return on_gpu(super().redrawn(seed))


def on_gpu(case: Problem) -> GpuProblem:
    """The same problem with its tensors on the GPU."""
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    moved = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in fields.items()}
    return GpuProblem(**{**moved, "leaves": tuple(x.to(DEVICE) for x in case.leaves)})


def gpu_problem(name: str = "causal", dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Problem:
    fields = {"batch": 2, "heads": (8, 2), "lengths": (1000, 1000), "widths": (128, 128), **fields}
    lengths = fields["lengths"]
    fields.setdefault("spec", SPECS[name])
    fields.setdefault("leaves", leaves_for(fields["batch"], *lengths))
    return on_gpu(problem(dtype=dtype, params=(lengths[1] - lengths[0], 70), **fields))


def random_case(seed: int) -> Problem:
    """Sizes, types, masks and memory layouts drawn from `seed`."""
    draw = random.Random(seed)
    widths = draw.choice([(64, 64), (128, 128), (128, 128), (80, 80), (192, 128), (40, 64)])
    group, kv_heads = draw.choice([1, 2, 4, 7]), draw.choice([1, 2, 3])
    batch = draw.choice([1, 2, 3])
    queries = draw.choice([1, 2, 17, 63, 64, 65, 128, 129, 200, 333, 700])
    keys = queries if draw.random() < 0.4 else draw.choice([1, 31, 64, 65, 127, 128, 200, 513, 900])
    dtype = draw.choice([torch.bfloat16] * 6 + [torch.float16, torch.float32])
    spec = SPECS[draw.choice(list(SPECS))]
    spec = dataclasses.replace(spec, empty=draw.choice(["zero", "zero", "mean"]))
    mask = None
    if draw.random() < 0.3:
        generator = torch.Generator().manual_seed(seed)
        shape = (draw.choice([1, batch]), draw.choice([1, group * kv_heads]), queries, keys)
        mask = torch.rand(shape, generator=generator) < draw.choice([0.1, 0.9])
        if draw.random() < 0.5:
            mask = torch.randn(shape, generator=generator).masked_fill(mask, float("-inf"))
        spec = dataclasses.replace(spec, dense=True)
    heads = (group * kv_heads, kv_heads)
    case = problem(
        batch, heads, (queries, keys), widths, dtype, seed, spec=spec, mask=mask,
        leaves=leaves_for(batch, queries, keys, seed), params=(keys - queries, 70),
        sinks=torch.randn(heads[0]) if draw.random() < 0.2 else None,
        scale=draw.choice([None, None, 0.2, -0.1 if keys > 1 else 0.1]),
    )  # fmt: skip
    case = on_gpu(case)
    layouts = {name: in_memory(getattr(case, name), draw.choice(LAYOUTS)) for name in ("q", "k", "v", "grad")}
    return dataclasses.replace(case, **layouts)


@pytest.mark.parametrize("seed", range(120))
def test_random_cases(seed: int) -> None:
    random_case(seed).check()


@pytest.mark.parametrize("name", SPECS)
def test_every_mask_term(name: str) -> None:
    gpu_problem(name).check()
    gpu_problem(name, lengths=(3, 2000)).check()


@pytest.mark.parametrize(
    ("route", "name", "fields"),
    [
        ("cudnn", "causal", {}),
        ("cudnn", "full", {"lengths": (300, 555)}),
        ("cudnn", "causal", {"widths": (64, 64), "dtype": torch.float16}),
        ("flash", "causal", {}),
        ("flash", "full", {"lengths": (1, 3000)}),
        ("flash", "full", {"lengths": (5, 3000), "widths": (256, 256)}),
        ("efficient", "causal", {"dtype": torch.float32, "lengths": (500, 500)}),
        ("efficient", "full", {"dtype": torch.float32, "lengths": (70, 501), "heads": (3, 3)}),
        ("triton", "causal", {"widths": (256, 256)}),
        ("triton", "documents", {"widths": (320, 320), "lengths": (200, 200)}),
        ("triton", "window", {"widths": (512, 512), "lengths": (200, 200)}),
        ("math", "documents", {"lengths": (300, 300)}),
        ("math", "all", {"lengths": (300, 300), "dtype": torch.float64}),
    ],
)
def test_every_route(route: str, name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Routes forced, forward and backward, where the choice would be another at this size."""
    monkeypatch.setattr(cuda, "choose_route", lambda facts: route)
    if route != "triton":
        monkeypatch.setattr(cuda, "backward_route", lambda call, q, k, v: route)
    case = gpu_problem(name, **fields)
    case.check()
    for layout in LAYOUTS:
        dataclasses.replace(case, **{x: in_memory(getattr(case, x), layout) for x in ("q", "k", "v", "grad")}).check()


@pytest.mark.parametrize("batch", [1, 4])
def test_against_float64_at_4096(batch: int) -> None:
    """32 query heads on 8, four heads of the result at a time."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v, grad = (
        torch.randn(batch, 4096, heads, 128, generator=generator, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
        for heads in (32, 8, 8, 32)
    )
    keep = torch.arange(4096, device=DEVICE) < torch.tensor([[4096], [3000], [2], [2047]], device=DEVICE)[:batch]
    spec = MaskSpec(upper="0", keys="L0[b, k]")
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = ops.attention(*inputs, leaves=[keep], spec=spec.text())
    grads = torch.autograd.grad(out, inputs, grad)
    visible = masks.evaluate(spec, None, [keep], [], batch, 4096, 4096, DEVICE)
    for b in range(batch):
        for kv_head in (0, 7):
            at = (slice(b, b + 1), slice(4 * kv_head, 4 * kv_head + 4))
            kv_at = (slice(b, b + 1), slice(kv_head, kv_head + 1))
            results = []
            for dtype in (torch.float64, torch.bfloat16):
                part = [x.detach().to(dtype, copy=True).requires_grad_() for x in (q[at], k[kv_at], v[kv_at])]
                o, s = reference.attention(*part, visible=visible[b : b + 1])
                results.append((o.detach(), s.detach(), *torch.autograd.grad(o, part, grad[at].to(dtype))))
            actual = (out[at].detach(), lse[at], grads[0][at], grads[1][kv_at], grads[2][kv_at])
            for what, a, gold, low in zip(("output", "lse", "dq", "dk", "dv"), actual, *results, strict=True):
                assert_close_to_gold(a, low.to(a.dtype), gold, what=what, dtype=torch.bfloat16)


@pytest.mark.parametrize("length", [8192, 32768])
def test_triton_agrees_with_cudnn_when_long(length: int) -> None:
    """No float64 at this length: two kernels that share nothing must differ by rounding alone."""
    q, k, v, grad = (
        torch.randn(1, length, heads, 128, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
        for heads in (8, 2, 2, 8)
    )
    call = dense.Call.of(q, k, v, None, [], [], [], CAUSAL, None, None, 128**-0.5, 0.0)
    results = {}
    for route in ("cudnn", "triton"):
        forced = dataclasses.replace(call, route=route)
        out, lse = cuda.forward(forced, q, k, v)
        results[route] = (out, lse)
    from s2o_inductor.kernels import triton_attention_backward

    ours = triton_attention_backward.backward(grad, q, k, v, *results["triton"], cuda.tile_mask(call), call.scale)
    theirs = cuda.backward(dataclasses.replace(call, route="cudnn"), grad, q, k, v, *results["cudnn"])
    assert cuda.backward_route(call, q, k, v) == ("cudnn" if length == 32768 else "triton")
    for a, b in zip((*results["triton"], *ours), (*results["cudnn"], *theirs), strict=True):
        error = (a.float() - b.float()).norm() / b.float().norm()
        assert error < 5e-3, float(error)


def test_beyond_two_to_the_31_bytes_and_elements() -> None:
    """One sequence of 600,000 tokens in a fused QKV projection: offsets pass 2^31 elements, twice over in bytes."""
    length, heads, width, window = 600_000, 32, 128, 256
    fused = torch.randn(1, length, 48, width, device=DEVICE, dtype=torch.bfloat16)
    q, k, v = (x.transpose(1, 2) for x in fused.split([heads, 8, 8], dim=2))
    assert q.stride(2) * (length - 1) > 2**31
    spec = MaskSpec(lower=f"1 - {window}", upper="0")
    out, lse = ops.attention(q, k, v, spec=spec.text())
    assert out.isfinite().all() and lse.isfinite().all()
    grad = torch.randn_like(out)
    call = dense.Call.of(q, k, v, None, [], [], [], spec, None, None, width**-0.5, 0.0)
    grads = dense.backward(call, grad, q, k, v, out, lse)[:3]
    first = length - 1024  # rows from here on see no key before; gradients of their keys come from rows after
    part = [x[:, :n, first:].double().requires_grad_() for x, n in ((q, 4), (k, 1), (v, 1))]
    visible = masks.evaluate(spec, None, [], [], 1, 1024, 1024, DEVICE)
    gold, _ = reference.attention(*part, visible=visible)
    gold_grads = torch.autograd.grad(gold, part, grad[:, :4, first:].double())
    low_part = [x.detach().bfloat16().requires_grad_() for x in part]
    low, _ = reference.attention(*low_part, visible=visible)
    low_grads = torch.autograd.grad(low, low_part, grad[:, :4, first:])
    late = slice(window, None)
    assert_close_to_gold(out[:, :4, first:][:, :, late], low.detach()[:, :, late], gold.detach()[:, :, late])
    for a, n, b, c in zip(grads, (4, 1, 1), low_grads, gold_grads, strict=True):
        assert_close_to_gold(a[:, :n, first:][:, :, late], b[:, :, late], c[:, :, late])


@pytest.mark.parametrize("name", ["causal", "documents"])
def test_bitwise_repeatable(name: str) -> None:
    case = gpu_problem(name, lengths=(2000, 2000))
    first = case.run()
    for _ in range(5):
        again = case.run()
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert all(torch.equal(a, b) for a, b in zip(first[2], again[2], strict=True))


@pytest.mark.parametrize("width", [64, 128])
def test_dropout(width: int) -> None:
    """Unit vectors as values read off which weights were dropped; the backward must drop the same."""
    case, seed, p = gpu_problem("causal", lengths=(width, width)), torch.tensor([42], device=DEVICE), 0.25
    call = dense.Call.of(case.q, case.k, case.v, None, [], [], [], CAUSAL, None, seed, 0.1, p)
    assert call.route == "triton"
    unit = torch.eye(width, device=DEVICE, dtype=torch.bfloat16).expand(2, 2, width, width)
    kept = cuda.forward(call, case.q, case.k, unit)[0] > 0
    seen = torch.ones(width, width, dtype=torch.bool, device=DEVICE).tril()
    assert abs(float(kept[..., seen].float().mean()) - (1 - p)) < 0.02
    out, lse = cuda.forward(call, case.q, case.k, case.v)
    grads = cuda.backward(call, case.grad, case.q, case.k, case.v, out, lse)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        part = [x.detach().to(dtype, copy=True).requires_grad_() for x in (case.q, case.k, case.v)]
        o, _ = reference.attention(*part, visible=seen, scale=0.1, dropout_keep=kept, dropout_p=p)
        results.append((o.detach(), *torch.autograd.grad(o, part, case.grad.to(dtype))))
    for a, gold, low in zip((out, *grads), *results, strict=True):
        assert_close_to_gold(a, low, gold)


def test_captured_in_a_cuda_graph() -> None:
    """No call waits for the device or chooses by what a tensor holds, so a replay follows its inputs."""
    case = gpu_problem("causal, padding", batch=2, lengths=(500, 500))
    case.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run()
    for x in (case.q, case.k, case.v, case.grad):
        x.copy_(torch.randn_like(x))
    case.leaves[0].copy_(torch.arange(500, device=DEVICE) < torch.tensor([[60], [400]], device=DEVICE))
    graph.replay()
    fresh = case.run()
    assert torch.equal(captured[0], fresh[0]) and torch.equal(captured[1], fresh[1])
    assert all(torch.equal(a, b) for a, b in zip(captured[2], fresh[2], strict=True))
