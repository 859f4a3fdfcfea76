"""Checks a lifted predicate against the mask that the graph itself computes.

The mask's own nodes are run, on made-up inputs, in the graph as it is; the predicate is evaluated
beside them. A mask too large to compute whole is computed for a sample of its query rows: nodes
that already have the mask's last two dimensions are pointwise, and run on those rows alone. Where
sizes are symbolic it is done twice, as captured and with every size one larger: a predicate that was
read wrongly may be right by chance at one length, such as an even one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from s2o_inductor import ops
from s2o_inductor.passes.masks import HIDES, LiftedMask
from s2o_inductor.passes.verify import Outcome, hint

# Largest mask, in elements, that is computed whole; above, a sample of its rows is.
MAX_MASK = 2**20
SAMPLED_ROWS = 24
_SIZED = {
    torch.ops.aten.expand.default,
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.full.default,
    torch.ops.aten.new_ones.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.new_full.default,
    torch.ops.aten.ones.default,
    torch.ops.aten.zeros.default,
}
_SHAPELESS = {
    torch.ops.aten.clone.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.full_like.default,
    torch.ops.aten.ones_like.default,
    torch.ops.aten.zeros_like.default,
}


_LIFTS = {torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default}


class _NotPointwise(Exception):
    """A node of the mask's full size that cannot run on some of its rows."""


def check_mask(mask: fx.Node, lifted: LiftedMask, shape: tuple[Any, Any, Any, Any]) -> Outcome:
    """Runs a mask's own nodes and compares with the predicate, on three kinds of inputs.

    Args:
        mask: the mask node, boolean (True is visible) or additive, of a functional graph.
        lifted: the predicate.
        shape: (B, Hq, Sq, Sk) of the attention that uses it.
    """
    outcome = _check_at(hint, mask, lifted, shape)
    larger = _larger_sizes(mask) if outcome.passed else None
    if larger is None:
        return outcome
    other = _check_at(larger, mask, lifted, shape)
    return outcome if other.passed else Outcome(False, f"{other.detail}, at sizes other than those captured")


# From a size, symbolic or not, to the integer that it is in a check.
_Sizes: TypeAlias = Callable[[Any], int]


def _larger_sizes(mask: fx.Node) -> _Sizes | None:
    """Every symbolic size one larger than its hint; None without any, or where a guard or a multiple forbids it."""
    environment = getattr(getattr(mask.meta["val"], "fake_mode", None), "shape_env", None)
    values: dict[sympy.Expr, int] = {}
    symbols: set[sympy.Expr] = set()
    for node in mask.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        for size in (size for size in sizes if isinstance(size, torch.SymInt)):
            symbols |= size.node.expr.free_symbols
            if size.node.expr.is_Symbol and size.node.has_hint():
                values[size.node.expr] = hint(size) + 1
    if environment is None or not values or symbols - values.keys():
        return None
    if any(environment.replace(guard.expr).xreplace(values) != sympy.true for guard in environment.guards):
        return None
    return lambda size: size if isinstance(size, int) else int(size.node.expr.xreplace(values))


def _check_at(sizes: _Sizes, mask: fx.Node, lifted: LiftedMask, shape: tuple[Any, Any, Any, Any]) -> Outcome:
    """`check_mask` at one size of everything."""
    batch, _, queries, keys = map(sizes, shape)
    closure = _ancestors(mask)
    whole = batch * queries * keys <= MAX_MASK
    device = mask.meta["val"].device
    # A generator of our own: the user's random state is not ours to advance. No modes: a joint graph
    # is compiled under a fake tensor mode, and this check is on real numbers.
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad(), _disable_current_modes():
        rows = torch.arange(queries, device=device) if whole else _sample(queries, generator)
        for style in range(3):
            sources = (node for node in closure if node.op in ("placeholder", "get_attr"))
            try:
                inputs = {node: _example(node, sizes, style, generator) for node in sources}
                values = _run(closure, inputs, None if whole else rows, (queries, keys), sizes)
            except _NotPointwise as reason:
                return Outcome(True, f"unverified: {reason}")
            except (IndexError, RuntimeError, TypeError) as reason:
                # Made-up positions can point outside a table, and a shape can depend on values or other sizes.
                return Outcome(True, f"unverified: {reason}")
            actual = values[mask]
            if actual.dtype != torch.bool:
                added, actual = actual, actual > HIDES
                if added[actual].any():
                    return Outcome(False, f"the mask adds up to {added[actual].abs().max():.3g} to visible scores")
            params = [sizes(one.meta["val"]) if isinstance(one, fx.Node) else one for one in lifted.params]
            expected = ops.visible_rows(
                lifted.spec.text(), [values[leaf] for leaf in lifted.leaves], params, batch, queries, keys, rows
            )
            actual, expected = torch.broadcast_tensors(actual, expected)
            if not torch.equal(actual, expected):
                at = (actual != expected).nonzero()[0].tolist()
                return Outcome(False, f"the predicate {lifted.spec.terms()} is not the mask at (b, h, row, k) = {at}")
    return Outcome(True, "verified" if whole else f"verified on {len(rows)} rows")


def _ancestors(mask: fx.Node) -> list[fx.Node]:
    wanted, pending = {mask}, [mask]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in wanted:
                wanted.add(source)
                pending.append(source)
    return [node for node in mask.graph.nodes if node in wanted]


def _sample(queries: int, generator: torch.Generator) -> Tensor:
    edges = torch.tensor([0, 1, queries // 2, queries - 2, queries - 1], device=generator.device)
    drawn = torch.randint(0, queries, (SAMPLED_ROWS - 5,), device=generator.device, generator=generator)
    return torch.cat([edges.clamp(0, queries - 1), drawn]).unique()


def _example(node: fx.Node, sizes: _Sizes, style: int, generator: torch.Generator) -> Any:
    """An input: integers as left- and right-padded 0/1 rows (0), random 0/1 (1) or packed positions (2)."""
    held = _constant(node)
    if held is not None:
        return held
    value = node.meta["val"]
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return sizes(value) if isinstance(value, torch.SymInt) else value.node.hint
    if not isinstance(value, Tensor):
        return value
    shape, device = tuple(map(sizes, value.shape)), generator.device
    if value.dtype.is_floating_point:
        return torch.randn(shape, device=device, generator=generator).to(value.device, value.dtype)
    drawn = torch.randint(0, 2, shape, device=device, generator=generator)
    if style != 1 and shape:
        at = torch.arange(shape[-1], device=device)
        edge = (*shape[:-1], 1)
        cut = torch.randint(0, shape[-1] + 1, edge, device=device, generator=generator) // 2
        if style == 0:
            left = torch.rand(edge, device=device, generator=generator) < 0.5
            drawn = torch.where(left, at >= cut, at < shape[-1] - cut)
        else:
            drawn = torch.where(at < cut, at, at - cut).expand(shape)
    return drawn.to(value.device, value.dtype)


def _constant(node: fx.Node) -> Tensor | None:
    """The value of `torch.tensor(0.0)` in traced code, which no run of the graph can change; else None.

    An additive mask is made of such constants: with made-up values in their place, it would be a bias.
    """
    module = node.graph.owning_module
    if node.op != "get_attr" or module is None or any(user.target not in _LIFTS for user in node.users):
        return None
    held = getattr(module, str(node.target), None)
    return held if isinstance(held, Tensor) and not isinstance(held, FakeTensor) else None


def _run(
    closure: list[fx.Node], inputs: Mapping[fx.Node, Any], rows: Tensor | None, size: tuple[int, int], sizes: _Sizes
) -> Any:  # fmt: skip
    values = dict(inputs)
    for node in closure:
        if node in values:
            continue
        if rows is not None and _is_large(node, size, sizes):
            values[node] = _run_rows(node, values, rows, size, sizes)
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values


def _is_large(node: fx.Node, size: tuple[int, int], sizes: _Sizes) -> bool:
    value = node.meta.get("val")
    return (
        isinstance(value, Tensor)
        and value.dim() >= 2
        and (sizes(value.shape[-2]), sizes(value.shape[-1])) == size
        and node.op == "call_function"
    )


def _run_rows(
    node: fx.Node, values: Mapping[fx.Node, Any], rows: Tensor, size: tuple[int, int], sizes: _Sizes
) -> Tensor:  # fmt: skip
    """One node of the mask's full size, on some of its rows."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise _NotPointwise(f"{target} is not an operator")
    sized = target in _SIZED
    if not (sized or target in _SHAPELESS or torch.Tag.pointwise in target.tags or target is _TO_COPY):
        raise _NotPointwise(f"{target} was not computed at the mask's full size")

    def restricted(source: fx.Node) -> Any:
        value = values[source]
        if not isinstance(value, Tensor) or _is_large(source, size, sizes) or value.dim() < 2:
            return value
        return value.index_select(-2, rows) if value.shape[-2] == size[0] > 1 else value

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), restricted)
    if sized:
        at = next(index for index, argument in enumerate(args) if isinstance(argument, (list, tuple)))
        shape = list(args[at])  # type: ignore[arg-type]
        shape[-2] = len(rows) if operator.index(shape[-2]) == size[0] else shape[-2]
        args = (*args[:at], shape, *args[at + 1 :])
    result: Tensor = target(*args, **kwargs)
    if result.shape[-2] not in (len(rows), 1):
        raise _NotPointwise(f"{target} changes rows")
    return result


_TO_COPY = torch.ops.aten._to_copy.default
