"""Ways in which mask lifting could go wrong in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mask_spellings import (
    CONJUNCTIONS,
    DOCUMENTS,
    LENGTHS,
    PADDING,
    ROWS,
    Spelling,
    causal,
    make_inputs,
    sinks,
)
from mask_tracing import assert_equals_mask, lift, trace
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import default_partition
from torch.fx.experimental.proxy_tensor import make_fx

from s2o_inductor.mask_spec import MaskSpec
from s2o_inductor.passes.masks import LiftedMask, MaskLifter

B, S = 2, 12
MIN = torch.finfo(torch.float32).min
CAUSAL = MaskSpec(upper="0")
STATIC_AND_DYNAMIC = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def test_writes_in_place_are_not_read_over() -> None:
    """Data flow alone says that a mask written in place is what it was before."""

    def build(x: Tensor) -> Tensor:
        mask = torch.full((S, S), float("-inf"))
        mask.triu_(1)
        return mask.clone()

    gm = make_fx(build, tracing_mode="fake")(torch.zeros(1))
    targets = (torch.ops.aten.full.default, torch.ops.aten.triu_.default, torch.ops.aten.clone.default)
    for target in targets:
        (node,) = gm.graph.find_nodes(op="call_function", target=target)
        reason = lift(node, (1, S, S), "additive")
        assert isinstance(reason, str) and "in place" in reason


def test_writes_through_a_view_and_into_inputs_after_the_mask() -> None:
    graph = fx.Graph()

    def fake(node: fx.Node, value: Tensor) -> fx.Node:
        node.meta["val"] = value
        return node

    aten = torch.ops.aten
    pad = fake(graph.placeholder("pad"), torch.ones(S, dtype=torch.bool))
    made = fake(graph.call_function(aten.ones.default, ([S, S],), {"dtype": torch.bool}), torch.ones(S, S).bool())
    view = fake(graph.call_function(aten.view.default, (made, [S * S])), torch.ones(S * S).bool())
    early = fake(graph.call_function(aten.bitwise_and.Tensor, (made, pad)), torch.ones(S, S).bool())
    graph.call_function(aten.fill_.Scalar, (view, False))
    late = fake(graph.call_function(aten.bitwise_and.Tensor, (made, pad)), torch.ones(S, S).bool())
    graph.call_function(aten.copy_.default, (pad, late))
    graph.output((early, late))
    assert isinstance(lift(early, (1, S, S)), LiftedMask)
    reason = lift(late, (1, S, S))
    assert isinstance(reason, str) and "written in place" in reason


@STATIC_AND_DYNAMIC
def test_joint_graph_of_autograd(dynamic: bool) -> None:
    """AOTAutograd's own functionalisation, forward and backward in one graph, two uses of one mask."""
    joint: list[LiftedMask | str] = []

    def step(x: Tensor, pad: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"))
        mask.triu_(1)
        mask = mask.masked_fill((pad == 0)[:, None, None], float("-inf"))
        scores = x[:, None] @ x[:, None].mT
        return ((scores + mask).softmax(-1) + (2 * scores + mask).softmax(-1)).nan_to_num().sum()

    def partition(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        lifter = MaskLifter(gm.graph)
        for add in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
            scores, mask = add.args
            if isinstance(mask, fx.Node) and mask.target is torch.ops.aten.masked_fill.Scalar:
                shape = scores.meta["val"].shape
                joint.append(lifter.lift_node(mask, "additive", tuple(shape), MaskSpec(empty="nan")))
        return default_partition(gm, inputs, **options)

    x, pad = torch.randn(B, S, 4, requires_grad=True), torch.ones(B, S, dtype=torch.long)
    boxed = lambda gm, _: make_boxed_func(gm)  # noqa: E731
    aot_function(step, boxed, boxed, partition, dynamic=dynamic)(x, pad).backward()
    first, second = joint
    assert first is second and isinstance(first, LiftedMask)
    assert first.spec == MaskSpec(upper="0", keys="L0[b, k] != 0", empty="nan")


def test_a_mask_is_read_once_per_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2o_inductor.passes import masks

    lifts: list[fx.Node] = []
    original = masks._Lifting.run

    def counted(self: Any) -> LiftedMask:
        lifts.append(self.mask)
        return original(self)

    monkeypatch.setattr(masks._Lifting, "run", counted)
    mask = trace(lambda pad: pad.bool()[:, None, None], (torch.ones(B, S, dtype=torch.long),))
    lifter = MaskLifter(mask.graph)
    results = [lifter.lift_node(mask, "visible", (B, 4, S, S), MaskSpec()) for _ in range(5)]
    assert len(lifts) == 1 and all(result is results[0] for result in results)
    lifter.lift_node(mask, "visible", (B, 4, S, S), CAUSAL)
    assert len(lifts) == 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_narrow_integers_do_not_wrap_unnoticed(dtype: torch.dtype) -> None:
    """q - k of unsigned bytes is never negative; a predicate over integers must not say otherwise."""

    def build(x: Tensor) -> Tensor:
        positions = torch.arange(S, dtype=dtype)
        return (positions[:, None] - positions) < 100

    mask = trace(build, (torch.zeros(1),))
    lifted = lift(mask, (1, S, S))
    if isinstance(lifted, LiftedMask):
        assert_equals_mask(lifted, mask, (torch.zeros(1),), (1, S, S))
    assert isinstance(lifted, LiftedMask) == (dtype != torch.uint8)


def test_a_leaf_holds_rows_not_the_mask() -> None:
    """One row of a computed matrix is a leaf; the matrix read at (q, k) or at one column is none."""
    x = (torch.randn(400, 400),)
    row = lift(trace(lambda x: (torch.sin(x) > 0)[:1], x), (1, 400, 400))
    assert isinstance(row, LiftedMask) and row.leaves[0].meta["val"].numel() == 400, row
    whole = lift(trace(lambda x: torch.sin(x) > 0, x), (1, 400, 400))
    assert isinstance(whole, str) and "sin" in whole


def test_text_does_not_depend_on_hashes() -> None:
    """The text is a cache key: two processes must write the same."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    script = "import test_masks_traps; print(test_masks_traps.text_of_many_terms())"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == text_of_many_terms()


def text_of_many_terms() -> str:
    terms = tuple((term, 0, 0) for term in (causal(1), PADDING, DOCUMENTS, LENGTHS, sinks(2, 4), ROWS))
    inputs = make_inputs(2, 9, 12, seed=0).tensors()
    lifted = lift(trace(Spelling(terms, CONJUNCTIONS[:1] * 5, 0), inputs, dynamic=True), (2, 9, 12))
    assert isinstance(lifted, LiftedMask), lifted
    return lifted.spec.text()
