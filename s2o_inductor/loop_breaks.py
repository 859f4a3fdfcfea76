"""Which Python loops over data broke a graph, for the report: Dynamo says where it gave up, the source says in what.

A loop over the experts that tokens chose is the commonest of them. No pass can see it: a frame that
breaks inside a loop is skipped whole, and nothing of it arrives at the backend.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import linecache
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

_ABOUT_DATA = ("dynamic shape operator", "data-dependent", "data dependent", ".item()", "nonzero")


@dataclasses.dataclass(frozen=True)
class LoopBreak:
    """A loop at which Dynamo gave up because its course depends on data.

    Attributes:
        owner: qualified name of the class whose method holds the loop; "" outside a class.
        file: full path.
        line: where Dynamo gave up.
    """

    owner: str
    file: str
    line: int

    def describe(self, model: nn.Module | None) -> str:
        """What to do, in a sentence; names the modules of a model that hold such a loop."""
        place = f"{self.owner or 'a function'} ({Path(self.file).name}:{self.line})"
        named = [] if model is None else [name for name, one in model.named_modules() if self._is_of(type(one))]
        if named:
            more = f" and {len(named) - 3} more" if len(named) > 3 else ""
            place = f"{', '.join(name or 'the model' for name in named[:3])}{more}, {place}"
        return (
            f"a Python loop over data in {place} stays out of every graph; if it runs the experts that tokens chose, "
            "call s2o_inductor.prepare(model) before torch.compile"
        )

    def _is_of(self, cls: type) -> bool:
        return any(base.__qualname__ == self.owner for base in cls.__mro__)


def loop_breaks(since: float) -> list[LoopBreak]:
    """The loops in the frames that Dynamo gave up since a time (seconds of the epoch), in the order of their code."""
    found = set()
    for metrics in torch._dynamo.utils.get_compilation_metrics():
        reason, file, line = (getattr(metrics, f"fail_{name}", None) for name in _FIELDS)
        if not reason or not file or not line or (metrics.start_time or 0.0) < since:
            continue
        if any(words in reason.lower() for words in _ABOUT_DATA) and (place := _loop_at(file, line)) is not None:
            found.add(LoopBreak(place, file, line))
    return sorted(found, key=lambda one: (one.file, one.line))


_FIELDS = ("reason", "user_frame_filename", "user_frame_lineno")


def describe(breaks: Iterable[LoopBreak], model: nn.Module | None = None) -> list[str]:
    """A sentence for each loop."""
    return [one.describe(model) for one in breaks]


@functools.lru_cache(maxsize=256)
def _loop_at(file: str, line: int) -> str | None:
    """The class around a line, "" for none; None where no for-loop holds or follows the line in its function."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return None
    names: list[str] = []
    function: ast.AST | None = None
    node: ast.AST | None = tree
    while node is not None:
        node = next((child for child in ast.walk(node) if child is not node and _scope_around(child, line)), None)
        if isinstance(node, ast.ClassDef):
            names.append(node.name)
        elif node is not None:
            function = node
    loops = [one for one in ast.walk(function or ast.Module([], [])) if isinstance(one, ast.For)]
    return ".".join(names) if any((loop.end_lineno or 0) >= line for loop in loops) else None


def _scope_around(node: ast.AST, line: int) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.lineno <= line <= (node.end_lineno or 0)
