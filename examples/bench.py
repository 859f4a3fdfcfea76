"""Benchmarks of s2o's sparse attention: `python examples/bench.py quality --help`.

quality     error against density of our selection and of published ones, on real or synthetic heads; needs no GPU
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import tiny_lm
import torch
from sparse_baselines import METHODS
from sparse_quality import FLOOR, Curve, evaluate, sample_starts, tiles_of
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


def synthetic_heads(length: int, seed: int) -> Heads:
    """One head of every kind, each its own group."""
    for kind in KINDS:
        q, k, v = synthetic_head(kind, length, seed=seed)
        yield kind, q[None], k[None], v[None]


# ---------------------------------------------------------------- quality


def measure(heads: Heads, methods: Sequence[str], tiles: int, seed: int) -> tuple[dict[str, Curve], dict[str, float]]:
    """Curves of each method over all heads, and rows of pseudo-keys per visible pair.

    Args:
        heads: what to measure on.
        methods: names of `METHODS`.
        tiles: sampled tiles of each head, one in each of that many equal ranges.
        seed: of the sampled tiles.

    Returns:
        curves, and for each method the pseudo-keys of its tail as a share of visible keys.
    """
    errors: dict[str, list[Tensor]] = {name: [] for name in methods}
    read: dict[str, Tensor] = {name: torch.zeros(()) for name in methods}
    pseudo = dict.fromkeys(methods, 0.0)
    visible = 0
    for name, q, k, v in heads:
        began = time.perf_counter()
        of_layer: dict[str, dict[int, list[Tensor]]] = {method: {} for method in methods}
        for head, _, tile in tiles_of(q, k, v, sample_starts(k.shape[1], tiles, seed)):
            group, rows = tile.q.shape[:2]
            visible += group * tile.visible_pairs
            for method in methods:
                chosen = METHODS[method].select(tile, METHODS[method].knobs)
                make_tail = METHODS[method].tail
                tail = None if make_tail is None else make_tail(tile)
                of_layer[method].setdefault(head, []).append(evaluate(tile, chosen, tail))
                read[method] = read[method] + (chosen.tokens * rows + tile.dense_pairs).sum(dim=0).double()
                pseudo[method] += 0 if tail is None else group * rows * tail.k.shape[0]
        for method in methods:
            errors[method] += [torch.stack(parts).mean(dim=0) for parts in of_layer[method].values()]
        print(f"# {name}: {time.perf_counter() - began:.0f} s", flush=True)
    curves = {m: Curve((read[m] / visible).float(), torch.cat(errors[m]).clamp(min=FLOOR)) for m in methods}
    return curves, {m: pseudo[m] / visible for m in methods}


def print_table(
    curves: dict[str, Curve], pseudo: dict[str, float], reference: str, densities: Sequence[float], middle: float
) -> None:
    """A markdown table of errors and of ratios to the reference; a dash is a density outside the measured range."""
    at = " / ".join(f"{x:g}" for x in densities)
    base = curves[reference]

    def ratios(curve: Curve, mean: str) -> str:
        return _joined([base.error_at(x, mean) / curve.error_at(x, mean) for x in densities], ".2f")

    print(f"\nRatios are the error of {reference} over the row's at equal density of computed pairs ({at}).\n")
    print(
        f"| method | error, geometric mean | ratio, geometric | arithmetic | median | worst head at {middle:g} "
        f"| density ratio at {reference}'s error at {densities[-1]:g} | pseudo-keys / keys | scoring, share of dense |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, curve in curves.items():
        method = METHODS[name]
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
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        raise SystemExit(f"--methods must name some of: {'; '.join(METHODS)}. Unknown: {'; '.join(unknown)}")
    methods = list(args.methods) or list(METHODS)
    if args.reference not in methods:
        methods.insert(0, args.reference)
    sources: dict[str, Heads] = {}
    if args.heads:
        sources["stored heads"] = stored_heads(args.heads)
    else:
        if args.checkpoint is None:
            sources["synthetic heads"] = synthetic_heads(args.length, args.seed)
        sources["the example language model"] = model_heads(args.checkpoint or tiny_lm.CHECKPOINT, args.length)
    with torch.no_grad():
        for title, heads in sources.items():
            print(f"\n## {title}\n")
            curves, pseudo = measure(heads, methods, args.tiles, args.seed)
            print_table(curves, pseudo, args.reference, args.densities, args.densities[len(args.densities) // 2])
            if args.levels:
                print_levels(curves)


def print_levels(curves: dict[str, Curve]) -> None:
    """What each threshold of each method gives: its calibration."""
    for name, curve in curves.items():
        print(
            f"\n{name}\n\n| threshold | density | error, arithmetic | geometric | worst head |\n|---|---|---|---|---|"
        )
        levels = [curve.level(mean).exp().tolist() for mean in ("arithmetic", "geometric", "worst")]
        for knob, density, *row in zip(METHODS[name].knobs, curve.density.tolist(), *levels, strict=True):
            print(f"| {knob:g} | {density:.3f} | " + " | ".join(f"{x:.1e}" for x in row) + " |")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("quality", help="error against density of sparse selections")
    add.set_defaults(run=quality)
    add.add_argument("--heads", type=Path, nargs="+", help="files with q (1, Hq, S, D) and k, v (1, Hkv, S, D)")
    add.add_argument(
        "--checkpoint", type=Path, help="a checkpoint of examples/train_tiny_lm.py; alone, without --heads"
    )
    add.add_argument("--length", type=int, default=16384, help="tokens of synthetic heads and of the model's text")
    add.add_argument("--tiles", type=int, default=4, help="sampled tiles of 128 rows for each head")
    add.add_argument("--methods", nargs="+", default=[], help="rows of the table; default all")
    add.add_argument("--reference", default="PBS-Attn", choices=list(METHODS), help="what ratios are against")
    add.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    add.add_argument("--levels", action="store_true", help="also print density and error of every threshold")
    add.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
