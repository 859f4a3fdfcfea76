"""nn.MultiheadAttention opened up: the graph computes the same, and the attention inside is found."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from capture import assert_means_what_it_says, capture
from torch import Tensor, nn

from s2o_inductor.passes import mha
from s2o_inductor.passes.attention import find_attention
from s2o_inductor.passes.records import AttentionSite

N, L, S, E, HEADS = 3, 7, 9, 32, 4


def opened(function: Callable[..., Any], *args: Any, tolerance: float = 1e-5, **options: Any) -> AttentionSite:
    """Opens the one multi-head attention of a function; the site that is then found."""
    gm, inputs = capture(function, *args, **options)
    expected = gm(*[value.clone() if isinstance(value, Tensor) else value for value in inputs])
    assert mha.expand_all(gm.graph) == (1, [])
    assert not mha.find_mha(gm.graph)
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    sites, declined = find_attention(gm.graph)
    assert not declined
    assert len(sites) == 1
    with torch.no_grad():
        assert_means_what_it_says(gm, sites, inputs)
    return sites[0]


def refused(function: Callable[..., Any], *args: Any) -> str:
    """Why the one multi-head attention of a function stays closed; the graph must be as it was."""
    gm, _ = capture(function, *args)
    before = str(gm.graph)
    count, declined = mha.expand_all(gm.graph)
    assert count == 0
    assert str(gm.graph) == before
    assert len(declined) == 1
    return declined[0].reason


def masks(name: str, batch: int = N) -> Tensor | None:
    """An attention mask in each form that the module takes."""
    generator = torch.Generator().manual_seed(5)
    return {
        "none": lambda: None,
        "bool": lambda: torch.rand(L, S, generator=generator) < 0.4,
        "float": lambda: torch.randn(L, S, generator=generator),
        "bool per head": lambda: torch.rand(batch * HEADS, L, S, generator=generator) < 0.4,
        "float per head": lambda: torch.randn(batch * HEADS, L, S, generator=generator),
        "causal": lambda: torch.full((L, S), -math.inf).triu(1),
    }[name]()  # type: ignore[no-any-return]


def paddings(name: str, batch: int = N) -> Tensor | None:
    """A key padding mask in each form; one example hides every key."""
    if name == "none":
        return None
    hidden = torch.rand(batch, S, generator=torch.Generator().manual_seed(6)) < 0.4
    hidden[-1] = True
    return hidden if name == "bool" else torch.zeros(batch, S).masked_fill(hidden, -math.inf)


def same_type(mask: str, padding: str) -> bool:
    """The module warns, which breaks the graph, when one mask is boolean and the other is not."""
    return "none" in (mask, padding) or mask.startswith("bool") == (padding == "bool")


COMBINATIONS = [
    combination
    for combination in itertools.product(
        (False, True), ("none", "bool", "float", "bool per head", "float per head", "causal"), ("none", "bool", "float")
    )
    if same_type(*combination[1:])
]


@pytest.mark.parametrize(("need_weights", "mask", "padding"), COMBINATIONS)
def test_masks(need_weights: bool, mask: str, padding: str) -> None:
    module = nn.MultiheadAttention(E, HEADS).eval()
    attn_mask, key_padding_mask = masks(mask), paddings(padding)

    def attend(q: Tensor, k: Tensor) -> Tensor:
        output: Tensor
        output, _ = module(q, k, k, key_padding_mask, need_weights, attn_mask, is_causal=mask == "causal")
        return output

    site = opened(attend, torch.randn(L, N, E), torch.randn(S, N, E))
    hint = mask == "causal" and padding == "none" and not need_weights
    assert site.causal is hint
    if hint or need_weights:
        assert len(site.masks) == (0 if hint else (mask != "none") + (padding != "none"))
    assert site.empty == ("nan" if need_weights and site.masks else "zero")


def modules() -> Iterator[tuple[str, nn.Module, list[Tensor]]]:
    """Module options and inputs."""
    x, y, z, narrow = torch.randn(N, L, E), torch.randn(N, S, E), torch.randn(N, S, E), torch.randn(N, S, 24)
    yield "self", nn.MultiheadAttention(E, HEADS, batch_first=True), [x, x, x]
    yield "cross", nn.MultiheadAttention(E, HEADS, batch_first=True), [x, y, y]
    yield "three inputs", nn.MultiheadAttention(E, HEADS, batch_first=True), [x, y, z]
    yield "without bias", nn.MultiheadAttention(E, HEADS, bias=False), [x, x, x]
    yield "other widths", nn.MultiheadAttention(E, HEADS, kdim=24, batch_first=True), [x, narrow, z]
    yield "widths without bias", nn.MultiheadAttention(E, HEADS, kdim=24, bias=False, batch_first=True), [x, narrow, y]
    yield "unbatched", nn.MultiheadAttention(E, HEADS), [x[0], y[0], z[0]]
    yield "float64", nn.MultiheadAttention(E, HEADS, dtype=torch.float64), [x.double()] * 3


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("case", list(modules()), ids=lambda case: case[0])
def test_module_options(case: tuple[str, nn.Module, list[Tensor]], need_weights: bool) -> None:
    _, module, inputs = case

    def attend(*tensors: Tensor) -> Tensor:
        q, k, v = (tensors[0], tensors[len(tensors) // 2], tensors[-1])
        output: Tensor = module(q, k, v, need_weights=need_weights)[0]
        return output

    distinct = list({id(value): value for value in inputs}.values())
    site = opened(attend, *distinct)
    assert site.scale == pytest.approx((E // HEADS) ** -0.5)


def test_an_unbatched_mask() -> None:
    module = nn.MultiheadAttention(E, HEADS)
    mask, padding = masks("float per head", 1), paddings("float", 2)
    assert padding is not None
    opened(lambda q, k: module(q, k, k, padding[0], True, mask)[0], torch.randn(L, E), torch.randn(S, E))


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_in_training(need_weights: bool) -> None:
    module = nn.MultiheadAttention(E, HEADS, dropout=0.2).train()
    gm, _ = capture(lambda x: module(x, x, x, need_weights=need_weights)[0], torch.randn(L, N, E))
    assert mha.expand_all(gm.graph) == (1, [])
    (site,), _ = find_attention(gm.graph)
    assert site.dropout == 0.2


def test_gradients_of_projections() -> None:
    module = nn.MultiheadAttention(E, HEADS)
    x = torch.randn(L, N, E, requires_grad=True)
    module(x, x, x)[0].square().sum().backward()
    expected = [x.grad, *(parameter.grad for parameter in module.parameters())]
    gm, inputs = capture(lambda x: module(x, x, x)[0], x)
    assert mha.expand_all(gm.graph) == (1, [])
    gm.recompile()
    copies = [value.detach().requires_grad_() for value in inputs]
    gm(*copies)[0].square().sum().backward()
    found = [value.grad for value in copies]
    for gradient in expected:
        assert any(gradient.shape == other.shape and torch.allclose(gradient, other, atol=1e-5) for other in found)


@pytest.mark.parametrize("converted", [False, True], ids=["float32 input", "bfloat16 input"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast(need_weights: bool, converted: bool) -> None:
    module = nn.MultiheadAttention(E, HEADS)

    def attend(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.mm(x.view(-1, E), torch.eye(E)).view(L, N, E) if converted else x
            output: Tensor = module(x, x, x, need_weights=need_weights)[0]
        return output

    site = opened(attend, torch.randn(L, N, E), tolerance=3e-2)
    assert site.output.meta["example_value"].dtype == torch.bfloat16


def test_an_encoder_layer_in_training() -> None:
    layer = nn.TransformerEncoderLayer(E, HEADS, 48, dropout=0.0, batch_first=True).train()
    site = opened(layer, torch.randn(N, L, E))
    assert site.k.node.meta["example_value"].shape == (N, HEADS, L, E // HEADS)


def test_symbolic_lengths() -> None:
    module = nn.MultiheadAttention(E, HEADS)
    x = torch.randn(L, N, E)
    for dim in (0, 1):
        torch._dynamo.maybe_mark_dynamic(x, dim)
    site = opened(lambda x: module(x, x, x, need_weights=False)[0], x, dynamic=None)
    assert isinstance(site.q.node.meta["example_value"].shape[0], torch.SymInt)


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], int, str]] = {
    "bias_k": ({"add_bias_kv": True}, {}, 0, "bias_k is not supported"),
    "add_zero_attn": ({"add_zero_attn": True}, {}, 0, "add_zero_attn is not supported"),
    "weights": ({}, {}, 1, "attention weights are used elsewhere"),
    "weights per head": ({}, {"average_attn_weights": False}, 1, "attention weights are used elsewhere"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_stays_closed(name: str) -> None:
    options, arguments, index, reason = REFUSALS[name]
    module = nn.MultiheadAttention(E, HEADS, **options)
    x = torch.randn(L, N, E)
    if index == 0:
        assert refused(lambda x: module(x, x, x, **arguments)[0], x) == reason
    else:
        assert refused(lambda x: module(x, x, x, **arguments), x) == reason


def test_a_learned_mask_closes_it_again() -> None:
    """What the finder declines inside is not left opened."""
    module = nn.MultiheadAttention(E, HEADS)
    bias = torch.zeros(L, L, requires_grad=True)
    reason = refused(lambda x, bias: module(x, x, x, attn_mask=bias)[0], torch.randn(L, N, E), bias)
    assert reason == "the additive bias needs a gradient"


def test_undo_restores_the_graph() -> None:
    module = nn.MultiheadAttention(E, HEADS)
    gm, _ = capture(lambda x: module(x, x, x)[0].relu(), torch.randn(L, N, E))
    before, graph = str(gm.graph), gm.graph
    expansion = mha.expand_mha(graph, mha.find_mha(graph)[0])
    assert isinstance(expansion, mha.Expansion)
    assert str(graph) != before
    expansion.undo(graph)
    assert str(graph) == before
