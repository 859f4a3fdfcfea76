"""Budgets for a model: measure what each head costs and loses at each budget, then spend error where it is cheap."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from s2o_inductor import backend, ops, report
from s2o_inductor.config import S2OConfig, split_options
from s2o_inductor.errors import S2OError
from s2o_inductor.passes.sparsify import site_place
from s2o_inductor.sparse_policy import SparsePolicy

CANDIDATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
# Halvings of the price of error between "free" and "none": each runs the model once per batch.
_STEPS = 8
_PRICES = (1e-2, 1e6)


@dataclasses.dataclass(frozen=True)
class _Trying(S2OConfig):
    """A config under which every site stays exact and records what `CANDIDATES` would have given."""

    def policy(self, where: str, heads: int, device: str) -> SparsePolicy | None:
        policy = super().policy(where, heads, device)
        return None if policy is None else dataclasses.replace(policy, candidates=CANDIDATES, audit=0)


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Density and relative error of a site, (candidates + 1, heads); the last row is the exact route: 1 and 0."""

    density: Tensor
    error: Tensor


def calibrate(
    model: Callable[..., Any],
    batches: Iterable[Any],
    *,
    target_error: float,
    metric: Callable[[Any, Any], float] | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> S2OConfig:
    """Budgets per layer and head with which the model's output errs by at most `target_error`, at the least cost.

    First every site runs exactly and records, for each of `CANDIDATES`, the density and the squared error of every
    head. For a price of error each head then takes the budget with the least density + price x relative error; heads
    for which nothing is worth its error stay exact. The price is halved towards the target with runs of the whole
    model. Runs under `torch.no_grad`, without code generation.

    Args:
        model: a module or function.
        batches: inputs as long as those to come: each a tensor, a tuple of positional or a dict of named arguments.
        target_error: largest allowed `metric`, averaged over the batches.
        metric: of the output and the exact output; the default is the relative error |y - y0| / |y0| over all
            floating-point tensors of the output.
        options: what ``torch.compile(options=...)`` takes; `budget` and `budgets` are what is searched.
        progress: show a progress bar.

    Returns:
        `options` with `budgets` for every site that was long enough; use it as
        ``torch.compile(model, backend="s2o", options=config.options())``, keep it with `to_json`.

    Raises:
        OptionError: an option is unknown or out of range.
        S2OError: `target_error` is not positive, `batches` is no list or is empty, or no attention is long enough to
            approximate.
    """
    if not target_error > 0:
        raise S2OError(f"target_error must be above 0; got {target_error}. For exact results set budget=0.")
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise S2OError(
            f"batches must be a list of inputs, each a tensor, tuple or dictionary; got {type(batches).__name__}"
        )
    inputs = [_arguments(batch) for batch in batches]
    if not inputs:
        raise S2OError("calibrate needs at least one batch; got none")
    base, _ = split_options({**(options or {}), "inner": "aot_eager"}, None)
    base = dataclasses.replace(base, budget=base.budget or CANDIDATES[0], budgets={})
    measure = metric or relative_error
    with tqdm(total=len(inputs) * (1 + _STEPS), desc="calibrate", disable=not progress) as bar, torch.no_grad():
        exact, sites = _try_candidates(model, inputs, base, bar)
        if not sites:
            raise S2OError(
                "no attention in the model may be approximated for these batches: see s2o_inductor.explain for why, "
                f"and whether the batches are shorter than min_seq ({base.min_seq or 'the default of the device'})"
            )
        low, high = _PRICES
        best = _config(base, sites, None)
        for _ in range(_STEPS):
            price = (low * high) ** 0.5
            trial = _config(base, sites, price)
            errors = []
            with report.separate(), backend.compiled_apart(model, trial) as run:
                for (args, kwargs), wanted in zip(inputs, exact, strict=True):
                    errors.append(measure(run(*args, **kwargs), wanted))
                    bar.update()
            error = sum(errors) / len(errors)
            bar.set_postfix(error=f"{error:.2e}", density=f"{_density(sites, price):.3f}")
            if error <= target_error:
                best, high = trial, price
            else:
                low = price
    return dataclasses.replace(best, inner=S2OConfig().inner)


def relative_error(output: Any, exact: Any) -> float:
    """|y - y0| / |y0| over all floating-point tensors of two outputs."""
    error = norm = 0.0
    for y, y0 in zip(tree_leaves(output), tree_leaves(exact), strict=True):
        if isinstance(y, Tensor) and y.is_floating_point():
            error += (y.double() - y0.double()).square().sum().item()
            norm += y0.double().square().sum().item()
    return (error / max(norm, torch.finfo(torch.float64).tiny)) ** 0.5


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _try_candidates(
    model: Callable[..., Any], inputs: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], base: S2OConfig, bar: Any
) -> tuple[list[Any], dict[str, _Measured]]:
    """The exact outputs, and what the candidates would have given at each place."""
    exact = []
    kept = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    with report.separate(), backend.compiled_apart(model, _Trying(**kept)) as run:
        for args, kwargs in inputs:
            exact.append(run(*args, **kwargs))
            bar.update()
        by_place: dict[str, list[Any]] = {}
        for name, calls in ops.trials.items():
            by_place.setdefault(site_place(name), []).extend(calls)
    return exact, {place: _summary(calls) for place, calls in by_place.items()}


def _summary(calls: list[Any]) -> _Measured:
    density, error = [], []
    for tries in zip(*calls, strict=True):
        density.append(torch.cat([one.density for one in tries]).mean(dim=0))
        total, norm = (sum(getattr(one, field).sum(dim=0) for one in tries) for field in ("error", "norm"))
        error.append(total / norm.clamp(min=torch.finfo(torch.float32).tiny))
    return _Measured(
        torch.stack([*density, torch.ones_like(density[0])]), torch.stack([*error, torch.zeros_like(error[0])])
    )


def _choice(site: _Measured, price: float) -> Tensor:
    return (site.density + price * site.error).argmin(dim=0)


def _density(sites: Mapping[str, _Measured], price: float) -> float:
    chosen = [site.density.gather(0, _choice(site, price)[None]) for site in sites.values()]
    return float(torch.cat(chosen, dim=1).mean())


def _config(base: S2OConfig, sites: Mapping[str, _Measured], price: float | None) -> S2OConfig:
    """The config in which every head takes the best budget at a price of error; exact everywhere without one."""
    values = (*CANDIDATES, 0.0)
    budgets: dict[str, Any] = {}
    for place, site in sites.items():
        best = [len(CANDIDATES)] * site.density.shape[1] if price is None else _choice(site, price).tolist()
        budgets[glob.escape(place)] = tuple(values[index] for index in best)
    return dataclasses.replace(base, budgets=budgets)
