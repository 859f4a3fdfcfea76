"""The pictures: that they show the numbers they are given, and refuse what they cannot draw."""

from __future__ import annotations

import sys

import pytest
import torch

from s2o_inductor import viz
from s2o_inductor.errors import S2OError
from s2o_inductor.kernels.reference_sparse import chosen_keys, sparse_attention
from s2o_inductor.report import GraphReport, Reading, Report, Site
from s2o_inductor.sparse_policy import Geometry

pytest.importorskip("matplotlib").use("Agg")


def test_density_is_drawn_for_what_was_approximated() -> None:
    reading = Reading(0.25, (0.2, 0.3), 0.26, 0.3, 0.1, None)
    sites = [Site("attention", "a", "rewritten", reading=reading), Site("attention", "b", "rewritten")]
    axes = viz.density(Report([GraphReport(sites)]))
    (image,) = axes.images
    assert image.get_array().tolist() == [[0.2, 0.3]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a"]
    with pytest.raises(S2OError, match="nothing was approximated"):
        viz.density(Report([GraphReport(sites[1:])]))


def test_the_keys_that_tiles_read_are_those_that_were_computed() -> None:
    torch.manual_seed(0)
    q, k = 4 * torch.randn(1, 1, 96, 8), torch.randn(1, 1, 96, 8)
    geometry = Geometry(tile=16, sink=8, bundle=16, sub_means=4, run=4, block=8, clusters=2)
    chosen = chosen_keys(q[0, 0], k[0, 0], k[0, 0], budget=0.6, geometry=geometry)
    (image,) = viz.tokens_read(chosen).images
    assert torch.equal(torch.as_tensor(image.get_array()).bool(), chosen)
    seen = torch.ones(96, 96, dtype=torch.bool).tril() & chosen.repeat_interleave(16, 0)
    assert seen.sum() == sparse_attention(q, k, k, budgets=(0.6,), geometry=geometry).pairs.item()
    with pytest.raises(S2OError, match=r"\(tiles, keys\); got a tensor of shape \(96,\)"):
        viz.tokens_read(chosen[0].bool())


def test_curves_are_sorted_and_named() -> None:
    axes = viz.error_against_density({"one": [(0.2, 1e-3), (0.1, 1e-2)], "other": [(0.3, 1e-4)]})
    assert axes.lines[0].get_xydata().tolist() == [[0.1, 1e-2], [0.2, 1e-3]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "other"]
    with pytest.raises(S2OError, match="'none' has no points"):
        viz.error_against_density({"none": []})


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(S2OError, match=r"s2o-inductor\[viz\]"):
        viz.tokens_read(torch.ones(2, 2, dtype=torch.bool))
