"""Every spelling of every mask term is lifted, and every random combination exactly or not at all."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mask_spellings import (
    CONJUNCTIONS,
    DOCUMENTS,
    FINAL,
    PADDING,
    POSITION_STYLES,
    ROWS,
    STANDARD,
    Spelling,
    Term,
    causal,
    chunk,
    make_inputs,
    sizes,
    spellings,
    window,
)
from mask_tracing import assert_equals_mask, lift, trace

from s2o_inductor.passes.masks import LiftedMask, lift_mask

STATIC_AND_DYNAMIC = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


@STATIC_AND_DYNAMIC
@pytest.mark.parametrize("term", STANDARD, ids=lambda term: term.name)
def test_every_spelling_of_every_term_is_lifted(term: Term, dynamic: bool) -> None:
    shape = (2, 9, 12)
    inputs = make_inputs(*shape, seed=0).tensors()
    spelled = range(0, len(term.spellings), 3 if dynamic else 1)
    for at in spelled:
        mask = trace(Spelling(((term, at, at % POSITION_STYLES),), (), 0), inputs, dynamic, decompose=at % 2 == 1)
        lifted = lift(mask, shape)
        assert isinstance(lifted, LiftedMask), f"spelling {at}: {lifted}"
        assert_equals_mask(lifted, mask, inputs, shape)


@pytest.mark.parametrize("join", range(len(CONJUNCTIONS)))
@pytest.mark.parametrize("final", range(len(FINAL)))
def test_every_way_to_join_and_to_finish_is_lifted(join: int, final: int) -> None:
    shape = (2, 9, 12)
    inputs = make_inputs(*shape, seed=join).tensors()
    terms = ((causal(1), 0, 0), (PADDING, 0, 0), (window(5), 1, 0), (DOCUMENTS, 0, 0), (ROWS, 0, 0))
    spelling = Spelling(terms, (CONJUNCTIONS[join],) * (len(terms) - 1), final)
    mask = trace(spelling, inputs)
    lifted = lift(mask, shape, spelling.kind)
    assert isinstance(lifted, LiftedMask), lifted
    assert_equals_mask(lifted, mask, inputs, shape, spelling.kind)
    assert (lifted.spec.upper, lifted.spec.lower) == ("1", "-4")
    assert lifted.spec.keys and lifted.spec.rows and lifted.spec.equal


def _check(spelling: Spelling, shape: tuple[int, int, int], seed: int, dynamic: bool, decompose: bool) -> None:
    inputs = make_inputs(*shape, seed=seed).tensors()
    mask = trace(spelling, inputs, dynamic, decompose)
    lifted = lift(mask, shape, spelling.kind)
    if isinstance(lifted, LiftedMask):
        assert_equals_mask(lifted, mask, inputs, shape, spelling.kind)
    else:
        assert len(lifted) > 20  # a reason, in words


FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
FLAGS = {"seed": st.integers(0, 999), "decompose": st.booleans()}


@settings(max_examples=430, **FUZZ)
@given(spelling=spellings(), shape=sizes(), **FLAGS)
def test_conjunctions(spelling: Spelling, shape: tuple[int, int, int], seed: int, decompose: bool) -> None:
    _check(spelling, shape, seed, False, decompose)


@settings(max_examples=30, **FUZZ)
@given(spelling=spellings(), shape=sizes(), **FLAGS)
def test_conjunctions_of_any_size(spelling: Spelling, shape: tuple[int, int, int], seed: int, decompose: bool) -> None:
    _check(spelling, shape, seed, True, decompose)


@settings(max_examples=140, **FUZZ)
@given(spelling=spellings(any_connective=True), shape=sizes(), **FLAGS)
def test_any_combination(spelling: Spelling, shape: tuple[int, int, int], seed: int, decompose: bool) -> None:
    _check(spelling, shape, seed, False, decompose)


def test_one_dynamic_graph_serves_all_sizes() -> None:
    spelling = Spelling(((causal(1), 6, 1), (PADDING, 4, 0), (window(5), 2, 0), (chunk(4), 0, 0)), CONJUNCTIONS[:3], 0)
    mask = trace(spelling, make_inputs(2, 7, 9, seed=0).tensors(), dynamic=True)
    lifted = lift_mask(
        mask, kind="visible", shape=(mask.meta["val"].shape[0], 1, *mask.meta["val"].shape[2:]), empty="nan"
    )
    assert isinstance(lifted, LiftedMask), lifted
    for shape in ((2, 7, 9), (3, 12, 4), (5, 4, 12)):
        assert_equals_mask(lifted, mask, make_inputs(*shape, seed=1).tensors(), shape)
