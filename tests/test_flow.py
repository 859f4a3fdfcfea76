"""In-place writers made explicit, and axes followed through views: the ground that the finder stands on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture import capture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from s2o_inductor.passes.axes import Axes, Factor, apply_view, divide, fresh, regroup, resolve, steps_between, undo_view
from s2o_inductor.passes.flow import Flow, written
from s2o_inductor.passes.graph_utils import op_name


def graph_of(function: Callable[..., Any], *args: Any) -> tuple[Flow, dict[str, fx.Node]]:
    """The flow of a function's graph and its nodes by name."""
    gm, _ = capture(function, *args)
    return Flow(gm.graph), {node.name: node for node in gm.graph.nodes}


# ------------------------------------------------------------------------------------ who writes what

WRITERS: list[Callable[[Tensor, Tensor], Any]] = [
    lambda x, y: x.mul_(2),
    lambda x, y: x.copy_(y),
    lambda x, y: x.masked_fill_(y > 0, 0.0),
    lambda x, y: x.__iadd__(y),
    lambda x, y: x.__setitem__((0, slice(None)), 1.0),
    lambda x, y: torch.relu_(x),
    lambda x, y: F.relu(x, inplace=True),
    lambda x, y: F.relu(x, True),
    lambda x, y: F.dropout(x, 0.5, True, True),
    lambda x, y: torch.add(x, y, out=x),
    lambda x, y: torch.ops.aten.add_.Tensor(x, y),
    lambda x, y: torch._foreach_mul_([x], 2.0),
    lambda x, y: x.index_copy_(0, torch.tensor([0, 1]), y[:2]),
    lambda x, y: x.scatter_(0, torch.zeros(1, 4, dtype=torch.int64), y[:1]),
]


@pytest.mark.parametrize("index", range(len(WRITERS)))
def test_every_kind_of_writer_is_seen(index: int) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x = x + 1
        before = x.t()
        WRITERS[index](x, y)
        return before.cos()

    flow, nodes = graph_of(function, torch.randn(4, 4), torch.randn(4, 4))
    writers = [node for node in flow.nodes if written(node)]
    assert len(writers) == 1
    assert written(writers[0])[0].name.startswith("x")
    # `before` was made in front of the write and read behind it: no node stands for what it holds then.
    assert flow.read(nodes["cos"], nodes["cos"].args[0]) is None
    assert flow.written_between(nodes["cos"].args[0], nodes["x"], nodes["cos"], ())  # type: ignore[arg-type]


def test_reading_is_not_writing() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        mask = (x > 0) & (y > 0) | ~(x < y)
        return torch.where(mask, F.relu(x), F.dropout(y, 0.5, False, False)).index_fill(0, torch.tensor([0]), 1.0)

    flow, _ = graph_of(function, torch.randn(4, 4), torch.randn(4, 4))
    assert not any(written(node) for node in flow.nodes)


def test_values_after_writes_have_the_name_of_the_writer() -> None:
    def function(x: Tensor) -> Tensor:
        y = x + 1
        y.mul_(2)
        y += 3
        return y.cos()

    flow, nodes = graph_of(function, torch.randn(4))
    last = flow.read(nodes["cos"], nodes["cos"].args[0])
    assert last is not None and op_name(last) == "add" and written(last)
    first = flow.read(last, last.args[0])
    assert first is not None and op_name(first) == "mul"
    assert flow.readers(first) == [last]


def test_a_copy_is_not_a_view() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        copied, viewed = x.t().contiguous(), x.contiguous()
        x.mul_(2)
        return copied.cos() + viewed.sin()

    flow, nodes = graph_of(function, torch.randn(4, 4), torch.randn(4, 4))
    assert flow.read(nodes["cos"], nodes["cos"].args[0]) is not None
    assert flow.read(nodes["sin"], nodes["sin"].args[0]) is None


def test_dead_views_do_not_count_as_readers() -> None:
    def function(x: Tensor) -> Tensor:
        y = x + 1
        y.transpose(0, 1).float()
        y.view(-1)
        return y.cos()

    flow, nodes = graph_of(function, torch.randn(4, 4))
    (value,) = (node for node in flow.nodes if op_name(node) == "add")
    assert flow.readers(value) == [nodes["cos"]]


def test_modes_around_nodes() -> None:
    def function(x: Tensor) -> Tensor:
        x = x.cos()
        with torch.no_grad():
            y = x.sin()
        with torch.autocast("cpu", torch.bfloat16):
            z = x.tan()
        return x.exp() + y + z

    flow, _ = graph_of(function, torch.randn(4, requires_grad=True))
    modes = {op_name(node): flow.ambient[node] for node in flow.nodes}
    assert modes["cos"] == modes["exp"]
    assert len({modes["cos"], modes["sin"], modes["tan"]}) == 3


# ----------------------------------------------------------------------------------------------- axes


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[Factor], list[list[int]], list[list[int]]]:
    """Factors, and two ways to arrange them as axes, units among them."""
    count = draw(st.integers(1, 5))
    factors = [Factor(draw(st.sampled_from((2, 3, 4)))) for _ in range(count)]

    def arranged() -> list[list[int]]:
        order = draw(st.permutations(range(count)))
        cuts = sorted(draw(st.lists(st.integers(0, count), max_size=4)))
        bounds = [0, *cuts, count]
        return [list(order[a:b]) for a, b in itertools.pairwise(bounds)]

    return factors, arranged(), arranged()


@given(layouts())
@settings(max_examples=300)
def test_steps_lead_from_one_layout_to_the_other(case: tuple[list[Factor], list[list[int]], list[list[int]]]) -> None:
    factors, before, after = case
    sizes = [int(factor.size) for factor in factors]
    entries = torch.arange(math.prod(sizes)).view(sizes)

    def laid_out(axes: list[list[int]]) -> Tensor:
        return entries.permute([at for axis in axes for at in axis]).reshape(
            [math.prod(sizes[at] for at in axis) for axis in axes]
        )

    def named(axes: list[list[int]]) -> Axes:
        return tuple(tuple(factors[at] for at in axis) for axis in axes)

    steps = steps_between(named(before), named(after))
    assert steps is not None
    value = laid_out(before)
    for method, args in steps:
        value = getattr(value, method)(*args)
    assert torch.equal(value, laid_out(after))
    if before == after:
        assert steps == ()


def test_steps_that_do_not_exist() -> None:
    a, b, c = Factor(2), Factor(3), Factor(4)
    assert steps_between(((a,), (b,)), ((a, c), (b,))) is None  # half of an axis
    assert steps_between(((a,), (b,), (c,)), ((a,), (b,))) is None  # nowhere to go
    assert steps_between(((a,),), ((a,), (b,))) == (("unsqueeze", (1,)),)
    assert divide((Factor(6),), (2,)) is None
    assert divide((Factor(6),), (4, 3)) is None


@given(st.lists(st.sampled_from((1, 2, 3, 4, 6)), min_size=1, max_size=4), st.data())
@settings(max_examples=300)
def test_a_reshape_moves_factors_as_it_moves_entries(shape: list[int], data: st.DataObject) -> None:
    """Undoing the reshape by the steps that its factors give restores the tensor."""
    total = math.prod(shape)
    other: list[int] = []
    left = total
    while left > 1:
        size = data.draw(st.sampled_from([size for size in range(2, left + 1) if left % size == 0]))
        other.append(size)
        left //= size
    other = data.draw(st.permutations([*other, *[1] * data.draw(st.integers(0, 2))]))
    axes = fresh(shape)
    moved = regroup(axes, shape, other)
    if moved is None:  # sizes that share no divisors: entries of one axis would straddle two
        return
    steps = steps_between(moved, axes)
    assert steps is not None
    entries = torch.arange(total).view(shape)
    value = entries.reshape(other)
    for method, args in steps:
        value = getattr(value, method)(*args)
    assert torch.equal(value.reshape(shape), entries)


VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.transpose(1, 2), lambda x: x.permute(2, 0, 1, 3), lambda x: x.permute((3, 2, 1, 0)), lambda x: x.mT,
    lambda x: x.swapaxes(-1, 0), lambda x: x.movedim(1, -1), lambda x: x.view(2, 3, -1), lambda x: x.reshape(6, 4, 5),
    lambda x: x.flatten(1, 2), lambda x: x.unflatten(2, (2, 2)), lambda x: x.unsqueeze(1), lambda x: x[:, None],
    lambda x: x[..., None, :], lambda x: x.unsqueeze(0).squeeze(0), lambda x: x.contiguous(), lambda x: x.clone(),
    lambda x: torch.transpose(x, 0, 3), lambda x: torch.permute(x, dims=(0, 2, 1, 3)), lambda x: x.view_as(x.clone()),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(VIEWS)))
def test_views_forwards_and_backwards_agree(index: int) -> None:
    flow, _ = graph_of(lambda x: VIEWS[index](x.cos()).sin(), torch.randn(2, 3, 4, 5))
    start = next(node for node in flow.nodes if op_name(node) == "cos")
    end = next(node for node in flow.nodes if op_name(node) == "sin").args[0]
    axes = fresh(start.meta["example_value"].shape)
    path = [node for node in flow.nodes if flow.position[start] < flow.position[node] <= flow.position[end]]  # type: ignore[index]
    path = [node for node in path if op_name(node) != "clone" or len(path) == 1]
    forwards = axes
    for node in path:
        found = apply_view(node, forwards)
        assert found is not None
        forwards = found
    backwards = forwards
    for node in reversed(path):
        undone = undo_view(node, backwards)
        assert undone is not None
        backwards = undone[1]
    assert [resolve(axis) for axis in backwards] == [resolve(axis) for axis in axes]
    steps = steps_between(axes, forwards)
    assert steps is not None
    entries = torch.arange(120.0).view(2, 3, 4, 5)
    value = entries
    for method, args in steps:
        value = getattr(value, method)(*args)
    assert torch.equal(value, VIEWS[index](entries))


REPEATS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.unsqueeze(2).expand(2, 3, 4, 5, 6).flatten(1, 2),
    lambda x: x.repeat_interleave(4, dim=1),
    lambda x: x[:, :, None].repeat(1, 1, 4, 1, 1).reshape(2, 12, 5, 6),
    lambda x: x[:, :, None, :, :].broadcast_to(2, 3, 4, 5, 6).reshape(2, 12, 5, 6),
]


@pytest.mark.parametrize("index", range(len(REPEATS)))
def test_repeated_heads_lack_the_minor_factor(index: int) -> None:
    flow, _ = graph_of(lambda x: REPEATS[index](x).sin(), torch.randn(2, 3, 5, 6))
    node = next(node for node in flow.nodes if op_name(node) == "sin").args[0]
    axes = fresh((2, 12, 5, 6))
    source: Axes = axes
    while node.op != "placeholder":  # type: ignore[union-attr]
        undone = undo_view(node, source)  # type: ignore[arg-type]
        assert undone is not None
        node, source = undone
    shared, repeated = resolve(axes[1])
    assert resolve(source[1]) == (shared,)
    assert (shared.size, repeated.size) == (3, 4)
