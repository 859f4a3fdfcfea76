"""The order in which tiles of queries read their prefix, in Triton: scores, bins of falling score, page tables.

`kernels/reference_sparse.py` says what is scored and how. A sort of every prefix would cost more than the attention
that it saves, so runs of keys are only told apart by bins, eight to a factor of two of their score: bins in falling
order, positions rising inside one. That is enough: any order inside a bundle is as good as another, and scores in a
bin differ by an eighth at most. Seven kernels, none of which waits for the host; the first four are in
`triton_sparse_scores.py`, that of scores for Hopper in `gluon_sparse_scores.py`, too, the others in
`triton_sparse_table.py`:

    rounded keys      in float8, where the device multiplies such numbers faster (`in_float8`)
    representatives   mean queries of clusters of each tile, for all query heads of a key/value head
    masses            log-sum-exp of each representative's scores over the groups of its prefix
    scores            how far keys are from their group, mean over representatives and runs, as bins; reads all keys
    histogram         runs in each bin, per segment of the prefix
    offsets, place    a counting sort by bin: where each bin of each segment starts, then the page table

Everything but the first three works on a range of tiles whose tables fit the workspace.
"""

from __future__ import annotations

import dataclasses
import fractions
import math
from typing import Any

import torch
import triton
from torch import Tensor

from s2o_inductor.kernels import hopper_sparse
from s2o_inductor.kernels import triton_sparse_scores as scoring
from s2o_inductor.kernels import triton_sparse_table as sorting
from s2o_inductor.kernels.launching import Config, block_width, launch, tiles_of
from s2o_inductor.kernels.triton_sparse_groups import GroupTable
from s2o_inductor.kernels.triton_sparse_table import BINS, SEGMENT
from s2o_inductor.kernels.triton_sparse_tiles import Padding, Tiling, steps_of
from s2o_inductor.sparse_policy import Geometry

# Whether keys may be ranked by products of float8 numbers; attention to what is read does not depend on it.
FLOAT8 = True
# Least and most runs that one program sorts at a time.
_LEAST_SORTED, _SORTED = 64, 1024
# Exact products hold all of their operands in shared memory: wide heads leave room for few representatives.
# Left to choose, ptxas gives them 128 registers, or 32 and a stack of 8 kB, by how many groups a block has.
_EXACT = Config(128, 32, 8, 2, registers=255)
_FEW = [Config(64, 16, 8, 1), Config(32, 16, 8, 1), Config(16, 16, 4, 1)]


@dataclasses.dataclass(frozen=True)
class Order:
    """What tiles [tile0, tile0 + count) may read, in which order; a row is a batch entry, key/value head and tile.

    Attributes:
        table: int32 (B, Hkv, count, places), numbers of runs (their first position over `run`) by falling score; -1
            beyond `listed`. Places are a multiple of a bundle.
        listed: int32 (B, Hkv, count), runs.
        bundle_of: int16 (B, Hkv, count, room), the bundle of the run at position base + i * run, `UNLISTED` if it is
            in none; None without a tail, the only one who asks.
        tile0: first tile, counted from `Tiling.first`.
        base: first position of `bundle_of`.
    """

    table: Tensor
    listed: Tensor
    bundle_of: Tensor | None
    tile0: int
    base: int


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Representatives of all tiles with their masses: all that an order of any range of tiles needs.

    Attributes:
        means: (B * Hkv, tiles, MEANS, D), of the type of q, times scale * log2(e): products with keys are scores in
            base 2.
        shift: float32 (B * Hkv, tiles, MEANS).
        k: (B, Hkv, .., D), the keys of whole blocks as the scores read them: those of the call, or rounded to float8.
        arguments: what all kernels take.
    """

    means: Tensor
    shift: Tensor
    k: Tensor
    arguments: dict[str, Any]


def in_float8(k: Tensor) -> bool:
    """Whether keys k (B, Hkv, S, D) are ranked by products of float8 numbers (e4m3).

    Hopper and later multiply these at twice the rate of half precision, in tiles that rows of 64 channels or more fill.
    """
    if not FLOAT8 or k.dtype == torch.float32 or k.shape[3] not in (64, 128, 256):
        return False
    return not k.is_cuda or torch.cuda.get_device_capability(k.device) >= (9, 0)  # the interpreter takes all


def representatives_configs(dtype: torch.dtype, tile: int) -> list[Config]:
    """Ways to run the kernel of representatives, fastest first: queries of a tile at a time, which divide it.

    Args:
        dtype: of q.
        tile: queries of a tile, a power of two from 16 on.
    """
    if dtype == torch.float32:
        return [Config(min(32, tile), 0, 8, 1), Config(16, 0, 4, 1)]
    return [Config(tile, 0, 4, 1), Config(min(64, tile), 0, 4, 1), Config(16, 0, 4, 1)]


def masses_configs(dtype: torch.dtype, width: int, means: int) -> list[Config]:
    """Ways to run the kernel of masses, fastest first: representatives, a multiple of a tile's, and groups at a time.

    Args:
        dtype: of q and k.
        width: of their heads.
        means: representatives of a tile, a power of two.
    """
    if dtype == torch.float32:
        return _for_rows(means, [_EXACT, Config(128, 16, 8, 1), *_FEW])
    if width <= 128:
        return _for_rows(means, [Config(128, 64, 8, 2), Config(128, 64, 8, 1), Config(64, 32, 4, 1)])
    return _for_rows(means, [Config(128, 64, 8, 2), Config(128, 32, 8, 1), Config(64, 32, 4, 1)])


def scores_configs(dtype: torch.dtype, width: int, means: int) -> list[Config]:
    """The same for the kernel of scores: representatives, and keys at a time.

    Between its products lie exponentials: a multiprocessor is busy only with two programs, of 128 registers a thread
    and half of a Hopper's shared memory.
    """
    if dtype == torch.float32:
        return _for_rows(means, [_EXACT, Config(128, 16, 8, 1), *_FEW])
    if width <= 128:
        most = [Config(128, 128, 8, 2, registers=128), Config(128, 64, 4, 2), Config(128, 32, 4, 1)]
        return _for_rows(means, most)
    return _for_rows(means, [Config(128, 64, 8, 2), Config(128, 32, 8, 1), Config(64, 32, 4, 1)])


def _for_rows(means: int, configs: list[Config]) -> list[Config]:
    """Those configs that take whole tiles of `means` representatives."""
    return [config for config in configs if config.rows % means == 0]


def _for_block(run: int, block: int, configs: list[Config]) -> list[Config]:
    """Those configs whose keys a block has room for, or the last with as many as it has; whole runs at a time.

    Not the first with fewer keys: 64 rows of float8 with 64 channels, shared by eight warps, are compiled into reads
    beyond the shared memory by Triton 3.6.
    """
    fit = [config for config in configs if config.keys <= block] or configs[-1:]
    return [dataclasses.replace(config, keys=max(run, min(config.keys, block))) for config in fit]


def rank(q: Tensor, k: Tensor, scale: float, tiling: Tiling, padding: Padding, groups: GroupTable) -> Ranking:
    """Representatives and masses of all tiles.

    Args:
        q: (B, Hq, Sq, D), `aligned`, like k.
        k: (B, Hkv, Sk, D).
        scale: of the scores, above 0.
        tiling: of Sq and Sk.
        padding: of the keys.
        groups: of the keys.
    """
    batch, heads, _, width = q.shape
    kv_heads, sub = k.shape[1], tiling.geometry.sub_means
    group = heads // kv_heads
    means_count = triton.next_power_of_2(group * sub)
    rows = batch * kv_heads
    float8 = in_float8(k)
    means = torch.empty((rows, tiling.count, means_count, width), dtype=q.dtype, device=q.device)
    rounded = torch.empty_like(means, dtype=_float8()) if float8 else None
    shift = torch.empty((rows, tiling.count, means_count), dtype=torch.float32, device=q.device)
    shared = {
        "means_ptr": means, "rounded_means_ptr": rounded, "FLOAT8": float8, "shift_ptr": shift,
        "heads": heads, "group": group, "tiles": tiling.count, "scale": scale, "limit": tiling.geometry.limit,
        "D": width, "BLOCK_D": block_width(width), "SUB": sub, "MEANS": means_count, "ROUNDS": tiling.geometry.rounds,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32", "blocks": tiling.keys // tiling.geometry.block,
        **tiling.arguments(), **padding.arguments(), **groups.arguments(),
    }  # fmt: skip
    launch(
        scoring.representatives_kernel, representatives_configs(q.dtype, tiling.geometry.tile),
        lambda _: rows * tiling.count * (means_count // sub), lambda _: {**shared, "q_ptr": q, "q_steps": steps_of(q)},
    )  # fmt: skip
    launch(
        scoring.masses_kernel, masses_configs(k.dtype, width, means_count),
        lambda config: rows * triton.cdiv(tiling.count, config.rows // means_count),
        lambda config: {**shared, "GROUPED": config.rows // means_count},
    )  # fmt: skip
    return Ranking(means, shift, _rounded_keys(k, tiling.geometry, shared) if float8 else k, shared)


def _float8() -> torch.dtype:
    """Of the copies: Triton's interpreter, which loses carries where it rounds to float8, shows the rest in float16."""
    return torch.float16 if triton.knobs.runtime.interpret else torch.float8_e4m3fn


def _rounded_keys(k: Tensor, geometry: Geometry, shared: dict[str, Any]) -> Tensor:
    """Keys k (B, Hkv, S, D) of whole blocks, at least one, as `rounded_keys_kernel` rounds them."""
    blocks = k.shape[2] // geometry.block
    size = (*k.shape[:2], max(blocks, 1) * geometry.block, k.shape[3])
    rounded = torch.empty(size, dtype=_float8(), device=k.device)
    if blocks:
        launch(
            scoring.rounded_keys_kernel, [Config(min(64, geometry.block), 0, 4, 1)],
            lambda _: k.shape[0] * k.shape[1] * blocks,
            lambda _: {**shared, "k_ptr": k, "k_steps": steps_of(k), "rounded_k_ptr": rounded},
        )  # fmt: skip
    return rounded


def span_of(tiling: Tiling, tile0: int, count: int) -> tuple[int, int, int]:
    """(base, room, most) of a range of tiles: their prefixes lie in `room` runs from position `base` on, whole
    segments; none is longer than `most` keys."""
    prefixes = [tiling.prefix(tile) for tile in range(tile0, tile0 + count)]
    present = [(low, high) for low, high in prefixes if low < high]
    if not present:
        return 0, SEGMENT.value, 0
    base = min(low for low, _ in present)
    runs = (max(high for _, high in present) - base) // tiling.geometry.run
    return base, triton.cdiv(runs, SEGMENT.value) * SEGMENT.value, max(high - low for low, high in present)


def groups_in(room: int, geometry: Geometry) -> int:
    """Groups of the blocks of `room` runs, whole segments."""
    return room // (geometry.block // geometry.run) * geometry.clusters


def row_bytes(tiling: Tiling, tile0: int, count: int, density: fractions.Fraction, group: int) -> int:
    """Bytes of workspace that one key/value head takes at most per tile of a range, with its `group` query heads."""
    _, room, most = span_of(tiling, tile0, count)
    run = 4 + 1 + 2  # packed for sorting, bin, bundle
    unread = group * 2 * 4  # of a group of keys, by query head: two numbers
    return (
        room * run + room // SEGMENT.value * BINS.value * 4 + tiling.listed(most, density) * 4
        + groups_in(room, tiling.geometry) * unread
    )  # fmt: skip


def order(
    ranking: Ranking, k: Tensor, tiling: Tiling, density: fractions.Fraction, tile0: int, count: int
) -> Order:  # fmt: skip
    """The order of tiles [tile0, tile0 + count).

    Args:
        ranking: of the same call.
        k: (B, Hkv, Sk, D), as `rank` had it.
        tiling: of the call.
        density: largest share of its prefix that a tile may read.
        tile0: first tile, counted from `Tiling.first`.
        count: tiles.
    """
    batch, kv_heads = k.shape[:2]
    rows = batch * kv_heads * count
    base, room, most = span_of(tiling, tile0, count)
    geometry, device = tiling.geometry, k.device
    places = max(tiling.listed(most, density), geometry.bundle // geometry.run)
    segments = room // SEGMENT.value
    bins = torch.empty((rows, room), dtype=torch.uint8, device=device)
    kept = torch.empty((rows, room), dtype=torch.int32, device=device)
    starts = torch.empty((rows, segments, BINS.value), dtype=torch.int32, device=device)
    table = torch.full((batch, kv_heads, count, places), -1, dtype=torch.int32, device=device)
    listed = torch.empty((batch, kv_heads, count), dtype=torch.int32, device=device)
    bundle_of = torch.empty((batch, kv_heads, count, room), dtype=torch.int16, device=device)
    shared = {
        **ranking.arguments, "bins_ptr": bins, "starts_ptr": starts, "listed_ptr": listed, "tile0": tile0,
        "count": count, "base": base, "room": room, "places": places, "segments": segments, "table_ptr": table,
        "bundle_of_ptr": bundle_of, "kept_ptr": kept, "numerator": density.numerator,
        "denominator": density.denominator, "BUNDLE": geometry.bundle,
    }  # fmt: skip
    means = ranking.arguments["MEANS"]
    spans = triton.cdiv(room * geometry.run, geometry.block * (scoring.SPAN_GROUPS.value // geometry.clusters))

    def programs(config: Config) -> int:
        return int(batch * kv_heads * triton.cdiv(count, config.rows // means) * spans)

    if not hopper_sparse.score(ranking.k, tiling, programs, shared):
        configs = scores_configs(k.dtype, k.shape[3], means)
        launch(
            scoring.scores_kernel, _for_block(geometry.run, geometry.block, configs), programs,
            lambda config: {**shared, "GROUPED": config.rows // means, "k_tiles": tiles_of(ranking.k, config.keys)},
        )  # fmt: skip
    launch(sorting.histogram_kernel, [Config(0, 0, 4, 1)], lambda _: rows * segments, lambda _: shared)
    launch(sorting.offsets_kernel, [Config(0, 0, 4, 1)], lambda _: rows, lambda _: shared)
    # As many as a segment keeps, if its share of the table is that of its runs: it costs more to sort more at once.
    kept_by_segment = math.ceil(SEGMENT.value * density)
    sorted_at_once = max(_LEAST_SORTED, min(_SORTED, triton.next_power_of_2(min(kept_by_segment, places))))
    launch(sorting.place_kernel, [Config(0, sorted_at_once, 4, 1)], lambda _: rows * segments, lambda _: shared)
    return Order(table, listed, bundle_of, tile0, base)
