"""Routed experts on this machine: a layer under Inductor against the same layer under s2o, in the ways people write it.

    python examples/bench_moe.py
    python examples/bench_moe.py --threads 1 --clock cpu --experts 128 512 --tokens 1 8 --dtypes bfloat16

"grouped" and "batched" are Hugging Face's implementations in a Qwen3-MoE layer, "gathered" is gpt-fast's: the matrices
of the chosen experts gathered, then einsums. Shapes are those of Mixtral, OLMoE, Qwen3-30B-A3B and Nemotron 3
Super's latent layer, scaled down. All are rewritten, also what option `experts` would leave
to Inductor by default. Prints milliseconds and their ratio, medians of runs in alternating order, so that a
busy machine disturbs both alike; what others take is not counted with --threads 1 --clock cpu, save for caches and
memory. Layers whose gathered matrices would pass --room are left out.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

SHAPES = {8: (512, 1024, 2), 64: (512, 256, 8), 128: (256, 96, 8), 512: (128, 168, 22)}  # experts: width, inner, top-k
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Gathered(nn.Module):
    """gpt-fast's layer."""

    def __init__(self, experts: int, width: int, inner: int, choices: int) -> None:
        super().__init__()
        self.choices = choices
        self.gate = nn.Linear(width, experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(experts, inner, width))
        self.w2 = nn.Parameter(torch.empty(experts, width, inner))
        self.w3 = nn.Parameter(torch.empty(experts, inner, width))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        p, ids = self.gate(flat).softmax(dim=-1).topk(self.choices, dim=-1)
        p = p / p.sum(dim=-1, keepdim=True)
        gate = F.silu(torch.einsum("ti,taoi->tao", flat, self.w1[ids]))
        up = torch.einsum("ti,taoi->tao", flat, self.w3[ids])
        y = torch.einsum("tao,taio->tai", gate * up, self.w2[ids])
        return torch.einsum("tai,ta->ti", y, p).view_as(x)


def build(form: str, experts: int, dtype: torch.dtype) -> nn.Module:
    """A layer with weights of a model's size, so that outputs are neither large nor tiny."""
    width, inner, choices = SHAPES[experts]
    torch.manual_seed(0)
    if form == "gathered":
        layer: nn.Module = Gathered(experts, width, inner, choices)
    else:
        config = Qwen3MoeConfig(
            hidden_size=width, moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=choices,
            norm_topk_prob=True,
        )  # fmt: skip
        config._experts_implementation = f"{form}_mm"
        layer = Qwen3MoeSparseMoeBlock(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer.to(dtype)


def measure(
    calls: dict[str, Callable[[], Any]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median milliseconds of each call, run in turn for about so many seconds, 5 to 200 times."""
    start = time.perf_counter()
    for _ in range(2):
        for call in calls.values():
            call()
    repeats = max(5, min(200, int(2 * seconds / (time.perf_counter() - start))))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name, call in list(calls.items())[:: 1 if repeat % 2 else -1]:
            start = clock()
            call()
            taken[name].append(1e3 * (clock() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def compare(
    form: str, experts: int, tokens: int, dtype: torch.dtype, training: bool, seconds: float, clock: str
) -> dict[str, float]:
    """Milliseconds of the layer under Inductor and under s2o."""
    layer = build(form, experts, dtype)
    x = torch.randn(1, tokens, SHAPES[experts][0]).to(dtype).requires_grad_(training)
    torch._dynamo.reset()
    layers = {
        "inductor": torch.compile(layer, backend="inductor", dynamic=False),
        "s2o": torch.compile(layer, backend="s2o", options={"experts": True}, dynamic=False),
    }

    def run(call: Callable[..., Any]) -> None:
        with torch.set_grad_enabled(training):
            y = call(x)
            if training:
                (y if isinstance(y, Tensor) else y[0]).float().square().mean().backward()

    for call in layers.values():
        run(call)  # compiles
    return measure({name: (lambda call=call: run(call)) for name, call in layers.items()}, seconds, CLOCKS[clock])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=("grouped", "batched", "gathered"), default=["grouped"])
    parser.add_argument("--experts", type=int, nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 64, 512])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", choices=("inference", "training"), default=["inference", "training"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring per row")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: seconds of the process, for --threads 1")
    parser.add_argument(
        "--room", type=float, default=1.0, help="GiB of gathered matrices, beyond which a row is left out"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads, {args.clock}")
    rows = itertools.product(args.dtypes, args.forms, args.experts, args.modes, args.tokens)
    for name, form, experts, mode, tokens in rows:
        width, inner, choices = SHAPES[experts]
        dtype = getattr(torch, name)
        if form != "grouped" and tokens * choices * 3 * width * inner * dtype.itemsize > args.room * 2**30:
            continue
        found = compare(form, experts, tokens, dtype, mode == "training", args.seconds, args.clock)
        print(
            f"{name:9} {form:9} E={experts:<4}T={tokens:<5}{mode:10} inductor {found['inductor']:9.3f} ms"
            f"  s2o {found['s2o']:9.3f} ms  speed-up {found['inductor'] / found['s2o']:.2f}", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
