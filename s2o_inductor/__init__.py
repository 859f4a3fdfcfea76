"""s2o: a torch.compile backend that rewrites attention.

    torch.compile(model, backend="s2o")

With the package installed, torch finds the backend by its name without an import. Importing the
package needs neither a GPU nor Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"
__all__ = [
    "Report", "S2OConfig", "calibrate", "explain", "install", "last_report", "prepare", "restore", "uninstall",
]  # fmt: skip

if TYPE_CHECKING:
    from s2o_inductor.backend import explain, install, uninstall
    from s2o_inductor.calibration import calibrate
    from s2o_inductor.config import S2OConfig
    from s2o_inductor.preparation import prepare, restore
    from s2o_inductor.report import Report, last_report

_HOME = {
    "Report": "report",
    "S2OConfig": "config",
    "calibrate": "calibration",
    "explain": "backend",
    "install": "backend",
    "last_report": "report",
    "prepare": "preparation",
    "restore": "preparation",
    "uninstall": "backend",
}


def __getattr__(name: str) -> Any:
    # Lazy: TORCH_LOGS imports this package while torch itself is still being imported.
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
