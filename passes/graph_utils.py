"""Reading single nodes of a Dynamo graph: names, arguments, sizes, where they come from."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any, TypeAlias

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._sympy.functions import FloorDiv

# A dimension: an int, or the expression of a symbolic one. Arithmetic on it adds no guard.
Size: TypeAlias = int | sympy.Expr


class Refusal(Exception):
    """A candidate that must stay as it is; the message is the reason that users read."""


# --------------------------------------------------------------------------- names and arguments

_NAMESPACES: tuple[Any, ...] = (
    torch, torch.Tensor, F, torch._C._nn, torch.functional, operator,
    torch._C._special,  # type: ignore[attr-defined]
)  # fmt: skip
_SYNONYMS = {
    "truediv": "div", "true_divide": "div", "divide": "div", "itruediv": "div",
    "multiply": "mul", "imul": "mul", "negative": "neg",
    "iadd": "add", "subtract": "sub", "isub": "sub",
    "swapaxes": "transpose", "swapdims": "transpose", "t": "T", "adjoint": "mH", "moveaxis": "movedim",
    "concat": "cat", "concatenate": "cat", "broadcast_to": "expand", "tile": "repeat",
    "special_softmax": "softmax", "_softmax": "softmax",
}  # fmt: skip


def op_name(node: fx.Node) -> str:
    """What a node computes, in one name for function, method, operator and in-place form; "" when unknown.

    `torch.mul`, `x.mul`, `x * y`, `x.mul_` and `x *= y` are all "mul"; whether a node writes in place
    is what `written` says.
    """
    if node.op == "call_method":
        name = str(node.target)
        if name.startswith("__") and name.endswith("__"):
            name = name.strip("_")
    elif node.op == "call_function":
        name = _function_name(node.target)
        if name == "getattr":
            name = str(node.args[1])
    else:
        return ""
    if name.endswith("_"):
        name = name.rstrip("_")
    return _SYNONYMS.get(name, name)


def _function_name(target: Any) -> str:
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        packet = target.overloadpacket if isinstance(target, OpOverload) else target
        return str(packet.__name__) if str(packet._qualified_op_name).startswith("aten::") else ""
    if target is getattr:
        return "getattr"
    name = getattr(target, "__name__", "")
    return name if any(getattr(space, name, None) == target for space in _NAMESPACES) else ""


def argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    """An argument of a call, given by position (the tensor is 0, for methods too) or by any of its names."""
    if position < len(node.args):
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def tensor_argument(node: fx.Node) -> fx.Node | None:
    """The tensor that a unary operator reads."""
    found = argument(node, 0, "input", "self", "x")
    return found if isinstance(found, fx.Node) else None


def integers(node: fx.Node, start: int, *names: str) -> tuple[Any, ...]:
    """A list argument that may also be spread: `permute(0, 2, 1)`, `permute((0, 2, 1))`, `permute(dims=...)`."""
    spread = node.args[start:]
    if len(spread) == 1 and isinstance(spread[0], (tuple, list)):
        return tuple(spread[0])
    if spread:
        return tuple(spread)
    value = argument(node, start, *names, default=())
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


# --------------------------------------------------------------------------------------- metadata


def fake(node: Any) -> Tensor | None:
    """The example tensor of a node, or None when it is no tensor or carries no metadata."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    """The shape of a node.

    Raises:
        Refusal: the node carries no metadata.
    """
    value = fake(node)
    if value is None:
        raise Refusal(f"the shape of '{node.name}' is not known at compile time")
    return tuple(size_of(size) for size in value.shape)


def made(node: fx.Node) -> fx.Node:
    """The node that holds what another one makes: itself, or the buffer that it assigns to."""
    return node.args[0] if node.target is operator.setitem and isinstance(node.args[0], fx.Node) else node


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a node; raises Refusal like `shape_of`."""
    value = fake(node)
    if value is None:
        raise Refusal(f"the dtype of '{node.name}' is not known at compile time")
    return value.dtype


def size_of(size: Any) -> Size:
    """A size without its guards: an int, or the expression behind a SymInt.

    Raises:
        Refusal: it is the length of a jagged dimension.
    """
    if isinstance(size, int):
        return size
    if size.node.is_nested_int():
        raise Refusal("jagged tensors are not supported")
    expression = size.node.expr.replace(FloorDiv, _exact_division)
    return int(expression) if expression.is_Integer else expression


def _exact_division(numerator: Any, denominator: Any) -> Any:
    """`numerator // denominator` without the rounding where nothing is left over."""
    quotient = sympy.cancel(numerator / denominator)
    return quotient if quotient.as_numer_denom()[1] == 1 else FloorDiv(numerator, denominator)


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal whatever the values of their symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(a == b or sympy.expand(a - b) == 0)


def ratio(a: Size, b: Size) -> Size | None:
    """a / b where that is a whole number whatever the values of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b != 0 and a % b == 0 else None
    quotient = sympy.cancel(sympy.sympify(a) / b)
    if quotient.is_Integer:
        return int(quotient)
    return quotient if quotient.is_integer and quotient.as_numer_denom()[1] == 1 else None


def product_of_sizes(sizes: Iterable[Size]) -> Size:
    """The product of sizes, 1 for none."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def is_contiguous(node: fx.Node) -> bool:
    """Whether a tensor lies in memory in the order of its dimensions, whatever the values of the symbols."""
    value, shape = fake(node), shape_of(node)
    strides = () if value is None else value.stride()
    return all(
        same(shape[dim], 1) or same(size_of(stride), product_of_sizes(shape[dim + 1 :]))
        for dim, stride in enumerate(strides)
    )


def plain(node: fx.Node) -> str | None:
    """Why a node is no ordinary dense tensor, or None when it is one."""
    value = fake(node)
    if value is None:
        return f"the shape of '{node.name}' is not known at compile time"
    if value.is_nested or value.layout != torch.strided:
        return f"'{node.name}' is a {'nested' if value.is_nested else value.layout} tensor"
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return f"'{node.name}' is inside a functorch transform"
    if type(value) not in (Tensor, torch.nn.Parameter, torch._subclasses.FakeTensor):
        return f"'{node.name}' is a {type(value).__name__}, not a plain tensor"
    return None


# How Dynamo names the module that was compiled: L['self'], G['model'], L['fn'].inner.
_ROOT = re.compile(r"^[A-Z]\['\w+'\]")


def where(node: fx.Node) -> str:
    """Module path of a node, or its source line, for reports."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path = _ROOT.sub("", str(list(stack.values())[-1][0]))
        parts = [part for part in re.split(r"[.\[\]'\"]+", path) if part not in ("", "_modules", "_orig_mod")]
        # Functions that close over the module, and methods of it, hold it in these.
        holders = [at for at, part in enumerate(parts) if part in ("cell_contents", "__self__")]
        parts = parts[holders[-1] + 1 :] if holders else parts
        if parts and "(" not in path:
            return ".".join(parts)
    lines = [line.strip() for line in node.meta.get("stack_trace", "").splitlines()]
    for line in reversed(lines):
        if line.startswith("File "):
            file, number, *_ = line.split(", ")
            return f"{file.split('/')[-1].strip(chr(34))}:{number.removeprefix('line ')}"
    return node.name
