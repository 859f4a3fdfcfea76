"""Unmodified Hugging Face Llama on a GPU: eager, torch.compile and s2o, in one run.

    python examples/bench_hf.py --forward 4096 16384 --train 4096 --batch 1 4 --json results.json

Builds transformers' LlamaModel in the shape of Llama-3.1-8B with a few layers, random weights,
bfloat16, and measures every side on the same inputs: median time, peak memory, time of the first
call (compilation included) and the difference from eager. Batches above 1 are padded: sequences of
different length, half of them padded on the left. A side that runs out of memory says so. `--sparse` adds s2o
under a budget, with the density of what it read: with random weights attention is nearly flat, so cap it with
max_density, and take the time for that of a model whose attention is as sparse as that.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

SIDES = ("eager", "inductor", "s2o", "s2o sparse")


def llama(layers: int) -> nn.Module:
    """A Llama-3.1-8B shaped decoder with `layers` layers, on the GPU."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=131072,
        rope_theta=500000.0, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaModel(config)
    finally:
        torch.set_default_dtype(torch.float32)


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    """Token ids, and for more than one sequence an attention mask with ragged padding."""
    generator = torch.Generator("cuda").manual_seed(length + batch)
    ids = torch.randint(0, 128256, (batch, length), device="cuda", generator=generator)
    if batch == 1:
        return {"input_ids": ids}
    mask = torch.ones(batch, length, dtype=torch.long, device="cuda")
    for row in range(batch):
        hidden = length * row // (2 * batch)
        if hidden:
            mask[row, :hidden] = 0
            if row % 2:
                mask[row] = mask[row].flip(0)
    return {"input_ids": ids, "attention_mask": mask}


def side(model: nn.Module, name: str, sparse: dict[str, Any]) -> Callable[..., Any]:
    """The model as one side runs it; the only difference is the backend's name, and its options where it is sparse."""
    torch._dynamo.reset()
    if name == "eager":
        return model
    options = sparse if name == "s2o sparse" else None
    return torch.compile(model, backend=name.split()[0], dynamic=False, options=options)


def steps(run: Callable[..., Any], model: nn.Module, batch: dict[str, Tensor], train: bool) -> Callable[[], Tensor]:
    """One forward, or one forward and backward, returning something to compare.

    Padded positions are left out of both: torch's kernels do not agree on a row that sees no key.
    """
    seen = batch["attention_mask"][..., None] if "attention_mask" in batch else torch.ones((), device="cuda")
    direction = torch.randn(4096, device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def forward() -> Tensor:
        with torch.no_grad():
            output: Tensor = run(**batch).last_hidden_state
            return output

    def train_step() -> Tensor:
        model.zero_grad(set_to_none=True)
        states = run(**batch).last_hidden_state
        ((states @ direction.to(states.dtype)) * seen.squeeze(-1)).float().sum().backward()
        gradient = model.layers[0].self_attn.k_proj.weight.grad  # type: ignore[index,union-attr]
        assert gradient is not None
        return gradient

    return train_step if train else forward


def measure(step: Callable[[], Tensor], seconds: float, seen: Tensor | None) -> tuple[dict[str, float], Tensor]:
    """First-call and median time and peak memory of a step, and its result on the host, where `seen`."""
    gc.collect()
    torch.cuda.empty_cache()
    begin = time.perf_counter()
    result = step()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times: list[float] = []
    while not times or (sum(times) < seconds * 1e3 and len(times) < 20) or len(times) < 3:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    peak = torch.cuda.max_memory_allocated() - before
    figures = {"ms": statistics.median(times), "peak_gib": peak / 2**30, "first_s": first}
    kept = result if seen is None else result[seen.bool()]
    return figures, kept.flatten()[:: max(1, kept.numel() // 2**22)].float().cpu()


def compare(
    batch: dict[str, Tensor], model: nn.Module, train: bool, seconds: float, sides: list[str], sparse: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One record per side on one workload; differences are relative to the first, in the Frobenius norm."""
    expected: Tensor | None = None
    model.train(train)
    for name in sides:
        record: dict[str, Any] = {"side": name}
        try:
            seen = None if train else batch.get("attention_mask")
            figures, result = measure(steps(side(model, name, sparse), model, batch, train), seconds, seen)
            expected = result if expected is None else expected
            record |= figures | {"difference": ((result - expected).norm() / expected.norm()).item()}
        except torch.OutOfMemoryError as error:
            record["failed"] = f"out of memory: {str(error).split('. ')[1] if '. ' in str(error) else error}"
        if name.startswith("s2o"):
            import s2o_inductor

            report = s2o_inductor.last_report()
            report.settle()
            record["sites"] = [f"{' & '.join(site.mask)} -> {site.route}" for site in report.sites]
            record["pass_s"] = report.seconds
            record["density"] = [site.reading and round(site.reading.density, 3) for site in report.sites]
        model.zero_grad(set_to_none=True)
        torch._dynamo.reset()
        yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--forward", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--train", type=int, nargs="*", default=[4096])
    parser.add_argument("--batch", type=int, nargs="*", default=[1])
    parser.add_argument("--seconds", type=float, default=0.7, help="timed seconds per side and workload")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:3]))
    parser.add_argument("--sparse", type=json.loads, default={}, help="options as JSON, such as '{\"min_seq\": 32768}'")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    if ("s2o sparse" in arguments.sides) != bool(arguments.sparse):
        parser.error("the side 's2o sparse' and --sparse go together")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.layers} layers, bfloat16")
    model = llama(arguments.layers)
    records: list[dict[str, Any]] = []
    for train, lengths in ((False, arguments.forward), (True, arguments.train)):
        for length in lengths:
            for batch in arguments.batch:
                workload = {"what": "train" if train else "forward", "batch": batch, "tokens": length}
                workloads = (inputs(batch, length), model, train, arguments.seconds)
                for record in compare(*workloads, arguments.sides, arguments.sparse):
                    records.append(workload | record)
                    print(json.dumps(records[-1]), flush=True)
                    if arguments.json:
                        with open(arguments.json, "w") as file:
                            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main()
