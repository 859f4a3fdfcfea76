"""What s2o does, in one command: a trained language model on text it has never seen, eagerly, compiled, and with s2o.

    python examples/quickstart.py              # two CPU cores: under two minutes; with a CUDA device: 16,384 tokens
    python examples/quickstart.py --tokens 512 --fast      # a look at the report, nothing compiled to machine code

The model (`tiny_lm.py`, plain PyTorch) gets what a tokenizer hands out: two texts of different length, padded, and
an attention_mask. As in Hugging Face models that mask becomes a (B, 1, S, S) tensor, and attention runs on slow
kernels. s2o proves that the tensor says "causal, and not the padding", and never builds it. Nothing is approximated:
the table shows the difference of the logits, the loss on held-out text and the recall of keys planted far back.
Then, on the CPU, one text twice as long, exactly and sparsely: what leaving out most of the attention costs and brings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_lm import load_checkpoint, load_text, recall, to_tokens
from torch import Tensor

import s2o_inductor


@dataclass
class Measured:
    """What one way of running the model gave; times in seconds, memory in bytes."""

    first_call: float
    logits: Tensor
    peak_memory: int
    loss: float
    recall: float = 0.0
    times: list[float] = field(default_factory=list)


def padded_batch(text: bytes, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and attention_mask, (2, length) each: one text fills its row, the other three quarters of it."""
    short = length * 3 // 4
    tokens = to_tokens([text[:length], text[length : length + short].ljust(length, b"\0")])
    attention_mask = torch.ones_like(tokens)
    attention_mask[1, short:] = 0
    return tokens, attention_mask


def peak_memory(run: Callable[[], Any], device: str) -> int:
    """Most bytes of tensors that were alive at once during `run` on top of those alive before it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text())
    events = [event for event in trace["traceEvents"] if event["name"] == "[memory]"]
    alive = list(itertools.accumulate(event["args"]["Bytes"] for event in sorted(events, key=lambda e: e["ts"])))
    return max(alive, default=0)


def measure(model: Callable[..., Tensor], text: bytes, length: int, recalls: int, device: str) -> Measured:
    """Runs `model` on a padded batch for loss and memory, then on planted keys for recall and time."""
    tokens, attention_mask = (t.to(device) for t in padded_batch(text, length))
    began = time.perf_counter()
    logits = model(tokens, attention_mask).float().cpu()
    first_call = time.perf_counter() - began

    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten().cpu(), reduction="none")
    counts = attention_mask[:, 1:].flatten().cpu()
    loss = (losses * counts).sum().item() / counts.sum().item()
    result = Measured(first_call, logits, peak_memory(lambda: model(tokens, attention_mask), device), loss)

    def timed(planted: Tensor) -> Tensor:
        began = time.perf_counter()
        out = model(planted, torch.ones_like(planted)).float()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        result.times.append(time.perf_counter() - began)
        return out

    result.recall = recall(timed, text, length, recalls, device, batch=2)
    return result


def print_table(rows: dict[str, Measured]) -> None:
    eager = rows["eager"]
    header = ("first call", 11), ("forward", 12), ("memory", 11), ("loss", 9), ("recall", 8), ("difference", 12)
    print("\n" + " " * 28 + "".join(f"{title:>{width}}" for title, width in header))
    for name, row in rows.items():
        difference = "" if row is eager else f"{(row.logits - eager.logits).abs().max().item():.1e}"
        print(
            f"{name:28}{row.first_call:9.1f} s{statistics.median(row.times) * 1e3:9,.1f} ms"
            f"{row.peak_memory / 2**20:7,.0f} MiB{row.loss:9.4f}{row.recall:8.2f}{difference:>12}"
        )


def compare_sparse(model: Callable[..., Tensor], text: bytes, length: int) -> None:
    """Prints what sparse attention costs and brings on `length` bytes: loss, recall, density and time."""
    tokens, targets = to_tokens([text[:length]]), to_tokens([text[1 : length + 1]])
    print(f"\nsparse attention, {length} bytes of context:\n")
    print(f"{'':28}{'forward':>12}{'loss':>10}{'recall':>8}{'density':>9}{'dropped':>9}")
    for name, options in (("exact: budget=0", {"budget": 0.0}), ("sparse: the default budget", {})):
        torch._dynamo.reset()
        way = torch.compile(model, backend="s2o", options={**options, "min_seq": length}, dynamic=False)
        with torch.no_grad():
            loss = F.cross_entropy(way(tokens)[0].float(), targets[0]).item()
            began = time.perf_counter()
            recalled = recall(way, text, length, count=2, device="cpu")
            seconds = (time.perf_counter() - began) / 2
        read = [site["sparse"] for site in s2o_inductor.last_report().to_dict()["sites"] if site["sparse"]]
        density, dropped = (
            statistics.mean(site[key] for site in read) if read else default
            for key, default in (("density", 1.0), ("dropped", 0.0))
        )
        print(f"{name:28}{seconds * 1e3:9,.1f} ms{loss:10.4f}{recalled:8.2f}{density:9.3f}{dropped:9.3f}")
    print(
        "\ndensity: share of the visible (query, key) pairs that were computed, mean of layers and heads;\n"
        "dropped: estimated share of the softmax mass that groups of like keys stood in for."
    )


def main() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that counts memory is chatty
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=None, help="context length; default 4,096, or 16,384 on CUDA")
    parser.add_argument(
        "--recalls", type=int, default=None, help="sequences with a key to recall; default 4, or 24 on CUDA"
    )
    parser.add_argument("--fast", action="store_true", help="generate no code, and leave torch.compile's Inductor out")
    arguments = parser.parse_args()
    cuda = arguments.device.startswith("cuda")
    length = arguments.tokens or (16384 if cuda else 4096)
    text = load_text(held_out=True, limit=2**20)
    if not 256 <= length <= len(text) // 2:
        parser.error(f"--tokens must be from 256, for room for planted keys, to {len(text) // 2}; got {length}")

    model, notes = load_checkpoint()
    model.to(arguments.device, torch.bfloat16 if cuda else torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"model: {parameters / 1e6:.1f} M parameters, {len(model.blocks)} layers; "
        f"trained on {notes['tokens'] / 1e6:.0f} M bytes of Python through backend={notes['backend']!r}\n"
        f"text:  the standard library's, which training never saw: {length} and {length * 3 // 4} bytes, padded\n"
        f"run:   torch {torch.__version__} on {arguments.device}, {torch.get_num_threads()} threads"
    )
    ways: dict[str, Callable[..., Tensor]] = {"eager": model}
    if arguments.fast:
        options = {"inner": "aot_eager"}
        ways['s2o, inner="aot_eager"'] = torch.compile(model, backend="s2o", options=options, dynamic=False)
    else:
        ways["torch.compile(model)"] = torch.compile(model, dynamic=False)
        ways['... (model, backend="s2o")'] = torch.compile(model, backend="s2o", dynamic=False)

    rows: dict[str, Measured] = {}
    for name, way in ways.items():
        torch._dynamo.reset()  # each way starts from nothing
        with torch.no_grad():
            rows[name] = measure(way, text, length, arguments.recalls or (24 if cuda else 4), arguments.device)
    print(f"\n{s2o_inductor.last_report()}")
    print_table(rows)
    if not arguments.fast:
        inductor, s2o = list(rows.values())[-2:]
        speed = statistics.median(inductor.times) / statistics.median(s2o.times)
        memory = s2o.peak_memory / max(inductor.peak_memory, 1)
        print(f"\ns2o against torch.compile: {speed:.2f}x the speed, {memory:.2f}x the memory")
    print(
        "\nfirst call: with compilation, or from Inductor's cache; forward: median of the calls of the recall test;\n"
        "memory: most bytes of tensors alive at once beside weights and input; loss: nats per byte of held-out text;\n"
        "recall: share of sequences in which a number planted far back, among three others, came back whole;\n"
        "difference: the largest of any logit from eager (in bfloat16 any two ways round differently)."
    )
    if not cuda and not arguments.fast:  # not measured on CUDA yet
        compare_sparse(model, text, min(2 * length, len(text) - 1))


if __name__ == "__main__":
    main()
