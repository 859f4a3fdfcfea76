"""Masks as models write them: what they are lifted to, or why they stay dense."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mask_tracing import assert_equals_mask, lift, trace
from torch import Tensor, fx

from s2o_inductor.mask_spec import MaskSpec
from s2o_inductor.passes.masks import LiftedMask, MaskLifter, lift_mask

B, S = 2, 12
MIN = torch.finfo(torch.float32).min
CAUSAL = MaskSpec(upper="0")
STATIC_AND_DYNAMIC = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def indices(length: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(b, q, k) as Hugging Face broadcasts them."""
    positions = torch.arange(length)
    return torch.arange(batch)[:, None, None, None], positions[None, None, :, None], positions[None, None, None]


def packed_documents(ids: Tensor) -> Tensor:
    """Documents told apart by where position ids stop counting up."""
    first = ids[:, :1] - 1
    return (torch.diff(ids, prepend=first, dim=-1) != 1).cumsum(-1)


def packed(pad: Tensor, ids: Tensor) -> Tensor:
    b, q, k = indices(ids.shape[1], ids.shape[0])
    documents = packed_documents(ids)
    visible = q.new_ones((), dtype=torch.bool) & (documents[b, q] == documents[b, k]) & (ids[b, k] <= ids[b, q])
    return visible.expand(ids.shape[0], -1, ids.shape[1], ids.shape[1])


def undetected(pad: Tensor, ids: Tensor) -> Tensor:
    counted = (torch.arange(pad.shape[1]) + 0).unsqueeze(0).expand(pad.shape[0], -1)
    return packed(pad, counted)


def chunked(pad: Tensor, ids: Tensor) -> Tensor:
    b, q, k = indices(pad.shape[1], pad.shape[0])
    left = (pad.cumsum(-1) == 0).sum(-1)
    return (k <= q) & ((k - left[b]) // 4 == (q - left[b]) // 4) & pad.bool()[b, k]


def chunked_documents(pad: Tensor, ids: Tensor) -> Tensor:
    _, q, k = indices(pad.shape[1], pad.shape[0])
    documents = packed_documents(ids)
    return (documents[:, None, :, None] == documents[:, None, None]) & (k // 4 == q // 4)


def in_place_triangle(pad: Tensor, ids: Tensor) -> Tensor:
    mask = torch.full((pad.shape[1], pad.shape[1]), float("-inf"))
    mask.triu_(1)
    return mask


def in_place_columns(pad: Tensor, ids: Tensor) -> Tensor:
    mask = torch.ones(pad.shape[1], pad.shape[1], dtype=torch.bool).tril_()
    mask[:, :4] = True
    return mask


def in_place_row(pad: Tensor, ids: Tensor) -> Tensor:
    mask = torch.zeros(pad.shape[0], 1, pad.shape[1], pad.shape[1], dtype=torch.bool)
    mask[:] = pad.bool()[:, None, None]
    mask[:, :, :, 0] = True
    mask[~mask.clone()] = False
    return mask


def batched(pad: Tensor, ids: Tensor) -> Tensor:
    """Four nested vmaps, the way mask functions of users run."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < 4)

    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        visible = torch.vmap(visible, in_dims=dims, out_dims=0)
    positions = torch.arange(pad.shape[1])
    return visible(torch.arange(pad.shape[0]), torch.arange(1), positions, positions)


def prefix_lengths(pad: Tensor, ids: Tensor) -> Tensor:
    _, q, k = indices(pad.shape[1], pad.shape[0])
    return (k <= q) | (k < pad.sum(-1)[:, None, None, None])


def self_visible(pad: Tensor, ids: Tensor) -> Tensor:
    """Padding, with the diagonal kept so that no row is empty."""
    _, q, k = indices(pad.shape[1], pad.shape[0])
    return (k <= q) & (pad.bool()[:, None, None] | (k == q))


def gpt_oss(pad: Tensor, ids: Tensor) -> Tensor:
    b, q, k = indices(pad.shape[1], pad.shape[0])
    return torch.where((k <= q) & (k > q - 8) & pad.bool()[b, k], torch.tensor(0.0), MIN)


def global_rows(pad: Tensor, ids: Tensor) -> Tensor:
    _, q, k = indices(pad.shape[1], pad.shape[0])
    return (k <= q) & ((q - k < 3) | (k < 2) | (pad[:, None, :, None] == 0))


@dataclasses.dataclass(frozen=True)
class Style:
    """A mask function and the fields of its spec; a field of several equivalent texts is None here."""

    build: Callable[[Tensor, Tensor], Tensor]
    fields: dict[str, Any]
    kind: str = "visible"


PADDED = {"keys": "L0[b, k] != 0", "empty": "nan"}
STYLES = [
    Style(lambda pad, ids: torch.ones(pad.shape[1], pad.shape[1], dtype=torch.bool).tril(), {"upper": "0"}),
    Style(undetected, {"upper": "0"}),
    Style(packed, {"equal": ("L0[b, q]", "L0[b, k]"), "at_most": ("L1[b, q]", "L1[b, k]")}),
    Style(chunked, {"upper": "0", "equal": ("(q - L1[b]) // 4", "(k - L1[b]) // 4"), **PADDED}),
    Style(chunked_documents, {"equal": None}),
    Style(in_place_triangle, {"upper": "0"}, "additive"),
    Style(in_place_columns, {"at_most": ("max(3, q)", "k")}),
    Style(in_place_row, {"keys": None}),
    Style(batched, {"upper": "0", "lower": "-3"}),
    Style(prefix_lengths, {"at_most": ("max(q, L0[b] - 1)", "k")}),
    Style(self_visible, {"upper": "0", "at_most": None}),
    Style(gpt_oss, {**PADDED, "upper": "0", "lower": "-7", "empty": "shifted"}, "additive"),
    Style(lambda pad, ids: pad.bool()[:, None, None].expand(-1, -1, pad.shape[1], -1), PADDED),
    Style(lambda pad, ids: pad[:, None, None] * 0 == 1, {"keys": "False", "empty": "nan"}),
    Style(lambda pad, ids: torch.ones(pad.shape[1], pad.shape[1], dtype=torch.bool), {}),
    Style(lambda pad, ids: torch.zeros(pad.shape[1], pad.shape[1]), {}, "additive"),
    Style(global_rows, {"upper": "0", "at_most": None}),
]


@STATIC_AND_DYNAMIC
@pytest.mark.parametrize("at", range(len(STYLES)))
def test_styles_of_models(at: int, dynamic: bool) -> None:
    style = STYLES[at]
    pad = torch.ones(B, S, dtype=torch.long)
    pad[0, :3] = 0
    ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]])
    for decompose in (False, True):
        mask = trace(style.build, (pad, ids), dynamic, decompose)
        lifted = lift(mask, (B, S, S), style.kind)
        assert isinstance(lifted, LiftedMask), lifted
        assert_equals_mask(lifted, mask, (pad, ids), (B, S, S), style.kind)
        found = {name: value for name, value in vars(lifted.spec).items() if value != getattr(MaskSpec(), name)}
        assert found.keys() == style.fields.keys()
        assert all(found[name] == text for name, text in style.fields.items() if text is not None), found
        for leaf in lifted.leaves:
            assert leaf.meta["val"].numel() <= B * S


def half_windows(pad: Tensor, ids: Tensor) -> Tensor:
    """Half as many positions on either side as there are."""
    at = torch.arange(pad.shape[1])
    return ((at[:, None] - at).abs() <= pad.shape[1] // 2)[None, None]


@pytest.mark.parametrize(
    "build", [global_rows, self_visible, chunked_documents, packed, prefix_lengths, in_place_columns, half_windows]
)
def test_one_predicate_serves_all_lengths(build: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Lifted from a graph of 12 positions, evaluated where bounds that depend on the length change places."""

    def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(length)
        pad = torch.randint(0, 2, (batch, length), generator=generator)
        return pad, torch.randint(0, 2, (batch, length), generator=generator).cumsum(-1)

    mask = trace(build, inputs(B, S), dynamic=True)
    batch, length = mask.meta["val"].shape[0], mask.meta["val"].shape[-1]
    lifted = lift_mask(
        mask, kind="visible", shape=(batch if mask.meta["val"].dim() == 4 else B, 1, length, length), empty="nan"
    )
    assert isinstance(lifted, LiftedMask), lifted
    for case in ((9, 2), (3, 5), (5, 7), (4, 19)):
        assert_equals_mask(lifted, mask, inputs(*case), (case[0], case[1], case[1]))


def test_cached_keys_of_any_length() -> None:
    """Queries behind a cache: k <= q + past, where past is a symbolic size."""

    def build(new: Tensor, cache: Tensor) -> Tensor:
        past = cache.shape[0]
        q, k = torch.arange(new.shape[0]) + past, torch.arange(new.shape[0] + past)
        return (k <= q[:, None])[None, None]

    inputs = (torch.zeros(3), torch.zeros(5))
    mask = trace(build, inputs, dynamic=True)
    lifted = lift(mask, (1, 3, 8))
    assert isinstance(lifted, LiftedMask), lifted
    assert lifted.spec == MaskSpec(upper="p0")
    (param,) = lifted.params
    assert isinstance(param, fx.Node) and isinstance(param.meta["val"], torch.SymInt)
    for new, past in ((3, 5), (6, 2), (4, 9)):
        assert_equals_mask(lifted, mask, (torch.zeros(new), torch.zeros(past)), (1, new, new + past))


def test_decoding_one_token_sees_all() -> None:
    """k <= past is proved when there are past + 1 keys."""

    def build(cache: Tensor) -> Tensor:
        past = cache.shape[0]
        return (torch.arange(past + 1) <= torch.arange(1)[:, None] + past)[None, None]

    lifted = lift(trace(build, (torch.zeros(7),), dynamic=True), (1, 1, 8))
    assert isinstance(lifted, LiftedMask) and lifted.spec == MaskSpec(), lifted


@pytest.mark.parametrize("tensor", ["offset", "positions"])
def test_static_cache(tensor: str) -> None:
    """Cache positions that are a tensor: the keys beyond them are not written yet."""

    def build(offset: Tensor, positions: Tensor) -> Tensor:
        q = torch.arange(4) + offset if tensor == "offset" else positions
        return (torch.arange(16) <= q[:, None])[None, None]

    inputs = (torch.tensor(5), torch.tensor([5, 6, 7, 8]))
    mask = trace(build, inputs)
    lifted = lift(mask, (1, 4, 16))
    assert isinstance(lifted, LiftedMask), lifted
    assert lifted.spec.at_most == (("q + L0" if tensor == "offset" else "L0[q]"), "k")
    assert_equals_mask(lifted, mask, inputs, (1, 4, 16))


def test_reads_outside_a_leaf_are_clamped() -> None:
    """A padding mask that is itself padded: the guard decides, but the kernels refuse an index out of range."""

    def build(pad: Tensor) -> Tensor:
        return torch.cat([torch.ones(B, 2, dtype=torch.bool), pad.bool()], dim=1)[:, None, None]

    inputs = (torch.tensor([[1, 0, 1], [0, 1, 1]]),)
    mask = trace(build, inputs)
    lifted = lift(mask, (B, 4, 5))
    assert isinstance(lifted, LiftedMask), lifted
    assert_equals_mask(lifted, mask, inputs, (B, 4, 5))


# ---- what stays dense -------------------------------------------------------------------------------


def alibi(x: Tensor) -> Tensor:
    positions = torch.arange(S)
    return (positions[None] - positions[:, None]).float() * 0.5


def relative_bias(x: Tensor) -> Tensor:
    positions = torch.arange(S)
    distance = (positions[None] - positions[:, None]).clamp(-3, 3) + 3
    return torch.nn.functional.embedding(distance, x[:, :7].reshape(7, -1)).permute(2, 0, 1)[None]


def images(x: Tensor) -> Tensor:
    group, positions = x[:, :S].long(), torch.arange(S)
    same = (group[:, :, None] == group[:, None]) & (group[:, :, None] >= 0)
    return (same | (positions <= positions[:, None]))[:, None]


def heads(x: Tensor) -> Tensor:
    positions = torch.arange(S)
    return positions <= positions[:, None] + torch.arange(4)[:, None, None]


DENSE: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("visible", lambda x: x[:S, :S].bool(), "its values are known only at run time"),
    ("additive", lambda x: x[None, None, :S, :S], "its values are known only at run time"),
    ("visible", lambda x: x[None, None, :S, :S] == 0, "its values are known only at run time"),
    ("additive", alibi, "floating-point"),
    ("additive", relative_bias, "floating-point values that only run time knows"),
    ("visible", images, "an alternative that no limit on keys expresses"),
    ("visible", heads, "differs between heads"),
    ("visible", lambda x: torch.arange(S) != torch.arange(S)[:, None], "no band, equality or limit"),
    ("additive", lambda x: torch.ones(S, S).tril(), "a bias, not a mask"),
    ("additive", lambda x: torch.ones(S, S).triu(1) * -5.0, "a bias, not a mask"),
    ("additive", lambda x: (x[:1, None, None, :S] == 0) * -1e9, "may have no other key"),
    ("additive", lambda x: torch.full((S, S), -1e4).triu(0), "may have no other key"),
    ("additive", lambda x: torch.full((S, S), 0.0).mul(float("-inf")), "a bias, not a mask"),
    ("visible", lambda x: torch.rand(S, S) > 0.5, "that only run time knows"),
]


@pytest.mark.parametrize("at", range(len(DENSE)))
def test_what_is_no_predicate_stays_dense_with_its_reason(at: int) -> None:
    kind, build, expected = DENSE[at]
    mask = trace(build, (torch.randn(16, 16),))
    before = str(mask.graph)
    reason = lift(mask, (16 if build is images else 1, S, S), kind)
    assert isinstance(reason, str) and expected in reason, reason
    assert str(mask.graph) == before


def _triangle_of(value: float, x: Tensor) -> Tensor:
    return torch.full((S, S), value).triu(1)


def test_finite_values_hide_when_every_row_sees_a_key() -> None:
    """With the diagonal visible, -1e4 and -1e9 hide as -inf does, and no row needs "shifted"."""
    for value in (-1e4, -1e9, MIN, float("-inf")):
        mask = trace(functools.partial(_triangle_of, value), (torch.zeros(1),))
        lifted = lift(mask, (B, S, S), "additive", empty="nan")
        assert isinstance(lifted, LiftedMask) and lifted.spec == CAUSAL, lifted


def test_sum_of_additive_masks() -> None:
    """Two finite values add up to others, or to -inf: rows that see nothing would tell them apart."""

    def build(pad: Tensor) -> Tensor:
        return torch.full((S, S), MIN).triu(1) + (pad[:, None, None] == 0) * MIN

    pad = torch.ones(B, S, dtype=torch.long)
    reason = lift(trace(build, (pad,)), (B, S, S), "additive")
    assert isinstance(reason, str) and "may have no other key" in reason


def test_a_band_of_the_op_joins_the_mask() -> None:
    mask = trace(lambda pad: pad.bool()[:, None, None], (torch.ones(B, S, dtype=torch.long),))
    lifted = MaskLifter(mask.graph).lift_node(mask, "visible", (B, 4, S, S), MaskSpec(upper="0", lower="-3"))
    assert isinstance(lifted, LiftedMask)
    assert lifted.spec == MaskSpec(upper="0", lower="-3", keys="L0[b, k] != 0")
    finite = trace(lambda pad: (pad[:, None, None] == 0) * MIN, (torch.ones(B, S, dtype=torch.long),))
    reason = MaskLifter(finite.graph).lift_node(finite, "additive", (B, 4, S, S), CAUSAL)
    assert isinstance(reason, str) and "may have no other key" in reason


def test_bad_arguments() -> None:
    mask = trace(lambda pad: pad.bool()[:, None, None], (torch.ones(B, S, dtype=torch.long),))
    with pytest.raises(ValueError, match="'visible', 'hidden' or 'additive'"):
        lift(mask, (B, S, S), "causal")
    assert "cannot have dtype" in str(lift(mask, (B, S, S), "additive"))
    assert "not proved to be that of the scores" in str(
        lift_mask(mask, kind="visible", shape=(B, 4, S, S + 1), empty="zero")
    )
