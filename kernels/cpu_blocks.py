"""Blocks of query rows for the CPU path: which keys each block sees, and the mask where it does not see all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2o_inductor.kernels.mask import TILE_KEYS, TILE_QUERIES

if TYPE_CHECKING:
    from s2o_inductor.kernels.dense import Call

HIDDEN = float("-inf")
# Rows of a block. Measured on float32 and bfloat16, D = 64, causal and windows of 512 keys: 192 to 256
# rows are best; shorter ones pay for calls, longer ones for hidden keys. Narrow bands want less.
_ROWS = 256
_NARROW_BAND = 256
_SMALL = 128
# Bytes of scores that one block of the unfused path may hold.
_MATH_BYTES = 1 << 27


@dataclasses.dataclass(frozen=True)
class Block:
    """Batch entries, query rows and the keys that these may see; `full` of them are seen by all rows."""

    index: int
    batch: slice
    rows: slice
    keys: slice
    full: slice

    @property
    def is_full(self) -> bool:
        return self.full == self.keys

    @property
    def is_hidden(self) -> bool:
        return self.keys.start >= self.keys.stop


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Data type of scores, sums and log-sum-exp."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# First key seen, first key of the run that all rows see, end of that run, end: as in a plan, but in keys.
Span = tuple[int, int, int, int]
_NOTHING: Span = (0, 0, 0, 0)


def _block_rows(call: Call, queries: int) -> int:
    """Query rows of a block, a multiple of `TILE_QUERIES` unless one block takes all."""
    if call.route == "cpu-math":
        return TILE_QUERIES
    one_row_for_all = call.lower is None and call.upper is None
    one_row_for_all &= not any((call.spec.rows, call.spec.equal, call.spec.at_most))
    if one_row_for_all and (call.mask is None or call.mask.shape[2] == 1):
        return queries
    if call.lower is not None and call.upper is not None and call.upper - call.lower < _NARROW_BAND:
        return TILE_QUERIES
    return _ROWS


def blocks(call: Call, batch: int, heads: int, queries: int, keys: int) -> Iterator[Block]:
    """All blocks; their order and number, on which dropout relies, depend on the call alone."""
    height = min(_block_rows(call, queries), queries)
    # Where everything is small, ranges save less than reading them costs; a GPU would have to be waited for.
    unread = max(queries, keys) <= _SMALL or (bool(call.plan) and call.plan[2].device.type != "cpu")
    table = None if unread else _plan_spans(call, height, queries, keys)
    index = 0
    for number, start in enumerate(range(0, queries, height)):
        rows = slice(start, min(start + height, queries))
        spans = [_band_span(call, rows, keys)]
        if call.plan and unread:
            first, _, _, end = spans[0]
            spans = [(first, first, first, end)]
        if table is not None:
            spans = [_tighten(spans[0], entry) for entry in table[number]]
        limit = _MATH_BYTES // (4 * heads * height) if call.route == "cpu-math" else None
        for entries, (first, first_full, end_full, end) in _group(spans, batch, limit):
            yield Block(index, entries, rows, slice(first, end), slice(first_full, end_full))
            index += 1


def _band_span(call: Call, rows: slice, keys: int) -> Span:
    low, high = call.lower, call.upper
    return _tidy(
        0 if low is None else rows.start + low,
        0 if low is None else rows.stop - 1 + low,
        keys if high is None else rows.start + high + 1,
        keys if high is None else rows.stop + high,
        keys,
    )


def _tighten(a: Span, b: Span) -> Span:
    return _tidy(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]), max(a[3], b[3]))


def _tidy(first: int, first_full: int, end_full: int, end: int, keys: int) -> Span:
    """The span within [0, keys), with empty parts in one form."""
    first, end = max(first, 0), min(end, keys)
    if first >= end:
        return _NOTHING
    first_full, end_full = max(first_full, first), min(end_full, end)
    return (first, first_full, end_full, end) if first_full < end_full else (first, first, first, end)


def _plan_spans(call: Call, height: int, queries: int, keys: int) -> list[list[Span]] | None:
    """For each block of rows and each batch entry, the span that holds for all heads and tiles of the block."""
    if not call.plan:
        return None
    first, first_full, end_full, end = (x.to(torch.int64) * TILE_KEYS for x in call.plan[2].unbind(-1))
    first = first.where(end > first, keys)  # a tile that sees nothing widens no range
    per_block = -(-height // TILE_QUERIES)
    missing = -(-queries // height) * per_block - first.shape[2]

    def reduce(x: Tensor, neutral: int, largest: bool) -> Tensor:
        x = pad(x.amax(dim=1) if largest else x.amin(dim=1), (0, missing), value=neutral)
        x = x.unflatten(1, (-1, per_block))
        return (x.amax(dim=2) if largest else x.amin(dim=2)).clamp(0, keys)

    edges = (
        reduce(first, keys, largest=False),
        reduce(first_full, 0, largest=True),
        reduce(end_full, keys, largest=False),
        reduce(end, 0, largest=True),
    )
    table = torch.stack(edges, dim=-1).transpose(0, 1).tolist()
    return [[_tidy(a, b, c, d, keys) for a, b, c, d in row] for row in table]


def _group(spans: list[Span], batch: int, limit: int | None) -> list[tuple[slice, Span]]:
    """Batch entries together where the keys that some need cost the others little, else each by itself.

    Args:
        spans: one for all entries, or one per entry.
        batch: number of entries.
        limit: number of (entry, key) pairs that fit in memory.
    """
    seen = [span for span in spans if span != _NOTHING]
    if not seen:
        return [(slice(0, batch), _NOTHING)]
    union = min(s[0] for s in seen), max(s[1] for s in seen), min(s[2] for s in seen), max(s[3] for s in seen)
    if len(seen) < len(spans):
        union = (union[0], 0, 0, union[3])
    pairs = batch * (union[3] - union[0])
    needed = sum(s[3] - s[0] for s in spans) if len(spans) > 1 else pairs
    if needed >= 0.85 * pairs and (limit is None or pairs <= limit):
        return [(slice(0, batch), _tidy(*union, union[3]))]
    return [(slice(b, b + 1), spans[b % len(spans)]) for b in range(batch)]


class Masks:
    """Additive masks of blocks, for one call: -inf hides."""

    def __init__(self, call: Call, dtype: torch.dtype, device: torch.device) -> None:
        self.call = call
        self.dtype = dtype
        self.device = device
        self.bias = call.mask if call.mask is not None and call.mask.dtype != torch.bool else None
        if self.bias is not None and self.bias.dtype != dtype:
            # The fused kernel reads a mask in its own type or, below float64, in float32.
            self.bias = self.bias.to(accumulate_dtype(dtype))
        self.bands: dict[tuple[int, ...], Tensor] = {}

    def additive(self, block: Block) -> Tensor | None:
        """(1 or Bb, 1 or Hq, 1 or R, 1 or N), or None where the block sees all its keys."""
        if block.is_full:
            return None
        if self.call.mask is not None or self.call.has_terms:
            return self._build(block)
        # Blocks of a band differ only in where they stand to the diagonal.
        edges = (block.rows.stop, block.keys.start, block.keys.stop, block.full.start, block.full.stop)
        key = tuple(edge - block.rows.start for edge in edges)
        if key not in self.bands:
            self.bands = {key: self._build(block)}
        return self.bands[key]

    def _build(self, block: Block) -> Tensor:
        start, stop = block.keys.start, block.keys.stop
        borders = [block.keys]
        if block.full.start < block.full.stop:
            borders = [slice(start, block.full.start), slice(block.full.stop, stop)]
        parts = [
            (slice(keys.start - start, keys.stop - start), hidden)
            for keys in borders
            if keys.start < keys.stop
            for hidden in self._hidden(block.batch, block.rows, keys)
        ]
        shape = tuple(max(sizes) for sizes in zip((1, 1, 1), *(hidden.shape[:3] for _, hidden in parts), strict=True))
        if self.bias is None:
            additive = torch.zeros(*shape, stop - start, dtype=self.dtype, device=self.device)
        else:
            additive = _cut(self.bias, block.batch, block.rows, block.keys)
            if parts:
                shape = tuple(map(max, shape, additive.shape[:3]))
                additive = additive.expand(*shape, stop - start).clone(memory_format=torch.contiguous_format)
        for where, hidden in parts:
            additive[..., where].masked_fill_(hidden, HIDDEN)
        # Older kernels take the entries of a row to be adjacent; newer ones copy a mask where they are not.
        return additive if additive.stride(3) in (0, 1) or additive.shape[3] == 1 else additive.contiguous()

    def _hidden(self, entries: slice, rows: slice, keys: slice) -> Iterator[Tensor]:
        """Tensors that broadcast to (Bb, Hm, R, N): a position is hidden where one of them says so."""
        call, spec = self.call, self.call.spec
        if call.lower is not None or call.upper is not None:
            offset = torch.arange(keys.start, keys.stop, device=self.device)
            offset = offset - torch.arange(rows.start, rows.stop, device=self.device)[:, None]
            if call.lower is not None and keys.start - (rows.stop - 1) < call.lower:
                yield (offset < call.lower)[None, None]
            if call.upper is not None and keys.stop - 1 - rows.start > call.upper:
                yield (offset > call.upper)[None, None]
        if call.has_terms:
            query_terms = call.plan[0][entries, :, None, rows, None]
            key_terms = call.plan[1][entries, :, None, None, keys]
            if spec.equal is not None:
                yield query_terms[:, 0] != key_terms[:, 0]
            else:  # all values are 0 but those of hidden rows and keys
                if spec.rows is not None:
                    yield query_terms[:, 0] != 0
                if spec.keys is not None:
                    yield key_terms[:, 0] != 0
            if spec.at_most is not None:
                yield key_terms[:, 1] > query_terms[:, 1]
        if call.mask is not None and self.bias is None:
            yield ~_cut(call.mask, entries, rows, keys)


def _cut(mask: Tensor, entries: slice, rows: slice, keys: slice) -> Tensor:
    """The part of a dense mask that a block needs; dimensions of size 1 stay."""
    wanted = (entries, slice(None), rows, keys)
    return mask[tuple(slice(None) if size == 1 else part for size, part in zip(mask.shape, wanted, strict=True))]
