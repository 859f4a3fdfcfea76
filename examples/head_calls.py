"""Time and error of one attention call over many heads on a GPU, beside dense kernels and other people's code.

    python examples/bench.py heads --model DIR                              # all heads of a model as one call
    python examples/bench.py heads --model DIR --copies 4 --tiles 64        # texts of 32,768 tokens behind each other
    python examples/bench.py heads --kinds vertical slash --length 131072   # synthetic heads
    python examples/bench.py heads --model DIR --peers peers.py             # PEERS of that file as well

bfloat16, batch 1, causal. The error of a head is the squared error over its rows relative to their squared norm,
against attention in float32 on the same operands; means are over heads.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import model_quality
import torch
from bench_dense import measure
from block_selections import SELECTIONS
from block_selections import select as choose
from synthetic_heads import KINDS, synthetic_head
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from s2o_inductor.kernels import cuda_sparse

ROWS = 128
FLOOR = 1e-6  # relative squared error of rounding an output to bfloat16; nobody gains from less
NEVER = 1e-30  # a budget that is never kept, though it is not 0, which reads everything
_SCORES = 1 << 28  # most scores that are held at once
BUDGETS = (0.99, 0.98, 0.97, 0.95, 0.92, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
DENSITIES = (0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
BOTH = tuple((budget, density) for budget in (0.5, 0.7) for density in (0.1, 0.2, 0.3))
SHARES, ALPHAS = (0.8, 0.9, 0.95), (0.05, 0.1, 0.2)  # of selections by cumulative shares, and of FlashPrefill

Peer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, float]]  # output (1, Hq, S, Dv) and density, NaN if unknown


# ---------------------------------------------------------------- heads


@torch.no_grad()
def model_heads(folder: Path | None, length: int, first: int, copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of all layers of a model as heads of one call, in memory as projections leave them.

    Args:
        folder: as `model_quality.load_language` takes it.
        length: tokens of a text.
        first: number of the first text.
        copies: texts whose operands are put behind each other. Positions start anew in each, so that no query is
            rotated further than the model was trained for.
    """
    language = model_quality.load_language(folder, (first + copies) * length)
    model = language.model.cuda()
    captured: list[list[Tensor]] = []

    def capture(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, int, int]:
        captured.append([x.bfloat16() for x in (q, k, v)])
        return model_quality.dense(*captured[-1])

    texts = []
    for number in range(first, first + copies):
        captured.clear()
        tokens = model_quality.plant(language, number, length, 0).tokens
        model_quality.answered(model, tokens.cuda(), capture)
        texts.append([torch.cat(layers, dim=1) for layers in zip(*captured, strict=True)])
    q, k, v = (_projected(torch.cat(parts, dim=2)) for parts in zip(*texts, strict=True))
    return q, k, v


def made_heads(kinds: Sequence[str], length: int, seeds: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (1, kinds x seeds, length, 128) of synthetic heads, each with keys and values of its own."""
    made = [synthetic_head(kind, length, seed=seed) for kind in kinds for seed in range(seeds)]
    q, k, v = (_projected(torch.stack(x)[None].cuda().bfloat16()) for x in zip(*made, strict=True))
    return q, k, v


def _projected(x: Tensor) -> Tensor:
    """The same numbers in memory of (B, S, H, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


# ---------------------------------------------------------------- errors


class Exact:
    """Attention of some tiles of rows in float32, to compare with.

    Args:
        q: (1, Hq, S, D), S a multiple of 128.
        k: (1, Hkv, S, D).
        v: (1, Hkv, S, Dv).
        tiles: evenly spaced tiles of 128 rows, the last included; all of them if there are no more.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, tiles: int) -> None:
        count, group = q.shape[2] // ROWS, q.shape[1] // k.shape[1]
        starts = torch.linspace(0, count - 1, min(tiles, count), device=q.device).round().long()
        self.at = (starts[:, None] * ROWS + torch.arange(ROWS, device=q.device)).flatten()
        size = max(ROWS, _SCORES // q.shape[2] // ROWS * ROWS)
        self.output = torch.empty(q.shape[1], self.at.numel(), v.shape[3], device=q.device)
        for head in range(q.shape[1]):
            for first in range(0, self.at.numel(), size):
                rows = self.at[first : first + size]
                end = int(rows[-1]) + 1
                keys, values = (x[0, head // group, :end].float() for x in (k, v))
                scores = q[0, head, rows].float() @ keys.T * q.shape[3] ** -0.5
                later = torch.arange(end, device=q.device) > rows[:, None]
                self.output[head, first : first + size] = scores.masked_fill_(later, -torch.inf).softmax(1) @ values
        self.norm = self.output.square().sum(dim=(1, 2))

    def error(self, output: Tensor) -> Tensor:
        """(Hq,), relative squared error of an output (1, Hq, S, Dv), at least `FLOOR`; on the host."""
        error = torch.stack([
            (found[self.at].float() - exact).square().sum()
            for found, exact in zip(output[0], self.output, strict=True)
        ])  # fmt: skip
        return (error / self.norm).clamp(min=FLOOR).cpu()


@dataclasses.dataclass
class Row:
    """What one way to compute the call takes and gives; `select` is the time of the selection alone, where it is apart.

    `density` counts computed over visible pairs. `heads` are densities of single heads, where they are known.
    """

    name: str
    knob: str
    ms: float
    density: float
    error: list[float]
    select: float = 0.0
    heads: list[float] = dataclasses.field(default_factory=list)

    @property
    def arithmetic(self) -> float:
        return sum(self.error) / len(self.error)

    @property
    def geometric(self) -> float:
        return float(torch.tensor(self.error).log().mean().exp())

    def within(self, arithmetic: float, geometric: float) -> bool:
        return self.arithmetic <= arithmetic and self.geometric <= geometric


# ---------------------------------------------------------------- rows


def ours(
    q: Tensor, k: Tensor, v: Tensor, exact: Exact, knob: str, budgets: tuple[float, ...], density: float = 1.0,
    timed: bool = True,
) -> Row:  # fmt: skip
    """Our kernels."""

    def run() -> cuda_sparse.Sparse:
        return cuda_sparse.forward(q, k, v, budgets=budgets, max_density=density)

    read = run()
    heads = (read.pairs / read.visible)[0].cpu()
    error = exact.error(read.output).tolist()
    del read
    return Row("S2O", knob, measure(run) if timed else 0.0, float(heads.mean()), error, heads=heads.tolist())


def ours_swept(q: Tensor, k: Tensor, v: Tensor, exact: Exact) -> Iterator[Callable[[], Row]]:
    """Every setting of budget and largest density, each when it is called for."""
    settings = [(budget, 1.0) for budget in BUDGETS] + [(NEVER, density) for density in DENSITIES] + list(BOTH)
    for budget, density in settings:
        parts = [f"budget {budget:g}"] * (budget != NEVER) + [f"max_density {density:g}"] * (density < 1)
        yield functools.partial(ours, q, k, v, exact, ", ".join(parts), (budget,), density)


def dense(q: Tensor, k: Tensor, v: Tensor, exact: Exact, backend: SDPBackend, name: str) -> Row:
    """A kernel of torch."""
    with sdpa_kernel(backend):
        output = model_quality.dense(q, k, v)[0]
        return Row(name, "", measure(lambda: model_quality.dense(q, k, v)), 1.0, exact.error(output).tolist())


def selected(q: Tensor, k: Tensor, v: Tensor, exact: Exact, name: str, knob: float) -> Row:
    """A published selection through our attention kernel, few heads at a time: page tables of single keys are long."""
    group, heads, length = q.shape[1] // k.shape[1], q.shape[1], q.shape[2]
    at_once = max(1, min(heads, (1 << 19) // length))
    output, pairs, ms, select = torch.empty_like(q), 0, 0.0, 0.0
    for first in range(0, heads, at_once):
        part = slice(first, first + at_once)
        of_head = torch.arange(heads, device=q.device)[part] // group
        rows, keys, values = q[:, part], k[:, of_head], v[:, of_head]
        table = choose(name, rows[0], keys[0], knob)
        pages = (table.places[None], table.listed[None])
        attend = functools.partial(cuda_sparse.attend, rows, keys, values, *pages, geometry=table.geometry)
        read = attend()
        output[:, part], pairs = read.output, pairs + int(read.pairs.sum())
        ms += measure(attend, 5.0)
        select += measure(functools.partial(choose, name, rows[0], keys[0], knob), 5.0)
    return Row(
        name, f"{knob:g}", ms, pairs / (heads * length * (length + 1) // 2), exact.error(output).tolist(), select
    )


def foreign(q: Tensor, k: Tensor, v: Tensor, exact: Exact, name: str, peer: Peer) -> Row:
    output, density = peer(q, k, v)
    error = exact.error(output).tolist()
    del output
    return Row(name, "", measure(lambda: peer(q, k, v)[0]), density, error)


def selection_of(text: str) -> tuple[str, tuple[float, ...]]:
    """A selection and its thresholds by NAME or NAME=threshold,..."""
    name, _, knobs = text.partition("=")
    if name not in SELECTIONS:
        raise SystemExit(f"--selections must name some of: {'; '.join(SELECTIONS)}. Unknown: {name}")
    if knobs:
        return name, tuple(float(knob) for knob in knobs.split(","))
    return name, ALPHAS if name == "FlashPrefill" else SHARES


def load_peers(file: Path) -> dict[str, Peer]:
    """`PEERS` of a Python file: by name, functions of q, k and v that give an output and a density."""
    spec = importlib.util.spec_from_file_location("s2o_peers", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--peers must be a Python file; got {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    peers: dict[str, Peer] = module.PEERS
    return peers


# ---------------------------------------------------------------- budgets for each head


def cheapest(density: Tensor, error: Tensor, arithmetic: float, geometric: float) -> Tensor | None:
    """The choice of each head that costs least in all while both means of the errors hold.

    As `s2o_inductor.calibrate`: every head takes the least of density + price x error, here with a second price on the
    logarithm of the error; prices are searched on a grid.

    Args:
        density: (C, H), of C candidates.
        error: (C, H), above 0.
        arithmetic: largest mean error.
        geometric: largest geometric mean.

    Returns:
        int64 (H,), or None where no choice holds.
    """
    prices = torch.cat([torch.zeros(1), torch.logspace(-3, 4, 64)])
    best, least = None, float("inf")
    for on_log in torch.cat([torch.zeros(1), torch.logspace(-4, 1, 64)]):
        cost = density + prices[:, None, None] * error + on_log * error.log()
        choice = cost.argmin(dim=1)  # (prices, H)
        errors = error.gather(0, choice)
        holds = (errors.mean(dim=1) <= arithmetic) & (errors.log().mean(dim=1).exp() <= geometric)
        total = density.gather(0, choice).mean(dim=1).masked_fill(~holds, float("inf"))
        if total.min() < least:
            least, best = float(total.min()), choice[total.argmin()]
    return best


def calibrated(
    q: Tensor, k: Tensor, v: Tensor, exact: Exact, other: Sequence[Row], arithmetic: float, geometric: float, knob: str
) -> Row | None:
    """Budgets for each head by what `other`, rows of single budgets on another text, lost there."""
    density, error = (torch.tensor([getattr(row, name) for row in other]) for name in ("heads", "error"))
    choice = cheapest(density, error, arithmetic, geometric)
    if choice is None:
        return None
    return ours(q, k, v, exact, knob, tuple(BUDGETS[i] for i in choice.tolist()))


# ---------------------------------------------------------------- the command


def show(row: Row) -> None:
    print(
        f"| {row.name} | {row.knob} | {row.ms:.2f} | {f'{row.select:.1f}' if row.select else ''} | {row.density:.3f} "
        f"| {row.arithmetic:.1e} | {row.geometric:.1e} | {max(row.error):.2g} |",
        flush=True,
    )


def compare(rows: Sequence[Row]) -> None:
    """For every row that approximates otherwise: our fastest one with no more error, by either mean and by both."""
    mine = [row for row in rows if row.name == "S2O" and row.ms]
    cudnn = next((row.ms for row in rows if row.name == "cuDNN"), float("nan"))
    print("\n| against | its ms | ours, no more error by both means | ms | density | its ms / ours | cuDNN / ours |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        fits = [x for x in mine if x.within(row.arithmetic, row.geometric)]
        if row.name in ("S2O", "cuDNN", "flash") or not fits:
            continue
        best, ms = min(fits, key=lambda x: x.ms), row.ms + row.select
        print(
            f"| {row.name} {row.knob} | {ms:.2f} | {best.knob} | {best.ms:.2f} | {best.density:.3f} "
            f"| {ms / best.ms:.2f}x | {cudnn / best.ms:.2f}x |",
            flush=True,
        )


def attempt(rows: list[Row], row: Callable[[], Row | None], what: str) -> None:
    """Adds a row and prints it; one that fails is told and leaves the others alone."""
    try:
        made = row()
    except Exception as error:
        print(f"# {what}: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}", flush=True)
        torch.cuda.empty_cache()
        return
    if made is None:
        print(f"# {what}: nothing holds", flush=True)
        return
    rows.append(made)
    show(made)


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """`bench.py heads`."""
    if not torch.cuda.is_available():
        raise SystemExit("bench.py heads needs a CUDA device; there is none")
    peers = load_peers(args.peers) if args.peers else {}
    if args.kinds:
        q, k, v = made_heads(list(KINDS) if args.kinds == ["all"] else args.kinds, args.length, args.seeds)
    else:
        q, k, v = model_heads(args.model, args.length, 0, args.copies)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; q {tuple(q.shape)}, k {tuple(k.shape)}, errors of "
        f"{min(args.tiles, q.shape[2] // ROWS)} tiles\n"
    )
    exact = Exact(q, k, v, args.tiles)
    rows: list[Row] = []
    print("| | knob | ms | selection, ms | density | error, arithmetic | geometric | worst head |")
    print("|---|---|---|---|---|---|---|---|")
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        attempt(rows, functools.partial(dense, q, k, v, exact, backend, name), name)
    for name, peer in peers.items():
        attempt(rows, functools.partial(foreign, q, k, v, exact, name, peer), name)
    for row in ours_swept(q, k, v, exact):
        attempt(rows, row, "S2O")
    for text in args.selections:
        name, knobs = selection_of(text)
        for knob in knobs:
            attempt(rows, functools.partial(selected, q, k, v, exact, name, knob), name)
    if args.calibrate and not args.kinds:
        per_head(q, k, v, exact, rows, [row for row in rows if row.name.startswith("FlashPrefill")], args)
    compare(rows)
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows]))


def per_head(
    q: Tensor, k: Tensor, v: Tensor, exact: Exact, rows: list[Row], targets: Sequence[Row], args: argparse.Namespace
) -> None:
    """Rows of budgets for each head that aim at the errors of `targets`, chosen on the text behind those measured."""
    if not targets:
        return
    operands = model_heads(args.model, args.length, args.copies, 1)
    truth = Exact(*operands, args.tiles)
    other = [ours(*operands, truth, "", (budget,), timed=False) for budget in BUDGETS]
    for target in targets:
        for margin in (1.0, 0.7):  # errors of another text scatter
            knob = f"budgets by head for {margin:g} of {target.name} {target.knob}".rstrip()
            wanted = (margin * target.arithmetic, margin * target.geometric)
            attempt(rows, functools.partial(calibrated, q, k, v, exact, other, *wanted, knob), knob)
