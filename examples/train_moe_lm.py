"""Trains a mixture-of-experts language model twice on the same bytes, in eager mode and through s2o: the losses agree.

    python examples/train_moe_lm.py                 # a minute or two on two CPU cores
    python examples/train_moe_lm.py --steps 20 --width 48

The model is that of `tiny_lm.py` with LatentMoE layers (arXiv 2601.18089) for its feed-forward layers, written as most
people write experts: a Python loop over those that tokens chose. `s2o_inductor.prepare` makes each
loop one operator, and torch.compile captures the model in one graph. The text is Python's standard library.
"""

from __future__ import annotations

import argparse
import copy
import random
import time

import torch
import torch.nn.functional as F
from tiny_lm import Config, TinyLM, load_text, to_tokens
from torch import Tensor, nn

import s2o_inductor


class Expert(nn.Module):
    """W2 relu(W1 z)^2."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(z).relu().square())
        return out


class LatentMoE(nn.Module):
    """Router and shared expert see the full width, routed experts a latent space of half of it."""

    def __init__(self, width: int, inner: int, experts: int, choices: int) -> None:
        super().__init__()
        self.choices = choices
        self.router = nn.Linear(width, experts, bias=False)
        self.into, self.out_of = nn.Linear(width, width // 2, bias=False), nn.Linear(width // 2, width, bias=False)
        self.experts = nn.ModuleList(Expert(width // 2, inner) for _ in range(experts))
        self.shared = Expert(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        p, ids = self.router(flat).sigmoid().topk(self.choices, dim=-1)
        p = p / p.sum(dim=-1, keepdim=True)
        z = self.into(flat)
        total = torch.zeros_like(z)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            if len(token):
                total.index_add_(0, token, expert(z[token]) * p[token, slot, None])
        out: Tensor = self.out_of(total) + self.shared(flat)
        return out.view_as(x)


def build(width: int, experts: int, choices: int) -> TinyLM:
    """The model, every feed-forward layer a LatentMoE."""
    torch.manual_seed(0)
    model = TinyLM(Config(width=width, layers=2, query_heads=4, kv_heads=2, head_dim=width // 4, hidden=width))
    for block in model.blocks:
        block.feed_forward = LatentMoE(width, width, experts, choices)
    return model


def batches(text: bytes, steps: int, batch: int, length: int, device: str) -> list[Tensor]:
    """(B, length + 1) bytes from random places, the same ones at every call."""
    rng = random.Random(0)
    starts = [[rng.randrange(len(text) - length) for _ in range(batch)] for _ in range(steps)]
    return [to_tokens([text[at : at + length + 1] for at in row]).to(device) for row in starts]


def train(model: nn.Module, call: object, data: list[Tensor], rate: float) -> tuple[list[float], float]:
    """The loss of every step, and seconds without the first two, which compile."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    losses, start = [], 0.0
    for step, tokens in enumerate(data):
        if step == 2:
            start = time.perf_counter()
        logits = call(tokens[:, :-1])  # type: ignore[operator]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        # Not to None: a loop leaves experts without tokens without a gradient, and AdamW would skip their decay.
        optimizer.zero_grad(set_to_none=False)
        losses.append(loss.item())
    return losses, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--choices", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager"), help="compiler behind s2o")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.steps < 3 or arguments.width % 8 or not 0 < arguments.choices <= arguments.experts:
        parser.error("--steps must be at least 3, --width a multiple of 8, --choices from 1 to --experts")
    data = batches(load_text(False, 2 * 10**6), arguments.steps, arguments.batch, arguments.length, arguments.device)
    eager = build(arguments.width, arguments.experts, arguments.choices).to(arguments.device)
    ours = copy.deepcopy(eager)
    print(f"{sum(x.numel() for x in eager.parameters()) / 1e6:.2f} M parameters on {arguments.device}")

    expected, slow = train(eager, eager, data, 2e-3)
    print(s2o_inductor.prepare(ours))
    compiled = torch.compile(ours, backend="s2o", options={"inner": arguments.inner}, fullgraph=True, dynamic=False)
    found, fast = train(ours, compiled, data, 2e-3)
    print(s2o_inductor.last_report())

    for step in sorted({0, *range(0, arguments.steps, max(1, arguments.steps // 8)), arguments.steps - 1}):
        print(f"step {step:4d}  loss eager {expected[step]:.4f}  s2o {found[step]:.4f}")
    last = max(1, arguments.steps // 10)
    means = [sum(losses[-last:]) / last for losses in (expected, found)]
    print(f"mean of the last {last} steps: eager {means[0]:.4f}, s2o {means[1]:.4f}; {slow:.1f} s and {fast:.1f} s")
    # Rounding differs and training amplifies it; a wrong gradient would show in the first steps.
    early = max(abs(a - b) for a, b in zip(expected[:20], found[:20], strict=True))
    agree = early < 1e-3 and abs(means[0] - means[1]) < 0.02
    print("the losses agree" if agree else f"the losses DIFFER, by {early:.1e} in the first 20 steps")
    return int(not agree)


if __name__ == "__main__":
    raise SystemExit(main())
