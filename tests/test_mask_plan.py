"""The mask language, and plans: what they say of every tile is checked against the evaluated mask."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2o_inductor.kernels import mask as masks
from s2o_inductor.kernels.mask import HIDDEN_KEY, HIDDEN_ROW, TILE_KEYS, TILE_QUERIES
from s2o_inductor.mask_spec import MaskSpec

CPU = torch.device("cpu")
LENGTHS = st.sampled_from([1, 2, 17, 63, 64, 65, 127, 128, 129, 192, 257, 300])


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask with its tensors and sizes."""

    spec: MaskSpec
    mask: Tensor | None
    leaves: list[Tensor]
    params: list[int]
    batch: int
    queries: int
    keys: int

    def plan(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return masks.plan(
            self.mask, self.leaves, self.params, self.spec, self.batch, self.queries, self.keys, CPU
        )  # fmt: skip

    def visible(self) -> Tensor:
        """Bool (B, Hm, Sq, Sk)."""
        visible = masks.evaluate(
            self.spec, self.mask, self.leaves, self.params, self.batch, self.queries, self.keys, CPU
        )
        return visible.expand(self.batch, -1, -1, -1)


@st.composite
def cases(draw: st.DrawFn, dense: bool = True) -> Case:
    """Random conjunctions of all mask terms, with leaves that make whole tiles visible and hidden often."""
    batch, queries, keys = draw(st.integers(1, 3)), draw(LENGTHS), draw(LENGTHS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < share

    def runs(*shape: int) -> Tensor:
        """Documents: numbers that grow by one at a few random places."""
        return chance(draw(st.sampled_from([0.0, 0.004, 0.02, 0.5])), *shape).cumsum(-1)

    padding = torch.arange(keys) >= torch.randint(0, keys + 1, (batch, 1), generator=generator)
    if draw(st.booleans()):
        padding = ~padding
    key_documents = runs(batch, keys)
    first = torch.randint(0, max(1, keys - queries + 1), (batch, 1), generator=generator)
    query_documents = key_documents.gather(1, (first + torch.arange(queries)).clamp(max=keys - 1))
    positions = torch.randint(-1, keys + 1, (queries,), generator=generator).sort().values
    leaves = [padding, chance(0.9, batch, queries), query_documents, key_documents, positions.to(torch.int32)]
    params = [keys - queries, draw(st.sampled_from([1, 5, 64, 100, 200]))]
    band = draw(st.sampled_from(["none", "causal", "offset", "window", "behind", "both", "never"]))
    lower, upper = {
        "none": (None, None),
        "causal": (None, "0"),
        "offset": (None, "p0"),
        "window": ("p0 - p1 + 1", "p0"),
        "behind": ("-p1", None),
        "both": ("-(p1 // 2)", "max(p0, p1 // 2)"),
        "never": ("p0 + 1", "p0"),
    }[band]
    some = draw(st.sets(st.sampled_from(["keys", "rows", "equal", "chunks", "at_most", "reverse"]), max_size=3))
    spec = MaskSpec(
        lower=lower,
        upper=upper,
        keys="L0[b, k]" if "keys" in some else None,
        rows="L1[b, q]" if "rows" in some else None,
        equal=("L2[b, q]", "L3[b, k]") if "equal" in some else ("q // p1", "k // p1") if "chunks" in some else None,
        at_most=("L4[q]", "k") if "at_most" in some else ("-q", "p1 - k") if "reverse" in some else None,
        dense=dense and draw(st.booleans()),
    )
    mask = None
    if spec.dense:
        shape = tuple(draw(st.sampled_from([1, n])) for n in (batch, 3, queries, keys))
        mask = chance(draw(st.sampled_from([0.0, 0.5, 0.999, 1.0])), *shape)
        if draw(st.booleans()):
            mask = mask | (torch.arange(shape[3]) < shape[3] // 2) & (torch.arange(shape[2])[:, None] > 130)
        if draw(st.booleans()):  # stride 0, as masks come out of expand()
            mask = mask.expand(batch, shape[1], queries, keys)
    return Case(spec, mask, leaves, params, batch, queries, keys)


def check_plan(case: Case) -> None:
    """Every promise of `masks.plan` about its four tensors."""
    query_terms, key_terms, row_tiles, key_tiles = case.plan()
    visible = case.visible()
    heads = 1 if case.mask is None else case.mask.shape[1]
    tile_rows, tile_columns = -(-case.queries // TILE_QUERIES), -(-case.keys // TILE_KEYS)
    assert (query_terms.shape, query_terms.dtype) == ((case.batch, 2, case.queries), torch.int64)
    assert (key_terms.shape, key_terms.dtype) == ((case.batch, 2, case.keys), torch.int64)
    assert (row_tiles.shape, row_tiles.dtype) == ((case.batch, heads, tile_rows, 4), torch.int32)
    assert (key_tiles.shape, key_tiles.dtype) == ((case.batch, heads, tile_columns, 4), torch.int32)
    assert all(x.is_contiguous() for x in (query_terms, key_terms, row_tiles, key_tiles))

    # Terms, band and dense mask together are the mask.
    lower, upper = masks.band(case.spec, case.params)
    offset = torch.arange(case.keys) - torch.arange(case.queries)[:, None]
    rebuilt = (query_terms[:, 0, :, None] == key_terms[:, 0, None]) & (
        key_terms[:, 1, None] <= query_terms[:, 1, :, None]
    )
    rebuilt = rebuilt[:, None]
    rebuilt = rebuilt if lower is None else rebuilt & (offset >= lower)
    rebuilt = rebuilt if upper is None else rebuilt & (offset <= upper)
    if case.mask is not None and case.mask.dtype == torch.bool:
        rebuilt = rebuilt & case.mask
    assert torch.equal(rebuilt.expand_as(visible), visible)

    for b in range(case.batch):
        for h in range(visible.shape[1]):
            tiles = [
                [
                    visible[b, h, i : i + TILE_QUERIES, j : j + TILE_KEYS]
                    for j in range(0, case.keys, TILE_KEYS)
                ]
                for i in range(0, case.queries, TILE_QUERIES)
            ]  # fmt: skip
            for i, row in enumerate(tiles):
                check_ranges(row_tiles[b, h, i].tolist(), row)
            for j in range(tile_columns):
                check_ranges(key_tiles[b, h, j].tolist(), [row[j] for row in tiles])


def check_ranges(ranges: list[int], tiles: list[Tensor]) -> None:
    first, first_full, end_full, end = ranges
    assert 0 <= first <= first_full <= end_full <= end <= len(tiles)
    for at, tile in enumerate(tiles):
        if not first <= at < end:
            assert not tile.any(), f"tile {at} outside [{first}, {end}) has visible positions"
        if first_full <= at < end_full:
            assert tile.all(), f"tile {at} inside [{first_full}, {end_full}) has hidden positions"
            assert tile.shape[1] == TILE_KEYS, f"tile {at} reaches past the last key and is called full"


@settings(max_examples=300)
@given(cases())
@example(Case(MaskSpec(keys="L0[b, k]"), None, [torch.zeros(1, 300, dtype=torch.bool)], [], 1, 300, 300))
def test_plan_agrees_with_the_mask_everywhere(case: Case) -> None:
    check_plan(case)


def padding(keys: int, lengths: list[int]) -> Tensor:
    """Bool (B, keys), True for the first `lengths[b]` keys of entry b."""
    return torch.arange(keys).expand(len(lengths), keys) < torch.tensor(lengths)[:, None]


def test_plan_of_a_band_is_as_tight_as_tiles_allow() -> None:
    _, _, row_tiles, _ = Case(MaskSpec(lower="-199", upper="0"), None, [], [], 1, 512, 512).plan()
    assert row_tiles[0, 0].tolist() == [[0, 0, 0, 2], [0, 1, 2, 4], [0, 3, 4, 6], [2, 5, 6, 8]]


def test_plan_of_padding_ends_where_the_padding_begins() -> None:
    case = Case(MaskSpec(upper="0", keys="L0[b, k]"), None, [padding(512, [200])], [], 1, 512, 512)
    _, _, row_tiles, key_tiles = case.plan()
    assert row_tiles[0, 0].tolist() == [[0, 0, 0, 2], [0, 0, 2, 4], [0, 0, 3, 4], [0, 0, 3, 4]]
    seen = [[0, 1, 4, 4], [0, 1, 4, 4], [1, 2, 4, 4], [1, 1, 1, 4]]
    assert key_tiles[0, 0].tolist() == seen + [[0, 0, 0, 0]] * 4


def test_plan_of_documents_visits_no_other_document() -> None:
    documents = (torch.arange(512) // 128)[None]
    case = Case(MaskSpec(equal=("L0[b, q]", "L0[b, k]")), None, [documents], [], 1, 512, 512)
    _, _, row_tiles, key_tiles = case.plan()
    assert row_tiles[0, 0].tolist() == [[2 * i, 2 * i, 2 * i + 2, 2 * i + 2] for i in range(4)]
    assert key_tiles[0, 0].tolist() == [[j // 2, j // 2, j // 2 + 1, j // 2 + 1] for j in range(8)]


@given(st.integers(0, 2**16), st.sampled_from([0.2, 0.5, 0.9]))
def test_full_range_is_the_longest_run(seed: int, share: float) -> None:
    full = torch.rand(3, 9, generator=torch.Generator().manual_seed(seed)) < share
    mask = full.repeat_interleave(TILE_QUERIES, 0).repeat_interleave(TILE_KEYS, 1)[None, None]
    _, _, row_tiles, _ = Case(MaskSpec(dense=True), mask, [], [], 1, 3 * TILE_QUERIES, 9 * TILE_KEYS).plan()
    for row, (_, first_full, end_full, _) in zip(full.tolist(), row_tiles[0, 0].tolist(), strict=True):
        longest = max((b - a for a in range(9) for b in range(a, 10) if all(row[a:b])), default=0)
        assert end_full - first_full == longest


def test_additive_mask_makes_every_tile_partial() -> None:
    case = Case(MaskSpec(upper="0", dense=True), torch.zeros(1, 2, 256, 256), [], [], 1, 256, 256)
    check_plan(case)
    assert case.plan()[2][0].tolist() == [[[0, 0, 0, 2], [0, 0, 0, 4]]] * 2


def test_hidden_rows_and_keys_equal_nothing() -> None:
    spec = MaskSpec(keys="L0[b, k]", rows="L1[b, q]", equal=("L2[b, q]", "L2[b, k]"))
    leaves = [padding(4, [2]), padding(4, [3]), torch.tensor([[5, 5, -1, 7]])]
    query_terms, key_terms, _, _ = Case(spec, None, leaves, [], 1, 4, 4).plan()
    assert query_terms[0, 0].tolist() == [5, 5, -1, HIDDEN_ROW]
    assert key_terms[0, 0].tolist() == [5, 5, HIDDEN_KEY, HIDDEN_KEY]


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("dense", [False, True])
def test_plan_of_nothing(batch: int, queries: int, keys: int, dense: bool) -> None:
    mask = torch.ones(batch, 2, queries, keys, dtype=torch.bool) if dense else None
    spec = MaskSpec(upper="0", keys="L0[b, k]", dense=dense)
    check_plan(Case(spec, mask, [torch.ones(batch, keys, dtype=torch.bool)], [], batch, queries, keys))


@settings(max_examples=30)
@given(cases())
def test_plan_reads_no_value_on_a_device(case: Case) -> None:
    """Meta tensors have no values: whatever would wait for a GPU raises here. Shapes are those of CPU."""
    meta = torch.device("meta")
    mask = None if case.mask is None else case.mask.to(meta)
    leaves = [leaf.to(meta) for leaf in case.leaves]
    got = masks.plan(mask, leaves, case.params, case.spec, case.batch, case.queries, case.keys, meta)
    for actual, expected in zip(got, case.plan(), strict=True):
        assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride())
    masks.evaluate(case.spec, mask, leaves, case.params, case.batch, case.queries, case.keys, meta)


def test_plan_needs_memory_for_tiles_not_for_scores() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, Tensor) and x.untyped_storage().size() != inputs:
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    length = 2048
    mask = torch.rand(1, 1, length, length) < 0.5
    inputs = mask.untyped_storage().size()
    case = Case(
        MaskSpec(upper="0", keys="L0[b, k]", dense=True), mask, [padding(length, [1500])], [], 1, length, length
    )
    with Watch():
        case.plan()
    assert 0 < largest <= length * 64, f"a temporary of {largest} bytes; the mask has {length**2}"
