"""Routed experts on one GPU: right first, then fast; beside torch's grouped products and batched ones.

    python examples/bench_moe_gpu.py --quick                     # Nemotron 3 Super, five sizes, a minute
    python examples/bench_moe_gpu.py --json out.json             # four models, T = 1 to 65,536, five minutes at most
    python examples/bench_moe_gpu.py --sweep --models super      # ways to run each kernel, the best of each size

bfloat16. A line is one call of the routed core: median microseconds of s2o, of the peers and the floor, which is the
time the routed multiplications take at 790 TFLOP/s or reading the weights of the experts that were hit takes at
the memory's copy speed, whichever is longer. Up to 64 tokens everything runs in CUDA graphs. Peers are the code of
Hugging Face's experts: compiled by Inductor for the first model, run as it stands for the others. "zipf" draws
experts with probabilities of 1 / rank.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sweep_moe import fits, stages_of, sweep, tiles_to_try

from s2o_inductor.kernels import cuda_moe, reference_moe
from s2o_inductor.moe_ops import moe_experts
from s2o_inductor.moe_spec import ExpertSpec

TOKENS = (8192, 1, 32, 64, 8, 512, 65536)  # the most telling first: a run that is cut off has them
PEAK = 790e12
GRAPHED = 64


@dataclasses.dataclass(frozen=True)
class Model:
    """E, K, the width that experts see, their inner width, and their formula."""

    experts: int
    choices: int
    width: int
    inner: int
    spec: ExpertSpec

    @property
    def expert_bytes(self) -> int:
        return 2 * (self.spec.halves + 1) * self.width * self.inner

    def flops(self, tokens: int) -> float:
        return float(tokens * self.choices * self.expert_bytes)  # two for each weight, of two bytes


MODELS = {
    "super": Model(512, 22, 1024, 2688, ExpertSpec("relu2")),
    "qwen3": Model(128, 8, 2048, 768, ExpertSpec("silu", "half")),
    "mixtral": Model(8, 2, 4096, 14336, ExpertSpec("silu", "half")),
    "deepseek": Model(256, 8, 7168, 2048, ExpertSpec("silu", "half")),
}


@dataclasses.dataclass
class Call:
    """Operands of one call."""

    model: Model
    z: Tensor
    w1: Tensor
    w2: Tensor
    ids: Tensor
    p: Tensor

    def run(self) -> Tensor:
        return moe_experts(self.z, self.w1, self.w2, self.ids, self.p, spec=self.model.spec)


def weights_of(model: Model) -> tuple[Tensor, Tensor]:
    shapes = ((model.spec.halves * model.inner, model.width), (model.width, model.inner))
    return tuple(
        torch.randn(model.experts, *shape, device="cuda", dtype=torch.bfloat16).mul_(shape[1] ** -0.5)
        for shape in shapes
    )  # type: ignore[return-value]


def call_of(model: Model, weights: tuple[Tensor, Tensor], tokens: int, routing: str) -> Call:
    generator = torch.Generator("cuda").manual_seed(tokens)
    noise = torch.rand(tokens, model.experts, generator=generator, device="cuda")
    if routing == "zipf":  # the largest of u^(1/w) are a draw without repetition, proportional to w
        noise = noise.log_().mul_(torch.arange(1, model.experts + 1, device="cuda"))
    p, ids = noise.topk(model.choices)
    p = torch.softmax(torch.randn(p.shape, generator=generator, device="cuda"), 1)
    z = torch.randn(tokens, model.width, generator=generator, device="cuda", dtype=torch.bfloat16)
    return Call(model, z, *weights, ids, p)


# ------------------------------------------------------------------------------------------- peers


def grouped(z: Tensor, w1: Tensor, w2: Tensor, ids: Tensor, p: Tensor, spec: ExpertSpec) -> Tensor:
    """Sorted rows through torch's grouped product, as Hugging Face writes it."""
    order = ids.view(-1).argsort()
    ends = torch.histc(ids.view(-1).float(), w1.shape[0], 0, w1.shape[0] - 1).cumsum(0, dtype=torch.int32)
    h = reference_moe.hidden(torch._grouped_mm(z[order // ids.shape[1]], w1.mT, offs=ends), spec)
    y = torch._grouped_mm(h, w2.mT, offs=ends) * p.view(-1)[order, None]
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return y[inverse].view(*ids.shape, -1).sum(1).to(z.dtype)


def batched(z: Tensor, w1: Tensor, w2: Tensor, ids: Tensor, p: Tensor, spec: ExpertSpec) -> Tensor:
    """Weights gathered for every choice, Hugging Face's way for few tokens."""
    flat = ids.view(-1)
    x = z.repeat_interleave(ids.shape[1], 0)
    h = reference_moe.hidden(torch.bmm(w1[flat], x[:, :, None]).squeeze(2), spec)
    y = torch.bmm(w2[flat], h[:, :, None]).squeeze(2) * p.view(-1, 1)
    return y.view(*ids.shape, -1).sum(1).to(z.dtype)


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By Inductor, once for all numbers of tokens but one, which it always takes for a constant."""
    return torch.compile(function, dynamic=True)


def peers_of(call: Call, name: str) -> dict[str, Callable[[], Tensor]]:
    """The peers that can run a call; the first model's compiled."""
    found: dict[str, Callable[..., Tensor]] = {"grouped_mm": grouped}
    if call.ids.numel() * call.model.expert_bytes < 8e9:
        found["batched_mm"] = batched
    if name == "super":
        found = {peer: compiled(function) for peer, function in found.items()}
    operands = (call.z, call.w1, call.w2, call.ids, call.p, call.model.spec)
    return {peer: lambda function=function: function(*operands) for peer, function in found.items()}


# --------------------------------------------------------------------------------------- measuring


def measure(run: Callable[[], Any], budget_ms: float = 120.0) -> float:
    """Median device time in microseconds, after warm-up, of calls that follow one another as a model's do."""
    times: list[float] = []
    calls = 1
    for i in range(60):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        taken = start.elapsed_time(end) / calls
        if i >= 3:
            times.append(taken)
            if sum(times) * calls > budget_ms and len(times) >= 3:
                break
        calls = max(1, min(10, int(10.0 / taken)))
    return 1e3 * statistics.median(times)


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def bandwidth() -> float:
    """Bytes per second that a large copy reads and writes."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").fill_(1)
    y = torch.empty_like(x)
    return 2 * x.numel() / (1e-6 * measure(lambda: y.copy_(x)))


def check(call: Call) -> float:
    """Largest error of a few tokens' outputs and gradients, relative to the largest value, against float64."""
    tokens = sorted({0, call.z.shape[0] // 2, call.z.shape[0] - 1})
    z, p = call.z.detach().requires_grad_(), call.p.detach().requires_grad_()
    out = moe_experts(z, call.w1, call.w2, call.ids, p, spec=call.model.spec)
    grad = torch.randn_like(out)
    found = (out, *torch.autograd.grad(out, (z, p), grad))
    worst = 0.0
    for token in tokens:
        at = slice(token, token + 1)
        experts, here = call.ids[at].unique(return_inverse=True)
        part = [x[at].detach().double().requires_grad_() for x in (z, p)]
        weights = (call.w1[experts].double(), call.w2[experts].double())
        gold = reference_moe.experts(part[0], *weights, here.view(1, -1), part[1], call.model.spec)
        for actual, wanted in zip(found, (gold, *torch.autograd.grad(gold, part, grad[at].double())), strict=True):
            worst = max(worst, float((actual[at].detach() - wanted.detach()).abs().max() / wanted.abs().max()))
    if not worst < 3e-2:
        raise SystemExit(f"experts are off by {worst:.2e}: {call.model}, {call.z.shape[0]} tokens")
    return worst


def training(call: Call, run: Callable[[], Tensor]) -> Callable[[], Any]:
    """`run` and its backward pass to every operand."""
    leaves = (call.z, call.w1, call.w2, call.p)
    for x in leaves:
        x.requires_grad_()
    grad = torch.randn_like(call.z)
    return lambda: torch.autograd.grad(run(), leaves, grad)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Bytes that a call allocates at its height, results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def bench(call: Call, name: str, routing: str, speed: float, with_peers: bool) -> list[dict[str, Any]]:
    """A line for inference and, from 512 tokens on, one for training."""
    tokens, model, rows = call.z.shape[0], call.model, []
    bytes_read = float(call.ids.unique().numel() * model.expert_bytes)
    for mode, factor in (("forward", 1), ("training", 3)) if tokens >= 512 else (("forward", 1),):
        row: dict[str, Any] = {"model": name, "T": tokens, "routing": routing, "mode": mode}
        rows.append(row)
        row["floor"] = 1e6 * factor * max(model.flops(tokens) / PEAK, bytes_read / speed)
        wrap = (lambda run: training(call, run)) if mode == "training" else (graphed if tokens <= GRAPHED else None)
        candidates: dict[str, Callable[[], Any]] = {"s2o": call.run}
        if with_peers:
            candidates.update(peers_of(call, name))
        for which, plain in candidates.items():
            if mode == "training" and which == "batched_mm":
                continue
            try:
                run = plain if wrap is None else wrap(plain)
                row[which] = measure(run)
                if which == "s2o":
                    row["MB"] = peak_bytes(run if mode == "training" else plain) / 1e6
            except (RuntimeError, torch.OutOfMemoryError) as error:  # of a peer, or of a card too small
                row[which] = float("nan")
                print(f"{which}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        for x in (call.z, call.w1, call.w2, call.p):
            x.requires_grad_(False)
        row["TFLOP/s"] = factor * 1e-6 * model.flops(tokens) / row["s2o"]
        row["s2o / floor"] = row["s2o"] / row["floor"]
    return rows


# ----------------------------------------------------------------------------- compiling beforehand


def facts_of(model: Model, tokens: int) -> cuda_moe.Facts:
    device = cuda_moe._device(torch.device("cuda", torch.cuda.current_device()))
    return cuda_moe.Facts(torch.bfloat16, tokens * model.choices, model.experts, *device)


def compile_one(name: str, tokens: int, kernel: str | None, share: int, shares: int) -> None:
    """Compiles, into Triton's cache, what a call of a model runs, or a share of what a sweep of a kernel does.

    With as many experts as a token takes, for memory; what is compiled depends on the facts, which are the model's.
    Inductor's cache is filled too, by the model itself.
    """
    if kernel == "peers":
        call = call_of(MODELS[name], weights_of(MODELS[name]), tokens, "uniform")
        for peer, run in peers_of(call, name).items():
            (training(call, run) if tokens >= 512 and peer == "grouped_mm" else run)()
            with torch.no_grad():
                run()
        return
    model, facts = MODELS[name], facts_of(MODELS[name], tokens)
    small = dataclasses.replace(model, experts=max(8, model.choices))
    # Few choices and many are ordered by different kernels, into tables of different types.
    call = call_of(small, weights_of(small), min(tokens, 2048 // model.choices + 1), "uniform")
    if kernel is None:
        cuda_moe.facts_of = lambda *_: facts  # type: ignore[assignment]
        (training(call, call.run) if tokens >= 512 else call.run)()
        with torch.no_grad():
            call.run()
    else:
        run = stages_of(call)[kernel]
        for tile, parts in tiles_to_try(facts, model.spec.halves > 1)[kernel][share::shares]:
            fits(lambda: run(tile, parts))  # noqa: B023 - called at once
    torch.cuda.synchronize()


def compile_all(names: list[str], lengths: list[int], sweeping: bool, with_peers: bool) -> None:
    """The same for all calls, side by side, so that the time measured goes to measuring."""
    start, shares = time.time(), 4
    jobs: list[tuple[str, int, str | None, int, int]] = []
    for name in names:
        for tokens in lengths:
            kernels = tiles_to_try(facts_of(MODELS[name], tokens), False) if sweeping else [None]
            jobs += [(name, tokens, kernel, i, shares) for kernel in kernels for i in range(shares if kernel else 1)]
    if with_peers and not sweeping and "super" in names:
        jobs = [("super", tokens, "peers", 0, 1) for tokens in (1, 8192) if tokens in lengths] + jobs
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=context) as pool:
        for job, done in [(job, pool.submit(compile_one, *job)) for job in jobs]:
            if (error := done.exception()) is not None:
                print(f"compiling {job}: {error}", flush=True)
    print(f"compiled in {time.time() - start:.0f} s", flush=True)


def show(row: dict[str, Any]) -> None:
    cells = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    print("  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--routing", default="uniform,zipf", help="zipf goes with 32 and 8,192 tokens alone")
    parser.add_argument("--quick", action="store_true", help="Nemotron 3 Super alone, without the longest call")
    parser.add_argument("--sweep", action="store_true", help="ways to run the kernels instead of whole calls")
    parser.add_argument("--no-peers", action="store_true", help="s2o alone")
    parser.add_argument("--seconds", type=float, default=280.0, help="begin nothing new after so long")
    parser.add_argument("--json", help="write the rows here as well")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; there is none")
    start, rows = time.time(), []
    names = ["super"] if options.quick else options.models.split(",")
    lengths = [int(x) for x in options.tokens.split(",") if not options.quick or int(x) < 65536]
    speed = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {speed / 1e12:.2f} TB/s; times in us")
    compile_all(names, lengths, options.sweep, not options.no_peers)
    for name in names:
        weights = weights_of(MODELS[name])
        for tokens in lengths:
            for routing in options.routing.split(","):
                if routing == "zipf" and (tokens not in (32, 8192) or options.sweep):
                    continue
                if time.time() - start > options.seconds:
                    print(f"left out: {name}, {tokens} tokens, {routing}", flush=True)
                    continue
                call = call_of(MODELS[name], weights, tokens, routing)
                if options.sweep:
                    found = sweep(call, facts_of(call.model, tokens), measure)
                    found = [{"model": name, "T": tokens, **row} for row in found]
                    for row in found:
                        show(row)
                else:
                    error = check(call)
                    found = bench(call, name, routing, speed, not options.no_peers)
                    for row in found:
                        show({**row, "error": error})
                rows += found
                if options.json:  # after every call: a run that is cut off leaves what it has
                    Path(options.json).write_text(json.dumps(rows, indent=1))
        del weights
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
