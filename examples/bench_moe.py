"""Routed experts on this machine: Hugging Face's grouped experts under Inductor against the same layer under s2o.

    python examples/bench_moe.py

Prints milliseconds and their ratio, medians of interleaved runs. Shapes are those of Qwen3-30B-A3B and of
Nemotron 3 Super's latent layer, scaled down to run on a CPU in a minute.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

SHAPES = {
    "E=128 top-8": {"hidden_size": 256, "moe_intermediate_size": 96, "num_experts": 128, "num_experts_per_tok": 8},
    "E=512 top-22": {"hidden_size": 128, "moe_intermediate_size": 168, "num_experts": 512, "num_experts_per_tok": 22},
}


def measure(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, run in turn so that noise meets all of them."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    for shape, fields in SHAPES.items():
        torch.manual_seed(0)
        config = Qwen3MoeConfig(**fields, norm_topk_prob=True)
        config._experts_implementation = "grouped_mm"
        block = Qwen3MoeSparseMoeBlock(config)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        for tokens in (1, 64, 2048):
            x = torch.randn(1, tokens, fields["hidden_size"])
            for training in (False, True):
                torch._dynamo.reset()
                layers = {
                    "inductor": torch.compile(block, backend="inductor", dynamic=False),
                    "s2o": torch.compile(block, backend="s2o", options={"experts": True}, dynamic=False),
                }

                def run(layer: Callable[..., Any], training: bool = training, x: torch.Tensor = x) -> None:
                    with torch.set_grad_enabled(training):
                        y = layer(x)
                        if training:
                            (y if isinstance(y, torch.Tensor) else y[0]).sum().backward()

                calls = {name: (lambda layer=layer: run(layer)) for name, layer in layers.items()}
                measure(calls, 2)
                found = measure(calls, 9 if tokens > 64 else 30)
                ratio = found["inductor"] / found["s2o"]
                print(
                    f"{shape:13} T={tokens:<5} {'training ' if training else 'inference'} inductor "
                    f"{found['inductor']:8.2f} ms  s2o {found['s2o']:8.2f} ms  speed-up {ratio:.2f}", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
