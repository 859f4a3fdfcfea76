"""S2O sparse attention on CPU, compiled and in torch, against the float64 reference and by its properties."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from s2o_inductor.kernels import cpu_sparse, native, reference, reference_sparse
from s2o_inductor.kernels.documents import Documents
from s2o_inductor.kernels.reference_sparse import Sparse
from s2o_inductor.sparse_policy import Geometry
from s2o_inductor.testing import LAYOUTS, assert_close_to_gold, attention_inputs, in_memory

# Small enough that short inputs have many tiles, bundles and blocks.
SMALL = Geometry(tile=16, sink=8, bundle=16, sub_means=4, run=4, block=8, clusters=2, horizon=4)
NAN = float("nan")
both = pytest.mark.parametrize("kind", ["native", "torch"])  # the compiled kernel, and the torch code


def run(kind: str, q: Tensor, k: Tensor, v: Tensor, budget: float | tuple[float, ...] = 0.0, **options: Any) -> Sparse:
    options = {
        **{"scale": 0.25, "causal": True, "window": None, "keys": None, "max_density": 1.0, "geometry": SMALL},
        **{"full": 1.0},
        **options,
    }
    budgets = budget if isinstance(budget, tuple) else (budget,)
    assert native.library("cpu_sparse") is not None, "no C++ compiler here can build the kernel"
    with mock.patch.object(native, "library", lambda name: None) if kind == "torch" else contextlib.nullcontext():
        return cpu_sparse.forward(q, k, v, budgets=budgets, **options)


@dataclasses.dataclass(frozen=True)
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]

    def reference(self, budget: float, noise: float = 0.0, seed: int = 0) -> reference_sparse.Sparse:
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (
            x.double() * (1 + noise * torch.randn(x.shape, generator=generator).double())
            for x in (self.q, self.k, self.v)
        )
        return reference_sparse.sparse_attention(q, k, v, budgets=(budget,), **{"scale": 0.25, **self.options})

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output and lse of exact attention."""
        queries, keys = self.q.shape[2], self.k.shape[2]
        at = torch.arange(keys - queries, keys)[:, None]
        sees = torch.ones(queries, keys, dtype=torch.bool)
        if self.options.get("causal", True):
            sees &= torch.arange(keys) <= at
        if self.options.get("window") is not None:
            sees &= torch.arange(keys) > at - self.options["window"]
        allowed, documents = self.options.get("keys"), self.options.get("documents")
        sees = sees[None, None] if allowed is None else sees & allowed[:, None, None, :]
        if documents is not None:
            sees = sees & (documents[0][:, None, :, None] == documents[1][:, None, None, :])
        inputs = (x.to(dtype) for x in (self.q, self.k, self.v))
        return reference.attention(*inputs, visible=sees, scale=0.25)


KINDS = ["in a row", "shuffled", "again", "of queries apart"]


def documents(kind: str, batch: int, queries: int, keys: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids of documents: numbered in a row, anyhow, such that one comes back after another, or queries' own."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(batch, keys, generator=generator) < 1 / 60).cumsum(dim=1)
    if kind == "shuffled":
        ids = (torch.randperm(keys + 1, generator=generator) - 3 << 40)[ids]
    ids = ids % 2 if kind == "again" else ids
    if kind == "of queries apart":
        return torch.randint(0, 4, (batch, queries), generator=generator), ids
    return ids[:, keys - queries :], ids


@settings(max_examples=60)
@given(kind=st.sampled_from(KINDS), keys=st.integers(1, 150), before=st.integers(0, 149), seed=st.integers(0, 2**16))
def test_tables_of_documents_say_what_the_reference_does(kind: str, keys: int, before: int, seed: int) -> None:
    queries = max(1, keys - before)
    ids = documents(kind, 2, queries, keys, seed)
    packed = Documents.of(*ids, SMALL)
    same = ids[0][:, :, None] == ids[1][:, None]
    assert torch.equal(packed.queries[:, :, None] == packed.keys[:, None], same)
    for b in range(2):
        for t, (start, end) in enumerate(reference_sparse.tiles_of(queries, keys, SMALL.tile)):
            rows = slice(start - keys + queries, end - keys + queries)
            first, low = packed.tiles[b, t].tolist()
            seen = same[b, rows].any(dim=0).nonzero()
            assert first == (int(seen[0]) if len(seen) else keys)
            plain = reference_sparse._prefix(start, end, keys, True, None, SMALL)
            low = max(low, plain[0])
            wanted = reference_sparse._prefix(start, end, keys, True, None, SMALL, (ids[0][b, rows], ids[1][b]))
            assert (low, max(low, plain[1])) == wanted


@st.composite
def problems(draw: st.DrawFn, exact: bool = False) -> Problem:
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3]))
    keys = draw(st.sampled_from([1, 15, 16, 40, 97, 130, 200]))
    queries = draw(st.sampled_from([keys, keys, max(1, keys - 37), 1]))
    widths = draw(st.sampled_from([(16, 16), (20, 24), (7, 13), (32, 8)]))
    seed = draw(st.integers(0, 2**16))
    q, k, v, _ = attention_inputs(
        batch, (group * kv_heads, kv_heads), (queries, keys), widths, torch.float32, seed=seed
    )  # fmt: skip
    causal = draw(st.sampled_from([True, True, False]))
    options: dict[str, Any] = {
        "causal": causal,
        "window": draw(st.sampled_from([None, 1, 7, 40, 100])) if causal else None,
        "geometry": dataclasses.replace(
            SMALL,
            clusters=draw(st.sampled_from([2, 0, 3])),
            horizon=draw(st.sampled_from([1, 4])),
            limit=draw(st.sampled_from([3.0, 0.0, 0.1])),
            sink=draw(st.sampled_from([8, 0, 64])),
            bundle=draw(st.sampled_from([16, 24])),
            run=draw(st.sampled_from([4, 1, 8])),
            sub_means=draw(st.sampled_from([4, 1, 16])),
        ),
    }
    if draw(st.booleans()):
        rate = draw(st.sampled_from([0.1, 0.7]))
        options["keys"] = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) < rate
    if causal and draw(st.booleans()):
        options["documents"] = documents(draw(st.sampled_from(KINDS)), batch, queries, keys, seed)
    options["full"] = draw(st.sampled_from([1.0, 0.8, 0.4]))
    if not exact:
        options["max_density"] = draw(st.sampled_from([1.0, 1.0, 0.5]))
    layouts = draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 3))
    q, k, v = (in_memory(x, layout) for x, layout in zip((2 * q, k, v), layouts, strict=True))
    return Problem(q, k, v, options)


@both
@settings(max_examples=40)
@given(case=problems(), budget=st.sampled_from([0.1, 0.3, 0.6, 1.0]))
def test_against_the_reference(kind: str, case: Problem, budget: float) -> None:
    gold = case.reference(budget)
    # Where noise a little above float32's rounding already changes what is read, results may differ.
    for seed in (1, 2):
        noisy = case.reference(budget, noise=3e-6, seed=seed)
        assume(torch.equal(noisy.bundles, gold.bundles) and torch.allclose(noisy.output, gold.output, atol=1e-3))
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        actual = run(kind, case.q.to(dtype), case.k.to(dtype), case.v.to(dtype), budget, **case.options)
        assert torch.equal(actual.bundles, gold.bundles)
        assert torch.equal(actual.pairs, gold.pairs) and torch.equal(actual.visible, gold.visible)
        assert actual.output.dtype == dtype and actual.lse.dtype == dtype
        torch.testing.assert_close(actual.output.double(), gold.output, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(actual.lse.double(), gold.lse, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(actual.tail.double(), gold.tail, atol=2e-5, rtol=2e-4)


@both
@settings(max_examples=40)
@given(case=problems(exact=True), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_budget_zero_is_dense_attention(kind: str, case: Problem, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, **{name: getattr(case, name).to(dtype) for name in "qkv"})
    actual = run(kind, case.q, case.k, case.v, 0.0, **case.options)
    gold, gold_lse = case.dense(torch.float64)
    low, low_lse = case.dense(dtype)
    assert_close_to_gold(actual.output, low, gold, what="output")
    assert_close_to_gold(actual.lse, low_lse.float(), gold_lse, what="lse", dtype=dtype)
    assert torch.equal(actual.pairs, actual.visible)
    strides = torch.empty(*(actual.output.shape[i] for i in (0, 2, 1, 3))).transpose(1, 2).stride()
    assert actual.output.stride() == strides and actual.output.dtype == dtype


@both
@pytest.mark.parametrize("width", [16, 64, 100, 128, 256])
def test_widths_and_long_prefixes(kind: str, width: int) -> None:
    q, k, v, _ = attention_inputs(1, (2, 1), (300, 700), (width, width + 8), torch.float32)
    actual = run(kind, q, k, v, scale=width**-0.5, geometry=Geometry())
    low = scaled_dot_product_attention(
        q, k, v, attn_mask=torch.ones(300, 700, dtype=torch.bool).tril(400), enable_gqa=True
    )
    gold, _ = reference.attention(
        *(x.double() for x in (q, k, v)), visible=torch.ones(300, 700, dtype=torch.bool).tril(400)
    )
    assert_close_to_gold(actual.output, low, gold)


def example(seed: int = 0, lengths: tuple[int, int] = (200, 200), heads: tuple[int, int] = (4, 2)) -> list[Tensor]:
    q, k, v, _ = attention_inputs(2, heads, lengths, (16, 24), torch.float32, seed=seed)
    return [2 * q, k, v]


@both
@settings(max_examples=8)
@given(
    cuts=st.sets(st.sampled_from(range(16, 200, 16)), max_size=3),
    seed=st.integers(0, 99),
    full=st.sampled_from([1.0, 0.6]),
)
def test_chunks_of_whole_tiles_change_nothing(kind: str, cuts: set[int], seed: int, full: float) -> None:
    q, k, v = example(seed)
    whole = run(kind, q, k, v, 0.3, full=full)
    edges = [0, *sorted(cuts), 200]
    for start, end in itertools.pairwise(edges):
        part = run(kind, q[:, :, start:end], k[:, :, :end], v[:, :, :end], 0.3, full=full)
        torch.testing.assert_close(part.output, whole.output[:, :, start:end], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part.lse, whole.lse[:, :, start:end], atol=1e-5, rtol=1e-5)
        tiles = slice(start // SMALL.tile, -(-end // SMALL.tile))
        assert torch.equal(part.bundles, whole.bundles[:, :, tiles])


@both
@settings(max_examples=25)
@given(
    last=st.integers(0, 198),
    poison=st.sampled_from([NAN, float("inf"), -float("inf"), 3e38]),
    budget=st.sampled_from([0.0, 0.3]),
    window=st.sampled_from([None, 50]),
)
def test_no_row_is_reached_from_its_future(
    kind: str, last: int, poison: float, budget: float, window: int | None
) -> None:
    q, k, v = example(last)
    clean = run(kind, q, k, v, budget, window=window)
    k[:, :, last + 1 :], v[:, :, last + 1 :] = poison, poison
    actual = run(kind, q, k, v, budget, window=window)
    # The rows of a tile vote together on when to stop, so that later ones may let it read more, but no other value in.
    same = last + 1 if budget == 0.0 else (last + 1) // SMALL.tile * SMALL.tile
    assert torch.equal(actual.output[:, :, :same], clean.output[:, :, :same])
    assert torch.equal(actual.lse[:, :, :same], clean.lse[:, :, :same])
    exact = run(kind, q, k, v, 0.0, window=window)
    off = [(x.output - exact.output)[:, :, same : last + 1].abs() for x in (actual, clean)]
    assert ((off[0] <= 1e-5) | (off[0] == off[1])).all()


@both
@pytest.mark.parametrize("poison", [NAN, float("inf")])
@pytest.mark.parametrize("budget", [0.0, 0.3])
def test_no_row_is_reached_from_hidden_keys_or_from_outside_its_window(kind: str, budget: float, poison: float) -> None:
    q, k, v = example()
    keys = torch.rand(2, 200, generator=torch.Generator().manual_seed(0)) < 0.8
    clean = run(kind, q, k, v, budget, keys=keys)
    hidden = ~keys[:, None, :, None]
    actual = run(kind, q, k.masked_fill(hidden, poison), v.masked_fill(hidden, poison), budget, keys=keys)
    assert torch.equal(actual.output, clean.output) and torch.equal(actual.lse, clean.lse)
    clean = run(kind, q, k, v, budget, window=50)
    k[:, :, :60], v[:, :, :60] = poison, poison
    actual = run(kind, q, k, v, budget, window=50)
    assert torch.equal(actual.output[:, :, 109:], clean.output[:, :, 109:])


@both
@settings(max_examples=15)
@given(
    kind_of_ids=st.sampled_from(KINDS),
    poison=st.sampled_from([NAN, float("inf")]),
    budget=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_no_row_is_reached_from_another_document(
    kind: str, kind_of_ids: str, poison: float, budget: float, seed: int
) -> None:
    q, k, v = example(seed)
    ids = documents(kind_of_ids, 2, 200, 200, seed)
    clean = run(kind, q, k, v, budget, documents=ids)
    for b in range(2):
        one = ids[0][b, 190]
        other = torch.zeros(2, 200, dtype=torch.bool)
        other[b] = ids[1][b] != one
        poisoned = [x.masked_fill(other[:, None, :, None], poison) for x in (k, v)]
        actual = run(kind, q, *poisoned, budget, documents=ids)
        # Rows of other documents keep a tile that they share with ours from stopping, but its prefix is empty anyway.
        own = ids[0][b] == one
        assert torch.equal(actual.output[b][:, own], clean.output[b][:, own])
        assert torch.equal(actual.lse[b][:, own], clean.lse[b][:, own])
        assert torch.equal(actual.output[1 - b], clean.output[1 - b])


@both
def test_documents_are_ranked_from_their_own_sinks_on(kind: str) -> None:
    """A tile inside a document reads less than all; one in which a document begins reads all of its own, no more."""
    q, k, v = example(lengths=(320, 320))
    ids = torch.arange(320) // 160 * torch.ones(2, 1, dtype=torch.int64)
    packed = run(kind, q, k, v, 0.6, documents=(ids, ids))
    for at in (slice(0, 160), slice(160, 320)):
        alone = run(kind, q[:, :, at], k[:, :, at], v[:, :, at], 0.6)
        torch.testing.assert_close(packed.output[:, :, at], alone.output, atol=1e-5, rtol=1e-5)
        tiles = slice(at.start // SMALL.tile, at.stop // SMALL.tile)
        assert torch.equal(packed.bundles[:, :, tiles], alone.bundles)
    assert (packed.pairs < packed.visible).all()


@both
def test_nan_in_a_query_stays_in_its_row(kind: str) -> None:
    q, k, v = example()
    q[1, 2, 150, 3] = NAN
    actual = run(kind, q, k, v, 0.3)
    clean = run(kind, q, k, v, 0.0)
    assert actual.output[1, 2, 150].isnan().all() and actual.lse[1, 2, 150].isnan()
    others = torch.ones(2, 4, 200, dtype=torch.bool)
    others[1, 2, 150] = False
    assert actual.output[others].isfinite().all() and actual.lse[others].isfinite().all()
    # A row that cannot vote keeps its tile from stopping.
    tile = slice(144, 160)
    others[:, :, :144], others[:, :, 160:] = False, False
    assert actual.bundles[1, 2, 9] == clean.bundles[1, 2, 9]
    torch.testing.assert_close(actual.output[1, 2, tile].nan_to_num(), clean.output[1, 2, tile].nan_to_num())


@both
def test_nan_in_a_key_reaches_those_who_see_it(kind: str) -> None:
    q, k, v = example()
    v[0, 1, 77] = NAN
    actual = run(kind, q, k, v, 0.0)
    assert actual.output[0, 2:, 77:].isnan().all()
    assert actual.output[0, 2:, :77].isfinite().all() and actual.output[0, :2].isfinite().all()


@both
@settings(max_examples=15)
@given(seed=st.integers(0, 999), budgets=st.tuples(*[st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 0.9])] * 2))
def test_a_smaller_budget_reads_no_fewer_bundles(kind: str, seed: int, budgets: tuple[float, float]) -> None:
    inputs = example(seed)
    less, more = (run(kind, *inputs, budget) for budget in sorted(budgets))
    assert (less.bundles >= more.bundles).all() and (less.pairs >= more.pairs).all()


@both
@settings(max_examples=10)
@given(seed=st.integers(0, 999), full=st.sampled_from([0.9, 0.6, 0.3]), heads=st.sampled_from([(4, 2), (2, 2)]))
def test_a_tile_reads_all_of_its_prefix_or_what_the_rule_says(
    kind: str, seed: int, full: float, heads: tuple[int, int]
) -> None:
    inputs = example(seed, heads=heads)
    ruled, exact = run(kind, *inputs, 0.6), run(kind, *inputs, 0.0)
    result = run(kind, *inputs, 0.6, full=full)
    tiles = torch.arange(200) // SMALL.tile
    gave_up = (result.bundles != ruled.bundles).unflatten(1, (heads[1], -1)).any(dim=2).repeat_interleave(
        heads[0] // heads[1], dim=1
    )  # fmt: skip
    assert torch.equal(result.bundles, torch.where(gave_up, exact.bundles, ruled.bundles))
    for field, which in (("output", gave_up[..., tiles, None]), ("lse", gave_up[..., tiles])):
        wanted = torch.where(which, getattr(exact, field), getattr(ruled, field))
        torch.testing.assert_close(getattr(result, field), wanted, atol=1e-5, rtol=1e-5)
    assert (result.tail[gave_up] == 0).all() and torch.equal(result.tail[~gave_up], ruled.tail[~gave_up])
    assert (result.pairs >= ruled.pairs).all() and torch.equal(result.visible, ruled.visible)


@both
def test_only_flat_heads_are_given_up(kind: str) -> None:
    """Of two heads of which one is flat, the flat one is read wholly, the other as if nothing were given up."""
    q, k, v, _ = attention_inputs(1, (2, 2), (1400, 1400), (16, 16), torch.float32, seed=3)
    k[:, 1, ::37] += 4.0
    q[:, 1] += 2.0
    geometry = Geometry(sink=128, bundle=64, horizon=1, block=128)
    ruled, result = (run(kind, q, k, v, 0.2, full=full, geometry=geometry) for full in (1.0, 0.7))
    assert result.pairs[0, 0] == result.visible[0, 0] and ruled.pairs[0, 0] < ruled.visible[0, 0]
    assert torch.equal(result.output[:, 1], ruled.output[:, 1]) and result.pairs[0, 1] < 0.6 * result.visible[0, 1]
    exact = run(kind, q, k, v, 0.0)
    torch.testing.assert_close(result.output[:, 0], exact.output[:, 0], atol=1e-5, rtol=1e-5)


@both
def test_a_density_that_is_asked_for_is_kept(kind: str) -> None:
    flat = attention_inputs(1, (2, 1), (200, 200), (16, 16), torch.float32)[:3]
    assert torch.equal(*(run(kind, *flat, 0.1, max_density=0.5, full=full).pairs for full in (1.0, 0.1)))


@both
def test_heads_stop_by_themselves(kind: str) -> None:
    """Each head of a group follows its own budget, and gives what it gives when all have that budget."""
    inputs = example(heads=(4, 1))
    budgets = (0.0, 0.8, 0.3, 0.8)
    mixed = run(kind, *inputs, budgets)
    assert len(mixed.bundles.sum(dim=(0, 2)).unique()) >= 3
    for head, budget in enumerate(budgets):
        alone = run(kind, *inputs, budget)
        assert torch.equal(mixed.bundles[:, head], alone.bundles[:, head])
        torch.testing.assert_close(mixed.output[:, head], alone.output[:, head], atol=1e-5, rtol=1e-5)


@both
@pytest.mark.parametrize("causal", [True, False])
def test_a_group_reads_what_repeated_keys_would_give(kind: str, causal: bool) -> None:
    q, k, v = example(heads=(6, 2))
    grouped = run(kind, q, k, v, causal=causal)
    repeated = run(kind, q, *(x.repeat_interleave(3, dim=1) for x in (k, v)), causal=causal)
    torch.testing.assert_close(grouped.output, repeated.output, atol=1e-6, rtol=1e-5)
    assert torch.equal(grouped.visible, repeated.visible)


@both
def test_results_do_not_depend_on_the_number_of_threads(kind: str) -> None:
    inputs = example()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(kind, *inputs, 0.3))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for field in dataclasses.fields(Sparse):
            assert torch.equal(getattr(results[0], field.name), getattr(other, field.name)), field.name


@both
def test_equal_scores_are_taken_by_position(kind: str) -> None:
    """With equal keys every score ties, and a capped tile reads the first keys of its prefix."""
    q = torch.ones(1, 1, 200, 16)
    k, v = torch.ones(1, 1, 200, 16), torch.arange(200.0)[None, None, :, None].expand(1, 1, 200, 16)
    options = {"max_density": 0.2, "geometry": dataclasses.replace(SMALL, clusters=0, sub_means=1, run=1)}
    output = run(kind, q, k, v, 0.0, **options).output
    # The last tile, [192, 200), has the prefix [8, 192): 0.2 of it, rounded up, are 3 bundles.
    read = [*range(8 + 3 * 16), *range(192, 200)]
    torch.testing.assert_close(output[0, 0, 199, 0], torch.tensor(read).double().mean().float())


@both
@pytest.mark.parametrize("clusters", [0, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_runs_of_which_keys_are_hidden(kind: str, clusters: int, seed: int) -> None:
    """A run is worth what the keys are worth that can be seen, and has its whole place in a bundle."""
    keys = torch.rand(2, 200, generator=torch.Generator().manual_seed(seed)) < 0.4
    options = {"keys": keys, "max_density": 0.3, "geometry": dataclasses.replace(SMALL, clusters=clusters)}
    case = Problem(*example(seed), options)
    gold, actual = case.reference(0.0), run(kind, case.q, case.k, case.v, **options)
    assert torch.equal(actual.pairs, gold.pairs) and torch.equal(actual.visible, gold.visible)
    torch.testing.assert_close(actual.output.double(), gold.output, atol=2e-5, rtol=2e-5)


@both
@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 0, 0)])
def test_empty_sizes(kind: str, shape: tuple[int, int, int]) -> None:
    batch, queries, keys = shape
    actual = run(kind, torch.ones(batch, 2, queries, 16), *torch.ones(2, batch, 1, keys, 16), 0.3)
    assert actual.output.shape == (batch, 2, queries, 16) and actual.lse.shape == (batch, 2, queries)
    assert actual.pairs.sum() == 0 and actual.pairs.shape == (batch, 2)


@both
def test_rows_without_a_key(kind: str) -> None:
    q, k, v = example()
    keys = torch.arange(200) >= torch.tensor([[200], [70]])
    actual = run(kind, q, k, v, 0.3, keys=keys)
    assert actual.output[0].eq(0).all() and actual.lse[0].eq(-float("inf")).all()
    assert actual.output[1, :, :70].eq(0).all() and actual.lse[1, :, 70:].isfinite().all()


@both
def test_huge_scores(kind: str) -> None:
    """Scores far beyond what exp can hold, one key heavier than all others together."""
    q, k, v = example()
    q, k = 30 * q, 30 * k
    gold, _ = Problem(q, k, v, {}).dense(torch.float64)
    low, _ = Problem(q, k, v, {}).dense(torch.float32)
    assert_close_to_gold(run(kind, q, k, v, 0.0).output, low, gold)
    assert run(kind, q, k, v, 0.5).output.isfinite().all()


@both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": -0.1}, "budgets must be at least 0"),
        ({"budget": NAN}, "budgets must be at least 0"),
        ({"budget": (0.1, 0.2, 0.3)}, "one for each of 4 query heads; got 3"),
        ({"max_density": 0.0}, "max_density"),
        ({"full": 1.5}, "share of the prefix"),
        ({"window": 0}, "at least 1"),
        ({"window": 3, "causal": False}, "goes with causal"),
        ({"keys": torch.ones(2, 199, dtype=torch.bool)}, "must be bool"),
        ({"documents": (torch.zeros(2, 200), torch.zeros(2, 200))}, "both be int32 or int64"),
        ({"documents": (torch.zeros(2, 200).int(), torch.zeros(2, 9).int())}, r"\(2, 200\) and \(2, 200\); got .*9"),
        ({"documents": (torch.zeros(2, 200).int(),) * 2, "causal": False}, "go with causal"),
    ],
)
def test_what_cannot_be_is_refused(kind: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(kind, *example(), **change)
    q, k, v = example()
    for wrong in ((q[:, :3], k, v), (q, k[:, :, :100], v[:, :, :100]), (q, k, v[:, :, :100])):
        with pytest.raises(ValueError, match="got"):
            run(kind, *wrong)


# Compiling.


def no_compiler(folder: Path) -> dict[str, str]:
    return {"CXX": str(folder / "no-such-compiler"), "S2O_CACHE_DIR": str(folder)}


def a_compiler_that_fails(folder: Path) -> dict[str, str]:
    return {"CXX": f"{sys.executable} -c 'raise SystemExit(1)'", "S2O_CACHE_DIR": str(folder)}


def no_place_to_write(folder: Path) -> dict[str, str]:
    (folder / "file").touch()
    return {"S2O_CACHE_DIR": str(folder / "file" / "folder")}


@pytest.mark.parametrize("trouble", [no_compiler, a_compiler_that_fails, no_place_to_write])
def test_without_a_library_one_line_is_logged(
    trouble: Callable[[Path], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for name, value in trouble(tmp_path).items():
        monkeypatch.setenv(name, value)
    assert native.library.__wrapped__("cpu_sparse") is None
    (record,) = caplog.records
    assert record.name == "s2o_inductor" and "torch code runs instead" in record.message


def test_builds_at_the_same_time_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2O_CACHE_DIR", str(tmp_path))
    built: list[Any] = []
    threads = [
        threading.Thread(target=lambda: built.append(native.library.__wrapped__("cpu_sparse"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 2 and all(library is not None for library in built)
    (made,) = tmp_path.iterdir()
    written = made.stat().st_mtime_ns
    assert native.library.__wrapped__("cpu_sparse") is not None
    assert made.stat().st_mtime_ns == written, "a second call compiles nothing"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are options of compilers for x86-64")
@pytest.mark.parametrize("option", ["-mno-avx512f", "-mno-avx"])
def test_narrower_vectors_give_the_same(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = run("native", *example(), 0.3)
    monkeypatch.setenv("CXX", f"{native._compiler()[0]} {option}")
    monkeypatch.setenv("S2O_CACHE_DIR", str(tmp_path))
    narrow_library = native.library.__wrapped__("cpu_sparse")
    assert narrow_library is not None
    with mock.patch.object(native, "library", lambda name: narrow_library):
        narrow = run("native", *example(), 0.3)
    assert torch.equal(narrow.bundles, wide.bundles)
    torch.testing.assert_close(narrow.output, wide.output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(narrow.lse, wide.lse, atol=1e-5, rtol=1e-5)


def test_a_forked_process_can_go_on() -> None:
    code = """
import os, torch
from s2o_inductor.kernels import cpu_sparse, native
from s2o_inductor.sparse_policy import Geometry
assert native.library("cpu_sparse") is not None
q = torch.randn(1, 2, 600, 16)
def run():
    options = dict(scale=1.0, budgets=(0.3,), causal=True, window=None, keys=None, max_density=1.0)
    return cpu_sparse.forward(q, q, q, geometry=Geometry(bundle=64), **options).output
first = run()
child = os.fork()
same = torch.equal(run(), first)
if child == 0:
    os._exit(0 if same else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and same
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0
