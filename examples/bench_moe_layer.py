"""Unmodified mixture-of-experts layers of Hugging Face on one GPU: eager, compiled by Inductor, compiled by s2o.

    python examples/bench_moe_layer.py                               # both layers, two and a half minutes
    python examples/bench_moe_layer.py --layers super --tokens 1,32,8192 --no-training

Nemotron 3 Super's layer (width 4096, latent width 1024, 512 experts of 2688, 22 per token, one shared expert of 5376)
and Qwen3-30B-A3B's (width 2048, 128 experts of 768, 8 per token), bfloat16, random weights, the router's own choices.

    loop         `experts_implementation="eager"`, as it stands: a Python loop over the experts that were hit
    grouped      "grouped_mm", what transformers runs by default
    compiled ..  "grouped_mm" and "batched_mm" under torch.compile
    s2o          "grouped_mm" under `torch.compile(backend="s2o", options={"experts": True})`

Up to 64 tokens everything compiled runs with CUDA graphs (mode="reduce-overhead"). A time there is that of replaying a
call's graph; "called" is with what Inductor's host side does around it, once for all layers that are compiled together.
Other times are medians of calls that follow one another, in microseconds, so the host's time counts where it is
longer. "err" is the error of the first 64 tokens against float64, rms over rms. The floor counts the layer's
multiplications at 790 TFLOP/s or its weights, those of experts that were hit alone, at copy speed. Graphs are compiled
side by side in processes that fill Inductor's cache.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench_moe_gpu import FAILURES, GATHERED_BYTES, GRAPHED, MODELS, PEAK, bandwidth, measure, peak_bytes, say
from compile_moe import compiling, whole_call

import s2o_inductor

TOKENS = (8192, 32, 1, 64, 8, 512)
TRAINED = 8192
# Name: (implementation of the experts, how it is compiled).
WAYS = {
    "s2o": ("grouped_mm", "s2o"),
    "compiled grouped": ("grouped_mm", "inductor"),
    "compiled batched": ("batched_mm", "inductor"),
    "grouped": ("grouped_mm", None),
    "loop": ("eager", None),
}


def build(name: str, device: str = "cuda") -> nn.Module:
    """A layer with random weights whose outputs are of the size of its inputs."""
    if name == "super":
        config: Any = transformers.NemotronHConfig(
            hidden_size=4096, moe_latent_size=1024, n_routed_experts=512, num_experts_per_tok=22,
            moe_intermediate_size=2688, moe_shared_expert_intermediate_size=5376, routed_scaling_factor=5.0,
            norm_topk_prob=True, n_group=1, topk_group=1,
        )  # fmt: skip
        kind: Callable[[Any], nn.Module] = NemotronHMoE
    else:
        config = transformers.Qwen3MoeConfig(
            hidden_size=2048, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True
        )
        kind = Qwen3MoeSparseMoeBlock
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            layer = kind(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return layer.eval()


def wants(name: str, way: str, tokens: int) -> bool:
    """Whether a way is run for so many tokens."""
    gathered = tokens * MODELS[name].choices * MODELS[name].expert_bytes
    return way != "compiled batched" or (tokens <= GRAPHED and gathered < GATHERED_BYTES)


def compiled(layer: nn.Module, backend: str | None, graphs: bool) -> Callable[[Tensor], Tensor]:
    if backend is None:
        return layer
    if backend == "s2o":
        return torch.compile(layer, backend="s2o", options={"experts": True, "triton.cudagraphs": graphs})
    return torch.compile(layer, mode="reduce-overhead" if graphs else "default")


def tokens_of(layer: nn.Module, tokens: int) -> Tensor:
    """The first of always the same tokens; their number is symbolic to compilers."""
    width = next(p.shape[-1] for name, p in layer.named_parameters() if name.endswith("gate.weight"))
    device = next(layer.parameters()).device
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(1, max(TOKENS), width, generator=generator, device=device, dtype=torch.bfloat16)[:, :tokens].clone()
    if tokens > 1:
        torch._dynamo.maybe_mark_dynamic(x, 1)
    return x


def stepping(layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Any]:
    """Forward and backward to the input and every parameter."""
    leaves = [x.requires_grad_(), *layer.parameters()]
    grad = torch.randn_like(x)
    return lambda: torch.autograd.grad(call(x), leaves, grad)


def run_of(layer: nn.Module, way: str, tokens: int, training: bool) -> Callable[[], Any]:
    """One call of a layer."""
    implementation, backend = WAYS[way]
    layer.experts.config._experts_implementation = implementation
    call, x = compiled(layer, backend, tokens <= GRAPHED), tokens_of(layer, tokens)
    return stepping(layer, call, x) if training else lambda: call(x)


def graphs_of(run: Callable[[], Any]) -> list[torch.cuda.CUDAGraph]:
    """The CUDA graphs that a call replays."""
    found, replay = [], torch.cuda.CUDAGraph.replay

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        found.append(graph)
        replay(graph)

    torch.cuda.CUDAGraph.replay = noted  # type: ignore[method-assign]
    try:
        run()
    finally:
        torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign]
    return found


def fill_cache(name: str, way: str, tokens: int, training: bool) -> float:
    """Compiles a layer in a process of its own; seconds."""
    start = time.time()
    torch._inductor.config.compile_threads = 1  # there are enough processes
    layer = build(name)
    with torch.set_grad_enabled(training):
        run_of(layer, way, tokens, training)()
    torch.cuda.synchronize()
    del layer
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    return time.time() - start


def jobs_of(names: list[str], lengths: list[int], training: bool) -> list[tuple[str, str, int, bool]]:
    """What there is to compile: one token, a few, many, and training."""
    few = [n for n in lengths if n <= GRAPHED]
    sizes = [*({1} & set(few)), *[n for n in few if n > 1][:1], *[n for n in lengths if n > GRAPHED][:1]]
    jobs = [
        (name, way, n, False)
        for name in names for way in WAYS if WAYS[way][1] for n in sizes if wants(name, way, n)
    ]  # fmt: skip
    if training and TRAINED in lengths:
        jobs += [(name, way, TRAINED, True) for name in names for way in ("s2o", "compiled grouped")]
    return jobs


def compile_all(names: list[str], lengths: list[int], training: bool) -> None:
    """Fills the caches of Triton, for s2o's kernels, and of Inductor."""
    start = time.time()
    shapes = [MODELS[name].shape(n, t) for name in names for n in lengths for t in {False, training and n == TRAINED}]
    with compiling([(whole_call, shape) for shape in shapes]):
        jobs = jobs_of(names, lengths, training)
        context = multiprocessing.get_context("spawn")
        # Super's layer takes 6 GB in each process, more with its gradients.
        with concurrent.futures.ProcessPoolExecutor(6, mp_context=context) as pool:
            for job, future in [(job, pool.submit(fill_cache, *job)) for job in reversed(jobs)]:
                if (error := future.exception()) is not None:
                    print(f"compiling {job}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    print(f"{len(jobs)} graphs compiled in {time.time() - start:.0f} s", flush=True)


def gold_of(layer: nn.Module, tokens: int) -> Tensor:
    """The output of the first tokens in float64, (tokens, width), with the choices that the layer itself makes."""
    layer.experts.config._experts_implementation = "eager"
    exact = copy.deepcopy(layer).double()
    dtype = layer.gate.weight.dtype
    exact.gate = copy.deepcopy(layer.gate)
    exact.gate.register_forward_pre_hook(lambda _, args: (args[0].to(dtype),))
    exact.gate.register_forward_hook(lambda _, args, out: (out[0], out[1].double(), out[2]))
    with torch.no_grad():
        y: Tensor = exact(tokens_of(layer, tokens).double())
    return y.flatten(0, 1)


def floor_of(name: str, layer: nn.Module, tokens: int, training: bool, speed: float) -> float:
    """Microseconds that no layer of this kind goes below."""
    model = MODELS[name]
    with torch.no_grad():
        ids = layer.gate(tokens_of(layer, tokens))[2]
    experts = {id(p) for p in layer.experts.parameters()}
    other = sum(p.numel() for p in layer.parameters() if id(p) not in experts)
    flops = model.flops(tokens) + 2.0 * tokens * other
    read = ids.unique().numel() * model.expert_bytes + 2.0 * other
    return 1e6 * (3 if training else 1) * max(flops / PEAK, read / speed)


def bench(name: str, lengths: list[int], training: bool, speed: float, out_of_time: Callable[[], bool]) -> list[Any]:
    layer, rows = build(name), []
    gold = gold_of(layer, min(GRAPHED, max(lengths)))
    torch.cuda.empty_cache()
    cases = [(n, False) for n in lengths] + [(TRAINED, True)] * (training and TRAINED in lengths)
    for tokens, trained in cases:
        if out_of_time():
            print(f"left out: {name}, {tokens} tokens", flush=True)
            continue
        floor = floor_of(name, layer, tokens, trained, speed)
        row: dict[str, Any] = {"layer": name, "T": tokens, "mode": "training" if trained else "forward", "floor": floor}
        say(f"{name} layer T={tokens} {row['mode']}: floor {floor:.4g}")
        for way in WAYS:
            if not wants(name, way, tokens) or (way == "loop" and trained):
                continue
            try:
                with torch.set_grad_enabled(trained):
                    run = run_of(layer, way, tokens, trained)
                    for _ in range(2):  # compile, record
                        run()
                    y = None if trained else run().clone()
                    row[way] = measure(run, 60.0)
                    row[f"{way} MB"] = peak_bytes(run) / 1e6
                    if graphs := graphs_of(run):
                        row[f"{way} called"] = row[way]
                        row[way] = measure(lambda graphs=graphs: [graph.replay() for graph in graphs], 60.0)
                say(f"  {way} {row[way]:.4g} ({row[way] / floor:.2f} floors, {row[f'{way} MB']:.4g} MB")
                if graphs:
                    say(f", called {row[f'{way} called']:.4g}")
                if y is not None:
                    known = min(tokens, gold.shape[0])
                    off = y.flatten(0, 1)[:known].double() - gold[:known]
                    row[f"{way} err"] = float(off.square().mean().sqrt() / gold[:known].square().mean().sqrt())
                    say(f", err {row[f'{way} err']:.1e}")
                say(")")
                if way == "s2o":
                    sites = [s for s in s2o_inductor.last_report().to_dict()["sites"] if s["kind"] == "moe"]
                    if {(s["status"], s["route"]) for s in sites} != {("rewritten", "triton")}:
                        say(f" NOT REWRITTEN: {[(s['status'], s['route'], s['reason']) for s in sites]}")
            except FAILURES as error:
                row[way] = math.nan
                print(f"\n  {way}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            run = y = graphs = None  # type: ignore[assignment]
            torch.cuda.empty_cache()
        rows.append(row)
        say("\n")
    torch._dynamo.reset()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="super,qwen3")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--seconds", type=float, default=130.0, help="begin nothing new after measuring so long")
    parser.add_argument("--json", help="write the rows here as well")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; there is none")
    start, rows = time.time(), []
    torch._dynamo.config.recompile_limit = 64  # one layer, compiled in every way
    names, lengths = options.layers.split(","), [int(x) for x in options.tokens.split(",")]
    compile_all(names, lengths, not options.no_training)
    speed = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {speed / 1e12:.2f} TB/s; times in us")
    ready = time.time()
    for name in names:
        rows += bench(name, lengths, not options.no_training, speed, lambda: time.time() - ready > options.seconds)
        torch.cuda.empty_cache()
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1))
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
