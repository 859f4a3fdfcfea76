"""Benchmarks of s2o's sparse attention: `python examples/bench.py quality --help`.

attention   time by stage beside torch's dense kernels, on a GPU with Triton; the others need none
quality     error against density of our selection and of published ones, on real or synthetic heads
model       loss and key recall of a language model against density, for the same selections
heads       time and error of one call over all heads of a model, beside dense kernels and other people's, on a GPU
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import model_quality
import tiny_lm
import torch
from model_quality import Quality
from sparse_baselines import METHODS, Method
from sparse_quality import FLOOR, Curve, PseudoKeys, evaluate, groups_of, sample_starts
from sparse_variants import EXPERIMENTS
from synthetic_heads import KINDS, synthetic_head
from torch import Tensor

Heads = Iterator[tuple[str, Tensor, Tensor, Tensor]]  # name, q (Hq, S, D), k and v (Hkv, S, D)


# ---------------------------------------------------------------- heads


def stored_heads(files: Sequence[Path]) -> Heads:
    """Heads of files by `torch.save`: a dict of q (1, Hq, S, D) and k, v (1, Hkv, S, D), rotated and not scaled."""
    for file in files:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        missing = [name for name in "qkv" if name not in stored]
        if missing:
            raise SystemExit(f"{file} must hold a dict of tensors q, k and v; {', '.join(missing)} is not in it")
        yield (file.stem, *(stored[name][0] for name in "qkv"))


@torch.no_grad()
def model_heads(checkpoint: Path, length: int) -> Heads:
    """Heads of the example language model, layer by layer, on held-out text of `length` bytes."""
    model, _ = tiny_lm.load_checkpoint(checkpoint)
    captured: list[tuple[Tensor, ...]] = []

    def capture(module: tiny_lm.Attention, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
        x, cos, sin, _ = inputs
        width = module.config.head_dim
        q, k, v = (p(x[0]).view(length, -1, width).transpose(0, 1) for p in (module.q, module.k, module.v))
        captured.append((tiny_lm.rotate(q, cos, sin), tiny_lm.rotate(k, cos, sin), v))

    for block in model.blocks:
        block.attention.register_forward_pre_hook(capture)  # type: ignore[arg-type]
    model(tiny_lm.to_tokens([tiny_lm.load_text(held_out=True, limit=length)]))
    for layer, (q, k, v) in enumerate(captured):
        yield f"layer {layer}", q, k, v


def synthetic_heads(kinds: Sequence[str], length: int, seed: int) -> Heads:
    """One head of each kind, each its own group."""
    for kind in kinds:
        q, k, v = synthetic_head(kind, length, seed=seed)
        yield kind, q[None], k[None], v[None]


# ---------------------------------------------------------------- quality


def measure(
    heads: Heads, methods: Mapping[str, Method], tiles: int, seed: int, consecutive: int = 1
) -> tuple[dict[str, Curve], dict[str, float]]:
    """Curves of each method over all heads, and rows of pseudo-keys per visible pair.

    Args:
        heads: what to measure on.
        methods: by name.
        tiles: sampled tiles of each head, one in each of that many equal ranges.
        seed: of the sampled tiles.
        consecutive: so many tiles in a row, aligned, instead of each sampled one.

    Returns:
        curves, and for each method the pseudo-keys of its tail as a share of visible keys.
    """
    errors: dict[str, list[Tensor]] = {name: [] for name in methods}
    read = {name: torch.zeros(len(method.knobs), dtype=torch.float64) for name, method in methods.items()}
    pseudo, visible = (dict.fromkeys(methods, 0.0) for _ in range(2))
    for title, q, k, v in heads:
        began = time.perf_counter()
        of_layer: dict[str, dict[int, list[Tensor]]] = {name: {} for name in methods}
        for head, start, operands in groups_of(q, k, v, sample_starts(k.shape[1], tiles, seed, consecutive)):
            for make in dict.fromkeys(method.tile for method in methods.values()):
                tile = make(*operands, start)
                group, rows = tile.q.shape[:2]
                tails: dict[object, PseudoKeys] = {}
                for name, method in methods.items():
                    if method.tile is not make:
                        continue
                    if method.tail is not None and method.tail not in tails:
                        tails[method.tail] = method.tail(tile)
                    tail = tails.get(method.tail)
                    chosen = method.select(tile, method.knobs)
                    of_layer[name].setdefault(head, []).append(evaluate(tile, chosen, tail))
                    read[name] += (chosen.tokens * rows + tile.dense_pairs).sum(dim=0)
                    pseudo[name] += 0 if tail is None else group * rows * tail.k.shape[0]
                    visible[name] += group * tile.visible_pairs
        for name in methods:
            errors[name] += [torch.stack(parts).mean(dim=0) for parts in of_layer[name].values()]
        print(f"# {title}: {time.perf_counter() - began:.0f} s", flush=True)
    curves = {m: Curve((read[m] / visible[m]).float(), torch.cat(errors[m]).clamp(min=FLOOR)) for m in methods}
    return curves, {m: pseudo[m] / visible[m] for m in methods}


def print_table(
    curves: Mapping[str, Curve], methods: Mapping[str, Method], pseudo: Mapping[str, float], reference: str,
    densities: Sequence[float],
) -> None:  # fmt: skip
    """A markdown table of errors and of ratios to the reference; a dash is a density outside the measured range."""
    at = " / ".join(f"{x:g}" for x in densities)
    base, middle = curves[reference], densities[len(densities) // 2]

    def ratios(curve: Curve, mean: str) -> str:
        return _joined([base.error_at(x, mean) / curve.error_at(x, mean) for x in densities], ".2f")

    print(f"\nRatios are the error of {reference} over the row's at equal density of computed pairs ({at}).\n")
    print(
        f"| method | error, geometric mean | ratio, geometric | arithmetic | median | worst head at {middle:g} "
        f"| density ratio at {reference}'s error at {densities[-1]:g} | pseudo-keys / keys | scoring, share of dense |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, curve in curves.items():
        method = methods[name]
        density = [
            densities[-1] / curve.density_at(base.error_at(densities[-1], mean), mean)
            for mean in ("geometric", "arithmetic")
        ]
        cells = [
            name,
            _joined([curve.error_at(x, "geometric") for x in densities], ".1e"),
            ratios(curve, "geometric"),
            ratios(curve, "arithmetic"),
            ratios(curve, "median"),
            _joined([curve.error_at(middle, "worst")], ".1e"),
            _joined(density, ".2f"),
            f"{pseudo[name]:.1%}" if pseudo[name] else "",
            "oracle" if method.oracle else f"{method.scoring / 256:.1%}",
        ]
        print("| " + " | ".join(cells) + " |")


def _joined(numbers: Sequence[float], form: str) -> str:
    return " ".join("-" if math.isnan(x) else format(x, form) for x in numbers)


def quality(args: argparse.Namespace) -> None:
    """The subcommand."""
    known = {**METHODS, **EXPERIMENTS.get(args.experiment, {})}
    unknown = [name for name in [*args.methods, args.reference] if name not in known]
    if unknown:
        raise SystemExit(f"--methods, --reference: unknown {'; '.join(unknown)}; there are {'; '.join(known)}")
    names = args.methods or list(EXPERIMENTS[args.experiment] if args.experiment else METHODS)
    methods = {name: known[name] for name in dict.fromkeys([args.reference, *names])}
    sources: dict[str, Heads] = {}
    document: dict[str, dict[str, dict[str, list[object]]]] = {}
    if args.heads:
        sources["stored heads"] = stored_heads(args.heads)
    else:
        if args.checkpoint is None:
            sources["synthetic heads"] = synthetic_heads(args.kinds or list(KINDS), args.length, args.seed)
        if not args.kinds:
            sources["the example language model"] = model_heads(args.checkpoint or tiny_lm.CHECKPOINT, args.length)
    with torch.no_grad():
        for title, heads in sources.items():
            print(f"\n## {title}\n")
            curves, pseudo = measure(heads, methods, args.tiles, args.seed, args.consecutive)
            document[title] = {n: {"density": c.density.tolist(), "error": c.error.tolist()} for n, c in curves.items()}
            print_table(curves, methods, pseudo, args.reference, args.densities)
            if args.levels:
                print_levels(curves, methods)
    if args.json:
        args.json.write_text(json.dumps(document))


def print_levels(curves: Mapping[str, Curve], methods: Mapping[str, Method]) -> None:
    """What each threshold of each method gives: its calibration."""
    for name, curve in curves.items():
        print(
            f"\n{name}\n\n| threshold | density | error, arithmetic | geometric | worst head |\n|---|---|---|---|---|"
        )
        levels = [curve.level(mean).exp().tolist() for mean in ("arithmetic", "geometric", "worst")]
        for knob, density, *row in zip(methods[name].knobs, curve.density.tolist(), *levels, strict=True):
            print(f"| {knob:g} | {density:.3f} | " + " | ".join(f"{x:.1e}" for x in row) + " |")


# ---------------------------------------------------------------- model


def model(args: argparse.Namespace) -> None:
    """The subcommand."""
    chosen = dict(_method(text) for text in args.methods) or model_quality.METHODS
    language = model_quality.load_language(args.model, args.sequences * max(args.lengths))
    language.model.to(args.device)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    results: dict[int, list[Quality]] = {}
    for length in args.lengths:
        rows = results[length] = [Quality(name, knob) for name, knobs in chosen.items() for knob in knobs]
        for sequence in range(args.sequences):
            planted = model_quality.plant(language, sequence, length, args.keys)
            for row in rows:
                began = time.perf_counter()
                attention = model_quality.attention_of(row.method, row.knob)
                density, loss, recalled = model_quality.run(language, planted, attention, args.device, dtype)
                row.density.append(density)
                row.loss.append(loss)
                row.recalled, row.asked = row.recalled + recalled, row.asked + args.keys
                print(
                    f"# {length} tokens, sequence {sequence}, {row.method} {row.knob:g}: density {density:.3f}, "
                    f"loss {loss:.4f}, {recalled} of {args.keys} keys, {time.perf_counter() - began:.0f} s",
                    flush=True,
                )
        print_curve(length, rows)
    if args.json:
        document = {str(length): [dataclasses.asdict(row) for row in rows] for length, rows in results.items()}
        args.json.write_text(json.dumps(document, indent=1))


def attention(args: argparse.Namespace) -> None:
    """Times of the CUDA kernels, whose module imports Triton."""
    import sparse_timing

    sparse_timing.run(args)


def heads(args: argparse.Namespace) -> None:
    """Time and error of calls over many heads, by the CUDA kernels."""
    import head_calls

    head_calls.run(args)


def _method(text: str) -> tuple[str, tuple[float, ...]]:
    name, _, knobs = text.partition("=")
    if name not in model_quality.METHODS:
        raise SystemExit(f"--methods must name some of: {'; '.join(model_quality.METHODS)}. Unknown: {name}")
    return name, tuple(float(knob) for knob in knobs.split(",")) if knobs else model_quality.METHODS[name]


def print_curve(length: int, rows: Sequence[Quality]) -> None:
    """A markdown table of one length; change is against the first row, of the mean loss and of each sequence."""
    base = rows[0]
    print(f"\n{length} tokens, {len(base.loss)} sequences; loss of {base.method}: {_mean(base.loss):.4f}\n")
    print("| method | threshold | density | change of the loss | of each sequence | keys recalled |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        changes = [x / y - 1 for x, y in zip(row.loss, base.loss, strict=True)]
        print(
            f"| {row.method} | {row.knob:g} | {_mean(row.density):.3f} | {_mean(row.loss) / _mean(base.loss) - 1:+.2%} "
            f"| {_joined(changes, '+.2%')} | {row.recalled}/{row.asked} |"
        )


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("attention", help="time on a GPU by length and density")
    add.set_defaults(run=attention)
    lengths = [1024, 4096, 16384, 32768, 65536, 131072, 262144]
    add.add_argument("--lengths", type=int, nargs="+", default=lengths, help="tokens")
    add.add_argument("--sweep", action="store_true", help="ways to run the kernels, at density 0.1")
    add.add_argument("--gather", action="store_true", help="the attention kernel alone on equal work in several orders")
    add.add_argument("--profile", action="store_true", help="time on the device by kernel, at density 0.1")
    add.add_argument("--flex", action="store_true", help="FlexAttention, too, compiled for each length")
    add.add_argument("--json", type=Path, help="write the rows here as well")
    add = commands.add_parser("quality", help="error against density of sparse selections")
    add.set_defaults(run=quality)
    add.add_argument("--heads", type=Path, nargs="+", help="files with q (1, Hq, S, D) and k, v (1, Hkv, S, D)")
    add.add_argument(
        "--checkpoint", type=Path, help="a checkpoint of examples/train_tiny_lm.py; alone, without --heads"
    )
    add.add_argument("--kinds", nargs="+", default=[], choices=list(KINDS), help="only synthetic heads, of these kinds")
    add.add_argument("--length", type=int, default=16384, help="tokens of synthetic heads and of the model's text")
    add.add_argument("--tiles", type=int, default=4, help="sampled tiles of 128 rows for each head")
    add.add_argument("--methods", nargs="+", default=[], help="rows of the table; default all")
    add.add_argument("--reference", default="PBS-Attn", help="the row that ratios are against")
    add.add_argument("--experiment", choices=list(EXPERIMENTS), help="rows of one experiment instead of all methods")
    add.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    add.add_argument("--consecutive", type=int, default=1, help="tiles in a row for each sampled one, aligned")
    add.add_argument("--json", type=Path, help="write densities and the error of each head here as well")
    add.add_argument("--levels", action="store_true", help="also print density and error of every threshold")
    add.add_argument("--seed", type=int, default=0)
    add = commands.add_parser("model", help="loss and key recall of a language model under sparse selections")
    add.set_defaults(run=model)
    add.add_argument("--model", type=Path, help="a folder as model_quality.load_language describes; default: ours")
    add.add_argument("--lengths", type=int, nargs="+", default=[8192], help="tokens, multiples of 128")
    add.add_argument("--sequences", type=int, default=2, help="held-out sequences of each length")
    add.add_argument("--keys", type=int, default=8, help="planted keys in each sequence")
    add.add_argument("--methods", nargs="+", default=[], help="NAME or NAME=threshold,...; first: the base")
    add.add_argument("--device", default="cpu", help="on CUDA attention runs in bfloat16, the rest in float32")
    add.add_argument("--json", type=Path, help="write the figures here as well")
    add = commands.add_parser("heads", help="time and error of one call over many heads on a GPU")
    add.set_defaults(run=heads)
    add.add_argument("--model", type=Path, help="heads of this folder's model, as `model` takes it; default: ours")
    add.add_argument("--length", type=int, default=32768, help="tokens of a text, a multiple of 128")
    add.add_argument("--copies", type=int, default=1, help="texts put behind each other")
    add.add_argument("--kinds", nargs="+", default=[], help="synthetic heads instead: of these kinds, or all")
    add.add_argument("--seeds", type=int, default=2, help="synthetic heads of each kind")
    add.add_argument("--tiles", type=int, default=256, help="tiles of 128 rows that errors are of")
    add.add_argument(
        "--selections",
        nargs="*",
        default=["PBS-Attn"],
        help="published, through our kernel: NAME or NAME=threshold,...",
    )
    add.add_argument("--peers", type=Path, help="a Python file with PEERS, other people's attention")
    add.add_argument("--calibrate", action="store_true", help="also budgets for each head, chosen on the next text")
    add.add_argument("--json", type=Path, help="write the rows here as well")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
