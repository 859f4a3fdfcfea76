"""`prepare`: experts in Python loops become one operator before anything is captured; `restore` undoes it.

A loop over the experts that tokens chose has a length that depends on data, and breaks every graph
that torch.compile captures. No pass sees such a loop, so it is replaced in the module: the method that
holds it is swapped on the instance. Parameters, buffers, hooks, training mode and state dict stay.
A swap is kept only if the module gives the same values and gradients as before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from s2o_inductor.errors import S2OError
from s2o_inductor.loops import comparison, probe, weights
from s2o_inductor.loops.comparison import Inputs
from s2o_inductor.loops.probe import Found
from s2o_inductor.loops.source import NoSource
from s2o_inductor.loops.weights import Experts, NotExperts
from s2o_inductor.moe_ops import is_routed
from s2o_inductor.passes import verify
from s2o_inductor.passes.moe_sizes import PREPARED

log = logging.getLogger("s2o_inductor")

# Modules of up to so many elements are compared in float64; larger ones in their own dtype alone.
MAX_DOUBLE = 2**25
_TOKENS = 16
_SWAPPED = "_s2o_swapped"  # on a prepared module: the names of its swapped methods


@dataclasses.dataclass(frozen=True)
class Entry:
    """One module that holds experts in a Python loop.

    Attributes:
        where: its path in the model.
        status: "prepared" or "declined".
        reason: why it was declined.
        experts: how many it has.
        formula: what one of them computes.
        methods: the methods that were swapped.
        verified: how the swap was checked.
    """

    where: str
    status: str
    reason: str = ""
    experts: int = 0
    formula: str = ""
    methods: tuple[str, ...] = ()
    verified: str = ""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What `prepare` did; prints as a table."""

    entries: tuple[Entry, ...]

    @property
    def prepared(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == "prepared"]

    @property
    def declined(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == "declined"]

    def to_dict(self) -> dict[str, Any]:
        """``{"modules": [...]}``, ready for JSON."""
        return {"modules": [dataclasses.asdict(entry) for entry in self.entries]}

    def __str__(self) -> str:
        lines = [f"s2o: {len(self.prepared)} of {len(self.entries)} modules with loops over experts prepared"]
        for entry in self.entries:
            what = f"{entry.experts} experts, {entry.formula}; {entry.verified}" if not entry.reason else entry.reason
            lines.append(f"  {entry.where or '(the model)'}: {entry.status}, {what}")
        return "\n".join(lines)

    __repr__ = __str__


def prepare(model: nn.Module, sample: Any = None) -> Preparation:
    """Replaces Python loops over experts by one operator each, so that torch.compile captures the layer whole.

    Call it once, before torch.compile. It changes methods of the modules that hold such a loop and
    nothing else: parameters, buffers, state dict, hooks and training mode stay what they are, and
    `restore` undoes it. Single experts are no longer called. Gradients of experts without tokens are
    zero afterwards, where the loop leaves None.

    Args:
        model: any module.
        sample: inputs of the model: one value, a tuple, or a mapping of keyword arguments. Without it, each
            module that may hold experts is run by itself on random hidden states.

    Returns:
        Every module with experts in a loop: prepared, or declined with the reason.

    Raises:
        TypeError: `model` is no module.
        S2OError: the model does not run on `sample`. This and any other exception leaves the model as it was.
    """
    _check_module("prepare", model)
    candidates = [(name, module) for name, module in model.named_modules() if _may_hold_experts(module)]
    seen = {} if sample is None else _record(model, sample, [module for _, module in candidates])
    entries: list[Entry] = []
    before = {module for _, module in candidates if _SWAPPED in vars(module)}
    try:
        # Children first: a block is no candidate any more once its experts are prepared.
        for name, module in reversed(candidates):
            entry = _prepare_module(name, module, seen.get(module, []))
            if entry is not None:
                entries.append(entry)
                log.info("%s %s: %s", entry.status, name, entry.reason or entry.formula)
    except BaseException:  # an interrupt by the user, too: without a result nobody knows what was prepared
        for _, module in candidates:
            if module not in before:
                _restore_module(module)
        raise
    # What lies inside a prepared module is not called any more: that it could not be prepared itself is no news.
    inside = tuple(f"{name}." if name else "" for name, module in model.named_modules() if _SWAPPED in vars(module))
    kept = [entry for entry in entries if entry.status == "prepared" or not entry.where.startswith(inside)]
    return Preparation(tuple(reversed(kept)))


def restore(model: nn.Module) -> int:
    """Undoes `prepare`; returns how many modules were prepared. Raises TypeError for what is no module."""
    _check_module("restore", model)
    return sum(_restore_module(module) for module in list(model.modules()))


def _check_module(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} takes an nn.Module, whose methods it changes; got {type(model).__name__}")


def _restore_module(module: nn.Module) -> bool:
    """Takes the swapped methods off a module; whether it had any."""
    names = vars(module).pop(_SWAPPED, None)
    for name in names or ():
        vars(module).pop(name, None)
    return names is not None


def _may_hold_experts(module: nn.Module) -> bool:
    if type(module).__module__.startswith("torch."):
        return False  # also a bare nn.ModuleList: the code that loops over it is its parent's
    return any(True for _ in weights.containers(module)) or bool(weights.stacked_numbers(module))


def _record(model: nn.Module, sample: Any, modules: list[nn.Module]) -> dict[nn.Module, list[Inputs]]:
    """The first call of every module when the model runs on a sample."""
    seen: dict[nn.Module, list[Inputs]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(module, [(args, kwargs)])

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    args, kwargs = ((), dict(sample)) if isinstance(sample, Mapping) else (sample, {})
    args = args if isinstance(args, (tuple, list)) else (args,)
    try:
        with torch.no_grad(), _as_it_was(model):
            model(*args, **kwargs)
    except Exception as error:
        raise S2OError(f"the model does not run on the sample: {type(error).__name__}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextlib.contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Afterwards, buffers, gradients, training flags and the random state are what they were."""
    buffers = [(x, x.detach().clone()) for x in module.buffers()]
    modes = [(one, one.training) for one in module.modules()]
    devices = sorted({x.device.index or 0 for x in module.parameters() if x.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for x, before in buffers:
                x.copy_(before)
        for one, training in modes:
            one.training = training


def _prepare_module(where: str, module: nn.Module, given: list[Inputs]) -> Entry | None:
    """Prepares one module; None when it is not a loop over experts, or captured as it is."""
    if _SWAPPED in vars(module):
        return None
    try:
        with _as_it_was(module), torch.enable_grad():
            return _Module(where, module).prepare(given)
    except (NotExperts, NoSource) as error:
        return Entry(where, "declined", str(error))
    except Exception as error:  # a user's code, run in ways it was not written for: one module less, not none
        log.debug("%s could not be searched for experts", where, exc_info=True)
        return Entry(where, "declined", f"looking for its experts failed: {type(error).__name__}: {error}")


def _is_plain(x: Tensor) -> bool:
    return type(x) in (nn.Parameter, Tensor)


@dataclasses.dataclass
class _Module:
    """One module on its way to be prepared."""

    where: str
    module: nn.Module
    tried: nn.Module = dataclasses.field(init=False)  # what calls of unknown outcome are made of

    def __post_init__(self) -> None:
        # An index out of bounds is an error that can be caught on a CPU, and the end of a process's work on CUDA.
        self.device = next(self.module.parameters()).device
        self.tried = self.module if self.device.type == "cpu" else comparison.on_cpu(self.module)

    @property
    def small(self) -> bool:
        """Whether there is room for copies of it in float64."""
        return sum(x.numel() for x in self.module.parameters()) <= MAX_DOUBLE

    def prepare(self, given: list[Inputs]) -> Entry | None:
        given = [comparison.moved(run, "cpu") for run in given] or list(self._random_inputs())
        runs = [run for run in given if comparison.runs(self.tried, run)]
        if not runs:
            raise NoSource("it does not run on random hidden states; give prepare a sample of the model's inputs")
        modes = [mode for mode in (self.module.training, not self.module.training) if self._loops(runs[0], mode)]
        if not modes:
            return None
        first = next(self.module.parameters())
        if not is_routed(first.device, first.dtype):
            raise NotExperts(f"no {first.device.type.upper()} kernel for experts in {first.dtype} in this version")
        if any(name in vars(self.module) for name in probe.methods(self.module)):
            raise NotExperts("another program has replaced a method of it")
        if not all(map(_is_plain, self.module.parameters())):
            raise NotExperts("its parameters are of a class of their own, such as sharded or quantised ones")
        found: dict[str, tuple[Found, Experts]] = {}
        reasons: list[str] = []
        for mode, run in itertools.product(modes, runs):
            try:
                experts, one = self._find(run, mode)
                found[one.method] = (one, experts)
            except (NotExperts, NoSource) as error:
                reasons.append(str(error))
        if not found:
            raise NotExperts("; ".join(dict.fromkeys(reasons)))
        return self._swap(list(found.values()), runs[0], modes)

    def _loops(self, run: Inputs, training: bool) -> bool:
        self.tried.train(training)
        with torch.no_grad():
            return comparison.runs(self.tried, run) and probe.depends_on_data(lambda: comparison.call(self.tried, run))

    def _random_inputs(self) -> Iterator[Inputs]:
        """Hidden states alone, and with expert numbers and routing weights in any order."""
        parameter = next(self.module.parameters())
        sizes = dict.fromkeys(size for x in self.module.parameters() for size in x.shape[-2:] if x.dim() > 1)
        numbers = [
            *(len(weights.members(weights.at(self.module, path)))
              for path in weights.containers(self.module)),
            *weights.stacked_numbers(self.module),
        ]  # fmt: skip
        generator = torch.Generator().manual_seed(0)

        def tensor(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(parameter.dtype)

        for width in sizes:
            yield (tensor(2, _TOKENS // 2, width),), {}
            yield (tensor(_TOKENS, width),), {}
            for number in numbers:
                ids = torch.rand(_TOKENS, number, generator=generator).topk(min(2, number)).indices
                three = (tensor(_TOKENS, width), ids, tensor(*ids.shape).abs())
                for order in ((0, 1, 2), (0, 2, 1)):
                    yield tuple(three[at] for at in order), {}

    def _find(self, run: Inputs, training: bool) -> tuple[Experts, Found]:
        """The experts and the loop that sums them, read from a run in float64 where the module is small.

        Raises:
            NotExperts, NoSource: what stands in the way.
        """
        subject = comparison.on_cpu(self.module, torch.float64) if self.small else self.tried
        subject.train(training)
        run = comparison.moved(run, "cpu", torch.float64) if self.small else run
        paths = list(weights.containers(self.module))
        reason: Exception = NotExperts("its parameters are not the experts of a loop")
        readers: list[Callable[[], Experts]] = [
            *(functools.partial(weights.read_container, self.module, path) for path in paths),
            *(functools.partial(self._read_stacked, run, n) for n in weights.stacked_numbers(self.module)),
        ]
        for read in readers:
            try:
                experts = read()
                return experts, probe.probe(subject, experts, lambda: comparison.call(subject, run))
            except (NotExperts, NoSource) as error:
                reason = error
        raise reason

    def _read_stacked(self, run: Inputs, number: int) -> Experts:
        args = [x for x in (*run[0], *run[1].values()) if isinstance(x, Tensor)]
        if len(args) != 3:
            raise NotExperts("its experts are stacked, and it does not take tokens, expert numbers and weights")
        kept = min(number, 4)
        few = comparison.on_cpu(self.module, torch.float64, stacked=(number, kept))
        names = list(run[1]) if run[1] else None

        def first_expert(owner: nn.Module, rows: Tensor) -> Any:
            choice = rows.new_zeros((rows.shape[0], 1), dtype=torch.int64)
            given = [rows, *(rows.new_ones(choice.shape) if x.is_floating_point() else choice for x in args[1:])]
            return owner(*given) if names is None else owner(**dict(zip(names, given, strict=True)))

        return weights.read_stacked(few, number, kept, first_expert, args[0].shape[-1])

    def _swap(self, found: Sequence[tuple[Found, Experts]], run: Inputs, modes: Sequence[bool]) -> Entry:
        gold_of = comparison.on_cpu(self.module, torch.float64) if self.small else None
        cases, expected = [], []
        with _as_it_was(self.tried):
            variants = [case for case in comparison.variants(run) if comparison.runs(self.tried, case)]
        for mode, case in itertools.product(modes, variants):
            gold = None
            if gold_of is not None:
                gold = comparison.results(gold_of, comparison.moved(case, "cpu", torch.float64), mode)
            elif self.tried is not self.module:
                comparison.call(self.tried.train(mode), case)
            # What ran on the CPU may run on the module's own device.
            cases.append((comparison.moved(case, self.device), mode))
            expected.append((comparison.results(self.module, *cases[-1]), gold))
        methods = tuple(one.method for one, _ in found)
        outcome = verify.Outcome(False, "")
        vars(self.module)[_SWAPPED] = methods
        try:
            for detached in (False, True):
                for one, experts in found:
                    roles = dataclasses.replace(one.roles, detached=detached)
                    replaced = dataclasses.replace(one, roles=roles)
                    changed = probe.replacement(replaced, experts, f"{self.where}{PREPARED}")
                    vars(self.module)[one.method] = types.MethodType(changed, self.module)
                try:
                    outcome = comparison.compare([comparison.results(self.module, *case) for case in cases], expected)
                except Exception as error:  # a user's code, changed by us: any failure means "not proved"
                    outcome = verify.Outcome(False, f"{type(error).__name__}: {error}")
                if outcome.passed:
                    break
        finally:
            if not outcome.passed:
                _restore_module(self.module)
        if not outcome.passed:
            raise NotExperts(f"with its loop replaced it gives something else: {outcome.detail}")
        one, experts = found[0]
        formula = dataclasses.replace(experts.spec, score=one.roles.score).describe()
        return Entry(self.where, "prepared", "", experts.number, formula, methods, outcome.detail)
