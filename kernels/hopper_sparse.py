"""When attention through a page table, its tail, and scores run in Gluon kernels for Hopper, and in which sizes.

Of attention, the one with warps that only load comes first, then the one in which all load. Gluon is experimental:
where the installed Triton lacks it, or has one that no longer compiles them, the Triton kernels take every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s2o_inductor.kernels.launching import Config, launch, try_launch
from s2o_inductor.kernels.triton_sparse_tail import round_kernel
from s2o_inductor.kernels.triton_sparse_tiles import Padding, Tiling

try:
    from s2o_inductor.kernels import gluon_sparse_attention as kernels
except (ImportError, AttributeError):
    kernels = None  # type: ignore[assignment]
try:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from s2o_inductor.kernels import gluon_sparse_scores as scoring
    from s2o_inductor.kernels import gluon_sparse_special as special
    from s2o_inductor.kernels import gluon_sparse_tail as tails
except (ImportError, AttributeError):
    special = tails = scoring = None  # type: ignore[assignment]

# What a run of keys must be for the kernels' loads.
_RUN = 8


def attend_configs(
    capability: tuple[int, int], dtype: torch.dtype, widths: tuple[int, int], tiling: Tiling, padding: Padding
) -> list[Config]:
    """Ways to run the kernel in which all warps load, fastest first on an H100; none for calls that it does not take.

    `stages` are the key tiles that it loads ahead.

    Args:
        capability: of the device, major and minor.
        dtype: of q, k and v.
        widths: head sizes D and Dv.
        tiling: the tiles of the call.
        padding: of the keys.
    """
    geometry = tiling.geometry
    if kernels is None or not _plain(capability, dtype, widths, tiling, padding) or geometry.tile not in (64, 128):
        return []
    if geometry.tile == 64:  # two programs share a multiprocessor, and its memory
        found = [Config(64, 64, 4, 2)]
    else:
        found = [Config(128, 128, 8, 2), Config(128, 64, 8, 3), Config(128, 64, 8, 2)]
    return [config for config in found if geometry.block % config.keys == 0 and geometry.bundle % config.keys == 0]


def special_configs(
    capability: tuple[int, int], dtype: torch.dtype, widths: tuple[int, int], tiling: Tiling, padding: Padding
) -> list[Config]:
    """Ways to run the kernel with warps that only load, like `attend_configs`; fastest first on an H100.

    `warps` are those of half of the rows, `registers` those of a thread before the loading warps, which have four
    warps' share, leave theirs to the others.
    """
    geometry = tiling.geometry
    general = attend_configs(capability, dtype, widths, tiling, padding)
    if special is None or not general or geometry.tile != 128:
        return []
    found = [Config(128, 128, 4, 3, registers=168)]
    return [config for config in found if geometry.block % config.keys == 0 and geometry.bundle % config.keys == 0]


def tail_configs(
    capability: tuple[int, int], dtype: torch.dtype, widths: tuple[int, int], tiling: Tiling, padding: Padding
) -> list[Config]:
    """Ways to run the tail's kernel, like `special_configs`: `stages` tiles of `keys` groups are loaded ahead.

    Heads of 64 have not been proved on a GPU.
    """
    plain = tails is not None and _plain(capability, dtype, widths, tiling, padding)
    return [Config(128, 128, 4, 2, registers=168)] if plain and widths[0] == 128 == tiling.geometry.tile else []


def _plain(
    capability: tuple[int, int], dtype: torch.dtype, widths: tuple[int, int], tiling: Tiling, padding: Padding
) -> bool:
    """Whether a call has what all kernels here take, tiles aside."""
    return (
        capability == (9, 0)
        and dtype in (torch.float16, torch.bfloat16)
        and widths in ((64, 64), (128, 128))
        and tiling.geometry.run == _RUN
        and tiling.causal
        and tiling.window is None
        and padding.allowed is None
        and padding.documents is None
    )


def runs_of(x: Tensor) -> Any:
    """x (B, H, S, D), aligned, as (B, H, D / `special.PIECE`, S, `special.PIECE`) in pieces of one run."""
    width = special.PIECE.value
    shape = [*x.shape[:2], x.shape[3] // width, x.shape[2], width]
    strides = [*x.stride()[:2], width, x.stride(2), 1]
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * x.element_size(), rank=5)
    return TensorDescriptor(x, shape, strides, [1, 1, shape[2], _RUN, width], layout)


def tiles_of(x: Tensor, rows: int) -> Any:
    """x (N, S, D), contiguous, in tiles of `rows` rows of one (S, D), zeros beyond it."""
    bits = 8 * x.element_size()
    layout = NVMMASharedLayout(min(128, x.shape[2] * bits // 8), bits, rank=3)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, x.shape[2]], layout)


def attend(
    q: Tensor, widths: tuple[int, int], tiling: Tiling, padding: Padding, programs: int, named: dict[str, Any]
) -> bool:
    """Launches the first kernel that takes the call and compiles; whether there is one.

    Args:
        q: the queries.
        widths: as in `attend_configs`, like the following two.
        tiling: see there.
        padding: see there.
        programs: tiles times query heads times batch.
        named: the arguments of the Triton kernel, by name.
    """
    if not q.is_cuda:
        return False
    call = (torch.cuda.get_device_capability(q.device), q.dtype, widths, tiling, padding)

    def arguments(config: Config) -> dict[str, Any]:
        return {**named, "AHEAD": config.stages}

    def special_arguments(config: Config) -> dict[str, Any]:
        return {**arguments(config), **{f"{name}_desc": runs_of(named[f"{name}_ptr"]) for name in ("k", "v")}}

    ways: tuple[tuple[Any, Callable[..., list[Config]], Callable[[Config], dict[str, Any]]], ...] = (
        (special, special_configs, special_arguments), (kernels, attend_configs, arguments)
    )  # fmt: skip
    for module, configs_of, arguments_of in ways:
        configs = configs_of(*call)
        kind = (q.device, q.dtype, widths, tiling.geometry)
        if configs and try_launch(module.attend_kernel, configs, lambda _: programs, arguments_of, kind):
            return True
    return False


def tail(
    q: Tensor, widths: tuple[int, int], tiling: Tiling, padding: Padding, programs: int, named: dict[str, Any]
) -> Tensor | None:
    """Launches the tail's kernel, if it takes the call and compiles.

    Args:
        q: as in `attend`, like all that follows.
        widths: see there.
        tiling: see there.
        padding: see there.
        programs: see there.
        named: see there.

    Returns:
        int8 (B, Hq, count, 2), halves of tiles that are marked for the Triton kernel; None, if it has to do all.
    """
    if not q.is_cuda:
        return None
    configs = tail_configs(torch.cuda.get_device_capability(q.device), q.dtype, widths, tiling, padding)
    if not configs:
        return None
    variance, k, v = (named[f"{name}_ptr"].flatten(0, 1) for name in ("variance", "mean_k", "mean_v"))
    rounded = torch.empty(variance.shape, dtype=torch.float8_e4m3fn, device=q.device)
    units = torch.empty(variance.shape[:2], dtype=torch.float32, device=q.device)
    rows = units.numel()
    launch(
        round_kernel, [Config(32, 0, 4, 1)], lambda config: -(-rows // config.rows),
        lambda _: {"x_ptr": variance, "rounded_ptr": rounded, "units_ptr": units, "rows": rows, "D": widths[0]},
    )  # fmt: skip
    marks = torch.empty((*q.shape[:2], named["count"], 2), dtype=torch.int8, device=q.device)

    def arguments(config: Config) -> dict[str, Any]:
        groups = {"variance_desc": rounded, "k_desc": k, "v_desc": v}
        descriptors = {name: tiles_of(x, config.keys) for name, x in groups.items()}
        return {**named, **descriptors, "units_ptr": units, "marks_ptr": marks, "AHEAD": config.stages}

    kind = (q.device, q.dtype, widths, tiling.geometry)
    return marks if try_launch(tails.tail_kernel, configs, lambda _: programs, arguments, kind) else None


def rows_of(x: Tensor, rows: int) -> Any:
    """x (.., D), contiguous, of one-byte numbers, in tiles of `rows` rows."""
    x = x.view(-1, x.shape[-1])
    layout = NVMMASharedLayout(swizzle_byte_width=x.shape[1], element_bitwidth=8, rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, x.shape[1]], layout)


def scores_configs(
    capability: tuple[int, int], k: Tensor, means: int, clusters: int, tiling: Tiling, padded: bool
) -> list[Config]:
    """Ways to run the kernel of scores, like `attend_configs`; fastest first on an H100.

    Args:
        capability: of the device, major and minor.
        k: (B, Hkv, .., D), the keys as the scores read them.
        means: representatives of a tile.
        clusters: groups of a block.
        tiling: of the call.
        padded: whether keys are padded, or documents packed.
    """
    geometry = tiling.geometry
    if (
        scoring is None
        or capability != (9, 0)
        or k.dtype != torch.float8_e4m3fn
        or k.shape[3] not in (64, 128)
        or means > 128
        or clusters != scoring.CLUSTERS.value
        or geometry.run != _RUN
        or geometry.block % 64
        or padded
        or k.numel() // k.shape[3] >= 1 << 31
    ):
        return []
    return [Config(128, 64, 4, 2, registers=128)]


def score(k: Tensor, tiling: Tiling, programs: Callable[[Config], int], named: dict[str, Any]) -> bool:
    """Launches the kernel of scores if it takes the call and compiles; whether it does.

    Args:
        k: as in `scores_configs`.
        tiling: of the call.
        programs: how many programs of a config.
        named: the arguments of the Triton kernel, by name, but those that depend on the config.
    """
    if not k.is_cuda:
        return False
    means, padded = named["MEANS"], named["KEYS"] or named["PACKED"]
    capability = torch.cuda.get_device_capability(k.device)
    configs = scores_configs(capability, k, means, named["CLUSTERS"], tiling, padded)

    def arguments(config: Config) -> dict[str, Any]:
        k_tiles = rows_of(k, config.keys)
        return {**named, "GROUPED": config.rows // means, "STAGES": config.stages, "k_tiles": k_tiles}

    fixed = (means, tiling.geometry, tiling.causal, tiling.window is None)
    kind = (k.device, named["means_ptr"].dtype, k.shape[3], *fixed)
    return bool(configs) and try_launch(scoring.scores_kernel, configs, programs, arguments, kind)
