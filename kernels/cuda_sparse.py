"""S2O sparse attention on CUDA: the order of every tile, then attention through it; see `kernels/reference_sparse.py`.

Nothing here waits for the device or depends on what a tensor holds, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fractions
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from s2o_inductor.kernels import hopper_sparse
from s2o_inductor.kernels import triton_sparse_attention as kernels
from s2o_inductor.kernels import triton_sparse_order as ordering
from s2o_inductor.kernels import triton_sparse_tail as tails
from s2o_inductor.kernels.documents import Documents, check_documents
from s2o_inductor.kernels.launching import Config, block_width, heads_last, launch, section_heads
from s2o_inductor.kernels.operands import aligned, positive_scale
from s2o_inductor.kernels.reference_sparse import Sparse
from s2o_inductor.kernels.triton_sparse_groups import GroupTable, group_keys
from s2o_inductor.kernels.triton_sparse_order import Order
from s2o_inductor.kernels.triton_sparse_tiles import UNLISTED, Padding, Tiling, steps_of
from s2o_inductor.sparse_policy import GEOMETRIES, Geometry, most_means

# Tables and scratch of the tiles that are worked on at a time; a single row of tiles may need more.
WORKSPACE_BYTES = 512 << 20
GEOMETRY = GEOMETRIES["cuda"]
# Widest rows of keys and values that leave room for the rest of a program.
_WIDTH = 256
# Halves of tiles that Hopper's kernel leaves to Triton's. They are rare: most of these programs find nothing to do.
_MARKED = [Config(64, 32, 4, 1)]
# A head with this budget reads its prefix in place.
_EXACT = -1.0


def attend_configs(dtype: torch.dtype, width: int, tile: int) -> list[Config]:
    """Ways to run the attention kernel, fastest first on an H100: `examples/bench.py attention --sweep`.

    Args:
        dtype: of q, k and v.
        width: the larger of the head sizes D and Dv.
        tile: queries of a tile.
    """
    if dtype == torch.float32:
        return [Config(tile, 32, 8, 2), Config(tile, 16, 8, 1)]
    warps = 8 if tile > 64 else 4  # with fewer, ptxas spills the output's tile
    if width <= 128:
        return [Config(tile, 64, warps, 3), Config(tile, 64, 4, 3), Config(tile, 32, 8, 2)]
    return [Config(tile, 64, 8, 2), Config(tile, 32, 8, 2), Config(tile, 16, 8, 1)]


def tail_configs(dtype: torch.dtype, width: int, tile: int) -> list[Config]:
    """The same for the tail kernel: rows at a time, which divide the tile, and groups."""
    if dtype == torch.float32:
        return [Config(min(tile, 32 if width <= 128 else 16), 16, 8, 1)]
    if width <= 128:
        return [Config(tile, 64, 8, 3), Config(tile, 64, 8, 2), Config(tile, 32, 8, 2), Config(tile, 32, 8, 1)]
    return [Config(min(tile, 64), 32, 8, 2), Config(min(tile, 64), 16, 8, 1)]


def unread_configs(geometry: Geometry) -> list[Config]:
    """Ways to count what was not read: as many groups at a time as have 2048 runs, at most 256."""
    return [Config(0, min(256, 2048 // (geometry.block // geometry.run)), 4, 1)]


def why_not(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> str | None:
    """Why the kernels do not take operands of these sizes, or None when they do."""
    widest, group = max(q.shape[3], v.shape[3]), q.shape[1] // k.shape[1]
    if widest > _WIDTH:
        return f"heads are wider than {_WIDTH}: {widest}"
    if group * geometry.sub_means > (most := most_means(q.dtype == torch.float32, q.shape[3])):
        return (
            f"{group} query heads of a key/value head times {geometry.sub_means} sub-means are over {most} for "
            f"{q.dtype} heads of {q.shape[3]}"
        )
    try:
        Tiling(q.shape[2], k.shape[2], True, None, geometry)
    except ValueError as error:
        return str(error)
    return None


@dataclasses.dataclass(frozen=True)
class _Call:
    """Operands as the kernels read them, and the results they fill."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    tiling: Tiling
    padding: Padding
    budgets: Tensor
    groups: GroupTable | None
    output: Tensor
    lse: Tensor
    per_tile: dict[str, Tensor]

    @staticmethod
    def of(
        q: Tensor, k: Tensor, v: Tensor, scale: float, budgets: tuple[float, ...], tiling: Tiling,
        keys: Tensor | None, documents: tuple[Tensor, Tensor] | None,
    ) -> _Call:  # fmt: skip
        """Operands checked, aligned, and with a scale above 0; results empty."""
        batch, heads = q.shape[:2]
        q, scale, _ = positive_scale(q, scale)
        q, k, v = aligned(q), aligned(k), aligned(v)
        packed = None if documents is None or 0 in q.shape else Documents.of(*documents, tiling.geometry)
        padding = Padding.of(keys, tiling.geometry.run, packed)
        kinds = {
            "bundles": torch.int64, "tail": torch.float32, "pairs": torch.int64, "visible": torch.int64,
        }  # fmt: skip
        shape = (batch, heads, tiling.count)
        groups = group_keys(k, v, padding, tiling.geometry) if tiling.geometry.clusters else None
        return _Call(
            q, k, v, scale, tiling, padding, _on_device(budgets, heads, q.device), groups,
            heads_last(q, heads, q.shape[2], v.shape[3]),
            torch.empty(q.shape[:3], dtype=torch.float32, device=q.device),
            {name: torch.empty(shape, dtype=kind, device=q.device) for name, kind in kinds.items()},
        )  # fmt: skip

    def run(self, order: Order, ragged: bool, configs: list[Config] | None, tail: list[Config] | None) -> None:
        """Fills the results of the tiles of `order`."""
        batch, heads = self.q.shape[:2]
        count, places = order.table.shape[2:]
        width, v_width = self.q.shape[3], self.v.shape[3]
        geometry = self.tiling.geometry
        group = heads // self.k.shape[1]
        section = section_heads(self.tiling.keys, (width + v_width) * self.k.element_size()) * group
        shared = {
            "q_ptr": self.q, "q_steps": steps_of(self.q), "k_ptr": self.k, "k_steps": steps_of(self.k),
            "v_ptr": self.v, "v_steps": steps_of(self.v), "out_ptr": self.output, "lse_ptr": self.lse,
            "table_ptr": order.table, "listed_ptr": order.listed, "budgets_ptr": self.budgets,
            "heads": heads, "group": group, "tiles": self.tiling.count, "tile0": order.tile0, "count": count,
            "places": places, "section": section, "scale": self.scale, "BUNDLE": geometry.bundle,
            "HORIZON": geometry.horizon, "D": width, "DV": v_width, "BLOCK_D": block_width(width),
            "BLOCK_DV": block_width(v_width),
            **{f"{name}_ptr": x for name, x in self.per_tile.items()},
            **self.tiling.arguments(), **self.padding.arguments(),
        }  # fmt: skip
        programs = batch * heads * count
        whole = not ragged and self.padding.allowed is None

        def attend_arguments(config: Config) -> dict[str, Any]:
            return {**shared, "RAGGED": not (whole and geometry.block % config.keys == 0)}

        sizes = (self.q.dtype, max(width, v_width), geometry.tile)
        if ragged or not hopper_sparse.attend(self.q, (width, v_width), self.tiling, self.padding, programs, shared):
            launch(kernels.attend_kernel, configs or attend_configs(*sizes), lambda _: programs, attend_arguments)
        if self.groups is None or order.bundle_of is None:
            return
        room = order.bundle_of.shape[3]
        groups = ordering.groups_in(room, geometry)
        # Half precision is as good as that of the scores which these numbers scale.
        kind = torch.float32 if self.q.dtype == torch.float32 else torch.float16
        unread = torch.empty((batch, heads, count, 2, groups), dtype=kind, device=self.q.device)
        extra = {
            **self.groups.arguments(), "bundle_of_ptr": order.bundle_of, "base": order.base, "room": room,
            "limit": geometry.limit, "unread_ptr": unread,
        }  # fmt: skip
        launch(
            tails.unread_kernel, unread_configs(geometry),
            lambda config: batch * self.k.shape[1] * count * triton.cdiv(groups, config.keys),
            lambda _: {**shared, **extra},
        )  # fmt: skip
        marks = None
        if not tail:
            plain = (self.q, (width, v_width), self.tiling, self.padding)
            marks = hopper_sparse.tail(*plain, programs, {**shared, **extra})
        marked = {"marks_ptr": marks, "MARKED": marks is not None}
        launch(
            tails.tail_kernel, tail or (tail_configs(*sizes) if marks is None else _MARKED),
            lambda config: programs * (geometry.tile // config.rows), lambda _: {**shared, **extra, **marked},
        )  # fmt: skip

    def result(self) -> Sparse:
        """What was filled; pairs are added up over tiles."""
        return Sparse(
            self.output, self.lse, self.per_tile["bundles"], self.per_tile["tail"],
            self.per_tile["pairs"].sum(dim=2), self.per_tile["visible"].sum(dim=2),
        )  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    budgets: tuple[float, ...],
    causal: bool = True,
    window: int | None = None,
    keys: Tensor | None = None,
    documents: tuple[Tensor, Tensor] | None = None,
    max_density: float = 1.0,
    geometry: Geometry = GEOMETRY,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Sparse:
    """S2O attention: `reference_sparse.sparse_attention` with its defaults, ordered by bins of falling score.

    Args:
        q: (B, Hq, Sq, D), float16, bfloat16 or float32, any strides, like k and v.
        k: (B, Hkv, Sk, D), Sq <= Sk.
        v: (B, Hkv, Sk, Dv).
        scale: of the scores; D ** -0.5 by default.
        budgets: thresholds of the stop rule, one for all query heads or one each. A head with budget 0 reads
            everything, whatever `max_density` says.
        causal: query i of Sq sees keys up to i + Sk - Sq.
        window: with `causal`, it sees the last `window` of these alone.
        keys: bool (B, Sk), keys that may be seen at all; None is all of them.
        documents: with `causal`, both int32 or int64, (B, Sq) and (B, Sk), the documents of queries and keys: a query
            sees keys of an equal number alone. None is one document.
        max_density: largest share of a prefix that a tile reads, rounded up to a bundle.
        geometry: sizes; see `triton_sparse_tiles.Tiling` for those that the kernels take.
        workspace_bytes: tiles are worked on in ranges whose tables take no more than this, one tile at least. What is
            made once for all tiles is not among these: groups, mean queries, and where keys are ranked in float8 a copy
            of them, half as large as they are.

    Returns:
        `Sparse`: output (B, Hq, Sq, Dv) in memory of (B, Sq, Hq, Dv), lse float32, bundles int64 and tail float32
        (B, Hq, tiles), pairs and visible int64 (B, Hq), all on the device of q. `tail` is the estimate at the last
        bundle read.

    Raises:
        ValueError: sizes, budgets, density, window, documents or geometry are out of range.
    """
    tiling = _checked(q, k, v, budgets, causal, window, keys, documents, geometry)
    if not 0 < max_density <= 1:
        raise ValueError(f"max_density must be in (0, 1]; got {max_density}")
    if not geometry.clusters:
        raise ValueError("the CUDA kernels rank keys by their groups: clusters must be at least 1 here; got 0")
    density = fractions.Fraction(max_density).limit_denominator(1 << 20) or fractions.Fraction(1, 1 << 20)
    exact = tuple(_EXACT if budget == 0 else budget for budget in budgets)
    with _device_of(q):
        call = _Call.of(q, k, v, _scale(q, scale), exact, tiling, keys, documents)
        if call.output.numel() == 0:
            return call.result()
        assert call.groups is not None
        ranking = ordering.rank(call.q, call.k, call.scale, tiling, call.padding, call.groups)
        heads, group = q.shape[0] * k.shape[1], q.shape[1] // k.shape[1]
        for tile0, count in ranges(tiling, density, heads, group, workspace_bytes):
            call.run(ordering.order(ranking, call.k, tiling, density, tile0, count), False, None, None)
        return call.result()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    listed: Tensor,
    *,
    scale: float | None = None,
    budgets: tuple[float, ...] = (0.0,),
    causal: bool = True,
    window: int | None = None,
    keys: Tensor | None = None,
    documents: tuple[Tensor, Tensor] | None = None,
    geometry: Geometry = GEOMETRY,
    configs: list[Config] | None = None,
    tail: list[Config] | None = None,
) -> Sparse:
    """The same attention over keys that the caller chose, for every tile at once.

    Args:
        q: (B, Hq, Sq, D), and the following as in `forward`.
        k: (B, Hkv, Sk, D).
        v: (B, Hkv, Sk, Dv).
        table: int32 (B, Hkv, tiles, places), the runs of keys that a tile reads, in this order, each as its first
            position over `geometry.run`; each at most once, inside the tile's prefix (`Tiling.prefix`, and with
            documents what `Documents.tiles` leaves of it), and with a key that `keys` shows. Not checked: that would
            have to wait for the device.
        listed: int32 (B, Hkv, tiles), how many of the places count.
        scale: of the scores.
        budgets: as in `forward`, but 0 reads all that is listed.
        causal: as in `forward`, like what follows.
        window: see there.
        keys: see there.
        documents: see there.
        geometry: see there.
        configs: instead of `attend_configs`.
        tail: instead of `tail_configs`.

    Raises:
        ValueError: also when table or listed have another shape or type.
    """
    tiling = _checked(q, k, v, budgets, causal, window, keys, documents, geometry)
    shape = (q.shape[0], k.shape[1], tiling.count)
    if table.shape[:3] != shape or listed.shape != shape or {table.dtype, listed.dtype} != {torch.int32}:
        raise ValueError(
            f"table and listed must be int32 {(*shape, 'places')} and {shape}; got {table.dtype} {tuple(table.shape)} "
            f"and {listed.dtype} {tuple(listed.shape)}"
        )
    with _device_of(q):
        call = _Call.of(q, k, v, _scale(q, scale), budgets, tiling, keys, documents)
        if call.output.numel() == 0:
            return call.result()
        of_bundle = geometry.bundle // geometry.run
        missing = max(-(-table.shape[3] // of_bundle), 1) * of_bundle - table.shape[3]
        table = torch.nn.functional.pad(table, (0, missing), value=-1).contiguous()
        bundle_of, base = None, 0
        if geometry.clusters:
            base, room, _ = ordering.span_of(tiling, 0, tiling.count)
            bundle_of = torch.full((*shape, room), UNLISTED.value, dtype=torch.int16, device=q.device)
            sizes = {
                "places": table.shape[3], "room": room, "base": base, "RUN": geometry.run, "BUNDLE": geometry.bundle,
            }  # fmt: skip
            listed = listed.contiguous()
            launch(
                kernels.bundle_of_kernel, [Config(0, 64, 4, 1)],
                lambda config: math.prod(shape) * triton.cdiv(table.shape[3], config.keys),
                lambda _: {"table_ptr": table, "listed_ptr": listed, "bundle_of_ptr": bundle_of, **sizes},
            )  # fmt: skip
        call.run(Order(table, listed.contiguous(), bundle_of, 0, base), True, configs, tail)
        return call.result()


def ranges(tiling: Tiling, density: fractions.Fraction, heads: int, group: int, most: int) -> list[tuple[int, int]]:
    """Ranges (first tile, tiles), the last tiles first, whose tables take at most so many bytes for `heads` key/value
    heads, each of `group` query heads."""
    found, end = [], tiling.count
    while end:
        # Later tiles have longer rows: a range of this many fits, if its last tile's row is its longest.
        fits = most // (heads * ordering.row_bytes(tiling, end - 1, 1, density, group))
        count = min(end, max(1, fits))
        while count > 1 and count * heads * ordering.row_bytes(tiling, end - count, count, density, group) > most:
            count -= max(1, count // 8)  # with a window, a range spans more keys than its last tile
        found.append((end - count, count))
        end -= count
    return found


def _on_device(budgets: tuple[float, ...], heads: int, device: torch.device) -> Tensor:
    """float32 (Hq,). Filled on the device run by run: a copy from the host could not be captured in a CUDA graph."""
    if len(budgets) == 1:
        return torch.full((heads,), budgets[0], dtype=torch.float32, device=device)
    result = torch.empty((heads,), dtype=torch.float32, device=device)
    first = 0
    for head in range(1, heads + 1):
        if head == heads or budgets[head] != budgets[first]:
            result[first:head].fill_(budgets[first])
            first = head
    return result


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[3] ** -0.5 if scale is None else scale


@contextlib.contextmanager
def _device_of(q: Tensor) -> Iterator[None]:
    with torch.cuda.device_of(q):
        yield


def _checked(
    q: Tensor, k: Tensor, v: Tensor, budgets: tuple[float, ...], causal: bool, window: int | None,
    keys: Tensor | None, documents: tuple[Tensor, Tensor] | None, geometry: Geometry,
) -> Tiling:  # fmt: skip
    """The tiles of a call whose arguments fit together."""
    batch, heads, queries, width = q.shape
    kv_heads, length = k.shape[1:3]
    if k.shape != (batch, kv_heads, length, width) or v.shape[:3] != k.shape[:3] or heads % kv_heads:
        raise ValueError(
            f"q (B, Hq, Sq, D), k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv) with Hq a multiple of Hkv; got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or {k.dtype, v.dtype} != {q.dtype}:
        raise ValueError(f"q, k and v must all be float16, bfloat16 or float32; got {q.dtype}, {k.dtype}, {v.dtype}")
    if queries > length:
        raise ValueError(f"sparse attention needs at least as many keys as queries; got {queries} and {length}")
    if len(budgets) not in (1, heads) or min(budgets) < 0:
        raise ValueError(f"budgets must be one or {heads} numbers of at least 0; got {budgets}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window goes with causal attention and is at least 1; got {window}, causal={causal}")
    if keys is not None and (keys.dtype != torch.bool or keys.shape != (batch, length)):
        raise ValueError(f"keys must be bool {(batch, length)}; got {keys.dtype} {tuple(keys.shape)}")
    if documents is not None:
        check_documents(documents, q, k, causal)
    if (why := why_not(q, k, v, geometry)) is not None:
        raise ValueError(f"{why}; use exact attention")
    return Tiling(queries, length, causal, window, geometry)
