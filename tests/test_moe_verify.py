"""Verification of large layers of experts: the site's own nodes at shortened sizes, or a decline that says why not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from capture import capture

from s2o_inductor.passes import moe, moe_verify
from s2o_inductor.passes.graph_utils import Refusal
from s2o_inductor.passes.records import ExpertsSite

transformers = pytest.importorskip("transformers")
# Sizes like those of real models: a width that is twice the inner one, as many experts as tokens, all alike.
SIZES = {
    "plain": (96, 72, 64, 3, 50),
    "width is both halves": (96, 48, 64, 3, 50),
    "width is inner": (96, 96, 64, 3, 50),
    "experts are tokens": (96, 72, 50, 3, 50),
    "one token": (96, 72, 64, 8, 1),
}


def captured(implementation: str, width: int, inner: int, experts: int, choices: int, tokens: int, **how: Any) -> Any:
    config = transformers.Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=choices
    )
    config._experts_implementation = implementation
    block = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.rand(tokens, experts).topk(choices).indices
    gm, _ = capture(block, torch.randn(tokens, width), ids, torch.rand(tokens, choices), **how)
    (site,), declined = moe.find_experts(gm.graph)
    assert not declined
    return gm.graph, site


def sizes_seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    run = moe_verify._run
    monkeypatch.setattr(moe_verify, "SHORTEN_ABOVE", 1000)
    monkeypatch.setattr(moe_verify, "MAX_ELEMENTS", 1000)
    monkeypatch.setattr(
        moe_verify, "_run", lambda site, routing, sizes: (seen.append(sizes), run(site, routing, sizes))[1]
    )
    return seen


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_large_site_is_verified_at_shortened_sizes(
    implementation: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, site = captured(implementation, *sizes)
    seen = sizes_seen(monkeypatch)
    outcome = moe_verify.check_experts(graph, site, always=True)
    assert outcome.passed and outcome.detail.endswith(", at shortened sizes")
    width, inner, experts, choices, tokens = sizes
    for size in {width, inner, experts, tokens} - {1}:
        assert all(replaced[size] < size for replaced in seen), size
    assert all(choices not in replaced for replaced in seen)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_symbolic_sizes_are_shortened_too(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, site = captured(implementation, *SIZES["plain"], dynamic=True)
    assert not isinstance(site.tokens.meta["example_value"].shape[0], int)
    sizes_seen(monkeypatch)
    assert moe_verify.check_experts(graph, site, always=True).passed


@pytest.mark.parametrize("wrong", [{"activation": "gelu"}, {"gate": "half_swapped"}, {"score": "input"}])
def test_a_misread_formula_fails_at_shortened_sizes(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    graph, site = captured("grouped_mm", *SIZES["plain"])
    sizes_seen(monkeypatch)
    misread: ExpertsSite = dataclasses.replace(site, spec=dataclasses.replace(site.spec, **wrong))
    outcome = moe_verify.check_experts(graph, misread, always=True)
    assert not outcome.passed and "differs from the code it would replace" in outcome.detail


def test_sizes_that_cannot_be_told_apart_decline_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    # 50 tokens x 3 choices are 150 rows, and so many experts there are.
    graph, site = captured("grouped_mm", 96, 72, 150, 3, 50)
    sizes_seen(monkeypatch)
    with pytest.raises(Refusal, match="too large to verify, and its sizes cannot be told apart"):
        moe_verify.check_experts(graph, site, always=True)
    monkeypatch.setattr(moe_verify, "MAX_ELEMENTS", 2**25)
    assert moe_verify.check_experts(graph, site, always=True).detail.startswith("verified, max error")


# ------------------------------------------------------------------------------------- sites of a GPU


def inputs_of(site: ExpertsSite, short: dict[int, int]) -> dict[Any, Any]:
    """Random inputs of a site, its weights at shortened sizes."""
    generator = torch.Generator().manual_seed(0)
    return {
        node: moe_verify._example(node, site, "random", short if node in (site.w1, site.w2) else {}, generator)
        for node in moe_verify._inputs(site)
    }


def test_nodes_of_a_gpu_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _, site = captured("grouped_mm", *SIZES["plain"])
    inputs = inputs_of(site, {})
    expected = moe_verify._replay(site, {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}, {},
                                  moe_verify._in_double)  # fmt: skip
    gpu, named = torch.device("cuda", 0), 0
    for node in site.region:
        if getattr(node.target, "__name__", "") in ("arange", "histc"):
            named += 1
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": gpu}
        if node.target == "float":  # a GPU counts integers
            node.target = "int"
    assert named == 2 and any(node.kwargs.get("device") == gpu for node in site.region)
    results, replay = [], moe_verify._replay
    monkeypatch.setattr(moe_verify, "_replay", lambda *given: results.append(replay(*given)))
    moe_verify._try_on_cpu(site, inputs, {})
    torch.testing.assert_close(results[0], expected)


def test_an_index_out_of_bounds_is_found_before_a_gpu_meets_it() -> None:
    _, site = captured("batched_mm", *SIZES["plain"])
    with pytest.raises(Refusal, match=r"could not be verified: index .* out of bounds"):
        moe_verify._try_on_cpu(site, inputs_of(site, {64: 8}), {})
