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
        sub_means: parts of a tile whose mean queries rank the keys; divides `tile`.
        run: neighbouring keys that are ranked and read together, from a multiple of it on; divides `bundle` and
            `block`.
        block: positions whose keys are grouped together; a prefix is whole blocks.
        clusters: groups in a block; 0 drops the tail.
        rounds: Lloyd iterations that make the groups.
        limit: most nats that the spread of a group's keys may add to its score.
    """

    tile: int = 128
    sink: int = 256
    bundle: int = 512
    horizon: int = 8
    sub_means: int = 4
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
