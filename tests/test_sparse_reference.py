"""Properties of S2O attention on the reference, which defines it: research is full of sparse kernels that leak."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2o_inductor.kernels import reference
from s2o_inductor.kernels.reference_sparse import representatives, run_order, run_scores, sparse_attention, tiles_of
from s2o_inductor.kernels.stop_rule import stop_after
from s2o_inductor.kernels.tail_groups import Groups, tail_groups, tail_logits
from s2o_inductor.sparse_policy import Extent, Geometry, keys_of_tiles

SMALL = Geometry(tile=16, sink=8, bundle=16, sub_means=4, run=4, block=8, clusters=2, horizon=4)
QUICK = settings(max_examples=40)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """q, k, v in float64 with at least as many keys as queries, and a mask of every kind that is ranked."""
    batch, kv_heads, group = draw(st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 1, 2)]))
    keys = draw(st.integers(1, 120))
    queries = draw(st.integers(1, keys))
    width, value_width = draw(st.sampled_from([(8, 8), (8, 4)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = normal(batch, kv_heads * group, queries, width) * draw(st.sampled_from([0.0, 1.0, 4.0]))
    k, v = normal(batch, kv_heads, keys, width), normal(batch, kv_heads, keys, value_width)
    causal = draw(st.booleans())
    mask: dict[str, Any] = {"causal": causal}
    if causal and draw(st.booleans()):
        mask["window"] = draw(st.integers(1, keys + 5))
    if draw(st.booleans()):
        mask["keys"] = torch.rand(batch, keys, generator=generator) < 0.8
    if causal and draw(st.booleans()):
        ids = packed_ids(draw(st.sampled_from(["in a row", "shuffled", "again"])), batch, keys, generator)
        mask["documents"] = ids[:, keys - queries :], ids
    return q, k, v, mask


def packed_ids(kind: str, batch: int, keys: int, generator: torch.Generator) -> Tensor:
    """Documents of keys, (B, Sk): numbered in a row, numbered anyhow, or such that one may come back after another."""
    begins = torch.rand(batch, keys, generator=generator) < 1 / 40
    ids = begins.cumsum(dim=1)
    if kind == "shuffled":
        return torch.randperm(keys + 1, generator=generator)[ids] - 3
    return ids % 2 if kind == "again" else ids


def visible(
    q: Tensor, k: Tensor, causal: bool = True, window: int | None = None, keys: Tensor | None = None,
    documents: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """bool (B, 1, Sq, Sk), written another way than the code under test."""
    queries, length = q.shape[2], k.shape[2]
    seen = torch.ones(queries, length, dtype=torch.bool)
    if causal:
        seen = seen.tril(length - queries)
    if window is not None:
        seen = seen.triu(length - queries - window + 1)
    if documents is not None:
        seen = seen & (documents[0][:, None, :, None] == documents[1][:, None, None, :])
    return seen if keys is None else seen & keys[:, None, None, :]


@QUICK
@given(problems(), st.sampled_from([0, 2]), st.booleans())
def test_budget_zero_is_attention(problem: Any, clusters: int, share: bool) -> None:
    q, k, v, mask = problem
    geometry = dataclasses.replace(SMALL, clusters=clusters)
    got = sparse_attention(q, k, v, budgets=(0.0,), share_order=share, geometry=geometry, **mask)
    output, lse = reference.attention(q, k, v, visible=visible(q, k, **mask))
    torch.testing.assert_close(got.output, output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.lse, lse, rtol=1e-9, atol=1e-9)
    assert torch.equal(got.pairs, got.visible)
    assert (got.tail < 1e-9).all()


@QUICK
@given(problems(), st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_budget_never_reads_less(problem: Any, one: float, other: float) -> None:
    q, k, v, mask = problem
    less, more = (
        sparse_attention(q, k, v, budgets=(budget,), geometry=SMALL, **mask) for budget in sorted((one, other))
    )
    assert (less.bundles >= more.bundles).all()
    assert (less.pairs >= more.pairs).all()


@QUICK
@given(problems(), st.floats(0.1, 1))
def test_groups_of_one_key_lose_nothing(problem: Any, budget: float) -> None:
    """What is not read is stood in for by itself, once and with its own value, however little is read."""
    q, k, v, mask = problem
    every = dataclasses.replace(SMALL, clusters=SMALL.block, rounds=1)
    got = sparse_attention(q, k, v, budgets=(budget,), geometry=every, **mask)
    output, lse = reference.attention(q, k, v, visible=visible(q, k, **mask))
    torch.testing.assert_close(got.output, output, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(got.lse, lse, rtol=1e-7, atol=1e-7)


@QUICK
@given(problems(), st.floats(0.1, 1))
def test_no_key_of_the_future_and_no_hidden_key_reaches_a_row(problem: Any, budget: float) -> None:
    q, k, v, mask = problem
    queries, length = q.shape[2], k.shape[2]
    before = sparse_attention(q, k, v, budgets=(budget,), geometry=SMALL, **mask)
    if mask["causal"]:
        # Everything from a tile's last position on is poisoned: that tile and those before it must not notice.
        start, end = tiles_of(queries, length, SMALL.tile)[0]
        poisoned_q, poisoned_k, poisoned_v = q.clone(), k.clone(), v.clone()
        poisoned_k[:, :, end:] = poisoned_v[:, :, end:] = float("nan")
        poisoned_q[:, :, end - start :] = float("nan")
        after = sparse_attention(poisoned_q, poisoned_k, poisoned_v, budgets=(budget,), geometry=SMALL, **mask)
        assert torch.equal(before.output[:, :, : end - start], after.output[:, :, : end - start])
    if "keys" in mask:
        hidden = ~mask["keys"][:, None, :, None]
        after = sparse_attention(
            q, k.masked_fill(hidden, 7.0), v.masked_fill(hidden, 1e6), budgets=(budget,), geometry=SMALL, **mask
        )
        torch.testing.assert_close(before.output, after.output, rtol=1e-9, atol=1e-9)


@QUICK
@given(problems(), st.floats(0, 1), st.integers(0, 7))
def test_chunks_of_whole_tiles_give_what_the_whole_prefill_gives(problem: Any, budget: float, cut: int) -> None:
    q, k, v, mask = problem
    if not mask["causal"]:
        return
    queries, length = q.shape[2], k.shape[2]
    edge = min(cut * SMALL.tile, length)
    first = edge - (length - queries)
    if not 0 < first < queries:
        return
    whole = sparse_attention(q, k, v, budgets=(budget,), geometry=SMALL, **mask)
    parts = []
    for rows, end in ((slice(0, first), edge), (slice(first, queries), length)):
        part = {**mask, "keys": mask["keys"][:, :end]} if "keys" in mask else dict(mask)
        if "documents" in mask:
            part["documents"] = mask["documents"][0][:, rows], mask["documents"][1][:, :end]
        parts.append(
            sparse_attention(q[:, :, rows], k[:, :, :end], v[:, :, :end], budgets=(budget,), geometry=SMALL, **part)
        )
    torch.testing.assert_close(torch.cat([part.output for part in parts], 2), whole.output, rtol=1e-9, atol=1e-9)
    assert torch.equal(torch.cat([part.bundles for part in parts], 2), whole.bundles)


@QUICK
@given(problems(), st.floats(0.1, 1), st.sampled_from(["in a row", "shuffled", "again"]), st.integers(0, 2**16))
def test_nothing_of_another_document_reaches_a_row(problem: Any, budget: float, kind: str, seed: int) -> None:
    """Not even its NaN, outside the tiles in which rows of both stand."""
    q, k, v, mask = problem
    queries, length = q.shape[2], k.shape[2]
    ids = packed_ids(kind, q.shape[0], length, torch.Generator().manual_seed(seed))
    mask = {**mask, "causal": True, "documents": (ids[:, length - queries :], ids)}
    before = sparse_attention(q, k, v, budgets=(budget,), geometry=SMALL, **mask)
    last = ids[:, -1:]
    for poison in (1e3, float("nan")):
        other = (ids != last)[:, None, :, None]
        after = sparse_attention(
            q, k.masked_fill(other, poison), v.masked_fill(other, poison), budgets=(budget,), geometry=SMALL, **mask
        )
        for b in range(q.shape[0]):
            for start, end in tiles_of(queries, length, SMALL.tile):
                own = ids[b, start:end] == last[b]
                if own.all() or (own.any() and poison == 1e3):
                    at = torch.arange(start, end)[own] - (length - queries)
                    torch.testing.assert_close(after.output[b, :, at], before.output[b, :, at], rtol=1e-9, atol=1e-9)


@QUICK
@given(problems(), st.floats(0, 1), st.integers(-3, 3))
def test_one_document_is_attention_without_documents(problem: Any, budget: float, number: int) -> None:
    q, k, v, mask = problem
    mask = {**mask, "causal": True, "documents": None}
    plain = sparse_attention(q, k, v, budgets=(budget,), geometry=SMALL, **mask)
    mask["documents"] = tuple(torch.full((q.shape[0], x.shape[2]), number) for x in (q, k))
    packed = sparse_attention(q, k, v, budgets=(budget,), geometry=SMALL, **mask)
    for field in dataclasses.fields(plain):
        assert torch.equal(getattr(plain, field.name), getattr(packed, field.name)), field.name


@QUICK
@given(problems(), st.floats(0, 1), st.integers(0, 3), st.integers(0, 15))
def test_a_document_that_begins_with_a_tile_gives_what_it_gives_alone(
    problem: Any, budget: float, tiles: int, behind: int
) -> None:
    """Behind others and before others: what ends inside a tile keeps that tile from being ranked, all else is equal."""
    q, k, v, mask = problem
    q, mask = torch.cat([q[:, :, :1].expand(-1, -1, k.shape[2] - q.shape[2], -1), q], dim=2), {**mask, "causal": True}
    mask.pop("documents", None)
    alone = sparse_attention(q, k, v, budgets=(budget,), geometry=SMALL, **mask)
    batch, length, before = q.shape[0], k.shape[2], tiles * SMALL.tile
    wide = [torch.cat([3 * x.flip(2)[:, :, :1].expand(-1, -1, before, -1), x, x[:, :, :behind]], 2) for x in (q, k, v)]
    total = wide[0].shape[2]
    ids = torch.cat([torch.full((batch, n), i) for i, n in enumerate((before, length, total - before - length))], 1)
    if "keys" in mask:
        mask["keys"] = torch.nn.functional.pad(mask["keys"], (before, total - before - length), value=True)
    packed = sparse_attention(*wide, budgets=(budget,), geometry=SMALL, documents=(ids, ids), **mask)
    same = length // SMALL.tile * SMALL.tile if behind else length
    torch.testing.assert_close(
        packed.output[:, :, before : before + same], alone.output[:, :, :same], rtol=1e-9, atol=1e-9
    )
    numbers = slice(tiles, tiles - (-same // SMALL.tile))
    assert torch.equal(packed.bundles[:, :, numbers], alone.bundles[:, :, : numbers.stop - tiles])


@QUICK
@given(problems(), st.floats(0, 1))
def test_heads_without_sharing_are_heads_alone(problem: Any, budget: float) -> None:
    q, k, v, mask = problem
    group = q.shape[1] // k.shape[1]
    together = sparse_attention(q, k, v, budgets=(budget,), share_order=False, geometry=SMALL, **mask)
    repeated = [x.repeat_interleave(group, dim=1) for x in (k, v)]
    alone = sparse_attention(q, *repeated, budgets=(budget,), geometry=SMALL, **mask)
    torch.testing.assert_close(together.output, alone.output, rtol=1e-9, atol=1e-9)
    assert torch.equal(together.bundles, alone.bundles)


@QUICK
@given(problems(), st.floats(0.05, 1))
def test_max_density_is_a_cap_rounded_up_to_a_bundle(problem: Any, cap: float) -> None:
    q, k, v, mask = problem
    got = sparse_attention(q, k, v, budgets=(0.0,), max_density=cap, geometry=SMALL, **mask)
    full = sparse_attention(q, k, v, budgets=(0.0,), geometry=SMALL, **mask)
    # Tokens of the last bundle may be few: n tokens make ceil(n / bundle) bundles.
    tokens = full.bundles * SMALL.bundle
    assert (got.bundles * SMALL.bundle <= (cap * tokens).ceil() + SMALL.bundle).all()


@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, 64))
def test_tiles_cover_every_query_once_and_end_at_whole_tiles(queries: int, past: int, tile: int) -> None:
    spans = tiles_of(queries, queries + past, tile)
    assert [at for start, end in spans for at in range(start, end)] == list(range(past, past + queries))
    assert all(0 < end - start <= tile for start, end in spans)
    assert all(end % tile == 0 for _, end in spans[:-1])


@QUICK
@given(problems(), st.floats(0.0, 0.9))
def test_counted_work_covers_what_was_computed(problem: Any, budget: float) -> None:
    q, k, v, mask = problem
    mask = {name: mask[name] for name in ("causal", "window") if name in mask}
    extent = Extent(q.shape[2], k.shape[2], mask["causal"], mask.get("window"))
    tiles = keys_of_tiles(extent, SMALL)
    whole = sparse_attention(q, k, v, budgets=(0.0,), geometry=SMALL, **mask)
    ranked = [math.ceil(tile.ranked / SMALL.bundle) for tile in tiles]
    assert all(bundles == ranked for bundles in whole.bundles.flatten(0, 1).tolist())
    read = sparse_attention(q, k, v, budgets=(budget,), geometry=SMALL, **mask)
    exact = SMALL.tile * sum(tile.exact for tile in tiles)
    assert exact >= int(whole.visible.max())
    for bundles, pairs in zip(read.bundles.flatten(0, 1).tolist(), read.pairs.flatten().tolist(), strict=True):
        mma, work = extent.densities(bundles, SMALL)
        assert mma * exact >= pairs - 0.5 and work >= mma
        assert (work > mma) == any(tile.ranked for tile in tiles)
        assert mma <= extent.densities(ranked, SMALL)[0]


@pytest.mark.parametrize("tiles", [1, 2, 3, 40])
def test_whole_tiles_that_read_everything_do_what_exact_attention_does(tiles: int) -> None:
    geometry = Geometry()
    extent = Extent.of_band(128 * tiles, 128 * tiles + 999, None, 0)  # a cache that is longer than what it holds
    assert extent == Extent(128 * tiles, 128 * tiles, True, None)
    everything = [math.ceil(tile.ranked / geometry.bundle) for tile in keys_of_tiles(extent, geometry)]
    mma, work = extent.densities(everything, geometry)
    assert mma == 1.0
    ranked = sum(tile.ranked for tile in keys_of_tiles(extent, geometry))
    groups = ranked * geometry.clusters / geometry.block
    extra = geometry.sub_means * (ranked / 2 + groups) + geometry.tile * 1.5 * groups
    ranking = sum(tile.ranked > 0 for tile in keys_of_tiles(extent, geometry))
    extra += ranking * geometry.tile * geometry.sub_means * geometry.rounds
    assert (work - mma) * 128 * 128 * tiles * (tiles + 1) / 2 == pytest.approx(extra)


def test_shares_and_order_by_hand() -> None:
    """Without groups: the share of a key in the softmax of each mean query, and at least half of a run's beside."""
    geometry = Geometry(tile=2, sink=0, bundle=2, sub_means=2, run=1, block=2, clusters=0)
    k = torch.eye(4, dtype=torch.float64)
    q = torch.tensor([[[0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0]]], dtype=torch.float64)
    scores = run_scores(representatives(q, geometry)[0], k, 1.0, geometry, None, None)
    torch.testing.assert_close(scores, scores.new_tensor([0.25, 0.5, 0.5, 0.25]), rtol=1e-3, atol=0.0)
    assert sorted(run_order(scores, 1)[:2].tolist()) == [1, 2]
    assert run_order(scores.round(decimals=6), 1).tolist() == [1, 2, 0, 3]  # equal scores: by position
    # One mean query for both rows sees neither: what sub-means are for.
    mean = representatives(q, dataclasses.replace(geometry, sub_means=1))[0]
    assert run_scores(mean, k, 1.0, geometry, None, None)[1] < scores[1]
    pairs = run_scores(q[0], k, 1.0, dataclasses.replace(geometry, run=2), None, None)
    torch.testing.assert_close(pairs, scores.unflatten(0, (2, 2)).amax(dim=1))
    assert run_order(torch.tensor([0.1, 0.2]), 2).tolist() == [2, 3, 0, 1]
    # A hidden key has no score and takes none from its run; a run without a visible key is not listed.
    hidden = torch.tensor([False, True, True, True])
    masked = run_scores(q[0], k, 1.0, dataclasses.replace(geometry, run=2), None, hidden)
    torch.testing.assert_close(masked, masked.new_tensor([1.0, 0.0]))
    assert run_order(masked, 2, hidden).tolist() == [0, 1]


def test_a_row_that_looks_elsewhere_has_a_mean_of_its_own() -> None:
    """Two rows look up a key each among rows that do not: a mean of neighbours finds neither, one of like rows does."""
    geometry = Geometry(tile=9, sink=0, bundle=9, sub_means=3, run=1, block=9, clusters=0)
    k = 4 * torch.eye(9, dtype=torch.float64)
    common, first, second = (5 * torch.eye(9, dtype=torch.float64)[i] for i in (0, 3, 6))
    q = torch.stack([common, first, common, common, common, common, second, common, common])
    means = representatives(q[None], geometry)[0]
    torch.testing.assert_close(means[means.argmax(dim=1).argsort()], torch.stack([common, first, second]))
    neighbours = torch.stack([part.mean(dim=0) for part in q.tensor_split(3)])
    for rows, least, most in ((means, 0.3, 1.0), (neighbours, 0.0, 0.01)):
        found = run_scores(rows, k, 1.0, geometry, None, None)[[3, 6]]
        assert (least < found).all() and (found < most).all()


@given(st.integers(0, 2**16), st.sampled_from([1, 3, 16]), st.sampled_from([1, 5, 40]))
def test_representatives_are_means_of_rows(seed: int, parts: int, rows: int) -> None:
    """Never farther from the rows than the means of equal parts, and one round never brings them farther away."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, rows, 4, generator=generator, dtype=torch.float64)
    geometry = Geometry(tile=48, sink=0, block=48, bundle=48, run=1, sub_means=parts)
    equal = torch.stack([part.mean(dim=1) for part in q.tensor_split(min(parts, rows), dim=1)], dim=1)
    distances = [torch.cdist(q, equal).amin(dim=2).square().sum(dim=1)]
    for rounds in (1, 2, 4):
        means = representatives(q, dataclasses.replace(geometry, rounds=rounds))
        assert means.shape == equal.shape
        distances.append(torch.cdist(q, means).amin(dim=2).square().sum(dim=1))
        assert (distances[-1] <= distances[-2] + 1e-9).all()
    if parts == 1:
        torch.testing.assert_close(means, q.mean(dim=1, keepdim=True))


def test_a_key_like_its_group_is_read_last() -> None:
    """Six equal heavy keys, for which their group can stand, against one that its group hides."""
    geometry = Geometry(tile=8, sink=0, bundle=8, sub_means=1, run=1, block=8, clusters=2)
    heavy, light, other = (torch.tensor(x, dtype=torch.float64) for x in ([3.0, 0.0], [-3.0, 0.0], [2.0, 1.0]))
    k = torch.stack([heavy] * 6 + [light, other])
    groups = Groups(torch.tensor([0] * 6 + [1, 1]), *(torch.stack([heavy, (light + other) / 2]),) * 3)
    groups = dataclasses.replace(groups, variance=torch.zeros_like(groups.k))
    scores = run_scores(torch.tensor([[1.0, 0.0]], dtype=torch.float64), k, 1.0, geometry, groups, None)
    mass = 6 * math.exp(3.0) + 2 * math.exp(-0.5)
    light_apart, other_apart = (math.exp(-0.5) - math.exp(-3.0)) / mass, (math.exp(2.0) - math.exp(-0.5)) / mass
    expected = [0.0] * 5 + [light_apart / 2, max(light_apart, other_apart / 2), other_apart]
    torch.testing.assert_close(scores, scores.new_tensor(expected), rtol=1e-9, atol=1e-12)
    assert run_order(scores, 1)[0] == 7


def test_groups_by_hand() -> None:
    geometry = Geometry(tile=4, sink=0, bundle=4, sub_means=1, run=1, block=4, clusters=2)
    near, far = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 5.0], dtype=torch.float64)
    k = torch.stack([near, far, near + 0.5, far, near, near, far, far])
    groups = tail_groups(k, k, None, geometry)
    assert groups.member.tolist() == [0, 1, 0, 1, 2, 2, 3, 3]
    torch.testing.assert_close(groups.k[0], near + 0.25)
    torch.testing.assert_close(groups.variance[0], torch.full((2,), 0.0625, dtype=torch.float64))
    torch.testing.assert_close(groups.v[1], far)
    hidden = torch.tensor([False, False, True, False] + [True] * 4)
    shown = tail_groups(k.masked_fill(hidden[:, None], float("nan")), k, hidden, geometry)
    torch.testing.assert_close(shown.k[0], near)
    assert shown.k.isfinite().all() and shown.variance.isfinite().all()
    # A key of another block changes nothing: no tile sees what comes after its prefix.
    other = torch.cat([k[:4], 100 * torch.ones(4, 2, dtype=torch.float64)])
    assert torch.equal(tail_groups(other, other, None, geometry).k[:2], groups.k[:2])


@given(st.integers(0, 2**16), st.sampled_from([0.1, 0.3]))
def test_the_spread_of_a_flat_tail_counts(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (30, 256))
    geometry = Geometry(tile=256, sink=0, sub_means=1, run=1, block=256, clusters=1)
    groups = tail_groups(k, k, None, geometry)
    exact = (q @ k.T * scale).logsumexp(dim=1)
    count = torch.tensor([256])
    second, first = (
        (tail_logits(q, groups, count, count, scale, limit)[:, 0] - exact).abs().mean() for limit in (3.0, 0.0)
    )
    assert second < 0.5 * first
    capped = tail_logits(99 * q, groups, count, count, 1.0, 2.0) - 99 * q @ groups.k.T - math.log(256)
    torch.testing.assert_close(capped.amax().item(), 2.0)


@pytest.mark.parametrize(("read", "within"), [(0, 0.03), (64, 0.06), (256, 0.1), (1024, 0.1), (2048, 0.1), (3072, 0.3)])
def test_keys_left_are_the_lighter_ones(read: int, within: float) -> None:
    """Of a group with normal scores of deviation 1 whose heaviest keys were read."""
    size = 4096
    scores = torch.special.ndtri((torch.arange(size, dtype=torch.float64) + 0.5) / size)
    groups = Groups(torch.zeros(size, dtype=torch.int64), *(torch.tensor([[x]]).double() for x in (0.0, 1.0, 0.0)))
    left = tail_logits(torch.ones(1, 1).double(), groups, torch.tensor([size - read]), torch.tensor([size]), 1.0, 3.0)
    assert left.item() == pytest.approx(scores[: size - read].logsumexp(0).item(), abs=within)


def test_stop_rules_by_hand() -> None:
    # One row; dense mass 1, bundles of mass 1, 0.5 and 0.1 with ten tokens each.
    masses, sizes = torch.tensor([[1.0, 1.0, 0.5, 0.1]]), torch.tensor([10, 10, 10])
    remaining, seen = torch.tensor([20, 10, 0]), torch.tensor([True])
    # After one bundle: gain 1/2, two times as much left: 1 / (1 + 1) = 0.5; after two: gain 0.2, 0.2 / 1.2.
    for budget, bundles, left in ((0.6, 1, 0.5), (0.5, 1, 0.5), (0.4, 2, 0.2 / 1.2), (0.1, 3, 0.0), (0.0, 3, 0.0)):
        read, tail = stop_after(masses, remaining, sizes, "tail", budget, seen)
        assert (read, tail.item()) == (bundles, pytest.approx(left)), budget
    # A horizon of four bundles: 4/2 after the first, 4/5 of a gain after the second, nothing is left after the third.
    for budget, bundles, left in ((0.6, 2, 0.2 / 1.2), (0.4, 3, 0.0)):
        read, tail = stop_after(masses, remaining, sizes, "tail", budget, seen, horizon=4)
        assert (read, tail.item()) == (bundles, pytest.approx(left)), budget
    assert stop_after(masses, remaining, sizes, "tail", 0.0, seen, most=2)[1].item() == pytest.approx(0.2 / 1.2)
    # The paper's: added over mass before, 1, 0.25 and 0.04.
    for tau, bundles in ((2.0, 1), (0.5, 2), (0.1, 3), (0.01, 3)):
        assert stop_after(masses, remaining, sizes, "gain", tau, seen)[0] == bundles, tau
    # The worst row decides for "tail", and a row that sees nothing has no say.
    two = torch.cat([masses, torch.tensor([[1.0, 0.0, 0.0, 9.0]])])
    assert stop_after(two, remaining, sizes, "tail", 0.5, torch.tensor([True, True]))[0] == 1
    worse = torch.cat([masses, torch.tensor([[0.1, 9.0, 9.0, 9.0]])])
    assert stop_after(worse, remaining, sizes, "tail", 0.5, torch.tensor([True, True]))[0] == 2
    assert stop_after(worse, remaining, sizes, "tail", 0.5, torch.tensor([True, False]))[0] == 1
    with pytest.raises(ValueError, match='rule must be "tail" or "gain"'):
        stop_after(masses, remaining, sizes, "mean", 0.5, seen)


def test_a_few_heavy_keys_are_found_wherever_they_are() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 512, 16, dtype=torch.float64) for _ in range(3))
    heavy = torch.randperm(400)[:12]
    q, k[:, :, heavy] = q + 4.0, 3.0
    got = sparse_attention(q, k, v, budgets=(0.3,), geometry=SMALL)
    exact, _ = reference.attention(q, k, v, visible=visible(q, k))
    assert ((got.output - exact).square().sum() / exact.square().sum()).item() < 1e-4
    assert (got.pairs / got.visible).item() < 0.3


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"budgets": (-0.1,)}, "budgets must be at least 0"),
        ({"budgets": (0.1, 0.2, 0.3)}, "one for each of 2 query heads"),
        ({"max_density": 0.0}, r"max_density must be in \(0, 1\]; got 0"),
        ({"window": 0}, "window goes with causal attention and is at least 1; got 0"),
        ({"window": 4, "causal": False}, "causal=False"),
        ({"rule": "mean"}, 'rule must be "tail" or "gain"'),
        ({"documents": (torch.zeros(1, 40), torch.zeros(1, 39))}, r"got causal=True and \(1, 40\), \(1, 39\) for B=1"),
        ({"documents": (torch.zeros(1, 40), torch.zeros(1, 40)), "causal": False}, "documents go with causal"),
    ],
)
def test_bad_input_is_refused(fields: dict[str, Any], says: str) -> None:
    q, k = torch.randn(1, 2, 40, 8), torch.randn(1, 1, 40, 8)
    with pytest.raises(ValueError, match=says):
        sparse_attention(q, k, k, **{"budgets": (0.5,), "geometry": SMALL, **fields})
    with pytest.raises(ValueError, match="as many keys as queries; got 40 and 39"):
        sparse_attention(q, k[:, :, 1:], k[:, :, 1:], budgets=(0.5,))
