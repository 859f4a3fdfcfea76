"""The attention finder: every spelling gives the same record, the record means what the graph computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture import assert_means_what_it_says, capture, capture_all
from hypothesis import given, settings
from hypothesis import strategies as st
from near_misses import NEAR_MISSES
from spellings import Cell, Spelling, grid, spellings
from torch import Tensor, fx

from s2o_inductor.passes.attention import find_attention
from s2o_inductor.passes.records import AttentionSite, Declined, MaskOperand, Operand

INF = math.inf


def find(gm: fx.GraphModule) -> tuple[list[AttentionSite], list[Declined]]:
    """`find_attention`, which must leave the graph as it is."""
    before = str(gm.graph)
    found = find_attention(gm.graph)
    assert str(gm.graph) == before
    return found


def find_one(function: Callable[..., Any], *args: Any, **options: Any) -> AttentionSite:
    """The only site of a function, its record checked against what the graph computes."""
    gm, inputs = capture(function, *args, **options)
    sites, declined = find(gm)
    assert len(sites) == 1, [refusal.reason for refusal in declined]
    assert not declined
    assert_region_is_closed(sites[0])
    assert_means_what_it_says(gm, sites, inputs)
    return sites[0]


def reasons(function: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    """Why a function without a site has none."""
    gm, _ = capture(function, *args, **options)
    sites, declined = find(gm)
    assert not sites
    return [refusal.reason for refusal in declined]


def assert_region_is_closed(site: AttentionSite) -> None:
    """Nothing outside reads the region but for its output, and the operands are outside."""
    region = set(site.region)
    assert site.output in region
    for node in region - {site.output}:
        assert set(node.users) <= region
    operands = [site.q.node, site.k.node, site.v.node, *(mask.node for mask in site.masks)]
    assert not region.intersection([*operands, *([site.sinks] if site.sinks else [])])


def shape_after(operand: Operand | MaskOperand) -> tuple[int, ...]:
    """The shape of an operand in the op's layout."""
    value = torch.empty(operand.node.meta["example_value"].shape, device="meta")
    for method, args in operand.steps:
        value = getattr(value, method)(*args)
    return tuple(value.shape)


def record(site: AttentionSite) -> tuple[Any, ...]:
    """(scale, groups, kinds of masks, empty rows), the same for every spelling of one attention."""
    groups = shape_after(site.q)[1] // shape_after(site.k)[1]
    kinds = tuple("additive" if mask.kind == "additive" else "boolean" for mask in site.masks)
    return (pytest.approx(site.scale, rel=1e-3), groups, kinds, site.empty)


# ------------------------------------------------------------------------------------ the grid of 96


@pytest.mark.parametrize("cell", list(grid()), ids=str)
def test_every_cell_of_the_grid_is_found(cell: Cell) -> None:
    with torch.no_grad():
        site = find_one(cell.function(), *cell.inputs())
    kinds = {"none": (), "add": ("additive",), "where": ("boolean",), "causal": ("boolean",)}[cell.mask]
    assert record(site) == (32**-0.5, 4 if cell.grouped else 1, kinds, "nan" if kinds else "zero")
    assert site.q.node.op == site.k.node.op == site.v.node.op == "placeholder"


# ------------------------------------------------------------------------------- random spellings


@settings(max_examples=300)
@given(spelling=spellings(), dtype=st.sampled_from((torch.float32, torch.bfloat16)))
def test_the_record_does_not_depend_on_the_spelling(spelling: Spelling, dtype: torch.dtype) -> None:
    with torch.no_grad():
        site = find_one(spelling, *spelling.inputs(dtype))
    assert spelling.expected == record(site)
    assert site.dropout == 0.0


@settings(max_examples=40)
@given(spelling=spellings())
def test_symbolic_lengths_give_the_same_record(spelling: Spelling) -> None:
    inputs = spelling.inputs()
    for value in inputs:
        for dim in (0, value.dim() - 2):
            if value.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(value, dim)
    with torch.no_grad():
        site = find_one(spelling, *inputs, dynamic=None)
    assert (site.empty, len(site.masks)) == (spelling.expected[3], len(spelling.expected[2]))
    assert site.scale == pytest.approx(spelling.expected[0], rel=1e-3)


# --------------------------------------------------------------------------------------- near misses


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone(name: str) -> None:
    case = NEAR_MISSES[name]
    found = reasons(case.function, *case.inputs())
    if case.reason is None:
        assert not found
    else:
        assert found
        assert all(case.reason in reason for reason in found), found


def test_there_are_enough_near_misses() -> None:
    assert len(NEAR_MISSES) >= 100


# ------------------------------------------------------------------------------------ attention calls


def operands(shared: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """q (2, 4, 12, 8), k and v (2, shared, 12, 8)."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, 12, 8, generator=generator) for heads in (4, shared, shared))
    return q, k, v


VISIBLE = torch.rand(12, 12, generator=torch.Generator().manual_seed(4)) < 0.6
VISIBLE[3] = False
BIAS = torch.zeros(12, 12).masked_fill(~VISIBLE, -INF)
sdpa = F.scaled_dot_product_attention

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "plain": (lambda q, k, v: sdpa(q, k, v), {"scale": 8**-0.5}),
    "keywords": (lambda q, k, v: sdpa(query=q, key=k, value=v, attn_mask=None, dropout_p=0), {"causal": False}),
    "positional": (lambda q, k, v: sdpa(q, k, v, None, 0.0, True), {"causal": True}),
    "causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), {"causal": True, "empty": "zero"}),
    "scale": (lambda q, k, v: sdpa(q, k, v, scale=0.3), {"scale": 0.3}),
    "scale on queries too": (lambda q, k, v: sdpa(q * 2.0, k, v, scale=0.3), {"scale": 0.6}),
    "integer scale": (lambda q, k, v: sdpa(q, k, v, scale=1), {"scale": 1.0}),
    "boolean mask": (lambda q, k, v: sdpa(q, k, v, VISIBLE), {"empty": "zero", "kinds": ("visible",)}),
    "added mask": (lambda q, k, v: sdpa(q, k, v, BIAS), {"empty": "zero", "kinds": ("additive",)}),
    "mask of a batch": (lambda q, k, v: sdpa(q, k, v, VISIBLE.expand(2, 1, -1, -1)), {"kinds": ("visible",)}),
    "three dimensions": (lambda q, k, v: sdpa(q[0], k[0], v[0], VISIBLE), {"kinds": ("visible",)}),
    "two dimensions": (lambda q, k, v: sdpa(q[0, 0], k[0, 0], v[0, 0]), {}),
    "five dimensions": (lambda q, k, v: sdpa(q[None], k[None], v[None], VISIBLE), {"kinds": ("visible",)}),
    "merged heads": (lambda q, k, v: sdpa(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)), {}),
    "dropout switched off": (lambda q, k, v: sdpa(q, k, v, dropout_p=0), {"dropout": 0.0}),
    "up-cast": (lambda q, k, v: sdpa(q.double(), k.double(), v.double()), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_attention_calls(name: str) -> None:
    function, expected = CALLS[name]
    site = find_one(function, *operands())
    assert site.scale == pytest.approx(expected.get("scale", 8**-0.5))
    assert site.causal is expected.get("causal", False)
    assert site.empty == expected.get("empty", "zero")
    assert tuple(mask.kind for mask in site.masks) == expected.get("kinds", ())
    assert site.dropout == expected.get("dropout", 0.0)


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_enable_gqa(shared: int) -> None:
    site = find_one(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), *operands(shared=shared))
    assert shape_after(site.k) == (2, shared, 12, 8)
    assert site.k.steps == site.v.steps == ()


def test_dropout_of_a_call_and_of_weights() -> None:
    called, _ = find(capture(lambda q, k, v: sdpa(q, k, v, dropout_p=0.2), *operands())[0])
    written, _ = find(capture(lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.2) @ v, *operands())[0])
    in_place, _ = find(capture(_dropout_in_place, *operands())[0])
    assert [site.dropout for site in (*called, *written, *in_place)] == [0.2, 0.2, 0.2]


def _dropout_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    F.dropout(weights, 0.2, True, True)
    return weights @ v


def test_a_scale_that_is_not_known_yet_is_declined() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return sdpa(q, k, v, scale=scale)

    def written(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return ((q @ k.mT) * scale).softmax(-1) @ v

    for function in (attend, written):
        (gm, _), *_ = capture_all(function, *operands(), 0.3, dynamic=True)
        sites, declined = find(gm)
        assert not sites
        assert [refusal.reason for refusal in declined] == ["scale is not a constant yet"]


# --------------------------------------------------------------------- forms that the strategy lacks


def baddbmm_with_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scale and mask inside the product."""
    bias = BIAS[None].expand(8, 12, 12)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.3)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(2, 4, 12, 8)


def alibi_as_in_bloom(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bias of (B * H, 1, S) inside the product, a mask after the view."""
    slopes = torch.arange(1, 5).float()[None, :, None] * torch.arange(12)[None, None]
    alibi = slopes.expand(2, 4, 12).reshape(8, 1, 12)
    scores = alibi.baddbmm(batch1=q.flatten(0, 1), batch2=k.flatten(0, 1).transpose(-1, -2), beta=1.0, alpha=0.3)
    weights = (scores.view(2, 4, 12, 12) + BIAS).softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.view(8, 12, 12), v.flatten(0, 1)).view(2, 4, 12, 8)


def heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """einsum on (B, S, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores + BIAS, dim=-1), v)


def strange_letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """einsum with other letters, operands swapped, and an implicit result."""
    scores = torch.einsum("xyjc,xyic->xyij", k, q) * 0.3
    return torch.einsum("xyjz,xyij->xyiz", v, scores.softmax(-1))


def scores_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """k q^T, transposed; v^T p^T, transposed."""
    scores = (k @ q.mT * 0.3).transpose(2, 3)
    return (v.mT @ scores.softmax(-1).mT).mT


def heads_tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query head h reads key head h % 2: other groups than repeat_kv makes."""
    return ((q @ k[:, :2].repeat(1, 2, 1, 1).mT) * 0.3).softmax(-1) @ v[:, :2].repeat(1, 2, 1, 1)


def heads_of_a_group_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped with the group as the major axis, as in (B, G, Hkv, S, D)."""
    q = q.view(2, 2, 2, 12, 8)
    return ((q @ k[:, None, :2].mT) * 0.3).softmax(-1) @ v[:, None, :2]


def groups_in_the_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads of a group merged into the queries for one product."""
    merged = q.reshape(2, 2, 2 * 12, 8)
    scores = ((merged @ k[:, :2].mT) * 0.3).view(2, 2, 2, 12, 12).view(2, 4, 12, 12) + BIAS
    return (scores.softmax(-1).view(2, 2, 24, 12) @ v[:, :2]).view(2, 4, 12, 8)


def shared_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One key head for all, broadcast by the product."""
    return ((q @ k[:, :1].mT) * 0.3).softmax(-1) @ v[:, :1]


def keys_shared_by_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One set of keys and values for every example."""
    return ((q @ k[0].mT) * 0.3 + BIAS).softmax(-1) @ v[0]


def windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask per window, the windows merged into the batch (Swin)."""
    scores = ((q * 0.3) @ k.mT).view(1, 2, 4, 12, 12) + torch.stack([BIAS, BIAS.mT])[None, :, None]
    return scores.view(2, 4, 12, 12).softmax(-1) @ v


def one_head_without_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, S, D)."""
    return ((q[:, 0] @ k[:, 0].mT) * 0.3 + BIAS).softmax(-1) @ v[:, 0]


def matrices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(S, D)."""
    return torch.softmax(torch.matmul(q[0, 0], k[0, 0].t()) * 0.3, 1) @ v[0, 0]


def one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A decoding step."""
    return ((q[:, :, -1:] @ k.mT) * 0.3).masked_fill(~VISIBLE[-1], -INF).softmax(-1) @ v


def pooling(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query per head, without an axis for it."""
    weights = (torch.einsum("bhd,bhkd->bhk", q[:, :, 0], k) * 0.3).softmax(-1)
    return torch.einsum("bhk,bhkd->bhd", weights, v)


def one_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first decoding step."""
    return ((q @ k[:, :, :1].mT) * 0.3).softmax(-1) @ v[:, :, :1]


def two_masks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal and padding, each in its own way."""
    scores = (q @ k.mT * 0.3).masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -INF)
    return torch.where(VISIBLE[1], scores, -INF).softmax(-1) @ v


def mask_by_assignment(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """scores[mask] = -inf."""
    scores = q @ k.mT * 0.3
    scores[(~VISIBLE).expand(2, 4, 12, 12)] = -INF
    return scores.softmax(-1) @ v


def chained_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every step in place, results not rebound."""
    scores = q @ k.mT
    scores.mul_(0.3)
    scores.add_(BIAS)
    scores.masked_fill_(~VISIBLE.mT, -INF)
    return scores.softmax(-1) @ v


def cache_written_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A key cache written in place just before it is read."""
    cache = torch.zeros_like(k)
    cache[:, :, :6] = k[:, :, :6]
    cache[:, :, 6:].copy_(v[:, :, 6:])
    return ((q @ cache.mT) * 0.3).softmax(-1) @ v


def values_written_meanwhile(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A value cache written between scores and output: the output sees the write."""
    v = v.clone()
    weights = ((q @ k.mT) * 0.3).softmax(-1)
    v[:, :, 0] = 0.0
    return weights @ v


def safe_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows without keys give zero."""
    return torch.ops.aten._safe_softmax(q @ k.mT * 0.3 + BIAS, -1) @ v


def sinks_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A logit per head that takes weight and has no value (GPT-OSS)."""
    logits = torch.arange(4.0)
    scores = torch.cat([q @ k.mT * 0.3 + BIAS, logits.reshape(1, -1, 1, 1).expand(2, -1, 12, -1)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return F.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1] @ v


def sinks_in_front(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same on the other side."""
    logits = torch.arange(4.0)
    scores = torch.cat([logits[:, None, None].expand(2, 4, 12, 1), q @ k.mT * 0.3], dim=3)
    return scores.softmax(-1)[:, :, :, 1:] @ v


def unread_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Views of weights and keys that nobody reads."""
    weights = ((q @ k.mT) * 0.3).softmax(-1)
    weights.transpose(1, 2).float()
    k.mT.contiguous()
    return weights @ v


def repeated_keys_changed_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The copy that repeat_interleave made is changed: the keys in front of it are not what is read."""
    k, v = (x[:, :2].repeat_interleave(2, dim=1) for x in (k, v))
    k.mul_(0.5)
    return ((q @ k.mT) * 0.3).softmax(-1) @ v


def shifted_by_another_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The maximum of something else is a mask like any other: it may be infinite."""
    return (q @ k.mT * 0.3 - BIAS[None, None].amax(-1, keepdim=True)).softmax(-1) @ v


def negated_constant(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A fill value computed from a constant."""
    return torch.where(VISIBLE, q @ k.mT * 0.3, -torch.full((), INF)).softmax(-1) @ v


def mask_over_merged_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads of a group merged into the queries, masked while merged, apart afterwards."""
    merged = q.reshape(2, 2, 2 * 12, 8)
    scores = (merged @ k[:, :2].mT) * 0.3 + torch.cat([BIAS, BIAS.mT])
    weights = scores.view(2, 2, 2, 12, 12).softmax(-1)
    return weights.view(2, 2, 24, 12) @ v[:, :2]


def negative_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Filled with +inf, then negated."""
    return ((q @ k.mT * -0.3).masked_fill(~VISIBLE, INF) * -1.0).softmax(-1) @ v


def mask_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(1 - mask) * 1e9 taken away."""
    visible = VISIBLE | torch.eye(12, dtype=torch.bool)
    return (q @ k.mT * 0.3 - 1e9 * (1.0 - visible.float())).softmax(-1) @ v


FORMS: dict[Callable[..., Any], dict[str, Any]] = {
    baddbmm_with_mask: {"empty": "nan"},
    alibi_as_in_bloom: {"empty": "nan", "masks": 2},
    heads_last: {"empty": "nan"},
    strange_letters: {},
    scores_transposed: {},
    heads_tiled: {"groups": 2},
    heads_of_a_group_first: {"groups": 2},
    groups_in_the_queries: {"groups": 2, "empty": "nan"},
    shared_keys: {"groups": 4},
    keys_shared_by_the_batch: {"empty": "nan", "groups": 2},
    one_head_without_axis: {"empty": "nan"},
    matrices: {},
    one_query: {"empty": "nan"},
    pooling: {},
    one_key: {},
    two_masks: {"empty": "nan", "masks": 2},
    mask_by_assignment: {"empty": "nan"},
    chained_in_place: {"empty": "nan", "masks": 2},
    cache_written_before: {},
    values_written_meanwhile: {},
    safe_softmax: {},
    sinks_behind: {"sinks": True},
    sinks_in_front: {"sinks": True},
    unread_weights: {},
    repeated_keys_changed_in_place: {},
    shifted_by_another_maximum: {"empty": "nan", "masks": 1},
    negated_constant: {"empty": "nan", "masks": 1},
    mask_over_merged_queries: {"empty": "nan", "masks": 1, "groups": 2},
    negative_scale: {"empty": "nan", "masks": 1},
    mask_subtracted: {"empty": "nan"},
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_forms_found_in_real_code(form: Callable[..., Any]) -> None:
    expected = FORMS[form]
    site = find_one(form, *operands())
    assert site.scale == pytest.approx(0.3)
    assert shape_after(site.q)[1] // shape_after(site.k)[1] == expected.get("groups", 1)
    assert site.empty == expected.get("empty", "zero")
    assert len(site.masks) >= expected.get("masks", 0)
    assert (site.sinks is not None) is expected.get("sinks", False)


def test_a_scale_is_what_its_tensor_holds() -> None:
    """A number in a bfloat16 tensor is rounded before it divides the scores."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) / torch.full([], 3.33, dtype=q.dtype)).softmax(-1) @ v

    site = find_one(attend, *(x.bfloat16() for x in operands()))
    assert site.scale == 1.0 / float(torch.tensor(3.33, dtype=torch.bfloat16))


def test_a_fill_value_is_what_the_scores_hold() -> None:
    """-1e9 becomes -inf in float16: a row without keys is NaN, not a mean."""

    def stored(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.where(VISIBLE, q @ k.mT, -1e9).softmax(-1) @ v

    def cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q.float() @ k.float().mT).masked_fill(~VISIBLE, -1e9)
        return F.softmax(scores, dim=-1, dtype=torch.float16) @ v

    for function in (stored, cast):
        site = find_one(function, *(x.half() for x in operands()))
        assert site.empty == "nan"


@torch._dynamo.allow_in_graph
def softmax(x: Tensor, dim: int) -> Tensor:
    """Not the softmax."""
    return x.sigmoid()


def test_a_function_of_the_same_name_is_another_function() -> None:
    assert reasons(lambda q, k, v: softmax(q @ k.mT, -1) @ v, *operands()) == []


def test_bits_read_as_another_type_are_no_view() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.view(torch.bfloat16), v)

    q, k, v = operands()
    site = find_one(attend, q.bfloat16(), (k.abs() + 0.5).half(), v.bfloat16())
    assert site.k.node.op == "call_method"


@pytest.mark.slow
def test_more_of_the_grid_is_rewritten_than_torch_fuses() -> None:
    """End to end through the backend, verification included; torch's own pass beside it on every eighth cell."""
    from spelling_grid import fused_by_torch, rewritten_by_s2o

    cells = list(grid())
    assert sum(map(rewritten_by_s2o, cells)) >= 95
    sample = cells[::8]
    assert sum(map(fused_by_torch, sample)) < len(sample)
