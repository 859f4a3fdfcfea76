"""Traces mask builders to functional ATen graphs, lifts them, and compares with the mask itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from s2o_inductor.kernels.mask import evaluate
from s2o_inductor.mask_spec import EmptyRows
from s2o_inductor.passes.masks import LiftedMask, lift_mask

MaskBuilder = Callable[..., Tensor]
_DECOMPOSITIONS = select_decomp_table()


def trace(builder: MaskBuilder, inputs: Sequence[Tensor], dynamic: bool = False, decompose: bool = False) -> fx.Node:
    """The mask node of the functional ATen graph of `builder(*inputs)`.

    Args:
        builder: returns one mask; may write in place, use vmap, and so on.
        inputs: example inputs.
        dynamic: with symbolic sizes.
        decompose: with the decompositions that Inductor's joint graphs have (iota, convert_element_type, ...).
    """
    functional = torch.func.functionalize(builder, remove="mutations")
    table = _DECOMPOSITIONS if decompose else None
    gm = make_fx(functional, tracing_mode="symbolic" if dynamic else "fake", decomposition_table=table)(*inputs)
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    (mask,) = output.all_input_nodes
    return mask


def scores_shape(mask: fx.Node, heads: int, sizes: tuple[int, int, int]) -> tuple[Any, Any, Any, Any]:
    """(B, H, Sq, Sk): the mask's own sizes, symbolic ones too, and `sizes` (B, Sq, Sk) where it broadcasts."""
    own = [1] * (4 - mask.meta["val"].dim()) + list(mask.meta["val"].shape)
    wanted = (sizes[0], heads, sizes[1], sizes[2])
    shape = tuple(full if isinstance(size, int) and size == 1 else size for size, full in zip(own, wanted, strict=True))
    return shape[0], shape[1], shape[2], shape[3]


def lift(
    mask: fx.Node, sizes: tuple[int, int, int], kind: str = "visible", empty: EmptyRows = "nan", heads: int = 4
) -> LiftedMask | str:
    """`lift_mask` for scores of (B, heads, Sq, Sk), `sizes` being (B, Sq, Sk)."""
    return lift_mask(mask, kind=kind, shape=scores_shape(mask, heads, sizes), empty=empty)


class Run(fx.Interpreter):
    """Runs a graph on real inputs and keeps the value of every node."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.run(*inputs)

    def __getitem__(self, node: fx.Node) -> Any:
        return self.env[node]


def seen(mask: Tensor, kind: str) -> Tensor:
    """Where a mask lets a key be seen."""
    return mask if kind == "visible" else ~mask if kind == "hidden" else mask == 0


def predicate(lifted: LiftedMask, value: Callable[[fx.Node], Any], sizes: tuple[int, int, int]) -> Tensor:
    """The lifted predicate as a bool tensor (B or 1, 1, Sq, Sk); `value` gives the run-time values of nodes."""
    leaves = [value(leaf) for leaf in lifted.leaves]
    params = [int(value(param)) if isinstance(param, fx.Node) else param for param in lifted.params]
    return evaluate(lifted.spec, None, leaves, params, *sizes, torch.device("cpu"))


def assert_equals_mask(
    lifted: LiftedMask, mask: fx.Node, inputs: Sequence[Tensor], sizes: tuple[int, int, int], kind: str = "visible"
) -> None:
    """The predicate equals the mask at every position, and "zero" is only claimed where no row is empty.

    The caller must have lifted with ``empty="nan"`` or for an additive mask.
    """
    gm = mask.graph.owning_module
    assert isinstance(gm, fx.GraphModule)
    run = Run(gm, inputs)
    actual = seen(run[mask], kind)
    full = (sizes[0], actual.shape[1] if actual.dim() == 4 else 1, *sizes[1:])
    expected = predicate(lifted, run.__getitem__, sizes).expand(full)
    message = f"{lifted.spec.text()} gives\n{expected.int()}\nfor\n{actual.int()}"
    assert torch.equal(actual.expand(full), expected), message
    if lifted.spec.empty == "zero":
        assert bool(actual.expand(full).any(-1).all()), f"{lifted.spec.text()} has empty rows"
