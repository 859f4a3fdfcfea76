"""Routed experts on CUDA: which tiles run a call, and its passes.

Rows of an expert are few or many, whatever the number of tokens: tiles are as high as an expert has rows on
average. Where that is few, weights are all that is read, and what counts is that every multiprocessor reads; where
it is many, that the tensor cores never wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from s2o_inductor.kernels import hopper_moe, triton_moe_backward, triton_moe_first, triton_moe_second
from s2o_inductor.kernels.moe_cpu import Experts, Gradients, PerExpert
from s2o_inductor.kernels.triton_moe_addresses import Matrices, addresses_of, matrices
from s2o_inductor.kernels.triton_moe_backward import Rows
from s2o_inductor.kernels.triton_moe_plan import Plan
from s2o_inductor.kernels.triton_moe_tiles import Tile, rows_like
from s2o_inductor.moe_spec import ExpertSpec

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Tiles per multiprocessor from which on none waits for the last ones for long, programs that keep memory busy, and
# steps of a sum below which a part of it is not worth a program.
_TILES = 4
_PROGRAMS = 2
_LEAST_STEPS = 4
_MOST_PARTS = 8


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the choice of tiles depends on.

    Attributes:
        dtype: of tokens and weights.
        pairs: T * K.
        experts: E.
        processors: of the device.
        room: bytes of shared memory that a program may have.
        capability: of the device, major and minor.
    """

    dtype: torch.dtype
    pairs: int
    experts: int
    processors: int
    room: int
    capability: tuple[int, int] = (0, 0)

    @functools.cached_property
    def height(self) -> int:
        """Rows of a tile: a little above an expert's on average, so that most experts need one or all are full."""
        mean = self.pairs / self.experts
        return 16 if mean <= 8 else 32 if mean <= 36 else 64 if mean <= 64 else 128

    @property
    def hopper(self) -> Tile | None:
        """How `hopper_moe` makes products of many rows, if it does."""
        if self.room < _SHARED_ROOM:
            return None
        return hopper_moe.product_tile(self.capability, self.dtype, self.processors, self.pairs // self.experts)

    @functools.lru_cache(maxsize=256)  # noqa: B019 - facts are few and small
    def parts(self, out: int, depth: int) -> int:
        """Into how many parts the sum of a product with `out` columns is cut so that all multiprocessors work."""
        if self.height > 32 or self.dtype == torch.float32:
            return 1
        tile = second_tiles(self, out)[0]
        wanted = triton.cdiv(_TILES * self.processors, self.tiles(out, tile.keys))
        return max(1, min(wanted, depth // (tile.depth * _LEAST_STEPS), _MOST_PARTS))

    def tiles(self, out: int, columns: int) -> int:
        """Tiles of a product with `out` columns that are surely needed, if the routing is even."""
        busy = max(min(self.experts, self.pairs), self.pairs // self.height)
        return busy * triton.cdiv(out, columns)

    def columns(self, out: int, most: int) -> int:
        """Columns of a low tile: as wide, up to `most`, as leaves work for all multiprocessors."""
        while most > 32 and self.tiles(out, most) < _TILES * self.processors:
            most //= 2
        return most


# All choices are for half precision on an H100, where Nemotron 3 Super with 8,192, 512 and 32 tokens was measured in
# every way that examples/sweep_moe.py knows; elsewhere the first that fits runs. float32 is exact, not fast.
# Choices are remembered, for the host's sake: in a decoding step the device waits for it.
_FLOAT32 = [Tile(32, 32, 4, 2, depth=32), Tile(16, 32, 4, 1, depth=16)]
_LAST = Tile(16, 32, 4, 1, depth=32)
# Shared memory that a program needs to keep a 128 x 256 tile's pipeline filled across tiles: what Hopper has.
_SHARED_ROOM = 227 << 10


@functools.lru_cache(maxsize=256)
def first_tiles(facts: Facts, inner: int, gated: bool) -> list[Tile]:
    """Ways to make the first product and its activation, fastest first; `inner` hidden columns, or two for each."""
    wide = 2 if gated else 1
    if facts.dtype == torch.float32:
        return _FLOAT32
    if facts.height <= 32:
        columns = facts.columns(inner, 128 // wide)
        return [Tile(facts.height, columns, 4, stages, 128, 4) for stages in (5, 3)] + [_LAST]
    if facts.height == 64:
        return [Tile(64, 128 // wide, 4, stages) for stages in (4, 2)] + [_LAST]
    # Products of 128 x 256 are bound by what the L2 cache delivers to a multiprocessor; narrower ones read more.
    tiles = [Tile(128, 128 // wide, 4, stages) for stages in (3, 2)] + [_LAST]
    if facts.room >= _SHARED_ROOM:
        return [Tile(128, 256 // wide, 8, stages, programs=facts.processors) for stages in (4, 3)] + tiles
    return tiles


@functools.lru_cache(maxsize=256)
def second_tiles(facts: Facts, out: int) -> list[Tile]:
    """Ways to make the second product, or the gradient of the rows that entered the first, fastest first."""
    if facts.dtype == torch.float32:
        return _FLOAT32
    if facts.height == 32:
        return [Tile(32, facts.columns(out, 128), 4, stages, 128, 4) for stages in (5, 3)] + [_LAST]
    if facts.height < 32:
        columns = facts.columns(out, 64)
        programs = _PROGRAMS * facts.processors
        programs = programs if facts.tiles(out, columns) > 2 * programs else 0
        return [Tile(facts.height, columns, 4, stages, 128, 4, programs) for stages in (3, 2)] + [_LAST]
    if facts.height == 64:
        return [Tile(64, 128, 4, 4), Tile(64, 128, 4, 2), _LAST]
    tiles = [Tile(128, 128, 4, stages) for stages in (3, 2)] + [_LAST]
    return [Tile(128, 256, 8, 4), *tiles] if facts.room >= _SHARED_ROOM else tiles


@functools.lru_cache(maxsize=256)
def hidden_tiles(facts: Facts) -> list[Tile]:
    """Ways to make the gradient of the first product, fastest first; all of as many columns."""
    if facts.dtype == torch.float32:
        return _FLOAT32
    rows = max(facts.height, 64)
    # Its epilogue moves as much memory as its sum: two programs share a multiprocessor, so that one sums meanwhile.
    shared = [Tile(rows, 128, 8, 3, registers=128)] if rows == 128 else [Tile(rows, 128, 8, 4)]
    return [*shared, Tile(rows, 128, 8, 3), Tile(rows, 128, 4, 2), Tile(32, 128, 4, 1, depth=32)]


@functools.lru_cache(maxsize=256)
def outer_tiles(facts: Facts, m: int, n: int) -> list[Tile]:
    """Ways to make the gradient of weights (E, m, n), fastest first."""
    if facts.dtype == torch.float32:
        return [Tile(32, 32, 4, 2, depth=32), Tile(16, 16, 4, 1, depth=16)]
    depth = 64 if facts.pairs > 64 * facts.experts else 32
    tiles = [Tile(128, 128, 4, stages, depth) for stages in (3, 2)] + [Tile(64, 64, 4, 2, depth=32)]
    if facts.height < 128 or facts.room < _SHARED_ROOM:
        return tiles
    # As for the products, blocks are as large as registers hold, for the L2 cache's sake; no column may be for nothing.
    rows, columns = min(((128, 256), (256, 128)), key=lambda tile: -(-m // tile[0]) * -(-n // tile[1]))
    return [Tile(rows, columns, 8, stages) for stages in (4, 3)] + tiles


@dataclasses.dataclass(frozen=True)
class Operands:
    """`moe_cpu.Experts` as the kernels read them: weights of all experts as one tensor, or as a table of addresses."""

    spec: ExpertSpec
    w1: tuple[Matrices, ...]
    w2: Matrices
    b1: Tensor | None
    b2: Tensor | None
    columns: int

    @classmethod
    def of(cls, experts: Experts) -> Operands:
        """Biases of separate experts are stacked: to copy a row takes no time beside the matrix that goes with it."""
        *first, second = matrices((*experts.w1, experts.w2))
        b1, b2 = [
            x if x is None or isinstance(x, Tensor) else torch.stack(list(x)) for x in (experts.b1, experts.b2)
        ]  # fmt: skip
        return cls(experts.spec, tuple(first), second, b1, b2, experts.columns)


def forward(experts: Experts, z: Tensor, ids: Tensor, p: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """`moe_cpu.forward`; what is kept of choices without an expert is undefined, and never read.

    What is kept is the first product or, where that says as much, its activation.

    Args:
        experts: weights (E, ..., l), float16, bfloat16 or float32, any strides; or a list of one tensor per expert,
            read where they lie if they all have one stride, and rows start at multiples of 16 bytes.
        z: (T, l).
        ids: (T, K).
        p: (T, K).
        keep: store what the backward pass would otherwise compute again, (T * K, columns).
    """
    kept, out = z.new_empty((ids.numel() if keep else 0, experts.columns)), z.new_empty(z.shape)
    if ids.numel() == 0 or out.numel() == 0:
        return out.zero_(), kept
    with torch.cuda.device_of(z):
        operands = Operands.of(experts)
        facts = facts_of(operands, z, ids)
        spec, pairs, width = operands.spec, ids.numel(), z.shape[1]
        inner = operands.w2.shape[2]
        plan = Plan.of(ids, facts.experts, facts.height)
        z, weights = _unit_rows(z), p.contiguous()
        hidden = keep and _keeps_hidden(operands, z.dtype)
        h = kept if hidden else rows_like(z, pairs, inner)
        _first(operands, z, plan, weights, kept if keep and not hidden else None, h, facts)
        parts = facts.parts(width, inner)
        kind = torch.float32 if parts > 1 else z.dtype
        y = z.new_empty((parts, pairs, width), dtype=kind)
        _second([h], [operands.w2], operands.b2, plan, y, facts)
        triton_moe_second.combine(y, weights if spec.score == "output" else None, plan, out)
    return out, kept


def backward(experts: Experts, grad: Tensor, z: Tensor, ids: Tensor, p: Tensor, kept: Tensor, into: Gradients) -> None:
    """`moe_cpu.backward`; `into` holds contiguous tensors, or views of such with the last two dimensions swapped.

    Where each expert has tensors of its own, so may its gradients.
    """
    if ids.numel() == 0 or z.numel() == 0:
        for gradient in (into.z, *into.w1, into.w2, into.b1, into.b2, into.p):
            for x in (gradient,) if isinstance(gradient, Tensor) else gradient or ():
                x.zero_()
        return
    with torch.cuda.device_of(z):
        _backward(Operands.of(experts), _unit_rows(grad), _unit_rows(z), ids, p, kept, into)


def _backward(
    experts: Operands, grad: Tensor, z: Tensor, ids: Tensor, p: Tensor, kept: Tensor, into: Gradients
) -> None:
    facts, spec, pairs = facts_of(experts, z, ids), experts.spec, ids.numel()
    inner, width = experts.w2.shape[2], z.shape[1]
    plan = Plan.of(ids, facts.experts, facts.height)
    weights = p.reshape(-1).contiguous()
    hidden = _keeps_hidden(experts, z.dtype)
    if kept.shape[0] == 0:
        kept = torch.empty((pairs, experts.columns), dtype=z.dtype, device=z.device)
        _first(experts, z, plan, weights, None if hidden else kept, kept if hidden else None, facts)
    # Each tensor of weights takes its part of dpre; parts start where the copy engine can.
    up_at = inner if len(experts.w1) == 1 else rows_like(z, 1, inner).stride(0)
    dpre = rows_like(z, pairs, experts.columns if len(experts.w1) == 1 else up_at + inner)
    parts = [dpre] if len(experts.w1) == 1 else [dpre[:, :inner], dpre[:, up_at:]]
    h = rows_like(z, pairs, inner) if into.w2 is not None and not hidden else None
    scored = spec.score == "input"

    # One thing after another, so that of what is as large as dpre little is alive at once.
    du = _rows(grad, plan, None, facts)
    share = _hidden_backward(experts, du, plan, weights, kept, hidden, dpre, up_at, h, facts)
    if into.w2 is not None:
        if h is None and spec.score == "output":
            # The weight that h would have is on the other side.
            del du
            du = _rows(grad, plan, weights, facts)
        _outer(du, Rows(kept if h is None else h), plan, into.w2, facts)
    del du, h
    if into.z is not None or (scored and into.p is not None):
        y = torch.empty((1, pairs, width), dtype=z.dtype, device=z.device)
        turned = [w.mT for w in experts.w1]
        if scored:
            # Wider tiles would spill, and shares are counted in blocks of the same width.
            tiles = second_tiles(facts, width)
            columns = min(tiles[0].keys, 128)
            tiles = [tile for tile in tiles if tile.keys == columns]
            share = _share(pairs, width, tiles[0], z)
            scores = triton_moe_second.Scored(z, weights, share)
            triton_moe_second.second(parts, turned, None, plan, y, tiles, scores)
        else:
            _second(parts, turned, None, plan, y, facts)
        if into.z is not None:
            triton_moe_second.combine(y, None, plan, into.z)
        del y
    if into.p is not None:
        bias = experts.b2 if spec.score == "output" else None
        triton_moe_backward.weight_gradient(share, plan, grad, bias, into.p)

    if any(gradient is not None for gradient in into.w1):
        entered = _rows(z, plan, weights if scored else None, facts)
        for gradient, part in zip(into.w1, parts, strict=True):
            if gradient is not None:
                _outer(Rows(part), entered, plan, gradient, facts)
    if into.b1 is not None:
        with _rows_of(into.b1) as out:
            for index, part in enumerate(parts):
                triton_moe_backward.sums(Rows(part), plan, out[:, index * inner :][:, : part.shape[1]])
    if into.b2 is not None:
        rows = Rows(grad, by_token=True, weight=weights if spec.score == "output" else None)
        with _rows_of(into.b2) as out:
            triton_moe_backward.sums(rows, plan, out)


@contextlib.contextmanager
def _rows_of(vectors: PerExpert) -> Iterator[Tensor]:
    """The vectors of all experts as rows (E, n) to fill; what is filled in goes to each."""
    if isinstance(vectors, Tensor):
        yield vectors
        return
    rows = torch.empty((len(vectors), *vectors[0].shape), dtype=vectors[0].dtype, device=vectors[0].device)
    yield rows
    torch._foreach_copy_(list(vectors), list(rows.unbind()))


def _first(
    experts: Operands, z: Tensor, plan: Plan, p: Tensor, pre: Tensor | None, h: Tensor | None, facts: Facts
) -> None:
    """The first product and the hidden rows, where wanted."""
    if not hopper_moe.first(experts.spec, experts.w1, experts.b1, z, plan, p, pre, h, facts.hopper):
        tiles = first_tiles(facts, experts.w2.shape[2], experts.spec.gate != "none")
        triton_moe_first.first(experts.spec, experts.w1, experts.b1, z, plan, p, pre, h, tiles)


def _second(
    a: Sequence[Tensor], w: Sequence[Matrices], bias: Tensor | None, plan: Plan, y: Tensor, facts: Facts
) -> None:
    """The second product, or the gradient of the rows that entered the first."""
    if not hopper_moe.second(a, w, bias, plan, y, facts.hopper):
        triton_moe_second.second(a, w, bias, plan, y, second_tiles(facts, y.shape[2]))


def _keeps_hidden(experts: Operands, dtype: torch.dtype) -> bool:
    """Whether the activation is kept for the backward pass, of which it is all that is needed, and not its argument.

    So it is for relu and its square, whose root is as exact as a stored argument; but float16 has not the exponents
    of squares. `second` reads it as it lies.
    """
    spec = experts.spec
    if spec.gate != "none" or spec.limit is not None or spec.score == "hidden":
        return False
    exact = spec.activation == "relu" or (spec.activation == "relu2" and dtype == torch.bfloat16)
    return exact and experts.columns * dtype.itemsize % 16 == 0


def _hidden_backward(
    experts: Operands, du: Rows, plan: Plan, p: Tensor, kept: Tensor, from_hidden: bool, dpre: Tensor, up_at: int,
    h: Tensor | None, facts: Facts,
) -> Tensor:  # fmt: skip
    """Fills dpre, and where wanted h times its routing weight; returns the shares of the gradient of p."""
    spec, (pairs, inner) = experts.spec, (kept.shape[0], experts.w2.shape[2])
    if (tile := facts.hopper) is not None:
        share = _share(pairs, inner, tile, kept)
        if hopper_moe.hidden_backward(spec, du, experts.w2, plan, p, kept, from_hidden, dpre, h, share, tile):
            return share
    tiles = hidden_tiles(facts)
    share = _share(pairs, inner, tiles[0], kept)
    triton_moe_backward.hidden_backward(
        spec, du, experts.w2, plan, p, kept, from_hidden, dpre, up_at, h, share, tiles
    )  # fmt: skip
    return share


def _rows(x: Tensor, plan: Plan, weight: Tensor | None, facts: Facts) -> Rows:
    """Rows of x by token; gathered once where many programs read them, so that they come in large pieces."""
    if facts.height == 128:
        return Rows(triton_moe_first.gather(x, plan, weight))
    return Rows(x, by_token=True, weight=weight)


def _outer(left: Rows, right: Rows, plan: Plan, into: PerExpert, facts: Facts) -> None:
    """Fills `into` (E, m, n), whose last dimension or last but one is contiguous."""
    out = into if isinstance(into, Tensor) else addresses_of(into)
    if not out.is_contiguous():
        left, right, out = right, left, out.mT
    if hopper_moe.outer(left, right, plan, out, facts.hopper):
        return
    triton_moe_backward.outer(left, right, plan, out, outer_tiles(facts, *out.shape[1:]), facts.processors)


def _share(pairs: int, width: int, tile: Tile, like: Tensor) -> Tensor:
    """Room for sums over each block of columns of a row."""
    return torch.empty((pairs, triton.cdiv(width, tile.keys)), dtype=torch.float32, device=like.device)


def facts_of(experts: Operands, z: Tensor, ids: Tensor) -> Facts:
    """Raises NotImplementedError where no kernel takes the dtype."""
    if z.dtype not in DTYPES:
        raise NotImplementedError(
            f"experts on CUDA take float16, bfloat16 and float32; got {z.dtype}: cast them, or leave the layer "
            "as it is (option 'exclude' with its path, or s2o_inductor.restore(model) after prepare)"
        )
    return _facts(z.dtype, ids.numel(), experts.w2.shape[0], z.device)


@functools.lru_cache(maxsize=256)
def _facts(dtype: torch.dtype, pairs: int, experts: int, device: torch.device) -> Facts:
    return Facts(dtype, pairs, experts, *_device(device))


@functools.lru_cache(maxsize=16)
def _device(device: torch.device) -> tuple[int, int, tuple[int, int]]:
    """Multiprocessors, a program's shared memory, and the capability; of a small GPU where kernels are interpreted."""
    if device.type != "cuda":
        return 4, 48 << 10, (0, 0)
    properties = torch.cuda.get_device_properties(device)
    room = getattr(properties, "shared_memory_per_block_optin", 0)
    return properties.multi_processor_count, room, (properties.major, properties.minor)


def _unit_rows(x: Tensor) -> Tensor:
    """x (T, l), or a copy, with rows of unit stride."""
    return x if x.stride(1) == 1 else x.contiguous()
