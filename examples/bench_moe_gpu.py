"""Routed experts on one GPU: right first, then fast; beside torch's grouped products and batched ones.

    python examples/bench_moe_gpu.py --models super --tokens 8192,32,1,64,8,512   # a minute and a half
    python examples/bench_moe_gpu.py --models qwen3,mixtral,deepseek              # two minutes
    python examples/bench_moe_gpu.py --sweep --models super --tokens 8192         # ways to run each kernel

bfloat16. A line is one call of the routed core, printed cell by cell as it is measured: the floor, which is the time
that the routed multiplications take at 790 TFLOP/s or reading the weights of the experts that were hit takes at the
memory's copy speed, whichever is longer; then median microseconds of s2o and of each peer. "MB" is what a call
allocates at its height, "B/token" what a forward pass holds for its backward pass beyond operands and result.
"training" is forward and backward to every operand. Up to 64 tokens everything runs in CUDA graphs. Routing is even,
"zipf", experts drawn with probabilities of 1 / rank, or "one", all tokens to the same K experts.

Peers are Hugging Face's grouped and batched experts, compiled by Inductor. More can be given with --peers: Python files
that define `peers(call) -> {name: function without arguments that returns (T, l)}`; see `Call` for its operands.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compile_moe import Shape, compiling, whole_call
from sweep_moe import sweep, sweep_walks

from s2o_inductor.kernels import cuda_moe, reference_moe
from s2o_inductor.moe_ops import moe_experts
from s2o_inductor.moe_spec import ExpertSpec

TOKENS = (8192, 32, 1, 64, 8, 512, 65536)  # the most telling first: a run that is cut off has them
SKEWED = (32, 8192)  # numbers of tokens that are routed unevenly, too
PEAK = 790e12
GRAPHED = 64
TRAINED = 512  # from how many tokens on training is measured
GATHERED_BYTES = 30e9  # most weights that the batched peer may copy
FAILURES = (RuntimeError, TypeError, AssertionError, NotImplementedError)  # of a peer, or of a card too small


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

    def shape(self, tokens: int, training: bool) -> Shape:
        device = torch.device("cuda", torch.cuda.current_device())
        major, minor = torch.cuda.get_device_capability()
        return Shape(
            tokens, self.choices, self.experts, self.width, self.inner, self.spec, training,
            *cuda_moe._device(device)[:2], 10 * major + minor,
        )  # fmt: skip


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
    noise = torch.rand(1 if routing == "one" else tokens, model.experts, generator=generator, device="cuda")
    if routing == "zipf":  # the largest of u^(1/w) are a draw without repetition, proportional to w
        noise = noise.log_().mul_(torch.arange(1, model.experts + 1, device="cuda"))
    ids = noise.topk(model.choices).indices.expand(tokens, -1).contiguous()
    p = torch.softmax(torch.randn(ids.shape, generator=generator, device="cuda"), 1)
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


@functools.cache
def load_peers(path: str) -> Callable[[Call], dict[str, Callable[[], Tensor]]]:
    """The function `peers` of a Python file."""
    found = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.peers  # type: ignore[no-any-return]


def peers_of(call: Call, more: Sequence[Callable[[Call], dict[str, Callable[[], Tensor]]]]) -> dict[str, Any]:
    """The peers that can run a call."""
    functions: dict[str, Callable[..., Tensor]] = {"grouped_mm": grouped}
    if call.z.shape[0] <= GRAPHED and call.ids.numel() * call.model.expert_bytes < GATHERED_BYTES:
        functions["batched_mm"] = batched
    operands = (call.z, call.w1, call.w2, call.ids, call.p, call.model.spec)
    found: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(compiled(function), *operands) for name, function in functions.items()
    }
    for peers in more:
        found.update(peers(call))
    return found


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
        if i >= (3 if taken < 30.0 else 1):  # what takes long is warm after one
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
    """Largest error of a few tokens' outputs, and gradients where training is measured, relative to the largest value.

    Against float64, with the weights of their experts alone.
    """
    tokens = sorted({0, call.z.shape[0] // 2, call.z.shape[0] - 1})
    trained = call.z.shape[0] >= TRAINED
    z, p = (x.detach().requires_grad_(trained) for x in (call.z, call.p))
    out = moe_experts(z, call.w1, call.w2, call.ids, p, spec=call.model.spec)
    grad = torch.randn_like(out)
    found = (out, *(torch.autograd.grad(out, (z, p), grad) if trained else ()))
    worst = 0.0
    for token in tokens:
        at = slice(token, token + 1)
        experts, here = call.ids[at].unique(return_inverse=True)
        part = [x[at].detach().double().requires_grad_(trained) for x in (z, p)]
        weights = (call.w1[experts].double(), call.w2[experts].double())
        gold = reference_moe.experts(part[0], *weights, here.view(1, -1), part[1], call.model.spec)
        wanted = (gold, *(torch.autograd.grad(gold, part, grad[at].double()) if trained else ()))
        for actual, right in zip(found, wanted, strict=True):
            error = (actual[at].detach() - right.detach()).abs().max() / right.detach().abs().max()
            worst = max(worst, float(error))
    if not worst < 3e-2:
        raise SystemExit(f"experts are off by {worst:.2e}: {call.model}, {call.z.shape[0]} tokens")
    return worst


def leaves_of(call: Call) -> tuple[Tensor, ...]:
    return call.z, call.w1, call.w2, call.p


def training(call: Call, run: Callable[[], Tensor]) -> Callable[[], Any]:
    """`run` and its backward pass to every operand, which want gradients."""
    grad = torch.randn_like(call.z)
    return lambda: torch.autograd.grad(run(), leaves_of(call), grad)


def held_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass holds for its backward pass, beyond operands and result."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = run()
    return torch.cuda.memory_allocated() - before - out.numel() * out.element_size()


def peak_bytes(run: Callable[[], Any]) -> int:
    """Bytes that a call allocates at its height, results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def time_one(call: Call, run: Callable[[], Tensor], mode: str, expected: Tensor | None) -> float:
    """Median microseconds; NaN, with the reason printed, of what does not run or is not what s2o gives."""
    try:
        if expected is not None:
            off = float((run().detach() - expected).abs().max() / expected.abs().max())
            if not off < 3e-2:
                raise RuntimeError(f"its result is off by {off:.1e}")
        if mode == "training":
            return measure(training(call, run))
        return measure(graphed(run) if call.z.shape[0] <= GRAPHED else run)
    except FAILURES as error:
        print(f"\n  {type(error).__name__}: {str(error)[:200]}", flush=True)
        return float("nan")
    finally:
        torch.cuda.empty_cache()


def bench(call: Call, name: str, routing: str, speed: float, more: Sequence[Any] | None) -> list[dict[str, Any]]:
    """A line for inference and, from 512 tokens on, one for training; each is printed as it grows."""
    tokens, model, rows = call.z.shape[0], call.model, []
    bytes_read = float(call.ids.unique().numel() * model.expert_bytes)
    for mode, factor in (("forward", 1), ("training", 3)) if tokens >= TRAINED else (("forward", 1),):
        floor = 1e6 * factor * max(model.flops(tokens) / PEAK, bytes_read / speed)
        row: dict[str, Any] = {"model": name, "T": tokens, "routing": routing, "mode": mode, "floor": floor}
        rows.append(row)
        say(f"{name} T={tokens} {routing} {mode}: floor {floor:.4g}")
        for x in leaves_of(call):
            x.requires_grad_(mode == "training")
        with torch.set_grad_enabled(mode == "training"):
            row["s2o"] = time_one(call, call.run, mode, None)
            row["TFLOP/s"] = factor * 1e-6 * model.flops(tokens) / row["s2o"]
            say(f"  s2o {row['s2o']:.4g} ({row['s2o'] / floor:.2f} floors, {row['TFLOP/s']:.4g} TFLOP/s")
            if not math.isnan(row["s2o"]):
                row["MB"] = peak_bytes(training(call, call.run) if mode == "training" else call.run) / 1e6
                say(f", {row['MB']:.4g} MB")
            if mode == "training" and not math.isnan(row["s2o"]):
                row["B/token"] = held_bytes(call.run) / tokens
                say(f", {row['B/token']:.4g} B/token")
            say(")")
            if more is not None and not math.isnan(row["s2o"]):
                expected = call.run().detach()
                for peer, run in peers_of(call, more).items():
                    if mode == "training" and peer == "batched_mm":
                        continue
                    row[peer] = time_one(call, run, mode, expected)
                    say(f"  {peer} {row[peer]:.4g}")
                    if mode == "training" and not math.isnan(row[peer]):
                        row[f"{peer} B/token"] = held_bytes(run) / tokens
                        say(f" ({row[f'{peer} B/token']:.4g} B/token)")
        say("\n")
    for x in leaves_of(call):
        x.requires_grad_(False)
    return rows


def say(text: str) -> None:
    print(text, end="", flush=True)


def warm(spec: ExpertSpec, tokens: int, trained: bool, paths: Sequence[str], quiet: bool = False) -> None:
    """Compiles the peers for one token or for any other number, with or without gradients."""
    if quiet:  # one of many processes
        torch._inductor.config.compile_threads = 1
    # No two sizes are alike: a compiler would take them for one.
    model = Model(23, 5, 256, 320, spec)
    call = call_of(model, weights_of(model), tokens, "uniform")
    for x in leaves_of(call):
        x.requires_grad_(trained)
    with torch.set_grad_enabled(trained):
        for peer, run in peers_of(call, [load_peers(path) for path in paths]).items():
            try:
                (training(call, run) if trained else run)()
            except FAILURES as error:
                if not quiet:
                    print(f"{peer}: {type(error).__name__}: {str(error)[:300]}", flush=True)


def warm_peers(names: Sequence[str], lengths: Sequence[int], paths: Sequence[str]) -> None:
    """Fills Inductor's cache with the peers, case by case in processes of their own, and then reads it."""
    start = time.time()
    few = [n for n in lengths if n < TRAINED]
    sizes = [*({1} & set(few)), *([40] if any(n > 1 for n in few) else []), *([600] if len(few) < len(lengths) else [])]
    jobs = [
        (spec, tokens, trained, paths)
        for spec in {MODELS[name].spec: None for name in names}
        for tokens in sizes
        for trained in ((False, True) if tokens >= TRAINED else (False,))
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(len(jobs), mp_context=context) as pool:
        for future in [pool.submit(warm, *job, True) for job in jobs]:
            future.exception()  # what fails there fails below, and says so
    between = time.time()
    for job in jobs:
        warm(*job)
    print(f"peers compiled in {between - start:.0f} s, read in {time.time() - between:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--routing", default="uniform,zipf,one", help="uneven ones go with 32 and 8,192 tokens alone")
    parser.add_argument("--sweep", action="store_true", help="ways to run the kernels instead of whole calls")
    parser.add_argument("--no-peers", action="store_true", help="s2o alone")
    parser.add_argument("--peers", action="append", default=[], metavar="FILE", help="a Python file with more peers")
    parser.add_argument("--seconds", type=float, default=280.0, help="begin nothing new after measuring so long")
    parser.add_argument("--json", help="write the rows here as well")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; there is none")
    start, rows = time.time(), []
    names, lengths = options.models.split(","), [int(x) for x in options.tokens.split(",")]
    more = None if options.no_peers or options.sweep else [load_peers(path) for path in options.peers]
    shapes = [MODELS[name].shape(n, n >= TRAINED) for name in names for n in lengths]
    if options.sweep:
        walks = [walk for shape in shapes for walk in sweep_walks(shape)]
    else:
        walks = [(whole_call, dataclasses.replace(s, training=t)) for s in shapes for t in {False, s.training}]
    with compiling(walks):
        speed = bandwidth()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {speed / 1e12:.2f} TB/s; times in us")
        if more is not None:
            warm_peers(names, lengths, options.peers)
    ready = time.time()
    for name in names:
        weights = weights_of(MODELS[name])
        for tokens in lengths:
            for routing in options.routing.split(","):
                if routing != "uniform" and (tokens not in SKEWED or options.sweep):
                    continue
                if time.time() - ready > options.seconds:
                    print(f"left out: {name}, {tokens} tokens, {routing}", flush=True)
                    continue
                call = call_of(MODELS[name], weights, tokens, routing)
                if options.sweep:
                    for row in sweep(call, call.model.shape(tokens, False).facts, measure):
                        rows.append({"model": name, "T": tokens, **row})
                        print(
                            "  ".join(f"{k} {v if isinstance(v, (str, int)) else f'{v:.4g}'}" for k, v in row.items())
                        )
                else:
                    error = check(call)
                    rows += [{**row, "error": error} for row in bench(call, name, routing, speed, more)]
                if options.json:  # after every call: a run that is cut off leaves what it has
                    Path(options.json).write_text(json.dumps(rows, indent=1))
        del weights
        torch.cuda.empty_cache()
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
