"""Which calls Hopper's attention kernel takes, and that the installed Triton compiles it, which needs no GPU."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from s2o_inductor.kernels import hopper_sparse
from s2o_inductor.kernels.operands import aligned
from s2o_inductor.kernels.triton_sparse_tiles import Padding, Tiling
from s2o_inductor.sparse_policy import GEOMETRIES, Geometry
from s2o_inductor.testing import LAYOUTS, in_memory

HOPPER = (9, 0)


def configs(
    of: Any = hopper_sparse.attend_configs, *, capability: tuple[int, int] = HOPPER,
    dtype: torch.dtype = torch.bfloat16, widths: tuple[int, int] = (128, 128),
    causal: bool = True, window: int | None = None, padding: Padding | None = None, geometry: Geometry | None = None,
) -> list[Any]:  # fmt: skip
    tiling = Tiling(4096, 4096, causal, window, geometry or GEOMETRIES["cuda"])
    return of(capability, dtype, widths, tiling, padding or Padding())


@pytest.mark.parametrize(
    "call",
    [
        {}, {"dtype": torch.float16, "widths": (64, 64)}, {"geometry": Geometry(tile=64)},
        {"geometry": Geometry(sink=64, block=64, bundle=192)},
    ],
)  # fmt: skip
def test_taken(call: dict[str, Any]) -> None:
    geometry = call.get("geometry") or GEOMETRIES["cuda"]
    found = configs(**call)
    assert found
    special = configs(hopper_sparse.special_configs, **call)
    coarse = math.gcd(geometry.sink, geometry.block, geometry.bundle) % 128 == 0
    assert bool(special) == (hopper_sparse.special is not None and geometry.tile == 128 and coarse)
    for config in found + special:
        assert config.rows == geometry.tile
        assert math.gcd(geometry.sink, geometry.block, geometry.bundle) % config.keys == 0


@pytest.mark.parametrize(
    "call",
    [
        {"capability": (8, 0)}, {"capability": (10, 0)}, {"dtype": torch.float32}, {"widths": (96, 96)},
        {"widths": (128, 64)}, {"causal": False}, {"window": 1024}, {"geometry": Geometry(run=16)},
        {"padding": Padding.of(torch.ones(1, 4096, dtype=torch.bool), 8)},
    ],
)  # fmt: skip
def test_left_to_triton(call: dict[str, Any]) -> None:
    assert configs(**call) == configs(hopper_sparse.special_configs, **call) == []


@pytest.mark.skipif(hopper_sparse.special is None, reason="this Triton has no Gluon that the kernel could use")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [64, 128])
def test_runs_in_pieces(width: int, layout: str) -> None:
    x = aligned(in_memory(torch.randn(2, 3, 40, width).bfloat16(), layout))
    runs = hopper_sparse.runs_of(x)
    pieces = torch.as_strided(runs.base, runs.shape, runs.strides, runs.base.storage_offset())
    assert torch.equal(pieces.transpose(2, 3).flatten(3), x)
    assert runs.block_shape == [1, 1, width // 64, 8, 64]


@pytest.mark.parametrize(
    ("kind", "width", "tile"),
    [("special", 128, 128), ("special", 64, 128), ("kernels", 128, 128), ("kernels", 64, 128), ("kernels", 128, 64)],
)
def test_compiles(kind: str, width: int, tile: int) -> None:
    """For sm_90, in the first way that a call of this size would run it."""
    import triton
    from triton.backends.compiler import GPUTarget

    module = getattr(hopper_sparse, kind)
    if module is None:
        pytest.skip("this Triton has no Gluon that the kernel could use")
    from triton.experimental.gluon._runtime import GluonASTSource

    of = hopper_sparse.special_configs if kind == "special" else hopper_sparse.attend_configs
    geometry = dataclasses.replace(GEOMETRIES["cuda"], tile=tile)
    (config, *_) = configs(of, widths=(width, width), geometry=geometry)
    kernel = module.attend_kernel
    constants = {
        "TILE": tile, "UNIT": geometry.block, "BUNDLE": geometry.bundle, "HORIZON": geometry.horizon, "D": width,
        "BN": config.keys, "AHEAD": config.stages,
    }  # fmt: skip
    kinds: dict[str, Any] = {
        "lse_ptr": "*fp32", "table_ptr": "*i32", "listed_ptr": "*i32", "budgets_ptr": "*fp32", "bundles_ptr": "*i64",
        "tail_ptr": "*fp32", "pairs_ptr": "*i64", "visible_ptr": "*i64", "scale": "fp32",
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16"),
        **dict.fromkeys(("q_steps", "k_steps", "v_steps"), ("i32",) * 3), **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    if kind == "special":
        runs = hopper_sparse.runs_of(torch.empty(1, 1, 8, width, dtype=torch.bfloat16))
        kinds |= dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<bf16{runs.block_shape},{runs.layout!r}>")
    aligned = [["tt.divisibility", 16]]
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if name.endswith("_steps"):
            attributes |= {(i, j): aligned for j in range(3)}
        elif name.endswith("_ptr"):
            attributes[(i,)] = aligned
    compiled = triton.compile(
        GluonASTSource(
            fn=kernel,
            signature={name: kinds.get(name, "i32") for name in kernel.arg_names},
            constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
            attrs=attributes,
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": config.warps, "maxnreg": config.registers},
    )
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 232_448  # what a program may have on Hopper
    if kind == "special":
        assert compiled.metadata.num_warps == 12  # whose registers the config shares out
