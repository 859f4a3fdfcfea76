"""What the kernels of routed experts share: tiles of rows, of weights in any layout, and the activation.

Weights are read where they lie, as (E, out, in) views: in tiles that the bulk copy engine of Hopper fetches
where `in` or `out` has unit stride and rows start at multiples of 16 bytes, else by ordinary loads. Those of experts
that are separate tensors are of the latter kind: one tile descriptor holds one address.
Sizes of weights are constants of a compiled kernel, numbers of tokens are not.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from s2o_inductor.kernels.launching import Config, Tiles, ceil_div
from s2o_inductor.kernels.triton_moe_addresses import Addresses, Matrices, address_of
from s2o_inductor.kernels.triton_moe_plan import Plan
from s2o_inductor.moe_spec import ExpertSpec

# How a kernel reads weights (E, out, in): tiles (out, in), tiles (in, out), pointers, or pointers that a table holds.
OUT_IN = tl.constexpr(0)
IN_OUT = tl.constexpr(1)
POINTERS = tl.constexpr(2)
ADDRESSES = tl.constexpr(3)
# How the first product holds gate and up: no gate, halves of one tensor's columns, alternating columns, two tensors.
PLAIN = tl.constexpr(0)
HALVES = tl.constexpr(1)
ALTERNATING = tl.constexpr(2)
SEPARATE = tl.constexpr(3)
SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)
GELU_CUBIC = tl.constexpr(0.044715)


@dataclasses.dataclass(frozen=True)
class Tile(Config):
    """One way to run a product of rows with their experts' weights.

    `rows` and `keys` are rows and columns of the tile of the product that a program holds.

    Attributes:
        depth: how much of the sum one step takes.
        group: tiles of rows whose products with the same weights run side by side, so that these are read once.
        programs: how many share all tiles, each fetching its next one while it writes the last; 0 for one a tile.
    """

    depth: int = 64
    group: int = 8
    programs: int = 0


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights (E, out, in) as a kernel reads them."""

    source: Tensor | TensorDescriptor | None
    steps: tuple[int, ...]
    layout: int

    @classmethod
    def of(cls, w: Matrices, columns: int, depth: int, halves: bool = False) -> Weights:
        """w in tiles of `columns` of out and `depth` of in, zero beyond its edges.

        With `halves` out is two times n, and a tile has as many columns of each, zero beyond the edges of both.
        """
        steps = w.stride()
        if isinstance(w, Addresses):
            return cls(w.table, steps, ADDRESSES.value)
        tiling = _tiling(w.shape, steps, w.element_size(), halves, columns, depth)
        if tiling is None or w.data_ptr() % 16:
            return cls(w, steps, POINTERS.value)
        layout, sizes = tiling
        return cls(Tiles(w, *sizes), steps, layout)


# In place of weights that a kernel never reads: what it is given takes time to pass on.
NO_WEIGHTS = Weights(None, (0, 0, 0), POINTERS.value)


@functools.lru_cache(maxsize=256)
def _tiling(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, halves: bool, columns: int, depth: int
) -> tuple[int, tuple[list[int], list[int], list[int]]] | None:
    """The layout of aligned weights (E, out, in), and shape, strides and block of a descriptor; None if none fits."""
    (experts, out, inner), (by_expert, by_out, by_in) = shape, strides
    for layout in (OUT_IN, IN_OUT):
        rows, row_step = ([2, out // 2], [out // 2 * by_out, by_out]) if halves else ([out], [by_out])
        blocks = [2, columns] if halves else [columns]
        if layout is OUT_IN:
            sizes, steps, block = [experts, *rows, inner], [by_expert, *row_step, by_in], [1, *blocks, depth]
        else:
            sizes, steps, block = [experts, inner, *rows], [by_expert, by_in, *row_step], [1, depth, *blocks]
        if (read := _read_steps(sizes, steps, itemsize)) is not None:
            return layout.value, (sizes, read, block)
    return None


def _read_steps(sizes: Sequence[int], steps: Sequence[int], itemsize: int) -> list[int] | None:
    """Strides by which the copy engine reads aligned numbers in these, None if it cannot.

    Strides of dimensions of size one mean nothing and may be anything.
    """
    unit = 16 // itemsize
    read = [unit if size == 1 else step for size, step in zip(sizes[:-1], steps[:-1], strict=True)]
    if (steps[-1] == 1 or sizes[-1] == 1) and all(step > 0 and step % unit == 0 for step in read):
        return [*read, 1]
    return None


def in_tiles(x: Tensor) -> bool:
    """Whether the copy engine reads tiles of x."""
    return x.data_ptr() % 16 == 0 and _read_steps(x.shape, x.stride(), x.element_size()) is not None


def rows_like(x: Tensor, rows: int, columns: int) -> Tensor:
    """An empty (rows, columns) in x's dtype whose rows start at multiples of 16 bytes."""
    unit = 16 // x.element_size()
    if columns % unit == 0:
        return x.new_empty((rows, columns))
    return x.new_empty((rows, ceil_div(columns, unit) * unit))[:, :columns]


def rows_in_tiles(x: Tensor, rows: int, depth: int) -> TensorDescriptor:
    """x (rows, n), made by `rows_like`, in tiles of `rows` by `depth`, zero beyond its edges."""
    return Tiles(x, list(x.shape), list(x.stride()), [rows, depth])


def expert_rows_in_tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x (rows, n), made by `rows_like`, as (first row of an expert, row from there on, column), zero before row 0.

    Both of the first two dimensions take a step from row to row, so a tile may begin in front of an expert's rows.
    """
    return Tiles(x, [x.shape[0], *x.shape], [x.stride(0), *x.stride()], [1, rows, columns])


def grid_of(plan: Plan, columns: int, parts: int = 1) -> Callable[[Config], int]:
    """Number of programs for all tiles of rows by `columns`, in `parts`."""

    def grid(config: Config) -> int:
        assert isinstance(config, Tile)
        return config.programs or plan.bound(config.rows) * ceil_div(columns, config.keys) * parts

    return grid


@functools.lru_cache(maxsize=256)
def formula(spec: ExpertSpec) -> Mapping[str, Any]:
    """The formula of an expert as arguments of a kernel."""
    gate = {"none": PLAIN, "interleaved": ALTERNATING, "separate": SEPARATE}.get(spec.gate, HALVES)
    return {
        "alpha": float(spec.alpha),
        "limit": 0.0 if spec.limit is None else float(spec.limit),
        "shift": float(spec.shift),
        "ACTIVATION": spec.activation,
        "GATE": gate.value,
        "LIMITED": spec.limit is not None,
    }


@triton.jit
def place_of(program, blocks, splits, count, GROUP: tl.constexpr):
    """(tile of rows, block of columns, split) of one of `count` tiles of rows times blocks times splits.

    GROUP tiles of rows go through the same columns side by side: they belong to one expert, or to a few.
    """
    here = program // (GROUP * blocks * splits) * GROUP
    within = program - here * blocks * splits
    present = tl.minimum(GROUP, count - here)
    rest = within // present
    return here + within % present, rest % blocks, rest // blocks


@triton.jit
def weights_of(source, steps, expert, LAYOUT: tl.constexpr, KIND: tl.constexpr):
    """What `load_weights` and `load_halves` read an expert's weights from, numbers of dtype KIND."""
    if LAYOUT == ADDRESSES:
        return address_of(source, expert, KIND)
    elif LAYOUT == POINTERS:
        return source + expert.to(tl.int64) * steps[0]
    else:
        return source


@triton.jit
def load_weights(source, steps, expert, column, depth, LAYOUT: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
                 BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Weights of one expert, (BK, BN): in [depth, depth + BK) by out [column, column + BN), zero beyond."""
    if LAYOUT == OUT_IN:
        return source.load([expert, column, depth]).reshape(BN, BK).T
    elif LAYOUT == IN_OUT:
        return source.load([expert, depth, column]).reshape(BK, BN)
    else:
        n = column + tl.arange(0, BN)
        k = depth + tl.arange(0, BK)
        place = source + n.to(tl.int64)[None, :] * steps[1] + k.to(tl.int64)[:, None] * steps[2]
        if LAYOUT == ADDRESSES:
            place = tl.multiple_of(place, (16, 16))  # bytes; see `Addresses`
        if OUT % BN == 0 and IN % BK == 0:
            return tl.load(place)
        else:
            return tl.load(place, mask=(n < OUT)[None, :] & (k < IN)[:, None], other=0.0)


@triton.jit
def load_halves(source, steps, expert, column, depth, LAYOUT: tl.constexpr, INNER: tl.constexpr, IN: tl.constexpr,
                BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Weights of one expert, (BK, 2 * BN): out [column, column + BN) of the first half of INNER, then of the second."""
    if LAYOUT == OUT_IN:
        return source.load([expert, 0, column, depth]).reshape(2 * BN, BK).T
    elif LAYOUT == IN_OUT:
        return source.load([expert, depth, 0, column]).reshape(BK, 2 * BN)
    else:
        c = tl.arange(0, 2 * BN)
        n = column + c % BN
        k = depth + tl.arange(0, BK)
        place = source + (c // BN * INNER + n).to(tl.int64)[None, :] * steps[1] + k.to(tl.int64)[:, None] * steps[2]
        if LAYOUT == ADDRESSES:
            place = tl.multiple_of(place, (16, 16))  # bytes; see `Addresses`
        if INNER % BN == 0 and IN % BK == 0:
            return tl.load(place)
        else:
            return tl.load(place, mask=(n < INNER)[None, :] & (k < IN)[:, None], other=0.0)


@triton.jit
def halves(x):
    """(left, right) of the columns of x (BM, 2 * BN)."""
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def load_rows(rows, depth, inside, MASKED: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr):
    """Columns [depth, depth + BK) of the rows that the pointers (BM,) `rows` begin; with MASKED, 0 unless `inside`."""
    k = depth + tl.arange(0, BK)
    place = rows[:, None] + k[None, :]
    if MASKED:
        return tl.load(place, mask=inside[:, None] & (k < WIDTH)[None, :], other=0.0)
    elif WIDTH % BK == 0:
        return tl.load(place)
    else:
        return tl.load(place, mask=(k < WIDTH)[None, :], other=0.0)


@triton.jit
def load_bias(bias_ptr, steps, expert, column, COLUMNS: tl.constexpr):
    """Biases of one expert at `column`, float32."""
    place = bias_ptr + expert.to(tl.int64) * steps[0] + column.to(tl.int64) * steps[1]
    return tl.load(place, mask=column < COLUMNS, other=0.0).to(tl.float32)


@triton.jit
def scaled(rows, weight):
    """Rows times weights (BM,) float32, rounded to the dtype of the rows."""
    return (rows.to(tl.float32) * weight[:, None]).to(rows.dtype)


# -------------------------------------------------------------------------------------- activation


@triton.jit
def _activate(x, alpha, ACTIVATION: tl.constexpr):
    """(act(x), act'(x)), float32; NaN stays NaN."""
    if ACTIVATION == "identity":
        return x, tl.full(x.shape, 1.0, tl.float32)
    elif ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        positive = tl.where(x <= 0.0, 0.0, x)
        return positive * positive, 2.0 * positive
    elif ACTIVATION == "silu":
        gate = 1.0 / (1.0 + tl.exp(-alpha * x))
        return x * gate, gate + alpha * x * gate * (1.0 - gate)
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
        return x * share, share + x * tl.exp(-0.5 * x * x) * INV_SQRT_2_PI
    else:
        # (1 + tanh(y)) / 2 is sigmoid(2 y), which does not cancel where y is far below 0.
        gate = 1.0 / (1.0 + tl.exp(x * (1.0 + x * x * GELU_CUBIC) * (-2.0 * SQRT_2_OVER_PI)))
        slope = (1.0 + x * x * (3.0 * GELU_CUBIC)) * (2.0 * SQRT_2_OVER_PI)
        return x * gate, gate + x * gate * (1.0 - gate) * slope


@triton.jit
def _clamp(x, limit):
    """min(x, limit) for which NaN stays NaN."""
    return tl.where(x > limit, limit, x)


@triton.jit
def plain_hidden(x, numbers, ACTIVATION: tl.constexpr, LIMITED: tl.constexpr):
    """act(x), without a gate; `numbers` are (alpha, limit, shift)."""
    if LIMITED:
        x = _clamp(x, numbers[1])
    if ACTIVATION != "identity":
        x = _activate(x, numbers[0], ACTIVATION)[0]
    return x


@triton.jit
def gated_hidden(gate, up, numbers, ACTIVATION: tl.constexpr, LIMITED: tl.constexpr):
    """act(gate) * (up + shift)."""
    if LIMITED:
        up = tl.where(up < -numbers[1], -numbers[1], _clamp(up, numbers[1]))
    return plain_hidden(gate, numbers, ACTIVATION, LIMITED) * (up + numbers[2])


@triton.jit
def plain_backward(x, numbers, ACTIVATION: tl.constexpr, LIMITED: tl.constexpr):
    """(hidden, its derivative by x)."""
    inner = x
    if LIMITED:
        inner = _clamp(x, numbers[1])
    value, slope = _activate(inner, numbers[0], ACTIVATION)
    if LIMITED:
        slope = tl.where(x > numbers[1], 0.0, slope)
    return value, slope


@triton.jit
def kept_backward(h, ACTIVATION: tl.constexpr):
    """(h, the derivative of act at what h = act(x) came from) of relu or its square; NaN stays NaN."""
    if ACTIVATION == "relu":
        return h, tl.where(h <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        return h, 2.0 * tl.sqrt(h)


@triton.jit
def gated_backward(gate, up, numbers, ACTIVATION: tl.constexpr, LIMITED: tl.constexpr):
    """(hidden, its derivative by gate, that by up)."""
    value, slope = plain_backward(gate, numbers, ACTIVATION, LIMITED)
    outer = up
    of_up = value
    if LIMITED:
        outer = tl.where(up < -numbers[1], -numbers[1], _clamp(up, numbers[1]))
        of_up = tl.where(tl.abs(up) > numbers[1], 0.0, value)
    outer = outer + numbers[2]
    return value * outer, slope * outer, of_up
