"""Trains a small GPT on the source text of the standard library; shows that s2o leaves the loss curve alone.

    python examples/train_nanogpt.py --backend s2o --attention manual --dtype bf16   # one training run
    python examples/train_nanogpt.py --compare                                       # the table, about five minutes

`--compare` trains with eager, Inductor and s2o, with scaled_dot_product_attention and with attention
written out by hand, in float32 and under bfloat16 autocast, on the same seeds: same weights, same
batches. Rounding differs between compilers and grows while training, so it sets the difference of
two curves of one seed beside the difference of two seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tiny_lm import load_text
from torch import Tensor, nn

BACKENDS = ("eager", "inductor", "s2o")


@dataclass(frozen=True)
class Sizes:
    """Of the model, over bytes."""

    vocabulary: int = 256
    context: int = 64
    width: int = 64
    heads: int = 4
    layers: int = 2


class Attention(nn.Module):
    """Causal multi-head attention, through PyTorch's function or written out with a mask from a buffer."""

    causal: Tensor

    def __init__(self, sizes: Sizes, manual: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.manual, self.dropout = sizes.heads, manual, dropout
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.out = nn.Linear(sizes.width, sizes.width)
        self.register_buffer("causal", torch.ones(sizes.context, sizes.context).tril().bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (y.view(batch, length, self.heads, -1).transpose(1, 2) for y in self.qkv(x).split(width, dim=2))
        dropout = self.dropout if self.training else 0.0
        if self.manual:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(~self.causal[:length, :length], float("-inf"))
            y = F.dropout(F.softmax(scores, dim=-1), dropout) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, width))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, sizes: Sizes, manual: bool, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(sizes.width), Attention(sizes, manual, dropout)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.mlp = nn.Sequential(
            nn.Linear(sizes.width, 4 * sizes.width), nn.GELU(), nn.Linear(4 * sizes.width, sizes.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class GPT(nn.Module):
    """GPT-2's layout with learned positions; the head shares the embedding's weight."""

    def __init__(self, sizes: Sizes, manual: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes, manual, dropout) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.initialize(0, sizes.layers)

    def initialize(self, seed: int, layers: int) -> None:
        """Draws the weights again, as GPT-2 does: normal, 0.02, smaller where a block writes to the residual."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            residual = name.endswith(("attention.out.weight", "mlp.2.weight"))
            with torch.no_grad():
                if parameter.dim() == 2:
                    std = 0.02 / math.sqrt(2 * layers) if residual else 0.02
                    parameter.copy_(torch.empty(parameter.shape).normal_(std=std, generator=generator))
                else:
                    parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in nats per byte, of (B, S) targets given (B, S) tokens."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def train(
    model: GPT,
    step: Callable[[Tensor, Tensor], Tensor],
    text: Tensor,
    arguments: argparse.Namespace,
    dtype: str,
    seed: int,
) -> list[float]:
    """The losses of one run; `step` is the model or its compiled form, and both share the weights."""
    sizes = Sizes()
    model.initialize(seed, sizes.layers)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)
    device = arguments.device
    losses = []
    for _ in range(arguments.steps):
        starts = torch.randint(len(text) - sizes.context - 1, (arguments.batch,), generator=generator)
        rows = torch.stack([text[start : start + sizes.context + 1] for start in starts.tolist()]).long().to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bf16"):
            loss = step(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def curves(attention: str, dtype: str, backend: str, text: Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    """Loss curves of all seeds, (seeds, steps), with one compilation; and what s2o reports."""
    torch._dynamo.reset()
    model = GPT(Sizes(), attention == "manual", arguments.dropout).to(arguments.device)
    step: Callable[[Tensor, Tensor], Tensor] = model
    if backend != "eager":
        options = {"inner": arguments.inner} if backend == "s2o" and arguments.inner else None
        step = torch.compile(model, backend=backend, options=options)
    start = time.perf_counter()
    losses = [train(model, step, text, arguments, dtype, seed) for seed in range(arguments.seeds)]
    record = {"attention": attention, "dtype": dtype, "backend": backend, "losses": losses}
    record["seconds"] = round(time.perf_counter() - start, 1)
    if backend == "s2o":
        import s2o_inductor

        sites = s2o_inductor.last_report().to_dict()["sites"]
        rewritten = [" & ".join(site["mask"]) or "none" for site in sites if site["status"] == "rewritten"]
        record["report"] = f"{len(rewritten)} of {len(sites)} sites, mask {', '.join(sorted(set(rewritten)))}"
    return record


def compare(records: list[dict[str, Any]]) -> str:
    """A markdown table: every backend's curves against eager's of the same seeds and against those of other seeds."""
    header = ("attention", "dtype", "backend", "loss, last 20 steps", "largest difference from eager")
    header += ("largest difference of two seeds", "its share", "seconds", "report")
    rows = [header, ("---",) * len(header)]
    for record in records:
        same = {k: record[k] for k in ("attention", "dtype")}
        eager = next(
            torch.tensor(r["losses"]) for r in records if r["backend"] == "eager" and same.items() <= r.items()
        )
        losses = torch.tensor(record["losses"])
        difference = (losses - eager).abs().max().item()
        pairs = itertools.combinations(eager, 2)
        seeds = max(((a - b).abs().max().item() for a, b in pairs), default=math.nan)
        rows.append((
            record["attention"], record["dtype"], record["backend"], f"{losses[:, -20:].mean():.4f}",
            f"{difference:.1e}", f"{seeds:.2f}", f"{difference / seeds:.2%}", f"{record['seconds']:.0f}",
            record.get("report", "-"),
        ))  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="all backends, attentions and dtypes")
    parser.add_argument("--attention", choices=("sdpa", "manual"), default="sdpa")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast over float32 weights"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="s2o")
    parser.add_argument("--inner", default=None, help='s2o\'s option "inner" (inductor, aot_eager or eager)')
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--dropout", type=float, default=0.0, help="of the attention weights; curves then differ by chance"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; the model is too small for more")
    parser.add_argument("--json", metavar="FILE", help="write the loss curves here")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.seeds < 1 or arguments.batch < 1:
        parser.error("--steps, --seeds and --batch must be positive")
    torch.set_num_threads(arguments.threads)
    text = torch.frombuffer(bytearray(load_text(held_out=False, limit=2**22)), dtype=torch.uint8)
    plan = [(arguments.attention, arguments.dtype, arguments.backend)]
    if arguments.compare:
        plan = list(itertools.product(("sdpa", "manual"), ("fp32", "bf16"), BACKENDS))
    records = []
    for attention, dtype, backend in plan:
        records.append(curves(attention, dtype, backend, text, arguments))
        last = torch.tensor(records[-1]["losses"])[:, -20:].mean(1)
        print(
            f"{attention:6} {dtype} {backend:8} {records[-1]['seconds']:6.1f} s, loss of the last 20 steps by seed:",
            " ".join(f"{loss:.4f}" for loss in last.tolist()), records[-1].get("report", ""), flush=True,
        )  # fmt: skip
    if arguments.compare:
        print(compare(records))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(records, file)


if __name__ == "__main__":
    main()
