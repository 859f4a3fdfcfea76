"""When products of rows with their experts' weights run in the Gluon kernel for Hopper, and in which tiles.

Gluon is experimental: where the installed Triton lacks it, or has one that no longer compiles the kernel, the Triton
kernels take every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from s2o_inductor.kernels.launching import Config, try_launch
from s2o_inductor.kernels.triton_moe_addresses import Addresses, Matrices
from s2o_inductor.kernels.triton_moe_backward import Rows
from s2o_inductor.kernels.triton_moe_first import gather
from s2o_inductor.kernels.triton_moe_plan import Plan
from s2o_inductor.kernels.triton_moe_tiles import (
    IN_OUT,
    OUT_IN,
    Tile,
    Weights,
    expert_rows_in_tiles,
    formula,
    in_tiles,
    rows_in_tiles,
)
from s2o_inductor.moe_spec import ExpertSpec

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia import hopper

    from s2o_inductor.kernels import gluon_moe as kernels
    from s2o_inductor.kernels import gluon_moe_outer as outer_kernels
    from s2o_inductor.kernels.gluon_moe_ring import ROWS
except (ImportError, AttributeError):
    kernels = None  # type: ignore[assignment]

_DTYPES = (torch.float16, torch.bfloat16)
# Rows that an expert has on average from which on the kernel was measured.
_LEAST_ROWS = 256


@functools.lru_cache(maxsize=256)
def product_tile(capability: tuple[int, int], dtype: torch.dtype, programs: int, mean: int) -> Tile | None:
    """How the kernel runs, in the fastest of the ways tried on an H100; None where it does not.

    Args:
        capability: of the device, major and minor.
        dtype: of rows and weights.
        programs: that share all tiles.
        mean: rows of an expert, on average.
    """
    if kernels is None or capability != (9, 0) or dtype not in _DTYPES or mean < _LEAST_ROWS:
        return None
    # Side by side run all tiles of rows of one expert where they are few. Each number of them is compiled for itself.
    return Tile(128, 256, 4, 4, group=3 if mean <= 512 else 8, programs=programs)


def outer_tile(programs: int) -> Tile:
    """How `outer` runs: of an expert's rows, steps are few, so that they are short where not all are the expert's."""
    return Tile(192, 256, 4, 7, depth=32, programs=programs)


def first(
    spec: ExpertSpec, w1: Sequence[Matrices], b1: Tensor | None, z: Tensor, plan: Plan, p: Tensor, pre: Tensor | None,
    h: Tensor | None, tile: Tile | None,
) -> bool:  # fmt: skip
    """`triton_moe_first.first` if the kernel takes the call, which it does without gate and bias; whether it did."""
    if tile is None or spec.gate != "none" or spec.score == "hidden" or b1 is not None:
        return False
    if (weights := _weights(w1[0], tile)) is None:
        return False
    named = {
        "pre_ptr": pre, "out_ptr": h, "out_steps": (0,) if h is None else h.stride()[:1], "OUT": w1[0].shape[1],
        "KEEP": pre is not None, "HIDDEN": h is not None, "BY_CHOICE": False,
    }  # fmt: skip
    return _launch(spec, lambda: gather(z, plan, p if spec.score == "input" else None), weights, plan, tile, named)


def second(
    a: Sequence[Tensor], w: Sequence[Matrices], bias: Tensor | None, plan: Plan, y: Tensor, tile: Tile | None
) -> bool:  # fmt: skip
    """`triton_moe_second.second` if the kernel takes the call, which it does without bias; whether it did."""
    if tile is None or len(w) > 1 or y.shape[0] > 1 or bias is not None:
        return False
    if (weights := _weights(w[0], tile)) is None:
        return False
    named = {
        "pre_ptr": None, "out_ptr": y, "out_steps": y.stride()[1:2], "OUT": y.shape[2], "KEEP": False,
        "HIDDEN": False, "BY_CHOICE": True,
    }  # fmt: skip
    return _launch(ExpertSpec("identity"), lambda: a[0], weights, plan, tile, named)


def hidden_backward(
    spec: ExpertSpec, grad: Rows, w2: Matrices, plan: Plan, p: Tensor, kept: Tensor, from_hidden: bool, dpre: Tensor,
    h: Tensor | None, share: Tensor, tile: Tile,
) -> bool:  # fmt: skip
    """`triton_moe_backward.hidden_backward` if the kernel takes the call, without a gate; whether it did.

    `share` has one column for each block of columns of `tile`.
    """
    if grad.by_token or spec.gate != "none" or spec.activation == "identity":
        return False
    if (weights := _weights(w2.mT, tile)) is None:
        return False
    named = {
        "pre_ptr": kept, "out_ptr": dpre, "out_steps": dpre.stride()[:1], "OUT": dpre.shape[1], "KEEP": False,
        "HIDDEN": h is not None, "BY_CHOICE": False, "BACK": True, "FROM_HIDDEN": from_hidden,
        "SCORED": spec.score != "input", "p_ptr": p, "share_ptr": share, "h_ptr": h,
        "h_steps": (0,) if h is None else h.stride()[:1],
    }  # fmt: skip
    return _launch(spec, lambda: grad.x, weights, plan, tile, named)


def outer(left: Rows, right: Rows, plan: Plan, out: Matrices, tile: Tile | None) -> bool:
    """`triton_moe_backward.outer` if the kernel takes the call, which it does of rows as they lie; whether it did."""
    if tile is None or isinstance(out, Addresses) or not in_tiles(out):
        return False
    if any(side.by_token or side.weight is not None or not in_tiles(side.x) for side in (left, right)):
        return False
    # Blocks are not square: whichever way needs fewer of them. For widths see `_weights`.
    tile = outer_tile(tile.programs)
    ways = [
        way for way in ((left, right, False), (right, left, True))
        if (width := way[1].x.shape[1]) >= tile.keys and width % (tile.keys // 4) == 0
    ]  # fmt: skip
    if not ways:
        return False
    left, right, turned = min(
        ways, key=lambda way: triton.cdiv(way[0].x.shape[1], tile.rows) * triton.cdiv(way[1].x.shape[1], tile.keys)
    )  # fmt: skip

    def arguments(_: Config) -> dict[str, Any]:
        return {
            "left": _shared(expert_rows_in_tiles(left.x, tile.depth, ROWS.value)),
            "right": _shared(expert_rows_in_tiles(right.x, tile.depth, tile.keys // 2)), "firsts_ptr": plan.firsts,
            "taken_ptr": _taken(plan), "out_ptr": out, "EXPERTS": out.shape[0], "LEFT": left.x.shape[1],
            "RIGHT": right.x.shape[1], "TURNED": turned, "STAGES": tile.stages, "BK": tile.depth,
        }  # fmt: skip

    kind = (plan.order.device, out.dtype, turned)
    return try_launch(outer_kernels.outer_kernel, [tile], lambda _: tile.programs, arguments, kind)


def _taken(plan: Plan) -> Tensor:
    """How many tiles were taken, beside those that programs begin with: none."""
    return torch.zeros(1, dtype=torch.int32, device=plan.order.device)


def _weights(w: Matrices, tile: Tile) -> Weights | None:
    """w in tiles of the copy engine; None if that cannot read it, or w is of a size that the kernel does not take."""
    # A tile wider than the product is wasted on it, and Triton 3.6 cannot compile a part of one that is never stored.
    if w.shape[1] < tile.keys or w.shape[1] % (tile.keys // 4) or w.shape[2] % tile.depth:
        return None
    weights = Weights.of(w, tile.keys, tile.depth)
    return weights if weights.layout in (OUT_IN.value, IN_OUT.value) else None


def _shared(tiles: Any) -> Any:
    """Tiles as Gluon's copies take them, with the layout that they get in shared memory."""
    assert isinstance(tiles, TensorDescriptor)
    kind = gl.float16 if tiles.base.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for(tiles.block_shape, kind)
    return hopper.TensorDescriptor(tiles.base, tiles.shape, tiles.strides, tiles.block_shape, layout)


def _launch(
    spec: ExpertSpec, rows_of: Callable[[], Tensor], weights: Weights, plan: Plan, tile: Tile, named: dict[str, Any]
) -> bool:
    """Launches the kernel with what both products have in common; whether it compiles."""
    assert isinstance(weights.source, TensorDescriptor)
    named = {
        "BACK": False, "FROM_HIDDEN": False, "SCORED": False, "p_ptr": None, "share_ptr": None, "h_ptr": None,
        "h_steps": (0,), **named,
    }  # fmt: skip
    modes = (named[name] for name in ("KEEP", "HIDDEN", "BACK", "FROM_HIDDEN", "SCORED"))
    kind = (plan.order.device, weights.source.base.dtype, spec.activation, *modes)

    def arguments(_: Config) -> dict[str, Any]:
        rows = rows_of()
        numbers = {name: value for name, value in formula(spec).items() if name != "GATE"}
        return {
            **numbers, **named, "a": _shared(rows_in_tiles(rows, ROWS.value, tile.depth)),
            "w": _shared(weights.source), "tiles_ptr": plan.tiles(tile.rows), "order_ptr": plan.order,
            "taken_ptr": _taken(plan), "DEPTH": rows.shape[1],
            "LAYOUT": weights.layout, "GROUP": tile.group, "STAGES": tile.stages, "BK": tile.depth,
        }  # fmt: skip

    return try_launch(kernels.grouped_kernel, [tile], lambda _: tile.programs, arguments, kind)
