"""Pictures of sparse attention: how dense each head was, which tokens a tile read, what a budget costs.

Needs matplotlib: ``pip install "s2o-inductor[viz]"``. Every function draws on the axes that it is given, or on a new
figure, and returns the axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from s2o_inductor.errors import S2OError
from s2o_inductor.report import Report


def density(report: Report, axes: Any = None) -> Any:
    """Density of every query head at every approximate site: a map of layers by heads.

    Args:
        report: from `s2o_inductor.last_report` after a run.
        axes: matplotlib axes; None makes a figure.

    Raises:
        S2OError: nothing in the report was approximated, or matplotlib is missing.
    """
    report.settle()
    sites = [site for site in report.sites if site.reading is not None]
    if not sites:
        raise S2OError("nothing was approximated: run the compiled model on long inputs under torch.no_grad() first")
    rows = [site.reading.head_density for site in sites if site.reading is not None]
    width = max(len(row) for row in rows)
    table = [[*row, *[float("nan")] * (width - len(row))] for row in rows]
    axes = _axes(axes)
    image = axes.imshow(table, vmin=0.0, vmax=1.0, aspect="auto", cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label="density (pairs computed / visible)")
    axes.set_yticks(range(len(sites)), [site.where for site in sites])
    axes.set(xlabel="query head", title="density per layer and head")
    return axes


def tokens_read(chosen: Tensor, axes: Any = None) -> Any:
    """Which keys each tile of queries read: one row of pixels per tile.

    Args:
        chosen: bool (tiles, Sk), as from `s2o_inductor.kernels.reference_sparse.chosen_keys`.
        axes: matplotlib axes; None makes a figure.

    Raises:
        S2OError: `chosen` is not 2-D, or matplotlib is missing.
    """
    if chosen.dim() != 2:
        raise S2OError(f"chosen must be (tiles, keys); got a tensor of shape {tuple(chosen.shape)}")
    axes = _axes(axes)
    axes.imshow(chosen.cpu().float(), aspect="auto", cmap="Greys", interpolation="nearest", vmin=0.0, vmax=1.0)
    axes.set(xlabel="key position", ylabel="tile of queries", title="keys read")
    return axes


def error_against_density(curves: Mapping[str, Sequence[tuple[float, float]]], axes: Any = None) -> Any:
    """Error over density on logarithmic axes, one line per method.

    Args:
        curves: by name of a method, its (density, error) points.
        axes: matplotlib axes; None makes a figure.

    Raises:
        S2OError: a method has no point, or matplotlib is missing.
    """
    axes = _axes(axes)
    for name, points in curves.items():
        if not points:
            raise S2OError(f"the curve {name!r} has no points")
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="density", ylabel="relative squared error")
    axes.legend()
    return axes


def _axes(axes: Any) -> Any:
    if axes is not None:
        return axes
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise S2OError('pictures need matplotlib: pip install "s2o-inductor[viz]"') from error
    return pyplot.subplots(layout="constrained")[1]
