"""When, how far and in what sizes attention is approximated: what the sparse op and its kernels share.

Like a `MaskSpec`, a `SparsePolicy` is text so that it can be an operator's argument and part of a cache key. Nothing
here holds a tensor or imports torch.
"""

from __future__ import annotations

import dataclasses
import functools
import json

# Least number of keys from which sparse attention pays, per device type; BENCHMARKS.md has the measurements.
# A device that is missing stays dense unless the user sets `min_seq`: nothing was measured there.
MIN_SEQ = {"cpu": 8192}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes that fix which keys a tile reads densely and which it ranks.

    A tile holds the queries at absolute positions [t * tile, (t + 1) * tile), where query i of Sq stands at
    i + Sk - Sq: tiles, and so results, do not depend on how a prefill is cut into chunks of whole tiles.

    Attributes:
        tile: query positions that share one order and one stop; a multiple of `block` or a divisor of it.
        sink: keys at the start that every tile reads densely; a multiple of `block`.
        bundle: keys read between two stop tests.
        horizon: bundles that the stop rule takes to be left at least. A row's estimate is at most r / (1 + r) with r
            bundles left: without this a short prefix would stop for being short, whatever it holds.
        sub_means: clusters of a tile's queries, like ones together, whose means rank the keys; divides `tile`.
        run: neighbouring keys that are ranked and read together, from a multiple of it on; divides `bundle` and
            `block`.
        block: positions whose keys are grouped together; a prefix is whole blocks.
        clusters: groups in a block; 0 drops the tail.
        rounds: Lloyd iterations that make the groups, and the clusters of queries.
        limit: most nats that the spread of a group's keys may add to its score.
    """

    tile: int = 128
    sink: int = 256
    bundle: int = 512
    horizon: int = 8
    sub_means: int = 8
    run: int = 8
    block: int = 256
    clusters: int = 4
    rounds: int = 4
    limit: float = 3.0

    def __post_init__(self) -> None:
        for name in ("tile", "bundle", "horizon", "sub_means", "run", "block", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.tile % self.sub_means:
            raise ValueError(f"sub_means must divide the tile of {self.tile} queries; got {self.sub_means}")
        if self.bundle % self.run or self.block % self.run:
            raise ValueError(f"run must divide bundle and block; got {self.run}, {self.bundle} and {self.block}")
        if self.sink < 0 or self.sink % self.block or (self.tile % self.block and self.block % self.tile):
            raise ValueError(
                f"sink must be a multiple of block, and tile too or the other way round; "
                f"got {self.sink}, {self.tile} and {self.block}"
            )
        if not 0 <= self.clusters <= self.block or self.limit < 0:
            raise ValueError(
                f"clusters must be from 0 to block, limit at least 0; "
                f"got {self.clusters}, {self.block} and {self.limit}"
            )


# Sizes per device type. Eight groups of 512 keys cost a tile's tail what four of 256 do, and err less (BENCHMARKS.md,
# "Cheaper tails"), but a tile reads 128 keys more densely, those behind its whole blocks. On CUDA, where sparse
# attention pays from tens of thousands of keys on, that is little; on a CPU it pays from 8,192. There sinks stay dense.
# Where they would be 512, they are ranked like any key: every tile finds them, and reads less for the same error.
GEOMETRIES = {"cpu": Geometry(), "cuda": Geometry(sink=0, block=512, clusters=8)}


def most_means(float32: bool, width: int) -> int:
    """Mean queries of all query heads of a key/value head that the CUDA kernels take: columns of one product.

    Wide heads in float32 leave room for half as many.
    """
    return 64 if float32 and width > 128 else 128


@functools.lru_cache(maxsize=64)
def geometry_of(device: str, group: int, most: int) -> Geometry | None:
    """Sizes for `group` query heads of a key/value head on a device type, None where there is no kernel.

    On CUDA many heads have fewer mean queries each, so that they are at most `most` together: see `most_means`.
    """
    found = GEOMETRIES.get(device)
    if found is None or device != "cuda":
        return found
    sub_means = found.sub_means
    while sub_means > 1 and sub_means * group > most:
        sub_means //= 2
    return dataclasses.replace(found, sub_means=sub_means)


KEY_TILE = 64  # keys that a kernel multiplies at a time, for counts of whole tiles


@dataclasses.dataclass(frozen=True)
class TileKeys:
    """Keys of one tile of queries; the first two in whole tiles of `KEY_TILE` keys, as products are made of these.

    Attributes:
        exact: multiplied by a kernel that skips nothing but hidden tiles.
        dense: multiplied in place by sparse attention.
        ranked: its prefix.
    """

    exact: int
    dense: int
    ranked: int


@dataclasses.dataclass(frozen=True)
class Extent:
    """Sizes of one call of sparse attention. Keys that padding hides count as the others do.

    Attributes:
        queries: Sq.
        keys: those that some query sees, at least Sq; query i stands at i + keys - queries.
        causal: a query sees keys up to its own position.
        window: and the last so many of these alone; None is all.
    """

    queries: int
    keys: int
    causal: bool
    window: int | None

    @classmethod
    def of_band(cls, queries: int, keys: int, lower: int | None, upper: int | None) -> Extent:
        """Of a call whose query i sees the keys i + lower to i + upper; None is unbounded, with a lower bound only
        under an upper one."""
        if upper is None:
            return cls(queries, keys, False, None)
        return cls(queries, min(keys, queries + upper), True, None if lower is None else upper - lower + 1)

    def densities(self, bundles: list[int], geometry: Geometry) -> tuple[float, float]:
        """What one head does, as shares of what exact attention would do: (products of whole tiles, all work).

        Products count whole tiles, hidden pairs in them too. Work adds ranking and the tail in the same unit: a pair is
        one product with a key and one with a value of equal width. Mean queries meet keys alone, half a pair; they
        and all rows meet the groups' keys and variances, and rows the groups' values. In each round that makes mean
        queries, rows meet the means and are added up to new ones, a pair. Grouping keys, once per key/value head, is
        under a thousandth from 32,768 tokens on and left out, as is what sorting and gathering move.

        Args:
            bundles: read by each tile.
            geometry: sizes.
        """
        exact = multiplied = extra = 0.0
        for keys, count in zip(keys_of_tiles(self, geometry), bundles, strict=True):
            groups = keys.ranked / geometry.block * geometry.clusters
            exact += keys.exact
            multiplied += keys.dense + _whole(min(count * geometry.bundle, keys.ranked))
            extra += geometry.sub_means / geometry.tile * (keys.ranked / 2 + groups) + 1.5 * groups
            extra += geometry.sub_means * geometry.rounds if keys.ranked else 0
        return multiplied / max(exact, 1), (multiplied + extra) / max(exact, 1)


@functools.lru_cache(maxsize=64)
def keys_of_tiles(extent: Extent, geometry: Geometry) -> tuple[TileKeys, ...]:
    """What every tile multiplies and ranks, by the rules of `kernels/reference_sparse.py`."""
    found, unit = [], geometry.block
    first_query = extent.keys - extent.queries
    for begin in range(first_query // geometry.tile * geometry.tile, extent.keys, geometry.tile):
        start, end = max(begin, first_query), min(begin + geometry.tile, extent.keys)
        first, low = 0, geometry.sink
        if extent.window is not None:
            first = max(start - extent.window + 1, 0)
            low = max(low, -(-max(end - extent.window, 0) // unit) * unit)
        last = end if extent.causal else extent.keys
        high = max(low, (begin if extent.causal else extent.keys) // unit * unit)
        parts = [(first, last)] if low == high else [(first, low), (max(high, first), last)]
        exact = _whole(last) - first // KEY_TILE * KEY_TILE
        found.append(TileKeys(exact, sum(_whole(max(b - a, 0)) for a, b in parts), high - low))
    return tuple(found)


def _whole(keys: int) -> int:
    return -(-keys // KEY_TILE) * KEY_TILE


@dataclasses.dataclass(frozen=True)
class SparsePolicy:
    """What one call of `s2o::sparse_attention` may do.

    Attributes:
        budgets: estimated share of its softmax mass that the worst row of a tile may leave unread (groups of
            like keys stand in for it): one for all query heads, or one per query head. 0 is exact.
        max_density: largest share of a prefix that a tile reads.
        min_seq: fewer keys than this are computed exactly.
        audit: rows per head whose exact result is computed as well, for the error in the report; 0 is none.
        candidates: budgets to try: the call then gives the exact result and records what each of them would have
            cost and changed (see `s2o_inductor.calibrate`).
    """

    budgets: tuple[float, ...]
    max_density: float = 1.0
    min_seq: int = 0
    audit: int = 0
    candidates: tuple[float, ...] = ()

    def text(self) -> str:
        """The policy as a canonical string."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> SparsePolicy:
    """The policy that `SparsePolicy.text` wrote.

    Raises:
        ValueError: the text is not such a policy.
    """
    try:
        fields = json.loads(text)
        for name in ("budgets", "candidates"):
            fields[name] = tuple(float(value) for value in fields[name])
        return SparsePolicy(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a sparse policy: {text!r} ({error}); write it with SparsePolicy.text()") from error
