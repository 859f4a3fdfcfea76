"""Finds out, by running a module, which of its loops is a weighted sum of chosen experts: for `prepare`.

A method, or a loop in it, is replaced if what it adds to one of its variables equals the experts'
weighted sum for some choice of tokens, expert numbers and routing weights among its other
variables. Nothing is concluded from names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from s2o_inductor import loop_source
from s2o_inductor.expert_weights import Experts
from s2o_inductor.loop_source import NoSource
from s2o_inductor.module_check import close
from s2o_inductor.moe_spec import Score


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which variables of a method or loop are what, each by its name.

    Attributes:
        rows: the experts' input, (..., l).
        ids: expert numbers, (T, K) up to reshaping.
        weights: routing weights (T, K), or (T, E) of which the chosen ones count; None for none.
        dense: they are (T, E).
        result: the variable that a loop changes; "" for a whole method.
        adds: the sum is added to the result, not put in its place.
        flat: a whole method returns (T, l) whatever the shape of its rows.
        detached: the method lets no gradient through.
    """

    rows: str
    ids: str
    weights: str | None
    dense: bool
    result: str
    adds: bool
    score: Score
    flat: bool = False
    detached: bool = False

    @property
    def names(self) -> list[str]:
        """The variables that the replacement reads."""
        return [self.rows, self.ids, *([self.weights] if self.weights is not None else [])]


@dataclasses.dataclass(frozen=True)
class Found:
    """A method that contains the experts, the index of the loop that does (None: all of it), and the roles."""

    method: str
    function: types.FunctionType
    loop: int | None
    roles: Roles


# -------------------------------------------------------------------------------- data dependence

_DEPENDENT = ("item", "tolist", "numpy", "nonzero", "masked_select", "unique", "__bool__", "argwhere", "__index__")


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= getattr(func, "__name__", "") in _DEPENDENT
        return func(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Inside an operator of its own, such as Hugging Face's grouped product, a graph sees nothing.
        self.seen |= torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags
        return func(*args, **(kwargs or {}))


def depends_on_data(run: Callable[[], Any]) -> bool:
    """Whether a call reads sizes or values from tensors, which breaks a captured graph."""
    with _Watch() as functions, _Dispatch() as dispatched:
        run()
    return functions.seen or dispatched.seen


# ---------------------------------------------------------------------------------------- probing


@dataclasses.dataclass
class _Unit:
    """One run of a method (loop None) or loop: tensors before, tensors after."""

    method: str
    loop: int | None
    before: dict[str, Tensor]
    after: dict[str, Tensor] | None = None


def methods(owner: nn.Module) -> dict[str, types.FunctionType]:
    """The methods of a module's class, decorators taken off, those of torch's own classes left out."""
    found: dict[str, types.FunctionType] = {}
    for base in type(owner).__mro__:
        if base.__module__.startswith("torch.") or base is object:
            break
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            if isinstance(function, types.FunctionType) and not name.startswith("__"):
                found.setdefault(name, function)
    return found


def probe(owner: nn.Module, experts: Experts, run: Callable[[], Any]) -> Found:
    """The method or loop that `run` passes through and that sums the chosen experts.

    Raises:
        NoSource: there is none; says what was in the way.
    """
    reasons: list[str] = []
    with watching(owner, reasons) as (units, functions):
        run()
    for unit in sorted(units, key=lambda unit: unit.loop is not None):
        roles = _match(owner, experts, unit)
        if roles is not None:
            return Found(unit.method, functions[unit.method], unit.loop, roles)
    known = "; ".join(dict.fromkeys(reasons))
    raise NoSource(known or "no method or loop of it is a weighted sum of the chosen experts")


@contextlib.contextmanager
def watching(owner: nn.Module, reasons: list[str]) -> Iterator[tuple[list[_Unit], dict[str, types.FunctionType]]]:
    """While open, every method of a module and every loop in them notes its tensors."""
    units: list[_Unit] = []
    functions = methods(owner)
    watched = []
    for name, function in functions.items():
        try:
            changed = loop_source.watched(function, *_notes(name, units))
        except NoSource as error:
            reasons.append(str(error))
            continue
        vars(owner)[name] = types.MethodType(_noting(changed, name, units), owner)
        watched.append(name)
    try:
        yield units, functions
    finally:
        for name in watched:
            del vars(owner)[name]


def _notes(method: str, units: list[_Unit]) -> tuple[Callable[..., None], Callable[..., None]]:
    def before(loop: int, values: dict[str, Any]) -> None:
        units.append(_Unit(method, loop, _tensors(values)))

    def after(loop: int, values: dict[str, Any]) -> None:
        unit = next(u for u in reversed(units) if (u.method, u.loop) == (method, loop))
        unit.after = _tensors(values)

    return before, after


def _noting(function: types.FunctionType, name: str, units: list[_Unit]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        unit = _Unit(name, None, _tensors(dict(list(bound.arguments.items())[1:])))
        units.append(unit)
        result = function(*args, **kwargs)
        if isinstance(result, Tensor):  # anything else leaves its loops, which are looked at on their own
            unit.after = _tensors({"": result})
        return result

    return run


def _tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: value.detach().clone()
        for name, value in values.items()
        if isinstance(value, Tensor) and value.dim() > 0 and value.dtype != torch.bool
    }


def _match(owner: nn.Module, experts: Experts, unit: _Unit) -> Roles | None:
    """The roles of a unit's variables, or None where no choice of them gives what it computed."""
    if unit.after is None:
        return None
    changed = {
        name: value
        for name, value in unit.after.items()
        if value.is_floating_point() and not _equal(unit.before.get(name), value)
    }
    for rows, ids, weights, dense in _candidates(unit.before, experts):
        x = unit.before[rows].reshape(-1, experts.width)
        chosen = unit.before[ids].reshape(x.shape[0], -1)
        p = routing_weights(None if weights is None else unit.before[weights], chosen, dense, x)
        results = [name for name, value in changed.items() if value.numel() == x.numel()]
        scores: tuple[Score, ...] = ("output", "input") if weights is not None else ("output",)
        for score in scores if results else ():
            spec = dataclasses.replace(experts.spec, score=score)
            y = dataclasses.replace(experts, spec=spec)(owner, x, chosen, p, "")
            # Set before added: a buffer that is written row by row may hold zeros by chance.
            for adds, result in itertools.product((False, True), results):
                base = unit.before.get(result)
                if adds and (base is None or base.shape != changed[result].shape):
                    continue
                if unit.loop is None and not _laid_out_like(changed[result], unit.before[rows], experts.width):
                    continue
                now = changed[result].reshape(y.shape).to(y.dtype)
                if close(now - base.reshape(y.shape).to(y.dtype) if adds and base is not None else now, y):
                    flat = changed[result].shape != unit.before[rows].shape
                    return Roles(rows, ids, weights, dense, result, adds, score, flat)
    return None


def _laid_out_like(result: Tensor, rows: Tensor, width: int) -> bool:
    return result.shape in (rows.shape, (rows.numel() // width, width)) and result.dtype == rows.dtype


def _equal(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and bool(torch.equal(a, b))


def _candidates(values: dict[str, Tensor], experts: Experts) -> Iterator[tuple[str, str, str | None, bool]]:
    floats = {name: x for name, x in values.items() if x.is_floating_point()}
    for rows, x in floats.items():
        if x.shape[-1] != experts.width or x.dim() < 2:
            continue
        tokens = x.numel() // experts.width
        for ids, chosen in values.items():
            choices = chosen.numel() // max(tokens, 1)
            if chosen.is_floating_point() or chosen.numel() != tokens * choices or not 0 < choices <= experts.number:
                continue
            if chosen.min() < 0 or chosen.max() >= experts.number:
                continue
            for weights, p in floats.items():
                if p.numel() == tokens * choices and (choices == 1 or p.shape[-1] in (choices, p.numel(), 1)):
                    yield rows, ids, weights, False
                if p.numel() == tokens * experts.number and p.shape[-1] == experts.number:
                    yield rows, ids, weights, True
            yield rows, ids, None, False


def routing_weights(weights: Tensor | None, ids: Tensor, dense: bool, like: Tensor) -> Tensor:
    """(T, K) weights of the choices (T, K), out of what a module holds."""
    if weights is None:
        return torch.ones(ids.shape, dtype=like.dtype, device=like.device)
    if dense:
        return weights.reshape(ids.shape[0], -1).gather(1, ids.to(torch.int64))
    return weights.reshape(ids.shape)


# ------------------------------------------------------------------------------------ replacement


def replacement(found: Found, experts: Experts, site: str) -> Any:
    """The method with its experts as one operator."""
    roles = found.roles
    planned = dataclasses.replace(experts, spec=dataclasses.replace(experts.spec, score=roles.score))

    def routed(owner: nn.Module, rows: Tensor, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        x = rows.reshape(-1, planned.width)
        chosen = ids.reshape(x.shape[0], -1)
        return planned(owner, x, chosen, routing_weights(weights, chosen, roles.dense, x), site)

    if found.loop is None:

        def whole(owner: nn.Module, *values: Tensor) -> Tensor:
            with torch.no_grad() if roles.detached else contextlib.nullcontext():
                y = routed(owner, *values)
                return y if roles.flat else y.view(values[0].shape)

        return loop_source.as_one_call(found.function, whole, roles.names)

    def step(owner: nn.Module, result: Tensor, *values: Tensor) -> Tensor:
        y = routed(owner, *values).reshape(result.shape).to(result.dtype)
        return result + y if roles.adds else y

    return loop_source.without_loop(found.function, found.loop, step, roles.result, roles.names)
