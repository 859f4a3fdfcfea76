"""Mask lifting: what a mask tensor of a joint graph means, as a `MaskSpec` instead of a tensor.

The mask node is read as a function of (b, h, q, k) (`mask_reader`), which gives a predicate
(`predicates`) that is sorted into the terms of a spec (`mask_terms`) and written down
(`mask_text`). Every step proves what it claims; what cannot be proved leaves the mask a tensor, with
the reason. Only functional graphs are read: where an operator writes in place, data flow alone lies.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch
from torch import fx

from s2o_inductor.mask_spec import EmptyRows, MaskSpec
from s2o_inductor.passes import rewrite
from s2o_inductor.passes.index_math import ZERO, Expr, IndexMath, linear_terms, size_expr
from s2o_inductor.passes.mask_reader import Reader, written_before
from s2o_inductor.passes.mask_terms import Classifier, Dense
from s2o_inductor.passes.mask_text import Unwritable, Writer
from s2o_inductor.passes.mask_values import Cases, Unreadable, is_constant, to_python
from s2o_inductor.passes.predicates import TRUE, Predicate

Shape = tuple[Any, Any, Any, Any]

# An added value at or below this hides a position, and swallows any score: a row of nothing else
# averages its values. float16 has no such finite value.
SWALLOWS = -1e30
# At or below this it hides a position next to a visible one: exp of the difference is 0.
HIDES = -1e4


@dataclasses.dataclass(frozen=True)
class LiftedMask:
    """A mask as a predicate.

    Attributes:
        spec: the terms.
        leaves: nodes of L0, L1, ...: tensors of at most a few rows of the mask.
        params: p0, p1, ...: nodes that hold a SymInt, in front of the mask in the graph.
    """

    spec: MaskSpec
    leaves: tuple[fx.Node, ...]
    params: tuple[int | fx.Node, ...]


def lift_mask(node: fx.Node, *, kind: str, shape: Shape, empty: EmptyRows) -> LiftedMask | str:
    """One mask of a graph; `MaskLifter` shares work between the masks of a graph.

    Args:
        node: a tensor that broadcasts to `shape`, in a functional ATen graph with fake values in ``meta["val"]``.
        kind: "visible" (boolean, True is seen), "hidden" (boolean, True is not) or "additive" (a float).
        shape: (B, H, Sq, Sk) of the scores, int or SymInt.
        empty: what the source gives for a row that sees no key.

    Returns:
        The lifted mask, or the reason why the mask stays a tensor.
    """
    return MaskLifter(node.graph).lift_node(node, kind, shape, MaskSpec(empty=empty))


class MaskLifter:
    """Lifts the masks of one graph; one that several layers share is lifted once."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._lifted: dict[Any, LiftedMask | str] = {}
        self._readers: dict[Any, Reader] = {}

    def lift(self, attention: fx.Node, mask: fx.Node, spec: MaskSpec, kind: str) -> LiftedMask | str:
        """The mask of an `s2o::attention` or `s2o::attention_backward` node, together with the terms of its spec."""
        return self.lift_node(mask, kind, rewrite.sizes(attention), spec)

    def lift_node(self, mask: fx.Node, kind: str, shape: Shape, spec: MaskSpec) -> LiftedMask | str:
        """`lift_mask`, with a spec whose band applies as well and whose `empty` is the source's."""
        if kind not in ("visible", "hidden", "additive"):
            raise ValueError(f"kind must be 'visible', 'hidden' or 'additive'; got {kind!r}")
        sizes = tuple(size_expr(size) for size in shape)
        key = (mask, kind, sizes, spec)
        if key not in self._lifted:
            self._lifted[key] = self._lift(mask, kind, sizes, spec)
        return self._lifted[key]

    def _lift(self, mask: fx.Node, kind: str, sizes: tuple[Expr, ...], spec: MaskSpec) -> LiftedMask | str:
        reason = ""
        # Leaves far from the mask leave more to prove with; nearer ones hide what has no term.
        for eager_leaves in (False, True):
            reader = self._reader(mask, sizes, eager_leaves)
            try:
                return _Lifting(reader, mask, kind, spec).run()
            except (Dense, Unreadable, Unwritable) as refusal:
                reason = reason or str(refusal)
        return reason

    def _reader(self, mask: fx.Node, sizes: tuple[Expr, ...], eager_leaves: bool) -> Reader:
        unsafe = written_before(self.graph, mask)
        key = (sizes, unsafe, eager_leaves)
        if key not in self._readers:
            fake_mode = getattr(mask.meta.get("val"), "fake_mode", None)
            index_math = IndexMath(getattr(fake_mode, "shape_env", None))
            batch, heads, queries, keys = sizes
            self._readers[key] = Reader((batch, heads, queries, keys), index_math, unsafe, eager_leaves)
        return self._readers[key]


class _Lifting:
    """One attempt at one mask."""

    def __init__(self, reader: Reader, mask: fx.Node, kind: str, spec: MaskSpec) -> None:
        self.reader, self.mask, self.kind, self.given = reader, mask, kind, spec
        self.logic, self.math = reader.logic, reader.math
        self._sizes_in_graph: dict[Expr, tuple[fx.Node, int, int]] | None = None

    def run(self) -> LiftedMask:
        """Raises Dense, Unreadable or Unwritable with the reason why the mask is not lifted."""
        visible, hiding = self._visible()
        visible = self.logic.all_of([visible, *self._given_band()])
        empty = self._empty_rows(visible, hiding)
        writer = Writer(self.logic, self.reader.leaves, self.reader.sizes, self._find_size)
        index = self.reader.index
        spec = Classifier(self.logic, (index[0], index[1], index[2], index[3]), writer).spec(visible)
        return LiftedMask(dataclasses.replace(spec, empty=empty), tuple(writer.leaves), tuple(writer.params))

    def _visible(self) -> tuple[Predicate, set[float]]:
        """Where the mask lets a key be seen, and the values that an additive one adds elsewhere."""
        place = self._place()
        is_bool = self.reader.dtype(self.mask) == torch.bool
        if is_bool == (self.kind == "additive"):
            raise Dense(f"a mask of kind {self.kind!r} cannot have dtype {self.reader.dtype(self.mask)}")
        value = self.reader.read(self.mask, place)
        if not isinstance(value, Cases):
            return (self.logic.negate(value) if self.kind == "hidden" else value), set()
        hidden, hiding = [], set()
        for guard, scalar in value.parts:
            if not is_constant(scalar):
                raise Dense(f"it adds a bias that depends on positions or data, such as {scalar}")
            number = float(to_python(scalar))
            if number == 0:
                continue
            if not number <= HIDES:
                raise Dense(f"it adds {number} to some scores: a bias, not a mask")
            hidden.append(guard)
            hiding.add(number)
        return self.logic.negate(self.logic.any_of(hidden)), hiding

    def _place(self) -> list[Expr]:
        """The mask's index at (b, h, q, k): 0 where it broadcasts."""
        own, shape = self.reader.sizes(self.mask), self.reader.shape
        if len(own) > 4:
            raise Dense(f"it has {len(own)} dimensions")
        place = []
        for size, full, variable in zip(own, shape[4 - len(own) :], self.reader.index[4 - len(own) :], strict=True):
            if size != 1 and not self.math.equal(size, full):
                raise Dense(f"its size {size} is not proved to be that of the scores, {full}")
            place.append(ZERO if size == 1 else variable)
        return place

    def _given_band(self) -> list[Predicate]:
        """The band that the attention op applies beside its mask."""
        given = self.given
        if given.keys or given.rows or given.equal or given.at_most:
            raise Dense("the attention has another lifted mask")
        distance = self.reader.index[3] - self.reader.index[2]
        parts = []
        for text, sign in ((given.upper, -1), (given.lower, 1)):
            if text is not None:
                try:
                    limit = int(text)
                except ValueError:
                    raise Dense(f"the attention has a band of symbolic width, {text}") from None
                parts.append(self.logic.at_least_zero(sign * (distance - limit)))
        return parts

    # ---- rows that see nothing ------------------------------------------------------------------

    def _empty_rows(self, visible: Predicate, hiding: set[float]) -> EmptyRows:
        if self._no_row_is_empty(visible):
            return "zero"
        finite = {value for value in hiding if value != float("-inf")}
        if not finite:
            return self.given.empty
        banded = self.given.upper is not None or self.given.lower is not None
        if len(hiding) > 1 or banded or max(finite) > SWALLOWS:
            raise Dense(
                f"it adds {sorted(hiding)} to hide keys, and a row may have no other key: its result depends on scores"
            )
        return "shifted"

    def _no_row_is_empty(self, visible: Predicate) -> bool:
        """Whether every query provably sees the key at its own position, the aligned one, or an end."""
        _, _, queries, keys = self.reader.shape
        _, _, q, k = self.reader.index
        if visible == TRUE or k == ZERO:
            return visible == TRUE
        for candidate in (q, q + keys - queries, ZERO, keys - 1):
            inside = self.math.nonnegative(candidate) and self.math.nonnegative(keys - 1 - candidate)
            if inside and self.logic.substitute(visible, {k: sympy.expand(candidate)}) == TRUE:
                return True
        return False

    # ---- sizes --------------------------------------------------------------------------------

    def _find_size(self, symbol: Expr) -> tuple[fx.Node, int, int] | None:
        """(node, factor, offset) with symbol == factor * node + offset, the node being in front of the mask."""
        if self._sizes_in_graph is None:
            self._sizes_in_graph = {}
            for node in self.mask.graph.nodes:
                if node is self.mask:
                    break
                if isinstance(node.meta.get("val"), torch.SymInt):
                    self._note_size(node)
        return self._sizes_in_graph.get(symbol)

    def _note_size(self, node: fx.Node) -> None:
        assert self._sizes_in_graph is not None
        terms = linear_terms(sympy.expand(size_expr(node.meta["val"])))
        offset = int(terms.pop(sympy.S.One, 0))
        if len(terms) != 1:
            return
        (symbol, factor), = terms.items()  # fmt: skip
        if not symbol.is_Symbol or abs(factor) != 1:
            return
        known = self._sizes_in_graph.get(symbol)
        # node == factor * symbol + offset; the symbol itself is the plainest.
        if known is None or (known[1:] != (1, 0) and (factor, offset) == (1, 0)):
            self._sizes_in_graph[symbol] = (node, int(factor), int(-factor * offset))
