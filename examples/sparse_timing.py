"""How long S2O sparse attention takes on one GPU, by stage, beside torch's dense kernels; right first, then fast.

    python examples/bench.py attention --lengths 16384                 # a minute
    python examples/bench.py attention --json out.json                 # 1,024 to 262,144 tokens
    python examples/bench.py attention --sweep --lengths 131072        # tile sizes, warps, stages, bundles
    python examples/bench.py attention --gather --lengths 131072       # what reading through an index costs

bfloat16, 32 query heads on 8 of size 128, batch 1, causal. Fixed densities stop at a share of the prefix; "budget"
stops by the estimated tail. TFLOP/s count the pairs computed. The heads are synthetic: a few keys that all queries of
a stretch look for, so that the order matters; no conclusion about quality can be drawn from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import fractions
import json
from collections.abc import Iterable
from typing import Any

import torch
from bench_dense import measure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from s2o_inductor.kernels import cuda_sparse
from s2o_inductor.kernels import triton_sparse_order as ordering
from s2o_inductor.kernels.launching import Config
from s2o_inductor.kernels.reference_sparse import sparse_attention
from s2o_inductor.kernels.triton_sparse_groups import group_keys
from s2o_inductor.kernels.triton_sparse_tiles import Padding, Tiling
from s2o_inductor.sparse_policy import Geometry

HEADS, KV_HEADS, WIDTH = 32, 8, 128
GEOMETRY = cuda_sparse.GEOMETRY
DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# A budget that is never kept before the density is reached, though it is not 0, which reads everything.
NEVER = 1e-30


def operands(length: int, heads: int = HEADS, kv_heads: int = KV_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as a projection leaves them; queries of 512 positions share a topic, which one key in 64 answers."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    topics = normal(16, WIDTH)
    q, k, v = (normal(1, length, n, WIDTH) for n in (heads, kv_heads, kv_heads))
    position = torch.arange(length, device="cuda")
    q += topics[position // 512 % 16][None, :, None] * 0.7
    k += topics[position * 7 // 64 % 16][None, :, None] * (position % 64 == 3)[None, :, None, None]
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def check() -> None:
    """The kernels against the reference in float64, all read: nothing is timed before that holds."""
    q, k, v = operands(2048, 4, 2)
    found = cuda_sparse.forward(q, k, v, budgets=(NEVER,))
    gold = sparse_attention(q.double(), k.double(), v.double(), budgets=(0.0,))
    error = float((found.output - gold.output).norm() / gold.output.norm())
    if not error < 1e-2 or not torch.equal(found.pairs, found.visible):
        raise SystemExit(f"sparse attention that reads everything is off by {error:.2e}")
    print(f"relative error with everything read: {error:.2e}")


def flex_time(q: Tensor, k: Tensor, v: Tensor) -> float:
    """FlexAttention with a causal block mask, compiled for this length."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    torch._dynamo.reset()
    mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return measure(lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True))


def dense_times(q: Tensor, k: Tensor, v: Tensor, flex: bool) -> dict[str, float]:
    times = {"flex": flex_time(q, k, v)} if flex else {}
    for name, backend in DENSE.items():
        with sdpa_kernel(backend):
            times[name] = measure(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    return times


def stage_times(q: Tensor, k: Tensor, v: Tensor, density: fractions.Fraction, geometry: Geometry) -> dict[str, float]:
    """Milliseconds to group keys, to rank (representatives, masses) and to order (scores, bins, table) all tiles."""
    tiling = Tiling(q.shape[2], k.shape[2], True, None, geometry)
    scale = WIDTH**-0.5
    groups = group_keys(k, v, Padding(), geometry)
    ranking = ordering.rank(q, k, scale, tiling, Padding(), groups)
    ranges = cuda_sparse.ranges(tiling, density, k.shape[1], q.shape[1] // k.shape[1], cuda_sparse.WORKSPACE_BYTES)

    def order() -> None:
        for tile0, count in ranges:
            ordering.order(ranking, k, tiling, density, tile0, count)

    return {
        "group": measure(lambda: group_keys(k, v, Padding(), geometry)),
        "rank": measure(lambda: ordering.rank(q, k, scale, tiling, Padding(), groups)),
        "order": measure(order),
    }


def run_case(q: Tensor, k: Tensor, v: Tensor, budget: float, density: float, geometry: Geometry) -> dict[str, Any]:
    """One row: milliseconds in all and by stage, density reached, TFLOP/s of attention on the pairs computed."""
    call = {"budgets": (budget,), "max_density": density, "geometry": geometry}
    result = cuda_sparse.forward(q, k, v, **call)
    pairs, visible = int(result.pairs.sum()), int(result.visible.sum())
    del result
    stages = stage_times(q, k, v, fractions.Fraction(density).limit_denominator(1 << 20), geometry)
    total = measure(lambda: cuda_sparse.forward(q, k, v, **call))
    attention = total - sum(stages.values())
    return {
        "tokens": q.shape[2], "budget": budget, "max_density": density, "bundle": geometry.bundle, "total": total,
        **stages, "attention": attention, "density": pairs / visible, "tflops": 4e-9 * WIDTH * pairs / attention,
    }  # fmt: skip


# Ways to run each kernel: rows, keys or groups at a time, warps, stages, and the most registers of a thread.
SWEEP: dict[str, tuple[Any, str, list[tuple[int, ...]]]] = {
    "attend_kernel": (
        cuda_sparse, "attend_configs",
        [
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3),
            (64, 32, 4, 4),
        ],
    ),
    "tail_kernel": (
        cuda_sparse, "tail_configs", [(128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 4, 3), (64, 64, 4, 2)]
    ),
    "scores_kernel": (
        ordering, "scores_configs",
        [(128, 128, 8, 2, 128), (128, 128, 8, 2), (128, 64, 4, 2, 168), (128, 64, 4, 3), (128, 64, 8, 3)],
    ),
}  # fmt: skip


def sweep(q: Tensor, k: Tensor, v: Tensor) -> Iterable[dict[str, Any]]:
    """Milliseconds of each kernel for every way to run it, at density 0.1; what does not fit the device is left out.

    A tile is as large as the rows of the attention kernel: with 64, twice as many tiles are ranked.
    """
    import triton

    for kernel, (module, name, configs) in SWEEP.items():
        original = getattr(module, name)
        try:
            for config in configs:
                one = Config(*config[:4], registers=(*config, None)[4])
                setattr(module, name, lambda *_, one=one: [one])
                geometry = dataclasses.replace(GEOMETRY, tile=config[0]) if kernel == "attend_kernel" else GEOMETRY
                try:
                    found = profile(q, k, v, NEVER, 0.1, geometry)
                except triton.runtime.errors.OutOfResources:
                    continue
                yield {"tokens": q.shape[2], "kernel": kernel, "config": config, "ms": found[kernel]}
        finally:
            setattr(module, name, original)


def profile(q: Tensor, k: Tensor, v: Tensor, budget: float, density: float, geometry: Geometry) -> dict[str, float]:
    """Milliseconds on the device of every kernel of one call, added up by name."""
    call = {"budgets": (budget,), "max_density": density, "geometry": geometry}
    cuda_sparse.forward(q, k, v, **call)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        cuda_sparse.forward(q, k, v, **call)
        torch.cuda.synchronize()
    found = {event.key[:60]: event.self_device_time_total / 1e3 for event in profiler.key_averages()}
    return dict(sorted(found.items(), key=lambda item: -item[1])[:16])


def gathered(q: Tensor, k: Tensor, v: Tensor) -> Iterable[dict[str, Any]]:
    """Milliseconds of the attention kernel alone for equal work read in several orders, for runs of several lengths.

    Every tile reads the same tenth of its prefix's keys, whole bundles: consecutive runs, random ones by position as
    the bins of an order leave them, or random ones as they come.
    """
    for run in (1, 8, 32):
        geometry = Geometry(run=run, clusters=0)
        tiling = Tiling(q.shape[2], k.shape[2], True, None, geometry)
        for order in ("consecutive", "random, sorted", "random"):
            table, listed = _pages(tiling, k.shape[1], order, k.device)

            def attend(table: Tensor = table, listed: Tensor = listed, geometry: Geometry = geometry) -> Any:
                return cuda_sparse.attend(q, k, v, table, listed, budgets=(NEVER,), geometry=geometry)

            pairs, ms = int(attend().pairs.sum()), measure(attend)
            yield {"tokens": q.shape[2], "run": run, "order": order, "ms": ms, "tflops": 4e-9 * WIDTH * pairs / ms}


def _pages(tiling: Tiling, kv_heads: int, order: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Page table (1, Hkv, tiles, places) and its lengths (1, Hkv, tiles) of a tenth of every prefix."""
    generator = torch.Generator(device).manual_seed(0)
    prefixes = [tiling.prefix(tile) for tile in range(tiling.count)]
    run = tiling.geometry.run
    counts = [min(tiling.listed(high - low, fractions.Fraction(1, 10)), (high - low) // run) for low, high in prefixes]
    table = torch.full((1, kv_heads, tiling.count, max(counts)), -1, dtype=torch.int32, device=device)
    for tile, ((low, high), count) in enumerate(zip(prefixes, counts, strict=True)):
        for head in range(kv_heads if count else 0):
            runs = torch.arange(count, device=device)
            if order != "consecutive":
                runs = torch.randperm((high - low) // run, generator=generator, device=device)[:count]
            table[0, head, tile, :count] = low // run + (runs.sort().values if "sorted" in order else runs)
    listed = torch.tensor(counts, dtype=torch.int32, device=device).expand(1, kv_heads, -1).contiguous()
    return table, listed


def show(row: dict[str, Any]) -> None:
    cells = (f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    print("  ".join(cells), flush=True)


def timed(q: Tensor, k: Tensor, v: Tensor, flex: bool) -> Iterable[dict[str, Any]]:
    """Fixed densities, and the default budget."""
    dense = dense_times(q, k, v, flex)
    for budget, density in ((NEVER, 0.05), (NEVER, 0.1), (NEVER, 0.2), (0.5, 1.0)):
        row = {**run_case(q, k, v, budget, density, GEOMETRY), **dense}
        yield {**row, "cudnn / total": row["cudnn"] / row["total"]}


def run(options: argparse.Namespace) -> None:
    """`bench.py attention`, with the options it gives: one row for each length and density, printed as measured."""
    if not torch.cuda.is_available():
        raise SystemExit("bench.py attention needs a CUDA device; there is none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; times in ms")
    check()
    rows = []
    for length in options.lengths:
        q, k, v = operands(length)
        found: Iterable[dict[str, Any]]
        if options.sweep:
            found = sweep(q, k, v)
        elif options.gather:
            found = gathered(q, k, v)
        elif options.profile:
            found = [{"tokens": length, **profile(q, k, v, NEVER, 0.1, GEOMETRY)}]
        else:
            found = timed(q, k, v, options.flex)
        for row in found:
            show(row)
            rows.append(row)
        if options.json:  # after every length: a run that is cut off leaves what it has
            options.json.write_text(json.dumps(rows, indent=1))
