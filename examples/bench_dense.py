"""Exact attention on one GPU: s2o's op beside what torch offers, for the masks that models use.

    python examples/bench_dense.py                         # 4,096 to 32,768 tokens, forward and backward
    python examples/bench_dense.py --masks causal,window --lengths 65536 --forward-only
    python examples/bench_dense.py --short                 # short prompts and decoding: device and host time
    python examples/bench_dense.py --plans                 # what cuDNN's plan for a new shape costs

bfloat16, 32 query heads on 8 of size 128. TFLOP/s count visible pairs alone. All ratios are of one run. Every
contender's output is compared with s2o's first; one that is off by more than rounding stops the run.
Masks, plans and block masks are built outside the timed region.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from s2o_inductor import ops
from s2o_inductor.kernels import cuda, dense, mask
from s2o_inductor.mask_spec import MaskSpec

DEVICE = torch.device("cuda")
HEADS, KV_HEADS, WIDTH = 32, 8, 128
SCALE = WIDTH**-0.5
WINDOW, DOCUMENT = 4096, 2000
MASKS = ("causal", "window", "padding", "packed", "dense")
# Seconds that compiling FlexAttention may take in all; what does not fit is left out of the table.
FLEX_SECONDS = 90.0


@dataclasses.dataclass
class Case:
    """One mask at one length.

    Attributes:
        batch: B.
        spec, leaves, mask: as s2o's op takes them.
        pairs: visible (query, key) pairs of one head, summed over the batch.
        mask_mod: the same mask for FlexAttention, or None where that would read a dense tensor.
        plain: whether torch's kernels know it as `is_causal`.
    """

    batch: int
    spec: MaskSpec
    leaves: list[Tensor]
    mask: Tensor | None
    pairs: float
    mask_mod: Callable[..., Tensor] | None
    plain: bool = False


def make_case(name: str, length: int) -> Case:
    triangle = length * (length + 1) / 2
    if name == "causal":
        return Case(1, MaskSpec(upper="0"), [], None, triangle, lambda b, h, q, k: q >= k, plain=True)
    if name == "window":
        short = min(WINDOW, length)
        spec = MaskSpec(lower=f"1 - {WINDOW}", upper="0")
        pairs = short * (short + 1) / 2 + (length - short) * short
        return Case(1, spec, [], None, pairs, lambda b, h, q, k: (q >= k) & (q - k < WINDOW))
    if name == "padding":  # batch of 4, right-padded to the longest
        lengths = torch.tensor([length, length * 3 // 4, length // 2, length // 4], device=DEVICE)
        keep = torch.arange(length, device=DEVICE) < lengths[:, None]
        pairs = sum(n * (n + 1) / 2 + (length - n) * n for n in lengths.tolist())
        spec = MaskSpec(upper="0", keys="L0[b, k]")
        return Case(4, spec, [keep], None, pairs, lambda b, h, q, k: (q >= k) & keep[b, k])
    if name == "packed":  # documents of one length, one after another
        documents = (torch.arange(length, device=DEVICE) // DOCUMENT)[None]
        sizes = [DOCUMENT] * (length // DOCUMENT) + [length % DOCUMENT]
        spec = MaskSpec(upper="0", equal=("L0[b, q]", "L0[b, k]"))
        pairs = sum(n * (n + 1) / 2 for n in sizes)
        return Case(
            1, spec, [documents], None, pairs, lambda b, h, q, k: (q >= k) & (documents[0, q] == documents[0, k])
        )
    if name == "dense":  # a causal mask that arrives as a tensor
        visible = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()[None, None]
        return Case(1, MaskSpec(dense=True), [], visible, triangle, None)
    raise ValueError(f"mask must be one of {MASKS}; got {name!r}")


def operands(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v, grad = (
        torch.randn(batch, length, heads, WIDTH, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    return q, k, v, grad


def measure(run: Callable[[], Any], budget_ms: float = 60.0) -> float:
    """Median device time in milliseconds, after two warm-up runs."""
    times: list[float] = []
    for i in range(32):
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


# A contender returns its output, and gradients of q, k and v when called with a second function.
Contender = tuple[Callable[[], Tensor], Callable[[], Any] | None]


def by_autograd(run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None) -> Contender:
    if grad is None:
        return lambda: run(q, k, v), None
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = run(*leaves)
    return lambda: run(q, k, v), lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def s2o(case: Case, q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, route: str | None = None) -> Contender:
    """The op, or one of its routes forced."""
    sizes = (q.shape[0], q.shape[2], k.shape[2], DEVICE)
    plan = () if case.spec.is_band else mask.plan(case.mask, case.leaves, [], case.spec, *sizes)
    call = dense.Call.of(q, k, v, case.mask, case.leaves, plan, [], case.spec, None, None, SCALE, 0.0)
    if route is None:
        text = case.spec.text()
        out, lse = ops.attention(q, k, v, case.mask, leaves=case.leaves, plan=plan, spec=text)
        return (
            lambda: ops.attention(q, k, v, case.mask, leaves=case.leaves, plan=plan, spec=text)[0],
            None if grad is None else lambda: dense.backward(call, grad, q, k, v, out, lse),
        )
    call = dataclasses.replace(call, route=route)
    out, lse = cuda.forward(call, q, k, v)

    def backward() -> Any:
        original, cuda.backward_route = cuda.backward_route, lambda *_: route
        try:
            return cuda.backward(call, grad, q, k, v, out, lse)
        finally:
            cuda.backward_route = original

    return lambda: cuda.forward(call, q, k, v)[0], None if grad is None else backward


_flex_spent = 0.0


def flex(case: Case, q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None) -> Contender | None:
    global _flex_spent
    if case.mask_mod is None or _flex_spent > FLEX_SECONDS:
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    started = time.perf_counter()
    length = q.shape[2]
    batch = case.batch if case.batch > 1 else None
    block_mask = torch.compile(create_block_mask)(case.mask_mod, batch, None, length, length, device=DEVICE)
    compiled = torch.compile(flex_attention, dynamic=False)
    contender = by_autograd(
        lambda *qkv: compiled(*qkv, block_mask=block_mask, scale=SCALE, enable_gqa=True), q, k, v, grad
    )
    for run in contender:
        if run is not None:
            run()
    torch.cuda.synchronize()
    _flex_spent += time.perf_counter() - started
    return contender


def contenders(case: Case, length: int, with_backward: bool) -> dict[str, Callable[[], Contender | None]]:
    q, k, v, grad_ = operands(case.batch, length)
    grad = grad_ if with_backward else None
    found: dict[str, Callable[[], Contender | None]] = {"s2o": lambda: s2o(case, q, k, v, grad)}
    if case.plain:
        found["s2o triton"] = lambda: s2o(case, q, k, v, grad, "triton")
        found["cudnn"] = lambda: s2o(case, q, k, v, grad, "cudnn")
        found["flash"] = lambda: s2o(case, q, k, v, grad, "flash")
    else:
        # What a compiled Hugging Face model does today: keys and values repeated, a boolean mask.
        def repeated(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            b, c = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (b, c))
            return scaled_dot_product_attention(a, b, c, attn_mask=visible())

        def grouped(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return scaled_dot_product_attention(a, b, c, attn_mask=visible(), enable_gqa=True)

        built: list[Tensor] = []

        def visible() -> Tensor:
            if not built:
                sizes = (case.batch, length, length, DEVICE)
                built.append(mask.evaluate(case.spec, case.mask, case.leaves, [], *sizes))
            return built[0]

        found["sdpa, mask"] = lambda: by_autograd(repeated, q, k, v, grad)
        found["sdpa, mask, gqa"] = lambda: by_autograd(grouped, q, k, v, grad)
    found["flex"] = lambda: flex(case, q, k, v, grad)
    return found


def run_case(name: str, length: int, with_backward: bool) -> list[dict[str, Any]]:
    """Rows of the table: one per pass, milliseconds by contender."""
    case = make_case(name, length)
    rows = [{"mask": name, "length": length, "batch": case.batch, "pass": p} for p in ("forward", "backward")]
    expected = None
    for label, make in contenders(case, length, with_backward).items():
        try:
            contender = make()
        except torch.OutOfMemoryError:
            rows[0][label] = rows[1][label] = None
            continue
        if contender is None:
            continue
        forward, backward = contender
        out = forward()
        if expected is None:
            expected = out
        off = float((out - expected).abs().max() / expected.abs().max())
        if not off < 0.02:
            raise AssertionError(f"{label} differs from s2o by {off:.3f} of the greatest output for {name}, {length}")
        del out
        rows[0][label] = measure(forward)
        if backward is not None:
            rows[1][label] = measure(backward)
        del contender, forward, backward
        torch.cuda.empty_cache()
    work = 4.0 * WIDTH * HEADS * case.pairs
    for row, factor in zip(rows, (1.0, 2.5), strict=True):
        row["flops"] = work * factor
    return rows if with_backward else rows[:1]


def table(rows: list[dict[str, Any]]) -> str:
    labels = list(
        dict.fromkeys(key for row in rows for key in row if key not in {"mask", "length", "batch", "pass", "flops"})
    )
    lines = ["| mask | batch | tokens | pass | " + " | ".join(labels) + " | best other / s2o |"]
    lines.append("|" + "---|" * (len(labels) + 5))
    for row in rows:
        cells = [
            f"{row[x]:.3f} ms ({row['flops'] / row[x] / 1e9:.0f})" if row.get(x) else ("memory" if x in row else "-")
            for x in labels
        ]
        others = [row[x] for x in labels if not x.startswith("s2o") and row.get(x)]
        ratio = f"{min(others) / row['s2o']:.2f}" if others else "-"
        start = [row["mask"], row["batch"], f"{row['length']:,}", row["pass"]]
        lines.append("| " + " | ".join(map(str, [*start, *cells, ratio])) + " |")
    return "\n".join(lines)


def graphed(run: Callable[[], Any]) -> float:
    """Microseconds on the device alone: the run is replayed from a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            run()
    return measure(graph.replay, 10.0) * 100


def on_host(run: Callable[[], Any]) -> float:
    """Microseconds that the host needs to launch a run."""
    run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(100):
        run()
    elapsed = time.perf_counter() - started
    torch.cuda.synchronize()
    return elapsed * 1e4


def short() -> str:
    """Short causal prompts and decoding with a padding mask: device and host microseconds."""
    lines = ["| case | kernel | device us | host us |", "|---|---|---|---|"]
    for batch, length in ((1, 128), (1, 512), (1, 1024), (1, 2048), (1, 4096), (8, 512)):
        q, k, v, grad = operands(batch, length)
        case = make_case("causal", length)
        for route in ("triton", "cudnn", "flash"):
            for direction, run in zip(("forward", "backward"), s2o(case, q, k, v, grad, route), strict=True):
                assert run is not None
                label = f"causal, batch {batch}, {length:,} tokens, {direction}"
                lines.append(f"| {label} | {route} | {graphed(run):.1f} | {on_host(run):.0f} |")
    for batch, queries, keys in ((1, 1, 1024), (1, 1, 8192), (1, 1, 131072), (32, 1, 4096), (8, 4, 8192)):
        q, k, v, _ = operands(batch, keys)
        q = q[:, :, :queries]
        keep = torch.arange(keys, device=DEVICE).expand(batch, keys) < keys * 7 // 8
        padded = Case(batch, MaskSpec(keys="L0[b, k]"), [keep], None, 0.0, None)
        everything = dataclasses.replace(padded, spec=MaskSpec(), leaves=[])
        visible = keep[:, None, None].expand(batch, 1, queries, keys)
        kernels = {
            "s2o decode": s2o(everything, q, k, v, None, "decode")[0],
            "flash": s2o(everything, q, k, v, None, "flash")[0],
            "s2o decode, padding": s2o(padded, q, k, v, None, "decode")[0],
            "sdpa, padding, gqa": lambda q=q, k=k, v=v, m=visible: scaled_dot_product_attention(
                q, k, v, attn_mask=m, enable_gqa=True
            ),
        }
        for label, run in kernels.items():
            start = f"decode, batch {batch}, {queries} x {keys:,}"
            lines.append(f"| {start} | {label} | {graphed(run):.1f} | {on_host(run):.0f} |")
    return "\n".join(lines)


def plans() -> str:
    """First call of cuDNN for shapes it has not met, in milliseconds of wall time."""
    lines = ["| tokens | forward, first | second | backward, first | second |", "|---|---|---|---|---|"]
    for length in (1024, 1025, 4096, 4097, 16384, 16385):
        q, k, v, grad = operands(1, length)
        times = []
        case = make_case("causal", length)
        call = dense.Call.of(q, k, v, None, [], [], [], case.spec, None, None, SCALE, 0.0)
        call = dataclasses.replace(call, route="cudnn")
        cuda.backward_route = lambda *_: "cudnn"
        for direction in ("forward", "backward"):
            for _ in range(2):
                torch.cuda.synchronize()
                started = time.perf_counter()
                if direction == "forward":
                    out, lse = cuda.forward(call, q, k, v)
                else:
                    cuda.backward(call, grad, q, k, v, out, lse)
                torch.cuda.synchronize()
                times.append((time.perf_counter() - started) * 1e3)
        lines.append(f"| {length:,} | " + " | ".join(f"{t:.1f}" for t in times) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", default=",".join(MASKS))
    parser.add_argument("--lengths", default="4096,16384,32768")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which takes long to compile")
    parser.add_argument("--json", help="write the rows here as well")
    parser.add_argument("--compile-only", action="store_true", help="fill FlexAttention's compile cache and stop")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; there is none")
    if options.short or options.plans:
        print(short() if options.short else plans())
        return
    names, lengths = options.masks.split(","), [int(x) for x in options.lengths.split(",")]
    if options.compile_only:
        for name in names:
            for length in lengths:
                case = make_case(name, length)
                q, k, v, grad = operands(case.batch, length)
                flex(case, q, k, v, None if options.forward_only else grad)
        return
    if options.no_flex:
        global FLEX_SECONDS
        FLEX_SECONDS = -1.0
    # FlexAttention compiles for every mask and length: let that happen side by side, into the cache.
    jobs = [
        subprocess.Popen(
            [sys.executable, __file__, "--compile-only", "--masks", name, "--lengths", str(length)]
            + ["--forward-only"] * options.forward_only,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for name in names if name != "dense" and not options.no_flex for length in lengths
    ]  # fmt: skip
    for job in jobs:
        job.wait()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}; ms (TFLOP/s on visible pairs), {os.cpu_count()} CPU cores")
    rows = [
        row
        for mask_name in names
        for length in lengths
        for row in run_case(mask_name, length, not options.forward_only)
    ]
    print(table(rows))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
