"""The quality benchmark: its selections, tails and errors, against dense attention and against the reference."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # scripts that import each other, as when they are run

import bench
from sparse_baselines import METHODS, built_score, by_tokens, pbs, represented, true_mass
from sparse_quality import Curve, Selection, Tile, built, built_tile, clusters, evaluate, make_tile, runs
from synthetic_heads import KINDS, synthetic_head

from s2o_inductor.kernels.reference_sparse import sparse_attention
from s2o_inductor.sparse_policy import Geometry

LENGTH, START = 1536, 1408


def tile_of(kind: str, heads: int = 1, start: int = START, seed: int = 0, sink: int = 128) -> Tile:
    made = [synthetic_head(kind, LENGTH, 64, seed + i) for i in range(heads)]
    return make_tile(torch.stack([q for q, _, _ in made]), made[0][1], made[0][2], start, sink)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_part_is_dense_attention(kind: str) -> None:
    q, k, v = (x[None, None] for x in synthetic_head(kind, LENGTH, 64))
    tile = make_tile(q[0], k[0, 0], v[0, 0], START)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(tile.exact, dense[0, :, START : START + 128], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_selections_read_every_token_once_and_more_with_looser_thresholds(name: str) -> None:
    method, tile = METHODS[name], tile_of("mix", heads=2)
    chosen = method.select(tile, method.knobs)
    everything = torch.arange(tile.k.shape[0]).expand(2, -1)
    # The prefix is visible to all rows, so an order that holds each of its tokens once never reads an invisible key.
    assert torch.equal(chosen.order.sort(dim=1).values, everything)
    assert (chosen.tokens.diff(dim=1) >= 0).all()
    assert (chosen.tokens <= tile.k.shape[0]).all()


@pytest.mark.parametrize("kind", ["vertical", "querymix", "diffuse"])
def test_reading_everything_is_exact(kind: str) -> None:
    tile = tile_of(kind, heads=2)
    chosen = by_tokens(tile, [0.0], score=represented, rule="tail", bundle=128)
    assert (chosen.tokens == tile.k.shape[0]).all()
    for tail in (None, runs(tile, 64, exact=True), clusters(tile, 256, 8)):
        assert evaluate(tile, chosen, tail).max() < 1e-8


def test_oracle_beats_the_other_selections_at_equal_density() -> None:
    tile, shares = tile_of("semantic"), [0.2, 0.4]
    oracle = evaluate(tile, by_tokens(tile, shares, score=true_mass, rule="count", bundle=128))
    ours = evaluate(tile, by_tokens(tile, shares, score=represented, rule="count", bundle=128))
    order = pbs(tile, [0.5]).order
    blocks = evaluate(
        tile, Selection(order, 128, by_tokens(tile, shares, score=true_mass, rule="count", bundle=128).taken)
    )
    assert (oracle <= ours).all()
    assert (oracle < blocks).all()


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    budget=st.sampled_from([0.05, 0.3, 0.7, 0.95]),
    blocks=st.integers(2, 8),
    seed=st.integers(0, 99),
)
def test_ours_is_the_reference_attention(kind: str, budget: float, blocks: int, seed: int) -> None:
    geometry = Geometry(bundle=128)
    start = geometry.sink + 128 * blocks
    made = [synthetic_head(kind, LENGTH, 32, seed + i) for i in range(2)]
    q, k, v = torch.stack([q for q, _, _ in made]), made[0][1], made[0][2]
    end = start + 128
    reference = sparse_attention(
        q[None, :, start:end], k[None, None, :end], v[None, None, :end], budgets=(budget,), geometry=geometry
    )
    tile = built_tile(q, k, v, start, geometry=geometry)
    chosen = by_tokens(tile, [budget], score=built_score, rule="tail", bundle=128, horizon=geometry.horizon)
    assert torch.equal(chosen.taken[:, 0], reference.bundles[0, :, 0])
    error = (reference.output[0] - tile.exact).square().sum(dim=(1, 2)) / tile.exact.square().sum(dim=(1, 2))
    measured = evaluate(tile, chosen, built(tile))[:, 0]
    torch.testing.assert_close(measured, error, rtol=1e-2, atol=1e-8)
    assert torch.equal(chosen.tokens[:, 0] * 128 + tile.dense_pairs, reference.pairs[0])
    assert int(reference.visible[0, 0]) == tile.visible_pairs


@settings(max_examples=12, deadline=None)
@given(start=st.integers(3, 11), sink=st.sampled_from([64, 128]), block=st.sampled_from([128, 256, 512]))
def test_clusters_stay_inside_their_blocks(start: int, sink: int, block: int) -> None:
    tile = tile_of("semantic", start=128 * start, sink=sink)
    made = clusters(tile, block, 4)
    position = torch.arange(tile.k.shape[0]) + sink
    groups = torch.zeros(made.k.shape[0]).index_add_(0, made.group, torch.ones(position.shape[0]))
    for group in groups.nonzero().flatten().tolist():
        assert position[made.group == group].div(block, rounding_mode="floor").unique().numel() == 1
    # Statistics are those of the members: together they weigh as much as the prefix.
    torch.testing.assert_close((groups[:, None] * made.v).sum(dim=0), tile.v.sum(dim=0), rtol=1e-3, atol=1e-3)


def test_first_order_tail_never_weighs_too_much() -> None:
    tile = tile_of("querymix")
    rest = torch.ones(1, tile.k.shape[0])
    true = tile.weights[0].sum(dim=0)
    for tail in (runs(tile, 64), clusters(tile, 256, 8, limit=0.0)):
        assert (tail.masses(tile, 0, rest)[0][0] <= true * 1.0001).all()  # Jensen
    first, second = (runs(tile, 64, limit=x).masses(tile, 0, rest)[0][0] for x in (0.0, 3.0))
    assert (second > first).all()


def test_curve_interpolates_and_never_extrapolates() -> None:
    curve = Curve(torch.tensor([0.1, 0.4]), torch.tensor([[1e-2, 1e-4], [1e-2, 1e-4]]))
    assert curve.error_at(0.2, "geometric") == pytest.approx(1e-3, rel=1e-3)
    assert curve.density_at(1e-3, "arithmetic") == pytest.approx(0.2, rel=1e-3)
    assert curve.error_at(0.5, "geometric") != curve.error_at(0.5, "geometric")


def test_command_prints_a_table_of_given_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [synthetic_head("mix", 2048, 32, seed) for seed in range(2)]
    q, k, v = (torch.stack([head[i] for head in made])[None] for i in range(3))
    torch.save({"q": q, "k": k[:, :1], "v": v[:, :1]}, tmp_path / "heads.pt")
    names = ["block mean", "S2O, clusters"]
    bench.main(["quality", "--heads", str(tmp_path / "heads.pt"), "--tiles", "2", "--methods", *names, "--levels"])
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in [*names, "PBS-Attn"])
    torch.save({"q": q}, tmp_path / "heads.pt")
    with pytest.raises(SystemExit, match="k, v is not in it"):
        bench.main(["quality", "--heads", str(tmp_path / "heads.pt")])
