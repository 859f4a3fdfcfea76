"""What the passes and their verification cost: cold and warm compile times against Inductor.

    python examples/bench_compile.py --layers 8 --tokens 256 --train

Every figure comes from a process of its own. Cold starts with an empty cache folder, warm is the
same command again on the folder that it left. Needs transformers; runs on CUDA when there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time


def child(backend: str, layers: int, tokens: int, train: bool) -> None:
    """Compiles and runs one model once; prints its figures as JSON."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=1024, max_position_embeddings=max(tokens, 2048),
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device).train(train)
    ids = torch.randint(0, 1024, (2, tokens), device=device)
    mask = torch.ones_like(ids)
    mask[0, : tokens // 4] = 0
    compiled = torch.compile(model, backend=backend)
    begin = time.perf_counter()
    with torch.set_grad_enabled(train):
        output = compiled(input_ids=ids, attention_mask=mask, labels=ids)
        if train:
            output.loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    figures: dict[str, object] = {"seconds": time.perf_counter() - begin}
    if backend == "s2o":
        import s2o_inductor

        report = s2o_inductor.last_report()
        figures |= {"passes": report.seconds, "sites": len(report.sites)}
    print(json.dumps(figures))


def run(backend: str, cache: str, arguments: argparse.Namespace) -> dict[str, object]:
    """The figures of one fresh process."""
    command = [sys.executable, __file__, "--child", backend, "--layers", str(arguments.layers)]
    command += ["--tokens", str(arguments.tokens), *(["--train"] if arguments.train else [])]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--backends", nargs="+", default=["inductor", "s2o"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.layers, arguments.tokens, arguments.train)
        return
    print(f"Llama, {arguments.layers} layers, {arguments.tokens} tokens, {'train' if arguments.train else 'eval'}")
    for backend in arguments.backends:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                figures = run(backend, cache, arguments)
                line = f"{backend:9} {state}: {figures['seconds']:6.1f} s"
                passes = figures.get("passes")
                if isinstance(passes, dict):
                    own = passes.get("stage 1", 0.0) + passes.get("stage 2", 0.0)
                    checked = passes.get("of which verification", 0.0)
                    share = own / float(str(figures["seconds"]))
                    line += f", own passes {own:.2f} s ({share:.1%}), of which verification {checked:.2f} s"
                print(line, flush=True)


if __name__ == "__main__":
    main()
