"""One LatentMoE layer as in Nemotron 3 Super, unmodified Hugging Face code: what s2o does to it, how fast, how exact.

    python examples/latent_moe.py                        # scaled to the machine; a minute on two CPU cores
    python examples/latent_moe.py --scale 1 --tokens 8192

Super's layer (arXiv 2604.12374): width 4096, latent width 1024, 512 experts of inner width 2688 with squared relu,
22 per token, sigmoid router with a bias for the choice, one shared expert of 5376. `--scale s` divides
the widths by s and the number of experts by s / 2; choices stay. Times are medians of interleaved calls, and
errors are against the same layer in float64 on the CPU, over the largest value.
"""

from __future__ import annotations

import argparse
import copy
import functools
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

import s2o_inductor


def build(scale: int) -> nn.Module:
    """Super's layer, divided; weights are random with outputs of the size of the inputs."""
    experts = max(32, 512 * 2 // (scale + scale % 2 if scale > 1 else 2))
    config = transformers.NemotronHConfig(
        hidden_size=4096 // scale, moe_latent_size=1024 // scale, n_routed_experts=experts, num_experts_per_tok=22,
        moe_intermediate_size=2688 // scale, moe_shared_expert_intermediate_size=5376 // scale,
        routed_scaling_factor=5.0, norm_topk_prob=True, n_group=1, topk_group=1,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    layer: nn.Module = NemotronHMoE(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer.eval()


def run(call: Callable[..., Any], x: Tensor, training: bool) -> Tensor:
    """The output; in training, the gradient of the input after a backward pass through all weights."""
    x = x.detach().requires_grad_(training)
    with torch.set_grad_enabled(training):
        y: Tensor = call(x)
        if not training:
            return y
        y.sum().backward()
    assert x.grad is not None
    return x.grad


def seconds(calls: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each call, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(repeats + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if index >= 3:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    parser.add_argument("--scale", type=int, default=1 if device == "cuda" else 8, help="divides the widths")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 8192] if device == "cuda" else [1, 32, 1024])
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    device, dtype = arguments.device, torch.bfloat16 if arguments.device == "cuda" else torch.float32
    if arguments.scale < 1 or 1024 % arguments.scale:
        parser.error(f"--scale must divide 1024; got {arguments.scale}")
    warnings.filterwarnings("ignore")
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)  # Inductor alone breaks float32 training into pieces
    layer = build(arguments.scale).to(device, dtype)
    size = sum(x.numel() for x in layer.parameters())
    print(f"{size / 1e6:.1f} M parameters, {dtype} on {device}, {torch.get_num_threads()} thread(s)")
    # The loop over experts, which torch runs in float64: the truth. A copy of a full-size layer would take 23 GB.
    gold = copy.deepcopy(layer).cpu().double() if size < 2e8 else None
    if gold is not None:
        gold.config._experts_implementation = "eager"
    for tokens in arguments.tokens:
        x = torch.randn(1, tokens, layer.config.hidden_size).to(device, dtype)
        for training in (False, True):
            torch._dynamo.reset()
            calls = {
                "eager": layer,
                "inductor": torch.compile(layer, backend="inductor", dynamic=False),
                "s2o": torch.compile(layer, backend="s2o", options={"experts": True}, dynamic=False),
            }
            results = {name: run(call, x, training) for name, call in calls.items()}
            if tokens == arguments.tokens[0] and not training:
                print(s2o_inductor.last_report())
            line = f"T={tokens:<5} {'training ' if training else 'inference'}"
            timed = {name: functools.partial(run, call, x, training) for name, call in calls.items()}
            found = seconds(timed, arguments.repeats, device)
            line += "".join(f"  {name} {1e3 * value:8.2f} ms" for name, value in found.items())
            if gold is not None and tokens <= 64:
                truth = run(gold, x.cpu().double(), training)
                errors = {n: (y.cpu().double() - truth).abs().max() / truth.abs().max() for n, y in results.items()}
                line += "  error " + ", ".join(f"{name} {float(value):.1e}" for name, value in errors.items())
            print(line, flush=True)


if __name__ == "__main__":
    main()
