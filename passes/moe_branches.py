"""Loops over experts that a graph holds unrolled, one branch of nodes per expert.

What an iteration contributes is a *term*. `find_loops` follows sums, in place or not, and stacks;
`Branches` shows that the terms of one loop are the same computation but for their weights and for one
number, that of the expert. What a branch computes is read by `moe_unrolled.py`, in the first one alone.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from s2o_inductor.passes.flow import Flow
from s2o_inductor.passes.graph_utils import Refusal, argument, dtype_of, op_name, shape_of
from s2o_inductor.passes.moe import MOVES, rows_and_factor
from s2o_inductor.passes.moe_activation import ROWWISE
from s2o_inductor.passes.moe_products import read_linear


@dataclasses.dataclass(frozen=True)
class Term:
    """What one iteration contributes.

    Attributes:
        reader: the node that adds or stacks it, and
        node: how that names it.
        index: the value of the positions at which it is added, None for all tokens.
    """

    reader: fx.Node
    node: fx.Node
    index: fx.Node | None = None


@dataclasses.dataclass(frozen=True)
class Loop:
    """Terms in graph order, and the node that has all of them: their sum, or a stack of them.

    Attributes:
        base: what a sum starts from, None for nothing.
        stacked: the terms are not added up yet.
        sure: it is a candidate even if its terms turn out to differ. A sum over all tokens of what nothing weights
            may be one of layers.
    """

    output: fx.Node
    terms: tuple[Term, ...]
    base: fx.Node | None = None
    stacked: bool = False
    sure: bool = True


def find_loops(flow: Flow) -> list[Loop]:
    """Every sum and every stack of two or more terms that may be experts."""
    sums: dict[fx.Node, Loop] = {}
    found = []
    for node in flow.nodes:
        parts = argument(node, 0, "tensors") if op_name(node) == "stack" else ()
        if isinstance(parts, (list, tuple)) and len(parts) > 1 and all(_is_expert(flow, node, part) for part in parts):
            found.append(Loop(node, tuple(Term(node, part) for part in parts), stacked=True))
        links = [(total, term) for total, term in _links(flow, node) if _is_expert(flow, term.reader, term.node)]
        for total, term in links:
            so_far = None if total is None else sums.get(total)
            if total is not None and so_far is not None and _continues(flow, so_far, total, term, node):
                sums[node] = dataclasses.replace(so_far, output=node, terms=(*so_far.terms, term))
                del sums[total]
                break
        else:
            sure = bool(links) and _is_weighted(flow, links[0][1])
            if len(links) == 2:  # two terms, or one and what it is added to; in the order of the sum
                sums[node] = Loop(node, (links[1][1], links[0][1]), sure=sure)
            elif links:
                sums[node] = Loop(node, (links[0][1],), base=links[0][0], sure=sure)
    return [*found, *(loop for loop in sums.values() if len(loop.terms) > 1)]


def _continues(flow: Flow, so_far: Loop, total: fx.Node, term: Term, node: fx.Node) -> bool:
    """Whether a term belongs to a sum: it is weighted, or for some tokens, as the first is."""
    alike = (so_far.terms[0].index is None) == (term.index is None) and so_far.sure == _is_weighted(flow, term)
    return alike and _reads_alone(flow, total, node)


def _links(flow: Flow, node: fx.Node) -> Iterator[tuple[fx.Node | None, Term]]:
    """As what a node may be a sum of what came before, None for zero, and of a term."""
    name, total = op_name(node), argument(node, 0, "input", "self")
    if name == "add" and argument(node, 2, "alpha", default=1) == 1 and len(node.args) > 1:
        for total, term in (node.args[:2], node.args[1::-1]):
            known = total == 0 if not isinstance(total, fx.Node) else flow.read(node, total) is not None
            if isinstance(term, fx.Node) and known:
                yield flow.read(node, total), Term(node, term)
    elif name == "index_add" and argument(node, 1, "dim") == 0 and argument(node, 4, "alpha", default=1) == 1:
        index, term = argument(node, 2, "index"), argument(node, 3, "source")
        known = flow.read(node, total) is not None and flow.read(node, index) is not None
        if isinstance(term, fx.Node) and known:
            yield flow.read(node, total), Term(node, term, flow.read(node, index))
    elif node.target is operator.setitem:
        yield from _assigned(flow, node)


def _assigned(flow: Flow, node: fx.Node) -> Iterator[tuple[fx.Node | None, Term]]:
    """`total[index] = total[index] + term`, as which a graph holds `total[index] += term`."""
    total, index, value = node.args
    added = flow.read(node, value)
    if added is None or op_name(added) != "add" or len(added.args) != 2 or flow.read(node, index) is None:
        return
    for seen, term in (added.args, added.args[::-1]):
        old = flow.read(added, seen)
        if old is None or op_name(old) != "getitem" or old.args[1] is not index or not isinstance(term, fx.Node):
            continue
        if flow.read(old, old.args[0]) is flow.read(node, total) is not None:
            yield flow.read(node, total), Term(added, term, flow.read(node, index))


def _reads_alone(flow: Flow, total: fx.Node, node: fx.Node) -> bool:
    """Whether a sum is read to be added to and for nothing else."""
    readers = [reader for reader in flow.readers(total) if reader is not node]
    if node.target is operator.setitem:
        return len(readers) == 1 and op_name(readers[0]) == "getitem" and readers[0].args[1] is node.args[1]
    return not readers


def _is_expert(flow: Flow, reader: fx.Node, node: Any) -> bool:
    """Whether a value comes from two linear layers, one after the other, weighted or not."""
    value = flow.read(reader, node)
    while value is not None and read_linear(flow, value) is None:
        value = None if (rows := rows_of(value)) is None else flow.read(value, rows)
    last = None if value is None else read_linear(flow, value)
    pending = [] if last is None else [flow.read(last.node, last.rows)]
    seen = set()
    while pending:
        value = pending.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        if read_linear(flow, value) is not None:
            return True
        if op_name(value) in ROWWISE | {"dropout"}:
            pending += [flow.read(value, source) for source in value.all_input_nodes]
    return False


def _is_weighted(flow: Flow, term: Term) -> bool:
    """Whether a term is for some tokens, or its rows are multiplied by a number each."""
    value = flow.read(term.reader, term.node)
    while term.index is None and value is not None and op_name(value) != "mul" and read_linear(flow, value) is None:
        value = None if (rows := rows_of(value)) is None else flow.read(value, rows)
    return term.index is not None or (value is not None and op_name(value) == "mul")


def rows_of(node: fx.Node) -> fx.Node | None:
    """What a view, a cast, dropout or a product with one number per row does that to."""
    if op_name(node) == "mul":
        try:
            return rows_and_factor(node)[0]
        except Refusal:
            return None
    source = argument(node, 0, "input", "self")
    return source if isinstance(source, fx.Node) and op_name(node) in MOVES | {"dropout"} else None


# ------------------------------------------------------------------------------ that branches are alike


class Branches:
    """The terms of a loop beside one another.

    Attributes:
        first: the nodes of the first branch of which the others have copies.
        numbers: that of the expert of each term.
        numbered: the nodes, of every branch, that hold it.
    """

    def __init__(self, flow: Flow, loop: Loop) -> None:
        """Compares each term with the first.

        Raises:
            Refusal: they differ in more than a number.
        """
        copies = [_Copy(flow, loop.terms[0], term) for term in loop.terms[1:]]
        self.first = {node for copy in copies for node in copy.nodes}
        self.numbered = {node for copy in copies for node in copy.numbered}
        starts = [copy.start for copy in copies if copy.start is not None]
        shifts = [copy.shift for copy in copies]
        # Without a number anywhere it is the place in the stack that tells one expert from another.
        places = range(1, len(loop.terms)) if loop.stacked and not starts else shifts
        self.numbers = [shift + (starts[0] if starts else 0) for shift in (0, *places)]
        self._copies = copies

    def own(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """What each expert has in the place of a node of the first branch, in the order of their numbers.

        Raises:
            Refusal: they are not the experts 0, 1, 2 and so on.
        """
        if sorted(self.numbers) != list(range(len(self.numbers))):
            shown = ", ".join(map(str, self.numbers[:8])) + " ..." * (len(self.numbers) > 8)
            raise Refusal(f"the unrolled loop runs over experts {shown}, not over each one from 0 on, once")
        found = [node, *(copy.nodes.get(node, node) for copy in self._copies)]
        return tuple(one for _, one in sorted(zip(self.numbers, found, strict=True), key=lambda pair: pair[0]))


class _Copy:
    """One branch, node for node beside the first.

    Attributes:
        nodes: from those of the first branch to those of this one; what both read from outside is not in it.
        shift: by how much the number of its expert is larger.
        start: the number in the first branch, where one is seen.
        numbered: the nodes of both that hold it.
    """

    def __init__(self, flow: Flow, first: Term, other: Term) -> None:
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.shift = 0
        self.start: int | None = None
        self.numbered: set[fx.Node] = set()
        self._flow = flow
        self._pending: list[tuple[fx.Node | None, fx.Node | None]] = []
        self._align(first.reader, first.node, other.reader, other.node)
        if first.index is not None and other.index is not None:
            self._pending.append((first.index, other.index))
        while self._pending:
            self._compare(*self._pending.pop())

    def _compare(self, one: fx.Node | None, other: fx.Node | None) -> None:
        if one is None or other is None:
            raise Refusal("the experts of an unrolled loop are changed in place through a view")
        if one is other:
            return
        if one in self.nodes:
            if self.nodes[one] is not other:
                raise Refusal("the experts of an unrolled loop read their operands in different places")
            return
        if one.op != other.op or (one.op.startswith("call") and one.target != other.target):
            names = [op_name(node) or node.name for node in (one, other)]
            raise Refusal(f"the experts of an unrolled loop differ: '{names[0]}' in one, '{names[1]}' in another")
        self.nodes[one] = other
        if not one.op.startswith("call"):
            if shape_of(one) != shape_of(other) or dtype_of(one) != dtype_of(other):
                raise Refusal("the weights of an unrolled loop's experts differ in shape or dtype")
            return
        self._align(one, one.args, other, other.args)
        self._align(one, one.kwargs, other, other.kwargs)

    def _align(self, one: fx.Node, given: Any, other: fx.Node, its: Any) -> None:
        """Compares an argument of a node, or something in it, with that of its copy."""
        if isinstance(given, fx.Node) and isinstance(its, fx.Node):
            self._pending.append((self._flow.read(one, given), self._flow.read(other, its)))
        elif isinstance(given, slice) and isinstance(its, slice):
            for name in ("start", "stop", "step"):
                self._align(one, getattr(given, name), other, getattr(its, name))
        elif isinstance(given, (list, tuple)) and isinstance(its, (list, tuple)) and len(given) == len(its):
            for part, counterpart in zip(given, its, strict=True):
                self._align(one, part, other, counterpart)
        elif isinstance(given, dict) and isinstance(its, dict) and given.keys() == its.keys():
            for name in given:
                self._align(one, given[name], other, its[name])
        elif type(given) is int and type(its) is int and given != its and self.shift in (0, its - given):
            self.shift, self.start = its - given, given if self.start is None else self.start
            self.numbered |= {one, other}
        elif type(given) is not type(its) or given != its:
            raise Refusal(f"the experts of an unrolled loop differ: '{op_name(one)}' with {given} and with {its}")
