"""Who reads and writes what in a Dynamo graph, whose nodes may write in place.

`x.mul_(2)` changes what every later reader of `x`, and of every view of `x`, sees, without an edge
that says so. `Flow` makes those effects explicit, so that what is built on it can follow data and
nothing else.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree

from s2o_inductor.passes.graph_utils import argument, op_name

_IN_PLACE_OPERATORS = frozenset(
    (
        operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
        operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
        operator.setitem,
    )
)  # fmt: skip
_IN_PLACE_METHODS = frozenset(f"__{function.__name__}__" for function in _IN_PLACE_OPERATORS)


def written(node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensors that a node changes in place, as it names them."""
    targets: list[Any] = []
    if node.op == "call_method":
        name = str(node.target)
        if name in _IN_PLACE_METHODS or (name.endswith("_") and not name.endswith("__")):
            targets.append(node.args[0])
    elif node.op == "call_function":
        targets += _written_by_function(node, node.target)
    if "out" in node.kwargs:
        targets.append(node.kwargs["out"])
    return tuple(leaf for leaf in pytree.tree_leaves(targets) if isinstance(leaf, fx.Node))


def _written_by_function(node: fx.Node, target: Any) -> list[Any]:
    if target in _IN_PLACE_OPERATORS:
        return [node.args[0]]
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        return _written_by_schema(node, target)
    if isinstance(target, HigherOrderOperator):
        return _written_by_body(node, target)
    name, module = getattr(target, "__name__", ""), getattr(target, "__module__", None) or "torch"
    if name.endswith("_") and not name.endswith("__") and module.startswith("torch"):
        return [node.args[0]] if node.args else []
    if _in_place_flag(target, node):
        return [node.args[0] if node.args else node.kwargs.get("input")]
    return []


def _written_by_schema(node: fx.Node, target: OpOverload | OpOverloadPacket) -> list[Any]:
    overloads = [target] if isinstance(target, OpOverload) else [getattr(target, name) for name in target.overloads()]
    found = []
    for position, parameter in enumerate(overloads[0]._schema.arguments):
        if parameter.alias_info is not None and parameter.alias_info.is_write:
            found.append(argument(node, position, parameter.name))
    return found


def _written_by_body(node: fx.Node, target: HigherOrderOperator) -> list[Any]:
    """Everything a higher-order operator reads, when its body (or the operator itself) writes in place."""
    writes = "mutation" in target.name()
    owner = node.graph.owning_module
    for leaf in node.all_input_nodes:
        if leaf.op == "get_attr" and owner is not None:
            body = functools.reduce(_attribute, str(leaf.target).split("."), owner)
            writes |= isinstance(body, fx.GraphModule) and any(written(inner) for inner in body.graph.nodes)
    return list(node.all_input_nodes) if writes else []


def _attribute(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)


def _in_place_flag(target: Any, node: fx.Node) -> bool:
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    position = _in_place_position(target)
    return position is not None and position < len(node.args) and node.args[position] is not False


@functools.lru_cache(maxsize=1024)
def _in_place_position(target: Any) -> int | None:
    """Where a function of torch.nn.functional takes its `inplace` flag."""
    if getattr(target, "__module__", "") != F.__name__:
        return None
    names = list(inspect.signature(target).parameters)
    return names.index("inplace") if "inplace" in names else None


# -------------------------------------------------------------------------------------- data flow

# Nodes that only look at a tensor: without readers they are dead, whatever they read.
_LOOKING = frozenset(
    ("view", "reshape", "transpose", "permute", "contiguous", "expand", "unsqueeze", "squeeze", "flatten", "unflatten",
     "getitem", "detach", "clone", "float", "half", "bfloat16", "to", "size", "mean", "type_as")
)  # fmt: skip


class Flow:
    """Who reads and writes which value of a graph, in-place writers included.

    A *value* is named by the node that made it. After `x.mul_(2)` the value that readers of `x` see
    is that of the `mul_` node. A write through a view leaves the other names of the memory *torn*:
    no node stands for what they now hold.

    Attributes:
        position: index of a node in the graph.
        ambient: what surrounds a node (gradient mode, autocast, functorch levels), as a comparable value.
        dead: views, casts and the like on which nothing depends, in graph order.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.ambient = dict(zip(self.nodes, _ambients(self.nodes), strict=True))
        self._memory = _memories(self.nodes)
        self._sharing: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            self._sharing.setdefault(self._memory[node], []).append(node)
        self._writers: dict[fx.Node, list[fx.Node]] = {}
        self._reads: dict[tuple[fx.Node, fx.Node], fx.Node | None] = {}
        self._readers: dict[fx.Node, list[fx.Node]] = {}
        self._follow_writes()
        self._live = self._find_live()
        self.dead = [node for node in self.nodes if node not in self._live]

    def _follow_writes(self) -> None:
        current: dict[fx.Node, fx.Node | None] = {}
        names: dict[fx.Node, list[fx.Node]] = {}  # the names under which one whole value is known
        for node in self.nodes:
            for source in node.all_input_nodes:
                value = current.get(source, source)
                self._reads[node, source] = value
                if value is not None:
                    self._readers.setdefault(value, []).append(node)
            for target in written(node):
                whole = names.setdefault(target, [target])
                self._writers.setdefault(self._memory[target], []).append(node)
                for other in self._sharing[self._memory[target]]:
                    if self.position[other] < self.position[node]:
                        current[other] = node if other in whole else None
                whole.append(node)
                names[node] = whole

    def _find_live(self) -> set[fx.Node]:
        live: set[fx.Node] = set()
        for node in reversed(self.nodes):
            looking = node.op in ("call_function", "call_method") and op_name(node) in _LOOKING and not written(node)
            if not looking or any(user in live for user in node.users):
                live.add(node)
        return live

    def read(self, node: fx.Node, source: Any) -> fx.Node | None:
        """The value that `node` sees when it reads `source`; None when it is torn or no tensor."""
        return self._reads.get((node, source)) if isinstance(source, fx.Node) else None

    def readers(self, value: fx.Node) -> list[fx.Node]:
        """The live nodes that read a value, in graph order."""
        return [node for node in self._readers.get(value, ()) if node in self._live]

    def is_live(self, node: fx.Node) -> bool:
        """Whether anything depends on a node."""
        return node in self._live

    def names_of(self, node: fx.Node) -> list[fx.Node]:
        """Every node that may share memory with this one, itself included."""
        return self._sharing[self._memory[node]]

    def written_between(self, source: fx.Node, start: fx.Node, end: fx.Node, allowed: Iterable[fx.Node]) -> bool:
        """Whether a node outside `allowed` changes the memory of `source` after `start` and before `end`."""
        inside = set(allowed)
        return any(
            self.position[start] < self.position[writer] < self.position[end] and writer not in inside
            for writer in self._writers.get(self._memory[source], ())
        )

    def written_after(self, source: fx.Node, start: fx.Node) -> bool:
        """Whether a node behind `start` changes the memory of `source`."""
        writers = self._writers.get(self._memory[source], ())
        return any(self.position[writer] > self.position[start] for writer in writers)


# Values and indices that share nothing: dividing the values of a top-k in place leaves its indices alone.
_FRESH = frozenset(("topk", "sort", "kthvalue", "mode"))


def _memories(nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """One representative node per piece of memory: views share the storage of their example values."""
    parent = {node: node for node in nodes}

    def find(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = node = parent[parent[node]]
        return node

    first: dict[int, fx.Node] = {}
    for node in nodes:
        storages = list(_storages(node))
        known = storages or node.meta.get("example_value") is not None or node.op == "output"
        if not known and not written(node):
            # Nothing is known of the result: assume that it is a view of everything read.
            for source in node.all_input_nodes:
                parent[find(source)] = find(node)
        if op_name(node) in _FRESH:
            storages = []  # one new piece of memory per result: its getitem nodes stand for them
        for storage in storages:
            parent[find(node)] = find(first.setdefault(storage, node))
        for target in written(node):
            parent[find(target)] = find(node)
    return {node: find(node) for node in nodes}


def _storages(node: fx.Node) -> Iterator[int]:
    for value in pytree.tree_leaves(node.meta.get("example_value")):
        if isinstance(value, Tensor):
            try:
                yield value.untyped_storage()._cdata
            except (NotImplementedError, RuntimeError):  # sparse and wrapper tensors have no storage
                continue


def _ambients(nodes: list[fx.Node]) -> Iterator[tuple[Any, ...]]:
    names = [getattr(node.target, "__name__", "") if node.op == "call_function" else "" for node in nodes]
    settings = [node.args[0] for node, name in zip(nodes, names, strict=True) if name == "_set_grad_enabled"]
    # A context sets the mode on entry and restores it on exit: the second setting tells what it was at first.
    grad: Any = settings[1] if len(settings) > 1 else None
    open_contexts: list[fx.Node] = []
    for node, name in zip(nodes, names, strict=True):
        yield (grad, *open_contexts)
        if name == "_set_grad_enabled":
            grad = node.args[0]
        elif name.startswith("_enter_") or name.endswith("increment_nesting"):
            open_contexts.append(node)
        elif (name.startswith("_exit_") or name.endswith("decrement_nesting")) and open_contexts:
            open_contexts.pop()
