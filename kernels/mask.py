"""Masks as predicates: evaluates a `MaskSpec`, and plans which tiles of a score matrix it touches.

On CUDA nothing here waits for the device: no value of a tensor is read by the host, and no shape
depends on one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from s2o_inductor.kernels.mask_language import integer, term
from s2o_inductor.mask_spec import MaskSpec

TILE_QUERIES = 128
TILE_KEYS = 64
# Folded into the "equal" values: they equal no value of the other side and differ from one another.
HIDDEN_KEY = torch.iinfo(torch.int64).min
HIDDEN_ROW = HIDDEN_KEY + 1
_LEAST = torch.iinfo(torch.int64).min
_MOST = torch.iinfo(torch.int64).max


def band(spec: MaskSpec, params: Sequence[int]) -> tuple[int | None, int | None]:
    """(lower, upper) of a spec as integers; None where it sets no limit."""
    lower = None if spec.lower is None else integer(spec.lower, params)
    upper = None if spec.upper is None else integer(spec.upper, params)
    return lower, upper


def evaluate(
    spec: MaskSpec,
    mask: Tensor | None,
    leaves: Sequence[Tensor],
    params: Sequence[int],
    batch: int,
    queries: int,
    keys: int,
    device: torch.device,
    rows: Tensor | None = None,
) -> Tensor:
    """The visible positions, materialised; for tests, verification and small sizes.

    Args:
        spec: the predicate.
        mask: the dense mask that goes with ``spec.dense``; of an additive one, -inf hides.
        leaves: L0, L1, ...: tensors of integers or booleans on `device`.
        params: p0, p1, ...
        batch: B.
        queries: Sq.
        keys: Sk.
        device: where the result goes.
        rows: int64 positions of the queries to evaluate, instead of all Sq; not with a dense mask.

    Returns:
        bool (B, Hm, Sq, Sk), with B replaced by 1 when the spec reads no tensor; Hm is 1, or the
        number of heads of a dense mask.

    Raises:
        ValueError: an expression is outside the language or reads a leaf out of range (on CPU).
    """
    b = torch.arange(batch, device=device)[:, None, None, None]
    q = (torch.arange(queries, device=device) if rows is None else rows)[:, None]
    k = torch.arange(keys, device=device)
    by_query, by_key = {"b": b, "q": q}, {"b": b, "k": k}
    lower, upper = band(spec, params)
    visible = torch.ones(1, 1, q.shape[0], keys, dtype=torch.bool, device=device)
    if lower is not None:
        visible = visible & (k - q >= lower)
    if upper is not None:
        visible = visible & (k - q <= upper)
    if spec.keys is not None:
        visible = visible & term(spec.keys, by_key, leaves, params, boolean=True)
    if spec.rows is not None:
        visible = visible & term(spec.rows, by_query, leaves, params, boolean=True)
    if spec.equal is not None:
        query_side, key_side = spec.equal
        equal = term(query_side, by_query, leaves, params, False) == term(key_side, by_key, leaves, params, False)
        visible = visible & equal
    if spec.at_most is not None:
        query_side, key_side = spec.at_most
        visible = visible & (
            term(key_side, by_key, leaves, params, False) <= term(query_side, by_query, leaves, params, False)
        )
    if mask is not None:
        visible = visible & (mask if mask.dtype == torch.bool else mask != float("-inf"))
    if spec.is_band:
        return visible
    return visible.expand(batch, *visible.shape[1:]).contiguous()


def documents(
    spec: MaskSpec,
    leaves: Sequence[Tensor],
    params: Sequence[int],
    batch: int,
    queries: int,
    keys: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The values that ``spec.equal`` compares, of queries and of keys, hidden ones too: int64 (B, Sq) and (B, Sk).

    Raises:
        ValueError: an expression is outside the language or reads a leaf out of range (on CPU).
    """
    assert spec.equal is not None
    b = torch.arange(batch, device=device)[:, None]
    values = []
    for text, name, length in ((spec.equal[0], "q", queries), (spec.equal[1], "k", keys)):
        value = term(text, {"b": b, name: torch.arange(length, device=device)}, leaves, params, boolean=False)
        values.append(value.expand(batch, length))
    return values[0], values[1]


def plan(
    mask: Tensor | None,
    leaves: Sequence[Tensor],
    params: Sequence[int],
    spec: MaskSpec,
    batch: int,
    queries: int,
    keys: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `s2o::attention_mask`: what a kernel reads instead of the mask.

    A position (b, q, k) is visible exactly when ``lower <= k - q <= upper``,
    ``query_terms[b, 0, q] == key_terms[b, 0, k]``, ``key_terms[b, 1, k] <= query_terms[b, 1, q]``
    and the dense mask, where there is one, says so.

    Time and memory grow with S plus the number of tiles; a dense boolean mask is read once.

    Returns:
        query_terms: int64 (B, 2, Sq): "equal" value, "at_most" bound; a hidden row has `HIDDEN_ROW`.
        key_terms: int64 (B, 2, Sk), likewise; a hidden key has `HIDDEN_KEY`.
        row_tiles: int32 (B, Hm, ceil(Sq / 128), 4): per query tile, in key tiles of 64, the range
            (first, first_full, end_full, end). Outside [first, end) all is hidden; inside
            [first_full, end_full), the longest such run, all is visible and no key lies beyond Sk.
        key_tiles: int32 (B, Hm, ceil(Sk / 64), 4): per key tile, the same over query tiles of 128.

    Raises:
        ValueError: an expression is outside the language or reads a leaf out of range (on CPU).
    """
    query_terms, row_hidden = _side(spec, 0, leaves, params, batch, queries, device)
    key_terms, key_hidden = _side(spec, 1, leaves, params, batch, keys, device)
    if 0 in (batch, queries, keys):
        heads = 1 if mask is None else mask.shape[1]
        row_tiles = torch.zeros(batch, heads, -(-queries // TILE_QUERIES), 4, dtype=torch.int32, device=device)
        key_tiles = torch.zeros(batch, heads, -(-keys // TILE_KEYS), 4, dtype=torch.int32, device=device)
        return query_terms, key_terms, row_tiles, key_tiles
    lower, upper = band(spec, params)
    some, full = _structured_tiles(query_terms, row_hidden, key_terms, key_hidden, lower, upper)
    if mask is not None and mask.dtype == torch.bool:
        any_visible, all_visible = _dense_tiles(mask, queries, keys)
        some, full = some[:, None] & any_visible, full[:, None] & all_visible
    else:
        some, full = some[:, None], full[:, None]
        if mask is not None:
            full = torch.zeros_like(full)
            some, full = (x.expand(-1, mask.shape[1], -1, -1) for x in (some, full))
    return (
        query_terms,
        key_terms,
        _ranges(some, full),
        _ranges(some.transpose(-1, -2), full.transpose(-1, -2)),
    )


def _side(
    spec: MaskSpec, side: int, leaves: Sequence[Tensor], params: Sequence[int], batch: int, length: int,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The terms of queries (side 0) or keys (side 1), int64 (B, 2, S), and the hidden ones, bool (B, S)."""
    names = {"b": torch.arange(batch, device=device)[:, None], "qk"[side]: torch.arange(length, device=device)}
    terms = torch.zeros(batch, 2, length, dtype=torch.int64, device=device)
    for row, pair in enumerate((spec.equal, spec.at_most)):
        if pair is not None:
            terms[:, row] = term(pair[side], names, leaves, params, boolean=False)
    text = spec.rows if side == 0 else spec.keys
    if text is None:
        return terms, None
    hidden = (~term(text, names, leaves, params, boolean=True)).expand(batch, length)
    terms[:, 0].masked_fill_(hidden, HIDDEN_ROW if side == 0 else HIDDEN_KEY)
    return terms, hidden


def _tile_extrema(terms: Tensor, hidden: Tensor | None, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Least and greatest term of the visible entries of each tile, (B, 2, T), and whether none is hidden, (B, T).

    A tile with nothing visible has an empty interval: least `_MOST`, greatest `_LEAST`.
    """
    batch, _, length = terms.shape
    tiles = -(-length // tile)
    padding = tiles * tile - length
    if hidden is None:
        low = high = terms
        clear = torch.ones(batch, tiles, dtype=torch.bool, device=terms.device)
    else:
        low = terms.masked_fill(hidden[:, None], _MOST)
        high = terms.masked_fill(hidden[:, None], _LEAST)
        clear = ~torch.nn.functional.pad(hidden, (0, padding)).unflatten(1, (tiles, tile)).any(dim=-1)
    low = _pad(low, padding, _MOST).unflatten(2, (tiles, tile)).amin(dim=-1)
    high = _pad(high, padding, _LEAST).unflatten(2, (tiles, tile)).amax(dim=-1)
    return low, high, clear


def _pad(x: Tensor, padding: int, value: int) -> Tensor:
    """`torch.nn.functional.pad` takes its value through a float, which rounds the extremes of int64."""
    return torch.cat([x, x.new_full((*x.shape[:-1], padding), value)], dim=-1) if padding else x


def _structured_tiles(
    query_terms: Tensor, row_hidden: Tensor | None, key_terms: Tensor, key_hidden: Tensor | None,
    lower: int | None, upper: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which tiles may hold a visible position, and which hold no other: bool (B, query tiles, key tiles)."""
    queries, keys, device = query_terms.shape[-1], key_terms.shape[-1], query_terms.device
    q_low, q_high, q_clear = _tile_extrema(query_terms, row_hidden, TILE_QUERIES)
    k_low, k_high, k_clear = _tile_extrema(key_terms, key_hidden, TILE_KEYS)
    equal_low, bound_low = (x[:, :, None] for x in q_low.unbind(1))
    equal_high, bound_high = (x[:, :, None] for x in q_high.unbind(1))
    key_low, value_low = (x[:, None] for x in k_low.unbind(1))
    key_high, value_high = (x[:, None] for x in k_high.unbind(1))
    some = (equal_low <= key_high) & (key_low <= equal_high) & (value_low <= bound_high)
    one_value = (equal_low == equal_high) & (key_low == key_high) & (equal_low == key_low)
    full = one_value & (value_high <= bound_low) & q_clear[:, :, None] & k_clear[:, None]

    first_query = torch.arange(0, queries, TILE_QUERIES, device=device)[:, None]
    last_query = (first_query + TILE_QUERIES - 1).clamp(max=queries - 1)
    first_key = torch.arange(0, keys, TILE_KEYS, device=device)
    last_key = (first_key + TILE_KEYS - 1).clamp(max=keys - 1)
    full = full & (first_key + TILE_KEYS <= keys)
    if lower is not None:
        some = some & (last_key - first_query >= lower)
        full = full & (first_key - last_query >= lower)
    if upper is not None:
        some = some & (first_key - last_query <= upper)
        full = full & (last_key - first_query <= upper)
    return some, full


def _dense_tiles(mask: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """Any and all of each tile of a boolean mask, (B, Hm, query tiles, key tiles), without a copy of it.

    Queries are reduced first, and as bytes: extrema along rows are vectorised over keys, 50 times
    faster on CPU than `torch.any` within a row.
    """

    def reduce(x: Tensor, dim: int, length: int, tile: int, extremum: Callable[..., Tensor]) -> Tensor:
        if x.shape[dim] == 1:  # one entry for all positions
            return x.expand(*(-(-length // tile) if i == dim else -1 for i in range(4)))
        whole = length // tile * tile
        parts = []
        if whole:
            parts.append(extremum(x.narrow(dim, 0, whole).unflatten(dim, (whole // tile, tile)), dim=dim + 1))
        if whole < length:
            parts.append(extremum(x.narrow(dim, whole, length - whole), dim=dim, keepdim=True))
        return torch.cat(parts, dim)

    def tiles(extremum: Callable[..., Tensor]) -> Tensor:
        rows = reduce(mask.view(torch.uint8), 2, queries, TILE_QUERIES, extremum)
        return reduce(rows, 3, keys, TILE_KEYS, extremum) != 0

    return tiles(torch.amax), tiles(torch.amin)


def _ranges(some: Tensor, full: Tensor) -> Tensor:
    """int32 (..., rows, 4) of (first, first_full, end_full, end) over the last dimension of two tables."""
    columns = some.shape[-1]
    at = torch.arange(columns, device=some.device, dtype=torch.int32)
    found = some.any(dim=-1)
    first = torch.where(some, at, columns).amin(dim=-1).where(found, 0)
    end = torch.where(some, at + 1, 0).amax(dim=-1)
    # Length of the run of full tiles that ends at each column: distance to the last one that is not.
    broken = torch.where(full, -1, at).cummax(dim=-1).values
    run = at - broken
    length, last = run.max(dim=-1)
    end_full = torch.where(length > 0, last + 1, first)
    first_full = torch.where(length > 0, end_full - length, first)
    return torch.stack([first, first_full, end_full, end], dim=-1).to(torch.int32)
