"""Where a module keeps the weights of its experts, and the formula they stand in: for `prepare`.

Two layouts are known: a container of like modules (`nn.ModuleList`, `nn.ModuleDict`), each a small MLP, and
parameters whose first axis counts the experts, as (E, ., .) or folded into rows (E * I, l). Which matrix is
which and what lies between them is found by running one expert in float64 and comparing with every
formula of `ExpertSpec`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2o_inductor.loops.comparison import on_cpu
from s2o_inductor.moe_list_ops import moe_experts_list
from s2o_inductor.moe_ops import hidden_rows, moe_experts
from s2o_inductor.moe_spec import ExpertSpec
from s2o_inductor.passes.moe_activation import formulas

_ROWS = 8
Path: TypeAlias = tuple[str, ...]


class NotExperts(Exception):
    """A module is not experts of a known kind; the message is the reason that users read."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """One matrix or bias of every expert.

    Attributes:
        path: attributes from the expert (or, where they are stacked, from the owner) to the parameter.
        flipped: it is stored (in, out).
    """

    path: Path
    flipped: bool = False


@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of a module and their formula; holds names, no tensors.

    Attributes:
        container: attributes from the owner to the container of experts; None where weights are stacked.
        number: how many experts there are.
        width: columns of a row that enters an expert.
        w1: first products: one, or gate and up.
        b1: their biases, none or as many.
        spec: the formula; `score` is filled in by who finds the routing.
    """

    container: Path | None
    number: int
    width: int
    w1: tuple[Weight, ...]
    w2: Weight
    b1: tuple[Weight, ...]
    b2: Weight | None
    spec: ExpertSpec
    text: str = dataclasses.field(init=False)  # of the spec: writing it is nothing that torch.compile can capture

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", self.spec.text())

    def __call__(self, owner: nn.Module, rows: Tensor, ids: Tensor, p: Tensor, site: str) -> Tensor:
        """The weighted sum of the chosen experts: (T, l), (T, K), (T, K) -> (T, l) in the dtype of `rows`."""
        # Products by nn.Linear and by @ run in the autocast dtype, and so does what replaces them.
        device = rows.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        run = self._run_stacked if self.container is None else self._run_separate
        return run(owner, rows, ids, p, site, low).to(rows.dtype)

    def _run_separate(
        self, owner: nn.Module, rows: Tensor, ids: Tensor, p: Tensor, site: str, low: torch.dtype | None
    ) -> Tensor:
        assert self.container is not None
        experts = members(at(owner, self.container))

        def each(weight: Weight) -> list[Tensor]:
            found = [at(expert, weight.path) for expert in experts]
            return found if low is None else [x.to(low) for x in found]

        def oriented(weight: Weight) -> list[Tensor]:
            found = each(weight)
            return [x.mT for x in found] if weight.flipped != self.spec.transposed else found

        lists = [oriented(weight) for weight in (*self.w1, self.w2)]
        b1 = [each(weight) for weight in self.b1]
        joined = b1[0] if len(b1) == 1 else [torch.cat(parts) for parts in zip(*b1, strict=True)]
        return moe_experts_list(
            rows.to(lists[0][0].dtype), lists[0], lists[-1], ids, p, spec=self.text,
            w3=lists[1] if len(lists) == 3 else (), b1=joined,
            b2=() if self.b2 is None else each(self.b2), site=site,
        )  # fmt: skip

    def _run_stacked(
        self, owner: nn.Module, rows: Tensor, ids: Tensor, p: Tensor, site: str, low: torch.dtype | None
    ) -> Tensor:
        def all_of(weight: Weight) -> Tensor:
            found: Tensor = at(owner, weight.path)
            if found.shape[0] != self.number:
                found = found.view(self.number, -1, *found.shape[1:])
            return found if low is None else found.to(low)

        def oriented(weight: Weight) -> Tensor:
            # The op takes all matrices one way round.
            return all_of(weight).mT if weight.flipped != self.spec.transposed else all_of(weight)

        first = [oriented(weight) for weight in self.w1]
        b1 = [all_of(weight) for weight in self.b1]
        return moe_experts(
            rows.to(first[0].dtype), first[0], oriented(self.w2), ids, p, spec=self.text,
            w3=first[1] if len(first) == 2 else None, b1=torch.cat(b1, dim=-1) if b1 else None,
            b2=None if self.b2 is None else all_of(self.b2), site=site,
        )  # fmt: skip


def at(owner: Any, path: Path) -> Any:
    """The attribute that a path leads to."""
    for name in path:
        owner = getattr(owner, name)
    return owner


def members(container: nn.Module) -> list[nn.Module]:
    """The experts of a container, in order."""
    return list(container.values() if isinstance(container, nn.ModuleDict) else container.children())


# --------------------------------------------------------------------------------------- containers


def containers(owner: nn.Module) -> Iterator[Path]:
    """Paths to what may be containers of experts: the owner itself, or a child."""
    named: list[tuple[Path, nn.Module]] = [((), owner), *(((name,), child) for name, child in owner.named_children())]
    for path, module in named:
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            experts = members(module)
            matrices = [x for x in experts[0].parameters() if x.dim() == 2] if experts else []
            if len(experts) > 1 and len(matrices) in (2, 3) and all(map(_alike(experts[0]), experts)):
                yield path


def _alike(first: nn.Module) -> Callable[[nn.Module], bool]:
    def shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
        return [(name, x.shape) for name, x in module.named_parameters()]

    wanted = shapes(first)
    return lambda other: type(other) is type(first) and shapes(other) == wanted


def read_container(owner: nn.Module, path: Path) -> Experts:
    """The experts of a container.

    Raises:
        NotExperts: they compute something else, carry hooks, or draw random numbers.
    """
    experts = members(at(owner, path))
    for expert in experts:
        for module in expert.modules():
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                raise NotExperts("single experts carry hooks, which would no longer run")
            if getattr(module, "p", 0) and isinstance(module, nn.modules.dropout._DropoutNd):
                raise NotExperts("the experts drop out values at random")
    double = on_cpu(experts[0], torch.float64)
    parameters = {tuple(name.split(".")): x.detach() for name, x in double.named_parameters()}
    matrices = {name: x for name, x in parameters.items() if x.dim() == 2}
    biases = {name: x for name, x in parameters.items() if x.dim() == 1}
    if len(matrices) not in (2, 3) or len(matrices) + len(biases) != len(parameters):
        raise NotExperts("an expert is not two or three matrices and their biases")
    for width in dict.fromkeys(size for x in matrices.values() for size in x.shape):
        found = _fit(double, matrices, biases, width, constants(double))
        if found is not None:
            return Experts(path, len(experts), width, *found)
    raise NotExperts("an expert computes none of the formulas that s2o knows")


def constants(module: nn.Module) -> set[float]:
    """Positive numbers that a module and its children hold as attributes: slopes, bounds and shifts."""
    found = {1.0}
    for one in module.modules():
        found |= {value for value in vars(one).values() if type(value) is float and value > 0}
    return found


# ------------------------------------------------------------------------------------------ stacked


def stacked_numbers(owner: nn.Module) -> list[int]:
    """Numbers of experts that a module's own parameters may be stacked by; empty where they are not."""
    parameters = [x for _, x in _stacked_parameters(owner)]
    deep = {x.shape[0] for x in parameters if x.dim() == 3}
    if len(deep) == 1 and sum(x.dim() == 3 for x in parameters) in (2, 3):
        return list(deep)
    if len(parameters) in (2, 3) and all(x.dim() == 2 for x in parameters) and len({x.shape for x in parameters}) == 1:
        numbers = {value for value in vars(owner).values() if type(value) is int and value > 1}
        return sorted(value for value in numbers if parameters[0].shape[0] % value == 0)
    return []


def _stacked_parameters(owner: nn.Module) -> list[tuple[Path, nn.Parameter]]:
    """Parameters of a module and of its children that are no modules of torch's own."""
    found: list[tuple[Path, nn.Parameter]] = [((name,), x) for name, x in owner.named_parameters(recurse=False)]
    for name, child in owner.named_children():
        if not type(child).__module__.startswith("torch."):
            found += [((name, inner), x) for inner, x in child.named_parameters(recurse=False)]
    return found


def read_stacked(
    few: nn.Module, number: int, kept: int, run: Callable[[nn.Module, Tensor], Any], width: int
) -> Experts:
    """The experts whose matrices are stacked in a module's parameters.

    Args:
        few: the module in float64, with its first experts alone.
        number: how many experts there are, and
        kept: how many of them `few` has.
        run: what the first expert makes of rows: (few, (rows, width)) -> (rows, width).
        width: columns of a row.

    Raises:
        NotExperts: they compute something else.
    """
    matrices, biases = {}, {}
    for path, parameter in _stacked_parameters(few):
        x = parameter.detach()
        if x.dim() == 3 or (x.dim() == 2 and x.shape[0] != kept):
            matrices[path] = (x if x.dim() == 3 else x.view(kept, -1, x.shape[1]))[0]
        elif x.dim() == 2:
            biases[path] = x[0]
    found = _fit(lambda rows: run(few, rows), matrices, biases, width, constants(few))
    if found is None:
        raise NotExperts("the experts compute none of the formulas that s2o knows")
    return Experts(None, number, width, *found)


# ---------------------------------------------------------------------------------------------- fit

_Fit: TypeAlias = tuple[tuple[Weight, ...], Weight, tuple[Weight, ...], Weight | None, ExpertSpec]


def _fit(
    expert: Callable[[Tensor], Any], matrices: dict[Path, Tensor], biases: dict[Path, Tensor], width: int,
    numbers: Iterable[float],
) -> _Fit | None:  # fmt: skip
    """Which matrix is which and what the expert computes, or None; all in float64."""
    rows = torch.randn(_ROWS, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Large enough to tell activations and bounds apart, whatever the scale of the weights.
    one = next(iter(matrices.values()))
    rows = 4.0 * rows.to(one.device) / one.norm(dim=int(one.shape[1] == width)).mean().clamp(min=1e-6)
    with torch.no_grad():
        try:
            target = expert(rows)
        except Exception:  # a user's module on rows of ours: that it fails only means "not this width"
            return None
        if not isinstance(target, Tensor) or target.numel() != rows.numel() or not target.isfinite().all():
            return None
        target = target.reshape(rows.shape)  # some modules put an axis of size 1 between tokens and width
        for first, last in _roles(matrices, width):
            outputs = sum(_matrix(matrices, weight).shape[0] for weight in first)
            inner = _matrix(matrices, last).shape[1]
            for b1, b2 in _bias_roles(biases, first, outputs, width):
                pre = torch.cat([F.linear(rows, _matrix(matrices, weight)) for weight in first], dim=1)
                pre = pre if not b1 else pre + torch.cat([biases[weight.path] for weight in b1])
                for spec, swapped in formulas(numbers, len(first), outputs == inner):
                    if swapped:
                        continue  # the other order of the two is tried as roles of its own
                    y = F.linear(hidden_rows(pre, spec), _matrix(matrices, last))
                    y = y if b2 is None else y + biases[b2.path]
                    if torch.allclose(y, target, rtol=0.0, atol=1e-6 * float(target.abs().max())):
                        return first, last, b1, b2, dataclasses.replace(spec, transposed=last.flipped)
    return None


def _matrix(matrices: dict[Path, Tensor], weight: Weight) -> Tensor:
    return matrices[weight.path].mT if weight.flipped else matrices[weight.path]


def _roles(matrices: dict[Path, Tensor], width: int) -> Iterator[tuple[tuple[Weight, ...], Weight]]:
    """First and last matrices whose shapes fit, the ways of nn.Linear first."""
    for order in itertools.permutations(matrices):
        for flips in itertools.product((False, True), repeat=len(order)):
            *first, last = (Weight(path, flip) for path, flip in zip(order, flips, strict=True))
            outputs = [_matrix(matrices, weight) for weight in first]
            final = _matrix(matrices, last)
            wide = final.shape[1] * (1 if len(first) == 2 else 0)
            fits = {final.shape[1], 2 * final.shape[1]} if not wide else {wide}
            if final.shape[0] == width and all(x.shape[1] == width and x.shape[0] in fits for x in outputs):
                yield tuple(first), last


def _bias_roles(
    biases: dict[Path, Tensor], first: Sequence[Weight], outputs: int, width: int
) -> Iterator[tuple[tuple[Weight, ...], Weight | None]]:
    """Biases of the first products and of the last one, whose shapes fit and which use all there are."""
    for count in {0, len(first)}:
        for order in itertools.permutations(biases):
            b1, rest = tuple(Weight(path) for path in order[:count]), order[count:]
            if len(b1) == count and len(rest) <= 1 and (not b1 or sum(len(biases[x.path]) for x in b1) == outputs):
                b2 = Weight(rest[0]) if rest else None
                if b2 is None or len(biases[b2.path]) == width:
                    yield b1, b2
