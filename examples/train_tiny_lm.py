"""Trains the small language model of `tiny_lm.py`, an ordinary training script: s2o is one argument of torch.compile.

    python examples/train_tiny_lm.py --backend s2o --seconds 200       # how the committed checkpoint was made
    python examples/train_tiny_lm.py --steps 3 --device cpu --layers 1 --context 256 --tokens 1024 --log-every 1

The context grows while training goes on, so that the model first learns to copy from near and then
from afar. About a fifth of the text is planted keys and the lines that recall them.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_lm import Config, TinyLM, load_checkpoint, load_text, plant_keys, recall, save_checkpoint, to_tokens
from torch import Tensor


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="s2o", help="s2o, inductor, eager or any other torch.compile backend")
    parser.add_argument("--inner", default=None, help='with s2o: its option "inner" (inductor, aot_eager or eager)')
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps")
    parser.add_argument("--seconds", type=float, default=None, help="train this long, whatever the number of steps")
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096, 16384], help="sequence length, by phase")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens in one step")
    parser.add_argument("--layers", type=int, default=Config.layers)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--text-mb", type=int, default=96, help="most megabytes of text to train on")
    parser.add_argument("--log-every", type=int, default=100, help="steps between two lines of the log")
    parser.add_argument("--output", type=Path, default=Path("tiny_lm.pt"))
    arguments = parser.parse_args()
    if arguments.steps < 1 or min(arguments.context) < 256 or arguments.tokens < max(arguments.context):
        parser.error("--steps must be positive, --context at least 256 and --tokens at least the longest --context")
    return arguments


def batch(text: bytes, length: int, tokens: int, rng: random.Random) -> Tensor:
    """(B, length + 1) tokens of random places of the text, B * length = tokens, one key pair per 256 bytes."""
    rows = []
    for _ in range(tokens // length):
        start = rng.randrange(len(text) - length)
        rows.append(bytearray(text[start : start + length + 1]))
        plant_keys(rows[-1], length // 256, rng)
    return to_tokens(rows)


def held_out_loss(model: TinyLM, text: bytes, length: int, device: str) -> float:
    """Nats per byte over up to 8 windows of held-out text, nothing planted."""
    windows = [text[i : i + length] for i in range(0, len(text) - length + 1, length)][:8]
    losses = []
    for window in windows:
        tokens = to_tokens([window]).to(device)
        with torch.no_grad():
            losses.append(F.cross_entropy(model(tokens)[0, :-1].float(), tokens[0, 1:]).item())
    return sum(losses) / len(losses)


def main() -> None:
    arguments = parse_arguments()
    device, rng = arguments.device, random.Random(0)
    torch.manual_seed(0)
    began = time.perf_counter()
    text, held_out = load_text(False, arguments.text_mb * 10**6), load_text(True, 10**6)
    print(f"text: {len(text) / 1e6:.1f} MB to train on, read in {time.perf_counter() - began:.1f} s", flush=True)

    model = TinyLM(Config(layers=arguments.layers)).to(device)
    options = {"inner": arguments.inner} if arguments.inner else None
    compiled = torch.compile(model, backend=arguments.backend, options=options, dynamic=False)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device.startswith("cuda"))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=arguments.learning_rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    print(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}", flush=True)

    began = logged = time.perf_counter()
    step = seen = seen_then = phase = 0
    while True:
        progress = (time.perf_counter() - began) / arguments.seconds if arguments.seconds else step / arguments.steps
        if progress >= 1:
            break
        # Half the time for the first context length, half the rest for the next and so on.
        phase = min(int(-math.log2(1 - progress)), len(arguments.context) - 1)
        length = arguments.context[phase]
        rate = arguments.learning_rate * min((step + 1) / 200, 1.0) * (1 - progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = batch(text, length, arguments.tokens, rng)
        tokens = (tokens.pin_memory() if device.startswith("cuda") else tokens).to(device, non_blocking=True)
        with autocast:
            logits = compiled(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seen = step + 1, seen + arguments.tokens
        if step % arguments.log_every == 0:
            value, now = loss.item(), time.perf_counter()  # item() waits for the device, so `now` is honest
            if not math.isfinite(value):
                raise SystemExit(f"the loss is {value} at step {step}: try a lower --learning-rate")
            with autocast:
                share = recall(model, held_out, length, 16, device)
            print(
                f"step {step:5d}  {now - began:6.1f} s  context {length:5d}  loss {value:.3f}  recall {share:.2f}  "
                f"{(seen - seen_then) / (now - logged):9,.0f} tokens/s", flush=True,
            )  # fmt: skip
            seen_then, logged = seen, time.perf_counter()
    seconds = time.perf_counter() - began

    # What is stored is int8, so what is measured is what was stored.
    notes = {"backend": arguments.backend, "torch": str(torch.__version__), "seconds": seconds, "tokens": seen}
    save_checkpoint(arguments.output, model, notes)
    stored = load_checkpoint(arguments.output)[0].to(device)
    with autocast:
        loss_by_length = {n: held_out_loss(stored, held_out, n, device) for n in arguments.context}
        recall_by_length = {n: recall(stored, held_out, n, 24, device) for n in arguments.context}
    notes |= {"held_out_loss": loss_by_length, "recall": recall_by_length}
    save_checkpoint(arguments.output, stored, notes)
    print(f"trained {step} steps, {seen / 1e6:.1f} M tokens in {seconds:.1f} s ({seen / seconds:,.0f} tokens/s)")
    for n in arguments.context:
        print(f"context {n:6d}: held-out loss {loss_by_length[n]:.3f} nats/byte, key recall {recall_by_length[n]:.2f}")
    print(f"wrote {arguments.output} ({arguments.output.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
