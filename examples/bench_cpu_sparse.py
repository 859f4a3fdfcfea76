"""Times causal attention on CPU: torch's SDPA against S2O sparse attention, on flat and on structured data.

    python examples/bench_cpu_sparse.py --lengths 8192 16384
    python examples/bench_cpu_sparse.py --file heads.pt
    python examples/bench_cpu_sparse.py --documents 512 4096

"flat" is standard normal: nothing to skip, the worst case. In "structured" a few keys are heavy for all queries, and
neighbours are for each other. --file takes {"q", "k", "v"} saved by torch.save, cut to each length. --documents packs
documents of so many tokens; torch's SDPA then runs on one after the other, which takes less than a mask would. Runs
alternate and medians are compared, so that a busy machine disturbs both alike; the load average before a row tells how
busy it was. What others take is not counted with --threads 1 --clock cpu, save for caches and memory. The density is
the share of visible pairs that were computed, the error relative, mean over heads of mean |o - dense|^2 over
mean |dense|^2.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from s2o_inductor.kernels import cpu_sparse
from s2o_inductor.kernels.reference_sparse import Sparse
from s2o_inductor.sparse_policy import Geometry

SHAPES = ("8/2x128", "8/8x64", "1/1x64")  # query heads / key/value heads x width
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def structured(length: int, heads: tuple[int, int], width: int) -> list[Tensor]:
    """q, k and v (1, H, S, D) whose scores, of deviation 1/2 else, rise by 4 to 8 at 2 % of the keys and by 5 nearby.

    Both terms take half of the features: one direction for the heavy keys of each key/value head, and waves of the
    position, random in frequency, whose product falls off as exp(-(distance / 128)^2 / 2).
    """
    generator = torch.Generator().manual_seed(1)
    group, half = heads[0] // heads[1], width // 2
    q, k, v = flat(length, heads, width)
    q /= 2
    unit = width**0.25  # two vectors of this length along each other score 1
    direction = torch.nn.functional.normalize(torch.randn(1, heads[1], 1, half, generator=generator), dim=3) * unit
    strength = torch.rand(1, heads[1], length, 1, generator=generator) * 4 + 4
    chosen = torch.rand(1, heads[1], length, 1, generator=generator) < 0.02
    k[..., :half] += direction * strength * chosen
    q[..., :half] += direction.repeat_interleave(group, dim=1)
    angle = torch.arange(length)[:, None] * torch.randn(1, half // 2, generator=generator) / 128
    wave = torch.cat([angle.cos(), angle.sin()], dim=1) * (5 / (half // 2)) ** 0.5 * unit
    q[..., half : half + wave.shape[1]] += wave
    k[..., half : half + wave.shape[1]] += wave
    return [q, k, v]


def flat(length: int, heads: tuple[int, int], width: int) -> list[Tensor]:
    """Standard normal q, k and v (1, H, S, D)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, length, width, generator=generator) for n in (heads[0], heads[1], heads[1])]


def dense(q: Tensor, k: Tensor, v: Tensor, document: int) -> Tensor:
    """torch's causal attention, inside documents of so many tokens; 0 is one document."""
    if document:
        parts = zip(*(x.split(document, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([dense(*part, 0) for part in parts], dim=2)
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def sparse(q: Tensor, k: Tensor, v: Tensor, document: int, budget: float) -> Sparse:
    """S2O's; exact for budget 0."""
    ids = (torch.arange(q.shape[2]) // document)[None] if document else None
    return cpu_sparse.forward(
        q, k, v, scale=q.shape[3] ** -0.5, budgets=(budget,), causal=True, window=None, keys=None,
        documents=None if ids is None else (ids, ids), max_density=1.0, geometry=Geometry(),
    )  # fmt: skip


def median_times(
    functions: list[Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Median seconds of `repeats` alternating runs of each function, after a run of each to warm up."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, taken in zip(functions, times, strict=True):
            start = clock()
            function()
            if repeat:
                taken.append(clock() - start)
    return [statistics.median(taken) for taken in times]


def compare(
    name: str, inputs: list[Tensor], document: int, budgets: list[float], repeats: int, clock: Callable[[], float]
) -> None:
    """Prints a row for each budget."""
    q, k, v = inputs
    name += f" {document}" if document else ""
    load = os.getloadavg()[0]
    times = median_times(
        [
            functools.partial(dense, q, k, v, document),
            *(functools.partial(sparse, q, k, v, document, b) for b in budgets),
        ],
        repeats,
        clock,
    )
    exact = dense(q, k, v, document).double()
    for budget, taken in zip(budgets, times[1:], strict=True):
        result = sparse(q, k, v, document, budget)
        off = (result.output.double() - exact).square().mean(dim=(0, 2, 3)) / exact.square().mean(dim=(0, 2, 3))
        density = float(result.pairs.sum() / result.visible.sum())
        print(
            f"{name:16}{q.shape[2]:7}  {q.shape[1]}/{k.shape[1]} x {q.shape[3]:<4} {str(q.dtype)[6:]:9}{budget:6.2f}"
            f"{times[0] * 1e3:9.0f}{taken * 1e3:8.0f}{times[0] / taken:7.2f}x{density:9.3f}{float(off.mean()):10.1e}"
            f"{load:6.1f}",
            flush=True,
        )


def shape(text: str) -> tuple[int, int, int]:
    """8/2x128 as (8, 2, 128)."""
    heads, _, width = text.partition("x")
    queries, _, keys = heads.partition("/")
    return int(queries), int(keys), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--shapes", type=shape, nargs="+", default=[shape(text) for text in SHAPES])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: seconds of the process, for --threads 1")
    parser.add_argument("--documents", type=int, nargs="+", default=[0], help="tokens of each; 0: one document")
    parser.add_argument("--file", type=Path, help="real q, k and v to time instead of made ones")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads; ", end="")
    print(f"milliseconds ({args.clock}), median of {args.repeats}")
    print(
        f"{'data':19}{'S':>4}  {'heads x D':12}{'dtype':8}{'budget':>7}{'SDPA':>9}{'s2o':>8}{'ratio':>8}{'density':>9}",
        end="",
    )
    print(f"{'error':>10}{'load':>6}")
    for length in args.lengths:
        for dtype in (getattr(torch, name) for name in args.dtypes):
            if args.file is not None:
                saved = torch.load(args.file)
                inputs = [saved[name][:, :, :length].to(dtype).contiguous() for name in ("q", "k", "v")]
                for document in args.documents:
                    compare(args.file.stem, inputs, document, args.budgets, args.repeats, CLOCKS[args.clock])
                continue
            for queries, keys, width in args.shapes:
                for make, document in itertools.product((flat, structured), args.documents):
                    inputs = [x.to(dtype) for x in make(length, (queries, keys), width)]
                    compare(make.__name__, inputs, document, args.budgets, args.repeats, CLOCKS[args.clock])


if __name__ == "__main__":
    main()
