"""S2O sparse attention on one GPU: right first, then fast; beside torch's dense kernels.

    python examples/bench_sparse_gpu.py --quick                    # 16,384 tokens, a minute
    python examples/bench_sparse_gpu.py --json out.json            # 1,024 to 262,144 tokens
    python examples/bench_sparse_gpu.py --sweep --lengths 131072   # tile sizes, warps, stages, bundles

bfloat16, 32 query heads on 8 of size 128, batch 1, causal. Fixed densities stop at a share of the prefix; "budget"
stops by the estimated tail. TFLOP/s count the pairs computed. The heads are synthetic: a few keys that all queries of
a stretch look for, so that the order matters; no conclusion about quality can be drawn from them.
"""

from __future__ import annotations

import argparse
import fractions
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from s2o_inductor.kernels import cuda_sparse
from s2o_inductor.kernels import triton_sparse_order as ordering
from s2o_inductor.kernels.launching import Config
from s2o_inductor.kernels.reference_sparse import sparse_attention
from s2o_inductor.kernels.triton_sparse_groups import group_keys
from s2o_inductor.kernels.triton_sparse_tiles import Padding, Tiling
from s2o_inductor.sparse_policy import Geometry

HEADS, KV_HEADS, WIDTH = 32, 8, 128
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


def measure(run: Callable[[], Any], budget_ms: float = 150.0) -> float:
    """Median device time in milliseconds, after two warm-up runs."""
    times: list[float] = []
    for i in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end))
            if sum(times) > budget_ms and len(times) >= 3:
                break
    return statistics.median(times)


def dense_times(q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    times = {}
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
    ranges = cuda_sparse.ranges(tiling, density, k.shape[1], cuda_sparse.WORKSPACE_BYTES)

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


def sweep(q: Tensor, k: Tensor, v: Tensor) -> list[dict[str, Any]]:
    """Attention at density 0.1 for every way to run its two kernels; what does not fit the device is left out."""
    import triton

    originals = cuda_sparse.attend_configs, cuda_sparse.tail_configs
    variants = [(tile, keys, warps, stages) for tile in (128, 64) for keys in (32, 64, 128) for warps in (4, 8)
                for stages in (2, 3, 5)]  # fmt: skip
    rows = []
    try:
        for bundle in (512, 1024, 2048):
            for tile, keys, warps, stages in variants if bundle == 512 else [(128, 64, 8, 3), (128, 64, 4, 3)]:
                config = Config(tile, keys, warps, stages)
                cuda_sparse.attend_configs = lambda *_, config=config: [config]
                geometry = Geometry(tile=tile, bundle=bundle)
                try:
                    row = run_case(q, k, v, NEVER, 0.1, geometry)
                except triton.runtime.errors.OutOfResources:
                    continue
                rows.append({"kernel": "attend", "config": [tile, keys, warps, stages], **row})
        cuda_sparse.attend_configs = originals[0]
        for keys, warps, stages in ((32, 8, 2), (32, 8, 3), (64, 8, 2), (64, 8, 3), (64, 4, 2), (128, 8, 2)):
            config = Config(128, keys, warps, stages)
            cuda_sparse.tail_configs = lambda *_, config=config: [config]
            try:
                row = run_case(q, k, v, NEVER, 0.1, Geometry())
            except triton.runtime.errors.OutOfResources:
                continue
            rows.append({"kernel": "tail", "config": [128, keys, warps, stages], **row})
        cuda_sparse.tail_configs = originals[1]
    finally:
        cuda_sparse.attend_configs, cuda_sparse.tail_configs = originals
    return rows


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


def show(row: dict[str, Any]) -> None:
    cells = (f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    print("  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,4096,16384,32768,65536,131072,262144")
    parser.add_argument("--quick", action="store_true", help="16,384 tokens alone")
    parser.add_argument("--sweep", action="store_true", help="ways to run the kernels instead of lengths")
    parser.add_argument("--profile", action="store_true", help="time on the device by kernel, at density 0.1")
    parser.add_argument("--json", help="write the rows here as well")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; there is none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; times in ms")
    check()
    rows = []
    for length in [16384] if options.quick else [int(x) for x in options.lengths.split(",")]:
        q, k, v = operands(length)
        if options.sweep:
            found = sweep(q, k, v)
        elif options.profile:
            found = [{"tokens": length, **profile(q, k, v, NEVER, 0.1, Geometry())}]
        else:
            dense = dense_times(q, k, v)
            cases = [(NEVER, 0.05), (NEVER, 0.1), (NEVER, 0.2), (0.5, 1.0)]
            found = [{**run_case(q, k, v, *case, Geometry()), **dense} for case in cases]
            for row in found:
                row["cudnn / total"] = row["cudnn"] / row["total"]
        for row in found:
            show(row)
        rows += found
        if options.json:  # after every length: a run that is cut off leaves what it has
            Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
