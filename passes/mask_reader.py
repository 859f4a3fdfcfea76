"""Reads nodes of a functional ATen graph as functions of their index.

`Reader.read(node, index)` answers: which value has this tensor at that index? It follows the data
from the mask back to index tensors (arange), constants, and *leaves*: tensors whose values only run
time knows. The rules of single operators are in
`mask_moves` and `mask_pointwise`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes

from s2o_inductor.passes import mask_pointwise  # noqa: F401  (registers its rules)
from s2o_inductor.passes.index_math import ONE, ZERO, Expr, IndexMath, leaf_reads, size_expr
from s2o_inductor.passes.mask_moves import LOOKED_THROUGH, RULES
from s2o_inductor.passes.mask_values import Cases, Unreadable, Value, Values, atoms_of, from_python
from s2o_inductor.passes.predicates import Comparison, Logic, Predicate

Index = tuple[Expr, ...]
# A leaf may hold this many times the entries of one row of the mask per batch entry.
LEAF_ROWS = 16
_LEAF_DTYPES = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


# How a reason starts that already names its node.
_SITED = "at "


class Reader:
    """Reads one graph for one size of score matrix.

    Args:
        shape: (B, H, Sq, Sk) as expressions.
        index_math: what is known about sizes; gets the four index variables.
        unsafe: nodes whose memory is written in place before the mask is complete.
        eager_leaves: take a leaf as close to the mask as possible, rather than as far from it.
    """

    def __init__(
        self,
        shape: tuple[Expr, Expr, Expr, Expr],
        index_math: IndexMath,
        unsafe: frozenset[fx.Node],
        eager_leaves: bool = False,
    ) -> None:
        self.shape, self.math = shape, index_math
        self.logic = Logic(index_math)
        self.values = Values(self.logic)
        self.unsafe, self.eager_leaves = unsafe, eager_leaves
        self.index: Index = tuple(index_math.variable(name, size) for name, size in zip("bhqk", shape, strict=True))
        self.leaves: dict[str, fx.Node] = {}
        self._leaf_functions: dict[fx.Node, Any] = {}
        self._memo: dict[tuple[fx.Node, Index], Value | Unreadable] = {}
        self._bound: dict[tuple[fx.Node, int], Expr] = {}

    # ---- reading ------------------------------------------------------------------------------

    def read(self, node: fx.Node, index: Sequence[Expr]) -> Value:
        """The value at an index of as many expressions as the node has dimensions.

        Raises:
            Unreadable: the node is neither understood nor small enough to be a leaf.
        """
        place = tuple(
            ZERO if size == 1 else i for i, size in zip(index, self.sizes(node), strict=True)
        )  # the only index of a dimension of size 1 is 0
        key = (node, place)
        if key not in self._memo:
            try:
                self._memo[key] = self._read(node, place)
            except Unreadable as refusal:
                self._memo[key] = refusal
        found = self._memo[key]
        if isinstance(found, Unreadable):
            raise found
        return found

    def _read(self, node: fx.Node, index: Index) -> Value:
        if node in self.unsafe:
            raise Unreadable(f"{node.name} is written in place before the mask is complete", final=True)
        try:
            value = self._interpret(node, index)
        except Unreadable as refusal:
            if refusal.final:
                raise
            return self._leaf(node, index, refusal)
        if self._wants_leaf(node, value):
            try:
                return self._leaf(node, index, Unreadable("", final=True))
            except Unreadable:
                return value
        return value

    def _interpret(self, node: fx.Node, index: Index) -> Value:
        target = node.target
        if not isinstance(target, OpOverload):
            raise Unreadable(self._as_input(node))
        if target._schema.is_mutable:
            raise Unreadable(f"{node.name} ({target}) writes in place", final=True)
        rule = RULES.get(target._schema.name)
        if rule is None:
            raise Unreadable(f"{node.name} ({target}) is not an operator that masks are read through")
        try:
            return rule(self, node, arguments(node), index)
        except Unreadable as refusal:
            if refusal.final or refusal.args[0].startswith(_SITED):
                raise
            raise Unreadable(f"{_SITED}{node.name} ({target}): {refusal}") from refusal

    def _as_input(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "get_attr"):
            return f"{node.name} is an input of the graph: its values are known only at run time"
        return f"{node.name} ({node.target}) is not an operator that masks are read through"

    # ---- leaves -------------------------------------------------------------------------------

    def _wants_leaf(self, node: fx.Node, value: Value) -> bool:
        """Whether the node itself says in one entry what its value says in many."""
        if not any(leaf_reads(expr) for expr in atoms_of(value)):
            return False
        if self.eager_leaves:
            return not (isinstance(node.target, OpOverload) and node.target._schema.name in LOOKED_THROUGH)
        return isinstance(value, Cases) and len(value.parts) > 1

    def _leaf(self, node: fx.Node, index: Index, refusal: Unreadable) -> Value:
        """The entry of a tensor that the run-time mask reads; raises `refusal` when the tensor is none for that."""
        tensor = node.meta.get("val")
        named = node.op in ("placeholder", "get_attr") or refusal.args[0].startswith(_SITED)
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not named:
            raise Unreadable(f"{_SITED}{node.name} ({node.target}): floating-point values that only run time knows")
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _LEAF_DTYPES:
            raise refusal
        used = {symbol for expr in index for symbol in expr.free_symbols & self.math.ranges.keys()}
        if used >= {self.index[2], self.index[3]} or used - set(self.index):
            raise refusal
        if node.op not in ("placeholder", "get_attr") and not self._is_small(node):
            raise refusal
        function = self._leaf_functions.get(node)
        if function is None:
            name = f"L{len(self._leaf_functions)}"
            function = self._leaf_functions[node] = sympy.Function(name, integer=True)
            self.leaves[name] = node
            self.math.leaf_ranges[name] = self._entry_range(node, tensor)
        entry = function(*index)
        return Comparison("!=", entry) if tensor.dtype == torch.bool else self.values.constant(entry)

    def _is_small(self, node: fx.Node) -> bool:
        batch, _, queries, keys = self.shape
        count = sympy.Mul(*self.sizes(node))
        return any(self.math.nonnegative(LEAF_ROWS * batch * length - count) for length in (queries, keys))

    def _entry_range(self, node: fx.Node, tensor: torch.Tensor) -> tuple[Expr | None, Expr | None]:
        if tensor.dtype == torch.bool:
            return ZERO, ONE
        if tensor.dtype != torch.int64:
            limits = torch.iinfo(tensor.dtype)
            return sympy.Integer(limits.min), sympy.Integer(limits.max)
        name = node.target._schema.name if isinstance(node.target, OpOverload) else ""
        if name not in ("aten::cumsum", "aten::sum", "aten::argmax", "aten::argmin"):
            return None, None
        given = arguments(node)
        source = given["self"]
        dims = given.get("dim")
        if dims is None:
            dims = []
        dims = dims if isinstance(dims, (list, tuple)) else [dims]
        sizes = self.sizes(source)
        count = sympy.Mul(*((sizes[dim] for dim in dims) if dims and sizes else sizes))
        if name.startswith("aten::arg"):
            return ZERO, count - 1
        return (ZERO, count) if source.meta["val"].dtype == torch.bool else (None, None)

    # ---- what rules ask -------------------------------------------------------------------------

    def sizes(self, node: fx.Node) -> Index:
        """The node's shape."""
        tensor = node.meta.get("val")
        if not isinstance(tensor, torch.Tensor):
            raise Unreadable(f"{node.name} carries no tensor metadata", final=True)
        return tuple(size_expr(size) for size in tensor.shape)

    def dtype(self, node: fx.Node) -> torch.dtype:
        """The node's dtype."""
        self.sizes(node)
        dtype = node.meta["val"].dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    def integer(self, argument: Any) -> Expr:
        """A size-like argument: an int or a node that holds one."""
        scalar = self.scalar(argument)
        if isinstance(scalar, float):
            raise Unreadable(f"{scalar} is not an integer")
        return scalar

    def scalar(self, argument: Any) -> Any:
        """A number argument: a Python number or a node that holds a SymInt."""
        if isinstance(argument, fx.Node):
            argument = argument.meta.get("val")
        if isinstance(argument, torch.SymInt):
            return size_expr(argument)
        if not isinstance(argument, (bool, int, float)):
            raise Unreadable("it uses a number that is not an integer of the graph")
        return from_python(argument)

    def operand(self, argument: Any, index: Index, dtype: torch.dtype) -> Cases:
        """A tensor (broadcast to `index`) or number operand, as a number of that dtype."""
        converted = self.values.convert(self.broadcast(argument, index), dtype)
        assert isinstance(converted, Cases)
        return converted

    def flag(self, argument: Any, index: Index) -> Predicate:
        """A tensor or number operand as a truth value."""
        return self.values.truth(self.broadcast(argument, index))

    def broadcast(self, argument: Any, index: Index) -> Value:
        """A tensor operand at the index of the result, or a number."""
        if isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor):
            rank = len(self.sizes(argument))
            return self.read(argument, index[len(index) - rank :])
        return self.values.constant(self.scalar(argument))

    def common_dtype(self, *operands: Any) -> torch.dtype:
        """The dtype in which torch compares or combines two operands."""

        def sample(argument: Any) -> Any:
            value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
            if isinstance(value, torch.Tensor):
                return torch.empty((1,) * value.dim(), dtype=value.dtype, device="meta")
            return 0 if isinstance(value, torch.SymInt) else value

        with _disable_current_modes():
            dtype = torch.result_type(*(sample(operand) for operand in operands))
        return dtype

    def running(self, node: fx.Node, dim: int, size: Expr) -> Expr:
        """The variable that runs over a reduced dimension of a node."""
        if (node, dim) not in self._bound:
            self._bound[node, dim] = self.math.fresh_variable(size)
        return self._bound[node, dim]


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator node by name, defaults included."""
    assert isinstance(node.target, OpOverload)
    found: dict[str, Any] = {}
    for position, declared in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            found[declared.name] = node.args[position]
        elif declared.name in node.kwargs:
            found[declared.name] = node.kwargs[declared.name]
        else:
            found[declared.name] = declared.default_value
    return found


def written_before(graph: fx.Graph, mask: fx.Node) -> frozenset[fx.Node]:
    """Nodes whose memory some operator in front of `mask` writes, with all their views; `mask` if one behind does.

    A functional graph has none but the copies into its inputs at its end.
    """
    early: set[fx.Node] = set()
    late: set[fx.Node] = set()
    written = early
    for node in graph.nodes:
        if node is mask:
            written = late
        target = node.target
        if isinstance(target, OpOverload) and target._schema.is_mutable:
            for declared in target._schema.arguments:
                if declared.alias_info is not None and declared.alias_info.is_write:
                    written.update(_nodes(arguments(node)[declared.name]))
    unsafe = _sharing_memory(early) if early else set()
    if late and mask in _sharing_memory(late):
        unsafe.add(mask)
    return frozenset(unsafe)


def _sharing_memory(nodes: set[fx.Node]) -> set[fx.Node]:
    """The nodes and everything that may look at their memory."""
    found = set(nodes)
    # Towards the owners of the memory, then back to all their views.
    for step in (_aliased_inputs, _aliasing_users):
        pending = list(found)
        while pending:
            for other in step(pending.pop()):
                if other not in found:
                    found.add(other)
                    pending.append(other)
    return found


def _aliased_inputs(node: fx.Node) -> Iterable[fx.Node]:
    if not isinstance(node.target, OpOverload):
        return node.all_input_nodes if node.op == "call_function" else ()
    given = arguments(node)
    declared = [a.name for a in node.target._schema.arguments if a.alias_info is not None]
    return [source for name in declared for source in _nodes(given[name])]


def _aliasing_users(node: fx.Node) -> Iterable[fx.Node]:
    return [user for user in node.users if node in _aliased_inputs(user)]


def _nodes(argument: Any) -> list[fx.Node]:
    if isinstance(argument, fx.Node):
        return [argument]
    return [part for part in argument if isinstance(part, fx.Node)] if isinstance(argument, (list, tuple)) else []
