"""When products of rows with their experts' weights run in the Gluon kernel for Hopper, and in which tiles.

Gluon is experimental: where the installed Triton lacks it, or has one that no longer compiles the kernel, the Triton
kernels take every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from s2o_inductor.kernels.launching import Config, try_launch
from s2o_inductor.kernels.triton_moe_addresses import Matrices
from s2o_inductor.kernels.triton_moe_first import gather
from s2o_inductor.kernels.triton_moe_plan import Plan
from s2o_inductor.kernels.triton_moe_tiles import IN_OUT, OUT_IN, Tile, Weights, formula, rows_in_tiles
from s2o_inductor.moe_spec import ExpertSpec

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia import hopper

    from s2o_inductor.kernels import gluon_moe as kernels
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
    kind = (plan.order.device, weights.source.base.dtype, spec.activation, named["KEEP"], named["HIDDEN"])

    def arguments(_: Config) -> dict[str, Any]:
        rows = rows_of()
        numbers = {name: value for name, value in formula(spec).items() if name != "GATE"}
        return {
            **numbers, **named, "a": _shared(rows_in_tiles(rows, kernels.ROWS.value, tile.depth)),
            "w": _shared(weights.source), "tiles_ptr": plan.tiles(tile.rows), "order_ptr": plan.order,
            # How many tiles were taken, beside those that programs begin with.
            "taken_ptr": torch.zeros(1, dtype=torch.int32, device=rows.device), "DEPTH": rows.shape[1],
            "LAYOUT": weights.layout, "GROUP": tile.group, "STAGES": tile.stages, "BK": tile.depth,
        }  # fmt: skip

    return try_launch(kernels.grouped_kernel, [tile], lambda _: tile.programs, arguments, kind)
