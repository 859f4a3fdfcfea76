"""The expression language of `s2o_inductor.mask_spec`: parsed with `ast`, run on integers and index tensors.

Nothing is ever passed to ``eval``: a spec may come out of a cache on disk.
"""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Value = Any  # int, bool or Tensor

_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
_COMPARE: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod)
_PARAMETER = re.compile(r"p(\d+)")
_LEAF = re.compile(r"L(\d+)")


@functools.lru_cache(maxsize=4096)
def _tree(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"not a mask expression: {text!r} ({error.msg})") from error


def _integer(value: Value) -> Value:
    """Booleans as integers: True + True is 2, as in Python, where torch would say True."""
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return value.to(torch.int64)
    return value


class _Interpreter:
    """Runs one expression; `names` gives the values of b, q and k that are in scope."""

    def __init__(self, text: str, names: dict[str, Tensor], leaves: Sequence[Tensor], params: Sequence[int]) -> None:
        self.text, self.names, self.leaves, self.params = text, names, leaves, params

    def run(self) -> Value:
        return self.visit(_tree(self.text))

    def error(self, reason: str) -> ValueError:
        return ValueError(f"in mask expression {self.text!r}: {reason}")

    def visit(self, node: ast.expr) -> Value:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):  # bool is an int
            return node.value
        if isinstance(node, ast.Name):
            return self.name(node.id)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            index = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return self.load(node.value.id, [_integer(self.visit(i)) for i in index])
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            left, right = self.visit(node.left), self.visit(node.right)
            if isinstance(node.op, _ARITHMETIC):
                left, right = _integer(left), _integer(right)
            return _BINARY[type(node.op)](left, right)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -_integer(self.visit(node.operand))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            value = self.visit(node.operand)
            return (not value) if isinstance(value, bool) else ~value
        if isinstance(node, ast.Compare) and all(type(op) in _COMPARE for op in node.ops):
            values = [_integer(self.visit(v)) for v in (node.left, *node.comparators)]
            links = [_COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, values, values[1:], strict=False)]
            return functools.reduce(operator.and_, links)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self.call(node.func.id, [_integer(self.visit(a)) for a in node.args])
        raise self.error(f"{ast.unparse(node)!r} is not in the language of s2o_inductor.mask_spec")

    def name(self, name: str) -> Value:
        if name in self.names:
            return self.names[name]
        if match := _PARAMETER.fullmatch(name):
            if int(match[1]) < len(self.params):
                return int(self.params[int(match[1])])
            raise self.error(f"{name} needs {int(match[1]) + 1} parameters; got {len(self.params)}")
        if _LEAF.fullmatch(name):
            return self.load(name, [])
        raise self.error(f"unknown name {name!r}; this term may use {sorted(self.names)}, p0, p1, ... and L0[...], ...")

    def call(self, name: str, values: list[Value]) -> Value:
        if name == "abs" and len(values) == 1:
            return abs(values[0])
        if name in ("min", "max") and len(values) == 2:
            a, b = values
            if not isinstance(a, Tensor):
                a, b = b, a
            if not isinstance(a, Tensor):
                return min(a, b) if name == "min" else max(a, b)
            if isinstance(b, Tensor):
                return torch.minimum(a, b) if name == "min" else torch.maximum(a, b)
            return a.clamp(max=b) if name == "min" else a.clamp(min=b)
        raise self.error(f"no function {name} of {len(values)} arguments; there are min(a, b), max(a, b) and abs(a)")

    def load(self, name: str, index: list[Value]) -> Value:
        match = _LEAF.fullmatch(name)
        if not match or int(match[1]) >= len(self.leaves):
            raise self.error(f"{name} is not one of the {len(self.leaves)} leaves")
        leaf = self.leaves[int(match[1])]
        if leaf.dim() != len(index):
            raise self.error(f"{name} has shape {tuple(leaf.shape)} and is read with {len(index)} indices")
        checked = [self.in_range(name, i, size, leaf.device) for i, size in zip(index, leaf.shape, strict=True)]
        value = leaf[tuple(checked)]
        return value if value.dtype == torch.bool or value.is_floating_point() else value.to(torch.int64)

    def in_range(self, name: str, index: Value, size: int, device: torch.device) -> Value:
        """The index, proven or forced to lie in [0, size); a device's values cannot be tested without waiting."""
        if not isinstance(index, Tensor):
            if not 0 <= index < size:
                raise self.error(f"index {index} of {name} is out of range for size {size}")
            return index
        if index.numel() and size == 0:
            raise self.error(f"{name} is empty and is read at {index.numel()} places")
        if index.device.type == "cpu":
            if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
                raise self.error(
                    f"indices of {name} span [{int(index.min())}, {int(index.max())}], out of range for size {size}"
                )
            return index
        return index.clamp(0, size - 1)


def integer(text: str, params: Sequence[int]) -> int:
    """The value of an expression over parameters alone.

    Raises:
        ValueError: it is not in the language or uses more than p0, p1, ... and integers.
    """
    value = _Interpreter(text, {}, (), params).run()
    return int(value)


def term(text: str, names: dict[str, Tensor], leaves: Sequence[Tensor], params: Sequence[int], boolean: bool) -> Tensor:
    """One side of a mask term as a tensor that broadcasts over the index tensors.

    Args:
        text: the expression.
        names: index tensors (int64) of the names that may occur: b with q, or b with k.
        leaves: L0, L1, ...
        params: p0, p1, ...
        boolean: whether the result is bool (of an integer: not zero) or int64.

    Raises:
        ValueError: the expression is outside the language, a leaf is read out of range (on CPU), or
            an integer is wanted and the result is floating point.
    """
    value = _Interpreter(text, names, leaves, params).run()
    if not isinstance(value, Tensor):
        value = torch.full((), value, device=names["b"].device)
    if boolean:
        return value if value.dtype == torch.bool else value != 0
    if value.is_floating_point():
        raise ValueError(f"mask expression {text!r} must be an integer; it is {value.dtype}")
    return value.to(torch.int64)
