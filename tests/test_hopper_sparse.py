"""Which calls Hopper's kernels of attention, tail and scores take, and that Triton compiles them without a GPU."""

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
    tails = configs(hopper_sparse.tail_configs, **call)
    assert bool(tails) == (hopper_sparse.tails is not None and geometry.tile == 128 and "widths" not in call)
    for config in found + special + tails:
        assert config.rows == geometry.tile
    for config in found + special:
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
    for of in (hopper_sparse.attend_configs, hopper_sparse.special_configs, hopper_sparse.tail_configs):
        assert configs(of, **call) == []


@pytest.mark.skipif(hopper_sparse.special is None, reason="this Triton has no Gluon that the kernel could use")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [64, 128])
def test_runs_in_pieces(width: int, layout: str) -> None:
    x = aligned(in_memory(torch.randn(2, 3, 40, width).bfloat16(), layout))
    runs = hopper_sparse.runs_of(x)
    pieces = torch.as_strided(runs.base, runs.shape, runs.strides, runs.base.storage_offset())
    assert torch.equal(pieces.transpose(2, 3).flatten(3), x)
    assert runs.block_shape == [1, 1, width // 64, 8, 64]


def compile_for_hopper(kernel: Any, constants: dict[str, Any], kinds: dict[str, Any], config: Any) -> Any:
    """A Gluon kernel for sm_90; arguments without a kind are int32, pointers are aligned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    aligned = [["tt.divisibility", 16]]
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if name.endswith("_steps"):
            attributes |= {(i, j): aligned for j in range(3)}
        elif name.endswith("_ptr"):
            attributes[(i,)] = aligned
    kinds = {**kinds, **dict.fromkeys(constants, "constexpr")}
    return triton.compile(
        GluonASTSource(
            fn=kernel,
            signature={name: kinds.get(name, "i32") for name in kernel.arg_names},
            constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
            attrs=attributes,
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": config.warps, "maxnreg": config.registers},
    )


@pytest.mark.parametrize(
    ("kind", "width", "tile"),
    [("special", 128, 128), ("special", 64, 128), ("kernels", 128, 128), ("kernels", 64, 128), ("kernels", 128, 64)],
)
def test_compiles(kind: str, width: int, tile: int) -> None:
    """For sm_90, in the first way that a call of this size would run it."""
    module = getattr(hopper_sparse, kind)
    if module is None:
        pytest.skip("this Triton has no Gluon that the kernel could use")
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
        **dict.fromkeys(("q_steps", "k_steps", "v_steps"), ("i32",) * 3),
    }  # fmt: skip
    if kind == "special":
        runs = hopper_sparse.runs_of(torch.empty(1, 1, 8, width, dtype=torch.bfloat16))
        kinds |= dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<bf16{runs.block_shape},{runs.layout!r}>")
    compiled = compile_for_hopper(kernel, constants, kinds, config)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 232_448  # what a program may have on Hopper
    if kind == "special":
        assert compiled.metadata.num_warps == 12  # whose registers the config shares out


@pytest.mark.skipif(hopper_sparse.tails is None, reason="this Triton has no Gluon that the kernel could use")
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_tail_compiles(dtype: torch.dtype, kind: str) -> None:
    """For sm_90, as a call would run it."""
    geometry = GEOMETRIES["cuda"]
    (config, *_) = configs(hopper_sparse.tail_configs, dtype=dtype)
    constants = {
        "TILE": geometry.tile, "UNIT": geometry.block, "RUN": geometry.run, "BUNDLE": geometry.bundle,
        "CLUSTERS": geometry.clusters, "D": 128, "BN": config.keys, "AHEAD": config.stages,
    }  # fmt: skip
    groups = torch.empty(1, 8, 128, dtype=dtype)
    tiles, rounded = (hopper_sparse.tiles_of(x, config.keys) for x in (groups, groups.to(torch.float8_e4m3fn)))
    kinds: dict[str, Any] = {
        "q_steps": ("i32",) * 3, "lse_ptr": "*fp32", "listed_ptr": "*i32", "unread_ptr": "*fp16", "units_ptr": "*fp32",
        "budgets_ptr": "*fp32", "bundles_ptr": "*i64", "marks_ptr": "*i8", "scale": "fp32", "limit": "fp32",
        "variance_desc": f"tensordesc<fp8e4nv{rounded.block_shape},{rounded.layout!r}>",
        **dict.fromkeys(("q_ptr", "out_ptr"), f"*{kind}"),
        **dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<{kind}{tiles.block_shape},{tiles.layout!r}>"),
    }  # fmt: skip
    compiled = compile_for_hopper(hopper_sparse.tails.tail_kernel, constants, kinds, config)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 232_448
    assert compiled.metadata.num_warps == 12


def scores_configs(
    *, capability: tuple[int, int] = HOPPER, shape: tuple[int, ...] = (1, 8, 4096, 128), means: int = 32,
    dtype: torch.dtype = torch.float8_e4m3fn, padded: bool = False, geometry: Geometry = GEOMETRIES["cuda"],
) -> list[Any]:  # fmt: skip
    tiling = Tiling(4096, 4096, True, None, geometry)
    k = torch.empty(shape, dtype=dtype, device="meta")
    return hopper_sparse.scores_configs(capability, k, means, geometry.clusters, tiling, padded)


@pytest.mark.skipif(hopper_sparse.scoring is None, reason="this Triton has no Gluon that the kernel could use")
@pytest.mark.parametrize(
    ("call", "taken"),
    [
        ({}, True), ({"shape": (2, 3, 4096, 64), "means": 64}, True), ({"means": 1}, True), ({"means": 128}, True),
        ({"geometry": Geometry(block=64, clusters=8, bundle=64)}, True), ({"capability": (10, 0)}, False),
        ({"dtype": torch.bfloat16}, False), ({"shape": (1, 8, 4096, 256)}, False), ({"means": 256}, False),
        ({"padded": True}, False), ({"geometry": Geometry()}, False), ({"shape": (64, 64, 1 << 19, 128)}, False),
        ({"geometry": Geometry(clusters=8, run=4)}, False),
        ({"geometry": Geometry(clusters=8, block=32, sink=32)}, False),
    ],
)  # fmt: skip
def test_scores_taken(call: dict[str, Any], taken: bool) -> None:
    found = scores_configs(**call)
    assert bool(found) == taken
    for config in found:
        assert config.rows % call.get("means", 32) == 0
        assert call.get("geometry", GEOMETRIES["cuda"]).block % config.keys == 0


@pytest.mark.skipif(hopper_sparse.scoring is None, reason="this Triton has no Gluon that the kernel could use")
@pytest.mark.parametrize(
    ("width", "means", "kind"), [(128, 32, "bf16"), (128, 64, "fp16"), (64, 8, "bf16"), (128, 128, "bf16")]
)
def test_scores_compile(width: int, means: int, kind: str) -> None:
    """For sm_90, in the first way that a call would run it: four programs share a multiprocessor's memory."""
    geometry = GEOMETRIES["cuda"]
    k = torch.empty((1, 8, 4096, width), dtype=torch.float8_e4m3fn, device="meta")
    (config, *_) = scores_configs(shape=tuple(k.shape), means=means)
    constants = {
        "D": width, "TILE": geometry.tile, "UNIT": geometry.block, "RUN": geometry.run, "CAUSAL": True,
        "WINDOWED": False, "MEANS": means, "GROUPED": config.rows // means,
        "BM": config.rows, "BN": config.keys, "STAGES": config.stages,
    }  # fmt: skip
    tiles = hopper_sparse.rows_of(k, config.keys)
    kinds: dict[str, Any] = {
        "means_ptr": f"*{kind}", "mean_k_ptr": f"*{kind}", "variance_ptr": "*bf16", "rounded_means_ptr": "*fp8e4nv",
        "shift_ptr": "*fp32", "member_ptr": "*u8", "bins_ptr": "*u8", "limit": "fp32",
        "k_tiles": f"tensordesc<fp8e4nv{tiles.block_shape},{tiles.layout!r}>",
    }  # fmt: skip
    compiled = compile_for_hopper(hopper_sparse.scoring.scores_kernel, constants, kinds, config)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert 4 * (compiled.metadata.shared + 1024) <= 233_472  # 1 KB of a program's share is the system's
