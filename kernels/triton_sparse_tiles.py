"""Which keys a tile of queries reads densely and which it ranks, on the host and on the device.

Both sides follow `kernels/reference_sparse.py`: the tile at absolute positions [start, end) ranks the keys
[low, high), its prefix, and reads the others that it can see in place.
"""

# Device code has no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import dataclasses
import fractions
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_inductor.kernels.documents import Documents
from s2o_inductor.sparse_policy import Geometry

# Number of a bundle that no token is in: what `bundle_of` holds where the order lists none.
UNLISTED = tl.constexpr(32767)


@triton.jit
def tile_keys(
    tile, queries, keys, window, sink, TILE: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """(start, end, low, high) of absolute tile number `tile`, a scalar or a vector; low = high without a prefix."""
    begin = tile * TILE
    start = tl.maximum(begin, keys - queries)
    end = tl.minimum(begin + TILE, keys)
    low = begin * 0 + sink
    if WINDOWED:
        low = tl.maximum(tl.cdiv(tl.maximum(end - window, 0), UNIT) * UNIT, low)
    high = begin if CAUSAL else begin * 0 + keys
    return start, end, low, tl.maximum(high // UNIT * UNIT, low)


@triton.jit
def packed_keys(documents_ptr, batch, tile, tiles, low, high, PACKED: tl.constexpr):
    """What is left of the prefixes [low, high) of tiles of packed documents; `tile` counts from the first.

    `documents_ptr` (B, tiles, 2) is `Documents.tiles`.
    """
    if PACKED:
        entry = documents_ptr + (batch.to(tl.int64) * tiles + tile) * 2
        low = tl.maximum(low, tl.load(entry + 1, mask=tile < tiles, other=0))
    return low, tl.maximum(high, low)


@triton.jit
def ranked_keys(before_ptr, batch, keys, low, high, KEYS: tl.constexpr):
    """How many of the keys [low, high) may be seen; `before_ptr` (B, Sk + 1) counts those before each position."""
    if KEYS:
        row = before_ptr + batch.to(tl.int64) * (keys + 1)
        return tl.load(row + tl.minimum(high, keys)) - tl.load(row + tl.minimum(low, keys))
    else:
        return high - low


@triton.jit
def ranked_runs(runs_ptr, batch, keys, low, high, RUN: tl.constexpr, KEYS: tl.constexpr):
    """How many runs of the keys [low, high) have a visible one; `runs_ptr` (B, Sk // RUN + 1) counts those before."""
    if KEYS:
        row = runs_ptr + batch.to(tl.int64) * (keys // RUN + 1)
        return tl.load(row + tl.minimum(high, keys) // RUN) - tl.load(row + tl.minimum(low, keys) // RUN)
    else:
        return (high - low) // RUN


@triton.jit
def load_allowed(allowed_ptr, batch, keys, index, inside, KEYS: tl.constexpr):
    """`inside`, less the keys at `index` that the padding hides; `allowed_ptr` (B, Sk) bytes."""
    if KEYS:
        return inside & (tl.load(allowed_ptr + batch.to(tl.int64) * keys + index, mask=inside, other=0) != 0)
    else:
        return inside


@triton.jit
def gather_rows(pointer, steps, batch, head, index, inside, MASKED: tl.constexpr, WIDTH: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Rows `index` of one head of a (B, H, S, WIDTH) with strides `steps` and 1, zero where not `inside`."""
    column = tl.arange(0, BLOCK)
    base = pointer + batch.to(tl.int64) * steps[0] + head.to(tl.int64) * steps[1]
    place = base + index.to(tl.int64)[:, None] * steps[2] + column[None, :]
    if MASKED:
        return tl.load(place, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif WIDTH < BLOCK:
        return tl.load(place, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(place)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The tiles of a call.

    Attributes:
        queries: Sq, at least 1.
        keys: Sk, at least Sq.
        causal: query i sees keys up to i + Sk - Sq.
        window: and the last `window` of these alone; None sees all.
        geometry: sizes.

    Raises:
        ValueError: the kernels cannot run these sizes.
    """

    queries: int
    keys: int
    causal: bool
    window: int | None
    geometry: Geometry

    def __post_init__(self) -> None:
        g = self.geometry
        for name, least, most in (("tile", 16, 128), ("sub_means", 1, g.tile)):
            size = getattr(g, name)
            if not least <= size <= most or size & (size - 1):
                raise ValueError(f"the CUDA kernels take a {name} of a power of two, {least} to {most}; got {size}")
        if g.bundle % 64 or g.bundle < 64:
            raise ValueError(f"the CUDA kernels take bundles of a multiple of 64 keys; got {g.bundle}")
        if g.clusters > 16 or g.clusters & (g.clusters - 1):
            raise ValueError(f"the CUDA kernels take clusters of a power of two up to 16, or 0; got {g.clusters}")
        if g.run > 64 or g.run & (g.run - 1) or not 16 <= g.block <= 512 or g.block & (g.block - 1):
            raise ValueError(
                f"the CUDA kernels take runs and blocks of a power of two, up to 64 and from 16 to 512 keys; "
                f"got {g.run} and {g.block}"
            )
        if self.keys > UNLISTED.value * g.bundle:
            raise ValueError(
                f"at most {UNLISTED.value} bundles fit the page table; got {self.keys} keys in bundles of {g.bundle}: "
                "choose a larger bundle"
            )

    @property
    def first(self) -> int:
        """Absolute number of the first tile."""
        return (self.keys - self.queries) // self.geometry.tile

    @property
    def count(self) -> int:
        """Number of tiles, the first and last of which may be short."""
        return triton.cdiv(self.keys, self.geometry.tile) - self.first

    def prefix(self, tile: int) -> tuple[int, int]:
        """The keys [low, high) that tile `tile`, counted from `first`, ranks; low = high if it ranks none."""
        unit = self.geometry.block
        begin, low = (self.first + tile) * self.geometry.tile, self.geometry.sink
        if self.window is not None:
            end = min(begin + self.geometry.tile, self.keys)
            low = max(low, triton.cdiv(max(end - self.window, 0), unit) * unit)
        high = (begin if self.causal else self.keys) // unit * unit
        return low, max(low, high)

    def listed(self, ranked: int, density: fractions.Fraction) -> int:
        """Most runs that a tile may read of `ranked` keys: whole bundles."""
        most = triton.cdiv(ranked * density.numerator, density.denominator)
        return triton.cdiv(most, self.geometry.bundle) * self.geometry.bundle // self.geometry.run

    def arguments(self) -> dict[str, Any]:
        """What every kernel takes of this."""
        return {
            "queries": self.queries,
            "keys": self.keys,
            "window": self.window or 0,
            "sink": self.geometry.sink,
            "first_tile": self.first,
            "TILE": self.geometry.tile,
            "UNIT": self.geometry.block,
            "RUN": self.geometry.run,
            "CAUSAL": self.causal,
            "WINDOWED": self.window is not None,
        }


@dataclasses.dataclass(frozen=True)
class Padding:
    """Keys that may be seen, as the kernels read them.

    Attributes:
        allowed: uint8 (B, Sk), or None: all.
        before: int32 (B, Sk + 1), how many of the keys before each position may be seen, or None.
        runs: int32 (B, Sk // run + 1), the same of runs in which some key may be seen, or None.
        documents: which keys of packed documents the queries see of these, or None: all.
    """

    allowed: Tensor | None = None
    before: Tensor | None = None
    runs: Tensor | None = None
    documents: Documents | None = None

    @staticmethod
    def of(keys: Tensor | None, run: int, documents: Documents | None = None) -> Padding:
        """From bool (B, Sk)."""
        if keys is None:
            return Padding(documents=documents)
        some = keys[:, : keys.shape[1] // run * run].unflatten(1, (-1, run)).any(dim=2)
        before, runs = (torch.nn.functional.pad(x.cumsum(dim=1, dtype=torch.int32), (1, 0)) for x in (keys, some))
        return Padding(keys.contiguous().view(torch.uint8), before, runs, documents)

    def arguments(self) -> dict[str, Any]:
        """What every kernel takes of this."""
        documents = self.documents
        return {
            "allowed_ptr": self.allowed, "before_ptr": self.before, "runs_ptr": self.runs,
            "KEYS": self.allowed is not None, "PACKED": documents is not None,
            "documents_ptr": documents and documents.tiles, "query_documents_ptr": documents and documents.queries,
            "key_documents_ptr": documents and documents.keys,
        }  # fmt: skip


def steps_of(x: Tensor) -> tuple[int, int, int]:
    """Strides of an `aligned` (B, H, S, D) but for the last, which is 1."""
    return x.stride()[:3]  # type: ignore[return-value]
